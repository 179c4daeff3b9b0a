/* What the limit programs share: their end, their clock, their memory. */
#ifndef AFORK_BENCH_LIMITS_H
#define AFORK_BENCH_LIMITS_H

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <time.h>

enum { LIMITS_PAGE = 4096 };

static inline _Noreturn void
die(const char *what)
{
    fprintf(stderr, "%s: %s: %s\n", program_invocation_short_name, what,
            strerror(errno));
    exit(1);
}

static inline double
now(void)
{
    struct timespec ts;

    if (clock_gettime(CLOCK_MONOTONIC, &ts) < 0)
        die("clock_gettime");
    return (double)ts.tv_sec + (double)ts.tv_nsec * 1e-9;
}

/* CPU seconds: RUSAGE_SELF, or RUSAGE_CHILDREN for those waited for. */
static inline double
cpu_of(int who)
{
    struct rusage usage;

    if (getrusage(who, &usage) < 0)
        die("getrusage");
    return (double)(usage.ru_utime.tv_sec + usage.ru_stime.tv_sec) +
           (double)(usage.ru_utime.tv_usec + usage.ru_stime.tv_usec) * 1e-6;
}

/* Ordinary pages whatever the machine's huge page setting says: fork pays for
 * each of them. */
static inline void
touch(size_t mb)
{
    size_t size = mb << 20;
    char *memory;

    if (size == 0)
        return;
    memory = mmap(NULL, size, PROT_READ | PROT_WRITE,
                  MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED)
        die("mmap");
    /* Fails only where there are no huge pages. */
    (void)madvise(memory, size, MADV_NOHUGEPAGE);
    for (size_t at = 0; at < size; at += LIMITS_PAGE)
        memory[at] = 1;
}

#endif
