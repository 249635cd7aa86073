/* What a program must not be, have or do to be checkpointed, and what is to be noted of it that /proc knows. */
#define _GNU_SOURCE
#include "freeze.h"

#include "desk.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/kcmp.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <unistd.h>

enum { LINE = PATH_MAX + 256, MEMORY_DEVICES = 1 /* major number of /dev/null, zero, random, ... */ };

static FILE *open_of(pid_t pid, const char *what)
{
    char path[LINE + 32];
    snprintf(path, sizeof path, "/proc/%d/%s", (int)pid, what);
    return fopen(path, "re");
}

static bool link_of(pid_t pid, const char *what, char target[PATH_MAX])
{
    char path[128];
    snprintf(path, sizeof path, "/proc/%d/%.40s", (int)pid, what);
    ssize_t length = readlink(path, target, PATH_MAX - 1);
    target[length > 0 ? length : 0] = 0;
    return length > 0;
}

static bool is_removed(const char *path)
{
    static const char mark[] = " (deleted)";
    size_t length = strlen(path);
    return length >= sizeof mark - 1 && !strcmp(path + length - (sizeof mark - 1), mark);
}

/* One line of /proc/PID/status. */
static bool check_status(const char *line, struct loaded *all)
{
    unsigned id[4];
    unsigned long mask;
    char word[32];
    if ((sscanf(line, "Uid: %u %u %u %u", &id[0], &id[1], &id[2], &id[3]) == 4 ||
         sscanf(line, "Gid: %u %u %u %u", &id[0], &id[1], &id[2], &id[3]) == 4) && (id[0] | id[1] | id[2] | id[3]))
        return tracee_fail("it does not run as root");
    if (sscanf(line, "Seccomp: %31s", word) == 1 && strcmp(word, "0"))
        return tracee_fail("it has a filter for its system calls (seccomp)");
    if (sscanf(line, "State: %31s", word) == 1 && *word == 'Z')
        return tracee_fail("it has ended");
    if (sscanf(line, "SigPnd: %lx", &mask) == 1 || sscanf(line, "ShdPnd: %lx", &mask) == 1)
        all->image.pending |= mask;
    sscanf(line, "Umask: %o", &all->image.umask);
    return true;
}

static bool check_children(pid_t pid)
{
    char path[64], word[32];
    snprintf(path, sizeof path, "/proc/%d/task", (int)pid);
    DIR *folder = opendir(path);
    bool alone = true;
    for (struct dirent *entry; folder && alone && (entry = readdir(folder));) {
        snprintf(path, sizeof path, "task/%.20s/children", entry->d_name);
        FILE *in = *entry->d_name == '.' ? NULL : open_of(pid, path);
        if (in && fscanf(in, "%31s", word) == 1)
            alone = tracee_fail("it has a child, process %s: only a single process can be checkpointed", word);
        if (in)
            fclose(in);
    }
    if (folder)
        closedir(folder);
    return alone;
}

static bool is_empty(pid_t pid, const char *what)
{
    FILE *in = open_of(pid, what);
    bool empty = !in || fgetc(in) == EOF;
    if (in)
        fclose(in);
    return empty;
}

static bool mentions(pid_t pid, const char *what, const char *text)
{
    char line[LINE];
    FILE *in = open_of(pid, what);
    bool found = false;
    while (in && !found && fgets(line, sizeof line, in))
        found = strstr(line, text);
    if (in)
        fclose(in);
    return found;
}

bool refuse_process(pid_t pid, struct loaded *all)
{
    char line[LINE], root[PATH_MAX];
    FILE *in = open_of(pid, "status");
    all->image.pending = 0;
    bool fine = in || tracee_fail("it has ended");
    while (fine && fgets(line, sizeof line, in))
        fine = check_status(line, all);
    if (in)
        fclose(in);
    if (!fine || !check_children(pid))
        return false;
    if (!mentions(pid, "maps", "excache_shim.so"))
        return tracee_fail("it has no ExCache: its memory is swapped, and only this blade's kernel knows to where");
    if (!is_empty(pid, "timers"))
        return tracee_fail("it has timers (timer_create)");
    if (!link_of(pid, "cwd", all->image.directory) || is_removed(all->image.directory))
        return tracee_fail("its working directory has been removed");
    if (!link_of(pid, "exe", all->image.program) || is_removed(all->image.program))
        return tracee_fail("its program file has been removed");
    if (!link_of(pid, "root", root) || strcmp(root, "/"))
        return tracee_fail("it has changed its root directory (chroot)");
    return true;
}

static bool same_file(pid_t a, int number_a, pid_t b, int number_b)
{
    return syscall(SYS_kcmp, a, b, KCMP_FILE, (unsigned long)number_a, (unsigned long)number_b) == 0;
}

/* Flags and offset of a descriptor; a lock cannot move. */
static bool read_info(pid_t pid, struct image_file *file)
{
    char line[LINE];
    snprintf(line, sizeof line, "fdinfo/%d", file->number);
    FILE *in = open_of(pid, line);
    bool locked = false;
    while (in && fgets(line, sizeof line, in)) {
        sscanf(line, "pos: %ld", &file->offset);
        sscanf(line, "flags: %o", (unsigned *)&file->flags);
        locked |= !strncmp(line, "lock:", 5);
    }
    if (in)
        fclose(in);
    file->cloexec = (file->flags & O_CLOEXEC) != 0;
    file->flags &= ~O_CLOEXEC;
    return !locked || tracee_fail("it holds a lock on %s", file->path);
}

static const char *kind_of(const char *target)
{
    static const char *const kinds[][2] = {
        {"socket:", "a socket"}, {"pipe:", "a pipe that is not its standard input or output"},
        {"anon_inode:[eventpoll]", "an epoll set"}, {"anon_inode:[userfaultfd]", "a pager that is just starting"},
        {"/dev/infiniband/", "an RDMA device"}, {"/dev/pts/", "a terminal that is not its standard input or output"},
        {"/dev/tty", "a terminal"}, {"/memfd:", "shared memory"}};
    for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++)
        if (!strncmp(target, kinds[i][0], strlen(kinds[i][0])))
            return kinds[i][1];
    return target;
}

/* A descriptor that is to be opened again by its path. */
static bool check_path(pid_t pid, struct image_file *file)
{
    char path[64];
    struct stat status;
    snprintf(path, sizeof path, "/proc/%d/fd/%d", (int)pid, file->number);
    bool device = !stat(path, &status) && S_ISCHR(status.st_mode) && major(status.st_rdev) == MEMORY_DEVICES;
    if (*file->path != '/' || !(device || S_ISREG(status.st_mode) || S_ISDIR(status.st_mode)))
        return tracee_fail("it has %s open (descriptor %d)", kind_of(file->path), file->number);
    if (is_removed(file->path))
        return tracee_fail("it has a file open that has been removed: %.300s", file->path);
    if (S_ISDIR(status.st_mode))
        return tracee_fail("it has a folder open: %.300s", file->path);
    if (device || !strncmp(file->path, VNODE "/", strlen(VNODE "/")))
        return true;
    if ((file->flags & O_ACCMODE) != O_RDONLY)
        return tracee_fail("it writes to %.300s, which is on this blade only (files under " VNODE " go with it)",
                           file->path);
    file->print = image_fingerprint(file->path);
    return file->print || tracee_fail("%.300s cannot be read: %s", file->path, strerror(errno));
}

static bool note_file(pid_t pid, pid_t split, struct loaded *all, int number)
{
    struct image_file *file = &all->file[all->image.files];
    char what[32];
    *file = (struct image_file){.number = number, .kind = FILE_PATH};
    snprintf(what, sizeof what, "fd/%d", number);
    if (!link_of(pid, what, file->path))
        return true; /* it has just been closed: that of whoever reads the folder */
    if (!read_info(pid, file))
        return false;
    for (int i = 0; i < 3 && file->kind == FILE_PATH; i++)
        if (same_file(pid, number, split, i)) {
            file->kind = FILE_STDIO;
            file->same = i;
        }
    for (uint32_t i = 0; i < all->image.files && file->kind == FILE_PATH; i++)
        if (same_file(pid, number, pid, all->file[i].number)) {
            file->kind = FILE_SAME;
            file->same = all->file[i].number;
        }
    if (file->kind == FILE_PATH && !check_path(pid, file))
        return false;
    all->image.files++;
    return true;
}

static int by_number(const void *a, const void *b)
{
    return *(const int *)a - *(const int *)b;
}

bool refuse_files(pid_t pid, pid_t split, struct loaded *all, const int32_t *own, size_t n_own)
{
    enum { FILES = 1024 };
    int number[FILES];
    size_t n = 0;
    char path[64];
    snprintf(path, sizeof path, "/proc/%d/fd", (int)pid);
    DIR *folder = opendir(path);
    for (struct dirent *entry; folder && n < FILES && (entry = readdir(folder));) {
        number[n] = atoi(entry->d_name);
        bool ours = *entry->d_name == '.';
        for (size_t i = 0; i < n_own; i++)
            ours |= own[i] == number[n];
        n += !ours;
    }
    if (folder)
        closedir(folder);
    if (n == FILES)
        return tracee_fail("it has more than %d files open", FILES);
    qsort(number, n, sizeof *number, by_number); /* so that the first of several that are the same is opened first */
    all->file = calloc(n + 1, sizeof *all->file);
    for (size_t i = 0; i < n; i++)
        if (!note_file(pid, split, all, number[i]))
            return false;
    return true;
}
