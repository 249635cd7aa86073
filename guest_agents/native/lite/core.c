/* The thread: it sleeps until a program or the fabric wants something, and looks around a little before it does. */
#define _GNU_SOURCE
#include "core.h"

#include <errno.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

enum {
    WAKE = 0, COMPLETIONS = 1, FIRST_CHANNEL = 2, /* what an epoll event is about; channels: their id */
    EPOLL_EVENTS_AT_ONCE = 16,
    LONGEST_SLEEP_MS = 1000, /* safety net: a lost event must not become a hang */
    LOOKS = 4, /* while something is on the fabric, only every so many rounds take the time for system calls */
};
static const uint64_t NS_PER_MS = 1000000;

uint64_t core_clock(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

void core_enter(struct core *core)
{
    pthread_mutex_lock(&core->lock);
    core->now = core_clock();
}

void core_leave(struct core *core)
{
    pieces_flush(core);
    pthread_mutex_unlock(&core->lock);
}

void core_wait(struct core *core)
{
    pieces_flush(core);
    core_wake(core);
    struct timespec until;
    clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_sec++;
    pthread_cond_clockwait(&core->changed, &core->lock, CLOCK_MONOTONIC, &until);
    core->now = core_clock();
}

void core_wake(struct core *core)
{
    uint64_t one = 1;
    if (!pthread_equal(core->thread, pthread_self()) && write(core->wake, &one, sizeof one) < 0) {
        /* it is full: then the thread is awake already */
    }
}

void core_alarm(struct core *core, uint64_t when)
{
    if (when >= core->next_deadline)
        return;
    core->next_deadline = when;
    core_wake(core);
}

void core_event(struct core *core, uint32_t kind, uint32_t node, uint32_t incarnation, uint32_t port, uint64_t client)
{
    if (core->events == EVENTS) { /* nobody fetches them: the oldest is the least use */
        core->event_first = (core->event_first + 1) % EVENTS;
        core->events--;
    }
    core->event[(core->event_first + core->events++) % EVENTS] =
        (struct lite_event){kind, node, incarnation, port, client};
    pthread_cond_broadcast(&core->event_came);
}

API int lite_next_event(struct core *core, uint32_t timeout_ms, struct lite_event *out)
{
    struct timespec until;
    clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_sec += timeout_ms / 1000;
    until.tv_nsec += (long)(timeout_ms % 1000) * (long)NS_PER_MS;
    if (until.tv_nsec >= 1000000000) {
        until.tv_sec++;
        until.tv_nsec -= 1000000000;
    }
    pthread_mutex_lock(&core->lock);
    int error = 0;
    while (!core->events && !error)
        error = pthread_cond_clockwait(&core->event_came, &core->lock, CLOCK_MONOTONIC, &until);
    int code = LITE_TIMED_OUT;
    if (core->events) {
        *out = core->event[core->event_first];
        core->event_first = (core->event_first + 1) % EVENTS;
        core->events--;
        code = 0;
    }
    pthread_mutex_unlock(&core->lock);
    return code;
}

/* Read what programs sent. True if there was anything. */
static bool read_hot(struct core *core)
{
    struct link hot;
    list_init(&hot);
    list_splice(&hot, &core->hot);
    bool any = false;
    for (struct channel *channel; (channel = FIRST(&hot, struct channel, hot));) {
        list_remove(&channel->hot);
        any |= channel_read(core, channel);
    }
    return any;
}

static bool look(struct core *core, int timeout_ms)
{
    struct epoll_event event[EPOLL_EVENTS_AT_ONCE];
    int n = epoll_wait(core->epoll, event, EPOLL_EVENTS_AT_ONCE, timeout_ms);
    if (n <= 0)
        return false;
    pthread_mutex_lock(&core->lock);
    for (int i = 0; i < n; i++) {
        uint64_t unused;
        if (event[i].data.u64 == WAKE) {
            if (read(core->wake, &unused, sizeof unused) < 0) {
                /* somebody else's wake-up, already read */
            }
        } else if (event[i].data.u64 == COMPLETIONS) {
            struct ibv_cq *cq;
            void *context;
            if (ibv_get_cq_event(core->completions, &cq, &context) == 0)
                ibv_ack_cq_events(cq, 1);
        } else {
            struct channel *channel = table_find(&core->channels, event[i].data.u64);
            if (channel && event[i].events & EPOLLOUT)
                channel_writable(core, channel);
            if (channel && event[i].events & ~(uint32_t)EPOLLOUT)
                list_append(&core->hot, &channel->hot);
        }
    }
    pthread_mutex_unlock(&core->lock);
    return true;
}

struct round {
    bool any;       /* something was done */
    bool expecting; /* something is on the fabric */
    uint64_t now, next;
};

/* One look at everything. */
static struct round work(struct core *core)
{
    core_enter(core);
    bool any = pieces_reap(core);
    any |= mail_collect(core);
    any |= read_hot(core);
    if (core->now >= core->next_deadline) {
        core->next_deadline = UINT64_MAX;
        ops_expire(core);
        core->again = true;
    }
    if (core->again) {
        core->again = false;
        any = true;
        for (uint32_t node = 0; node < NODES; node++)
            if (core->by_node[node])
                transfer_pump(core, core->by_node[node]);
    }
    core->turn++;
    core->stats.polls += !any;
    struct round round = {any, core->stats.pieces || core->stats.slots_used, core->now, core->next_deadline};
    core_leave(core);
    return round;
}

static void set_asleep(struct core *core, bool asleep)
{
    pthread_mutex_lock(&core->lock);
    mail_asleep(core, asleep);
    pthread_mutex_unlock(&core->lock);
}

static void sleep_until_event(struct core *core)
{
    /* Arm, look once more, then sleep: an entry that came before arming raises no event. */
    set_asleep(core, true);
    ibv_req_notify_cq(core->cq, 0);
    struct round round = work(core);
    if (!round.any) {
        uint64_t ms = round.next <= round.now ? 0 : (round.next - round.now) / NS_PER_MS + 1;
        __atomic_fetch_add(&core->stats.sleeps, 1, __ATOMIC_RELAXED);
        look(core, ms < LONGEST_SLEEP_MS ? (int)ms : LONGEST_SLEEP_MS);
    }
    set_asleep(core, false);
}

/* How long to look around before sleeping, when the usual time between two things to do is `gap` (all in ns): as long
 * as it is likely to pay. */
static uint64_t patience(const struct core *core, uint64_t gap, bool expecting)
{
    uint64_t most = (uint64_t)core->config.spin_us * 1000;
    if (expecting)
        return most;
    return gap > most ? 0 : 2 * gap < most ? 2 * gap : most;
}

static void *run(void *argument)
{
    struct core *core = argument;
    pthread_setname_np(pthread_self(), "lite-core");
    uint64_t active = core_clock(), gap = 4000ull * core->config.spin_us;
    for (uint32_t idle = 0; !__atomic_load_n(&core->stopping, __ATOMIC_RELAXED); idle++) {
        struct round round = work(core);
        if (round.any) {
            uint64_t since = round.now - active, most = 4000ull * core->config.spin_us;
            gap = (3 * gap + (since < most ? since : most)) / 4; /* one long pause says little about the next */
            active = round.now;
            idle = 0;
        } else if (round.now - active >= patience(core, gap, round.expecting)) {
            sleep_until_event(core);
            continue;
        }
        if (!round.expecting || idle % LOOKS == 0) {
            sched_yield(); /* to the program that was answered, or the kernel's worker that sends what was posted */
            look(core, 0);
        }
    }
    return NULL;
}

static void destroy(struct core *core)
{
    if (core->started) {
        __atomic_store_n(&core->stopping, true, __ATOMIC_RELAXED);
        uint64_t one = 1;
        if (write(core->wake, &one, sizeof one) < 0) {
            /* full: it wakes anyway */
        }
        pthread_join(core->thread, NULL);
    }
    if (core->context) {
        pthread_mutex_lock(&core->lock);
        peers_break(core);
        clients_close(core);
        rpc_close(core);
        lmrs_close(core);
        peers_close(core);
        pthread_mutex_unlock(&core->lock);
    }
    device_close(core);
    qos_close(core);
    table_free(&core->clients);
    table_free(&core->channels);
    table_free(&core->lmrs);
    for (struct op *op; (op = FIRST(&core->free_ops, struct op, wait));) {
        list_remove(&op->wait);
        free(op);
    }
    close(core->epoll);
    close(core->wake);
    free(core);
}

API int lite_open(const struct lite_config *config, struct core **out)
{
    struct core *core = calloc(1, sizeof *core);
    if (!core)
        return LITE_NO_MEMORY;
    core->config = *config;
    if (!config->queue_pairs || config->queue_pairs > MAX_QPS || config->qos > 2) {
        free(core);
        return LITE_BAD_ARGUMENT;
    }
    pthread_mutex_init(&core->lock, NULL);
    pthread_cond_init(&core->changed, NULL);
    pthread_cond_init(&core->event_came, NULL);
    struct link *lists[] = {&core->hot, &core->timed, &core->free_ops, &core->free_pieces, &core->starved,
                            &core->mailboxes};
    for (size_t i = 0; i < sizeof lists / sizeof *lists; i++)
        list_init(lists[i]);
    core->next_deadline = UINT64_MAX;
    core->channel_ids = FIRST_CHANNEL;
    core->epoll = epoll_create1(EPOLL_CLOEXEC);
    core->wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    size_t half = config->pool / 2;
    pool_init(&core->packets, PACKET_BYTES, 32, half);
    pool_init(&core->chunks, CHUNK, 4, half);
    int code = core->epoll < 0 || core->wake < 0 || qos_open(core) ? LITE_NO_MEMORY : device_open(core);
    if (!code)
        code = rpc_open(core);
    struct epoll_event wake = {.events = EPOLLIN, .data.u64 = WAKE};
    struct epoll_event completions = {.events = EPOLLIN, .data.u64 = COMPLETIONS};
    if (!code && (epoll_ctl(core->epoll, EPOLL_CTL_ADD, core->wake, &wake) ||
                  epoll_ctl(core->epoll, EPOLL_CTL_ADD, core->completions->fd, &completions)))
        code = LITE_NO_MEMORY;
    if (!code) {
        sigset_t all, before;
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &before); /* signals are for the agent's own threads */
        code = pthread_create(&core->thread, NULL, run, core) ? LITE_NO_MEMORY : 0;
        pthread_sigmask(SIG_SETMASK, &before, NULL);
        core->started = !code;
    }
    if (code) {
        int error = errno;
        destroy(core);
        errno = error;
        return code;
    }
    *out = core;
    return 0;
}

API int lite_close(struct core *core)
{
    destroy(core);
    return 0;
}

API int lite_stats(struct core *core, struct lite_stats *out)
{
    core_enter(core);
    *out = core->stats;
    out->clients = core->clients.count;
    out->channels = core->channels.count;
    out->lmrs = core->lmrs.count;
    out->pool_used = core->packets.used * core->packets.bytes_each + core->chunks.used * core->chunks.bytes_each;
    out->bytes_pool = core->packets.allocated + core->chunks.allocated;
    for (uint32_t i = 0; i < core->slabs; i++)
        out->bytes_slabs += core->slab[i]->region.size;
    for (uint32_t node = 0; node < NODES && out->n_peers < MAX_PEERS; node++) {
        const struct peer *peer = core->by_node[node];
        if (!peer || peer->state == PEER_DEAD)
            continue;
        out->queue_pairs += peer->pairs;
        uint64_t waiting = 0;
        for (int priority = 0; priority < LITE_PRIORITIES; priority++)
            for (struct link *link = peer->wait[priority].next; link != &peer->wait[priority]; link = link->next)
                waiting++;
        out->peers[out->n_peers++] =
            (struct lite_peer_stats){peer->node, peer->incarnation, peer->state, peer->pairs,
                                     peer->in_flight, waiting, peer->bytes_out, peer->bytes_in};
    }
    core_leave(core);
    return 0;
}
