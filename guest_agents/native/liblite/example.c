/* A first LITE program: gcc example.c -llite -o example && ./example mb0
 *
 * Puts a line into the memory of another node, reads it back, and counts how often that was done. */
#include <lite.h>
#include <stdio.h>
#include <string.h>

static int check(int status, const char *what)
{
    if (status < 0)
        fprintf(stderr, "%s: %s (%d)\n", what, LT_error(), status);
    return status < 0;
}

int main(int argc, char **argv)
{
    const char *node = argc > 1 ? argv[1] : NULL;
    const char line[] = "Hello from C, by RDMA.";
    char back[sizeof line] = "";
    uint64_t before;
    LT_handle memory;

    if (check(LT_join(), "join") ||
        check(LT_malloc(node, 1 << 20, NULL, LT_MAY_READ | LT_MAY_WRITE, 0, &memory), "malloc") ||
        check(LT_write(memory, 4096, line, sizeof line), "write") ||
        check(LT_read(memory, 4096, back, sizeof back), "read") ||
        check(LT_fetch_add(memory, 0, 1, &before), "fetch_add"))
        return 1;
    printf("%s (count was %llu)\n", back, (unsigned long long)before);
    return check(LT_leave(), "leave");
}
