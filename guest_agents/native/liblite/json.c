/* See json.h. The reader walks the text once per field: replies are short, and this is not the fast path. */
#define _GNU_SOURCE
#include "json.h"

#include <ctype.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void put(struct json *j, const char *text, size_t length)
{
    if (j->length + length >= sizeof j->text) {
        j->full = true;
        return;
    }
    memcpy(j->text + j->length, text, length);
    j->length += length;
    j->text[j->length] = 0;
}

static void quoted(struct json *j, const char *value, size_t length)
{
    put(j, "\"", 1);
    for (size_t i = 0; i < length; i++) {
        unsigned char c = (unsigned char)value[i];
        if (c == '"' || c == '\\') {
            put(j, "\\", 1);
            put(j, &value[i], 1);
        } else if (c < 0x20) {
            char escaped[8];
            put(j, escaped, (size_t)snprintf(escaped, sizeof escaped, "\\u%04x", c));
        } else {
            put(j, &value[i], 1);
        }
    }
    put(j, "\"", 1);
}

static void key_of(struct json *j, const char *key)
{
    put(j, ",", 1);
    quoted(j, key, strlen(key));
    put(j, ":", 1);
}

void json_begin(struct json *j, const char *op)
{
    j->length = 0;
    j->full = false;
    put(j, "{\"op\":", 6);
    quoted(j, op, strlen(op));
}

void json_string(struct json *j, const char *key, const char *value)
{
    key_of(j, key);
    quoted(j, value, strlen(value));
}

void json_number(struct json *j, const char *key, int64_t value)
{
    char digits[24];
    key_of(j, key);
    put(j, digits, (size_t)snprintf(digits, sizeof digits, "%" PRId64, value));
}

void json_unsigned(struct json *j, const char *key, uint64_t value)
{
    char digits[24];
    key_of(j, key);
    put(j, digits, (size_t)snprintf(digits, sizeof digits, "%" PRIu64, value));
}

void json_true(struct json *j, const char *key)
{
    key_of(j, key);
    put(j, "true", 4);
}

void json_list(struct json *j, const char *key, const char *commas)
{
    key_of(j, key);
    put(j, "[", 1);
    while (*commas) {
        size_t length = strcspn(commas, ",");
        quoted(j, commas, length);
        commas += length;
        if (*commas == ',') {
            commas++;
            put(j, ",", 1);
        }
    }
    put(j, "]", 1);
}

void json_end(struct json *j)
{
    put(j, "}", 1);
}

static const char *blank(const char *at)
{
    while (isspace((unsigned char)*at))
        at++;
    return at;
}

/* Past the string that starts at `at` (a quote), or NULL when it does not end. */
static const char *past_string(const char *at)
{
    for (at++; *at && *at != '"'; at++)
        if (*at == '\\' && !*++at)
            return NULL;
    return *at ? at + 1 : NULL;
}

/* Past the value that starts at `at`, whatever it is, or NULL when it does not end. */
static const char *past_value(const char *at)
{
    int depth = 0;
    do {
        at = blank(at);
        if (!*at)
            return NULL;
        if (*at == '"') {
            at = past_string(at);
            if (!at)
                return NULL;
        } else if (*at == '{' || *at == '[') {
            depth++;
            at++;
        } else if (*at == '}' || *at == ']') {
            depth--;
            at++;
        } else if (*at == ',' || *at == ':') {
            if (!depth)
                return NULL;
            at++;
        } else {
            at += strcspn(at, ",:{}[]\" \t\r\n");
        }
    } while (depth > 0);
    return depth ? NULL : at;
}

const char *json_find(const char *text, const char *key)
{
    const char *at = blank(text);
    if (*at != '{')
        return NULL;
    at = blank(at + 1);
    while (at && *at == '"') {
        const char *name = at + 1;
        at = past_string(at);
        if (!at)
            return NULL;
        size_t length = (size_t)(at - 1 - name);
        at = blank(at);
        if (*at != ':')
            return NULL;
        at = blank(at + 1);
        if (strlen(key) == length && !strncmp(name, key, length))
            return at;
        at = past_value(at);
        if (at)
            at = blank(at);
        if (at && *at == ',')
            at = blank(at + 1);
    }
    return NULL;
}

bool json_get_unsigned(const char *text, const char *key, uint64_t *value)
{
    const char *at = json_find(text, key);
    if (!at || !isdigit((unsigned char)*at))
        return false;
    *value = strtoull(at, NULL, 10);
    return true;
}

bool json_get_number(const char *text, const char *key, int64_t *value)
{
    const char *at = json_find(text, key);
    if (!at || (*at != '-' && !isdigit((unsigned char)*at)))
        return false;
    *value = strtoll(at, NULL, 10);
    return true;
}

bool json_get_true(const char *text, const char *key)
{
    const char *at = json_find(text, key);
    return at && !strncmp(at, "true", 4);
}

bool json_get_string(const char *text, const char *key, char *value, size_t size)
{
    const char *at = json_find(text, key);
    if (!at || *at != '"' || !size)
        return false;
    const char *end = past_string(at);
    if (!end)
        return false;
    size_t n = 0;
    for (at++; at < end - 1 && n < size - 1; at++) {
        char c = *at;
        if (c == '\\') {
            c = *++at;
            if (c == 'n' || c == 't' || c == 'r')
                c = ' ';
            if (c == 'u') { /* not ASCII: names are, and of a message a mark is enough */
                c = '?';
                at += at + 4 < end - 1 ? 4 : 0;
            }
        }
        value[n++] = c;
    }
    value[n] = 0;
    return true;
}

const char *json_next_object(const char **at)
{
    const char *start = blank(*at);
    if (*start == '[' || *start == ',')
        start = blank(start + 1);
    if (*start != '{')
        return NULL;
    const char *end = past_value(start);
    if (!end)
        return NULL;
    *at = end;
    return start;
}
