/* Huge pages for what a template has loaded. */
#define _GNU_SOURCE
#include "hugepage.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "fd.h"

#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25
#endif

#define THP "/sys/kernel/mm/transparent_hugepage/"

/* The beginning of a small file as a string; its length or -errno. */
static ssize_t
read_text(const char *path, char *text, size_t size)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    ssize_t n;

    if (fd < 0)
        return -errno;
    n = read(fd, text, size - 1);
    if (n < 0)
        n = -errno;
    text[n > 0 ? n : 0] = 0;
    afork_fd_close(&fd);
    return n;
}

enum afork_huge
afork_huge_probe(void)
{
    char text[64];

    if (read_text(THP "enabled", text, sizeof text) < 0 ||
        strstr(text, "[never]"))
        return AFORK_HUGE_NEVER;
    if (read_text(THP "hpage_pmd_size", text, sizeof text) < 0 ||
        strtoull(text, NULL, 10) != AFORK_HUGE_SIZE)
        return AFORK_HUGE_NEVER;
    /* Of no length: whether the advice is known is looked at first. */
    if (madvise(NULL, 0, MADV_COLLAPSE) < 0)
        return AFORK_HUGE_NO_COLLAPSE;
    return AFORK_HUGE_OK;
}

int64_t
afork_huge_private(void)
{
    char text[128], *at = text;
    ssize_t n = read_text("/proc/self/statm", text, sizeof text);
    long long resident, shared;

    if (n < 0)
        return n;
    strtoll(at, &at, 10);
    resident = strtoll(at, &at, 10);
    shared = strtoll(at, &at, 10);
    return (resident - shared) * sysconf(_SC_PAGESIZE);
}

int64_t
afork_huge_bytes(void)
{
    char text[2048], *found;
    ssize_t n = read_text("/proc/self/smaps_rollup", text, sizeof text);

    if (n < 0)
        return n;
    found = strstr(text, "\nAnonHugePages:");
    return found ? strtoll(found + sizeof "\nAnonHugePages:" - 1, NULL, 10) *
                       1024
                 : -ENOENT;
}

/* Whether a line of maps is memory that was allocated, and where it is. */
static int
parse(const char *line, uintptr_t *ret_start, uintptr_t *ret_end)
{
    char *at;
    const char *name;
    unsigned long inode;

    *ret_start = strtoul(line, &at, 16);
    *ret_end = strtoul(at + 1, &at, 16); /* behind the "-" */
    if (strncmp(at, " rw-p ", 6) != 0)
        return 0;
    strtoul(at + 6, &at, 16); /* offset */
    at = strchr(at + 1, ' '); /* device */
    if (!at)
        return 0;
    inode = strtoul(at, &at, 10);
    name = at + strspn(at, " ");
    return inode == 0 &&
           (*name == '\n' || strncmp(name, "[heap]", 6) == 0 ||
            strncmp(name, "[anon:", 6) == 0); /* no stack, no vdso */
}

static int
is_kept(uintptr_t at, const void *const *keep, size_t n)
{
    for (size_t i = 0; i < n; i++)
        if ((uintptr_t)keep[i] - at < AFORK_HUGE_SIZE)
            return 1;
    return 0;
}

/* Whether enough of the 2 MiB is in use that the rest is no waste. */
static int
is_used(void *at)
{
    unsigned char pages[AFORK_HUGE_SIZE / 4096];
    size_t n = AFORK_HUGE_SIZE / (size_t)sysconf(_SC_PAGESIZE), used = 0;

    if (n > sizeof pages || mincore(at, AFORK_HUGE_SIZE, pages) < 0)
        return 0;
    for (size_t i = 0; i < n; i++)
        used += pages[i] & 1;
    return used >= n / 2;
}

static void
collapse(uintptr_t start, uintptr_t end, const void *const *keep, size_t n,
         struct afork_collapse *ret)
{
    uintptr_t at = (start + AFORK_HUGE_SIZE - 1) & ~(AFORK_HUGE_SIZE - 1);

    for (; at < end && end - at >= AFORK_HUGE_SIZE; at += AFORK_HUGE_SIZE) {
        if (is_kept(at, keep, n) || !is_used((void *)at))
            continue;
        if (madvise((void *)at, AFORK_HUGE_SIZE, MADV_COLLAPSE) == 0) {
            ret->bytes += AFORK_HUGE_SIZE;
        } else {
            ret->refused += AFORK_HUGE_SIZE;
            ret->error = errno;
        }
    }
}

int
afork_huge_collapse(const void *const *keep, size_t n,
                    struct afork_collapse *ret)
{
    FILE *maps = fopen("/proc/self/maps", "re");
    char *line = NULL;
    size_t size = 0;
    uintptr_t start, end;

    memset(ret, 0, sizeof *ret);
    if (!maps)
        return -errno;
    while (getline(&line, &size, maps) > 0)
        if (parse(line, &start, &end))
            collapse(start, end, keep, n, ret);
    free(line);
    fclose(maps);
    return 0;
}
