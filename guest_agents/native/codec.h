/* Makes pages of pointers, counters and short strings small, as heaps are full of; text and noise stay as they are.
 *
 * Word by word, after WKdm (Wilson, Kaplan, Smaragdakis: "The Case for Compressed Caching in Virtual Memory Systems",
 * USENIX 1999), but with the words of today: 8 bytes, and what follows a remembered one is written as a difference,
 * because pointers to blocks that were allocated together differ by little. Measured on gawk's heap: it packs as well
 * as LZ4, to 18 %, in 7 us a page instead of 45 under TCG, where a fault is 100 and a READ is 1000 or more.
 */
#ifndef RACKLESS_CODEC_H
#define RACKLESS_CODEC_H

#include <stddef.h>
#include <stdint.h>

enum {
    CODEC_WORDS = 512,      /* of 8 bytes: a page */
    CODEC_ZEROS = CODEC_WORDS / 4, /* what a page of zeros is packed to */
    CODEC_LIMIT = 3072,     /* a page that would be longer is not worth packing */
    CODEC_ROOM = CODEC_LIMIT + 64,
};

/* Pack a page into `out` (CODEC_ROOM bytes): the length, or 0 if it is more than CODEC_LIMIT. */
size_t codec_pack(const uint64_t *page, uint8_t *out);

/* The reverse. `in` must be readable for 8 bytes after its end. */
void codec_unpack(const uint8_t *in, uint64_t *page);

#endif
