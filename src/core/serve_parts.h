/* What the files of the server loop use of each other; nobody else does. */
#ifndef AFORK_SERVE_PARTS_H
#define AFORK_SERVE_PARTS_H

#include "serve.h"

enum { AFORK_NEXT = -1 }; /* a handler's "go on"; outcomes are >= 0 */

/* Sends what goes without waiting; whoever does not read is not waited for. */
void afork_server_flush(struct afork_server *s);
/* Sends everything: the socket is about to be somebody else's. */
void afork_server_flush_all(struct afork_server *s);
/* From here on the process executes nothing: it answers forks and waits. */
int afork_server_fail(struct afork_server *s, const char *stage, int error,
                      const char *type, const char *message,
                      const char *filename);
/* The stream means nothing any more: reports that, and ends the loop. */
int afork_server_protocol_error(struct afork_server *s, const char *message);

/* Reaps what has exited, and reports it. */
void afork_server_reap(struct afork_server *s);

/* FORK, FORK_ID and FORK_MANY: they return in every process that they make. */
int afork_server_fork(struct afork_server *s);
int afork_server_fork_id(struct afork_server *s, struct afork_frame *frame);
int afork_server_fork_many(struct afork_server *s,
                           const struct afork_frame *frame);

/* The same for requests whose spare has died; 1 in a process made so. */
int afork_server_fork_orphans(struct afork_server *s);
/*
 * Forks a spare that waits at link.  *ret_pid is its pid, or -errno.  In the
 * spare 0, and it returns when there is something to do: AFORK_NEXT if it has
 * become a process that was asked for, AFORK_END if it is not needed.
 */
int afork_server_fork_spare_take(struct afork_server *s, int link,
                                 pid_t *ret_pid);

/* Before the process changes: waits for the spares that have yet to answer.
 * 1 in a process that had to be forked in place of one. */
int afork_server_settle(struct afork_server *s);

/* A fork that nobody has asked for: as fork(2), a server without a socket. */
pid_t afork_server_fork_unasked(struct afork_server *s);

/* Finds out which text workers use, once and if it is time: 1 in a process
 * made for that. */
int afork_server_try(struct afork_server *s);
/* A child has exited: if it was the trial's, the template is arranged. */
void afork_server_tried(struct afork_server *s, pid_t pid, int status);

/* EXEC: returns only if the program could not be executed. */
int afork_server_exec(struct afork_server *s, const struct afork_frame *frame);
/* SPAWN. */
int afork_server_spawn(struct afork_server *s,
                       const struct afork_frame *frame);
/* SPAWN after an error: nothing is executed any more. */
int afork_server_refuse_spawn(struct afork_server *s,
                              const struct afork_frame *frame);

#endif
