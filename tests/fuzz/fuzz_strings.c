/*
 * String lists, the arguments made of them, and requests for programs.
 *
 * Input: what to do; how many descriptors are pending (bits 0 to 1) and
 * whether one of them was lost (bit 2); the payload.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "args.h"
#include "execreq.h"
#include "serve.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static volatile size_t sum;

static void
check(int good)
{
    if (!good)
        abort();
}

/* What decodes has one encoding only, and it is this one. */
static void
try_list(struct afork_strs list)
{
    const uint8_t *start = list.at;
    size_t size = (size_t)(list.end - list.at), n = 0;
    struct afork_str *strs = calloc(size + 1, sizeof *strs);
    uint8_t *again = malloc(size + 1);
    int r;

    while ((r = afork_wire_next(&list, &strs[n])) > 0) {
        check(strs[n].data >= start);
        check(strs[n].len <= (size_t)(list.end - strs[n].data));
        n++;
    }
    check(r == 0 || r == -EPROTO);
    if (r == 0) {
        check(afork_wire_list_size(strs, n) == (int64_t)size);
        afork_wire_put_list(again, strs, n);
        check(!size || !memcmp(again, start, size));
    }
    free(again);
    free(strs);
}

static void
try_args(struct afork_args *a, struct afork_strs list)
{
    int r = afork_args_add_list(a, AFORK_ARG_BYTES, list);

    check(r == 0 || r == -EPROTO);
    for (size_t i = 0; i < a->n; i++)
        for (size_t k = 0; k < a->list[i].len; k++)
            sum += a->list[i].data[k];
    afork_args_drop(a, a->n / 2);
    check(afork_args_tail_has_lost(a, a->n + 1) ==
          afork_args_tail_has_lost(a, a->n));
}

static void
try_exec(const struct afork_args *a, struct afork_strs list)
{
    static char *const environment[] = {(char *)(uintptr_t) "A=1", NULL};
    struct afork_execreq q;
    int r = afork_execreq_get(&q, list, a, environment);

    check(r == 0 || r == -EPROTO || r == -EMFILE);
    if (r < 0)
        return;
    check(q.handles <= a->n);
    sum += strlen(q.exec.program) + strlen(q.exec.search);
    sum += q.exec.cwd ? strlen(q.exec.cwd) : 0;
    for (char *const *at = q.exec.argv; *at; at++)
        sum += strlen(*at);
    for (char *const *at = q.exec.envp; *at; at++)
        sum += strlen(*at);
    for (size_t i = 0; i < q.exec.nfds; i++)
        check(
            (q.exec.fds[i].from >= 0 || q.exec.fds[i].from == AFORK_NULLFD) &&
            q.exec.fds[i].to >= 0);
    check(q.exec.cwd_fd >= -1);
    afork_execreq_free(&q);
}

static void
try_failure(struct afork_strs list)
{
    struct afork_failure f = {NULL, 0};
    struct afork_strs got;
    struct afork_str s[4] = {{0}}, str;
    int n = 0;

    for (int i = 0; i < 4; i++)
        if (afork_wire_next(&list, &s[i]) <= 0)
            s[i] = (struct afork_str){NULL, 0};
    check(afork_failure_set(&f, "stage", -1, s[0], s[1], s[2], s[3]) == 0);
    got = (struct afork_strs){f.payload, f.payload + f.len};
    while (afork_wire_next(&got, &str) > 0)
        n++;
    check(n == 6 && got.at == got.end);
    free(f.payload);
}

int
LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct afork_args args;
    struct afork_strs list;
    uint8_t *exact;

    if (size < 2)
        return 0;
    /* A copy of exactly that size: a byte too far is seen. */
    exact = malloc(size - 2 ? size - 2 : 1);
    memcpy(exact, data + 2, size - 2);
    list = (struct afork_strs){exact, exact + size - 2};
    afork_args_init(&args);
    /* Numbers that are nothing here: borrowed, never used, closed in vain. */
    for (int i = 0; i < (data[1] & 3); i++)
        afork_args_add_fd_take(&args, 100000 + i);
    if (data[1] & 4)
        afork_args_add_fd_take(&args, AFORK_LOSTFD);
    switch (data[0] & 3) {
    case 0:
        try_list(list);
        break;
    case 1:
        try_args(&args, list);
        break;
    case 2:
        try_exec(&args, list);
        break;
    case 3:
        try_failure(list);
        break;
    }
    afork_args_free(&args);
    free(exact);
    return 0;
}
