/* Requests: what is asked is checked here, and everything ends here. */
#include "core.h"

#include <stdlib.h>
#include <string.h>

static const uint64_t NS_PER_MS = 1000000;
static const unsigned ALL_FLAGS = LITE_INLINE_DATA | LITE_INLINE_REPLY | LITE_NO_WAIT;

static bool has(const struct op *op, uint32_t ops)
{
    return ops >> op->request.op & 1;
}

enum {
    OUTGOING = 1 << LITE_WRITE | 1 << LITE_WRITEV | 1 << LITE_CALL | 1 << LITE_SEND | 1 << LITE_REPLY |
               1 << LITE_REPLY_RECEIVE,
    INCOMING = 1 << LITE_READ | 1 << LITE_READV | 1 << LITE_CALL | 1 << LITE_RECEIVE | 1 << LITE_REPLY_RECEIVE,
    VECTOR = 1 << LITE_READV | 1 << LITE_WRITEV,
    MEMORY = 1 << LITE_READ | 1 << LITE_WRITE | 1 << LITE_FETCH_ADD | 1 << LITE_CAS | VECTOR,
    WITH_PORT = 1 << LITE_CALL | 1 << LITE_SEND | 1 << LITE_RECEIVE | 1 << LITE_REPLY_RECEIVE,
};

struct op *op_new(struct core *core, struct client *client, struct channel *channel)
{
    struct op *op = FIRST(&core->free_ops, struct op, wait);
    if (op)
        list_remove(&op->wait);
    else if (!(op = malloc(sizeof *op)))
        return NULL;
    *op = (struct op){.client = client, .channel = channel, .pair = -1};
    list_init(&op->wait);
    list_init(&op->order);
    list_init(&op->timed);
    if (client)
        client->ops++;
    if (channel) {
        list_append(&channel->order, &op->order);
        channel->window++;
    }
    core->stats.ops++;
    return op;
}

/* Most bytes that may come in. */
static uint64_t most_incoming(const struct op *op)
{
    return has(op, 1 << LITE_READ | 1 << LITE_READV) ? op->request.length : op->request.arg1;
}

static int check_segments(struct op *op)
{
    uint64_t sum = 0;
    op->segment = (const struct lite_segment *)(const void *)(op->packet->bytes + sizeof op->request);
    for (uint64_t i = 0; i < op->request.arg0; i++)
        if (__builtin_add_overflow(sum, op->segment[i].length, &sum))
            return LITE_BAD_MESSAGE;
    return sum == op->request.length ? 0 : LITE_BAD_MESSAGE;
}

static int check_buffer(struct op *op)
{
    const struct lite_request *r = &op->request;
    bool out = has(op, OUTGOING) && !(r->flags & LITE_INLINE_DATA);
    bool in = has(op, INCOMING) && !(r->flags & LITE_INLINE_REPLY);
    if (!r->buffer || !(out || in))
        return 0;
    op->buffer = buffer_of(op->client, r->buffer, 0, 0);
    if (!op->buffer)
        return LITE_BAD_HANDLE;
    op->buffer->users++;
    if ((out && !buffer_of(op->client, r->buffer, op_address(op, false), r->length)) ||
        (in && !buffer_of(op->client, r->buffer, op_address(op, true), most_incoming(op))))
        return LITE_OUT_OF_RANGE;
    return 0;
}

/* Is the request one that makes sense by itself? `payload`: bytes after its header. */
static int check(struct op *op, size_t payload)
{
    const struct lite_request *r = &op->request;
    if (!r->op || r->op >= LITE_OPS || r->priority >= LITE_PRIORITIES || r->flags & ~ALL_FLAGS)
        return LITE_BAD_MESSAGE;
    size_t segments = 0, data = 0;
    if (has(op, VECTOR)) {
        if (!r->arg0 || r->arg0 > LITE_SEGMENTS)
            return LITE_BAD_MESSAGE;
        segments = r->arg0 * sizeof(struct lite_segment);
    }
    if (r->flags & LITE_INLINE_DATA) {
        if (!has(op, OUTGOING) || r->length > LITE_INLINE)
            return LITE_BAD_MESSAGE;
        data = r->length;
    }
    if (payload > LITE_INLINE || payload != segments + data)
        return LITE_BAD_MESSAGE;
    if (r->flags & LITE_INLINE_REPLY && (!has(op, INCOMING) || most_incoming(op) > LITE_INLINE - segments))
        return LITE_BAD_MESSAGE;
    if (has(op, WITH_PORT) && r->arg0 >= LITE_PORTS)
        return LITE_BAD_ARGUMENT;
    if (has(op, INCOMING) && !has(op, MEMORY) && r->arg1 > LITE_MAX_MESSAGE)
        return LITE_BAD_ARGUMENT;
    op->data = op->packet->bytes + sizeof *r + segments;
    int code = segments ? check_segments(op) : 0;
    return code ? code : check_buffer(op);
}

static void set_deadline(struct core *core, struct op *op)
{
    uint32_t ms = op->request.timeout_ms;
    bool receive = has(op, 1 << LITE_RECEIVE | 1 << LITE_REPLY_RECEIVE);
    if (ms == LITE_NO_LIMIT || (!ms && receive))
        return;
    op->deadline = core->now + (ms ? ms : core->config.timeout_ms) * NS_PER_MS;
    list_append(&core->timed, &op->timed);
    core_alarm(core, op->deadline);
}

/* CANCEL: the oldest request with the tag. */
static void cancel(struct core *core, struct op *op)
{
    core->stats.cancels++;
    struct link *list = &op->channel->order;
    for (struct link *link = list->next; link != list; link = link->next) {
        struct op *other = OF(link, struct op, order);
        if (other == op || other->request.tag != op->request.arg0)
            continue;
        op->reply.value = op_cancel(core, other, LITE_CANCELLED);
        break;
    }
    op_answer(core, op, 0);
}

/* Without data in its packet a request does not need the packet any more. */
static void keep_packet(struct core *core, struct op *op)
{
    bool read = has(op, MEMORY) && op->request.flags & LITE_INLINE_REPLY;
    if (op->segment || read || (op->request.flags & LITE_INLINE_DATA && op->request.length))
        return;
    pool_give(&core->packets, op->packet);
    op->packet = NULL;
}

void op_start(struct core *core, struct op *op, size_t payload)
{
    int code = check(op, payload);
    if (code) {
        core->stats.bad_requests += code == LITE_BAD_MESSAGE;
        op_answer(core, op, code);
        return;
    }
    keep_packet(core, op);
    if (!core->node) {
        op_answer(core, op, LITE_NOT_JOINED);
        return;
    }
    set_deadline(core, op);
    switch (op->request.op) {
    case LITE_CALL:
    case LITE_SEND:
        rpc_call(core, op);
        break;
    case LITE_RECEIVE:
        rpc_receive(core, op);
        break;
    case LITE_REPLY:
    case LITE_REPLY_RECEIVE:
        rpc_reply(core, op);
        break;
    case LITE_CANCEL:
        cancel(core, op);
        break;
    default:
        op_memory(core, op);
    }
}

void op_memory(struct core *core, struct op *op)
{
    int code = lmr_begin(core, op);
    if (code > 0)
        return; /* parked */
    if (code) {
        op_answer(core, op, code);
        return;
    }
    bool read = has(op, 1 << LITE_READ | 1 << LITE_READV);
    core->stats.reads += read;
    core->stats.writes += has(op, 1 << LITE_WRITE | 1 << LITE_WRITEV);
    core->stats.atomics += has(op, 1 << LITE_FETCH_ADD | 1 << LITE_CAS);
    if (read && op->request.flags & LITE_INLINE_REPLY)
        op->inline_reply = op->data;
    op->reply.length = op->total;
    transfer(core, op);
}

/* What a program or the tier waits for: see struct raw. */
static void answer_raw(struct core *core, struct op *op);

/* What it used and will not use again, however long the program takes to read the answer. */
static void release(struct core *core, struct op *op)
{
    if (op->lmr)
        lmr_end(core, op);
    if (op->buffer) {
        struct buffer *buffer = op->buffer;
        op->buffer = NULL;
        buffer->users--;
        buffer_release(core, op->client, buffer);
    }
}

void op_answer(struct core *core, struct op *op, int status)
{
    op->ended = true;
    list_remove(&op->wait);
    list_remove(&op->timed);
    op->reply.tag = op->request.tag;
    op->reply.status = status;
    if (status) {
        core->stats.errors++;
        if (status != LITE_MESSAGE_TOO_LARGE)
            op->reply.length = 0;
        op->inline_reply = NULL;
        rpc_slot_release(core, op);
    }
    if (!op->in_flight)
        release(core, op);
    if (op->raw) {
        answer_raw(core, op);
        return;
    }
    if (!op->channel) {
        op->told = true;
        op_settle(core, op);
        return;
    }
    list_remove(&op->order);
    channel_send(core, op); /* may end the channel */
}

/* Give back all that is shared with others. */
static void let_go(struct core *core, struct op *op)
{
    release(core, op);
    rpc_slot_release(core, op);
    if (op->packet)
        pool_give(&core->packets, op->packet);
    if (op->message)
        message_done(core, op->message);
    op->packet = NULL;
    op->message = NULL;
}

void op_settle(struct core *core, struct op *op)
{
    if (op->in_flight || !(op->told || op->spilled))
        return;
    let_go(core, op);
    if (!op->told)
        return;
    free(op->spilled);
    list_remove(&op->wait);
    struct client *client = op->client;
    if (client && --client->ops == 0 && client->removed)
        pthread_cond_broadcast(&core->changed);
    core->stats.ops--;
    list_append(&core->free_ops, &op->wait);
}

bool op_cancel(struct core *core, struct op *op, int code)
{
    if (op->ended)
        return false;
    bool call = op->request.op == LITE_CALL;
    if (op->head_bytes && !(call && op->sent)) {
        if (call && !op->status)
            op->status = code; /* its message goes first: the ring has a place for it */
        return false;
    }
    if (op->in_flight) {
        op->status = op->status ? op->status : code;
        list_remove(&op->wait); /* no more of it; what is on the fabric ends by itself */
        return false;
    }
    op_answer(core, op, code); /* a call that is sent leaves its slot in quarantine */
    return true;
}

void ops_expire(struct core *core)
{
    struct link later;
    list_init(&later);
    for (struct op *op; (op = FIRST(&core->timed, struct op, timed));) {
        if (op->deadline > core->now) {
            list_append(&later, &op->timed);
            core_alarm(core, op->deadline);
            continue;
        }
        list_remove(&op->timed);
        core->stats.timeouts++;
        op_cancel(core, op, rpc_wants_room(core, op) ? LITE_RING_FULL : LITE_TIMED_OUT);
    }
    list_splice(&core->timed, &later);
    rpc_room(core);
}

/* An operation of the tier: the calling thread waits for it. */
struct raw {
    pthread_cond_t done;
    bool ended;
    int status;
    uint64_t value;
};

static void answer_raw(struct core *core, struct op *op)
{
    op->raw->status = op->reply.status;
    op->raw->value = op->reply.value;
    op->raw->ended = true;
    pthread_cond_signal(&op->raw->done);
    op->raw = NULL;
    op->told = true;
    op_settle(core, op);
}

API int lite_raw(struct core *core, uint32_t kind, uint32_t node, uint64_t address, uint32_t rkey, void *data,
                 uint64_t length, uint64_t arg0, uint64_t arg1, uint64_t *value)
{
    bool atomic = kind == LITE_FETCH_ADD || kind == LITE_CAS;
    if ((!atomic && kind != LITE_READ && kind != LITE_WRITE) || (atomic && address % 8))
        return LITE_BAD_ARGUMENT;
    core_enter(core);
    struct op *op = op_new(core, NULL, NULL);
    if (!op) {
        core_leave(core);
        return LITE_NO_MEMORY;
    }
    struct raw raw = {.ended = false};
    pthread_cond_init(&raw.done, NULL);
    op->raw = &raw;
    op->request = (struct lite_request){
        .op = (uint8_t)kind, .handle = node, .arg0 = arg0, .arg1 = arg1, .address = (uintptr_t)data};
    op->remote = address;
    op->rkey = rkey;
    op->total = atomic ? 8 : length;
    transfer(core, op);
    pieces_flush(core);
    while (!raw.ended)
        pthread_cond_wait(&raw.done, &core->lock);
    core_leave(core);
    pthread_cond_destroy(&raw.done);
    *value = raw.value;
    return raw.status;
}
