/* What travels between cores for RPC, and what each side remembers of it.
 *
 * A message is written into the ring of (client node, port) at the server, with an immediate that says where:
 * struct message_head, then the data. The client owns the ring's tail; the server writes its head back into
 * peer->heads of the client each quarter ring. The reply is written into the caller's slot: struct reply_head, data.
 *
 * When a port is closed its rings retire: the server says so in the head it writes back. The client puts nothing more
 * into such a ring, waits for what is on its way, and asks for another: if somebody has registered the port again it
 * gets one of the right size, and learns whose one-way messages nobody has read.
 */
#ifndef RACKLESS_LITE_RPC_H
#define RACKLESS_LITE_RPC_H

#include "core.h"

enum {
    MESSAGE_MAGIC = 0x4c495445,
    SLOT_CLASSES = 5,
    SLOT_HEAD = 32,     /* so that a struct lite_reply fits before the data; the reply's own head is the second half */
    SMALLEST_RING = 256 << 10,
    MOST_SLOTS = 1 << SLOT_BITS,
    MOST_CALLS = 1 << 16,
};

enum message_kind { MESSAGE_SEND, MESSAGE_CALL, MESSAGE_VOID };

struct message_head {
    uint32_t magic;
    uint16_t port;
    uint8_t kind, sender; /* sender: SENDER of the program, for messages that nobody reads */
    uint32_t length, sequence;
    uint32_t skipped;   /* bytes left unused before it, at the ring's end */
    uint32_t max_reply, slot, ticket, slot_rkey;
    uint32_t zero;
    uint64_t slot_address;
    uint64_t zeros[2];
};
_Static_assert(sizeof(struct message_head) == RING_UNIT, "data begin one unit after the head");

struct reply_head {
    int32_t status;
    uint32_t ticket;
    uint64_t length;
};
_Static_assert(sizeof(struct lite_reply) == SLOT_HEAD && sizeof(struct reply_head) == SLOT_HEAD / 2, "see SLOT_HEAD");

/* What the server writes back: the ring's generation, RING_CLOSED, and the head modulo 2^47. Always by the same queue
 * pair, so that nothing older can arrive later. */
#define RING_CLOSED (1ull << 47)
#define HEAD_MASK (RING_CLOSED - 1)
enum { GENERATION_SHIFT = 48 };

/* The immediate of a reply without a head: as much of the ticket as there is room for, and the slot. */
static inline uint32_t bare_reply(uint32_t slot, uint32_t ticket)
{
    uint32_t ticket_mask = (1u << (OPCODE_SHIFT - SLOT_BITS)) - 1;
    return (uint32_t)IMM_BARE_REPLY << OPCODE_SHIFT | (ticket & ticket_mask) << SLOT_BITS | slot;
}

/* A bit for each program of a blade (or for a few, if it has many), in masks of who lost a message. */
#define SENDER(client) ((uint8_t)((client)->id % 64))

/* Client's side of a ring. */
struct ring_out {
    struct link full;   /* rpc->full, if ops wait for room or for a slot */
    struct link waiting;
    struct peer *peer;
    uint32_t port, rkey, sequence;
    uint32_t in_flight; /* messages that have their place in it and have not landed yet */
    uint16_t generation;
    bool ready;         /* false: the tier is asking for it */
    uint64_t address, size, max_message, tail, asked;
};

/* Server's side. */
struct ring_in {
    struct region region;
    struct peer *peer;
    bool retired;       /* its port was closed: the client shall ask for another */
    bool detached;      /* out of use: only messages that are not read yet keep the memory */
    bool told_closed;
    uint16_t generation;
    uint32_t port, first, held; /* first: sequence of the oldest message not yet done; held: messages */
    uint64_t lost, lost_before; /* whose one-way messages nobody has read: in this ring; in those before */
    uint64_t max_message, head, head_told;
    uint32_t *span;     /* by sequence: bytes, and DONE */
    uint32_t spans;
};

struct message {
    struct link link;   /* port->messages, or the free list */
    struct ring_in *ring;
    struct message_head head;
    uint8_t *data;
};

/* A call that was received and not yet replied to: what a descriptor means. */
struct call {
    struct client *client; /* NULL: free */
    struct peer *peer;
    uint32_t generation, session, slot, ticket, slot_rkey, max_reply;
    uint64_t slot_address;
};

struct port {
    struct client *client;
    uint64_t max_message;
    struct link receivers, messages;
};

struct rpc {
    struct slot **slot;
    uint32_t slots, tickets;
    struct link idle[SLOT_CLASSES], bare; /* bare: slots without memory */
    struct link regions;                  /* that small slots share */
    struct link full;
    struct port port[LITE_PORTS];
    struct call *call;
    uint32_t calls, free_call;
    uint16_t generations;                 /* of rings */
    struct link free_messages;
};

/* slots.c */
struct slot *slot_take(struct core *core, uint64_t capacity);
void slot_idle(struct core *core, struct slot *slot);
uint64_t slot_capacity(const struct slot *slot);
void slots_close(struct core *core);

/* messages.c */
void message_post(struct core *core, struct op *op, struct peer *peer, uint64_t remote, uint32_t rkey, uint32_t imm);

#endif
