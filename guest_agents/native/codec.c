#include "codec.h"

#include <stdbool.h>
#include <string.h>

enum {
    MEMORY = 64,            /* words remembered, at most one for each 1 MiB of addresses */
    NEIGHBOURHOOD = 20,     /* bits: words that differ below only are written as a difference */
    TAG_BYTES = CODEC_WORDS / 4,
};

/* Two bits per word, before everything else. */
enum tag {
    ZERO,
    NEAR,                   /* a byte: number of the remembered word, bytes of the difference (0 to 3); these bytes */
    SHORT,                  /* 4 bytes, the upper 4 are zero */
    LONG,                   /* 8 bytes */
};

static unsigned slot_of(uint64_t word)
{
    return (unsigned)((word >> NEIGHBOURHOOD) * 0x9e3779b97f4a7c15ull >> 58);
}

/* Bytes that a signed difference needs. */
static unsigned length_of(int64_t difference)
{
    return difference == 0 ? 0 : difference == (int8_t)difference ? 1 : difference == (int16_t)difference ? 2 : 3;
}

static enum tag pack_word(uint64_t word, uint64_t *memory, uint8_t **out)
{
    if (!word)
        return ZERO;
    unsigned slot = slot_of(word);
    uint64_t before = memory[slot];
    memory[slot] = word;
    if (before >> NEIGHBOURHOOD == word >> NEIGHBOURHOOD && before) {
        int64_t difference = (int64_t)(word - before);
        unsigned length = length_of(difference);
        *(*out)++ = (uint8_t)(slot << 2 | length);
        memcpy(*out, &difference, 4);
        *out += length;
        return NEAR;
    }
    bool small = word >> 32 == 0;
    memcpy(*out, &word, 8);
    *out += small ? 4 : 8;
    return small ? SHORT : LONG;
}

size_t codec_pack(const uint64_t *page, uint8_t *out)
{
    uint64_t memory[MEMORY] = {0};
    uint8_t *to = out + TAG_BYTES;
    for (size_t i = 0; i < CODEC_WORDS; i += 4) {
        unsigned tags = pack_word(page[i], memory, &to);
        tags |= pack_word(page[i + 1], memory, &to) << 2;
        tags |= pack_word(page[i + 2], memory, &to) << 4;
        tags |= pack_word(page[i + 3], memory, &to) << 6;
        out[i / 4] = (uint8_t)tags;
        if (to - out > CODEC_LIMIT)
            return 0;
    }
    return (size_t)(to - out);
}

static uint64_t unpack_word(unsigned tag, uint64_t *memory, const uint8_t **in)
{
    static const unsigned shift[] = {0, 56, 48, 40};
    uint64_t word = 0;
    switch ((enum tag)(tag & 3)) {
    case ZERO:
        return 0;
    case NEAR: {
        unsigned slot = **in >> 2, length = **in & 3;
        memcpy(&word, *in + 1, 8);
        word = length ? (uint64_t)((int64_t)(word << shift[length]) >> shift[length]) : 0;
        *in += 1 + length;
        return memory[slot] += word;
    }
    case SHORT:
        memcpy(&word, *in, 4);
        *in += 4;
        break;
    case LONG:
        memcpy(&word, *in, 8);
        *in += 8;
    }
    return memory[slot_of(word)] = word;
}

void codec_unpack(const uint8_t *in, uint64_t *page)
{
    uint64_t memory[MEMORY] = {0};
    const uint8_t *from = in + TAG_BYTES;
    for (size_t i = 0; i < CODEC_WORDS; i += 4) {
        unsigned tags = in[i / 4];
        if (!tags) { /* half of a heap's words are zero */
            memset(&page[i], 0, 32);
            continue;
        }
        page[i] = unpack_word(tags, memory, &from);
        page[i + 1] = unpack_word(tags >> 2, memory, &from);
        page[i + 2] = unpack_word(tags >> 4, memory, &from);
        page[i + 3] = unpack_word(tags >> 6, memory, &from);
    }
}
