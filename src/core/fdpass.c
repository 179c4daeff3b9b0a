/*
 * The only place where a control socket is written or read.
 *
 * read(2) would destroy a descriptor that rides on the bytes, MSG_PEEK would
 * install it twice, and a control buffer of "one int" has room for two on
 * 64-bit Linux, the second of which would stay open unseen.  So everything
 * goes through the two functions of many, with room for as many as the kernel can
 * send at once.
 */
#define _GNU_SOURCE
#include "fdpass.h"

#include <errno.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>

#include "fd.h"

ssize_t
afork_fdpass_send_many(int sock, const void *data, size_t len, const int *fds,
                       size_t n)
{
    union {
        struct cmsghdr align;
        char space[CMSG_SPACE(AFORK_FDPASS_MAX * sizeof(int))];
    } control;
    struct iovec iov = {.iov_base = (void *)(uintptr_t)data, .iov_len = len};
    struct msghdr msg = {.msg_iov = &iov, .msg_iovlen = 1};
    ssize_t sent;

    /* A descriptor on no bytes vanishes without an error. */
    if (len == 0 || n > AFORK_FDPASS_MAX)
        return -EINVAL;
    if (n) {
        msg.msg_control = control.space;
        msg.msg_controllen = CMSG_SPACE(n * sizeof *fds);
        memset(&control, 0, msg.msg_controllen);
        struct cmsghdr *c = CMSG_FIRSTHDR(&msg);
        c->cmsg_level = SOL_SOCKET;
        c->cmsg_type = SCM_RIGHTS;
        c->cmsg_len = CMSG_LEN(n * sizeof *fds);
        memcpy(CMSG_DATA(c), fds, n * sizeof *fds);
    }
    do
        sent = sendmsg(sock, &msg, MSG_NOSIGNAL | MSG_DONTWAIT);
    while (sent < 0 && errno == EINTR);
    return sent < 0 ? -errno : sent;
}

ssize_t
afork_fdpass_send(int sock, const void *data, size_t len, int fd)
{
    return afork_fdpass_send_many(sock, data, len, &fd, fd >= 0);
}

/* Adds the descriptors of one control message to fds; their number. */
static size_t
take_fds(const struct cmsghdr *c, int *fds, size_t found)
{
    size_t n = (c->cmsg_len - CMSG_LEN(0)) / sizeof(int);

    for (size_t i = 0; i < n; i++) {
        int fd;

        memcpy(&fd, CMSG_DATA(c) + i * sizeof fd, sizeof fd);
        if (found < AFORK_FDPASS_MAX)
            fds[found++] = fd;
        else /* the kernel promises that there are no more */
            afork_fd_close(&fd);
    }
    return found;
}

ssize_t
afork_fdpass_recv_many(int sock, void *data, size_t len, int wait,
                       int fds[AFORK_FDPASS_MAX], size_t *ret_n)
{
    union {
        struct cmsghdr align;
        /* and room for credentials, should somebody have asked for them */
        char
            space[CMSG_SPACE(AFORK_FDPASS_MAX * sizeof(int)) + CMSG_SPACE(64)];
    } control;
    struct iovec iov = {.iov_base = data, .iov_len = len};
    struct msghdr msg = {
        .msg_iov = &iov,
        .msg_iovlen = 1,
        .msg_control = control.space,
        .msg_controllen = sizeof control.space,
    };
    size_t found = 0;
    ssize_t n;

    do
        n = recvmsg(sock, &msg, MSG_CMSG_CLOEXEC | (wait ? 0 : MSG_DONTWAIT));
    while (n < 0 && errno == EINTR && !wait);
    if (n < 0)
        return -errno;

    for (struct cmsghdr *c = CMSG_FIRSTHDR(&msg); c; c = CMSG_NXTHDR(&msg, c))
        if (c->cmsg_level == SOL_SOCKET && c->cmsg_type == SCM_RIGHTS)
            found = take_fds(c, fds, found);
    /* Room was there for all of them: cut off means no slot in this process. */
    if (msg.msg_flags & MSG_CTRUNC) {
        if (found == AFORK_FDPASS_MAX)
            afork_fd_close(&fds[--found]);
        fds[found++] = AFORK_LOSTFD;
    }

    *ret_n = found;
    return n;
}

ssize_t
afork_fdpass_recv(int sock, void *data, size_t len, int *ret_fd)
{
    int fds[AFORK_FDPASS_MAX];
    size_t found;
    ssize_t n = afork_fdpass_recv_many(sock, data, len, 0, fds, &found);

    if (n < 0)
        return n;
    if (found > 1) {
        /* The sender never puts two on one byte, whatever was cut off. */
        while (found)
            afork_fd_close(&fds[--found]);
        return -EPROTO;
    }

    *ret_fd = found ? fds[0] : AFORK_NOFD;
    return n;
}
