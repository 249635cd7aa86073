#define _GNU_SOURCE
#include "desk.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>

_Noreturn void die(int status, const char *format, const char *a, const char *b)
{
    fprintf(stderr, "rackless: ");
    fprintf(stderr, format, a, b);
    fprintf(stderr, "\n");
    exit(status);
}

bool request(int monitor, char text[MESSAGE])
{
    ssize_t got;
    if (send(monitor, text, strlen(text), MSG_NOSIGNAL) < 0) {
        snprintf(text, MESSAGE, "the process monitor has gone: %s", strerror(errno));
        return false;
    }
    do
        got = recv(monitor, text, MESSAGE - 1, 0);
    while (got < 0 && errno == EINTR);
    if (got <= 0) {
        snprintf(text, MESSAGE, "the process monitor does not answer (see /var/log/rackless/agent/current)");
        return false;
    }
    text[got] = 0;
    bool granted = !strncmp(text, "ok", 2);
    char *rest = granted ? text + 2 : text;
    if (!granted && !strncmp(text, "error ", 6))
        strtol(text + 6, &rest, 10);
    rest += *rest == ' ';
    memmove(text, rest, strlen(rest) + 1);
    return granted;
}

void ask(int monitor, char text[MESSAGE])
{
    if (!request(monitor, text))
        die(NOT_STARTED, "%s%s", text, "");
}

int attach_monitor(void)
{
    int s = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
    struct sockaddr_un name = {.sun_family = AF_UNIX, .sun_path = MONITOR_SOCKET};
    if (s < 0 || connect(s, (struct sockaddr *)&name, sizeof name))
        die(NOT_STARTED, "no process monitor at %s: %s", MONITOR_SOCKET, strerror(errno));
    return s;
}
