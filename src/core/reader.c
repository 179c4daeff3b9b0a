/* Frames out of a control socket, never a byte further than the frame. */
#include "reader.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "fd.h"
#include "fdpass.h"

enum {
    SMALL = 512,
    CHUNK = 64 << 10, /* what is kept, and the first allocation */
};

void
afork_reader_init(struct afork_reader *r, enum afork_direction direction)
{
    memset(r, 0, sizeof *r);
    r->direction = direction;
    r->frame_max = AFORK_FRAME_MAX;
}

void
afork_reader_prepare(struct afork_reader *r)
{
    r->payload = malloc(SMALL);
    r->payload_cap = r->payload ? SMALL : 0;
}

void
afork_reader_reset(struct afork_reader *r)
{
    r->head_got = r->payload_got = 0;
}

void
afork_reader_free(struct afork_reader *r)
{
    free(r->payload);
    r->payload = NULL;
    r->head_got = r->payload_got = r->payload_cap = 0;
}

/* Bytes that may carry no descriptor: > 0, 0 to wait, or an error. */
static int
recv_plain(int sock, uint8_t *at, uint32_t want)
{
    int fd = AFORK_NOFD;
    ssize_t n = afork_fdpass_recv(sock, at, want, &fd);

    if (n == -EAGAIN)
        return 0;
    if (n == 0 || n == -ECONNRESET)
        return -EPIPE; /* a peer that died with our bytes unread */
    if (n < 0)
        return (int)n;
    if (fd != AFORK_NOFD) {
        afork_fd_close(&fd);
        return -EPROTO;
    }
    return (int)n;
}

static int
recv_fd(int sock, int *ret_fd)
{
    uint8_t byte = 0;
    int fd = AFORK_NOFD;
    ssize_t n = afork_fdpass_recv(sock, &byte, 1, &fd);

    if (n == -EAGAIN)
        return 0;
    if (n == 0 || n == -ECONNRESET)
        return -EPIPE;
    if (n < 0)
        return (int)n;
    if (byte != 0 || fd == AFORK_NOFD) {
        afork_fd_close(&fd);
        return -EPROTO;
    }
    *ret_fd = fd;
    return 1;
}

/* Room for more of a payload of len bytes, as far as it has arrived. */
static int
grow(struct afork_reader *r, uint32_t len)
{
    uint32_t cap = r->payload_cap < CHUNK ? CHUNK : r->payload_cap;
    uint8_t *p;

    if (r->payload_got < r->payload_cap)
        return 0;
    if (r->payload_cap >= CHUNK)
        cap = cap > len / 2 ? len : cap * 2;
    if (cap > len)
        cap = len;
    p = realloc(r->payload, cap);
    if (!p)
        return -ENOMEM;
    r->payload = p;
    r->payload_cap = cap;
    return 0;
}

int
afork_reader_next(struct afork_reader *r, int sock, struct afork_frame *ret_frame)
{
    uint32_t len;
    int fd = AFORK_NOFD, n;

    while (r->head_got < AFORK_HEAD_SIZE) {
        n = recv_plain(sock, r->head + r->head_got, AFORK_HEAD_SIZE - r->head_got);
        if (n <= 0)
            return n;
        r->head_got += (uint32_t)n;
        /* The buffer of the frame before lasts until here. */
        if (r->payload_cap > CHUNK) {
            free(r->payload);
            r->payload = NULL;
            r->payload_cap = 0;
        }
        r->payload_got = 0;
    }
    len = afork_wire_head_len(r->head);
    if (len > r->frame_max)
        return -EMSGSIZE;
    while (r->payload_got < len) {
        uint32_t room;

        n = grow(r, len);
        if (n < 0)
            return n;
        room = (r->payload_cap < len ? r->payload_cap : len) - r->payload_got;
        n = recv_plain(sock, r->payload + r->payload_got, room);
        if (n <= 0)
            return n;
        r->payload_got += (uint32_t)n;
    }
    if (afork_wire_has_fd(r->direction, r->head[0])) {
        n = recv_fd(sock, &fd);
        if (n <= 0)
            return n;
    }

    r->head_got = 0;
    *ret_frame = (struct afork_frame){
        .letter = r->head[0],
        .len = len,
        .payload = r->payload,
        .fd = fd,
    };
    return 1;
}
