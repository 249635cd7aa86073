/* Life of the preloaded library: heaps, the moment paging starts, fork, exit.
 *
 * RACKLESS_EXCACHE   bytes of the ExCache; without it nothing is ever paged
 * RACKLESS_JOB       directory for counters
 * RACKLESS_REPLICAS  copies of remote memory; 1 without it
 * RACKLESS_WAYS, RACKLESS_POLICY, RACKLESS_VICTIM, RACKLESS_PREFETCH, RACKLESS_POOL
 *                    how the ExCache is organised (organisation.h); `split` has checked them
 */
#define _GNU_SOURCE
#include "shim.h"

#include "counters.h"
#include "pager.h"

#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

enum {
    MANAGED_PAGES = 8 << 20,    /* 32 GiB of address space */
    LOCAL_PAGES = 64 << 10,     /* 256 MiB */
};

static struct heap managed, local;
static pthread_once_t once = PTHREAD_ONCE_INIT;
static _Thread_local bool thread_is_local __attribute__((tls_model("initial-exec")));

static size_t excache_pages;
static uint32_t copies = 1;
static struct organisation organisation;
static char job[200];
static const struct pager *pager;   /* once paging */
static bool is_child;               /* forked after paging began: our memory is served by the parent's pager */

static void enter_thread(void)
{
    thread_is_local = true;
}

bool shim_is_local(void)
{
    return thread_is_local;
}

/* The pager's library is beside this one. Looked up when it is needed: that may be in another library's constructor,
 * before ours has run (jemalloc maps its first chunks in one). */
static void *open_pager(void)
{
    char path[300];
    Dl_info self;
    const char *slash = dladdr((void *)open_pager, &self) ? strrchr(self.dli_fname, '/') : NULL;
    int length = slash ? (int)(slash - self.dli_fname) + 1 : 0;
    snprintf(path, sizeof path, "%.*sexcache_pager.so", length, self.dli_fname);
    return dlopen(path, RTLD_NOW | RTLD_LOCAL);
}

static void load_pager(void)
{
    static const struct pager_config config_template = {
        .enter_thread = enter_thread, .guard = shim_guard, .close = shim_close};
    static struct pager_config config;
    config = config_template;
    config.excache_pages = excache_pages;
    config.organisation = organisation;
    config.job = job;
    config.copies = copies;
    bool before = thread_is_local;
    thread_is_local = true; /* what libraries allocate now, the pager thread may use */
    void *library = open_pager();
    const struct pager *(*start)(struct arena *, const struct pager_config *) = NULL;
    if (library)
        *(void **)&start = dlsym(library, "pager_start");
    if (start)
        pager = start(&managed.arena, &config);
    else
        dprintf(STDERR_FILENO, "rackless: no remote memory: %s\n", dlerror());
    thread_is_local = before;
}

static void shrink(struct arena *arena, size_t reserved)
{
    pager->give_back(arena, reserved);
}

static int grow(struct arena *arena, size_t top)
{
    if (is_child) {
        arena->reserved = arena->pages;
        return 0;
    }
    if (!pager) {
        /* The run being taken is not touched yet, so what is touched still fits the ExCache. */
        load_pager();
        if (!pager)
            return ENOMEM;
        arena->shrink = shrink;
        arena->long_run = 1; /* from now on an unneeded page costs a flush, if nobody drops it */
    }
    return pager->reserve(arena, top);
}

/* ---- what a program touches that never outgrows its ExCache ---- */

static size_t most_touched, looked_at;

static size_t touched(void)
{
    unsigned char present[1024];
    size_t sum = 0;
    for (size_t page = 0; page < managed.arena.top; page += sizeof present) {
        size_t n = managed.arena.top - page < sizeof present ? managed.arena.top - page : sizeof present;
        if (syscall(SYS_mincore, arena_address(&managed.arena, page), n << PAGE_SHIFT, present))
            break;
        for (size_t i = 0; i < n; i++)
            sum += present[i] & 1;
    }
    return sum;
}

/* Memory is about to be given to the kernel. Looking costs, so we look only if there is more of it than when we looked. */
static void note_touched(void)
{
    if (managed.arena.in_use <= looked_at + looked_at / 8)
        return;
    looked_at = managed.arena.in_use;
    size_t now = touched();
    if (now > most_touched)
        most_touched = now;
}

/* In a child the parent still holds the old bytes for us: give us memory that it does not know. */
static void replace(char *address, size_t bytes)
{
    static const char text[] = "rackless: a forked child has too many mappings (vm.max_map_count): it ends here\n";
    if (syscall(SYS_mmap, address, bytes, PROT_READ | PROT_WRITE,
                MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0L) != -1)
        return;
    if (write(STDERR_FILENO, text, sizeof text - 1) < 0) {
        /* nobody to tell */
    }
    syscall(SYS_exit_group, 70); /* it would find old bytes where it expects zeros */
}

static void drop(struct arena *arena, size_t page, size_t count)
{
    if (arena == &managed.arena && excache_pages && !pager)
        note_touched();
    char *address = arena_address(arena, page);
    if (is_child)
        replace(address, count << PAGE_SHIFT);
    else if (pager && arena == &managed.arena)
        pager->drop(arena, page, count);
    else
        syscall(SYS_madvise, address, count << PAGE_SHIFT, MADV_DONTNEED);
}

static void settle(struct arena *arena)
{
    if (pager && !is_child && arena == &managed.arena)
        pager->settle();
}

static int no_growth(struct arena *arena, size_t top)
{
    (void)arena, (void)top;
    return ENOMEM;
}

static uint32_t number(const char *name)
{
    const char *value = getenv(name);
    return value ? (uint32_t)strtoul(value, NULL, 10) : 0;
}

static void read_organisation(void)
{
    const char *policy = getenv("RACKLESS_POLICY"), *pool = getenv("RACKLESS_POOL");
    organisation = (struct organisation){
        .ways = number("RACKLESS_WAYS"),
        .policy = !policy ? POLICY_FIFO : *policy == 'l' ? POLICY_LRU : *policy == 'r' ? POLICY_RANDOM : POLICY_FIFO,
        .victim = number("RACKLESS_VICTIM"),
        .prefetch = number("RACKLESS_PREFETCH"),
        .unpacked = pool && !strcmp(pool, "off"),
    };
}

static void start(void)
{
    managed.arena.grow = grow;
    managed.arena.drop = local.arena.drop = drop;
    local.arena.grow = no_growth;
    managed.arena.settle = local.arena.settle = settle;
    if (heap_init(&managed, MANAGED_PAGES) || heap_init(&local, LOCAL_PAGES)) {
        static const char text[] = "rackless: no address space (is there an ulimit -v?)\n";
        if (write(STDERR_FILENO, text, sizeof text - 1) < 0) {
            /* nobody to tell */
        }
        _exit(70);
    }
    const char *excache = getenv("RACKLESS_EXCACHE"), *where = getenv("RACKLESS_JOB");
    if (!excache || !where)
        return;
    const char *replicas = getenv("RACKLESS_REPLICAS");
    if (replicas && !strcmp(replicas, "2"))
        copies = 2;
    read_organisation();
    excache_pages = strtoull(excache, NULL, 10) >> PAGE_SHIFT;
    snprintf(job, sizeof job, "%s", where);
    if (excache_pages)
        managed.arena.reserved = excache_pages < managed.arena.pages ? excache_pages : managed.arena.pages;
}

struct heap *shim_heap(void)
{
    pthread_once(&once, start);
    return thread_is_local ? &local : &managed;
}

struct heap *shim_owner(const void *block)
{
    return arena_has(&managed.arena, block) ? &managed : arena_has(&local.arena, block) ? &local : NULL;
}

struct heap *shim_managed(const void *address)
{
    return arena_has(&managed.arena, address) ? &managed : NULL;
}

/* ---- fork ---- */

static _Thread_local bool hushed __attribute__((tls_model("initial-exec")));

static void before_fork(void)
{
    hushed = pager && !is_child;
    if (hushed)
        pager->hush(true);
    pthread_mutex_lock(&managed.lock);
    pthread_mutex_lock(&local.lock);
    if (pager && !is_child)
        pager->before_fork();
}

static void after_fork_parent(void)
{
    if (pager && !is_child)
        pager->after_fork_parent();
    pthread_mutex_unlock(&local.lock);
    pthread_mutex_unlock(&managed.lock);
    if (hushed)
        pager->hush(false);
}

static void after_fork_child(void)
{
    if (pager && !is_child) {
        is_child = true;
        managed.arena.long_run = NO_PAGE;
        managed.arena.shrink = NULL;
        pager->after_fork_child();
    }
    pthread_mutex_unlock(&local.lock);
    pthread_mutex_unlock(&managed.lock);
}

__attribute__((constructor)) static void loaded(void)
{
    pthread_once(&once, start);
    pthread_atfork(before_fork, after_fork_parent, after_fork_child);
}

/* ---- exit ---- */

/* A program that never outgrew its ExCache still reports what it touched. */
static void report_small(void)
{
    if (!excache_pages || is_child)
        return;
    struct counters count = {.magic = COUNTERS_MAGIC, .excache_bytes = (uint64_t)excache_pages << PAGE_SHIFT};
    size_t now = touched();
    count.pages_touched = count.zero_fills = now > most_touched ? now : most_touched;
    prctl(PR_GET_NAME, count.command);
    char path[256];
    snprintf(path, sizeof path, "%s/%d.counters", job, (int)getpid());
    int file = open(path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    if (file >= 0) {
        if (write(file, &count, sizeof count) < 0) {
            /* counters are not worth disturbing the program */
        }
        close(file);
    }
}

__attribute__((destructor)) static void unloading(void)
{
    if (is_child)
        return;
    if (pager)
        pager->before_exit();
    else
        report_small();
}

void _exit(int status)
{
    unloading();
    for (;;)
        syscall(SYS_exit_group, status);
}

void _Exit(int status) __attribute__((alias("_exit")));
