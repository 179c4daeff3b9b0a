/*
 * Between src/core and libc in the tests (ld --wrap): counts calls, makes them
 * short, makes them fail.  Also a few things that are dull through cffi.
 */
#ifndef AFORK_TESTS_SHIM_H
#define AFORK_TESTS_SHIM_H

#include <stddef.h>
#include <stdint.h>

#include "children.h"
#include "serve.h"

struct shim {
    /* counted */
    int sends, recvs, fds_sent, allocs;
    int busy; /* waits for room while crowd was not 0 */
    /* faults; 0 is off */
    int io_max;         /* bytes that one sendmsg or recvmsg moves */
    int eintr_every;    /* every n-th sendmsg and recvmsg is interrupted */
    int eagain_every;   /* every n-th finds a full or an empty socket */
    int send_errno;     /* sendmsg fails with it */
    int crowd;          /* so many more fail with ETOOMANYREFS */
    int alloc_fail_at;  /* the n-th allocation from here fails */
    int no_close_range; /* as Linux 5.10: no CLOSE_RANGE_CLOEXEC */
    int no_pidfd_open;
};
extern struct shim shim;

/* All counters and faults back to 0. */
void shim_reset(void);

struct shim_exit {
    int pid;
    uint64_t id;
    int status;
    int has_usage;
    int64_t cpu_usec;
    int64_t max_rss;
};

/* afork_children_reap into an array; returns how many there were. */
int shim_reap(struct afork_children *c, struct shim_exit *out, int max);

#endif
