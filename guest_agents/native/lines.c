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
    TOGETHER_SHARE = 64,    /* this part of the ExCache comes in or goes out together, */
    TOGETHER_LEAST = 8,     /* but so many pages at least, and RUN_PAGES at most */
    BUFFER_SHARE = 32,      /* the line buffer is this part of it: plain lines serve every program better, */
    BUFFER_LEAST = 3,       /* but a flush should carry more than what goes out together */
    UNPACK_PAGES = 8,       /* most pages that are unpacked together: the others would push more out than they spare */
    LOOK_EVERY = 8,
    CHANGES_MOST = 16,
};

static const char zeros[RUN_PAGES * PAGE_SIZE] __attribute__((aligned(PAGE_SIZE)));

static uint64_t nanoseconds(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static size_t at_most(size_t n, size_t most)
{
    return n < most ? n : most;
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

/* Which early READ is for this page; EARLY_READS: none. */
static unsigned early_of(const struct lines *l, size_t page)
{
    unsigned i = 0;
    while (i < EARLY_READS && l->early[i] != page)
        i++;
    return i;
}

static char *early_landing(const struct lines *l, unsigned i)
{
    return l->landing + ((l->together + 1 + i) << PAGE_SHIFT);
}

bool lines_may_start(const struct lines *l)
{
    return early_of(l, NO_PAGE) < EARLY_READS;
}

bool lines_start(struct lines *l, size_t page)
{
    unsigned i = early_of(l, NO_PAGE);
    if (i == EARLY_READS || (l->state[page] & STATE_MASK) != REMOTE || early_of(l, page) < EARLY_READS ||
        page - l->coming < l->coming_pages)
        return false;
    l->early[i] = page;
    l->count->overlaps++;
    wire_read(l, page, 1, early_landing(l, i), ID_EARLY + i, false);
    return true;
}

/* Pages that come together because of a fault at one of them. */
struct run {
    size_t first, pages;
};

typedef bool alike(const struct lines *l, size_t page, size_t other);

/* So many pages at most, as long as they are like the one at fault. */
static struct run gather(const struct lines *l, size_t page, size_t most, bool down, alike *alike)
{
    size_t n = 1;
    while (n < most && (down ? page >= n : page + n < l->arena->top) && alike(l, page, down ? page - n : page + n))
        n++;
    return (struct run){down ? page - n + 1 : page, n};
}

/* As many as the stream of faults asks for. */
static struct run make_run(struct lines *l, struct streams *streams, size_t page, size_t most, alike *alike)
{
    bool down;
    most = streams_fault(streams, page, most, &down);
    struct run run = gather(l, page, most, down, alike);
    streams_brought(streams, page, run.pages);
    return run;
}

static bool both_untouched(const struct lines *l, size_t page, size_t other)
{
    (void)page;
    return l->state[other] == UNTOUCHED && bit_test(l->arena->used, other) && !bit_test(l->arena->unreadable, other);
}

static bool both_remote(const struct lines *l, size_t page, size_t other)
{
    return (l->state[other] & STATE_MASK) == REMOTE && page / REGION_PAGES == other / REGION_PAGES &&
           early_of(l, other) == EARLY_READS;
}

static bool both_packed(const struct lines *l, size_t page, size_t other)
{
    return ((l->state[page] ^ l->state[other]) & (STATE_MASK | DIRTY)) == 0;
}

static void zero_fill(struct lines *l, size_t page, bool write)
{
    struct run run = make_run(l, &l->zero_fills, page, l->run_most, both_untouched);
    evict_make_room(l, run.first, run.pages);
    int error = lines_install(l, l->uffd, run.first, zeros, run.pages, !write);
    if (error)
        lines_die("filling memory failed: %s", strerror(error));
    for (size_t i = 0; i < run.pages; i++)
        map(l, run.first + i, write ? DIRTY : 0);
    l->count->zero_fills += run.pages;
}

/* Flags for a page that comes back. One that was changed when it was last mapped may well be changed again: given as
 * changed already, that costs no fault; but if it is not changed after all, a flush for nothing. Now and then (always,
 * if that has mostly been for nothing) it is given as unchanged, to see; WRITTEN says then that this is such a look. */
static unsigned expect(struct lines *l, size_t page, bool write)
{
    if (write || !(l->state[page] & WRITTEN))
        return write ? DIRTY : 0;
    bool look = l->changes < 0 || ++l->expected % LOOK_EVERY == 0;
    return look ? WRITTEN : DIRTY;
}

void lines_learn(struct lines *l, size_t page, bool changed)
{
    if (!(l->state[page] & WRITTEN))
        return;
    if (changed ? l->changes < CHANGES_MOST : l->changes > -CHANGES_MOST)
        l->changes += changed ? 1 : -1;
    l->state[page] &= (uint8_t)~WRITTEN;
}

static void fetch(struct lines *l, size_t page, bool write)
{
    unsigned early = early_of(l, page), id = early < EARLY_READS ? ID_EARLY + early : ID_MISS;
    struct run run = {page, 1};
    const char *data = early < EARLY_READS ? early_landing(l, early) : l->landing;
    uint32_t link = region_of(l, page)->at[0].link;
    uint64_t posted = nanoseconds();
    if (id == ID_MISS) {
        run = make_run(l, &l->fetches, page, l->fetch_most, both_remote);
        wire_read(l, run.first, run.pages, l->landing, ID_MISS, l->dirty_on[link] >= wire_fair_share(l, 2));
    }
    l->coming = run.first;
    l->coming_pages = run.pages;
    l->count->misses++;
    l->count->prefetched += run.pages - 1;
    evict_weigh_read(l, page);
    l->count->blade[link].misses++;
    evict_make_room(l, run.first, run.pages); /* while the data is on its way */
    while (!wire_answered(l, id)) {
        bool asked = l->on_wait(l);
        if (asked || evict_ahead(l))
            continue;
        uint64_t start = nanoseconds();
        wire_wait(l, id);
        l->count->wait_nanoseconds += nanoseconds() - start;
    }
    uint64_t answered = nanoseconds();
    l->count->read_nanoseconds += answered - posted;
    evict_make_room(l, run.first, run.pages); /* what was evicted ahead may have taken it, for another segment of pool */
    l->coming_pages = 0;
    l->fabric.other[1] = -1;
    if (early < EARLY_READS)
        l->early[early] = NO_PAGE;
    unsigned flags = expect(l, page, write), others = write ? DIRTY : 0; /* what is written in order goes on */
    size_t before = page - run.first, after = run.pages - before - 1; /* one of these is 0 */
    int error = lines_install(l, l->uffd, page, data + (before << PAGE_SHIFT), 1, !(flags & DIRTY));
    if (!error && before)
        error = lines_install(l, l->uffd, run.first, data, before, !write);
    if (!error && after)
        error = lines_install(l, l->uffd, page + 1, data + PAGE_SIZE, after, !write);
    if (error)
        lines_die("installing fetched memory failed: %s", strerror(error));
    l->count->install_nanoseconds += nanoseconds() - answered;
    for (size_t i = 0; i < run.pages; i++) {
        map(l, run.first + i, STORED | (i == before ? flags : others));
        l->on_arrival(l, run.first + i, data + (i << PAGE_SHIFT));
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
    unsigned flags = expect(l, page, write || l->slots[slot].state == SLOT_DIRTY);
    int error = lines_install(l, l->uffd, page, slot_data(l, slot), 1, !(flags & DIRTY));
    if (error)
        lines_die("installing buffered memory failed: %s", strerror(error));
    unsigned stored = l->state[page] & STORED;
    l->on_arrival(l, page, slot_data(l, slot));
    evict_release_slot(l, slot);
    map(l, page, stored | flags);
    l->count->buffer_hits++;
}

static void unpack(struct lines *l, size_t page, bool write)
{
    bool changes = write && !(l->state[page] & DIRTY); /* this page alone */
    struct run run = make_run(l, &l->unpackings, page, changes ? 1 : at_most(l->run_most, UNPACK_PAGES), both_packed);
    evict_make_room(l, run.first, run.pages); /* may send some of the pages away */
    if ((l->state[page] & STATE_MASK) != PACKED) {
        miss(l, page, write);
        return;
    }
    evict_weigh_unpacking(l, page);
    run = gather(l, page, run.pages, run.first < page, both_packed);
    for (size_t i = 0; i < run.pages; i++)
        codec_unpack(pool_get(&l->pool, run.first + i), (uint64_t *)(l->landing + (i << PAGE_SHIFT)));
    bool dirty = write || l->state[page] & DIRTY;
    int error = lines_install(l, l->uffd, run.first, l->landing, run.pages, !dirty);
    if (error)
        lines_die("installing unpacked memory failed: %s", strerror(error));
    for (size_t i = 0; i < run.pages; i++) {
        l->on_arrival(l, run.first + i, l->landing + (i << PAGE_SHIFT));
        pool_remove(&l->pool, run.first + i);
        map(l, run.first + i, (l->state[run.first + i] & STORED) | (dirty ? DIRTY : 0));
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
    uint64_t start = nanoseconds(), misses = l->count->misses;
    miss(l, page, write);
    uint64_t taken = nanoseconds() - start;
    l->count->busy_nanoseconds += taken;
    if (l->count->misses != misses)
        l->count->miss_nanoseconds += taken;
}

void lines_write(struct lines *l, size_t page)
{
    if ((l->state[page] & STATE_MASK) != MAPPED) { /* evicted meanwhile: it will miss */
        wake(l, page);
        return;
    }
    l->state[page] |= DIRTY;
    lines_learn(l, page, true);
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

/* How many lines the ExCache has, in how many sets, and what goes in and out together. */
static int organise(struct lines *l, size_t excache_pages, const struct organisation *o)
{
    /* Victims are packed before they are unmapped, and compacting copies a segment. */
    l->together = at_most(excache_pages / TOGETHER_SHARE, RUN_PAGES);
    if (l->together < TOGETHER_LEAST)
        l->together = TOGETHER_LEAST;
    size_t passing = l->together + SEGMENT_PAGES, landing = l->together + 1 + EARLY_READS, sets = 1, ways = excache_pages;
    l->nslots = o->victim ? at_most(o->victim, excache_pages / 2) : excache_pages / BUFFER_SHARE;
    if (!o->victim && l->nslots < BUFFER_LEAST * l->together)
        l->nslots = BUFFER_LEAST * l->together;
    l->budget = excache_pages - l->nslots - landing - passing;
    l->run_most = at_most(l->budget / 8, l->together);
    l->unpacked = o->unpacked || o->ways;
    if (o->ways) {
        ways = at_most(o->ways, l->budget);
        sets = l->budget / ways;
        l->budget = sets * ways;
        l->run_most = at_most(sets * (ways < 8 ? 1 : ways / 8), l->together);
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

size_t lines_registered(const struct lines *l)
{
    return (l->together + 1 + EARLY_READS + l->nslots) << PAGE_SHIFT;
}

int lines_init(struct lines *l, struct arena *arena, size_t excache_pages, const struct organisation *o)
{
    l->arena = arena;
    l->state = raw_memory(arena->pages);
    l->where = raw_memory(arena->pages * sizeof *l->where);
    if (!l->state || !l->where)
        return -ENOMEM;
    int error = organise(l, excache_pages, o);
    if (error)
        return error;
    l->slots = raw_memory(l->nslots * sizeof *l->slots);
    l->free_batches = (1u << FLUSH_BATCHES) - 1;
    size_t landing = l->together + 1 + EARLY_READS, bytes = lines_registered(l);
    l->landing = raw_memory(bytes);
    if (!l->slots || !l->landing)
        return -ENOMEM;
    madvise(l->landing, bytes, MADV_DONTFORK); /* pinned for RDMA: a forked child must not inherit it */
    l->buffer = l->landing + (landing << PAGE_SHIFT);
    for (size_t i = 0; i < l->nslots; i++)
        l->slots[i].page = NO_OWNER;
    for (unsigned i = 0; i < EARLY_READS; i++)
        l->early[i] = NO_PAGE;
    evict_init(l);
    return pool_init(&l->pool, l->budget / SEGMENT_PAGES, l->where);
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
