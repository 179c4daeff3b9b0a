/* The only place where a control socket is written or read. */
#ifndef AFORK_FDPASS_H
#define AFORK_FDPASS_H

#include <sys/types.h>

#include "base.h"

/*
 * Sends up to len bytes (len >= 1), fd riding on the first of them unless it
 * is AFORK_NOFD.  Never blocks, never raises SIGPIPE.  Returns the number of
 * bytes accepted, of which the descriptor was one, or -errno: -EAGAIN when
 * nothing was accepted.
 */
ssize_t afork_fdpass_send(int sock, const void *data, size_t len, int fd);

/*
 * Receives up to len bytes and at most one descriptor.  Never blocks.
 * Returns the number of bytes, 0 at end of file, or -errno.  *ret_fd is a
 * close-on-exec descriptor, AFORK_NOFD, or AFORK_LOSTFD when one was sent but
 * did not fit into this process.  Two or more descriptors are a hostile or
 * broken peer: all are closed and the result is -EPROTO.
 */
ssize_t afork_fdpass_recv(int sock, void *data, size_t len, int *ret_fd);

/* The same for up to AFORK_FDPASS_MAX descriptors, none of them AFORK_NOFD. */
ssize_t afork_fdpass_send_many(int sock, const void *data, size_t len,
                               const int *fds, size_t n);

/*
 * Receives the descriptors of at most one send: the kernel stops behind the
 * bytes that they rode on.  When some did not fit into this process, an
 * AFORK_LOSTFD stands behind those that did.  With wait it blocks if the
 * socket does, and -EINTR is returned instead of tried again.
 */
ssize_t afork_fdpass_recv_many(int sock, void *data, size_t len, int wait,
                               int fds[AFORK_FDPASS_MAX], size_t *ret_n);

#endif
