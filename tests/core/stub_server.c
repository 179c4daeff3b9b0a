/*
 * The server loop with a toy language instead of Python.
 *
 *   stub_server SOCK LOG [p][d]     plain, detached
 *
 * Every callback is logged, one line each, behind the process id.  LOG is held
 * by each server and by nothing else: its end of file means that all are gone.
 *
 * What EVAL runs (its first string; IMPORT, SET and EVAL_TYPED succeed):
 *   ok, fail, nomem       as named
 *   period:N              spares become fewer after N ms
 *   patience:N            spares that take longer than N ms are killed
 *   forkfail              the next fork is refused with EAGAIN
 *   nofile                leaves no free descriptor;  "morefiles" undoes it
 *   stranger              leaves a zombie that the loop does not know
 *   steal                 waits for all children of this process
 *   crowd:N               the next N sends meet the limit in flight
 *   nopidfd, nocloexec    an older kernel
 *   ignore                CHLD and TERM ignored, USR1 blocked
 *   mask                  logs what is blocked and the handlers
 * What RUN finds: dump, hold, exit:N, kill:N; nothing else.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include "shim.h"

extern char **environ;

static int log_fd, fork_fails;
static struct afork_server *served;
static rlim_t files_before;
static char function[256];

static struct afork_str
str_of(const char *text)
{
    return (struct afork_str){(const uint8_t *)text, strlen(text)};
}

static int
failed(struct afork_failure *f, const char *stage, const char *message)
{
    afork_failure_set(f, stage, EINVAL, str_of("ValueError"), str_of(message),
                      str_of("Traceback"), str_of("stub.c"));
    return -1;
}

static void
dump_status(int to)
{
    FILE *status = fopen("/proc/self/status", "re");
    char line[256];

    while (status && fgets(line, sizeof line, status))
        if (!strncmp(line, "Sig", 3) && line[3] != 'Q')
            dprintf(to, "%s", line);
    if (status)
        fclose(status);
}

static void
no_more_files(void)
{
    struct rlimit limit;
    int free_slot = fcntl(0, F_DUPFD, 0);

    close(free_slot);
    getrlimit(RLIMIT_NOFILE, &limit);
    files_before = limit.rlim_cur;
    limit.rlim_cur = (rlim_t)free_slot;
    setrlimit(RLIMIT_NOFILE, &limit);
}

static void
more_files(void)
{
    struct rlimit limit;

    getrlimit(RLIMIT_NOFILE, &limit);
    limit.rlim_cur = files_before;
    setrlimit(RLIMIT_NOFILE, &limit);
}

static void
leave_zombie(void)
{
    siginfo_t info;
    pid_t pid = fork();

    if (pid == 0)
        _exit(77);
    while (waitid(P_PID, (id_t)pid, &info, WEXITED | WNOWAIT) < 0 &&
           errno == EINTR)
        ;
}

static int
op_command(void *self, uint8_t letter, const uint8_t *payload, size_t len,
           struct afork_failure *ret_failure)
{
    struct afork_strs list = {payload, payload + len};
    struct afork_str code = {(const uint8_t *)"", 0};
    char text[64] = "";
    int r = afork_wire_next(&list, &code);

    (void)self;
    if (r < 0)
        return failed(ret_failure, "eval", "malformed");
    memcpy(text, code.data, code.len < 63 ? code.len : 63);
    dprintf(log_fd, "%d %c %zu %s\n", getpid(), letter, len, text);
    if (letter != AFORK_CMD_EVAL || !strcmp(text, "ok"))
        return 0;
    if (!strcmp(text, "nomem"))
        return -1;
    if (!strncmp(text, "period:", 7))
        served->spares.period = atoi(text + 7);
    else if (!strncmp(text, "patience:", 9))
        served->spares.patience = atoi(text + 9);
    else if (!strcmp(text, "forkfail"))
        fork_fails = 1;
    else if (!strcmp(text, "nofile"))
        no_more_files();
    else if (!strcmp(text, "morefiles"))
        more_files();
    else if (!strcmp(text, "stranger"))
        leave_zombie();
    else if (!strcmp(text, "steal"))
        while (wait(NULL) > 0 || errno == EINTR)
            ;
    else if (!strncmp(text, "crowd:", 6))
        shim.crowd = atoi(text + 6);
    else if (!strcmp(text, "nopidfd"))
        shim.no_pidfd_open = 1;
    else if (!strcmp(text, "nocloexec"))
        shim.no_close_range = 1;
    else if (!strcmp(text, "mask"))
        dump_status(log_fd);
    else if (!strcmp(text, "ignore")) {
        sigset_t usr1;

        signal(SIGCHLD, SIG_IGN);
        signal(SIGTERM, SIG_IGN);
        sigemptyset(&usr1);
        sigaddset(&usr1, SIGUSR1);
        sigprocmask(SIG_BLOCK, &usr1, NULL);
    } else
        return failed(ret_failure, "eval", text);
    return 0;
}

static int
op_find(void *self, const uint8_t *name, size_t len,
        struct afork_failure *ret_failure)
{
    static const char *const known[] = {"dump", "hold", "exit:", "kill:"};
    sigset_t now;

    (void)self;
    sigprocmask(SIG_BLOCK, NULL, &now);
    dprintf(log_fd, "%d find %.*s%s\n", getpid(), len < 200 ? (int)len : 200,
            name, sigismember(&now, SIGCHLD) ? "" : " with CHLD open");
    for (size_t i = 0; i < sizeof known / sizeof *known; i++) {
        if (len >= sizeof function || len < strlen(known[i]) ||
            memcmp(name, known[i], strlen(known[i])))
            continue;
        memcpy(function, name, len);
        return 0;
    }
    return failed(ret_failure, "run", "no such function");
}

static pid_t
op_fork(void *self)
{
    pid_t pid;

    (void)self;
    if (fork_fails) {
        fork_fails = 0;
        return -EAGAIN;
    }
    pid = fork();
    return pid < 0 ? -errno : pid;
}

static uint8_t *
op_stats(void *self, size_t *ret_len)
{
    uint8_t *data = malloc(2);

    (void)self;
    if (data)
        memcpy(data, "\1k", 2);
    *ret_len = 2;
    return data;
}

static void
op_warm(void *self)
{
    (void)self;
    dprintf(log_fd, "%d warm\n", getpid());
}

static void
op_interrupted(void *self)
{
    (void)self;
}

static char *const *
op_environ(void *self)
{
    (void)self;
    return environ;
}

static void
dump(const struct afork_server *s)
{
    DIR *dir = opendir("/proc/self/fd");
    struct dirent *entry;

    while (dir && (entry = readdir(dir))) {
        int fd = atoi(entry->d_name);

        if (entry->d_name[0] != '.' && fd != dirfd(dir) && fd > 2 &&
            fd != log_fd && fd != s->sock)
            dprintf(s->sock, "fd %d\n", fd);
    }
    closedir(dir);
    dump_status(s->sock);
    for (size_t i = 0; i < s->args.n; i++) {
        const struct afork_arg *a = &s->args.list[i];

        if (a->kind == AFORK_ARG_HANDLE)
            dprintf(s->sock, "handle %d\n", a->fd);
        else
            dprintf(s->sock, "%s %.*s\n",
                    a->kind == AFORK_ARG_TEXT ? "text" : "bytes", (int)a->len,
                    (const char *)a->data);
    }
}

static int
enter(const struct afork_server *s)
{
    char bytes[64];

    if (!strcmp(function, "dump"))
        dump(s);
    else if (!strcmp(function, "hold"))
        while (read(s->sock, bytes, sizeof bytes) > 0)
            ;
    else if (!strncmp(function, "exit:", 5))
        return atoi(function + 5);
    else
        raise(atoi(function + 5));
    return 0;
}

int
main(int argc, char **argv)
{
    static const struct afork_ops ops = {
        .command = op_command,
        .find = op_find,
        .fork = op_fork,
        .warm = op_warm,
        .stats = op_stats,
        .interrupted = op_interrupted,
        .environ = op_environ,
    };
    struct afork_server server;
    const char *flags = argc > 3 ? argv[3] : "";
    int r;

    if (argc < 3)
        return 99;
    log_fd = atoi(argv[2]);
    served = &server;
    afork_server_init_take(&server, atoi(argv[1]), strchr(flags, 'p') != NULL,
                           &ops, NULL);
    server.detached = strchr(flags, 'd') != NULL;
    r = afork_serve(&server);
    dprintf(log_fd, "%d left %d%s\n", getpid(), r,
            shim.busy ? " after waiting busily" : "");
    if (r == AFORK_ENTER)
        r = enter(&server);
    afork_server_free(&server);
    return r < 0 ? 100 : r;
}
