/* See watch.h. While the service lives, the thread only waits for its connection to hang up. After that it answers the
 * page faults of the dataset itself: what the memory file has is mapped, writable, and what it has not is not to be had,
 * so who asks for it gets SIGBUS, as under a mapped file that cannot be read.
 *
 * SIGBUS comes from a file without a byte, which is mapped in place of the page. UFFDIO_POISON would do the same, but
 * only since Linux 6.6. */
#define _GNU_SOURCE
#include "watch.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#define EXPORT __attribute__((visibility("default")))

enum { PAGE = 4096 };

struct watch {
    pthread_t thread;
    pid_t owner;
    int service; /* a duplicate: the program may close its own first */
    int faults;
    int stop;    /* an eventfd */
    int nothing; /* the empty file */
    uintptr_t memory;
    uint64_t size;
    char name[136];
    bool said;
};

/* Wait for one of `events` of a file; false: stop. */
static bool wait_for(const struct watch *w, int file, short events)
{
    struct pollfd files[] = {{.fd = w->stop, .events = POLLIN}, {.fd = file, .events = events}};
    while (poll(files, 2, -1) < 0 || !(files[0].revents | files[1].revents))
        ;
    return !files[0].revents;
}

static void say(struct watch *w, uintptr_t page)
{
    struct pollfd terminal = {.fd = STDERR_FILENO, .events = POLLOUT};
    if (!w->said && poll(&terminal, 1, 0) == 1) /* a pipe that nobody reads must not keep us */
        dprintf(STDERR_FILENO, "hotpot: SIGBUS at %zu of dataset '%s': that page is not here, and the service has gone\n",
                (size_t)(page - w->memory), w->name);
    w->said = true;
}

static void answer(struct watch *w, uintptr_t page)
{
    struct uffdio_range range = {page, PAGE};
    struct uffdio_continue map = {.range = range};
    struct uffdio_writeprotect unprotect = {.range = range};

    if (ioctl(w->faults, UFFDIO_CONTINUE, &map) == 0)
        return;
    if (errno == EEXIST && ioctl(w->faults, UFFDIO_WRITEPROTECT, &unprotect) == 0) /* it was there, for loads */
        return;
    if (errno != EAGAIN) { /* else it faults again */
        say(w, page);
        if (mmap((void *)page, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, w->nothing, 0) == MAP_FAILED)
            kill(getpid(), SIGBUS);
    }
    ioctl(w->faults, UFFDIO_WAKE, &range);
}

static void *run(void *given)
{
    struct watch *w = given;
    struct uffdio_range all = {w->memory, w->size};
    struct uffd_msg fault;

    if (!wait_for(w, w->service, POLLRDHUP))
        return NULL;
    ioctl(w->faults, UFFDIO_WAKE, &all); /* of whose faults the service has read, but not answered: they fault again */
    while (wait_for(w, w->faults, POLLIN))
        if (read(w->faults, &fault, sizeof fault) == sizeof fault && fault.event == UFFD_EVENT_PAGEFAULT)
            answer(w, fault.arg.pagefault.address & ~(uintptr_t)(PAGE - 1));
    return NULL;
}

/* Start the thread; it takes no signal from the program. An error number. */
static int start(struct watch *w)
{
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int failed = pthread_create(&w->thread, NULL, run, w);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return failed;
}

static void release(struct watch *w)
{
    int files[] = {w->service, w->stop, w->nothing};
    for (int i = 0; i < 3; i++)
        if (files[i] >= 0)
            close(files[i]);
    free(w);
}

EXPORT struct watch *hotpot_watch(int service, int faults, void *memory, uint64_t size, const char *name)
{
    struct watch *w = calloc(1, sizeof *w);
    if (!w)
        return NULL;
    w->owner = getpid();
    w->service = fcntl(service, F_DUPFD_CLOEXEC, 0);
    w->faults = faults;
    w->stop = eventfd(0, EFD_CLOEXEC);
    w->nothing = memfd_create("hotpot: nothing", MFD_CLOEXEC);
    w->memory = (uintptr_t)memory;
    w->size = size;
    snprintf(w->name, sizeof w->name, "%s", name);
    int failed = w->service < 0 || w->stop < 0 || w->nothing < 0 ? errno : start(w);
    if (failed) {
        release(w);
        errno = failed;
        return NULL;
    }
    return w;
}

EXPORT void hotpot_unwatch(struct watch *w)
{
    if (w->owner == getpid()) {
        eventfd_write(w->stop, 1);
        pthread_join(w->thread, NULL);
    }
    release(w);
}
