/*
 * Huge pages for what a template has loaded.
 *
 * fork(2) copies one page table entry for each page, and the end of the child
 * takes it down again.  In huge pages that is one entry for 2 MiB instead of
 * 512, so a start from a big template costs what one from a small one does.
 */
#ifndef AFORK_HUGEPAGE_H
#define AFORK_HUGEPAGE_H

#include <stddef.h>
#include <stdint.h>

#define AFORK_HUGE_SIZE ((size_t)2 << 20)

/* What there is of huge pages here. */
enum afork_huge {
    AFORK_HUGE_OK,
    AFORK_HUGE_NEVER,       /* the administrator wants none, or the kernel has
                               none of 2 MiB */
    AFORK_HUGE_NO_COLLAPSE, /* only from birth: a kernel before 6.1 */
};

/* Looks once for every call: it may be changed at any time. */
enum afork_huge afork_huge_probe(void);

/* Bytes of private memory in use, nearly: cheap to ask.  -errno. */
int64_t afork_huge_private(void);

/* Bytes in huge pages, from the kernel's books.  -errno. */
int64_t afork_huge_bytes(void);

struct afork_collapse {
    uint64_t bytes;   /* in huge pages now */
    uint64_t refused; /* bytes that stayed in small ones */
    int error;        /* why the last of them did: an errno */
    uint64_t moved;   /* of those in huge pages: into a file */
    int move_error;   /* why no more of them: an errno, or 0 */
};

/* Makes the 2 MiB at an aligned address one huge page.  -errno. */
int afork_huge_make(void *at);

/*
 * Collapses private anonymous memory into huge pages wherever at least half of
 * one is in use, but for those that hold an address to be kept: what will be
 * written between forks would split them again.  Those of which movable says
 * yes are moved into a file, see heapfile.h; it may be NULL.  -errno if the
 * mappings cannot be read.
 */
int afork_huge_collapse(const void *const *keep, size_t n,
                        int (*movable)(const void *at),
                        struct afork_collapse *ret);

#endif
