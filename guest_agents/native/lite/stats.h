/* What lite_stats() tells; guest_agents/lite/core.py has the same list. */
#ifndef RACKLESS_LITE_STATS_H
#define RACKLESS_LITE_STATS_H

#include <stdint.h>

struct lite_peer_stats {
    uint32_t node, incarnation, state, queue_pairs;
    uint64_t in_flight, waiting, bytes_out, bytes_in;
};

struct lite_stats {
    /* since the start */
    uint64_t reads, writes, atomics, calls, sends, receives, replies, cancels, errors;
    uint64_t bytes_read, bytes_written, bytes_local, messages_in, messages_dropped, bad_requests, bad_messages;
    uint64_t peers_broken, parked, ring_waits, timeouts, polls, sleeps, posts, mails, knocks;
    /* now */
    uint64_t clients, channels, lmrs, handles, buffers, ports, ops, pieces, rings_in, rings_out;
    uint64_t descriptors, slots_used, slots_quarantined, pool_used;
    uint64_t bytes_slabs, bytes_buffers, bytes_pool, bytes_slots, bytes_rings, queue_pairs;
    uint64_t n_peers;
    struct lite_peer_stats peers[64];
};

#endif
