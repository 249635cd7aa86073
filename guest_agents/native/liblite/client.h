/* Inside liblite: a thread's connection, and what data.c and control.c say to each other. */
#ifndef RACKLESS_LITE_CLIENT_H
#define RACKLESS_LITE_CLIENT_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>

#include "../lite/wire.h"
#include "json.h"
#include "lite.h"

enum { REPLY_BYTES = 64 << 10, REGIONS = 64, SLOTS = LITE_WINDOW - 1 };

/* An asynchronous operation. */
struct slot {
    enum { FREE, RUNNING, ENDED } state;
    bool forgotten; /* has no ticket: freed when it ends */
    uint32_t tag;
    int32_t status;
    uint64_t length;
    void *into;
    size_t room;
};

/* What a thread has. */
struct connection {
    int control;
    int data;
    struct lite_mailbox *mailbox; /* NULL: everything goes by `data` */
    uint32_t serial;
    uint8_t priority;
    unsigned running; /* slots in state RUNNING */
    unsigned next;    /* where to look for a free slot */
    int32_t failed;   /* of the first operation without a ticket that failed since the last fence */
    struct slot slots[SLOTS];
    struct connection *newer, **older; /* list of all of this process */
    struct {
        struct lite_reply header;
        char data[LITE_INLINE];
    } packet;
    char answer[REPLY_BYTES];
};

/* Registered memory of this process. */
struct region {
    _Atomic(char *) start; /* NULL: none */
    size_t size;
    uint32_t id;
};
extern struct region lite_regions[REGIONS];
extern atomic_uint lite_regions_used; /* none at or after this one */

extern int lite_own_node;

/* This thread's connection, made at first use; NULL: not joined, or the agent is gone (LT_error says which). */
struct connection *lite_connection(void);

/* Set this thread's LT_error; returns code. */
int lite_fail(int code, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* Send a control request and wait; the reply is in `answer` of this thread's connection. `descriptor`, if not NULL,
 * gets the file that came with it. */
int lite_ask(struct json *request, int *descriptor);

#endif
