/*
 * Spares: children forked in advance and warmed up, so that a start is a
 * message to one of them.
 *
 *   template ──link── spare        idle: waits for one message
 *            ──sock──►             handed: the new process's socket and id
 *            ◄──byte──             taken: from here on it is that process
 *
 * The template keeps its copy of the socket until the byte has come: a spare
 * that ends without having sent it has not read a byte of the socket either,
 * so that somebody else can be given it.  One that takes too long is killed, and
 * its end is waited for like any other's.
 */
#ifndef AFORK_SPARES_H
#define AFORK_SPARES_H

#include <sys/types.h>

#include "base.h"

struct afork_server;
struct afork_child;
struct pollfd;

enum { AFORK_SPARES_MAX = 64 };

struct afork_spare {
    pid_t pid;
    int link; /* owned; AFORK_NOFD: it has died */
    int sock; /* owned: handed over and not taken yet */
    uint64_t id;
    int64_t until; /* handed: when to lose patience; 0: it was killed */
};

struct afork_spares {
    size_t n;
    unsigned most;    /* what was asked for; 0: all of this does nothing */
    unsigned target;  /* what the starts of late are worth, up to most */
    unsigned demand;  /* starts since all spares were ready */
    unsigned peak;    /* the highest demand of this period */
    size_t args_n;    /* pending arguments that they have */
    int64_t period;   /* milliseconds of a period */
    int64_t patience; /* milliseconds for an answer */
    int64_t due;      /* when it ends */
    int64_t not_yet;  /* no attempt before, after one that failed */
    unsigned retries; /* attempts that have failed in a row */
    int64_t since;    /* when one was first seen to be missing; 0: none is */
    int eager;        /* nothing has happened since the last one was made */
    uint64_t asked;   /* token of who waits for them; 0: nobody does */
    uint64_t hits, misses, died;
    struct afork_spare list[AFORK_SPARES_MAX]; /* last: see afork_server */
};

void afork_spares_init(struct afork_spares *p);
/* Closes everything: they end by themselves.  In a child of the template the
 * copies that it has inherited. */
void afork_spares_forget(struct afork_spares *p);

/* How many are to be had at most, from now on. */
void afork_spares_set(struct afork_server *s, unsigned most);
/* The template has changed: idle ones are not its copies any more. */
void afork_spares_drop(struct afork_server *s);
/* The same, if only pending arguments have come or gone. */
void afork_spares_check_args(struct afork_server *s);
size_t afork_spares_ready(const struct afork_spares *p);

/* Answers who waits for all of them, once they are there or one could not be
 * made. */
void afork_spares_tell(struct afork_server *s);

/* Gives a request to a spare: 1, and sock is consumed; or 0 without one. */
int afork_spares_start(struct afork_server *s, int sock, uint64_t id);
/* Takes in what those have answered that were given one, and kills those that
 * should have.  Not while a list of them is being walked. */
void afork_spares_answers(struct afork_server *s);
/* A request whose spare has died: its socket (given) or AFORK_NOFD. */
int afork_spares_orphan(struct afork_server *s, uint64_t *ret_id);
/* A child has been reaped: if it was a spare it is none any more, and has the
 * id of the request that it had taken, or 0. */
void afork_spares_exited(struct afork_server *s, struct afork_child *child);

/* Adds those that answers are awaited from, at most AFORK_SPARES_MAX. */
size_t afork_spares_poll(const struct afork_spares *p, struct pollfd *fds);
/* Milliseconds until one of them has to be killed, or -1. */
int afork_spares_patience(const struct afork_spares *p);
/* Milliseconds after which afork_spares_tend has something to do, or -1. */
int afork_spares_timeout(struct afork_server *s);
/* The template is idle: makes one spare, or finds that fewer are worth having.
 * AFORK_NEXT; in a spare see afork_server_fork_spare_take. */
int afork_spares_tend(struct afork_server *s);
/* The end of a period: moves the target towards what was needed in it. */
void afork_spares_adapt(struct afork_spares *p);
/* Gives up spares for as long as there is no descriptor left. */
void afork_spares_make_room(struct afork_server *s);

#endif
