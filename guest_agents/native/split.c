/* split run [--excache BYTES] [--replicas N] [--stats FILE] -- COMMAND [ARGUMENT...]
 *
 * Runs an unmodified program whose memory is managed by the process monitor. Thin on purpose: a Python client would
 * need seconds to start on an emulated blade. The program is a child with the caller's descriptors, environment and
 * terminal; signals go on to it; its exit status is ours (128 + n if signal n ended it).
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <limits.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define MONITOR_SOCKET "/run/rackless/split.sock"
#define VNODE "/vnode"

enum { USAGE = 2, INTERNAL = 70, CANNOT_RUN = 126, NOT_FOUND = 127, MESSAGE = 64 << 10 };

static volatile pid_t program;

/* Ctrl-C reaches the program from the terminal, as it does us: only what another process sent is passed on. */
static void forward(int number, siginfo_t *info, void *unused)
{
    (void)unused;
    if (program > 0 && info->si_code <= 0)
        kill(program, number);
}

static _Noreturn void die(int status, const char *format, const char *a, const char *b)
{
    fprintf(stderr, "rackless: ");
    fprintf(stderr, format, a, b);
    fprintf(stderr, "\n");
    exit(status);
}

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* One request to the process monitor; the text after "ok " in `text`. */
static void ask(int monitor, char text[MESSAGE])
{
    if (send(monitor, text, strlen(text), MSG_NOSIGNAL) < 0)
        die(INTERNAL, "the process monitor has gone: %s%s", strerror(errno), "");
    ssize_t got = recv(monitor, text, MESSAGE - 1, 0);
    if (got <= 0)
        die(INTERNAL, "the process monitor does not answer (see /var/log/rackless/agent/current)%s%s", "", "");
    text[got] = 0;
    if (strncmp(text, "ok", 2))
        die(INTERNAL, "%s%s", text, "");
    memmove(text, text + (text[2] ? 3 : 2), (size_t)got - 1);
}

static int attach_monitor(void)
{
    int s = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
    struct sockaddr_un name = {.sun_family = AF_UNIX, .sun_path = MONITOR_SOCKET};
    if (s < 0 || connect(s, (struct sockaddr *)&name, sizeof name))
        die(INTERNAL, "no process monitor at %s: %s", MONITOR_SOCKET, strerror(errno));
    return s;
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

static void write_stats(const char *file, int monitor, const char *job, double seconds, int status)
{
    char text[MESSAGE];
    snprintf(text, sizeof text, "report %.200s %.6f %d", job, seconds, status);
    ask(monitor, text);
    if (!file)
        return;
    FILE *out = strcmp(file, "-") ? fopen(file, "we") : fdopen(dup(STDERR_FILENO), "w");
    if (!out || fprintf(out, "%s\n", text) < 0 || fclose(out))
        die(INTERNAL, "cannot write %s: %s", file, strerror(errno));
}

int main(int argc, char **argv)
{
    const char *excache = "", *stats = NULL, *replicas = "1";
    static const struct option options[] = {
        {"excache", required_argument, NULL, 'e'}, {"stats", required_argument, NULL, 's'},
        {"replicas", required_argument, NULL, 'r'}, {0}};
    if (argc < 2 || strcmp(argv[1], "run"))
        die(USAGE, "usage: split run [--excache BYTES] [--replicas 1|2] [--stats FILE] -- COMMAND [ARGUMENT...]%s%s", "", "");
    argv++, argc--;
    for (int c; (c = getopt_long(argc, argv, "+", options, NULL)) != -1;) {
        if (c == 'e')
            excache = optarg;
        else if (c == 's')
            stats = optarg;
        else if (c == 'r')
            replicas = optarg;
        else
            exit(USAGE);
    }
    if (optind == argc)
        die(USAGE, "no command given%s%s", "", "");
    char *end;
    if (*excache && (strtoull(excache, &end, 10) == 0 || *end))
        die(USAGE, "--excache takes a number of bytes, not '%s'%s", excache, "");

    if (strcmp(replicas, "1") && strcmp(replicas, "2"))
        die(USAGE, "--replicas takes 1 or 2, not '%s'%s", replicas, "");
    char stats_path[PATH_MAX];
    if (stats && strcmp(stats, "-") && stats[0] != '/') {
        char *here = getcwd(stats_path, sizeof stats_path - strlen(stats) - 2);
        if (here)
            stats = strcat(strcat(stats_path, "/"), stats);
    }
    int monitor = attach_monitor();
    char job[MESSAGE];
    snprintf(job, sizeof job, "job %s", excache);
    ask(monitor, job); /* "DIRECTORY EXCACHE" */
    char *size = strchr(job, ' ');
    if (!size)
        die(INTERNAL, "the process monitor's answer makes no sense: %s%s", job, "");
    *size++ = 0;

    const int signals[] = {SIGINT, SIGTERM, SIGHUP, SIGQUIT, SIGUSR1, SIGUSR2, SIGCONT, SIGWINCH};
    sigset_t blocked, before;
    sigfillset(&blocked);
    sigprocmask(SIG_BLOCK, &blocked, &before);
    double start = now();
    program = fork();
    if (program < 0)
        die(INTERNAL, "fork: %s%s", strerror(errno), "");
    if (program == 0) {
        sigprocmask(SIG_SETMASK, &before, NULL);
        setenv("RACKLESS_EXCACHE", size, 1);
        setenv("RACKLESS_JOB", job, 1);
        setenv("RACKLESS_REPLICAS", replicas, 1);
        preload("/proc/self/exe");
        if (chdir(VNODE))
            die(CANNOT_RUN, "%s: %s", VNODE, strerror(errno));
        setenv("PWD", VNODE, 1);
        execvp(argv[optind], argv + optind);
        int error = errno;
        die(error == ENOENT ? NOT_FOUND : CANNOT_RUN, "%s: %s", argv[optind],
            error == ENOENT ? "command not found" : strerror(error));
    }
    for (size_t i = 0; i < sizeof signals / sizeof *signals; i++) {
        struct sigaction action = {.sa_sigaction = forward, .sa_flags = SA_RESTART | SA_SIGINFO};
        sigaction(signals[i], &action, NULL);
    }
    sigprocmask(SIG_SETMASK, &before, NULL);
    int status = wait_for(program);
    write_stats(stats, monitor, job, now() - start, status);
    return status;
}
