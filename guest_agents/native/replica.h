/* Copies of the program's memory: what happens when a memory blade is lost, and how a lost copy is made again.
 *
 * LegoOS (OSDI'18, section 4.5.3) keeps a log at the secondary and a backup file on storage, to save memory. Here the
 * secondary is a mirror: each vRegion has a place on a second blade, a flush counts as done when both blades have
 * confirmed it, and the survivor of a failure can answer READs at once, with nothing to replay.
 *
 * A blade is lost when a request to it fails (Soft-RoCE gives up after some 7 s) or when membership declares it dead.
 * Its queue pair is destroyed, so that nothing can arrive late. Flushes under way count as done when the other blade
 * has them, a READ is repeated there, and regions get a new second place, copied from the first piece by piece.
 *
 * A blade that is to be removed is drained: what has its only place there gets a second one elsewhere, also in a program
 * that wants one copy, and then the blade is given up as if it were lost.
 */
#ifndef RACKLESS_REPLICA_H
#define RACKLESS_REPLICA_H

#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct lines;

struct replica {
    uint32_t copies;            /* that every region should have: 1 or 2 */
    uint32_t release;           /* bit set: a lost blade that the process monitor has yet to be told of */
    uint32_t back;              /* bit set: a lost blade that can be used again */
    uint32_t leaving;           /* bit set: a blade that is drained */
    uint32_t stuck;             /* bit set: what is on this blade found no second place, this time round */
    uint8_t losses[16];         /* how often a blade was lost */
    size_t cursor;              /* region where the search for work goes on */
    pthread_mutex_t quiet;      /* held while a thread forks: the pager must not allocate or free memory then */
    bool told;                  /* the program's user, that it goes on with single copies */
};

/* Places for region number l->regions. 0, or an errno with monitor->error set; ENOMEM: the blades are full. `lock`
 * guards `l`; it is not held while the process monitor is asked. */
int replica_reserve(struct lines *l, pthread_mutex_t *lock);

/* Give the places of all regions but the first `keep` back; no page of them has contents. `lock` as above. */
void replica_give_back(struct lines *l, pthread_mutex_t *lock, size_t keep);

/* A memory blade is lost. Ends the program if it had the only copy of anything. */
void replica_lost(struct lines *l, uint32_t link, const char *why);

/* Take note of what the process monitor says about memory blades. */
void replica_news(struct lines *l);

/* Do a piece of the work that a loss has left. Returns in how many milliseconds to call again, -1: when there is news. */
int replica_step(struct lines *l);

#endif
