/* The pager: what the shim loads once a program outgrows its ExCache.
 *
 * excache_shim.so is preloaded into every program and is light: it only gives out memory. excache_pager.so brings
 * userfaultfd and verbs, and is loaded the first time a program's heap would exceed its ExCache. Until then every
 * page is local, and a hit costs nothing (legoos.md 1.3: "a hit is an ordinary PTE hit").
 */
#ifndef RACKLESS_PAGER_H
#define RACKLESS_PAGER_H

#include "arena.h"
#include "organisation.h"

struct pager_config {
    size_t excache_pages;
    struct organisation organisation;
    uint32_t copies;                /* of every page, on as many memory blades: 1 or 2 */
    const char *job;                /* directory for the counters of this program */
    void (*enter_thread)(void);     /* to be called first in a thread that must not use managed memory */
    void (*guard)(int file);        /* keep a descriptor open whatever the program closes */
    void (*close)(int file);        /* close a guarded descriptor */
};

struct pager {
    /* Reserve remote memory for pages [0, top): 0, or an errno. Raises arena->reserved. */
    int (*reserve)(struct arena *arena, size_t top);
    /* The opposite: pages from `reserved` on have no contents, whatever there was, and need no remote memory. */
    void (*give_back)(struct arena *arena, size_t reserved);
    /* The program no longer needs the contents of these pages. */
    void (*drop)(struct arena *arena, size_t page, size_t count);
    /* Returns when no eviction that began before is under way. */
    void (*settle)(void);
    /* Around fork and taking the heaps' locks for it: in between, the pager asks for no memory. */
    void (*hush)(bool on);
    /* Around fork: `before` in the parent, then one of the others. The child's pages are served by its parent. */
    void (*before_fork)(void);
    void (*after_fork_parent)(void);
    void (*after_fork_child)(void);
    /* Give forked children all they still depend on; called when the process is about to end. */
    void (*before_exit)(void);
};

/* Start paging `arena`; returns NULL after writing one line to standard error if that is impossible. */
const struct pager *pager_start(struct arena *arena, const struct pager_config *config);

#endif
