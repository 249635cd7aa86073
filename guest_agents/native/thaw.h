/* `split restart`: a new process that is what the one was of which an image was made. */
#ifndef RACKLESS_THAW_H
#define RACKLESS_THAW_H

#include "image.h"

struct thaw {
    struct loaded all;
    FILE *in;                   /* where its pages follow */
    char path[PATH_MAX], taken[PATH_MAX];
};

/* Take the checkpoint `name`: nobody else can have it then; others can again if this process exits before thaw_finish.
 * Does not return if it is not there or does not fit. */
void thaw_take(struct thaw *t, const char *name);

/* There is no need for it any more. */
void thaw_finish(const struct thaw *t);

/* A child of this process, with this number; -1 and errno EEXIST: it is another's. Only root can have that. */
pid_t fork_as(pid_t number);

/* A child with a number that no process of another blade is likely to have, if that is possible: so that it can have it
 * there, too. */
pid_t fork_apart(void);

/* In the child: files, directory, signals; then it waits for its parent to make the rest. */
_Noreturn void thaw_become(const struct thaw *t);

/* In the parent: the rest, and let it go on. False after one line on standard error: the child is dead. */
bool thaw_make(struct thaw *t, pid_t pid);

/* List checkpoints; forget one, which nobody will restart. Exit codes. */
int thaw_list(void);
int thaw_discard(const char *name);

#endif
