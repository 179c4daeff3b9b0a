/*
 * Link: RPC frames in both directions over a connected unix stream socket,
 * each with up to 253 descriptors (docs/protocol.rst, "RPC frames").
 *
 * Unlike a control socket it is nobody else's afterwards, so the receiver
 * takes whatever the kernel has, many frames at a time.
 */
#ifndef AFORK_LINK_H
#define AFORK_LINK_H

#include "base.h"
#include "outq.h"

enum {
    AFORK_LINK_HEAD_SIZE = 16,
    AFORK_LINK_FRAME_MAX = 1 << 20, /* bytes of payload */
};

struct afork_link {
    int fd; /* owned */
    struct afork_outq out;

    /* Received bytes: [head, ready) are complete frames, [ready, tail) the
     * beginning of one.  `next` is where the frame behind the last one whose
     * head is known begins: ready, or past tail. */
    uint8_t *buf;
    size_t head, ready, next, tail, cap;
    /* Received descriptors, in order.  Room for those of one frame that is
     * not complete, and for those of one more recvmsg. */
    int fds[2 * AFORK_FDPASS_MAX]; /* owned */
    size_t fds_head, fds_tail;
    size_t loose; /* of them: for the head that is not complete */
    size_t fresh; /* of them: of the last recvmsg and claimed by no head */
    int status;   /* why nothing more is received, or 0 */
};

struct afork_link_frame {
    uint8_t kind;
    uint8_t nfds;
    uint32_t len;
    uint64_t id;
    /* Valid until the next call; the descriptors are the caller's once he
     * has called afork_link_take. */
    const uint8_t *payload;
    const int *fds;
};

void afork_link_init_take(struct afork_link *l, int fd);
/* Closes and frees all. */
void afork_link_free(struct afork_link *l);

/*
 * Queues a frame and duplicates of n descriptors, all or nothing.  -E2BIG for
 * a payload over the cap, -EINVAL for too many descriptors, -EBADF, -EMFILE,
 * -ENOMEM.
 */
int afork_link_send(struct afork_link *l, uint8_t kind, uint64_t id,
                    const void *payload, size_t len, const int *fds, size_t n);
/* As afork_outq_flush. */
int afork_link_flush(struct afork_link *l);

/*
 * Receives once, unless a complete frame is waiting.  1 when something has
 * come (which need not be a complete frame), 0 when there is nothing now,
 * -EPIPE at end of file (also in the middle of a frame, which is dropped),
 * -EPROTO for a malformed frame and for descriptors that do not fit their
 * frame, -EMFILE for lost ones, -ENOMEM, -EINTR.  With wait it blocks if the socket does.
 * An error comes when the complete frames before it have been taken.
 */
int afork_link_fill(struct afork_link *l, int wait);
static inline int
afork_link_ready(const struct afork_link *l)
{
    return l->head < l->ready;
}
/* The next complete frame: 1 and *ret_frame, or 0. */
int afork_link_peek(struct afork_link *l, struct afork_link_frame *ret_frame);
/* Forgets the frame that was peeked. */
void afork_link_take(struct afork_link *l);

#endif
