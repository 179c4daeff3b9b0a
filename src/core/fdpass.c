/*
 * The only place where a control socket is written or read.
 *
 * read(2) would destroy a descriptor that rides on the bytes, MSG_PEEK would
 * install it twice, and a control buffer of "one int" has room for two on
 * 64-bit Linux, the second of which would stay open unseen.  So everything
 * goes through these two functions, with room for as many as the kernel can
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
afork_fdpass_send(int sock, const void *data, size_t len, int fd)
{
    union {
        struct cmsghdr align;
        char space[CMSG_SPACE(sizeof(int))];
    } control;
    struct iovec iov = {.iov_base = (void *)(uintptr_t)data, .iov_len = len};
    struct msghdr msg = {.msg_iov = &iov, .msg_iovlen = 1};
    ssize_t n;

    /* A descriptor on no bytes vanishes without an error. */
    if (len == 0)
        return -EINVAL;
    if (fd >= 0) {
        memset(&control, 0, sizeof control);
        msg.msg_control = control.space;
        msg.msg_controllen = sizeof control.space;
        struct cmsghdr *c = CMSG_FIRSTHDR(&msg);
        c->cmsg_level = SOL_SOCKET;
        c->cmsg_type = SCM_RIGHTS;
        c->cmsg_len = CMSG_LEN(sizeof(int));
        memcpy(CMSG_DATA(c), &fd, sizeof fd);
    }
    do
        n = sendmsg(sock, &msg, MSG_NOSIGNAL | MSG_DONTWAIT);
    while (n < 0 && errno == EINTR);
    return n < 0 ? -errno : n;
}

/* Takes the descriptors out of one control message; returns their number. */
static size_t
take_fds(const struct cmsghdr *c, size_t found, int *first)
{
    size_t n = (c->cmsg_len - CMSG_LEN(0)) / sizeof(int);

    for (size_t i = 0; i < n; i++) {
        int fd;

        memcpy(&fd, CMSG_DATA(c) + i * sizeof fd, sizeof fd);
        if (found + i == 0)
            *first = fd;
        else
            afork_fd_close(&fd);
    }
    return n;
}

ssize_t
afork_fdpass_recv(int sock, void *data, size_t len, int *ret_fd)
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
    int fd = AFORK_NOFD;
    size_t found = 0;
    ssize_t n;

    do
        n = recvmsg(sock, &msg, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
    while (n < 0 && errno == EINTR);
    if (n < 0)
        return -errno;

    for (struct cmsghdr *c = CMSG_FIRSTHDR(&msg); c; c = CMSG_NXTHDR(&msg, c))
        if (c->cmsg_level == SOL_SOCKET && c->cmsg_type == SCM_RIGHTS)
            found += take_fds(c, found, &fd);
    if (found > 1 || (found == 1 && (msg.msg_flags & MSG_CTRUNC))) {
        /* The sender never puts two on one byte, whatever was cut off. */
        afork_fd_close(&fd);
        return -EPROTO;
    }
    /* Room was there for all of them: cut off means no slot in this process. */
    if (msg.msg_flags & MSG_CTRUNC)
        fd = AFORK_LOSTFD;

    *ret_fd = fd;
    return n;
}
