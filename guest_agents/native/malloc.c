/* The malloc family, as glibc lets a preloaded library replace it (glibc manual, "Replacing malloc"). */
#define _GNU_SOURCE
#include "shim.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

static bool power_of_two(size_t n)
{
    return n && !(n & (n - 1));
}

void *malloc(size_t bytes)
{
    return heap_take(shim_heap(), bytes, SMALLEST_BLOCK, false);
}

void free(void *block)
{
    struct heap *owner = block ? shim_owner(block) : NULL;
    if (!owner)
        return; /* NULL, or from the dynamic loader's own allocator before ours was in place */
    int kept = errno; /* free must not change errno (POSIX 2024) */
    heap_give(owner, block);
    errno = kept;
}

void *calloc(size_t count, size_t size)
{
    size_t bytes;
    if (__builtin_mul_overflow(count, size, &bytes)) {
        errno = ENOMEM;
        return NULL;
    }
    return heap_take(shim_heap(), bytes, SMALLEST_BLOCK, true);
}

void *realloc(void *block, size_t bytes)
{
    if (!block)
        return malloc(bytes);
    if (!bytes) {
        free(block);
        return NULL;
    }
    struct heap *owner = shim_owner(block);
    if (owner && heap_resize_in_place(owner, block, bytes))
        return block;
    void *moved = malloc(bytes);
    if (!moved || !owner)
        return moved;
    size_t old = heap_size(owner, block);
    memcpy(moved, block, old < bytes ? old : bytes);
    free(block);
    return moved;
}

void *reallocarray(void *block, size_t count, size_t size)
{
    size_t bytes;
    if (__builtin_mul_overflow(count, size, &bytes)) {
        errno = ENOMEM;
        return NULL;
    }
    return realloc(block, bytes);
}

int posix_memalign(void **result, size_t align, size_t bytes)
{
    if (!power_of_two(align) || align % sizeof(void *))
        return EINVAL;
    int kept = errno;
    void *block = heap_take(shim_heap(), bytes, align < SMALLEST_BLOCK ? SMALLEST_BLOCK : align, false);
    errno = kept;
    if (!block)
        return ENOMEM;
    *result = block;
    return 0;
}

void *aligned_alloc(size_t align, size_t bytes)
{
    if (!power_of_two(align)) {
        errno = EINVAL;
        return NULL;
    }
    return heap_take(shim_heap(), bytes, align < SMALLEST_BLOCK ? SMALLEST_BLOCK : align, false);
}

void *memalign(size_t align, size_t bytes)
{
    return aligned_alloc(align, bytes);
}

void *valloc(size_t bytes)
{
    return aligned_alloc(PAGE_SIZE, bytes);
}

void *pvalloc(size_t bytes)
{
    return aligned_alloc(PAGE_SIZE, (bytes + PAGE_SIZE - 1) & ~(size_t)(PAGE_SIZE - 1));
}

size_t malloc_usable_size(void *block)
{
    struct heap *owner = block ? shim_owner(block) : NULL;
    return owner ? heap_size(owner, block) : 0;
}

int malloc_trim(size_t pad)
{
    (void)pad;
    return 0;
}
