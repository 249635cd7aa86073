/* What experiment `lite` runs on blades beside perftest: prints one figure per line, microseconds per operation.
 *
 *   lite_bench serve PORT                         answer every call with its own data
 *   lite_bench read|write SIZE COUNT NODE [LMRS]  one operation at a time, on the last of LMRS areas (default 1)
 *   lite_bench reads|writes SIZE COUNT NODE DEPTH  DEPTH operations outstanding; prints one figure: us per operation
 *   lite_bench urgent SIZE COUNT NODE             reads as `read` does, of high priority
 *   lite_bench bulk NODE                          writes of 64 KiB, 16 outstanding, of low priority, until it is killed;
 *                                                 prints us per operation again and again
 *   lite_bench rpc SIZE COUNT NODE PORT           calls with a reply of the same size
 *   lite_bench hold NODE                          be one more process that uses LITE, until standard input ends
 *   lite_bench echo PORT                          the same as serve, over TCP
 *   lite_bench tcp SIZE COUNT ADDRESS PORT
 */
#include <arpa/inet.h>
#include <lite.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { WARM_UP = 20, MOST_DEPTH = 64, MOST_BYTES = 64 << 10 };

static char data[MOST_BYTES];

static void check(int status, const char *what)
{
    if (status < 0) {
        fprintf(stderr, "lite_bench: %s: %s\n", what, LT_error());
        exit(1);
    }
}

static void check_system(long status, const char *what)
{
    if (status < 0) {
        fprintf(stderr, "lite_bench: ");
        perror(what);
        exit(1);
    }
}

static double microseconds(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e6 + (double)t.tv_nsec / 1e3;
}

/* Time `count` calls of `operation`, after some that do not count. */
static void measure(int count, void (*operation)(void *), void *with)
{
    for (int i = 0; i < WARM_UP; i++)
        operation(with);
    for (int i = 0; i < count; i++) {
        double before = microseconds();
        operation(with);
        printf("%.1f\n", microseconds() - before);
    }
}

struct access {
    LT_handle area;
    char *buffer;
    size_t size;
    int depth;
};

static void one_read(void *with)
{
    struct access *a = with;
    check(LT_read(a->area, 0, a->buffer, a->size), "read");
}

static void one_write(void *with)
{
    struct access *a = with;
    check(LT_write(a->area, 0, a->buffer, a->size), "write");
}

static LT_handle areas(const char *node, int count, size_t each)
{
    LT_handle last = 0;
    for (int i = 0; i < count; i++)
        check(LT_malloc(node, each, NULL, LT_MAY_READ | LT_MAY_WRITE, 0, &last), "malloc");
    return last;
}

static void *registered(size_t bytes)
{
    void *buffer = LT_buffer(bytes);
    check(buffer ? 0 : -1, "buffer");
    return buffer;
}

static void latency(bool write, size_t size, int count, const char *node, int lmrs)
{
    struct access a = {areas(node, lmrs, lmrs > 1 ? 4096 : MOST_BYTES), registered(MOST_BYTES), size, 1};
    measure(count, write ? one_write : one_read, &a);
}

static void bulk(const char *node)
{
    enum { DEPTH = 16 };
    LT_handle area = areas(node, 1, MOST_BYTES * DEPTH);
    char *buffer = registered(MOST_BYTES * DEPTH);
    check(LT_set_priority(LT_LOW), "priority");
    for (bool ready = false;; ready = true) {
        double start = microseconds();
        for (int i = 0; i < DEPTH; i++) {
            size_t at = (size_t)i * MOST_BYTES;
            check(LT_write_async(area, at, buffer + at, MOST_BYTES, NULL), "start");
        }
        check(LT_fence(), "fence");
        if (ready)
            printf("%.1f\n", (microseconds() - start) / DEPTH);
        else
            puts("ready");
        fflush(stdout);
    }
}

static void throughput(bool write, size_t size, int count, const char *node, int depth)
{
    struct access a = {areas(node, 1, MOST_BYTES * (size_t)depth), registered(MOST_BYTES * (size_t)depth), size, depth};
    LT_ticket ticket[MOST_DEPTH];
    double start = 0;
    for (int i = -depth; i < count; i++) { /* the first `depth` fill the pipe */
        int slot = (i + depth) % depth;
        if (i >= 0)
            check(LT_wait(ticket[slot]), "wait");
        if (i == 0)
            start = microseconds();
        size_t at = (size_t)slot * MOST_BYTES;
        check(write ? LT_write_async(a.area, at, a.buffer + at, size, &ticket[slot])
                    : LT_read_async(a.area, at, a.buffer + at, size, &ticket[slot]), "start");
    }
    printf("%.2f\n", (microseconds() - start) / count);
    check(LT_fence(), "fence");
}

struct call {
    int node, port;
    size_t size;
};

static void one_call(void *with)
{
    static char reply[MOST_BYTES];
    struct call *c = with;
    check(LT_RPC(c->node, c->port, data, c->size, reply, sizeof reply, NULL, LT_DEFAULT), "call");
}

static void calls(size_t size, int count, const char *node, int port)
{
    struct call c = {LT_node(node), port, size};
    check(c.node, "node");
    measure(count, one_call, &c);
}

static void serve(int port)
{
    struct LT_message message;
    check(LT_regRPC(port, MOST_BYTES), "register");
    puts("ready");
    fflush(stdout);
    check(LT_recvRPC(port, data, sizeof data, &message, LT_FOREVER), "receive");
    for (;;)
        check(LT_reply_recvRPC(message.descriptor, data, message.length, port, data, sizeof data, &message, LT_FOREVER),
              "reply and receive");
}

static void hold(const char *node)
{
    LT_handle area = areas(node, 1, 4096);
    check(LT_read(area, 0, data, 64), "read");
    puts("ready");
    fflush(stdout);
    while (getchar() != EOF) {
    }
}

static void all(int socket, void *bytes, size_t size, bool out)
{
    for (size_t done = 0; done < size;) {
        char *at = (char *)bytes + done;
        ssize_t n = out ? write(socket, at, size - done) : read(socket, at, size - done);
        if (n == 0)
            exit(0);
        check_system(n, "TCP");
        done += (size_t)n;
    }
}

struct stream {
    int socket;
    uint32_t size;
};

static void one_echo(void *with)
{
    struct stream *s = with;
    all(s->socket, &s->size, sizeof s->size, true);
    all(s->socket, data, s->size, true);
    all(s->socket, data, s->size, false);
}

static int tcp_socket(void)
{
    int one = 1, s = socket(AF_INET, SOCK_STREAM, 0);
    check_system(s, "socket");
    check_system(setsockopt(s, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one), "TCP_NODELAY");
    check_system(setsockopt(s, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one), "SO_REUSEADDR");
    return s;
}

static void tcp(size_t size, int count, const char *address, int port)
{
    struct stream s = {tcp_socket(), (uint32_t)size};
    struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
    inet_pton(AF_INET, address, &to.sin_addr);
    check_system(connect(s.socket, (struct sockaddr *)&to, sizeof to), "connect");
    measure(count, one_echo, &s);
}

static void echo(int port)
{
    int listener = tcp_socket();
    struct sockaddr_in any = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
    check_system(bind(listener, (struct sockaddr *)&any, sizeof any), "bind");
    check_system(listen(listener, 4), "listen");
    puts("ready");
    fflush(stdout);
    int s = accept(listener, NULL, NULL), one = 1;
    check_system(s, "accept");
    check_system(setsockopt(s, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one), "TCP_NODELAY");
    for (;;) {
        uint32_t size;
        all(s, &size, sizeof size, false);
        all(s, data, size, false);
        all(s, data, size, true);
    }
}

int main(int argc, char **argv)
{
    const char *what = argc > 1 ? argv[1] : "";
    bool local = !strcmp(what, "echo") || !strcmp(what, "tcp");
    size_t size = argc > 2 ? strtoul(argv[2], NULL, 10) : 0;
    int count = argc > 3 ? atoi(argv[3]) : 0, last = argc > 5 ? atoi(argv[5]) : 1;
    const char *node = argc > 4 ? argv[4] : "";
    if (!local)
        check(LT_join(), "join");
    if (argc == 3 && !strcmp(what, "serve"))
        serve((int)size);
    else if (argc == 3 && !strcmp(what, "echo"))
        echo((int)size);
    else if (argc == 3 && !strcmp(what, "hold"))
        hold(argv[2]);
    else if (argc == 3 && !strcmp(what, "bulk"))
        bulk(argv[2]);
    else if (argc == 5 && size <= MOST_BYTES && !strcmp(what, "urgent")) {
        check(LT_set_priority(LT_HIGH), "priority");
        latency(false, size, count, node, 1);
    } else if (argc >= 5 && size <= MOST_BYTES && last > 0 && (!strcmp(what, "read") || !strcmp(what, "write")))
        latency(what[0] == 'w', size, count, node, last);
    else if (argc == 6 && size <= MOST_BYTES && last > 0 && last <= MOST_DEPTH &&
             (!strcmp(what, "reads") || !strcmp(what, "writes")))
        throughput(what[0] == 'w', size, count, node, last);
    else if (argc == 6 && size <= MOST_BYTES && !strcmp(what, "rpc"))
        calls(size, count, node, last);
    else if (argc == 6 && size <= MOST_BYTES && !strcmp(what, "tcp"))
        tcp(size, count, node, last);
    else {
        fprintf(stderr, "lite_bench: see the head of lite_bench.c for what to write\n");
        return 2;
    }
    return local ? 0 : LT_leave() < 0;
}
