/* Packing of pages, and the pool that keeps them, under random use with every byte checked.
 * Usage: pool_stress ROUNDS SEED. Exit 0 and a line with figures, or 1 and a line that says what was wrong. */
#define _GNU_SOURCE
#include "codec.h"
#include "pool.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

enum { PAGES = 2000, LIMIT = 24, MOST = 40, KINDS = 7, LARGE = 6 };

static bool only_large;             /* few fit a segment, and some of it stays free */

static uint64_t seed;
static struct pool pool;
static uint32_t where[PAGES];
static uint32_t version[PAGES];    /* 0: not in the pool */

static uint64_t number(uint64_t *state)
{
    *state ^= *state << 13;
    *state ^= *state >> 7;
    return *state ^= *state << 17;
}

static void check(int ok, const char *what)
{
    if (!ok) {
        printf("WRONG: %s\n", what);
        exit(1);
    }
}

static size_t kind_of(size_t page)
{
    return only_large ? LARGE : page % KINDS;
}

/* A page as heaps have them; what is in it follows from its number and version. */
static void fill(uint64_t *words, size_t page, uint32_t of)
{
    uint64_t state = page * 0x9e3779b97f4a7c15ull + of + 1, base = 0x7f1200000000ull + (number(&state) & 0xffffff0);
    for (size_t i = 0; i < CODEC_WORDS; i++) {
        uint64_t random = number(&state);
        switch (kind_of(page)) {
        case 0: words[i] = 0; break;
        case 1: words[i] = random % 4 ? 0 : base + random % 100000 * 16; break;
        case 2: words[i] = random % 3 ? random % 300 : 0; break;
        case 3: words[i] = random % 8 ? 0 : random; break;
        case 4: words[i] = i * (random % 2 ? 1 : ~0ull) << random % 41; break; /* differences of every length */
        case 5: words[i] = random; break;
        case LARGE: words[i] = random % 2 ? random : 0; break;
        }
    }
}

static void test_codec(void)
{
    static uint64_t page[CODEC_WORDS], back[CODEC_WORDS];
    static uint8_t packed[CODEC_ROOM + 8];
    size_t length[KINDS] = {0};
    for (size_t i = 0; i < 600; i++) {
        fill(page, i, (uint32_t)seed);
        memset(packed + CODEC_ROOM, 0xa5, 8);
        size_t bytes = length[i % KINDS] = codec_pack(page, packed);
        check(packed[CODEC_ROOM] == 0xa5 && packed[CODEC_ROOM + 7] == 0xa5, "packing wrote beyond its room");
        check(bytes <= CODEC_LIMIT, "packed to more than the limit");
        if (!bytes)
            continue;
        memset(back, 0x5a, sizeof back);
        codec_unpack(packed, back);
        check(!memcmp(page, back, sizeof page), "a page is not what it was before packing");
    }
    check(length[0] == CODEC_ZEROS, "a page of zeros is not recognised");
    check(length[1] && length[1] < 1024, "pointers do not pack well");
    check(length[5] == 0, "noise was packed");
}

static void look(size_t page)
{
    static uint64_t expected[CODEC_WORDS], back[CODEC_WORDS];
    fill(expected, page, version[page]);
    codec_unpack(pool_get(&pool, page), back);
    check(pool_stamp(&pool, page) == (uint16_t)page, "a stamp is not what it was");
    check(!memcmp(expected, back, sizeof back), "a page in the pool is not what was put there");
}

static size_t resident(void)
{
    static unsigned char present[MOST * SEGMENT_PAGES];
    size_t n = 0;
    check(mincore(pool.base, sizeof present << 12, present) == 0, "mincore");
    for (size_t i = 0; i < sizeof present; i++)
        n += present[i] & 1;
    return n;
}

int main(int argc, char **argv)
{
    if (argc < 3)
        return 2;
    seed = strtoull(argv[2], NULL, 10) * 1000003 + 88172645463325252ull;
    test_codec();
    only_large = atoi(argv[2]) % 2;
    check(pool_init(&pool, MOST, where) == 0, "no pool");
    size_t compactions = 0, spilled = 0, inside = 0;
    for (int round = atoi(argv[1]); round; round--) {
        size_t page = number(&seed) % PAGES;
        if (version[page]) {
            look(page);
            pool_remove(&pool, page);
            version[page] = 0;
            inside--;
            continue;
        }
        static uint64_t words[CODEC_WORDS];
        static uint8_t packed[CODEC_ROOM];
        fill(words, page, (uint32_t)round);
        size_t bytes = codec_pack(words, packed);
        if (!bytes)
            continue;
        for (int tries = 0; !pool_put(&pool, page, (uint16_t)page, packed, bytes); tries++) {
            check(tries == 0, "what made room for a page made none");
            size_t held = pool.held;
            if (pool_compact(&pool, bytes)) {
                check(pool.held <= held, "compacting took memory");
                compactions++;
                continue;
            }
            if (pool.held >= LIMIT) {
                size_t oldest = pool_oldest(&pool), before = pool.held;
                for (size_t at = 0, next; pool_next(&pool, oldest, &at, &next); spilled++, inside--) {
                    check(version[next] != 0, "the pool gives out a page that was removed");
                    look(next);
                    pool_remove(&pool, next);
                    version[next] = 0;
                }
                check(pool.held == before - 1, "an emptied segment keeps its memory");
            }
            pool_grow(&pool);
        }
        version[page] = (uint32_t)round;
        inside++;
        check(pool.pages == inside, "the pool counts its pages wrongly");
        check(pool.held <= LIMIT, "the pool is larger than it may be");
        check(resident() <= pool_pages(&pool), "the pool holds more memory than it says");
    }
    size_t found = 0;
    for (size_t page = 0; page < PAGES; page++)
        if (version[page]) {
            look(page);
            pool_remove(&pool, page);
            found++;
        }
    check(found == inside, "pages got lost");
    check(pool.live == 0 && pool.held <= 1 && resident() <= pool_pages(&pool), "an empty pool holds memory");
    check(compactions > 0 && spilled > 0, "nothing was compacted, or nothing spilled");
    printf("%zu compactions, %zu pages spilled\n", compactions, spilled);
    return 0;
}
