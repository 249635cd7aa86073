/* The core of LITE on one blade: what it knows, and who does what with it.
 *
 * Everything is under one lock. The thread (core.c) holds it while it works and drops it to sleep or to yield; calls
 * from Python take it for a moment. A request of a program is a `struct op` (ops.c). Its data go over the fabric in
 * pieces of at most CHUNK bytes, one work request each (transfer.c cuts them, pieces.c posts and reaps them); what
 * cannot go now waits in the list of what it waits for. Every op ends in op_answer(), exactly once.
 */
#ifndef RACKLESS_LITE_CORE_H
#define RACKLESS_LITE_CORE_H

#include "list.h"
#include "table.h"
#include "wire.h"

#include <infiniband/verbs.h>
#include <pthread.h>
#include <stdbool.h>
#include <sys/types.h>

#define API __attribute__((visibility("default")))

enum {
    NODES = 256,             /* node ids are below */
    MAX_PEERS = 64,
    MAX_QPS = 8,
    CHUNK = 64 << 10,        /* most bytes of one work request, and of one bounce chunk */
    OP_WINDOW = 8,           /* pieces one op may have in flight */
    PIECES = 1024,           /* in flight in all */
    QP_DEPTH = 128,
    INLINE_SEND = 256,       /* bytes that are copied into the work request */
    SRQ_DEPTH = 1024,
    SRQ_QUARTER = SRQ_DEPTH / 4,
    PACKET_BYTES = (int)sizeof(struct lite_request) + LITE_INLINE,
    EVENTS = 256,            /* that Python has not fetched yet */
};

struct lite_config {
    char device[64];
    uint32_t queue_pairs, qos;
    uint64_t pool, slots, buffers;
    uint32_t timeout_ms, spin_us;
};

struct lite_address {
    uint8_t gid[16];
    uint32_t count, heads_rkey;
    uint64_t heads;
    uint32_t qpn[MAX_QPS], psn[MAX_QPS];
};

struct lite_block {
    uint64_t address, length;
    uint32_t node, rkey;
};

struct lite_slab {
    uint64_t address, bytes, number;
    uint32_t rkey, pad;
};

struct lite_ring {
    uint64_t address, size, max_message, lost;
    uint32_t rkey, generation;
};

enum lite_event_kind { EVENT_PEER_BROKEN, EVENT_BIND, EVENT_CHANNEL_CLOSED };

struct lite_event {
    uint32_t kind, node, incarnation, port;
    uint64_t client;
};

#include "stats.h"

/* Registered memory. */
struct region {
    uint8_t *bytes;
    size_t size;
    struct ibv_mr *mr;
};

struct slab {
    struct region region;
    uint64_t number;
    uint32_t users;          /* blocks of LMRs that lie in it */
};

/* A packet buffer or a bounce chunk: a piece of a registered region. */
struct store {
    struct link link;
    uint8_t *bytes;
    uint32_t lkey;
};

struct pool {
    struct link free;        /* of struct store */
    size_t bytes_each, per_region, limit, allocated, used;
    struct link regions;
};

/* Where a reply is to arrive. */
/* The upper two bits of an immediate; then 6 bits port and 24 bits ring offset in RING_UNITs, or 30 bits slot, or (for a
 * reply that is nothing but data: 4 KiB are one packet then) the lower 18 bits of its ticket and 12 bits slot. */
enum { IMM_REQUEST = 1, IMM_REPLY = 2, IMM_BARE_REPLY = 3, OPCODE_SHIFT = 30, PORT_SHIFT = 24, SLOT_BITS = 12 };
enum { RING_UNIT = 64 };

enum slot_state { SLOT_IDLE, SLOT_ACTIVE, SLOT_QUARANTINED };
struct slot {
    struct link link;        /* of idle slots */
    struct region region;    /* if it has one of its own */
    uint8_t *bytes;          /* SLOT_HEAD bytes, then the reply */
    uint32_t rkey, index, ticket, class, session;
    enum slot_state state;
    bool replied;
    struct op *op;           /* NULL once it has its reply */
    struct peer *peer;
};

/* Memory shared with a program. */
struct buffer {
    struct region region;
    uint32_t users;
    bool dropped;
};

struct piece {
    uint8_t head[64];        /* registered: a message's header, or an atomic's result */
    struct link link;        /* peer->pieces, or the free list */
    struct op *op;
    struct peer *peer;
    struct store *chunk;
    uint64_t at;             /* position in the op's data */
    uint32_t length, generation;
    uint16_t pair;
    uint8_t priority;
    bool busy;
    struct ibv_send_wr wr;
    struct ibv_sge sge[2];
};

struct pair {
    struct ibv_qp *qp;
    uint32_t psn, in_flight; /* in_flight: work requests posted or about to be */
    struct ibv_send_wr *first, **last; /* to be posted in one go */
};

enum peer_state { PEER_PREPARED, PEER_CONNECTED, PEER_BROKEN, PEER_DEAD };
struct peer {
    uint32_t node, incarnation, session; /* session: grows whenever the queue pairs go */
    enum peer_state state;
    uint32_t next_pair, pairs;
    struct pair pair[MAX_QPS];
    struct link wait[LITE_PRIORITIES];   /* ops that have something to post */
    struct link pieces;
    uint32_t in_flight;
    uint64_t bytes_out, bytes_in;
    uint64_t *heads;                     /* where it writes how far it has read our messages, by port */
    uint64_t remote_heads;
    uint32_t remote_heads_rkey;
    struct ring_out *out[LITE_PORTS];
    struct ring_in *in[LITE_PORTS];
    uint64_t owed[LITE_PORTS], informed[LITE_PORTS]; /* programs here that must hear, or heard, of a closed port */
};

enum lmr_state { LMR_ACTIVE, LMR_FROZEN, LMR_KILLED };
struct block {
    uint64_t start, address, length;     /* start: offset in the LMR */
    uint32_t node, rkey, incarnation;    /* incarnation of the node when the LMR was put */
    struct slab *slab;                   /* if it is ours */
};

struct lmr {
    uint64_t id, size;
    enum lmr_state state;
    int code;                            /* what requests get when it is killed */
    uint32_t blocks, handles, in_flight, waiters;
    struct block *block;
    struct link parked;
};

struct handle {
    struct lmr *lmr;                     /* NULL: free */
    uint32_t permissions, generation;
};

struct client {
    uint64_t id;
    pid_t pid;
    bool removed;
    uint32_t ops;                        /* not yet freed */
    struct link channels;
    struct handle *handle;
    uint32_t handles, free_handle;       /* size of the array; where to look for a free one */
    struct buffer **buffer;
    uint32_t buffers;
    uint64_t buffer_bytes;
};

struct channel {
    struct link link;                    /* client->channels */
    struct link hot;                     /* core->hot: may have packets to read */
    struct link order;                   /* unanswered ops, oldest first */
    struct link unsent;                  /* answered, but the socket was full */
    struct link mail;                    /* core->mailboxes, if it has one */
    struct lite_mailbox *mailbox;
    bool asked;                          /* the request in the mailbox has been taken, and is not answered */
    uint64_t id;
    struct client *client;
    int fd;
    uint32_t window, burst;              /* requests unanswered; packets to read at a time */
    bool gone;                           /* nobody reads the other end; closed when its turn comes */
};

/* One request of a program, or of the tier (raw), or a reply of our own making. */
struct op {
    struct link wait, order, timed;
    struct channel *channel;
    struct client *client;
    struct raw *raw;
    struct lite_request request;
    struct lite_reply reply;
    uint64_t deadline;
    struct store *packet;
    uint8_t *data;                       /* in the packet: inline data, out or in */
    const struct lite_segment *segment;
    uint64_t in_segment;
    struct buffer *buffer;
    struct lmr *lmr;
    uint64_t posted, total;
    uint32_t in_flight;
    int status;                          /* the first thing that went wrong */
    bool mailed;                         /* it came by mailbox, and is answered there */
    bool ended, told;                    /* its outcome is settled; the program knows it (or has gone) */
    bool final, sent, voided;            /* a message: its last work request is posted; has ended; carries no data */
    bool bare;                           /* a reply: its head does not travel */
    uint8_t *inline_reply;               /* the data that follow the reply's header; 32 bytes before are ours */
    uint8_t *spilled;                    /* the answer, copied because its program does not read just now */
    /* messages */
    struct peer *peer;
    uint64_t remote;
    uint32_t rkey, imm, head_bytes;
    int32_t pair;                        /* all pieces of a message take one queue pair; -1: not chosen */
    uint8_t head[64];
    struct slot *slot;
    struct message *message;
};

struct core {
    pthread_mutex_t lock;
    pthread_cond_t changed, event_came;
    pthread_t thread;
    bool stopping, started;
    bool again;                          /* there is more to do than this round did */
    struct lite_config config;
    uint32_t node, incarnation;
    int epoll, wake;
    uint64_t now, next_deadline;         /* ns, monotonic; now: as of this round of the thread */

    struct ibv_context *context;
    struct ibv_pd *pd;
    struct ibv_comp_channel *completions;
    struct ibv_cq *cq;
    struct ibv_srq *srq;
    uint32_t srq_used;                   /* receives consumed and not yet posted again */
    union ibv_gid gid;
    int gid_index;
    enum ibv_mtu mtu;
    int reads_in_flight;

    struct region piece_region, heads_region;
    struct piece *piece;
    struct link free_pieces, starved;    /* starved: ops that wait for a piece or a chunk */
    struct pool packets, chunks;
    struct store *spare;                 /* for the next packet read */
    struct slab **slab;                  /* sorted by address */
    uint32_t slabs;
    uint64_t slab_numbers;

    struct peer *by_node[NODES];
    struct peer *by_qpn[256];            /* a guess, by low bits of the number */
    struct pair *flush[MAX_PEERS * MAX_QPS];
    uint32_t to_flush, turn;             /* turn: which queue pair this round's work requests take */

    struct table lmrs, clients, channels;
    struct link hot, timed, free_ops, mailboxes;
    bool asleep;                         /* the thread does not look into mailboxes: programs must knock */
    uint64_t client_ids, channel_ids;
    struct rpc *rpc;
    struct qos *qos;

    struct lite_event event[EVENTS];
    uint32_t event_first, events;
    struct lite_stats stats;
};

/* core.c */
void core_enter(struct core *core);
void core_leave(struct core *core);                /* posts what is to be posted, then unlocks */
void core_wait(struct core *core);                 /* until something changed; only for callers from Python */
void core_wake(struct core *core);                 /* make the thread look around */
void core_event(struct core *core, uint32_t kind, uint32_t node, uint32_t incarnation, uint32_t port, uint64_t client);
uint64_t core_clock(void);
void core_alarm(struct core *core, uint64_t when); /* let the thread look around at this time */

/* device.c */
int device_open(struct core *core);
void device_close(struct core *core);
void device_receives(struct core *core, uint32_t count);

/* memory.c */
int region_open(struct core *core, struct region *region, size_t bytes, int access, int memfd);
void region_close(struct region *region);
struct slab *slab_find(struct core *core, uint64_t address, uint64_t length);
void pool_init(struct pool *pool, size_t bytes_each, size_t per_region, size_t limit);
void pool_grow(struct core *core, struct pool *pool);
struct store *pool_take(struct core *core, struct pool *pool);
void pool_give(struct pool *pool, struct store *store);
void pool_close(struct pool *pool);
bool copy_from(struct op *op, uint64_t at, void *target, size_t length);      /* the op's outgoing data */
bool copy_to(struct op *op, uint64_t at, const void *source, size_t length);  /* its incoming data */
uint64_t op_address(const struct op *op, bool incoming);

/* pieces.c */
struct piece *piece_take(struct core *core, struct peer *peer, uint32_t pair, struct op *op);
void piece_post(struct core *core, struct piece *piece);
void piece_free(struct core *core, struct piece *piece);
void pieces_flush(struct core *core);
bool pieces_reap(struct core *core);

/* transfer.c */
bool transfer(struct core *core, struct op *op);              /* post what can be posted; false: it waits for room */
void transfer_piece_done(struct core *core, struct piece *piece, int status);
void transfer_pump(struct core *core, struct peer *peer);
void transfer_starved(struct core *core);

/* ops.c */
struct op *op_new(struct core *core, struct client *client, struct channel *channel);
void op_start(struct core *core, struct op *op, size_t payload);
void op_memory(struct core *core, struct op *op);             /* a one-sided request: check the handle, go */
void op_answer(struct core *core, struct op *op, int status); /* if pieces are in flight it is freed later */
void op_settle(struct core *core, struct op *op);
bool op_cancel(struct core *core, struct op *op, int code);   /* true: it waited, and is answered */
void ops_expire(struct core *core);

/* peers.c */
int peer_usable(struct core *core, uint32_t node, struct peer **peer); /* 0, or why not */
struct peer *peer_of(struct core *core, uint32_t qpn);
void peer_break(struct core *core, struct peer *peer, int code);
void peers_break(struct core *core);                          /* all of them, for good */
void peers_close(struct core *core);

/* lmrs.c */
int lmr_begin(struct core *core, struct op *op);              /* 0: go; 1: parked; negative: the error */
void lmr_end(struct core *core, struct op *op);
const struct block *lmr_block(const struct lmr *lmr, uint64_t offset);
void handles_close(struct core *core, struct client *client);
void lmrs_close(struct core *core);

/* clients.c */
bool channel_read(struct core *core, struct channel *channel); /* true: there was something; it may be gone now */
void channel_send(struct core *core, struct op *op);
void channel_close(struct core *core, struct channel *channel);
void channel_writable(struct core *core, struct channel *channel);
struct client *client_of(struct core *core, uint64_t id);
void clients_close(struct core *core);

/* mail.c */
int mail_open(struct core *core, struct channel *channel);     /* the file of its mailbox, for the program; or -1 */
void mail_close(struct channel *channel);
bool mail_collect(struct core *core);                          /* take what is in mailboxes; true: there was something */
void mail_answer(struct op *op);
void mail_asleep(struct core *core, bool asleep);

/* buffers.c */
struct buffer *buffer_of(struct client *client, uint32_t number, uint64_t offset, uint64_t length);
void buffer_release(struct core *core, struct client *client, struct buffer *buffer);
void buffers_close(struct core *core, struct client *client);

/* messages.c: what both sides of RPC do */
int rpc_open(struct core *core);
void rpc_close(struct core *core);
void rpc_call(struct core *core, struct op *op);
void rpc_replied(struct core *core, struct peer *peer, uint32_t imm, uint32_t bytes);
void rpc_room(struct core *core);                             /* there may be room in a ring, or a slot, now */
void rpc_slot_release(struct core *core, struct op *op);
void rpc_sent(struct core *core, struct op *op);              /* all pieces of a message ended */
void rpc_landed(struct core *core, struct op *op);            /* ... its place in the ring is filled */
void rpc_void(struct op *op);                                 /* it was begun, but will have no data */
bool rpc_wants_room(struct core *core, const struct op *op);   /* it waits for room in a ring */
void calls_peer_gone(struct core *core, struct peer *peer, int code);

/* ports.c: the side that is called */
void rpc_receive(struct core *core, struct op *op);
void rpc_reply(struct core *core, struct op *op);
void rpc_arrived(struct core *core, struct peer *peer, uint32_t port, uint64_t offset);
void rpc_malformed(struct core *core, struct peer *peer);      /* it sends nonsense: break with it */
void message_done(struct core *core, struct message *message);
void ports_client_gone(struct core *core, struct client *client);
void ports_peer_gone(struct core *core, struct peer *peer);

/* qos.c */
int qos_open(struct core *core);
void qos_close(struct core *core);
bool qos_may_post(struct core *core, const struct op *op);
uint32_t qos_chunk(struct core *core, const struct op *op);
int qos_pair(struct core *core, struct peer *peer, const struct op *op); /* -1: none has room */
void qos_posted(struct core *core, const struct piece *piece);
void qos_done(struct core *core, const struct piece *piece);

#endif
