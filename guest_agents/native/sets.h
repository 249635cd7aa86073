/* The lines of the ExCache: which pages have one, in which set, and which of a set is to leave first.
 *
 * Virtually indexed: a page's set follows from its address alone, page number modulo sets, so neighbours are in
 * different sets. One set that has all lines is a fully associative ExCache.
 *
 * FIFO and random need to know nothing of a line's use, and the kernel tells us nothing: a hit is an ordinary access,
 * and accessed bits cannot be read without root or a kernel option. So LRU *samples*: the oldest quarter of a set's
 * lines *doze*. They keep their line, but are out of the page table (lines.h: DOZING), and one that is used again
 * faults, without any network, and is the newest again. What leaves is what has been dozing longest: not used since.
 * First writes to clean lines fault anyway, and count as uses too.
 */
#ifndef RACKLESS_SETS_H
#define RACKLESS_SETS_H

#include "organisation.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Lines are numbered from 1; 0 is none. */
struct line {
    uint32_t page;
    uint32_t older, newer;
    bool taken, dozing;
};

struct set {
    uint32_t oldest, newest;
    uint32_t awake;             /* the oldest that does not doze; all that are older do */
    uint32_t free;              /* a list by `newer` of lines that were given back */
    uint32_t begun;             /* lines that were taken at least once */
    uint32_t count, dozing;
};

struct sets {
    enum policy policy;
    size_t count, ways;
    struct set *set;
    struct line *line;
    uint32_t *where;            /* by page: its line */
    uint64_t random;
};

/* 0, or a negative errno. */
int sets_init(struct sets *s, size_t count, size_t ways, enum policy policy, uint32_t *where);

/* Give a page a line, as the newest of its set; false if the set is full. Take the line away again. */
bool sets_add(struct sets *s, size_t page);
void sets_remove(struct sets *s, size_t page);

/* It has been used: awake, and the newest. */
void sets_renew(struct sets *s, size_t page);

/* The page that the policy wants to leave, of a set that is not empty; and the oldest. */
size_t sets_choose(struct sets *s, size_t set);
size_t sets_oldest(const struct sets *s, size_t set);

/* LRU: the next page that should doze, if any; it dozes from now on. */
bool sets_next_to_doze(struct sets *s, size_t set, size_t *page);

static inline size_t sets_of(const struct sets *s, size_t page)
{
    return page % s->count;
}

#endif
