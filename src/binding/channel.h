/* Channel: the application's end of a process's control socket. */
#ifndef AFORK_BINDING_CHANNEL_H
#define AFORK_BINDING_CHANNEL_H

#include "binding.h"
#include "outq.h"
#include "reader.h"

typedef struct {
    PyObject_HEAD
    int fd; /* owned */
    int plain;
    int eof;
    struct afork_outq out;
    struct afork_reader in;
} Channel;

/* 0, or -1 and OSError if it has no socket. */
int binding_channel_check(const Channel *c);

/* receive.c */
/* METH_NOARGS: the reports that are there, a list. */
PyObject *binding_channel_receive(PyObject *self, PyObject *unused);
/* Hands them to a process.  None, or NULL if its method has raised. */
PyObject *binding_channel_tell(const struct binding_state *state,
                               PyObject *self, PyObject *process);
/* The same as a method. */
PyObject *binding_channel_deliver(PyObject *self, PyTypeObject *defining,
                                  PyObject *const *args, Py_ssize_t n,
                                  PyObject *names);

#endif
