/* Registered memory: slabs for blocks, pools of packet buffers and bounce chunks; and copies to and from programs. */
#define _GNU_SOURCE
#include "core.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>

static const size_t HUGE = 2 << 20;

int region_open(struct core *core, struct region *region, size_t bytes, int access, int memfd)
{
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    region->size = (bytes + page - 1) & ~(page - 1);
    if (!bytes || region->size < bytes)
        return LITE_BAD_ARGUMENT;
    int flags = memfd < 0 ? MAP_PRIVATE | MAP_ANONYMOUS : MAP_SHARED;
    region->bytes = mmap(NULL, region->size, PROT_READ | PROT_WRITE, flags, memfd, 0);
    if (region->bytes == MAP_FAILED) {
        region->bytes = NULL;
        return LITE_NO_MEMORY;
    }
    madvise(region->bytes, region->size, MADV_DONTFORK); /* a child must not turn pinned pages into copies */
    if (region->size >= HUGE && memfd < 0)
        madvise(region->bytes, region->size, MADV_HUGEPAGE);
    region->mr = ibv_reg_mr(core->pd, region->bytes, region->size, access);
    if (region->mr)
        return 0;
    region_close(region);
    return LITE_NO_MEMORY;
}

void region_close(struct region *region)
{
    if (region->mr)
        ibv_dereg_mr(region->mr);
    if (region->bytes)
        munmap(region->bytes, region->size);
    *region = (struct region){0};
}

/* The index of the first slab that begins after `address`. */
static uint32_t slab_after(struct core *core, uint64_t address)
{
    uint32_t low = 0, high = core->slabs;
    while (low < high) {
        uint32_t middle = (low + high) / 2;
        if ((uintptr_t)core->slab[middle]->region.bytes <= address)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

struct slab *slab_find(struct core *core, uint64_t address, uint64_t length)
{
    uint32_t after = slab_after(core, address);
    if (!after)
        return NULL;
    struct slab *slab = core->slab[after - 1];
    uint64_t offset = address - (uintptr_t)slab->region.bytes;
    return offset <= slab->region.size && length <= slab->region.size - offset ? slab : NULL;
}

API int lite_slab_open(struct core *core, uint64_t bytes, struct lite_slab *out)
{
    struct slab *slab = calloc(1, sizeof *slab);
    if (!slab)
        return LITE_NO_MEMORY;
    /* Outside the lock: pinning takes long, and nobody else knows the slab yet. */
    int code = region_open(core, &slab->region, bytes,
                           IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_READ | IBV_ACCESS_REMOTE_WRITE |
                               IBV_ACCESS_REMOTE_ATOMIC, -1);
    core_enter(core);
    struct slab **grown = code ? NULL : realloc(core->slab, (core->slabs + 1) * sizeof *grown);
    if (grown) {
        core->slab = grown;
        uint32_t at = slab_after(core, (uintptr_t)slab->region.bytes);
        memmove(&grown[at + 1], &grown[at], (core->slabs++ - at) * sizeof *grown);
        grown[at] = slab;
        slab->number = ++core->slab_numbers;
        const struct region *r = &slab->region;
        *out = (struct lite_slab){(uintptr_t)r->bytes, r->size, slab->number, r->mr->rkey, 0};
    }
    core_leave(core);
    if (grown)
        return 0;
    region_close(&slab->region);
    free(slab);
    return code ? code : LITE_NO_MEMORY;
}

API int lite_slab_close(struct core *core, uint64_t number)
{
    core_enter(core);
    struct slab *slab = NULL;
    uint32_t i = 0;
    while (i < core->slabs && core->slab[i]->number != number)
        i++;
    int code = i == core->slabs || core->slab[i]->users ? LITE_BAD_ARGUMENT : 0;
    if (!code) {
        slab = core->slab[i];
        memmove(&core->slab[i], &core->slab[i + 1], (--core->slabs - i) * sizeof *core->slab);
    }
    core_leave(core);
    if (slab) {
        region_close(&slab->region);
        free(slab);
    }
    return code;
}

struct pool_region {
    struct link link;
    struct region region;
    struct store store[];
};

void pool_init(struct pool *pool, size_t bytes_each, size_t per_region, size_t limit)
{
    *pool = (struct pool){.bytes_each = (bytes_each + 63) & ~(size_t)63, .per_region = per_region, .limit = limit};
    list_init(&pool->free);
    list_init(&pool->regions);
}

void pool_grow(struct core *core, struct pool *pool)
{
    size_t bytes = pool->bytes_each * pool->per_region;
    if (pool->allocated + bytes > pool->limit)
        return;
    struct pool_region *region = calloc(1, sizeof *region + pool->per_region * sizeof *region->store);
    if (!region)
        return;
    if (region_open(core, &region->region, bytes, IBV_ACCESS_LOCAL_WRITE, -1)) {
        free(region);
        return;
    }
    list_init(&region->link);
    list_append(&pool->regions, &region->link);
    pool->allocated += bytes;
    for (size_t i = 0; i < pool->per_region; i++) {
        struct store *store = &region->store[i];
        *store = (struct store){.bytes = region->region.bytes + i * pool->bytes_each, .lkey = region->region.mr->lkey};
        list_init(&store->link);
        list_append(&pool->free, &store->link);
    }
}

struct store *pool_take(struct core *core, struct pool *pool)
{
    if (list_empty(&pool->free))
        pool_grow(core, pool);
    struct store *store = FIRST(&pool->free, struct store, link);
    if (store) {
        list_remove(&store->link);
        pool->used++;
    }
    return store;
}

void pool_give(struct pool *pool, struct store *store)
{
    list_prepend(&pool->free, &store->link); /* the one used last is the warmest */
    pool->used--;
}

void pool_close(struct pool *pool)
{
    for (struct pool_region *region; (region = FIRST(&pool->regions, struct pool_region, link));) {
        list_remove(&region->link);
        region_close(&region->region);
        free(region);
    }
}

/* CALL and REPLY_RECEIVE have two addresses: incoming data go to `offset`. */
uint64_t op_address(const struct op *op, bool incoming)
{
    bool two = op->request.op == LITE_CALL || op->request.op == LITE_REPLY_RECEIVE;
    return incoming && two ? op->request.offset : op->request.address;
}

/* Copy between our memory and the program's. `out`: from the program. */
static bool copy(struct op *op, uint64_t at, void *ours, size_t length, bool out)
{
    if (!length)
        return true;
    uint64_t address = op_address(op, !out) + at;
    uint8_t *theirs = NULL;
    if (out ? op->request.flags & LITE_INLINE_DATA : op->request.flags & LITE_INLINE_REPLY)
        theirs = op->data + at;
    else if (op->buffer)
        theirs = op->buffer->region.bytes + address; /* checked when the request came */
    else if (!op->client)
        theirs = (uint8_t *)(uintptr_t)address; /* the tier's own memory */
    if (theirs) {
        memcpy(out ? ours : theirs, out ? theirs : ours, length);
        return true;
    }
    if (!op->channel)
        return false; /* the program has gone: its number may be another's now */
    struct iovec local = {ours, length}, remote = {(void *)(uintptr_t)address, length};
    ssize_t done = out ? process_vm_readv(op->client->pid, &local, 1, &remote, 1, 0)
                       : process_vm_writev(op->client->pid, &local, 1, &remote, 1, 0);
    return done == (ssize_t)length;
}

bool copy_from(struct op *op, uint64_t at, void *target, size_t length)
{
    return copy(op, at, target, length, true);
}

bool copy_to(struct op *op, uint64_t at, const void *source, size_t length)
{
    return copy(op, at, (void *)(uintptr_t)source, length, false);
}
