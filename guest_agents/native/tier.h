/* The second tier: programs whose memory no library of ours can have are put into a control group that swaps to memory
 * blades (splitkernel/process/swap.py). */
#ifndef RACKLESS_TIER_H
#define RACKLESS_TIER_H

#include <stdbool.h>

/* Whether the program at `path`, or the interpreter that its first line names, is linked statically. */
bool tier_is_static(const char *path);

/* Put this process into the group of its job. Ends it, with the reason, if that cannot be. */
void tier_enter(const char *job);

/* A killed program's exit code: INTERNAL, after one line that says why, if it was ended for want of memory. */
int tier_verdict(int monitor, const char *job, int status);

#endif
