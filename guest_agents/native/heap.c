#include "heap.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

/* Block sizes: every 16 bytes to 128, then four per doubling. All are multiples of 16. */
static const uint16_t class_bytes[CLASSES] = {
    16,   32,   48,   64,   80,   96,   112,  128,  160,  192,  224,  256,  320,  384,  448,  512,  640,  768,
    896,  1024, 1280, 1536, 1792, 2048, 2560, 3072, 3584, 4096, 5120, 6144, 7168, 8192,
};

static unsigned class_of(size_t bytes)
{
    if (bytes <= 128)
        return bytes ? (unsigned)((bytes - 1) / 16) : 0;
    /* `half` is the power of two below: its range is cut into four classes. */
    unsigned half = 63u - (unsigned)__builtin_clzll(bytes - 1);
    unsigned quarter = (unsigned)((bytes - 1) >> (half - 2)) & 3;
    return 8 + (half - 7) * 4 + quarter;
}

static size_t pages_for(size_t bytes)
{
    return (bytes + PAGE_SIZE - 1) >> PAGE_SHIFT;
}

int heap_init(struct heap *heap, size_t pages)
{
    pthread_mutex_init(&heap->lock, NULL);
    int error = arena_init(&heap->arena, pages);
    if (error)
        return error;
    heap->spans = raw_memory(heap->arena.pages * sizeof *heap->spans);
    return heap->spans ? 0 : ENOMEM;
}

static void list_add(struct heap *heap, uint32_t number)
{
    struct span *span = &heap->spans[number - 1];
    uint32_t *head = &heap->with_room[span->class_index];
    span->prev = 0;
    span->next = *head;
    if (*head)
        heap->spans[*head - 1].prev = number;
    *head = number;
}

static void list_remove(struct heap *heap, uint32_t number)
{
    struct span *span = &heap->spans[number - 1];
    if (span->prev)
        heap->spans[span->prev - 1].next = span->next;
    else
        heap->with_room[span->class_index] = span->next;
    if (span->next)
        heap->spans[span->next - 1].prev = span->prev;
}

static size_t span_pages(unsigned class_index)
{
    return class_bytes[class_index] <= LARGEST_IN_PAGE ? 1 : LARGE_SPAN_PAGES;
}

/* First page of the span that `page` belongs to. */
static size_t span_start(const struct heap *heap, size_t page)
{
    return heap->arena.use[page] == PAGE_SPAN ? page : page / LARGE_SPAN_PAGES * LARGE_SPAN_PAGES;
}

static bool in_span(const struct heap *heap, size_t page)
{
    return heap->arena.use[page] == PAGE_SPAN || heap->arena.use[page] == PAGE_LARGE_SPAN;
}

static uint32_t new_span(struct heap *heap, unsigned class_index)
{
    size_t pages = span_pages(class_index);
    size_t page = arena_take(&heap->arena, pages, pages, pages == 1 ? PAGE_SPAN : PAGE_LARGE_SPAN, false);
    if (page == NO_PAGE)
        return 0;
    struct span *span = &heap->spans[page];
    span->class_index = (uint16_t)class_index;
    span->blocks = span->free = (uint16_t)((pages << PAGE_SHIFT) / class_bytes[class_index]);
    memset(span->room, 0, sizeof span->room);
    size_t whole = span->blocks / 64;
    memset(span->room, 0xff, whole * sizeof *span->room);
    if (span->blocks % 64)
        span->room[whole] = (1ull << span->blocks % 64) - 1;
    list_add(heap, (uint32_t)page + 1);
    return (uint32_t)page + 1;
}

static void *take_small(struct heap *heap, unsigned class_index)
{
    uint32_t number = heap->with_room[class_index];
    if (!number && !(number = new_span(heap, class_index)))
        return NULL;
    struct span *span = &heap->spans[number - 1];
    size_t block = bits_next_set(span->room, 0, span->blocks);
    bit_clear(span->room, block);
    if (--span->free == 0)
        list_remove(heap, number);
    return arena_address(&heap->arena, number - 1) + block * class_bytes[class_index];
}

static void give_small(struct heap *heap, size_t page, const void *p)
{
    uint32_t number = (uint32_t)span_start(heap, page) + 1;
    struct span *span = &heap->spans[number - 1];
    size_t offset = (size_t)((const char *)p - arena_address(&heap->arena, number - 1));
    size_t block = offset / class_bytes[span->class_index];
    if (bit_test(span->room, block))
        abort(); /* double free: going on would hand one block to two owners */
    bit_set(span->room, block);
    if (span->free++ == 0)
        list_add(heap, number);
    bool alone = heap->with_room[span->class_index] == number && !span->next;
    if (span->free == span->blocks && !alone) {
        list_remove(heap, number);
        arena_give(&heap->arena, number - 1, span_pages(span->class_index), false);
    }
}

void *heap_take(struct heap *heap, size_t bytes, size_t align, bool zeroed)
{
    if (bytes > PTRDIFF_MAX - (2 * align + PAGE_SIZE)) {
        errno = ENOMEM;
        return NULL;
    }
    if (align > SMALLEST_BLOCK && align <= PAGE_SIZE) {
        /* A block of a power-of-two class is aligned to its size. */
        size_t power = bytes > align ? bytes : align;
        bytes = power <= 1 ? 1 : (size_t)1 << (64 - __builtin_clzll(power - 1));
        if (power > LARGEST_SMALL)
            bytes = power;
    }
    void *block = NULL;
    pthread_mutex_lock(&heap->lock);
    if (bytes <= LARGEST_SMALL && align <= PAGE_SIZE) {
        block = take_small(heap, class_of(bytes));
    } else {
        size_t pages = align > PAGE_SIZE ? align >> PAGE_SHIFT : 1;
        size_t page = arena_take(&heap->arena, pages_for(bytes), pages, PAGE_LARGE, zeroed);
        if (page != NO_PAGE)
            block = arena_address(&heap->arena, page);
    }
    pthread_mutex_unlock(&heap->lock);
    if (block && zeroed && bytes <= LARGEST_SMALL && align <= PAGE_SIZE)
        memset(block, 0, bytes);
    return block;
}

void heap_give(struct heap *heap, void *block)
{
    size_t page = arena_page(&heap->arena, block);
    pthread_mutex_lock(&heap->lock);
    switch ((enum page_use)heap->arena.use[page]) {
    case PAGE_SPAN:
    case PAGE_LARGE_SPAN:
        give_small(heap, page, block);
        break;
    case PAGE_LARGE:
        if ((uintptr_t)block % PAGE_SIZE)
            abort();
        arena_give(&heap->arena, page, heap->arena.length[page], false);
        break;
    default:
        abort(); /* not a block of ours, or freed before */
    }
    pthread_mutex_unlock(&heap->lock);
}

size_t heap_size(const struct heap *heap, const void *block)
{
    size_t page = arena_page(&heap->arena, block);
    if (in_span(heap, page))
        return class_bytes[heap->spans[span_start(heap, page)].class_index];
    return (size_t)heap->arena.length[page] << PAGE_SHIFT;
}

bool heap_resize_in_place(struct heap *heap, void *block, size_t bytes)
{
    size_t have = heap_size(heap, block);
    size_t page = arena_page(&heap->arena, block);
    if (bytes <= have && (have <= LARGEST_SMALL ? bytes > have / 2 || have <= 64 : pages_for(bytes) == pages_for(have)))
        return true;
    if (heap->arena.use[page] != PAGE_LARGE || bytes <= LARGEST_SMALL)
        return false;
    size_t old = pages_for(have), new = pages_for(bytes);
    bool done = true;
    pthread_mutex_lock(&heap->lock);
    if (new < old) {
        heap->arena.length[page] = (uint32_t)new;
        arena_give(&heap->arena, page + new, old - new, false);
    } else {
        done = arena_extend(&heap->arena, page, old, new - old, false);
    }
    pthread_mutex_unlock(&heap->lock);
    return done;
}
