/* All of libhotpot on a dataset that others may have open too: exercise NAME MODE COUNT. Adds COUNT to the word at 0,
 * which any number of these programs may do at once, and tries the rest on a dataset of its own. */
#include "hotpot_check.h"

#include <string.h>
#include <unistd.h>

static void count_up(struct HP_dataset *shared, int count)
{
    const struct HP_range words[] = {{0, 8}, {8 * 4096 - 4, 8}}; /* the second across pages */
    while (count) {
        HP_transaction t;
        CHECK(HP_begin(shared, &t) == 0);
        int status = HP_acquire(t, words, 2);
        if (status == HP_RETRY) {
            CHECK(HP_abort(t) == 0);
            usleep((unsigned)rand() % 4000);
            continue;
        }
        CHECK(status == 0);
        uint64_t one, other;
        memcpy(&one, shared->memory, 8);
        memcpy(&other, shared->memory + words[1].offset, 8);
        one++;
        other += 3;
        memcpy(shared->memory, &one, 8);
        memcpy(shared->memory + words[1].offset, &other, 8);
        status = HP_commit(t, 2);
        CHECK(status == 0 || status == HP_RETRY);
        if (status == 0)
            count--;
        else
            usleep((unsigned)rand() % 4000);
    }
}

static void try_the_rest(const char *mode)
{
    char name[32];
    struct HP_dataset d, again;
    HP_transaction t;
    snprintf(name, sizeof name, "own \"%d\"", getpid());
    CHECK(HP_create(name, 4096, "never") == HP_ERR_SERVICE && strcmp(HP_error_name(), "BadArgument") == 0);
    CHECK(HP_create(name, 5 << 20, mode) == 0);
    CHECK(HP_create(name, 4096, NULL) == HP_ERR_SERVICE && strcmp(HP_error_name(), "DatasetExists") == 0);
    CHECK(HP_open(name, &d) == 0 && d.size == 5 << 20);
    char *first = d.memory;
    CHECK(HP_open(name, &again) == HP_ERR_SERVICE && strcmp(HP_error_name(), "BadArgument") == 0);

    strcpy(d.memory + 4090, "across pages");
    strcpy(d.memory + (4 << 20), first);
    struct HP_range ranges[] = {{4090, 13}, {4 << 20, 1}};
    CHECK(HP_commit_ranges(&d, ranges, 2, 1) == 0);
    CHECK(HP_begin(&d, &t) == 0);
    CHECK(HP_acquire(t, ranges, 1) == 0);
    strcpy(d.memory + 4090, "never");
    CHECK(HP_abort(t) == 0);
    CHECK(strcmp(d.memory + 4090, "across pages") == 0);
    CHECK(HP_commit(t, 1) == HP_ERR_SERVICE && strcmp(HP_error_name(), "NoSuchTransaction") == 0);
    ranges[1] = (struct HP_range){4095, 2};
    CHECK(HP_commit_ranges(&d, ranges, 2, 1) == HP_ERR_SERVICE && strcmp(HP_error_name(), "Overlap") == 0);
    CHECK(HP_commit_ranges(&d, ranges, HP_MOST_RANGES + 1, 1) == HP_ERR_ARGUMENT);

    CHECK(HP_delete(name) == HP_ERR_SERVICE && strcmp(HP_error_name(), "DatasetBusy") == 0);
    CHECK(HP_close(&d) == 0);
    CHECK(HP_open(name, &d) == 0 && d.memory == first);
    CHECK(strcmp(d.memory + 4090, "across pages") == 0);
    CHECK(HP_close(&d) == 0);
    CHECK(HP_delete(name) == 0);
    CHECK(HP_open(name, &d) == HP_ERR_SERVICE && strcmp(HP_error_name(), "NoSuchDataset") == 0);
}

int main(int argc, char **argv)
{
    struct HP_dataset shared;
    (void)argc;
    CHECK(HP_delete("x") == HP_ERR_NOT_CONNECTED);
    CHECK(HP_connect() == 0);
    CHECK(HP_open(argv[1], &shared) == 0);
    count_up(&shared, atoi(argv[3]));
    try_the_rest(argv[2]);
    printf("%p\n", (void *)shared.memory);
    CHECK(HP_close(&shared) == 0);
    CHECK(HP_disconnect() == 0);
    CHECK(HP_delete("x") == HP_ERR_NOT_CONNECTED);
    return 0;
}
