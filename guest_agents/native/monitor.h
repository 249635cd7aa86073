/* The program's side of its conversation with the process monitor (splitkernel/process/desk.py documents it). */
#ifndef RACKLESS_MONITOR_H
#define RACKLESS_MONITOR_H

#include "counters.h"
#include "fabric.h"

#define MONITOR_SOCKET "/run/rackless/split.sock"

struct region {
    uint32_t link;              /* index of the memory blade */
    uint32_t rkey;
    uint64_t address;           /* at the memory blade */
};

struct monitor {
    int socket;
    uint32_t blades;
    char name[COUNTERS_BLADES][COUNTERS_NAME];
    char error[256];            /* why the last call failed: one line */
};

/* Each returns 0, or an errno with monitor->error set. */
int monitor_attach(struct monitor *m, const char *job);
int monitor_connect(struct monitor *m, uint32_t blade, struct fabric *f, struct fabric_link *link);
int monitor_region(struct monitor *m, uint64_t bytes, struct region *region);

#endif
