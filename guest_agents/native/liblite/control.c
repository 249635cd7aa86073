/* What goes through the agent's books: allocation, names, rights, ports, locks, barriers, registered memory. */
#define _GNU_SOURCE
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "client.h"

#define EXPORT __attribute__((visibility("default")))

struct region lite_regions[REGIONS];
atomic_uint lite_regions_used;
static pthread_mutex_t regions_lock = PTHREAD_MUTEX_INITIALIZER;

/* The reply to the last lite_ask of this thread. */
static const char *answer(void)
{
    struct connection *c = lite_connection();
    return c ? c->answer : "";
}

static int get(const char *key, uint64_t *value)
{
    if (json_get_unsigned(answer(), key, value))
        return 0;
    return lite_fail(LT_ERR_BAD_MESSAGE, "the agent's answer has no %s", key);
}

static int on_handle(const char *op, LT_handle handle)
{
    struct json request;
    json_begin(&request, op);
    json_unsigned(&request, "handle", handle);
    return lite_ask(&request, NULL);
}

static int on_name(const char *op, const char *name, const unsigned *timeout_ms)
{
    struct json request;
    json_begin(&request, op);
    json_string(&request, "name", name);
    if (timeout_ms)
        json_unsigned(&request, "timeout_ms", *timeout_ms);
    return lite_ask(&request, NULL);
}

EXPORT int LT_malloc(const char *nodes, uint64_t size, const char *name, unsigned permissions, unsigned flags,
                     LT_handle *handle)
{
    struct json request;
    json_begin(&request, "malloc");
    json_unsigned(&request, "size", size);
    if (nodes)
        json_list(&request, "nodes", nodes);
    if (name)
        json_string(&request, "name", name);
    json_unsigned(&request, "permissions", permissions);
    if (flags & LT_SPREAD)
        json_true(&request, "spread");
    if (flags & LT_KEEP)
        json_true(&request, "keep");
    int failed = lite_ask(&request, NULL);
    return failed ? failed : get("handle", handle);
}

EXPORT int LT_map(const char *name, unsigned permissions, LT_handle *handle, uint64_t *size)
{
    struct json request;
    json_begin(&request, "map");
    json_string(&request, "name", name);
    json_unsigned(&request, "permissions", permissions);
    int failed = lite_ask(&request, NULL);
    if (!failed && size)
        failed = get("size", size);
    return failed ? failed : get("handle", handle);
}

EXPORT int LT_unmap(LT_handle handle)
{
    return on_handle("unmap", handle);
}

EXPORT int LT_free(LT_handle handle)
{
    return on_handle("free", handle);
}

EXPORT int LT_move(LT_handle handle, const char *nodes)
{
    struct json request;
    json_begin(&request, "move");
    json_unsigned(&request, "handle", handle);
    json_list(&request, "to", nodes);
    return lite_ask(&request, NULL);
}

static int rights(const char *op, LT_handle handle, unsigned permissions, const char *to)
{
    struct json request;
    json_begin(&request, op);
    json_unsigned(&request, "handle", handle);
    json_unsigned(&request, "permissions", permissions);
    json_string(&request, "to", to);
    return lite_ask(&request, NULL);
}

EXPORT int LT_grant(LT_handle handle, unsigned permissions, const char *to)
{
    return rights("grant", handle, permissions, to);
}

EXPORT int LT_revoke(LT_handle handle, unsigned permissions, const char *to)
{
    return rights("revoke", handle, permissions, to);
}

EXPORT int LT_memset(LT_handle handle, uint64_t offset, int byte, uint64_t length)
{
    struct json request;
    json_begin(&request, "memset");
    json_unsigned(&request, "handle", handle);
    json_unsigned(&request, "offset", offset);
    json_unsigned(&request, "byte", (unsigned char)byte);
    json_unsigned(&request, "length", length);
    return lite_ask(&request, NULL);
}

static int copy(const char *op, LT_handle target, uint64_t to, LT_handle source, uint64_t from, uint64_t length)
{
    struct json request;
    json_begin(&request, op);
    json_unsigned(&request, "source", source);
    json_unsigned(&request, "soffset", from);
    json_unsigned(&request, "target", target);
    json_unsigned(&request, "toffset", to);
    json_unsigned(&request, "length", length);
    return lite_ask(&request, NULL);
}

EXPORT int LT_memcpy(LT_handle target, uint64_t to, LT_handle source, uint64_t from, uint64_t length)
{
    return copy("memcpy", target, to, source, from, length);
}

EXPORT int LT_memmove(LT_handle target, uint64_t to, LT_handle source, uint64_t from, uint64_t length)
{
    return copy("memmove", target, to, source, from, length);
}

EXPORT void *LT_buffer(size_t size)
{
    struct json request;
    int file;
    uint64_t id = 0;
    json_begin(&request, "buffer");
    json_unsigned(&request, "size", size);
    if (lite_ask(&request, &file))
        return NULL;
    char *start = get("id", &id) ? MAP_FAILED : mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    close(file);
    if (start == MAP_FAILED) {
        lite_fail(LT_ERR_NO_MEMORY, "cannot map the buffer");
        return NULL;
    }
    pthread_mutex_lock(&regions_lock);
    unsigned used = atomic_load(&lite_regions_used), i = 0;
    while (i < used && atomic_load(&lite_regions[i].start))
        i++;
    if (i < REGIONS) {
        lite_regions[i].size = size;
        lite_regions[i].id = (uint32_t)id;
        atomic_store_explicit(&lite_regions[i].start, start, memory_order_release);
        if (i == used)
            atomic_store_explicit(&lite_regions_used, used + 1, memory_order_release);
    }
    pthread_mutex_unlock(&regions_lock);
    if (i < REGIONS)
        return start;
    munmap(start, size);
    json_begin(&request, "buffer_drop");
    json_unsigned(&request, "id", id);
    lite_ask(&request, NULL);
    lite_fail(LT_ERR_NO_MEMORY, "a process can have %d buffers", REGIONS);
    return NULL;
}

EXPORT int LT_buffer_free(void *buffer)
{
    struct json request;
    struct region *region = NULL;
    pthread_mutex_lock(&regions_lock);
    for (unsigned i = 0; i < atomic_load(&lite_regions_used) && !region; i++)
        if (buffer && atomic_load(&lite_regions[i].start) == buffer)
            region = &lite_regions[i];
    if (region) {
        atomic_store(&region->start, NULL);
        munmap(buffer, region->size);
        json_begin(&request, "buffer_drop");
        json_unsigned(&request, "id", region->id);
    }
    pthread_mutex_unlock(&regions_lock);
    return region ? lite_ask(&request, NULL) : lite_fail(LT_ERR_BAD_ARGUMENT, "not a buffer of LT_buffer");
}

EXPORT int LT_regRPC(int port, size_t max_message)
{
    struct json request;
    json_begin(&request, "register");
    json_number(&request, "port", port);
    json_unsigned(&request, "max_message", max_message);
    return lite_ask(&request, NULL);
}

EXPORT int LT_unregRPC(int port)
{
    struct json request;
    json_begin(&request, "unregister");
    json_number(&request, "port", port);
    return lite_ask(&request, NULL);
}

EXPORT int LT_createlock(const char *name, const char *home)
{
    struct json request;
    json_begin(&request, "lock_create");
    json_string(&request, "name", name);
    if (home)
        json_string(&request, "home", home);
    return lite_ask(&request, NULL);
}

EXPORT int LT_lock(const char *name, unsigned timeout_ms)
{
    return on_name("lock", name, &timeout_ms);
}

EXPORT int LT_unlock(const char *name)
{
    return on_name("unlock", name, NULL);
}

EXPORT int LT_barrier(const char *name, unsigned count, unsigned timeout_ms)
{
    struct json request;
    json_begin(&request, "barrier");
    json_string(&request, "name", name);
    json_unsigned(&request, "count", count);
    json_unsigned(&request, "timeout_ms", timeout_ms);
    return lite_ask(&request, NULL);
}

/* Calls `see` for the living nodes in turn, until it returns true. */
static int each_node(bool (*see)(int id, const char *name, void *context), void *context)
{
    struct json request;
    json_begin(&request, "nodes");
    int failed = lite_ask(&request, NULL);
    if (failed)
        return failed;
    const char *at = json_find(answer(), "nodes"), *member;
    if (!at)
        return lite_fail(LT_ERR_BAD_MESSAGE, "the agent's answer has no nodes");
    while ((member = json_next_object(&at))) {
        char name[64] = "", state[16] = "";
        uint64_t id = 0;
        json_get_string(member, "state", state, sizeof state);
        if (!strcmp(state, "alive") && json_get_string(member, "name", name, sizeof name) &&
            json_get_unsigned(member, "node_id", &id) && see((int)id, name, context))
            break;
    }
    return 0;
}

struct sought {
    const char *name;
    int id;
    char *copy;
    size_t size;
};

static bool has_name(int id, const char *name, void *context)
{
    struct sought *sought = context;
    if (strcmp(name, sought->name))
        return false;
    sought->id = id;
    return true;
}

static bool has_id(int id, const char *name, void *context)
{
    struct sought *sought = context;
    if (id != sought->id)
        return false;
    snprintf(sought->copy, sought->size, "%s", name);
    return true;
}

struct list {
    int *ids;
    int room, count;
};

static bool add(int id, const char *name, void *context)
{
    struct list *list = context;
    (void)name;
    if (list->count < list->room)
        list->ids[list->count] = id;
    list->count++;
    return false;
}

EXPORT int LT_node(const char *name)
{
    struct sought sought = {.name = name};
    if (!name)
        return lite_connection() ? lite_own_node : LT_ERR_NOT_JOINED;
    int failed = each_node(has_name, &sought);
    if (!failed && !sought.id)
        failed = lite_fail(LT_ERR_NO_SUCH_NODE, "no living node is called %s", name);
    return failed ? failed : sought.id;
}

EXPORT int LT_node_name(int node, char *name, size_t size)
{
    struct sought sought = {.id = node, .copy = name, .size = size};
    if (!size)
        return lite_fail(LT_ERR_BAD_ARGUMENT, "no room for a name");
    name[0] = 0;
    int failed = each_node(has_id, &sought);
    return failed || name[0] ? failed : lite_fail(LT_ERR_NO_SUCH_NODE, "no living node has id %d", node);
}

EXPORT int LT_nodes(int *ids, int room)
{
    struct list list = {ids, room, 0};
    int failed = each_node(add, &list);
    return failed ? failed : list.count;
}
