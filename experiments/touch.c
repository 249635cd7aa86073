/* What experiment `excache` runs under `split run` to see single misses.
 *
 *   touch_pages MIB COUNT [THREADS]
 *
 * Fills MIB MiB with words that do not pack, in order; then THREADS threads (default 1) touch COUNT pages in all, in
 * random order and none of them twice, of the half that was filled first: with an ExCache smaller than the other half
 * every touch is a miss. Prints the seconds of all, then the microseconds of each touch. Exit 1: wrong contents.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>

enum { PAGE = 4096, WORDS = PAGE / sizeof(uint64_t), MOST_THREADS = 16 };

static uint64_t *block;
static uint32_t *order;
static double *taken;
static pthread_barrier_t ready;

struct part {
    pthread_t thread;
    size_t begin, end;
};

static uint64_t word(uint64_t i)
{
    i = (i + 1) * 0x9e3779b97f4a7c15ull;
    i = (i ^ (i >> 30)) * 0xbf58476d1ce4e5b9ull;
    return i ^ (i >> 31);
}

static double microseconds(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e6 + (double)t.tv_nsec / 1e3;
}

static void *touch(void *with)
{
    const struct part *part = with;
    pthread_barrier_wait(&ready);
    for (size_t i = part->begin; i < part->end; i++) {
        double before = microseconds();
        uint64_t seen = ((volatile uint64_t *)block)[(size_t)order[i] * WORDS];
        taken[i] = microseconds() - before;
        if (seen != word((uint64_t)order[i] * WORDS)) {
            fprintf(stderr, "touch_pages: page %u has %#lx\n", order[i], (unsigned long)seen);
            exit(1);
        }
    }
    return NULL;
}

int main(int argc, char **argv)
{
    size_t pages = argc > 2 ? (size_t)atoi(argv[1]) << 8 : 0, count = argc > 2 ? (size_t)atoi(argv[2]) : 0;
    size_t threads = argc > 3 ? (size_t)atoi(argv[3]) : 1, half = pages / 2;
    if (!count || count > half || !threads || threads > MOST_THREADS) {
        fprintf(stderr, "usage: touch_pages MIB COUNT [THREADS]\n");
        return 2;
    }
    block = mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    /* Not to be paged themselves. */
    order = mmap(NULL, half * sizeof *order, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    taken = mmap(NULL, half * sizeof *taken, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (block == MAP_FAILED || order == MAP_FAILED || taken == MAP_FAILED) {
        perror("touch_pages");
        return 2;
    }
    for (size_t i = 0; i < pages * WORDS; i++)
        block[i] = word(i);
    for (uint32_t i = 0; i < half; i++) {
        uint32_t j = (uint32_t)(word(i) % (i + 1));
        order[i] = order[j];
        order[j] = i;
    }
    struct part part[MOST_THREADS];
    pthread_barrier_init(&ready, NULL, (unsigned)threads + 1);
    for (size_t t = 0; t < threads; t++) {
        part[t] = (struct part){.begin = count * t / threads, .end = count * (t + 1) / threads};
        pthread_create(&part[t].thread, NULL, touch, &part[t]);
    }
    pthread_barrier_wait(&ready);
    double before = microseconds();
    for (size_t t = 0; t < threads; t++)
        pthread_join(part[t].thread, NULL);
    printf("%.6f\n", (microseconds() - before) / 1e6);
    for (size_t i = 0; i < count; i++)
        printf("%.1f\n", taken[i]);
    return 0;
}
