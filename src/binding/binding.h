/* The binding of the core to CPython: what its files share. */
#ifndef AFORK_BINDING_H
#define AFORK_BINDING_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "wire.h"

struct binding_state {
    PyTypeObject *channel_type;
    PyTypeObject *link_type;
    PyTypeObject *mapping_type;
};

/* Sets OSError from a core status (< 0) and returns NULL. */
PyObject *binding_oserror(int status);
PyObject *binding_oserror_name(int status, PyObject *filename);

/* Strings of a sequence of bytes-like objects, borrowed until released. */
struct binding_strs {
    struct afork_str *strs;
    Py_buffer *buffers;
    size_t n;
};
int binding_strs_get(struct binding_strs *s, PyObject *sequence);
void binding_strs_release(struct binding_strs *s);

/* channel.c */
extern PyType_Spec binding_channel_spec;

/* link.c */
extern PyType_Spec binding_link_spec;

/* server.c */
PyObject *binding_serve(PyObject *module, PyObject *args);
PyObject *binding_fork(PyObject *module, PyObject *unused);
PyObject *binding_detach(PyObject *module, PyObject *flag);
PyObject *binding_keep_title(PyObject *module, PyObject *unused);
PyObject *binding_report_again(PyObject *module, PyObject *unused);
PyObject *binding_make_plain(PyObject *module, PyObject *unused);

/* worker.c */
/* The function behind a name whose module is loaded; NULL without an
 * exception if it takes more than looking it up. */
PyObject *binding_find_loaded(const char *name, size_t len);
/* Calls the function with a socket for fd (consumed) and the arguments; -1
 * with the exception that it has raised. */
int binding_enter(PyObject *handler, PyObject *func, PyObject *blank, int fd,
                  PyObject *args);
/* Ends the process with status 0 if nothing but a flush is left to do. */
void binding_end_plainly(PyObject *count_exit_handlers, PyObject *threading,
                         PyObject *flush);

/* mapping.c */
extern PyType_Spec binding_mapping_spec;
PyObject *binding_map_private(PyObject *module, PyObject *args);

/* process.c */
PyObject *binding_spawn(PyObject *module, PyObject *args, PyObject *kwargs);
PyObject *binding_exit_status(PyObject *module, PyObject *pidfd);
PyObject *binding_set_title(PyObject *module, PyObject *title);
PyObject *binding_get_environ(PyObject *module, PyObject *unused);
PyObject *binding_get_umask(PyObject *module, PyObject *unused);

#endif
