/* Random use of the ExCache's sets, compared with a plain model of them: sets_stress STEPS SEED */
#include "sets.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { PAGES = 500, MOST = 64 };

static struct model {
    uint32_t page[MOST];        /* oldest first */
    bool dozing[MOST];
    size_t count;
} models[PAGES];

static uint32_t where[PAGES];
static struct sets sets;

static _Noreturn void wrong(const char *what, size_t page, size_t step)
{
    printf("WRONG %s: page %zu at step %zu\n", what, page, step);
    exit(1);
}

static size_t find(const struct model *m, size_t page)
{
    size_t i = 0;
    while (i < m->count && m->page[i] != page)
        i++;
    return i;
}

static void take_out(struct model *m, size_t i)
{
    memmove(m->page + i, m->page + i + 1, (m->count - i - 1) * sizeof *m->page);
    memmove(m->dozing + i, m->dozing + i + 1, (m->count - i - 1) * sizeof *m->dozing);
    m->count--;
}

static void put_in(struct model *m, size_t page)
{
    m->page[m->count] = (uint32_t)page;
    m->dozing[m->count++] = false;
}

/* As the pager does: what the policy chooses leaves, then the next ones doze. */
static void make_room(struct model *m, size_t set, size_t step)
{
    size_t page = sets_choose(&sets, set), at = find(m, page);
    if (at == m->count || (sets.policy != POLICY_RANDOM && at))
        wrong("another page leaves", page, step);
    if (sets_oldest(&sets, set) != m->page[0])
        wrong("another page is the oldest", page, step);
    sets_remove(&sets, page);
    take_out(m, at);
    for (size_t i, dozing;; m->dozing[i] = true) {
        for (i = 0; i < m->count && m->dozing[i]; i++) {
        }
        for (size_t k = dozing = 0; k < m->count; k++)
            dozing += m->dozing[k];
        bool more = sets.policy == POLICY_LRU && dozing < (m->count + 3) / 4;
        if (more != sets_next_to_doze(&sets, set, &page) || (more && page != m->page[i]))
            wrong("another page dozes", page, step);
        if (!more)
            break;
    }
}

int main(int argc, char **argv)
{
    size_t steps = argc > 2 ? strtoul(argv[1], NULL, 10) : 0, chosen[PAGES] = {0}, left = 0;
    srand((unsigned)strtoul(argv[argc - 1], NULL, 10));
    size_t ways = (size_t)rand() % 16 + 1, count = (size_t)rand() % 40 + 1;
    if (sets_init(&sets, count, ways, (enum policy)(rand() % 3), where))
        return 2;
    for (size_t step = 0; step < steps; step++) {
        size_t page = (size_t)rand() % PAGES, set = sets_of(&sets, page);
        struct model *m = &models[set];
        size_t at = find(m, page);
        if (set != page % count)
            wrong("another set", page, step);
        if (at == m->count) {
            bool full = m->count == ways;
            if (full != !sets_add(&sets, page))
                wrong("a set's limit", page, step);
            if (full) {
                make_room(m, set, step);
                left++;
                if (!sets_add(&sets, page))
                    wrong("no line in spite of room", page, step);
            }
            put_in(m, page);
        } else if (rand() % 3) {
            take_out(m, at);
            sets_remove(&sets, page);
        } else {
            take_out(m, at);
            put_in(m, page);
            sets_renew(&sets, page);
        }
        if (sets.set[set].count != m->count)
            wrong("a set's count", page, step);
    }
    for (size_t i = 0; sets.policy == POLICY_RANDOM && i < 200 * ways; i++)
        if (models[0].count)
            chosen[find(&models[0], sets_choose(&sets, 0))]++;
    for (size_t i = 0; sets.policy == POLICY_RANDOM && i < models[0].count; i++)
        if (!chosen[i])
            wrong("a page is never chosen at random", models[0].page[i], steps);
    printf("%zu sets of %zu, policy %d: %zu left\n", count, ways, sets.policy, left);
    return 0;
}
