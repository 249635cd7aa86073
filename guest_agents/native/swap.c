#define _GNU_SOURCE
#include "swap.h"

#include <endian.h>
#include <errno.h>
#include <linux/nbd.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

enum {
    REGION = 4 << 20,
    BLOCKS = REGION / SWAP_BLOCK,       /* of a region */
    PIECES = 2,                         /* of a request: it may go over the end of a region */
    WAIT_MS = 1000,                     /* safety net: a lost event must not become a hang */
};

/* Where 4 MiB of the device are. */
struct extent {
    struct place place;
    uint64_t written[BLOCKS / 64];      /* bit: block has contents; others are zeros */
    uint32_t count;
    bool lost;                          /* its memory blade has died */
    struct extent *next;                /* when no part of the device uses it */
};

struct slot {
    struct nbd_request request;
    uint64_t from;
    uint32_t bytes, error;
    unsigned pieces;                    /* still under way */
    uint32_t link[PIECES];
    char *data;
};

static struct swap *swap;
static struct extent **extents, *spare;
static uint64_t size;
static char *buffer, first[SWAP_BLOCK];
static struct slot slots[SWAP_SLOTS];
static unsigned busy;                   /* bit: slot is in use */

char *swap_first_block(void)
{
    return first;
}

const char *swap_open(struct swap *s, uint64_t bytes)
{
    static char why[300];
    swap = s;
    size = bytes;
    extents = calloc(bytes / REGION + 1, sizeof *extents);
    buffer = mmap(NULL, SWAP_SLOTS * SWAP_REQUEST, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (!extents || buffer == MAP_FAILED)
        return "no memory";
    for (unsigned i = 0; i < SWAP_SLOTS; i++)
        slots[i].data = buffer + i * SWAP_REQUEST;
    if (monitor_attach(&s->monitor, "-"))
        return s->monitor.error;
    int error = fabric_open(&s->fabric, buffer, SWAP_SLOTS * SWAP_REQUEST);
    if (error) {
        snprintf(why, sizeof why, "no RDMA device: %s", strerror(-error));
        return why;
    }
    s->fabric.other[0] = s->fabric.other[1] = -1;
    unsigned connected = 0;
    for (uint32_t i = 0; i < s->monitor.blades; i++) {
        if (fabric_link_create(&s->fabric, &s->link[i]))
            return "no more queue pairs";
        if (monitor_connect(&s->monitor, i, &s->fabric, &s->link[i]))
            fabric_link_destroy(&s->link[i]); /* its blade may be dying: others will do */
        else
            connected++;
    }
    return connected ? NULL : s->monitor.error;
}

/* ---- memory ---- */

static struct extent *take_extent(void)
{
    struct extent *extent = spare;
    if (extent) {
        spare = extent->next;
        return extent;
    }
    struct place place[COPIES];
    uint32_t without = 0;
    for (uint32_t i = 0; i < swap->monitor.blades; i++)
        if (!swap->link[i].qp)
            without |= 1u << i;
    if (monitor_region(&swap->monitor, REGION, 1, without, place) || !(extent = calloc(1, sizeof *extent)))
        return NULL;
    extent->place = place[0];
    return extent;
}

static void forget(uint64_t from, uint64_t bytes)
{
    for (uint64_t at = (from + SWAP_BLOCK - 1) / SWAP_BLOCK, end = (from + bytes) / SWAP_BLOCK; at < end; at++) {
        struct extent **extent = &extents[at / BLOCKS];
        if (!*extent) {
            at = (at / BLOCKS + 1) * BLOCKS - 1;
            continue;
        }
        uint64_t bit = 1ull << at % 64;
        if (!((*extent)->written[at % BLOCKS / 64] & bit))
            continue;
        (*extent)->written[at % BLOCKS / 64] &= ~bit;
        if (--(*extent)->count)
            continue;
        if ((*extent)->lost) {
            free(*extent);
        } else {
            (*extent)->next = spare;
            spare = *extent;
        }
        *extent = NULL;
    }
}

static void lose(uint32_t link)
{
    if (!swap->link[link].qp)
        return;
    fabric_link_stop(&swap->link[link]);
    uint64_t blocks = 0;
    for (uint64_t i = 0; i <= size / REGION; i++)
        if (extents[i] && extents[i]->place.link == link) {
            extents[i]->lost = true;
            blocks += extents[i]->count;
        }
    for (struct extent **at = &spare; *at;)
        if ((*at)->place.link == link) {
            struct extent *gone = *at;
            *at = gone->next;
            free(gone);
        } else {
            at = &(*at)->next;
        }
    for (unsigned i = 0; i < SWAP_SLOTS; i++)
        for (unsigned k = 0; busy >> i & 1 && k < PIECES; k++)
            if (slots[i].link[k] == link) {
                slots[i].link[k] = NO_LINK;
                slots[i].pieces--;
                slots[i].error = EIO;
            }
    swap->lost(swap->monitor.name[link], blocks);
    monitor_release(&swap->monitor, link);
}

/* ---- requests ---- */

static bool send_all(int socket, const void *data, size_t bytes, int flags)
{
    for (const char *at = data; bytes;) {
        ssize_t sent = send(socket, at, bytes, MSG_NOSIGNAL | flags);
        if (sent < 0 && errno == EINTR)
            continue;
        if (sent <= 0)
            return false;
        at += sent;
        bytes -= (size_t)sent;
    }
    return true;
}

static bool receive_all(int socket, void *data, size_t bytes)
{
    for (char *at = data; bytes;) {
        ssize_t got = recv(socket, at, bytes, MSG_WAITALL);
        if (got < 0 && errno == EINTR)
            continue;
        if (got <= 0)
            return false;
        at += got;
        bytes -= (size_t)got;
    }
    return true;
}

static bool answer(int socket, struct slot *slot)
{
    bool read = (be32toh(slot->request.type) & 0xffff) == NBD_CMD_READ && !slot->error;
    struct nbd_reply reply = {.magic = htobe32(NBD_REPLY_MAGIC), .error = htobe32(slot->error)};
    memcpy(reply.handle, slot->request.handle, sizeof reply.handle);
    busy &= ~(1u << (slot - slots));
    return send_all(socket, &reply, sizeof reply, read ? MSG_MORE : 0) &&
           (!read || send_all(socket, slot->data, slot->bytes, 0));
}

/* Whether all, or some, blocks of a piece have contents. */
static unsigned written(const struct extent *extent, uint64_t block, uint64_t count)
{
    unsigned n = 0;
    for (uint64_t i = block; extent && i < block + count; i++)
        n += extent->written[i / 64] >> i % 64 & 1;
    return n;
}

static void start_piece(struct slot *slot, unsigned piece, uint64_t at, char *data, uint32_t bytes, bool write)
{
    struct extent **extent = &extents[at / REGION];
    uint64_t block = at % REGION / SWAP_BLOCK, count = bytes / SWAP_BLOCK;
    if (!write && !written(*extent, block, count)) {
        memset(data, 0, bytes);
        return;
    }
    if (!*extent && !(*extent = take_extent())) {
        slot->error = ENOSPC;
        swap->lost(NULL, 0);
        return;
    }
    if ((*extent)->lost || !swap->link[(*extent)->place.link].qp) {
        slot->error = EIO;
        return;
    }
    if (write)
        for (uint64_t i = block; i < block + count; i++)
            if (!((*extent)->written[i / 64] >> i % 64 & 1)) {
                (*extent)->written[i / 64] |= 1ull << i % 64;
                (*extent)->count++;
            }
    struct ibv_sge sge = {(uintptr_t)data, bytes, swap->fabric.mr->lkey};
    struct ibv_send_wr wr = {.wr_id = (uint64_t)(slot - slots) * PIECES + piece, .sg_list = &sge, .num_sge = 1,
                             .opcode = write ? IBV_WR_RDMA_WRITE : IBV_WR_RDMA_READ, .send_flags = IBV_SEND_SIGNALED},
                       *bad;
    wr.wr.rdma.remote_addr = (*extent)->place.address + at % REGION;
    wr.wr.rdma.rkey = (*extent)->place.rkey;
    slot->link[piece] = (*extent)->place.link;
    slot->pieces++;
    if (ibv_post_send(swap->link[slot->link[piece]].qp, &wr, &bad))
        lose(slot->link[piece]);
}

/* Blocks of a READ that were never written are zeros, whatever the memory blade has there. */
static void blank(struct slot *slot)
{
    for (uint32_t at = 0; at < slot->bytes; at += SWAP_BLOCK) {
        uint64_t block = (slot->from + at) / SWAP_BLOCK;
        if (!block)
            memcpy(slot->data + at, first, SWAP_BLOCK);
        else if (!written(extents[block / BLOCKS], block % BLOCKS, 1))
            memset(slot->data + at, 0, SWAP_BLOCK);
    }
}

static bool finish(int socket, struct slot *slot)
{
    if ((be32toh(slot->request.type) & 0xffff) == NBD_CMD_READ && !slot->error)
        blank(slot);
    return answer(socket, slot);
}

/* Take one request. False when the conversation is over. */
static bool begin(int socket)
{
    struct slot *slot = &slots[__builtin_ctz(~busy)];
    if (!receive_all(socket, &slot->request, sizeof slot->request) ||
        be32toh(slot->request.magic) != NBD_REQUEST_MAGIC)
        return false;
    uint32_t type = be32toh(slot->request.type) & 0xffff;
    slot->from = be64toh(slot->request.from);
    slot->bytes = be32toh(slot->request.len);
    slot->error = slot->pieces = 0;
    slot->link[0] = slot->link[1] = NO_LINK;
    busy |= 1u << (slot - slots);
    bool moves = type == NBD_CMD_READ || type == NBD_CMD_WRITE;
    if (type == NBD_CMD_DISC || (moves && slot->bytes > SWAP_REQUEST))
        return false;
    if (type == NBD_CMD_WRITE && !receive_all(socket, slot->data, slot->bytes))
        return false;
    if (slot->from + slot->bytes > size || (moves && (slot->from | slot->bytes) % SWAP_BLOCK)) {
        slot->error = EINVAL;
    } else if (type == NBD_CMD_TRIM) {
        forget(slot->from, slot->bytes);
    } else if (moves) {
        for (uint32_t done = 0, piece = 0; done < slot->bytes; piece++) {
            uint64_t at = slot->from + done, room = REGION - at % REGION;
            uint32_t bytes = slot->bytes - done < room ? slot->bytes - done : (uint32_t)room;
            start_piece(slot, piece, at, slot->data + done, bytes, type == NBD_CMD_WRITE);
            done += bytes;
        }
    }
    return slot->pieces || finish(socket, slot);
}

/* Answer what memory blades have confirmed. Returns how many completions there were, or -1: the end. */
static int reap(int socket)
{
    struct ibv_wc wc[SWAP_SLOTS];
    int got = fabric_poll(&swap->fabric, wc, SWAP_SLOTS);
    for (int i = 0; i < got; i++) {
        struct slot *slot = &slots[wc[i].wr_id / PIECES];
        uint32_t *link = &slot->link[wc[i].wr_id % PIECES];
        if (*link == NO_LINK || !swap->link[*link].qp || swap->link[*link].qp->qp_num != wc[i].qp_num)
            continue; /* given up before */
        if (wc[i].status != IBV_WC_SUCCESS) {
            lose(*link);
            continue;
        }
        *link = NO_LINK;
        slot->pieces--;
    }
    for (unsigned i = 0; i < SWAP_SLOTS; i++)
        if (busy >> i & 1 && !slots[i].pieces && !finish(socket, &slots[i]))
            return -1;
    return got;
}

static void read_news(void)
{
    uint32_t blade;
    for (char what; (what = monitor_news(&swap->monitor, &blade));)
        if (what == 'l')
            lose(blade);
}

void swap_serve(struct swap *s, int socket, int also, bool (*idle)(void))
{
    for (int quiet = 0;;) {
        int got = reap(socket);
        if (got < 0)
            return;
        quiet = got ? 0 : quiet + 1;
        bool armed = !busy || quiet > fabric_spin;
        if (armed && (ibv_req_notify_cq(s->fabric.cq, 0) || (got = reap(socket)) < 0))
            return;
        if (got)
            quiet = 0;
        struct pollfd watch[] = {
            {.fd = ~busy & ((1u << SWAP_SLOTS) - 1) ? socket : -1, .events = POLLIN},
            {.fd = s->monitor.news, .events = POLLIN},
            {.fd = also, .events = POLLIN},
            {.fd = s->fabric.channel->fd, .events = POLLIN},
        };
        if (poll(watch, 4, armed && !got ? WAIT_MS : 0) < 0 && errno != EINTR)
            return;
        struct ibv_cq *cq;
        void *unused;
        if (watch[3].revents && !ibv_get_cq_event(s->fabric.channel, &cq, &unused))
            ibv_ack_cq_events(cq, 1);
        if (watch[1].revents)
            read_news();
        if (watch[2].revents && !idle())
            return;
        if (watch[0].revents && !begin(socket))
            return;
    }
}
