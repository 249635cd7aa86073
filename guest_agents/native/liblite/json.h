/* As much JSON as LITE's control messages need: one flat object is written; top-level fields of a reply are found. */
#ifndef RACKLESS_LITE_JSON_H
#define RACKLESS_LITE_JSON_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { JSON_REQUEST = 4096 };

/* A request that is being written; `full` once something did not fit. */
struct json {
    char text[JSON_REQUEST];
    size_t length;
    bool full;
};

void json_begin(struct json *j, const char *op);
void json_string(struct json *j, const char *key, const char *value);
void json_number(struct json *j, const char *key, int64_t value);
void json_unsigned(struct json *j, const char *key, uint64_t value);
void json_true(struct json *j, const char *key);
/* "a,b" becomes ["a","b"]. */
void json_list(struct json *j, const char *key, const char *commas);
void json_end(struct json *j);

/* The value of a top-level field of the object in `text` (which ends with NUL), or NULL. */
const char *json_find(const char *text, const char *key);
/* Likewise, as what it should be; false when the field is missing or something else. */
bool json_get_unsigned(const char *text, const char *key, uint64_t *value);
bool json_get_number(const char *text, const char *key, int64_t *value);
bool json_get_string(const char *text, const char *key, char *value, size_t size);
bool json_get_true(const char *text, const char *key);
/* The next object of an array: `*at` starts as the array's value and moves on; NULL after the last. */
const char *json_next_object(const char **at);

#endif
