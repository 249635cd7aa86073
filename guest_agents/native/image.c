#define _GNU_SOURCE
#include "image.h"

#include "desk.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

uint64_t image_print(const void *data, size_t bytes, uint64_t so_far)
{
    const uint8_t *at = data;
    for (; bytes >= 8; bytes -= 8, at += 8) {
        uint64_t word;
        memcpy(&word, at, 8);
        so_far = (so_far ^ word) * 0x9e3779b97f4a7c15ull;
        so_far ^= so_far >> 32;
    }
    for (; bytes; bytes--)
        so_far = (so_far ^ *at++) * 0x100000001b3ull;
    return so_far | 1;
}

uint64_t image_fingerprint(const char *path)
{
    static char data[1 << 16];
    FILE *in = fopen(path, "re");
    if (!in)
        return 0;
    uint64_t print = 1;
    for (size_t got; (got = fread(data, 1, sizeof data, in)) > 0;)
        print = image_print(data, got, print);
    bool failed = ferror(in);
    fclose(in);
    return failed ? 0 : print;
}

void image_path(char path[PATH_MAX], const char *name)
{
    snprintf(path, PATH_MAX, IMAGE_FOLDER "/%s", name);
}

static bool write_all(FILE *out, const void *data, size_t size, size_t count)
{
    return fwrite(data, size, count, out) == count;
}

int image_write(FILE *out, const struct loaded *all)
{
    bool done = write_all(out, &all->image, sizeof all->image, 1) &&
                write_all(out, all->thread, sizeof *all->thread, all->image.threads) &&
                write_all(out, all->map, sizeof *all->map, all->image.maps) &&
                write_all(out, all->file, sizeof *all->file, all->image.files);
    return done ? 0 : errno;
}

static void *read_some(FILE *in, size_t size, uint32_t count)
{
    void *data = calloc(count + 1u, size);
    if (data && fread(data, size, count, in) != count) {
        free(data);
        return NULL;
    }
    return data;
}

int image_read(FILE *in, struct loaded *all)
{
    if (fread(&all->image, sizeof all->image, 1, in) != 1 || all->image.magic != IMAGE_MAGIC)
        return EINVAL;
    all->thread = read_some(in, sizeof *all->thread, all->image.threads);
    all->map = read_some(in, sizeof *all->map, all->image.maps);
    all->file = read_some(in, sizeof *all->file, all->image.files);
    return all->thread && all->map && all->file ? 0 : EINVAL;
}
