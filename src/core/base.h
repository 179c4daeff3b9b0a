/*
 * What every file of the core shares: the status convention and the limits.
 *
 * A core function returns >= 0 on success and -errno on failure.  It never
 * prints, never exits and includes no Python.h.  Descriptor parameters are
 * borrowed; a function whose name ends in _take owns its descriptor from its
 * first line; ret_fd gives one to the caller.  A field that owns a descriptor
 * says so.  Every descriptor is close-on-exec from birth.
 */
#ifndef AFORK_BASE_H
#define AFORK_BASE_H

#include <stddef.h>
#include <stdint.h>

#define AFORK_NOFD (-1)
/* A descriptor was sent, but the kernel had no free slot for it here. */
#define AFORK_LOSTFD (-2)

enum {
    AFORK_HEAD_SIZE = 5,        /* letter + native uint32_t length */
    AFORK_FRAME_MAX = 16 << 20, /* bytes of payload; default cap */
    AFORK_HANDLES_MAX = 64,     /* descriptors pending, or of one request */
    AFORK_ERROR_MAX = 64 << 10, /* bytes of one field of an error report */
    AFORK_FDPASS_MAX = 253,     /* SCM_MAX_FD of Linux */
};

#endif
