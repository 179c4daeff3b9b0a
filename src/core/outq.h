/*
 * Frames and descriptors waiting to be sent, merged into as few sends as the
 * protocol allows: descriptors must ride on the first byte of their send, so
 * K bytes that carry some and any number of frames cost K + 1 sends.
 */
#ifndef AFORK_OUTQ_H
#define AFORK_OUTQ_H

#include "base.h"
#include "wire.h"

/* A descriptor and the byte of the stream that it rides on. */
struct afork_outq_fd {
    uint64_t at;    /* position of its byte in the stream */
    uint64_t frame; /* position of the frame that announces it */
    uint64_t tag;   /* the caller's; 0 for none */
    int fd;         /* owned; AFORK_NOFD for a frame that only has a tag */
};

struct afork_outq {
    uint8_t *buf;
    size_t head, tail, cap;
    uint64_t sent; /* bytes the kernel has taken: position of buf[head] */
    int crowded;   /* the last flush found too many descriptors in flight */
    struct afork_outq_fd *fds;
    size_t fds_head, fds_tail, fds_cap;
    void *lent, *lent_fds; /* borrowed: the first buf and fds, or NULL */
    size_t lent_cap, lent_fds_cap;
};

void afork_outq_init(struct afork_outq *q);
/* Memory for a few frames, and for n descriptors: a template has it in the page
 * that it writes at each fork anyway.  It must outlive the queue. */
void afork_outq_lend(struct afork_outq *q, void *memory, size_t size,
                     struct afork_outq_fd *fds, size_t n);
/* Closes and forgets what is queued, but keeps the memory. */
void afork_outq_reset(struct afork_outq *q);
/* Frees all and closes the descriptors that were not sent. */
void afork_outq_free(struct afork_outq *q);

/* Position in the stream of the next byte to be queued. */
uint64_t afork_outq_end(const struct afork_outq *q);
static inline size_t
afork_outq_len(const struct afork_outq *q)
{
    return q->tail - q->head;
}

/* Queue one frame; all or nothing.  -ENOMEM. */
int afork_outq_frame(struct afork_outq *q, uint8_t letter, const void *payload,
                     size_t len);
/* The same with a string list for payload.  -E2BIG above frame_max. */
int afork_outq_list(struct afork_outq *q, uint8_t letter,
                    const struct afork_str *strs, size_t n, size_t frame_max);
/* Queue a frame and a descriptor that rides where the letter says; it is
 * consumed on success and on failure. */
int afork_outq_fd_take(struct afork_outq *q, enum afork_carry carry,
                       uint8_t letter, const void *payload, size_t len, int fd,
                       uint64_t tag);
/* Queue head and payload behind each other, and n descriptors that ride on
 * the first byte; all or nothing.  On success they are the queue's. */
int afork_outq_many(struct afork_outq *q, const void *head, size_t head_len,
                    const void *payload, size_t len, const int *fds, size_t n);

/* Queue a frame that can be taken back as long as none of it is sent. */
int afork_outq_tagged(struct afork_outq *q, uint8_t letter,
                      const void *payload, size_t len, uint64_t tag);

/*
 * Sends what the socket accepts without waiting: 1 when all is sent, 0 when
 * the socket is full, -errno when it is broken.  Also 0, and crowded, at this
 * user's limit on descriptors in flight: then the socket has room, and nobody
 * tells when to try again; so after AFORK_OUTQ_BACK_OFF milliseconds.
 */
enum { AFORK_OUTQ_BACK_OFF = 10 };
int afork_outq_flush(struct afork_outq *q, int sock);

/* Takes back what has a tag and none of whose frame has been sent: 1, its tag
 * and its descriptor (given to the caller) or AFORK_NOFD; or 0. */
int afork_outq_reclaim(struct afork_outq *q, uint64_t *ret_tag, int *ret_fd);

#endif
