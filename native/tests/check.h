// What the plain executables among the tests count. One of them is one translation unit.
#pragma once

#include <cstddef>
#include <cstdio>

static size_t n_checks = 0, n_failures = 0;

// printf's arguments say what was checked.
#define CHECK(condition, ...)                                           \
    do {                                                                \
        n_checks++;                                                     \
        if (!(condition) && n_failures++ < 40) {                        \
            std::printf("%s:%d: %s: ", __FILE__, __LINE__, #condition); \
            std::printf(__VA_ARGS__);                                   \
            std::printf("\n");                                          \
        }                                                               \
    } while (0)
