/* Keeps the pager's descriptors open while the program closes "all" of its own (closefrom, daemons, children before
 * exec). Without its userfaultfd, memory that lives on a blade would read as zeros: nothing may close it by accident.
 */
#define _GNU_SOURCE
#include "shim.h"

#include <errno.h>
#include <limits.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { GUARDED = 4096 };
static uint64_t guarded[GUARDED / 64];

void shim_guard(int file)
{
    if (file >= 0 && file < GUARDED)
        bit_set(guarded, (size_t)file);
}

void shim_close(int file)
{
    if (file >= 0 && file < GUARDED)
        bit_clear(guarded, (size_t)file);
    if (file >= 0)
        syscall(SYS_close, file);
}

static bool is_guarded(int file)
{
    return file >= 0 && file < GUARDED && bit_test(guarded, (size_t)file);
}

int close(int file)
{
    if (is_guarded(file)) {
        errno = EBADF; /* as if it were not there, which is what the program believes */
        return -1;
    }
    return (int)syscall(SYS_close, file);
}

int close_range(unsigned first, unsigned last, int flags)
{
    while (first <= last && first < GUARDED) {
        size_t end = last < GUARDED ? last + 1 : GUARDED;
        size_t ours = bits_next_set(guarded, first, end);
        if (ours == end)
            break;
        if (ours > first && syscall(SYS_close_range, first, (unsigned)ours - 1, flags))
            return -1;
        first = (unsigned)ours + 1;
    }
    return first > last ? 0 : (int)syscall(SYS_close_range, first, last, flags);
}

void closefrom(int low)
{
    close_range(low < 0 ? 0 : (unsigned)low, UINT_MAX, 0);
}

int dup3(int from, int to, int flags)
{
    if (is_guarded(to)) {
        errno = EBUSY; /* better a loud failure than lost memory */
        return -1;
    }
    return (int)syscall(SYS_dup3, from, to, flags);
}

int dup2(int from, int to)
{
    if (is_guarded(to)) {
        errno = EBUSY;
        return -1;
    }
    return (int)syscall(SYS_dup2, from, to);
}
