/* swap_serve SIZE: the device of swap.c at the socket that is descriptor 0; says "lost NAME BLOCKS" and "full". */
#define _GNU_SOURCE
#include "swap.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void lost(const char *name, uint64_t blocks)
{
    if (name)
        printf("lost %s %lu\n", name, (unsigned long)blocks);
    else
        puts("full");
    fflush(stdout);
}

static bool nothing(void)
{
    return true;
}

int main(int argc, char **argv)
{
    static struct swap swap = {.lost = lost};
    const char *why = argc == 2 ? swap_open(&swap, strtoull(argv[1], NULL, 10)) : "usage";
    if (why) {
        fprintf(stderr, "%s\n", why);
        return 1;
    }
    memcpy(swap_first_block(), "first", 5);
    swap_serve(&swap, 0, -1, nothing);
    return 0;
}
