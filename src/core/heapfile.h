/*
 * A template's heap as a private mapping of a file of memory.
 *
 * fork(2) copies the entries of anonymous memory, those of huge pages too, and
 * the end of the child takes them down again.  Entries of a file it leaves out:
 * the child maps what it reads when it reads it, 2 MiB at a time.  So a start
 * costs the same from a heap of any size.  What is written becomes private as
 * always, page by page.
 */
#ifndef AFORK_HEAPFILE_H
#define AFORK_HEAPFILE_H

#include <stdint.h>

struct afork_heapfile {
    int fd;       /* owned */
    int64_t size; /* in bytes, so far */
    char *space;  /* owned: addresses, enough for an aligned huge page */
};

/* Makes an empty file; -errno, and then there is nothing to close. */
int afork_heapfile_open(struct afork_heapfile *file);

/*
 * Moves the 2 MiB at an aligned address into the file, as one huge page; what
 * they hold does not change.  No other thread may write there meanwhile.
 * -errno, and then they are as they were.
 */
int afork_heapfile_move(struct afork_heapfile *file, void *at);

/* What has been moved stays as long as a process has it mapped. */
void afork_heapfile_close(struct afork_heapfile *file);

#endif
