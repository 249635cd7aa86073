#define _GNU_SOURCE
#include "attach.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

/* What is called here must not touch the program's memory, where its environment and locale may be (so no strerror). */

struct counters *attach_counters(const char *job, size_t excache_pages)
{
    char path[256];
    snprintf(path, sizeof path, "%s/%d.counters", job, (int)getpid());
    int file = open(path, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    void *memory = MAP_FAILED;
    if (file >= 0 && ftruncate(file, sizeof(struct counters)) == 0)
        memory = mmap(NULL, sizeof(struct counters), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (file >= 0)
        close(file);
    struct counters *count = memory == MAP_FAILED ? raw_memory(sizeof *count) : memory;
    if (count) {
        count->magic = COUNTERS_MAGIC;
        count->excache_bytes = (uint64_t)excache_pages << PAGE_SHIFT;
        count->managed = 1;
        prctl(PR_GET_NAME, count->command);
    }
    return count;
}

const char *attach_device(struct lines *l)
{
    static char why[100];
    size_t bytes = l->arena->pages / REGION_PAGES * sizeof *l->region;
    l->region_file = memfd_create("rackless-regions", MFD_CLOEXEC);
    if (l->region_file < 0 || ftruncate(l->region_file, (off_t)bytes))
        return "no memory for the pager's books";
    l->region = (void *)syscall(SYS_mmap, NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, l->region_file, 0L);
    if (l->region == MAP_FAILED || madvise(l->region, bytes, MADV_DONTFORK))
        return "no memory for the pager's books";
    int error = fabric_open(&l->fabric, l->landing, lines_registered(l));
    if (!error)
        return NULL;
    snprintf(why, sizeof why, "no RDMA device: %s", strerrordesc_np(-error));
    return why;
}

const char *attach_blades(struct lines *l, uint32_t copies)
{
    static char why[100];
    l->fabric.other[0] = l->monitor.news;
    l->fabric.other[1] = -1;
    l->count->blades = l->monitor.blades;
    uint32_t connected = 0;
    for (uint32_t i = 0; i < l->monitor.blades; i++) {
        memcpy(l->count->blade[i].name, l->monitor.name[i], COUNTERS_NAME);
        if (fabric_link_create(&l->fabric, &l->link[i]))
            return "no more queue pairs";
        if (monitor_connect(&l->monitor, i, &l->fabric, &l->link[i]))
            fabric_link_destroy(&l->link[i]); /* its blade may be dying: others will do */
        else
            connected++;
    }
    if (!connected)
        return l->monitor.error;
    if (connected < copies) {
        snprintf(why, sizeof why, "%u copies need as many memory blades, and there is %u", copies, connected);
        return why;
    }
    return NULL;
}

static int open_uffd(void)
{
    int uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
    struct uffdio_api api = {.api = UFFD_API, .features = UFFD_FEATURE_PAGEFAULT_FLAG_WP | UFFD_FEATURE_EVENT_FORK};
    if (uffd < 0 || ioctl(uffd, UFFDIO_API, &api))
        return -errno;
    return uffd;
}

const char *attach_faults(const struct arena *arena, int *uffd)
{
    static char why[100];
    *uffd = open_uffd();
    if (*uffd < 0) {
        snprintf(why, sizeof why, "userfaultfd is not available: %s", strerrordesc_np(-*uffd));
        return why;
    }
    struct uffdio_register whole = {
        .range = {(uintptr_t)arena->base, arena->pages << PAGE_SHIFT},
        .mode = UFFDIO_REGISTER_MODE_MISSING | UFFDIO_REGISTER_MODE_WP,
    };
    if (ioctl(*uffd, UFFDIO_REGISTER, &whole)) {
        snprintf(why, sizeof why, "userfaultfd refuses the program's memory: %s", strerrordesc_np(errno));
        close(*uffd);
        return why;
    }
    return NULL;
}

void attach_own(const struct lines *l, int uffd, int own[ATTACH_OWN])
{
    const int all[ATTACH_OWN] = {uffd, l->region_file, l->monitor.socket, l->monitor.news, l->fabric.channel->fd,
                                 l->fabric.context->cmd_fd, l->fabric.context->async_fd};
    memcpy(own, all, sizeof all);
}

void attach_guard(const struct lines *l, int uffd, void (*guard)(int file))
{
    int own[ATTACH_OWN];
    attach_own(l, uffd, own);
    for (size_t i = 0; i < ATTACH_OWN; i++)
        guard(own[i]);
}
