/* The children of a template, and reaping them: each has one reaper. */
#ifndef AFORK_CHILDREN_H
#define AFORK_CHILDREN_H

#include <sys/resource.h>
#include <sys/types.h>

#include "base.h"

struct afork_child {
    pid_t pid;
    uint64_t id; /* the application's name for it; 0 if it gave none */
};

struct afork_children {
    struct afork_child *list; /* ordered by pid */
    size_t n, cap;
    void *lent; /* borrowed: the first list, or NULL */
};

void afork_children_init(struct afork_children *c);
/* Memory for the first n; see afork_outq_lend. */
void afork_children_lend(struct afork_children *c, struct afork_child *list,
                         size_t n);
void afork_children_free(struct afork_children *c);

/* Makes sure that the next add cannot fail.  -ENOMEM. */
int afork_children_reserve(struct afork_children *c);
void afork_children_add(struct afork_children *c, pid_t pid, uint64_t id);

/* Gives a child another id. */
void afork_children_name(struct afork_children *c, pid_t pid, uint64_t id);

typedef void afork_child_exited(void *arg, const struct afork_child *child,
                                int status, const struct rusage *usage);

/*
 * Reaps the children of the table that have exited, and no other: evaluated
 * code may have started processes that it wants to wait for itself.
 */
void afork_children_reap(struct afork_children *c, afork_child_exited *exited,
                         void *arg);

#endif
