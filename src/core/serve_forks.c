/* The server's commands that make processes of its own kind. */
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <unistd.h>

#include "fd.h"
#include "fdpass.h"
#include "image.h"
#include "report.h"
#include "serve_parts.h"

static struct afork_str
str_of(const char *text)
{
    return (struct afork_str){(const uint8_t *)text, strlen(text)};
}

void
afork_server_forked(struct afork_server *s, pid_t parent)
{
    if (s->sock < 0) /* it was called already */
        return;
    afork_fd_close(
        &s->sock); /* a second holder would hide our parent's death */
    for (; s->batch.n; s->batch.n--)
        afork_fd_close(&s->batch.socks[s->batch.n - 1]);
    afork_fd_close(&s->pidfd);
    afork_spares_forget(&s->spares);
    if (s->plain || s->detached)
        return;
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (getppid() != parent)
        _exit(1); /* it died before we could ask to be told */
}

/* Forks; in the child 0, and it is a server of its own that has no socket
 * yet.  -errno. */
static pid_t
fork_server(struct afork_server *s, uint64_t id)
{
    pid_t parent = getpid(), pid;
    sigset_t old;
    int r = afork_children_reserve(&s->children);

    if (r < 0)
        return r;
    afork_signals_block_all(&old);
    pid = s->ops->fork(s->self);
    if (pid == 0) {
        afork_server_forked(s, parent);
        afork_outq_reset(&s->out); /* its reports are not ours to send */
        afork_reader_reset(&s->in);
        s->children.n = 0;
        s->started = 0;
        s->starts = 0;
        s->forked = 0;
        s->mute = 0;
        if (s->trial) { /* it is our parent's */
            afork_image_free(s->trial);
            s->trial = NULL;
            s->trial_pid = 0;
            s->tried = 0;
        }
    }
    afork_signals_restore(&old);
    if (pid > 0) {
        s->forked = 1;
        afork_children_add(&s->children, pid, id);
    }
    return pid;
}

pid_t
afork_server_fork_unasked(struct afork_server *s)
{
    return fork_server(s, 0);
}

/* One fork on behalf of the new socket; in the child 1. */
static int
fork_one_take(struct afork_server *s, int sock, uint64_t id)
{
    pid_t pid = fork_server(s, id);

    if (pid == 0) {
        s->sock = sock;
        return 1;
    }
    if (pid < 0 && !s->plain) {
        struct afork_failure f = {NULL, 0};
        struct afork_outq q;
        int error = -(int)pid;

        /* The new process's owner asked; its socket is where it listens. */
        afork_outq_init(&q);
        if (afork_failure_set(&f, "fork", error, str_of("OSError"),
                              str_of(strerror(error)), str_of(""),
                              str_of("")) == 0 &&
            afork_outq_frame(&q, AFORK_REP_ERROR, f.payload, f.len) == 0)
            afork_outq_flush(&q, sock);
        afork_outq_free(&q);
        free(f.payload);
    }
    afork_fd_close(&sock);
    return 0;
}

/* A spare's life until it is given a request: AFORK_NEXT, or AFORK_END. */
static int
wait_as_spare(struct afork_server *s, int link)
{
    struct pollfd p = {.fd = link, .events = POLLIN};
    int fd = AFORK_NOFD;
    ssize_t n = -EAGAIN;
    uint64_t id;

    s->ops->warm(s->self);
    s->pidfd = afork_report_pidfd(getpid());
    while (n == -EAGAIN) {
        if (poll(&p, 1, -1) < 0 && errno == EINTR)
            s->ops->interrupted(s->self);
        n = afork_fdpass_recv(link, &id, sizeof id, &fd);
    }
    /* A lost descriptor is no answer: the template still has its own. */
    if (n != sizeof id || fd < 0 ||
        afork_fdpass_send(link, "", 1, AFORK_NOFD) != 1) {
        afork_fd_close(&fd);
        return AFORK_END;
    }
    s->sock = fd;
    return AFORK_NEXT;
}

int
afork_server_fork_spare_take(struct afork_server *s, int link, pid_t *ret_pid)
{
    int r = 0;

    *ret_pid = fork_server(s, 0);
    if (*ret_pid == 0)
        r = wait_as_spare(s, link);
    afork_fd_close(&link);
    return r;
}

/* Tells the owner of a new process why its template makes no more. */
static void
answer_failure_take(struct afork_server *s, int sock)
{
    struct afork_outq q;

    afork_outq_init(&q);
    if (!s->plain && afork_outq_frame(&q, AFORK_REP_ERROR, s->failure.payload,
                                      s->failure.len) == 0)
        afork_outq_flush(&q, sock);
    afork_outq_free(&q);
    afork_fd_close(&sock);
}

/* A new process on sock, which may have been lost on the way; in it 1.  The
 * request of an orphan has waited long enough: other spares may be as slow. */
static int
fork_for_take(struct afork_server *s, int sock, uint64_t id, int orphan)
{
    s->starts += !orphan;
    if (sock < 0)
        afork_report_failed(s, id, EMFILE, AFORK_STAGE_FORK);
    else if (s->failure.payload)
        answer_failure_take(s, sock);
    else if (!orphan && afork_spares_start(s, sock, id))
        return 0;
    else if (fork_one_take(s, sock, id))
        return 1;
    /* Also here: a template that is never idle must not collect zombies. */
    afork_server_reap(s);
    return afork_server_try(s);
}

int
afork_server_fork_orphans(struct afork_server *s)
{
    uint64_t id;
    int sock;

    while ((sock = afork_spares_orphan(s, &id)) >= 0)
        if (fork_for_take(s, sock, id, 1))
            return 1;
    return 0;
}

/* The original's fork: the socket is the last pending argument. */
int
afork_server_fork(struct afork_server *s)
{
    int sock;

    if (!afork_args_tail_is_handles(&s->args, 1))
        return afork_server_protocol_error(s, "fork without a socket");
    sock = afork_args_pop_fd(&s->args);
    if (sock >= 0) /* else lost: there is no id to report */
        fork_for_take(s, sock, 0, 0);
    return AFORK_NEXT;
}

/* Whether more has come, and a slot is free for a descriptor that comes with
 * it: without one it would be lost, as it is not while it waits. */
static int
can_receive(struct afork_server *s)
{
    int bytes = 0, probe;

    if (ioctl(s->sock, FIONREAD, &bytes) < 0 || !bytes)
        return 0;
    probe = afork_fd_dup(s->sock);
    if (probe < 0)
        return 0;
    afork_fd_close(&probe);
    return 1;
}

static void
ask_take(struct afork_batch *b, const struct afork_frame *frame)
{
    memcpy(&b->ids[b->n], frame->payload, sizeof *b->ids);
    b->socks[b->n++] = frame->fd;
}

/* Forks for one of the batch; in the child 1. */
static int
fork_from_batch(struct afork_server *s, size_t i)
{
    int sock = s->batch.socks[i];

    s->batch.socks[i] = AFORK_NOFD; /* the child closes the others */
    return fork_for_take(s, sock, s->batch.ids[i], 0);
}

/*
 * While a socket is under way in another, the kernel looks for garbage whenever
 * any socket is closed (unix_gc): at the end of each worker, and once more in
 * the application. So requests that wait for a fork wait here, not in the
 * kernel.
 */
int
afork_server_fork_id(struct afork_server *s, struct afork_frame *frame)
{
    struct afork_batch *b = &s->batch;
    struct afork_frame more;
    int sock = frame->fd;

    if (frame->len != sizeof *b->ids) {
        afork_fd_close(&sock);
        return afork_server_protocol_error(s, "malformed fork request");
    }
    ask_take(b, frame);
    for (size_t i = 0; i < b->n; i++) {
        if (i)
            afork_server_flush(s); /* as between any two requests */
        while (b->n < AFORK_BATCH && can_receive(s) &&
               afork_reader_next_is(&s->in, s->sock, AFORK_CMD_FORK_ID,
                                    sizeof *b->ids) &&
               afork_reader_next(&s->in, s->sock, &more) > 0)
            ask_take(b, &more);
        if (fork_from_batch(s, i))
            return AFORK_NEXT;
    }
    b->n = 0;
    return AFORK_NEXT;
}

/* Makes socket pairs for the next ids, at most n, and sends the application
 * its ends.  Returns for how many: without descriptors for all, the forks of
 * some come first. */
static size_t
open_batch(struct afork_server *s, const uint8_t *ids, size_t n)
{
    struct afork_batch *b = &s->batch;

    size_t i;

    for (i = 0; i < n; i++) {
        int pair[2], r = afork_fd_pair(pair);
        uint64_t id;

        memcpy(&id, ids + i * sizeof id, sizeof id);
        if (r < 0 && b->n)
            break;
        if (r < 0) {
            afork_report_failed(s, id, -r, AFORK_STAGE_FORK);
            continue;
        }
        afork_report_socket_take(s, id, pair[0]);
        b->ids[b->n] = id;
        b->socks[b->n++] = pair[1];
    }
    afork_server_flush(s);
    return i;
}

/*
 * One request for many: the socket pairs are made here, so that neither the
 * application's loop nor its descriptors take all of them at once.  Its ends
 * go out before the forks: most processes will find their commands there.
 */
int
afork_server_fork_many(struct afork_server *s, const struct afork_frame *frame)
{
    struct afork_batch *b = &s->batch;
    size_t n = frame->len / sizeof(uint64_t);

    if (frame->len % sizeof(uint64_t))
        return afork_server_protocol_error(s, "malformed fork request");
    /* Nobody reads any more: whom would they serve? */
    for (size_t at = 0; at < n && !s->mute;) {
        at += open_batch(s, frame->payload + at * sizeof(uint64_t),
                         n - at < AFORK_BATCH ? n - at : AFORK_BATCH);
        for (size_t i = 0; i < b->n; i++)
            if (fork_from_batch(s, i))
                return AFORK_NEXT;
        b->n = 0;
    }
    return AFORK_NEXT;
}
