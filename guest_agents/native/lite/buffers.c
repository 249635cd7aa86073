/* Buffers: memory that a program and the core share, registered once, so that nothing is copied. */
#define _GNU_SOURCE
#include "core.h"

#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

enum { MOST_BUFFERS = 1024 };

struct buffer *buffer_of(struct client *client, uint32_t number, uint64_t offset, uint64_t length)
{
    if (!client || !number || number > client->buffers)
        return NULL;
    struct buffer *buffer = client->buffer[number - 1];
    bool fits = buffer && !buffer->dropped && offset <= buffer->region.size && length <= buffer->region.size - offset;
    return fits ? buffer : NULL;
}

static uint32_t free_number(struct client *client)
{
    for (uint32_t i = 0; i < client->buffers; i++)
        if (!client->buffer[i])
            return i + 1;
    struct buffer **grown = client->buffers == MOST_BUFFERS
                                ? NULL
                                : realloc(client->buffer, (client->buffers + 1) * sizeof(struct buffer *));
    if (!grown)
        return 0;
    client->buffer = grown;
    client->buffer[client->buffers++] = NULL;
    return client->buffers;
}

static int open_memfd(uint64_t bytes)
{
    int fd = memfd_create("lite-buffer", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    /* Sealed, or the program could cut it short under our feet. */
    if (fd >= 0 && (ftruncate(fd, (off_t)bytes) || fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL))) {
        close(fd);
        return -1;
    }
    return fd;
}

static int add(struct core *core, uint64_t client_id, struct buffer *buffer, uint32_t *number)
{
    uint64_t bytes = buffer->region.size;
    core_enter(core);
    struct client *client = client_of(core, client_id);
    int code = !client ? LITE_BAD_HANDLE : client->buffer_bytes + bytes > core->config.buffers ? LITE_NO_MEMORY : 0;
    if (!code && !(*number = free_number(client)))
        code = LITE_NO_MEMORY;
    if (!code) {
        client->buffer[*number - 1] = buffer;
        client->buffer_bytes += bytes;
        core->stats.buffers++;
        core->stats.bytes_buffers += bytes;
    }
    core_leave(core);
    return code;
}

API int lite_buffer_add(struct core *core, uint64_t client_id, uint64_t bytes, uint32_t *number, int *memfd)
{
    uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE);
    if (!bytes || bytes > core->config.buffers)
        return bytes ? LITE_NO_MEMORY : LITE_BAD_ARGUMENT;
    bytes = (bytes + page - 1) & ~(page - 1);
    struct buffer *buffer = calloc(1, sizeof *buffer);
    int fd = buffer ? open_memfd(bytes) : -1;
    /* Outside the lock: pinning takes long. */
    int code = fd < 0 ? LITE_NO_MEMORY : region_open(core, &buffer->region, bytes, IBV_ACCESS_LOCAL_WRITE, fd);
    if (!code)
        code = add(core, client_id, buffer, number);
    if (!code) {
        *memfd = fd;
        return 0;
    }
    if (buffer)
        region_close(&buffer->region);
    if (fd >= 0)
        close(fd);
    free(buffer);
    return code;
}

/* Give a dropped buffer back when nothing uses it. */
void buffer_release(struct core *core, struct client *client, struct buffer *buffer)
{
    if (!buffer->dropped || buffer->users)
        return;
    for (uint32_t i = 0; i < client->buffers; i++)
        if (client->buffer[i] == buffer)
            client->buffer[i] = NULL;
    client->buffer_bytes -= buffer->region.size;
    core->stats.buffers--;
    core->stats.bytes_buffers -= buffer->region.size;
    region_close(&buffer->region);
    free(buffer);
    pthread_cond_broadcast(&core->changed);
}

API int lite_buffer_drop(struct core *core, uint64_t client_id, uint32_t number)
{
    core_enter(core);
    struct client *client = client_of(core, client_id);
    struct buffer *buffer = buffer_of(client, number, 0, 0);
    if (buffer) {
        buffer->dropped = true;
        buffer_release(core, client, buffer);
        while ((client = client_of(core, client_id)) && number <= client->buffers &&
               client->buffer[number - 1] == buffer)
            core_wait(core);
    }
    core_leave(core);
    return buffer ? 0 : LITE_BAD_HANDLE;
}

void buffers_close(struct core *core, struct client *client)
{
    for (uint32_t i = 0; i < client->buffers; i++) {
        struct buffer *buffer = client->buffer[i];
        if (!buffer)
            continue;
        buffer->dropped = true;
        buffer->users = 0;
        buffer_release(core, client, buffer);
    }
    free(client->buffer);
    client->buffer = NULL;
    client->buffers = 0;
}
