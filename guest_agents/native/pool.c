#define _GNU_SOURCE
#include "pool.h"

#include "arena.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>

enum {
    GONE = UINT32_MAX,          /* page number of an entry that was taken out */
    UNIT = 8,                   /* entries start at multiples of it, and are numbered by them */
    LEAST_GAIN = SEGMENT_BYTES / 8, /* bytes for which a segment is worth copying */
    ROOM = SEGMENT_BYTES - 8,   /* for entries: some bytes after the last one may be read */
};

struct entry {
    uint32_t page;
    uint16_t bytes;             /* of the whole entry, a multiple of UNIT */
    uint16_t stamp;
    uint8_t packed[];
};

static size_t whole_entry(size_t bytes)
{
    return (sizeof(struct entry) + bytes + UNIT - 1) & ~(size_t)(UNIT - 1);
}

static struct entry *entry_at(const struct pool *pool, size_t segment, size_t offset)
{
    return (struct entry *)(pool->base + segment * SEGMENT_BYTES + offset);
}

static struct entry *entry_of(const struct pool *pool, size_t page)
{
    return (struct entry *)(pool->base + (size_t)pool->where[page] * UNIT);
}

int pool_init(struct pool *pool, size_t segments, uint32_t *where)
{
    size_t bytes = segments * SEGMENT_BYTES;
    *pool = (struct pool){.most = segments, .open = segments, .where = where};
    pool->base = raw_memory(bytes);
    pool->segment = raw_memory(segments * sizeof *pool->segment);
    if (!pool->base || !pool->segment)
        return -ENOMEM;
    madvise(pool->base, bytes, MADV_NOHUGEPAGE); /* a huge page would hold more than we count */
    madvise(pool->base, bytes, MADV_DONTFORK);   /* a forked child's pages come from its parent's pager */
    return 0;
}

bool pool_put(struct pool *pool, size_t page, uint16_t stamp, const void *packed, size_t bytes)
{
    size_t whole = whole_entry(bytes);
    if (pool->open == pool->most || pool->segment[pool->open].used + whole > ROOM)
        return false;
    struct segment *segment = &pool->segment[pool->open];
    struct entry *entry = entry_at(pool, pool->open, segment->used);
    *entry = (struct entry){(uint32_t)page, (uint16_t)whole, stamp};
    memcpy(entry->packed, packed, bytes);
    pool->where[page] = (uint32_t)((size_t)((char *)entry - pool->base) / UNIT);
    segment->used += (uint32_t)whole;
    segment->live += (uint32_t)whole;
    pool->live += whole;
    pool->pages++;
    return true;
}

const uint8_t *pool_get(const struct pool *pool, size_t page)
{
    return entry_of(pool, page)->packed;
}

uint16_t pool_stamp(const struct pool *pool, size_t page)
{
    return entry_of(pool, page)->stamp;
}

void pool_remove(struct pool *pool, size_t page)
{
    struct entry *entry = entry_of(pool, page);
    size_t number = (size_t)pool->where[page] * UNIT / SEGMENT_BYTES;
    entry->page = GONE;
    pool->segment[number].live -= entry->bytes;
    pool->live -= entry->bytes;
    pool->pages--;
    if (!pool->segment[number].live && number != pool->open)
        pool_release(pool, number);
}

void pool_grow(struct pool *pool)
{
    size_t number = 0;
    while (pool->segment[number].age)
        number++;
    size_t full = pool->open;
    pool->segment[number].age = ++pool->age;
    pool->open = number;
    pool->held++;
    if (full < pool->most && !pool->segment[full].live)
        pool_release(pool, full);
}

bool pool_compact(struct pool *pool, size_t bytes)
{
    size_t emptiest = pool->most, gain = whole_entry(bytes);
    for (size_t i = 0; i < pool->most; i++)
        if (pool->segment[i].age && i != pool->open &&
            (emptiest == pool->most || pool->segment[i].live < pool->segment[emptiest].live))
            emptiest = i;
    gain = gain < LEAST_GAIN ? LEAST_GAIN : gain;
    if (emptiest == pool->most || pool->segment[emptiest].live + gain > ROOM)
        return false;
    /* A copy, so that the segment itself can be filled anew: nothing more is held meanwhile. */
    static char copy[SEGMENT_BYTES];
    size_t used = pool->segment[emptiest].used;
    memcpy(copy, entry_at(pool, emptiest, 0), used);
    pool->live -= pool->segment[emptiest].live;
    pool->segment[emptiest] = (struct segment){.age = ++pool->age};
    size_t full = pool->open;
    pool->open = emptiest;
    if (!pool->segment[full].live)
        pool_release(pool, full);
    for (size_t at = 0; at < used; at += ((struct entry *)(copy + at))->bytes) {
        struct entry *entry = (struct entry *)(copy + at);
        if (entry->page == GONE)
            continue;
        pool_put(pool, entry->page, entry->stamp, entry->packed, entry->bytes - sizeof *entry);
        pool->pages--; /* it was counted already */
    }
    return true;
}

size_t pool_oldest(const struct pool *pool)
{
    size_t oldest = pool->most;
    for (size_t i = 0; i < pool->most; i++)
        if (pool->segment[i].age && i != pool->open &&
            (oldest == pool->most || pool->segment[i].age < pool->segment[oldest].age))
            oldest = i;
    return oldest;
}

bool pool_next(const struct pool *pool, size_t segment, size_t *at, size_t *page)
{
    while (*at < pool->segment[segment].used) {
        struct entry *entry = entry_at(pool, segment, *at);
        *at += entry->bytes;
        if (entry->page != GONE) {
            *page = entry->page;
            return true;
        }
    }
    return false;
}

void pool_release(struct pool *pool, size_t segment)
{
    pool->segment[segment] = (struct segment){0};
    pool->held--;
    madvise(pool->base + segment * SEGMENT_BYTES, SEGMENT_BYTES, MADV_DONTNEED);
}
