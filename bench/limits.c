/* Limit programs for bench/start.py and bench/calls.py: what the kernel allows, with nothing of
 * ours around it.
 *
 *   limits fork     socketpair, fork, child _exit, wait for EOF
 *   limits spawn -- PROGRAM ARG...
 *                   posix_spawn, stdio on /dev/null, wait for the status
 *   limits pingpong
 *                   64 bytes to another process and back, over a socketpair
 *
 * Options, behind the first word: --mb N (touched private memory, in 4 KiB
 * pages), --like FILE (the mappings and touched pages of the process whose
 * smaps that is), --inflight K, --seconds S, --count N (instead of S). Prints
 * one line of JSON in the form of every other contender.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "limits.h"

enum { LIMITS_MAX_INFLIGHT = 1024, LIMITS_MESSAGE = 64 };

extern char **environ;

struct options {
    size_t mb;
    const char *like; /* borrowed from argv */
    size_t inflight;
    double seconds;
    long count;
    long cpus;      /* 0: wherever the kernel puts them */
    char **program; /* borrowed from argv */
};

struct meter {
    double begin;
    double cpu_begin;
    double until;
    long started;
    long count;
};

static void
meter_begin(struct meter *meter, const struct options *options)
{
    meter->begin = now();
    meter->cpu_begin = cpu_of(RUSAGE_SELF); /* children are not in it */
    meter->until = meter->begin + options->seconds;
    meter->started = 0;
    meter->count = options->count;
}

static int
meter_more(struct meter *meter)
{
    if (meter->count > 0 ? meter->started >= meter->count
                         : now() >= meter->until)
        return 0;
    meter->started++;
    return 1;
}

static void
meter_print(const struct meter *meter)
{
    double seconds = now() - meter->begin;
    double cpu = cpu_of(RUSAGE_SELF) - meter->cpu_begin;

    printf("{\"n\": %ld, \"seconds\": %.6f, \"cpu_us\": %.3f}\n",
           meter->started, seconds,
           meter->started > 0 ? cpu * 1e6 / (double)meter->started : 0.0);
}

/* One mapping of another process's smaps. */
struct mapping {
    unsigned long from, to, offset;
    char perms[8], path[512];
    unsigned long resident, anonymous; /* kB */
};

/* The same here: same address where that is free, same file, same pages. */
static void
map_like(const struct mapping *m)
{
    const size_t size = m->to - m->from;
    const int prot = (m->perms[0] == 'r' ? PROT_READ : 0) |
                     (m->perms[1] == 'w' ? PROT_WRITE : 0) |
                     (m->perms[2] == 'x' ? PROT_EXEC : 0);
    const int shared = m->perms[3] == 's';
    int fd = m->path[0] == '/' ? open(m->path, O_RDONLY | O_CLOEXEC) : -1;
    int flags = (shared ? MAP_SHARED : MAP_PRIVATE) |
                (fd < 0 ? MAP_ANONYMOUS : 0) | MAP_FIXED_NOREPLACE;
    /* What it has written it could write at some time. */
    int first = m->anonymous ? PROT_READ | PROT_WRITE : prot;
    volatile char *memory;
    size_t at = 0;

    memory = mmap((void *)m->from, size, first, flags, fd, (off_t)m->offset);
    if (memory == MAP_FAILED)
        memory = mmap(NULL, size, first, flags & ~MAP_FIXED_NOREPLACE, fd,
                      (off_t)m->offset);
    if (memory == MAP_FAILED)
        die(m->path);
    for (; at < m->anonymous << 10; at += LIMITS_PAGE)
        memory[at] = 1;
    for (; first & PROT_READ && at < m->resident << 10; at += LIMITS_PAGE)
        (void)memory[at];
    if (first != prot && mprotect((void *)memory, size, prot) < 0)
        die("mprotect");
    if (fd >= 0)
        close(fd);
}

static int
is_special(const struct mapping *m)
{
    return strncmp(m->path, "[v", 2) == 0; /* vdso, vvar: we have our own */
}

static void
become_like(const char *file)
{
    struct mapping m = {0};
    char line[1024];
    FILE *f = fopen(file, "re");

    if (!f)
        die(file);
    while (fgets(line, sizeof line, f)) {
        struct mapping next = {0};

        if (sscanf(line, "%lx-%lx %7s %lx %*s %*s %511s", &next.from, &next.to,
                   next.perms, &next.offset, next.path) >= 4) {
            if (m.to && !is_special(&m))
                map_like(&m);
            m = next;
        } else if (sscanf(line, "Rss: %lu", &m.resident) == 1 ||
                   sscanf(line, "Anonymous: %lu", &m.anonymous) == 1) {
            continue;
        }
    }
    if (m.to && !is_special(&m))
        map_like(&m);
    fclose(f);
}

static int
fork_one(void)
{
    int pair[2];
    pid_t pid;

    if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) < 0)
        die("socketpair");
    pid = fork();
    if (pid < 0)
        die("fork");
    if (pid == 0)
        _exit(0);
    close(pair[1]); /* or its end would never read EOF */
    return pair[0];
}

static void
fork_wait_eof(int fd)
{
    char byte;
    ssize_t got;

    do
        got = read(fd, &byte, 1);
    while (got < 0 && errno == EINTR);
    if (got != 0)
        die("read");
    close(fd);
}

static void
fork_loop(const struct options *options, struct meter *meter)
{
    struct pollfd waiting[LIMITS_MAX_INFLIGHT];
    nfds_t used = 0;

    signal(SIGCHLD, SIG_IGN); /* the kernel reaps: the cheapest way there is */
    meter_begin(meter, options);
    for (;;) {
        while (used < options->inflight && meter_more(meter))
            waiting[used++] =
                (struct pollfd){.fd = fork_one(), .events = POLLIN};
        if (used == 0)
            break;
        if (options->inflight ==
            1) { /* one system call less than poll and read */
            fork_wait_eof(waiting[--used].fd);
            continue;
        }
        if (poll(waiting, used, -1) < 0 && errno != EINTR)
            die("poll");
        for (nfds_t i = used; i-- > 0;) {
            if (waiting[i].revents == 0)
                continue;
            fork_wait_eof(waiting[i].fd);
            waiting[i] = waiting[--used];
        }
    }
}

static void
spawn_loop(const struct options *options, struct meter *meter)
{
    posix_spawn_file_actions_t actions;
    size_t used = 0;
    pid_t pid;
    int error, status;

    error = posix_spawn_file_actions_init(&actions);
    for (int fd = 0; fd < 3 && error == 0; fd++)
        error = posix_spawn_file_actions_addopen(&actions, fd, "/dev/null",
                                                 O_RDWR, 0);
    if (error != 0) {
        errno = error;
        die("posix_spawn_file_actions");
    }
    meter_begin(meter, options);
    for (;;) {
        while (used < options->inflight && meter_more(meter)) {
            error = posix_spawn(&pid, options->program[0], &actions, NULL,
                                options->program, environ);
            if (error != 0) {
                errno = error;
                die(options->program[0]);
            }
            used++;
        }
        if (used == 0)
            break;
        pid = waitpid(-1, &status, 0);
        if (pid < 0)
            die("waitpid");
        if (status != 0) {
            fprintf(stderr, "limits: %s: wait status %d\n",
                    options->program[0], status);
            exit(1);
        }
        used--;
    }
    posix_spawn_file_actions_destroy(&actions);
}

/* Whether a whole message has come; not at the end of the file. */
static int
receive(int fd, char *message)
{
    size_t had = 0;

    while (had < LIMITS_MESSAGE) {
        ssize_t got = read(fd, message + had, LIMITS_MESSAGE - had);

        if (got < 0 && errno == EINTR)
            continue;
        if (got < 0)
            die("read");
        if (got == 0)
            return 0;
        had += (size_t)got;
    }
    return 1;
}

static void
transmit(int fd, const char *message)
{
    ssize_t sent;

    do
        sent = write(fd, message, LIMITS_MESSAGE);
    while (sent < 0 && errno == EINTR);
    if (sent != LIMITS_MESSAGE) /* an empty socket takes that much whole */
        die("write");
}

/* Keep this process on the first or the last processor that it may use. */
static void
stay(int last)
{
    cpu_set_t all, one;
    size_t found = CPU_SETSIZE;

    if (sched_getaffinity(0, sizeof all, &all) < 0)
        die("sched_getaffinity");
    for (size_t cpu = 0; cpu < CPU_SETSIZE && (last || found == CPU_SETSIZE);
         cpu++)
        if (CPU_ISSET(cpu, &all))
            found = cpu;
    CPU_ZERO(&one);
    CPU_SET(found, &one);
    if (sched_setaffinity(0, sizeof one, &one) < 0)
        die("sched_setaffinity");
}

static void
pingpong_loop(const struct options *options, struct meter *meter)
{
    char message[LIMITS_MESSAGE] = {0};
    int pair[2];
    pid_t pid;

    if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) < 0)
        die("socketpair");
    pid = fork();
    if (pid < 0)
        die("fork");
    if (pid == 0) {
        close(pair[0]);
        if (options->cpus > 0)
            stay(options->cpus == 1);
        while (receive(pair[1], message))
            transmit(pair[1], message);
        _exit(0);
    }
    close(pair[1]);
    if (options->cpus > 0)
        stay(1);
    meter_begin(meter, options);
    while (meter_more(meter)) {
        transmit(pair[0], message);
        if (!receive(pair[0], message))
            die("the other process");
    }
    close(pair[0]);
    if (waitpid(pid, NULL, 0) < 0)
        die("waitpid");
}

static void
parse(struct options *options, int argc, char **argv)
{
    for (int i = 2; i < argc; i++) {
        if (strcmp(argv[i], "--") == 0) {
            options->program = argv + i + 1;
            break;
        }
        if (i + 1 >= argc) {
            fprintf(stderr, "limits: %s: value missing\n", argv[i]);
            exit(2);
        }
        if (strcmp(argv[i], "--mb") == 0)
            options->mb = strtoul(argv[++i], NULL, 10);
        else if (strcmp(argv[i], "--like") == 0)
            options->like = argv[++i];
        else if (strcmp(argv[i], "--inflight") == 0)
            options->inflight = strtoul(argv[++i], NULL, 10);
        else if (strcmp(argv[i], "--seconds") == 0)
            options->seconds = strtod(argv[++i], NULL);
        else if (strcmp(argv[i], "--count") == 0)
            options->count = strtol(argv[++i], NULL, 10);
        else if (strcmp(argv[i], "--cpus") == 0)
            options->cpus = strtol(argv[++i], NULL, 10);
        else {
            fprintf(stderr, "limits: %s: unknown option\n", argv[i]);
            exit(2);
        }
    }
    if (options->inflight < 1 || options->inflight > LIMITS_MAX_INFLIGHT) {
        fprintf(stderr, "limits: --inflight 1 to %d\n", LIMITS_MAX_INFLIGHT);
        exit(2);
    }
}

int
main(int argc, char **argv)
{
    struct options options = {.inflight = 1, .seconds = 1.0};
    struct meter meter;

    parse(&options, argc, argv);
    touch(options.mb);
    if (options.like)
        become_like(options.like);
    if (argc > 1 && strcmp(argv[1], "fork") == 0) {
        fork_loop(&options, &meter);
    } else if (argc > 1 && strcmp(argv[1], "spawn") == 0 && options.program &&
               options.program[0]) {
        spawn_loop(&options, &meter);
    } else if (argc > 1 && strcmp(argv[1], "pingpong") == 0) {
        pingpong_loop(&options, &meter);
    } else {
        fprintf(stderr, "usage: limits fork|spawn|pingpong [options] "
                        "[-- PROGRAM ARG...]\n");
        return 2;
    }
    meter_print(&meter);
    return 0;
}
