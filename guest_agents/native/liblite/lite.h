/* LITE for C programs on a blade of a Rackless rack: link with -llite. docs/lite.md explains it.
 *
 * Every function returns 0 or a negative LT_ERR_ code, unless it says otherwise; LT_error() then has the words. All
 * may be called from any thread: each thread gets its own connection underneath, closed when the thread ends. After
 * fork() a child has to LT_join() anew. Offsets and lengths are bytes, times milliseconds.
 */
#ifndef RACKLESS_LITE_H
#define RACKLESS_LITE_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum {
    LT_ERR_PERMISSION = -1,        /* the handle does not carry the right that this needs */
    LT_ERR_OUT_OF_RANGE = -2,      /* the range goes beyond the end */
    LT_ERR_BAD_HANDLE = -3,        /* this process holds no such handle */
    LT_ERR_FREED = -4,             /* the LMR was freed by one of its masters */
    LT_ERR_REVOKED = -5,           /* the rights of this handle were taken back */
    LT_ERR_NAME_TAKEN = -6,        /* there is already something of this name */
    LT_ERR_NO_SUCH_NAME = -7,      /* nothing has this name */
    LT_ERR_NODE_DEAD = -8,         /* a node that this needs is dead, or was restarted since */
    LT_ERR_NODE_UNREACHABLE = -9,  /* a node does not answer on the fabric */
    LT_ERR_TIMED_OUT = -10,        /* the time given has passed */
    LT_ERR_MESSAGE_TOO_LARGE = -11, /* the message is larger than the receiver allows */
    LT_ERR_RING_FULL = -12,        /* the ring of this port stayed full */
    LT_ERR_PORT_CLOSED = -13,      /* nobody has registered this port on that node */
    LT_ERR_PORT_TAKEN = -14,       /* another process of this blade has registered this port */
    LT_ERR_NO_MEMORY = -15,        /* a node has no memory left for this, or this thread no ticket */
    LT_ERR_NOT_JOINED = -16,       /* this process has no connection to LITE */
    LT_ERR_BAD_MESSAGE = -17,      /* a message is malformed or truncated */
    LT_ERR_CANCELLED = -18,        /* the operation was cancelled, or what it used was closed */
    LT_ERR_BARRIER_BROKEN = -19,   /* someone whom the barrier waits for died or gave up */
    LT_ERR_BAD_ARGUMENT = -20,     /* an argument makes no sense */
    LT_ERR_NO_SUCH_NODE = -21,     /* the rack has no node of this name */
    LT_ERR_NOT_HELD = -22,         /* this process does not hold the lock */
    LT_ERR_MANAGER_LOST = -23,     /* the manager does not answer */
    LT_ERR_OTHER = -100,
};

enum { LT_MAY_READ = 1, LT_MAY_WRITE = 2, LT_MAY_SHARE = 4, LT_MAY_ADMIN = 8, LT_MAY_ATOMIC = 16 };
enum { LT_SPREAD = 1, LT_KEEP = 2 }; /* flags of LT_malloc */
enum { LT_NORMAL = 0, LT_HIGH = 1, LT_LOW = 2 };

#define LT_DEFAULT 0u           /* timeout_ms: the agent's default; for LT_recvRPC, LT_lock and LT_barrier no limit */
#define LT_FOREVER 0xffffffffu  /* timeout_ms: no limit */
#define LT_NOW 0xfffffffeu      /* timeout_ms of LT_recvRPC: do not wait */

typedef uint64_t LT_handle; /* an LMR as this process may use it; of no use to another process */
typedef uint32_t LT_ticket; /* an operation under way, for the thread that started it */

/* A piece of an LMR. */
struct LT_range {
    uint64_t offset, length;
};

/* A message that came to a port. */
struct LT_message {
    size_t length;
    uint64_t descriptor; /* for LT_replyRPC; 0 if the sender wants no reply */
    int source;          /* node id of the sender */
};

/* Membership */
int LT_join(void);                 /* this process joins; must be called first */
int LT_leave(void);                /* gives back all that this process has; no other thread may be in LITE */
int LT_node(const char *name);     /* id of the living node called `name` (NULL: this one), or an error */
int LT_node_name(int node, char *name, size_t size);
int LT_nodes(int *ids, int room);  /* ids of all living nodes; returns how many there are, or an error */
int LT_set_priority(int priority); /* of this thread's operations from now on */
const char *LT_strerror(int code);
const char *LT_error(void);        /* what went wrong last in this thread, in words */

/* Memory. `nodes`: names with commas between, NULL for this node; `name` may be NULL. */
int LT_malloc(const char *nodes, uint64_t size, const char *name, unsigned permissions, unsigned flags,
              LT_handle *handle);
int LT_map(const char *name, unsigned permissions, LT_handle *handle, uint64_t *size); /* size may be NULL */
int LT_unmap(LT_handle handle);
int LT_free(LT_handle handle);
int LT_move(LT_handle handle, const char *nodes); /* while it is in use; handles stay as they are */
int LT_grant(LT_handle handle, unsigned permissions, const char *to);  /* to: node name or "*" */
int LT_revoke(LT_handle handle, unsigned permissions, const char *to);

int LT_read(LT_handle handle, uint64_t offset, void *data, size_t length);
int LT_write(LT_handle handle, uint64_t offset, const void *data, size_t length);
/* Several ranges (1 to 256) in one operation: `data` has the bytes of all, one range after the other. Where the ranges
 * of a write overlap it is not said which one wins. */
int LT_readv(LT_handle handle, const struct LT_range *ranges, unsigned count, void *data);
int LT_writev(LT_handle handle, const struct LT_range *ranges, unsigned count, const void *data);
/* Read and write without waiting: `data` must stay until LT_wait(*ticket), or, where ticket is NULL, LT_fence(). */
int LT_read_async(LT_handle handle, uint64_t offset, void *data, size_t length, LT_ticket *ticket);
int LT_write_async(LT_handle handle, uint64_t offset, const void *data, size_t length, LT_ticket *ticket);
int LT_wait(LT_ticket ticket);  /* each ticket is waited for once; the operation's result */
int LT_done(LT_ticket ticket);  /* 1 if LT_wait would return at once, 0 if not */
int LT_fence(void);             /* all this thread has started has ended; first error of those without a ticket */

int LT_fetch_add(LT_handle handle, uint64_t offset, uint64_t addend, uint64_t *before);
int LT_test_set(LT_handle handle, uint64_t offset, uint64_t expected, uint64_t set, uint64_t *before);

int LT_memset(LT_handle handle, uint64_t offset, int byte, uint64_t length);
int LT_memcpy(LT_handle target, uint64_t to, LT_handle source, uint64_t from, uint64_t length);
int LT_memmove(LT_handle target, uint64_t to, LT_handle source, uint64_t from, uint64_t length);

void *LT_buffer(size_t size);    /* registered memory: reads into and writes from it copy nothing; NULL: see LT_error */
int LT_buffer_free(void *buffer);

/* Messages. Ports are 0 to 63. */
int LT_regRPC(int port, size_t max_message);
int LT_unregRPC(int port);
int LT_RPC(int node, int port, const void *data, size_t length, void *reply, size_t max_reply, size_t *reply_length,
           unsigned timeout_ms); /* reply_length may be NULL */
int LT_recvRPC(int port, void *data, size_t size, struct LT_message *message, unsigned timeout_ms);
int LT_replyRPC(uint64_t descriptor, const void *data, size_t length);
int LT_reply_recvRPC(uint64_t descriptor, const void *reply, size_t length, int port, void *data, size_t size,
                     struct LT_message *message, unsigned timeout_ms);
int LT_send(int node, int port, const void *data, size_t length);
/* Call `count` nodes at once. replies[i] has room for max_reply bytes and gets lengths[i]; results[i] is 0 or an error.
 * Returns the first error of results. */
int LT_multicast(int count, const int *nodes, int port, const void *data, size_t length, void *const *replies,
                 size_t max_reply, size_t *lengths, int *results, unsigned timeout_ms);

/* Synchronisation */
int LT_createlock(const char *name, const char *home); /* does nothing if it is there; home NULL: this node */
int LT_lock(const char *name, unsigned timeout_ms);
int LT_unlock(const char *name);
int LT_barrier(const char *name, unsigned count, unsigned timeout_ms);

#ifdef __cplusplus
}
#endif

#endif
