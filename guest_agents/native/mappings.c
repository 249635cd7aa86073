/* Anonymous private mappings, readable and writable, come from the managed arena; all others from the kernel.
 *
 * The C library's own calls (thread stacks, the loader) do not pass here and stay local, as do executable, shared,
 * file-backed and reserved (PROT_NONE) mappings.
 */
#define _GNU_SOURCE
#include "shim.h"

#include <errno.h>
#include <stdarg.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

static void *kernel_mmap(void *address, size_t bytes, int prot, int flags, int file, off_t offset)
{
    return (void *)syscall(SYS_mmap, address, bytes, prot, flags, file, offset);
}

static size_t pages_of(size_t bytes)
{
    return (bytes + PAGE_SIZE - 1) >> PAGE_SHIFT;
}

static void *fail(int error)
{
    errno = error;
    return MAP_FAILED;
}

static bool manageable(int prot, int flags)
{
    int unusual = MAP_FIXED | MAP_FIXED_NOREPLACE | MAP_HUGETLB | MAP_GROWSDOWN | MAP_STACK | MAP_32BIT | MAP_LOCKED;
    return (flags & MAP_ANONYMOUS) && (flags & MAP_TYPE) == MAP_PRIVATE && prot == (PROT_READ | PROT_WRITE) &&
           !(flags & unusual);
}

/* How many pages from `page` on are foreign, or are not, at most up to `end`. */
static size_t run_of(const struct arena *arena, size_t page, size_t end, bool foreign)
{
    size_t n = 0;
    while (page + n < end && (arena->use[page + n] == PAGE_FOREIGN) == foreign)
        n++;
    return n;
}

/* Release [page, page + count): like munmap, of mapped pages only; what lies between them is not ours to free, but for
 * what is foreign. */
static void release(struct heap *heap, size_t page, size_t count)
{
    struct arena *arena = &heap->arena;
    pthread_mutex_lock(&heap->lock);
    for (size_t end = page + count; page < end;) {
        size_t n = run_of(arena, page, end, true);
        if (n) {
            syscall(SYS_munmap, arena_address(arena, page), n << PAGE_SHIFT);
            page += n;
            continue;
        }
        while (page + n < end && bit_test(arena->used, page + n) && arena->use[page + n] == PAGE_MAPPED)
            n++;
        if (n) {
            for (size_t i = page; i < page + n; i++) {
                bit_set(arena->sealed, i);
                bit_set(arena->unreadable, i); /* until they are gone: nor may neighbours bring them back */
            }
            arena_give(arena, page, n, true);
            /* A later touch is the program's bug and must end in SIGSEGV, not in a fresh page. */
            syscall(SYS_mprotect, arena_address(arena, page), n << PAGE_SHIFT, PROT_NONE);
            for (size_t i = page; i < page + n; i++)
                bit_clear(arena->unreadable, i);
        }
        page += n ? n : 1;
    }
    pthread_mutex_unlock(&heap->lock);
}

static void *take(struct heap *heap, size_t bytes)
{
    pthread_mutex_lock(&heap->lock);
    size_t page = arena_take(&heap->arena, pages_of(bytes), 1, PAGE_MAPPED, true);
    pthread_mutex_unlock(&heap->lock);
    return page == NO_PAGE ? fail(ENOMEM) : arena_address(&heap->arena, page);
}

/* MAP_FIXED onto managed pages: anonymous memory is the same pages made zero; anything else takes the pages away
 * from the pager for good, and what is mapped over that later is the kernel's, too. */
static void *map_over(struct heap *heap, void *address, size_t bytes, int prot, int flags, int file, off_t offset)
{
    struct arena *arena = &heap->arena;
    size_t page = arena_page(arena, address), count = pages_of(bytes);
    if ((uintptr_t)address % PAGE_SIZE)
        return fail(EINVAL);
    if ((flags & MAP_FIXED_NOREPLACE) == MAP_FIXED_NOREPLACE)
        return fail(EEXIST);
    if (page + count > arena->pages)
        return fail(ENOMEM);
    pthread_mutex_lock(&heap->lock);
    bool same = (flags & MAP_ANONYMOUS) && (flags & MAP_TYPE) == MAP_PRIVATE &&
                run_of(arena, page, page + count, false) == count;
    if (!arena_claim(arena, page, count, PAGE_MAPPED)) {
        pthread_mutex_unlock(&heap->lock);
        return MAP_FAILED;
    }
    for (size_t i = page; i < page + count; i++) {
        bit_set(arena->unreadable, i); /* before they are dropped, or neighbours might bring them back at once */
        if (!same)
            arena->use[i] = PAGE_FOREIGN;
    }
    arena->drop(arena, page, count);
    bool failed = same && syscall(SYS_mprotect, address, count << PAGE_SHIFT, prot);
    for (size_t i = page; same && !failed && prot & PROT_READ && i < page + count; i++)
        bit_clear(arena->unreadable, i);
    pthread_mutex_unlock(&heap->lock);
    if (same)
        return failed ? MAP_FAILED : address;
    return kernel_mmap(address, bytes, prot, flags, file, offset);
}

void *mmap(void *address, size_t bytes, int prot, int flags, int file, off_t offset)
{
    if (shim_is_local() || !bytes || bytes > PTRDIFF_MAX)
        return kernel_mmap(address, bytes, prot, flags, file, offset);
    if (manageable(prot, flags))
        return take(shim_heap(), bytes);
    struct heap *heap = flags & (MAP_FIXED | MAP_FIXED_NOREPLACE) ? shim_managed(address) : NULL;
    if (heap)
        return map_over(heap, address, bytes, prot, flags, file, offset);
    return kernel_mmap(address, bytes, prot, flags, file, offset);
}

void *mmap64(void *address, size_t bytes, int prot, int flags, int file, off_t offset)
    __attribute__((alias("mmap")));

int munmap(void *address, size_t bytes)
{
    struct heap *heap = shim_managed(address);
    if (!heap)
        return (int)syscall(SYS_munmap, address, bytes);
    if ((uintptr_t)address % PAGE_SIZE || !bytes) {
        errno = EINVAL;
        return -1;
    }
    release(heap, arena_page(&heap->arena, address), pages_of(bytes));
    return 0;
}

void *mremap(void *address, size_t old, size_t new, int flags, ...)
{
    va_list args;
    va_start(args, flags);
    void *target = flags & (MREMAP_FIXED | MREMAP_DONTUNMAP) ? va_arg(args, void *) : NULL;
    va_end(args);
    struct heap *heap = shim_managed(address);
    if (!heap || heap->arena.use[arena_page(&heap->arena, address)] == PAGE_FOREIGN)
        return (void *)syscall(SYS_mremap, address, old, new, flags, target);
    if (!new || (uintptr_t)address % PAGE_SIZE || (flags & ~MREMAP_MAYMOVE))
        return fail(EINVAL);
    size_t page = arena_page(&heap->arena, address), have = pages_of(old), want = pages_of(new);
    if (want <= have) {
        release(heap, page + want, have - want);
        return address;
    }
    pthread_mutex_lock(&heap->lock);
    bool grown = arena_extend(&heap->arena, page, have, want - have, true);
    pthread_mutex_unlock(&heap->lock);
    if (grown)
        return address;
    if (!(flags & MREMAP_MAYMOVE))
        return fail(ENOMEM);
    void *moved = take(heap, new);
    if (moved == MAP_FAILED)
        return moved;
    memcpy(moved, address, old);
    release(heap, page, have);
    return moved;
}

/* The pager reads pages at any time: those that lose permission are marked before, others when they have it again. */
int mprotect(void *address, size_t bytes, int prot)
{
    struct heap *heap = shim_managed(address);
    if (!heap || (uintptr_t)address % PAGE_SIZE)
        return (int)syscall(SYS_mprotect, address, bytes, prot);
    struct arena *arena = &heap->arena;
    size_t first = arena_page(arena, address), end = first + pages_of(bytes);
    pthread_mutex_lock(&heap->lock);
    for (size_t page = first; !(prot & PROT_READ) && page < end && page < arena->pages; page++)
        bit_set(arena->unreadable, page);
    arena->settle(arena);
    int failed = (int)syscall(SYS_mprotect, address, bytes, prot);
    for (size_t page = first; !failed && prot & PROT_READ && page < end && page < arena->pages; page++)
        if (arena->use[page] != PAGE_FOREIGN)
            bit_clear(arena->unreadable, page);
    pthread_mutex_unlock(&heap->lock);
    return failed;
}

/* Advice that changes nothing of what a program sees. */
static bool is_hint(int advice)
{
    static const int hints[] = {MADV_NORMAL, MADV_RANDOM, MADV_SEQUENTIAL, MADV_WILLNEED, MADV_HUGEPAGE, MADV_NOHUGEPAGE,
                                MADV_MERGEABLE, MADV_UNMERGEABLE, MADV_COLD, MADV_PAGEOUT, MADV_DONTDUMP, MADV_DODUMP};
    for (size_t i = 0; i < sizeof hints / sizeof *hints; i++)
        if (advice == hints[i])
            return true;
    return false;
}

int madvise(void *address, size_t bytes, int advice)
{
    struct heap *heap = shim_managed(address);
    if (!heap || heap->arena.use[arena_page(&heap->arena, address)] == PAGE_FOREIGN)
        return (int)syscall(SYS_madvise, address, bytes, advice);
    if (advice == MADV_DONTNEED || advice == MADV_FREE) {
        pthread_mutex_lock(&heap->lock);
        heap->arena.drop(&heap->arena, arena_page(&heap->arena, address), pages_of(bytes));
        pthread_mutex_unlock(&heap->lock);
        return 0;
    }
    if (is_hint(advice))
        return 0; /* about paging that is not the kernel's here */
    errno = EINVAL; /* a promise that the pager does not keep, such as MADV_WIPEONFORK */
    return -1;
}
