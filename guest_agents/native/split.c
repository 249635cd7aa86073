/* split run [OPTION...] [--] COMMAND [ARGUMENT...], split ps, split kill ID [SIGNAL], split checkpoint, split restart
 *
 * Runs an unmodified program whose memory is managed by the process monitor. Thin on purpose: a Python client would
 * need seconds to start on an emulated blade. The program is a child with the caller's descriptors, environment,
 * directory and terminal; signals go on to it; its exit status is ours (128 + n if signal n ended it).
 */
#define _GNU_SOURCE
#include "desk.h"
#include "freeze.h"
#include "results.h"
#include "thaw.h"
#include "tier.h"

#include <elf.h>
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <limits.h>
#include <sched.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { COMMAND_SHOWN = 200 };

static volatile pid_t program;
static sigset_t before; /* which signals were blocked when we began */

static void hold_signals(void)
{
    sigset_t all;
    sigfillset(&all);
    sigprocmask(SIG_BLOCK, &all, &before);
}

/* Ctrl-C reaches the program from the terminal, as it does us: only what another process sent is passed on. */
static void forward(int number, siginfo_t *info, void *unused)
{
    (void)unused;
    if (program > 0 && info->si_code <= 0)
        kill(program, number);
}

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void preload(const char *own)
{
    char path[PATH_MAX], value[2 * PATH_MAX];
    ssize_t length = readlink(own, path, sizeof path - 32);
    if (length < 0)
        die(INTERNAL, "cannot find myself: %s%s", strerror(errno), "");
    path[length] = 0;
    strcpy(strrchr(path, '/') + 1, "excache_shim.so");
    if (access(path, R_OK))
        die(INTERNAL, "%s: %s", path, strerror(errno));
    const char *others = getenv("LD_PRELOAD");
    snprintf(value, sizeof value, "%s%s%s", path, others && *others ? ":" : "", others ? others : "");
    setenv("LD_PRELOAD", value, 1);
}

/* The program's status: its exit code, or 128 + the signal that ended it. Stops with it when it is stopped. */
static int wait_for(pid_t pid)
{
    int status;
    for (;;) {
        if (waitpid(pid, &status, WUNTRACED) < 0) {
            if (errno == EINTR)
                continue;
            die(INTERNAL, "lost the program: %s%s", strerror(errno), "");
        }
        if (WIFSTOPPED(status))
            raise(SIGSTOP);
        else
            return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
    }
}

struct options {
    const char *excache, *replicas, *stats, *trace, *vnode, *directory;
    const char *tier; /* NULL: the ExCache, unless the program is linked statically */
    const char *ways, *policy, *victim, *prefetch, *pool; /* NULL: as is fastest */
};

/* ---- in the child ---- */

/* Let the program see its vNode's files, and no others, as /vnode. */
static void enter_root(const char *root)
{
    if (unshare(CLONE_NEWNS) || mount(NULL, "/", NULL, MS_REC | MS_SLAVE, NULL))
        die(NOT_STARTED, "only root may run programs in a vNode: %s%s", strerror(errno), "");
    if (mount(root, VNODE, NULL, MS_BIND, NULL))
        die(NOT_STARTED, "cannot show the vNode's files as " VNODE ": %s%s", strerror(errno), "");
}

static void enter_directory(const char *directory)
{
    if (chdir(directory))
        die(NOT_STARTED, "cannot start in %s: %s", directory, strerror(errno));
}

/* Whether the file begins as an ELF program does, and its header. */
static bool read_elf(const char *path, Elf64_Ehdr *header)
{
    int file = open(path, O_RDONLY | O_CLOEXEC);
    if (file < 0)
        return false;
    memset(header, 0, sizeof *header);
    ssize_t got = read(file, header, sizeof *header);
    close(file);
    return got >= (ssize_t)offsetof(Elf64_Ehdr, e_version) && !memcmp(header->e_ident, ELFMAG, SELFMAG);
}

static const char *machine_name(unsigned machine, char text[32])
{
    static const struct { unsigned machine; const char *name; } known[] = {
        {EM_386, "i386"}, {EM_X86_64, "x86-64"}, {EM_ARM, "arm"}, {EM_AARCH64, "aarch64"}, {EM_RISCV, "risc-v"},
        {EM_PPC64, "ppc64"}, {EM_S390, "s390"}, {EM_MIPS, "mips"}};
    for (size_t i = 0; i < sizeof known / sizeof *known; i++)
        if (known[i].machine == machine)
            return known[i].name;
    snprintf(text, 32, "machine %u", machine);
    return text;
}

/* Where execvp would find it: the first executable file in PATH, else the first that is there at all. */
static bool find_program(const char *name, char path[PATH_MAX])
{
    snprintf(path, PATH_MAX, "%s", name);
    if (strchr(name, '/'))
        return !access(path, F_OK);
    char seen[PATH_MAX] = "";
    const char *folders = getenv("PATH");
    for (const char *at = folders ? folders : "/bin:/usr/bin", *end; at; at = *end ? end + 1 : NULL) {
        end = strchrnul(at, ':');
        snprintf(path, PATH_MAX, "%.*s%s%s", (int)(end - at), at, end > at ? "/" : "", name);
        if (!access(path, X_OK))
            return true;
        if (!*seen && !access(path, F_OK))
            strcpy(seen, path);
    }
    strcpy(path, seen);
    return *seen;
}

/* Refuse what cannot run, with the reason: execvp would hand another machine's program to the shell. Returns whether it
 * is linked statically. */
static bool check_program(const char *name)
{
    char path[PATH_MAX], text[32];
    struct stat status;
    Elf64_Ehdr program, own;
    if (!*name || !find_program(name, path))
        die(NOT_FOUND, "%s: command not found (it must be on this blade, or in " VNODE ")%s", name, "");
    if (!stat(path, &status) && S_ISDIR(status.st_mode))
        die(CANNOT_RUN, "%s: is a directory%s", name, "");
    if (access(path, X_OK))
        die(CANNOT_RUN, "%s: %s (chmod +x makes a file executable)", name, strerror(errno));
    if (read_elf(path, &program) && read_elf("/proc/self/exe", &own) && program.e_machine != own.e_machine)
        die(CANNOT_RUN, "%s: is a program for another machine (%s); compile it for this blade's", name,
            machine_name(program.e_machine, text));
    return tier_is_static(path);
}

static _Noreturn void become(char **argv, const struct options *o, const char *job)
{
    if (check_program(argv[0]) || (o->tier && !strcmp(o->tier, "swap"))) {
        if (!strcmp(o->replicas, "2"))
            die(USAGE, "%s: --replicas 2 is not to be had in the second tier: swap space has one copy%s", argv[0], "");
        if (o->tier && !strcmp(o->tier, "excache"))
            die(CANNOT_RUN, "%s: is linked statically and cannot have an ExCache (leave --tier out)%s", argv[0], "");
        unsetenv("RACKLESS_EXCACHE"); /* or a shim that is inherited would page, too */
        tier_enter(job);
    } else {
        preload("/proc/self/exe");
    }
    execvp(argv[0], argv);
    int error = errno;
    die(error == ENOENT ? NOT_FOUND : CANNOT_RUN, "%s: %s", argv[0],
        error == ENOENT ? "the interpreter that it names is not on this blade" : strerror(error));
}

/* ---- commands ---- */

enum { LINE_BYTES = 4096, SMALLEST_EXCACHE = 1 << 20, MOST_PREFETCH = 32 };

/* A whole number from 1 to `most`, or NULL. */
static unsigned long count_of(const char *option, const char *text, unsigned long most)
{
    char *end;
    if (!text)
        return 0;
    unsigned long n = strtoul(text, &end, 10);
    if (*text < '0' || *text > '9' || *end || !n || n > most) {
        char limit[32];
        snprintf(limit, sizeof limit, most < INT_MAX ? "1 to %lu" : "1 or more", most);
        fprintf(stderr, "rackless: --%s takes a number of lines, %s, not '%s'\n", option, limit, text);
        exit(USAGE);
    }
    return n;
}

static void check_word(const char *option, const char *text, const char *known)
{
    char words[64], *save = NULL;
    snprintf(words, sizeof words, "%s", known);
    for (const char *word = strtok_r(words, " ", &save); text; word = strtok_r(NULL, " ", &save)) {
        if (!word) {
            fprintf(stderr, "rackless: --%s takes one of: %s; not '%s'\n", option, known, text);
            exit(USAGE);
        }
        if (!strcmp(word, text))
            return;
    }
}

/* Refuse what makes no sense whatever the ExCache's size. */
static void check_organisation(const struct options *o)
{
    count_of("ways", o->ways, INT_MAX);
    count_of("victim", o->victim, INT_MAX);
    count_of("prefetch", o->prefetch, MOST_PREFETCH);
    check_word("policy", o->policy, "fifo lru random");
    check_word("pool", o->pool, "on off");
    check_word("tier", o->tier, "excache swap");
    if (o->ways && o->pool && !strcmp(o->pool, "on"))
        die(USAGE, "--pool on and --ways exclude each other: sets have as many lines whatever packs (leave one out)%s%s",
            "", "");
}

/* Refuse what does not fit an ExCache of `size` bytes: a tenth or so is working space. */
static void check_fit(const struct options *o, const char *size)
{
    unsigned long long bytes = strtoull(size, NULL, 10);
    unsigned long lines = (unsigned long)((bytes < SMALLEST_EXCACHE ? SMALLEST_EXCACHE : bytes) / LINE_BYTES);
    unsigned long ways = count_of("ways", o->ways, INT_MAX), victim = count_of("victim", o->victim, INT_MAX);
    unsigned long buffer = victim ? victim : lines / 16;
    char fits[160];
    if (victim > lines / 2) {
        snprintf(fits, sizeof fits, "an ExCache of %lu lines (4 KiB each): at most %lu", lines, lines / 2);
        die(USAGE, "--victim %s leaves too little of %s", o->victim, fits);
    }
    if (ways > lines * 3 / 4 - buffer) {
        snprintf(fits, sizeof fits, "an ExCache of %lu lines (4 KiB each), %lu of them victims: at most %lu", lines, buffer,
                 lines * 3 / 4 - buffer);
        die(USAGE, "--ways %s does not fit %s", o->ways, fits);
    }
}

static void set_organisation(const struct options *o)
{
    const char *const known[][2] = {{"RACKLESS_WAYS", o->ways}, {"RACKLESS_POLICY", o->policy}, {"RACKLESS_POOL", o->pool},
                                    {"RACKLESS_VICTIM", o->victim}, {"RACKLESS_PREFETCH", o->prefetch}};
    for (size_t i = 0; i < sizeof known / sizeof *known; i++)
        if (known[i][1])
            setenv(known[i][0], known[i][1], 1);
        else
            unsetenv(known[i][0]); /* this program's, not those of the one that starts it */
}

static void set_variable(char *text)
{
    char *value = strchr(text, '=');
    if (!value || value == text)
        die(USAGE, "--env takes NAME=VALUE, not '%s'%s", text, "");
    *value = 0;
    setenv(text, value + 1, 1);
}

/* Returns where in argv the command begins. */
static int read_options(int argc, char **argv, struct options *o)
{
    static const struct option known[] = {
        {"excache", required_argument, NULL, 'e'}, {"replicas", required_argument, NULL, 'r'},
        {"stats", required_argument, NULL, 's'}, {"vnode", required_argument, NULL, 'v'},
        {"cwd", required_argument, NULL, 'c'}, {"env", required_argument, NULL, 'E'},
        {"ways", required_argument, NULL, 'w'}, {"policy", required_argument, NULL, 'p'},
        {"victim", required_argument, NULL, 'V'}, {"prefetch", required_argument, NULL, 'f'},
        {"pool", required_argument, NULL, 'P'}, {"trace", required_argument, NULL, 't'},
        {"tier", required_argument, NULL, 'T'}, {0}};
    for (int c; (c = getopt_long(argc, argv, "+", known, NULL)) != -1;) {
        if (c == 'e')
            o->excache = optarg;
        else if (c == 's')
            o->stats = optarg;
        else if (c == 't')
            o->trace = optarg;
        else if (c == 'v')
            o->vnode = optarg;
        else if (c == 'c')
            o->directory = optarg;
        else if (c == 'E')
            set_variable(optarg);
        else if (c == 'r')
            o->replicas = optarg;
        else if (c == 'w')
            o->ways = optarg;
        else if (c == 'p')
            o->policy = optarg;
        else if (c == 'V')
            o->victim = optarg;
        else if (c == 'f')
            o->prefetch = optarg;
        else if (c == 'P')
            o->pool = optarg;
        else if (c == 'T')
            o->tier = optarg;
        else
            exit(USAGE);
    }
    if (optind == argc)
        die(USAGE, "no command given%s%s", "", "");
    char *end;
    if (o->excache && (strtoull(o->excache, &end, 10) == 0 || *end))
        die(USAGE, "--excache takes a number of bytes, not '%s'%s", o->excache, "");
    if (strcmp(o->replicas, "1") && strcmp(o->replicas, "2"))
        die(USAGE, "--replicas takes 1 or 2, not '%s'%s", o->replicas, "");
    check_organisation(o);
    if (strpbrk(o->vnode, " \t\n"))
        die(USAGE, "'%s' cannot name a vNode%s", o->vnode, "");
    return optind;
}

/* Was it ended by `split checkpoint`? Then say how it goes on. */
static int checkpointed(const char *job, int status)
{
    char path[MESSAGE + 16], name[IMAGE_WORD] = "";
    snprintf(path, sizeof path, "%s/checkpoint", job);
    FILE *in = status == 128 + SIGKILL ? fopen(path, "re") : NULL;
    if (!in || !fgets(name, sizeof name, in))
        return status;
    fclose(in);
    fprintf(stderr, "rackless: checkpointed as %s: `rackless restart %s --on BLADE` goes on with it\n", name, name);
    return CHECKPOINTED;
}

/* "began PID COMMAND...", as much of the command as people need to know it again. */
static void tell_begin(int monitor, char **argv)
{
    char text[MESSAGE];
    size_t length = (size_t)snprintf(text, sizeof text, "began %d", (int)program);
    for (; *argv && length < COMMAND_SHOWN; argv++)
        length += (size_t)snprintf(text + length, sizeof text - length, " %.*s", COMMAND_SHOWN, *argv);
    request(monitor, text); /* the program runs, whether it is in the books or not */
}

/* Run a command; or, with `thaw`, go on with a checkpoint. */
static int run(struct options o, char **argv, struct thaw *thaw)
{
    char here[PATH_MAX], stats_path[2 * PATH_MAX];
    if (!getcwd(here, sizeof here))
        die(NOT_STARTED, "there is no current directory: %s%s", strerror(errno), "");
    if (o.stats && strcmp(o.stats, "-") && o.stats[0] != '/') {
        snprintf(stats_path, sizeof stats_path, "%s/%s", here, o.stats);
        o.stats = stats_path;
    }
    int monitor = attach_monitor();
    char job[MESSAGE];
    snprintf(job, sizeof job, "job %s %s %s", o.excache ? o.excache : "-", o.vnode, thaw ? thaw->all.image.job : "");
    if (!request(monitor, job)) /* "DIRECTORY EXCACHE ROOT" */
        die(NOT_STARTED, "%s%s", job, "");
    char *save = NULL;
    strtok_r(job, " ", &save);
    const char *size = strtok_r(NULL, " ", &save), *root = strtok_r(NULL, " ", &save);
    if (!size || !root)
        die(INTERNAL, "the process monitor's answer makes no sense: %s%s", job, "");

    check_fit(&o, size);
    FILE *trace = o.trace ? begin_trace(o.trace, job) : NULL;

    const int signals[] = {SIGINT, SIGTERM, SIGHUP, SIGQUIT, SIGUSR1, SIGUSR2, SIGCONT, SIGWINCH};
    if (!thaw)
        hold_signals();
    pid_t parent = getpid();
    double start = now();
    program = thaw ? fork_as(thaw->all.image.pid) : fork_apart();
    if (program < 0)
        die(thaw ? NOT_STARTED : INTERNAL, "no process can be made%s: %s", thaw ? " with the number that it had" : "",
            strerror(errno));
    if (program == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL); /* nobody could end it through us any more, or see its end */
        if (getppid() != parent)
            _exit(NOT_STARTED);
        if (!thaw)
            sigprocmask(SIG_SETMASK, &before, NULL);
        setenv("RACKLESS_EXCACHE", size, 1);
        setenv("RACKLESS_JOB", job, 1);
        setenv("RACKLESS_REPLICAS", o.replicas, 1);
        set_organisation(&o);
        setenv("RACKLESS_VNODE", o.vnode, 1);
        if (strcmp(root, "-")) {
            enter_root(root);
            enter_directory(here); /* of that name in the files that are seen now */
        }
        if (thaw)
            thaw_become(thaw);
        if (o.directory) {
            enter_directory(o.directory);
            if (getcwd(here, sizeof here))
                setenv("PWD", here, 1);
        }
        become(argv, &o, job);
    }
    if (thaw && !thaw_make(thaw, program))
        return NOT_STARTED;
    if (thaw)
        thaw_finish(thaw);
    for (size_t i = 0; i < sizeof signals / sizeof *signals; i++) {
        struct sigaction action = {.sa_sigaction = forward, .sa_flags = SA_RESTART | SA_SIGINFO};
        sigaction(signals[i], &action, NULL);
    }
    sigprocmask(SIG_SETMASK, &before, NULL);
    tell_begin(monitor, argv);
    int status = checkpointed(job, tier_verdict(monitor, job, wait_for(program)));
    report(o.stats, monitor, job, now() - start, status);
    if (trace)
        end_trace(trace, o.trace, monitor, job);
    return status;
}

static int run_command(int argc, char **argv)
{
    const char *own = getenv("RACKLESS_VNODE");
    struct options o = {.replicas = "1", .vnode = own && *own ? own : "default"};
    return run(o, argv + read_options(argc, argv, &o), NULL);
}

static int restart(int argc, char **argv)
{
    static struct thaw thaw;
    static char size[32];
    struct options o = {.replicas = "1", .vnode = "default"};
    int at = read_options(argc, argv, &o);
    hold_signals(); /* they would leave it taken */
    thaw_take(&thaw, argv[at]);
    struct image *image = &thaw.all.image;
    snprintf(size, sizeof size, "%lu", image->excache);
    char *command[] = {image->command, NULL};
    o = (struct options){.replicas = "1", .vnode = image->vnode, .excache = size, .stats = o.stats};
    return run(o, command, &thaw);
}

static int ps(void)
{
    char text[MESSAGE] = "ps";
    ask(attach_monitor(), text);
    return puts(text) < 0;
}

static int send_signal(const char *id, const char *number)
{
    char text[MESSAGE];
    snprintf(text, sizeof text, "kill %s %s", id, number);
    if (strpbrk(id, " \t\n") || strpbrk(number, " \t\n") || !*id || !*number)
        die(USAGE, "split kill takes the ID of a program (see split ps) and a signal%s%s", "", "");
    if (!request(attach_monitor(), text))
        die(1, "%s%s", text, "");
    return 0;
}

int main(int argc, char **argv)
{
    if (argc >= 2 && !strcmp(argv[1], "run"))
        return run_command(argc - 1, argv + 1);
    if (argc == 3 && !strcmp(argv[1], "checkpoint") && !strcmp(argv[2], "--list"))
        return thaw_list();
    if (argc == 4 && !strcmp(argv[1], "checkpoint") && !strcmp(argv[2], "--discard"))
        return thaw_discard(argv[3]);
    if (argc == 3 && !strcmp(argv[1], "checkpoint"))
        return checkpoint(argv[2]);
    if (argc >= 3 && !strcmp(argv[1], "restart"))
        return restart(argc - 1, argv + 1);
    if (argc == 2 && !strcmp(argv[1], "ps"))
        return ps();
    if ((argc == 3 || argc == 4) && !strcmp(argv[1], "kill"))
        return send_signal(argv[2], argc == 4 ? argv[3] : "TERM");
    fputs("usage: split run [--vnode NAME] [--excache BYTES] [--replicas 1|2] [--stats FILE] [--trace FILE]\n"
          "                 [--cwd DIR] [--env NAME=VALUE]... [--ways N] [--policy fifo|lru|random] [--victim N]\n"
          "                 [--prefetch N] [--pool on|off] [--tier excache|swap] [--] COMMAND [ARGUMENT...]\n"
          "       split ps\n"
          "       split kill ID [SIGNAL]\n"
          "       split checkpoint ID | --list | --discard NAME\n"
          "       split restart [--stats FILE] NAME\n", stderr);
    return USAGE;
}
