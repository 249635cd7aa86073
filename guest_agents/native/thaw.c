#define _GNU_SOURCE
#include "thaw.h"

#include "desk.h"
#include "park.h"
#include "tracee.h"

#include <elf.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/prctl.h>
#include <linux/sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

enum {
    RESUME_SECONDS = 60,
    CHUNK = 64 * IMAGE_PAGE,
    SCRATCH_STEP = 1 << 30,
    MOVED = 64 * IMAGE_PAGE,    /* behind the scratch page: where the kernel's pages are on their way */
    ROOM = MOVED * 2,
};

/* ---- the child: what a process can do for itself ---- */

/* Descriptors that are needed for a moment, above all that the program has: standard streams, the program, its maps. */
static int spare(const struct loaded *all, int n)
{
    int most = 2;
    for (uint32_t i = 0; i < all->image.files; i++)
        if (all->file[i].number > most)
            most = all->file[i].number;
    return most + 1 + n;
}

enum { SPARE_PROGRAM = 3, SPARE_MAPS };

/* The number, among spare ones, of a mapping's file: neighbours share one. */
static int map_spare(const struct loaded *all, uint32_t i)
{
    int n = -1;
    const char *before = "";
    for (uint32_t k = 0; k <= i; k++)
        if (all->map[k].kind == MAP_OF_FILE) {
            n += strcmp(before, all->map[k].path) != 0;
            before = all->map[k].path;
        }
    return SPARE_MAPS + n;
}

static void move(int from, int to, const char *what)
{
    if (from < 0 || (from != to && dup3(from, to, O_CLOEXEC) < 0))
        die(NOT_STARTED, "cannot open %s: %s", what, strerror(errno));
    if (from != to)
        close(from);
}

static void open_file(const struct loaded *all, const struct image_file *file)
{
    int from = file->kind == FILE_STDIO ? spare(all, file->same) : file->same;
    if (file->kind == FILE_PATH) {
        from = open(file->path, file->flags | O_CLOEXEC | O_NOCTTY);
        if (from < 0 || (file->offset && lseek(from, file->offset, SEEK_SET) < 0))
            die(NOT_STARTED, "cannot open %s again: %s", file->path, strerror(errno));
    }
    if (from != file->number && dup3(from, file->number, O_CLOEXEC) < 0)
        die(NOT_STARTED, "cannot open %s again: %s", file->path, strerror(errno));
    if (file->kind == FILE_PATH && from != file->number)
        close(from);
    fcntl(file->number, F_SETFD, file->cloexec ? FD_CLOEXEC : 0);
}

static void open_files(const struct loaded *all)
{
    bool used[3] = {false};
    for (int i = 0; i < 3; i++)
        if (fcntl(i, F_GETFD) >= 0)
            dup3(i, spare(all, i), O_CLOEXEC);
    move(open(all->image.program, O_RDONLY | O_CLOEXEC), spare(all, SPARE_PROGRAM), all->image.program);
    const char *before = "";
    for (uint32_t i = 0; i < all->image.maps; i++)
        if (all->map[i].kind == MAP_OF_FILE && strcmp(before, all->map[i].path)) {
            before = all->map[i].path;
            move(open(before, O_RDONLY | O_CLOEXEC), spare(all, map_spare(all, i)), before);
        }
    close_range(3, (unsigned)spare(all, 0) - 1, 0);
    for (uint32_t i = 0; i < all->image.files; i++) {
        open_file(all, &all->file[i]);
        if (all->file[i].number < 3)
            used[all->file[i].number] = true;
    }
    for (int i = 0; i < 3; i++)
        if (!used[i])
            close(i);
}

_Noreturn void thaw_become(const struct thaw *t)
{
    const struct loaded *all = &t->all;
    sigset_t set;
    sigfillset(&set);
    sigprocmask(SIG_BLOCK, &set, NULL);
    if (chdir(all->image.directory))
        die(NOT_STARTED, "cannot go on in %s: %s", all->image.directory, strerror(errno));
    umask(all->image.umask);
    open_files(all);
    for (int i = 0; i < IMAGE_SIGNALS; i++)
        if (i + 1 != SIGKILL && i + 1 != SIGSTOP)
            syscall(SYS_rt_sigaction, i + 1, &all->image.action[i], NULL, 8);
    ptrace(PTRACE_TRACEME, 0, 0, 0);
    kill(getpid(), SIGSTOP);
    _exit(NOT_STARTED); /* never: it becomes another program while it is stopped */
}

pid_t fork_as(pid_t number)
{
    struct clone_args args = {.exit_signal = SIGCHLD, .set_tid = (uintptr_t)&number, .set_tid_size = 1};
    return (pid_t)syscall(SYS_clone3, &args, sizeof args);
}

pid_t fork_apart(void)
{
    enum { TRIES = 4 };
    unsigned most = 0, random;
    FILE *in = fopen("/proc/sys/kernel/pid_max", "re");
    bool known = in && fscanf(in, "%u", &most) == 1;
    if (in)
        fclose(in);
    for (int i = 0; known && i < TRIES && getrandom(&random, sizeof random, 0) == sizeof random; i++) {
        pid_t pid = fork_as((pid_t)(most / 2 + random % (most / 2)));
        if (pid >= 0)
            return pid;
    }
    return fork(); /* only root may choose */
}

/* ---- the parent: memory and threads ---- */

struct making {
    struct tracee tracee;
    const struct loaded *all;
    uint64_t scratch;
};

static bool call(struct making *m, pid_t thread, const char *what, long number, uint64_t a, uint64_t b, uint64_t c,
                 uint64_t d, uint64_t e, uint64_t f)
{
    long result = tracee_call(&m->tracee, thread, number, a, b, c, d, e, f);
    return (result >= 0 || result < -4095) || tracee_fail("%s: %s", what, strerror((int)-result));
}

struct range {
    uint64_t start, end;
    bool kernels;
};

/* What the child has mapped now. */
static size_t read_ranges(const struct making *m, struct range *range, size_t most)
{
    char path[64], line[PATH_MAX + 128];
    size_t n = 0;
    snprintf(path, sizeof path, "/proc/%d/maps", (int)m->tracee.pid);
    FILE *in = fopen(path, "re");
    while (in && n < most && fgets(line, sizeof line, in))
        if (!strstr(line, "[vsyscall]") && sscanf(line, "%lx-%lx", &range[n].start, &range[n].end) == 2) {
            range[n].kernels = strstr(line, "[vdso") || strstr(line, "[vvar");
            n++;
        }
    if (in)
        fclose(in);
    return n;
}

/* An address at which neither process has anything. */
static uint64_t free_address(const struct loaded *all, const struct range *range, size_t n)
{
    for (uint64_t at = SCRATCH_STEP;; at += SCRATCH_STEP) {
        bool free = true;
        for (uint32_t i = 0; i < all->image.maps; i++)
            free &= all->map[i].start >= at + ROOM || all->map[i].end <= at;
        for (size_t i = 0; i < n; i++)
            free &= range[i].start >= at + ROOM || range[i].end <= at;
        if (free)
            return at;
    }
}

static bool move_kernels(struct making *m, uint64_t from, uint64_t to, uint64_t bytes)
{
    if (!call(m, m->tracee.pid, "the kernel's pages cannot be moved", SYS_mremap, from, bytes, bytes,
              MREMAP_MAYMOVE | MREMAP_FIXED, to, 0))
        return false;
    if (m->tracee.gate - from < bytes)
        m->tracee.gate = m->tracee.gate - from + to;
    return true;
}

/* Only the kernel's own pages stay, and go to where they were in the old process. */
static bool clear(struct making *m)
{
    enum { RANGES = 256 };
    struct range range[RANGES];
    size_t n = read_ranges(m, range, RANGES);
    pid_t pid = m->tracee.pid;
    m->scratch = free_address(m->all, range, n);
    if (!call(m, pid, "no memory", SYS_mmap, m->scratch, IMAGE_PAGE, PROT_READ | PROT_WRITE,
              MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, (uint64_t)-1, 0))
        return false;
    uint64_t moved = m->scratch + MOVED;
    uint32_t k = 0;
    for (size_t i = 0; i < n; i++)
        if (!range[i].kernels &&
            !call(m, pid, "memory cannot be given back", SYS_munmap, range[i].start, range[i].end - range[i].start, 0, 0, 0, 0))
            return false;
    for (int back = 0; back < 2; back++, k = 0)
        for (size_t i = 0; i < n; i++) {
            if (!range[i].kernels)
                continue;
            while (k < m->all->image.maps && m->all->map[k].kind != MAP_OF_VDSO)
                k++;
            uint64_t bytes = range[i].end - range[i].start, way = moved;
            if (k == m->all->image.maps || m->all->map[k].end - m->all->map[k].start != bytes)
                return tracee_fail("this blade's kernel is another one");
            for (size_t j = 0; j < i; j++)
                way += range[j].kernels ? range[j].end - range[j].start : 0;
            if (!move_kernels(m, back ? way : range[i].start, back ? m->all->map[k].start : way, bytes))
                return false;
            k++;
        }
    return true;
}

static bool map_all(struct making *m)
{
    static const struct { uint32_t bit; int advice; } advices[] = {
        {IMAGE_NOHUGEPAGE, MADV_NOHUGEPAGE}, {IMAGE_DONTFORK, MADV_DONTFORK}, {IMAGE_WIPEONFORK, MADV_WIPEONFORK}};
    const struct loaded *all = m->all;
    pid_t pid = m->tracee.pid;
    for (uint32_t i = 0; i < all->image.maps; i++) {
        const struct image_map *map = &all->map[i];
        uint64_t bytes = map->end - map->start;
        if (map->kind == MAP_OF_VDSO)
            continue;
        int file = map->kind == MAP_OF_FILE ? spare(all, map_spare(all, i)) : -1;
        if (!call(m, pid, "its memory map cannot be made", SYS_mmap, map->start, bytes, map->protection, map->flags,
                  (uint64_t)file, file < 0 ? 0 : map->offset))
            return false;
        for (size_t k = 0; k < sizeof advices / sizeof *advices; k++)
            if (map->advice & advices[k].bit &&
                !call(m, pid, "madvise", SYS_madvise, map->start, bytes, (uint64_t)advices[k].advice, 0, 0, 0))
                return false;
    }
    return true;
}

/* The kernel's idea of where its parts are; and descriptors that were needed for the maps go. */
static bool lay_out(struct making *m)
{
    const struct image *i = &m->all->image;
    struct prctl_mm_map map = {
        .start_code = i->start_code, .end_code = i->end_code, .start_data = i->start_data, .end_data = i->end_data,
        .start_brk = i->start_brk, .brk = i->brk, .start_stack = i->start_stack, .arg_start = i->arg_start,
        .arg_end = i->arg_end, .env_start = i->env_start, .env_end = i->env_end,
        .auxv = (void *)(m->scratch + sizeof map), .auxv_size = i->auxv_bytes,
        .exe_fd = (uint32_t)spare(m->all, SPARE_PROGRAM)};
    tracee_write(&m->tracee, m->scratch, &map, sizeof map);
    tracee_write(&m->tracee, m->scratch + sizeof map, i->auxv, i->auxv_bytes);
    return call(m, m->tracee.pid, "the kernel refuses its layout", SYS_prctl, PR_SET_MM, PR_SET_MM_MAP, m->scratch,
                sizeof map, 0, 0) &&
           call(m, m->tracee.pid, "close_range", SYS_close_range, (uint64_t)spare(m->all, 0), ~0u, 0, 0, 0, 0);
}

static bool fill(struct making *m, FILE *in)
{
    static char data[CHUNK];
    struct image_run run;
    while (fread(&run, sizeof run, 1, in) == 1) {
        if (!run.pages)
            return true;
        uint64_t address = run.address, left = run.pages * IMAGE_PAGE;
        for (uint64_t bytes; left; left -= bytes, address += bytes) {
            bytes = left < CHUNK ? left : CHUNK;
            if (fread(data, 1, bytes, in) != bytes)
                return tracee_fail("its image has an early end");
            if (!tracee_write(&m->tracee, address, data, bytes))
                return tracee_fail("its memory cannot be written: %s", strerror(errno));
        }
    }
    return tracee_fail("its image has an early end");
}

/* With the number it had: the C library's locks know their owner by it. The pager holds none of these. */
static pid_t make_thread(struct making *m, const struct image_thread *t, bool is_pager)
{
    struct {
        struct clone_args args;
        int32_t tid;
    } text = {.args = {.flags = CLONE_VM | CLONE_FS | CLONE_FILES | CLONE_SIGHAND | CLONE_THREAD | CLONE_SYSVSEM,
                       .set_tid = m->scratch + offsetof(__typeof__(text), tid), .set_tid_size = 1}, .tid = t->tid};
    long tid = -EEXIST;
    for (int tries = 0; tries < 1 + is_pager && tid < 0; tries++) {
        text.args.set_tid_size = tries ? 0 : 1;
        text.args.set_tid = tries ? 0 : text.args.set_tid;
        tracee_write(&m->tracee, m->scratch, &text, sizeof text);
        tid = tracee_call(&m->tracee, m->tracee.pid, SYS_clone3, m->scratch, sizeof text.args, 0, 0, 0, 0);
    }
    int status;
    if (tid < 0 || waitpid((pid_t)tid, &status, __WALL) != (pid_t)tid || !WIFSTOPPED(status)) {
        tracee_fail("thread number %d is %s", t->tid, tid == -EEXIST ? "another's on this blade" : "not to be had");
        return 0;
    }
    return (pid_t)tid;
}

/* What the kernel knows of a thread beside its registers. */
static bool dress_thread(struct making *m, pid_t tid, const struct image_thread *t)
{
    int32_t number = tid; /* what the C library takes for its own number */
    if (!call(m, tid, "set_tid_address", SYS_set_tid_address, t->tid_address, 0, 0, 0, 0, 0) ||
        (t->tid_address && !tracee_write(&m->tracee, t->tid_address, &number, sizeof number)))
        return false;
    if (t->robust && !call(m, tid, "set_robust_list", SYS_set_robust_list, t->robust, t->robust_bytes, 0, 0, 0, 0))
        return false;
    if (t->rseq && !call(m, tid, "rseq", SYS_rseq, t->rseq, t->rseq_bytes, 0, t->rseq_signature, 0, 0))
        return false;
    if (!(t->altstack.ss_flags & SS_DISABLE)) {
        stack_t stack = t->altstack;
        stack.ss_flags &= ~SS_ONSTACK;
        tracee_write(&m->tracee, m->scratch, &stack, sizeof stack);
        if (!call(m, tid, "sigaltstack", SYS_sigaltstack, m->scratch, 0, 0, 0, 0, 0))
            return false;
    }
    tracee_write(&m->tracee, m->scratch, t->name, sizeof t->name);
    return call(m, tid, "prctl", SYS_prctl, PR_SET_NAME, m->scratch, 0, 0, 0, 0);
}

static bool forget_rseq(struct making *m)
{
    struct __ptrace_rseq_configuration own = {0};
    return ptrace(PTRACE_GET_RSEQ_CONFIGURATION, m->tracee.pid, sizeof own, &own) <= 0 || !own.rseq_abi_pointer ||
           call(m, m->tracee.pid, "rseq", SYS_rseq, own.rseq_abi_pointer, own.rseq_abi_size, 1, own.signature, 0, 0);
}

static bool make_threads(struct making *m)
{
    const struct loaded *all = m->all;
    for (uint32_t i = 0; i < all->image.threads; i++) {
        pid_t tid = i ? make_thread(m, &all->thread[i], i == all->image.pager) : m->tracee.pid;
        if (!tid)
            return false;
        m->tracee.thread[i] = tid;
        m->tracee.stopped[i] = true;
        m->tracee.threads = i + 1;
        if (!dress_thread(m, tid, &all->thread[i]))
            return false;
    }
    for (int i = 0; i < IMAGE_TIMERS; i++) {
        tracee_write(&m->tracee, m->scratch, &all->image.timer[i], sizeof all->image.timer[i]);
        if (!call(m, m->tracee.pid, "setitimer", SYS_setitimer, (uint64_t)i, m->scratch, 0, 0, 0, 0))
            return false;
    }
    if (!call(m, m->tracee.pid, "munmap", SYS_munmap, m->scratch, IMAGE_PAGE, 0, 0, 0, 0))
        return false;
    for (uint32_t i = 0; i < all->image.threads; i++) {
        const struct image_thread *t = &all->thread[i];
        struct iovec xstate = {(void *)t->xstate, t->xstate_bytes};
        pid_t tid = m->tracee.thread[i];
        if (ptrace(PTRACE_SETREGSET, tid, NT_X86_XSTATE, &xstate) || ptrace(PTRACE_SETREGS, tid, 0, &t->registers) ||
            ptrace(PTRACE_SETSIGMASK, tid, sizeof t->mask, &t->mask))
            return tracee_fail("a thread's registers cannot be set: %s (is this another kind of processor?)",
                               strerror(errno));
    }
    return true;
}

/* Its pager gets RDMA and userfaultfd on this blade, and its remote memory. */
static bool resume_pager(struct making *m)
{
    const struct loaded *all = m->all;
    if (!all->image.paging)
        return true;
    pid_t pager = m->tracee.thread[all->image.pager];
    uint64_t at;
    struct park_report report;
    tracee_tell(pager, PARK_RESTORED);
    int said = tracee_hear(pager, RESUME_SECONDS, &at);
    if (said == PARK_RESUMED)
        return tracee_tell(pager, PARK_GO_ON);
    return said && tracee_read(&m->tracee, at, &report, sizeof report) ? tracee_fail("%s", report.error)
                                                                      : tracee_fail("its pager does not go on");
}

static bool make(struct making *m, FILE *in)
{
    return tracee_find_gate(&m->tracee) && forget_rseq(m) && clear(m) && map_all(m) && lay_out(m) && fill(m, in) &&
           make_threads(m) && resume_pager(m);
}

bool thaw_make(struct thaw *t, pid_t pid)
{
    static struct making m;
    char path[64];
    int status;
    snprintf(path, sizeof path, "/proc/%d/mem", (int)pid);
    m = (struct making){.all = &t->all, .tracee = {.pid = pid, .threads = 1, .thread = {pid}, .stopped = {true}}};
    if (waitpid(pid, &status, WUNTRACED | __WALL) != pid || !WIFSTOPPED(status))
        return false; /* it has said why */
    m.tracee.memory = open(path, O_RDWR | O_CLOEXEC);
    ptrace(PTRACE_SETOPTIONS, pid, 0, PTRACE_O_TRACECLONE | PTRACE_O_TRACESYSGOOD | PTRACE_O_EXITKILL);
    if (!make(&m, t->in)) {
        fprintf(stderr, "rackless: %s cannot go on here: %s\n", t->all.image.name, tracee_why);
        kill(pid, SIGKILL);
        tracee_release(&m.tracee);
        waitpid(pid, &status, __WALL);
        return false;
    }
    for (int i = 0; i < IMAGE_SIGNALS; i++)
        if (t->all.image.pending >> i & 1)
            kill(pid, i + 1);
    tracee_release(&m.tracee);
    return true;
}
