/* What the two files of the type Link share. */
#ifndef AFORK_LINK_TYPE_H
#define AFORK_LINK_TYPE_H

#include "binding.h"
#include "link.h"

typedef struct {
    PyObject_HEAD
    struct afork_link link;
    int users;     /* calls in which other code may run, also in this thread */
    int receiving; /* one of them is receive */
    int closed;    /* the last of them is to free the link */
} Link;

/* 0, or -1 with OSError(EBADF). */
int binding_link_check(const Link *l);
/* Ends what users++ has begun. */
void binding_link_leave(Link *l);
/* Waits for events of the socket without the GIL, then runs signal handlers;
 * -1 with an exception. */
int binding_link_wait(Link *l, short events);
/* The first of at most max arguments, all optional: whether to wait. */
int binding_link_wait_arg(const char *name, PyObject *const *args,
                          Py_ssize_t nargs, Py_ssize_t max);

/* link_receive.c */
PyObject *binding_link_receive(PyObject *self, PyObject *const *args,
                               Py_ssize_t nargs);

#endif
