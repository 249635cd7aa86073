/* A hash table from non-zero 64-bit numbers to pointers: open addressing, never more than half full. */
#ifndef RACKLESS_LITE_TABLE_H
#define RACKLESS_LITE_TABLE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct table_entry {
    uint64_t key; /* 0: empty */
    void *value;
};

struct table {
    struct table_entry *entry;
    size_t size, count; /* size: a power of two, or 0 */
};

void *table_find(const struct table *table, uint64_t key);
bool table_put(struct table *table, uint64_t key, void *value); /* false: no memory, or the key is there */
void table_remove(struct table *table, uint64_t key);
void table_free(struct table *table);

#endif
