/* Forked children that have not yet called exec: their faults are served by their parent's pager ("parent" is here the
 * program that pages, also to children of its children).
 *
 * A child inherits the parent's mapped pages by copy-on-write. What was in the line buffer or at a memory blade
 * when it was forked, it *needs*: such a page is given to it when it touches it, or when the parent fetches it back
 * (before the parent can change it), or at the latest when the parent drops it or ends. So the copy at the memory
 * blade is never overwritten while a child depends on it. A child's own memory is not evicted.
 *
 * A parent that is killed gives nothing any more. So the process monitor has, for each child, its userfaultfd and a
 * shared file that says what it needs (struct heir), and one that says where regions are: when the parent has gone it
 * reads those pages from their blades and gives them (splitkernel/process/heirs.py). For that they must be there:
 * shortly after a fork everything that is not mapped is stored at its blade (family_settle). In the moments before,
 * what a child of a parent that is killed still needs is lost, and ends it with SIGBUS when it is touched.
 *
 * Most children call exec at once (popen, system): a socket that exec closes tells the pager to forget them.
 */
#ifndef RACKLESS_FAMILY_H
#define RACKLESS_FAMILY_H

#include "lines.h"

#include <poll.h>

enum { FAMILY_CHILDREN = 32 };

/* A child as the process monitor sees it. */
struct heir {
    uint64_t settled;           /* 1: all that it needs is at memory blades */
    uint64_t base, pages;       /* the arena */
    uint64_t words;
    uint64_t needs[];           /* bit per page */
};

struct child {
    uint32_t number;            /* as the process monitor knows it */
    int uffd;                   /* -1: gone, to be removed by family_bury */
    int channel;                /* -1, or a socket whose other end closes when the child calls exec or ends */
    struct heir *heir;
    uint64_t *needs;            /* in it */
    size_t words;
};

struct family {
    struct lines *lines;
    void (*guard)(int file);    /* of pager_config */
    void (*close)(int file);
    struct child child[FAMILY_CHILDREN];
    size_t count;
    uint32_t numbers;
    uint64_t settle_at;         /* milliseconds on the monotonic clock; 0: all are settled */
    int channel[2];             /* for the fork under way: parent's end, child's end */
    bool forking, taken;
    int lifeline;               /* in a child: its own userfaultfd, so that it never reads zeros for lost pages */
};

/* In the pager thread, under its lock. */
void family_add(struct family *f, struct child *parent, int uffd);
struct child *family_find(struct family *f, int uffd);
void family_fault(struct family *f, struct child *child, size_t page, bool protected);
void family_supply(struct family *f, size_t page, const char *data);
void family_before_drop(struct family *f, size_t page, size_t count);
void family_complete_all(struct family *f);
void family_bury(struct family *f);
/* Store what children need, in case their parent is killed, once it is due. Returns in how many milliseconds that is;
 * -1: it is done. */
int family_settle(struct family *f);
/* This process ends without giving its children what they need: they end too, rather than wait for it for ever. (Their
 * children are the process monitor's, or get SIGBUS where their memory is lost.) */
void family_kill(struct family *f);
nfds_t family_watch(struct family *f, struct pollfd *watch);
void family_check(struct family *f, const struct pollfd *watch, nfds_t n);

/* Around fork, in the forking thread. */
void family_before_fork(struct family *f);
void family_after_fork_parent(struct family *f);
void family_after_fork_child(struct family *f);

#endif
