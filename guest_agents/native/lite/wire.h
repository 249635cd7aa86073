/* What a program and the LITE core of its blade say to each other; guest_agents/lite/wire.py is the same in Python.
 *
 * A data channel is a Unix SEQPACKET socket, one per thread of the program. One packet is one request or one reply,
 * little endian; replies come in any order and carry the request's tag. A packet is a header and at most LITE_INLINE
 * bytes of payload. A packet shorter than a header closes the channel; any other nonsense is answered BAD_MESSAGE.
 *
 *   op             handle      arg0     arg1           length        reply: length      value            value2
 *   READ           lh          -        -              to read       bytes read         -                -
 *   WRITE          lh          -        -              to write      bytes written      -                -
 *   READV, WRITEV  lh          entries  -              of all        of all             -                -
 *   FETCH_ADD      lh          addend   -              -             -                  value before     -
 *   CAS            lh          guess    set            -             -                  value before     -
 *   CALL           node        port     max reply      of request    of reply           -                -
 *   SEND           node        port     -              of message    -                  -                -
 *   RECEIVE        -           port     max message    -             of message         descriptor       source node
 *   REPLY          descriptor  -        -              of reply      -                  -                -
 *   REPLY_RECEIVE  descriptor  port     max message    of reply      of message         descriptor       source node
 *   CANCEL         -           tag      -              -             -                  1: was cancelled -
 *
 * offset: in the LMR, for one-sided operations. READV and WRITEV ignore it: their payload begins with arg0 entries of
 * struct lite_segment; the data lie one after the other in the order of the entries.
 * Outgoing data (WRITE, WRITEV, CALL, SEND, REPLY): in the packet with LITE_INLINE_DATA, else at `address`.
 * Incoming data (READ, READV, CALL, RECEIVE): in the reply's packet with LITE_INLINE_REPLY, else stored at `address`;
 * CALL and REPLY_RECEIVE, which have both, store incoming data at `offset` instead.
 * Addresses are the program's, or offsets in the registered buffer `buffer` if that is not 0 (then nothing is copied).
 * Requests have no order among each other: who wants one waits for the replies in between.
 * SEND is answered when the message lies in the other node's ring; its descriptor there is 0.
 * A message larger than a RECEIVE's maximum is answered MESSAGE_TOO_LARGE with its length, and stays the next one.
 * A reply larger than the caller's maximum is answered MESSAGE_TOO_LARGE, and so is the call: nobody waits for another.
 * A REPLY_RECEIVE whose reply fails is answered with that error and receives nothing.
 * CANCEL ends a request of this channel that waits (RECEIVE, CALL, a full ring, an LMR that moves): it is answered
 * CANCELLED; what is already on the fabric is left to end by itself (value 0).
 */
#ifndef RACKLESS_LITE_WIRE_H
#define RACKLESS_LITE_WIRE_H

#include <stddef.h>
#include <stdint.h>

enum lite_op {
    LITE_READ = 1,
    LITE_WRITE = 2,
    LITE_FETCH_ADD = 3,
    LITE_CAS = 4,
    LITE_READV = 5,
    LITE_WRITEV = 6,
    LITE_CALL = 7,
    LITE_SEND = 8,
    LITE_RECEIVE = 9,
    LITE_REPLY = 10,
    LITE_REPLY_RECEIVE = 11,
    LITE_CANCEL = 12,
    LITE_OPS = 13,
    LITE_KNOCK = 255, /* on a channel with a mailbox: there is something in it; not answered */
};

enum lite_priority { LITE_NORMAL = 0, LITE_HIGH = 1, LITE_LOW = 2, LITE_PRIORITIES = 3 };

enum lite_flag {
    LITE_INLINE_DATA = 1,  /* outgoing data follow the header */
    LITE_INLINE_REPLY = 2, /* incoming data, at most LITE_INLINE, shall follow the reply's header */
    LITE_NO_WAIT = 4,      /* RECEIVE: if there is no message answer TIMED_OUT at once */
};

enum lite_permission {
    LITE_MAY_READ = 1,
    LITE_MAY_WRITE = 2,
    LITE_MAY_SHARE = 4,
    LITE_MAY_ADMIN = 8,
    LITE_MAY_ATOMIC = 16,
};

enum lite_limit {
    LITE_INLINE = 8192,      /* bytes of payload a packet may have, segments included */
    LITE_SEGMENTS = 256,     /* entries of READV and WRITEV */
    LITE_PORTS = 64,         /* ports are 0 to 63 */
    LITE_WINDOW = 256,       /* requests a channel may have unanswered; more wait in its socket */
    LITE_MAX_MESSAGE = 4 << 20,
};

#define LITE_NO_LIMIT 0xffffffffu /* timeout_ms: wait for ever */

/* timeout_ms 0 is the core's default: for RECEIVE no limit, for others its setting. What is on the fabric when the
 * time is up ends first (an RDMA operation cannot be called back), but within the transport's own bounds. */
struct lite_request {
    uint8_t op;
    uint8_t priority;
    uint16_t flags;
    uint32_t tag;
    uint64_t handle;
    uint64_t offset;
    uint64_t length;
    uint64_t arg0;
    uint64_t arg1;
    uint64_t address;
    uint32_t buffer;
    uint32_t timeout_ms;
};

struct lite_reply {
    uint32_t tag;
    int32_t status; /* 0 or enum lite_error */
    uint64_t length;
    uint64_t value;
    uint64_t value2;
};

struct lite_segment {
    uint64_t offset;
    uint64_t length;
};

/* Memory that a program's thread and the core share, in a file that the program gets with its channel if it asks for
 * one. A request in it (`out`: what would follow it in a packet, `payload` bytes) is the core's when `turn`, a futex, is
 * MAIL_CORE, and answered when it is MAIL_PROGRAM again (`in`: inline data). Who has found `asleep` set after giving the
 * turn away must KNOCK. The socket stays for everything else, and for telling that the other end is gone. */
enum { MAIL_PROGRAM = 0, MAIL_CORE = 1 };

struct lite_mailbox {
    uint32_t turn;
    uint32_t asleep;
    uint32_t payload;
    uint32_t pad;
    struct lite_request request;
    uint8_t out[LITE_INLINE];
    struct lite_reply reply;
    uint8_t in[LITE_INLINE];
};

_Static_assert(sizeof(struct lite_request) == 64, "wire.py says 64");
_Static_assert(sizeof(struct lite_reply) == 32, "wire.py says 32");
_Static_assert(sizeof(struct lite_segment) == 16, "wire.py says 16");
_Static_assert(offsetof(struct lite_mailbox, out) == offsetof(struct lite_mailbox, request) +
                   sizeof(struct lite_request), "copied in one go");

/* The same numbers as guest_agents/lite/errors.py. */
enum lite_error {
    LITE_PERMISSION = -1,
    LITE_OUT_OF_RANGE = -2,
    LITE_BAD_HANDLE = -3,
    LITE_FREED = -4,
    LITE_REVOKED = -5,
    LITE_NAME_TAKEN = -6,
    LITE_NO_SUCH_NAME = -7,
    LITE_NODE_DEAD = -8,
    LITE_NODE_UNREACHABLE = -9,
    LITE_TIMED_OUT = -10,
    LITE_MESSAGE_TOO_LARGE = -11,
    LITE_RING_FULL = -12,
    LITE_PORT_CLOSED = -13,
    LITE_PORT_TAKEN = -14,
    LITE_NO_MEMORY = -15,
    LITE_NOT_JOINED = -16,
    LITE_BAD_MESSAGE = -17,
    LITE_CANCELLED = -18,
    LITE_BARRIER_BROKEN = -19,
    LITE_BAD_ARGUMENT = -20,
    LITE_NO_SUCH_NODE = -21,
    LITE_NOT_HELD = -22,
    LITE_MANAGER_LOST = -23,
};

#endif
