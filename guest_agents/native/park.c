#define _GNU_SOURCE
#include "lines.h"

#include "pager.h"
#include "park.h"

#include "attach.h"
#include "evict.h"
#include "trace.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

static struct park_report report;

/* What is in shared files now, and must be part of the image. */
static struct counters counts;
static struct region *places;

/* Tell the tracer. What it answers; -1: there is none any more. */
static long tell(enum park_said said)
{
    return syscall(SYS_prctl, PARK_CALL, said, &report, 0L, 0L);
}

static void refuse(const char *why, bool again)
{
    snprintf(report.error, sizeof report.error, "%s", why);
    report.again = again;
    tell(PARK_BUSY);
}

static bool prepare(struct lines *l)
{
    evict_all(l);
    attach_own(l, l->uffd, report.own);
    report.remote_pages = l->contents;
    counts = *l->count;
    places = raw_memory(l->regions * sizeof *places + 1);
    if (places)
        memcpy(places, l->region, l->regions * sizeof *places);
    return places;
}

/* The number that a memory blade has now; NO_LINK: it is not there. */
static uint32_t renumber(const struct monitor *m, const char name[COUNTERS_NAME])
{
    for (uint32_t link = 0; link < m->blades; link++)
        if (!strcmp(m->name[link], name))
            return link;
    return NO_LINK;
}

/* The counters go on, under the blades' new numbers. */
static bool continue_counters(struct lines *l, const char *job)
{
    l->count = attach_counters(job, (size_t)(counts.excache_bytes >> PAGE_SHIFT));
    if (!l->count)
        return false;
    *l->count = counts;
    memset(l->count->blade, 0, sizeof l->count->blade);
    for (uint32_t old = 0; old < counts.blades; old++) {
        uint32_t now = renumber(&l->monitor, counts.blade[old].name);
        if (now != NO_LINK)
            l->count->blade[now] = counts.blade[old];
    }
    trace = NULL;
    trace_open(job, l->count);
    return true;
}

static const char *renumber_places(struct lines *l)
{
    static char why[100];
    for (size_t r = 0; r < l->regions; r++) {
        l->region[r] = places[r];
        for (unsigned i = 0; i < COPIES; i++) {
            struct place *place = &l->region[r].at[i];
            if (place->link == NO_LINK)
                continue;
            const char *name = counts.blade[place->link].name;
            place->link = renumber(&l->monitor, name);
            if (place->link == NO_LINK || !l->link[place->link].qp) {
                snprintf(why, sizeof why, "memory blade %s is not there, and it has a part of the memory", name);
                return why;
            }
        }
    }
    return NULL;
}

static size_t count_places(const struct lines *l)
{
    size_t n = 0;
    for (size_t r = 0; r < l->regions; r++)
        n += 1 + (l->region[r].at[1].link != NO_LINK);
    return n;
}

/* In a new process: what there was of the old blade exists no more. NULL, or why it cannot be had here. */
static const char *resume(struct lines *l, const struct pager_config *config)
{
    for (size_t i = 0; i < PARK_OWN; i++)
        config->close(report.own[i]); /* not open, but guarded still */
    /* The first: a page of the program that is touched before would be taken for one that reads as zeros. */
    const char *why = attach_faults(l->arena, &l->uffd);
    if (why)
        return why;
    memset(&l->monitor, 0, sizeof l->monitor);
    memset(l->link, 0, sizeof l->link);
    l->replica = (struct replica){.copies = l->replica.copies, .quiet = PTHREAD_MUTEX_INITIALIZER};
    if (monitor_attach(&l->monitor, config->job))
        return l->monitor.error;
    if (!continue_counters(l, config->job))
        return "no memory for the pager's books";
    why = attach_device(l);
    if (!why)
        why = attach_blades(l, l->replica.copies);
    if (!why)
        why = renumber_places(l);
    if (!why)
        attach_guard(l, l->uffd, config->guard);
    if (!why && monitor_claim(&l->monitor, report.name, count_places(l))) /* the last: until then it is kept */
        why = l->monitor.error;
    return why;
}

static void begin_anew(struct lines *l, const struct pager_config *config)
{
    const char *why = resume(l, config);
    if (why)
        snprintf(report.error, sizeof report.error, "%s", why);
    if (tell(why ? PARK_FAILED : PARK_RESUMED) != PARK_GO_ON && why)
        lines_die("the program cannot go on here: %s", why);
}

static void keep(struct lines *l)
{
    int error = monitor_keep(&l->monitor, report.name, count_places(l));
    if (error)
        snprintf(report.error, sizeof report.error, "%s", l->monitor.error);
    /* If whoever asked has gone meanwhile, it is ours again. */
    if (tell(error ? PARK_FAILED : PARK_KEPT) != PARK_KEEP && !error &&
        monitor_claim(&l->monitor, report.name, count_places(l)))
        lines_die("a checkpoint was given up, and the memory is not to be had back: %s", l->monitor.error);
}

void park(struct lines *l, pthread_mutex_t *lock, bool children, const struct pager_config *config)
{
    if (pthread_mutex_trylock(lock)) { /* held by a thread that has been stopped, as may be the others */
        refuse("it is asking for memory", true);
        return;
    }
    bool quiet = !pthread_mutex_trylock(&l->replica.quiet), free = quiet && !pthread_mutex_trylock(&l->monitor.lock);
    long told = PARK_GO_ON;
    if (!free) {
        refuse("it is asking for memory, or forks", true);
    } else if (children) {
        refuse("a process that it has forked needs its memory", true);
    } else if (l->count->degraded_regions || l->replica.release || l->replica.back) {
        refuse("its memory is being copied to another memory blade", true);
    } else if (!prepare(l)) {
        refuse("no memory for the pager's books", false);
    } else {
        told = tell(PARK_PARKED);
        if (told == PARK_KEEP)
            keep(l);
    }
    if (told == PARK_RESTORED) {
        begin_anew(l, config);
    } else {
        if (free)
            pthread_mutex_unlock(&l->monitor.lock);
        if (quiet)
            pthread_mutex_unlock(&l->replica.quiet);
    }
    pthread_mutex_unlock(lock);
}
