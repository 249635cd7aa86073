/* A stand-in for libibverbs: several "devices" in one process, RC queue pairs, one thread that carries work requests.
 *
 * It checks what a device would check (keys, ranges, receives) and lets a test hold the fabric still, or cut it, so
 * that the core can be tested without RDMA, under sanitizers. Link it instead of -libverbs.
 */
#define _GNU_SOURCE
#include <infiniband/verbs.h>

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#define EXPORT __attribute__((visibility("default")))
enum { CQ_MAX = 1 << 16, QPS = 4096, MRS = 1 << 16, QUEUE = 1 << 12, SGES = 16, INLINE_MAX = 512 };

struct fake_cq {
    struct ibv_cq cq;
    struct ibv_wc wc[CQ_MAX];
    unsigned first, count;
    int armed, event;
};

struct fake_srq {
    struct ibv_srq srq;
    unsigned posted, max;
};

struct work {
    struct ibv_send_wr wr;
    struct ibv_sge sge[SGES];
    char data[INLINE_MAX];
};

struct fake_qp {
    struct ibv_qp qp;
    struct fake_cq *cq;
    struct fake_srq *receives;
    uint32_t peer, depth;
    int access, state, broken;
    struct work *queue;
    unsigned first, count;
};

struct fake_mr {
    struct ibv_mr mr;
    int access, used;
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t wake = PTHREAD_COND_INITIALIZER;
static struct fake_qp *qps[QPS];
static struct fake_mr *mrs[MRS];
static uint32_t next_qp = 17, next_mr = 1;
static int held, delay_us = 30, late;
static struct late {
    struct fake_cq *cq;
    struct ibv_wc wc;
} late_ack[QUEUE];
static unsigned lates;
static uint64_t carried;
static void (*on_carry)(uint64_t carried);
static pthread_t carrier;
static int carrying;

static void complete(struct fake_cq *cq, struct ibv_wc wc)
{
    if (cq->count == CQ_MAX)
        abort();
    cq->wc[(cq->first + cq->count++) % CQ_MAX] = wc;
    if (cq->armed) {
        cq->armed = 0;
        if (eventfd_write(cq->event, 1))
            abort();
    }
}

/* A request's own completion: on a real fabric its acknowledgement may come after what it has led to. */
static void acknowledge(struct fake_cq *cq, struct ibv_wc wc)
{
    if (!late)
        complete(cq, wc);
    else if (lates < QUEUE)
        late_ack[lates++] = (struct late){cq, wc};
    else
        abort();
}

static char *reach(uint32_t key, uint64_t address, uint64_t length, int access)
{
    struct fake_mr *mr = key < MRS ? mrs[key] : NULL;
    uint64_t start = mr ? (uintptr_t)mr->mr.addr : 0;
    if (!mr || (mr->access & access) != access || address < start || address + length > start + mr->mr.length)
        return NULL;
    return (char *)(uintptr_t)address;
}

static uint64_t total(const struct work *w)
{
    uint64_t sum = 0;
    for (int i = 0; i < w->wr.num_sge; i++)
        sum += w->sge[i].length;
    return sum;
}

static void copy(const struct work *w, char *remote, int out)
{
    const char *in_line = w->data;
    for (int i = 0; i < w->wr.num_sge; i++) {
        uint32_t n = w->sge[i].length;
        if (w->wr.send_flags & IBV_SEND_INLINE) {
            memcpy(remote, in_line, n);
            in_line += n;
        } else {
            char *local = reach(w->sge[i].lkey, w->sge[i].addr, n, out ? 0 : IBV_ACCESS_LOCAL_WRITE);
            if (!local)
                abort(); /* a local protection error is always our own fault */
            memcpy(out ? remote : local, out ? local : remote, n);
        }
        remote += n;
    }
}

static enum ibv_wc_status carry(const struct work *w, struct fake_qp *peer)
{
    const struct ibv_send_wr *wr = &w->wr;
    uint64_t length = total(w);
    if (wr->opcode == IBV_WR_RDMA_READ) {
        char *remote = reach(wr->wr.rdma.rkey, wr->wr.rdma.remote_addr, length, IBV_ACCESS_REMOTE_READ);
        if (!remote)
            return IBV_WC_REM_ACCESS_ERR;
        copy(w, remote, 0);
    } else if (wr->opcode == IBV_WR_ATOMIC_FETCH_AND_ADD || wr->opcode == IBV_WR_ATOMIC_CMP_AND_SWP) {
        char *place = reach(wr->wr.atomic.rkey, wr->wr.atomic.remote_addr, 8, IBV_ACCESS_REMOTE_ATOMIC);
        uint64_t *word = (uint64_t *)(void *)place;
        if (!word || (uintptr_t)word % 8)
            return IBV_WC_REM_ACCESS_ERR;
        uint64_t before = *word;
        if (wr->opcode == IBV_WR_ATOMIC_FETCH_AND_ADD)
            *word += wr->wr.atomic.compare_add;
        else if (before == wr->wr.atomic.compare_add)
            *word = wr->wr.atomic.swap;
        copy(w, (char *)&before, 0);
    } else {
        char *remote = reach(wr->wr.rdma.rkey, wr->wr.rdma.remote_addr, length, IBV_ACCESS_REMOTE_WRITE);
        if (!remote)
            return IBV_WC_REM_ACCESS_ERR;
        copy(w, remote, 1);
        if (wr->opcode == IBV_WR_RDMA_WRITE_WITH_IMM) {
            if (!peer->receives->posted)
                return IBV_WC_RNR_RETRY_EXC_ERR;
            peer->receives->posted--;
            complete(peer->cq, (struct ibv_wc){.status = IBV_WC_SUCCESS, .opcode = IBV_WC_RECV_RDMA_WITH_IMM,
                .byte_len = (uint32_t)length, .imm_data = wr->imm_data, .wc_flags = IBV_WC_WITH_IMM,
                .qp_num = peer->qp.qp_num});
        }
    }
    return IBV_WC_SUCCESS;
}

/* Carry one request of each queue pair; false: there is none. */
static int carry_some(void)
{
    int any = 0;
    for (int i = 0; i < QPS && !held; i++) {
        struct fake_qp *qp = qps[i];
        if (!qp || !qp->count)
            continue;
        any = 1;
        if (on_carry)
            on_carry(++carried);
        struct work *w = &qp->queue[qp->first];
        struct fake_qp *peer = qp->peer < QPS ? qps[qp->peer] : NULL;
        if (peer && peer->broken > 1 && qp->state == IBV_QPS_RTS)
            continue;
        enum ibv_wc_status status = IBV_WC_WR_FLUSH_ERR;
        if (qp->state == IBV_QPS_RTS)
            status = !peer || peer->state < IBV_QPS_RTR || peer->state > IBV_QPS_RTS || qp->broken || peer->broken
                         ? IBV_WC_RETRY_EXC_ERR : carry(w, peer);
        if (status != IBV_WC_SUCCESS)
            qp->state = IBV_QPS_ERR;
        acknowledge(qp->cq, (struct ibv_wc){.wr_id = w->wr.wr_id, .status = status, .qp_num = qp->qp.qp_num});
        qp->first = (qp->first + 1) % QUEUE;
        qp->count--;
    }
    return any;
}

static void *run(void *unused)
{
    (void)unused;
    pthread_mutex_lock(&lock);
    for (;;) {
        int any = carry_some();
        if (any && delay_us) {
            pthread_mutex_unlock(&lock);
            usleep((useconds_t)delay_us);
            pthread_mutex_lock(&lock);
        } else if (!any) {
            pthread_cond_wait(&wake, &lock);
        }
    }
    return NULL;
}

/* For tests. */
EXPORT void fake_hold(int hold)
{
    pthread_mutex_lock(&lock);
    held = hold;
    pthread_cond_signal(&wake);
    pthread_mutex_unlock(&lock);
}
/* Keep the completions of requests back, while what they carry arrives; 0 delivers them. */
EXPORT void fake_late(int keep)
{
    pthread_mutex_lock(&lock);
    late = keep;
    for (unsigned i = 0; !late && i < lates; i++)
        complete(late_ack[i].cq, late_ack[i].wc);
    lates = late ? lates : 0;
    pthread_mutex_unlock(&lock);
}
EXPORT void fake_delay(int us)
{
    pthread_mutex_lock(&lock);
    delay_us = us;
    pthread_mutex_unlock(&lock);
}
EXPORT int fake_cut(uint32_t qpn)
{
    pthread_mutex_lock(&lock);
    int found = qpn < QPS && qps[qpn];
    if (found)
        qps[qpn]->broken = 1;
    pthread_mutex_unlock(&lock);
    return found;
}
/* `hook` is called before each request is carried, with how many there have been, and may call fake_break. */
EXPORT void fake_hook(void (*hook)(uint64_t carried))
{
    on_carry = hook;
}
/* For a hook: the node of this queue pair is dead. `silent`: what is sent to it gets no answer, not even an error. */
EXPORT void fake_break(uint32_t qpn, int silent)
{
    if (qpn < QPS && qps[qpn])
        qps[qpn]->broken = 1 + silent;
}
/* Deliver a message that no well-behaved peer would send: an immediate to `qpn`. */
EXPORT void fake_immediate(uint32_t qpn, uint32_t imm, uint32_t bytes)
{
    pthread_mutex_lock(&lock);
    struct fake_qp *qp = qps[qpn];
    qp->receives->posted--;
    complete(qp->cq, (struct ibv_wc){.status = IBV_WC_SUCCESS, .byte_len = bytes, .imm_data = imm, .qp_num = qpn});
    pthread_mutex_unlock(&lock);
}
EXPORT unsigned fake_registrations(void)
{
    unsigned n = 0;
    pthread_mutex_lock(&lock);
    for (int i = 0; i < MRS; i++)
        n += mrs[i] != NULL;
    pthread_mutex_unlock(&lock);
    return n;
}

static int post_send(struct ibv_qp *ibqp, struct ibv_send_wr *wr, struct ibv_send_wr **bad)
{
    struct fake_qp *qp = (struct fake_qp *)ibqp;
    pthread_mutex_lock(&lock);
    for (; wr; wr = wr->next) {
        if (qp->count >= qp->depth) {
            *bad = wr;
            pthread_mutex_unlock(&lock);
            return ENOMEM;
        }
        struct work *w = &qp->queue[(qp->first + qp->count++) % QUEUE];
        w->wr = *wr;
        char *in_line = w->data;
        for (int i = 0; i < wr->num_sge; i++) {
            w->sge[i] = wr->sg_list[i];
            if (wr->send_flags & IBV_SEND_INLINE) {
                if (in_line + w->sge[i].length > w->data + INLINE_MAX)
                    abort();
                memcpy(in_line, (void *)(uintptr_t)w->sge[i].addr, w->sge[i].length);
                in_line += w->sge[i].length;
            }
        }
    }
    pthread_cond_signal(&wake);
    pthread_mutex_unlock(&lock);
    return 0;
}

static int poll_cq(struct ibv_cq *ibcq, int n, struct ibv_wc *wc)
{
    struct fake_cq *cq = (struct fake_cq *)ibcq;
    int got = 0;
    pthread_mutex_lock(&lock);
    if (!carrying)
        carry_some();
    for (; got < n && cq->count; cq->count--, cq->first = (cq->first + 1) % CQ_MAX)
        wc[got++] = cq->wc[cq->first];
    pthread_mutex_unlock(&lock);
    return got;
}

static int req_notify(struct ibv_cq *cq, int solicited)
{
    (void)solicited;
    pthread_mutex_lock(&lock);
    ((struct fake_cq *)cq)->armed = 1;
    pthread_mutex_unlock(&lock);
    return 0;
}

static int post_srq(struct ibv_srq *ibsrq, struct ibv_recv_wr *wr, struct ibv_recv_wr **bad)
{
    struct fake_srq *srq = (struct fake_srq *)ibsrq;
    int error = 0;
    pthread_mutex_lock(&lock);
    for (; wr && !error; wr = wr->next) {
        if (srq->posted == srq->max) {
            *bad = wr;
            error = ENOMEM;
        } else {
            srq->posted++;
        }
    }
    pthread_mutex_unlock(&lock);
    return error;
}

EXPORT struct ibv_device **ibv_get_device_list(int *n)
{
    static struct ibv_device device = {.name = "rxe0"};
    static struct ibv_device *list[2] = {&device, NULL};
    if (n)
        *n = 1;
    return list;
}
EXPORT void ibv_free_device_list(struct ibv_device **list) { (void)list; }
EXPORT const char *ibv_get_device_name(struct ibv_device *device) { return device->name; }
EXPORT struct ibv_context *ibv_open_device(struct ibv_device *device)
{
    struct ibv_context *context = calloc(1, sizeof *context);
    context->device = device;
    context->ops.poll_cq = poll_cq;
    context->ops.req_notify_cq = req_notify;
    context->ops.post_send = post_send;
    context->ops.post_srq_recv = post_srq;
    pthread_mutex_lock(&lock);
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    static int asked, alone;
    if (!asked++)
        alone = getenv("FAKE_ALONE") != NULL; /* never again: see fake_monitor.c */
    if (!carrying && !alone) {
        pthread_create(&carrier, NULL, run, NULL);
        carrying = 1;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_mutex_unlock(&lock);
    return context;
}
EXPORT const char *ibv_wc_status_str(enum ibv_wc_status status)
{
    return status == IBV_WC_RETRY_EXC_ERR ? "transport retry counter exceeded" : "failed";
}
EXPORT int ibv_close_device(struct ibv_context *context) { free(context); return 0; }
#undef ibv_query_port
EXPORT int ibv_query_port(struct ibv_context *context, uint8_t port, struct _compat_ibv_port_attr *compat)
{
    (void)context, (void)port;
    struct ibv_port_attr *attr = (void *)compat;
    attr->active_mtu = IBV_MTU_4096;
    attr->gid_tbl_len = 2;
    return 0;
}
EXPORT int ibv_query_gid(struct ibv_context *context, uint8_t port, int index, union ibv_gid *gid)
{
    (void)context, (void)port;
    memset(gid, 0, sizeof *gid);
    if (index) {
        gid->raw[10] = gid->raw[11] = 0xff;
        gid->raw[12] = 10;
    }
    return 0;
}
EXPORT int ibv_query_device(struct ibv_context *context, struct ibv_device_attr *attr)
{
    (void)context;
    attr->max_qp_rd_atom = 128;
    return 0;
}
EXPORT struct ibv_pd *ibv_alloc_pd(struct ibv_context *context)
{
    struct ibv_pd *pd = calloc(1, sizeof *pd);
    pd->context = context;
    return pd;
}
EXPORT int ibv_dealloc_pd(struct ibv_pd *pd) { free(pd); return 0; }
EXPORT struct ibv_comp_channel *ibv_create_comp_channel(struct ibv_context *context)
{
    struct ibv_comp_channel *channel = calloc(1, sizeof *channel);
    channel->context = context;
    channel->fd = eventfd(0, EFD_SEMAPHORE | EFD_CLOEXEC); /* a single descriptor, as the real one has */
    if (channel->fd < 0)
        abort();
    return channel;
}
EXPORT int ibv_destroy_comp_channel(struct ibv_comp_channel *channel)
{
    close(channel->fd);
    free(channel);
    return 0;
}
EXPORT struct ibv_cq *ibv_create_cq(struct ibv_context *context, int n, void *own, struct ibv_comp_channel *channel,
                                    int vector)
{
    (void)n, (void)own, (void)vector;
    struct fake_cq *cq = calloc(1, sizeof *cq);
    cq->cq.context = context;
    cq->cq.channel = channel;
    cq->event = channel->fd;
    return &cq->cq;
}
EXPORT int ibv_destroy_cq(struct ibv_cq *cq) { free(cq); return 0; }
EXPORT int ibv_get_cq_event(struct ibv_comp_channel *channel, struct ibv_cq **cq, void **context)
{
    eventfd_t one;
    (void)cq, (void)context;
    return eventfd_read(channel->fd, &one);
}
EXPORT void ibv_ack_cq_events(struct ibv_cq *cq, unsigned n) { (void)cq, (void)n; }
EXPORT struct ibv_srq *ibv_create_srq(struct ibv_pd *pd, struct ibv_srq_init_attr *init)
{
    struct fake_srq *srq = calloc(1, sizeof *srq);
    srq->srq.context = pd->context;
    srq->max = init->attr.max_wr;
    return &srq->srq;
}
EXPORT int ibv_destroy_srq(struct ibv_srq *srq) { free(srq); return 0; }
#undef ibv_reg_mr
EXPORT struct ibv_mr *ibv_reg_mr(struct ibv_pd *pd, void *address, size_t length, int access)
{
    struct fake_mr *mr = calloc(1, sizeof *mr);
    pthread_mutex_lock(&lock);
    while (next_mr % MRS == 0 || mrs[next_mr % MRS])
        next_mr++;
    uint32_t key = next_mr++ % MRS;
    mr->mr = (struct ibv_mr){pd->context, pd, address, length, 0, key, key};
    mr->access = access;
    mrs[key] = mr;
    pthread_mutex_unlock(&lock);
    return &mr->mr;
}
EXPORT struct ibv_mr *ibv_reg_mr_iova2(struct ibv_pd *pd, void *address, size_t length, uint64_t iova, unsigned access)
{
    (void)iova;
    return ibv_reg_mr(pd, address, length, (int)access);
}
EXPORT int ibv_dereg_mr(struct ibv_mr *mr)
{
    pthread_mutex_lock(&lock);
    mrs[mr->lkey] = NULL;
    pthread_mutex_unlock(&lock);
    free(mr);
    return 0;
}
EXPORT struct ibv_qp *ibv_create_qp(struct ibv_pd *pd, struct ibv_qp_init_attr *init)
{
    struct fake_qp *qp = calloc(1, sizeof *qp);
    pthread_mutex_lock(&lock);
    while (next_qp % QPS < 2 || qps[next_qp % QPS])
        next_qp++;
    qp->qp.qp_num = next_qp++ % QPS;
    qp->qp.context = pd->context;
    qp->cq = (struct fake_cq *)init->send_cq;
    qp->receives = (struct fake_srq *)init->srq;
    qp->depth = init->cap.max_send_wr;
    qp->peer = QPS;
    qp->queue = calloc(QUEUE, sizeof *qp->queue);
    qps[qp->qp.qp_num] = qp;
    pthread_mutex_unlock(&lock);
    return &qp->qp;
}
EXPORT int ibv_modify_qp(struct ibv_qp *ibqp, struct ibv_qp_attr *attr, int mask)
{
    struct fake_qp *qp = (struct fake_qp *)ibqp;
    pthread_mutex_lock(&lock);
    qp->state = (int)attr->qp_state;
    if (qp->state == IBV_QPS_RESET)
        qp->count = 0;
    if (mask & IBV_QP_DEST_QPN)
        qp->peer = attr->dest_qp_num;
    pthread_mutex_unlock(&lock);
    return 0;
}
EXPORT int ibv_destroy_qp(struct ibv_qp *ibqp)
{
    struct fake_qp *qp = (struct fake_qp *)ibqp;
    pthread_mutex_lock(&lock);
    qps[qp->qp.qp_num] = NULL;
    pthread_mutex_unlock(&lock);
    free(qp->queue);
    free(qp);
    return 0;
}
