/* What a pager needs of the blade that it runs on: at its start, and again when its program goes on on another blade. */
#ifndef RACKLESS_ATTACH_H
#define RACKLESS_ATTACH_H

#include "lines.h"

enum { ATTACH_OWN = 7 };

/* The counters, in a file of the job; zeros, but for what is known at once. NULL: no memory. */
struct counters *attach_counters(const char *job, size_t excache_pages);

/* The shared file with regions' places, empty, and the RDMA device with the registered buffer. NULL, or why not. */
const char *attach_device(struct lines *l);

/* Queue pairs to the memory blades that the process monitor has named. NULL, or why there are too few for `copies`. */
const char *attach_blades(struct lines *l, uint32_t copies);

/* Have the arena watched: NULL, or why that cannot be. */
const char *attach_faults(const struct arena *arena, int *uffd);

/* The descriptors that are the pager's own. */
void attach_own(const struct lines *l, int uffd, int own[ATTACH_OWN]);
void attach_guard(const struct lines *l, int uffd, void (*guard)(int file));

#endif
