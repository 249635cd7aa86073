/* Doubly linked lists: a link lives in what is listed; empty lists and free links point to themselves. */
#ifndef RACKLESS_LITE_LIST_H
#define RACKLESS_LITE_LIST_H

#include <stdbool.h>
#include <stddef.h>

struct link {
    struct link *next, *prev;
};

#define OF(link, type, member) ((type *)(void *)((char *)(link) - offsetof(type, member)))
#define FIRST(list, type, member) (list_empty(list) ? (type *)NULL : OF((list)->next, type, member))

static inline void list_init(struct link *list)
{
    list->next = list->prev = list;
}

static inline bool list_empty(const struct link *list)
{
    return list->next == list;
}

static inline void list_remove(struct link *link)
{
    link->prev->next = link->next;
    link->next->prev = link->prev;
    list_init(link);
}

/* Take the link from wherever it is and put it at the end. */
static inline void list_append(struct link *list, struct link *link)
{
    list_remove(link);
    link->prev = list->prev;
    link->next = list;
    list->prev->next = link;
    list->prev = link;
}

static inline void list_prepend(struct link *list, struct link *link)
{
    list_append(list->next, link);
}

/* Append all of `from` to `list`. */
static inline void list_splice(struct link *list, struct link *from)
{
    while (!list_empty(from))
        list_append(list, from->next);
}

#endif
