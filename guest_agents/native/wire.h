/* What the ExCache sends and receives: READs for misses, batches of WRITEs for flushes. One thread at a time. */
#ifndef RACKLESS_WIRE_H
#define RACKLESS_WIRE_H

#include "lines.h"

/* Ask for `count` pages, which lie in one vRegion, from its first place into registered memory, as request `id`; and
 * behind that, if `flush`, send up to FLUSH_PAGES dirty pages of that blade. */
void wire_read(struct lines *l, size_t page, size_t count, char *to, unsigned id, bool flush);

/* Whether READ `id` has been answered by now. */
bool wire_answered(struct lines *l, unsigned id);

/* Wait for READ `id`, or something else, to be answered, and ask another blade if it failed. */
void wire_wait(struct lines *l, unsigned id);

/* Wait until READ `id` has been answered, by another blade if need be. */
void wire_await(struct lines *l, unsigned id);

/* Copy `n` <= l->together pages of one vRegion from its first to its second place, by way of l->landing: two round trips.
 * False if the second blade was lost before it had them all. */
bool wire_copy(struct lines *l, const size_t *page, uint32_t n);

/* What was under way to this blade has failed: its queue pair has gone. */
void wire_give_up(struct lines *l, uint32_t link);

/* Start flushing the blades that have at least so many dirty pages waiting. */
void wire_flush(struct lines *l, size_t at_least);

/* Dirty pages of one blade that may wait in the buffer before they are flushed: a hot one should have the time to be
 * touched again. Divided by two, those worth sending along with a READ to that blade. */
size_t wire_fair_share(const struct lines *l, size_t divisor);

/* Wait until no flush is under way. */
void wire_settle(struct lines *l);

/* Take note of what has completed; if `wait` and something is under way, of one thing at least. */
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
