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

static const struct timeval patience = {.tv_sec = REPLY_SECONDS};

static int fail(struct monitor *m, int error, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    vsnprintf(m->error, sizeof m->error, format, args);
    va_end(args);
    return error;
}

/* What came unasked before a reply. Nothing is missed: the blades that are there are asked for afterwards. */
static int is_news(const char text[MESSAGE])
{
    return !strncmp(text, "lost ", 5) || !strncmp(text, "back ", 5) || !strncmp(text, "drain ", 6) ||
           !strncmp(text, "keep ", 5);
}

/* One request, one reply: "ok words...", or "error ERRNO text". Returns the words after "ok" in `text`. */
static int ask_at(struct monitor *m, int socket, char text[MESSAGE])
{
    ssize_t got;
    if (send(socket, text, strlen(text), MSG_NOSIGNAL) < 0)
        return fail(m, EPIPE, "the process monitor has gone: %s", strerror(errno));
    do
        got = recv(socket, text, MESSAGE - 1, 0);
    while ((got < 0 && errno == EINTR) || (got > 0 && is_news(text)));
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

static int ask(struct monitor *m, char text[MESSAGE])
{
    return ask_at(m, m->socket, text);
}

static int call(struct monitor *m, int *at)
{
    *at = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
    struct sockaddr_un name = {.sun_family = AF_UNIX, .sun_path = MONITOR_SOCKET};
    if (*at < 0 || connect(*at, (struct sockaddr *)&name, sizeof name))
        return fail(m, errno, "no process monitor at %s: %s", MONITOR_SOCKET, strerror(errno));
    setsockopt(*at, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
    return 0;
}

int monitor_attach(struct monitor *m, const char *job)
{
    pthread_mutex_init(&m->lock, NULL);
    m->news = m->socket = -1;
    char text[MESSAGE] = "watch";
    int error = call(m, &m->socket);
    if (!error)
        error = call(m, &m->news);
    if (!error) /* before it is known which blades there are, so that no loss is missed */
        error = ask_at(m, m->news, text);
    if (error)
        return error;
    snprintf(text, sizeof text, "attach %d %s", (int)getpid(), job);
    error = ask(m, text);
    if (error)
        return error;
    char *save = NULL;
    for (char *word = strtok_r(text, " ", &save); word; word = strtok_r(NULL, " ", &save))
        if (m->blades < COUNTERS_BLADES)
            snprintf(m->name[m->blades++], COUNTERS_NAME, "%.31s", word);
    return m->blades ? 0 : fail(m, ENOMEM, "the rack has no memory blade");
}

void monitor_leave(struct monitor *m)
{
    if (m->socket >= 0)
        close(m->socket);
    if (m->news >= 0)
        close(m->news);
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

int monitor_release(struct monitor *m, uint32_t blade)
{
    char text[MESSAGE];
    snprintf(text, sizeof text, "release %s", m->name[blade]);
    return ask(m, text);
}

int monitor_region(struct monitor *m, uint64_t bytes, uint32_t copies, uint32_t without, struct place place[COPIES])
{
    char text[MESSAGE], *at = text, *save = NULL;
    at += sprintf(text, "region %lu %u", (unsigned long)bytes, copies);
    for (uint32_t link = 0; link < m->blades; link++)
        if (without >> link & 1)
            at += sprintf(at, " %u", link);
    int error = ask(m, text);
    if (error)
        return error;
    char all[MESSAGE];
    strcpy(all, text);
    char *word = strtok_r(text, " ", &save);
    for (uint32_t i = 0; i < copies; i++) {
        char *words[3];
        for (int k = 0; k < 3; k++, word = strtok_r(NULL, " ", &save))
            words[k] = word ? word : "";
        place[i].link = (uint32_t)strtoul(words[0], NULL, 10);
        place[i].address = strtoull(words[1], NULL, 10);
        place[i].rkey = (uint32_t)strtoul(words[2], NULL, 10);
        if (!*words[2] || place[i].link >= m->blades)
            return fail(m, EPROTO, "the process monitor's answer makes no sense: %.60s", all);
    }
    return 0;
}

void monitor_return(struct monitor *m, const struct region *region)
{
    char text[MESSAGE] = "return", *at = text + strlen(text);
    for (uint32_t i = 0; i < COPIES; i++)
        if (region->at[i].link != NO_LINK)
            at += sprintf(at, " %u %lu", region->at[i].link, (unsigned long)region->at[i].address);
    send(m->socket, text, strlen(text), MSG_NOSIGNAL); /* when it has gone, all goes back anyway */
}

int monitor_keep(struct monitor *m, const char *name, size_t places)
{
    char text[MESSAGE];
    snprintf(text, sizeof text, "keep %s %zu", name, places);
    return ask(m, text);
}

int monitor_claim(struct monitor *m, const char *name, size_t places)
{
    char text[MESSAGE];
    snprintf(text, sizeof text, "claim %s %zu", name, places);
    return ask(m, text);
}

char monitor_news(struct monitor *m, uint32_t *blade)
{
    char text[MESSAGE];
    while (m->news >= 0) {
        ssize_t got = recv(m->news, text, sizeof text - 1, MSG_DONTWAIT);
        if (got < 0)
            return 0;
        if (got == 0)
            break; /* the process monitor has gone */
        text[got] = 0;
        char *name = strchr(text, ' ');
        for (*blade = 0; name && *blade < m->blades; ++*blade)
            if (!strcmp(m->name[*blade], name + 1))
                return text[0];
    }
    m->news = -1; /* its descriptor is one of those that the program cannot close: it stays until the end */
    return 0;
}
