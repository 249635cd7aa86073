/* touch_static MIB: fills memory and reads it back, twice. For the second tier: compile it with -static. */
#include <stdio.h>
#include <stdlib.h>

int main(int argc, char **argv)
{
    size_t words = argc == 2 ? strtoul(argv[1], NULL, 10) << 17 : 0;
    unsigned long *block = malloc(words * sizeof *block);
    if (!block)
        return 2;
    for (size_t i = 0; i < words; i++)
        block[i] = i * 0x9e3779b97f4a7c15ul;
    for (unsigned long round = 0; round < 2; round++)
        for (size_t i = 0; i < words; i++)
            if (block[i]++ != i * 0x9e3779b97f4a7c15ul + round) {
                printf("WRONG word %zu\n", i);
                return 1;
            }
    puts("fine");
    return 0;
}
