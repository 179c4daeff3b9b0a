/* The children of a template, and reaping them: each has one reaper. */
#define _GNU_SOURCE
#include "children.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>

#include "lent.h"

void
afork_children_init(struct afork_children *c)
{
    memset(c, 0, sizeof *c);
}

void
afork_children_free(struct afork_children *c)
{
    afork_lent_free(c->list, c->lent);
    afork_children_init(c);
}

void
afork_children_lend(struct afork_children *c, struct afork_child *list,
                    size_t n)
{
    c->list = c->lent = list;
    c->cap = n;
}

int
afork_children_reserve(struct afork_children *c)
{
    size_t cap = c->cap ? c->cap * 2 : 64;
    void *p;

    if (c->n < c->cap)
        return 0;
    p = afork_lent_grow(c->list, c->lent, c->n * sizeof *c->list,
                        cap * sizeof *c->list);
    if (!p)
        return -ENOMEM;
    c->list = p;
    c->cap = cap;
    return 0;
}

/* Index of pid, or of where it belongs. */
static size_t
find(const struct afork_children *c, pid_t pid)
{
    size_t low = 0, high = c->n;

    while (low < high) {
        size_t mid = low + (high - low) / 2;

        if (c->list[mid].pid < pid)
            low = mid + 1;
        else
            high = mid;
    }
    return low;
}

void
afork_children_add(struct afork_children *c, pid_t pid, uint64_t id)
{
    size_t at = find(c, pid);

    memmove(c->list + at + 1, c->list + at, (c->n - at) * sizeof *c->list);
    c->list[at] = (struct afork_child){.pid = pid, .id = id};
    c->n++;
}

void
afork_children_name(struct afork_children *c, pid_t pid, uint64_t id)
{
    size_t at = find(c, pid);

    if (at < c->n && c->list[at].pid == pid)
        c->list[at].id = id;
}

/* Reaps the child at an index if it has exited: 1, or 0. */
static int
reap_one(struct afork_children *c, size_t at, afork_child_exited *exited,
         void *arg)
{
    struct afork_child child = c->list[at];
    struct rusage usage;
    int status;
    pid_t pid;

    do
        pid = wait4(child.pid, &status, WNOHANG, &usage);
    while (pid < 0 && errno == EINTR);
    if (pid == 0)
        return 0;
    c->n--;
    memmove(c->list + at, c->list + at + 1, (c->n - at) * sizeof *c->list);
    /* ECHILD: evaluated code waited for -1 and took it; status unknown. */
    if (pid > 0)
        exited(arg, &child, status, &usage);
    else
        exited(arg, &child, -1, NULL);
    return 1;
}

void
afork_children_reap(struct afork_children *c, afork_child_exited *exited,
                    void *arg)
{
    while (c->n) {
        siginfo_t info = {.si_pid = 0};
        size_t at = c->n;

        /* Only look: the first one may be a stranger's. */
        if (waitid(P_ALL, 0, &info, WEXITED | WNOHANG | WNOWAIT) == 0) {
            if (info.si_pid == 0)
                return;
            at = find(c, info.si_pid);
        } else if (errno == EINTR) {
            continue;
        }
        if (at < c->n && c->list[at].pid == info.si_pid) {
            reap_one(c, at, exited, arg);
            continue;
        }
        /*
         * A stranger's zombie hides those behind it, or (ECHILD) evaluated
         * code has waited for all of ours: ask for each.
         */
        for (at = c->n; at-- > 0;)
            reap_one(c, at, exited, arg);
        return;
    }
}
