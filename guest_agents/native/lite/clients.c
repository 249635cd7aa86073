/* Programs and their data channels. */
#define _GNU_SOURCE
#include "core.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

enum { MOST_BURST = 16 /* packets of one channel before others get their turn */ };

struct client *client_of(struct core *core, uint64_t id)
{
    struct client *client = table_find(&core->clients, id);
    return client && !client->removed ? client : NULL;
}

API int lite_client_add(struct core *core, uint32_t pid, uint64_t *out)
{
    core_enter(core);
    struct client *client = calloc(1, sizeof *client);
    int code = LITE_NO_MEMORY;
    if (client && table_put(&core->clients, ++core->client_ids, client)) {
        client->id = *out = core->client_ids;
        client->pid = (pid_t)pid;
        list_init(&client->channels);
        code = 0;
    } else {
        free(client);
    }
    core_leave(core);
    return code;
}

API int lite_channel_add(struct core *core, uint64_t client_id, int fd, int *mailbox)
{
    core_enter(core);
    struct client *client = client_of(core, client_id);
    struct channel *channel = client ? calloc(1, sizeof *channel) : NULL;
    int code = !client ? LITE_BAD_HANDLE : LITE_NO_MEMORY;
    if (channel) {
        *channel = (struct channel){.id = core->channel_ids++, .client = client, .fd = fd, .burst = 1};
        list_init(&channel->hot);
        list_init(&channel->order);
        list_init(&channel->unsent);
        list_init(&channel->link);
        list_init(&channel->mail);
        fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK);
        fcntl(fd, F_SETFD, FD_CLOEXEC);
        struct epoll_event event = {.events = EPOLLIN | EPOLLET, .data.u64 = channel->id};
        if (table_put(&core->channels, channel->id, channel) && !epoll_ctl(core->epoll, EPOLL_CTL_ADD, fd, &event)) {
            list_append(&client->channels, &channel->link);
            code = 0;
            if (mailbox)
                *mailbox = mail_open(core, channel); /* without one it goes too */
        } else {
            table_remove(&core->channels, channel->id);
            free(channel);
        }
    }
    core_leave(core);
    if (code)
        close(fd);
    return code;
}

void channel_close(struct core *core, struct channel *channel)
{
    core_event(core, EVENT_CHANNEL_CLOSED, 0, 0, 0, channel->client->id);
    table_remove(&core->channels, channel->id);
    list_remove(&channel->link);
    list_remove(&channel->hot);
    mail_close(channel);
    close(channel->fd); /* which also takes it out of epoll */
    for (struct op *op; (op = FIRST(&channel->unsent, struct op, wait));) {
        list_remove(&op->wait);
        op->channel = NULL;
        op->told = true;
        op_settle(core, op);
    }
    for (struct op *op; (op = FIRST(&channel->order, struct op, order));) {
        list_remove(&op->order);
        op->channel = NULL;
        op_cancel(core, op, LITE_CANCELLED);
    }
    free(channel);
}

/* Send an answer, unless the program is gone. False: the socket is full. */
static bool send_reply(struct op *op)
{
    const void *packet = &op->reply;
    size_t length = sizeof op->reply;
    if (op->inline_reply) {
        packet = memcpy(op->inline_reply - length, &op->reply, length);
        length += op->reply.length;
    }
    ssize_t sent = send(op->channel->fd, packet, length, MSG_DONTWAIT | MSG_NOSIGNAL);
    if (sent < 0 && (errno == EAGAIN || errno == EINTR || errno == ENOBUFS))
        return false;
    op->channel->gone |= sent < 0;
    return true;
}

static void sent(struct core *core, struct op *op)
{
    struct channel *channel = op->channel;
    if (channel->window-- == LITE_WINDOW)
        list_append(&core->hot, &channel->hot); /* it may go on asking */
    op->channel = NULL;
    op->told = true;
    op_settle(core, op);
}

static void watch(struct core *core, struct channel *channel, uint32_t events)
{
    struct epoll_event event = {.events = events | EPOLLET, .data.u64 = channel->id};
    epoll_ctl(core->epoll, EPOLL_CTL_MOD, channel->fd, &event);
}

/* Close it soon if it is gone: not now, as whoever sends may still be at work on its requests. */
static void bury(struct core *core, struct channel *channel)
{
    if (!channel->gone)
        return;
    list_append(&core->hot, &channel->hot);
    core_wake(core);
}

/* A program that does not read its answers must not keep packets, slots or rings from others. */
static bool spill(struct core *core, struct op *op)
{
    op->spilled = malloc(sizeof op->reply + (op->inline_reply ? op->reply.length : 0));
    if (!op->spilled)
        return false;
    if (op->inline_reply) {
        memcpy(op->spilled + sizeof op->reply, op->inline_reply, op->reply.length);
        op->inline_reply = op->spilled + sizeof op->reply;
    }
    op_settle(core, op);
    return true;
}

void channel_send(struct core *core, struct op *op)
{
    struct channel *channel = op->channel;
    if (op->mailed) {
        mail_answer(op);
        sent(core, op);
    } else if (!list_empty(&channel->unsent) || !send_reply(op)) {
        if (list_empty(&channel->unsent))
            watch(core, channel, EPOLLIN | EPOLLOUT);
        list_append(&channel->unsent, &op->wait);
        channel->gone |= !spill(core, op);
    } else {
        sent(core, op);
    }
    bury(core, channel);
}

void channel_writable(struct core *core, struct channel *channel)
{
    for (struct op *op; !channel->gone && (op = FIRST(&channel->unsent, struct op, wait));) {
        if (!send_reply(op))
            return;
        list_remove(&op->wait);
        sent(core, op);
    }
    watch(core, channel, EPOLLIN);
    bury(core, channel);
}

/* Read one packet into the spare buffer and start what it asks for. False: there is none (now, or for ever). */
static bool read_packet(struct core *core, struct channel *channel)
{
    struct store *packet = core->spare;
    ssize_t got = recv(channel->fd, packet->bytes, PACKET_BYTES, MSG_DONTWAIT | MSG_TRUNC);
    if (got < 0 && (errno == EAGAIN || errno == EINTR))
        return false;
    if (got == sizeof(struct lite_request) && packet->bytes[0] == LITE_KNOCK && channel->mailbox) {
        core->stats.knocks++;
        return true;
    }
    struct op *op = got < (ssize_t)sizeof(struct lite_request) ? NULL : op_new(core, channel->client, channel);
    if (!op) {
        core->stats.bad_messages += got > 0;
        channel_close(core, channel); /* the end, an error, nonsense, or no memory */
        return false;
    }
    memcpy(&op->request, packet->bytes, sizeof op->request);
    op->packet = packet;
    core->spare = NULL;
    op_start(core, op, (size_t)got - sizeof op->request);
    return true;
}

bool channel_read(struct core *core, struct channel *channel)
{
    uint64_t id = channel->id;
    uint32_t n = 0;
    if (channel->gone) {
        channel_close(core, channel);
        return true;
    }
    for (; n < channel->burst; n++) {
        if (channel->window >= LITE_WINDOW)
            return n; /* hot again when an answer is sent */
        if (!core->spare && !(core->spare = pool_take(core, &core->packets)))
            break; /* hot: tried again when something has ended */
        if (!read_packet(core, channel)) {
            channel = table_find(&core->channels, id);
            if (channel)
                channel->burst = n ? n : 1;
            return n || !channel;
        }
    }
    /* There may be more. A program that asks one thing at a time is not asked again before that is posted. */
    if (n == channel->burst && n < MOST_BURST)
        channel->burst = 2 * n;
    list_append(&core->hot, &channel->hot);
    return n;
}

static void close_client(struct core *core, struct client *client)
{
    client->removed = true;
    for (struct channel *channel; (channel = FIRST(&client->channels, struct channel, link));)
        channel_close(core, channel);
    ports_client_gone(core, client);
}

static void free_client(struct core *core, struct client *client)
{
    handles_close(core, client);
    buffers_close(core, client);
    table_remove(&core->clients, client->id);
    free(client);
}

API int lite_client_remove(struct core *core, uint64_t id)
{
    core_enter(core);
    struct client *client = client_of(core, id);
    if (client) {
        close_client(core, client);
        while (client->ops)
            core_wait(core);
        free_client(core, client);
    }
    core_leave(core);
    return client ? 0 : LITE_BAD_HANDLE;
}

void clients_close(struct core *core)
{
    for (size_t i = 0; i < core->clients.size; i++)
        if (core->clients.entry[i].value)
            close_client(core, core->clients.entry[i].value);
    while (core->clients.count)
        for (size_t i = 0; i < core->clients.size; i++)
            if (core->clients.entry[i].value)
                free_client(core, core->clients.entry[i].value);
}
