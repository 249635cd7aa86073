/* swapd CGROUP BYTES: swap space on memory blades, for the programs in CGROUP, until standard input ends.
 *
 * Started by the process monitor, which hears on standard output, a line each:
 *
 *   ready /dev/nbdN       programs may begin
 *   lost BLADE BLOCKS     a memory blade has died, and so many pages with it. All of CGROUP is killed then: whose pages
 *                         they were is not to be known, and a program must not go on without some of its memory
 *   full                  the memory blades have no room; the kernel will end programs
 *   error WORDS           there is no swap space, and why
 *
 * While this process is stuck no page comes or goes. So it is locked in memory, in no cgroup with a limit, and the
 * kernel is told that it must not wait for its own writes (PR_SET_IO_FLUSHER).
 */
#define _GNU_SOURCE
#include "swap.h"

#include <errno.h>
#include <fcntl.h>
#include <glob.h>
#include <limits.h>
#include <linux/nbd.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/swap.h>
#include <unistd.h>

#ifndef SWAP_FLAG_DISCARD_PAGES
#define SWAP_FLAG_DISCARD_PAGES 0x40000 /* linux/swap.h: discard what is not used any more, as it comes */
#endif

enum { RETRY_SECONDS = 1, ATTACH_TRIES = 6000, ATTACH_US = 5000, STACK = 64 << 10 };

static struct swap swap;
static const char *group;
static char device_path[64];
static int device, ends[2];     /* ends: of the device's socket; [0] is the kernel's */
static bool full;
static pthread_t swapper;

static _Noreturn void fail(const char *what, const char *why)
{
    printf("error %s%s%s\n", what, why ? ": " : "", why ? why : "");
    fflush(stdout);
    _exit(1);
}

static void write_file(const char *path, const char *text)
{
    int file = open(path, O_WRONLY | O_CLOEXEC);
    if (file < 0 || write(file, text, strlen(text)) < 0)
        fprintf(stderr, "swapd: %s: %s\n", path, strerror(errno));
    if (file >= 0)
        close(file);
}

static void kill_group(void)
{
    char path[PATH_MAX];
    snprintf(path, sizeof path, "%s/cgroup.kill", group);
    write_file(path, "1");
}

static void lost(const char *name, uint64_t blocks)
{
    if (!name) {
        if (!full)
            puts("full");
        full = true;
    } else {
        if (blocks) /* told first: who asks why its program ended must find the reason */
            printf("lost %s %lu\n", name, (unsigned long)blocks);
        fflush(stdout);
        if (blocks)
            kill_group();
    }
    fflush(stdout);
}

/* With a small stack: all of it is locked in memory. */
static bool start(pthread_t *thread, void *(*run)(void *))
{
    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
    pthread_attr_setstacksize(&attributes, STACK);
    return !pthread_create(thread, &attributes, run, NULL);
}

/* The first of the kernel's devices that nobody uses, ready to be attached. */
static int open_device(uint64_t bytes)
{
    glob_t found;
    if (glob("/dev/nbd*", 0, NULL, &found))
        return -ENODEV;
    int error = -EBUSY;
    for (size_t i = 0; i < found.gl_pathc; i++) {
        char attached[PATH_MAX];
        const char *name = strrchr(found.gl_pathv[i], '/') + 1;
        if (strchr(name, 'p'))
            continue; /* a partition */
        snprintf(attached, sizeof attached, "/sys/block/%s/pid", name);
        if (!access(attached, F_OK))
            continue;
        int file = open(found.gl_pathv[i], O_RDWR | O_CLOEXEC);
        if (file < 0) {
            error = -errno;
            continue;
        }
        if (!ioctl(file, NBD_SET_BLKSIZE, (unsigned long)SWAP_BLOCK) &&
            !ioctl(file, NBD_SET_SIZE_BLOCKS, (unsigned long)(bytes / SWAP_BLOCK)) &&
            !ioctl(file, NBD_SET_FLAGS, (unsigned long)(NBD_FLAG_HAS_FLAGS | NBD_FLAG_SEND_TRIM)) &&
            !ioctl(file, NBD_SET_SOCK, ends[0])) {
            snprintf(device_path, sizeof device_path, "/dev/%.40s", name);
            char limit[PATH_MAX], text[16];
            snprintf(limit, sizeof limit, "/sys/block/%s/queue/max_sectors_kb", name);
            snprintf(text, sizeof text, "%d", SWAP_REQUEST >> 10);
            write_file(limit, text);
            globfree(&found);
            return file;
        }
        error = -errno;
        close(file);
    }
    globfree(&found);
    return error;
}

/* What mkswap writes (linux/swap.h: union swap_header). */
static void make_header(uint64_t bytes)
{
    uint32_t head[] = {1, (uint32_t)(bytes / SWAP_BLOCK - 1), 0}; /* version, last page, bad pages */
    memcpy(swap_first_block() + 1024, head, sizeof head);
    memcpy(swap_first_block() + SWAP_BLOCK - 10, "SWAPSPACE2", 10);
}

/* Carries the device's requests to us, until it is detached. */
static void *attach(void *unused)
{
    (void)unused;
    ioctl(device, NBD_DO_IT);
    return NULL;
}

/* Whether the device has its size: `attach` is so far. */
static bool attached(void)
{
    char path[PATH_MAX];
    unsigned long sectors = 0;
    snprintf(path, sizeof path, "/sys/block/%s/size", strrchr(device_path, '/') + 1);
    FILE *file = fopen(path, "re");
    bool known = file && fscanf(file, "%lu", &sectors) == 1;
    if (file)
        fclose(file);
    return known && sectors;
}

/* What reads the device, and so must not be the thread that serves it. */
static void *begin(void *unused)
{
    (void)unused;
    for (int tries = 0; !attached(); tries++) {
        if (tries == ATTACH_TRIES)
            fail("the kernel does not attach", device_path);
        usleep(ATTACH_US);
    }
    if (swapon(device_path, SWAP_FLAG_DISCARD | SWAP_FLAG_DISCARD_PAGES))
        fail("swapon", strerror(errno));
    printf("ready %s\n", device_path);
    fflush(stdout);
    return NULL;
}

static void *end(void *unused)
{
    (void)unused;
    pthread_join(swapper, NULL);
    while (swapoff(device_path)) { /* pages of others: the kernel has no room for them here now */
        fprintf(stderr, "swapd: swapoff: %s\n", strerror(errno));
        sleep(RETRY_SECONDS);
    }
    ioctl(device, NBD_DISCONNECT); /* which ends swap_serve */
    return NULL;
}

/* Standard input has ended: our programs have, or the process monitor has, and nothing of theirs is to stay. */
static bool finish(void)
{
    static bool begun;
    static pthread_t thread;
    if (!begun) {
        kill_group();
        begun = start(&thread, end);
    }
    usleep(1000); /* the descriptor stays readable */
    return true;
}

int main(int argc, char **argv)
{
    uint64_t bytes = argc == 3 ? strtoull(argv[2], NULL, 10) : 0;
    if (!bytes)
        fail("usage: swapd CGROUP BYTES", NULL);
    group = argv[1];
    swap.lost = lost;
    signal(SIGPIPE, SIG_IGN);
    write_file("/proc/self/oom_score_adj", "-1000");
    const char *why = swap_open(&swap, bytes);
    if (why)
        fail(why, NULL);
    if (mlockall(MCL_CURRENT | MCL_FUTURE) || prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0))
        fail("cannot lock memory", strerror(errno));
    make_header(bytes);
    if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends))
        fail("socketpair", strerror(errno));
    device = open_device(bytes);
    if (device < 0)
        fail("no NBD device (is the module nbd there?)", strerror(-device));
    pthread_t carrier;
    if (!start(&carrier, attach) || !start(&swapper, begin))
        fail("no threads", strerror(errno));
    swap_serve(&swap, ends[1], STDIN_FILENO, finish);
    return 0;
}
