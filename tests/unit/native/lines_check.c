/* Looks into the pager of a test: after every few faults all of its books must agree with each other and the kernel.
 *
 * Linked into the pager with -Wl,--wrap for the calls below, which are made under the pager's lock. A book that is
 * wrong ends the program with a line that begins with CHECK.
 */
#define _GNU_SOURCE
#include "evict.h"
#include "lines.h"
#include "wire.h"

#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

enum { EVERY = 16 };

#define MUST(true_, format, ...) \
    do { if (!(true_)) lines_die("CHECK %s: " format, #true_, __VA_ARGS__); } while (0)

/* A page is in one place, and that place knows it. */
static void check_page(struct lines *l, size_t page, bool present)
{
    unsigned state = l->state[page] & STATE_MASK;
    MUST(!present || state == MAPPED || l->arena->use[page] == PAGE_FOREIGN, "page %zu is in the page table, and in state %u", page, state);
    MUST(state == UNTOUCHED || state == MAPPED || state == DOZING || l->state[page] & (DIRTY | STORED | WRITTEN),
         "page %zu in state %u exists nowhere else", page, state);
    if (state == MAPPED || state == DOZING) {
        uint32_t index = l->where[page];
        const struct line *line = &l->sets.line[index];
        MUST(line->taken && line->page == page && line->dozing == (state == DOZING), "page %zu, line %u", page, index);
        MUST((index - 1) / l->sets.ways == page % l->sets.count, "page %zu is in the set of others", page);
    } else if (state == BUFFERED) {
        const struct slot *slot = &l->slots[l->where[page]];
        MUST(slot->page == page && slot->state != SLOT_FREE, "page %zu, slot %u", page, l->where[page]);
    } else if (state == PACKED) {
        MUST(pool_get(&l->pool, page) && !l->unpacked, "page %zu", page);
    } else if (state == REMOTE) {
        MUST(l->state[page] & STORED && !(l->state[page] & DIRTY), "page %zu is at no blade", page);
    }
}

static void check_set(const struct lines *l, size_t number, size_t *lined)
{
    const struct sets *s = &l->sets;
    const struct set *set = &s->set[number];
    size_t n = 0, dozing = 0;
    bool awake = false;
    for (uint32_t i = set->oldest, older = 0; i; older = i, i = s->line[i].newer, n++) {
        MUST(n <= s->ways && s->line[i].older == older, "set %zu's list is broken at line %u", number, i);
        MUST(!awake || !s->line[i].dozing, "set %zu: line %u dozes, an older one does not", number, i);
        awake |= !s->line[i].dozing;
        dozing += s->line[i].dozing;
    }
    MUST(n == set->count && dozing == set->dozing, "set %zu has %zu lines, %zu dozing", number, n, dozing);
    MUST(s->count == 1 || n <= s->ways, "set %zu has %zu lines", number, n);
    MUST(s->policy == POLICY_LRU || !dozing, "set %zu", number);
    *lined += n;
}

/* Which of `n` pages are in the page table. A hole is where the program has unmapped what was the kernel's. */
static void look_up(struct lines *l, size_t page, size_t n, unsigned char *present)
{
    if (!mincore(arena_address(l->arena, page), n << PAGE_SHIFT, present))
        return;
    for (size_t i = 0; i < n; i++)
        if (mincore(arena_address(l->arena, page + i), PAGE_SIZE, present + i)) {
            MUST(l->arena->use[page + i] == PAGE_FOREIGN, "page %zu is unmapped", page + i);
            present[i] = 0;
        }
}

static void check(struct lines *l)
{
    static unsigned char present[4096];
    size_t lined = 0, mapped = 0, contents = 0, packed = 0, buffered = 0, dirty = 0, held = 0;
    for (size_t page = 0; page < l->arena->top; page++) {
        if (page % sizeof present == 0)
            look_up(l, page, sizeof present, present);
        check_page(l, page, present[page % sizeof present] & 1);
        unsigned state = l->state[page] & STATE_MASK;
        contents += state != UNTOUCHED;
        mapped += state == MAPPED || state == DOZING;
        packed += state == PACKED;
        buffered += state == BUFFERED;
    }
    for (size_t number = 0; number < l->sets.count; number++)
        check_set(l, number, &lined);
    for (size_t i = 0; i < l->nslots; i++) {
        const struct slot *slot = &l->slots[i];
        dirty += slot->state == SLOT_DIRTY;
        held += slot->state != SLOT_FREE && slot->page != NO_OWNER && l->where[slot->page] == i &&
                (l->state[slot->page] & STATE_MASK) == BUFFERED; /* others are copies: evict_store_all */
        MUST(slot->state != SLOT_FREE || slot->page == NO_OWNER, "slot %zu", i);
    }
    MUST(lined == l->lined && lined == mapped, "%zu lines, %zu booked, %zu pages", lined, l->lined, mapped);
    MUST(lined + pool_pages(&l->pool) <= l->budget, "%zu lines, %zu pages of pool", lined, pool_pages(&l->pool));
    MUST(contents == l->contents && packed == l->pool.pages && dirty == l->dirty_slots, "%zu %zu %zu", contents, packed,
         dirty);
    MUST(buffered == held, "%zu pages in %zu slots", buffered, held);
}

static void look(struct lines *l)
{
    static unsigned calls;
    if (++calls % EVERY == 0)
        check(l);
}

void __real_lines_miss(struct lines *l, size_t page, bool write);
void __wrap_lines_miss(struct lines *l, size_t page, bool write)
{
    __real_lines_miss(l, page, write);
    look(l);
}

void __real_lines_write(struct lines *l, size_t page);
void __wrap_lines_write(struct lines *l, size_t page)
{
    __real_lines_write(l, page);
    look(l);
}

void __real_lines_drop(struct lines *l, size_t page, size_t count);
void __wrap_lines_drop(struct lines *l, size_t page, size_t count)
{
    __real_lines_drop(l, page, count);
    look(l);
}
