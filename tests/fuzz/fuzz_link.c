/*
 * RPC frames out of a socket, from a peer that may send anything, descriptors
 * included, and from a link, between them.
 *
 * Input: sends: how many descriptors (2 bits), whether to receive after it
 * (bit 2), whether it is a frame sent by a link with that payload (bit 3), its
 * kind (the other bits); a length; that many bytes.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "fd.h"
#include "fdpass.h"
#include "link.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static volatile unsigned sum; /* makes the payload be looked at */

static void
check(int good)
{
    if (!good)
        abort();
}

/* What is complete; the descriptors are closed, as a caller would. */
static void
take_ready(struct afork_link *l)
{
    struct afork_link_frame frame;

    while (afork_link_peek(l, &frame)) {
        check(frame.len <= AFORK_LINK_FRAME_MAX);
        for (uint32_t i = 0; i < frame.len; i++)
            sum += frame.payload[i];
        for (int i = 0; i < frame.nfds; i++) {
            int fd = frame.fds[i];

            check(fd >= 0);
            check(close(fd) == 0);
        }
        afork_link_take(l);
    }
}

/* Receives what is there: whether the link can still be used. */
static int
receive(struct afork_link *l)
{
    int r;

    while ((r = afork_link_fill(l, 0)) > 0)
        take_ready(l);
    check(r == 0 || r == -EPIPE || r == -EPROTO);
    check(!afork_link_ready(l));
    check(r == 0 || afork_link_fill(l, 0) == r); /* and it stays so */
    return r == 0;
}

/* Whether all of it was sent; a cut frame would be the harness's fault. */
static int
send_one(struct afork_link *from, int how, const uint8_t *data, size_t len)
{
    const int zeros[3] = {0, 0, 0};
    size_t n = how & 3;

    if (!(how & 8))
        return afork_fdpass_send_many(from->fd, data, len, zeros, n) ==
               (ssize_t)len;
    check(afork_link_send(from, (uint8_t)(how >> 4), len, data, len, zeros,
                          n) == 0);
    return afork_link_flush(from) == 1;
}

int
LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    const uint8_t *end = data + size;
    int before = dup(0), after, pair[2], open = 1;
    struct afork_link from, to;

    close(before);
    if (afork_fd_pair(pair) < 0)
        return 0;
    afork_link_init_take(&from, pair[0]);
    afork_link_init_take(&to, pair[1]);
    while (open && end - data > 2) {
        int how = data[0];
        size_t len = data[1] ? data[1] : 1;

        data += 2;
        if (len > (size_t)(end - data))
            len = (size_t)(end - data);
        if (!send_one(&from, how, data, len))
            break;
        if (how & 4)
            open = receive(&to);
        data += len;
    }
    if (open)
        open = receive(&to);
    afork_link_free(&from);
    if (open)
        check(!receive(&to));
    afork_link_free(&to);

    after = dup(0);
    check(after == before); /* every descriptor was closed or given */
    close(after);
    return 0;
}
