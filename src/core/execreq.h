/* The payload of EXEC and SPAWN, and the request that it asks for. */
#ifndef AFORK_EXECREQ_H
#define AFORK_EXECREQ_H

#include "args.h"
#include "spawn.h"
#include "wire.h"

/* First string of the payload: numbers, native order. */
struct afork_exec_head {
    int32_t handles; /* how many pending descriptors the request consumes */
    int32_t cwd;     /* which of them is the working directory, or -1 */
    int32_t mask;
    int32_t group;
    int32_t session;
    int32_t argc;
    int32_t envc; /* -1: the environment of the process */
};

/* Second string: an array of these. */
struct afork_exec_fd {
    int32_t from; /* index of a consumed handle, -1 - own descriptor, or: */
#define AFORK_EXEC_NULL INT32_MIN /* /dev/null */
    int32_t to;
};

/* Then: program, search path (of an environment that is sent along; else the
 * process's own counts), directory ("" for none), argv, environment. */

struct afork_execreq {
    struct afork_exec exec;  /* points into the fields below */
    size_t handles;          /* to be dropped from the arguments afterwards */
    char *text;              /* owned: all strings, NUL-terminated */
    char **pointers;         /* owned: argv, NULL, envp, NULL */
    struct afork_fdmap *fds; /* owned; the descriptors in it are borrowed */
};

/*
 * Decodes a request; handles are looked up at the tail of args and stay
 * there.  -EPROTO for a malformed one, -EMFILE if one of its descriptors was
 * lost on the way, -ENOMEM.  On failure there is nothing to free.
 */
int afork_execreq_get(struct afork_execreq *q, struct afork_strs list,
                      const struct afork_args *args, char *const *environ_);
void afork_execreq_free(struct afork_execreq *q);

#endif
