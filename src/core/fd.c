/* Descriptors: closing, duplicating and marking them. */
#define _GNU_SOURCE
#include "fd.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/ioctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#ifndef SYS_close_range
#define SYS_close_range 436
#endif
#define CLOSE_RANGE_CLOEXEC_FLAG (1U << 2)

void
afork_fd_close(int *fd)
{
    int saved = errno;

    /* No retry on EINTR: Linux has freed the number already. */
    if (*fd >= 0)
        close(*fd);
    *fd = AFORK_NOFD;
    errno = saved;
}

int
afork_fd_dup(int fd)
{
    int r = fcntl(fd, F_DUPFD_CLOEXEC, 3);

    return r < 0 ? -errno : r;
}

int
afork_fd_nonblock(int fd, int on)
{
    return ioctl(fd, FIONBIO, &on) < 0 ? -errno : 0;
}

int
afork_fd_pair(int ret_fd[2])
{
    int pair[2] = {AFORK_NOFD, AFORK_NOFD}, r = 0;

    if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) < 0)
        return -errno;
    for (int i = 0; i < 2; i++) {
        if (pair[i] > 2)
            continue;
        r = afork_fd_dup(pair[i]);
        if (r < 0)
            goto out;
        afork_fd_close(&pair[i]);
        pair[i] = r;
    }

    ret_fd[0] = pair[0];
    ret_fd[1] = pair[1];
    return 0;
out:
    afork_fd_close(&pair[0]);
    afork_fd_close(&pair[1]);
    return r;
}

int
afork_fd_cloexec_from(unsigned low)
{
    struct rlimit limit;

    if (syscall(SYS_close_range, low, ~0U, CLOSE_RANGE_CLOEXEC_FLAG) == 0)
        return 0;
    /*
     * Linux 5.10 knows close_range but not this flag.  A descriptor above a
     * limit that was lowered later is missed here; /proc would need a
     * directory descriptor and a buffer between vfork and exec.
     */
    if (getrlimit(RLIMIT_NOFILE, &limit) < 0)
        return -errno;
    for (unsigned fd = low; fd < limit.rlim_cur; fd++) {
        int flags = fcntl((int)fd, F_GETFD);

        if (flags >= 0 && !(flags & FD_CLOEXEC))
            fcntl((int)fd, F_SETFD, flags | FD_CLOEXEC);
    }
    return 0;
}
