/* LMRs, and the handles through which programs use them. */
#include "core.h"

#include <stdlib.h>
#include <time.h>

enum { FIRST_HANDLES = 64, MOST_HANDLES = 1 << 24 };

static bool put_blocks(struct core *core, struct lmr *lmr, const struct lite_block *block, uint32_t count)
{
    lmr->block = calloc(count, sizeof *lmr->block);
    if (!lmr->block)
        return false;
    lmr->blocks = count;
    lmr->size = 0;
    for (uint32_t i = 0; i < count; i++) {
        const struct peer *peer = block[i].node < NODES ? core->by_node[block[i].node] : NULL;
        struct slab *slab = block[i].node == core->node ? slab_find(core, block[i].address, block[i].length) : NULL;
        lmr->block[i] = (struct block){lmr->size, block[i].address, block[i].length, block[i].node,
                                       block[i].rkey, peer ? peer->incarnation : 0, slab};
        lmr->size += block[i].length;
        if (slab)
            slab->users++;
    }
    return true;
}

static void drop_blocks(struct lmr *lmr)
{
    for (uint32_t i = 0; i < lmr->blocks; i++)
        if (lmr->block[i].slab)
            lmr->block[i].slab->users--;
    free(lmr->block);
    lmr->block = NULL;
    lmr->blocks = 0;
}

static int check_blocks(const struct lite_block *block, uint32_t count, uint64_t *size)
{
    *size = 0;
    for (uint32_t i = 0; i < count; i++)
        if (!block[i].length || block[i].node >= NODES || block[i].address + block[i].length < block[i].address ||
            __builtin_add_overflow(*size, block[i].length, size))
            return LITE_BAD_ARGUMENT;
    return count ? 0 : LITE_BAD_ARGUMENT;
}

API int lite_lmr_put(struct core *core, uint64_t id, const struct lite_block *block, uint32_t count)
{
    uint64_t size;
    int code = id ? check_blocks(block, count, &size) : LITE_BAD_ARGUMENT;
    core_enter(core);
    if (!code && !table_find(&core->lmrs, id)) {
        struct lmr *lmr = calloc(1, sizeof *lmr);
        if (lmr) {
            lmr->id = id;
            list_init(&lmr->parked);
        }
        if (!lmr || !put_blocks(core, lmr, block, count) || !table_put(&core->lmrs, id, lmr)) {
            if (lmr)
                drop_blocks(lmr);
            free(lmr);
            code = LITE_NO_MEMORY;
        }
    }
    core_leave(core);
    return code;
}

/* Forget it if nobody can name it any more. */
static void forget(struct core *core, struct lmr *lmr)
{
    if (lmr->state != LMR_KILLED || lmr->handles || lmr->in_flight || lmr->waiters)
        return;
    table_remove(&core->lmrs, lmr->id);
    drop_blocks(lmr);
    free(lmr);
}

static void unpark(struct core *core, struct lmr *lmr)
{
    struct link parked;
    list_init(&parked);
    list_splice(&parked, &lmr->parked);
    for (struct op *op; (op = FIRST(&parked, struct op, wait));) {
        list_remove(&op->wait);
        op_memory(core, op); /* looks at its handle anew */
    }
    core_wake(core);
}

API int lite_lmr_freeze(struct core *core, uint64_t id, uint32_t timeout_ms)
{
    core_enter(core);
    uint64_t until = core->now + (uint64_t)timeout_ms * 1000000;
    struct lmr *lmr = table_find(&core->lmrs, id);
    int code = !lmr ? LITE_BAD_HANDLE : lmr->state == LMR_KILLED ? lmr->code : 0;
    if (!code) {
        lmr->state = LMR_FROZEN;
        lmr->waiters++;
        while (lmr->in_flight && lmr->state == LMR_FROZEN && core->now < until)
            core_wait(core);
        lmr->waiters--;
        if (lmr->state == LMR_KILLED) {
            code = lmr->code;
            forget(core, lmr);
        } else if (lmr->in_flight) {
            code = LITE_TIMED_OUT;
            lmr->state = LMR_ACTIVE;
            unpark(core, lmr);
        }
    }
    core_leave(core);
    return code;
}

API int lite_lmr_replace(struct core *core, uint64_t id, const struct lite_block *block, uint32_t count)
{
    uint64_t size;
    int code = check_blocks(block, count, &size);
    core_enter(core);
    struct lmr *lmr = table_find(&core->lmrs, id);
    if (!code && (!lmr || lmr->state != LMR_FROZEN || lmr->in_flight || size != lmr->size))
        code = LITE_BAD_ARGUMENT;
    if (!code) {
        struct lmr before = *lmr;
        if (put_blocks(core, lmr, block, count)) {
            drop_blocks(&before);
        } else {
            lmr->block = before.block;
            code = LITE_NO_MEMORY;
        }
    }
    core_leave(core);
    return code;
}

API int lite_lmr_thaw(struct core *core, uint64_t id)
{
    core_enter(core);
    struct lmr *lmr = table_find(&core->lmrs, id);
    if (lmr && lmr->state == LMR_FROZEN) {
        lmr->state = LMR_ACTIVE;
        unpark(core, lmr);
    }
    core_leave(core);
    return lmr ? 0 : LITE_BAD_HANDLE;
}

API int lite_lmr_kill(struct core *core, uint64_t id, int code)
{
    if (code >= 0)
        return LITE_BAD_ARGUMENT;
    core_enter(core);
    struct lmr *lmr = table_find(&core->lmrs, id);
    if (lmr && lmr->state != LMR_KILLED) {
        lmr->state = LMR_KILLED;
        lmr->code = code;
        lmr->waiters++;
        unpark(core, lmr);
        while (lmr->in_flight)
            core_wait(core);
        lmr->waiters--;
        drop_blocks(lmr); /* the slabs may go now, though handles remain */
        pthread_cond_broadcast(&core->changed);
        forget(core, lmr);
    }
    core_leave(core);
    return 0;
}

const struct block *lmr_block(const struct lmr *lmr, uint64_t offset)
{
    uint32_t low = 0, high = lmr->blocks;
    while (high - low > 1) {
        uint32_t middle = (low + high) / 2;
        if (lmr->block[middle].start <= offset)
            low = middle;
        else
            high = middle;
    }
    return &lmr->block[low];
}

/* A handle: its place in the client's array plus one, and above that how often the place was used. */
static struct handle *handle_of(const struct client *client, uint64_t lh)
{
    uint32_t index = (uint32_t)lh - 1;
    if (index >= client->handles)
        return NULL;
    struct handle *handle = &client->handle[index];
    return handle->lmr && handle->generation == lh >> 32 ? handle : NULL;
}

static bool in_range(const struct lmr *lmr, uint64_t offset, uint64_t length)
{
    return offset <= lmr->size && length <= lmr->size - offset;
}

static int check_range(const struct lmr *lmr, const struct op *op)
{
    const struct lite_request *r = &op->request;
    if (r->op == LITE_FETCH_ADD || r->op == LITE_CAS) {
        if (!in_range(lmr, r->offset, 8))
            return LITE_OUT_OF_RANGE;
        const struct block *block = lmr_block(lmr, r->offset);
        uint64_t within = r->offset - block->start;
        return (block->address + within) % 8 || block->length - within < 8 ? LITE_BAD_ARGUMENT : 0;
    }
    if (!op->segment)
        return in_range(lmr, r->offset, r->length) ? 0 : LITE_OUT_OF_RANGE;
    for (uint64_t i = 0; i < r->arg0; i++)
        if (!in_range(lmr, op->segment[i].offset, op->segment[i].length))
            return LITE_OUT_OF_RANGE;
    return 0;
}

int lmr_begin(struct core *core, struct op *op)
{
    static const uint8_t needed[LITE_OPS] = {
        [LITE_READ] = LITE_MAY_READ,        [LITE_READV] = LITE_MAY_READ, [LITE_WRITE] = LITE_MAY_WRITE,
        [LITE_WRITEV] = LITE_MAY_WRITE,     [LITE_CAS] = LITE_MAY_ATOMIC, [LITE_FETCH_ADD] = LITE_MAY_ATOMIC,
    };
    struct handle *handle = handle_of(op->client, op->request.handle);
    if (!handle)
        return LITE_BAD_HANDLE;
    struct lmr *lmr = handle->lmr;
    if (lmr->state == LMR_KILLED)
        return lmr->code;
    if (!handle->permissions)
        return LITE_REVOKED;
    if (!(handle->permissions & needed[op->request.op]))
        return LITE_PERMISSION;
    int code = check_range(lmr, op);
    if (code)
        return code;
    if (lmr->state == LMR_FROZEN) {
        core->stats.parked++;
        list_append(&lmr->parked, &op->wait);
        return 1;
    }
    lmr->in_flight++;
    op->lmr = lmr;
    op->total = needed[op->request.op] == LITE_MAY_ATOMIC ? 8 : op->request.length;
    return 0;
}

void lmr_end(struct core *core, struct op *op)
{
    struct lmr *lmr = op->lmr;
    op->lmr = NULL;
    if (--lmr->in_flight)
        return;
    if (lmr->waiters)
        pthread_cond_broadcast(&core->changed);
    forget(core, lmr);
}

static struct handle *free_handle(struct client *client)
{
    for (; client->free_handle < client->handles; client->free_handle++)
        if (!client->handle[client->free_handle].lmr)
            return &client->handle[client->free_handle];
    uint32_t size = client->handles ? 2 * client->handles : FIRST_HANDLES;
    struct handle *grown = size > MOST_HANDLES ? NULL : realloc(client->handle, size * sizeof *grown);
    if (!grown)
        return NULL;
    for (uint32_t i = client->handles; i < size; i++)
        grown[i] = (struct handle){0};
    client->handle = grown;
    client->handles = size;
    return &grown[client->free_handle];
}

API int lite_handle_add(struct core *core, uint64_t client_id, uint64_t id, uint32_t permissions, uint64_t *out)
{
    core_enter(core);
    struct client *client = client_of(core, client_id);
    struct lmr *lmr = table_find(&core->lmrs, id);
    int code = !client || !lmr ? LITE_BAD_HANDLE : lmr->state == LMR_KILLED ? lmr->code : 0;
    struct handle *handle = code ? NULL : free_handle(client);
    if (handle) {
        *handle = (struct handle){lmr, permissions, handle->generation + 1};
        lmr->handles++;
        core->stats.handles++;
        *out = (uint64_t)handle->generation << 32 | (uint64_t)(handle - client->handle + 1);
    }
    core_leave(core);
    return handle || code ? code : LITE_NO_MEMORY;
}

API int lite_handle_set(struct core *core, uint64_t client_id, uint64_t lh, uint32_t permissions)
{
    core_enter(core);
    struct client *client = client_of(core, client_id);
    struct handle *handle = client ? handle_of(client, lh) : NULL;
    if (handle)
        handle->permissions = permissions;
    core_leave(core);
    return handle ? 0 : LITE_BAD_HANDLE;
}

static void drop(struct core *core, struct client *client, struct handle *handle)
{
    struct lmr *lmr = handle->lmr;
    handle->lmr = NULL;
    lmr->handles--;
    core->stats.handles--;
    if ((uint32_t)(handle - client->handle) < client->free_handle)
        client->free_handle = (uint32_t)(handle - client->handle);
    forget(core, lmr);
}

API int lite_handle_drop(struct core *core, uint64_t client_id, uint64_t lh)
{
    core_enter(core);
    struct client *client = client_of(core, client_id);
    struct handle *handle = client ? handle_of(client, lh) : NULL;
    if (handle)
        drop(core, client, handle);
    core_leave(core);
    return handle ? 0 : LITE_BAD_HANDLE;
}

void handles_close(struct core *core, struct client *client)
{
    for (uint32_t i = 0; i < client->handles; i++)
        if (client->handle[i].lmr)
            drop(core, client, &client->handle[i]);
    free(client->handle);
    client->handle = NULL;
    client->handles = 0;
}

void lmrs_close(struct core *core)
{
    for (size_t i = 0; i < core->lmrs.size; i++) {
        struct lmr *lmr = core->lmrs.entry[i].value;
        if (!lmr)
            continue;
        drop_blocks(lmr);
        free(lmr);
    }
}
