#include "streams.h"

enum { GAP = 4 };              /* pages that a stream may find there already */

static bool expects(const struct stream *stream, uint32_t page)
{
    return stream->next && (stream->down ? stream->next - page : page - stream->next) < GAP;
}

static struct stream *find(struct streams *s, uint32_t page)
{
    for (size_t i = 0; i < STREAMS; i++)
        if (expects(&s->stream[i], page))
            return &s->stream[i];
    return NULL;
}

/* Take the place of the stream that has not been heard of for longest. */
static struct stream *begin(struct streams *s, bool down)
{
    struct stream *stream = &s->stream[0];
    for (size_t i = 1; i < STREAMS; i++)
        if (s->faults - s->stream[i].used > s->faults - stream->used)
            stream = &s->stream[i];
    *stream = (struct stream){.run = 1, .down = down};
    return stream;
}

static bool was_recent(const struct streams *s, uint32_t page)
{
    for (size_t i = 0; i < RECENT_FAULTS; i++)
        if (s->recent[i] == page)
            return true;
    return false;
}

size_t streams_fault(struct streams *s, size_t page, size_t most, bool *down)
{
    uint32_t number = (uint32_t)page + 1;
    *down = false;
    s->faults++;
    s->last = find(s, number);
    if (!s->last && page && was_recent(s, number - 1))
        s->last = begin(s, false);
    else if (!s->last && was_recent(s, number + 1))
        s->last = begin(s, true);
    if (!s->last) {
        s->recent[s->faults % RECENT_FAULTS] = number;
        return 1;
    }
    *down = s->last->down;
    s->last->used = s->faults;
    s->last->run = s->last->run * 2 < most ? s->last->run * 2 : (uint32_t)most;
    return s->last->run;
}

void streams_brought(struct streams *s, size_t page, size_t run)
{
    if (!s->last)
        return;
    uint32_t number = (uint32_t)page + 1;
    s->last->next = s->last->down ? number - (uint32_t)(run < number ? run : number - 1) : number + (uint32_t)run;
    s->last->used = s->faults;
}
