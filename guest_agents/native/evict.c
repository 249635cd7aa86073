#include "evict.h"

#include "codec.h"
#include "trace.h"
#include "wire.h"

#include <stdlib.h>
#include <string.h>

enum {
    POOL_SHARE_FIRST = 2,       /* the pool may hold half of the ExCache at first, */
    POOL_SHARE_MOST = 4,        /* and never the last quarter */
    POOL_LEAST = 2,             /* segments */
    READ_POINTS = 30,           /* a READ costs about 15 unpackings; twice that served gawk and sqlite3 best */
    SEGMENT_POINTS = 32,        /* so many move the pool's limit by a segment */
    STAMP_EVICTIONS = 16,       /* stamps of packed pages count evictions, so many at a time */
};

/* ---- the queue of mapped pages ---- */

static bool queue_valid(const struct lines *l, size_t position)
{
    uint32_t page = l->queue[position & l->queue_mask];
    return (l->state[page] & STATE_MASK) == MAPPED && l->where[page] == (uint32_t)position;
}

void evict_enqueue(struct lines *l, size_t page)
{
    if (l->tail - l->head > l->queue_mask) { /* full of stale entries: close the gaps */
        size_t to = l->head;
        for (size_t from = l->head; from != l->tail; from++) {
            if (!queue_valid(l, from))
                continue;
            uint32_t moved = l->queue[from & l->queue_mask];
            l->queue[to & l->queue_mask] = moved;
            l->where[moved] = (uint32_t)to++;
        }
        l->tail = to;
    }
    l->where[page] = (uint32_t)l->tail;
    l->queue[l->tail++ & l->queue_mask] = (uint32_t)page;
}

/* ---- the line buffer ---- */

static size_t slot_of_hand(struct lines *l)
{
    size_t slot = l->hand;
    l->hand = slot + 1 == l->nslots ? 0 : slot + 1;
    return slot;
}

void evict_release_slot(struct lines *l, size_t index)
{
    struct slot *slot = &l->slots[index];
    if (slot->state == SLOT_DIRTY) {
        l->dirty_slots--;
        l->dirty_on[region_of(l, slot->page)->at[0].link]--;
    }
    slot->page = NO_OWNER;
    if (slot->state != SLOT_FLUSHING)
        slot->state = SLOT_FREE;
}

/* From now on a page is at its memory blade only. */
static void depart(struct lines *l, size_t page)
{
    unsigned flags = l->state[page] & ~STATE_MASK;
    l->departures += (flags & PACKABLE) != 0;
    l->where[page] = l->departures;
    lines_set_state(l, page, REMOTE | flags);
}

/* A slot for `page`: the oldest that is free or clean. Its former page is then at its blade only. */
static size_t take_slot(struct lines *l, size_t page, bool dirty)
{
    for (size_t tries = 0;; tries++) {
        if (tries == l->nslots) {
            wire_flush(l, 1);
            wire_reap(l, true);
            tries = 0;
        }
        size_t index = slot_of_hand(l);
        struct slot *slot = &l->slots[index];
        if (slot->state == SLOT_CLEAN)
            depart(l, slot->page);
        else if (slot->state != SLOT_FREE)
            continue;
        *slot = (struct slot){.page = (uint32_t)page, .state = dirty ? SLOT_DIRTY : SLOT_CLEAN};
        l->dirty_slots += dirty;
        l->dirty_on[region_of(l, page)->at[0].link] += dirty;
        return index;
    }
}

static void buffered(struct lines *l, size_t page, size_t slot)
{
    unsigned flags = l->state[page];
    lines_set_state(l, page, BUFFERED | (flags & (STORED | PACKABLE)) | (flags & DIRTY ? WRITTEN : 0));
    l->where[page] = (uint32_t)slot;
}

/* ---- the pool ---- */

/* Empty a segment: unchanged pages are at their blades already, the others leave through the line buffer. */
static void spill(struct lines *l, size_t segment)
{
    for (size_t at = 0, page; pool_next(&l->pool, segment, &at, &page);) {
        l->count->spills++;
        if (!(l->state[page] & DIRTY)) {
            pool_remove(&l->pool, page);
            depart(l, page);
            continue;
        }
        size_t slot = take_slot(l, page, true);
        codec_unpack(pool_get(&l->pool, page), (uint64_t *)slot_data(l, slot));
        pool_remove(&l->pool, page);
        buffered(l, page, slot);
    }
}

static void make_segment(struct lines *l, size_t bytes)
{
    if (pool_compact(&l->pool, bytes))
        return;
    if (l->pool.held >= l->pool_limit)
        spill(l, pool_oldest(&l->pool));
    pool_grow(&l->pool);
    if (pool_pages(&l->pool) << PAGE_SHIFT > l->count->pool_bytes)
        l->count->pool_bytes = pool_pages(&l->pool) << PAGE_SHIFT;
}

static void pool_share(struct lines *l, int points)
{
    size_t most = l->budget - l->budget / POOL_SHARE_MOST;
    l->points += points;
    if (l->points >= SEGMENT_POINTS && (l->pool_limit + 1) * SEGMENT_PAGES <= most)
        l->pool_limit++;
    if (l->points <= -SEGMENT_POINTS && l->pool_limit > POOL_LEAST)
        l->pool_limit--;
    if (abs(l->points) >= SEGMENT_POINTS)
        l->points = 0;
}

/* If the page went not long ago, it would still be in a pool that were larger by the whole ExCache. */
void evict_weigh_read(struct lines *l, size_t page)
{
    size_t held = pool_pages(&l->pool);
    if (held && l->state[page] & PACKABLE && l->departures - l->where[page] < l->budget * l->pool.pages / held)
        pool_share(l, READ_POINTS);
}

static uint16_t stamp(const struct lines *l)
{
    return (uint16_t)(l->count->evictions / STAMP_EVICTIONS);
}

/* If the page was packed not long ago, it would still be mapped with so many more plain pages. */
void evict_weigh_unpacking(struct lines *l, size_t page)
{
    uint16_t age = stamp(l) - pool_stamp(&l->pool, page);
    if (age < l->budget / STAMP_EVICTIONS)
        pool_share(l, -1);
}

void evict_init(struct lines *l)
{
    l->pool_limit = l->budget / POOL_SHARE_FIRST / SEGMENT_PAGES;
}

/* ---- eviction ---- */

static int by_number(const void *a, const void *b)
{
    uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
    return x < y ? -1 : x > y;
}

/* Take one mapped page (already protected against writes) out of the books of mapped ones. */
static void shelve(struct lines *l, size_t page)
{
    static uint8_t packed[CODEC_ROOM];
    unsigned flags = l->state[page];
    const char *data = arena_address(l->arena, page);
    l->mapped--;
    size_t bytes = flags & (DIRTY | STORED) ? codec_pack((const uint64_t *)data, packed) : 0;
    if (!(flags & STORED) && (!(flags & DIRTY) || bytes == CODEC_ZEROS)) {
        lines_set_state(l, page, UNTOUCHED);
        l->count->zero_drops++;
    } else if (bytes) {
        while (!pool_put(&l->pool, page, stamp(l), packed, bytes))
            make_segment(l, bytes);
        lines_set_state(l, page, PACKED | PACKABLE | (flags & (STORED | DIRTY)));
        l->count->packed++;
        l->count->packed_bytes += bytes;
    } else {
        size_t slot = take_slot(l, page, flags & DIRTY);
        memcpy(slot_data(l, slot), data, PAGE_SIZE);
        l->state[page] &= (uint8_t)~PACKABLE;
        buffered(l, page, slot);
    }
}

static void evict(struct lines *l)
{
    uint32_t victim[EVICT_PAGES];
    size_t n = 0;
    for (size_t looked = l->tail - l->head; looked && n < EVICT_PAGES; looked--) {
        size_t position = l->head++;
        if (!queue_valid(l, position))
            continue;
        uint32_t page = l->queue[position & l->queue_mask];
        if (bit_test(l->arena->unreadable, page))
            evict_enqueue(l, page);
        else
            victim[n++] = page;
    }
    if (!n)
        lines_die("the ExCache is full of pages without read permission");
    uint64_t begin = trace_begin();
    qsort(victim, n, sizeof *victim, by_number);
    for (size_t i = 0; i < n;) {
        size_t k = 1;
        unsigned dirty = l->state[victim[i]] & DIRTY;
        while (i + k < n && victim[i + k] == victim[i] + k && (l->state[victim[i + k]] & DIRTY) == dirty)
            k++;
        if (dirty)
            lines_protect(l, victim[i], k, true);
        for (size_t j = 0; j < k; j++)
            shelve(l, victim[i] + j);
        lines_unmap(l, victim[i], k);
        i += k;
    }
    l->count->evictions += n;
    trace_done(TRACE_EVICT, begin, victim[0], n, 0, 0);
    wire_flush(l, wire_fair_share(l, 1));
}

void evict_make_room(struct lines *l, size_t pages)
{
    if (l->pool.held > l->pool_limit && l->pool.held > 1)
        spill(l, pool_oldest(&l->pool));
    while (l->mapped + pool_pages(&l->pool) + pages > l->budget)
        evict(l);
}
