/* Packed pages, in memory that grows and shrinks: a log of segments, as log-structured file systems have.
 *
 * Packed pages have all lengths; a log leaves no gaps between them. What has been taken out leaves a hole; a segment
 * that has many is copied together before a new one is begun (some microseconds per page). Every segment counts whole,
 * with its holes and headers, so `pool_pages` is what the pool really holds of the ExCache.
 */
#ifndef RACKLESS_POOL_H
#define RACKLESS_POOL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { SEGMENT_PAGES = 4, SEGMENT_BYTES = SEGMENT_PAGES << 12 };

struct segment {
    uint32_t used, live;        /* bytes written; of these, not taken out */
    uint32_t age;               /* 0: holds no memory; otherwise a larger one was begun later */
};

struct pool {
    char *base;
    struct segment *segment;
    uint32_t *where;            /* by page: where it is in the pool, kept true when it moves */
    size_t most;                /* segments there can be */
    size_t held;                /* segments that hold memory */
    size_t open;                /* the one that is being filled */
    size_t live;                /* bytes, of all segments */
    size_t pages;               /* packed pages in them */
    uint32_t age;
};

/* Make an empty pool of at most `segments` segments. 0, or a negative errno. */
int pool_init(struct pool *pool, size_t segments, uint32_t *where);

/* Take in a page packed to `bytes` bytes; false if the open segment has no room for it. */
bool pool_put(struct pool *pool, size_t page, uint16_t stamp, const void *packed, size_t bytes);

/* The packed page at where[page] (some bytes after its end may be read), and the stamp it was put with. Forget it. */
const uint8_t *pool_get(const struct pool *pool, size_t page);
uint16_t pool_stamp(const struct pool *pool, size_t page);
void pool_remove(struct pool *pool, size_t page);

/* Begin a new segment; the pool must hold fewer than `most`. */
void pool_grow(struct pool *pool);

/* Make room for `bytes` packed bytes by copying the emptiest segment together, holding no more memory than before;
 * false, and nothing done, if its holes are too small for that. */
bool pool_compact(struct pool *pool, size_t bytes);

/* The segment that was begun first, except the open one; pool->most if there is none. */
size_t pool_oldest(const struct pool *pool);

/* The next page in a segment, from *at (begin with 0) on; false at its end. */
bool pool_next(const struct pool *pool, size_t segment, size_t *at, size_t *page);

/* Give the memory of a segment without live pages back. */
void pool_release(struct pool *pool, size_t segment);

static inline size_t pool_pages(const struct pool *pool)
{
    return pool->held * SEGMENT_PAGES;
}

#endif
