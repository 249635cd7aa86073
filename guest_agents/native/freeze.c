#define _GNU_SOURCE
#include "freeze.h"

#include "desk.h"
#include "park.h"

#include <elf.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/prctl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/ptrace.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

enum {
    PARK_SECONDS = 60,          /* to send an ExCache to the memory blades */
    REPORT_SECONDS = 10,
    IMAGE_BUFFER = 1 << 20,     /* bytes */
    TRIES = 200, NAP_US = 5000, /* to find the program where it asks for no memory */
    CHUNK = 64,                 /* pages */
    FABRIC_POLLS = 3, FABRIC_MS = 1000, /* how the pager waits for a memory blade: not the moment (fabric_wait) */
    RESTART_NOW = 512, RESTART_NOINTR, RESTART_NOHAND, RESTART_BLOCK = 516, /* the kernel's ERESTART..., to itself */
};

/* The program, and what `split` knows of it. */
struct patient {
    struct tracee tracee;
    pid_t pager;                /* 0: it has none */
    bool parked;                /* it waits for an answer */
    uint64_t report;            /* address of its struct park_report */
    struct park_report said;
    uint64_t scratch;           /* a page of memory, while there is need for it */
    struct loaded all;
};

/* ---- its threads ---- */

static long call(struct patient *p, pid_t thread, long number, uint64_t a, uint64_t b, uint64_t c, uint64_t d)
{
    return tracee_call(&p->tracee, thread, number, a, b, c, d, 0, 0);
}

/* A system call that was interrupted is made again where the program goes on; what it has slept is forgotten. */
static void settle(struct user_regs_struct *r)
{
    long result = (long)r->rax;
    if ((long)r->orig_rax >= 0 && (result == -RESTART_NOW || result == -RESTART_NOINTR || result == -RESTART_NOHAND ||
                                   result == -RESTART_BLOCK)) {
        r->rax = r->orig_rax;
        r->rip -= 2;
    }
    r->orig_rax = (uint64_t)-1;
}

static bool note_thread(struct patient *p, pid_t tid, struct image_thread *t)
{
    struct iovec xstate = {t->xstate, sizeof t->xstate};
    struct __ptrace_rseq_configuration rseq = {0};
    char path[64];
    t->tid = tid;
    snprintf(path, sizeof path, "/proc/%d/task/%d/comm", (int)p->tracee.pid, (int)tid);
    FILE *in = fopen(path, "re");
    bool fine = in && fgets(t->name, sizeof t->name, in);
    if (in)
        fclose(in);
    t->name[strcspn(t->name, "\n")] = 0;
    fine = fine && !ptrace(PTRACE_GETREGS, tid, 0, &t->registers) &&
           !ptrace(PTRACE_GETREGSET, tid, NT_X86_XSTATE, &xstate) &&
           !ptrace(PTRACE_GETSIGMASK, tid, sizeof t->mask, &t->mask) &&
           ptrace(PTRACE_GET_RSEQ_CONFIGURATION, tid, sizeof rseq, &rseq) > 0 &&
           !syscall(SYS_get_robust_list, tid, &t->robust, &t->robust_bytes) &&
           !call(p, tid, SYS_prctl, PR_GET_TID_ADDRESS, p->scratch, 0, 0) &&
           tracee_read(&p->tracee, p->scratch, &t->tid_address, sizeof t->tid_address) &&
           !call(p, tid, SYS_sigaltstack, 0, p->scratch, 0, 0) &&
           tracee_read(&p->tracee, p->scratch, &t->altstack, sizeof t->altstack);
    settle(&t->registers);
    t->xstate_bytes = (uint32_t)xstate.iov_len;
    t->rseq = rseq.rseq_abi_pointer;
    t->rseq_bytes = rseq.rseq_abi_size;
    t->rseq_signature = rseq.signature;
    return fine || tracee_fail("a thread's state cannot be read: %s", strerror(errno));
}

static bool note_threads(struct patient *p)
{
    struct loaded *all = &p->all;
    all->image.threads = (uint32_t)p->tracee.threads;
    all->thread = calloc(p->tracee.threads, sizeof *all->thread);
    for (size_t i = 0; i < p->tracee.threads; i++) {
        if (!note_thread(p, p->tracee.thread[i], &all->thread[i]))
            return false;
        if (p->tracee.thread[i] == p->pager)
            all->image.pager = (uint32_t)i;
    }
    all->image.paging = p->pager != 0;
    return true;
}

static bool note_signals(struct patient *p)
{
    for (int i = 0; i < IMAGE_SIGNALS; i++) {
        struct image_action *action = &p->all.image.action[i];
        if (call(p, p->tracee.pid, SYS_rt_sigaction, (uint64_t)i + 1, 0, p->scratch, 8) ||
            !tracee_read(&p->tracee, p->scratch, action, sizeof *action))
            return tracee_fail("its signal actions cannot be read");
    }
    for (int i = 0; i < IMAGE_TIMERS; i++) {
        struct itimerval *timer = &p->all.image.timer[i];
        if (call(p, p->tracee.pid, SYS_getitimer, (uint64_t)i, p->scratch, 0, 0) ||
            !tracee_read(&p->tracee, p->scratch, timer, sizeof *timer))
            return tracee_fail("its timers cannot be read");
        if (!timerisset(&timer->it_value)) /* its signal waits, and only when it is taken the kernel begins anew */
            timer->it_value = timer->it_interval;
    }
    return true;
}

/* ---- its memory ---- */

struct area {
    uint64_t start, end, offset;
    char perms[8], path[PATH_MAX];
    char flags[256];            /* as VmFlags says them, with a space before and after each */
};

static bool has(const struct area *area, const char *flag)
{
    char word[8];
    snprintf(word, sizeof word, " %s ", flag);
    return strstr(area->flags, word);
}

static bool begins(const char *text, const char *with)
{
    return !strncmp(text, with, strlen(with));
}

static bool is_pagers(const struct patient *p, const struct area *area)
{
    size_t job = strlen(p->all.image.job);
    return p->pager && (begins(area->path, "/dev/infiniband/") || begins(area->path, "/memfd:rackless-regions") ||
                        (begins(area->path, p->all.image.job) && area->path[job] == '/'));
}

static bool note_area(struct patient *p, const struct area *area)
{
    struct image *image = &p->all.image;
    if (is_pagers(p, area) || begins(area->path, "[vsyscall]") || area->start == p->scratch)
        return true;
    bool file = *area->path == '/', shared = area->perms[3] == 's';
    if (has(area, "sh") || strstr(area->path, " (deleted)"))
        return tracee_fail("it has shared memory, or a removed file, mapped: %.300s", area->path);
    if (!begins(area->path, "[v") && (has(area, "io") || has(area, "pf") || has(area, "ht")))
        return tracee_fail("it has device memory or huge pages mapped: %.300s", area->path);
    p->all.map = realloc(p->all.map, (image->maps + 1u) * sizeof *p->all.map);
    struct image_map *map = &p->all.map[image->maps++];
    *map = (struct image_map){.start = area->start, .end = area->end, .offset = area->offset};
    map->protection = (area->perms[0] == 'r' ? PROT_READ : 0u) | (area->perms[1] == 'w' ? PROT_WRITE : 0u) |
                      (area->perms[2] == 'x' ? PROT_EXEC : 0u);
    map->flags = MAP_FIXED | (shared ? MAP_SHARED : has(area, "dp") ? IMAGE_DROPPABLE : MAP_PRIVATE) |
                 (file ? 0u : MAP_ANONYMOUS) | (has(area, "gd") ? MAP_GROWSDOWN : 0u) |
                 (has(area, "nr") ? MAP_NORESERVE : 0u);
    map->advice = (has(area, "nh") ? IMAGE_NOHUGEPAGE : 0u) | (has(area, "dc") ? IMAGE_DONTFORK : 0u) |
                  (has(area, "wf") ? IMAGE_WIPEONFORK : 0u);
    map->kind = begins(area->path, "[vvar") || begins(area->path, "[vdso") ? MAP_OF_VDSO : file ? MAP_OF_FILE
                                                                                               : MAP_OF_NOTHING;
    snprintf(map->path, sizeof map->path, "%s", area->path);
    if (map->kind != MAP_OF_FILE || begins(map->path, VNODE "/"))
        return true; /* whatever is in /vnode is the same on every blade */
    const struct image_map *before = image->maps > 1 ? map - 1 : NULL;
    map->print = before && !strcmp(before->path, map->path) ? before->print : image_fingerprint(map->path);
    return map->print || tracee_fail("%.300s cannot be read: %s", map->path, strerror(errno));
}

static bool note_maps(struct patient *p)
{
    char path[64], line[PATH_MAX + 256];
    struct area area = {0};
    snprintf(path, sizeof path, "/proc/%d/smaps", (int)p->tracee.pid);
    FILE *in = fopen(path, "re");
    bool fine = in || tracee_fail("it has ended");
    while (fine && fgets(line, sizeof line, in)) {
        struct area next = {0};
        int at = 0;
        if (sscanf(line, "%lx-%lx %7s %lx %*s %*s %n", &next.start, &next.end, next.perms, &next.offset, &at) == 4) {
            area = next;
            line[strcspn(line, "\n")] = 0;
            snprintf(area.path, sizeof area.path, "%s", line + at);
        } else if (begins(line, "VmFlags:")) {
            line[strcspn(line, "\n")] = 0;
            snprintf(area.flags, sizeof area.flags, "%.250s ", line + strlen("VmFlags:"));
            fine = note_area(p, &area);
        }
    }
    if (in)
        fclose(in);
    return fine;
}

/* Where the kernel thinks its parts are, and the fingerprint of what the kernel has put there. */
static bool note_layout(struct patient *p)
{
    struct image *image = &p->all.image;
    char path[64];
    unsigned long f[52] = {0}; /* numbered as in proc(5) */
    snprintf(path, sizeof path, "/proc/%d/stat", (int)p->tracee.pid);
    FILE *in = fopen(path, "re");
    char text[2048] = "", *at;
    if (in) {
        text[fread(text, 1, sizeof text - 1, in)] = 0;
        fclose(in);
    }
    at = strrchr(text, ')');
    if (!at || sscanf(at, ") %*c") < 0)
        return tracee_fail("it has ended");
    at += 4;
    for (int i = 4; i < 52; i++)
        f[i] = strtoul(at, &at, 10);
    image->start_code = f[26], image->end_code = f[27], image->start_stack = f[28];
    image->start_data = f[45], image->end_data = f[46], image->start_brk = f[47];
    image->arg_start = f[48], image->arg_end = f[49], image->env_start = f[50], image->env_end = f[51];
    image->brk = (uint64_t)call(p, p->tracee.pid, SYS_brk, 0, 0, 0, 0);
    snprintf(path, sizeof path, "/proc/%d/auxv", (int)p->tracee.pid);
    in = fopen(path, "re");
    if (in) {
        image->auxv_bytes = (uint32_t)fread(image->auxv, 1, sizeof image->auxv, in);
        fclose(in);
    }
    for (uint32_t i = 0; i < image->maps; i++) {
        static uint8_t code[4 << 12];
        size_t bytes = p->all.map[i].end - p->all.map[i].start;
        if (begins(p->all.map[i].path, "[vdso") && bytes <= sizeof code && tracee_read(&p->tracee, p->all.map[i].start, code, bytes))
            image->vdso = image_print(code, bytes, 1);
    }
    return true;
}

/* The kernel's PAGEMAP_SCAN (linux/fs.h of 6.7), for which headers may be too old. */
struct scan_range { uint64_t start, end, categories; };
struct scan {
    uint64_t size, flags, start, end, walk_end, vec, vec_len, max_pages, category_inverted, category_mask,
        category_anyof_mask, return_mask;
};
enum { IS_FILE = 1 << 2, IS_PRESENT = 1 << 3, IS_SWAPPED = 1 << 4, IS_ZERO = 1 << 5 };

static bool write_run(const struct patient *p, FILE *out, uint64_t address, uint64_t end)
{
    static char data[CHUNK * IMAGE_PAGE];
    struct image_run run = {address, (end - address) / IMAGE_PAGE};
    if (fwrite(&run, sizeof run, 1, out) != 1)
        return tracee_fail("the image cannot be written: %s", strerror(errno));
    for (uint64_t bytes; address < end; address += bytes) {
        bytes = end - address < sizeof data ? end - address : sizeof data;
        if (!tracee_read(&p->tracee, address, data, bytes))
            return tracee_fail("its memory cannot be read: %s", strerror(errno));
        if (fwrite(data, 1, bytes, out) != bytes)
            return tracee_fail("the image cannot be written: %s", strerror(errno));
    }
    return true;
}

/* The pages of a mapping that are its own: not those of a file, nor those never touched. */
static bool write_map(const struct patient *p, FILE *out, int pagemap, const struct image_map *map)
{
    struct scan_range range[64];
    struct scan scan = {.size = sizeof scan, .start = map->start, .end = map->end, .vec = (uintptr_t)range,
                        .vec_len = 64, .category_inverted = IS_FILE | IS_ZERO, .category_mask = IS_FILE | IS_ZERO,
                        .category_anyof_mask = IS_PRESENT | IS_SWAPPED, .return_mask = IS_PRESENT | IS_SWAPPED};
    while (scan.start < map->end) {
        int n = ioctl(pagemap, _IOWR('f', 16, struct scan), &scan);
        if (n < 0)
            return tracee_fail("its page table cannot be read: %s", strerror(errno));
        for (int i = 0; i < n; i++)
            if (!write_run(p, out, range[i].start, range[i].end))
                return false;
        scan.start = scan.walk_end;
    }
    return true;
}

static bool write_image(const struct patient *p, FILE *out)
{
    static const struct image_run end;
    char path[64];
    snprintf(path, sizeof path, "/proc/%d/pagemap", (int)p->tracee.pid);
    int pagemap = open(path, O_RDONLY | O_CLOEXEC);
    bool fine = pagemap >= 0 && !image_write(out, &p->all);
    if (!fine)
        tracee_fail("the image cannot be written: %s", strerror(errno));
    for (uint32_t i = 0; fine && i < p->all.image.maps; i++) {
        const struct image_map *map = &p->all.map[i];
        if (map->kind != MAP_OF_VDSO && map->flags & MAP_PRIVATE)
            fine = write_map(p, out, pagemap, map);
    }
    if (fine && (fwrite(&end, sizeof end, 1, out) != 1 || fflush(out) || fsync(fileno(out))))
        fine = tracee_fail("the image cannot be written: %s", strerror(errno));
    if (pagemap >= 0)
        close(pagemap);
    return fine;
}

/* ---- stopping it ---- */

static pid_t find_pager(const struct tracee *t)
{
    for (size_t i = 0; i < t->threads; i++) {
        char path[64], name[32] = "";
        snprintf(path, sizeof path, "/proc/%d/task/%d/comm", (int)t->pid, (int)t->thread[i]);
        FILE *in = fopen(path, "re");
        if (in && !fgets(name, sizeof name, in))
            *name = 0;
        if (in)
            fclose(in);
        if (!strcmp(name, "rackless-pager\n"))
            return t->thread[i];
    }
    return 0;
}

/* Does the pager wait for faults, holding nothing? Then have it park. */
static bool ask_to_park(struct patient *p)
{
    struct user_regs_struct r;
    if (ptrace(PTRACE_GETREGS, p->pager, 0, &r) || r.orig_rax != SYS_poll || (long)r.rax != -RESTART_BLOCK ||
        (r.rsi == FABRIC_POLLS && (int)r.rdx == FABRIC_MS))
        return false;
    r.rax = PARK_POLLED;
    r.orig_rax = (uint64_t)-1;
    return !ptrace(PTRACE_SETREGS, p->pager, 0, &r);
}

static void let_go_on(struct tracee *t)
{
    for (size_t i = 0; i < t->threads; i++) {
        ptrace(PTRACE_CONT, t->thread[i], 0, 0);
        t->stopped[i] = false;
    }
    usleep(NAP_US);
}

/* Stop it where nothing of it is in the ExCache. */
static bool stop(struct patient *p)
{
    strcpy(p->said.error, "it never stops asking for memory");
    for (int tries = 0; tries < TRIES; tries++) {
        p->pager = find_pager(&p->tracee);
        if (!tracee_stop(&p->tracee, p->pager) || !tracee_stop(&p->tracee, 0))
            return false;
        if (!p->pager && !find_pager(&p->tracee))
            return true;
        if (p->pager && ask_to_park(p)) {
            int said = tracee_hear(p->pager, PARK_SECONDS, &p->report);
            if (!said || !tracee_read(&p->tracee, p->report, &p->said, sizeof p->said))
                return tracee_fail("its pager does not come to an end (is a memory blade away?)");
            if (said == PARK_PARKED)
                return p->parked = true;
            if (!p->said.again)
                break;
        }
        let_go_on(&p->tracee);
    }
    return tracee_fail("%s", p->said.error);
}

/* ---- the whole ---- */

static bool examine(struct patient *p, pid_t split)
{
    struct image *image = &p->all.image;
    if (!tracee_find_gate(&p->tracee))
        return false;
    long scratch = tracee_call(&p->tracee, p->tracee.pid, SYS_mmap, 0, IMAGE_PAGE, PROT_READ | PROT_WRITE,
                               MAP_PRIVATE | MAP_ANONYMOUS, (uint64_t)-1, 0);
    if (scratch < 0)
        return tracee_fail("it has no memory left: %s", strerror((int)-scratch));
    p->scratch = (uint64_t)scratch;
    bool fine = refuse_files(p->tracee.pid, split, &p->all, p->said.own, p->pager ? PARK_OWN : 0) && note_maps(p) &&
                note_threads(p) && note_signals(p) && note_layout(p);
    call(p, p->tracee.pid, SYS_munmap, p->scratch, IMAGE_PAGE, 0, 0);
    image->magic = IMAGE_MAGIC;
    image->pid = p->tracee.pid;
    image->remote_pages = p->pager ? p->said.remote_pages : 0;
    return fine;
}

/* Its remote memory is to outlive it. */
static bool keep(struct patient *p)
{
    if (!p->pager)
        return true;
    tracee_tell(p->pager, PARK_KEEP);
    int said = tracee_hear(p->pager, PARK_SECONDS, &p->report);
    p->parked = said != 0;
    return said == PARK_KEPT || (tracee_read(&p->tracee, p->report, &p->said, sizeof p->said) &&
                                 tracee_fail("the memory blades do not keep its memory: %s", p->said.error));
}

/* Everything but the end of the program. */
static bool save(struct patient *p, pid_t split)
{
    char path[PATH_MAX], part[PATH_MAX];
    if (!refuse_process(p->tracee.pid, &p->all) || !stop(p))
        return false;
    if (p->pager) {
        snprintf(p->said.name, sizeof p->said.name, "%.*s", PARK_NAME - 1, p->all.image.name);
        if (!tracee_write(&p->tracee, p->report, p->said.name, sizeof p->said.name))
            return tracee_fail("its memory cannot be written: %s", strerror(errno));
    }
    if (!examine(p, split) || !refuse_process(p->tracee.pid, &p->all)) /* again: a signal may have come meanwhile */
        return false;
    image_path(path, p->all.image.name);
    snprintf(part, sizeof part, "%.*s.part", PATH_MAX - 8, path);
    mkdir(IMAGE_FOLDER, 0700);
    FILE *out = fopen(part, "wxe");
    if (!out)
        return tracee_fail("no place for its image, %.300s: %s", part, strerror(errno));
    fchmod(fileno(out), 0600);
    setvbuf(out, NULL, _IOFBF, IMAGE_BUFFER); /* each write is a round trip to the storage blade */
    bool fine = write_image(p, out);
    if (fclose(out) && fine)
        fine = tracee_fail("the image cannot be written: %s", strerror(errno));
    fine = fine && keep(p);
    if (fine && rename(part, path))
        fine = tracee_fail("no place for its image, %.300s: %s", path, strerror(errno));
    if (!fine)
        unlink(part);
    return fine;
}

/* For the `split run` that waits for its end. */
static void leave_note(const struct image *image)
{
    char path[PATH_MAX];
    snprintf(path, sizeof path, "%s/checkpoint", image->job);
    FILE *out = fopen(path, "we");
    if (out) {
        fputs(image->name, out);
        fclose(out);
    }
}

static pid_t parent_of(pid_t pid)
{
    char path[64], line[256];
    int parent = 0;
    snprintf(path, sizeof path, "/proc/%d/status", (int)pid);
    FILE *in = fopen(path, "re");
    while (in && fgets(line, sizeof line, in) && sscanf(line, "PPid: %d", &parent) != 1) {
    }
    if (in)
        fclose(in);
    return parent;
}

int checkpoint(const char *id)
{
    static struct patient p;
    struct image *image = &p.all.image;
    char text[MESSAGE];
    int pid = 0, used = 0;
    uint16_t tail = 0;
    snprintf(text, sizeof text, "program %s", id);
    if (strpbrk(id, " \t\n") || !*id)
        die(USAGE, "split checkpoint takes the ID of a program (see split ps)%s%s", "", "");
    if (!request(attach_monitor(), text)) /* "BLADE.PID PID VNODE EXCACHE JOB COMMAND" */
        die(1, "%s%s", text, "");
    char full[IMAGE_WORD / 2];
    if (sscanf(text, "%63s %d %127s %lu %127s %n", full, &pid, image->vnode, &image->excache, image->job, &used) < 5)
        die(INTERNAL, "the process monitor's answer makes no sense: %s%s", text, "");
    snprintf(image->command, sizeof image->command, "%.*s", IMAGE_COMMAND - 1, text + used);
    if (getrandom(&tail, sizeof tail, 0) != sizeof tail)
        die(INTERNAL, "no random numbers: %s%s", strerror(errno), "");
    snprintf(image->name, sizeof image->name, "%.40s-%04x", full, tail); /* a number may be used again */

    bool saved = tracee_seize(&p.tracee, pid) && save(&p, parent_of(pid));
    if (!saved) {
        if (p.parked)
            tracee_tell(p.pager, PARK_GO_ON);
        tracee_release(&p.tracee);
        die(1, "%s cannot be checkpointed: %s", full, tracee_why);
    }
    leave_note(image);
    kill(pid, SIGKILL);
    while (waitpid(-1, NULL, __WALL) > 0) { /* its parent hears of its end when whoever traces it has */
    }
    puts(image->name);
    fflush(stdout);
    for (int naps = 0; naps < REPORT_SECONDS * 100 && !access(image->job, F_OK); naps++)
        usleep(10000); /* until its end is in the books: so it can go on on this very blade, too */
    return 0;
}
