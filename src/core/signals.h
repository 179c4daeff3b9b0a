/*
 * The signal set-up of a template: it must survive what a terminal, a
 * container's stop and evaluated code do, and leave no trace in what is forked
 * from it.
 */
#ifndef AFORK_SIGNALS_H
#define AFORK_SIGNALS_H

#include <signal.h>

#include "base.h"

/* INT, QUIT, TERM, HUP, TSTP are swallowed; CHLD wakes the loop. */
enum { AFORK_MANAGED = 6 };

struct afork_signals {
    volatile sig_atomic_t chld_seen;        /* since it was asked for */
    struct sigaction theirs[AFORK_MANAGED]; /* what a worker is given back */
    sigset_t wait_mask;                     /* CHLD open, for ppoll */
};

/* Installs no-op handlers, blocks CHLD, remembers what was there.  They write to
 * s until it is forgotten. */
void afork_signals_enter(struct afork_signals *s);
void afork_signals_forget(const struct afork_signals *s);
/* Around evaluated code: CHLD open, afterwards our handlers back in place.
 * Handlers that the code installed are remembered for afork_signals_leave. */
void afork_signals_open(struct afork_signals *s);
void afork_signals_close(struct afork_signals *s);
/* What a worker starts with: their handlers, nothing blocked. */
void afork_signals_leave(struct afork_signals *s);

/* Whether a signal has a handler that is not ours: it would have to be told
 * of what has interrupted the wait. */
int afork_signals_foreign(void);

/* Whether a child may have ended since the last call.  Asking the kernel for
 * each child would cost more with each that lives. */
int afork_signals_chld(struct afork_signals *s);

/* Blocks everything around a fork, and undoes it. */
void afork_signals_block_all(sigset_t *ret_old);
void afork_signals_restore(const sigset_t *old);

/* What a program starts with: all defaults, nothing blocked. */
void afork_signals_default(void);

#endif
