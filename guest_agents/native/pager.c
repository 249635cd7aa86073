/* The pager thread: reads page faults from userfaultfd and answers them from the ExCache (lines.c).
 *
 * It lives inside the program, because only a thread of the same process can evict private anonymous memory
 * (MADV_DONTNEED), and private memory keeps fork's copy-on-write right. The thread never touches managed memory
 * except pages it knows to be mapped, and allocates nothing from the managed heap: it would wait for itself.
 */
#define _GNU_SOURCE
#include "pager.h"

#include "attach.h"
#include "evict.h"
#include "family.h"
#include "lines.h"
#include "park.h"
#include "trace.h"
#include "wire.h"

#include <errno.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <unistd.h>

enum {
    MESSAGES = 1024,            /* threads that may wait while one forks: the kernel tells of their faults first */
    DRAIN_MOST = 16,            /* faults answered before the pager looks at what else there is to do */
    IDLE_MS = 1,                /* without faults, until pages are evicted ahead of need */
};

static struct lines lines;
static struct family family;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static const struct pager_config *config;

/* Faults read while looking for something more urgent (a fork); answered next. */
static struct waiting { int uffd; struct uffd_msg message; } waiting[MESSAGES];
static size_t n_waiting;
static bool overlapping;        /* faults may be read ahead of their turn */

static void miss(size_t page, bool write)
{
    uint64_t begin = trace_begin();
    struct counters before = {.misses = lines.count->misses, .bytes_in = lines.count->bytes_in,
                              .piggybacks = lines.count->piggybacks};
    lines.count->faults++;
    lines_miss(&lines, page, write);
    if (lines.count->misses != before.misses)
        trace_done(TRACE_MISS, begin, page, (lines.count->bytes_in - before.bytes_in) >> PAGE_SHIFT,
                   1u << region_of(&lines, page)->at[0].link, lines.count->piggybacks != before.piggybacks);
}

static void answer(int uffd, const struct uffd_msg *message)
{
    if (message->event == UFFD_EVENT_FORK) {
        uint64_t begin = trace_begin();
        lines.count->forks++;
        family_add(&family, uffd == lines.uffd ? NULL : family_find(&family, uffd), (int)message->arg.fork.ufd);
        trace_done(TRACE_FORK, begin, 0, 0, 0, 0);
        return;
    }
    if (message->event != UFFD_EVENT_PAGEFAULT)
        return;
    uint64_t flags = message->arg.pagefault.flags;
    size_t page = arena_page(lines.arena, (void *)(uintptr_t)message->arg.pagefault.address);
    bool protected = flags & UFFD_PAGEFAULT_FLAG_WP;
    if (uffd != lines.uffd)
        family_fault(&family, family_find(&family, uffd), page, protected);
    else if (protected)
        lines_write(&lines, page);
    else
        miss(page, flags & UFFD_PAGEFAULT_FLAG_WRITE);
}

/* A fork is under way in this program, or in a child: nothing can be installed until its event is read. */
static void on_busy(struct lines *l)
{
    for (size_t i = 0; i <= family.count; i++) {
        int uffd = i < family.count ? family.child[i].uffd : l->uffd;
        struct uffd_msg message;
        if (n_waiting == MESSAGES || uffd < 0 || read(uffd, &message, sizeof message) != sizeof message)
            continue;
        if (message.event == UFFD_EVENT_FORK) {
            answer(uffd, &message);
            return;
        }
        waiting[n_waiting].uffd = uffd;
        waiting[n_waiting++].message = message;
    }
    sched_yield();
}

/* A READ is under way: other threads may have missed pages too. */
static bool on_wait(struct lines *l)
{
    struct uffd_msg message;
    bool room = overlapping && n_waiting < MESSAGES && lines_may_start(l), asked = false;
    if (room && read(l->uffd, &message, sizeof message) == sizeof message) {
        if (message.event == UFFD_EVENT_FORK) {
            answer(l->uffd, &message);
            return true;
        }
        waiting[n_waiting].uffd = l->uffd;
        waiting[n_waiting++].message = message;
        if (message.event == UFFD_EVENT_PAGEFAULT && !(message.arg.pagefault.flags & UFFD_PAGEFAULT_FLAG_WP))
            lines_start(l, arena_page(l->arena, (void *)(uintptr_t)message.arg.pagefault.address));
        asked = true;
        room = n_waiting < MESSAGES && lines_may_start(l);
    }
    l->fabric.other[1] = room ? l->uffd : -1;
    return asked;
}

static void on_arrival(struct lines *l, size_t page, const char *data)
{
    (void)l;
    family_supply(&family, page, data);
}

static void drain(int uffd)
{
    struct uffd_msg message;
    for (int most = DRAIN_MOST;;) {
        while (n_waiting) { /* what has been started must be answered before the lock is given up, */
            overlapping = most-- > 0; /* but threads that take turns to miss would start something for ever */
            struct waiting next = waiting[0];
            memmove(waiting, waiting + 1, --n_waiting * sizeof *waiting);
            answer(next.uffd, &next.message);
        }
        if (most <= 0)
            return;
        /* One at a time: answering may need to read a fork's event, and must find it in its order. */
        if (read(uffd, &message, sizeof message) != sizeof message)
            return;
        overlapping = most-- > 0;
        answer(uffd, &message);
    }
}

static void gauge(void)
{
    lines.count->pages_held = lines.contents;
    lines.count->pages_mapped = lines.lined;
    lines.count->pages_pooled = pool_pages(&lines.pool);
}

/* Of two pauses, of which -1 is for ever. */
static int sooner(int a, int b)
{
    return a < 0 || (b >= 0 && b < a) ? b : a;
}

/* Evict while no fault is to be answered. Returns in how many milliseconds there is more of that; -1: when there were
 * other faults. The only processor is the program's first. */
static int evict_idly(bool idle)
{
    static int courtesy = -1;
    if (courtesy < 0)
        courtesy = sysconf(_SC_NPROCESSORS_ONLN) > 1 ? 0 : IDLE_MS;
    if (!idle)
        return courtesy;
    return evict_ahead(&lines) ? 0 : -1;
}

static void *run(void *unused)
{
    (void)unused;
    config->enter_thread();
    pthread_setname_np(pthread_self(), "rackless-pager");
    pthread_mutex_lock(&lock);
    evict_make_room(&lines, 0, 0); /* what the program had filled before is now to be shared with the line buffer */
    pthread_mutex_unlock(&lock);
    for (bool idle = false;;) {
        struct pollfd watch[2 + 2 * FAMILY_CHILDREN];
        nfds_t n = 0;
        pthread_mutex_lock(&lock);
        family_bury(&family);
        int pause = sooner(replica_step(&lines), family_settle(&family));
        pause = sooner(pause, evict_idly(idle));
        gauge();
        pause = trace_pause(pause);
        watch[n++] = (struct pollfd){.fd = lines.uffd, .events = POLLIN};
        watch[n++] = (struct pollfd){.fd = lines.monitor.news, .events = POLLIN};
        n += family_watch(&family, watch + n);
        pthread_mutex_unlock(&lock);
        int events = poll(watch, n, n_waiting ? 0 : pause);
        if (events == PARK_POLLED) {
            park(&lines, &lock, family.count > 0, config);
            continue;
        }
        if (events < 0 && errno != EINTR)
            lines_die("the pager cannot wait for faults: %s", strerror(errno));
        idle = events == 0 && !n_waiting;
        pthread_mutex_lock(&lock);
        trace_tick();
        replica_news(&lines);
        drain(lines.uffd);
        for (size_t i = 0; i < family.count; i++)
            if (family.child[i].uffd >= 0)
                drain(family.child[i].uffd);
        family_check(&family, watch + 2, n - 2);
        pthread_mutex_unlock(&lock);
    }
    return NULL;
}

static int reserve(struct arena *arena, size_t top)
{
    while (arena->reserved < top) {
        int error = replica_reserve(&lines, &lock);
        if (error == ENOMEM)
            return ENOMEM; /* malloc returns NULL: for the program to say */
        if (error)
            lines_die("%s", lines.monitor.error);
        arena->reserved = lines.regions * REGION_PAGES;
    }
    return 0;
}

static void give_back(struct arena *arena, size_t reserved)
{
    pthread_mutex_lock(&lock);
    for (size_t end = lines.regions * REGION_PAGES, page = reserved; page < end; page++)
        if (lines.state[page]) { /* freed before there was a pager, or touched since */
            family_before_drop(&family, page, 1);
            lines_drop(&lines, page, 1);
        }
    pthread_mutex_unlock(&lock);
    replica_give_back(&lines, &lock, reserved / REGION_PAGES);
    arena->reserved = lines.regions * REGION_PAGES;
}

static void drop(struct arena *arena, size_t page, size_t count)
{
    (void)arena;
    pthread_mutex_lock(&lock);
    family_before_drop(&family, page, count);
    lines_drop(&lines, page, count);
    pthread_mutex_unlock(&lock);
}

static void end(void)
{
    trace_end();
    family_kill(&family);
}

static void settle(void)
{
    pthread_mutex_lock(&lock);
    pthread_mutex_unlock(&lock);
}

static void hush(bool on)
{
    if (on)
        pthread_mutex_lock(&lines.replica.quiet);
    else
        pthread_mutex_unlock(&lines.replica.quiet);
}

static void before_fork(void)
{
    family_before_fork(&family);
}

static void after_fork_parent(void)
{
    pthread_mutex_lock(&lock); /* the pager may still be busy with the event */
    family_after_fork_parent(&family);
    pthread_mutex_unlock(&lock);
}

static void after_fork_child(void)
{
    family_after_fork_child(&family);
    config->close(lines.uffd);
    config->close(lines.monitor.socket);
    config->close(lines.monitor.news);
    config->close(lines.region_file);
}

static void before_exit(void)
{
    pthread_mutex_lock(&lock);
    family_complete_all(&family);
    gauge();
    trace_end();
    pthread_mutex_unlock(&lock);
}

static const char *start(struct arena *arena, size_t *excache_pages)
{
    lines = (struct lines){.uffd = -1};
    pthread_mutex_init(&lines.replica.quiet, NULL);
    if (*excache_pages < LINES_MIN_PAGES)
        *excache_pages = LINES_MIN_PAGES;
    lines.count = attach_counters(config->job, *excache_pages);
    if (lines.count)
        trace_open(config->job, lines.count);
    lines.on_busy = on_busy;
    lines.on_wait = on_wait;
    lines.on_arrival = on_arrival;
    family.lines = &lines;
    lines_end = end;
    family.guard = config->guard;
    family.close = config->close;
    if (!lines.count || monitor_attach(&lines.monitor, config->job))
        return lines.monitor.error;
    if (lines_init(&lines, arena, *excache_pages, &config->organisation))
        return "no memory for the pager's books";
    const char *refused = attach_device(&lines);
    if (!refused)
        refused = attach_blades(&lines, config->copies);
    if (refused)
        return refused;
    lines.replica.copies = config->copies;
    arena->reserved = 0;
    if (reserve(arena, arena->top)) {
        arena->reserved = arena->top;
        return lines.monitor.error;
    }
    int uffd;
    refused = attach_faults(arena, &uffd);
    if (refused)
        return refused;
    attach_guard(&lines, uffd, config->guard);
    lines_adopt(&lines, uffd);
    return NULL;
}

static const struct pager pager = {
    .reserve = reserve,
    .give_back = give_back,
    .drop = drop,
    .settle = settle,
    .hush = hush,
    .before_fork = before_fork,
    .after_fork_parent = after_fork_parent,
    .after_fork_child = after_fork_child,
    .before_exit = before_exit,
};

const struct pager *pager_start(struct arena *arena, const struct pager_config *given)
{
    config = given;
    size_t excache_pages = given->excache_pages;
    const char *why = start(arena, &excache_pages);
    if (why) {
        dprintf(STDERR_FILENO, "rackless: no remote memory: %s\n", why);
        for (uint32_t i = 0; i < lines.monitor.blades; i++)
            fabric_link_destroy(&lines.link[i]);
        monitor_leave(&lines.monitor); /* what it lent us goes back: the program may try again */
        return NULL;
    }
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before); /* the program's signals are for its own threads */
    pthread_t thread;
    int error = pthread_create(&thread, NULL, run, NULL);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (error)
        lines_die("no pager thread: %s", strerror(error)); /* memory is registered already: nobody would answer */
    pthread_detach(thread);
    return &pager;
}
