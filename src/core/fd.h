/* Descriptors: closing, duplicating and marking them. */
#ifndef AFORK_FD_H
#define AFORK_FD_H

#include "base.h"

/* Closes *fd if it is one, keeps errno, stores AFORK_NOFD. */
void afork_fd_close(int *fd);

/* A close-on-exec duplicate, numbered 3 or higher.  -EBADF, -EMFILE. */
int afork_fd_dup(int fd);

/* Sets or clears O_NONBLOCK of the open file description. */
int afork_fd_nonblock(int fd, int on);

/*
 * A connected pair of unix stream sockets, close-on-exec and numbered 3 or
 * higher: with 0, 1 or 2 closed in the caller a socket would take their place
 * and be mistaken for stdio by everything that follows.
 */
int afork_fd_pair(int ret_fd[2]);

/* Marks every descriptor >= low close-on-exec.  Async-signal-safe. */
int afork_fd_cloexec_from(unsigned low);

#endif
