/* For programs of libhotpot that test it: one that finds something wrong says where, and why, and ends. */
#pragma once
#include <hotpot.h>
#include <stdio.h>
#include <stdlib.h>

#define CHECK(condition)                                                                            \
    do {                                                                                            \
        if (!(condition)) {                                                                         \
            fprintf(stderr, "line %d: %s: %s (%s)\n", __LINE__, #condition, HP_error(), HP_error_name()); \
            exit(1);                                                                                \
        }                                                                                           \
    } while (0)
