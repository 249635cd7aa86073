/* A thread that sees to a mapped dataset when the service of this blade has gone; for libhotpot and for Python, where a
 * thread that faults holds the interpreter lock (guest_agents/hotpot/watch.py). */
#ifndef RACKLESS_HOTPOT_WATCH_H
#define RACKLESS_HOTPOT_WATCH_H

#include <stdint.h>

struct watch;

/* Begin. `service` is the connection, `faults` the mapping's userfaultfd, which must stay open until the end; `name` is
 * for messages. NULL: see errno. */
struct watch *hotpot_watch(int service, int faults, void *memory, uint64_t size, const char *name);

/* End, before the dataset is unmapped; in a forked child, which has no such thread, too. */
void hotpot_unwatch(struct watch *watch);

#endif
