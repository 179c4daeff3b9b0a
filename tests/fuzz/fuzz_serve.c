/*
 * The server loop over a stream of commands, with callbacks that do little.
 *
 * Input: a byte of flags; how many quarter bytes at the end are the commands
 * for a forked process; frames.  Descriptors are sockets, and how many there
 * are on an 'h' or 'F' frame is chosen by the length of its payload.  Programs
 * are not started: their letters become others (fuzz_strings has the decoder).
 */
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "fd.h"
#include "serve.h"

enum {
    PLAIN = 1,
    FORK_FAILS = 2,
    FORK_IN_CHILD = 4,
    NO_MEMORY = 8,
    FAILED = 16
};
enum { NO_PID = 0x7ffffff0 };

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static int flags, application, polls, idle;

static void
check(int good)
{
    if (!good)
        abort();
}

static void
drain(void)
{
    char bytes[65536];

    /* Not with the core's own reader: the descriptors may vanish. */
    while (recv(application, bytes, sizeof bytes, MSG_DONTWAIT) > 0)
        ;
}

/* The application reads whenever the loop waits; and nothing else happens. */
int
ppoll(struct pollfd *fds, nfds_t n, const struct timespec *timeout,
      const sigset_t *mask)
{
    struct timespec none = {0, 0};
    long r;

    (void)mask;
    drain();
    check(++polls < 100000); /* a loop that never ends */
    r = syscall(SYS_ppoll, fds, n, &none, NULL, (size_t)8);
    /* Time passes, for a while: spares are made meanwhile. */
    if (r == 0 && timeout && idle++ < 20)
        return 0;
    if (r == 0) {
        fds->revents = POLLHUP; /* the application's patience is over */
        shutdown(application, SHUT_RDWR);
        r = 1;
    }
    return (int)r;
}

int
poll(struct pollfd *fds, nfds_t n, int timeout)
{
    (void)timeout;
    return ppoll(fds, n, NULL, NULL);
}

static struct afork_str
str_of(const char *text)
{
    return (struct afork_str){(const uint8_t *)text, strlen(text)};
}

static int
stub_command(void *self, uint8_t letter, const uint8_t *payload, size_t len,
             struct afork_failure *ret_failure)
{
    struct afork_str all = {payload, len};

    (void)self;
    if (len == 0 || payload[0] != 'f')
        return 0;
    if (!(flags & NO_MEMORY))
        afork_failure_set(ret_failure, "eval", letter, str_of("Type"), all,
                          all, all);
    return -1;
}

static int
stub_find(void *self, const uint8_t *name, size_t len,
          struct afork_failure *ret_failure)
{
    return stub_command(self, 0, name, len, ret_failure);
}

static pid_t
stub_fork(void *self)
{
    (void)self;
    if (flags & FORK_FAILS)
        return -EAGAIN;
    return flags & FORK_IN_CHILD ? 0 : NO_PID;
}

static uint8_t *
stub_stats(void *self, size_t *ret_len)
{
    uint8_t *data = malloc(2);

    (void)self;
    if (data)
        memcpy(data, "\1k", 2);
    *ret_len = 2;
    return data;
}

static void
stub_warm(void *self)
{
    (void)self;
}

static void
stub_interrupted(void *self)
{
    (void)self;
}

static char *const *
stub_environ(void *self)
{
    static char *const empty[] = {NULL};

    (void)self;
    return empty;
}

/* Sends len bytes, the first with so many descriptors. */
static void
send_with(int sock, const uint8_t *at, size_t len, int fd, int fds)
{
    union {
        struct cmsghdr align;
        char space[CMSG_SPACE(2 * sizeof(int))];
    } control;
    struct iovec iov = {.iov_base = (void *)(uintptr_t)at, .iov_len = len};
    struct msghdr msg = {.msg_iov = &iov, .msg_iovlen = 1};
    const int twice[2] = {fd, fd};

    if (fds) {
        memset(&control, 0, sizeof control);
        msg.msg_control = control.space;
        msg.msg_controllen = CMSG_SPACE((size_t)fds * sizeof(int));
        struct cmsghdr *c = CMSG_FIRSTHDR(&msg);
        c->cmsg_level = SOL_SOCKET;
        c->cmsg_type = SCM_RIGHTS;
        c->cmsg_len = CMSG_LEN((size_t)fds * sizeof(int));
        memcpy(CMSG_DATA(c), twice, (size_t)fds * sizeof(int));
    }
    if (len)
        sendmsg(sock, &msg, MSG_NOSIGNAL | MSG_DONTWAIT);
}

/* Sends a stream of frames; 'h' and 'F' get descriptors unless fd is none. */
static void
send_frames(int sock, const uint8_t *at, size_t size, int fd)
{
    static const int counts[8] = {1, 1, 0, 1, 2, 1, 1, 1};

    while (size) {
        size_t head = size < AFORK_HEAD_SIZE ? size : AFORK_HEAD_SIZE, len;
        uint8_t bytes[AFORK_HEAD_SIZE] = {0};
        int fds;

        memcpy(bytes, at, head);
        if (bytes[0] == AFORK_CMD_EXEC || bytes[0] == AFORK_CMD_SPAWN)
            bytes[0] = AFORK_CMD_TEXT;
        len = afork_wire_head_len(bytes);
        fds = fd < 0 ? 0 : counts[len & 7];
        send_with(sock, bytes, head, fd,
                  bytes[0] == AFORK_CMD_FORK_ID ? fds : 0);
        at += head;
        size -= head;
        if (head < AFORK_HEAD_SIZE)
            return;
        if (len > size)
            len = size;
        send_with(sock, at, len, AFORK_NOFD, 0);
        at += len;
        size -= len;
        if (bytes[0] == AFORK_CMD_HANDLE && size) {
            send_with(sock, at, 1, fd, fds);
            at++;
            size--;
        }
    }
}

int
LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static const struct afork_ops ops = {
        .command = stub_command,
        .find = stub_find,
        .fork = stub_fork,
        .warm = stub_warm,
        .stats = stub_stats,
        .interrupted = stub_interrupted,
        .environ = stub_environ,
    };
    int before = dup(0), after, pair[2], child[2];
    struct afork_server s;
    size_t inner;

    close(before);
    if (size < 2 || afork_fd_pair(pair) < 0 || afork_fd_pair(child) < 0)
        return 0;
    flags = data[0];
    inner = data[1] / 4;
    data += 2;
    size -= 2;
    if (inner > size)
        inner = size;
    polls = idle = 0;
    application = pair[0];
    send_frames(child[0], data + size - inner, inner, AFORK_NOFD);
    afork_fd_close(&child[0]);
    send_frames(application, data, size - inner, child[1]);
    shutdown(application, SHUT_WR);
    afork_fd_close(&child[1]);

    afork_server_init_take(&s, pair[1], flags & PLAIN, &ops, NULL);
    s.in.frame_max = 4096;
    s.detached = 1; /* a pretended child must not look for its parent */
    if (flags & FAILED)
        afork_failure_set(&s.failure, "main", 1, str_of("T"), str_of("M"),
                          str_of("B"), str_of("F"));
    afork_serve(&s);
    afork_server_free(&s);
    afork_fd_close(&pair[0]);

    after = dup(0);
    check(after == before); /* every descriptor was closed */
    close(after);
    return 0;
}
