/* The server loop of a process: reads commands, forks, and ends in a function. */
#ifndef AFORK_SERVE_H
#define AFORK_SERVE_H

#include <sys/types.h>

#include "args.h"
#include "base.h"
#include "children.h"
#include "image.h"
#include "outq.h"
#include "reader.h"
#include "signals.h"
#include "spares.h"
#include "wire.h"

/* What went wrong in a callback; strings are borrowed until it returns to it. */
struct afork_failure {
    uint8_t *payload; /* owned, malloc'ed: the payload of an error report */
    size_t len;
};

/* Fills in a failure; fields may be empty.  Long ones are cut.  -ENOMEM. */
int afork_failure_set(struct afork_failure *f, const char *stage, int error,
                      struct afork_str type, struct afork_str message,
                      struct afork_str traceback, struct afork_str filename);

struct afork_server;

/*
 * What the loop cannot do by itself.  A callback returns 0, or < 0 with
 * *ret_failure filled in.
 */
struct afork_ops {
    /* Runs an EVAL, EVAL_TYPED, IMPORT or SET frame. */
    int (*command)(void *self, uint8_t letter, const uint8_t *payload,
                   size_t len, struct afork_failure *ret_failure);
    /* Finds the function, so that the caller of the loop can enter it. */
    int (*find)(void *self, const uint8_t *name, size_t len,
                struct afork_failure *ret_failure);
    /* fork(2) with all that the language needs around it; -errno.  Calls
     * afork_server_forked before anything that is not the core's own. */
    pid_t (*fork)(void *self);
    /* In a spare: touches what starts touch, so that they need not. */
    void (*warm)(void *self);
    /* What is known of the process: malloc'ed, or NULL. */
    uint8_t *(*stats)(void *self, size_t *ret_len);
    /* Something interrupted the wait: handlers of the language may be due. */
    void (*interrupted)(void *self);
    /* The environment of programs that are started without one. */
    char *const *(*environ)(void *self);
};

/* Processes that were asked for and whose sockets are here: so many at a time,
 * as each takes a descriptor, or two. */
enum { AFORK_BATCH = 64 };
struct afork_batch {
    size_t n;
    int socks[AFORK_BATCH]; /* owned: ends of processes still to be forked */
    uint64_t ids[AFORK_BATCH];
};

/* Of queues and lists as much as is mostly needed. */
struct afork_near {
    struct afork_outq_fd fds[8];
    struct afork_child children[24];
    uint8_t in[512], out[512];
};

/*
 * What is written at each fork comes first: the template copies each page that
 * it writes then, and so does its child.
 */
struct afork_server {
    int sock;     /* owned */
    int plain;    /* the original's protocol and nothing else */
    int detached; /* outlives its parent and the application */
    size_t frame_max;
    struct afork_reader in;
    struct afork_outq out;
    struct afork_args args;
    struct afork_children children;
    int pidfd;       /* owned: our own, opened in advance, or AFORK_NOFD */
    uint64_t starts; /* processes that were asked for */
    int forked;      /* this process has */
    /* Which text the workers use, see image.h. */
    const char *trial_function; /* run in the trial; NULL: there is none */
    int tried;                  /* or given up */
    pid_t trial_pid;
    struct afork_image *trial;    /* shared, while there is one */
    size_t image_pages;           /* arranged like image; 0: not at all */
    int image_error;              /* why it is not: an errno */
    struct afork_failure failure; /* once set, no command is executed */
    int started;                  /* the started report has been queued */
    int mute;                     /* the application reads no more */
    const struct afork_ops *ops;
    void *self;
    struct afork_signals signals;
    struct afork_near near;
    struct afork_spares spares; /* up to its list */
    struct afork_batch batch;
    struct afork_image image;
};

/* How the loop was left. */
enum afork_outcome {
    AFORK_END,   /* nobody will send another command */
    AFORK_ENTER, /* run: enter the function that find found */
};

void afork_server_init_take(struct afork_server *s, int sock, int plain,
                            const struct afork_ops *ops, void *self);
void afork_server_free(struct afork_server *s);

/* First thing in a forked process, whose parent is the one given.  Once more
 * does no harm. */
void afork_server_forked(struct afork_server *s, pid_t parent);

/*
 * Serves until the process has nothing more to do as a server: an outcome, or
 * -EPROTO, -EMSGSIZE, -ENOMEM ... for a stream that cannot be used any more
 * (reported already, except in plain mode).  Also returns in every forked
 * process, each with its own copy of *s.
 */
int afork_serve(struct afork_server *s);

#endif
