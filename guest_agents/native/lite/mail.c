/* Mailboxes: memory that a thread of a program shares with the core, so that a request costs no packets (SOSP'17,
 * section 5.2, where a page shared with the kernel spares the way back).
 *
 * The program owns a mailbox while `turn` is MAIL_PROGRAM, the core while it is MAIL_CORE. What the program wrote is
 * copied before it is looked at: it may change at any time. The file cannot shrink under us: it is sealed.
 */
#define _GNU_SOURCE
#include "core.h"

#include <fcntl.h>
#include <limits.h>
#include <linux/futex.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

int mail_open(struct core *core, struct channel *channel)
{
    int file = memfd_create("lite-mailbox", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (file < 0)
        return -1;
    void *box = MAP_FAILED;
    if (!ftruncate(file, sizeof *channel->mailbox) &&
        !fcntl(file, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL))
        box = mmap(NULL, sizeof *channel->mailbox, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (box == MAP_FAILED) {
        close(file);
        return -1;
    }
    madvise(box, sizeof *channel->mailbox, MADV_DONTFORK);
    channel->mailbox = box;
    channel->mailbox->asleep = core->asleep;
    list_append(&core->mailboxes, &channel->mail);
    return file;
}

static void hand_over(struct lite_mailbox *box)
{
    __atomic_store_n(&box->turn, MAIL_PROGRAM, __ATOMIC_RELEASE);
    syscall(SYS_futex, &box->turn, FUTEX_WAKE, INT_MAX, NULL, NULL, 0);
}

void mail_close(struct channel *channel)
{
    if (!channel->mailbox)
        return;
    channel->mailbox->reply = (struct lite_reply){.status = LITE_NOT_JOINED};
    hand_over(channel->mailbox);
    munmap(channel->mailbox, sizeof *channel->mailbox);
    channel->mailbox = NULL;
    list_remove(&channel->mail);
}

/* Take the request of a mailbox, if there is one, and start it. */
static bool collect(struct core *core, struct channel *channel)
{
    const struct lite_mailbox *box = channel->mailbox;
    if (channel->asked || channel->gone || __atomic_load_n(&box->turn, __ATOMIC_ACQUIRE) != MAIL_CORE)
        return false;
    if (!core->spare && !(core->spare = pool_take(core, &core->packets)))
        return false; /* as soon as something has ended */
    struct op *op = op_new(core, channel->client, channel);
    if (!op)
        return false;
    uint32_t payload = __atomic_load_n(&box->payload, __ATOMIC_RELAXED);
    op->packet = core->spare;
    core->spare = NULL;
    memcpy(op->packet->bytes, &box->request, sizeof box->request + (payload < LITE_INLINE ? payload : LITE_INLINE));
    memcpy(&op->request, op->packet->bytes, sizeof op->request);
    op->mailed = channel->asked = true;
    core->stats.mails++;
    op_start(core, op, payload);
    return true;
}

bool mail_collect(struct core *core)
{
    bool any = false;
    for (struct link *link = core->mailboxes.next, *next; link != &core->mailboxes; link = next) {
        next = link->next;
        any |= collect(core, OF(link, struct channel, mail));
    }
    return any;
}

void mail_answer(struct op *op)
{
    struct lite_mailbox *box = op->channel->mailbox;
    box->reply = op->reply;
    if (op->inline_reply)
        memcpy(box->in, op->inline_reply, op->reply.length);
    op->channel->asked = false;
    hand_over(box);
}

void mail_asleep(struct core *core, bool asleep)
{
    core->asleep = asleep;
    for (struct link *link = core->mailboxes.next; link != &core->mailboxes; link = link->next)
        __atomic_store_n(&OF(link, struct channel, mail)->mailbox->asleep, asleep, __ATOMIC_SEQ_CST);
}
