/* The payload of EXEC and SPAWN, and the request that it asks for. */
#include "execreq.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

/* More than any limit on arguments lets through, less than overflows. */
enum { COUNT_MAX = 1 << 22, FDS_MAX = 256 };

/* A string of exactly size bytes. */
static int
next_sized(struct afork_strs *list, void *out, size_t size)
{
    struct afork_str str;

    if (afork_wire_next(list, &str) <= 0 || str.len != size)
        return -EPROTO;
    memcpy(out, str.data, size);
    return 0;
}

/* A string, copied to *at with a NUL behind it; one inside is -EPROTO. */
static int
next_text(struct afork_strs *list, char **at, char **ret_text)
{
    struct afork_str str;

    if (afork_wire_next(list, &str) <= 0 ||
        (str.len && memchr(str.data, 0, str.len)))
        return -EPROTO;
    *ret_text = *at;
    if (str.len)
        memcpy(*at, str.data, str.len);
    (*at)[str.len] = 0;
    *at += str.len + 1;
    return 0;
}

static int
next_fds(struct afork_strs *list, const struct afork_exec_head *head,
         const struct afork_args *args, struct afork_execreq *q)
{
    const struct afork_arg *handles =
        q->handles ? args->list + (args->n - q->handles) : NULL;
    struct afork_str str;
    struct afork_exec_fd fd;

    if (afork_wire_next(list, &str) <= 0 || str.len % sizeof fd ||
        str.len / sizeof fd > FDS_MAX)
        return -EPROTO;
    q->exec.nfds = str.len / sizeof fd;
    q->fds = calloc(q->exec.nfds + 1, sizeof *q->fds);
    if (!q->fds)
        return -ENOMEM;
    for (size_t i = 0; i < q->exec.nfds; i++) {
        memcpy(&fd, str.data + i * sizeof fd, sizeof fd);
        if (fd.to < 0 || fd.from >= head->handles)
            return -EPROTO;
        q->fds[i].to = fd.to;
        if (fd.from == AFORK_EXEC_NULL)
            q->fds[i].from = AFORK_NULLFD;
        else
            q->fds[i].from = fd.from < 0 ? -1 - fd.from : handles[fd.from].fd;
    }
    q->exec.fds = q->fds;
    if (head->cwd >= 0)
        q->exec.cwd_fd = handles[head->cwd].fd;
    return 0;
}

/* What an environment says of where to search; the shell's default if nothing. */
static const char *
path_of(char *const *envp)
{
    for (; envp && *envp; envp++)
        if (strncmp(*envp, "PATH=", 5) == 0)
            return *envp + 5;
    return "/bin:/usr/bin";
}

static int
decode(struct afork_execreq *q, struct afork_strs list,
       const struct afork_args *args, char *const *environ_)
{
    size_t size = (size_t)(list.end - list.at), argc, envc;
    char *at, *program, *search, *cwd;
    struct afork_exec_head head;
    int r;

    if (next_sized(&list, &head, sizeof head) < 0)
        return -EPROTO;
    if (head.handles < 0 || head.argc < 0 || head.argc > COUNT_MAX ||
        head.envc < -1 || head.envc > COUNT_MAX || head.cwd < -1 ||
        head.cwd >= head.handles ||
        !afork_args_tail_is_handles(args, (size_t)head.handles))
        return -EPROTO;
    q->handles = (size_t)head.handles;
    if (afork_args_tail_has_lost(args, q->handles))
        return -EMFILE;
    argc = (size_t)head.argc;
    envc = head.envc < 0 ? 0 : (size_t)head.envc;
    r = next_fds(&list, &head, args, q);
    if (r < 0)
        return r;

    /* Every string loses at least one byte of length and gains a NUL. */
    q->text = at = malloc(size + 1);
    q->pointers = calloc(argc + 1 + envc + 1, sizeof *q->pointers);
    if (!q->text || !q->pointers)
        return -ENOMEM;
    if (next_text(&list, &at, &program) < 0 ||
        next_text(&list, &at, &search) < 0 || next_text(&list, &at, &cwd) < 0)
        return -EPROTO;
    for (size_t i = 0; i < argc; i++)
        if (next_text(&list, &at, &q->pointers[i]) < 0)
            return -EPROTO;
    for (size_t i = 0; i < envc; i++)
        if (next_text(&list, &at, &q->pointers[argc + 1 + i]) < 0)
            return -EPROTO;
    if (list.at != list.end)
        return -EPROTO;

    q->exec.program = program;
    q->exec.search = head.envc < 0 ? path_of(environ_) : search;
    q->exec.argv = q->pointers;
    q->exec.envp = head.envc < 0 ? environ_ : q->pointers + argc + 1;
    q->exec.cwd = *cwd ? cwd : NULL;
    q->exec.mask = head.mask;
    q->exec.group = head.group;
    q->exec.session = head.session;
    return 0;
}

int
afork_execreq_get(struct afork_execreq *q, struct afork_strs list,
                  const struct afork_args *args, char *const *environ_)
{
    int r;

    memset(q, 0, sizeof *q);
    q->exec.cwd_fd = AFORK_NOFD;
    r = decode(q, list, args, environ_);
    if (r < 0)
        afork_execreq_free(q);
    return r;
}

void
afork_execreq_free(struct afork_execreq *q)
{
    free(q->text);
    free(q->pointers);
    free(q->fds);
    q->text = NULL;
    q->pointers = NULL;
    q->fds = NULL;
}
