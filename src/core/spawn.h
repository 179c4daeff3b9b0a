/*
 * Turning a process into a program, and starting one: the only vfork.
 *
 * Everything is converted by the caller; the code that runs between vfork and
 * exec touches no heap, no lock and no Python.  The program gets default
 * signal dispositions, an empty mask and exactly the descriptors of the map.
 */
#ifndef AFORK_SPAWN_H
#define AFORK_SPAWN_H

#include <sys/types.h>

#include "base.h"

/* As a source of a map: /dev/null, opened in the program's process. */
#define AFORK_NULLFD (-3)

struct afork_fdmap {
    int from; /* borrowed, or AFORK_NULLFD */
    int to;
};

struct afork_exec {
    const char *program; /* with a slash as it is, else searched */
    const char *search;  /* PATH to search; NULL for none */
    char *const *argv;
    char *const *envp;
    const char *cwd; /* or NULL */
    int cwd_fd;      /* borrowed, or AFORK_NOFD; before cwd */
    int mask;        /* umask, or -1 */
    int group;       /* process group to join, 0 for a new one, or -1 */
    int session;     /* whether to lead a session of its own */
    int deathsig;    /* signal when the parent dies, or 0 */
    pid_t parent;    /* who that is: it may have died already */
    const struct afork_fdmap *fds;
    size_t nfds;
};

/* Where a start failed: the errno alone does not say which name is meant. */
enum afork_stage {
    AFORK_STAGE_NONE,
    AFORK_STAGE_FORK,
    AFORK_STAGE_SETUP,
    AFORK_STAGE_CWD,
    AFORK_STAGE_EXEC,
};
/* "fork", "setup", "cwd", "exec" or "". */
const char *afork_stage_name(enum afork_stage stage);

/*
 * Becomes the program; returns only on failure, with -errno and *ret_stage.
 * Descriptors may have been replaced by then, so *status, a descriptor that
 * the caller still needs after a failure, is moved out of the way (owned).
 */
int afork_exec_self(const struct afork_exec *x, int *status,
                    enum afork_stage *ret_stage);

/*
 * Starts the program.  Returns once it runs or has failed to: its pid, or
 * -errno and *ret_stage with the child already reaped.
 */
pid_t afork_spawn(const struct afork_exec *x, enum afork_stage *ret_stage);

#endif
