/* Between src/core and libc in the tests; see shim.h. */
#define _GNU_SOURCE
#include "shim.h"

#include <errno.h>
#include <poll.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

struct shim shim;

void
shim_reset(void)
{
    memset(&shim, 0, sizeof shim);
}

ssize_t __real_sendmsg(int sock, const struct msghdr *msg, int flags);
ssize_t __real_recvmsg(int sock, struct msghdr *msg, int flags);
void *__real_malloc(size_t size);
void *__real_calloc(size_t n, size_t size);
void *__real_realloc(void *p, size_t size);
long __real_syscall(long number, ...);
int __real_poll(struct pollfd *fds, nfds_t n, int timeout);
int __real_ppoll(struct pollfd *fds, nfds_t n, const struct timespec *timeout,
                 const sigset_t *mask);

ssize_t __wrap_sendmsg(int sock, const struct msghdr *msg, int flags);
ssize_t __wrap_recvmsg(int sock, struct msghdr *msg, int flags);
void *__wrap_malloc(size_t size);
void *__wrap_calloc(size_t n, size_t size);
void *__wrap_realloc(void *p, size_t size);
long __wrap_syscall(long number, ...);
int __wrap_poll(struct pollfd *fds, nfds_t n, int timeout);
int __wrap_ppoll(struct pollfd *fds, nfds_t n, const struct timespec *timeout,
                 const sigset_t *mask);

/* Whether this call fails, and errno. */
static int
disturbed(int nth)
{
    if (shim.eintr_every && nth % shim.eintr_every == 0) {
        errno = EINTR;
        return 1;
    }
    if (shim.eagain_every && nth % shim.eagain_every == 0) {
        errno = EAGAIN;
        return 1;
    }
    return 0;
}

/* One buffer, cut to io_max. */
static struct iovec
cut(const struct msghdr *msg)
{
    struct iovec iov = msg->msg_iov[0];

    if (shim.io_max && iov.iov_len > (size_t)shim.io_max)
        iov.iov_len = (size_t)shim.io_max;
    return iov;
}

ssize_t
__wrap_sendmsg(int sock, const struct msghdr *msg, int flags)
{
    struct msghdr m = *msg;
    struct iovec iov = cut(msg);
    ssize_t n;

    shim.sends++;
    if (disturbed(shim.sends))
        return -1;
    if (shim.crowd) {
        shim.crowd--;
        errno = ETOOMANYREFS;
        return -1;
    }
    if (shim.send_errno) {
        errno = shim.send_errno;
        return -1;
    }
    m.msg_iov = &iov;
    n = __real_sendmsg(sock, &m, flags);
    if (n >= 0 && m.msg_controllen)
        shim.fds_sent++;
    return n;
}

ssize_t
__wrap_recvmsg(int sock, struct msghdr *msg, int flags)
{
    struct iovec iov = cut(msg), *whole = msg->msg_iov;
    ssize_t n;

    shim.recvs++;
    if (disturbed(shim.recvs))
        return -1;
    msg->msg_iov = &iov;
    n = __real_recvmsg(sock, msg, flags);
    msg->msg_iov = whole;
    return n;
}

static int
no_memory(void)
{
    shim.allocs++;
    return shim.alloc_fail_at && --shim.alloc_fail_at == 0;
}

void *
__wrap_malloc(size_t size)
{
    if (no_memory())
        return NULL;
    return __real_malloc(size);
}

void *
__wrap_calloc(size_t n, size_t size)
{
    if (no_memory())
        return NULL;
    return __real_calloc(n, size);
}

void *
__wrap_realloc(void *p, size_t size)
{
    if (no_memory())
        return NULL;
    return __real_realloc(p, size);
}

#ifndef SYS_close_range
#define SYS_close_range 436
#endif
#ifndef SYS_pidfd_open
#define SYS_pidfd_open 434
#endif

long
__wrap_syscall(long number, ...)
{
    long a, b, c;
    void *set, *old;
    va_list list;

    if ((number == SYS_close_range && shim.no_close_range) ||
        (number == SYS_pidfd_open && shim.no_pidfd_open)) {
        errno = number == SYS_close_range ? EINVAL : ENOSYS;
        return -1;
    }
    va_start(list, number);
    if (number == SYS_rt_sigaction) {
        a = va_arg(list, int);
        set = va_arg(list, void *);
        old = va_arg(list, void *);
        b = (long)va_arg(list, size_t);
        va_end(list);
        return __real_syscall(number, a, set, old, b);
    }
    /* Each of the other two takes at most three small arguments. */
    a = va_arg(list, int);
    b = va_arg(list, int);
    c = number == SYS_close_range ? va_arg(list, int) : 0;
    va_end(list);
    return __real_syscall(number, a, b, c);
}

int
__wrap_poll(struct pollfd *fds, nfds_t n, int timeout)
{
    shim.busy += shim.crowd && n && fds[0].events & POLLOUT;
    return __real_poll(fds, n, timeout);
}

int
__wrap_ppoll(struct pollfd *fds, nfds_t n, const struct timespec *timeout,
             const sigset_t *mask)
{
    shim.busy += shim.crowd && n && fds[0].events & POLLOUT;
    return __real_ppoll(fds, n, timeout, mask);
}

struct collected {
    struct shim_exit *out;
    int n, max;
};

static void
collect(void *arg, const struct afork_child *child, int status,
        const struct rusage *usage)
{
    struct collected *to = arg;
    struct shim_exit e = {
        .pid = child->pid, .id = child->id, .status = status};

    if (usage) {
        e.has_usage = 1;
        e.cpu_usec =
            (usage->ru_utime.tv_sec + usage->ru_stime.tv_sec) * 1000000 +
            usage->ru_utime.tv_usec + usage->ru_stime.tv_usec;
        e.max_rss = usage->ru_maxrss;
    }
    if (to->n < to->max)
        to->out[to->n] = e;
    to->n++;
}

int
shim_reap(struct afork_children *c, struct shim_exit *out, int max)
{
    struct collected to = {out, 0, max};

    afork_children_reap(c, collect, &to);
    return to.n;
}
