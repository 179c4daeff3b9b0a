/* A template's heap as a private mapping of a file, see heapfile.h. */
#define _GNU_SOURCE
#include "heapfile.h"

#include <errno.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

#include "fd.h"
#include "hugepage.h"

#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22 /* Linux 5.14 */
#endif

enum { TRIES = 100 };

int
afork_heapfile_open(struct afork_heapfile *file)
{
    int error;

    file->size = 0;
    file->fd = memfd_create("afork heap", MFD_CLOEXEC);
    if (file->fd < 0)
        return -errno;
    file->space = mmap(NULL, 2 * AFORK_HUGE_SIZE, PROT_NONE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (file->space != MAP_FAILED)
        return 0;
    error = errno;
    afork_fd_close(&file->fd);
    return -error;
}

void
afork_heapfile_close(struct afork_heapfile *file)
{
    munmap(file->space, 2 * AFORK_HUGE_SIZE);
    afork_fd_close(&file->fd);
}

static int
resize(const struct afork_heapfile *file, int64_t size)
{
    struct rlimit limit;

    /* Beyond it there is not only an error, but a signal. */
    if (getrlimit(RLIMIT_FSIZE, &limit) == 0 && (rlim_t)size > limit.rlim_cur)
        return -EFBIG;
    return ftruncate(file->fd, size) < 0 ? -errno : 0;
}

/* A huge page behind the end of the file, and a shared mapping of it. */
static int
extend(const struct afork_heapfile *file, char *window)
{
    int r = resize(file, file->size + (int64_t)AFORK_HUGE_SIZE);

    if (r < 0)
        return r;
    /* A page must be there to be collapsed.  It is not made by touching it,
     * which without memory would be SIGBUS. */
    if (pwrite(file->fd, "", 1, file->size) < 0 ||
        mmap(window, AFORK_HUGE_SIZE, PROT_READ | PROT_WRITE,
             MAP_SHARED | MAP_FIXED, file->fd, file->size) == MAP_FAILED)
        return -errno;
    return afork_huge_make(window);
}

/*
 * Maps the copy in the place of what it is a copy of.  Not reserved: before
 * Linux 6.12 that can be refused when the old pages have gone already.  Should
 * the kernel have no memory for the mapping itself just then, nothing helps but
 * to try again; without success this process ends by SIGSEGV.
 */
static int
replace(const struct afork_heapfile *file, void *at)
{
    unsigned char pages[AFORK_HUGE_SIZE / 4096];
    int r = 0;

    for (int i = 0; i < TRIES; i++) {
        if (mmap(at, AFORK_HUGE_SIZE, PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_FIXED | MAP_NORESERVE, file->fd,
                 file->size) != MAP_FAILED)
            return 0;
        r = -errno;
        if (mincore(at, AFORK_HUGE_SIZE, pages) == 0)
            break; /* they are still there */
    }
    return r;
}

/* Copies what is there, and puts the copy in its place. */
static int
exchange(const struct afork_heapfile *file, char *window, void *at)
{
    sigset_t all, before;
    int r;

    /* What a handler wrote in between would be lost. */
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    memcpy(window, at, AFORK_HUGE_SIZE);
    r = replace(file, at);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return r;
}

int
afork_heapfile_move(struct afork_heapfile *file, void *at)
{
    size_t before = -(uintptr_t)file->space & (AFORK_HUGE_SIZE - 1);
    char *window = file->space + before;
    int r = extend(file, window);

    if (r == 0)
        r = exchange(file, window, at);
    if (r < 0) {
        resize(file, file->size);
        return r;
    }
    file->size += (int64_t)AFORK_HUGE_SIZE;
    /* While this process has it mapped as well, the kernel's books show it as
     * shared by those that use it. */
    madvise(at, AFORK_HUGE_SIZE, MADV_POPULATE_READ);
    return 0;
}
