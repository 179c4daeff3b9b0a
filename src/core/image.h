/*
 * The interpreter's text in a template, arranged so that a fork copies what
 * the workers use of it.
 *
 * fork(2) leaves out the page tables of text: a worker maps it again, by some
 * thirty page faults that bring 64 KiB each, and all that is taken down when
 * it ends.  But it copies the entries of private pages, which are few: so the
 * pages that are used are made private, with the same contents, and the others
 * are unmapped.  They come back when they are touched.
 *
 * What is used is found out by a trial: in a copy of the template every page
 * is missing until it is touched, and so in a worker of that copy.  Nothing
 * here allocates: one write to a huge page, which children share, splits it.
 */
#ifndef AFORK_IMAGE_H
#define AFORK_IMAGE_H

#include <stddef.h>
#include <stdint.h>

enum {
    AFORK_IMAGE_REGIONS = 32,
    AFORK_IMAGE_PAGES = 4096, /* what is larger than 16 MiB is left alone */
};

struct afork_region {
    uintptr_t start;
    size_t pages;
    size_t first; /* number of its first page in the image */
    unsigned long inode;
};

struct afork_image {
    struct afork_region regions[AFORK_IMAGE_REGIONS];
    size_t n;
    size_t pages;
    uint8_t used[AFORK_IMAGE_PAGES / 8]; /* a bit for each page */
};

/* Looks at the text of this process and shares the result with the processes
 * that are forked from now on.  NULL with -errno: -ENOENT if there is none. */
struct afork_image *afork_image_new(int *ret_error);
void afork_image_free(struct afork_image *image);

/* In the copy: nothing is mapped, and then one page at a time.  -errno. */
int afork_image_try(const struct afork_image *image);

/* At the end of a process of the trial: notes what it has touched. */
void afork_image_note(struct afork_image *image);

/*
 * In the template: makes the used pages private and unmaps the others, of
 * each mapping where that is worth it.  Returns the number of private pages,
 * or -errno; what has been done before an error does no harm.
 */
int afork_image_apply(struct afork_image *image);

/* Once more, after other code has run: unmaps what is not used. */
void afork_image_clear(struct afork_image *image);

#endif
