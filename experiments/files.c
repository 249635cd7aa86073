/* What experiment `excache` runs on a processor blade: requests of 4 KiB to one file, one after the other.
 *
 *   file_requests FILE MIB read|write random|sequential COUNT
 *
 * Makes the file if it is not there or too short. A write ends with fsync. Prints requests per second.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum { BYTES = 4096 };

static char data[BYTES];

static void check(bool good, const char *what)
{
    if (!good) {
        fprintf(stderr, "file_requests: ");
        perror(what);
        exit(1);
    }
}

static double seconds(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

int main(int argc, char **argv)
{
    if (argc != 6) {
        fprintf(stderr, "usage: file_requests FILE MIB read|write random|sequential COUNT\n");
        return 2;
    }
    off_t pieces = (off_t)atoi(argv[2]) * 256;
    bool writing = !strcmp(argv[3], "write"), jumping = !strcmp(argv[4], "random");
    int count = atoi(argv[5]), file = open(argv[1], O_RDWR | O_CREAT | O_CLOEXEC, 0644);
    struct stat now;
    check(file >= 0 && fstat(file, &now) == 0, argv[1]);
    memset(data, 'x', sizeof data);
    if (now.st_size < pieces * BYTES) {
        for (off_t i = 0; i < pieces; i++)
            check(pwrite(file, data, BYTES, i * BYTES) == BYTES, "pwrite");
        check(fsync(file) == 0 && posix_fadvise(file, 0, 0, POSIX_FADV_DONTNEED) == 0, "fsync");
    }
    uint64_t random = 88172645463325252ull;
    double before = seconds();
    for (int i = 0; i < count; i++) {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        off_t at = (jumping ? (off_t)(random % (uint64_t)pieces) : i % pieces) * BYTES;
        if (writing)
            check(pwrite(file, data, BYTES, at) == BYTES && fsync(file) == 0, "write");
        else
            check(pread(file, data, BYTES, at) == BYTES, "read");
    }
    printf("%.1f\n", count / (seconds() - before));
    return 0;
}
