/* RPC frames in both directions, each with any number of descriptors. */
#include "link.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "fd.h"
#include "fdpass.h"

enum {
    CHUNK = 64 << 10, /* the first allocation, and what an idle link keeps */
    ROOM = 16 << 10,  /* less than this is not worth a recvmsg */
};

/* The bytes of a frame's head. */
struct head {
    uint32_t len;
    uint8_t kind;
    uint8_t nfds;
    uint16_t zero;
    uint64_t id;
};
_Static_assert(sizeof(struct head) == AFORK_LINK_HEAD_SIZE, "no padding");

void
afork_link_init_take(struct afork_link *l, int fd)
{
    memset(l, 0, sizeof *l);
    l->fd = fd;
    afork_outq_init(&l->out);
}

/* Closes the last n descriptors received. */
static void
drop_fds(struct afork_link *l, size_t n)
{
    while (n--)
        afork_fd_close(&l->fds[--l->fds_tail]);
}

void
afork_link_free(struct afork_link *l)
{
    drop_fds(l, l->fds_tail - l->fds_head);
    free(l->buf);
    afork_outq_free(&l->out);
    afork_fd_close(&l->fd);
    memset(l, 0, sizeof *l);
    l->fd = AFORK_NOFD;
}

int
afork_link_send(struct afork_link *l, uint8_t kind, uint64_t id,
                const void *payload, size_t len, const int *fds, size_t n)
{
    struct head head = {.kind = kind, .nfds = (uint8_t)n, .id = id};
    int dups[AFORK_FDPASS_MAX], r = 0;
    size_t have = 0;

    if (len > AFORK_LINK_FRAME_MAX)
        return -E2BIG;
    if (n > AFORK_FDPASS_MAX)
        return -EINVAL;
    head.len = (uint32_t)len;
    for (; have < n; have++) {
        r = afork_fd_dup(fds[have]);
        if (r < 0)
            goto out;
        dups[have] = r;
    }
    r = afork_outq_many(&l->out, &head, sizeof head, payload, len, dups, n);
out:
    while (r < 0 && have)
        afork_fd_close(&dups[--have]);
    return r;
}

int
afork_link_flush(struct afork_link *l)
{
    return afork_outq_flush(&l->out, l->fd);
}

static struct head
head_at(const struct afork_link *l, size_t at)
{
    struct head head;

    memcpy(&head, l->buf + at, sizeof head);
    return head;
}

static void
give_back(struct afork_link *l)
{
    if (l->cap > CHUNK) {
        free(l->buf);
        l->buf = NULL;
        l->cap = 0;
    }
    l->head = l->ready = l->next = l->tail = 0;
}

/* Room for the next recvmsg, where no complete frame is waiting. */
static int
make_room(struct afork_link *l)
{
    size_t used = l->tail - l->head, cap = CHUNK;
    uint8_t *p;

    if (l->fds_head) {
        l->fds_tail -= l->fds_head;
        memmove(l->fds, l->fds + l->fds_head, l->fds_tail * sizeof *l->fds);
        l->fds_head = 0;
    }
    if (l->cap - l->tail >= ROOM)
        return 0;
    if (l->head) {
        memmove(l->buf, l->buf + l->head, used);
        l->next -= l->head;
        l->head = l->ready = 0;
        l->tail = used;
    }
    if (l->cap - used >= ROOM)
        return 0;
    /* Only a frame that is long can come here: double as it arrives. */
    if (l->cap) {
        cap = l->cap * 2;
        if (cap > l->next + CHUNK)
            cap = l->next + CHUNK;
    }
    p = realloc(l->buf, cap);
    if (!p)
        return -ENOMEM;
    l->buf = p;
    l->cap = cap;
    return 0;
}

/* Gives the frame whose head is complete now its descriptors. */
static int
claim(struct afork_link *l, size_t nfds, int lost)
{
    if (l->loose) {
        /* They came with the beginning of this head, so for it. */
        if (nfds != l->loose)
            return -EPROTO;
        l->loose = 0;
    } else if (nfds) {
        if (lost || nfds != l->fresh)
            return -EPROTO;
        l->fresh = 0;
    }
    return 0;
}

/*
 * Goes through the heads that are complete now.  The kernel joins plain bytes
 * that were sent before descriptors with theirs, so these may arrive together
 * with frames that come before their own; but that one begins in the same
 * bytes, even if the rest of its head comes later.
 */
static int
check_heads(struct afork_link *l, int lost)
{
    while (l->next <= l->tail && l->tail - l->next >= AFORK_LINK_HEAD_SIZE) {
        struct head head = head_at(l, l->next);

        l->ready = l->next;
        if (head.zero || head.len > AFORK_LINK_FRAME_MAX)
            return -EPROTO;
        if (claim(l, head.nfds, lost) < 0)
            return lost ? -EMFILE : -EPROTO;
        l->next += AFORK_LINK_HEAD_SIZE + head.len;
    }
    if (l->next <= l->tail)
        l->ready = l->next;
    if (lost)
        return -EMFILE;
    if ((l->loose && l->fresh) || (l->fresh && l->next >= l->tail))
        return -EPROTO;
    l->loose += l->fresh;
    l->fresh = 0;
    return 0;
}

/* The end: the rest is no frame. */
static int
stop(struct afork_link *l, int status)
{
    size_t claimed = l->next > l->ready ? head_at(l, l->ready).nfds : 0;

    drop_fds(l, l->loose + l->fresh + claimed);
    l->loose = l->fresh = 0;
    l->next = l->tail = l->ready;
    if (!afork_link_ready(l))
        give_back(l);
    l->status = status;
    return status;
}

int
afork_link_fill(struct afork_link *l, int wait)
{
    size_t found = 0;
    int r, lost;
    ssize_t n;

    if (afork_link_ready(l))
        return 1;
    if (l->status)
        return l->status;
    r = make_room(l);
    if (r < 0)
        return r;
    n = afork_fdpass_recv_many(l->fd, l->buf + l->tail, l->cap - l->tail, wait,
                               l->fds + l->fds_tail, &found);
    if (n == -EAGAIN)
        return 0;
    if (n == 0 || n == -ECONNRESET) /* it died with our bytes unread */
        return stop(l, -EPIPE);
    if (n < 0)
        return (int)n;

    lost = found && l->fds[l->fds_tail + found - 1] < 0;
    l->tail += (size_t)n;
    l->fds_tail += found;
    l->fresh = found;
    r = check_heads(l, lost);
    if (r < 0)
        stop(l, r);
    return r == 0 || afork_link_ready(l) ? 1 : r;
}

int
afork_link_peek(struct afork_link *l, struct afork_link_frame *ret_frame)
{
    struct head head;

    if (!afork_link_ready(l)) {
        if (l->head == l->tail)
            give_back(l);
        return 0;
    }
    head = head_at(l, l->head);
    *ret_frame = (struct afork_link_frame){
        .kind = head.kind,
        .nfds = head.nfds,
        .len = head.len,
        .id = head.id,
        .payload = l->buf + l->head + AFORK_LINK_HEAD_SIZE,
        .fds = l->fds + l->fds_head,
    };
    return 1;
}

void
afork_link_take(struct afork_link *l)
{
    struct head head = head_at(l, l->head);

    l->head += AFORK_LINK_HEAD_SIZE + head.len;
    l->fds_head += head.nfds;
}
