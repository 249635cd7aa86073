/* Counters of one program, a file <job>/<pid>.counters that outlives it; the process monitor adds them up.
 * Read in Python by guest_agents/splitkernel/process/counters.py: same order, all little-endian u64. */
#ifndef RACKLESS_COUNTERS_H
#define RACKLESS_COUNTERS_H

#include <stdint.h>

enum { COUNTERS_MAGIC = 0x31544e43, COUNTERS_BLADES = 16, COUNTERS_NAME = 32, COUNTERS_COMMAND = 16 };

struct blade_counters {
    char name[COUNTERS_NAME];
    uint64_t misses, flushes, bytes_in, bytes_out;
    uint64_t reads, writes;     /* work requests posted */
    uint64_t piggybacks;
    uint64_t replica_writes;    /* of the flushes, those that were second copies */
};

struct counters {
    uint64_t magic;
    uint64_t excache_bytes;
    uint64_t managed;           /* 1 once the program has outgrown its ExCache */
    uint64_t faults;            /* missing-page faults; hits raise none, and are seen by nobody */
    uint64_t pages_held;        /* with contents, wherever they are; this one and the next two: now */
    uint64_t pages_mapped;
    uint64_t pages_pooled;      /* the pool's share of the ExCache */
    uint64_t replica_requests;  /* of the writes, those that carried second copies */
    uint64_t misses;            /* faults that a memory blade had to answer */
    uint64_t flushes;           /* dirty pages written to a memory blade */
    uint64_t zero_fills;        /* pages given as zeros, without asking anyone */
    uint64_t piggybacks;        /* misses whose READ was posted together with flushes to the same blade */
    uint64_t evictions;         /* pages taken out of the program's sight */
    uint64_t buffer_hits;       /* faults answered by the line buffer (the victim cache) */
    uint64_t write_faults;      /* first writes to clean pages */
    uint64_t reads, writes;     /* work requests posted */
    uint64_t zero_drops;        /* evicted pages that were all zeros and never needed a blade */
    uint64_t bytes_in, bytes_out;
    uint64_t pages_touched;     /* peak of pages with contents: the working set */
    uint64_t forks;
    uint64_t regions;           /* vRegions asked for */
    uint64_t regions_returned;  /* of these, those that went back before the end */
    uint64_t wait_nanoseconds;  /* spent waiting for misses' READs */
    uint64_t busy_nanoseconds;  /* spent answering faults, waiting included */
    uint64_t miss_nanoseconds;  /* of these, spent on misses: */
    uint64_t read_nanoseconds;  /*     from posting a READ to its answer, whatever is done meanwhile, */
    uint64_t install_nanoseconds; /*   and giving the pages to the program */
    uint64_t packed;            /* pages packed into the pool */
    uint64_t packed_bytes;      /* to so many bytes */
    uint64_t packed_hits;       /* faults answered by unpacking */
    uint64_t spills;            /* pages that left the pool for their memory blades */
    uint64_t pool_bytes;        /* peak of what the pool held of the ExCache */
    uint64_t replica_writes;    /* flushed pages that went to a second memory blade too */
    uint64_t failovers;         /* memory blades lost, and the program went on */
    uint64_t rereplicated_bytes;/* copied to give regions two copies again */
    uint64_t degraded_regions;  /* vRegions that have one copy now, and should have two (or: on a blade that is drained) */
    uint64_t prefetched;        /* pages that came with a miss, unasked */
    uint64_t sets;              /* of lines; 1: fully associative */
    uint64_t dozes;             /* lines put out of sight, to see whether they are used (policy LRU) */
    uint64_t doze_hits;         /* ... and they were */
    uint64_t evicted_ahead;     /* of the evictions, those while nobody waited for a line */
    uint64_t overlaps;          /* READs posted for one thread's fault while another's was waited for */
    uint64_t blades;
    struct blade_counters blade[COUNTERS_BLADES];
    char command[COUNTERS_COMMAND];
};

#endif
