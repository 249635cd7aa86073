/* What leaves the program's sight: the pages that sets.h chooses, packed into the pool or, when that does not pay, into the line
 * buffer; and from either, when they are full, to the memory blades.
 *
 * How much of the ExCache the pool may hold follows from what a little more would have spared: of unpackings, if there
 * were more plain pages, or of READs, if there were more packed ones (the idea of ARC, FAST 2003).
 */
#ifndef RACKLESS_EVICT_H
#define RACKLESS_EVICT_H

#include "lines.h"

/* The share of the pool to begin with, once l->budget is known. */
void evict_init(struct lines *l);

/* Evict until there is a line for each of these pages. Any page that is PACKED or BUFFERED may have moved afterwards. */
void evict_make_room(struct lines *l, size_t page, size_t count);

/* Evict some pages ahead of need, if fewer lines are free than the longest run needs, without waiting for anybody;
 * false if there is nothing to do (now). For times when nobody waits for a line: while a READ is on its way, and when
 * no fault is to be answered. In sets, lines leave only when their own set is full. */
bool evict_ahead(struct lines *l);

/* A page that is MAPPED or DOZING needs its line no more. */
void evict_release_line(struct lines *l, size_t page);

/* A slot of the line buffer is no longer needed for its page. */
void evict_release_slot(struct lines *l, size_t index);

/* Have the memory blades confirm the contents of every page that is not mapped. To be called when no fault is being
 * answered. */
void evict_store_all(struct lines *l);

/* Evict everything and have the memory blades confirm it: every page is REMOTE or UNTOUCHED then. To be called when no
 * thread of the program runs. */
void evict_all(struct lines *l);

/* Note what a fault for this page costs: a READ, or only an unpacking. To be called before it leaves where it is. */
void evict_weigh_read(struct lines *l, size_t page);
void evict_weigh_unpacking(struct lines *l, size_t page);

#endif
