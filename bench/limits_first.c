/* Limit programs for bench/latency.py, bench/scale.py and bench/memory.py: from
 * the request to the first byte of a forked child, with nothing of ours around
 * it.
 *
 *   limits_first one    one at a time; --live N children sleep meanwhile
 *   limits_first burst  --size N at once, then wait for all of them, again
 *   limits_first open   --size N per second, each from the time it was due
 *   limits_first pong   a byte to a waiting process and back
 *   limits_first hold   --size N children that wait; prints their process ids
 *                       and ends at the end of its standard input
 *
 * Options: --mb N (touched private memory), --seconds S, --count N (instead of
 * S), --gap MICROSECONDS (between two starts or bursts), --brisk S (so long
 * without a gap, afterwards). Prints one line of JSON: how many, how long, and
 * the microseconds of each; the median of those without a gap.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <signal.h>
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

enum { FIRST_MAX = 200000, FIRST_PENDING = 20000 };

struct options {
    size_t mb, size, live;
    double seconds, brisk;
    long count, gap;
};

/* A child that has not sent its byte yet. */
struct start {
    double begin;
    pid_t pid;
};

static double taken[FIRST_MAX];
static size_t taken_used;
static struct pollfd waiting[FIRST_PENDING];
static struct start starts[FIRST_PENDING];
static nfds_t pending;

static void
pause_us(long us)
{
    struct timespec ts = {us / 1000000, us % 1000000 * 1000};

    if (us > 0)
        nanosleep(&ts, NULL);
}

/* CPU time of this process and of the children that it has waited for. */
static double
cpu_now(void)
{
    return cpu_of(RUSAGE_SELF) + cpu_of(RUSAGE_CHILDREN);
}

/* Fork a child that sends a byte and ends. */
static pid_t
fork_one(int *fd)
{
    int pair[2];
    pid_t pid;

    if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) < 0)
        die("socketpair");
    pid = fork();
    if (pid < 0)
        die("fork");
    if (pid == 0)
        _exit(write(pair[1], "x", 1) != 1);
    close(pair[1]);
    *fd = pair[0];
    return pid;
}

static void
read_byte(int fd)
{
    char byte;
    ssize_t got;

    do
        got = read(fd, &byte, 1);
    while (got < 0 && errno == EINTR);
    if (got != 1)
        die("a child ended without its byte");
}

static void
reap(pid_t pid)
{
    while (waitpid(pid, NULL, 0) < 0)
        if (errno != EINTR)
            die("waitpid");
}

static void
took(double seconds)
{
    if (taken_used < FIRST_MAX)
        taken[taken_used++] = seconds * 1e6;
}

static void
launch(double begin)
{
    int fd;

    if (pending >= FIRST_PENDING) {
        errno = EAGAIN;
        die("too many that have not answered");
    }
    starts[pending] = (struct start){begin, fork_one(&fd)};
    waiting[pending++] = (struct pollfd){.fd = fd, .events = POLLIN};
}

/* Take the bytes that have come, or come within the milliseconds. */
static void
gather(int milliseconds)
{
    int found = poll(waiting, pending, milliseconds);

    if (found < 0 && errno != EINTR)
        die("poll");
    if (found <= 0)
        return;
    for (nfds_t i = pending; i-- > 0;) {
        if (waiting[i].revents == 0)
            continue;
        read_byte(waiting[i].fd);
        took(now() - starts[i].begin);
        close(waiting[i].fd);
        reap(starts[i].pid);
        waiting[i] = waiting[--pending];
        starts[i] = starts[pending];
    }
}

static int
more(const struct options *options, double begin)
{
    if (options->count > 0)
        return taken_used < (size_t)options->count;
    return now() - begin < options->seconds;
}

static void
one_loop(const struct options *options, double begin)
{
    while (more(options, begin)) {
        double at;
        pid_t pid;
        int fd;

        pause_us(options->gap);
        at = now();
        pid = fork_one(&fd);
        read_byte(fd);
        took(now() - at);
        close(fd);
        reap(pid);
    }
}

static void
burst_loop(const struct options *options, double begin)
{
    do {
        double at;

        pause_us(options->gap);
        at = now();
        for (size_t i = 0; i < options->size; i++)
            launch(at);
        while (pending > 0)
            gather(-1);
    } while (more(options, begin));
}

static void
open_loop(const struct options *options, double begin)
{
    const double step = 1.0 / (double)options->size;
    double due = begin;

    while (due - begin < options->seconds) {
        double early = due - now();

        if (early <= 0) {
            launch(due);
            due += step;
            gather(0);
        } else if (pending > 0) {
            gather(early < 0.001 ? 0 : 1);
        } else {
            pause_us((long)(early * 1e6));
        }
    }
    while (pending > 0)
        gather(-1);
}

static void
pong_loop(const struct options *options, double begin)
{
    char byte = 'x';
    int pair[2];
    pid_t pid;

    if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) < 0)
        die("socketpair");
    pid = fork();
    if (pid < 0)
        die("fork");
    if (pid == 0) {
        close(pair[0]);
        while (read(pair[1], &byte, 1) == 1 && write(pair[1], &byte, 1) == 1)
            continue;
        _exit(0);
    }
    close(pair[1]);
    while (more(options, begin)) {
        double at;

        pause_us(options->gap);
        at = now();
        if (write(pair[0], &byte, 1) != 1)
            die("write");
        read_byte(pair[0]);
        took(now() - at);
    }
    close(pair[0]);
    reap(pid);
}

/* The children share two pipes: they say at one that they live, and wait at the
 * other until this process ends.  At a single socket each byte would wake all.
 */
static void
keep(size_t n, int tell)
{
    char byte;
    int say[2], wait[2];

    if (pipe(say) < 0 || pipe(wait) < 0)
        die("pipe");
    for (size_t i = 0; i < n; i++) {
        pid_t pid = fork();

        if (pid < 0)
            die("fork");
        if (pid == 0) {
            close(wait[1]);
            if (write(say[1], "x", 1) == 1)
                (void)!read(wait[0], &byte, 1);
            _exit(0);
        }
        read_byte(say[0]);
        if (tell)
            printf("%d\n", (int)pid);
    }
    close(say[1]);
    close(wait[0]);
    if (tell && puts("") >= 0 && fflush(stdout) == 0)
        (void)!read(0, &byte, 1);
}

static void
print(double seconds, double cpu)
{
    const double n = taken_used ? (double)taken_used : 1.0;

    printf("{\"n\": %zu, \"seconds\": %.6f, \"cpu_us\": %.3f, \"us\": [",
           taken_used, seconds, cpu * 1e6 / n);
    for (size_t i = 0; i < taken_used; i++)
        printf("%s%.1f", i ? "," : "", taken[i]);
    printf("]");
}

static int
compare(const void *a, const void *b)
{
    const double x = *(const double *)a, y = *(const double *)b;

    return (x > y) - (x < y);
}

/* The same again without a gap. */
static void
print_brisk(void (*loop)(const struct options *, double),
            struct options options)
{
    options.seconds = options.brisk;
    options.count = options.gap = 0;
    taken_used = 0;
    loop(&options, now());
    qsort(taken, taken_used, sizeof *taken, compare);
    printf(", \"brisk_us\": %.1f", taken[taken_used / 2]);
}

static void
parse(struct options *options, int argc, char **argv)
{
    for (int i = 2; i + 1 < argc; i += 2) {
        const char *value = argv[i + 1];

        if (strcmp(argv[i], "--mb") == 0)
            options->mb = strtoul(value, NULL, 10);
        else if (strcmp(argv[i], "--size") == 0)
            options->size = strtoul(value, NULL, 10);
        else if (strcmp(argv[i], "--live") == 0)
            options->live = strtoul(value, NULL, 10);
        else if (strcmp(argv[i], "--seconds") == 0)
            options->seconds = strtod(value, NULL);
        else if (strcmp(argv[i], "--brisk") == 0)
            options->brisk = strtod(value, NULL);
        else if (strcmp(argv[i], "--count") == 0)
            options->count = strtol(value, NULL, 10);
        else if (strcmp(argv[i], "--gap") == 0)
            options->gap = strtol(value, NULL, 10);
        else {
            fprintf(stderr, "limits_first: %s: unknown option\n", argv[i]);
            exit(2);
        }
    }
}

int
main(int argc, char **argv)
{
    static const struct {
        const char *name;
        void (*loop)(const struct options *, double);
    } modes[] = {{"one", one_loop},
                 {"burst", burst_loop},
                 {"open", open_loop},
                 {"pong", pong_loop}};
    struct options options = {.size = 1, .seconds = 1.0};
    struct rlimit files;

    parse(&options, argc, argv);
    if (getrlimit(RLIMIT_NOFILE, &files) == 0) {
        files.rlim_cur = files.rlim_max;
        (void)setrlimit(RLIMIT_NOFILE, &files); /* else EMFILE says it */
    }
    touch(options.mb);
    pause_us((long)options.mb * 200); /* the machine is still busy with it */
    if (argc > 1 && strcmp(argv[1], "hold") == 0) {
        keep(options.size, 1);
        return 0;
    }
    keep(options.live, 0);
    for (size_t i = 0; argc > 1 && i < sizeof modes / sizeof *modes; i++)
        if (strcmp(argv[1], modes[i].name) == 0) {
            double cpu = cpu_now(), begin = now();

            modes[i].loop(&options, begin);
            print(now() - begin, cpu_now() - cpu);
            if (options.brisk > 0)
                print_brisk(modes[i].loop, options);
            puts("}");
            return 0;
        }
    fprintf(stderr,
            "usage: limits_first one|burst|open|pong|hold [options]\n");
    return 2;
}
