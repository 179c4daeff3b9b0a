/*
 * The server loop of a process.
 *
 *   exec'ed interpreter ──► loop ──f──► loop (child) ──r──► function, _exit
 *                            │ ▲                      └─x──► program
 *                            └─┘ e m s a t h: prepare
 *
 * A template waits for commands and for its children.  Once the application
 * has shut down its writing side it only reaps and reports; it ends with its
 * last child, or at once when the application's socket is gone altogether:
 * its children have asked the kernel to die with it.
 */
#define _GNU_SOURCE
#include "serve.h"

#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "fd.h"
#include "report.h"
#include "serve_parts.h"

static struct afork_str
str_of(const char *text)
{
    return (struct afork_str){(const uint8_t *)text, strlen(text)};
}

void
afork_server_init_take(struct afork_server *s, int sock, int plain,
                       const struct afork_ops *ops, void *self)
{
    memset(s, 0, sizeof *s);
    s->sock = sock;
    s->plain = plain;
    s->ops = ops;
    s->self = self;
    s->frame_max = AFORK_FRAME_MAX;
    afork_reader_init(&s->in, AFORK_TO_PROCESS);
    afork_outq_init(&s->out);
    afork_args_init(&s->args);
    afork_children_init(&s->children);
    afork_spares_init(&s->spares);
    s->pidfd = AFORK_NOFD;
    afork_reader_lend(&s->in, s->near.in, sizeof s->near.in);
    afork_outq_lend(&s->out, s->near.out, sizeof s->near.out, s->near.fds,
                    sizeof s->near.fds / sizeof *s->near.fds);
    afork_children_lend(&s->children, s->near.children,
                        sizeof s->near.children / sizeof *s->near.children);
}

void
afork_server_free(struct afork_server *s)
{
    afork_signals_forget(&s->signals);
    afork_fd_close(&s->sock);
    afork_fd_close(&s->pidfd);
    afork_spares_forget(&s->spares);
    afork_reader_free(&s->in);
    afork_outq_free(&s->out);
    afork_args_free(&s->args);
    afork_children_free(&s->children);
    free(s->failure.payload);
    s->failure.payload = NULL;
}

/* Sends what goes without waiting; whoever does not read is not waited for. */
void
afork_server_flush(struct afork_server *s)
{
    if (afork_outq_flush(&s->out, s->sock) < 0) {
        s->mute = 1;
        afork_outq_free(&s->out);
    }
}

/* Sends everything: the socket is about to be somebody else's. */
void
afork_server_flush_all(struct afork_server *s)
{
    for (;;) {
        struct pollfd p = {.fd = s->sock};

        afork_server_flush(s);
        if (!afork_outq_len(&s->out))
            return;
        p.events = s->out.crowded ? 0 : POLLOUT;
        poll(&p, 1, s->out.crowded ? AFORK_OUTQ_BACK_OFF : -1);
    }
}

static void
child_exited(void *arg, const struct afork_child *child, int status,
             const struct rusage *usage)
{
    struct afork_server *s = arg;
    struct afork_child one = *child;

    afork_spares_exited(s, &one);
    afork_server_tried(s, one.pid, status);
    if (one.id)
        afork_report_exited(s, &one, status, usage);
}

void
afork_server_reap(struct afork_server *s)
{
    if (s->children.n && afork_signals_chld(&s->signals))
        afork_children_reap(&s->children, child_exited, s);
}

/* From here on the process executes nothing: it answers forks and waits. */
int
afork_server_fail(struct afork_server *s, const char *stage, int error,
                  const char *type, const char *message, const char *filename)
{
    afork_report_started(s);
    if (afork_failure_set(&s->failure, stage, error, str_of(type),
                          str_of(message), str_of(""), str_of(filename)) < 0)
        return -ENOMEM;
    afork_report_failure(s);
    return s->plain ? -error
                    : AFORK_NEXT; /* the original ends at its first error */
}

int
afork_server_protocol_error(struct afork_server *s, const char *message)
{
    afork_server_fail(s, "protocol", EPROTO, "ProtocolError", message, "");
    return -EPROTO;
}

/* A callback failed and has filled in s->failure (or had no memory to). */
static int
callback_failed(struct afork_server *s)
{
    if (!s->failure.payload)
        return -ENOMEM;
    afork_report_failure(s);
    return s->plain ? -ECANCELED : AFORK_NEXT;
}

static int
handle_command(struct afork_server *s, const struct afork_frame *frame)
{
    int r;

    afork_spares_drop(s);
    afork_report_started(s);
    afork_server_flush(s);
    afork_signals_open(&s->signals);
    r = s->ops->command(s->self, frame->letter, frame->payload, frame->len,
                        &s->failure);
    afork_signals_close(&s->signals);
    return r < 0 ? callback_failed(s) : AFORK_NEXT;
}

static int
handle_strings(struct afork_server *s, enum afork_arg_kind kind,
               const struct afork_frame *frame)
{
    struct afork_strs list = {frame->payload, frame->payload + frame->len};
    int r = afork_args_add_list(&s->args, kind, list);

    if (r == -EPROTO)
        return afork_server_protocol_error(s, "malformed string list");
    return r < 0 ? r : AFORK_NEXT;
}

static int
handle_handle(struct afork_server *s, const struct afork_frame *frame)
{
    int r = afork_args_add_fd_take(&s->args, frame->fd);

    if (r == -EMFILE)
        return afork_server_fail(s, "handle", EMFILE, "OSError",
                                 "too many pending descriptors", "");
    return r < 0 ? r : AFORK_NEXT;
}

static int
handle_ready(struct afork_server *s, const struct afork_frame *frame)
{
    uint64_t token;
    int spares = frame->len == sizeof token + 1; /* answered when idle */

    if (frame->len != sizeof token && !spares)
        return afork_server_protocol_error(s, "malformed ready request");
    memcpy(&token, frame->payload, sizeof token);
    afork_report_started(s);
    if (spares)
        s->spares.asked = token; /* as those before it are, then */
    else
        afork_report_done(s, token, 0);
    return AFORK_NEXT;
}

static int
handle_stats(struct afork_server *s, const struct afork_frame *frame)
{
    uint8_t *data;
    size_t len = 0;
    uint64_t token;

    if (frame->len != sizeof token)
        return afork_server_protocol_error(s, "malformed stats request");
    memcpy(&token, frame->payload, sizeof token);
    afork_report_started(s);
    data = s->ops->stats(s->self, &len);
    afork_report_stats(s, token, data, data ? len : 0);
    free(data);
    return AFORK_NEXT;
}

static int
handle_spares(struct afork_server *s, const struct afork_frame *frame)
{
    uint32_t most;

    if (frame->len != sizeof most)
        return afork_server_protocol_error(s, "malformed spares request");
    memcpy(&most, frame->payload, sizeof most);
    afork_spares_set(s, most);
    return AFORK_NEXT;
}

static int
handle_run(struct afork_server *s, const struct afork_frame *frame)
{
    if (afork_args_tail_has_lost(&s->args, s->args.n))
        return afork_server_fail(
            s, "run", EMFILE, "OSError",
            "a descriptor was lost: no free slot in the process", "");
    afork_spares_set(s, 0);
    if (afork_server_settle(s))
        return AFORK_NEXT;
    afork_report_started(s);
    if (s->ops->find(s->self, frame->payload, frame->len, &s->failure) < 0)
        return callback_failed(s);
    /* Who reads the report may send a signal at once, to the function. */
    afork_signals_leave(&s->signals);
    afork_report_running(s);
    afork_server_flush_all(s);
    return AFORK_ENTER;
}

/* Whether what is forked from here on differs from what was before. */
static int
is_change(uint8_t letter)
{
    switch (letter) {
    case AFORK_CMD_EVAL:
    case AFORK_CMD_EVAL_TYPED:
    case AFORK_CMD_IMPORT:
    case AFORK_CMD_SET:
    case AFORK_CMD_ARGS:
    case AFORK_CMD_TEXT:
    case AFORK_CMD_HANDLE:
        return 1;
    }
    return 0;
}

static int
dispatch(struct afork_server *s, struct afork_frame *frame)
{
    afork_spares_check_args(s);
    /* A spare that dies with a request is replaced by a fork, which is to be
     * one of the template as it was when that was made. */
    if (s->spares.n && is_change(frame->letter) && afork_server_settle(s)) {
        afork_fd_close(&frame->fd); /* its parent's */
        return AFORK_NEXT;
    }
    if (s->failure.payload && frame->letter == AFORK_CMD_SPAWN)
        return afork_server_refuse_spawn(s, frame);
    if (s->failure.payload && frame->letter != AFORK_CMD_HANDLE &&
        frame->letter != AFORK_CMD_FORK &&
        frame->letter != AFORK_CMD_FORK_ID &&
        frame->letter != AFORK_CMD_FORK_MANY &&
        (frame->letter != AFORK_CMD_STATS || s->plain))
        return AFORK_NEXT;
    switch (frame->letter) {
    case AFORK_CMD_EVAL:
        return handle_command(s, frame);
    case AFORK_CMD_ARGS:
        return handle_strings(s, AFORK_ARG_BYTES, frame);
    case AFORK_CMD_HANDLE:
        return handle_handle(s, frame);
    case AFORK_CMD_FORK:
        return afork_server_fork(s);
    case AFORK_CMD_RUN:
        return handle_run(s, frame);
    }
    if (s->plain) {
        afork_fd_close(&frame->fd);
        return afork_server_protocol_error(s, "unknown command");
    }
    switch (frame->letter) {
    case AFORK_CMD_EVAL_TYPED:
    case AFORK_CMD_IMPORT:
    case AFORK_CMD_SET:
        return handle_command(s, frame);
    case AFORK_CMD_TEXT:
        return handle_strings(s, AFORK_ARG_TEXT, frame);
    case AFORK_CMD_FORK_ID:
        return afork_server_fork_id(s, frame);
    case AFORK_CMD_FORK_MANY:
        return afork_server_fork_many(s, frame);
    case AFORK_CMD_STATS:
        return handle_stats(s, frame);
    case AFORK_CMD_SPARES:
        return handle_spares(s, frame);
    case AFORK_CMD_READY:
        return handle_ready(s, frame);
    case AFORK_CMD_EXEC:
        return afork_server_exec(s, frame);
    case AFORK_CMD_SPAWN:
        return afork_server_spawn(s, frame);
    default:
        return afork_server_protocol_error(s, "unknown command");
    }
}

/* Waits for a command, a child, an answer of a spare, or until a report can be
 * sent, at most so many milliseconds.  The POLL* of the socket; -1 when time is
 * up. */
static int
wait_event(struct afork_server *s, short events, int timeout)
{
    struct pollfd fds[1 + AFORK_SPARES_MAX] = {{.fd = s->sock}};
    size_t all = 1 + afork_spares_poll(&s->spares, fds + 1);
    int early =
        s->out.crowded && (timeout < 0 || timeout > AFORK_OUTQ_BACK_OFF);
    struct timespec time;
    int n;

    if (early)
        timeout = AFORK_OUTQ_BACK_OFF;
    time = (struct timespec){timeout / 1000, timeout % 1000 * 1000000L};
    fds[0].events = events;
    if (afork_outq_len(&s->out) && !s->out.crowded)
        fds[0].events |= POLLOUT;
    n = ppoll(fds, all, timeout < 0 ? NULL : &time, &s->signals.wait_mask);
    if (n < 0 && errno == EINTR)
        s->ops->interrupted(s->self);
    if (n >= 0 && all > 1)
        afork_spares_answers(s);
    /* A descriptor may be about to come. */
    if (n > 0 && fds[0].revents & POLLIN)
        afork_spares_make_room(s);
    return n > 0 ? fds[0].revents : n < 0 || early ? 0 : -1;
}

/* There is no command to execute: waits for one, or makes a spare. */
static int
idle(struct afork_server *s)
{
    afork_report_started(s);
    afork_server_reap(s);
    afork_spares_tell(s);
    afork_server_flush(s);
    if (afork_server_fork_orphans(s))
        return AFORK_NEXT;
    if (wait_event(s, POLLIN, afork_spares_timeout(s)) >= 0)
        return AFORK_NEXT;
    return afork_spares_tend(s);
}

int
afork_server_settle(struct afork_server *s)
{
    for (;;) {
        struct pollfd fds[AFORK_SPARES_MAX];
        size_t n;

        if (afork_server_fork_orphans(s))
            return 1;
        n = afork_spares_poll(&s->spares, fds);
        if (!n)
            return 0;
        if (poll(fds, n, afork_spares_patience(&s->spares)) >= 0)
            afork_spares_answers(s);
    }
}

/* After end of file: half closed, but there are children to reap and perhaps
 * reports that the application has not read yet. */
static int
finish(struct afork_server *s)
{
    afork_spares_set(s, 0);
    for (;;) {
        int event;

        afork_server_reap(s);
        afork_server_flush(s);
        if (afork_server_fork_orphans(s))
            return AFORK_NEXT;
        if (s->plain || (!s->children.n && !afork_outq_len(&s->out)))
            return AFORK_END;
        event = wait_event(s, 0, afork_spares_patience(&s->spares));
        if (event > 0 && event & (POLLHUP | POLLERR))
            return AFORK_END; /* the application has gone: they go with us */
    }
}

int
afork_serve(struct afork_server *s)
{
    struct afork_frame frame;
    int r = AFORK_NEXT;

    afork_signals_enter(&s->signals);
    if (s->failure.payload) { /* failed before it began: say so, then answer */
        afork_report_started(s);
        afork_report_failure(s);
    }
    while (r == AFORK_NEXT) {
        int got = afork_reader_next(&s->in, s->sock, &frame);

        if (got > 0) {
            int carried = frame.fd >= 0;

            r = dispatch(s, &frame);
            if (carried)
                afork_spares_make_room(s);
        } else if (got == 0) {
            r = idle(s);
        } else if (got == -EPIPE) {
            r = finish(s);
        } else {
            const char *why = got == -EMSGSIZE ? "frame over the cap"
                                               : "broken stream of commands";

            afork_server_fail(s, "protocol", -got, "ProtocolError", why, "");
            r = got;
        }
        if (afork_outq_len(&s->out))
            afork_server_flush(s);
    }
    if (r != AFORK_ENTER) /* run has done so */
        afork_signals_leave(&s->signals);
    return r;
}
