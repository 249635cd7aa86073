/* `split checkpoint`: make an image of a running program and end it; its remote memory stays where it is. */
#ifndef RACKLESS_FREEZE_H
#define RACKLESS_FREEZE_H

#include "image.h"
#include "tracee.h"

/* Returns the command's exit code. */
int checkpoint(const char *id);

/* refuse.c: what is noted of a stopped program from /proc; false, and tracee_why: it cannot be checkpointed. */
bool refuse_process(pid_t pid, struct loaded *all);
bool refuse_files(pid_t pid, pid_t split, struct loaded *all, const int32_t *own, size_t n_own);

#endif
