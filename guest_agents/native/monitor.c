#define _GNU_SOURCE
#include "monitor.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

enum { MESSAGE = 1024, REPLY_SECONDS = 60 };

static int fail(struct monitor *m, int error, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    vsnprintf(m->error, sizeof m->error, format, args);
    va_end(args);
    return error;
}

/* One request, one reply: "ok words...", or "error ERRNO text". Returns the words after "ok" in `text`. */
static int ask(struct monitor *m, char text[MESSAGE])
{
    ssize_t got;
    if (send(m->socket, text, strlen(text), MSG_NOSIGNAL) < 0)
        return fail(m, EPIPE, "the process monitor has gone: %s", strerror(errno));
    do
        got = recv(m->socket, text, MESSAGE - 1, 0);
    while (got < 0 && errno == EINTR);
    if (got <= 0)
        return fail(m, EPIPE, "the process monitor does not answer: %s", got ? strerror(errno) : "it has gone");
    text[got] = 0;
    if (!strncmp(text, "ok", 2)) {
        memmove(text, text + (text[2] ? 3 : 2), (size_t)got - 1);
        return 0;
    }
    char *rest = text;
    int error = strncmp(text, "error ", 6) ? EPROTO : (int)strtol(text + 6, &rest, 10);
    return fail(m, error ? error : EPROTO, "%s", rest + (*rest == ' '));
}

int monitor_attach(struct monitor *m, const char *job)
{
    m->socket = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
    struct sockaddr_un name = {.sun_family = AF_UNIX, .sun_path = MONITOR_SOCKET};
    struct timeval patience = {.tv_sec = REPLY_SECONDS};
    if (m->socket < 0 || connect(m->socket, (struct sockaddr *)&name, sizeof name))
        return fail(m, errno, "no process monitor at %s: %s", MONITOR_SOCKET, strerror(errno));
    setsockopt(m->socket, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
    char text[MESSAGE];
    snprintf(text, sizeof text, "attach %d %s", (int)getpid(), job);
    int error = ask(m, text);
    if (error)
        return error;
    char *save = NULL;
    for (char *word = strtok_r(text, " ", &save); word; word = strtok_r(NULL, " ", &save))
        if (m->blades < COUNTERS_BLADES)
            snprintf(m->name[m->blades++], COUNTERS_NAME, "%.31s", word);
    return m->blades ? 0 : fail(m, ENOMEM, "the rack has no memory blade");
}

static void print_gid(char text[33], const union ibv_gid *gid)
{
    for (int i = 0; i < 16; i++)
        sprintf(text + 2 * i, "%02x", gid->raw[i]);
}

static int parse_gid(const char *text, union ibv_gid *gid)
{
    for (int i = 0; i < 16; i++) {
        unsigned byte;
        if (sscanf(text + 2 * i, "%2x", &byte) != 1)
            return -1;
        gid->raw[i] = (uint8_t)byte;
    }
    return 0;
}

int monitor_connect(struct monitor *m, uint32_t blade, struct fabric *f, struct fabric_link *link)
{
    char text[MESSAGE], gid[33];
    print_gid(gid, &f->gid);
    snprintf(text, sizeof text, "connect %s %u %u %s", m->name[blade], link->qp->qp_num, link->psn, gid);
    int error = ask(m, text);
    if (error)
        return error;
    uint32_t qpn, psn;
    union ibv_gid peer;
    if (sscanf(text, "%u %u %32s", &qpn, &psn, gid) != 3 || parse_gid(gid, &peer))
        return fail(m, EPROTO, "the process monitor's answer makes no sense: %.60s", text);
    error = fabric_link_connect(f, link, qpn, psn, &peer);
    return error ? fail(m, -error, "no RDMA connection to %s: %s", m->name[blade], strerror(-error)) : 0;
}

int monitor_region(struct monitor *m, uint64_t bytes, struct region *region)
{
    char text[MESSAGE];
    snprintf(text, sizeof text, "region %lu", (unsigned long)bytes);
    int error = ask(m, text);
    if (error)
        return error;
    unsigned long address;
    if (sscanf(text, "%u %lu %u", &region->link, &address, &region->rkey) != 3 || region->link >= m->blades)
        return fail(m, EPROTO, "the process monitor's answer makes no sense: %.60s", text);
    region->address = address;
    return 0;
}
