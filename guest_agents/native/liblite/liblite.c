/* LITE for C programs: who this process is, and each thread's connection to the agent. data.c has the operations that
 * count; control.c those that go through the agent's books. */
#define _GNU_SOURCE
#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "client.h"

#define EXPORT __attribute__((visibility("default")))
#define SOCKET "/run/rackless/lite.sock"

enum { MOST_FILES = 2 /* that come with an answer: hello's are the data channel and its mailbox */ };

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_once_t once = PTHREAD_ONCE_INIT;
static pthread_key_t key; /* its destructor closes the connection of a thread that ends */
static struct connection *all, *first;
static atomic_bool joined;
static char token[128];
int lite_own_node;

static __thread struct connection *mine;
static __thread atomic_uint my_life;
static atomic_uint life; /* grows with every join, leave and fork: connections of an earlier one are not ours */
static __thread char words[256];

static const char *const MEANINGS[] = {
    "",
    "the handle does not carry the right that this needs",
    "the range goes beyond the end",
    "this process holds no such handle",
    "the LMR was freed by one of its masters",
    "the rights of this handle were taken back by a master",
    "there is already something of this name",
    "nothing has this name",
    "a node that this needs is dead, or was restarted since",
    "a node does not answer on the fabric",
    "the time given has passed",
    "the message is larger than the receiver allows",
    "the ring of this port stayed full: the server does not keep up",
    "nobody has registered this port on that node",
    "another process of this blade has registered this port",
    "a node has no memory left for this",
    "this process has no connection to LITE",
    "the message is malformed or truncated",
    "the operation was cancelled, or what it used was closed",
    "someone whom the barrier waits for died or gave up",
    "an argument makes no sense",
    "the rack has no node of this name",
    "this process does not hold the lock",
    "the manager does not answer",
};

_Static_assert((int)LT_ERR_PERMISSION == (int)LITE_PERMISSION && (int)LT_ERR_MANAGER_LOST == (int)LITE_MANAGER_LOST &&
                   sizeof MEANINGS / sizeof *MEANINGS == -LITE_MANAGER_LOST + 1,
               "lite.h, wire.h and the words belong together");

EXPORT const char *LT_strerror(int code)
{
    if (code > 0 || code < LITE_MANAGER_LOST)
        return "LITE failed in a way that has no code of its own";
    return code ? MEANINGS[-code] : "no error";
}

EXPORT const char *LT_error(void)
{
    return words;
}

int lite_fail(int code, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(words, sizeof words, format, arguments);
    va_end(arguments);
    return code;
}

static void drop(struct connection *c, bool ours)
{
    *c->older = c->newer;
    if (c->newer)
        c->newer->older = c->older;
    if (c == first)
        first = NULL;
    if (ours && c->data >= 0)
        shutdown(c->data, SHUT_RDWR);
    if (c->data >= 0)
        close(c->data);
    close(c->control);
    if (c->mailbox)
        munmap(c->mailbox, sizeof *c->mailbox);
    free(c);
}

/* A thread ends. What it has under way may still write to its memory (perhaps its stack): that ends first. */
static void thread_ends(void *connection)
{
    struct connection *c = connection;
    if (atomic_load(&my_life) != atomic_load(&life))
        return; /* closed by LT_leave or a fork */
    for (unsigned i = 0; i < SLOTS && c->running; i++)
        if (c->slots[i].state == RUNNING)
            c->slots[i].forgotten = true;
    LT_fence();
    mine = NULL;
    pthread_mutex_lock(&lock);
    if (c != first) /* it holds what this process has: kept until LT_leave or the end */
        drop(c, true);
    pthread_mutex_unlock(&lock);
}

static void drop_all(bool ours)
{
    while (all)
        drop(all, ours);
    token[0] = 0;
    atomic_store(&joined, false);
    atomic_fetch_add(&life, 1);
    atomic_store(&lite_regions_used, 0);
}

static void before_fork(void)
{
    pthread_mutex_lock(&lock);
}

static void after_fork(void)
{
    pthread_mutex_unlock(&lock);
}

/* The child drops its copies: while they are open the agent would think that the parent lives. */
static void in_child(void)
{
    drop_all(false);
    pthread_mutex_unlock(&lock);
}

static void prepare(void)
{
    pthread_key_create(&key, thread_ends);
    pthread_atfork(before_fork, after_fork, in_child);
}

/* Ask; `files` gets the files that came, -1 for those that did not. */
static int ask_for(struct connection *c, struct json *request, int *files, size_t wanted)
{
    json_end(request);
    if (request->full)
        return lite_fail(LT_ERR_BAD_ARGUMENT, "a name is too long");
    ssize_t got;
    while ((got = send(c->control, request->text, request->length, MSG_NOSIGNAL)) < 0 && errno == EINTR)
        ;
    char room[CMSG_SPACE(MOST_FILES * sizeof(int))];
    struct iovec part = {c->answer, sizeof c->answer - 1};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = room, .msg_controllen = sizeof room};
    if (got > 0)
        while ((got = recvmsg(c->control, &message, MSG_CMSG_CLOEXEC)) < 0 && errno == EINTR)
            ;
    if (got <= 0)
        return lite_fail(LT_ERR_NOT_JOINED, "the agent has closed the connection");
    c->answer[got] = 0;
    struct cmsghdr *rights = CMSG_FIRSTHDR(&message);
    size_t came = 0;
    if (rights && rights->cmsg_level == SOL_SOCKET && rights->cmsg_type == SCM_RIGHTS)
        came = (rights->cmsg_len - CMSG_LEN(0)) / sizeof(int);
    bool ok = json_get_true(c->answer, "ok");
    for (size_t i = 0; i < wanted; i++)
        files[i] = -1;
    for (size_t i = 0; i < came; i++) {
        int file;
        memcpy(&file, CMSG_DATA(rights) + i * sizeof file, sizeof file);
        if (ok && i < wanted)
            files[i] = file;
        else
            close(file);
    }
    if (!ok) {
        int64_t code = LT_ERR_OTHER;
        char error[192] = "the agent gave no reason";
        json_get_number(c->answer, "code", &code);
        json_get_string(c->answer, "error", error, sizeof error);
        return lite_fail(code < 0 ? (int)code : LT_ERR_OTHER, "%s", error);
    }
    return wanted && files[0] < 0 ? lite_fail(LT_ERR_BAD_MESSAGE, "the agent sent no file") : 0;
}

/* One more connection of this process; `lock` is held. NULL: see LT_error. */
static struct connection *connect_thread(void)
{
    struct connection *c = calloc(1, sizeof *c);
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    const char *path = getenv("RACKLESS_LITE");
    struct json hello;
    if (!c) {
        lite_fail(LT_ERR_NO_MEMORY, "no memory");
        return NULL;
    }
    snprintf(address.sun_path, sizeof address.sun_path, "%s", path ? path : SOCKET);
    c->data = -1;
    c->control = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
    if (c->control < 0 || connect(c->control, (struct sockaddr *)&address, sizeof address) < 0) {
        lite_fail(LT_ERR_NOT_JOINED, "no LITE at %s: %s; is this a blade, and its agent running?", address.sun_path,
                  strerror(errno));
        goto failed;
    }
    json_begin(&hello, "hello");
    if (token[0])
        json_string(&hello, "token", token);
    json_true(&hello, "mailbox");
    int files[MOST_FILES];
    if (ask_for(c, &hello, files, MOST_FILES))
        goto failed;
    c->data = files[0];
    if (files[1] >= 0) {
        void *box = mmap(NULL, sizeof *c->mailbox, PROT_READ | PROT_WRITE, MAP_SHARED, files[1], 0);
        c->mailbox = box == MAP_FAILED ? NULL : box;
        close(files[1]);
    }
    if (!token[0] && !json_get_string(c->answer, "token", token, sizeof token)) {
        lite_fail(LT_ERR_BAD_MESSAGE, "the agent gave no token");
        goto failed;
    }
    uint64_t id = 0;
    json_get_unsigned(c->answer, "node_id", &id);
    lite_own_node = (int)id;
    c->older = &all;
    c->newer = all;
    if (all)
        all->older = &c->newer;
    all = c;
    return c;
failed:
    if (c->control >= 0)
        close(c->control);
    if (c->data >= 0)
        close(c->data);
    if (c->mailbox)
        munmap(c->mailbox, sizeof *c->mailbox);
    free(c);
    return NULL;
}

struct connection *lite_connection(void)
{
    if (mine && atomic_load_explicit(&my_life, memory_order_relaxed) ==
                    atomic_load_explicit(&life, memory_order_relaxed))
        return mine;
    mine = NULL;
    if (!atomic_load(&joined)) {
        lite_fail(LT_ERR_NOT_JOINED, "this process has not joined LITE (LT_join; anew after fork)");
        return NULL;
    }
    pthread_mutex_lock(&lock);
    mine = connect_thread();
    if (mine) {
        atomic_store(&my_life, atomic_load(&life));
        pthread_setspecific(key, mine);
    }
    pthread_mutex_unlock(&lock);
    return mine;
}

int lite_ask(struct json *request, int *descriptor)
{
    struct connection *c = lite_connection();
    return c ? ask_for(c, request, descriptor, descriptor != NULL) : LT_ERR_NOT_JOINED;
}

EXPORT int LT_join(void)
{
    pthread_once(&once, prepare);
    pthread_mutex_lock(&lock);
    int status = 0;
    if (!atomic_load(&joined)) {
        first = connect_thread();
        if (first) {
            mine = first;
            atomic_store(&my_life, atomic_load(&life));
            pthread_setspecific(key, mine);
            atomic_store(&joined, true);
        } else {
            status = LT_ERR_NOT_JOINED;
        }
    }
    pthread_mutex_unlock(&lock);
    return status;
}

EXPORT int LT_leave(void)
{
    pthread_mutex_lock(&lock);
    bool was = atomic_load(&joined);
    if (was)
        drop_all(true);
    pthread_mutex_unlock(&lock);
    mine = NULL;
    return was ? 0 : lite_fail(LT_ERR_NOT_JOINED, "this process has not joined LITE");
}
