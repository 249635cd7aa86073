/* Verbs for the pager: one device, one registered buffer, one RC queue pair per memory blade.
 *
 * Soft-RoCE facts behind the choices (lite-and-hotpot.md, section 7.2): the IPv4-mapped GID must be used,
 * rnr_retry 7 means for ever (6 is used), every post_send is a system call (work requests are chained).
 */
#ifndef RACKLESS_FABRIC_H
#define RACKLESS_FABRIC_H

#include <infiniband/verbs.h>
#include <stddef.h>
#include <stdint.h>

enum { FABRIC_DEPTH = 256 };          /* work requests a queue pair holds */

struct fabric {
    struct ibv_context *context;
    struct ibv_pd *pd;
    struct ibv_comp_channel *channel; /* non-blocking; sleep on channel->fd */
    struct ibv_cq *cq;
    struct ibv_mr *mr;
    union ibv_gid gid;
    int gid_index;
    enum ibv_mtu mtu;
    int other[2];                     /* other descriptors that end a wait when they can be read, or -1 */
};

struct fabric_link {
    struct ibv_qp *qp;                /* NULL: not connected */
    struct ibv_qp *stopped;           /* to be destroyed */
    uint32_t psn;                     /* first packet number we send */
};

/* Open the first device with an IPv4 GID and register [base, base + bytes). 0, or a negative errno. */
int fabric_open(struct fabric *f, void *base, size_t bytes);

/* Make a queue pair (state INIT); then f->gid, link->qp->qp_num and link->psn are what the peer needs. */
int fabric_link_create(struct fabric *f, struct fabric_link *link);

/* Bring the queue pair to RTS with the peer's number, first packet number and GID. */
int fabric_link_connect(struct fabric *f, struct fabric_link *link, uint32_t qpn, uint32_t psn,
                        const union ibv_gid *gid);

/* Stop the queue pair. What it carries is given up: nothing of it arrives in our memory afterwards. Completions that
 * are already there stay, with a number that no link has. Allocates and frees nothing. */
void fabric_link_stop(struct fabric_link *link);

/* Free what is left of a queue pair, stopped or not. */
void fabric_link_destroy(struct fabric_link *link);

/* Reap up to `n` completions, waiting for at least one: poll a little, then sleep on the event channel.
 * Returns the number reaped, 0 if it was `other` that ended the wait, or a negative errno. */
int fabric_wait(struct fabric *f, struct ibv_wc *wc, int n);

/* Reap what is there without waiting. */
int fabric_poll(struct fabric *f, struct ibv_wc *wc, int n);

extern int fabric_spin;               /* polls with sched_yield before sleeping */

#endif
