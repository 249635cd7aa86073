/* Reads, writes, atomics and messages. What is waited for goes by the thread's mailbox and takes one system call; what is
 * started goes by the data channel: a sendmsg and a recvmsg. No malloc. */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/futex.h>
#include <poll.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#include "client.h"

#define EXPORT __attribute__((visibility("default")))

/* Tags of asynchronous operations are their slot in the low bits; waited-for ones have this bit. */
enum { WAITED = 1 << 8 };

_Static_assert(sizeof(struct LT_range) == sizeof(struct lite_segment), "ranges go into the packet as they are");

static const struct region *region_of(const void *data, size_t length)
{
    unsigned used = atomic_load_explicit(&lite_regions_used, memory_order_acquire);
    for (unsigned i = 0; i < used; i++) {
        const char *start = atomic_load_explicit(&lite_regions[i].start, memory_order_acquire);
        if (start && (const char *)data >= start && (const char *)data + length <= start + lite_regions[i].size)
            return &lite_regions[i];
    }
    return NULL;
}

static int gone(void)
{
    return lite_fail(LT_ERR_NOT_JOINED, "the agent has closed the data channel");
}

/* Send a request, the ranges of a READV or WRITEV, and data that go into the packet. */
static int post(struct connection *c, const struct lite_request *request, const struct LT_range *ranges, const void *data,
                size_t length)
{
    size_t listed = ranges ? request->arg0 * sizeof *ranges : 0;
    struct iovec parts[3] = {{(void *)request, sizeof *request}, {(void *)ranges, listed}, {(void *)data, length}};
    struct msghdr message = {.msg_iov = parts, .msg_iovlen = 3};
    while (sendmsg(c->data, &message, MSG_NOSIGNAL) < 0)
        if (errno != EINTR)
            return gone();
    return 0;
}

/* Say where outgoing data are; returns how many bytes go into the packet, which has room for `most`. */
static size_t place_out(struct lite_request *request, const void *data, size_t length, bool buffers, size_t most)
{
    const struct region *region = buffers ? region_of(data, length) : NULL;
    request->length = length;
    if (region) {
        request->buffer = region->id;
        request->address = (uint64_t)((const char *)data - region->start);
        return 0;
    }
    if (length <= most) {
        request->flags |= LITE_INLINE_DATA;
        return length;
    }
    request->address = (uintptr_t)data;
    return 0;
}

/* Say where incoming data go: to `*place`, or with the reply, if they are at most `most` bytes. */
static void place_in(struct lite_request *request, void *data, size_t room, uint64_t *place, bool buffers, size_t most)
{
    const struct region *region = buffers && room ? region_of(data, room) : NULL;
    if (region) {
        request->buffer = region->id;
        *place = (uint64_t)((const char *)data - region->start);
    } else if (room <= most) {
        request->flags |= LITE_INLINE_REPLY;
    } else {
        *place = (uintptr_t)data;
    }
}

static ssize_t receive(struct connection *c, struct iovec *parts, int flags)
{
    struct msghdr message = {.msg_iov = parts, .msg_iovlen = 2};
    ssize_t got;
    do
        got = recvmsg(c->data, &message, flags);
    while (got < 0 && errno == EINTR);
    return got;
}

/* A reply to an asynchronous operation is in the packet. */
static void settle(struct connection *c, size_t inlined)
{
    unsigned index = c->packet.header.tag & (WAITED - 1);
    struct slot *slot = index < SLOTS ? &c->slots[index] : NULL;
    if (!slot || slot->state != RUNNING || slot->tag != c->packet.header.tag)
        return; /* of a wait that a signal handler left with longjmp */
    if (inlined)
        memcpy(slot->into, c->packet.data, inlined < slot->room ? inlined : slot->room);
    slot->status = c->packet.header.status;
    slot->length = c->packet.header.length;
    slot->state = slot->forgotten ? FREE : ENDED;
    c->running--;
    if (slot->forgotten && slot->status && !c->failed)
        c->failed = slot->status;
}

/* Take one reply to an asynchronous operation; with MSG_DONTWAIT returns 1 if there is none. */
static int take(struct connection *c, int flags)
{
    struct iovec parts[2] = {{&c->packet.header, sizeof c->packet.header}, {c->packet.data, sizeof c->packet.data}};
    ssize_t got = receive(c, parts, flags);
    if (got < 0 && (errno == EAGAIN || errno == EWOULDBLOCK))
        return 1;
    if (got < (ssize_t)sizeof c->packet.header)
        return gone();
    settle(c, (size_t)got - sizeof c->packet.header);
    return 0;
}

/* Wait for the reply to a request; incoming data that come with it go to `in`. */
static int await(struct connection *c, const struct lite_request *request, void *in, size_t room,
                 struct lite_reply *reply)
{
    for (;;) {
        /* With nothing else under way the data can go where they belong at once. */
        bool direct = !c->running && room <= LITE_INLINE;
        struct iovec parts[2] = {{direct ? reply : &c->packet.header, sizeof *reply},
                                 {direct ? in : c->packet.data, direct ? room : sizeof c->packet.data}};
        ssize_t got = receive(c, parts, 0);
        if (got < (ssize_t)sizeof *reply)
            return gone();
        if (direct && reply->tag == request->tag)
            break;
        if (!direct && c->packet.header.tag == request->tag) {
            size_t came = (size_t)got - sizeof *reply;
            *reply = c->packet.header;
            if (came)
                memcpy(in, c->packet.data, came < room ? came : room);
            break;
        }
        if (!direct)
            settle(c, (size_t)got - sizeof *reply);
    }
    return reply->status ? lite_fail(reply->status, "%s", LT_strerror(reply->status)) : 0;
}

/* A mailbox that stays silent: has the agent hung up? */
static bool hung_up(struct connection *c)
{
    struct pollfd end = {.fd = c->data};
    return poll(&end, 1, 0) > 0 && end.revents & (POLLHUP | POLLERR);
}

/* The same by mailbox. */
static int mail(struct connection *c, const struct lite_request *request, const struct LT_range *ranges,
                const void *out, size_t inlined, void *in, size_t room, struct lite_reply *reply)
{
    static const struct timespec a_while = {.tv_sec = 1};
    struct lite_mailbox *box = c->mailbox;
    size_t listed = ranges ? request->arg0 * sizeof *ranges : 0;
    box->request = *request;
    box->payload = (uint32_t)(listed + inlined);
    if (listed)
        memcpy(box->out, ranges, listed);
    if (inlined)
        memcpy(box->out + listed, out, inlined);
    __atomic_store_n(&box->turn, MAIL_CORE, __ATOMIC_SEQ_CST);
    if (__atomic_load_n(&box->asleep, __ATOMIC_SEQ_CST)) {
        struct lite_request knock = {.op = LITE_KNOCK};
        int failed = post(c, &knock, NULL, NULL, 0);
        if (failed)
            return failed;
    }
    while (__atomic_load_n(&box->turn, __ATOMIC_ACQUIRE) == MAIL_CORE)
        if (syscall(SYS_futex, &box->turn, FUTEX_WAIT, MAIL_CORE, &a_while, NULL, 0) < 0 && errno == ETIMEDOUT &&
            hung_up(c))
            return gone();
    *reply = box->reply;
    if (reply->status)
        return lite_fail(reply->status, "%s", LT_strerror(reply->status));
    if (request->flags & LITE_INLINE_REPLY)
        memcpy(in, box->in, reply->length < room ? reply->length : room);
    return 0;
}

/* Send a request, with the ranges of a READV or WRITEV, and wait for its reply. */
static int transact(struct connection *c, struct lite_request *request, const struct LT_range *ranges, const void *out,
                    size_t inlined, void *in, size_t room, struct lite_reply *reply)
{
    request->tag = ++c->serial << 9 | WAITED;
    request->priority = c->priority;
    /* The mailbox is taken if this is a signal handler, or one has left a wait with longjmp. */
    if (c->mailbox && __atomic_load_n(&c->mailbox->turn, __ATOMIC_ACQUIRE) == MAIL_PROGRAM)
        return mail(c, request, ranges, out, inlined, in, room, reply);
    int failed = post(c, request, ranges, out, inlined);
    return failed ? failed : await(c, request, in, room, reply);
}

static struct slot *free_slot(struct connection *c)
{
    for (;;) {
        for (unsigned n = 0; n < SLOTS; n++) {
            struct slot *slot = &c->slots[c->next];
            c->next = (c->next + 1) % SLOTS;
            if (slot->state == FREE)
                return slot;
        }
        if (!c->running) {
            lite_fail(LT_ERR_NO_MEMORY, "%d operations have ended and wait for LT_wait", SLOTS);
            return NULL;
        }
        if (take(c, 0))
            return NULL;
    }
}

static int start(struct connection *c, struct lite_request *request, const void *out, size_t inlined, void *in,
                 size_t room, LT_ticket *ticket)
{
    struct slot *slot = free_slot(c);
    if (!slot)
        return c->running ? LT_ERR_NOT_JOINED : LT_ERR_NO_MEMORY;
    slot->tag = request->tag = ++c->serial << 9 | (uint32_t)(slot - c->slots);
    request->priority = c->priority;
    slot->into = in;
    slot->room = room;
    slot->forgotten = !ticket;
    int failed = post(c, request, NULL, out, inlined);
    if (failed)
        return failed;
    slot->state = RUNNING;
    c->running++;
    if (ticket)
        *ticket = slot->tag;
    return 0;
}

static int finish(struct connection *c, LT_ticket ticket, uint64_t *length)
{
    unsigned index = ticket & (WAITED - 1);
    struct slot *slot = index < SLOTS ? &c->slots[index] : NULL;
    if (!slot || slot->state == FREE || slot->tag != ticket || slot->forgotten)
        return lite_fail(LT_ERR_BAD_ARGUMENT, "this thread has no such ticket");
    while (slot->state == RUNNING) {
        int failed = take(c, 0);
        if (failed)
            return failed;
    }
    slot->state = FREE;
    if (length)
        *length = slot->length;
    return slot->status ? lite_fail(slot->status, "%s", LT_strerror(slot->status)) : 0;
}

EXPORT int LT_read(LT_handle handle, uint64_t offset, void *data, size_t length)
{
    struct connection *c = lite_connection();
    struct lite_request request = {.op = LITE_READ, .handle = handle, .offset = offset, .length = length};
    struct lite_reply reply;
    if (!c)
        return LT_ERR_NOT_JOINED;
    place_in(&request, data, length, &request.address, true, LITE_INLINE);
    return transact(c, &request, NULL, NULL, 0, data, length, &reply);
}

EXPORT int LT_write(LT_handle handle, uint64_t offset, const void *data, size_t length)
{
    struct connection *c = lite_connection();
    struct lite_request request = {.op = LITE_WRITE, .handle = handle, .offset = offset};
    struct lite_reply reply;
    if (!c)
        return LT_ERR_NOT_JOINED;
    size_t inlined = place_out(&request, data, length, true, LITE_INLINE);
    return transact(c, &request, NULL, data, inlined, NULL, 0, &reply);
}

/* READV or WRITEV: `data` are those of the ranges, one after the other. */
static int vector(uint8_t op, LT_handle handle, const struct LT_range *ranges, unsigned count, void *data)
{
    struct connection *c = lite_connection();
    struct lite_request request = {.op = op, .handle = handle, .arg0 = count};
    struct lite_reply reply;
    size_t length = 0, inlined = 0;
    if (!c)
        return LT_ERR_NOT_JOINED;
    if (!count || count > LITE_SEGMENTS)
        return lite_fail(LT_ERR_BAD_ARGUMENT, "%u ranges; 1 to %d go in one operation", count, LITE_SEGMENTS);
    for (unsigned i = 0; i < count; i++)
        if (__builtin_add_overflow(length, ranges[i].length, &length))
            return lite_fail(LT_ERR_OUT_OF_RANGE, "the ranges are longer than memory is");
    size_t room = LITE_INLINE - count * sizeof *ranges; /* which the packet has for data */
    if (op == LITE_WRITEV)
        inlined = place_out(&request, data, length, true, room);
    else
        place_in(&request, data, length, &request.address, true, room);
    request.length = length;
    return transact(c, &request, ranges, data, inlined, data, op == LITE_READV ? length : 0, &reply);
}

EXPORT int LT_readv(LT_handle handle, const struct LT_range *ranges, unsigned count, void *data)
{
    return vector(LITE_READV, handle, ranges, count, data);
}

EXPORT int LT_writev(LT_handle handle, const struct LT_range *ranges, unsigned count, const void *data)
{
    return vector(LITE_WRITEV, handle, ranges, count, (void *)data);
}

EXPORT int LT_read_async(LT_handle handle, uint64_t offset, void *data, size_t length, LT_ticket *ticket)
{
    struct connection *c = lite_connection();
    struct lite_request request = {.op = LITE_READ, .handle = handle, .offset = offset, .length = length};
    if (!c)
        return LT_ERR_NOT_JOINED;
    place_in(&request, data, length, &request.address, true, LITE_INLINE);
    return start(c, &request, NULL, 0, data, length, ticket);
}

EXPORT int LT_write_async(LT_handle handle, uint64_t offset, const void *data, size_t length, LT_ticket *ticket)
{
    struct connection *c = lite_connection();
    struct lite_request request = {.op = LITE_WRITE, .handle = handle, .offset = offset};
    if (!c)
        return LT_ERR_NOT_JOINED;
    size_t inlined = place_out(&request, data, length, true, LITE_INLINE);
    return start(c, &request, data, inlined, NULL, 0, ticket);
}

EXPORT int LT_wait(LT_ticket ticket)
{
    struct connection *c = lite_connection();
    return c ? finish(c, ticket, NULL) : LT_ERR_NOT_JOINED;
}

EXPORT int LT_done(LT_ticket ticket)
{
    struct connection *c = lite_connection();
    unsigned index = ticket & (WAITED - 1);
    if (!c)
        return LT_ERR_NOT_JOINED;
    if (index >= SLOTS || c->slots[index].state == FREE || c->slots[index].tag != ticket)
        return lite_fail(LT_ERR_BAD_ARGUMENT, "this thread has no such ticket");
    while (c->slots[index].state == RUNNING) {
        int failed = take(c, MSG_DONTWAIT);
        if (failed)
            return failed > 0 ? 0 : failed;
    }
    return 1;
}

EXPORT int LT_fence(void)
{
    struct connection *c = lite_connection();
    if (!c)
        return LT_ERR_NOT_JOINED;
    while (c->running) {
        int failed = take(c, 0);
        if (failed)
            return failed;
    }
    int failed = c->failed;
    c->failed = 0;
    return failed ? lite_fail(failed, "%s", LT_strerror(failed)) : 0;
}

static int atomic(struct lite_request *request, uint64_t *before)
{
    struct connection *c = lite_connection();
    struct lite_reply reply;
    if (!c)
        return LT_ERR_NOT_JOINED;
    int failed = transact(c, request, NULL, NULL, 0, NULL, 0, &reply);
    if (!failed && before)
        *before = reply.value;
    return failed;
}

EXPORT int LT_fetch_add(LT_handle handle, uint64_t offset, uint64_t addend, uint64_t *before)
{
    struct lite_request request = {.op = LITE_FETCH_ADD, .handle = handle, .offset = offset, .arg0 = addend};
    return atomic(&request, before);
}

EXPORT int LT_test_set(LT_handle handle, uint64_t offset, uint64_t expected, uint64_t set, uint64_t *before)
{
    struct lite_request request = {
        .op = LITE_CAS, .handle = handle, .offset = offset, .arg0 = expected, .arg1 = set};
    return atomic(&request, before);
}

static size_t prepare_call(struct lite_request *request, int node, int port, const void *data, size_t length,
                           void *reply, size_t max_reply, unsigned timeout_ms)
{
    *request = (struct lite_request){.op = LITE_CALL, .handle = (uint64_t)node, .arg0 = (uint64_t)port,
                                     .arg1 = max_reply, .timeout_ms = timeout_ms};
    size_t inlined = place_out(request, data, length, false, LITE_INLINE);
    place_in(request, reply, max_reply, &request->offset, false, LITE_INLINE);
    return inlined;
}

EXPORT int LT_RPC(int node, int port, const void *data, size_t length, void *reply, size_t max_reply,
                  size_t *reply_length, unsigned timeout_ms)
{
    struct connection *c = lite_connection();
    struct lite_request request;
    struct lite_reply answer;
    if (!c)
        return LT_ERR_NOT_JOINED;
    size_t inlined = prepare_call(&request, node, port, data, length, reply, max_reply, timeout_ms);
    int failed = transact(c, &request, NULL, data, inlined, reply, max_reply, &answer);
    if (!failed && reply_length)
        *reply_length = answer.length;
    return failed;
}

EXPORT int LT_multicast(int count, const int *nodes, int port, const void *data, size_t length, void *const *replies,
                        size_t max_reply, size_t *lengths, int *results, unsigned timeout_ms)
{
    struct connection *c = lite_connection();
    LT_ticket tickets[SLOTS];
    int first = 0;
    if (!c)
        return LT_ERR_NOT_JOINED;
    if (count < 0 || count > SLOTS)
        return lite_fail(LT_ERR_BAD_ARGUMENT, "%d nodes at once; the most is %d", count, SLOTS);
    for (int i = 0; i < count; i++) {
        struct lite_request request;
        size_t inlined =
            prepare_call(&request, nodes[i], port, data, length, replies[i], max_reply, timeout_ms);
        results[i] = start(c, &request, data, inlined, replies[i], max_reply, &tickets[i]);
    }
    for (int i = 0; i < count; i++) {
        uint64_t came = 0;
        if (!results[i])
            results[i] = finish(c, tickets[i], &came);
        lengths[i] = results[i] ? 0 : came;
        if (!first)
            first = results[i];
    }
    return first;
}

EXPORT int LT_send(int node, int port, const void *data, size_t length)
{
    struct connection *c = lite_connection();
    struct lite_request request = {.op = LITE_SEND, .handle = (uint64_t)node, .arg0 = (uint64_t)port};
    struct lite_reply reply;
    if (!c)
        return LT_ERR_NOT_JOINED;
    size_t inlined = place_out(&request, data, length, true, LITE_INLINE);
    return transact(c, &request, NULL, data, inlined, NULL, 0, &reply);
}

static int receive_message(struct connection *c, struct lite_request *request, const void *reply, size_t inlined,
                           void *data, size_t size, struct LT_message *message, unsigned timeout_ms)
{
    struct lite_reply answer;
    if (timeout_ms == LT_NOW)
        request->flags |= LITE_NO_WAIT;
    else
        request->timeout_ms = timeout_ms;
    int failed = transact(c, request, NULL, reply, inlined, data, size, &answer);
    if (!failed)
        *message = (struct LT_message){answer.length, answer.value, (int)answer.value2};
    return failed;
}

EXPORT int LT_recvRPC(int port, void *data, size_t size, struct LT_message *message, unsigned timeout_ms)
{
    struct connection *c = lite_connection();
    struct lite_request request = {.op = LITE_RECEIVE, .arg0 = (uint64_t)port, .arg1 = size};
    if (!c)
        return LT_ERR_NOT_JOINED;
    place_in(&request, data, size, &request.address, true, LITE_INLINE);
    return receive_message(c, &request, NULL, 0, data, size, message, timeout_ms);
}

EXPORT int LT_replyRPC(uint64_t descriptor, const void *data, size_t length)
{
    struct connection *c = lite_connection();
    struct lite_request request = {.op = LITE_REPLY, .handle = descriptor};
    struct lite_reply reply;
    if (!c)
        return LT_ERR_NOT_JOINED;
    size_t inlined = place_out(&request, data, length, true, LITE_INLINE);
    return transact(c, &request, NULL, data, inlined, NULL, 0, &reply);
}

EXPORT int LT_reply_recvRPC(uint64_t descriptor, const void *reply, size_t length, int port, void *data, size_t size,
                            struct LT_message *message, unsigned timeout_ms)
{
    struct connection *c = lite_connection();
    struct lite_request request = {
        .op = LITE_REPLY_RECEIVE, .handle = descriptor, .arg0 = (uint64_t)port, .arg1 = size};
    if (!c)
        return LT_ERR_NOT_JOINED;
    size_t inlined = place_out(&request, reply, length, false, LITE_INLINE);
    place_in(&request, data, size, &request.offset, false, LITE_INLINE);
    return receive_message(c, &request, reply, inlined, data, size, message, timeout_ms);
}

EXPORT int LT_set_priority(int priority)
{
    struct connection *c = lite_connection();
    if (!c)
        return LT_ERR_NOT_JOINED;
    if (priority < 0 || priority >= LITE_PRIORITIES)
        return lite_fail(LT_ERR_BAD_ARGUMENT, "priority %d", priority);
    c->priority = (uint8_t)priority;
    return 0;
}
