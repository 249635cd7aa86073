/* Who goes first.
 *
 * hw_sep: low priority has queue pair 0 for itself, the others share the rest. sw_pri: low priority makes way. While a
 * high-priority piece is on the fabric no low one starts; for a moment after (a program that waits for each answer is
 * about to ask again) they go one at a time and small, so that at most one is ahead of the next high one. So that low
 * priority is slowed and not stopped, one may go every now and then in any case.
 */
#include "core.h"

#include <stdlib.h>

enum { SMALL_CHUNK = 8 << 10, RESERVED = 8 /* work requests per queue pair kept for heads of rings */ };
enum { QOS_NONE, QOS_HW_SEP, QOS_SW_PRI };
static const uint64_t RECENT_NS = 10000000; /* that long after a high-priority piece another is expected */
static const uint64_t STARVING_NS = 20000000;

struct qos {
    uint32_t mode, high, low; /* pieces in flight */
    uint64_t high_last, low_last;
};

int qos_open(struct core *core)
{
    core->qos = calloc(1, sizeof *core->qos);
    if (!core->qos)
        return LITE_NO_MEMORY;
    core->qos->mode = core->config.qos;
    return 0;
}

void qos_close(struct core *core)
{
    free(core->qos);
}

static bool expecting_high(const struct core *core)
{
    const struct qos *qos = core->qos;
    return qos->high || (qos->high_last && core->now - qos->high_last < RECENT_NS);
}

bool qos_may_post(struct core *core, const struct op *op)
{
    struct qos *qos = core->qos;
    if (qos->mode != QOS_SW_PRI || op->request.priority != LITE_LOW || !expecting_high(core))
        return true;
    if (!qos->low && (!qos->high || core->now - qos->low_last > STARVING_NS))
        return true;
    core_alarm(core, qos->low_last + STARVING_NS > core->now ? qos->low_last + STARVING_NS : core->now + RECENT_NS);
    return false;
}

uint32_t qos_chunk(struct core *core, const struct op *op)
{
    bool small = core->qos->mode == QOS_SW_PRI && op->request.priority == LITE_LOW && expecting_high(core);
    return small ? SMALL_CHUNK : CHUNK;
}

int qos_pair(struct core *core, struct peer *peer, const struct op *op)
{
    uint32_t first = 0, count = peer->pairs;
    if (op->pair >= 0 && op->head_bytes) {
        first = (uint32_t)op->pair;
        count = 1;
    } else if (core->qos->mode == QOS_HW_SEP && count > 1) {
        bool low = op->request.priority == LITE_LOW;
        first = low ? 0 : 1;
        count = low ? 1 : count - 1;
    }
    uint32_t most = QP_DEPTH - (op->client ? RESERVED : 0);
    for (uint32_t i = 0; i < count; i++) {
        uint32_t pair = first + (core->turn + i) % count;
        if (peer->pair[pair].in_flight < most)
            return (int)pair;
    }
    return -1;
}

void qos_posted(struct core *core, const struct piece *piece)
{
    struct qos *qos = core->qos;
    if (!piece->op)
        return;
    if (piece->priority == LITE_HIGH) {
        qos->high++;
        qos->high_last = core->now;
    } else if (piece->priority == LITE_LOW) {
        qos->low++;
        qos->low_last = core->now;
    }
}

void qos_done(struct core *core, const struct piece *piece)
{
    struct qos *qos = core->qos;
    if (!piece->op)
        return;
    if (piece->priority == LITE_HIGH) {
        qos->high--;
        qos->high_last = core->now;
        if (!qos->high)
            core->again = true; /* low ones may go */
    } else if (piece->priority == LITE_LOW) {
        qos->low--;
        core->again = true;
    }
}

API int lite_qos_set(struct core *core, uint32_t mode)
{
    if (mode > QOS_SW_PRI)
        return LITE_BAD_ARGUMENT;
    core_enter(core);
    core->qos->mode = mode;
    core->again = true;
    core_wake(core);
    core_leave(core);
    return 0;
}
