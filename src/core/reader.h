/*
 * Frames out of a control socket, never a byte further than they go.
 *
 * What follows an 'r' frame or a running report belongs to the user of the
 * socket, and a forked process must find what follows the 'f' frame unread in
 * the kernel.  So header, payload and descriptor byte are each asked for by
 * their exact length, unless the caller knows how many bytes are surely frames
 * (afork_reader_ahead).
 */
#ifndef AFORK_READER_H
#define AFORK_READER_H

#include "base.h"
#include "wire.h"

struct afork_reader {
    enum afork_direction direction;
    uint32_t frame_max;
    uint8_t head[AFORK_HEAD_SIZE];
    uint32_t head_got;
    int head_fd; /* owned: what rode on the first byte */
    uint8_t *
        payload; /* grows with what has arrived, not with what was announced */
    uint32_t payload_got, payload_cap;
    void *lent; /* borrowed: the first payload, or NULL */
    uint32_t lent_cap;
    uint8_t *early; /* what was read ahead: early_at .. early_end */
    uint32_t early_at, early_end;
    int early_fd;   /* owned: rides on a frame that begins in there */
    uint32_t ahead; /* bytes to ask for at once, 0 for exact reads */
    int ahead_once;
    int hold;  /* nothing is to be read ahead for now */
    int error; /* what the stream has come to: a negative errno, or 0 */
};

struct afork_frame {
    uint8_t letter;
    uint32_t len;
    const uint8_t *payload; /* valid until the next call */
    int fd;                 /* given to the caller: a descriptor, AFORK_NOFD or
                               AFORK_LOSTFD */
};

void afork_reader_init(struct afork_reader *r, enum afork_direction direction);
/* Memory for small frames; see afork_outq_lend. */
void afork_reader_lend(struct afork_reader *r, void *memory, uint32_t size);
/* Forgets a half-read frame, but keeps the memory. */
void afork_reader_reset(struct afork_reader *r);
void afork_reader_free(struct afork_reader *r);

/*
 * From here on asks for so many bytes at once, or does so the next time only.
 * They must be frames, whose descriptors ride on their first bytes.  To be
 * called once; without memory everything stays as it is.
 */
void afork_reader_ahead(struct afork_reader *r, uint32_t bytes, int once);
/* Whether something was read ahead that no frame was made of yet. */
int afork_reader_has_early(const struct afork_reader *r);

/*
 * The next frame without waiting: 1 and *ret_frame, 0 if it is not complete
 * yet, -EPIPE at end of file (also in the middle of a frame, which is
 * dropped), -EMSGSIZE for a frame over the cap, -EPROTO for a descriptor
 * where none belongs or a missing one, -ENOMEM.  After an error other than
 * -ENOMEM the stream cannot be used any further.
 */
int afork_reader_next(struct afork_reader *r, int sock,
                      struct afork_frame *ret_frame);

/* Whether the next frame is of this letter and length; it stays to be taken, and
 * so does an error. */
int afork_reader_next_is(struct afork_reader *r, int sock, uint8_t letter,
                         uint32_t len);

#endif
