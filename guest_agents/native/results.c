#define _GNU_SOURCE
#include "results.h"

#include "desk.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <string.h>
#include <unistd.h>

void report(const char *file, int monitor, const char *job, double seconds, int status)
{
    char text[MESSAGE];
    snprintf(text, sizeof text, "report %.200s %.6f %d", job, seconds, status);
    bool granted = request(monitor, text);
    if (!file)
        return;
    if (!granted)
        die(INTERNAL, "no statistics: %s%s", text, "");
    FILE *out = strcmp(file, "-") ? fopen(file, "we") : fdopen(dup(STDERR_FILENO), "w");
    if (!out || fprintf(out, "%s\n", text) < 0 || fclose(out))
        die(INTERNAL, "cannot write %s: %s", file, strerror(errno));
}

FILE *begin_trace(const char *file, const char *job)
{
    FILE *out = fopen(file, "we");
    if (!out)
        die(NOT_STARTED, "cannot write %s: %s", file, strerror(errno));
    char mark[PATH_MAX];
    snprintf(mark, sizeof mark, "%.200s/trace", job);
    int made = open(mark, O_WRONLY | O_CREAT | O_CLOEXEC, 0644);
    if (made < 0)
        die(NOT_STARTED, "no trace: %s: %s", mark, strerror(errno));
    close(made);
    return out;
}

void end_trace(FILE *out, const char *file, int monitor, const char *job)
{
    char text[MESSAGE], data[1 << 16];
    snprintf(text, sizeof text, "trace %.200s", job);
    if (!request(monitor, text))
        die(INTERNAL, "no trace: %s%s", text, "");
    FILE *in = fopen(text, "re");
    if (!in)
        die(INTERNAL, "no trace: %s: %s", text, strerror(errno));
    for (size_t got; (got = fread(data, 1, sizeof data, in)) > 0;)
        fwrite(data, 1, got, out);
    bool failed = ferror(in) || ferror(out);
    fclose(in);
    if (fclose(out) || failed)
        die(INTERNAL, "cannot write %s: %s", file, strerror(errno));
}
