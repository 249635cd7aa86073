#include "evict.h"

#include "codec.h"
#include "trace.h"
#include "wire.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum {
    POOL_SHARE_FIRST = 2,       /* the pool may hold half of the ExCache at first, */
    POOL_SHARE_MOST = 4,        /* and never the last quarter */
    POOL_LEAST = 2,             /* segments */
    READ_POINTS = 30,           /* a READ costs about 15 unpackings; twice that served gawk and sqlite3 best */
    PLAIN_READ_POINTS = 15,     /* for sort, which the pool does not serve; more harmed what it does serve */
    SEGMENT_POINTS = 32,        /* so many move the pool's limit by a segment */
    AHEAD_SLOTS = 2 * AHEAD_PAGES, /* for these pages, and some of a segment that is spilled because of them */
    STAMP_EVICTIONS = 16,       /* stamps of packed pages count evictions, so many at a time */
};

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
    l->where[page] = flags & PACKABLE ? l->departures : (uint32_t)l->count->evictions;
    lines_set_state(l, page, REMOTE | flags);
}

/* A clean slot may also be a copy that was made for evict_store_all. */
static bool is_at(const struct lines *l, size_t page, size_t slot)
{
    return page != NO_OWNER && (l->state[page] & STATE_MASK) == BUFFERED && l->where[page] == slot;
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
        if (slot->state != SLOT_CLEAN && slot->state != SLOT_FREE)
            continue;
        if (slot->state == SLOT_CLEAN && is_at(l, slot->page, index))
            depart(l, slot->page);
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

/* If the page went not long ago, it would still be in a pool that were larger by the whole ExCache; or, if it cannot be
 * packed, mapped, if pages like it had what the pool holds now. */
void evict_weigh_read(struct lines *l, size_t page)
{
    size_t held = pool_pages(&l->pool);
    if (!held)
        return;
    if (!(l->state[page] & PACKABLE)) {
        if ((uint32_t)l->count->evictions - l->where[page] < held)
            pool_share(l, -PLAIN_READ_POINTS);
    } else if (l->departures - l->where[page] < l->budget * l->pool.pages / held) {
        pool_share(l, READ_POINTS);
    }
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

/* Find another place for a page that has just lost its line (and cannot be written to any more). */
static void shelve(struct lines *l, size_t page, const char *data)
{
    static uint8_t packed[CODEC_ROOM];
    if (!(l->state[page] & DIRTY))
        lines_learn(l, page, false);
    unsigned flags = l->state[page];
    bool pack = l->unpacked ? (flags & (DIRTY | STORED)) == DIRTY : flags & (DIRTY | STORED);
    size_t bytes = pack ? codec_pack((const uint64_t *)data, packed) : 0;
    l->count->evictions++;
    if (!(flags & STORED) && (!(flags & DIRTY) || bytes == CODEC_ZEROS)) {
        lines_set_state(l, page, UNTOUCHED);
        l->count->zero_drops++;
    } else if (bytes && !l->unpacked) {
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

/* The page keeps its line, but not its place in the page table. */
static void doze(struct lines *l, size_t page, const char *data)
{
    memcpy(lines_frame(l, page), data, PAGE_SIZE);
    lines_set_state(l, page, DOZING | (l->state[page] & (STORED | DIRTY)));
    l->count->dozes++;
}

/* A mapped page, even if the program has taken away its own permission to read it. */
static const char *bytes_of(struct lines *l, size_t page)
{
    static char copy[PAGE_SIZE] __attribute__((aligned(PAGE_SIZE)));
    const char *data = arena_address(l->arena, page);
    if (!bit_test(l->arena->unreadable, page))
        return data;
    int memory = open("/proc/self/mem", O_RDONLY | O_CLOEXEC);
    if (memory < 0 || pread(memory, copy, PAGE_SIZE, (off_t)(uintptr_t)data) != PAGE_SIZE)
        lines_die("the ExCache is full of pages without read permission: %s", strerror(errno));
    close(memory);
    return copy;
}

/* Take mapped pages out of the page table, neighbours together, and hand each to `next` before it goes. */
static void withdraw(struct lines *l, uint32_t *page, size_t n, void (*next)(struct lines *, size_t, const char *))
{
    qsort(page, n, sizeof *page, by_number);
    for (size_t i = 0; i < n;) {
        size_t k = 1;
        unsigned dirty = l->state[page[i]] & DIRTY;
        while (i + k < n && page[i + k] == page[i] + k && (l->state[page[i + k]] & DIRTY) == dirty)
            k++;
        if (dirty)
            lines_protect(l, page[i], k, true); /* a store meanwhile would be lost: it waits */
        for (size_t j = 0; j < k; j++)
            next(l, page[i] + j, bytes_of(l, page[i] + j));
        lines_unmap(l, page[i], k);
        i += k;
    }
}

void evict_release_line(struct lines *l, size_t page)
{
    if ((l->state[page] & STATE_MASK) == DOZING)
        lines_release_frame(lines_frame(l, page));
    sets_remove(&l->sets, page);
    l->lined--;
}

/* The page of a set that is to leave: what nobody may read only when there is nothing else, it costs more. */
static size_t choose(struct lines *l, size_t set)
{
    size_t page = sets_choose(&l->sets, set);
    for (size_t others = l->sets.set[set].count; others && bit_test(l->arena->unreadable, page); others--) {
        if ((l->state[page] & STATE_MASK) == DOZING)
            break;
        sets_renew(&l->sets, page);
        page = sets_oldest(&l->sets, set);
    }
    return page;
}

/* LRU: let the oldest lines of a set doze. */
static void sample(struct lines *l, size_t set)
{
    uint32_t dozing[RUN_PAGES];
    size_t page, n = 0;
    while (sets_next_to_doze(&l->sets, set, &page)) {
        if (n == l->together) {
            withdraw(l, dozing, n, doze);
            n = 0;
        }
        dozing[n++] = (uint32_t)page;
    }
    withdraw(l, dozing, n, doze);
}

struct victims {
    uint32_t page[RUN_PAGES];
    size_t n;
};

static void send_away(struct lines *l, struct victims *victims)
{
    withdraw(l, victims->page, victims->n, shelve);
    victims->n = 0;
    wire_flush(l, wire_fair_share(l, 1));
}

/* Free so many lines of a set. Those that were mapped are noted, to leave together. */
static void evict(struct lines *l, size_t set, size_t lines, struct victims *victims)
{
    for (; lines && l->sets.set[set].count; lines--) {
        size_t page = choose(l, set);
        if ((l->state[page] & STATE_MASK) == DOZING) {
            char *frame = lines_frame(l, page);
            sets_remove(&l->sets, page);
            l->lined--;
            shelve(l, page, frame);
            lines_release_frame(frame);
            continue;
        }
        evict_release_line(l, page);
        if (victims->n == l->together)
            send_away(l, victims);
        victims->page[victims->n++] = (uint32_t)page;
    }
}

/* One set: many leave at once, ahead of need, because that is cheaper. */
static void make_room_anywhere(struct lines *l, size_t count)
{
    struct victims victims = {.n = 0};
    while (l->lined + pool_pages(&l->pool) + count > l->budget) {
        evict(l, 0, l->together, &victims);
        send_away(l, &victims);
        sample(l, 0);
    }
}

static void make_room(struct lines *l, size_t page, size_t count)
{
    if (l->pool.held > l->pool_limit && l->pool.held > 1)
        spill(l, pool_oldest(&l->pool));
    if (l->sets.count == 1) {
        make_room_anywhere(l, count);
        return;
    }
    struct victims victims = {.n = 0};
    for (size_t i = 0; i < count && i < l->sets.count; i++) {
        size_t set = sets_of(&l->sets, page + i), more = (count - i + l->sets.count - 1) / l->sets.count;
        size_t room = l->sets.ways - l->sets.set[set].count;
        if (more > room)
            evict(l, set, more - room, &victims);
    }
    send_away(l, &victims);
    for (size_t i = 0; i < count && i < l->sets.count; i++)
        sample(l, sets_of(&l->sets, page + i));
}

void evict_make_room(struct lines *l, size_t page, size_t count)
{
    uint64_t begin = trace_begin(), before = l->count->evictions;
    make_room(l, page, count);
    if (l->count->evictions != before)
        trace_done(TRACE_EVICT, begin, page, l->count->evictions - before, 0, 0);
}

bool evict_ahead(struct lines *l)
{
    wire_reap(l, false);
    size_t taken = l->lined + pool_pages(&l->pool), slots = l->nslots - l->dirty_slots - l->flushing_slots;
    size_t needed = l->nslots / 4 < AHEAD_SLOTS ? l->nslots / 4 : AHEAD_SLOTS;
    size_t pages = needed * AHEAD_PAGES / AHEAD_SLOTS;
    if (l->sets.count > 1 || !l->lined || !pages || taken + l->run_most <= l->budget)
        return false;
    if (slots < needed) {
        if (!l->flushing_slots)
            wire_flush(l, 1); /* no blade may have its fair share waiting */
        return false; /* evicting might have to wait for them */
    }
    uint64_t begin = trace_begin(), before = l->count->evictions;
    struct victims victims = {.n = 0};
    evict(l, 0, pages, &victims);
    send_away(l, &victims);
    make_room_anywhere(l, 0); /* they may have needed a segment that is larger than what they left */
    sample(l, 0);
    l->count->evicted_ahead += l->count->evictions - before;
    trace_done(TRACE_EVICT, begin, 0, l->count->evictions - before, 0, 0);
    return true;
}

/* A slot from which the contents of a page go to its blade, while the page stays where it is. */
static char *copy_out(struct lines *l, size_t page)
{
    char *data = slot_data(l, take_slot(l, page, true));
    l->state[page] &= (uint8_t)~DIRTY;
    return data;
}

void evict_store_all(struct lines *l)
{
    for (size_t segment = 0; segment < l->pool.most; segment++)
        for (size_t at = 0, page; pool_next(&l->pool, segment, &at, &page);)
            if (l->state[page] & DIRTY)
                codec_unpack(pool_get(&l->pool, page), (uint64_t *)copy_out(l, page));
    for (size_t set = 0; l->sets.policy == POLICY_LRU && set < l->sets.count; set++)
        for (uint32_t i = l->sets.set[set].oldest; i && l->sets.line[i].dozing; i = l->sets.line[i].newer)
            if (l->state[l->sets.line[i].page] & DIRTY)
                memcpy(copy_out(l, l->sets.line[i].page), lines_frame(l, l->sets.line[i].page), PAGE_SIZE);
    lines_flush_all(l); /* a copy that went later might be older than what a page is then */
}

void evict_all(struct lines *l)
{
    bool unpacked = l->unpacked;
    l->unpacked = true; /* what is packed now would be unpacked at once */
    for (size_t set = 0; set < l->sets.count; set++) {
        struct victims victims = {.n = 0};
        evict(l, set, l->sets.set[set].count, &victims);
        send_away(l, &victims);
    }
    for (size_t segment = 0; segment < l->pool.most; segment++)
        spill(l, segment);
    l->unpacked = unpacked;
    lines_flush_all(l);
    for (size_t index = 0; index < l->nslots; index++) {
        if (is_at(l, l->slots[index].page, index))
            depart(l, l->slots[index].page);
        l->slots[index] = (struct slot){.page = NO_OWNER};
    }
}
