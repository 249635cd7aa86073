/* A first Hotpot program: gcc example.c -lhotpot -o example && ./example
 *
 * Counts how often it was run, on any blade of the rack: each run is one transaction, on two nodes' media. */
#include <hotpot.h>
#include <stdio.h>
#include <string.h>

static int check(int status, const char *what)
{
    if (status < 0)
        fprintf(stderr, "%s: %s\n", what, HP_error());
    return status < 0;
}

int main(void)
{
    const struct HP_range word = {0, sizeof(uint64_t)};
    struct HP_dataset counter;
    HP_transaction turn;
    uint64_t count = 0;
    int status;

    if (check(HP_connect(), "connect"))
        return 1;
    if (HP_create("counter", 4096, NULL) && strcmp(HP_error_name(), "DatasetExists") != 0)
        return check(HP_ERR_SERVICE, "create");
    if (check(HP_open("counter", &counter), "open"))
        return 1;
    do {
        if (check(HP_begin(&counter, &turn), "begin"))
            return 1;
        status = HP_acquire(turn, &word, 1);
        if (status) {
            HP_abort(turn);
            continue;
        }
        count = ++*(uint64_t *)counter.memory;
        status = HP_commit(turn, 2);
    } while (status == HP_RETRY);
    if (check(status, "commit"))
        return 1;
    printf("run number %llu\n", (unsigned long long)count);
    return check(HP_close(&counter), "close");
}
