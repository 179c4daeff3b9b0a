/* Turning a process into a program, and starting one: the only vfork. */
#define _GNU_SOURCE
#include "spawn.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdint.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "fd.h"
#include "signals.h"

const char *
afork_stage_name(enum afork_stage stage)
{
    static const char *const names[] = {"", "fork", "setup", "cwd", "exec"};

    return (size_t)stage < sizeof names / sizeof *names ? names[stage] : "";
}

/* Executes program, searching as execvpe does.  Returns -errno. */
static int
exec_search(const struct afork_exec *x)
{
    const char *dir = x->search, *end;
    size_t name = strlen(x->program);
    char path[PATH_MAX];
    int saved = ENOENT;

    if (strchr(x->program, '/') || !dir) {
        execve(x->program, x->argv, x->envp);
        return -errno;
    }
    if (!name)
        return -ENOENT;
    for (;; dir = end + 1) {
        size_t len;

        end = strchrnul(dir, ':');
        len = (size_t)(end - dir);
        if (len + 1 + name + 1 <= sizeof path) {
            memcpy(path, dir, len);
            if (len) /* an empty entry is the working directory */
                path[len++] = '/';
            memcpy(path + len, x->program, name + 1);
            execve(path, x->argv, x->envp);
            /* The first real reason wins over "not there". */
            if (errno != ENOENT && errno != ENOTDIR && saved == ENOENT)
                saved = errno;
        }
        if (!*end)
            return -saved;
    }
}

/*
 * Puts the descriptors of the map in place.  Sources first move above every
 * target, so that no order of the map can overwrite one before its use.
 */
static int
map_fds(const struct afork_exec *x, int *status)
{
    int top = 2, moved[x->nfds + 1];

    for (size_t i = 0; i < x->nfds; i++) {
        if (x->fds[i].to == INT_MAX)
            return -EBADF; /* there is no number above it */
        if (x->fds[i].to > top)
            top = x->fds[i].to;
    }
    for (size_t i = 0; i < x->nfds; i++) {
        int from = x->fds[i].from, null = AFORK_NOFD;

        if (from == AFORK_NULLFD) {
            from = null = open("/dev/null", O_RDWR | O_CLOEXEC);
            if (null < 0)
                return -errno;
        }
        moved[i] = fcntl(from, F_DUPFD_CLOEXEC, top + 1);
        if (moved[i] < 0)
            return -errno;
        afork_fd_close(&null);
    }
    if (*status >= 0 && *status <= top) {
        int r = fcntl(*status, F_DUPFD_CLOEXEC, top + 1);

        if (r < 0)
            return -errno;
        *status = r; /* the old number is close-on-exec, and about to go */
    }
    int r = afork_fd_cloexec_from(3);
    if (r < 0)
        return r;
    for (size_t i = 0; i < x->nfds; i++)
        if (dup2(moved[i], x->fds[i].to) < 0) /* clears close-on-exec */
            return -errno;
    return 0;
}

int
afork_exec_self(const struct afork_exec *x, int *status,
                enum afork_stage *ret_stage)
{
    int r;

    *ret_stage = AFORK_STAGE_SETUP;
    if (x->session && setsid() < 0)
        return -errno;
    if (x->group >= 0 && setpgid(0, x->group) < 0)
        return -errno;
    if (x->deathsig) {
        if (prctl(PR_SET_PDEATHSIG, x->deathsig) < 0)
            return -errno;
        if (x->parent && getppid() != x->parent)
            return -ESRCH;
    }
    *ret_stage = AFORK_STAGE_CWD;
    if (x->cwd_fd >= 0 && fchdir(x->cwd_fd) < 0)
        return -errno;
    if (x->cwd && chdir(x->cwd) < 0)
        return -errno;
    *ret_stage = AFORK_STAGE_SETUP;
    r = map_fds(x, status);
    if (r < 0)
        return r;
    if (x->mask >= 0)
        umask((mode_t)x->mask);
    afork_signals_default();

    *ret_stage = AFORK_STAGE_EXEC;
    return exec_search(x);
}

struct failure {
    int32_t error;
    int32_t stage;
};

/* The child of vfork: never returns, and never into the frame below. */
static _Noreturn void
child_exec(const struct afork_exec *x, int status, pid_t parent)
{
    enum afork_stage stage = AFORK_STAGE_NONE;
    struct failure f;

    f.error = -afork_exec_self(x, &status, &stage);
    f.stage = (int32_t)stage;
    /* 8 bytes to a pipe are written whole; a dead parent needs no answer. */
    if (getppid() == parent)
        while (write(status, &f, sizeof f) < 0 && errno == EINTR)
            ;
    _exit(127);
}

pid_t
afork_spawn(const struct afork_exec *x, enum afork_stage *ret_stage)
{
    int status[2] = {AFORK_NOFD, AFORK_NOFD};
    struct failure f = {0, 0};
    pid_t parent = getpid();
    sigset_t all, old;
    ssize_t n;
    pid_t pid;

    *ret_stage = AFORK_STAGE_FORK;
    if (pipe2(status, O_CLOEXEC) < 0)
        return -errno;
    /*
     * The child shares our memory: no handler of ours may run in it, so all
     * signals stay blocked until it has put their dispositions back.
     */
    sigfillset(&all);
    sigprocmask(SIG_BLOCK, &all, &old);
    pid = vfork();
    if (pid == 0)
        child_exec(x, status[1], parent);
    if (pid < 0)
        f.error = errno;
    sigprocmask(SIG_SETMASK, &old, NULL);

    afork_fd_close(&status[1]);
    if (pid < 0) {
        afork_fd_close(&status[0]);
        return -f.error;
    }
    do
        n = read(status[0], &f, sizeof f);
    while (n < 0 && errno == EINTR);
    afork_fd_close(&status[0]);
    if (n == sizeof f) {
        while (waitpid(pid, NULL, 0) < 0 && errno == EINTR)
            ;
        *ret_stage = (enum afork_stage)f.stage;
        return -f.error;
    }

    *ret_stage = AFORK_STAGE_NONE;
    return pid;
}
