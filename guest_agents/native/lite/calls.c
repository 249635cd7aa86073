/* RPC, the side that calls: rings of other nodes, and the replies that come back. */
#include "rpc.h"

#include <stdlib.h>
#include <string.h>

static const uint64_t LOOK_AGAIN_NS = 1000000;   /* a head that is written back raises no event */
static const uint64_t ASK_AGAIN_NS = 1000000000; /* should the tier have lost the event that asks for a ring */

int rpc_open(struct core *core)
{
    struct rpc *rpc = core->rpc = calloc(1, sizeof *rpc);
    if (!rpc)
        return LITE_NO_MEMORY;
    for (int i = 0; i < SLOT_CLASSES; i++)
        list_init(&rpc->idle[i]);
    for (int i = 0; i < LITE_PORTS; i++) {
        list_init(&rpc->port[i].receivers);
        list_init(&rpc->port[i].messages);
    }
    struct link *lists[] = {&rpc->bare, &rpc->regions, &rpc->full, &rpc->free_messages};
    for (size_t i = 0; i < sizeof lists / sizeof *lists; i++)
        list_init(lists[i]);
    return 0;
}

void rpc_close(struct core *core)
{
    if (!core->rpc)
        return;
    slots_close(core);
    for (struct message *message; (message = FIRST(&core->rpc->free_messages, struct message, link));) {
        list_remove(&message->link);
        free(message);
    }
    free(core->rpc->call);
    free(core->rpc);
    core->rpc = NULL;
}

void message_post(struct core *core, struct op *op, struct peer *peer, uint64_t remote, uint32_t rkey, uint32_t imm)
{
    op->peer = peer;
    op->remote = remote;
    op->rkey = rkey;
    op->imm = imm;
    op->total = op->request.length;
    transfer(core, op);
}

void rpc_void(struct op *op)
{
    op->voided = true;
    if (op->head_bytes == sizeof(struct message_head)) {
        ((struct message_head *)(void *)op->head)->kind = MESSAGE_VOID;
        return;
    }
    struct reply_head *head = (struct reply_head *)(void *)op->head;
    head->status = LITE_BAD_MESSAGE;
    head->length = 0;
    if (op->bare) {
        op->bare = false;
        op->imm = (uint32_t)IMM_REPLY << OPCODE_SHIFT | (op->imm % MOST_SLOTS);
    }
}

static uint64_t head_of(const struct ring_out *ring)
{
    uint64_t word = __atomic_load_n(&ring->peer->heads[ring->port], __ATOMIC_ACQUIRE);
    return word >> GENERATION_SHIFT == ring->generation ? word : 0; /* it may still be that of the ring before */
}

/* Take room in the ring: where the message goes, and how much is skipped before it. False: there is none. */
static bool reserve(struct ring_out *ring, uint64_t length, uint64_t *offset, uint64_t *skipped)
{
    uint64_t span = (sizeof(struct message_head) + length + RING_UNIT - 1) & ~(uint64_t)(RING_UNIT - 1);
    uint64_t at = ring->tail % ring->size;
    *skipped = at + span > ring->size ? ring->size - at : 0;
    uint64_t used = (ring->tail - head_of(ring)) & HEAD_MASK; /* huge after nonsense from the peer: the ring is full */
    if (used > ring->size || *skipped + span > ring->size - used)
        return false;
    ring->tail += *skipped + span;
    *offset = *skipped ? 0 : at;
    return true;
}

/* False: it must wait. */
static bool try(struct core *core, struct ring_out *ring, struct op *op)
{
    const struct lite_request *r = &op->request;
    bool call = r->op == LITE_CALL;
    if (r->length > ring->max_message) {
        op_answer(core, op, LITE_MESSAGE_TOO_LARGE);
        return true;
    }
    uint64_t sender = 1ull << SENDER(op->client), *owed = &ring->peer->owed[ring->port];
    if (!call && *owed & sender) {
        *owed &= ~sender;
        op_answer(core, op, LITE_PORT_CLOSED);
        return true;
    }
    if (call && !op->slot && !(op->slot = slot_take(core, r->arg1)))
        return false;
    struct slot *slot = op->slot;
    uint64_t offset, skipped;
    if (!reserve(ring, r->length, &offset, &skipped))
        return false;
    struct message_head *head = (struct message_head *)(void *)op->head;
    *head = (struct message_head){
        .magic = MESSAGE_MAGIC,
        .port = (uint16_t)ring->port,
        .kind = call ? MESSAGE_CALL : MESSAGE_SEND,
        .sender = SENDER(op->client),
        .length = (uint32_t)r->length,
        .sequence = ring->sequence++,
        .skipped = (uint32_t)skipped,
    };
    if (slot) {
        slot->op = op;
        slot->peer = ring->peer;
        slot->session = ring->peer->session;
        head->max_reply = (uint32_t)r->arg1;
        head->slot = slot->index;
        head->ticket = slot->ticket;
        head->slot_rkey = slot->rkey;
        head->slot_address = (uintptr_t)slot->bytes + SLOT_HEAD / 2;
    }
    if (!call)
        ring->peer->informed[ring->port] &= ~sender;
    core->stats.calls += call;
    core->stats.sends += !call;
    ring->in_flight++;
    op->head_bytes = sizeof *head;
    message_post(core, op, ring->peer, ring->address + offset, ring->rkey,
                 (uint32_t)IMM_REQUEST << OPCODE_SHIFT | ring->port << PORT_SHIFT | (uint32_t)(offset / RING_UNIT));
    return true;
}

/* If the ring has retired, or was never there, ask for one: as soon as nothing is on its way into the old. */
static void renew(struct core *core, struct ring_out *ring)
{
    if (ring->ready && head_of(ring) & RING_CLOSED) {
        ring->ready = false;
        ring->asked = 0;
        list_remove(&ring->full);
    }
    if (!ring->ready && !ring->in_flight && core->now - ring->asked > ASK_AGAIN_NS) {
        ring->asked = core->now;
        core_event(core, EVENT_BIND, ring->peer->node, ring->peer->incarnation, ring->port, 0);
    }
}

/* A program hears that a port is closed: it need not hear again what that has cost. */
static void inform(struct peer *peer, uint32_t port, const struct op *op)
{
    uint64_t sender = 1ull << SENDER(op->client);
    peer->informed[port] |= sender;
    peer->owed[port] &= ~sender;
}

static struct ring_out *ring_of(struct core *core, struct peer *peer, uint32_t port)
{
    struct ring_out *ring = peer->out[port];
    if (!ring) {
        if (!(ring = calloc(1, sizeof *ring)))
            return NULL;
        ring->peer = peer;
        ring->port = port;
        list_init(&ring->waiting);
        list_init(&ring->full);
        core->stats.rings_out++;
        peer->out[port] = ring;
    }
    renew(core, ring);
    return ring;
}

void rpc_call(struct core *core, struct op *op)
{
    uint32_t node = op->request.handle < NODES ? (uint32_t)op->request.handle : NODES;
    int code = peer_usable(core, node, &op->peer);
    struct ring_out *ring = code ? NULL : ring_of(core, op->peer, (uint32_t)op->request.arg0);
    if (!ring) {
        op_answer(core, op, code ? code : LITE_NO_MEMORY);
        return;
    }
    if (ring->ready && list_empty(&ring->waiting) && try(core, ring, op))
        return;
    /* What waits keeps its packet; some must be left for those who would make room. */
    const struct pool *packets = &core->packets;
    if (op->packet && 4 * packets->used * packets->bytes_each > 3 * packets->limit) {
        op_answer(core, op, LITE_RING_FULL);
        return;
    }
    core->stats.ring_waits += ring->ready;
    list_append(&ring->waiting, &op->wait);
    if (ring->ready) {
        list_append(&core->rpc->full, &ring->full);
        core_alarm(core, core->now + LOOK_AGAIN_NS);
    }
}

bool rpc_wants_room(struct core *core, const struct op *op)
{
    (void)core;
    bool message = op->request.op == LITE_CALL || op->request.op == LITE_SEND;
    const struct ring_out *ring = message && !op->head_bytes ? op->peer->out[op->request.arg0] : NULL;
    return ring && ring->ready;
}

static void let_in(struct core *core, struct ring_out *ring)
{
    renew(core, ring);
    if (!ring->ready)
        return;
    for (struct op *op; (op = FIRST(&ring->waiting, struct op, wait));) {
        list_remove(&op->wait);
        if (!try(core, ring, op)) {
            list_prepend(&ring->waiting, &op->wait);
            break;
        }
    }
    if (list_empty(&ring->waiting))
        list_remove(&ring->full);
    else
        list_append(&core->rpc->full, &ring->full);
}

void rpc_room(struct core *core)
{
    struct link full;
    list_init(&full);
    list_splice(&full, &core->rpc->full);
    for (struct ring_out *ring; (ring = FIRST(&full, struct ring_out, full));) {
        list_remove(&ring->full);
        let_in(core, ring);
    }
    if (!list_empty(&core->rpc->full))
        core_alarm(core, core->now + LOOK_AGAIN_NS);
}

void rpc_landed(struct core *core, struct op *op)
{
    if (op->sent)
        return;
    op->sent = true;
    struct ring_out *ring = op->request.op == LITE_REPLY || op->request.op == LITE_REPLY_RECEIVE
                                ? NULL : op->peer->out[op->request.arg0];
    if (ring && --ring->in_flight == 0 && !list_empty(&ring->waiting))
        renew(core, ring);
}

void rpc_sent(struct core *core, struct op *op)
{
    rpc_landed(core, op);
    if (op->status || op->request.op == LITE_SEND || op->request.op == LITE_REPLY) {
        op_answer(core, op, op->status);
    } else if (op->request.op == LITE_REPLY_RECEIVE && op->deadline && op->deadline <= core->now) {
        op_answer(core, op, LITE_TIMED_OUT);
    } else if (op->request.op == LITE_REPLY_RECEIVE) {
        op->head_bytes = 0;
        op->final = op->sent = false;
        rpc_receive(core, op);
    }
    /* A call goes on when its reply comes. */
}

void rpc_malformed(struct core *core, struct peer *peer)
{
    core->stats.messages_dropped++;
    peer_break(core, peer, LITE_NODE_UNREACHABLE);
}

/* What arrived in a slot: from its head, or, without one, from the immediate. False: nonsense. */
static bool read_reply(const struct slot *slot, uint32_t imm, uint32_t bytes, struct reply_head *head)
{
    if (imm >> OPCODE_SHIFT == IMM_BARE_REPLY) {
        *head = (struct reply_head){0, slot->ticket, bytes};
        return bytes && imm == bare_reply(slot->index, slot->ticket);
    }
    if (bytes < sizeof *head)
        return false;
    memcpy(head, slot->bytes + SLOT_HEAD / 2, sizeof *head);
    return head->ticket == slot->ticket && head->status <= 0;
}

void rpc_replied(struct core *core, struct peer *peer, uint32_t imm, uint32_t bytes)
{
    struct rpc *rpc = core->rpc;
    bool bare = imm >> OPCODE_SHIFT == IMM_BARE_REPLY;
    uint32_t index = imm & ((1u << (bare ? SLOT_BITS : OPCODE_SHIFT)) - 1);
    struct slot *slot = index < rpc->slots ? rpc->slot[index] : NULL;
    struct reply_head head;
    if (!slot || slot->peer != peer || slot->state == SLOT_IDLE || slot->replied ||
        !read_reply(slot, imm, bytes, &head)) {
        rpc_malformed(core, peer);
        return;
    }
    struct op *op = slot->op;
    if (head.length > (op ? op->request.arg1 : slot_capacity(slot))) {
        rpc_malformed(core, peer);
        return;
    }
    slot->replied = true;
    if (slot->state == SLOT_QUARANTINED) {
        slot_idle(core, slot);
        rpc_room(core);
        return;
    }
    slot->op = NULL;
    uint8_t *data = slot->bytes + SLOT_HEAD;
    op->reply.length = head.length;
    if (head.status == LITE_PORT_CLOSED)
        inform(peer, (uint32_t)op->request.arg0, op);
    if (!head.status && op->request.flags & LITE_INLINE_REPLY)
        op->inline_reply = data;
    else if (!head.status && !copy_to(op, 0, data, head.length))
        head.status = LITE_BAD_ARGUMENT;
    op_answer(core, op, head.status);
    rpc_room(core);
}

static void fail_ring(struct core *core, struct ring_out *ring, int code)
{
    ring->peer->out[ring->port] = NULL;
    core->stats.rings_out--;
    list_remove(&ring->full);
    for (struct op *op; (op = FIRST(&ring->waiting, struct op, wait));) {
        if (code == LITE_PORT_CLOSED)
            inform(ring->peer, ring->port, op);
        op_answer(core, op, code);
    }
    free(ring);
}

void calls_peer_gone(struct core *core, struct peer *peer, int code)
{
    for (uint32_t port = 0; port < LITE_PORTS; port++)
        if (peer->out[port])
            fail_ring(core, peer->out[port], code);
    memset(peer->owed, 0, sizeof peer->owed);
    memset(peer->informed, 0, sizeof peer->informed);
    for (uint32_t i = 0; i < core->rpc->slots; i++) {
        struct slot *slot = core->rpc->slot[i];
        if (slot->peer != peer || slot->state == SLOT_IDLE)
            continue;
        if (slot->state == SLOT_QUARANTINED)
            slot_idle(core, slot);
        else if (slot->op)
            op_answer(core, slot->op, code);
    }
}

static int ring_waited_for(struct core *core, uint32_t node, uint32_t incarnation, uint32_t port,
                           struct ring_out **ring)
{
    struct peer *peer;
    int code = port < LITE_PORTS ? peer_usable(core, node, &peer) : LITE_BAD_ARGUMENT;
    if (!code && peer->incarnation != incarnation)
        code = LITE_NODE_DEAD;
    *ring = code ? NULL : peer->out[port];
    return code ? code : *ring && !(*ring)->ready && !(*ring)->in_flight ? 0 : LITE_BAD_ARGUMENT;
}

API int lite_ring_attach(struct core *core, uint32_t node, uint32_t incarnation, uint32_t port,
                         const struct lite_ring *offer)
{
    core_enter(core);
    struct ring_out *ring;
    int code = ring_waited_for(core, node, incarnation, port, &ring);
    bool sane = offer->size >= SMALLEST_RING && offer->size % RING_UNIT == 0 && offer->size / RING_UNIT <= 1u << 24 &&
                offer->max_message <= offer->size / 4 - RING_UNIT && offer->generation <= UINT16_MAX;
    if (!code && !sane)
        code = LITE_BAD_ARGUMENT;
    if (!code) {
        ring->ready = true;
        ring->tail = ring->sequence = 0;
        ring->generation = (uint16_t)offer->generation;
        ring->peer->owed[port] |= offer->lost & ~ring->peer->informed[port];
        ring->peer->informed[port] = 0;
        ring->address = offer->address;
        ring->rkey = offer->rkey;
        ring->size = offer->size;
        ring->max_message = offer->max_message;
        let_in(core, ring);
        core_alarm(core, core->now + LOOK_AGAIN_NS);
    }
    core_leave(core);
    return code;
}

API int lite_ring_refuse(struct core *core, uint32_t node, uint32_t incarnation, uint32_t port, int reason)
{
    core_enter(core);
    struct ring_out *ring;
    int code = reason < 0 ? ring_waited_for(core, node, incarnation, port, &ring) : LITE_BAD_ARGUMENT;
    if (!code)
        fail_ring(core, ring, reason);
    core_wake(core);
    core_leave(core);
    return code;
}
