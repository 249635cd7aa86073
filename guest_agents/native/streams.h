/* Sequential faults, told from random ones: how many pages a fault should bring, and in which direction.
 *
 * Several streams may be under way at once, up and down, with random faults between them (a merge reads two arrays and
 * writes a third, and compares what they point to). A fault next to one of the last RECENT_FAULTS begins a stream; one
 * where a stream was expected, or a little further, because pages in between were there already, goes on with it and
 * brings twice as many pages as the last one.
 */
#ifndef RACKLESS_STREAMS_H
#define RACKLESS_STREAMS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { RECENT_FAULTS = 64, STREAMS = 16 };

struct stream {
    uint32_t next;              /* the page expected, counted from 1; 0: no stream */
    uint32_t run;               /* pages brought last */
    uint32_t used;
    bool down;
};

struct streams {
    uint32_t recent[RECENT_FAULTS];     /* pages, counted from 1, that belong to no stream */
    uint32_t faults;
    struct stream stream[STREAMS];
    struct stream *last;        /* that of the last fault, or NULL */
};

/* A fault at this page: how many pages to bring (1 to `most`), from it on upwards or, if `*down`, downwards. */
size_t streams_fault(struct streams *s, size_t page, size_t most, bool *down);

/* So many were brought for that fault. */
void streams_brought(struct streams *s, size_t page, size_t run);

#endif
