/* Every path of liblite, checked; run against a real agent or a stand-in: lite_exercise [NODE-NAME] */
#define _GNU_SOURCE
#include <lite.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

enum { LARGE = 3 * 8192 + 5, PORT = 9, THREADS = 4, ROUNDS = 25 };

#define CHECK(condition)                                                                                              \
    do {                                                                                                              \
        if (!(condition)) {                                                                                           \
            fprintf(stderr, "line %d: %s is false (%s)\n", __LINE__, #condition, LT_error());                         \
            exit(1);                                                                                                  \
        }                                                                                                             \
    } while (0)

#define IS(call, code)                                                                                                \
    do {                                                                                                              \
        int got_ = (call);                                                                                            \
        if (got_ != (code)) {                                                                                         \
            fprintf(stderr, "line %d: %s is %d, not %d (%s)\n", __LINE__, #call, got_, code, LT_error());             \
            exit(1);                                                                                                  \
        }                                                                                                             \
    } while (0)

#define OK(call) IS(call, 0)

static char pattern[2 * LARGE], back[2 * LARGE];
static LT_handle memory;

static void reads_and_writes(void)
{
    const size_t sizes[] = {1, 8, 4096, 8192, 8193, LARGE};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        memset(back, 0, sizeof back);
        OK(LT_write(memory, 3, pattern + i, sizes[i]));
        OK(LT_read(memory, 3, back, sizes[i]));
        CHECK(!memcmp(back, pattern + i, sizes[i]) && !back[sizes[i]]);
    }
    OK(LT_write(memory, 0, NULL, 0));
    IS(LT_read(memory, 1 << 20, back, 1), LT_ERR_OUT_OF_RANGE);
    CHECK(strstr(LT_error(), "beyond the end"));
    IS(LT_read(memory + 12345, 0, back, 1), LT_ERR_BAD_HANDLE);
}

/* Ranges of `each` bytes, in an order of their own, with gaps that must stay as they were. */
static void ranges_of(unsigned count, size_t each, char *out, char *in)
{
    struct LT_range ranges[256];
    for (unsigned i = 0; i < count; i++)
        ranges[i] = (struct LT_range){(uint64_t)(i * 7 % count) * (each + 3), each};
    OK(LT_memset(memory, 0, '#', count * (each + 3)));
    memcpy(out, pattern, count * each);
    OK(LT_writev(memory, ranges, count, out));
    memset(in, 0, count * each + 1);
    OK(LT_readv(memory, ranges, count, in));
    CHECK(!memcmp(in, pattern, count * each) && !in[count * each]);
    for (unsigned i = 0; i < count; i++) {
        char one[LARGE + 3];
        OK(LT_read(memory, ranges[i].offset, one, each + 3));
        CHECK(!memcmp(one, pattern + i * each, each) && !memcmp(one + each, "###", 3));
    }
}

static void scatter_and_gather(void)
{
    static char out[2 * LARGE], in[2 * LARGE + 1];
    struct LT_range beyond[2] = {{0, 10}, {(1 << 20) - 1, 2}};
    struct LT_range endless[2] = {{0, UINT64_MAX}, {0, 2}};
    ranges_of(1, 5, out, in);
    ranges_of(256, 16, out, in); /* data and ranges are just as long as a packet may be */
    ranges_of(256, 17, out, in); /* the ranges leave too little room for the data */
    ranges_of(3, LARGE / 2, out, in);
    char *buffer = LT_buffer(sizeof out + sizeof in);
    CHECK(buffer);
    ranges_of(3, LARGE / 2, buffer, buffer + sizeof out);
    ranges_of(5, 100, buffer, in);
    OK(LT_buffer_free(buffer));
    IS(LT_readv(memory, beyond, 2, in), LT_ERR_OUT_OF_RANGE);
    IS(LT_writev(memory, beyond, 2, out), LT_ERR_OUT_OF_RANGE);
    IS(LT_writev(memory, endless, 2, out), LT_ERR_OUT_OF_RANGE);
    IS(LT_readv(memory, beyond, 0, in), LT_ERR_BAD_ARGUMENT);
    IS(LT_readv(memory, beyond, 257, in), LT_ERR_BAD_ARGUMENT);
    IS(LT_readv(memory + 12345, beyond, 1, in), LT_ERR_BAD_HANDLE);
    LT_ticket ticket; /* with another operation under way */
    OK(LT_read_async(memory, 0, in, 64, &ticket));
    ranges_of(4, 8, out, in + 64);
    OK(LT_wait(ticket));
}

static void many_at_once(void)
{
    LT_ticket tickets[100];
    for (int i = 0; i < 600; i++)
        OK(LT_write_async(memory, (uint64_t)i * 64, pattern + i, 64, NULL));
    OK(LT_fence());
    for (int i = 0; i < 100; i++)
        OK(LT_read_async(memory, (uint64_t)i * 64, back + i * 64, 64, &tickets[i]));
    char one[64], large[LARGE];
    OK(LT_read(memory, 64 * 300, one, 64));
    CHECK(!memcmp(one, pattern + 300, 64));
    OK(LT_read(memory, 0, large, LARGE)); /* with others under way */
    CHECK(!memcmp(large + 640, pattern + 10, 64));
    for (int i = 99; i >= 0; i--) {
        OK(LT_wait(tickets[i]));
        CHECK(!memcmp(back + i * 64, pattern + i, 64));
    }
    IS(LT_wait(tickets[5]), LT_ERR_BAD_ARGUMENT);
    OK(LT_write_async(memory, 1 << 20, "x", 1, NULL));
    IS(LT_fence(), LT_ERR_OUT_OF_RANGE);
    OK(LT_fence());
    OK(LT_read_async(memory, 0, back, 64, &tickets[0]));
    while (!LT_done(tickets[0]))
        usleep(1000);
    IS(LT_done(tickets[0]), 1);
    OK(LT_wait(tickets[0]));
    for (int i = 0; i < 255; i++)
        OK(LT_read_async(memory, 0, back, 8, i < 100 ? &tickets[i] : &tickets[99]));
    CHECK(LT_read_async(memory, 0, back, 8, &tickets[0]) == LT_ERR_NO_MEMORY); /* all ended, none waited for */
}

static void registered_memory(void)
{
    char *buffer = LT_buffer(2 * LARGE);
    CHECK(buffer);
    memcpy(buffer, pattern, LARGE);
    OK(LT_write(memory, 100, buffer, LARGE));
    OK(LT_read(memory, 100, buffer + LARGE, LARGE));
    OK(LT_write(memory, 90, buffer + 5, 16));
    OK(LT_read(memory, 90, buffer + 7, 16));
    CHECK(!memcmp(buffer + LARGE, pattern, LARGE) && !memcmp(buffer + 7, pattern + 5, 16));
    OK(LT_buffer_free(buffer));
    IS(LT_buffer_free(buffer), LT_ERR_BAD_ARGUMENT);
}

static void *count(void *unused)
{
    (void)unused;
    for (int i = 0; i < ROUNDS; i++) {
        uint64_t before;
        OK(LT_fetch_add(memory, 1024, 2, &before));
        OK(LT_lock("exercise \"lock\"", LT_DEFAULT));
        uint64_t word;
        OK(LT_read(memory, 1032, &word, 8));
        word++;
        OK(LT_write(memory, 1032, &word, 8));
        OK(LT_unlock("exercise \"lock\""));
    }
    OK(LT_write_async(memory, 4096, "left behind", 11, NULL));
    return NULL;
}

static void threads_and_locks(void)
{
    pthread_t threads[THREADS];
    uint64_t word = 0, before;
    OK(LT_write(memory, 1024, &word, 8));
    OK(LT_write(memory, 1032, &word, 8));
    OK(LT_createlock("exercise \"lock\"", NULL));
    for (int i = 0; i < THREADS; i++)
        CHECK(!pthread_create(&threads[i], NULL, count, NULL));
    for (int i = 0; i < THREADS; i++)
        pthread_join(threads[i], NULL);
    OK(LT_fetch_add(memory, 1024, 0, &before));
    CHECK(before == 2 * THREADS * ROUNDS);
    OK(LT_read(memory, 1032, &word, 8));
    CHECK(word == THREADS * ROUNDS);
    OK(LT_test_set(memory, 1024, 1, 7, &before));
    CHECK(before == 2 * THREADS * ROUNDS);
    OK(LT_test_set(memory, 1024, before, 7, &before));
    OK(LT_fetch_add(memory, 1024, (uint64_t)-1, &before));
    CHECK(before == 7);
    IS(LT_unlock("exercise \"lock\""), LT_ERR_NOT_HELD);
}

static void copies(void)
{
    LT_handle other;
    OK(LT_malloc(NULL, 4096, NULL, 3, 0, &other));
    OK(LT_memset(memory, 10, 'A', 20));
    OK(LT_memcpy(other, 50, memory, 10, 5));
    OK(LT_memmove(other, 52, other, 50, 5));
    OK(LT_read(other, 50, back, 10));
    CHECK(!memcmp(back, "AAAAAAA\0\0\0", 10));
    OK(LT_unmap(other));
    IS(LT_unmap(other), LT_ERR_BAD_HANDLE);
}

static void names(void)
{
    LT_handle named, again;
    uint64_t size = 0;
    char name[128];
    snprintf(name, sizeof name, "exercise-%d", getpid());
    OK(LT_malloc(NULL, 12345, name, LT_MAY_READ | LT_MAY_SHARE, 0, &named));
    IS(LT_malloc(NULL, 12345, name, LT_MAY_READ | LT_MAY_SHARE, 0, &again), LT_ERR_NAME_TAKEN);
    OK(LT_map(name, LT_MAY_READ, &again, &size));
    CHECK(size == 12345);
    IS(LT_write(again, 0, "x", 1), LT_ERR_PERMISSION);
    IS(LT_map("no such thing", LT_MAY_READ, &again, NULL), LT_ERR_NO_SUCH_NAME);
    memset(back, 'n', 5000);
    back[5000] = 0;
    IS(LT_map(back, LT_MAY_READ, &again, NULL), LT_ERR_BAD_ARGUMENT);
}

static void masters(int own, int there)
{
    LT_handle mine, reader, writer, master;
    char name[128], home[64], other[64], to[130];
    int ids[64], count_ = LT_nodes(ids, 64);
    snprintf(name, sizeof name, "masters-%d", getpid());
    OK(LT_node_name(own, home, sizeof home));
    OK(LT_node_name(there == own ? ids[count_ - 1] == own ? ids[0] : ids[count_ - 1] : there, other, sizeof other));
    OK(LT_malloc(NULL, 6 << 20, name, LT_MAY_READ | LT_MAY_SHARE, LT_KEEP, &mine));
    OK(LT_write(mine, 5 << 20, pattern, 5000));

    OK(LT_map(name, LT_MAY_READ, &reader, NULL));
    IS(LT_map(name, LT_MAY_WRITE, &writer, NULL), LT_ERR_PERMISSION);
    IS(LT_move(reader, other), LT_ERR_PERMISSION);
    IS(LT_grant(reader, LT_MAY_WRITE, "*"), LT_ERR_PERMISSION);
    IS(LT_revoke(reader, LT_MAY_READ, "*"), LT_ERR_PERMISSION);
    IS(LT_free(reader), LT_ERR_PERMISSION);
    IS(LT_grant(mine, LT_MAY_WRITE, "nobody"), LT_ERR_NO_SUCH_NODE);
    IS(LT_grant(mine, 1 << 7, home), LT_ERR_BAD_ARGUMENT);
    IS(LT_move(mine, "nobody"), LT_ERR_NO_SUCH_NODE);

    LT_ticket ticket; /* an operation under way does not notice the move */
    OK(LT_read_async(reader, 5 << 20, back, 5000, &ticket));
    OK(LT_move(mine, other));
    OK(LT_wait(ticket));
    CHECK(!memcmp(back, pattern, 5000));
    OK(LT_read(reader, 5 << 20, back, 5000));
    CHECK(!memcmp(back, pattern, 5000));
    snprintf(to, sizeof to, "%s,%s", home, other); /* a block on each */
    OK(LT_move(mine, to));
    memset(back, 0, 5000);
    OK(LT_read(reader, 5 << 20, back, 5000));
    CHECK(!memcmp(back, pattern, 5000));

    OK(LT_grant(mine, LT_MAY_WRITE | LT_MAY_ADMIN, home));
    OK(LT_map(name, LT_MAY_WRITE, &writer, NULL));
    OK(LT_write(writer, 0, "granted", 7));
    OK(LT_revoke(mine, LT_MAY_WRITE, home));
    IS(LT_write(writer, 0, "revoked", 7), LT_ERR_REVOKED);
    OK(LT_unmap(writer));
    OK(LT_read(reader, 0, back, 7));
    CHECK(!memcmp(back, "granted", 7));
    IS(LT_map(name, LT_MAY_WRITE, &writer, NULL), LT_ERR_PERMISSION);

    OK(LT_map(name, LT_MAY_ADMIN, &master, NULL)); /* a second master */
    OK(LT_unmap(mine));
    OK(LT_free(master));
    IS(LT_read(reader, 0, back, 1), LT_ERR_FREED);
    IS(LT_free(master), LT_ERR_FREED);
    OK(LT_unmap(master));
    OK(LT_unmap(reader));
    IS(LT_free(reader), LT_ERR_BAD_HANDLE);
    IS(LT_map(name, LT_MAY_READ, &reader, NULL), LT_ERR_NO_SUCH_NAME);
}

static void *serve(void *unused)
{
    static char data[LARGE];
    struct LT_message message;
    (void)unused;
    IS(LT_recvRPC(PORT, data, sizeof data, &message, LT_NOW), LT_ERR_TIMED_OUT);
    IS(LT_recvRPC(PORT, data, sizeof data, &message, 20), LT_ERR_TIMED_OUT);
    int status = LT_recvRPC(PORT, data, sizeof data, &message, LT_DEFAULT);
    for (;;) {
        OK(status);
        bool last = message.length == 4 && !memcmp(data, "stop", 4);
        for (size_t i = 0; i < message.length; i++)
            data[i] ^= 1;
        if (!message.descriptor) {
            if (last)
                return NULL;
            status = LT_recvRPC(PORT, data, sizeof data, &message, LT_DEFAULT);
        } else if (message.length == 1) {
            OK(LT_replyRPC(message.descriptor, data, message.length));
            status = LT_recvRPC(PORT, data, sizeof data, &message, LT_FOREVER);
        } else {
            status = LT_reply_recvRPC(message.descriptor, data, message.length, PORT, data, sizeof data, &message,
                                      LT_DEFAULT);
            if (status == LT_ERR_MESSAGE_TOO_LARGE) /* the reply, for that caller; both are told */
                status = LT_recvRPC(PORT, data, sizeof data, &message, LT_DEFAULT);
        }
    }
}

static void messages(int node)
{
    const size_t sizes[] = {0, 1, 100, 8192, 8193, LARGE};
    pthread_t server;
    size_t length;
    OK(LT_regRPC(PORT, LARGE));
    CHECK(!pthread_create(&server, NULL, serve, NULL));
    usleep(100000);
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        OK(LT_RPC(node, PORT, pattern, sizes[i], back, LARGE, &length, LT_DEFAULT));
        CHECK(length == sizes[i]);
        for (size_t b = 0; b < length; b++)
            CHECK(back[b] == (pattern[b] ^ 1));
    }
    IS(LT_RPC(node, PORT, "too long", 8, back, 2, &length, LT_DEFAULT), LT_ERR_MESSAGE_TOO_LARGE);
    int nodes[3] = {node, node, node}, results[3];
    char replies[3][16];
    void *places[3] = {replies[0], replies[1], replies[2]};
    size_t lengths[3];
    OK(LT_multicast(3, nodes, PORT, "@@", 2, places, 16, lengths, results, LT_DEFAULT));
    for (int i = 0; i < 3; i++)
        CHECK(!results[i] && lengths[i] == 2 && !memcmp(replies[i], "AA", 2));
    OK(LT_send(node, PORT, "stop", 4));
    pthread_join(server, NULL);
    OK(LT_unregRPC(PORT));
    IS(LT_RPC(node, PORT, "x", 1, back, 1, &length, LT_DEFAULT), LT_ERR_PORT_CLOSED);
}

static void forks(void)
{
    pid_t child = fork();
    if (!child) {
        char byte;
        IS(LT_read(memory, 0, &byte, 1), LT_ERR_NOT_JOINED);
        OK(LT_join());
        IS(LT_read(memory, 0, &byte, 1), LT_ERR_BAD_HANDLE);
        OK(LT_leave());
        _exit(0);
    }
    int status;
    waitpid(child, &status, 0);
    CHECK(!status);
    OK(LT_write(memory, 0, "parent", 6));
}

int main(int argc, char **argv)
{
    int ids[64];
    char name[64];
    for (size_t i = 0; i < sizeof pattern; i++)
        pattern[i] = (char)(i * 2654435761u >> 13);
    IS(LT_read(1, 0, back, 1), LT_ERR_NOT_JOINED);
    OK(LT_join());
    OK(LT_join());
    int own = LT_node(NULL), count_ = LT_nodes(ids, 64), there = LT_node(argc > 1 ? argv[1] : "pb0");
    CHECK(own > 0 && count_ > 0 && there > 0);
    OK(LT_node_name(there, name, sizeof name));
    IS(LT_node("nobody"), LT_ERR_NO_SUCH_NODE);
    OK(LT_set_priority(LT_HIGH));
    OK(LT_malloc(argc > 1 ? argv[1] : NULL, 1 << 20, NULL, 31, 0, &memory));
    reads_and_writes();
    scatter_and_gather();
    registered_memory();
    threads_and_locks();
    copies();
    names();
    masters(own, there);
    messages(own);
    forks();
    many_at_once();
    OK(LT_leave());
    IS(LT_leave(), LT_ERR_NOT_JOINED);
    printf("all of it works with %s\n", name);
    return 0;
}
