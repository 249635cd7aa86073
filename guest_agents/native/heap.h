/* A malloc over an arena: size classes in spans of one page (larger classes: four), bigger blocks in runs of pages.
 *
 * Spans are small so that blocks of different sizes that are allocated one after the other lie close together: a
 * program that uses them together then finds them in neighbouring pages, and one READ brings several.
 * No header, no free list inside the blocks: `free` touches bookkeeping only, so that freeing memory which lives on
 * a memory blade costs no round trip. One lock per heap; fork takes it (heap_lock, heap_unlock).
 */
#ifndef RACKLESS_HEAP_H
#define RACKLESS_HEAP_H

#include "arena.h"

#include <pthread.h>

enum {
    LARGE_SPAN_PAGES = 4,
    SMALLEST_BLOCK = 16,
    LARGEST_IN_PAGE = 1024, /* classes up to this have spans of one page */
    LARGEST_SMALL = 8192,
    CLASSES = 32,
};

struct span {
    uint32_t next, prev;    /* first pages + 1 in the class's list of spans with room; 0 ends it */
    uint16_t class_index;
    uint16_t free;          /* free blocks */
    uint16_t blocks;
    uint64_t room[PAGE_SIZE / SMALLEST_BLOCK / 64]; /* bit: block is free */
};

struct heap {
    pthread_mutex_t lock;
    struct arena arena;
    struct span *spans;             /* by first page */
    uint32_t with_room[CLASSES];
};

/* Make a heap over `pages` pages of address space; heap->arena.grow and .drop must be set. 0, or an errno. */
int heap_init(struct heap *heap, size_t pages);

/* As malloc, aligned to `align` (a power of two; 16 at least is given). NULL and errno on failure. */
void *heap_take(struct heap *heap, size_t bytes, size_t align, bool zeroed);
void heap_give(struct heap *heap, void *block);

/* Bytes usable in a block. */
size_t heap_size(const struct heap *heap, const void *block);

/* Resize without moving: true if the block now holds `bytes` bytes. */
bool heap_resize_in_place(struct heap *heap, void *block, size_t bytes);

#endif
