/* Checkpoints as files: taking one, putting it back, listing, forgetting. */
#define _GNU_SOURCE
#include "thaw.h"

#include "desk.h"

#include <dirent.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static const char taken_mark[] = ".taken";
static const struct thaw *taken; /* by this process, and not by its child */
static pid_t taker;

static void check_name(const char *name)
{
    if (!*name || strpbrk(name, "/ \t\n") || *name == '.' || strlen(name) >= IMAGE_WORD / 2)
        die(USAGE, "'%s' cannot be a checkpoint: see split checkpoint --list%s", name, "");
}

/* Free memory of this blade, in bytes. */
static uint64_t available(void)
{
    char line[128];
    uint64_t kib = 0;
    FILE *in = fopen("/proc/meminfo", "re");
    while (in && fgets(line, sizeof line, in) && sscanf(line, "MemAvailable: %lu", &kib) != 1) {
    }
    if (in)
        fclose(in);
    return kib << 10;
}

/* Does the program find here what it had there? */
static void check(const struct thaw *t)
{
    const struct loaded *all = &t->all;
    const char *wrong = NULL, *before = "";
    uint64_t print = 0;
    for (uint32_t i = 0; !wrong && i < all->image.maps; i++) {
        if (!all->map[i].print)
            continue;
        if (strcmp(before, all->map[i].path))
            print = image_fingerprint(all->map[i].path);
        before = all->map[i].path;
        wrong = print == all->map[i].print ? NULL : before;
    }
    for (uint32_t i = 0; !wrong && i < all->image.files; i++)
        if (all->file[i].kind == FILE_PATH && all->file[i].print &&
            image_fingerprint(all->file[i].path) != all->file[i].print)
            wrong = all->file[i].path;
    struct stat status;
    uint64_t needed = all->image.excache + (fstat(fileno(t->in), &status) ? 0 : (uint64_t)status.st_size);
    if (wrong || available() < needed) {
        char numbers[64];
        snprintf(numbers, sizeof numbers, "%lu MiB, and %lu are free", needed >> 20, available() >> 20);
        if (wrong)
            die(NOT_STARTED, "%s cannot go on here: %s is not what it was when the checkpoint was made",
                all->image.name, wrong);
        die(NOT_STARTED, "%s cannot go on here: it needs %s", all->image.name, numbers);
    }
}

static void put_back(void)
{
    if (taken && taker == getpid())
        rename(taken->taken, taken->path);
}

void thaw_take(struct thaw *t, const char *name)
{
    check_name(name);
    image_path(t->path, name);
    snprintf(t->taken, sizeof t->taken, "%.*s%s", PATH_MAX - 16, t->path, taken_mark);
    if (rename(t->path, t->taken))
        die(NOT_STARTED, access(t->taken, F_OK) ? "there is no checkpoint %s (restarted already?): %s"
                                                : "checkpoint %s is being restarted: %s", name, strerror(errno));
    taken = t;
    taker = getpid();
    atexit(put_back);
    t->in = fopen(t->taken, "re");
    int error = t->in ? image_read(t->in, &t->all) : errno;
    if (error)
        die(NOT_STARTED, "checkpoint %s cannot be read: %s", name, strerror(error));
    check(t);
}

void thaw_finish(const struct thaw *t)
{
    taken = NULL;
    unlink(t->taken);
    fclose(t->in);
}

static int by_name(const void *a, const void *b)
{
    return strcmp((*(const struct dirent *const *)a)->d_name, (*(const struct dirent *const *)b)->d_name);
}

static int is_whole(const struct dirent *entry)
{
    return *entry->d_name != '.' && !strstr(entry->d_name, ".part");
}

int thaw_list(void)
{
    struct dirent **entry;
    int n = scandir(IMAGE_FOLDER, &entry, is_whole, NULL);
    if (n > 0)
        qsort(entry, (size_t)n, sizeof *entry, by_name);
    printf("%-24s  %-10s  %10s  %s\n", "CHECKPOINT", "VNODE", "REMOTE MiB", "COMMAND");
    for (int i = 0; i < n; i++) {
        char path[PATH_MAX];
        struct loaded all;
        image_path(path, entry[i]->d_name);
        FILE *in = fopen(path, "re");
        if (in && !image_read(in, &all))
            printf("%-24s  %-10s  %10lu  %s%s\n", all.image.name, all.image.vnode, all.image.remote_pages >> 8,
                   all.image.command, strstr(entry[i]->d_name, taken_mark) ? " (being restarted)" : "");
        if (in)
            fclose(in);
    }
    return 0;
}

int thaw_discard(const char *name)
{
    struct thaw t;
    check_name(name);
    image_path(t.path, name);
    snprintf(t.taken, sizeof t.taken, "%.*s%s", PATH_MAX - 16, t.path, taken_mark);
    int monitor = attach_monitor();
    bool left = rename(t.path, t.taken) != 0; /* by a `split restart` that was killed */
    if (left && access(t.taken, F_OK))
        die(1, "there is no checkpoint %s: %s", name, strerror(errno));
    char text[MESSAGE];
    snprintf(text, sizeof text, "discard %s", name);
    if (!request(monitor, text)) {
        if (!left)
            rename(t.taken, t.path);
        die(1, "%s%s", text, "");
    }
    unlink(t.taken);
    return 0;
}
