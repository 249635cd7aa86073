/* The ExCache of one program: which pages are mapped, which wait in the line buffer, which live on memory blades.
 *
 * Pages that the program can use have a *line* each, and which of them leaves first is for sets.h to say: without other
 * wishes, first in first out over all of them (LegoOS found FIFO best, legoos.md 1.3). There is a second chance: an
 * evicted page is packed (codec.h) into the *pool*, and a fault that finds it there costs no round trip. What does not
 * pack, and what falls out of the pool, passes through the *line buffer*: registered memory, the source of RDMA WRITEs,
 * and LegoOS's victim cache: a page touched again while it is there comes back with a local copy. Dirty pages leave the
 * buffer in batches, because remote paging costs per round trip and not per byte (paging.md). Memory blades hold plain
 * pages. Lines, pool and buffer together are the ExCache's size; evict.c shares it out.
 *
 * Where a page goes follows from its address: vRegion (4 MiB) -> its one or two places at memory blades (replica.h).
 * Nothing here is thread-safe: callers hold the pager's lock.
 */
#ifndef RACKLESS_LINES_H
#define RACKLESS_LINES_H

#include "arena.h"
#include "counters.h"
#include "fabric.h"
#include "monitor.h"
#include "pool.h"
#include "organisation.h"
#include "replica.h"
#include "sets.h"
#include "streams.h"

enum {
    REGION_PAGES = VREGION,
    RUN_PAGES = 32,             /* most pages that come in, or are evicted, together; less in a small ExCache */
    FLUSH_PAGES = 64,           /* most pages per flush of one blade */
    FLUSH_BATCHES = 8,          /* flushes in flight */
    AHEAD_PAGES = 8,            /* evicted at a time ahead of need */
};

enum page_state {
    UNTOUCHED,                  /* reads as zeros */
    MAPPED,                     /* in the program's page table */
    BUFFERED,                   /* in the line buffer */
    PACKED,                     /* in the pool */
    REMOTE,                     /* at its memory blade only */
    DOZING,                     /* has its line, but not in the page table: in l->frames (sets.h) */
    STATE_MASK = 7,
    DIRTY = 8,                  /* differs from the copy at the memory blade */
    STORED = 16,                /* the memory blade has a copy (perhaps old) */
    PACKABLE = 64,              /* it could be packed when it was last evicted */
    WRITTEN = 32,               /* was changed when it was last mapped; of a MAPPED page: ... and will it be this time? */
};

enum slot_state { SLOT_FREE, SLOT_CLEAN, SLOT_DIRTY, SLOT_FLUSHING };

struct slot {
    uint32_t page;              /* NO_OWNER once the page left or was dropped during its flush */
    uint8_t state;
};
#define NO_OWNER UINT32_MAX

/* A flush. It is done when every blade that keeps a copy of its pages has confirmed it. */
struct batch {
    uint32_t count;
    uint32_t links;             /* bit set: that blade has yet to confirm it */
    uint32_t slot[FLUSH_PAGES];
};

/* Single requests somebody waits for, by number: wr_id and index of lines->request. */
enum {
    EARLY_READS = 3,            /* for faults of other threads, while one is waited for */
    ID_QUIET = 0, ID_MISS, ID_PEEK, ID_COPY, ID_EARLY,
    ID_BATCH = ID_EARLY + EARLY_READS, /* and more: flushes */
};

struct request {
    enum { ANSWERED, UNDERWAY, FAILED } state;
    uint32_t link;
    size_t page, count;
    char *to;
};

struct lines {
    struct arena *arena;
    int uffd;
    uint8_t *state;             /* enum page_state | flags, per page */
    uint32_t *where;            /* MAPPED, DOZING: its line; BUFFERED: slot; PACKED: see pool.h;
                                 * REMOTE: value of `departures` when it went, or of count->evictions if it is not PACKABLE */

    struct sets sets;
    char *frames;               /* a page for each line, in which it dozes; holds no memory otherwise */
    size_t lined;               /* pages that have a line */
    size_t budget;              /* pages that may have a line or be held by the pool */
    size_t contents;            /* pages that are not UNTOUCHED */
    size_t together;            /* pages that are evicted together when there is no line left, and the most that come in */
    size_t run_most, fetch_most;/* pages that are filled or taken together; and of a READ */

    bool unpacked;              /* no pool */
    struct pool pool;
    size_t pool_limit;          /* segments */
    int points;                 /* for (or, negative, against) a larger pool */
    uint32_t departures;        /* pages that could be packed, but had to go to their memory blades */

    char *landing;              /* `together` pages for misses, one to peek, EARLY_READS; registered like the buffer */
    char *buffer;
    struct slot *slots;
    size_t nslots, hand, dirty_slots, flushing_slots;
    struct batch batch[FLUSH_BATCHES];
    unsigned free_batches;      /* bit set: batch is free */
    unsigned batches_on[COUNTERS_BLADES];   /* flushes a blade has yet to confirm */
    size_t dirty_on[COUNTERS_BLADES];       /* dirty slots, by the memory blade of their region's first place */

    struct fabric fabric;
    struct fabric_link link[COUNTERS_BLADES];
    struct monitor monitor;
    struct region *region;      /* in a shared file, which outlives us (family.h) */
    int region_file;
    size_t regions;             /* that have a place */
    struct replica replica;
    struct request request[ID_BATCH];
    size_t early[EARLY_READS];  /* the page that such a READ is for, or NO_PAGE; only while the pager's lock is held */
    size_t coming, coming_pages;/* those that the READ under way brings */
    int changes;                /* of pages that were to be changed again: more were (or, negative, were not) */
    unsigned expected;
    struct streams zero_fills, fetches, unpackings;
    struct counters *count;

    /* Called with a page's contents when it comes in from afar, before the program can change it. */
    void (*on_arrival)(struct lines *lines, size_t page, const char *data);
    /* Called while a READ is under way: see to what else can be asked for. True if something was. */
    bool (*on_wait)(struct lines *lines);
    /* Called when the kernel refuses because a fork is under way: read its event. */
    void (*on_busy)(struct lines *lines);
};

enum { LINES_MIN_PAGES = 256 }; /* the smallest ExCache that makes sense: 1 MiB */

/* Make the books and the memory of the buffer; what is too large in `o` for this ExCache is made smaller. 0, or a
 * negative errno. */
int lines_init(struct lines *lines, struct arena *arena, size_t excache_pages, const struct organisation *o);

/* Bytes of registered memory: at l->landing, with l->buffer behind it. */
size_t lines_registered(const struct lines *lines);

/* Take over what is present in the arena, which must now be registered with `uffd`: all mapped, all dirty. */
void lines_adopt(struct lines *lines, int uffd);

/* Answer a missing-page fault, or a write to a clean (write-protected) page. */
void lines_miss(struct lines *lines, size_t page, bool write);
void lines_write(struct lines *lines, size_t page);

/* A page that was given back unchanged, to see whether it would be changed, was changed or not. */
void lines_learn(struct lines *lines, size_t page, bool changed);

/* Another thread has missed this page, and is to be answered next: ask for it already, if it is at its memory blade.
 * To be called by on_wait; the fault must be answered before the lock is given up. */
bool lines_start(struct lines *lines, size_t page);
bool lines_may_start(const struct lines *lines);

/* Forget pages. Their memory is returned to the kernel. */
void lines_drop(struct lines *lines, size_t page, size_t count);

/* Write every dirty page of the buffer to its blade and wait for it. */
void lines_flush_all(struct lines *lines);

/* Contents of a page that is neither UNTOUCHED nor MAPPED, valid until the next call. */
const char *lines_peek(struct lines *lines, size_t page);

/* Copy `count` pages into a (perhaps another) address space; write-protected if `clean`. 0, or an errno
 * (EEXIST: some page was there already and stays as it is; ESRCH: the address space has gone). */
int lines_install(struct lines *lines, int uffd, size_t page, const char *data, size_t count, bool clean);

/* For evict.c: books and page table. */
void lines_set_state(struct lines *lines, size_t page, unsigned state);
void lines_protect(struct lines *lines, size_t page, size_t count, bool on);
void lines_unmap(struct lines *lines, size_t page, size_t count);

/* Where a DOZING page is; and give that memory back, once the contents are elsewhere. */
char *lines_frame(const struct lines *l, size_t page);
void lines_release_frame(char *frame);

/* One line on standard error. Allocates nothing. */
void lines_say(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* One line on standard error, then the end of the process: its memory is no longer whole. Calls `lines_end` before. */
extern void (*lines_end)(void);
_Noreturn void lines_die(const char *format, ...) __attribute__((format(printf, 1, 2)));

#endif
