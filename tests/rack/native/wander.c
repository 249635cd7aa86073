/* A program that is to be moved in the middle: memory larger than its ExCache, floating point, a timer's signals, files,
 * a descriptor copied, a recursive lock, and threads if asked for. What it prints must not depend on where it has run.
 *
 *   wander MIB STEPS FILE [THREADS]
 *
 * Prints "step N" when a step is done, reading all that the step before wrote; at last a sum. FILE gets a line per step.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <math.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/time.h>
#include <unistd.h>

enum { PAGE = 4096, WORDS = PAGE / 8, MOST = 8 };

static volatile sig_atomic_t ticks;
static uint64_t *block;
static size_t pages, steps;
static int threads = 1;
static pthread_barrier_t together;
static double sums[MOST];

static void tick(int number)
{
    (void)number;
    ticks = ticks + 1;
}

static uint64_t word(size_t page, size_t step, size_t i)
{
    uint64_t x = (page + 1) * 0x9e3779b97f4a7c15ull ^ (step * 1000003 + i);
    return (x ^ x >> 29) * 0xbf58476d1ce4e5b9ull;
}

static void check(size_t page, size_t step)
{
    for (size_t i = 0; i < WORDS; i++)
        if (block[page * WORDS + i] != (step ? word(page, step, i) : 0)) {
            printf("page %zu, word %zu is wrong in step %zu\n", page, i, step + 1);
            exit(1);
        }
}

static void *walk(void *argument)
{
    size_t own = (size_t)(uintptr_t)argument;
    for (size_t step = 1; step <= steps; step++) {
        for (size_t n = own; n < pages; n += (size_t)threads) {
            size_t page = n * 7919 % pages; /* pages is no multiple of that prime */
            check(page, step - 1);
            for (size_t i = 0; i < WORDS; i++)
                block[page * WORDS + i] = word(page, step, i);
            sums[own] += sqrt((double)(block[page * WORDS] >> 11));
        }
        pthread_barrier_wait(&together);
        if (!own) {
            printf("step %zu\n", step);
            fflush(stdout);
        }
        pthread_barrier_wait(&together);
    }
    return NULL;
}

int main(int argc, char **argv)
{
    if (argc < 4)
        return 2;
    pages = strtoul(argv[1], NULL, 10) * 256;
    steps = strtoul(argv[2], NULL, 10);
    threads = argc > 4 ? atoi(argv[4]) : 1;
    setenv("WANDER", "1", 1); /* so that the environment is in memory that may be elsewhere */
    block = calloc(pages, PAGE);
    int out = open(argv[3], O_WRONLY | O_CREAT | O_TRUNC, 0644), copy = dup(out);
    struct sigaction action = {.sa_handler = tick, .sa_flags = SA_RESTART};
    sigaction(SIGALRM, &action, NULL);
    setitimer(ITIMER_REAL, &(struct itimerval){{0, 20000}, {0, 20000}}, NULL);
    pthread_mutexattr_t recursive;
    pthread_mutex_t lock;
    pthread_mutexattr_init(&recursive);
    pthread_mutexattr_settype(&recursive, PTHREAD_MUTEX_RECURSIVE);
    pthread_mutex_init(&lock, &recursive);
    pthread_mutex_lock(&lock);
    dprintf(out, "begin\n");
    pthread_t thread[MOST];
    pthread_barrier_init(&together, NULL, (unsigned)threads);
    for (int i = 1; i < threads; i++)
        pthread_create(&thread[i], NULL, walk, (void *)(uintptr_t)i);
    walk(0);
    double sum = 0;
    for (int i = 0; i < threads; i++) {
        if (i)
            pthread_join(thread[i], NULL);
        sum += sums[i];
    }
    for (size_t page = 0; page < pages; page++)
        check(page, steps);
    int before = ticks;
    while (ticks == before)
        usleep(1000);
    dprintf(copy, "end\n"); /* where the other descriptor has left off */
    if (pthread_mutex_lock(&lock) || pthread_mutex_unlock(&lock) || pthread_mutex_unlock(&lock)) {
        puts("a lock is not this thread's any more");
        return 1;
    }
    printf("sum %.6e in %zu steps\n", sum, steps);
    return 0;
}
