/* The interpreter's text in a template, see image.h. */
#define _GNU_SOURCE
#include "image.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "fd.h"

enum {
    PAGE = 4096,
    AROUND = 16, /* pages that the kernel maps at one fault */
    FEW = 4,     /* faults that a private mapping costs as much as */
    CHUNK = 512, /* entries of the page map that are read at once */
};

/* Of an entry of the page map, see proc_pid_pagemap(5). */
#define PRESENT ((uint64_t)1 << 63)
#define SWAPPED ((uint64_t)1 << 62)
#define OF_FILE ((uint64_t)1 << 61)

/* The lines of maps, without stdio, which allocates. */
struct lines {
    int fd; /* owned */
    size_t at, end;
    char buf[2048];
    char line[128]; /* as much as goes in: names are not looked at */
};

static int
open_lines(struct lines *l)
{
    l->fd = open("/proc/self/maps", O_RDONLY | O_CLOEXEC);
    l->at = l->end = 0;
    return l->fd < 0 ? -errno : 0;
}

static int
next_byte(struct lines *l)
{
    if (l->at == l->end) {
        ssize_t n = read(l->fd, l->buf, sizeof l->buf);

        if (n <= 0)
            return EOF;
        l->at = 0;
        l->end = (size_t)n;
    }
    return (unsigned char)l->buf[l->at++];
}

/* The next one in l->line; 0 behind the last. */
static int
next_line(struct lines *l)
{
    size_t n = 0;
    int c;

    while ((c = next_byte(l)) != EOF && c != '\n')
        if (n < sizeof l->line - 1)
            l->line[n++] = (char)c;
    l->line[n] = 0;
    return c != EOF;
}

static int
is_used(const struct afork_image *image, const struct afork_region *r,
        size_t at)
{
    return image->used[(r->first + at) / 8] >> (r->first + at) % 8 & 1;
}

/* Text of a file, from a line of maps. */
static int
parse(const char *line, struct afork_region *ret)
{
    uintptr_t end;
    char *at;

    ret->start = strtoul(line, &at, 16);
    end = strtoul(at + 1, &at, 16); /* behind the "-" */
    ret->pages = (end - ret->start) / PAGE;
    if (strncmp(at, " r-xp ", 6) != 0)
        return 0;
    strtoul(at + 6, &at, 16); /* offset */
    at = strchr(at + 1, ' '); /* device */
    ret->inode = at ? strtoul(at, NULL, 10) : 0;
    return ret->inode != 0;
}

/* Entries of the page map; 0, or -errno. */
static int
read_map(int pagemap, const struct afork_region *r, size_t at, size_t n,
         uint64_t *ret)
{
    ssize_t got = pread(pagemap, ret, n * sizeof *ret,
                        (off_t)((r->start / PAGE + at) * sizeof *ret));

    return got < 0 ? -errno : got != (ssize_t)(n * sizeof *ret) ? -EIO : 0;
}

static size_t
chunk(const struct afork_region *r, size_t at)
{
    return r->pages - at < CHUNK ? r->pages - at : CHUNK;
}

/* Whether nobody has written there: not a debugger, nor a relocation, and not
 * we ourselves. */
static int
is_clean(int pagemap, const struct afork_region *r, size_t at, size_t end)
{
    uint64_t map[CHUNK];

    for (; at < end; at += CHUNK) {
        size_t n = end - at < CHUNK ? end - at : CHUNK;

        if (read_map(pagemap, r, at, n, map) < 0)
            return 0;
        for (size_t i = 0; i < n; i++)
            if (map[i] & SWAPPED || (map[i] & PRESENT && !(map[i] & OF_FILE)))
                return 0;
    }
    return 1;
}

static void
scan(struct afork_image *image, struct lines *maps, int pagemap)
{
    while (next_line(maps)) {
        struct afork_region *r = &image->regions[image->n];

        if (image->n == AFORK_IMAGE_REGIONS)
            break;
        if (!parse(maps->line, r) || r->pages < AROUND ||
            r->pages > AFORK_IMAGE_PAGES - image->pages ||
            !is_clean(pagemap, r, 0, r->pages))
            continue;
        r->first = image->pages;
        image->pages += r->pages;
        image->n++;
    }
}

struct afork_image *
afork_image_new(int *ret_error)
{
    struct afork_image *image = NULL;
    int pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
    struct lines maps = {.fd = AFORK_NOFD};

    *ret_error = pagemap < 0 ? -errno : open_lines(&maps);
    if (*ret_error == 0 && sysconf(_SC_PAGESIZE) != PAGE)
        *ret_error = -ENOSYS;
    if (*ret_error == 0) {
        image = mmap(NULL, sizeof *image, PROT_READ | PROT_WRITE,
                     MAP_SHARED | MAP_ANONYMOUS, -1, 0);
        if (image == MAP_FAILED) {
            *ret_error = -errno;
            image = NULL;
        } else {
            scan(image, &maps, pagemap);
        }
    }
    afork_fd_close(&maps.fd);
    afork_fd_close(&pagemap);
    if (image && !image->n) {
        afork_image_free(image);
        *ret_error = -ENOENT;
        image = NULL;
    }
    return image;
}

void
afork_image_free(struct afork_image *image)
{
    if (image)
        munmap(image, sizeof *image);
}

static void *
page_of(const struct afork_region *r, size_t at)
{
    return (void *)(r->start + at * PAGE);
}

/* Text is never written: what is dropped is read from the file again. */
static int
drop(const struct afork_region *r, size_t at, size_t pages)
{
    return madvise(page_of(r, at), pages * PAGE, MADV_DONTNEED) < 0 ? -errno
                                                                    : 0;
}

int
afork_image_try(const struct afork_image *image)
{
    int result = 0;

    /* A fault maps its surroundings too, but never of another mapping: so
     * each page gets one of its own. */
    for (size_t i = 0; i < image->n; i++)
        for (size_t at = 0; at < image->regions[i].pages; at += 2)
            if (madvise(page_of(&image->regions[i], at), PAGE, MADV_RANDOM) <
                0)
                return -errno;
    for (size_t i = 0; i < image->n && result == 0; i++)
        result = drop(&image->regions[i], 0, image->regions[i].pages);
    return result;
}

void
afork_image_note(struct afork_image *image)
{
    int pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
    uint64_t map[CHUNK];

    for (size_t i = 0; pagemap >= 0 && i < image->n; i++) {
        const struct afork_region *r = &image->regions[i];

        for (size_t at = 0; at < r->pages; at += CHUNK) {
            size_t n = chunk(r, at);

            if (read_map(pagemap, r, at, n, map) < 0)
                break;
            for (size_t j = 0; j < n; j++)
                if (map[j] & (PRESENT | SWAPPED))
                    image->used[(r->first + at + j) / 8] |=
                        (uint8_t)(1 << (r->first + at + j) % 8);
        }
    }
    afork_fd_close(&pagemap);
}

/* Forgets the regions that are not mapped any more as they were. */
static int
confirm(struct afork_image *image)
{
    unsigned char found[AFORK_IMAGE_REGIONS] = {0};
    struct afork_region now;
    struct lines maps;
    size_t kept = 0;
    int r = open_lines(&maps);

    if (r < 0)
        return r;
    while (next_line(&maps))
        for (size_t i = 0; i < image->n; i++)
            if (parse(maps.line, &now) &&
                now.start == image->regions[i].start &&
                now.pages == image->regions[i].pages &&
                now.inode == image->regions[i].inode)
                found[i] = 1;
    afork_fd_close(&maps.fd);
    for (size_t i = 0; i < image->n; i++)
        if (found[i])
            image->regions[kept++] = image->regions[i];
    image->n = kept;
    return 0;
}

/* Whether a worker takes enough faults there that private pages are cheaper. */
static int
is_worth_it(const struct afork_image *image, const struct afork_region *r)
{
    size_t faults = 0, last = SIZE_MAX;

    for (size_t at = 0; at < r->pages; at++) {
        size_t around = (r->start / PAGE + at) / AROUND;

        if (!is_used(image, r, at) || around == last)
            continue;
        last = around;
        faults++;
    }
    return faults >= FEW;
}

/* Gives a page the contents that it has; whoever executes it does not see. */
static int
make_private(int mem, const void *page)
{
    ssize_t n = pwrite(mem, page, PAGE, (off_t)(uintptr_t)page);

    return n == PAGE ? 0 : n < 0 ? -errno : -EIO;
}

int
afork_image_apply(struct afork_image *image)
{
    size_t kept = 0;
    int mem, pages = 0, result = confirm(image);

    if (result < 0)
        return result;
    mem = open("/proc/self/mem", O_RDWR | O_CLOEXEC);
    if (mem < 0)
        return -errno;
    for (size_t i = 0; i < image->n; i++)
        if (is_worth_it(image, &image->regions[i]))
            image->regions[kept++] = image->regions[i];
    image->n = kept;
    for (size_t i = 0; i < image->n && result == 0; i++) {
        const struct afork_region *r = &image->regions[i];

        for (size_t at = 0; at < r->pages && result == 0; at++) {
            if (!is_used(image, r, at))
                continue;
            result = make_private(mem, page_of(r, at));
            pages++;
        }
    }
    afork_fd_close(&mem);
    if (result == 0)
        afork_image_clear(image);
    return result < 0 ? result : pages;
}

void
afork_image_clear(struct afork_image *image)
{
    int pagemap;

    if (confirm(image) < 0)
        return;
    pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
    if (pagemap < 0)
        return;
    for (size_t i = 0; i < image->n; i++) {
        const struct afork_region *r = &image->regions[i];

        for (size_t at = 0, end; at < r->pages; at = end) {
            int used = is_used(image, r, at);

            for (end = at; end < r->pages && is_used(image, r, end) == used;)
                end++;
            /* Somebody else may have written there since. */
            if (!used && is_clean(pagemap, r, at, end))
                drop(r, at, end - at);
        }
    }
    afork_fd_close(&pagemap);
}
