/* Frames and descriptors waiting to be sent, merged into few sends. */
#include "outq.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "fd.h"
#include "fdpass.h"
#include "lent.h"

enum { KEEP = 64 << 10 }; /* an empty buffer above this is given back */

void
afork_outq_init(struct afork_outq *q)
{
    memset(q, 0, sizeof *q);
}

void
afork_outq_reset(struct afork_outq *q)
{
    while (q->fds_head < q->fds_tail)
        afork_fd_close(&q->fds[q->fds_head++].fd);
    q->fds_head = q->fds_tail = 0;
    q->head = q->tail = 0;
    q->sent = 0;
    q->crowded = 0;
}

void
afork_outq_free(struct afork_outq *q)
{
    afork_outq_reset(q);
    afork_lent_free(q->fds, q->lent_fds);
    afork_lent_free(q->buf, q->lent);
    afork_outq_init(q);
}

uint64_t
afork_outq_end(const struct afork_outq *q)
{
    return q->sent + afork_outq_len(q);
}

/* Makes room for more elements of size bytes behind *tail. */
static int
reserve(void **base, const void *lent, size_t *head, size_t *tail, size_t *cap,
        size_t more, size_t size)
{
    size_t used = *tail - *head, want = *cap ? *cap : 512 / size;
    void *p;

    if (*cap - *tail >= more)
        return 0;
    if (*head) {
        memmove(*base, (char *)*base + *head * size, used * size);
        *head = 0;
        *tail = used;
    }
    if (*cap - used >= more)
        return 0;
    while (want - used < more) {
        if (want > SIZE_MAX / 4 / size)
            return -ENOMEM;
        want *= 2;
    }
    p = afork_lent_grow(*base, lent, used * size, want * size);
    if (!p)
        return -ENOMEM;
    *base = p;
    *cap = want;
    return 0;
}

static int
reserve_fds(struct afork_outq *q, size_t more)
{
    void *p = q->fds;
    int r = reserve(&p, q->lent_fds, &q->fds_head, &q->fds_tail, &q->fds_cap,
                    more, sizeof *q->fds);

    q->fds = p;
    return r;
}

static int
reserve_bytes(struct afork_outq *q, size_t more)
{
    void *p = q->buf;
    int r = reserve(&p, q->lent, &q->head, &q->tail, &q->cap, more, 1);

    q->buf = p;
    return r;
}

static void
put_bytes(struct afork_outq *q, const void *data, size_t len)
{
    if (len)
        memcpy(q->buf + q->tail, data, len);
    q->tail += len;
}

void
afork_outq_lend(struct afork_outq *q, void *memory, size_t size,
                struct afork_outq_fd *fds, size_t n)
{
    q->buf = q->lent = memory;
    q->cap = q->lent_cap = size;
    q->fds = q->lent_fds = fds;
    q->fds_cap = q->lent_fds_cap = n;
}

int
afork_outq_frame(struct afork_outq *q, uint8_t letter, const void *payload,
                 size_t len)
{
    uint8_t head[AFORK_HEAD_SIZE];

    if (len > UINT32_MAX)
        return -E2BIG;
    if (reserve_bytes(q, sizeof head + len) < 0)
        return -ENOMEM;
    afork_wire_put_head(head, letter, (uint32_t)len);
    put_bytes(q, head, sizeof head);
    put_bytes(q, payload, len);
    return 0;
}

int
afork_outq_list(struct afork_outq *q, uint8_t letter,
                const struct afork_str *strs, size_t n, size_t frame_max)
{
    int64_t len = afork_wire_list_size(strs, n);
    uint8_t head[AFORK_HEAD_SIZE];

    if (len < 0)
        return (int)len;
    if ((uint64_t)len > frame_max)
        return -E2BIG;
    if (reserve_bytes(q, sizeof head + (size_t)len) < 0)
        return -ENOMEM;
    afork_wire_put_head(head, letter, (uint32_t)len);
    put_bytes(q, head, sizeof head);
    afork_wire_put_list(q->buf + q->tail, strs, n);
    q->tail += (size_t)len;
    return 0;
}

/* Queues a frame and remembers where it begins; the descriptor stays the
 * caller's if that fails. */
static int
put_marked(struct afork_outq *q, enum afork_carry carry, uint8_t letter,
           const void *payload, size_t len, int fd, uint64_t tag)
{
    uint64_t frame = afork_outq_end(q);
    int r = reserve_fds(q, 1);

    if (r == 0)
        r = reserve_bytes(q, AFORK_HEAD_SIZE + len + 1);
    if (r == 0)
        r = afork_outq_frame(q, letter, payload, len);
    if (r < 0)
        return r;
    q->fds[q->fds_tail++] = (struct afork_outq_fd){
        .at = carry == AFORK_CARRY_BEHIND ? afork_outq_end(q) : frame,
        .frame = frame,
        .tag = tag,
        .fd = fd,
    };
    if (carry == AFORK_CARRY_BEHIND)
        put_bytes(q, "", 1);
    return 0;
}

int
afork_outq_fd_take(struct afork_outq *q, enum afork_carry carry,
                   uint8_t letter, const void *payload, size_t len, int fd,
                   uint64_t tag)
{
    int r = put_marked(q, carry, letter, payload, len, fd, tag);

    if (r < 0)
        afork_fd_close(&fd);
    return r;
}

int
afork_outq_tagged(struct afork_outq *q, uint8_t letter, const void *payload,
                  size_t len, uint64_t tag)
{
    return put_marked(q, AFORK_CARRY_NONE, letter, payload, len, AFORK_NOFD,
                      tag);
}

int
afork_outq_many(struct afork_outq *q, const void *head, size_t head_len,
                const void *payload, size_t len, const int *fds, size_t n)
{
    uint64_t at = afork_outq_end(q);

    if (n > AFORK_FDPASS_MAX)
        return -EINVAL;
    if (len > SIZE_MAX - head_len || reserve_bytes(q, head_len + len) < 0 ||
        (n && reserve_fds(q, n) < 0))
        return -ENOMEM;
    for (size_t i = 0; i < n; i++)
        q->fds[q->fds_tail++] =
            (struct afork_outq_fd){.at = at, .frame = at, .fd = fds[i]};
    put_bytes(q, head, head_len);
    put_bytes(q, payload, len);
    return 0;
}

/* The next send: its length, and the descriptors on its first byte. */
static size_t
next_send(const struct afork_outq *q, int fds[AFORK_FDPASS_MAX], size_t *ret_n)
{
    size_t i = q->fds_head, n = 0;

    /* Of a byte that has gone: a reclaimed one. */
    for (; i < q->fds_tail && q->fds[i].at <= q->sent; i++)
        if (q->fds[i].fd >= 0)
            fds[n++] = q->fds[i].fd;
    *ret_n = n;
    return i < q->fds_tail ? (size_t)(q->fds[i].at - q->sent)
                           : afork_outq_len(q);
}

/* Forgets what the kernel has taken: n bytes, and what rode on the first. */
static void
sent(struct afork_outq *q, size_t n)
{
    while (q->fds_head < q->fds_tail && q->fds[q->fds_head].at <= q->sent)
        afork_fd_close(&q->fds[q->fds_head++].fd);
    q->head += n;
    q->sent += n;
}

int
afork_outq_flush(struct afork_outq *q, int sock)
{
    q->crowded = 0;
    while (afork_outq_len(q)) {
        int fds[AFORK_FDPASS_MAX];
        size_t n, len = next_send(q, fds, &n);
        ssize_t r;

        r = afork_fdpass_send_many(sock, q->buf + q->head, len, fds, n);
        /*
         * Too many descriptors in flight for this user: the limit counts
         * what no process has received yet, so it passes like a full socket.
         */
        q->crowded = r == -ETOOMANYREFS;
        if (r == -EAGAIN || r == -ETOOMANYREFS)
            return 0;
        if (r < 0)
            return (int)r;
        /* A short write took the descriptors with its first byte. */
        sent(q, (size_t)r);
    }
    q->head = q->tail = 0;
    q->fds_head = q->fds_tail = 0;
    if (q->cap > (q->lent ? q->lent_cap : KEEP)) {
        free(q->buf);
        q->buf = q->lent;
        q->cap = q->lent_cap;
    }
    if (q->fds_cap > (q->lent_fds ? q->lent_fds_cap : KEEP / sizeof *q->fds)) {
        free(q->fds);
        q->fds = q->lent_fds;
        q->fds_cap = q->lent_fds_cap;
    }
    return 1;
}

int
afork_outq_reclaim(struct afork_outq *q, uint64_t *ret_tag, int *ret_fd)
{
    for (size_t i = q->fds_head; i < q->fds_tail; i++) {
        if (!q->fds[i].tag || q->fds[i].frame < q->sent)
            continue;
        *ret_tag = q->fds[i].tag;
        *ret_fd = q->fds[i].fd;
        q->fds[i].tag = 0;
        q->fds[i].fd = AFORK_NOFD;
        return 1;
    }
    return 0;
}
