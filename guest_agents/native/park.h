/* How a pager takes part in a checkpoint of its program, and in its restart on another blade.
 *
 * The conversation is between the pager's thread and whoever traces the program (freeze.c, thaw.c), while no other
 * thread of it runs. The tracer lets the pager's poll return PARK_POLLED; the pager evicts everything, and says what it
 * has done by a system call that does not exist, prctl(PARK_CALL, said, &report), whose result the tracer sets. A tracer
 * that dies leaves the kernel's answer, EINVAL, and the program goes on where it is: the pager has given nothing up.
 *
 * The image of the program is made at that point, without what belongs to the blade: RDMA, userfaultfd, sockets, the
 * file with regions' places, counters. A process that is made of the image is told so, and gets them anew there. What is
 * at memory blades stays where it is: the process monitor has it kept under the checkpoint's name (`keep`), which makes
 * it the one's who `claim`s it.
 */
#ifndef RACKLESS_PARK_H
#define RACKLESS_PARK_H

#include <stdbool.h>
#include <stdint.h>

enum { PARK_POLLED = 0x70726b, PARK_CALL = 0x726b7061, PARK_NAME = 64, PARK_OWN = 7 };

enum park_said {
    PARK_BUSY = 1,              /* not now, or not at all: report.error */
    PARK_PARKED,                /* nothing is in the ExCache any more */
    PARK_KEPT,                  /* its remote memory will outlive this process */
    PARK_RESUMED,               /* it pages again, in a new process */
    PARK_FAILED,                /* what was asked for could not be done: report.error */
};

enum park_told {
    PARK_GO_ON = 1,             /* this process goes on */
    PARK_KEEP,                  /* have the memory kept; this process will be killed */
    PARK_RESTORED,              /* this is a new process, and report.name that of its checkpoint */
};

struct park_report {
    char name[PARK_NAME];       /* of the checkpoint; the tracer writes it */
    char error[256];
    int32_t own[PARK_OWN];      /* the pager's descriptors */
    uint32_t again;             /* with PARK_BUSY: it may be different in a moment */
    uint64_t remote_pages;      /* that stay at memory blades */
};

#ifdef RACKLESS_PAGER_H
struct lines;

/* In the pager's thread, without its lock, when poll has returned PARK_POLLED. */
void park(struct lines *l, pthread_mutex_t *lock, bool children, const struct pager_config *config);
#endif

#endif
