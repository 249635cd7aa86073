#define _GNU_SOURCE
#include "family.h"

#include "evict.h"

#include <errno.h>
#include <linux/userfaultfd.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

static const char zero_page[PAGE_SIZE] __attribute__((aligned(PAGE_SIZE)));

enum { SETTLE_MS = 50 }; /* after a fork: whoever calls exec has mostly done so by then */

static size_t heir_bytes(size_t words)
{
    return sizeof(struct heir) + words * sizeof(uint64_t);
}

static uint64_t milliseconds(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000 + (uint64_t)t.tv_nsec / 1000000;
}

static void bury(struct family *f, struct child *child)
{
    char text[32];
    snprintf(text, sizeof text, "forgo %u", child->number);
    send(f->lines->monitor.socket, text, strlen(text), MSG_NOSIGNAL | MSG_DONTWAIT);
    f->close(child->uffd);
    f->close(child->channel);
    munmap(child->heir, heir_bytes(child->words));
    *child = (struct child){.uffd = -1, .channel = -1};
}

/* Marks a child whose address space has gone. Only the pager thread closes descriptors: it may be polling them. */
static void forget(struct child *child)
{
    child->uffd = child->uffd >= 0 ? -2 - child->uffd : child->uffd;
}

static void give(struct family *f, struct child *child, size_t page, const char *data)
{
    int error = lines_install(f->lines, child->uffd, page, data, 1, false);
    if (error == ESRCH) {
        forget(child);
        return;
    }
    if (error == EEXIST) {
        struct uffdio_range range = {(uintptr_t)arena_address(f->lines->arena, page), PAGE_SIZE};
        ioctl(child->uffd, UFFDIO_WAKE, &range);
    }
    if (page / 64 < child->words)
        bit_clear(child->needs, page);
}

static bool needs(const struct child *child, size_t page)
{
    return child->uffd >= 0 && page / 64 < child->words && bit_test(child->needs, page);
}

/* Give a child all it still needs; it no longer depends on us then. */
static void complete(struct family *f, struct child *child)
{
    size_t end = child->words * 64;
    for (size_t page = 0; child->uffd >= 0 && (page = bits_next_set(child->needs, page, end)) < end; page++)
        give(f, child, page, lines_peek(f->lines, page));
    if (child->uffd < 0)
        return;
    struct uffdio_range whole = {(uintptr_t)f->lines->arena->base, f->lines->arena->pages << PAGE_SHIFT};
    ioctl(child->uffd, UFFDIO_UNREGISTER, &whole);
    forget(child);
}

enum { DESCRIPTORS = 3 };

static void send_descriptors(int socket, const char *text, const int *descriptor, size_t n)
{
    size_t bytes = n * sizeof *descriptor;
    char space[CMSG_SPACE(DESCRIPTORS * sizeof *descriptor)] = {0};
    struct iovec data = {(char *)text, strlen(text)};
    struct msghdr message = {.msg_iov = &data, .msg_iovlen = 1, .msg_control = space, .msg_controllen = CMSG_SPACE(bytes)};
    struct cmsghdr *header = CMSG_FIRSTHDR(&message);
    *header = (struct cmsghdr){.cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS, .cmsg_len = CMSG_LEN(bytes)};
    memcpy(CMSG_DATA(header), descriptor, bytes);
    sendmsg(socket, &message, MSG_NOSIGNAL | MSG_DONTWAIT);
}

static int receive_descriptor(int socket)
{
    char byte, space[CMSG_SPACE(sizeof(int))] = {0};
    struct iovec data = {&byte, 1};
    struct msghdr message = {.msg_iov = &data, .msg_iovlen = 1, .msg_control = space, .msg_controllen = sizeof space};
    ssize_t got;
    do
        got = recvmsg(socket, &message, MSG_CMSG_CLOEXEC);
    while (got < 0 && errno == EINTR);
    struct cmsghdr *header = got == 1 ? CMSG_FIRSTHDR(&message) : NULL;
    int descriptor = -1;
    if (header && header->cmsg_type == SCM_RIGHTS)
        memcpy(&descriptor, CMSG_DATA(header), sizeof descriptor);
    return descriptor;
}

/* Tell the process monitor of a child. It answers nothing: a fork must not wait for it. */
static void announce(struct family *f, struct child *child, int file)
{
    char text[32];
    const int descriptor[DESCRIPTORS] = {child->uffd, file, f->lines->region_file};
    snprintf(text, sizeof text, "heir %u", child->number);
    send_descriptors(f->lines->monitor.socket, text, descriptor, DESCRIPTORS);
}

static void make_heir(struct family *f, struct child *child)
{
    const struct arena *arena = f->lines->arena;
    size_t bytes = heir_bytes(child->words);
    int file = memfd_create("rackless-heir", MFD_CLOEXEC);
    if (file < 0 || ftruncate(file, (off_t)bytes) ||
        (child->heir = (void *)syscall(SYS_mmap, NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0L)) == MAP_FAILED)
        lines_die("no memory to note what a forked child needs: %s", strerror(errno));
    madvise(child->heir, bytes, MADV_DONTFORK);
    child->heir->base = (uintptr_t)arena->base;
    child->heir->pages = arena->pages;
    child->heir->words = child->words;
    child->needs = child->heir->needs;
    announce(f, child, file);
    close(file);
}

void family_add(struct family *f, struct child *parent, int uffd)
{
    struct lines *l = f->lines;
    if (f->count == FAMILY_CHILDREN)
        lines_die("more than %d forked children that have not called exec", FAMILY_CHILDREN);
    struct child *child = &f->child[f->count++];
    f->guard(uffd);
    *child = (struct child){.number = ++f->numbers, .uffd = uffd, .channel = -1, .words = (l->arena->top + 63) / 64};
    make_heir(f, child);
    if (!f->settle_at)
        f->settle_at = milliseconds() + SETTLE_MS;
    if (parent && parent->uffd >= 0) {
        size_t words = parent->words < child->words ? parent->words : child->words;
        memcpy(child->needs, parent->needs, words * 8);
    } else if (!parent) {
        for (size_t page = 0; page < l->arena->top; page++) {
            unsigned state = l->state[page] & STATE_MASK;
            if (state != MAPPED && state != UNTOUCHED)
                bit_set(child->needs, page);
        }
        if (f->forking && !f->taken) {
            child->channel = f->channel[0];
            f->taken = true;
            send_descriptors(child->channel, ".", &uffd, 1);
        }
    }
}

/* Nobody tells us when a child's child ends or calls exec; but then there is nothing of it to be protected. */
static void look_after(struct family *f)
{
    for (size_t i = 0; i < f->count; i++) {
        struct uffdio_writeprotect nothing = {.range = {(uintptr_t)f->lines->arena->base, PAGE_SIZE}};
        if (f->child[i].channel < 0 && f->child[i].uffd >= 0 &&
            ioctl(f->child[i].uffd, UFFDIO_WRITEPROTECT, &nothing) && errno == ESRCH)
            forget(&f->child[i]);
    }
}

int family_settle(struct family *f)
{
    if (!f->settle_at)
        return -1;
    uint64_t now = milliseconds();
    if (now < f->settle_at)
        return (int)(f->settle_at - now);
    f->settle_at = 0;
    look_after(f);
    bool stored = false;
    for (size_t i = 0; i < f->count; i++) {
        if (f->child[i].uffd < 0)
            continue;
        if (!stored)
            evict_store_all(f->lines);
        stored = true;
        f->child[i].heir->settled = 1;
    }
    return -1;
}

struct child *family_find(struct family *f, int uffd)
{
    for (size_t i = 0; i < f->count; i++)
        if (f->child[i].uffd == uffd)
            return &f->child[i];
    return NULL;
}

void family_fault(struct family *f, struct child *child, size_t page, bool protected)
{
    if (!child)
        return;
    if (protected) {
        struct uffdio_writeprotect wp = {.range = {(uintptr_t)arena_address(f->lines->arena, page), PAGE_SIZE}};
        while (ioctl(child->uffd, UFFDIO_WRITEPROTECT, &wp) && errno == EAGAIN)
            f->lines->on_busy(f->lines);
        return;
    }
    give(f, child, page, needs(child, page) ? lines_peek(f->lines, page) : zero_page);
}

void family_supply(struct family *f, size_t page, const char *data)
{
    for (size_t i = 0; i < f->count; i++)
        if (needs(&f->child[i], page))
            give(f, &f->child[i], page, data);
}

void family_before_drop(struct family *f, size_t page, size_t count)
{
    for (size_t i = 0; i < f->count; i++)
        for (size_t k = page; k < page + count; k++)
            if (needs(&f->child[i], k))
                give(f, &f->child[i], k, lines_peek(f->lines, k));
}

void family_complete_all(struct family *f)
{
    for (size_t i = 0; i < f->count; i++)
        complete(f, &f->child[i]);
}

void family_bury(struct family *f)
{
    if (f->count >= FAMILY_CHILDREN / 4)
        look_after(f);
    for (size_t i = 0; i < f->count;) {
        if (f->child[i].uffd >= 0) {
            i++;
            continue;
        }
        if (f->child[i].uffd <= -2)
            f->child[i].uffd = -2 - f->child[i].uffd;
        bury(f, &f->child[i]);
        f->child[i] = f->child[--f->count];
    }
}

/* struct uffdio_poison: Linux 6.6, and headers may be older. */
struct poison {
    struct uffdio_range range;
    uint64_t mode;
    int64_t updated;
};
#define POISON _IOWR(UFFDIO, 0x08, struct poison)

/* What a child needs is lost: it gets SIGBUS where it touches that. */
static void spoil(struct family *f, struct child *child)
{
    size_t end = child->words * 64;
    for (size_t page = 0; child->uffd >= 0 && (page = bits_next_set(child->needs, page, end)) < end; page++) {
        struct poison poison = {.range = {(uintptr_t)arena_address(f->lines->arena, page), PAGE_SIZE}};
        ioctl(child->uffd, POISON, &poison);
    }
}

void family_kill(struct family *f)
{
    bool alone = send(f->lines->monitor.socket, "forgo 0", 7, MSG_NOSIGNAL | MSG_DONTWAIT) < 0 && errno != EAGAIN;
    for (size_t i = 0; alone && i < f->count; i++)
        spoil(f, &f->child[i]); /* no process monitor takes care of them */
    for (size_t i = 0; i < f->count; i++) {
        pid_t pid;
        if (f->child[i].channel >= 0 && recv(f->child[i].channel, &pid, sizeof pid, MSG_DONTWAIT) == sizeof pid)
            kill(pid, SIGKILL);
    }
}

nfds_t family_watch(struct family *f, struct pollfd *watch)
{
    nfds_t n = 0;
    for (size_t i = 0; i < f->count; i++) {
        watch[n++] = (struct pollfd){.fd = f->child[i].uffd, .events = POLLIN};
        if (f->child[i].channel >= 0)
            watch[n++] = (struct pollfd){.fd = f->child[i].channel}; /* POLLHUP */
    }
    return n;
}

void family_check(struct family *f, const struct pollfd *watch, nfds_t n)
{
    for (nfds_t k = 0; k < n; k++)
        for (size_t i = 0; i < f->count; i++)
            if (watch[k].fd == f->child[i].channel && (watch[k].revents & (POLLHUP | POLLERR)))
                forget(&f->child[i]);
}

void family_before_fork(struct family *f)
{
    f->taken = false;
    f->forking = socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, f->channel) == 0;
    if (f->forking) {
        f->guard(f->channel[0]);
        f->guard(f->channel[1]);
    }
}

void family_after_fork_parent(struct family *f)
{
    if (!f->forking)
        return;
    f->forking = false;
    f->close(f->channel[1]);
    if (!f->taken) /* fork failed */
        f->close(f->channel[0]);
}

void family_after_fork_child(struct family *f)
{
    if (!f->forking)
        return;
    f->close(f->channel[0]);
    f->lifeline = receive_descriptor(f->channel[1]);
    pid_t self = getpid();
    send(f->channel[1], &self, sizeof self, MSG_NOSIGNAL); /* for family_kill */
    f->guard(f->lifeline); /* both descriptors stay open until exec or exit */
}
