#define _GNU_SOURCE
#include "tracee.h"

#include "park.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { LOOKS = 200, STOP_SECONDS = 20, NAP_US = 500, SYSCALL_TRAP = SIGTRAP | 0x80 };

char tracee_why[400];

bool tracee_fail(const char *format, ...)
{
    va_list args;
    va_start(args, format);
    vsnprintf(tracee_why, sizeof tracee_why, format, args);
    va_end(args);
    return false;
}

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static bool known(const struct tracee *t, pid_t thread)
{
    for (size_t i = 0; i < t->threads; i++)
        if (t->thread[i] == thread)
            return true;
    return false;
}

/* Seize threads that are not yet; how many there were, or -1. */
static int seize_new(struct tracee *t)
{
    char path[64];
    int found = 0;
    snprintf(path, sizeof path, "/proc/%d/task", (int)t->pid);
    DIR *folder = opendir(path);
    for (struct dirent *entry; folder && (entry = readdir(folder));) {
        pid_t thread = atoi(entry->d_name);
        if (thread <= 0 || known(t, thread))
            continue;
        if (t->threads == TRACEE_THREADS || ptrace(PTRACE_SEIZE, thread, 0, PTRACE_O_TRACESYSGOOD)) {
            if (t->threads < TRACEE_THREADS && errno == ESRCH)
                continue; /* it has just ended */
            tracee_fail(t->threads == TRACEE_THREADS ? "it has more than 256 threads" : "somebody else traces it: %s",
                        strerror(errno));
            found = -1;
            break;
        }
        t->thread[t->threads] = thread;
        t->stopped[t->threads++] = false;
        found++;
    }
    if (folder)
        closedir(folder);
    return found;
}

bool tracee_seize(struct tracee *t, pid_t pid)
{
    char path[64];
    *t = (struct tracee){.pid = pid, .memory = -1};
    if (seize_new(t) < 0)
        return false;
    snprintf(path, sizeof path, "/proc/%d/mem", (int)pid);
    t->memory = open(path, O_RDWR | O_CLOEXEC);
    if (!t->threads || t->memory < 0)
        return tracee_fail("it has ended");
    return true;
}

/* Take note of one stop, if there is one. Signals that come are the program's: they are sent again when it goes on. */
static bool note_stop(struct tracee *t, size_t i)
{
    int status;
    pid_t got = waitpid(t->thread[i], &status, WNOHANG | __WALL);
    if (got == 0)
        return true;
    if (got < 0 || !WIFSTOPPED(status))
        return tracee_fail("it has ended");
    if (status >> 16 == PTRACE_EVENT_STOP) {
        t->stopped[i] = true;
        return WSTOPSIG(status) == SIGTRAP || tracee_fail("it is stopped: `split kill ID CONT` lets it go on");
    }
    /* A signal: it takes its course, and the interruption comes after it. */
    ptrace(PTRACE_CONT, t->thread[i], 0, WSTOPSIG(status));
    return true;
}

bool tracee_stop(struct tracee *t, pid_t except)
{
    double end = now() + STOP_SECONDS;
    size_t asked = 0;
    for (;;) {
        for (; asked < t->threads; asked++)
            if (t->thread[asked] != except && !t->stopped[asked])
                ptrace(PTRACE_INTERRUPT, t->thread[asked], 0, 0);
        bool all = true;
        for (size_t i = 0; i < t->threads; i++)
            if (t->thread[i] != except && !t->stopped[i]) {
                if (!note_stop(t, i))
                    return false;
                all &= t->stopped[i];
            }
        int more = all ? seize_new(t) : 0;
        if (more < 0)
            return false;
        if (all && !more)
            return true;
        if (now() > end)
            return tracee_fail("it does not stop within %d s (does it wait for a memory blade?)", STOP_SECONDS);
        usleep(NAP_US);
    }
}

void tracee_release(struct tracee *t)
{
    for (size_t i = 0; i < t->threads; i++)
        if (ptrace(PTRACE_DETACH, t->thread[i], 0, 0) && errno == ESRCH && !t->stopped[i]) {
            int status; /* it must be stopped to be let go */
            if (ptrace(PTRACE_INTERRUPT, t->thread[i], 0, 0) == 0 && waitpid(t->thread[i], &status, __WALL) > 0)
                ptrace(PTRACE_DETACH, t->thread[i], 0, WIFSTOPPED(status) && status >> 16 == 0 ? WSTOPSIG(status) : 0);
        }
    if (t->memory >= 0)
        close(t->memory);
    t->threads = 0;
    t->memory = -1;
}

bool tracee_read(const struct tracee *t, uint64_t address, void *data, size_t bytes)
{
    return pread(t->memory, data, bytes, (off_t)address) == (ssize_t)bytes;
}

bool tracee_write(const struct tracee *t, uint64_t address, const void *data, size_t bytes)
{
    return pwrite(t->memory, data, bytes, (off_t)address) == (ssize_t)bytes;
}

bool tracee_find_gate(struct tracee *t)
{
    char path[64], line[512];
    snprintf(path, sizeof path, "/proc/%d/maps", (int)t->pid);
    FILE *maps = fopen(path, "re");
    t->gate = 0;
    while (maps && !t->gate && fgets(line, sizeof line, maps)) {
        uint64_t start, end;
        static uint8_t code[4 << 12];
        if (!strstr(line, "[vdso]") || sscanf(line, "%lx-%lx", &start, &end) != 2 || end - start > sizeof code ||
            !tracee_read(t, start, code, end - start))
            continue;
        for (uint64_t i = 0; !t->gate && i + 1 < end - start; i++)
            if (code[i] == 0x0f && code[i + 1] == 0x05)
                t->gate = start + i;
    }
    if (maps)
        fclose(maps);
    return t->gate || tracee_fail("the kernel's [vdso] has no system call in it");
}

long tracee_call(struct tracee *t, pid_t thread, long number, uint64_t a, uint64_t b, uint64_t c, uint64_t d,
                 uint64_t e, uint64_t f)
{
    /* A signal that came in a step would be lost: it waits. But for the trap after the step. */
    uint64_t mask, most = ~(1ull << (SIGTRAP - 1));
    struct user_regs_struct before, r;
    int status;
    if (ptrace(PTRACE_GETREGS, thread, 0, &before) || ptrace(PTRACE_GETSIGMASK, thread, sizeof mask, &mask) ||
        ptrace(PTRACE_SETSIGMASK, thread, sizeof most, &most))
        return -errno;
    r = before;
    r.rax = (uint64_t)number;
    r.orig_rax = (uint64_t)-1; /* no system call to be made again */
    r.rdi = a, r.rsi = b, r.rdx = c, r.r10 = d, r.r8 = e, r.r9 = f;
    r.rip = t->gate;
    if (ptrace(PTRACE_SETREGS, thread, 0, &r))
        return -errno;
    do { /* a clone stops twice */
        if (ptrace(PTRACE_SINGLESTEP, thread, 0, 0) || waitpid(thread, &status, __WALL) != thread ||
            !WIFSTOPPED(status) || ptrace(PTRACE_GETREGS, thread, 0, &r))
            return -ESRCH;
    } while (status >> 16 || r.rip == t->gate);
    return ptrace(PTRACE_SETREGS, thread, 0, &before) || ptrace(PTRACE_SETSIGMASK, thread, sizeof mask, &mask)
               ? -errno : (long)r.rax;
}

int tracee_hear(pid_t thread, int seconds, uint64_t *report)
{
    for (double end = now() + seconds;;) {
        int status;
        struct user_regs_struct r;
        if (ptrace(PTRACE_SYSCALL, thread, 0, 0))
            return 0;
        pid_t got;
        for (int looks = 0; (got = waitpid(thread, &status, WNOHANG | __WALL)) == 0; looks++) {
            if (now() > end) {
                ptrace(PTRACE_INTERRUPT, thread, 0, 0);
                waitpid(thread, &status, __WALL);
                return 0;
            }
            if (looks < LOOKS)
                sched_yield();
            else
                usleep(NAP_US / 10);
        }
        if (got < 0 || !WIFSTOPPED(status) || ptrace(PTRACE_GETREGS, thread, 0, &r))
            return 0;
        if (WSTOPSIG(status) != SYSCALL_TRAP || (long)r.orig_rax != SYS_prctl || r.rdi != PARK_CALL)
            continue;
        if ((long)r.rax == -ENOSYS) /* it begins: go on to its end */
            continue;
        *report = r.rdx;
        return (int)r.rsi;
    }
}

bool tracee_tell(pid_t thread, long told)
{
    struct user_regs_struct r;
    if (ptrace(PTRACE_GETREGS, thread, 0, &r))
        return false;
    r.rax = (uint64_t)told;
    return !ptrace(PTRACE_SETREGS, thread, 0, &r);
}
