#include "table.h"

#include <stdlib.h>

static size_t home(const struct table *table, uint64_t key)
{
    return (key * 0x9e3779b97f4a7c15u >> 20) & (table->size - 1);
}

static struct table_entry *locate(const struct table *table, uint64_t key)
{
    size_t i = home(table, key);
    while (table->entry[i].key && table->entry[i].key != key)
        i = (i + 1) & (table->size - 1);
    return &table->entry[i];
}

void *table_find(const struct table *table, uint64_t key)
{
    return table->size && key ? locate(table, key)->value : NULL;
}

static bool grow(struct table *table)
{
    struct table old = *table;
    table->size = old.size ? 2 * old.size : 64;
    table->entry = calloc(table->size, sizeof *table->entry);
    if (!table->entry) {
        *table = old;
        return false;
    }
    for (size_t i = 0; i < old.size; i++)
        if (old.entry[i].key)
            *locate(table, old.entry[i].key) = old.entry[i];
    free(old.entry);
    return true;
}

bool table_put(struct table *table, uint64_t key, void *value)
{
    if (!key || (2 * (table->count + 1) > table->size && !grow(table)))
        return false;
    struct table_entry *entry = locate(table, key);
    if (entry->key)
        return false;
    *entry = (struct table_entry){key, value};
    table->count++;
    return true;
}

void table_remove(struct table *table, uint64_t key)
{
    if (!table_find(table, key))
        return;
    size_t hole = (size_t)(locate(table, key) - table->entry), mask = table->size - 1;
    table->count--;
    /* Close the hole: move up what was pushed past it. */
    for (size_t i = (hole + 1) & mask; table->entry[i].key; i = (i + 1) & mask) {
        size_t wanted = home(table, table->entry[i].key);
        if (((i - wanted) & mask) >= ((i - hole) & mask)) {
            table->entry[hole] = table->entry[i];
            hole = i;
        }
    }
    table->entry[hole] = (struct table_entry){0, NULL};
}

void table_free(struct table *table)
{
    free(table->entry);
    *table = (struct table){0};
}
