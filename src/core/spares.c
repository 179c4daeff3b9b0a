/* Spares: children forked in advance, so that a start is a message. */
#define _GNU_SOURCE
#include "spares.h"

#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <string.h>
#include <time.h>

#include "fd.h"
#include "fdpass.h"
#include "report.h"
#include "serve_parts.h"

enum {
    PERIOD = 10000, /* milliseconds after which unused ones become fewer */
    IDLE = 1,       /* milliseconds without a command that count as idle */
    PATIENCE = 20,  /* of a template that is never idle, in milliseconds */
    RETRY = 100,    /* after a failed fork; doubled up to 64 times that */
    TAKE = 1000, /* milliseconds for taking a request: some 30 us are usual */
};

static int64_t
now(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000 + t.tv_nsec / 1000000;
}

static int
is_idle(const struct afork_spare *one)
{
    return one->link >= 0 && one->sock < 0;
}

static int
is_handed(const struct afork_spare *one)
{
    return one->link >= 0 && one->sock >= 0;
}

void
afork_spares_init(struct afork_spares *p)
{
    memset(p, 0, offsetof(struct afork_spares, list));
    p->period = PERIOD;
    p->patience = TAKE;
}

void
afork_spares_forget(struct afork_spares *p)
{
    for (size_t i = 0; i < p->n; i++) {
        afork_fd_close(&p->list[i].link);
        afork_fd_close(&p->list[i].sock);
    }
    afork_spares_init(p);
}

size_t
afork_spares_ready(const struct afork_spares *p)
{
    size_t ready = 0;

    for (size_t i = 0; i < p->n; i++)
        ready += (size_t)is_idle(&p->list[i]);
    return ready;
}

static void
remove_at(struct afork_spares *p, size_t at)
{
    afork_fd_close(&p->list[at].link);
    afork_fd_close(&p->list[at].sock);
    p->list[at] = p->list[--p->n];
}

/* Lets go of idle ones until no more than so many are left. */
static void
trim(struct afork_spares *p, size_t keep)
{
    size_t ready = afork_spares_ready(p);

    for (size_t i = p->n; i-- > 0 && ready > keep;)
        if (is_idle(&p->list[i])) {
            pid_t pid = p->list[i].pid;

            remove_at(p, i);
            kill(pid, SIGCONT); /* a stopped one would not notice */
            ready--;
        }
}

void
afork_spares_drop(struct afork_server *s)
{
    trim(&s->spares, 0);
    s->spares.eager = 0;
}

void
afork_spares_check_args(struct afork_server *s)
{
    /* Lost ones can be replaced by others: then the number says nothing.
     * More of them may be those of a request, which takes them away again. */
    if (s->spares.n && s->args.n < s->spares.args_n)
        afork_spares_drop(s);
}

void
afork_spares_set(struct afork_server *s, unsigned most)
{
    struct afork_spares *p = &s->spares;

    p->most = most < AFORK_SPARES_MAX ? most : AFORK_SPARES_MAX;
    p->target = p->most;
    p->demand = p->peak = 0;
    p->not_yet = 0;
    p->retries = 0;
    p->due = now() + p->period;
    trim(p, p->target);
}

int
afork_spares_start(struct afork_server *s, int sock, uint64_t id)
{
    struct afork_spares *p = &s->spares;

    if (!p->most)
        return 0;
    if (s->args.n != p->args_n)
        afork_spares_drop(s);
    p->eager = 0;
    p->demand++;
    if (p->peak < p->demand)
        p->peak = p->demand;
    for (size_t i = p->n; i-- > 0;) {
        struct afork_spare *one = &p->list[i];

        if (!is_idle(one))
            continue;
        if (afork_fdpass_send(one->link, &id, sizeof id, sock) == sizeof id) {
            one->sock = sock;
            one->id = id;
            one->until = now() + p->patience;
            p->hits++;
            return 1;
        }
        p->died++; /* it will be reaped: a child like any other */
        remove_at(p, i);
    }
    p->misses++;
    if (p->target < p->most)
        p->target = p->target * 2 < p->most ? p->target * 2 + 1 : p->most;
    return 0;
}

/* Whether it has sent its byte: 1; 0 not yet; -1: it has died before. */
static int
answer_of(const struct afork_spare *one)
{
    int fd = AFORK_NOFD;
    uint8_t byte;
    ssize_t n = afork_fdpass_recv(one->link, &byte, 1, &fd);

    if (n > 0)
        afork_fd_close(&fd);
    return n == 1 ? 1 : n == -EAGAIN ? 0 : -1;
}

void
afork_spares_answers(struct afork_server *s)
{
    struct afork_spares *p = &s->spares;
    int64_t time = now();

    for (size_t i = p->n; i-- > 0;) {
        struct afork_spare *one = &p->list[i];
        int answer = is_handed(one) ? answer_of(one) : 0;

        if (answer > 0) {
            afork_children_name(&s->children, one->pid, one->id);
            remove_at(p, i);
        } else if (answer < 0) {
            p->died++;
            afork_fd_close(&one->link);
        } else if (is_handed(one) && one->until && one->until <= time) {
            /* It holds the other end of the link, so the number is still its
             * own.  Its socket is given to nobody before the link has ended:
             * it may just be about to take it. */
            kill(one->pid, SIGKILL);
            one->until = 0;
        }
    }
}

int
afork_spares_orphan(struct afork_server *s, uint64_t *ret_id)
{
    struct afork_spares *p = &s->spares;

    for (size_t i = 0; i < p->n; i++) {
        int sock = p->list[i].sock;

        if (p->list[i].link >= 0)
            continue;
        *ret_id = p->list[i].id;
        p->list[i].sock = AFORK_NOFD;
        remove_at(p, i);
        return sock;
    }
    return AFORK_NOFD;
}

void
afork_spares_exited(struct afork_server *s, struct afork_child *child)
{
    struct afork_spares *p = &s->spares;

    for (size_t i = 0; i < p->n; i++) {
        struct afork_spare *one = &p->list[i];

        if (one->pid != child->pid || one->link < 0)
            continue;
        if (is_handed(one) && answer_of(one) > 0) {
            child->id = one->id;
            remove_at(p, i);
            return;
        }
        p->died++;
        if (is_handed(one))
            afork_fd_close(&one->link);
        else
            remove_at(p, i);
        return;
    }
}

size_t
afork_spares_poll(const struct afork_spares *p, struct pollfd *fds)
{
    size_t n = 0;

    for (size_t i = 0; i < p->n; i++)
        if (is_handed(&p->list[i]))
            fds[n++] =
                (struct pollfd){.fd = p->list[i].link, .events = POLLIN};
    return n;
}

int
afork_spares_patience(const struct afork_spares *p)
{
    int64_t first = INT64_MAX, left;

    for (size_t i = 0; i < p->n; i++)
        if (is_handed(&p->list[i]) && p->list[i].until &&
            p->list[i].until < first)
            first = p->list[i].until;
    if (first == INT64_MAX)
        return -1;
    left = first - now();
    return left > 0 ? (int)left : 0;
}

/* Whether another one is wanted. */
static int
wants(const struct afork_server *s)
{
    const struct afork_spares *p = &s->spares;

    return p->n < AFORK_SPARES_MAX && !s->failure.payload && !s->mute &&
           !s->plain && afork_spares_ready(p) < p->target;
}

void
afork_spares_tell(struct afork_server *s)
{
    struct afork_spares *p = &s->spares;

    if (!p->asked || (wants(s) && !p->not_yet))
        return;
    afork_report_done(s, p->asked, 1);
    p->asked = 0;
}

int
afork_spares_timeout(struct afork_server *s)
{
    struct afork_spares *p = &s->spares;
    int64_t left, at = p->due;
    int patience = afork_spares_patience(p);

    if (!p->most || (!p->target && !p->n))
        return patience;
    if (wants(s)) {
        if (!p->since)
            p->since = now();
        if (!p->not_yet)
            /* Not for ever: commands that follow each other closely would
             * keep it from making any. */
            return p->eager || now() - p->since >= PATIENCE ? 0 : IDLE;
        if (p->not_yet < at)
            at = p->not_yet;
    } else {
        p->since = 0;
    }
    left = at - now();
    if (patience >= 0 && patience < left)
        return patience;
    return left > 0 ? (int)left : 0;
}

void
afork_spares_adapt(struct afork_spares *p)
{
    if (p->target > p->peak)
        p->target -= (p->target - p->peak + 1) / 2;
    p->peak = p->demand;
    trim(p, p->target);
}

/* Whether four more descriptors are to be had: two for a pair, and some that
 * the next commands may bring. */
static int
has_room(void)
{
    int a[2], b[2], r = afork_fd_pair(a);

    if (r < 0)
        return 0;
    r = afork_fd_pair(b);
    afork_fd_close(&a[0]);
    afork_fd_close(&a[1]);
    if (r < 0)
        return 0;
    afork_fd_close(&b[0]);
    afork_fd_close(&b[1]);
    return 1;
}

int
afork_spares_tend(struct afork_server *s)
{
    struct afork_spares *p = &s->spares;
    int link[2] = {AFORK_NOFD, AFORK_NOFD}, r;
    pid_t pid;

    if (p->due <= now()) {
        afork_spares_adapt(p);
        p->due = now() + p->period;
    }
    /* Before the next one: a template whose starts all find a spare forks
     * nowhere else. */
    if (afork_server_try(s))
        return AFORK_NEXT;
    if (!wants(s) || (p->not_yet && p->not_yet > now()))
        return AFORK_NEXT;
    if (s->args.n != p->args_n)
        afork_spares_drop(s);
    p->args_n = s->args.n;
    r = has_room() ? afork_fd_pair(link) : -EMFILE;
    if (r == 0) {
        /* Now, so that the child closes our end like those of the others. */
        p->list[p->n++] =
            (struct afork_spare){.link = link[0], .sock = AFORK_NOFD};
        r = afork_server_fork_spare_take(s, link[1], &pid);
        if (pid == 0)
            return r;
        if (pid < 0)
            remove_at(p, p->n - 1);
        r = pid < 0 ? (int)pid : 0;
    }
    if (r < 0) {
        p->not_yet = now() + ((int64_t)RETRY << p->retries);
        p->retries += p->retries < 6;
        return AFORK_NEXT;
    }
    p->list[p->n - 1].pid = pid;
    p->not_yet = 0;
    p->since = 0;
    p->retries = 0;
    p->eager = 1;
    if (afork_spares_ready(p) >= p->target)
        p->demand = 0;
    return AFORK_NEXT;
}

void
afork_spares_make_room(struct afork_server *s)
{
    struct afork_spares *p = &s->spares;

    while (afork_spares_ready(p)) {
        int probe = afork_fd_dup(s->sock);

        if (probe >= 0) {
            afork_fd_close(&probe);
            return;
        }
        trim(p, afork_spares_ready(p) - 1);
        p->not_yet = now() + ((int64_t)RETRY << p->retries);
        p->retries += p->retries < 6;
    }
}
