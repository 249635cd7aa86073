#define _GNU_SOURCE
#include "tier.h"

#include "desk.h"

#include <elf.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

enum { SCRIPTS = 4 /* interpreters that are scripts, as deep as the kernel follows them */ };

static bool has_interpreter(int file, const Elf64_Ehdr *header)
{
    for (unsigned i = 0; i < header->e_phnum; i++) {
        Elf64_Phdr part;
        off_t at = (off_t)(header->e_phoff + (uint64_t)i * header->e_phentsize);
        if (pread(file, &part, sizeof part, at) != sizeof part || part.p_type == PT_INTERP)
            return true; /* or broken: the kernel will say so */
    }
    return false;
}

bool tier_is_static(const char *path)
{
    union { Elf64_Ehdr elf; char text[PATH_MAX]; } head;
    char name[PATH_MAX];
    snprintf(name, sizeof name, "%s", path);
    for (int depth = 0; depth < SCRIPTS; depth++) {
        int file = open(name, O_RDONLY | O_CLOEXEC);
        ssize_t got = file < 0 ? -1 : pread(file, &head, sizeof head - 1, 0);
        bool elf = got >= (ssize_t)sizeof head.elf && !memcmp(head.elf.e_ident, ELFMAG, SELFMAG);
        bool found = elf && !has_interpreter(file, &head.elf);
        if (file >= 0)
            close(file);
        if (elf || got < 2 || memcmp(head.text, "#!", 2))
            return found;
        head.text[got] = 0;
        if (sscanf(head.text + 2, " %4095[^ \t\n]", name) != 1)
            return false;
    }
    return false;
}

void tier_enter(const char *job)
{
    char text[MESSAGE], path[PATH_MAX];
    int monitor = attach_monitor(); /* its own: the parent uses the other at the same time */
    snprintf(text, sizeof text, "swap %.200s", job);
    ask(monitor, text);
    close(monitor);
    snprintf(path, sizeof path, "%.4000s/cgroup.procs", text);
    int file = open(path, O_WRONLY | O_CLOEXEC);
    if (file < 0 || write(file, "0", 1) != 1)
        die(NOT_STARTED, "cannot enter the control group %s: %s", path, strerror(errno));
    close(file);
}

int tier_verdict(int monitor, const char *job, int status)
{
    char text[MESSAGE];
    if (status != 128 + SIGKILL && status != 128 + SIGBUS)
        return status;
    snprintf(text, sizeof text, "verdict %.200s", job);
    if (!request(monitor, text) || !*text)
        return status;
    fprintf(stderr, "rackless: %s\n", text);
    return INTERNAL;
}
