#include "sets.h"

#include "arena.h"

#include <errno.h>

enum { DOZE_SHARE = 4 };        /* a quarter of the lines in use */

int sets_init(struct sets *s, size_t count, size_t ways, enum policy policy, uint32_t *where)
{
    *s = (struct sets){.policy = policy, .count = count, .ways = ways, .where = where, .random = 88172645463325252ull};
    s->set = raw_memory(count * sizeof *s->set);
    s->line = raw_memory((count * ways + 1) * sizeof *s->line);
    return s->set && s->line ? 0 : -ENOMEM;
}

static void append(struct sets *s, struct set *set, uint32_t index)
{
    struct line *line = &s->line[index];
    line->older = set->newest;
    line->newer = 0;
    line->dozing = false;
    *(set->newest ? &s->line[set->newest].newer : &set->oldest) = index;
    set->newest = index;
    if (!set->awake)
        set->awake = index;
}

static void unlink_line(struct sets *s, struct set *set, uint32_t index)
{
    const struct line *line = &s->line[index];
    *(line->older ? &s->line[line->older].newer : &set->oldest) = line->newer;
    *(line->newer ? &s->line[line->newer].older : &set->newest) = line->older;
    if (set->awake == index)
        set->awake = line->newer;
    set->dozing -= line->dozing;
}

bool sets_add(struct sets *s, size_t page)
{
    size_t number = sets_of(s, page);
    struct set *set = &s->set[number];
    uint32_t index = set->free;
    if (index)
        set->free = s->line[index].newer;
    else if (set->begun < s->ways)
        index = (uint32_t)(number * s->ways) + ++set->begun;
    else
        return false;
    s->line[index] = (struct line){.page = (uint32_t)page, .taken = true};
    append(s, set, index);
    set->count++;
    s->where[page] = index;
    return true;
}

void sets_remove(struct sets *s, size_t page)
{
    struct set *set = &s->set[sets_of(s, page)];
    uint32_t index = s->where[page];
    unlink_line(s, set, index);
    s->line[index] = (struct line){.newer = set->free};
    set->free = index;
    set->count--;
}

void sets_renew(struct sets *s, size_t page)
{
    struct set *set = &s->set[sets_of(s, page)];
    unlink_line(s, set, s->where[page]);
    append(s, set, s->where[page]);
}

static uint64_t next_random(struct sets *s)
{
    s->random ^= s->random << 13;
    s->random ^= s->random >> 7;
    return s->random ^= s->random << 17;
}

size_t sets_choose(struct sets *s, size_t number)
{
    const struct set *set = &s->set[number];
    uint32_t index = set->oldest;
    if (s->policy == POLICY_RANDOM)
        do
            index = (uint32_t)(number * s->ways + next_random(s) % set->begun) + 1;
        while (!s->line[index].taken); /* a set is evicted from when it is nearly full: few tries */
    return s->line[index].page;
}

size_t sets_oldest(const struct sets *s, size_t set)
{
    return s->line[s->set[set].oldest].page;
}

bool sets_next_to_doze(struct sets *s, size_t number, size_t *page)
{
    struct set *set = &s->set[number];
    if (s->policy != POLICY_LRU || !set->awake || set->dozing >= (set->count + DOZE_SHARE - 1) / DOZE_SHARE)
        return false;
    struct line *line = &s->line[set->awake];
    line->dozing = true;
    set->dozing++;
    set->awake = line->newer;
    *page = line->page;
    return true;
}
