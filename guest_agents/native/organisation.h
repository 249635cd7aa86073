/* How an ExCache is organised: the choices of `split run` (LegoOS has them as build options: legoos.md, 1.3). */
#ifndef RACKLESS_ORGANISATION_H
#define RACKLESS_ORGANISATION_H

#include <stdbool.h>
#include <stdint.h>

/* Which line of a set leaves first. */
enum policy {
    POLICY_FIFO,
    POLICY_LRU,                 /* as far as uses can be seen: sets.h */
    POLICY_RANDOM,
};

struct organisation {
    uint32_t ways;              /* lines of a set; 0: one set has all lines */
    enum policy policy;
    uint32_t victim;            /* lines of the line buffer, which evicted lines pass through; 0: a thirty-second of all */
    uint32_t prefetch;          /* most pages of a READ; 0: as many as pay */
    bool unpacked;              /* no pool of packed pages */
};

#endif
