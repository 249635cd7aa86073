#define _GNU_SOURCE
#include "wire.h"

#include "codec.h"
#include "trace.h"

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
};

void (*lines_end)(void);

static void say(const char *format, va_list args)
{
    char text[512] = "rackless: ";
    vsnprintf(text + 10, sizeof text - 12, format, args);
    strcat(text, "\n");
    if (write(STDERR_FILENO, text, strlen(text)) < 0) {
        /* nobody to tell */
    }
}

void lines_say(const char *format, ...)
{
    va_list args;
    va_start(args, format);
    say(format, args);
    va_end(args);
}

_Noreturn void lines_die(const char *format, ...)
{
    va_list args;
    va_start(args, format);
    say(format, args);
    va_end(args);
    if (lines_end)
        lines_end();
    syscall(SYS_exit_group, 70); /* EX_SOFTWARE: with no exit handlers, which might touch lost memory */
    __builtin_unreachable();
}

static struct { uint64_t begin; uint32_t blades; } sent[FLUSH_BATCHES]; /* for the trace */

/* One blade has confirmed a flush, or will never do so. */
static void settle(struct lines *l, unsigned index, uint32_t link)
{
    struct batch *batch = &l->batch[index];
    batch->links &= ~(1u << link);
    l->batches_on[link]--;
    if (batch->links)
        return;
    l->flushing_slots -= batch->count;
    trace_done(TRACE_FLUSH, sent[index].begin, 0, batch->count, sent[index].blades, index);
    for (uint32_t i = 0; i < batch->count; i++) {
        struct slot *slot = &l->slots[batch->slot[i]];
        slot->state = slot->page == NO_OWNER ? SLOT_FREE : SLOT_CLEAN;
    }
    l->free_batches |= 1u << index;
}

void wire_give_up(struct lines *l, uint32_t link)
{
    for (unsigned i = 0; i < FLUSH_BATCHES; i++)
        if (!(l->free_batches >> i & 1) && l->batch[i].links >> link & 1)
            settle(l, i, link);
    for (unsigned id = 0; id < ID_BATCH; id++)
        if (l->request[id].state == UNDERWAY && l->request[id].link == link)
            l->request[id].state = FAILED;
    memset(l->dirty_on, 0, sizeof l->dirty_on); /* regions have another first place */
    for (size_t slot = 0; slot < l->nslots; slot++)
        if (l->slots[slot].state == SLOT_DIRTY)
            l->dirty_on[region_of(l, l->slots[slot].page)->at[0].link]++;
}

static bool idle(const struct lines *l)
{
    bool busy = l->free_batches != (1u << FLUSH_BATCHES) - 1;
    for (unsigned id = 0; id < ID_BATCH; id++)
        busy |= l->request[id].state == UNDERWAY;
    return !busy;
}

void wire_reap(struct lines *l, bool wait)
{
    struct ibv_wc wc[8];
    wait = wait && !idle(l);
    int got = wait ? fabric_wait(&l->fabric, wc, 8) : fabric_poll(&l->fabric, wc, 8);
    if (got < 0)
        lines_die("waiting for a memory blade failed: %s", strerror(-got));
    for (int i = 0; i < got; i++) {
        uint32_t link = 0;
        while (link < l->monitor.blades && !(l->link[link].qp && l->link[link].qp->qp_num == wc[i].qp_num))
            link++;
        if (link == l->monitor.blades)
            continue; /* it was lost: what it carried has been given up */
        if (wc[i].status != IBV_WC_SUCCESS)
            replica_lost(l, link, ibv_wc_status_str(wc[i].status));
        else if (wc[i].wr_id >= ID_BATCH)
            settle(l, (unsigned)(wc[i].wr_id - ID_BATCH), link);
        else
            l->request[wc[i].wr_id].state = ANSWERED;
    }
    if (wait && !got)
        replica_news(l);
}

struct dirty {
    uint32_t page, slot;
};

static int by_page(const void *a, const void *b)
{
    const struct dirty *x = a, *y = b;
    return x->page < y->page ? -1 : x->page > y->page;
}

/* The dirty pages whose region has its first place on this blade, oldest first; then in order of address. */
static uint32_t choose(const struct lines *l, uint32_t link, struct dirty dirty[FLUSH_PAGES])
{
    uint32_t n = 0;
    if (!l->free_batches || l->batches_on[link] >= BATCHES_PER_LINK)
        return 0;
    for (size_t i = 0, slot = l->hand; i < l->nslots && n < FLUSH_PAGES; i++) {
        if (l->slots[slot].state == SLOT_DIRTY) {
            const struct region *region = region_of(l, l->slots[slot].page);
            uint32_t second = region->at[1].link;
            if (region->at[0].link == link && (second == NO_LINK || l->batches_on[second] < BATCHES_PER_LINK))
                dirty[n++] = (struct dirty){l->slots[slot].page, (uint32_t)slot};
        }
        slot = slot + 1 == l->nslots ? 0 : slot + 1;
    }
    qsort(dirty, n, sizeof *dirty, by_page);
    return n;
}

static void post(struct lines *l, uint32_t link, struct ibv_send_wr *first)
{
    struct ibv_send_wr *bad;
    int error = ibv_post_send(l->link[link].qp, first, &bad);
    if (error)
        replica_lost(l, link, strerror(error));
}

static const struct place *place_on(const struct region *region, uint32_t link)
{
    return region->at[0].link == link ? &region->at[0] : region->at[1].link == link ? &region->at[1] : NULL;
}

/* Post to one blade, behind `read` (may be NULL), the pages of a flush that it keeps. Adjacent pages share a WRITE.
 * Returns the number of WRITEs. */
static uint32_t post_flush(struct lines *l, uint32_t link, unsigned index, const struct dirty *dirty,
                           struct ibv_send_wr *read)
{
    static struct ibv_send_wr wr[FLUSH_PAGES];
    static struct ibv_sge sge[FLUSH_PAGES];
    uint32_t requests = 0, pages = 0, last = NO_OWNER;
    for (uint32_t i = 0; i < l->batch[index].count; i++) {
        uint32_t page = dirty[i].page;
        const struct place *place = place_on(region_of(l, page), link);
        if (!place)
            continue;
        sge[pages] = (struct ibv_sge){(uintptr_t)slot_data(l, dirty[i].slot), PAGE_SIZE, l->fabric.mr->lkey};
        if (pages && last + 1 == page && page % REGION_PAGES && wr[requests - 1].num_sge < SGES) {
            wr[requests - 1].num_sge++;
        } else {
            wr[requests] = (struct ibv_send_wr){
                .wr_id = ID_QUIET,
                .sg_list = &sge[pages],
                .num_sge = 1,
                .opcode = IBV_WR_RDMA_WRITE,
                .wr.rdma = {place->address + ((uint64_t)(page % REGION_PAGES) << PAGE_SHIFT), place->rkey},
            };
            if (requests)
                wr[requests - 1].next = &wr[requests];
            requests++;
        }
        last = page;
        pages++;
    }
    wr[requests - 1].send_flags = IBV_SEND_SIGNALED;
    wr[requests - 1].wr_id = ID_BATCH + index;
    if (read)
        read->next = wr;
    l->count->writes += requests;
    l->count->bytes_out += (uint64_t)pages << PAGE_SHIFT;
    l->count->blade[link].writes += requests;
    l->count->blade[link].flushes += pages;
    l->count->blade[link].bytes_out += (uint64_t)pages << PAGE_SHIFT;
    post(l, link, read ? read : wr);
    return requests;
}

/* Book a flush of dirty pages: which slots, and which blades have to confirm it. */
static unsigned book_flush(struct lines *l, uint32_t link, const struct dirty *dirty, uint32_t n)
{
    unsigned index = (unsigned)__builtin_ctz(l->free_batches);
    struct batch *batch = &l->batch[index];
    *batch = (struct batch){.count = n};
    for (uint32_t i = 0; i < n; i++) {
        const struct region *region = region_of(l, dirty[i].page);
        batch->slot[i] = dirty[i].slot;
        batch->links |= 1u << link;
        if (region->at[1].link != NO_LINK) {
            batch->links |= 1u << region->at[1].link;
            l->count->replica_writes++;
            l->count->blade[region->at[1].link].replica_writes++;
        }
        l->slots[dirty[i].slot].state = SLOT_FLUSHING;
        l->state[dirty[i].page] |= STORED;
    }
    l->free_batches &= ~(1u << index);
    sent[index].begin = trace_begin();
    sent[index].blades = batch->links;
    for (uint32_t k = 0; k < l->monitor.blades; k++)
        l->batches_on[k] += batch->links >> k & 1;
    l->dirty_slots -= n;
    l->dirty_on[link] -= n;
    l->flushing_slots += n;
    l->count->flushes += n;
    return index;
}

/* Post `read` (may be NULL) and, behind it, dirty pages of that blade: one system call, one wait; and the same pages
 * to the blades that have the other copies. Returns the number of pages flushed. */
static uint32_t send_off(struct lines *l, uint32_t link, struct ibv_send_wr *read, bool flush)
{
    static struct dirty dirty[FLUSH_PAGES];
    uint32_t n = flush ? choose(l, link, dirty) : 0;
    if (!n) {
        if (read)
            post(l, link, read);
        return 0;
    }
    unsigned index = book_flush(l, link, dirty, n);
    uint32_t others = l->batch[index].links & ~(1u << link);
    l->count->piggybacks += read != NULL;
    l->count->blade[link].piggybacks += read != NULL;
    post_flush(l, link, index, dirty, read);
    for (uint32_t k = 0; k < l->monitor.blades; k++)
        if (others >> k & 1 && l->link[k].qp)
            l->count->replica_requests += post_flush(l, k, index, dirty, NULL);
    return n;
}

size_t wire_fair_share(const struct lines *l, size_t divisor)
{
    return l->nslots * 3 / 4 / l->monitor.blades / divisor;
}

void wire_flush(struct lines *l, size_t at_least)
{
    for (uint32_t link = 0; link < l->monitor.blades; link++)
        while (l->dirty_on[link] >= at_least && send_off(l, link, NULL, true) > 0) {
        }
}

static bool flushing(const struct lines *l)
{
    return l->free_batches != (1u << FLUSH_BATCHES) - 1;
}

void wire_settle(struct lines *l)
{
    while (flushing(l))
        wire_reap(l, true);
}

void lines_flush_all(struct lines *l)
{
    while (l->dirty_slots || flushing(l)) {
        wire_flush(l, 1);
        wire_reap(l, true);
    }
}

void wire_read(struct lines *l, size_t page, size_t count, char *to, unsigned id, bool flush)
{
    const struct place *place = &region_of(l, page)->at[0];
    uint32_t link = place->link;
    struct ibv_sge sge = {(uintptr_t)to, (uint32_t)(count << PAGE_SHIFT), l->fabric.mr->lkey};
    struct ibv_send_wr read = {
        .wr_id = id,
        .sg_list = &sge,
        .num_sge = 1,
        .opcode = IBV_WR_RDMA_READ,
        .send_flags = IBV_SEND_SIGNALED,
        .wr.rdma = {place->address + ((uint64_t)(page % REGION_PAGES) << PAGE_SHIFT), place->rkey},
    };
    l->request[id] = (struct request){UNDERWAY, link, page, count, to};
    l->count->reads++;
    l->count->blade[link].reads++;
    l->count->bytes_in += (uint64_t)count << PAGE_SHIFT;
    l->count->blade[link].bytes_in += (uint64_t)count << PAGE_SHIFT;
    send_off(l, link, &read, flush);
}

bool wire_answered(struct lines *l, unsigned id)
{
    wire_reap(l, false);
    return l->request[id].state == ANSWERED;
}

void wire_wait(struct lines *l, unsigned id)
{
    const struct request *request = &l->request[id];
    if (request->state == FAILED)
        wire_read(l, request->page, request->count, request->to, id, false);
    wire_reap(l, true);
}

void wire_await(struct lines *l, unsigned id)
{
    while (l->request[id].state != ANSWERED)
        wire_wait(l, id);
}

/* One leg of a copy: single pages between l->landing and one place, and wait. */
static bool carry(struct lines *l, const size_t *page, uint32_t n, const struct place *place, enum ibv_wr_opcode opcode)
{
    static struct ibv_send_wr wr[RUN_PAGES];
    static struct ibv_sge sge[RUN_PAGES];
    struct request *request = &l->request[ID_COPY];
    for (uint32_t i = 0; i < n; i++) {
        sge[i] = (struct ibv_sge){(uintptr_t)l->landing + ((uint64_t)i << PAGE_SHIFT), PAGE_SIZE, l->fabric.mr->lkey};
        wr[i] = (struct ibv_send_wr){
            .wr_id = i + 1 == n ? ID_COPY : ID_QUIET,
            .next = i + 1 == n ? NULL : &wr[i + 1],
            .sg_list = &sge[i],
            .num_sge = 1,
            .opcode = opcode,
            .send_flags = i + 1 == n ? IBV_SEND_SIGNALED : 0,
            .wr.rdma = {place->address + ((uint64_t)(page[i] % REGION_PAGES) << PAGE_SHIFT), place->rkey},
        };
    }
    *request = (struct request){.state = UNDERWAY, .link = place->link};
    post(l, place->link, wr);
    while (request->state == UNDERWAY)
        wire_reap(l, true);
    return request->state == ANSWERED;
}

bool wire_copy(struct lines *l, const size_t *page, uint32_t n)
{
    const struct region *region = region_of(l, page[0]);
    uint32_t from = region->at[0].link, to = region->at[1].link;
    uint64_t bytes = (uint64_t)n << PAGE_SHIFT;
    carry(l, page, n, &region->at[0], IBV_WR_RDMA_READ); /* if that blade is lost, so is the program */
    if (region->at[1].link == NO_LINK)
        return false;
    l->count->reads += n;
    l->count->blade[from].reads += n;
    l->count->bytes_in += bytes;
    l->count->blade[from].bytes_in += bytes;
    l->count->writes += n;
    l->count->blade[to].writes += n;
    l->count->bytes_out += bytes;
    l->count->blade[to].bytes_out += bytes;
    return carry(l, page, n, &region->at[1], IBV_WR_RDMA_WRITE);
}

const char *lines_peek(struct lines *l, size_t page)
{
    if ((l->state[page] & STATE_MASK) == BUFFERED)
        return slot_data(l, l->where[page]);
    if ((l->state[page] & STATE_MASK) == DOZING)
        return lines_frame(l, page);
    char *to = l->landing + (l->together << PAGE_SHIFT);
    if ((l->state[page] & STATE_MASK) == PACKED) {
        codec_unpack(pool_get(&l->pool, page), (uint64_t *)to);
        return to;
    }
    wire_read(l, page, 1, to, ID_PEEK, false);
    wire_await(l, ID_PEEK);
    return to;
}
