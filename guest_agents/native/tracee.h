/* Another process, stopped: its registers and memory, and system calls made in its name (ptrace). */
#ifndef RACKLESS_TRACEE_H
#define RACKLESS_TRACEE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>
#include <sys/user.h>

enum { TRACEE_THREADS = 256 };

struct tracee {
    pid_t pid;
    int memory;                 /* /proc/PID/mem */
    uint64_t gate;              /* address of a `syscall` instruction in it */
    size_t threads;
    pid_t thread[TRACEE_THREADS]; /* the first is the process's own */
    bool stopped[TRACEE_THREADS];
};

/* Why the last of these failed: one line. */
extern char tracee_why[400];
bool tracee_fail(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* Begin to trace all threads of a process, without stopping them; false: it is not possible. */
bool tracee_seize(struct tracee *t, pid_t pid);

/* Stop all threads but `except` (0: all), which may have to answer their page faults first. False if they do not stop. */
bool tracee_stop(struct tracee *t, pid_t except);

/* Let go of it: every thread goes on. */
void tracee_release(struct tracee *t);

/* Its memory: false if not all of it is there. */
bool tracee_read(const struct tracee *t, uint64_t address, void *data, size_t bytes);
bool tracee_write(const struct tracee *t, uint64_t address, const void *data, size_t bytes);

/* Find a `syscall` instruction in its [vdso]. */
bool tracee_find_gate(struct tracee *t);

/* Have a stopped thread make a system call; its registers are then what they were. A negative errno if that fails. */
long tracee_call(struct tracee *t, pid_t thread, long number, uint64_t a, uint64_t b, uint64_t c, uint64_t d,
                 uint64_t e, uint64_t f);

/* Let a thread run until it makes the call prctl(PARK_CALL, said, report), at most so long: what it said, with the
 * address of its report; 0: it did not. The thread
 * is then at the call's end, and `told` its result. */
int tracee_hear(pid_t thread, int seconds, uint64_t *report);
bool tracee_tell(pid_t thread, long told);

#endif
