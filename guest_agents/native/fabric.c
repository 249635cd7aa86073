#include "fabric.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <string.h>
#include <sys/random.h>
#include <unistd.h>

int fabric_spin = 30; /* about as long as the fastest round trip between two emulated blades */

enum {
    READS_IN_FLIGHT = 16,   /* RDMA READs one queue pair may have outstanding (rxe allows 128) */
    ACK_TIMEOUT = 18,       /* 4.096 us << 18 = 1.07 s: an emulated blade may well be silent for a second */
    RETRIES = 6,            /* so a dead blade is noticed after about 7 s */
    RNR_TIMER = 1,          /* 10 us */
    COMPLETIONS = 8 * FABRIC_DEPTH, /* all there can be when queue pairs fail: then every request has one */
    POLL_EVERY_MS = 1000,   /* safety net while sleeping: a lost event must not become a hang */
};

static int find_gid(struct fabric *f)
{
    struct ibv_port_attr port;
    if (ibv_query_port(f->context, 1, &port))
        return -errno;
    f->mtu = port.active_mtu;
    for (int i = 0; i < port.gid_tbl_len; i++) {
        static const uint8_t mapped[12] = {[10] = 0xff, [11] = 0xff};
        if (ibv_query_gid(f->context, 1, i, &f->gid) == 0 && !memcmp(f->gid.raw, mapped, sizeof mapped)) {
            f->gid_index = i;
            return 0;
        }
    }
    return -EADDRNOTAVAIL;
}

int fabric_open(struct fabric *f, void *base, size_t bytes)
{
    struct ibv_device **list = ibv_get_device_list(NULL);
    if (!list || !list[0])
        return -ENODEV;
    f->context = ibv_open_device(list[0]);
    ibv_free_device_list(list);
    if (!f->context)
        return -ENODEV;
    int error = find_gid(f);
    if (error)
        return error;
    f->pd = ibv_alloc_pd(f->context);
    f->channel = ibv_create_comp_channel(f->context);
    if (!f->pd || !f->channel)
        return -errno;
    fcntl(f->channel->fd, F_SETFL, fcntl(f->channel->fd, F_GETFL) | O_NONBLOCK);
    f->cq = ibv_create_cq(f->context, COMPLETIONS, NULL, f->channel, 0);
    f->mr = ibv_reg_mr(f->pd, base, bytes, IBV_ACCESS_LOCAL_WRITE);
    return f->cq && f->mr ? 0 : -errno;
}

int fabric_link_create(struct fabric *f, struct fabric_link *link)
{
    struct ibv_qp_init_attr init = {
        .send_cq = f->cq,
        .recv_cq = f->cq,
        .qp_type = IBV_QPT_RC,
        .cap = {.max_send_wr = FABRIC_DEPTH, .max_recv_wr = 1, .max_send_sge = 16, .max_recv_sge = 1},
    };
    link->qp = ibv_create_qp(f->pd, &init);
    if (!link->qp)
        return -errno;
    if (getrandom(&link->psn, sizeof link->psn, 0) != sizeof link->psn)
        return -errno;
    link->psn &= 0xffffff;
    struct ibv_qp_attr attr = {.qp_state = IBV_QPS_INIT, .port_num = 1};
    return -ibv_modify_qp(link->qp, &attr, IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS);
}

int fabric_link_connect(struct fabric *f, struct fabric_link *link, uint32_t qpn, uint32_t psn,
                        const union ibv_gid *gid)
{
    struct ibv_qp_attr receive = {
        .qp_state = IBV_QPS_RTR,
        .path_mtu = f->mtu,
        .dest_qp_num = qpn,
        .rq_psn = psn,
        .max_dest_rd_atomic = READS_IN_FLIGHT,
        .min_rnr_timer = RNR_TIMER,
        .ah_attr = {.is_global = 1,
                    .port_num = 1,
                    .grh = {.dgid = *gid, .sgid_index = (uint8_t)f->gid_index, .hop_limit = 64}},
    };
    int error = ibv_modify_qp(link->qp, &receive,
                              IBV_QP_STATE | IBV_QP_AV | IBV_QP_PATH_MTU | IBV_QP_DEST_QPN | IBV_QP_RQ_PSN |
                                  IBV_QP_MAX_DEST_RD_ATOMIC | IBV_QP_MIN_RNR_TIMER);
    if (error)
        return -error;
    struct ibv_qp_attr send = {
        .qp_state = IBV_QPS_RTS,
        .timeout = ACK_TIMEOUT,
        .retry_cnt = RETRIES,
        .rnr_retry = RETRIES,
        .sq_psn = link->psn,
        .max_rd_atomic = READS_IN_FLIGHT,
    };
    return -ibv_modify_qp(link->qp, &send,
                          IBV_QP_STATE | IBV_QP_TIMEOUT | IBV_QP_RETRY_CNT | IBV_QP_RNR_RETRY | IBV_QP_SQ_PSN |
                              IBV_QP_MAX_QP_RD_ATOMIC);
}

void fabric_link_stop(struct fabric_link *link)
{
    struct ibv_qp_attr attr = {.qp_state = IBV_QPS_RESET}; /* unlike ERR, complete when the call returns */
    ibv_modify_qp(link->qp, &attr, IBV_QP_STATE);
    link->stopped = link->qp;
    link->qp = NULL;
}

void fabric_link_destroy(struct fabric_link *link)
{
    if (link->qp)
        fabric_link_stop(link);
    if (link->stopped)
        ibv_destroy_qp(link->stopped);
    link->stopped = NULL;
}

int fabric_poll(struct fabric *f, struct ibv_wc *wc, int n)
{
    return ibv_poll_cq(f->cq, n, wc);
}

int fabric_wait(struct fabric *f, struct ibv_wc *wc, int n)
{
    for (int i = 0;; i++) {
        int got = ibv_poll_cq(f->cq, n, wc);
        if (got)
            return got;
        if (i >= fabric_spin)
            break;
        sched_yield();
    }
    for (;;) {
        /* Arm, look once more, then sleep: an entry that came before arming raises no event. */
        if (ibv_req_notify_cq(f->cq, 0))
            return -errno;
        int got = ibv_poll_cq(f->cq, n, wc);
        if (got)
            return got;
        struct pollfd sleep[] = {{.fd = f->channel->fd, .events = POLLIN},
                                 {.fd = f->other[0], .events = POLLIN},
                                 {.fd = f->other[1], .events = POLLIN}};
        if (poll(sleep, 3, POLL_EVERY_MS) < 0 && errno != EINTR)
            return -errno;
        if (sleep[1].revents || sleep[2].revents)
            return 0;
        struct ibv_cq *cq;
        void *unused;
        if (ibv_get_cq_event(f->channel, &cq, &unused) == 0)
            ibv_ack_cq_events(cq, 1);
    }
}
