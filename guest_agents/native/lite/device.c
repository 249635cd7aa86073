/* The RDMA device: one completion queue and one shared receive queue for all peers.
 *
 * Receives carry no buffer: messages are written into rings, a receive only takes the immediate. Soft-RoCE facts
 * behind the numbers: the GID must be the IPv4 one, every post is a system call, rnr_retry 7 would mean for ever.
 */
#include "core.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>

enum { CQ_DEPTH = PIECES + SRQ_DEPTH + 1024 /* what a destroyed queue pair leaves behind */, MOST_READS = 64 };

static int find_gid(struct core *core)
{
    struct ibv_port_attr port;
    if (ibv_query_port(core->context, 1, &port))
        return LITE_NOT_JOINED;
    core->mtu = port.active_mtu;
    for (int i = 0; i < port.gid_tbl_len; i++) {
        static const uint8_t mapped[12] = {[10] = 0xff, [11] = 0xff};
        if (ibv_query_gid(core->context, 1, i, &core->gid) == 0 && !memcmp(core->gid.raw, mapped, sizeof mapped)) {
            core->gid_index = i;
            return 0;
        }
    }
    errno = EADDRNOTAVAIL;
    return LITE_NOT_JOINED;
}

static int open_named(struct core *core)
{
    int count = 0;
    struct ibv_device **list = ibv_get_device_list(&count);
    errno = ENODEV;
    for (int i = 0; i < count; i++)
        if (!strcmp(ibv_get_device_name(list[i]), core->config.device))
            core->context = ibv_open_device(list[i]);
    if (list)
        ibv_free_device_list(list);
    return core->context ? 0 : LITE_NOT_JOINED;
}

static int make_pieces(struct core *core)
{
    if (region_open(core, &core->piece_region, PIECES * sizeof(struct piece), IBV_ACCESS_LOCAL_WRITE, -1) ||
        region_open(core, &core->heads_region, NODES * LITE_PORTS * sizeof(uint64_t),
                    IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE, -1))
        return LITE_NO_MEMORY;
    core->piece = (struct piece *)(void *)core->piece_region.bytes;
    for (uint32_t i = 0; i < PIECES; i++) {
        list_init(&core->piece[i].link);
        list_append(&core->free_pieces, &core->piece[i].link);
    }
    return 0;
}

int device_open(struct core *core)
{
    int code = open_named(core);
    if (!code)
        code = find_gid(core);
    if (code)
        return code;
    struct ibv_device_attr limits;
    if (ibv_query_device(core->context, &limits))
        return LITE_NOT_JOINED;
    core->reads_in_flight = limits.max_qp_rd_atom < MOST_READS ? limits.max_qp_rd_atom : MOST_READS;
    core->pd = ibv_alloc_pd(core->context);
    core->completions = ibv_create_comp_channel(core->context);
    if (!core->pd || !core->completions)
        return LITE_NO_MEMORY;
    fcntl(core->completions->fd, F_SETFL, fcntl(core->completions->fd, F_GETFL) | O_NONBLOCK);
    core->cq = ibv_create_cq(core->context, CQ_DEPTH, NULL, core->completions, 0);
    struct ibv_srq_init_attr srq = {.attr = {.max_wr = SRQ_DEPTH, .max_sge = 1}};
    core->srq = ibv_create_srq(core->pd, &srq);
    if (!core->cq || !core->srq || make_pieces(core))
        return LITE_NO_MEMORY;
    pool_grow(core, &core->packets); /* with none at all nothing would ever go on */
    pool_grow(core, &core->chunks);
    if (!core->packets.allocated || !core->chunks.allocated)
        return LITE_NO_MEMORY;
    device_receives(core, SRQ_DEPTH);
    return 0;
}

void device_receives(struct core *core, uint32_t count)
{
    static struct ibv_recv_wr chain[SRQ_QUARTER]; /* all alike, never changed once linked */
    for (uint32_t i = 0; i < SRQ_QUARTER; i++)
        chain[i] = (struct ibv_recv_wr){.next = i + 1 < SRQ_QUARTER ? &chain[i + 1] : NULL};
    while (count) {
        uint32_t n = count < SRQ_QUARTER ? count : SRQ_QUARTER;
        struct ibv_recv_wr *bad;
        /* It is full if a queue pair died without having used what was allowed for: no harm. */
        if (ibv_post_srq_recv(core->srq, &chain[SRQ_QUARTER - n], &bad))
            return;
        count -= n;
    }
}

void device_close(struct core *core)
{
    pool_close(&core->packets);
    pool_close(&core->chunks);
    region_close(&core->piece_region);
    region_close(&core->heads_region);
    for (uint32_t i = 0; i < core->slabs; i++) {
        region_close(&core->slab[i]->region);
        free(core->slab[i]);
    }
    free(core->slab);
    if (core->srq)
        ibv_destroy_srq(core->srq);
    if (core->cq)
        ibv_destroy_cq(core->cq);
    if (core->completions)
        ibv_destroy_comp_channel(core->completions);
    if (core->pd)
        ibv_dealloc_pd(core->pd);
    if (core->context)
        ibv_close_device(core->context);
}
