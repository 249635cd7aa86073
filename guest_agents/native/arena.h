/* An arena: one contiguous range of anonymous memory, given out in runs of pages.
 *
 * All bookkeeping lives outside the range, so that neither allocating nor freeing ever touches a page that may
 * have to be fetched from a memory blade.
 */
#ifndef RACKLESS_ARENA_H
#define RACKLESS_ARENA_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { PAGE_SHIFT = 12, PAGE_SIZE = 1 << PAGE_SHIFT, VREGION = (4 << 20) / PAGE_SIZE /* pages that are reserved together */ };

#define NO_PAGE ((size_t)-1)

enum page_use {
    PAGE_FREE, PAGE_SPAN, PAGE_LARGE_SPAN, PAGE_LARGE, PAGE_MAPPED,
    PAGE_FOREIGN,           /* the program has mapped something else there: the kernel's, and never free again */
};

struct arena {
    char *base;
    size_t pages;
    size_t top;             /* pages at and above it have never been given out */
    size_t reserved;        /* pages below it may be given out without asking `grow` */
    size_t lowest_free;     /* no page below it is free */
    size_t in_use;          /* pages given out now */
    size_t spare;           /* pages past the last one in use that stay reserved: then growing again costs nothing */
    bool shrunk;            /* since it last grew */
    size_t long_run;        /* runs of so many pages are dropped when given back, shorter ones kept warm */
    uint64_t *used;         /* bit: given out */
    uint64_t *stale;        /* bit: free, but still holds old bytes */
    uint64_t *sealed;       /* bit: unmapped by the program (PROT_NONE) */
    uint64_t *unreadable;   /* bit: the program took away read permission, or it is foreign; must not be evicted */
    uint8_t *use;           /* enum page_use of a page given out */
    uint32_t *length;       /* pages of the run, at its first page (PAGE_LARGE) */

    /* Make pages [0, top) usable: 0, or an errno if there is no memory for them. May raise `reserved`. */
    int (*grow)(struct arena *arena, size_t top);
    /* Give back what is reserved for pages [reserved, ...), which have no contents and cannot be touched: NULL, or lowers
     * `reserved`, to a multiple of VREGION. */
    void (*shrink)(struct arena *arena, size_t reserved);
    /* Forget the contents of a run: it reads as zeros afterwards. */
    void (*drop)(struct arena *arena, size_t page, size_t count);
    /* Returns when nobody is reading pages that have just been marked unreadable. */
    void (*settle)(struct arena *arena);
};

/* Reserve address space for `pages` pages, or as many as the process may have. 0, or an errno. */
int arena_init(struct arena *arena, size_t pages);

/* A run of `count` free pages, its first page number a multiple of `align` plus any offset of the base;
 * NO_PAGE and errno ENOMEM if there is none. Its bytes are unspecified unless `zeroed`. */
size_t arena_take(struct arena *arena, size_t count, size_t align, enum page_use use, bool zeroed);

/* Extend a run in place: true if the `more` pages after page + count were free and are now taken. */
bool arena_extend(struct arena *arena, size_t page, size_t count, size_t more, bool zeroed);

/* Take what is free of [page, page + count): false, and errno, if there is no memory for it. */
bool arena_claim(struct arena *arena, size_t page, size_t count, enum page_use use);

/* Give pages back. Contents are dropped at once if `always_drop` or the run is long. */
void arena_give(struct arena *arena, size_t page, size_t count, bool always_drop);

static inline bool arena_has(const struct arena *arena, const void *p)
{
    return (uintptr_t)p - (uintptr_t)arena->base < arena->pages << PAGE_SHIFT && arena->base;
}

static inline size_t arena_page(const struct arena *arena, const void *p)
{
    return ((uintptr_t)p - (uintptr_t)arena->base) >> PAGE_SHIFT;
}

static inline char *arena_address(const struct arena *arena, size_t page)
{
    return arena->base + (page << PAGE_SHIFT);
}

static inline bool bit_test(const uint64_t *bits, size_t i)
{
    return bits[i / 64] >> (i % 64) & 1;
}

static inline void bit_set(uint64_t *bits, size_t i)
{
    bits[i / 64] |= 1ull << (i % 64);
}

static inline void bit_clear(uint64_t *bits, size_t i)
{
    bits[i / 64] &= ~(1ull << (i % 64));
}

/* First bit in [from, to) that is set (or clear), or `to`. */
size_t bits_next_set(const uint64_t *bits, size_t from, size_t to);
size_t bits_next_clear(const uint64_t *bits, size_t from, size_t to);
/* One past the last bit in [0, to) that is set; 0 if none is. */
size_t bits_end(const uint64_t *bits, size_t to);

/* Zeroed bookkeeping memory straight from the kernel, untouched parts of which cost nothing; NULL on failure. */
void *raw_memory(size_t bytes);

#endif
