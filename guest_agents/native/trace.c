#define _GNU_SOURCE
#include "trace.h"

#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

enum { INTERVAL_MS = 10, MILLISECOND = 1000000 };

struct trace *trace;
static const uint64_t *values;  /* of the counters, TRACE_VALUES of them */

uint64_t trace_clock(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static void snapshot(uint64_t now)
{
    if (trace->snapshots == TRACE_SNAPSHOTS) {
        for (size_t i = 0; i < TRACE_SNAPSHOTS / 2; i++)
            trace->snapshot[i] = trace->snapshot[2 * i];
        trace->snapshots = TRACE_SNAPSHOTS / 2;
        trace->interval *= 2;
    }
    struct trace_snapshot *next = &trace->snapshot[trace->snapshots];
    next->time = now;
    memcpy(next->value, values, sizeof next->value);
    trace->snapshots++; /* last: whoever reads the file finds whole ones */
}

void trace_open(const char *job, const struct counters *count)
{
    char path[256];
    snprintf(path, sizeof path, "%s/trace", job);
    if (access(path, F_OK))
        return;
    snprintf(path, sizeof path, "%s/%d.trace", job, (int)getpid());
    int file = open(path, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    if (file < 0)
        return;
    /* The room must be there: a page that a full file system lacks would end the program. */
    void *memory = MAP_FAILED;
    if (posix_fallocate(file, 0, sizeof *trace) == 0)
        memory = mmap(NULL, sizeof *trace, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    close(file);
    if (memory == MAP_FAILED) {
        unlink(path);
        return;
    }
    trace = memory;
    values = &count->excache_bytes;
    trace->events_most = TRACE_EVENTS;
    trace->snapshots_most = TRACE_SNAPSHOTS;
    trace->values = TRACE_VALUES;
    trace->interval = (uint64_t)INTERVAL_MS * MILLISECOND;
    trace->begin = trace_clock();
    snapshot(trace->begin);
    trace->magic = TRACE_MAGIC;
}

void trace_tick(void)
{
    if (!trace)
        return;
    uint64_t now = trace_clock();
    if (now - trace->snapshot[trace->snapshots - 1].time >= trace->interval)
        snapshot(now);
}

int trace_pause(int pause)
{
    /* What has happened since the last snapshot belongs to its 10 ms, and not to the idle time that may follow. */
    if (!trace || !memcmp(trace->snapshot[trace->snapshots - 1].value, values, sizeof trace->snapshot[0].value))
        return pause;
    int soon = (int)(trace->interval / MILLISECOND);
    return pause < 0 || pause > soon ? soon : pause;
}

void trace_end(void)
{
    if (!trace)
        return;
    uint64_t now = trace_clock();
    snapshot(now);
    trace->end = now;
}

void trace_put(enum trace_kind kind, uint64_t begin, size_t page, size_t pages, uint32_t blades, unsigned lane)
{
    trace->event[trace->events % TRACE_EVENTS] = (struct trace_event){
        .begin = begin, .length = trace_clock() - begin, .page = (uint32_t)page, .pages = (uint32_t)pages,
        .blades = blades, .kind = (uint16_t)kind, .lane = (uint16_t)lane};
    trace->events++;
}
