/* The allocator of the process monitor under random use, with every byte checked and pages dropped for real.
 * Usage: heap_stress ROUNDS SEED. Exit 0, or 1 and a line. */
#define _GNU_SOURCE
#include "heap.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

enum { SLOTS = 4000, THREADS = 3 };

static struct heap heap;
static int rounds;

static void drop(struct arena *arena, size_t page, size_t count)
{
    madvise(arena_address(arena, page), count << PAGE_SHIFT, MADV_DONTNEED);
}

static int grow(struct arena *arena, size_t top)
{
    (void)top;
    return arena->reserved = 3000, top > 3000 ? 12 : 0; /* 12 MB, then ENOMEM */
}

static void check(int ok, const char *what)
{
    if (!ok) {
        printf("WRONG: %s\n", what);
        fflush(stdout);
        _Exit(1);
    }
}

static void *work(void *argument)
{
    unsigned seed = *(unsigned *)argument;
    struct { unsigned char *p; size_t n; unsigned char tag; } *slot = mmap(NULL, SLOTS * sizeof *slot, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    int refused = 0;
    for (int i = 0; i < rounds; i++) {
        int k = (int)(rand_r(&seed) % SLOTS);
        if (slot[k].p) {
            for (size_t j = 0; j < slot[k].n; j += slot[k].n > 64 ? 61 : 1)
                check(slot[k].p[j] == slot[k].tag, "a block was overwritten");
            check(slot[k].p[slot[k].n - 1] == slot[k].tag, "a block's end was overwritten");
            if (rand_r(&seed) % 4 == 0) {
                size_t n = rand_r(&seed) % (2 * slot[k].n) + 1;
                if (heap_resize_in_place(&heap, slot[k].p, n)) {
                    if (n > slot[k].n)
                        memset(slot[k].p + slot[k].n, slot[k].tag, n - slot[k].n);
                    slot[k].n = n;
                    check(heap_size(&heap, slot[k].p) >= n, "resized block is too small");
                }
            } else {
                heap_give(&heap, slot[k].p);
                slot[k].p = NULL;
            }
            continue;
        }
        size_t n = rand_r(&seed) % 100 < 90 ? rand_r(&seed) % 600 + 1 : rand_r(&seed) % 60000 + 1;
        size_t align = rand_r(&seed) % 10 ? 16 : (size_t)16 << rand_r(&seed) % 11;
        int zeroed = rand_r(&seed) % 3 == 0;
        unsigned char *p = heap_take(&heap, n, align, zeroed);
        if (!p) {
            refused++;
            continue;
        }
        check((uintptr_t)p % align == 0, "alignment");
        check(heap_size(&heap, p) >= n, "block is too small");
        if (zeroed)
            for (size_t j = 0; j < n; j++)
                check(p[j] == 0, "calloc is not zero");
        slot[k].p = p;
        slot[k].n = n;
        slot[k].tag = (unsigned char)(rand_r(&seed) | 1);
        memset(p, slot[k].tag, n);
    }
    for (int k = 0; k < SLOTS; k++)
        if (slot[k].p)
            heap_give(&heap, slot[k].p);
    printf("refused %d\n", refused);
    return NULL;
}

int main(int argc, char **argv)
{
    rounds = argc > 1 ? atoi(argv[1]) : 100000;
    unsigned seed[THREADS];
    heap.arena.drop = drop;
    heap.arena.grow = grow;
    check(heap_init(&heap, 1 << 16) == 0, "no arena");
    heap.arena.reserved = 1000;
    check(heap_take(&heap, SIZE_MAX - 100, 16, false) == NULL, "absurd size");
    check(heap_take(&heap, PTRDIFF_MAX, 4096, false) == NULL, "absurd size");
    pthread_t thread[THREADS];
    for (int i = 0; i < THREADS; i++) {
        seed[i] = (argc > 2 ? (unsigned)atoi(argv[2]) : 1) * 100 + (unsigned)i;
        pthread_create(&thread[i], NULL, work, &seed[i]);
    }
    for (int i = 0; i < THREADS; i++)
        pthread_join(thread[i], NULL);
    check(heap.arena.in_use <= CLASSES * LARGE_SPAN_PAGES, "pages were not given back");
    check(bits_next_set(heap.arena.used, heap.arena.top, heap.arena.pages) == heap.arena.pages, "used beyond the top");
    return 0;
}
