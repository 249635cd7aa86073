#define _GNU_SOURCE
#include "replica.h"

#include "lines.h"
#include "trace.h"
#include "wire.h"

#include <errno.h>
#include <string.h>

enum {
    LOSSES_MOST = 8,            /* a blade that was lost so often is not used again */
    BUSY_MS = 20,               /* until the process monitor is asked again: a thread of the program is asking it */
    FULL_MS = 5000,             /* ... because there was no room */
};

static uint32_t bit(uint32_t link)
{
    return 1u << link;
}

/* Blades that cannot be used, as a bit set. */
static uint32_t absent(const struct lines *l)
{
    uint32_t set = 0;
    for (uint32_t link = 0; link < l->monitor.blades; link++)
        if (!l->link[link].qp)
            set |= bit(link);
    return set;
}

static uint32_t present(const struct lines *l)
{
    return l->monitor.blades - (uint32_t)__builtin_popcount(absent(l));
}

/* Blades that nothing new goes to. */
static uint32_t closed(const struct lines *l)
{
    return absent(l) | l->replica.leaving;
}

static uint32_t open(const struct lines *l)
{
    return l->monitor.blades - (uint32_t)__builtin_popcount(closed(l));
}

static bool leaves(const struct lines *l, uint32_t link)
{
    return l->replica.leaving & bit(link);
}

static bool whole(const struct region *region)
{
    return region->at[1].link != NO_LINK && region->copied == REGION_PAGES;
}

/* Should it have another copy? */
static bool degraded(const struct lines *l, const struct region *region)
{
    return (l->replica.copies > 1 || leaves(l, region->at[0].link)) && !whole(region);
}

static void count_degraded(struct lines *l)
{
    uint64_t n = 0;
    for (size_t r = 0; r < l->regions; r++)
        n += degraded(l, &l->region[r]);
    l->count->degraded_regions = n;
}

/* Forget places on blades that have been lost. False if no place with everything remains. */
static bool keep_living(const struct lines *l, struct region *region)
{
    if (region->at[1].link != NO_LINK && !l->link[region->at[1].link].qp)
        region->at[1].link = NO_LINK;
    if (l->link[region->at[0].link].qp)
        return true;
    if (!whole(region))
        return false;
    region->at[0] = region->at[1];
    region->at[1].link = NO_LINK;
    return true;
}

/* After a refusal: did a blade die meanwhile, so that fewer copies are to be had now? */
static bool lost_meanwhile(struct lines *l, pthread_mutex_t *lock, uint32_t copies)
{
    pthread_mutex_lock(lock);
    replica_news(l);
    bool lost = open(l) < copies;
    pthread_mutex_unlock(lock);
    return lost;
}

int replica_reserve(struct lines *l, pthread_mutex_t *lock)
{
    for (bool booked = false; !booked;) {
        struct region region = {.at = {{.link = NO_LINK}, {.link = NO_LINK}}, .copied = REGION_PAGES};
        pthread_mutex_lock(&l->monitor.lock); /* until it is booked: park() counts what is in the books */
        pthread_mutex_lock(lock);
        uint32_t without = closed(l), copies = open(l) < l->replica.copies ? open(l) : l->replica.copies;
        pthread_mutex_unlock(lock);
        int error = monitor_region(&l->monitor, (uint64_t)REGION_PAGES << PAGE_SHIFT, copies, without, region.at);
        bool again = error == ENOMEM && lost_meanwhile(l, lock, copies);
        pthread_mutex_lock(lock);
        booked = !error && keep_living(l, &region);
        if (booked) {
            l->region[l->regions++] = region;
            l->count->regions++;
            count_degraded(l);
        }
        pthread_mutex_unlock(lock);
        pthread_mutex_unlock(&l->monitor.lock);
        if (error && !again)
            return error;
    }
    return 0;
}

void replica_give_back(struct lines *l, pthread_mutex_t *lock, size_t keep)
{
    pthread_mutex_lock(&l->monitor.lock); /* until all are returned: as in replica_reserve */
    pthread_mutex_lock(lock);
    wire_settle(l); /* what was flushed late must not arrive in what is another program's by then */
    while (l->regions > keep) {
        struct region region = l->region[--l->regions];
        l->region[l->regions] = (struct region){0};
        l->count->regions_returned++;
        pthread_mutex_unlock(lock);
        monitor_return(&l->monitor, &region);
        pthread_mutex_lock(lock);
    }
    count_degraded(l);
    pthread_mutex_unlock(lock);
    pthread_mutex_unlock(&l->monitor.lock);
}

void replica_lost(struct lines *l, uint32_t link, const char *why)
{
    if (!l->link[link].qp)
        return;
    uint64_t begin = trace_begin();
    fabric_link_stop(&l->link[link]);
    l->replica.release |= bit(link);
    l->replica.back &= ~bit(link);
    l->replica.losses[link]++;
    for (size_t r = 0; r < l->regions; r++)
        if (!keep_living(l, &l->region[r]))
            lines_die("memory blade %s is lost (%s): the program's memory is no longer whole, it ends here",
                      l->monitor.name[link], why);
    wire_give_up(l, link);
    l->count->failovers++;
    trace_done(TRACE_FAILOVER, begin, 0, 0, bit(link), 0);
    count_degraded(l);
}

void replica_news(struct lines *l)
{
    uint32_t link;
    for (char kind; (kind = monitor_news(&l->monitor, &link)) != 0;) {
        if (kind == 'l')
            replica_lost(l, link, "it has left the rack");
        l->replica.leaving = kind == 'd' ? l->replica.leaving | bit(link) :
                             kind == 'k' || kind == 'l' ? l->replica.leaving & ~bit(link) : l->replica.leaving;
        if ((kind == 'b' || kind == 'k') && !l->link[link].qp && !leaves(l, link) && l->replica.losses[link] < LOSSES_MOST)
            l->replica.back |= bit(link);
        l->replica.stuck = 0;
        count_degraded(l);
    }
    l->fabric.other[0] = l->monitor.news;
}

static void tell(struct lines *l, const char *why)
{
    if (!l->replica.told && l->replica.copies > 1)
        lines_say("%s: the program goes on with one copy of some of its memory", why);
    l->replica.told = true;
}

/* Queue pairs, and the process monitor's part, for one blade that was lost or is back. */
static int tidy(struct lines *l)
{
    /* libibverbs allocates: while a thread forks it holds the heaps' locks, and waits for us. */
    if (pthread_mutex_trylock(&l->replica.quiet))
        return BUSY_MS;
    if (l->replica.release) {
        uint32_t link = (uint32_t)__builtin_ctz(l->replica.release);
        l->replica.release &= ~bit(link);
        fabric_link_destroy(&l->link[link]);
        monitor_release(&l->monitor, link);
    } else {
        uint32_t link = (uint32_t)__builtin_ctz(l->replica.back);
        l->replica.back &= ~bit(link);
        if (fabric_link_create(&l->fabric, &l->link[link]) ||
            monitor_connect(&l->monitor, link, &l->fabric, &l->link[link])) {
            fabric_link_destroy(&l->link[link]);
            l->replica.losses[link]++;
        }
    }
    pthread_mutex_unlock(&l->replica.quiet);
    return 0;
}

/* A second place for the region that was found to need one. */
static int find_place(struct lines *l)
{
    struct region *region = &l->region[l->replica.cursor];
    struct place place[COPIES];
    uint32_t without = closed(l) | bit(region->at[0].link);
    if (monitor_region(&l->monitor, (uint64_t)REGION_PAGES << PAGE_SHIFT, 1, without, place)) {
        tell(l, l->monitor.error);
        l->replica.stuck |= bit(region->at[0].link);
        return 0;
    }
    region->at[1] = place[0];
    region->copied = 0;
    return 0;
}

/* Copy the next pages of a region to its second place. Nothing may be flushed in between: a queue pair keeps its
 * requests in order, so a flush posted before is part of what is read, and one posted afterwards overwrites it. */
static void copy_some(struct lines *l, size_t r)
{
    struct region *region = &l->region[r];
    size_t at = region->copied, page[RUN_PAGES];
    uint64_t begin = trace_begin();
    uint32_t n = 0, blades = bit(region->at[0].link) | bit(region->at[1].link);
    for (; at < REGION_PAGES && n < l->together; at++)
        if (l->state[r * REGION_PAGES + at] & STORED)
            page[n++] = r * REGION_PAGES + at;
    if (n && !wire_copy(l, page, n))
        return; /* the second blade was lost in its turn */
    if (n)
        trace_done(TRACE_COPY, begin, r * REGION_PAGES, n, blades, 0);
    l->count->rereplicated_bytes += (uint64_t)n << PAGE_SHIFT;
    region->copied = (uint32_t)at;
    if (at == REGION_PAGES)
        count_degraded(l);
}

/* Is no place to be had for it, because none was for another on the same blade? */
static bool stuck(const struct lines *l, const struct region *region)
{
    return region->at[1].link == NO_LINK && l->replica.stuck & bit(region->at[0].link);
}

/* A region that should, and perhaps can, have another copy, or l->regions. */
static size_t next_degraded(struct lines *l)
{
    for (size_t i = 0; l->count->degraded_regions && i < l->regions; i++) {
        size_t r = (l->replica.cursor + i) % l->regions;
        if (degraded(l, &l->region[r]) && !stuck(l, &l->region[r]))
            return l->replica.cursor = r;
    }
    return l->regions;
}

/* Has nothing its only place with everything on this blade? */
static bool dispensable(const struct lines *l, uint32_t link)
{
    for (size_t r = 0; r < l->regions; r++)
        if (l->region[r].at[0].link == link && !whole(&l->region[r]))
            return false;
    return true;
}

/* Do without one blade that is drained and no longer needed. There may be regions whose places are on two such blades:
 * they need another place before the second goes. Was there one? */
static bool give_up_drained(struct lines *l)
{
    for (uint32_t link = 0; link < l->monitor.blades; link++)
        if (leaves(l, link) && l->link[link].qp && dispensable(l, link)) {
            replica_lost(l, link, "it was drained");
            return true;
        }
    return false;
}

/* Do with `work` what needs the process monitor, unless a thread of the program is asking it. */
static int with_monitor(struct lines *l, int (*work)(struct lines *l))
{
    if (pthread_mutex_trylock(&l->monitor.lock))
        return BUSY_MS;
    int pause = work(l);
    pthread_mutex_unlock(&l->monitor.lock);
    return pause;
}

int replica_step(struct lines *l)
{
    if (l->replica.release || l->replica.back)
        return with_monitor(l, tidy);
    if (give_up_drained(l))
        return 0;
    size_t r = next_degraded(l);
    if (r == l->regions) {
        int pause = l->replica.stuck ? FULL_MS : -1;
        l->replica.stuck = 0;
        return pause;
    }
    if (present(l) < 2) {
        tell(l, "no second memory blade is left");
        return -1;
    }
    if (l->region[r].at[1].link == NO_LINK)
        return with_monitor(l, find_place);
    copy_some(l, r);
    return 0;
}
