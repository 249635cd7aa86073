/* The preloaded library: a program's malloc and anonymous mmap, on memory that a pager can manage. */
#ifndef RACKLESS_SHIM_H
#define RACKLESS_SHIM_H

#include "heap.h"

/* The heap a call of this thread allocates from: the program's, or a private one for the pager's own needs. */
struct heap *shim_heap(void);

/* The heap a block belongs to; NULL if it is none of ours. */
struct heap *shim_owner(const void *block);

/* The program's heap if `address` lies in it and it exists, else NULL. */
struct heap *shim_managed(const void *address);

/* Keep a descriptor of the pager open whatever the program closes; close one that was kept. */
void shim_guard(int file);
void shim_close(int file);

/* True while this thread must not use managed memory. */
bool shim_is_local(void);

#endif
