/* The trial that shows what the workers of a template use of its text. */
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "fd.h"
#include "fdpass.h"
#include "image.h"
#include "report.h"
#include "serve_parts.h"

enum {
    STARTS = 32,    /* so many and there will be more: a trial costs fifty */
    PATIENCE = 5000 /* milliseconds that a trial may take */
};

/* Reads and forgets until the end of file; 0 if that came in time. */
static int
read_out(int sock)
{
    struct pollfd p = {.fd = sock, .events = POLLIN};
    ssize_t n = -EAGAIN;

    while (n == -EAGAIN || n > 0) {
        uint8_t data[256];
        int fd = AFORK_NOFD, ready = poll(&p, 1, PATIENCE);

        if (ready < 0 && errno == EINTR)
            continue;
        if (ready <= 0)
            return -ETIMEDOUT;
        n = afork_fdpass_recv(sock, data, sizeof data, &fd);
        if (fd >= 0)
            afork_fd_close(&fd);
    }
    return (int)n;
}

static int
send_run(int sock, const char *name)
{
    uint8_t frame[AFORK_HEAD_SIZE + 64];
    size_t len = strlen(name);

    if (len > sizeof frame - AFORK_HEAD_SIZE)
        return -EINVAL;
    afork_wire_put_head(frame, AFORK_CMD_RUN, (uint32_t)len);
    memcpy(frame + AFORK_HEAD_SIZE, name, len);
    return afork_fdpass_send(sock, frame, AFORK_HEAD_SIZE + len, AFORK_NOFD) <
                   0
               ? -EIO
               : 0;
}

/* The status of our child, or -1; it is killed if it does not end. */
static int
wait_for(pid_t pid)
{
    struct pollfd p = {.fd = afork_report_pidfd(pid), .events = POLLIN};
    int status, ready;
    pid_t r;

    do
        ready = p.fd < 0 ? -1 : poll(&p, 1, PATIENCE);
    while (ready < 0 && p.fd >= 0 && errno == EINTR);
    if (ready <= 0)
        kill(pid, SIGKILL); /* our child, not reaped yet */
    do
        r = waitpid(pid, &status, 0);
    while (r < 0 && errno == EINTR);
    return r == pid ? status : -1;
}

/*
 * The copy of the template: starts one worker as the template would, and ends.
 * Returns in that worker.
 */
static void
be_the_copy(struct afork_server *s, struct afork_image *image)
{
    int pair[2];
    pid_t pid;

    afork_args_free(&s->args);
    if (afork_fd_pair(pair) < 0 || send_run(pair[0], s->trial_function) < 0 ||
        afork_image_try(image) < 0)
        _exit(1);
    s->sock = pair[0]; /* the worker closes it like any template's */
    pid = afork_server_fork_unasked(s);
    if (pid == 0) {
        s->sock = pair[1];
        s->trial = image;
        return;
    }
    afork_fd_close(&pair[1]);
    if (pid < 0)
        _exit(1);
    if (read_out(pair[0]) < 0)
        kill(pid, SIGKILL); /* our child, not reaped yet */
    if (wait_for(pid) != 0)
        _exit(1);
    afork_image_note(image);
    _exit(0);
}

int
afork_server_try(struct afork_server *s)
{
    struct afork_image *image;
    int error;
    pid_t pid;

    if (!s->trial_function || s->tried || s->starts < STARTS || s->plain ||
        s->failure.payload)
        return 0;
    s->tried = 1;
    image = afork_image_new(&error);
    if (!image) {
        s->image_error = -error;
        return 0;
    }
    pid = afork_server_fork_unasked(s);
    if (pid == 0) {
        be_the_copy(s, image);
        return 1;
    }
    if (pid < 0) {
        s->image_error = -(int)pid;
        afork_image_free(image);
        return 0;
    }
    s->trial = image;
    s->trial_pid = pid;
    return 0;
}

void
afork_server_tried(struct afork_server *s, pid_t pid, int status)
{
    int pages;

    if (!s->trial || pid != s->trial_pid)
        return;
    pages = status == 0 ? afork_image_apply(s->trial) : -ECHILD;
    s->trial_pid = 0;
    if (pages < 0)
        s->image_error = -pages;
    else
        s->image_pages = (size_t)pages;
    /* Not the shared one: every worker would have its mapping. */
    if (pages > 0)
        s->image = *s->trial;
    afork_image_free(s->trial);
    s->trial = NULL;
}
