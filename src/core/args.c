/* The arguments that wait for run: strings and descriptors, in order. */
#include "args.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "fd.h"

void
afork_args_init(struct afork_args *a)
{
    memset(a, 0, sizeof *a);
    /* Those that wait for run, and as many again for one request. */
    a->handles_max = 2 * AFORK_HANDLES_MAX;
}

void
afork_args_free(struct afork_args *a)
{
    afork_args_drop(a, a->n);
    free(a->list);
    a->list = NULL;
    a->cap = 0;
}

static int
push(struct afork_args *a, struct afork_arg arg)
{
    if (a->n == a->cap) {
        size_t cap = a->cap ? a->cap * 2 : 16;
        void *p = realloc(a->list, cap * sizeof *a->list);

        if (!p)
            return -ENOMEM;
        a->list = p;
        a->cap = cap;
    }
    a->list[a->n++] = arg;
    return 0;
}

int
afork_args_add_list(struct afork_args *a, enum afork_arg_kind kind,
                    struct afork_strs list)
{
    struct afork_str str;
    int r;

    while ((r = afork_wire_next(&list, &str)) > 0) {
        struct afork_arg arg = {
            .kind = kind, .fd = AFORK_NOFD, .len = str.len};

        arg.data = malloc(str.len ? str.len : 1);
        if (!arg.data)
            return -ENOMEM;
        if (str.len)
            memcpy(arg.data, str.data, str.len);
        r = push(a, arg);
        if (r < 0) {
            free(arg.data);
            return r;
        }
    }
    return r;
}

int
afork_args_add_fd_take(struct afork_args *a, int fd)
{
    struct afork_arg arg = {
        .kind = fd >= 0 ? AFORK_ARG_HANDLE : AFORK_ARG_LOST,
        .fd = fd >= 0 ? fd : AFORK_NOFD,
    };
    int r = a->handles < a->handles_max ? push(a, arg) : -EMFILE;

    if (r < 0)
        afork_fd_close(&fd);
    else
        a->handles++;
    return r;
}

static int
is_handle(const struct afork_arg *arg)
{
    return arg->kind == AFORK_ARG_HANDLE || arg->kind == AFORK_ARG_LOST;
}

int
afork_args_tail_is_handles(const struct afork_args *a, size_t n)
{
    if (n > a->n)
        return 0;
    for (size_t i = a->n - n; i < a->n; i++)
        if (!is_handle(&a->list[i]))
            return 0;
    return 1;
}

int
afork_args_tail_has_lost(const struct afork_args *a, size_t n)
{
    for (size_t i = n > a->n ? 0 : a->n - n; i < a->n; i++)
        if (a->list[i].kind == AFORK_ARG_LOST)
            return 1;
    return 0;
}

int
afork_args_pop_fd(struct afork_args *a)
{
    struct afork_arg *last = &a->list[--a->n];

    a->handles--;
    return last->kind == AFORK_ARG_LOST ? AFORK_LOSTFD : last->fd;
}

void
afork_args_drop(struct afork_args *a, size_t n)
{
    for (; n > 0 && a->n > 0; n--) {
        struct afork_arg *last = &a->list[--a->n];

        if (is_handle(last))
            a->handles--;
        afork_fd_close(&last->fd);
        free(last->data);
        last->data = NULL;
    }
}
