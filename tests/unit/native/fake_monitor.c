/* A stand-in for the process monitor and its memory blades, inside the program, over the stand-in verbs.
 *
 *   FAKE_BLADES    how many memory blades there are (3)
 *   FAKE_REGIONS   how many vRegions each has room for (1000)
 *   FAKE_ASKED     when so many vRegions have been asked for, blade 0 dies in silence
 *   FAKE_EVENTS    what happens after how many requests: "1x500 1+900 0s2000 2l2500": blade 1 dies, is there again
 *                  (empty), blade 0 dies in silence, which membership notices a little later; and blade 2 is
 *                  declared dead while it still answers; "0d500 0k600": it is drained, and is not any more
 *   FAKE_HEIRS     a socket where a test listens to what the process monitor would be told of forked children
 *   FAKE_MEMORY    the blades' memory is in files FAKE_MEMORY.0, ..., which outlive the program; blade 0's is at
 *                  address 1 << 44, and each of the others 1 << 36 higher
 *
 * What a dead blade held is overwritten. Link it instead of monitor.c.
 */
#define _GNU_SOURCE
#include "arena.h"
#include "monitor.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

void fake_hook(void (*hook)(uint64_t carried));
void fake_break(uint32_t qpn, int silent);

enum { BLADES = 8, REGIONS = 1000, REGION_BYTES = 4 << 20, EVENTS = 32, NOTICE = 40 /* requests until a silent death is noticed */ };

static struct blade {
    uint32_t qpn;
    bool dead;
    size_t held, given;     /* regions; no piece of memory is given twice, late requests must find no other use of it */
    char *memory;
    struct ibv_mr *mr;
} blades[BLADES];

static struct event {
    uint64_t at;
    unsigned blade;
    char kind;
} events[EVENTS];

static size_t n_events, room = REGIONS, turn, asked;
static int news;            /* so many are in `told`; a single descriptor, as the real one has */
static char told[EVENTS][2];
static size_t n_told, n_heard;

static void announce(char kind, unsigned blade)
{
    char *text = told[n_told++ % EVENTS];
    text[0] = kind, text[1] = (char)('0' + blade);
    if (eventfd_write(news, 1))
        abort();
}

static void later(char kind, unsigned blade, uint64_t at)
{
    if (n_events == EVENTS)
        abort();
    events[n_events++] = (struct event){at, blade, kind};
}

static void die(struct blade *blade, bool silent)
{
    blade->dead = true;
    fake_break(blade->qpn, silent);
    memset(blade->memory, 0xdb, blade->given * REGION_BYTES);
}

static void happen(uint64_t carried)
{
    for (size_t i = 0; i < n_events; i++) {
        struct event *event = &events[i];
        if (carried < event->at)
            continue;
        struct event now = *event;
        *event = events[--n_events];
        i = (size_t)-1;
        struct blade *blade = &blades[now.blade];
        if (now.kind == 'x' || now.kind == 's') {
            die(blade, now.kind == 's');
            if (now.kind == 's')
                later('l', now.blade, carried + NOTICE);
        } else {
            if (now.kind == '+')
                blade->dead = false;
            announce(now.kind == '+' ? 'b' : now.kind, now.blade);
        }
    }
}

/* The environment, as it is when the pager starts: later it may be among the pages that the pager must not touch. */
static struct {
    char name[24], value[256];
} settings[] = {{.name = "FAKE_BLADES"}, {.name = "FAKE_REGIONS"}, {.name = "FAKE_ASKED"}, {.name = "FAKE_EVENTS"},
                {.name = "FAKE_HEIRS"}, {.name = "FAKE_MEMORY"}, {.name = "FAKE_FORGETFUL"}};
enum { SETTINGS = sizeof settings / sizeof *settings };

static void read_settings(void)
{
    static bool done;
    for (size_t i = 0; !done && i < SETTINGS; i++) {
        const char *value = getenv(settings[i].name);
        snprintf(settings[i].value, sizeof settings[i].value, "%s", value ? value : "");
    }
    done = true;
}

static const char *text_of(const char *name)
{
    for (size_t i = 0; i < SETTINGS; i++)
        if (!strcmp(settings[i].name, name) && *settings[i].value)
            return settings[i].value;
    return NULL;
}

static unsigned long setting(const char *name, unsigned long otherwise)
{
    const char *value = text_of(name);
    return value ? strtoul(value, NULL, 10) : otherwise;
}

int monitor_attach(struct monitor *m, const char *job)
{
    (void)job;
    read_settings();
    m->blades = (uint32_t)setting("FAKE_BLADES", 3);
    room = setting("FAKE_REGIONS", REGIONS);
    pthread_mutex_init(&m->lock, NULL);
    m->news = news = eventfd(0, EFD_SEMAPHORE | EFD_NONBLOCK | EFD_CLOEXEC);
    if (news < 0)
        return errno;
    m->socket = -1;
    for (uint32_t i = 0; i < m->blades; i++)
        snprintf(m->name[i], sizeof m->name[i], "mb%u", i);
    const char *heirs = text_of("FAKE_HEIRS"), *text = text_of("FAKE_EVENTS");
    struct sockaddr_un name = {.sun_family = AF_UNIX};
    if (heirs) {
        strncpy(name.sun_path, heirs, sizeof name.sun_path - 1);
        m->socket = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
        if (connect(m->socket, (struct sockaddr *)&name, sizeof name))
            return errno;
    }
    unsigned blade;
    char kind;
    unsigned long at;
    int used;
    for (; text && sscanf(text, "%u%c%lu%n", &blade, &kind, &at, &used) == 3; text += used)
        later(kind, blade, at);
    fake_hook(happen);
    return 0;
}

void monitor_leave(struct monitor *m)
{
    (void)m;
}

static size_t held(void)
{
    size_t held = 0;
    for (uint32_t i = 0; i < BLADES; i++)
        held += blades[i].held;
    return held;
}

/* The blades' memory is this process's, and goes with it. */
int monitor_keep(struct monitor *m, const char *name, size_t places)
{
    (void)name;
    bool forgetful = text_of("FAKE_FORGETFUL");
    if (!forgetful && held() == places)
        return 0;
    snprintf(m->error, sizeof m->error, forgetful ? "mb0 is not there" : "there are %zu places, and it knows %zu",
             held(), places);
    return EHOSTUNREACH;
}

int monitor_claim(struct monitor *m, const char *name, size_t places)
{
    (void)m, (void)name;
    return held() == places ? 0 : ENOENT;
}

static char *memory_of(uint32_t number)
{
    const char *prefix = text_of("FAKE_MEMORY");
    char path[256];
    if (!prefix)
        return raw_memory((size_t)REGIONS * REGION_BYTES);
    snprintf(path, sizeof path, "%s.%u", prefix, number);
    int file = open(path, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    void *at = (void *)((1ull << 44) + ((uint64_t)number << 36));
    if (file < 0 || ftruncate(file, (off_t)REGIONS * REGION_BYTES) ||
        mmap(at, (size_t)REGIONS * REGION_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED_NOREPLACE, file, 0) != at)
        abort();
    close(file);
    return at;
}

int monitor_connect(struct monitor *m, uint32_t number, struct fabric *f, struct fabric_link *link)
{
    struct blade *blade = &blades[number];
    if (!blade->memory) {
        blade->memory = memory_of(number);
        blade->mr = ibv_reg_mr(f->pd, blade->memory, (size_t)REGIONS * REGION_BYTES, IBV_ACCESS_LOCAL_WRITE |
                               IBV_ACCESS_REMOTE_READ | IBV_ACCESS_REMOTE_WRITE);
    }
    if (blade->dead) {
        snprintf(m->error, sizeof m->error, "mb%u is not there", number);
        return EHOSTUNREACH;
    }
    struct fabric_link other;
    if (fabric_link_create(f, &other) || fabric_link_connect(f, &other, link->qp->qp_num, link->psn, &f->gid))
        abort();
    blade->qpn = other.qp->qp_num;
    return -fabric_link_connect(f, link, other.qp->qp_num, other.psn, &f->gid);
}

int monitor_release(struct monitor *m, uint32_t number)
{
    (void)m;
    blades[number].held = 0;
    memset(blades[number].memory, 0xdb, blades[number].given * REGION_BYTES); /* what was drained is not read again */
    return 0;
}

int monitor_region(struct monitor *m, uint64_t bytes, uint32_t copies, uint32_t without, struct place place[COPIES])
{
    uint32_t found = 0, chosen[COPIES];
    if (++asked == setting("FAKE_ASKED", 0))
        die(&blades[0], true);
    for (uint32_t i = 0; i < m->blades && found < copies; i++) {
        uint32_t number = (uint32_t)(turn + i) % m->blades;
        if (!(without >> number & 1) && !blades[number].dead && blades[number].held < room)
            chosen[found++] = number;
    }
    turn++;
    for (uint32_t number = 0; number < m->blades && found < copies; number++)
        if (!(without >> number & 1) && blades[number].dead)
            announce('l', number); /* the process monitor has waited for it until membership said so */
    if (found < copies || !copies) {
        snprintf(m->error, sizeof m->error, "the memory blades are full");
        return ENOMEM;
    }
    for (uint32_t i = 0; i < copies; i++) {
        struct blade *blade = &blades[chosen[i]];
        char *memory = blade->memory + blade->given++ * REGION_BYTES;
        if (bytes != REGION_BYTES || blade->given > REGIONS)
            abort();
        memset(memory, 0xab, bytes); /* what others left there */
        blade->held++;
        place[i] = (struct place){chosen[i], blade->mr->rkey, (uintptr_t)memory};
    }
    return 0;
}

static char *returned[REGIONS];
static size_t n_returned;

/* What has gone back is another program's: nothing may be written there any more. */
__attribute__((destructor)) static void look_at_returned(void)
{
    for (size_t i = 0; i < n_returned; i++)
        for (size_t at = 0; at < REGION_BYTES; at++)
            if (returned[i][at] != (char)0xdb) {
                printf("CHECK: written to memory that was returned\n");
                fflush(stdout);
                _exit(1);
            }
}

void monitor_return(struct monitor *m, const struct region *region)
{
    (void)m;
    for (int i = 0; i < COPIES; i++)
        if (region->at[i].link != NO_LINK) {
            struct blade *blade = &blades[region->at[i].link];
            if (!blade->held--)
                abort();
            memset((void *)region->at[i].address, 0xdb, REGION_BYTES);
            if (n_returned < REGIONS)
                returned[n_returned++] = (char *)region->at[i].address;
        }
}

char monitor_news(struct monitor *m, uint32_t *blade)
{
    eventfd_t one;
    if (eventfd_read(m->news, &one))
        return 0;
    const char *text = told[n_heard++ % EVENTS];
    *blade = (uint32_t)(text[1] - '0');
    return text[0];
}
