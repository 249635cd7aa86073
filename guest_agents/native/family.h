/* Forked children that have not yet called exec: their faults are served by their parent's pager.
 *
 * A child inherits the parent's mapped pages by copy-on-write. What was in the line buffer or at a memory blade
 * when it was forked, it *needs*: such a page is given to it when it touches it, or when the parent fetches it back
 * (before the parent can change it), or at the latest when the parent drops it or ends. So the copy at the memory
 * blade is never overwritten while a child depends on it. A child's own memory is not evicted.
 *
 * Most children call exec at once (popen, system): a socket that exec closes tells the pager to forget them.
 */
#ifndef RACKLESS_FAMILY_H
#define RACKLESS_FAMILY_H

#include "lines.h"

#include <poll.h>

enum { FAMILY_CHILDREN = 32 };

struct child {
    int uffd;                   /* -1: gone, to be removed by family_bury */
    int channel;                /* -1, or a socket whose other end closes when the child calls exec or ends */
    uint64_t *needs;            /* bit per page */
    size_t words;
};

struct family {
    struct lines *lines;
    void (*guard)(int file);    /* of pager_config */
    void (*close)(int file);
    struct child child[FAMILY_CHILDREN];
    size_t count;
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
/* This process ends without giving its children what they need: they end too, rather than wait for it for ever. */
void family_kill(struct family *f);
nfds_t family_watch(struct family *f, struct pollfd *watch);
void family_check(struct family *f, const struct pollfd *watch, nfds_t n);

/* Around fork, in the forking thread. */
void family_before_fork(struct family *f);
void family_after_fork_parent(struct family *f);
void family_after_fork_child(struct family *f);

#endif
