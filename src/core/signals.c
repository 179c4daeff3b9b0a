/* The signal set-up of a template. */
#define _GNU_SOURCE
#include "signals.h"

#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

static const int managed[AFORK_MANAGED] = {SIGINT, SIGQUIT, SIGTERM,
                                           SIGHUP, SIGTSTP, SIGCHLD};

/* Of the server that waits, or NULL. */
static volatile sig_atomic_t *chld_seen;

/* Not SIG_IGN: that would survive exec into every program started here. */
static void
swallow(int sig)
{
    if (sig == SIGCHLD && chld_seen)
        *chld_seen = 1;
}

static void
install(struct afork_signals *s)
{
    struct sigaction ours, old;

    memset(&ours, 0, sizeof ours);
    ours.sa_handler = swallow; /* no SA_RESTART: CHLD must end the ppoll */
    for (int i = 0; i < AFORK_MANAGED; i++) {
        if (sigaction(managed[i], &ours, &old) == 0 &&
            ((old.sa_flags & SA_SIGINFO) || old.sa_handler != swallow))
            s->theirs[i] = old;
    }
}

static void
chld_mask(int how)
{
    sigset_t chld;

    sigemptyset(&chld);
    sigaddset(&chld, SIGCHLD);
    sigprocmask(how, &chld, NULL);
}

void
afork_signals_enter(struct afork_signals *s)
{
    memset(s, 0, sizeof *s);
    s->chld_seen = 1;
    chld_seen = &s->chld_seen;
    install(s);
    chld_mask(SIG_BLOCK);
    sigprocmask(SIG_BLOCK, NULL, &s->wait_mask);
    sigdelset(&s->wait_mask, SIGCHLD);
}

void
afork_signals_forget(const struct afork_signals *s)
{
    if (chld_seen == &s->chld_seen)
        chld_seen = NULL;
}

void
afork_signals_open(struct afork_signals *s)
{
    (void)s;
    chld_mask(SIG_UNBLOCK);
}

void
afork_signals_close(struct afork_signals *s)
{
    chld_mask(SIG_BLOCK);
    install(s);
    s->chld_seen = 1; /* whoever it was delivered to */
}

int
afork_signals_chld(struct afork_signals *s)
{
    const struct timespec none = {0, 0};
    int seen = s->chld_seen;
    sigset_t chld;

    /* A template that is never idle does not open the signal. */
    sigemptyset(&chld);
    sigaddset(&chld, SIGCHLD);
    s->chld_seen = 0;
    return sigtimedwait(&chld, NULL, &none) == SIGCHLD || seen;
}

void
afork_signals_leave(struct afork_signals *s)
{
    sigset_t none;

    for (int i = 0; i < AFORK_MANAGED; i++)
        sigaction(managed[i], &s->theirs[i], NULL);
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
}

int
afork_signals_foreign(void)
{
    for (int sig = 1; sig < NSIG; sig++) {
        struct sigaction now;

        if (sigaction(sig, NULL, &now) < 0)
            continue; /* glibc's own */
        if ((now.sa_flags & SA_SIGINFO) ||
            (now.sa_handler != SIG_DFL && now.sa_handler != SIG_IGN &&
             now.sa_handler != swallow))
            return 1;
    }
    return 0;
}

void
afork_signals_block_all(sigset_t *ret_old)
{
    sigset_t all;

    sigfillset(&all);
    sigprocmask(SIG_BLOCK, &all, ret_old);
}

void
afork_signals_restore(const sigset_t *old)
{
    sigprocmask(SIG_SETMASK, old, NULL);
}

void
afork_signals_default(void)
{
    unsigned long kernel_dfl[8];
    struct sigaction dfl, now;
    sigset_t none;

    memset(&dfl, 0, sizeof dfl);
    dfl.sa_handler = SIG_DFL;
    for (int sig = 1; sig < NSIG; sig++)
        if (sigaction(sig, NULL, &now) == 0 && now.sa_handler != SIG_DFL)
            sigaction(sig, &dfl, NULL);
    /*
     * glibc refuses the two that it keeps for itself, but they may have been
     * ignored by whoever started us: the kernel's struct, all zero, is
     * SIG_DFL.
     */
    memset(kernel_dfl, 0, sizeof kernel_dfl);
    for (int sig = 32; sig < 34; sig++)
        syscall(SYS_rt_sigaction, sig, kernel_dfl, NULL, (size_t)(_NSIG / 8));
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
}
