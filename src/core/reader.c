/* Frames out of a control socket, never a byte further than they go. */
#include "reader.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "fd.h"
#include "fdpass.h"
#include "lent.h"

enum { CHUNK = 64 << 10 }; /* what is kept, and the first allocation */

void
afork_reader_init(struct afork_reader *r, enum afork_direction direction)
{
    memset(r, 0, sizeof *r);
    r->head_fd = r->early_fd = AFORK_NOFD;
    r->direction = direction;
    r->frame_max = AFORK_FRAME_MAX;
}

void
afork_reader_lend(struct afork_reader *r, void *memory, uint32_t size)
{
    r->payload = r->lent = memory;
    r->payload_cap = r->lent_cap = size;
}

void
afork_reader_reset(struct afork_reader *r)
{
    afork_fd_close(&r->head_fd);
    afork_fd_close(&r->early_fd);
    r->head_got = r->payload_got = 0;
    r->early_at = r->early_end = 0;
    r->error = 0;
}

void
afork_reader_free(struct afork_reader *r)
{
    afork_reader_reset(r);
    afork_lent_free(r->payload, r->lent);
    free(r->early);
    r->payload = r->early = NULL;
    r->payload_cap = r->ahead = 0;
}

void
afork_reader_ahead(struct afork_reader *r, uint32_t bytes, int once)
{
    uint8_t *p = afork_reader_has_early(r) ? NULL : realloc(r->early, bytes);

    if (!p)
        return;
    r->early = p;
    r->ahead = bytes;
    r->ahead_once = once;
}

int
afork_reader_has_early(const struct afork_reader *r)
{
    return r->early_at < r->early_end;
}

/* Bytes, and the descriptor that rides on them: > 0, 0 to wait, or an error. */
static int
recv_exact(int sock, uint8_t *at, uint32_t want, int *ret_fd)
{
    ssize_t n = afork_fdpass_recv(sock, at, want, ret_fd);

    if (n == -EAGAIN)
        return 0;
    if (n == 0 || n == -ECONNRESET)
        return -EPIPE; /* a peer that died with our bytes unread */
    return (int)n;
}

/* Gives a descriptor that was read ahead to the frame whose head has begun:
 * whether it is one that carries any, and has none yet. */
static int
place_early_fd(struct afork_reader *r)
{
    if (!r->head_got || r->head_fd != AFORK_NOFD ||
        afork_wire_carry(r->direction, r->head[0]) != AFORK_CARRY_FIRST)
        return 0;
    r->head_fd = r->early_fd;
    r->early_fd = AFORK_NOFD;
    return 1;
}

/*
 * The kernel stops behind the send that a descriptor came with.  So there is
 * at most one, and only one of the frames that begin in these bytes can be
 * its own; if none of them was, it did not belong there.
 */
static int
recv_early(struct afork_reader *r, int sock)
{
    int fd = AFORK_NOFD, n = recv_exact(sock, r->early, r->ahead, &fd);
    int in_head = r->head_got < AFORK_HEAD_SIZE;

    if (n <= 0)
        return n;
    if (r->early_fd != AFORK_NOFD && !(in_head && place_early_fd(r))) {
        afork_fd_close(&fd);
        return -EPROTO;
    }
    r->early_fd = fd;
    r->early_at = 0;
    r->early_end = (uint32_t)n;
    if (r->ahead_once)
        r->ahead = 0;
    return n;
}

/* The same as recv_exact, from what was read ahead if there is any.  A
 * descriptor that came with that waits in early_fd. */
static int
recv_some(struct afork_reader *r, int sock, uint8_t *at, uint32_t want,
          int *ret_fd)
{
    uint32_t have;

    if (!afork_reader_has_early(r)) {
        int n;

        if (r->hold || want >= r->ahead)
            return recv_exact(sock, at, want, ret_fd);
        n = recv_early(r, sock);
        if (n <= 0)
            return n;
    }
    have = r->early_end - r->early_at;
    if (want > have)
        want = have;
    memcpy(at, r->early + r->early_at, want);
    r->early_at += want;
    return (int)want;
}

/* Bytes that may carry no descriptor. */
static int
recv_plain(struct afork_reader *r, int sock, uint8_t *at, uint32_t want)
{
    int fd = AFORK_NOFD, n = recv_some(r, sock, at, want, &fd);

    if (n > 0 && fd != AFORK_NOFD) {
        afork_fd_close(&fd);
        return -EPROTO;
    }
    return n;
}

/*
 * The descriptor of a header rides on its first byte; but the kernel joins
 * bytes sent before a descriptor with its own, so on which of the five it was
 * depends on when they are read.  Any is accepted, and one only.
 */
static int
recv_head(struct afork_reader *r, int sock)
{
    while (r->head_got < AFORK_HEAD_SIZE) {
        int fd = AFORK_NOFD;
        int n = recv_some(r, sock, r->head + r->head_got,
                          AFORK_HEAD_SIZE - r->head_got, &fd);

        if (n <= 0)
            return n;
        if (fd != AFORK_NOFD && r->head_fd != AFORK_NOFD) {
            afork_fd_close(&fd);
            return -EPROTO;
        }
        if (fd != AFORK_NOFD)
            r->head_fd = fd;
        r->head_got += (uint32_t)n;
        /* The buffer of the frame before lasts until here. */
        if (r->payload_cap > (r->lent ? r->lent_cap : CHUNK)) {
            free(r->payload);
            r->payload = r->lent;
            r->payload_cap = r->lent_cap;
        }
        r->payload_got = 0;
    }
    return 1;
}

static int
recv_fd(struct afork_reader *r, int sock, int *ret_fd)
{
    uint8_t byte = 0;
    int fd = AFORK_NOFD, n = recv_some(r, sock, &byte, 1, &fd);

    if (n > 0 && (byte != 0 || fd == AFORK_NOFD)) {
        afork_fd_close(&fd);
        return -EPROTO;
    }
    if (n > 0)
        *ret_fd = fd;
    return n;
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
    p = afork_lent_grow(r->payload, r->lent, r->payload_got, cap);
    if (!p)
        return -ENOMEM;
    r->payload = p;
    r->payload_cap = cap;
    return 0;
}

static int
next_frame(struct afork_reader *r, int sock, struct afork_frame *ret_frame)
{
    enum afork_carry carry;
    int fd = AFORK_NOFD, n;
    uint32_t len;

    n = recv_head(r, sock);
    if (n <= 0)
        return n;
    carry = afork_wire_carry(r->direction, r->head[0]);
    if (r->early_fd != AFORK_NOFD)
        place_early_fd(r);
    if ((carry == AFORK_CARRY_FIRST) != (r->head_fd != AFORK_NOFD)) {
        afork_fd_close(&r->head_fd);
        return -EPROTO;
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
        n = recv_plain(r, sock, r->payload + r->payload_got, room);
        if (n <= 0)
            return n;
        r->payload_got += (uint32_t)n;
    }
    if (carry == AFORK_CARRY_BEHIND) {
        n = recv_fd(r, sock, &fd);
        if (n <= 0)
            return n;
    } else if (carry == AFORK_CARRY_FIRST) {
        fd = r->head_fd;
        r->head_fd = AFORK_NOFD;
    }

    r->head_got = 0;
    if (r->early_fd != AFORK_NOFD && !afork_reader_has_early(r)) {
        afork_fd_close(&fd);
        return -EPROTO; /* the other one came with bytes that carry none */
    }
    *ret_frame = (struct afork_frame){
        .letter = r->head[0],
        .len = len,
        .payload = r->payload,
        .fd = fd,
    };
    return 1;
}

/* Once broken, what follows in the stream would be taken for something else. */
static int
keep_error(struct afork_reader *r, int n)
{
    if (n < 0 && n != -ENOMEM)
        r->error = n;
    return n;
}

int
afork_reader_next(struct afork_reader *r, int sock,
                  struct afork_frame *ret_frame)
{
    return r->error ? r->error : keep_error(r, next_frame(r, sock, ret_frame));
}

int
afork_reader_next_is(struct afork_reader *r, int sock, uint8_t letter,
                     uint32_t len)
{
    return !r->error && keep_error(r, recv_head(r, sock)) > 0 &&
           r->head[0] == letter && afork_wire_head_len(r->head) == len;
}
