#define _GNU_SOURCE
#include "wire.h"

#include "codec.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

enum {
    BATCHES_PER_LINK = 3,   /* 3 x 64 work requests stay below FABRIC_DEPTH */
    SGES = 16,
    ID_BATCH = 16,          /* work request numbers from here on: flush batches */
};

_Noreturn void lines_die(const char *format, ...)
{
    char text[512] = "rackless: ";
    va_list args;
    va_start(args, format);
    vsnprintf(text + 10, sizeof text - 12, format, args);
    va_end(args);
    strcat(text, "\n");
    if (write(STDERR_FILENO, text, strlen(text)) < 0) {
        /* nobody to tell */
    }
    syscall(SYS_exit_group, 70); /* EX_SOFTWARE: with no exit handlers, which might touch lost memory */
    __builtin_unreachable();
}

static void complete_batch(struct lines *l, unsigned index)
{
    struct batch *batch = &l->batch[index];
    for (uint32_t i = 0; i < batch->count; i++) {
        struct slot *slot = &l->slots[batch->slot[i]];
        slot->state = slot->page == NO_OWNER ? SLOT_FREE : SLOT_CLEAN;
    }
    l->free_batches |= 1u << index;
    l->batches_on[batch->link]--;
}

void wire_reap(struct lines *l, bool wait)
{
    struct ibv_wc wc[8];
    int got = wait ? fabric_wait(&l->fabric, wc, 8) : fabric_poll(&l->fabric, wc, 8);
    if (got < 0)
        lines_die("waiting for a memory blade failed: %s", strerror(-got));
    for (int i = 0; i < got; i++) {
        if (wc[i].status != IBV_WC_SUCCESS) {
            const char *name = "a memory blade";
            for (uint32_t k = 0; k < l->monitor.blades; k++)
                if (l->link[k].qp->qp_num == wc[i].qp_num)
                    name = l->monitor.name[k];
            lines_die("memory blade %s is lost (%s): the program's memory is no longer whole, it ends here", name,
                      ibv_wc_status_str(wc[i].status));
        }
        if (wc[i].wr_id >= ID_BATCH)
            complete_batch(l, (unsigned)(wc[i].wr_id - ID_BATCH));
        else
            l->landed[wc[i].wr_id] = true;
    }
}

static int by_page(const void *a, const void *b)
{
    const struct { uint32_t page, slot; } *x = a, *y = b;
    return x->page < y->page ? -1 : x->page > y->page;
}

uint32_t wire_post(struct lines *l, uint32_t link, struct ibv_send_wr *read, bool flush)
{
    static struct ibv_send_wr wr[FLUSH_PAGES];
    static struct ibv_sge sge[FLUSH_PAGES];
    static struct { uint32_t page, slot; } dirty[FLUSH_PAGES];
    uint32_t n = 0, requests = 0;
    if (flush && l->free_batches && l->batches_on[link] < BATCHES_PER_LINK) {
        for (size_t i = 0, slot = l->hand; i < l->nslots && n < FLUSH_PAGES; i++) {
            if (l->slots[slot].state == SLOT_DIRTY && region_of(l, l->slots[slot].page)->link == link) {
                dirty[n].page = l->slots[slot].page;
                dirty[n++].slot = (uint32_t)slot;
            }
            slot = slot + 1 == l->nslots ? 0 : slot + 1;
        }
        qsort(dirty, n, sizeof *dirty, by_page);
    }
    unsigned index = n ? (unsigned)__builtin_ctz(l->free_batches) : 0;
    for (uint32_t i = 0; i < n; i++) {
        uint32_t page = dirty[i].page, slot = dirty[i].slot;
        struct region *region = region_of(l, page);
        sge[i] = (struct ibv_sge){(uintptr_t)slot_data(l, slot), PAGE_SIZE, l->fabric.mr->lkey};
        bool joins = i && dirty[i - 1].page + 1 == page && page % REGION_PAGES && wr[requests - 1].num_sge < SGES;
        if (joins) {
            wr[requests - 1].num_sge++;
        } else {
            wr[requests] = (struct ibv_send_wr){
                .wr_id = ID_BATCH + index,
                .sg_list = &sge[i],
                .num_sge = 1,
                .opcode = IBV_WR_RDMA_WRITE,
                .wr.rdma = {region->address + ((uint64_t)(page % REGION_PAGES) << PAGE_SHIFT), region->rkey},
            };
            if (requests)
                wr[requests - 1].next = &wr[requests];
            requests++;
        }
        l->slots[slot].state = SLOT_FLUSHING;
        l->state[page] |= STORED;
        l->batch[index].slot[i] = slot;
    }
    if (n) {
        wr[requests - 1].send_flags = IBV_SEND_SIGNALED;
        l->batch[index].count = n;
        l->batch[index].link = link;
        l->free_batches &= ~(1u << index);
        l->batches_on[link]++;
        l->dirty_slots -= n;
        l->dirty_on[link] -= n;
        l->count->flushes += n;
        l->count->writes += requests;
        l->count->bytes_out += (uint64_t)n << PAGE_SHIFT;
        l->count->blade[link].flushes += n;
        l->count->blade[link].bytes_out += (uint64_t)n << PAGE_SHIFT;
        if (read) {
            read->next = wr;
            l->count->piggybacks++;
        }
    }
    struct ibv_send_wr *first = read ? read : n ? wr : NULL, *bad;
    int error = first ? ibv_post_send(l->link[link].qp, first, &bad) : 0;
    if (error)
        lines_die("posting to memory blade %s failed: %s", l->monitor.name[link], strerror(error));
    return n;
}

size_t wire_fair_share(const struct lines *l, size_t divisor)
{
    return l->nslots * 3 / 4 / l->monitor.blades / divisor;
}

void wire_flush(struct lines *l, size_t at_least)
{
    for (uint32_t link = 0; link < l->monitor.blades; link++)
        while (l->dirty_on[link] >= at_least && wire_post(l, link, NULL, true) > 0) {
        }
}

void lines_flush_all(struct lines *l)
{
    while (l->dirty_slots || l->free_batches != (1u << FLUSH_BATCHES) - 1) {
        wire_flush(l, 1);
        wire_reap(l, true);
    }
}

struct ibv_send_wr wire_read(struct lines *l, size_t page, size_t count, struct ibv_sge *sge, char *to, uint64_t id)
{
    struct region *region = region_of(l, page);
    *sge = (struct ibv_sge){(uintptr_t)to, (uint32_t)(count << PAGE_SHIFT), l->fabric.mr->lkey};
    l->landed[id] = false;
    l->count->reads++;
    l->count->bytes_in += (uint64_t)count << PAGE_SHIFT;
    l->count->blade[region->link].bytes_in += (uint64_t)count << PAGE_SHIFT;
    return (struct ibv_send_wr){
        .wr_id = id,
        .sg_list = sge,
        .num_sge = 1,
        .opcode = IBV_WR_RDMA_READ,
        .send_flags = IBV_SEND_SIGNALED,
        .wr.rdma = {region->address + ((uint64_t)(page % REGION_PAGES) << PAGE_SHIFT), region->rkey},
    };
}

const char *lines_peek(struct lines *l, size_t page)
{
    if ((l->state[page] & STATE_MASK) == BUFFERED)
        return slot_data(l, l->where[page]);
    char *to = l->landing + RUN_PAGES * PAGE_SIZE;
    if ((l->state[page] & STATE_MASK) == PACKED) {
        codec_unpack(pool_get(&l->pool, page), (uint64_t *)to);
        return to;
    }
    struct ibv_sge sge;
    struct ibv_send_wr read = wire_read(l, page, 1, &sge, to, ID_PEEK);
    wire_post(l, region_of(l, page)->link, &read, false);
    while (!l->landed[ID_PEEK])
        wire_reap(l, true);
    return to;
}
