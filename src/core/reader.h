/*
 * Frames out of a control socket, never a byte further than the frame.
 *
 * What follows an 'r' frame or a running report belongs to the user of the
 * socket, and a forked process must find what follows the 'f' frame unread in
 * the kernel.  So header, payload and descriptor byte are each asked for by
 * their exact length.
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
};

struct afork_frame {
    uint8_t letter;
    uint32_t len;
    const uint8_t *payload; /* valid until the next call */
    int fd;                 /* given to the caller: a descriptor, AFORK_NOFD or
                               AFORK_LOSTFD */
};

void afork_reader_init(struct afork_reader *r, enum afork_direction direction);
/* Memory for small frames now; see afork_outq_prepare. */
void afork_reader_prepare(struct afork_reader *r);
/* Forgets a half-read frame, but keeps the memory. */
void afork_reader_reset(struct afork_reader *r);
void afork_reader_free(struct afork_reader *r);

/*
 * The next frame without waiting: 1 and *ret_frame, 0 if it is not complete
 * yet, -EPIPE at end of file (also in the middle of a frame, which is
 * dropped), -EMSGSIZE for a frame over the cap, -EPROTO for a descriptor
 * where none belongs or a missing one, -ENOMEM.  After an error other than
 * -ENOMEM the stream cannot be used any further.
 */
int afork_reader_next(struct afork_reader *r, int sock,
                      struct afork_frame *ret_frame);

#endif
