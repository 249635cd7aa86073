/* Exercises memory that is larger than the ExCache, and checks every byte it reads back. Run it under `split run`.
 *
 *   paging_stress MODE MIB [ROUNDS [SEED]]
 *
 * Random, mixed and skewed touches of 0 rounds go on until there is something to read, or the end, on standard input.
 * Each page of a block holds words computed from its number and its version, so a lost, stale or misplaced page is
 * noticed. Exit 0 and one line with figures; exit 1 and one line that says what was wrong.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { PAGE = 4096, WORDS = PAGE / 8 };

static uint64_t random_state = 88172645463325252ull;

static uint64_t random_number(uint64_t *state)
{
    *state ^= *state << 13;
    *state ^= *state >> 7;
    return *state ^= *state << 17;
}

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static _Noreturn void wrong(const char *what, size_t page, uint64_t got, uint64_t expected)
{
    printf("WRONG %s: page %zu has %#lx, not %#lx\n", what, page, (unsigned long)got, (unsigned long)expected);
    fflush(stdout);
    _exit(1);
}

static uint64_t word(size_t page, uint32_t version, size_t i)
{
    return version ? (page * 0x9e3779b97f4a7c15ull) ^ ((uint64_t)version << 40) ^ (i * 0x100000001b3ull) : 0;
}

/* Every how many words something is written: pages that pack to a sixth, to half, or not at all. */
static size_t step(size_t page)
{
    static const size_t of[] = {8, 2, 1};
    return of[page / 16 % 3];
}

static void fill(uint64_t *block, size_t page, uint32_t version)
{
    for (size_t i = 0; i < WORDS; i += step(page))
        block[page * WORDS + i] = word(page, version, i);
}

static void check(const char *what, const uint64_t *block, size_t page, uint32_t version)
{
    for (size_t i = 0; i < WORDS; i += step(page))
        if (block[page * WORDS + i] != word(page, version, i))
            wrong(what, page, block[page * WORDS + i], word(page, version, i));
}

static void sequential(size_t pages, int rounds)
{
    uint64_t *block = malloc(pages * PAGE);
    double t0 = now();
    for (size_t p = 0; p < pages; p++)
        fill(block, p, 1);
    double t1 = now();
    for (int r = 0; r < rounds; r++)
        for (size_t p = 0; p < pages; p++)
            check("sequential", block, p, 1);
    double t2 = now();
    printf("first write %.0f us/page, sequential read %.0f us/page\n", 1e6 * (t1 - t0) / (double)pages,
           1e6 * (t2 - t1) / (double)pages / rounds);
    free(block);
}

static bool told_to_end(void)
{
    struct pollfd in = {.fd = STDIN_FILENO, .events = POLLIN};
    return poll(&in, 1, 0) != 0;
}

/* One in `write_one_in` touches changes the page; `skew` > 1 makes low pages more popular. */
static void touch(const char *what, size_t pages, int touches, int write_one_in, int skew, uint64_t seed)
{
    uint64_t *block = calloc(pages, PAGE);
    uint32_t *version = mmap(NULL, pages * 4, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (!block || version == MAP_FAILED) {
        printf("WRONG %s: no memory: %s\n", what, strerror(errno));
        _exit(1);
    }
    double t0 = now();
    int done = 0;
    for (; touches ? done < touches : done % 64 || !told_to_end(); done++) {
        size_t p = pages;
        for (int s = 0; s < skew; s++) {
            size_t q = random_number(&seed) % pages;
            p = q < p ? q : p;
        }
        check(what, block, p, version[p]);
        if (write_one_in && random_number(&seed) % (unsigned)write_one_in == 0)
            fill(block, p, ++version[p]);
    }
    double t1 = now();
    for (size_t p = 0; p < pages; p++)
        check(what, block, p, version[p]);
    printf("%s: %.0f us/touch\n", what, 1e6 * (t1 - t0) / (done ? done : 1));
    munmap(version, pages * 4);
    free(block);
}

struct job {
    size_t pages;
    int touches;
    uint64_t seed;
};

static void *thread_main(void *argument)
{
    struct job *job = argument;
    touch("thread", job->pages, job->touches, 2, 1, job->seed);
    return NULL;
}

static void threads(size_t pages, int rounds, uint64_t seed)
{
    enum { N = 4 };
    pthread_t thread[N];
    struct job job[N];
    for (int i = 0; i < N; i++) {
        job[i] = (struct job){pages / N, (int)pages / N * rounds, seed + (uint64_t)i * 7919};
        pthread_create(&thread[i], NULL, thread_main, &job[i]);
    }
    for (int i = 0; i < N; i++)
        pthread_join(thread[i], NULL);
}

/* Children that keep running without exec read and change their copy while the parent changes its own. */
static void forks(size_t pages, int rounds, uint64_t seed)
{
    uint64_t *block = calloc(pages, PAGE);
    uint32_t *version = mmap(NULL, pages * 4, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_LOCKED, -1, 0);
    for (size_t p = 0; p < pages; p++)
        fill(block, p, version[p] = 1);
    for (int r = 0; r < rounds; r++) {
        int gate[2];
        if (pipe(gate))
            exit(1);
        pid_t child = fork();
        if (child == 0) {
            char byte;
            uint64_t own = seed + 1;
            for (int i = 0; i < 64; i++) { /* change some before the parent goes on, some after */
                size_t p = random_number(&own) % pages;
                check("child, early", block, p, version[p]);
                fill(block, p, version[p] += 1000);
            }
            close(gate[1]);
            if (read(gate[0], &byte, 1) < 0)
                _exit(1);
            char *fresh = calloc(40, PAGE);
            for (int i = 0; i < 40 * PAGE; i += 64)
                if (fresh[i])
                    wrong("child, calloc", (size_t)i / PAGE, 1, 0);
            free(fresh);
            closefrom(3); /* as daemons do, and children before exec */
            for (size_t p = 0; p < pages; p++)
                check("child, late", block, p, version[p]);
            _exit(42);
        }
        close(gate[0]);
        for (size_t i = 0; i < pages; i++) {
            size_t p = random_number(&seed) % pages;
            check("parent", block, p, version[p]);
            fill(block, p, ++version[p]);
        }
        close(gate[1]);
        int status;
        waitpid(child, &status, 0);
        if (!WIFEXITED(status) || WEXITSTATUS(status) != 42)
            wrong("child's status", 0, (uint64_t)status, 42 << 8);
        FILE *pipe = popen("echo fork and exec", "r");
        char line[64] = "";
        if (!pipe || !fgets(line, sizeof line, pipe) || strcmp(line, "fork and exec\n") || pclose(pipe))
            wrong("popen", 0, 0, 0);
    }
    for (size_t p = 0; p < pages; p++)
        check("parent, after", block, p, version[p]);
    printf("forks: %d children\n", rounds);
}

/* A parent that ends while its child still depends on it. */
static void orphan(size_t pages)
{
    uint64_t *block = calloc(pages, PAGE);
    int report[2];
    for (size_t p = 0; p < pages; p++)
        fill(block, p, 1);
    if (pipe(report))
        exit(1);
    pid_t middle = fork();
    if (middle == 0) { /* a child, which has a child, and ends first */
        if (fork() == 0) {
            usleep(300000);
            for (size_t p = 0; p < pages; p++)
                check("grandchild", block, p, 1);
            if (write(report[1], "k", 1) < 0)
                _exit(1);
            _exit(0);
        }
        for (size_t p = 0; p < pages; p += 3)
            check("middle", block, p, 1);
        _exit(0);
    }
    waitpid(middle, NULL, 0);
    close(report[1]);
    char byte = 0;
    if (read(report[0], &byte, 1) != 1 || byte != 'k')
        wrong("grandchild", 0, (uint64_t)byte, 'k');
    if (fork() == 0) { /* outlives the main program */
        sleep(2);
        for (size_t p = 0; p < pages; p++)
            check("orphan", block, p, 1);
        printf("orphan: fine\n");
        fflush(stdout);
        _exit(0);
    }
    printf("orphan: parent ends\n");
}

enum { DEPTH = 3, STEP = 7 };

/* A child, its child, and so on; each sees what was there when it was forked, and what it has changed since. It says so
 * on `ready` when it has forked, and then waits for the end of the first program, which has the other end of `gate`. */
static _Noreturn void descend(uint64_t *block, size_t pages, int ready, int gate)
{
    size_t depth = 0;
    for (;; depth++) {
        for (size_t p = depth; p < pages; p += STEP)
            fill(block, p, 100);
        if (depth == DEPTH || fork())
            break;
    }
    for (size_t p = depth; p < pages; p += 2 * STEP)
        fill(block, p, 200);
    char byte = 0;
    if (write(ready, &byte, 1) < 0)
        byte = 1; /* the first program has not waited */
    while (read(gate, &byte, 1) > 0) {
    }
    if (fork() == 0)
        depth += 10; /* one more, while its memory comes */
    for (size_t p = 0; p < pages; p++) {
        uint32_t version = p % STEP <= depth % 10 ? 100 : 1;
        check("descendant", block, p, p % (2 * STEP) == depth % 10 ? 200 : version);
    }
    if (printf("depth %zu: fine\n", depth) < 0 || fflush(stdout))
        _exit(1);
    _exit(0);
}

/* A program that is killed `ms` milliseconds after all have forked, and has changed its own memory meanwhile; with 0
 * at once. */
static void killed(size_t pages, int ms)
{
    uint64_t *block = calloc(pages, PAGE);
    int ready[2], gate[2];
    char byte;
    for (size_t p = 0; p < pages; p++)
        fill(block, p, 1);
    if (pipe(ready) || pipe(gate))
        exit(1);
    signal(SIGPIPE, SIG_IGN);
    if (fork() == 0) {
        close(ready[0]);
        close(gate[1]);
        descend(block, pages, ready[1], gate[0]);
    }
    close(ready[1]);
    close(gate[0]);
    for (int i = 0; ms && i <= DEPTH; i++)
        if (read(ready[0], &byte, 1) != 1)
            exit(1);
    double end = now() + 1e-3 * ms;
    for (size_t i = 0; now() < end; i++) /* what it changes, its children are given before */
        fill(block, i * 37 % (pages / 4) * 4, 9);
    kill(getpid(), SIGKILL);
}

static void blocks(size_t pages, int rounds, uint64_t seed)
{
    enum { N = 64 };
    uint64_t *block[N] = {0};
    size_t length[N] = {0};
    for (int i = 0; i < rounds * N; i++) {
        int k = (int)(random_number(&seed) % N);
        size_t want = random_number(&seed) % (pages / N * 2) + 1;
        if (random_number(&seed) % 4 == 0) {
            free(block[k]);
            block[k] = NULL;
            length[k] = 0;
            continue;
        }
        block[k] = realloc(block[k], want * PAGE);
        for (size_t p = 0; p < want; p++) {
            if (p < length[k])
                check("realloc", block[k], p, (uint32_t)k + 1);
            else
                fill(block[k], p, (uint32_t)k + 1);
        }
        length[k] = want;
    }
    for (int k = 0; k < N; k++) {
        for (size_t p = 0; p < length[k]; p++)
            check("realloc", block[k], p, (uint32_t)k + 1);
        free(block[k]);
    }
    printf("blocks: fine\n");
}

static void maps(size_t pages, int rounds, uint64_t seed)
{
    for (int r = 0; r < rounds; r++) {
        size_t n = pages / 2;
        uint64_t *a = mmap(NULL, n * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        for (size_t p = 0; p < n; p++) {
            check("fresh map", a, p, 0);
            fill(a, p, 3);
        }
        size_t hole = n / 4 + random_number(&seed) % (n / 4);
        munmap(a + hole * WORDS, 8 * PAGE);
        for (size_t p = 0; p < n; p++)
            if (p < hole || p >= hole + 8)
                check("around a hole", a, p, 3);
        pid_t child = fork();
        if (child == 0) {
            volatile uint64_t *gone = a + hole * WORDS;
            _exit((int)*gone & 0);
        }
        int status;
        waitpid(child, &status, 0);
        if (!WIFSIGNALED(status) || WTERMSIG(status) != SIGSEGV)
            wrong("unmapped page can be read", hole, (uint64_t)status, SIGSEGV);
        munmap(a + (hole + 8) * WORDS, (n - hole - 8) * PAGE);
        uint64_t *b = mremap(a, hole * PAGE, n * PAGE, MREMAP_MAYMOVE);
        for (size_t p = 0; p < n; p++)
            check("after mremap", b, p, p < hole ? 3 : 0);
        mprotect(b, PAGE, PROT_NONE);
        uint64_t *c = malloc(n * PAGE);
        for (size_t p = 0; p < n; p++)
            fill(c, p, 9);
        mprotect(b, PAGE, PROT_READ | PROT_WRITE);
        madvise(b + 4 * WORDS, 4 * PAGE, MADV_DONTNEED);
        for (size_t p = 0; p < n; p++)
            check("after madvise", b, p, p < hole && (p < 4 || p >= 8) ? 3 : 0);
        munmap(b, n * PAGE);
        free(c);
    }
    printf("maps: fine\n");
}

/* Memory that comes and goes: mappings that are made, grow, and are unmapped in any order, while a child that was forked
 * in between goes on with what there was. What stays through all of it is below them. */
static void ebbs(size_t pages, int rounds, uint64_t seed)
{
    enum { MAPS = 6 };
    size_t stays = pages / 8;
    uint64_t *low = mmap(NULL, stays * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    for (size_t p = 0; p < stays; p++)
        fill(low, p, 5);
    for (int r = 0; r < rounds; r++) {
        uint64_t *map[MAPS];
        size_t n[MAPS];
        for (int i = 0; i < MAPS; i++) {
            n[i] = pages / MAPS / 2 + random_number(&seed) % (pages / MAPS);
            map[i] = mmap(NULL, n[i] / 2 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
            map[i] = mremap(map[i], n[i] / 2 * PAGE, n[i] * PAGE, MREMAP_MAYMOVE);
            if (map[i] == MAP_FAILED)
                wrong("no memory", n[i], 0, 0);
            for (size_t p = 0; p < n[i]; p++) {
                check("fresh", map[i], p, 0);
                fill(map[i], p, 1 + (uint32_t)i);
            }
        }
        pid_t child = r % 2 ? fork() : 0;
        if (r % 2 && child == 0) {
            for (int i = 0; i < MAPS; i++)
                for (size_t p = 0; p < n[i]; p++)
                    check("child's", map[i], p, 1 + (uint32_t)i);
            _exit(0);
        }
        for (int left = MAPS; left; left--) {
            int i = (int)(random_number(&seed) % MAPS);
            while (!map[i])
                i = (i + 1) % MAPS;
            for (size_t p = 0; p < n[i]; p += 3)
                check("before it goes", map[i], p, 1 + (uint32_t)i);
            munmap(map[i], n[i] * PAGE);
            map[i] = NULL;
        }
        int status = 0;
        if (r % 2 && (waitpid(child, &status, 0) != child || status))
            wrong("child", (size_t)r, (uint64_t)status, 0);
        for (size_t p = 0; p < stays; p++)
            check("what stays", low, p, 5);
    }
    printf("ebbs: fine\n");
}

/* Pages that meet in one set of a set-associative ExCache, again and again; and, among them, some that may not be read
 * when they have to leave. */
static void conflicts(size_t pages, int rounds, size_t stride)
{
    uint64_t *block = mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    uint32_t *version = mmap(NULL, pages * 4, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    for (size_t p = 0; p < pages; p++)
        fill(block, p, version[p] = 1);
    for (int r = 0; r < rounds; r++)
        for (size_t first = 0; first < stride; first += stride / 7 + 1) {
            for (size_t p = first; p < pages; p += 3 * stride)
                mprotect(block + p * WORDS, PAGE, PROT_NONE);
            for (int twice = 0; twice < 2; twice++)
                for (size_t p = first; p < pages; p += stride)
                    if ((p - first) % (3 * stride)) {
                        check("conflict", block, p, version[p]);
                        fill(block, p, ++version[p]);
                    }
            for (size_t p = first; p < pages; p += 3 * stride)
                mprotect(block + p * WORDS, PAGE, PROT_READ | PROT_WRITE);
            for (size_t p = first; p < pages; p += stride)
                check("after a conflict", block, p, version[p]);
        }
    for (size_t p = 0; p < pages; p++)
        check("after all conflicts", block, p, version[p]);
    printf("conflicts: fine\n");
}

int main(int argc, char **argv)
{
    if (argc < 3)
        return 2;
    const char *mode = argv[1];
    size_t pages = strtoul(argv[2], NULL, 10) * 256;
    int rounds = argc > 3 ? atoi(argv[3]) : 1;
    uint64_t seed = random_state + (argc > 4 ? strtoull(argv[4], NULL, 10) : 0) * 1000003;
    if (!strcmp(mode, "sequential"))
        sequential(pages, rounds);
    else if (!strcmp(mode, "random"))
        touch("random read", pages, (int)pages * rounds, 0, 1, seed), touch("random write", pages, (int)pages * rounds, 1, 1, seed);
    else if (!strcmp(mode, "mixed"))
        touch("mixed", pages, (int)pages * rounds, 3, 1, seed);
    else if (!strcmp(mode, "skewed"))
        touch("skewed", pages, (int)pages * rounds, 3, 6, seed);
    else if (!strcmp(mode, "threads"))
        threads(pages, rounds, seed);
    else if (!strcmp(mode, "forks"))
        forks(pages, rounds, seed);
    else if (!strcmp(mode, "orphan"))
        orphan(pages);
    else if (!strcmp(mode, "killed"))
        killed(pages, rounds);
    else if (!strcmp(mode, "blocks"))
        blocks(pages, rounds, seed);
    else if (!strcmp(mode, "conflicts"))
        conflicts(pages, rounds, argc > 4 ? strtoul(argv[4], NULL, 10) : 64);
    else if (!strcmp(mode, "maps"))
        maps(pages, rounds, seed);
    else if (!strcmp(mode, "ebbs"))
        ebbs(pages, rounds, seed);
    else
        return 2;
    return 0;
}
