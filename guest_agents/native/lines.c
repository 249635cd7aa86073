#define _GNU_SOURCE
#include "lines.h"

#include "codec.h"
#include "evict.h"
#include "wire.h"

#include <errno.h>
#include <fcntl.h>
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
    LANDING_PAGES = RUN_PAGES + 1,
};

static const char zeros[RUN_PAGES * PAGE_SIZE] __attribute__((aligned(PAGE_SIZE)));

static uint64_t nanoseconds(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

void lines_set_state(struct lines *l, size_t page, unsigned state)
{
    bool had = (l->state[page] & STATE_MASK) != UNTOUCHED, has = (state & STATE_MASK) != UNTOUCHED;
    l->contents += (size_t)has - (size_t)had;
    if (l->contents > l->count->pages_touched)
        l->count->pages_touched = l->contents;
    l->state[page] = (uint8_t)state;
}

static void map(struct lines *l, size_t page, unsigned flags)
{
    lines_set_state(l, page, MAPPED | flags);
    l->lined++;
    if (!sets_add(&l->sets, page))
        lines_die("a set of the ExCache has no line for page %zu: this is a bug", page);
}

/* ---- the kernel's side: install, protect, remove ---- */

int lines_install(struct lines *l, int uffd, size_t page, const char *data, size_t count, bool clean)
{
    size_t done = 0, bytes = count << PAGE_SHIFT, most = bytes;
    while (done < bytes) {
        struct uffdio_copy copy = {
            .dst = (uintptr_t)arena_address(l->arena, page) + done,
            .src = (uintptr_t)data + done,
            .len = bytes - done < most ? bytes - done : most,
            .mode = clean ? UFFDIO_COPY_MODE_WP : 0,
        };
        int failed = ioctl(uffd, UFFDIO_COPY, &copy);
        if (copy.copy > 0)
            done += (size_t)copy.copy;
        else if (failed && errno == EAGAIN)
            l->on_busy(l);
        else if (failed && errno == ENOENT && copy.len > PAGE_SIZE)
            most = PAGE_SIZE; /* the program has protected some of these pages: one ioctl cannot reach over that */
        else
            return errno;
    }
    return 0;
}

void lines_protect(struct lines *l, size_t page, size_t count, bool on)
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

void lines_unmap(struct lines *l, size_t page, size_t count)
{
    /* _LOCKED: the program may have called mlock. */
    if (syscall(SYS_madvise, arena_address(l->arena, page), count << PAGE_SHIFT, 24 /* MADV_DONTNEED_LOCKED */))
        lines_die("giving memory back failed: %s", strerror(errno));
}

char *lines_frame(const struct lines *l, size_t page)
{
    return l->frames + ((size_t)(l->where[page] - 1) << PAGE_SHIFT);
}

void lines_release_frame(char *frame)
{
    madvise(frame, PAGE_SIZE, MADV_DONTNEED);
}

static void wake(struct lines *l, size_t page)
{
    struct uffdio_range range = {(uintptr_t)arena_address(l->arena, page), PAGE_SIZE};
    ioctl(l->uffd, UFFDIO_WAKE, &range);
}

/* ---- faults ---- */

static void miss(struct lines *l, size_t page, bool write);

static size_t next_run(size_t page, size_t *expected, size_t *run, size_t limit)
{
    *run = page == *expected ? *run * 2 : 1;
    if (*run > limit)
        *run = limit;
    return *run;
}

static void zero_fill(struct lines *l, size_t page, bool write)
{
    size_t want = next_run(page, &l->next_zero, &l->zero_run, l->run_most), run = 1;
    while (run < want && page + run < l->arena->top && l->state[page + run] == UNTOUCHED &&
           bit_test(l->arena->used, page + run) && !bit_test(l->arena->unreadable, page + run))
        run++;
    l->next_zero = page + run;
    evict_make_room(l, page, run);
    int error = lines_install(l, l->uffd, page, zeros, run, !write);
    if (error)
        lines_die("filling memory failed: %s", strerror(error));
    for (size_t i = 0; i < run; i++)
        map(l, page + i, write ? DIRTY : 0);
    l->count->zero_fills += run;
}

static void fetch(struct lines *l, size_t page, bool write)
{
    size_t want = next_run(page, &l->next_fetch, &l->fetch_run, l->fetch_most), run = 1;
    while (run < want && (page + run) % REGION_PAGES && (l->state[page + run] & STATE_MASK) == REMOTE)
        run++;
    l->next_fetch = page + run;
    uint32_t link = region_of(l, page)->at[0].link;
    wire_read(l, page, run, l->landing, ID_MISS, l->dirty_on[link] >= wire_fair_share(l, 2));
    l->count->misses++;
    l->count->prefetched += run - 1;
    evict_weigh_read(l, page);
    l->count->blade[link].misses++;
    evict_make_room(l, page, run); /* while the data is on its way */
    uint64_t start = nanoseconds();
    wire_await(l, ID_MISS);
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
    evict_make_room(l, page, 1); /* may recycle the very slot */
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
    evict_release_slot(l, slot);
    map(l, page, stored | (dirty ? DIRTY : 0));
    l->count->buffer_hits++;
}

static void unpack(struct lines *l, size_t page, bool write)
{
    unsigned want = l->state[page] & (STATE_MASK | DIRTY);
    size_t run = 1, limit = write && !(want & DIRTY) ? 1 : next_run(page, &l->next_packed, &l->packed_run, l->run_most);
    evict_make_room(l, page, limit); /* may send some of the pages away */
    if ((l->state[page] & STATE_MASK) != PACKED) {
        miss(l, page, write);
        return;
    }
    evict_weigh_unpacking(l, page);
    while (run < limit && page + run < l->arena->top && (l->state[page + run] & (STATE_MASK | DIRTY)) == want)
        run++;
    l->next_packed = page + run;
    for (size_t i = 0; i < run; i++)
        codec_unpack(pool_get(&l->pool, page + i), (uint64_t *)(l->landing + (i << PAGE_SHIFT)));
    bool dirty = write || (want & DIRTY);
    int error = lines_install(l, l->uffd, page, l->landing, run, !dirty);
    if (error)
        lines_die("installing unpacked memory failed: %s", strerror(error));
    for (size_t i = 0; i < run; i++) {
        l->on_arrival(l, page + i, l->landing + (i << PAGE_SHIFT));
        pool_remove(&l->pool, page + i);
        map(l, page + i, (l->state[page + i] & STORED) | (dirty ? DIRTY : 0));
    }
    l->count->packed_hits++;
}

/* A line that dozed has been used. */
static void awaken(struct lines *l, size_t page, bool write)
{
    char *frame = lines_frame(l, page);
    bool dirty = write || (l->state[page] & DIRTY);
    int error = lines_install(l, l->uffd, page, frame, 1, !dirty);
    if (error)
        lines_die("installing memory that dozed failed: %s", strerror(error));
    l->on_arrival(l, page, frame);
    lines_set_state(l, page, MAPPED | (l->state[page] & STORED) | (dirty ? DIRTY : 0));
    sets_renew(&l->sets, page);
    lines_release_frame(frame);
    l->count->doze_hits++;
}

static void miss(struct lines *l, size_t page, bool write)
{
    switch (l->state[page] & STATE_MASK) {
    case UNTOUCHED:
        zero_fill(l, page, write);
        break;
    case PACKED:
        unpack(l, page, write);
        break;
    case BUFFERED:
        take_back(l, page, write);
        break;
    case REMOTE:
        fetch(l, page, write);
        break;
    case DOZING:
        awaken(l, page, write);
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
    if (l->sets.policy == POLICY_LRU)
        sets_renew(&l->sets, page);
    lines_protect(l, page, 1, false);
}

void lines_drop(struct lines *l, size_t page, size_t count)
{
    for (size_t i = page; i < page + count; i++) {
        unsigned state = l->state[i] & STATE_MASK;
        if (state == BUFFERED)
            evict_release_slot(l, l->where[i]);
        else if (state == PACKED)
            pool_remove(&l->pool, i);
        else if (state == MAPPED || state == DOZING)
            evict_release_line(l, i);
        lines_set_state(l, i, UNTOUCHED);
    }
    lines_unmap(l, page, count);
}

/* ---- start ---- */

static size_t at_most(size_t n, size_t most)
{
    return n < most ? n : most;
}

/* How many lines the ExCache has, in how many sets, and what goes in and out together. */
static int organise(struct lines *l, size_t excache_pages, const struct organisation *o)
{
    /* Victims are packed before they are unmapped, and compacting copies a segment. */
    size_t passing = EVICT_PAGES + SEGMENT_PAGES, sets = 1, ways = excache_pages;
    l->nslots = o->victim ? at_most(o->victim, excache_pages / 2) : excache_pages / BUFFER_SHARE;
    l->budget = excache_pages - l->nslots - LANDING_PAGES - passing;
    l->run_most = at_most(l->budget / 8, RUN_PAGES);
    l->unpacked = o->unpacked || o->ways;
    if (o->ways) {
        ways = at_most(o->ways, l->budget);
        sets = l->budget / ways;
        l->budget = sets * ways;
        l->run_most = at_most(sets * (ways < 8 ? 1 : ways / 8), RUN_PAGES);
    }
    l->fetch_most = o->prefetch ? at_most(o->prefetch, l->run_most) : l->run_most;
    l->count->sets = sets;
    l->frames = raw_memory((sets * ways) << PAGE_SHIFT);
    if (!l->frames)
        return -ENOMEM;
    madvise(l->frames, (sets * ways) << PAGE_SHIFT, MADV_NOHUGEPAGE);
    madvise(l->frames, (sets * ways) << PAGE_SHIFT, MADV_DONTFORK);
    return sets_init(&l->sets, sets, ways, o->policy, l->where);
}

static int make_regions(struct lines *l, size_t bytes)
{
    l->region_file = memfd_create("rackless-regions", MFD_CLOEXEC);
    if (l->region_file < 0 || ftruncate(l->region_file, (off_t)bytes))
        return errno;
    l->region = (void *)syscall(SYS_mmap, NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, l->region_file, 0L);
    return l->region == MAP_FAILED ? errno : madvise(l->region, bytes, MADV_DONTFORK);
}

int lines_init(struct lines *l, struct arena *arena, size_t excache_pages, const struct organisation *o)
{
    l->arena = arena;
    l->state = raw_memory(arena->pages);
    l->where = raw_memory(arena->pages * sizeof *l->where);
    if (!l->state || !l->where || make_regions(l, arena->pages / REGION_PAGES * sizeof *l->region))
        return -ENOMEM;
    int error = organise(l, excache_pages, o);
    if (error)
        return error;
    l->slots = raw_memory(l->nslots * sizeof *l->slots);
    l->free_batches = (1u << FLUSH_BATCHES) - 1;
    l->next_zero = l->next_fetch = l->next_packed = NO_PAGE;
    size_t bytes = (LANDING_PAGES + l->nslots) << PAGE_SHIFT;
    l->landing = raw_memory(bytes);
    if (!l->slots || !l->landing)
        return -ENOMEM;
    madvise(l->landing, bytes, MADV_DONTFORK); /* pinned for RDMA: a forked child must not inherit it */
    l->buffer = l->landing + ((size_t)LANDING_PAGES << PAGE_SHIFT);
    for (size_t i = 0; i < l->nslots; i++)
        l->slots[i].page = NO_OWNER;
    evict_init(l);
    error = pool_init(&l->pool, l->budget / SEGMENT_PAGES, l->where);
    if (error)
        return error;
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
                if (l->sets.count > 1)
                    evict_make_room(l, page + i, 1); /* its set may be full */
                map(l, page + i, DIRTY);
                l->count->zero_fills++; /* by the kernel, before we took over */
            }
    }
    close(pagemap);
}
