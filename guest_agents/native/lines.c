#define _GNU_SOURCE
#include "lines.h"

#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <linux/userfaultfd.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum {
    BUFFER_SHARE = 8,       /* the line buffer is an eighth of the ExCache */
    EVICT_PAGES = 32,       /* evicted at a time */
    EVICT_AHEAD = 4,        /* evicted while a READ is on its way */
    BATCHES_PER_LINK = 3,   /* 3 x 64 work requests stay below FABRIC_DEPTH */
    SGES = 16,
};

enum { ID_MISS = 1, ID_PEEK = 2, ID_BATCH = 16 };

static const char zeros[RUN_PAGES * PAGE_SIZE] __attribute__((aligned(PAGE_SIZE)));

_Noreturn void lines_die(const char *format, ...)
{
    char text[512] = "rackless: ";
    va_list args;
    va_start(args, format);
    vsnprintf(text + 10, sizeof text - 12, format, args);
    va_end(args);
    strcat(text, "\n");
    if (write(STDERR_FILENO, text, strlen(text)) < 0) {
        /* nobody to tell */
    }
    syscall(SYS_exit_group, 70); /* EX_SOFTWARE: with no exit handlers, which might touch lost memory */
    __builtin_unreachable();
}

static uint64_t nanoseconds(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static size_t slot_of_hand(struct lines *l)
{
    size_t slot = l->hand;
    l->hand = slot + 1 == l->nslots ? 0 : slot + 1;
    return slot;
}

static char *slot_data(const struct lines *l, size_t slot)
{
    return l->buffer + (slot << PAGE_SHIFT);
}

static struct region *region_of(const struct lines *l, size_t page)
{
    return &l->region[page / REGION_PAGES];
}

static void set_state(struct lines *l, size_t page, unsigned state)
{
    bool had = (l->state[page] & STATE_MASK) != UNTOUCHED, has = (state & STATE_MASK) != UNTOUCHED;
    l->contents += (size_t)has - (size_t)had;
    if (l->contents > l->count->pages_touched)
        l->count->pages_touched = l->contents;
    l->state[page] = (uint8_t)state;
}

/* ---- the queue of mapped pages ---- */

static bool queue_valid(const struct lines *l, size_t position)
{
    uint32_t page = l->queue[position & l->queue_mask];
    return (l->state[page] & STATE_MASK) == MAPPED && l->where[page] == (uint32_t)position;
}

static void queue_push(struct lines *l, size_t page)
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

static void map(struct lines *l, size_t page, unsigned flags)
{
    set_state(l, page, MAPPED | flags);
    l->mapped++;
    queue_push(l, page);
}

/* ---- completions ---- */

static void complete_batch(struct lines *l, unsigned index)
{
    struct batch *batch = &l->batch[index];
    for (uint32_t i = 0; i < batch->count; i++) {
        struct slot *slot = &l->slots[batch->slot[i]];
        slot->state = slot->page == NO_OWNER ? SLOT_FREE : SLOT_CLEAN;
    }
    l->free_batches |= 1u << index;
    l->batches_on[batch->link]--;
}

static void reap(struct lines *l, bool wait)
{
    struct ibv_wc wc[8];
    int got = wait ? fabric_wait(&l->fabric, wc, 8) : fabric_poll(&l->fabric, wc, 8);
    if (got < 0)
        lines_die("waiting for a memory blade failed: %s", strerror(-got));
    for (int i = 0; i < got; i++) {
        if (wc[i].status != IBV_WC_SUCCESS) {
            const char *name = "a memory blade";
            for (uint32_t k = 0; k < l->monitor.blades; k++)
                if (l->link[k].qp->qp_num == wc[i].qp_num)
                    name = l->monitor.name[k];
            lines_die("memory blade %s is lost (%s): the program's memory is no longer whole, it ends here", name,
                      ibv_wc_status_str(wc[i].status));
        }
        if (wc[i].wr_id >= ID_BATCH)
            complete_batch(l, (unsigned)(wc[i].wr_id - ID_BATCH));
        else
            l->landed[wc[i].wr_id] = true;
    }
}

/* ---- flushing ---- */

static int by_page(const void *a, const void *b)
{
    const struct { uint32_t page, slot; } *x = a, *y = b;
    return x->page < y->page ? -1 : x->page > y->page;
}

/* Post `read` (may be NULL) and, behind it, up to FLUSH_PAGES dirty pages of that blade, oldest first: one system
 * call, one wait. Adjacent pages share a WRITE. Returns the number of pages flushed. */
static uint32_t post(struct lines *l, uint32_t link, struct ibv_send_wr *read, bool flush)
{
    static struct ibv_send_wr wr[FLUSH_PAGES];
    static struct ibv_sge sge[FLUSH_PAGES];
    static struct { uint32_t page, slot; } dirty[FLUSH_PAGES];
    uint32_t n = 0, requests = 0;
    if (flush && l->free_batches && l->batches_on[link] < BATCHES_PER_LINK) {
        for (size_t i = 0, slot = l->hand; i < l->nslots && n < FLUSH_PAGES; i++) {
            if (l->slots[slot].state == SLOT_DIRTY && region_of(l, l->slots[slot].page)->link == link) {
                dirty[n].page = l->slots[slot].page;
                dirty[n++].slot = (uint32_t)slot;
            }
            slot = slot + 1 == l->nslots ? 0 : slot + 1;
        }
        qsort(dirty, n, sizeof *dirty, by_page);
    }
    unsigned index = n ? (unsigned)__builtin_ctz(l->free_batches) : 0;
    for (uint32_t i = 0; i < n; i++) {
        uint32_t page = dirty[i].page, slot = dirty[i].slot;
        struct region *region = region_of(l, page);
        sge[i] = (struct ibv_sge){(uintptr_t)slot_data(l, slot), PAGE_SIZE, l->fabric.mr->lkey};
        bool joins = i && dirty[i - 1].page + 1 == page && page % REGION_PAGES && wr[requests - 1].num_sge < SGES;
        if (joins) {
            wr[requests - 1].num_sge++;
        } else {
            wr[requests] = (struct ibv_send_wr){
                .wr_id = ID_BATCH + index,
                .sg_list = &sge[i],
                .num_sge = 1,
                .opcode = IBV_WR_RDMA_WRITE,
                .wr.rdma = {region->address + ((uint64_t)(page % REGION_PAGES) << PAGE_SHIFT), region->rkey},
            };
            if (requests)
                wr[requests - 1].next = &wr[requests];
            requests++;
        }
        l->slots[slot].state = SLOT_FLUSHING;
        l->state[page] |= STORED;
        l->batch[index].slot[i] = slot;
    }
    if (n) {
        wr[requests - 1].send_flags = IBV_SEND_SIGNALED;
        l->batch[index].count = n;
        l->batch[index].link = link;
        l->free_batches &= ~(1u << index);
        l->batches_on[link]++;
        l->dirty_slots -= n;
        l->dirty_on[link] -= n;
        l->count->flushes += n;
        l->count->writes += requests;
        l->count->bytes_out += (uint64_t)n << PAGE_SHIFT;
        l->count->blade[link].flushes += n;
        l->count->blade[link].bytes_out += (uint64_t)n << PAGE_SHIFT;
        if (read) {
            read->next = wr;
            l->count->piggybacks++;
        }
    }
    struct ibv_send_wr *first = read ? read : n ? wr : NULL, *bad;
    int error = first ? ibv_post_send(l->link[link].qp, first, &bad) : 0;
    if (error)
        lines_die("posting to memory blade %s failed: %s", l->monitor.name[link], strerror(error));
    return n;
}

/* Dirty pages of one blade that may wait in the buffer before they are flushed: those of a hot page's owner should
 * have the time to be touched again. With a READ to the same blade under way, half as many are sent along. */
static size_t fair_share(const struct lines *l, size_t divisor)
{
    return l->nslots * 3 / 4 / l->monitor.blades / divisor;
}

static void flush(struct lines *l, size_t at_least)
{
    for (uint32_t link = 0; link < l->monitor.blades; link++)
        while (l->dirty_on[link] >= at_least && post(l, link, NULL, true) > 0) {
        }
}

void lines_flush_all(struct lines *l)
{
    while (l->dirty_slots || l->free_batches != (1u << FLUSH_BATCHES) - 1) {
        flush(l, 1);
        reap(l, true);
    }
}

/* ---- the line buffer ---- */

static void release_slot(struct lines *l, size_t index)
{
    struct slot *slot = &l->slots[index];
    if (slot->state == SLOT_DIRTY) {
        l->dirty_slots--;
        l->dirty_on[region_of(l, slot->page)->link]--;
    }
    slot->page = NO_OWNER;
    if (slot->state != SLOT_FLUSHING)
        slot->state = SLOT_FREE;
}

/* A slot for `page`: the oldest that is free or clean. Its former page is then at its blade only. */
static size_t take_slot(struct lines *l, size_t page, bool dirty)
{
    for (size_t tries = 0;; tries++) {
        if (tries == l->nslots) {
            flush(l, 1);
            reap(l, true);
            tries = 0;
        }
        size_t index = slot_of_hand(l);
        struct slot *slot = &l->slots[index];
        if (slot->state == SLOT_CLEAN)
            set_state(l, slot->page, REMOTE | (l->state[slot->page] & ~STATE_MASK));
        else if (slot->state != SLOT_FREE)
            continue;
        *slot = (struct slot){.page = (uint32_t)page, .state = dirty ? SLOT_DIRTY : SLOT_CLEAN};
        l->dirty_slots += dirty;
        l->dirty_on[region_of(l, page)->link] += dirty;
        return index;
    }
}

/* ---- the kernel's side: install, protect, remove ---- */

int lines_install(struct lines *l, int uffd, size_t page, const char *data, size_t count, bool clean)
{
    size_t done = 0, bytes = count << PAGE_SHIFT;
    while (done < bytes) {
        struct uffdio_copy copy = {
            .dst = (uintptr_t)arena_address(l->arena, page) + done,
            .src = (uintptr_t)data + done,
            .len = bytes - done,
            .mode = clean ? UFFDIO_COPY_MODE_WP : 0,
        };
        if (ioctl(uffd, UFFDIO_COPY, &copy) == 0)
            return 0;
        if (copy.copy > 0)
            done += (size_t)copy.copy;
        else if (errno == EAGAIN)
            l->on_busy(l);
        else
            return errno;
    }
    return 0;
}

static void protect(struct lines *l, size_t page, size_t count, bool on)
{
    struct uffdio_writeprotect wp = {
        .range = {(uintptr_t)arena_address(l->arena, page), count << PAGE_SHIFT},
        .mode = on ? UFFDIO_WRITEPROTECT_MODE_WP : 0,
    };
    while (ioctl(l->uffd, UFFDIO_WRITEPROTECT, &wp)) {
        if (errno != EAGAIN)
            lines_die("write-protecting memory failed: %s", strerror(errno));
        l->on_busy(l);
    }
}

static void unmap(struct lines *l, size_t page, size_t count)
{
    /* _LOCKED: the program may have called mlock. */
    if (syscall(SYS_madvise, arena_address(l->arena, page), count << PAGE_SHIFT, 24 /* MADV_DONTNEED_LOCKED */))
        lines_die("giving memory back failed: %s", strerror(errno));
}

static void wake(struct lines *l, size_t page)
{
    struct uffdio_range range = {(uintptr_t)arena_address(l->arena, page), PAGE_SIZE};
    ioctl(l->uffd, UFFDIO_WAKE, &range);
}

/* ---- eviction ---- */

static bool is_zero(const char *data)
{
    return data[0] == 0 && memcmp(data, data + 1, PAGE_SIZE - 1) == 0;
}

static int by_number(const void *a, const void *b)
{
    uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
    return x < y ? -1 : x > y;
}

/* Move one mapped page (already protected against writes) into the buffer, or forget it if it is all zeros. */
static void shelve(struct lines *l, size_t page)
{
    unsigned flags = l->state[page];
    const char *data = arena_address(l->arena, page);
    l->mapped--;
    if (!(flags & STORED) && (!(flags & DIRTY) || is_zero(data))) {
        set_state(l, page, UNTOUCHED);
        l->count->zero_drops++;
        return;
    }
    size_t slot = take_slot(l, page, flags & DIRTY);
    memcpy(slot_data(l, slot), data, PAGE_SIZE);
    set_state(l, page, BUFFERED | (flags & STORED) | (flags & DIRTY ? WRITTEN : 0));
    l->where[page] = (uint32_t)slot;
}

static void evict(struct lines *l, size_t want)
{
    uint32_t victim[EVICT_PAGES];
    size_t n = 0;
    for (size_t looked = l->tail - l->head; looked && n < want && n < EVICT_PAGES; looked--) {
        size_t position = l->head++;
        if (!queue_valid(l, position))
            continue;
        uint32_t page = l->queue[position & l->queue_mask];
        if (bit_test(l->arena->unreadable, page))
            queue_push(l, page);
        else
            victim[n++] = page;
    }
    if (!n)
        lines_die("the ExCache is full of pages without read permission");
    qsort(victim, n, sizeof *victim, by_number);
    for (size_t i = 0; i < n;) {
        size_t k = 1;
        while (i + k < n && victim[i + k] == victim[i] + k && !((l->state[victim[i]] ^ l->state[victim[i + k]]) & DIRTY))
            k++;
        if (l->state[victim[i]] & DIRTY)
            protect(l, victim[i], k, true);
        for (size_t j = 0; j < k; j++)
            shelve(l, victim[i] + j);
        unmap(l, victim[i], k);
        i += k;
    }
    l->count->evictions += n;
    flush(l, fair_share(l, 1));
}

static void make_room(struct lines *l, size_t pages)
{
    while (l->mapped + pages > l->max_mapped)
        evict(l, EVICT_PAGES);
}

/* ---- faults ---- */

static size_t next_run(size_t page, size_t *expected, size_t *run, size_t limit)
{
    *run = page == *expected ? *run * 2 : 1;
    if (*run > limit)
        *run = limit;
    return *run;
}

static void zero_fill(struct lines *l, size_t page, bool write)
{
    size_t limit = l->max_mapped / 8 < RUN_PAGES ? l->max_mapped / 8 : RUN_PAGES;
    size_t want = next_run(page, &l->next_zero, &l->zero_run, limit), run = 1;
    while (run < want && page + run < l->arena->top && l->state[page + run] == UNTOUCHED &&
           bit_test(l->arena->used, page + run) && !bit_test(l->arena->unreadable, page + run))
        run++;
    l->next_zero = page + run;
    make_room(l, run);
    int error = lines_install(l, l->uffd, page, zeros, run, !write);
    if (error)
        lines_die("filling memory failed: %s", strerror(error));
    for (size_t i = 0; i < run; i++)
        map(l, page + i, write ? DIRTY : 0);
    l->count->zero_fills += run;
}

static struct ibv_send_wr read_request(struct lines *l, size_t page, size_t count, struct ibv_sge *sge, char *to,
                                       uint64_t id)
{
    struct region *region = region_of(l, page);
    *sge = (struct ibv_sge){(uintptr_t)to, (uint32_t)(count << PAGE_SHIFT), l->fabric.mr->lkey};
    l->landed[id] = false;
    l->count->reads++;
    l->count->bytes_in += (uint64_t)count << PAGE_SHIFT;
    l->count->blade[region->link].bytes_in += (uint64_t)count << PAGE_SHIFT;
    return (struct ibv_send_wr){
        .wr_id = id,
        .sg_list = sge,
        .num_sge = 1,
        .opcode = IBV_WR_RDMA_READ,
        .send_flags = IBV_SEND_SIGNALED,
        .wr.rdma = {region->address + ((uint64_t)(page % REGION_PAGES) << PAGE_SHIFT), region->rkey},
    };
}

static void fetch(struct lines *l, size_t page, bool write)
{
    size_t want = next_run(page, &l->next_fetch, &l->fetch_run, RUN_PAGES), run = 1;
    while (run < want && (page + run) % REGION_PAGES && (l->state[page + run] & STATE_MASK) == REMOTE)
        run++;
    l->next_fetch = page + run;
    uint32_t link = region_of(l, page)->link;
    struct ibv_sge sge;
    struct ibv_send_wr read = read_request(l, page, run, &sge, l->landing, ID_MISS);
    post(l, link, &read, l->dirty_on[link] >= fair_share(l, 2));
    l->count->misses++;
    l->count->blade[link].misses++;
    if (!getenv("NOY")) sched_yield(); /* rxe sends in a kernel thread, which needs this CPU before our evictions do */
    make_room(l, run);
    if (!getenv("NOA") && l->mapped + run + 2 * EVICT_PAGES > l->max_mapped)
        evict(l, run > 1 ? EVICT_PAGES : EVICT_AHEAD); /* free time: later faults then need not evict */
    uint64_t start = nanoseconds();
    while (!l->landed[ID_MISS])
        reap(l, true);
    l->count->wait_nanoseconds += nanoseconds() - start;
    write |= (l->state[page] & WRITTEN) != 0;
    const char *data = l->landing;
    int error = lines_install(l, l->uffd, page, data, 1, !write);
    if (!error && run > 1)
        error = lines_install(l, l->uffd, page + 1, data + PAGE_SIZE, run - 1, true);
    if (error)
        lines_die("installing fetched memory failed: %s", strerror(error));
    for (size_t i = 0; i < run; i++) {
        map(l, page + i, STORED | (write && i == 0 ? DIRTY : 0));
        l->on_arrival(l, page + i, data + (i << PAGE_SHIFT));
    }
}

static void take_back(struct lines *l, size_t page, bool write)
{
    make_room(l, 1); /* may recycle the very slot */
    if ((l->state[page] & STATE_MASK) != BUFFERED) {
        fetch(l, page, write);
        return;
    }
    size_t slot = l->where[page];
    bool dirty = write || l->slots[slot].state == SLOT_DIRTY || (l->state[page] & WRITTEN);
    int error = lines_install(l, l->uffd, page, slot_data(l, slot), 1, !dirty);
    if (error)
        lines_die("installing buffered memory failed: %s", strerror(error));
    unsigned stored = l->state[page] & STORED;
    l->on_arrival(l, page, slot_data(l, slot));
    release_slot(l, slot);
    map(l, page, stored | (dirty ? DIRTY : 0));
    l->count->buffer_hits++;
}

static void miss(struct lines *l, size_t page, bool write)
{
    switch (l->state[page] & STATE_MASK) {
    case UNTOUCHED:
        zero_fill(l, page, write);
        break;
    case BUFFERED:
        take_back(l, page, write);
        break;
    case REMOTE:
        fetch(l, page, write);
        break;
    default:
        /* Two threads missed it together; or the program dropped it behind our back, then it reads as zeros. */
        if (lines_install(l, l->uffd, page, zeros, 1, false) == EEXIST)
            wake(l, page);
        else
            l->state[page] |= DIRTY;
    }
}

void lines_miss(struct lines *l, size_t page, bool write)
{
    uint64_t start = nanoseconds();
    miss(l, page, write);
    l->count->busy_nanoseconds += nanoseconds() - start;
}

void lines_write(struct lines *l, size_t page)
{
    if ((l->state[page] & STATE_MASK) != MAPPED) { /* evicted meanwhile: it will miss */
        wake(l, page);
        return;
    }
    l->state[page] |= DIRTY;
    l->count->write_faults++;
    protect(l, page, 1, false);
}

void lines_drop(struct lines *l, size_t page, size_t count)
{
    for (size_t i = page; i < page + count; i++) {
        unsigned state = l->state[i] & STATE_MASK;
        if (state == BUFFERED)
            release_slot(l, l->where[i]);
        else if (state == MAPPED)
            l->mapped--;
        set_state(l, i, UNTOUCHED);
    }
    unmap(l, page, count);
}

const char *lines_peek(struct lines *l, size_t page)
{
    if ((l->state[page] & STATE_MASK) == BUFFERED)
        return slot_data(l, l->where[page]);
    struct ibv_sge sge;
    char *to = l->landing + RUN_PAGES * PAGE_SIZE;
    struct ibv_send_wr read = read_request(l, page, 1, &sge, to, ID_PEEK);
    post(l, region_of(l, page)->link, &read, false);
    while (!l->landed[ID_PEEK])
        reap(l, true);
    return to;
}

/* ---- start ---- */

int lines_init(struct lines *l, struct arena *arena, size_t excache_pages)
{
    size_t extra = RUN_PAGES + 1, capacity = 1;
    l->arena = arena;
    l->nslots = excache_pages / BUFFER_SHARE;
    l->max_mapped = excache_pages - l->nslots - extra;
    while (capacity < 4 * excache_pages)
        capacity *= 2;
    l->queue_mask = capacity - 1;
    l->queue = raw_memory(capacity * sizeof *l->queue);
    l->state = raw_memory(arena->pages);
    l->where = raw_memory(arena->pages * sizeof *l->where);
    l->region = raw_memory(arena->pages / REGION_PAGES * sizeof *l->region);
    l->slots = raw_memory(l->nslots * sizeof *l->slots);
    l->free_batches = (1u << FLUSH_BATCHES) - 1;
    l->next_zero = l->next_fetch = NO_PAGE;
    size_t bytes = (extra + l->nslots) << PAGE_SHIFT;
    l->landing = raw_memory(bytes);
    if (!l->queue || !l->state || !l->where || !l->region || !l->slots || !l->landing)
        return -ENOMEM;
    madvise(l->landing, bytes, MADV_DONTFORK); /* pinned for RDMA: a forked child must not inherit it */
    l->buffer = l->landing + (extra << PAGE_SHIFT);
    for (size_t i = 0; i < l->nslots; i++)
        l->slots[i].page = NO_OWNER;
    return fabric_open(&l->fabric, l->landing, bytes);
}

void lines_adopt(struct lines *l, int uffd)
{
    enum { CHUNK = 512 };
    uint64_t entry[CHUNK];
    l->uffd = uffd;
    int pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
    if (pagemap < 0)
        lines_die("cannot read /proc/self/pagemap: %s", strerror(errno));
    size_t first = (uintptr_t)l->arena->base >> PAGE_SHIFT;
    for (size_t page = 0; page < l->arena->top; page += CHUNK) {
        size_t n = l->arena->top - page < CHUNK ? l->arena->top - page : CHUNK;
        if (pread(pagemap, entry, n * 8, (off_t)((first + page) * 8)) != (ssize_t)(n * 8))
            lines_die("cannot read /proc/self/pagemap: %s", strerror(errno));
        for (size_t i = 0; i < n; i++)
            if (entry[i] >> 63) {
                map(l, page + i, DIRTY);
                l->count->zero_fills++; /* by the kernel, before we took over */
            }
    }
    close(pagemap);
}
