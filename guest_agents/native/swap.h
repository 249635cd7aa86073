/* A block device whose blocks are pages of memory blades, as a server of the NBD protocol (nbd.git, doc/proto.md).
 *
 * For swap: blocks are zero until written, memory is asked for 4 MiB at a time when it is first written to, and what is
 * discarded (the kernel discards what no page uses any more) is used again. One copy: with a memory blade its blocks die.
 */
#ifndef RACKLESS_SWAP_H
#define RACKLESS_SWAP_H

#include "monitor.h"

#include <stdbool.h>
#include <stdint.h>

enum {
    SWAP_BLOCK = 4096,
    SWAP_REQUEST = 128 << 10,   /* most bytes that one request may read or write */
    SWAP_SLOTS = 16,            /* requests under way at a time */
};

struct swap {
    struct monitor monitor;
    struct fabric fabric;
    struct fabric_link link[COUNTERS_BLADES];
    /* A memory blade has died, and blocks with it (`blocks`: how many); or there is no room for a block (`name` NULL). */
    void (*lost)(const char *name, uint64_t blocks);
};

/* Connect to the process monitor and to all memory blades, for a device of `bytes`. NULL, or why not. */
const char *swap_open(struct swap *s, uint64_t bytes);

/* The first block; without a network, because it is read before anything else. */
char *swap_first_block(void);

/* Answer requests that come in at `socket` until its other end says goodbye or closes it. Calls `idle` when one of the
 * descriptors `also` can be read, and goes on while that returns true. */
void swap_serve(struct swap *s, int socket, int also, bool (*idle)(void));

#endif
