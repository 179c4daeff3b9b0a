/* Reports, process to application: encoding them into a server's queue. */
#ifndef AFORK_REPORT_H
#define AFORK_REPORT_H

#include <sys/resource.h>

#include "serve.h"
#include "spawn.h"

/* Payload bytes of an exited report. */
enum { AFORK_EXITED_SIZE = 8 + 4 + 4 + 18 * 8 };

/* A descriptor for a process of ours that is alive or not reaped; < 0. */
int afork_report_pidfd(pid_t pid);

/* All of them are silent in plain mode and when nobody listens any more;
 * the only other failure is a lack of memory, which loses the report. */
void afork_report_started(struct afork_server *s);
void afork_report_failure(struct afork_server *s);
void afork_report_running(struct afork_server *s);
void afork_report_done(struct afork_server *s, uint64_t token, int spares);
void afork_report_stats(struct afork_server *s, uint64_t token,
                        const uint8_t *data, size_t len);
void afork_report_exited(struct afork_server *s,
                         const struct afork_child *child, int status,
                         const struct rusage *usage);
void afork_report_failed(struct afork_server *s, uint64_t id, int error,
                         enum afork_stage stage);
/* sock is the end for the application. */
void afork_report_socket_take(struct afork_server *s, uint64_t id, int sock);
void afork_report_spawned(struct afork_server *s, uint64_t id, pid_t pid);

#endif
