/* Streams of faults, for a test to ask: "PAGE MOST" on standard input; prints the first page and how many. */
#include "streams.h"

#include <stdio.h>

int main(void)
{
    static struct streams streams;
    size_t page, most;
    while (scanf("%zu %zu", &page, &most) == 2) {
        bool down;
        size_t run = streams_fault(&streams, page, most, &down);
        run = down && run > page + 1 ? page + 1 : run;
        streams_brought(&streams, page, run);
        printf("%zu %zu\n", down ? page + 1 - run : page, run);
    }
    return 0;
}
