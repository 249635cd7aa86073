/* Slots: registered memory where replies arrive. Small ones come by the dozen, large ones one by one. */
#include "rpc.h"

#include <stdlib.h>

enum { SMALL_AT_ONCE = 32 };
static const uint64_t CAPACITY[SLOT_CLASSES] = {LITE_INLINE, 64 << 10, 256 << 10, 1 << 20, LITE_MAX_MESSAGE};
static const int ACCESS = IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE;

struct slot_region {
    struct link link;
    struct region region;
};

uint64_t slot_capacity(const struct slot *slot)
{
    return CAPACITY[slot->class];
}

static size_t bytes_of(uint32_t class)
{
    return SLOT_HEAD + CAPACITY[class];
}

static struct slot *bare_slot(struct rpc *rpc)
{
    struct slot *slot = FIRST(&rpc->bare, struct slot, link);
    if (slot)
        return slot;
    size_t bytes = (rpc->slots + 1) * sizeof(struct slot *);
    struct slot **grown = rpc->slots == MOST_SLOTS ? NULL : realloc(rpc->slot, bytes);
    if (!grown)
        return NULL;
    rpc->slot = grown;
    if (!(slot = calloc(1, sizeof *slot)))
        return NULL;
    list_init(&slot->link);
    slot->index = rpc->slots;
    grown[rpc->slots++] = slot;
    list_append(&rpc->bare, &slot->link);
    return slot;
}

/* Room under the limit, if need be by giving up large slots that nobody uses. */
static bool room(struct core *core, size_t bytes)
{
    struct rpc *rpc = core->rpc;
    for (uint32_t class = SLOT_CLASSES - 1; class && core->stats.bytes_slots + bytes > core->config.slots; class--) {
        struct slot *slot;
        while (core->stats.bytes_slots + bytes > core->config.slots &&
               (slot = FIRST(&rpc->idle[class], struct slot, link))) {
            core->stats.bytes_slots -= slot->region.size;
            region_close(&slot->region);
            slot->bytes = NULL;
            list_append(&rpc->bare, &slot->link);
        }
    }
    return core->stats.bytes_slots + bytes <= core->config.slots;
}

static void add_small(struct core *core)
{
    struct rpc *rpc = core->rpc;
    struct slot_region *shared = calloc(1, sizeof *shared);
    if (!shared || region_open(core, &shared->region, SMALL_AT_ONCE * bytes_of(0), ACCESS, -1)) {
        free(shared);
        return;
    }
    list_init(&shared->link);
    list_append(&rpc->regions, &shared->link);
    core->stats.bytes_slots += shared->region.size;
    for (uint32_t i = 0; i < SMALL_AT_ONCE; i++) {
        struct slot *slot = bare_slot(rpc);
        if (!slot)
            return;
        slot->class = 0;
        slot->bytes = shared->region.bytes + i * bytes_of(0);
        slot->rkey = shared->region.mr->rkey;
        list_append(&rpc->idle[0], &slot->link);
    }
}

static void add_large(struct core *core, uint32_t class)
{
    struct slot *slot = bare_slot(core->rpc);
    if (!slot || region_open(core, &slot->region, bytes_of(class), ACCESS, -1))
        return;
    slot->class = class;
    slot->bytes = slot->region.bytes;
    slot->rkey = slot->region.mr->rkey;
    core->stats.bytes_slots += slot->region.size;
    list_append(&core->rpc->idle[class], &slot->link);
}

struct slot *slot_take(struct core *core, uint64_t capacity)
{
    struct rpc *rpc = core->rpc;
    uint32_t class = 0;
    while (CAPACITY[class] < capacity)
        class++;
    if (list_empty(&rpc->idle[class]) && room(core, (class ? 1 : SMALL_AT_ONCE) * bytes_of(class))) {
        if (class)
            add_large(core, class);
        else
            add_small(core);
    }
    struct slot *slot = FIRST(&rpc->idle[class], struct slot, link);
    if (!slot)
        return NULL;
    list_remove(&slot->link);
    slot->state = SLOT_ACTIVE;
    slot->ticket = ++rpc->tickets;
    slot->replied = false;
    core->stats.slots_used++;
    return slot;
}

void slot_idle(struct core *core, struct slot *slot)
{
    if (slot->state == SLOT_ACTIVE)
        core->stats.slots_used--;
    else
        core->stats.slots_quarantined--;
    slot->state = SLOT_IDLE;
    slot->op = NULL;
    slot->peer = NULL;
    list_prepend(&core->rpc->idle[slot->class], &slot->link);
}

void rpc_slot_release(struct core *core, struct op *op)
{
    struct slot *slot = op->slot;
    if (!slot)
        return;
    op->slot = NULL;
    slot->op = NULL;
    bool awaited = op->head_bytes && !op->voided && !slot->replied && slot->session == op->peer->session;
    if (!awaited) {
        slot_idle(core, slot);
        return;
    }
    slot->state = SLOT_QUARANTINED; /* until its reply has come, or cannot come any more */
    core->stats.slots_used--;
    core->stats.slots_quarantined++;
}

void slots_close(struct core *core)
{
    struct rpc *rpc = core->rpc;
    for (uint32_t i = 0; i < rpc->slots; i++) {
        region_close(&rpc->slot[i]->region);
        free(rpc->slot[i]);
    }
    free(rpc->slot);
    for (struct slot_region *shared; (shared = FIRST(&rpc->regions, struct slot_region, link));) {
        list_remove(&shared->link);
        region_close(&shared->region);
        free(shared);
    }
}
