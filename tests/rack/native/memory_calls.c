/* Memory that is used in ways that the kernel and the C library promise something about, while most of it is elsewhere.
 *
 *   memory_calls MIB [CASE...]
 *
 * Run it under `split run` with an ExCache much smaller than MIB. A line for each case; exit 1 and a line that says what
 * was wrong. What it expects is what Linux does without an ExCache: it must say the same there.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

enum { PAGE = 4096, N = 64 /* pages of what is looked at */ };

static char *ballast;
static size_t ballast_pages;

#define EXPECT(what) ((what) ? (void)0 : wrong(__func__, #what, __LINE__))

static _Noreturn void wrong(const char *where, const char *what, int line)
{
    printf("WRONG %s: not %s (line %d, errno %s)\n", where, what, line, strerror(errno));
    fflush(stdout);
    _exit(1);
}

/* Touch so much else that everything before has to leave. */
static void sweep(void)
{
    for (int twice = 0; twice < 2; twice++)
        for (size_t p = 0; p < ballast_pages; p++)
            for (size_t i = 0; i < PAGE; i += 64)
                ballast[p * PAGE + i] += (char)(p * 31 + i);
}

static char *map(size_t pages)
{
    char *at = mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (at == MAP_FAILED)
        wrong(__func__, "memory", __LINE__);
    return at;
}

static void fill(char *at, size_t pages, int seed)
{
    for (size_t i = 0; i < pages * PAGE; i++)
        at[i] = (char)(i * 7 + i / PAGE + (size_t)seed);
}

static bool holds(const char *at, size_t pages, size_t first, int seed)
{
    for (size_t i = 0; i < pages * PAGE; i++)
        if (at[i] != (char)((first * PAGE + i) * 7 + first + i / PAGE + (size_t)seed))
            return false;
    return true;
}

static bool zero(const char *at, size_t bytes)
{
    for (size_t i = 0; i < bytes; i++)
        if (at[i])
            return false;
    return true;
}

/* ---- SIGSEGV ---- */

static sigjmp_buf back;
static void *volatile fault_at;
static char *volatile unprotect;
static volatile int faults;

static void on_fault(int number, siginfo_t *info, void *context)
{
    (void)number, (void)context;
    fault_at = info->si_addr;
    faults++;
    if (!unprotect)
        siglongjmp(back, 1);
    mprotect((void *)((uintptr_t)info->si_addr & ~(uintptr_t)(PAGE - 1)), PAGE, PROT_READ | PROT_WRITE);
}

static void catch_faults(bool on)
{
    struct sigaction action = {.sa_sigaction = on_fault, .sa_flags = SA_SIGINFO | SA_ONSTACK};
    if (!on)
        action = (struct sigaction){.sa_handler = SIG_DFL};
    sigaction(SIGSEGV, &action, NULL);
    sigaction(SIGBUS, &action, NULL);
}

/* Whether a read, or a write, of this byte is SIGSEGV there. */
static bool forbidden(volatile char *at, bool write)
{
    fault_at = NULL;
    if (sigsetjmp(back, 1))
        return fault_at == at;
    if (write)
        *at = 1;
    else
        (void)*at;
    return false;
}

static void protection(void)
{
    char *at = map(N);
    fill(at, N, 1);
    catch_faults(true);
    mprotect(at, 4 * PAGE, PROT_READ);
    mprotect(at + 4 * PAGE, 4 * PAGE, PROT_NONE);
    sweep();
    EXPECT(holds(at, 4, 0, 1));
    EXPECT(forbidden(at + 5, true) && forbidden(at + 3 * PAGE, true));
    EXPECT(forbidden(at + 4 * PAGE, false) && forbidden(at + 8 * PAGE - 1, true));
    mprotect(at, 8 * PAGE, PROT_READ | PROT_WRITE);
    EXPECT(holds(at, N, 0, 1));
    at[5] = 'x';
    sweep();
    EXPECT(at[5] == 'x');
    /* As garbage collectors do it: the first write to a page is seen, allowed and done. */
    fill(at, N, 2);
    mprotect(at, N * PAGE, PROT_READ);
    sweep();
    unprotect = at;
    faults = 0;
    for (int p = 0; p < N; p++)
        at[p * PAGE + 9] = (char)p;
    unprotect = NULL;
    EXPECT(faults == N);
    for (int p = 0; p < N; p++) {
        EXPECT(at[p * PAGE + 9] == (char)p);
        at[p * PAGE + 9] = (char)((p * PAGE + 9) * 7 + p + 2);
    }
    EXPECT(holds(at, N, 0, 2));
    EXPECT(mprotect(at + 1, PAGE, PROT_READ) < 0 && errno == EINVAL);
    munmap(at, N * PAGE);
}

static void unmapping(void)
{
    char *at = map(N);
    fill(at, N, 3);
    catch_faults(true);
    munmap(at + 8 * PAGE, 8 * PAGE);
    sweep();
    EXPECT(forbidden(at + 8 * PAGE, false) && forbidden(at + 16 * PAGE - 1, true));
    EXPECT(holds(at, 8, 0, 3) && holds(at + 16 * PAGE, N - 16, 16, 3));
    char *again = mmap(at + 8 * PAGE, 8 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
    EXPECT(again == at + 8 * PAGE && zero(again, 8 * PAGE));
    memset(again, 'y', 8 * PAGE);
    sweep();
    EXPECT(again[0] == 'y' && again[8 * PAGE - 1] == 'y');
    EXPECT(holds(at, 8, 0, 3) && holds(at + 16 * PAGE, N - 16, 16, 3));
    munmap(at, N * PAGE);
    EXPECT(forbidden(at, false) && forbidden(again, false) && forbidden(at + N * PAGE - 1, false));
    EXPECT(munmap(at + 1, PAGE) < 0 && errno == EINVAL);
}

static void remapping(void)
{
    char *at = map(N);
    fill(at, N, 4);
    sweep();
    char *more = mremap(at, N * PAGE, 3 * N * PAGE, MREMAP_MAYMOVE);
    EXPECT(more != MAP_FAILED && holds(more, N, 0, 4) && zero(more + N * PAGE, 2 * N * PAGE));
    memset(more + 3 * N * PAGE - 1, 1, 1);
    sweep();
    char *less = mremap(more, 3 * N * PAGE, N / 2 * PAGE, 0);
    EXPECT(less == more && holds(less, N / 2, 0, 4));
    catch_faults(true);
    EXPECT(forbidden(less + N / 2 * PAGE, false) && forbidden(less + 3 * N * PAGE - 1, false));
    munmap(less, N / 2 * PAGE);
}

static void advice(void)
{
    char *at = map(N);
    fill(at, N, 5);
    sweep();
    EXPECT(!madvise(at, 4 * PAGE, MADV_DONTNEED) && zero(at, 4 * PAGE));
    EXPECT(!madvise(at, N * PAGE, MADV_WILLNEED) && !madvise(at, N * PAGE, MADV_SEQUENTIAL));
    EXPECT(holds(at + 4 * PAGE, N - 4, 4, 5));
    /* Promises that are not hints are kept or refused. */
    memset(at, 's', PAGE);
    int kept = madvise(at, PAGE, MADV_WIPEONFORK);
    EXPECT(!kept || errno == EINVAL);
    pid_t child = fork();
    if (!child)
        _exit(at[0] == 0 ? 1 : 2);
    int status;
    waitpid(child, &status, 0);
    EXPECT(WIFEXITED(status) && WEXITSTATUS(status) == (kept ? 2 : 1));
    mlock(at, N * PAGE); /* allowed to fail */
    sweep();
    EXPECT(at[0] == 's' && holds(at + 4 * PAGE, N - 4, 4, 5));
    munlock(at, N * PAGE);
    munmap(at, N * PAGE);
}

/* ---- signals ---- */

static char *volatile counted;
static volatile int ticks;

static void on_tick(int number)
{
    (void)number;
    char local[8 * PAGE]; /* of the alternate stack */
    memset(local, ticks, sizeof local);
    counted[(size_t)(ticks % N) * PAGE]++;
    ticks += local[100 * (ticks % 8)] == (char)ticks;
}

static void signals(void)
{
    char *stack = malloc(64 << 10); /* handlers run on memory that comes and goes */
    stack_t other = {.ss_sp = stack, .ss_size = 64 << 10}, before;
    EXPECT(!sigaltstack(&other, &before));
    counted = map(N);
    ticks = 0;
    struct sigaction action = {.sa_handler = on_tick, .sa_flags = SA_ONSTACK | SA_RESTART};
    sigaction(SIGALRM, &action, NULL);
    struct itimerval often = {{0, 5000}, {0, 5000}}, never = {{0, 0}, {0, 0}};
    setitimer(ITIMER_REAL, &often, NULL);
    while (ticks < 3 * N)
        sweep();
    setitimer(ITIMER_REAL, &never, NULL);
    int sum = 0;
    for (int p = 0; p < N; p++)
        sum += counted[(size_t)p * PAGE];
    EXPECT(sum == ticks);
    catch_faults(true);
    mprotect(counted, PAGE, PROT_NONE);
    sweep();
    EXPECT(forbidden(counted, false)); /* on the other stack, most of which is away */
    munmap(counted, N * PAGE);
    sigaltstack(&before, NULL);
    free(stack);
}

/* ---- threads ---- */

struct room { /* among pages that come and go: the kernel wakes by address */
    pthread_mutex_t lock;
    pthread_cond_t turn;
    int whose;
    char filler[3 * PAGE];
};

static struct room *rooms;

static void *take_turns(void *argument)
{
    int me = (int)(intptr_t)argument;
    char local[4 * PAGE];
    for (int round = 0; round < 24; round++) {
        struct room *room = &rooms[round % 4];
        pthread_mutex_lock(&room->lock);
        while (room->whose != me)
            pthread_cond_wait(&room->turn, &room->lock);
        memset(local, me + round, sizeof local);
        if (!me)
            sweep();
        EXPECT(local[3 * PAGE] == (char)(me + round));
        room->whose = (me + 1) % 4;
        pthread_cond_broadcast(&room->turn);
        pthread_mutex_unlock(&room->lock);
    }
    return NULL;
}

static void threads(void)
{
    rooms = calloc(4, sizeof *rooms);
    for (int i = 0; i < 4; i++) {
        pthread_mutex_init(&rooms[i].lock, NULL);
        pthread_cond_init(&rooms[i].turn, NULL);
    }
    pthread_t thread[4];
    char *stack[4];
    for (int i = 0; i < 4; i++) {
        pthread_attr_t attributes;
        pthread_attr_init(&attributes);
        stack[i] = map(64);
        if (i % 2) /* its own stack, and one that it was given */
            pthread_attr_setstack(&attributes, stack[i], 64 * PAGE);
        EXPECT(!pthread_create(&thread[i], &attributes, take_turns, (void *)(intptr_t)i));
    }
    for (int i = 0; i < 4; i++) {
        pthread_join(thread[i], NULL);
        munmap(stack[i], 64 * PAGE);
    }
    free(rooms);
}

/* ---- system calls that read and write it ---- */

static void calls(void)
{
    char *from = map(N), *to = map(N);
    fill(from, N, 6);
    int ends[2];
    EXPECT(!pipe(ends));
    pid_t child = fork();
    if (!child) {
        for (size_t done = 0; done < N * PAGE;) {
            ssize_t sent = write(ends[1], from + done, N * PAGE - done);
            if (sent <= 0)
                _exit(1);
            done += (size_t)sent;
        }
        _exit(0);
    }
    sweep();
    for (size_t done = 0; done < N * PAGE;) {
        ssize_t got = read(ends[0], to + done, N * PAGE - done);
        EXPECT(got > 0);
        done += (size_t)got;
    }
    int status;
    waitpid(child, &status, 0);
    EXPECT(!status && holds(to, N, 0, 6));
    FILE *file = tmpfile();
    EXPECT(file && fwrite(from, PAGE, N, file) == N && !fflush(file));
    memset(to, 0, N * PAGE);
    sweep();
    struct iovec parts[] = {{to, 5 * PAGE + 77}, {to + 5 * PAGE + 77, (N - 5) * PAGE - 77}};
    EXPECT(preadv(fileno(file), parts, 2, 0) == N * PAGE && holds(to, N, 0, 6));
    /* A file over some of it, and anonymous memory over that. */
    char *over = mmap(to + 8 * PAGE, 8 * PAGE, PROT_READ, MAP_PRIVATE | MAP_FIXED, fileno(file), 0);
    EXPECT(over == to + 8 * PAGE && holds(over, 8, 0, 6));
    sweep();
    EXPECT(holds(to, 8, 0, 6) && holds(over, 8, 0, 6) && holds(to + 16 * PAGE, N - 16, 16, 6));
    EXPECT(mmap(over, 8 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == over);
    EXPECT(zero(over, 8 * PAGE));
    fill(over, 8, 7);
    sweep();
    EXPECT(holds(over, 8, 0, 7));
    fclose(file);
    munmap(from, N * PAGE);
    munmap(to, N * PAGE);
}

/* Children by fork, vfork and posix_spawn, which write into what they share, or do not. */
static void children(void)
{
    char *at = map(N);
    fill(at, N, 8);
    sweep();
    volatile int *said = (volatile int *)(void *)at;
    pid_t child = vfork();
    if (!child) {
        *said = 77;
        _exit(9);
    }
    int status;
    waitpid(child, &status, 0);
    EXPECT(*said == 77 && WEXITSTATUS(status) == 9);
    fill(at, N, 8);
    sweep();
    child = fork();
    if (!child) {
        bool fine = holds(at, N, 0, 8);
        fill(at, N, 9);
        _exit(fine && holds(at, N, 0, 9) ? 0 : 1);
    }
    sweep();
    waitpid(child, &status, 0);
    EXPECT(!status && holds(at, N, 0, 8));
    strcpy(at, "exit 5");
    sweep();
    EXPECT(WEXITSTATUS(system(at)) == 5);
    munmap(at, N * PAGE);
}

static volatile bool enough;

static void *wander(void *argument)
{
    for (unsigned at = (unsigned)(uintptr_t)argument; !enough; at = at * 1103515245u + 12345)
        (void)((volatile char *)ballast)[(at >> 8) % ballast_pages * PAGE];
    return NULL;
}

/* A fork while many threads wait for memory: its event comes behind their faults. */
static void crowd(void)
{
    pthread_t thread[64];
    for (size_t i = 0; i < sizeof thread / sizeof *thread; i++)
        EXPECT(!pthread_create(&thread[i], NULL, wander, (void *)(i + 1)));
    for (int round = 0; round < 10; round++) {
        pid_t child = fork();
        if (!child)
            _exit(7);
        int status;
        waitpid(child, &status, 0);
        EXPECT(WIFEXITED(status) && WEXITSTATUS(status) == 7);
    }
    enough = true;
    for (size_t i = 0; i < sizeof thread / sizeof *thread; i++)
        pthread_join(thread[i], NULL);
}

static void *sweep_on(void *unused)
{
    while (!enough)
        sweep();
    return unused;
}

/* Permissions that change while pages leave. */
static void toggling(void)
{
    pthread_t thread;
    enough = false;
    EXPECT(!pthread_create(&thread, NULL, sweep_on, NULL));
    char *at = map(N);
    fill(at, N, 10);
    for (int round = 0; round < 400; round++) {
        EXPECT(!mprotect(at, N * PAGE, PROT_NONE) && !mprotect(at, N * PAGE, PROT_READ));
        EXPECT(holds(at, N, 0, 10));
        char *other = map(N);
        fill(other, N, round);
        EXPECT(!mprotect(other, N * PAGE, PROT_NONE));
        if (round % 2) {
            char *over = mmap(other, N / 2 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
            EXPECT(over == other && zero(over, N / 2 * PAGE));
            over = mmap(other, N / 2 * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
            EXPECT(over == other);
        }
        munmap(other, N * PAGE);
    }
    enough = true;
    pthread_join(thread, NULL);
    munmap(at, N * PAGE);
}

int main(int argc, char **argv)
{
    static const struct { const char *name; void (*run)(void); } cases[] = {
        {"protection", protection}, {"unmapping", unmapping}, {"remapping", remapping}, {"advice", advice},
        {"signals", signals}, {"threads", threads}, {"calls", calls}, {"children", children},
        {"crowd", crowd}, {"toggling", toggling}};
    ballast_pages = argc > 1 ? strtoul(argv[1], NULL, 10) * 256 : 0;
    ballast = map(ballast_pages);
    uint64_t random = 88172645463325252ull; /* so that it does not pack */
    for (size_t i = 0; i + 8 <= ballast_pages * PAGE; i += 8) {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        memcpy(ballast + i, &random, 8);
    }
    setbuf(stdout, NULL);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        bool wanted = argc <= 2;
        for (int k = 2; k < argc; k++)
            wanted |= !strcmp(argv[k], cases[i].name);
        if (!wanted)
            continue;
        cases[i].run();
        catch_faults(false);
        printf("%s: fine\n", cases[i].name);
    }
    return 0;
}
