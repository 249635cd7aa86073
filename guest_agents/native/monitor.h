/* The program's side of its conversation with the process monitor (splitkernel/process/desk.py documents it). */
#ifndef RACKLESS_MONITOR_H
#define RACKLESS_MONITOR_H

#include "counters.h"
#include "fabric.h"

#include <pthread.h>

#define MONITOR_SOCKET "/run/rackless/split.sock"

enum { COPIES = 2, NO_LINK = UINT32_MAX };

struct place {
    uint32_t link;              /* index of the memory blade; NO_LINK: no such place */
    uint32_t rkey;
    uint64_t address;           /* at the memory blade */
};

struct region {
    struct place at[COPIES];    /* READs go to the first, flushes to both */
    uint32_t copied;            /* pages that the second has as the first has them; flushed ones it has anyway */
};

struct monitor {
    int socket;
    int news;                   /* says which memory blades come and go; non-blocking; -1: not connected */
    pthread_mutex_t lock;       /* one request at a time; `news` is read under the pager's lock */
    uint32_t blades;
    char name[COUNTERS_BLADES][COUNTERS_NAME];
    char error[256];            /* why the last call failed: one line */
};

/* Those that can fail return 0, or an errno with monitor->error set. */
int monitor_attach(struct monitor *m, const char *job);
void monitor_leave(struct monitor *m);
int monitor_connect(struct monitor *m, uint32_t blade, struct fabric *f, struct fabric_link *link);
int monitor_release(struct monitor *m, uint32_t blade);

/* Places for `copies` copies of a region, on as many blades and none of those in the bit set `without`: all or none.
 * ENOMEM if there is no room for them. */
int monitor_region(struct monitor *m, uint64_t bytes, uint32_t copies, uint32_t without, struct place place[COPIES]);

/* The places of a region are not needed any more, and nothing is under way to them. No answer comes. */
void monitor_return(struct monitor *m, const struct region *region);

/* What the memory blades lent this program stays when it ends here, under a name; and is another process's, on whatever
 * blade, that knows the name and how many places there must be. Both do all or nothing. */
int monitor_keep(struct monitor *m, const char *name, size_t places);
int monitor_claim(struct monitor *m, const char *name, size_t places);

/* The next piece of news: 'l' (blade `*blade` is lost), 'b' (it is back), or 0. */
char monitor_news(struct monitor *m, uint32_t *blade);

#endif
