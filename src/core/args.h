/* The arguments that wait for run: strings and descriptors, in order. */
#ifndef AFORK_ARGS_H
#define AFORK_ARGS_H

#include "base.h"
#include "wire.h"

enum afork_arg_kind {
    AFORK_ARG_BYTES,
    AFORK_ARG_TEXT,
    AFORK_ARG_HANDLE,
    AFORK_ARG_LOST, /* a descriptor that did not arrive: a tombstone */
};

struct afork_arg {
    enum afork_arg_kind kind;
    int fd;        /* owned */
    uint8_t *data; /* owned */
    size_t len;
};

struct afork_args {
    struct afork_arg *list;
    size_t n, cap;
    size_t handles, handles_max;
};

void afork_args_init(struct afork_args *a);
void afork_args_free(struct afork_args *a);

/* Append copies of a string list.  -EPROTO, -ENOMEM. */
int afork_args_add_list(struct afork_args *a, enum afork_arg_kind kind,
                        struct afork_strs list);
/* Appends a descriptor, or a tombstone for AFORK_LOSTFD.  -EMFILE over the
 * cap, -ENOMEM. */
int afork_args_add_fd_take(struct afork_args *a, int fd);

/* Whether the last n arguments are descriptors or tombstones. */
int afork_args_tail_is_handles(const struct afork_args *a, size_t n);
/* Whether one of the last n is a tombstone. */
int afork_args_tail_has_lost(const struct afork_args *a, size_t n);
/* Removes the last one and gives its descriptor, or AFORK_LOSTFD. */
int afork_args_pop_fd(struct afork_args *a);
/* Closes and removes the last n. */
void afork_args_drop(struct afork_args *a, size_t n);

#endif
