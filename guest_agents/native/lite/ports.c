/* RPC, the side that is called: rings of this node, ports, and the descriptors of calls not yet replied to. */
#include "rpc.h"

#include <stdlib.h>
#include <string.h>

static const uint32_t DONE = 1u << 31; /* in ring->span: the message has been read */

static void free_ring(struct core *core, struct ring_in *ring)
{
    core->stats.rings_in--;
    core->stats.bytes_rings -= ring->region.size;
    region_close(&ring->region);
    free(ring->span);
    free(ring);
}

/* Write the head back if a quarter of the ring has become free since, or if the client must know that it is closed. */
static void tell_head(struct core *core, struct ring_in *ring)
{
    struct peer *peer = ring->peer;
    bool closed = ring->retired && !ring->told_closed;
    if (peer->state != PEER_CONNECTED || (!closed && ring->head - ring->head_told < ring->region.size / 4))
        return;
    uint32_t pair = peer->pairs > 1 ? 1 + ring->port % (peer->pairs - 1) : 0; /* not among the bulk of hw_sep */
    struct piece *piece = peer->pair[pair].in_flight < QP_DEPTH ? piece_take(core, peer, pair, NULL) : NULL;
    if (!piece)
        return; /* all is full of work: the next message tells it */
    uint64_t word = (uint64_t)ring->generation << GENERATION_SHIFT | (ring->head & HEAD_MASK);
    word |= ring->retired ? RING_CLOSED : 0;
    memcpy(piece->head, &word, sizeof word);
    piece->sge[0] = (struct ibv_sge){(uintptr_t)piece->head, sizeof word, core->piece_region.mr->lkey};
    piece->wr.num_sge = 1;
    piece->wr.opcode = IBV_WR_RDMA_WRITE;
    piece->wr.send_flags |= IBV_SEND_INLINE;
    piece->wr.wr.rdma.remote_addr = peer->remote_heads + ring->port * sizeof word;
    piece->wr.wr.rdma.rkey = peer->remote_heads_rkey;
    piece->length = sizeof word;
    ring->head_told = ring->head;
    ring->told_closed = ring->retired;
    piece_post(core, piece);
}

void message_done(struct core *core, struct message *message)
{
    struct ring_in *ring = message->ring;
    ring->span[message->head.sequence % ring->spans] |= DONE;
    list_append(&core->rpc->free_messages, &message->link);
    ring->held--;
    for (uint32_t *span; *(span = &ring->span[ring->first % ring->spans]) & DONE; ring->first++) {
        ring->head += *span & ~DONE;
        *span = 0;
    }
    if (!ring->detached)
        tell_head(core, ring);
    else if (!ring->held)
        free_ring(core, ring);
}

/* Nothing arrives in this ring any more. */
static void detach(struct core *core, struct ring_in *ring)
{
    ring->peer->in[ring->port] = NULL;
    ring->detached = true;
    if (!ring->held)
        free_ring(core, ring);
}

static void begin_reply(struct core *core, struct op *op, struct call *call, int status)
{
    struct reply_head *head = (struct reply_head *)(void *)op->head;
    *head = (struct reply_head){status, call->ticket, op->request.length};
    op->head_bytes = sizeof *head;
    op->bare = !status && op->request.length && op->request.length <= CHUNK && call->slot < MOST_SLOTS;
    call->client = NULL;
    uint32_t index = (uint32_t)(call - core->rpc->call);
    if (index < core->rpc->free_call)
        core->rpc->free_call = index;
    core->stats.descriptors--;
    core->stats.replies++;
    uint32_t imm = op->bare ? bare_reply(call->slot, call->ticket) : (uint32_t)IMM_REPLY << OPCODE_SHIFT | call->slot;
    message_post(core, op, call->peer, call->slot_address, call->slot_rkey, imm);
}

static struct call *new_call(struct core *core, struct client *client, const struct message *message)
{
    struct rpc *rpc = core->rpc;
    while (rpc->free_call < rpc->calls && rpc->call[rpc->free_call].client)
        rpc->free_call++;
    if (rpc->free_call == rpc->calls) {
        uint32_t size = rpc->calls ? 2 * rpc->calls : 64;
        struct call *grown = size > MOST_CALLS ? NULL : realloc(rpc->call, size * sizeof *grown);
        if (!grown)
            return NULL;
        memset(&grown[rpc->calls], 0, (size - rpc->calls) * sizeof *grown);
        rpc->call = grown;
        rpc->calls = size;
    }
    struct call *call = &rpc->call[rpc->free_call];
    const struct message_head *head = &message->head;
    *call = (struct call){client, message->ring->peer, call->generation + 1, message->ring->peer->session,
                          head->slot, head->ticket, head->slot_rkey, head->max_reply, head->slot_address};
    core->stats.descriptors++;
    return call;
}

/* Tell a caller that it gets no reply, and why. */
static void refuse_call(struct core *core, struct call *call, int status)
{
    struct op *op = call->session == call->peer->session ? op_new(core, NULL, NULL) : NULL;
    if (!op) { /* its node has gone */
        call->client = NULL;
        core->stats.descriptors--;
        return;
    }
    op->request.op = LITE_REPLY;
    begin_reply(core, op, call, status);
}

/* Nobody will read this message: a caller is told at once, the sender of a one-way message when it sends again. */
static void refuse(struct core *core, struct message *message, int status)
{
    static struct client nobody;
    struct call *call = message->head.kind == MESSAGE_CALL ? new_call(core, &nobody, message) : NULL;
    struct ring_in *ring = message->ring->peer->in[message->ring->port]; /* for the client the one there is */
    if (call)
        refuse_call(core, call, status);
    else
        core->stats.messages_dropped++;
    if (message->head.kind == MESSAGE_SEND && ring)
        ring->lost |= 1ull << message->head.sender % 64;
    message_done(core, message);
}

/* False: this receiver gets nothing, and has been told why. */
static bool give(struct core *core, struct op *op, struct message *message)
{
    op->reply.length = message->head.length;
    if (message->head.length > op->request.arg1) {
        op_answer(core, op, LITE_MESSAGE_TOO_LARGE);
        return false;
    }
    if (!(op->request.flags & LITE_INLINE_REPLY) && !copy_to(op, 0, message->data, message->head.length)) {
        op_answer(core, op, LITE_BAD_ARGUMENT);
        return false;
    }
    struct call *call = message->head.kind == MESSAGE_CALL ? new_call(core, op->client, message) : NULL;
    if (!call && message->head.kind == MESSAGE_CALL) {
        op_answer(core, op, LITE_NO_MEMORY);
        return false;
    }
    if (call)
        op->reply.value = (uint64_t)call->generation << 32 | (uint64_t)(call - core->rpc->call + 1);
    op->reply.value2 = message->ring->peer->node;
    if (op->request.flags & LITE_INLINE_REPLY)
        op->inline_reply = message->data;
    list_remove(&message->link);
    op->message = message;
    core->stats.receives++;
    op_answer(core, op, 0);
    return true;
}

static void match(struct core *core, struct port *port)
{
    while (!list_empty(&port->receivers) && !list_empty(&port->messages))
        give(core, FIRST(&port->receivers, struct op, wait), FIRST(&port->messages, struct message, link));
}

void rpc_receive(struct core *core, struct op *op)
{
    struct port *port = &core->rpc->port[op->request.arg0];
    if (port->client != op->client) {
        op_answer(core, op, LITE_PORT_CLOSED);
        return;
    }
    if (list_empty(&port->messages) && op->request.flags & LITE_NO_WAIT) {
        op_answer(core, op, LITE_TIMED_OUT);
        return;
    }
    list_append(&port->receivers, &op->wait);
    match(core, port);
}

void rpc_reply(struct core *core, struct op *op)
{
    uint32_t index = (uint32_t)op->request.handle - 1;
    struct call *call = index < core->rpc->calls ? &core->rpc->call[index] : NULL;
    if (!call || call->client != op->client || call->generation != op->request.handle >> 32)
        op_answer(core, op, LITE_BAD_HANDLE);
    else if (op->request.length > call->max_reply) {
        refuse_call(core, call, LITE_MESSAGE_TOO_LARGE);
        op_answer(core, op, LITE_MESSAGE_TOO_LARGE);
    } else if (call->session != call->peer->session) {
        bool dead = call->peer->state == PEER_DEAD;
        refuse_call(core, call, LITE_PORT_CLOSED);
        op_answer(core, op, dead ? LITE_NODE_DEAD : LITE_NODE_UNREACHABLE);
    } else
        begin_reply(core, op, call, 0);
}

static bool sane(const struct ring_in *ring, const struct message_head *head, uint64_t at)
{
    return head->magic == MESSAGE_MAGIC && head->port == ring->port && head->kind <= MESSAGE_VOID &&
           head->length <= ring->max_message && at + sizeof *head + head->length <= ring->region.size &&
           head->sequence - ring->first < ring->spans && !ring->span[head->sequence % ring->spans] &&
           head->skipped < ring->region.size && head->skipped % RING_UNIT == 0 && head->max_reply <= LITE_MAX_MESSAGE;
}

void rpc_arrived(struct core *core, struct peer *peer, uint32_t number, uint64_t offset)
{
    struct ring_in *ring = peer->in[number];
    uint64_t at = offset * RING_UNIT;
    struct message_head head;
    if (!ring || at + sizeof head > ring->region.size) {
        rpc_malformed(core, peer);
        return;
    }
    memcpy(&head, ring->region.bytes + at, sizeof head);
    if (!sane(ring, &head, at)) {
        rpc_malformed(core, peer);
        return;
    }
    struct message *message = FIRST(&core->rpc->free_messages, struct message, link);
    if (!message) {
        if (!(message = malloc(sizeof *message))) {
            rpc_malformed(core, peer); /* no memory for forty bytes: as good as broken */
            return;
        }
        list_init(&message->link);
    }
    list_remove(&message->link);
    message->ring = ring;
    message->head = head;
    message->data = ring->region.bytes + at + sizeof head;
    ring->held++;
    ring->span[head.sequence % ring->spans] =
        head.skipped + (((uint32_t)sizeof head + head.length + RING_UNIT - 1) & ~(uint32_t)(RING_UNIT - 1));
    core->stats.messages_in++;
    struct port *port = &core->rpc->port[number];
    if (head.kind == MESSAGE_VOID) {
        message_done(core, message);
    } else if (!port->client) {
        refuse(core, message, LITE_PORT_CLOSED);
    } else if (head.length > port->max_message) { /* in a retired ring */
        refuse(core, message, LITE_MESSAGE_TOO_LARGE);
    } else {
        list_append(&port->messages, &message->link);
        match(core, port);
    }
}

static void close_port(struct core *core, struct port *port)
{
    uint32_t number = (uint32_t)(port - core->rpc->port);
    port->client = NULL;
    core->stats.ports--;
    for (uint32_t node = 0; node < NODES; node++) {
        struct ring_in *ring = core->by_node[node] ? core->by_node[node]->in[number] : NULL;
        if (ring) {
            ring->retired = true;
            tell_head(core, ring);
        }
    }
    for (struct op *op; (op = FIRST(&port->receivers, struct op, wait));)
        op_answer(core, op, LITE_CANCELLED);
    for (struct message *message; (message = FIRST(&port->messages, struct message, link));)
        refuse(core, message, LITE_PORT_CLOSED);
}

void ports_client_gone(struct core *core, struct client *client)
{
    struct rpc *rpc = core->rpc;
    for (uint32_t i = 0; i < LITE_PORTS; i++)
        if (rpc->port[i].client == client)
            close_port(core, &rpc->port[i]);
    for (uint32_t i = 0; i < rpc->calls; i++)
        if (rpc->call[i].client == client)
            refuse_call(core, &rpc->call[i], LITE_PORT_CLOSED);
}

void ports_peer_gone(struct core *core, struct peer *peer)
{
    for (uint32_t i = 0; i < LITE_PORTS; i++) {
        if (peer->in[i])
            detach(core, peer->in[i]);
        struct link *messages = &core->rpc->port[i].messages;
        for (struct link *link = messages->next, *next; link != messages; link = next) {
            struct message *message = OF(link, struct message, link);
            next = link->next;
            if (message->ring->peer == peer)
                message_done(core, message);
        }
    }
}

API int lite_port_open(struct core *core, uint64_t client_id, uint32_t number, uint64_t max_message)
{
    if (number >= LITE_PORTS || !max_message || max_message > LITE_MAX_MESSAGE)
        return LITE_BAD_ARGUMENT;
    core_enter(core);
    struct client *client = client_of(core, client_id);
    struct port *port = &core->rpc->port[number];
    int code = !client ? LITE_BAD_HANDLE : port->client ? LITE_PORT_TAKEN : 0;
    if (!code) {
        port->client = client;
        port->max_message = max_message;
        core->stats.ports++;
    }
    core_leave(core);
    return code;
}

API int lite_port_close(struct core *core, uint64_t client_id, uint32_t number)
{
    core_enter(core);
    struct client *client = client_of(core, client_id);
    bool own = client && number < LITE_PORTS && core->rpc->port[number].client == client;
    if (own) {
        pieces_reap(core); /* who waits shall have what is here already */
        close_port(core, &core->rpc->port[number]);
    }
    core_wake(core);
    core_leave(core);
    return own ? 0 : LITE_PORT_CLOSED;
}

/* `lost`: whose messages were lost in the rings before. */
static int make_ring(struct core *core, struct peer *peer, uint32_t number, uint64_t lost)
{
    uint64_t max_message = core->rpc->port[number].max_message;
    uint64_t size = 4 * ((max_message + 2 * RING_UNIT + 4095) & ~(uint64_t)4095); /* a message may waste its own size */
    struct ring_in *ring = calloc(1, sizeof *ring);
    if (!ring)
        return LITE_NO_MEMORY;
    *ring = (struct ring_in){.peer = peer, .port = number, .max_message = max_message, .lost_before = lost,
                             .generation = ++core->rpc->generations};
    size = size < SMALLEST_RING ? SMALLEST_RING : size;
    ring->spans = (uint32_t)(size / RING_UNIT);
    ring->span = calloc(ring->spans, sizeof *ring->span);
    if (!ring->span || region_open(core, &ring->region, size, IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE, -1)) {
        free(ring->span);
        free(ring);
        return LITE_NO_MEMORY;
    }
    core->stats.rings_in++;
    core->stats.bytes_rings += ring->region.size;
    peer->in[number] = ring;
    return 0;
}

API int lite_ring_offer(struct core *core, uint32_t node, uint32_t incarnation, uint32_t number, struct lite_ring *out)
{
    core_enter(core);
    struct peer *peer;
    int code = number < LITE_PORTS ? peer_usable(core, node, &peer) : LITE_BAD_ARGUMENT;
    if (!code && peer->incarnation != incarnation)
        code = LITE_NODE_DEAD;
    if (!code && !core->rpc->port[number].client)
        code = LITE_PORT_CLOSED;
    uint64_t lost = 0;
    if (!code && peer->in[number] && peer->in[number]->retired) {
        pieces_reap(core); /* the client has sent all it will: it may be here, unseen */
        code = peer_usable(core, node, &peer);
    }
    if (!code && peer->in[number] && peer->in[number]->retired) {
        const struct ring_in *old = peer->in[number];
        bool unused = !old->first && !old->held; /* the client may never have heard of it */
        lost = old->lost | (unused ? old->lost_before : 0);
        detach(core, peer->in[number]);
    }
    if (!code && !peer->in[number])
        code = make_ring(core, peer, number, lost);
    if (!code) {
        const struct ring_in *ring = peer->in[number];
        *out = (struct lite_ring){(uintptr_t)ring->region.bytes, ring->region.size, ring->max_message,
                                  ring->lost_before, ring->region.mr->rkey, ring->generation};
    }
    core_leave(core);
    return code;
}
