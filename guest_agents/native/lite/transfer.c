/* Moves an op's data: cuts them at blocks and chunks, picks a queue pair, copies through bounce chunks if it must.
 *
 * A message (head_bytes > 0) goes to one place in another node's memory: first everything but its beginning, then head
 * and beginning in one work request with the immediate; all on one queue pair, so that what arrives last announces all.
 */
#include "core.h"

#include <arpa/inet.h>
#include <string.h>

enum { LOCAL_BUDGET = 256 << 10 /* bytes one op may copy before others get their turn */ };

struct target {
    struct peer *peer;
    uint64_t remote, length;
    uint32_t rkey;
    uint8_t *local; /* the memory is ours: no fabric needed */
};

static bool incoming(const struct op *op)
{
    return op->request.op == LITE_READ || op->request.op == LITE_READV;
}

static bool atomic(const struct op *op)
{
    return op->request.op == LITE_FETCH_ADD || op->request.op == LITE_CAS;
}

static uint64_t least(uint64_t a, uint64_t b)
{
    return a < b ? a : b;
}

static int at_node(struct core *core, const struct op *op, uint32_t node, struct target *t)
{
    int code = peer_usable(core, node, &t->peer);
    if (node != core->node || atomic(op) || !t->peer || !slab_find(core, t->remote, t->length))
        return code;
    t->local = (uint8_t *)(uintptr_t)t->remote;
    return 0;
}

/* Where the next byte of the op lies. */
static int locate(struct core *core, const struct op *op, struct target *t)
{
    *t = (struct target){.length = op->total - op->posted};
    if (op->head_bytes) {
        t->peer = op->peer;
        t->rkey = op->rkey;
        return op->peer->state == PEER_CONNECTED ? 0
               : op->peer->state == PEER_DEAD    ? LITE_NODE_DEAD
                                                 : LITE_NODE_UNREACHABLE;
    }
    if (!op->lmr) { /* raw */
        t->remote = op->remote + op->posted;
        t->rkey = op->rkey;
        return at_node(core, op, (uint32_t)op->request.handle, t);
    }
    uint64_t offset = op->request.offset + op->posted;
    if (op->segment) {
        offset = op->segment->offset + op->in_segment;
        t->length = op->segment->length - op->in_segment;
    }
    const struct block *block = lmr_block(op->lmr, offset);
    uint64_t within = offset - block->start;
    t->remote = block->address + within;
    t->length = least(t->length, block->length - within);
    t->rkey = block->rkey;
    int code = at_node(core, op, block->node, t);
    if (!code && block->incarnation && block->incarnation != t->peer->incarnation)
        return LITE_NODE_DEAD; /* the life it was part of is over */
    return code;
}

static void advance(struct op *op, uint64_t length)
{
    op->posted += length;
    if (!op->segment)
        return;
    op->in_segment += length;
    while (op->posted < op->total && op->in_segment == op->segment->length) {
        op->segment++;
        op->in_segment = 0;
    }
}

static bool more(const struct op *op)
{
    if (op->head_bytes)
        return !op->final;
    return !op->status && op->posted < op->total;
}

static void local_copy(struct core *core, struct op *op, const struct target *t, uint64_t length)
{
    bool fine = incoming(op) ? copy_to(op, op->posted, t->local, length) : copy_from(op, op->posted, t->local, length);
    if (!fine)
        op->status = LITE_BAD_ARGUMENT;
    core->stats.bytes_local += length;
    advance(op, length);
}

/* Point the piece's last entry at the op's data [at, at + length), through a chunk unless they are registered. */
static bool attach(struct op *op, struct piece *piece, uint64_t at, uint32_t length)
{
    struct ibv_sge *sge = &piece->sge[piece->wr.num_sge];
    piece->at = at;
    piece->length = length;
    if (!length)
        return true;
    sge->length = length;
    piece->wr.num_sge++;
    if (piece->chunk) {
        sge->addr = (uintptr_t)piece->chunk->bytes;
        sge->lkey = piece->chunk->lkey;
        return incoming(op) || copy_from(op, at, piece->chunk->bytes, length);
    }
    if (op->request.flags & (incoming(op) ? LITE_INLINE_REPLY : LITE_INLINE_DATA)) {
        sge->addr = (uintptr_t)op->data + at;
        sge->lkey = op->packet->lkey;
    } else {
        sge->addr = (uintptr_t)op->buffer->region.bytes + op_address(op, incoming(op)) + at;
        sge->lkey = op->buffer->region.mr->lkey;
    }
    return true;
}

static bool wants_chunk(const struct op *op)
{
    return !atomic(op) && !op->buffer && op->posted < op->total &&
           !(op->request.flags & (incoming(op) ? LITE_INLINE_REPLY : LITE_INLINE_DATA));
}

static void post_atomic(struct core *core, struct op *op, struct piece *piece, const struct target *t)
{
    bool add = op->request.op == LITE_FETCH_ADD;
    piece->wr.opcode = add ? IBV_WR_ATOMIC_FETCH_AND_ADD : IBV_WR_ATOMIC_CMP_AND_SWP;
    piece->sge[0] = (struct ibv_sge){(uintptr_t)piece->head, 8, core->piece_region.mr->lkey};
    piece->wr.num_sge = 1;
    piece->wr.wr.atomic.remote_addr = t->remote;
    piece->wr.wr.atomic.rkey = t->rkey;
    piece->wr.wr.atomic.compare_add = op->request.arg0;
    piece->wr.wr.atomic.swap = op->request.arg1;
    piece->length = 8;
    advance(op, 8);
    piece_post(core, piece);
}

static void post_message(struct core *core, struct op *op, struct piece *piece)
{
    uint64_t first = least(op->total, CHUNK), rest = op->total - first;
    bool last = op->posted == rest;
    uint64_t at = last ? 0 : first + op->posted, length = last ? first : least(rest - op->posted, CHUNK);
    piece->wr.opcode = last ? IBV_WR_RDMA_WRITE_WITH_IMM : IBV_WR_RDMA_WRITE;
    piece->wr.wr.rdma.remote_addr = op->remote + (last && !op->bare ? 0 : op->head_bytes + at);
    piece->wr.wr.rdma.rkey = op->rkey;
    const struct ibv_sge head = {(uintptr_t)piece->head, op->head_bytes, core->piece_region.mr->lkey};
    piece->wr.num_sge = last && !op->bare;
    piece->sge[0] = head;
    if (!attach(op, piece, at, (uint32_t)length)) {
        /* The program's memory cannot be read. Its place is taken, so something must come: a message without data. */
        op->status = LITE_BAD_ARGUMENT;
        rpc_void(op);
        last = true;
        piece->wr.opcode = IBV_WR_RDMA_WRITE_WITH_IMM;
        piece->wr.wr.rdma.remote_addr = op->remote;
        piece->wr.num_sge = 1;
        piece->sge[0] = head;
        piece->length = 0;
    }
    piece->wr.imm_data = htonl(op->imm);
    memcpy(piece->head, op->head, op->head_bytes);
    if (last && op->head_bytes + piece->length <= INLINE_SEND)
        piece->wr.send_flags |= IBV_SEND_INLINE;
    op->posted += last ? 0 : length;
    op->final = last;
    piece_post(core, piece);
}

static void post_data(struct core *core, struct op *op, struct piece *piece, const struct target *t)
{
    uint32_t length = (uint32_t)least(t->length, qos_chunk(core, op));
    piece->wr.opcode = incoming(op) ? IBV_WR_RDMA_READ : IBV_WR_RDMA_WRITE;
    piece->wr.wr.rdma.remote_addr = t->remote;
    piece->wr.wr.rdma.rkey = t->rkey;
    if (!attach(op, piece, op->posted, length)) {
        op->status = LITE_BAD_ARGUMENT;
        op->in_flight--;
        piece_free(core, piece);
        return;
    }
    if (!incoming(op) && length <= INLINE_SEND)
        piece->wr.send_flags |= IBV_SEND_INLINE;
    advance(op, length);
    piece_post(core, piece);
}

/* Post the next piece. False: there is no room, and the op waits for it. */
static bool post(struct core *core, struct op *op, const struct target *t)
{
    int pair = qos_may_post(core, op) ? qos_pair(core, t->peer, op) : -1;
    if (pair < 0) {
        list_append(&t->peer->wait[op->request.priority], &op->wait);
        return false;
    }
    struct store *chunk = wants_chunk(op) ? pool_take(core, &core->chunks) : NULL;
    struct piece *piece = wants_chunk(op) && !chunk ? NULL : piece_take(core, t->peer, (uint32_t)pair, op);
    if (!piece) {
        if (chunk)
            pool_give(&core->chunks, chunk);
        list_append(&core->starved, &op->wait);
        return false;
    }
    piece->chunk = chunk;
    op->pair = pair;
    if (op->head_bytes)
        post_message(core, op, piece);
    else if (atomic(op))
        post_atomic(core, op, piece, t);
    else
        post_data(core, op, piece, t);
    return true;
}

bool transfer(struct core *core, struct op *op)
{
    uint64_t budget = LOCAL_BUDGET;
    list_remove(&op->wait);
    advance(op, 0); /* past segments of no length */
    while (more(op)) {
        struct target t;
        if (op->in_flight >= OP_WINDOW)
            return true; /* goes on when one of them has ended */
        int code = locate(core, op, &t);
        if (code) {
            op->status = op->status ? op->status : code;
            op->final = true;
        } else if (t.local && budget) {
            uint64_t length = least(t.length, budget);
            budget -= length;
            local_copy(core, op, &t, length);
        } else if (t.local) {
            list_append(&t.peer->wait[op->request.priority], &op->wait);
            core->again = true;
            return false;
        } else if (!post(core, op, &t)) {
            return false;
        }
    }
    if (op->in_flight)
        return true;
    if (op->head_bytes)
        rpc_sent(core, op);
    else
        op_answer(core, op, op->status);
    return true;
}

void transfer_piece_done(struct core *core, struct piece *piece, int status)
{
    struct op *op = piece->op;
    qos_done(core, piece);
    if (!op) {
        piece_free(core, piece);
        return;
    }
    op->in_flight--;
    if (status) {
        op->status = op->status ? op->status : status;
    } else if (atomic(op)) {
        memcpy(&op->reply.value, piece->head, sizeof op->reply.value);
    } else if (incoming(op)) {
        core->stats.bytes_read += piece->length;
        piece->peer->bytes_in += piece->length;
        if (piece->chunk && !copy_to(op, piece->at, piece->chunk->bytes, piece->length))
            op->status = op->status ? op->status : LITE_BAD_ARGUMENT;
    } else {
        core->stats.bytes_written += piece->length;
        piece->peer->bytes_out += piece->length;
    }
    struct peer *peer = piece->peer;
    piece_free(core, piece);
    if (op->ended) {
        if (op->head_bytes && !op->in_flight)
            rpc_landed(core, op); /* a reply may come before the acknowledgement of its call */
        op_settle(core, op);
    } else if (list_empty(&op->wait) || (op->status && !op->in_flight))
        transfer(core, op);
    transfer_pump(core, peer);
}

void transfer_pump(struct core *core, struct peer *peer)
{
    static const enum lite_priority order[] = {LITE_HIGH, LITE_NORMAL, LITE_LOW};
    for (int i = 0; i < LITE_PRIORITIES; i++)
        for (struct op *op; (op = FIRST(&peer->wait[order[i]], struct op, wait));)
            if (!transfer(core, op))
                break;
}

void transfer_starved(struct core *core)
{
    for (struct op *op; (op = FIRST(&core->starved, struct op, wait));)
        if (!transfer(core, op))
            break;
}
