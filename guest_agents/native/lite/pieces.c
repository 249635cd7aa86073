/* Pieces: one work request each, from the free list to its completion. */
#include "core.h"

#include <arpa/inet.h>

enum { ENTRIES = 32 };

struct piece *piece_take(struct core *core, struct peer *peer, uint32_t pair, struct op *op)
{
    struct piece *piece = FIRST(&core->free_pieces, struct piece, link);
    if (!piece)
        return NULL;
    list_append(&peer->pieces, &piece->link);
    piece->generation++;
    piece->op = op;
    piece->peer = peer;
    piece->chunk = NULL;
    piece->pair = (uint16_t)pair;
    piece->busy = true;
    piece->priority = op ? op->request.priority : LITE_HIGH;
    piece->wr = (struct ibv_send_wr){
        .wr_id = (uint64_t)piece->generation << 32 | (uint64_t)(piece - core->piece),
        .sg_list = piece->sge,
        .send_flags = IBV_SEND_SIGNALED,
    };
    if (op)
        op->in_flight++;
    peer->in_flight++;
    peer->pair[pair].in_flight++;
    core->stats.pieces++;
    return piece;
}

void piece_free(struct core *core, struct piece *piece)
{
    list_append(&core->free_pieces, &piece->link);
    if (piece->chunk)
        pool_give(&core->chunks, piece->chunk);
    piece->busy = false;
    piece->peer->in_flight--;
    piece->peer->pair[piece->pair].in_flight--;
    core->stats.pieces--;
}

void piece_post(struct core *core, struct piece *piece)
{
    struct pair *pair = &piece->peer->pair[piece->pair];
    if (!pair->first) {
        pair->last = &pair->first;
        core->flush[core->to_flush++] = pair;
    }
    *pair->last = &piece->wr;
    pair->last = &piece->wr.next;
    qos_posted(core, piece);
}

void pieces_flush(struct core *core)
{
    while (core->to_flush) {
        struct pair *pair = core->flush[--core->to_flush];
        struct ibv_send_wr *first = pair->first, *bad;
        if (!first)
            continue;
        pair->first = NULL;
        core->stats.posts++;
        struct peer *peer = core->piece[(uint32_t)first->wr_id].peer;
        if (ibv_post_send(pair->qp, first, &bad))
            peer_break(core, peer, LITE_NODE_UNREACHABLE);
    }
}

static void received(struct core *core, const struct ibv_wc *wc)
{
    if (++core->srq_used >= SRQ_QUARTER) {
        device_receives(core, core->srq_used);
        core->srq_used = 0;
    }
    struct peer *peer = peer_of(core, wc->qp_num);
    if (!peer)
        return; /* its queue pair is gone meanwhile */
    uint32_t imm = ntohl(wc->imm_data);
    if (wc->status != IBV_WC_SUCCESS)
        peer_break(core, peer, LITE_NODE_UNREACHABLE);
    else if (imm >> OPCODE_SHIFT == IMM_REQUEST)
        rpc_arrived(core, peer, imm >> PORT_SHIFT & (LITE_PORTS - 1), imm & ((1u << PORT_SHIFT) - 1));
    else if (imm >> OPCODE_SHIFT)
        rpc_replied(core, peer, imm, wc->byte_len);
    else
        rpc_malformed(core, peer);
}

static int code_of(enum ibv_wc_status status)
{
    switch (status) {
    case IBV_WC_SUCCESS:
        return 0;
    case IBV_WC_REM_ACCESS_ERR: /* the memory has been given back there */
        return LITE_FREED;
    default:
        return LITE_NODE_UNREACHABLE;
    }
}

static void completed(struct core *core, const struct ibv_wc *wc)
{
    uint32_t index = (uint32_t)wc->wr_id;
    struct piece *piece = index < PIECES ? &core->piece[index] : NULL;
    if (!piece || !piece->busy || piece->generation != wc->wr_id >> 32)
        return; /* of a queue pair that is gone: it was ended then */
    struct peer *peer = piece->peer;
    if (wc->status == IBV_WC_SUCCESS)
        transfer_piece_done(core, piece, 0);
    else {
        transfer_piece_done(core, piece, code_of(wc->status));
        peer_break(core, peer, LITE_NODE_UNREACHABLE);
    }
}

bool pieces_reap(struct core *core)
{
    struct ibv_wc wc[ENTRIES];
    bool any = false;
    for (int n = ENTRIES; n == ENTRIES;) {
        n = ibv_poll_cq(core->cq, ENTRIES, wc);
        for (int i = 0; i < n; i++) {
            if (wc[i].wr_id)
                completed(core, &wc[i]);
            else
                received(core, &wc[i]);
        }
        any |= n > 0;
    }
    if (any)
        transfer_starved(core);
    return any;
}
