/* Peers: K queue pairs to each, and what happens when they fail. */
#include "core.h"

#include <stdlib.h>
#include <string.h>
#include <sys/random.h>

enum {
    ACK_TIMEOUT = 18, /* 4.096 us << 18 = 1.07 s: an emulated blade may well be silent for a second */
    RETRIES = 6,      /* so a peer that is gone is noticed after about 7 s, if nobody says so before */
    RNR_TIMER = 24,   /* 41 ms, tried RETRIES times: how long a peer may leave its receives used up */
};

int peer_usable(struct core *core, uint32_t node, struct peer **out)
{
    struct peer *peer = node < NODES ? core->by_node[node] : NULL;
    *out = peer;
    if (!peer)
        return node ? LITE_NO_SUCH_NODE : LITE_NODE_DEAD; /* the tier gives lost blocks node 0 */
    return peer->state == PEER_CONNECTED ? 0 : peer->state == PEER_DEAD ? LITE_NODE_DEAD : LITE_NODE_UNREACHABLE;
}

struct peer *peer_of(struct core *core, uint32_t qpn)
{
    struct peer *guess = core->by_qpn[qpn % 256];
    for (uint32_t node = 0; node <= NODES; guess = node < NODES ? core->by_node[node] : NULL, node++)
        for (uint32_t i = 0; guess && i < guess->pairs; i++)
            if (guess->pair[i].qp->qp_num == qpn)
                return core->by_qpn[qpn % 256] = guess;
    return NULL;
}

static struct peer *new_peer(struct core *core, uint32_t node)
{
    struct peer *peer = calloc(1, sizeof *peer);
    if (!peer)
        return NULL;
    peer->node = node;
    for (int i = 0; i < LITE_PRIORITIES; i++)
        list_init(&peer->wait[i]);
    list_init(&peer->pieces);
    peer->heads = (uint64_t *)(void *)core->heads_region.bytes + (size_t)node * LITE_PORTS;
    return core->by_node[node] = peer;
}

void peer_break(struct core *core, struct peer *peer, int code)
{
    bool was = peer->state == PEER_CONNECTED;
    peer->state = code == LITE_NODE_DEAD ? PEER_DEAD : PEER_BROKEN;
    peer->session++;
    for (uint32_t i = 0; i < peer->pairs; i++) {
        peer->pair[i].first = NULL;
        /* From here on nothing of the peer can reach our memory, and nothing of ours its. */
        ibv_destroy_qp(peer->pair[i].qp);
    }
    device_receives(core, peer->pairs); /* each may have taken one that it never completed */
    peer->pairs = 0;
    for (struct piece *piece; (piece = FIRST(&peer->pieces, struct piece, link));)
        transfer_piece_done(core, piece, code);
    transfer_pump(core, peer); /* what waits finds that it is gone */
    calls_peer_gone(core, peer, code);
    ports_peer_gone(core, peer);
    if (was && code != LITE_NODE_DEAD) {
        core->stats.peers_broken++;
        core_event(core, EVENT_PEER_BROKEN, peer->node, peer->incarnation, 0, 0);
    }
    pthread_cond_broadcast(&core->changed);
}

static int make_pair(struct core *core, struct pair *pair)
{
    struct ibv_qp_init_attr init = {
        .send_cq = core->cq,
        .recv_cq = core->cq,
        .srq = core->srq,
        .qp_type = IBV_QPT_RC,
        .cap = {.max_send_wr = QP_DEPTH, .max_send_sge = 2, .max_inline_data = INLINE_SEND},
    };
    *pair = (struct pair){.qp = ibv_create_qp(core->pd, &init)};
    if (!pair->qp)
        return LITE_NO_MEMORY;
    struct ibv_qp_attr attr = {
        .qp_state = IBV_QPS_INIT,
        .port_num = 1,
        .qp_access_flags = IBV_ACCESS_REMOTE_READ | IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_ATOMIC,
    };
    int mask = IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS;
    if (getrandom(&pair->psn, sizeof pair->psn, 0) != sizeof pair->psn || ibv_modify_qp(pair->qp, &attr, mask)) {
        ibv_destroy_qp(pair->qp);
        return LITE_NO_MEMORY;
    }
    pair->psn &= 0xffffff;
    return 0;
}

static int connect_pair(struct core *core, struct pair *pair, const union ibv_gid *gid, uint32_t qpn, uint32_t psn)
{
    struct ibv_qp_attr receive = {
        .qp_state = IBV_QPS_RTR,
        .path_mtu = core->mtu,
        .dest_qp_num = qpn,
        .rq_psn = psn,
        .max_dest_rd_atomic = (uint8_t)core->reads_in_flight,
        .min_rnr_timer = RNR_TIMER,
        .ah_attr = {.is_global = 1,
                    .port_num = 1,
                    .grh = {.dgid = *gid, .sgid_index = (uint8_t)core->gid_index, .hop_limit = 64}},
    };
    struct ibv_qp_attr send = {
        .qp_state = IBV_QPS_RTS,
        .timeout = ACK_TIMEOUT,
        .retry_cnt = RETRIES,
        .rnr_retry = RETRIES,
        .sq_psn = pair->psn,
        .max_rd_atomic = (uint8_t)core->reads_in_flight,
    };
    return ibv_modify_qp(pair->qp, &receive,
                         IBV_QP_STATE | IBV_QP_AV | IBV_QP_PATH_MTU | IBV_QP_DEST_QPN | IBV_QP_RQ_PSN |
                             IBV_QP_MAX_DEST_RD_ATOMIC | IBV_QP_MIN_RNR_TIMER) ||
           ibv_modify_qp(pair->qp, &send,
                         IBV_QP_STATE | IBV_QP_TIMEOUT | IBV_QP_RETRY_CNT | IBV_QP_RNR_RETRY | IBV_QP_SQ_PSN |
                             IBV_QP_MAX_QP_RD_ATOMIC);
}

static int prepare(struct core *core, uint32_t node, uint32_t incarnation, struct lite_address *out)
{
    if (!node || node >= NODES)
        return LITE_NO_SUCH_NODE;
    struct peer *peer = core->by_node[node];
    uint32_t known = 0;
    for (uint32_t i = 0; i < NODES; i++)
        known += core->by_node[i] != NULL;
    if (!peer && (known >= MAX_PEERS || !(peer = new_peer(core, node))))
        return LITE_NO_MEMORY;
    if (incarnation < peer->incarnation || (peer->state == PEER_DEAD && incarnation == peer->incarnation))
        return LITE_NODE_DEAD;
    if (peer->pairs)
        peer_break(core, peer, incarnation == peer->incarnation ? LITE_NODE_UNREACHABLE : LITE_NODE_DEAD);
    peer->incarnation = incarnation;
    peer->state = PEER_PREPARED;
    for (; peer->pairs < core->config.queue_pairs; peer->pairs++) {
        int code = make_pair(core, &peer->pair[peer->pairs]);
        if (code) {
            peer_break(core, peer, LITE_NODE_UNREACHABLE);
            return code;
        }
    }
    memset(peer->heads, 0, LITE_PORTS * sizeof *peer->heads);
    *out = (struct lite_address){
        .count = peer->pairs, .heads = (uintptr_t)peer->heads, .heads_rkey = core->heads_region.mr->rkey};
    memcpy(out->gid, core->gid.raw, sizeof out->gid);
    for (uint32_t i = 0; i < peer->pairs; i++) {
        out->qpn[i] = peer->pair[i].qp->qp_num;
        out->psn[i] = peer->pair[i].psn;
    }
    return 0;
}

static int connect_peer(struct core *core, uint32_t node, uint32_t incarnation, const struct lite_address *remote)
{
    struct peer *peer = node < NODES ? core->by_node[node] : NULL;
    if (!peer || peer->state != PEER_PREPARED || peer->incarnation != incarnation)
        return LITE_NODE_UNREACHABLE;
    if (remote->count != peer->pairs)
        return LITE_BAD_ARGUMENT;
    union ibv_gid gid;
    memcpy(gid.raw, remote->gid, sizeof gid.raw);
    peer->remote_heads = remote->heads;
    peer->remote_heads_rkey = remote->heads_rkey;
    for (uint32_t i = 0; i < peer->pairs; i++) {
        if (connect_pair(core, &peer->pair[i], &gid, remote->qpn[i], remote->psn[i])) {
            peer_break(core, peer, LITE_NODE_UNREACHABLE);
            return LITE_NODE_UNREACHABLE;
        }
    }
    peer->state = PEER_CONNECTED;
    return 0;
}

API int lite_peer_prepare(struct core *core, uint32_t node, uint32_t incarnation, struct lite_address *out)
{
    core_enter(core);
    int code = prepare(core, node, incarnation, out);
    core_leave(core);
    return code;
}

API int lite_peer_connect(struct core *core, uint32_t node, uint32_t incarnation, const struct lite_address *remote)
{
    core_enter(core);
    int code = connect_peer(core, node, incarnation, remote);
    core_leave(core);
    return code;
}

API int lite_peer_dead(struct core *core, uint32_t node, uint32_t incarnation)
{
    core_enter(core);
    struct peer *peer = node < NODES ? core->by_node[node] : NULL;
    int code = !node || node >= NODES ? LITE_NO_SUCH_NODE : 0;
    if (!code && !peer && !(peer = new_peer(core, node)))
        code = LITE_NO_MEMORY;
    if (!code && incarnation >= peer->incarnation) {
        peer->incarnation = incarnation;
        peer_break(core, peer, LITE_NODE_DEAD);
        core_wake(core);
    }
    core_leave(core);
    return code;
}

API int lite_join(struct core *core, uint32_t node, uint32_t incarnation)
{
    core_enter(core);
    int code = node && node < NODES ? 0 : LITE_NO_SUCH_NODE;
    if (!code && (node != core->node || incarnation != core->incarnation)) {
        for (uint32_t i = 0; i < NODES; i++)
            if (core->by_node[i] && core->by_node[i]->pairs)
                peer_break(core, core->by_node[i], LITE_NODE_UNREACHABLE);
        core->node = node;
        core->incarnation = incarnation;
        struct lite_address own;
        code = prepare(core, node, incarnation, &own);
        if (!code)
            code = connect_peer(core, node, incarnation, &own); /* each loopback queue pair is its own peer */
    }
    core_leave(core);
    return code;
}

void peers_break(struct core *core)
{
    for (uint32_t node = 0; node < NODES; node++)
        if (core->by_node[node])
            peer_break(core, core->by_node[node], LITE_NODE_DEAD);
}

void peers_close(struct core *core)
{
    for (uint32_t node = 0; node < NODES; node++) {
        free(core->by_node[node]);
        core->by_node[node] = NULL;
    }
}
