/* See hotpot.h. What guest_agents/hotpot/session.py, mapping.py and userfault.py do for Python: packets of JSON to the
 * service of this blade, which answers the page faults of a dataset's mapping by a userfaultfd that it is given. */
#define _GNU_SOURCE
#include "hotpot.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <linux/userfaultfd.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <unistd.h>

#include "../liblite/json.h"
#include "watch.h"

#define EXPORT __attribute__((visibility("default")))
#define SOCKET "/run/rackless/hotpot.sock"
#define REGION ((void *)0x200000000000) /* where datasets are mapped; records.py says why there */
#define REGION_BYTES (1ul << 40)

enum { PACKET = 192 << 10, PAGE = 4096, STRIDE = PAGE + 64 };

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static int service = -1;
static pid_t owner;
static bool reserved;
static char packet[PACKET]; /* under the lock: the request, then the reply */
static _Thread_local char words[512], name_of_error[32];

static int fail(int code, const char *format, ...) __attribute__((format(printf, 2, 3)));

static int fail(int code, const char *format, ...)
{
    va_list more;
    va_start(more, format);
    vsnprintf(words, sizeof words, format, more);
    va_end(more);
    name_of_error[0] = 0;
    return code;
}

EXPORT const char *HP_error(void)
{
    return words;
}

EXPORT const char *HP_error_name(void)
{
    return name_of_error;
}

/* Send what is in `packet`, with a file if `give` is one; the reply is there then, its file (or -1) in `*got`. */
static int exchange(size_t length, int give, int *got)
{
    union {
        char bytes[CMSG_SPACE(sizeof(int))];
        struct cmsghdr align;
    } control = {0};
    struct iovec part = {packet, length};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1};
    struct cmsghdr *file;

    *got = -1;
    if (service < 0 || owner != getpid())
        return fail(HP_ERR_NOT_CONNECTED, "this process has not connected");
    if (give >= 0) {
        message.msg_control = &control;
        message.msg_controllen = sizeof control.bytes;
        file = CMSG_FIRSTHDR(&message);
        *file = (struct cmsghdr){CMSG_LEN(sizeof give), SOL_SOCKET, SCM_RIGHTS};
        memcpy(CMSG_DATA(file), &give, sizeof give);
    }
    if (sendmsg(service, &message, MSG_NOSIGNAL) < 0)
        return fail(HP_ERR_NOT_CONNECTED, "the service has gone: %s", strerror(errno));
    part.iov_len = sizeof packet - 1;
    message.msg_control = &control;
    message.msg_controllen = sizeof control.bytes;
    ssize_t answered;
    do
        answered = recvmsg(service, &message, MSG_CMSG_CLOEXEC);
    while (answered < 0 && errno == EINTR);
    if (answered <= 0)
        return fail(HP_ERR_NOT_CONNECTED, "the service has gone");
    packet[answered] = 0;
    file = CMSG_FIRSTHDR(&message);
    if (file && file->cmsg_type == SCM_RIGHTS)
        memcpy(got, CMSG_DATA(file), sizeof *got);
    char error[sizeof name_of_error];
    if (!json_get_string(packet, "error", error, sizeof error))
        return 0;
    if (*got >= 0)
        close(*got);
    *got = -1;
    char text[400];
    if (!json_get_string(packet, "message", text, sizeof text))
        text[0] = 0;
    int code = fail(strcmp(error, "Retry") ? HP_ERR_SERVICE : HP_RETRY, "%s: %s", error, text);
    strcpy(name_of_error, error);
    return code;
}

/* Ask, with the lock held: the request so far and more of it, such as ranges. */
static int ask(const struct json *request, const char *more, int give, int *got)
{
    int nothing, length = snprintf(packet, sizeof packet, "%s%s}", request->text, more);
    if (request->full || length < 0 || (size_t)length >= sizeof packet)
        return fail(HP_ERR_ARGUMENT, "the request is too long");
    return exchange((size_t)length, give, got ? got : &nothing);
}

/* Ask; `*value`, if wanted, is the field of the reply that is called `key`. */
static int simply(const struct json *request, const char *more, const char *key, uint64_t *value)
{
    pthread_mutex_lock(&lock);
    int failed = ask(request, more, -1, NULL);
    if (!failed && key && !json_get_unsigned(packet, key, value))
        failed = fail(HP_ERR_SERVICE, "the service's answer has no %s", key);
    pthread_mutex_unlock(&lock);
    return failed;
}

EXPORT int HP_connect(void)
{
    const char *path = getenv("RACKLESS_HOTPOT");
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    struct json request;
    char settings[96];
    int failed = 0;

    snprintf(address.sun_path, sizeof address.sun_path, "%s", path ? path : SOCKET);
    snprintf(settings, sizeof settings, ",\"settings\":{\"protocol\":%d,\"page\":%d,\"stride\":%d}", HP_PROTOCOL, PAGE,
             STRIDE);
    pthread_mutex_lock(&lock);
    if (service >= 0)
        close(service);
    owner = getpid();
    service = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
    if (service < 0 || connect(service, (struct sockaddr *)&address, sizeof address) < 0)
        failed = fail(HP_ERR_NOT_CONNECTED, "no Hotpot at %s: %s", address.sun_path, strerror(errno));
    if (!failed && !reserved &&
        mmap(REGION, REGION_BYTES, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED_NOREPLACE, -1,
             0) != REGION)
        failed = fail(HP_ERR_SYSTEM, "something of this program lies where datasets go");
    reserved |= !failed;
    if (!failed) {
        json_begin(&request, "hello");
        failed = ask(&request, settings, -1, NULL);
    }
    if (failed && service >= 0) {
        close(service);
        service = -1;
    }
    pthread_mutex_unlock(&lock);
    return failed;
}

EXPORT int HP_disconnect(void)
{
    pthread_mutex_lock(&lock);
    if (service >= 0)
        close(service);
    service = -1;
    pthread_mutex_unlock(&lock);
    return 0;
}

EXPORT int HP_create(const char *name, uint64_t size, const char *mode)
{
    struct json request;
    json_begin(&request, "create");
    json_string(&request, "name", name);
    json_unsigned(&request, "size", size);
    json_string(&request, "mode", mode ? mode : "mrmw");
    json_unsigned(&request, "chunk", 4 << 20);
    return simply(&request, ",\"owners\":null", NULL, NULL);
}

EXPORT int HP_delete(const char *name)
{
    struct json request;
    json_begin(&request, "delete");
    json_string(&request, "name", name);
    return simply(&request, "", NULL, NULL);
}

/* A descriptor that gets the faults of a mapping, or an error. */
static int faults_of(char *memory, uint64_t size)
{
    struct uffdio_api api = {.api = UFFD_API, .features = UFFD_FEATURE_PAGEFAULT_FLAG_WP | UFFD_FEATURE_MISSING_SHMEM |
                                                          UFFD_FEATURE_MINOR_SHMEM | UFFD_FEATURE_WP_HUGETLBFS_SHMEM};
    struct uffdio_register all = {.range = {(uintptr_t)memory, size},
                                  .mode = UFFDIO_REGISTER_MODE_MISSING | UFFDIO_REGISTER_MODE_WP |
                                          UFFDIO_REGISTER_MODE_MINOR};
    int file = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
    if (file < 0 || ioctl(file, UFFDIO_API, &api) < 0 || ioctl(file, UFFDIO_REGISTER, &all) < 0) {
        int code = fail(HP_ERR_SYSTEM, "userfaultfd: %s", strerror(errno));
        if (file >= 0)
            close(file);
        return code;
    }
    return file;
}

/* The addresses are reserved again: whoever still uses them gets SIGSEGV. */
static void unmap(char *memory, uint64_t size)
{
    mmap(memory, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
}

/* Map the dataset that the reply in `packet` tells of, and give its faults to the service, or to the watch without it. */
static int map(const char *name, struct HP_dataset *d, int file)
{
    uint64_t address;
    struct json request;
    if (file < 0 || !json_get_unsigned(packet, "id", &d->number) || !json_get_unsigned(packet, "size", &d->size) ||
        !json_get_unsigned(packet, "address", &address))
        return fail(HP_ERR_SERVICE, "the service's answer does not tell where the dataset is");
    d->memory = (char *)(uintptr_t)address;
    if (mmap(d->memory, d->size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, file, 0) != d->memory)
        return fail(HP_ERR_SYSTEM, "cannot map the dataset: %s", strerror(errno));
    madvise(d->memory, d->size, MADV_DONTFORK); /* nobody would answer a child's faults */
    d->faults = faults_of(d->memory, d->size);
    int failed = d->faults < 0 ? d->faults : 0;
    if (!failed) {
        json_begin(&request, "attach");
        json_unsigned(&request, "dataset", d->number);
        failed = ask(&request, "", d->faults, NULL);
    }
    if (!failed && !(d->watch = hotpot_watch(service, d->faults, d->memory, d->size, name)))
        failed = fail(HP_ERR_SYSTEM, "nobody can watch the dataset: %s", strerror(errno));
    if (failed) {
        unmap(d->memory, d->size);
        if (d->faults >= 0)
            close(d->faults);
    }
    return failed;
}

EXPORT int HP_open(const char *name, struct HP_dataset *d)
{
    struct json request;
    int file;
    json_begin(&request, "open");
    json_string(&request, "name", name);
    pthread_mutex_lock(&lock);
    int failed = ask(&request, "", -1, &file);
    if (!failed) {
        failed = map(name, d, file);
        if (file >= 0)
            close(file);
        if (failed) {
            char kept[sizeof words];
            memcpy(kept, words, sizeof kept);
            json_begin(&request, "close");
            json_unsigned(&request, "dataset", d->number);
            ask(&request, "", -1, NULL);
            memcpy(words, kept, sizeof kept);
        }
    }
    pthread_mutex_unlock(&lock);
    return failed;
}

EXPORT int HP_close(struct HP_dataset *d)
{
    struct json request;
    hotpot_unwatch(d->watch);
    unmap(d->memory, d->size);
    close(d->faults);
    json_begin(&request, "close");
    json_unsigned(&request, "dataset", d->number);
    return simply(&request, "", NULL, NULL);
}

/* `request` with ranges. */
static int with_ranges(const struct json *request, const struct HP_range *ranges, unsigned count)
{
    char *areas = NULL;
    size_t length;
    if (count > HP_MOST_RANGES)
        return fail(HP_ERR_ARGUMENT, "%u ranges, at most %d go at once", count, HP_MOST_RANGES);
    FILE *out = open_memstream(&areas, &length);
    if (!out)
        return fail(HP_ERR_SYSTEM, "%s", strerror(errno));
    fputs(",\"areas\":[", out);
    for (unsigned i = 0; i < count; i++)
        fprintf(out, "%s[%" PRIu64 ",%" PRIu64 "]", i ? "," : "", ranges[i].offset, ranges[i].length);
    fputs("]", out);
    int failed = fclose(out) ? fail(HP_ERR_SYSTEM, "%s", strerror(errno)) : simply(request, areas, NULL, NULL);
    free(areas);
    return failed;
}

EXPORT int HP_begin(const struct HP_dataset *d, HP_transaction *transaction)
{
    struct json request;
    json_begin(&request, "begin");
    json_unsigned(&request, "dataset", d->number);
    return simply(&request, "", "xid", transaction);
}

EXPORT int HP_acquire(HP_transaction transaction, const struct HP_range *ranges, unsigned count)
{
    struct json request;
    json_begin(&request, "acquire");
    json_unsigned(&request, "xid", transaction);
    return with_ranges(&request, ranges, count);
}

EXPORT int HP_commit(HP_transaction transaction, unsigned replicas)
{
    struct json request;
    json_begin(&request, "commit");
    json_unsigned(&request, "xid", transaction);
    json_unsigned(&request, "replicas", replicas);
    return simply(&request, "", NULL, NULL);
}

EXPORT int HP_abort(HP_transaction transaction)
{
    struct json request;
    json_begin(&request, "abort");
    json_unsigned(&request, "xid", transaction);
    return simply(&request, "", NULL, NULL);
}

EXPORT int HP_commit_ranges(const struct HP_dataset *d, const struct HP_range *ranges, unsigned count,
                            unsigned replicas)
{
    struct json request;
    json_begin(&request, "commit_areas");
    json_unsigned(&request, "dataset", d->number);
    json_unsigned(&request, "replicas", replicas);
    return with_ranges(&request, ranges, count);
}
