/*
 * Frames out of a socket, from a peer that may send anything, descriptors
 * included.
 *
 * Input: a byte of flags, then sends: how many descriptors (2 bits) and
 * whether to read after it (bit 2); a length; that many bytes.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "fd.h"
#include "reader.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static volatile unsigned sum; /* makes the payload be looked at */

static void
check(int good)
{
    if (!good)
        abort();
}

static void
send_some(int sock, const uint8_t *at, size_t len, int fds)
{
    union {
        struct cmsghdr align;
        char space[CMSG_SPACE(3 * sizeof(int))];
    } control;
    struct iovec iov = {.iov_base = (void *)(uintptr_t)at, .iov_len = len};
    struct msghdr msg = {.msg_iov = &iov, .msg_iovlen = 1};
    const int zeros[3] = {0, 0, 0};

    if (fds) {
        memset(&control, 0, sizeof control);
        msg.msg_control = control.space;
        msg.msg_controllen = CMSG_SPACE((size_t)fds * sizeof(int));
        struct cmsghdr *c = CMSG_FIRSTHDR(&msg);
        c->cmsg_level = SOL_SOCKET;
        c->cmsg_type = SCM_RIGHTS;
        c->cmsg_len = CMSG_LEN((size_t)fds * sizeof(int));
        memcpy(CMSG_DATA(c), zeros, (size_t)fds * sizeof(int));
    }
    sendmsg(sock, &msg, MSG_NOSIGNAL | MSG_DONTWAIT);
}

/* Takes what is there: whether the stream can still be used. */
static int
take(struct afork_reader *r, int sock)
{
    struct afork_frame frame;
    int got;

    while ((got = afork_reader_next(r, sock, &frame)) > 0) {
        check(frame.len <= r->frame_max);
        check((afork_wire_carry(r->direction, frame.letter) !=
               AFORK_CARRY_NONE) == (frame.fd >= 0));
        check(frame.fd >= 0 || frame.fd == AFORK_NOFD);
        for (uint32_t i = 0; i < frame.len; i++)
            sum += frame.payload[i];
        afork_fd_close(&frame.fd);
    }
    check(got == 0 || got == -EPIPE || got == -EPROTO || got == -EMSGSIZE);
    return got == 0;
}

int
LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    const uint8_t *end = data + size;
    int before = dup(0), after, pair[2], open = 1;
    struct afork_reader r;

    close(before);
    if (size < 1 || afork_fd_pair(pair) < 0)
        return 0;
    afork_reader_init(&r, *data & 1 ? AFORK_TO_PROCESS : AFORK_TO_APPLICATION);
    if (*data & 2)
        r.frame_max = 64;
    if (r.direction == AFORK_TO_APPLICATION)
        afork_reader_ahead(&r, (*data >> 3) + 1, *data & 4);
    data++;
    while (open && end - data > 2) {
        int how = data[0];
        size_t len = data[1] ? data[1] : 1;

        data += 2;
        if (len > (size_t)(end - data))
            len = (size_t)(end - data);
        send_some(pair[0], data, len, how & 3);
        if (how & 4)
            open = take(&r, pair[1]);
        data += len;
    }
    if (open)
        open = take(&r, pair[1]);
    afork_fd_close(&pair[0]);
    if (open)
        check(!take(&r, pair[1]));
    afork_reader_free(&r);
    afork_fd_close(&pair[1]);

    after = dup(0);
    check(after == before); /* every descriptor was closed or given */
    close(after);
    return 0;
}
