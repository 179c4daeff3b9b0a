/* Reports, process to application: encoding them into a server's queue. */
#define _GNU_SOURCE
#include "report.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "fd.h"

#ifndef SYS_pidfd_open
#define SYS_pidfd_open 434
#endif

static int
silent(const struct afork_server *s)
{
    return s->plain || s->mute;
}

/* Close-on-exec from birth, says pidfd_open(2). */
int
afork_report_pidfd(pid_t pid)
{
    return (int)syscall(SYS_pidfd_open, pid, 0);
}

void
afork_report_started(struct afork_server *s)
{
    uint32_t pid;
    int fd;

    if (s->started || silent(s))
        return;
    s->started = 1;
    pid = (uint32_t)getpid();
    fd = s->pidfd >= 0 ? s->pidfd : afork_report_pidfd((pid_t)pid);
    s->pidfd = AFORK_NOFD;
    if (fd < 0)
        afork_outq_frame(&s->out, AFORK_REP_STARTED_BARE, &pid, sizeof pid);
    else
        afork_outq_fd_take(&s->out, AFORK_CARRY_FIRST, AFORK_REP_STARTED, &pid,
                           sizeof pid, fd, 0);
}

void
afork_report_failure(struct afork_server *s)
{
    if (!silent(s) && s->failure.payload)
        afork_outq_frame(&s->out, AFORK_REP_ERROR, s->failure.payload,
                         s->failure.len);
}

void
afork_report_running(struct afork_server *s)
{
    if (!silent(s))
        afork_outq_frame(&s->out, AFORK_REP_RUNNING, NULL, 0);
}

void
afork_report_done(struct afork_server *s, uint64_t token, int spares)
{
    uint8_t payload[sizeof token + 1] = {[sizeof token] = 1};

    memcpy(payload, &token, sizeof token);
    if (!silent(s))
        afork_outq_frame(&s->out, AFORK_REP_DONE, payload,
                         sizeof token + (size_t) !!spares);
}

void
afork_report_stats(struct afork_server *s, uint64_t token, const uint8_t *data,
                   size_t len)
{
    uint8_t *payload = malloc(sizeof token + len);

    /* Without memory an empty answer: somebody waits for it. */
    if (silent(s))
        len = 0;
    else if (!payload || len > AFORK_FRAME_MAX - sizeof token)
        afork_outq_frame(&s->out, AFORK_REP_STATS, &token, sizeof token);
    else {
        memcpy(payload, &token, sizeof token);
        if (len)
            memcpy(payload + sizeof token, data, len);
        afork_outq_frame(&s->out, AFORK_REP_STATS, payload,
                         sizeof token + len);
    }
    free(payload);
}

void
afork_report_exited(struct afork_server *s, const struct afork_child *child,
                    int status, const struct rusage *usage)
{
    uint8_t payload[AFORK_EXITED_SIZE];
    uint32_t pid = (uint32_t)child->pid;
    int32_t code = status;
    int64_t u[18] = {0};

    if (silent(s))
        return;
    afork_report_started(s); /* the first report, whatever comes first */
    if (usage) {
        const int64_t fields[18] = {
            usage->ru_utime.tv_sec, usage->ru_utime.tv_usec,
            usage->ru_stime.tv_sec, usage->ru_stime.tv_usec,
            usage->ru_maxrss,       usage->ru_ixrss,
            usage->ru_idrss,        usage->ru_isrss,
            usage->ru_minflt,       usage->ru_majflt,
            usage->ru_nswap,        usage->ru_inblock,
            usage->ru_oublock,      usage->ru_msgsnd,
            usage->ru_msgrcv,       usage->ru_nsignals,
            usage->ru_nvcsw,        usage->ru_nivcsw,
        };

        memcpy(u, fields, sizeof u);
    }
    memcpy(payload, &child->id, 8);
    memcpy(payload + 8, &pid, 4);
    memcpy(payload + 12, &code, 4);
    memcpy(payload + 16, u, sizeof u);
    afork_outq_frame(&s->out, AFORK_REP_EXITED, payload, sizeof payload);
}

void
afork_report_failed(struct afork_server *s, uint64_t id, int error,
                    enum afork_stage stage)
{
    uint8_t payload[8 + 4 + 1];
    int32_t code = error;

    if (silent(s))
        return;
    afork_report_started(s);
    memcpy(payload, &id, 8);
    memcpy(payload + 8, &code, 4);
    payload[12] = (uint8_t)stage;
    afork_outq_frame(&s->out, AFORK_REP_FAILED, payload, sizeof payload);
}

void
afork_report_socket_take(struct afork_server *s, uint64_t id, int sock)
{
    if (silent(s)) {
        afork_fd_close(&sock);
        return;
    }
    afork_report_started(s);
    afork_outq_fd_take(&s->out, AFORK_CARRY_FIRST, AFORK_REP_SOCKET, &id,
                       sizeof id, sock, 0);
}

void
afork_report_spawned(struct afork_server *s, uint64_t id, pid_t pid)
{
    uint8_t payload[8 + 4];
    uint32_t number = (uint32_t)pid;
    int fd;

    if (silent(s))
        return;
    memcpy(payload, &id, 8);
    memcpy(payload + 8, &number, 4);
    fd = afork_report_pidfd(
        pid); /* our child, not reaped yet: cannot be another's */
    if (fd < 0)
        afork_outq_frame(&s->out, AFORK_REP_SPAWNED_BARE, payload,
                         sizeof payload);
    else
        afork_outq_fd_take(&s->out, AFORK_CARRY_FIRST, AFORK_REP_SPAWNED,
                           payload, sizeof payload, fd, 0);
}

int
afork_failure_set(struct afork_failure *f, const char *stage, int error,
                  struct afork_str type, struct afork_str message,
                  struct afork_str traceback, struct afork_str filename)
{
    char number[16];
    int digits = snprintf(number, sizeof number, "%d", error);
    struct afork_str strs[6] = {
        {(const uint8_t *)stage, strlen(stage)},
        {(const uint8_t *)number, (size_t)digits},
        type,
        message,
        traceback,
        filename,
    };
    uint8_t *payload;
    int64_t len;

    for (int i = 2; i < 6; i++) {
        if (strs[i].len <= AFORK_ERROR_MAX)
            continue;
        /* The end of a traceback says most. */
        strs[i].data += strs[i].len - AFORK_ERROR_MAX;
        strs[i].len = AFORK_ERROR_MAX;
    }
    len = afork_wire_list_size(strs, 6);
    payload = malloc((size_t)len);
    if (!payload)
        return -ENOMEM;
    afork_wire_put_list(payload, strs, 6);
    free(f->payload);

    f->payload = payload;
    f->len = (size_t)len;
    return 0;
}
