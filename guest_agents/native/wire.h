/* What the ExCache sends and receives: READs for misses, batches of WRITEs for flushes. One thread at a time. */
#ifndef RACKLESS_WIRE_H
#define RACKLESS_WIRE_H

#include "lines.h"

enum { ID_MISS = 1, ID_PEEK = 2 }; /* kinds of READ: index of lines->landed */

/* A READ of `count` pages, which lie in one vRegion, into registered memory; to be posted. */
struct ibv_send_wr wire_read(struct lines *l, size_t page, size_t count, struct ibv_sge *sge, char *to, uint64_t id);

/* Post `read` (may be NULL) and, behind it, up to FLUSH_PAGES dirty pages of that blade, oldest first: one system
 * call, one wait. Adjacent pages share a WRITE. Returns the number of pages flushed. */
uint32_t wire_post(struct lines *l, uint32_t link, struct ibv_send_wr *read, bool flush);

/* Start flushing the blades that have at least so many dirty pages waiting. */
void wire_flush(struct lines *l, size_t at_least);

/* Dirty pages of one blade that may wait in the buffer before they are flushed: a hot one should have the time to be
 * touched again. Divided by two, those worth sending along with a READ to that blade. */
size_t wire_fair_share(const struct lines *l, size_t divisor);

/* Take note of what has completed; if `wait`, of one thing at least. */
void wire_reap(struct lines *l, bool wait);

static inline char *slot_data(const struct lines *l, size_t slot)
{
    return l->buffer + (slot << PAGE_SHIFT);
}

static inline struct region *region_of(const struct lines *l, size_t page)
{
    return &l->region[page / REGION_PAGES];
}

#endif
