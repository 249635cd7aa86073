/* Hotpot for C programs on a blade of a Rackless rack: link with -lhotpot. docs/hotpot.md explains it.
 *
 * A dataset is memory at the same address in every program of the rack: load and store, and commit ranges of it. Every
 * function returns 0 or one of the errors below; HP_error() then has the words. All may be called from any thread;
 * threads wait for each other's requests. After fork() a child has no datasets, and has to HP_connect() anew.
 */
#ifndef RACKLESS_HOTPOT_H
#define RACKLESS_HOTPOT_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum {
    HP_RETRY = 1,               /* others were first, nothing took place: begin again with what is there now */
    HP_ERR_SERVICE = -1,        /* the service refuses; HP_error_name() says which of Hotpot's errors it is */
    HP_ERR_NOT_CONNECTED = -2,  /* no HP_connect() in this process, or the service has gone */
    HP_ERR_SYSTEM = -3,         /* a system call failed */
    HP_ERR_ARGUMENT = -4,       /* too many ranges, or too long a name */
};

enum { HP_MOST_RANGES = 1024 };

/* An open dataset. */
struct HP_dataset {
    char *memory;    /* the same address in every program */
    uint64_t size;   /* bytes */
    uint64_t number; /* the rest is the library's */
    int faults;
    struct watch *watch;
};

/* Bytes of a dataset. */
struct HP_range {
    uint64_t offset, length;
};

typedef uint64_t HP_transaction;

int HP_connect(void);    /* this process joins; must be called first */
int HP_disconnect(void); /* transactions are aborted; close datasets first, as they hold the connection */

int HP_create(const char *name, uint64_t size, const char *mode); /* mode: "mrmw", "mrsw", or NULL for the first */
int HP_open(const char *name, struct HP_dataset *dataset);
int HP_close(struct HP_dataset *dataset); /* what no program of this blade has committed is gone after the last */
int HP_delete(const char *name);

/* A transaction: acquire ranges, load and store there, then commit (or abort, which takes back the stores). After a
 * commit it has ended, whatever that returned. HP_RETRY from HP_acquire: abort, and begin again. */
int HP_begin(const struct HP_dataset *dataset, HP_transaction *transaction);
int HP_acquire(HP_transaction transaction, const struct HP_range *ranges, unsigned count);
int HP_commit(HP_transaction transaction, unsigned replicas); /* replicas: nodes that have it on their media, or more */
int HP_abort(HP_transaction transaction);

/* Commit stores that were made without a transaction; HP_RETRY: they are still there. */
int HP_commit_ranges(const struct HP_dataset *dataset, const struct HP_range *ranges, unsigned count,
                     unsigned replicas);

const char *HP_error(void);      /* what went wrong last in this thread, in words */
const char *HP_error_name(void); /* and which of Hotpot's errors it was, such as "NoSuchDataset"; "" if none */

#ifdef __cplusplus
}
#endif

#endif
