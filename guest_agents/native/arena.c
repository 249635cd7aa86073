#include "arena.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

enum {
    LONG_RUN = 32,                   /* pages: returned to the kernel when freed (128 KiB, as glibc does) */
    SPARE_MOST = 16 * VREGION,       /* pages */
    SMALLEST_ARENA = 1 << 14,        /* pages (64 MiB) below which an arena is not worth having */
    BASE_ALIGN = VREGION * PAGE_SIZE, /* bytes: spans (64 KiB) and vRegions start at multiples */
};

/* The system call itself: `mmap` is one of the names the shim interposes. */
static void *raw_mmap(size_t bytes)
{
    long p = syscall(SYS_mmap, NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
                     -1, 0L);
    return p == -1 ? NULL : (void *)p;
}

void *raw_memory(size_t bytes)
{
    return raw_mmap((bytes + PAGE_SIZE - 1) & ~(size_t)(PAGE_SIZE - 1));
}

size_t bits_next_set(const uint64_t *bits, size_t from, size_t to)
{
    while (from < to) {
        uint64_t word = bits[from / 64] >> (from % 64);
        if (word) {
            from += (size_t)__builtin_ctzll(word);
            return from < to ? from : to;
        }
        from = (from / 64 + 1) * 64;
    }
    return to;
}

size_t bits_next_clear(const uint64_t *bits, size_t from, size_t to)
{
    while (from < to) {
        uint64_t word = ~bits[from / 64] >> (from % 64);
        if (word) {
            from += (size_t)__builtin_ctzll(word);
            return from < to ? from : to;
        }
        from = (from / 64 + 1) * 64;
    }
    return to;
}

size_t bits_end(const uint64_t *bits, size_t to)
{
    while (to) {
        size_t word = (to - 1) / 64, n = to - word * 64;
        uint64_t set = bits[word] & (n < 64 ? (1ull << n) - 1 : ~0ull);
        if (set)
            return word * 64 + 64 - (size_t)__builtin_clzll(set);
        to = word * 64;
    }
    return 0;
}

int arena_init(struct arena *arena, size_t pages)
{
    char *range = NULL;
    for (; pages >= SMALLEST_ARENA; pages /= 2) {
        range = raw_mmap((pages << PAGE_SHIFT) + BASE_ALIGN);
        if (range)
            break;
    }
    if (!range)
        return ENOMEM;
    size_t words = pages / 64 * sizeof(uint64_t);
    *arena = (struct arena){
        .base = (char *)(((uintptr_t)range + BASE_ALIGN - 1) & ~(uintptr_t)(BASE_ALIGN - 1)),
        .pages = pages,
        .reserved = pages,
        .spare = VREGION,
        .long_run = LONG_RUN,
        .used = raw_memory(words),
        .stale = raw_memory(words),
        .sealed = raw_memory(words),
        .unreadable = raw_memory(words),
        .use = raw_memory(pages),
        .length = raw_memory(pages * sizeof *arena->length),
        .grow = arena->grow,
        .shrink = arena->shrink,
        .drop = arena->drop,
        .settle = arena->settle,
    };
    bool complete = arena->used && arena->stale && arena->sealed && arena->unreadable && arena->use && arena->length;
    /* A huge page would defeat both the budget and page-wise eviction. */
    madvise(arena->base, pages << PAGE_SHIFT, MADV_NOHUGEPAGE);
    return complete ? 0 : ENOMEM;
}

static size_t find_free(const struct arena *arena, size_t count, size_t align)
{
    size_t at = (arena->lowest_free + align - 1) / align * align;
    while (at + count <= arena->pages) {
        size_t end = at + count < arena->top ? at + count : arena->top;
        size_t taken = at < end ? bits_next_set(arena->used, at, end) : end;
        if (taken >= end)
            return at;
        size_t next = bits_next_clear(arena->used, taken, arena->top);
        at = (next + align - 1) / align * align;
    }
    return NO_PAGE;
}

static bool occupy(struct arena *arena, size_t page, size_t count, enum page_use use, bool zeroed)
{
    size_t end = page + count;
    if (end > arena->reserved) {
        int error = arena->grow(arena, end);
        if (error) {
            errno = error;
            return false;
        }
        if (arena->shrunk && arena->spare < SPARE_MOST)
            arena->spare *= 2; /* it comes and goes */
        arena->shrunk = false;
    }
    size_t sealed = bits_next_set(arena->sealed, page, end);
    if (sealed < end) {
        syscall(SYS_mprotect, arena_address(arena, page), count << PAGE_SHIFT, PROT_READ | PROT_WRITE);
        for (size_t i = sealed; i < end; i++)
            bit_clear(arena->sealed, i);
    }
    for (size_t i = page; i < end; i++) {
        bit_set(arena->used, i);
        arena->use[i] = (uint8_t)use;
    }
    for (size_t from = page; (from = bits_next_set(arena->stale, from, end)) < end;) {
        size_t to = bits_next_clear(arena->stale, from, end);
        if (zeroed)
            arena->drop(arena, from, to - from);
        for (; from < to; from++)
            bit_clear(arena->stale, from);
    }
    arena->in_use += count;
    if (end > arena->top)
        arena->top = end;
    return true;
}

size_t arena_take(struct arena *arena, size_t count, size_t align, enum page_use use, bool zeroed)
{
    size_t page = find_free(arena, count, align);
    if (page == NO_PAGE) {
        errno = ENOMEM;
        return NO_PAGE;
    }
    if (!occupy(arena, page, count, use, zeroed))
        return NO_PAGE;
    if (page <= arena->lowest_free && align == 1)
        arena->lowest_free = page + count;
    arena->length[page] = (uint32_t)count;
    return page;
}

bool arena_extend(struct arena *arena, size_t page, size_t count, size_t more, bool zeroed)
{
    size_t from = page + count, end = from + more;
    if (end > arena->pages || bits_next_set(arena->used, from, end) < end)
        return false;
    if (!occupy(arena, from, more, arena->use[page], zeroed))
        return false;
    arena->length[page] = (uint32_t)(count + more);
    return true;
}

bool arena_claim(struct arena *arena, size_t page, size_t count, enum page_use use)
{
    for (size_t end = page + count; (page = bits_next_clear(arena->used, page, end)) < end;) {
        size_t to = bits_next_set(arena->used, page, end);
        if (!occupy(arena, page, to - page, use, true))
            return false;
        page = to;
    }
    return true;
}

/* Give vRegions past the last page in use back, if that is worth it. */
static void trim(struct arena *arena)
{
    size_t end = bits_end(arena->used, arena->reserved), had = arena->reserved;
    size_t keep = (end + VREGION - 1) / VREGION * VREGION + arena->spare;
    if (keep + arena->spare > had)
        return;
    for (size_t i = keep; i < had; i++) {
        bit_clear(arena->stale, i);
        bit_set(arena->sealed, i);
    }
    /* A later touch is the program's bug: there would be no place for what it writes. */
    syscall(SYS_mprotect, arena_address(arena, keep), (had - keep) << PAGE_SHIFT, PROT_NONE);
    arena->shrink(arena, keep);
    arena->shrunk = true;
}

void arena_give(struct arena *arena, size_t page, size_t count, bool always_drop)
{
    bool drop = always_drop || count >= arena->long_run;
    if (drop)
        arena->drop(arena, page, count);
    for (size_t i = page; i < page + count; i++) {
        bit_clear(arena->used, i);
        arena->use[i] = PAGE_FREE;
        if (!drop)
            bit_set(arena->stale, i);
    }
    arena->in_use -= count;
    if (page < arena->lowest_free)
        arena->lowest_free = page;
    if (arena->shrink)
        trim(arena);
}
