/* What the pager did and when: a file <job>/<pid>.trace that outlives the program, if there is a file <job>/trace.
 *
 * Bounded: the latest TRACE_EVENTS events, and up to TRACE_SNAPSHOTS snapshots of all counters, 10 ms apart at first;
 * when these are full every other one goes, and they are taken half as often: they always span the whole run.
 * Read in Python by guest_agents/splitkernel/process/trace.py: same order, little-endian. When there is no trace each
 * call costs one comparison. Callers hold the pager's lock. Times are nanoseconds of CLOCK_MONOTONIC.
 */
#ifndef RACKLESS_TRACE_H
#define RACKLESS_TRACE_H

#include "counters.h"

#include <stddef.h>

enum {
    TRACE_MAGIC = 0x31435254,
    TRACE_EVENTS = 16384,
    TRACE_SNAPSHOTS = 2048,
    TRACE_VALUES = (offsetof(struct counters, blades) - offsetof(struct counters, excache_bytes)) / sizeof(uint64_t),
};

enum trace_kind {
    TRACE_MISS,                 /* a fault that a memory blade answered; lane: 1 if flushes went along */
    TRACE_FLUSH,                /* from posting to the last blade's confirmation; lane: which of those in flight */
    TRACE_EVICT,
    TRACE_FORK,
    TRACE_FAILOVER,             /* a blade was lost, and the program went on */
    TRACE_COPY,                 /* pages copied to give a region two copies again */
};

struct trace_event {
    uint64_t begin, length;
    uint32_t page, pages;
    uint32_t blades;            /* bit set */
    uint16_t kind, lane;
};

struct trace_snapshot {
    uint64_t time;
    uint64_t value[TRACE_VALUES];
};

struct trace {
    uint64_t magic;
    uint64_t events_most, snapshots_most, values;
    uint64_t begin, end;        /* end: 0 if the program was killed */
    uint64_t interval;          /* between snapshots now */
    uint64_t events;            /* written; the latest events_most are there */
    uint64_t snapshots;
    struct trace_event event[TRACE_EVENTS];
    struct trace_snapshot snapshot[TRACE_SNAPSHOTS];
};

extern struct trace *trace;     /* NULL: off */

/* Begin, if there is to be a trace and room for it. */
void trace_open(const char *job, const struct counters *count);

/* Take a snapshot if it is time. */
void trace_tick(void);

/* How many milliseconds to wait for faults (-1: for ever), if it were `pause` without a trace. */
int trace_pause(int pause);

/* The program ends. */
void trace_end(void);

uint64_t trace_clock(void);
void trace_put(enum trace_kind kind, uint64_t begin, size_t page, size_t pages, uint32_t blades, unsigned lane);

static inline uint64_t trace_begin(void)
{
    return trace ? trace_clock() : 0;
}

/* Something that began at `begin` is over now. */
static inline void trace_done(enum trace_kind kind, uint64_t begin, size_t page, size_t pages, uint32_t blades,
                              unsigned lane)
{
    if (trace)
        trace_put(kind, begin, page, pages, blades, lane);
}

#endif
