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
#include "heapfile.h"

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

/* The number in a line of smaps, in bytes; 0 if there is none. */
static int64_t
find_size(const char *text, const char *name)
{
    const char *found = strstr(text, name);

    return found ? strtoll(found + strlen(name), NULL, 10) * 1024 : 0;
}

int64_t
afork_huge_bytes(void)
{
    char text[2048];
    ssize_t n = read_text("/proc/self/smaps_rollup", text, sizeof text);

    return n < 0 ? n
                 : find_size(text, "\nAnonHugePages:") +
                       find_size(text, "\nShmemPmdMapped:");
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

int
afork_huge_make(void *at)
{
    return madvise(at, AFORK_HUGE_SIZE, MADV_COLLAPSE) < 0 ? -errno : 0;
}

struct work {
    const void *const *keep;
    size_t n;
    int (*movable)(const void *at);
    struct afork_heapfile file; /* while one is open, else its fd is none */
    struct afork_collapse *ret;
};

/* Whether it is in the file now. */
static int
move(struct work *w, void *at)
{
    int r;

    if (!w->movable || w->ret->move_error || !w->movable(at))
        return 0;
    r = w->file.fd < 0 ? afork_heapfile_open(&w->file) : 0;
    if (r == 0)
        r = afork_heapfile_move(&w->file, at);
    if (r < 0) {
        w->ret->move_error = -r;
        return 0;
    }
    w->ret->moved += AFORK_HUGE_SIZE;
    return 1;
}

static void
collapse(struct work *w, uintptr_t start, uintptr_t end)
{
    uintptr_t at = (start + AFORK_HUGE_SIZE - 1) & ~(AFORK_HUGE_SIZE - 1);

    for (; at < end && end - at >= AFORK_HUGE_SIZE; at += AFORK_HUGE_SIZE) {
        int r;

        if (is_kept(at, w->keep, w->n) || !is_used((void *)at))
            continue;
        r = move(w, (void *)at) ? 0 : afork_huge_make((void *)at);
        if (r == 0) {
            w->ret->bytes += AFORK_HUGE_SIZE;
        } else {
            w->ret->refused += AFORK_HUGE_SIZE;
            w->ret->error = -r;
        }
    }
}

int
afork_huge_collapse(const void *const *keep, size_t n,
                    int (*movable)(const void *at), struct afork_collapse *ret)
{
    struct work w = {keep, n, movable, {.fd = AFORK_NOFD}, ret};
    FILE *maps = fopen("/proc/self/maps", "re");
    char *line = NULL;
    size_t size = 0;
    uintptr_t start, end;

    memset(ret, 0, sizeof *ret);
    if (!maps)
        return -errno;
    while (getline(&line, &size, maps) > 0)
        if (parse(line, &start, &end))
            collapse(&w, start, end);
    free(line);
    fclose(maps);
    if (w.file.fd >= 0)
        afork_heapfile_close(&w.file);
    return 0;
}
