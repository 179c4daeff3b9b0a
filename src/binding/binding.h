/* The binding of the core to CPython: what its files share. */
#ifndef AFORK_BINDING_H
#define AFORK_BINDING_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "args.h"
#include "wire.h"

struct binding_state {
    PyTypeObject *channel_type;
    PyTypeObject *link_type;
    PyTypeObject *poller_type;
    PyTypeObject *lock_type;
    PyTypeObject *descriptor_type;
    PyTypeObject *mapping_type;
    /* names, made once */
    PyObject *on_entered, *on_reports, *children;
};

/* Sets OSError from a core status (< 0) and returns NULL; MemoryError where
 * it was our own memory. */
PyObject *binding_oserror(int status);
/* The same of a system call: OSError also for ENOMEM.  filename may be NULL.
 */
PyObject *binding_oserror_name(int status, PyObject *filename);

/* The state of the module that a type, or a base of it, is from; NULL and an
 * exception. */
struct binding_state *binding_state_of(PyTypeObject *type);

/* An exception, or none, that is put aside while something is called. */
#if PY_VERSION_HEX >= 0x030c0000
struct binding_raised {
    PyObject *value;
};

static inline void
binding_take_raised(struct binding_raised *r)
{
    r->value = PyErr_GetRaisedException();
}

static inline void
binding_put_raised(struct binding_raised *r)
{
    PyErr_SetRaisedException(r->value);
}
#else
struct binding_raised {
    PyObject *type, *value, *traceback;
};

static inline void
binding_take_raised(struct binding_raised *r)
{
    PyErr_Fetch(&r->type, &r->value, &r->traceback);
}

static inline void
binding_put_raised(struct binding_raised *r)
{
    PyErr_Restore(r->type, r->value, r->traceback);
}
#endif

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

/* poller.c */
extern PyType_Spec binding_poller_spec;

/* lock.c */
extern PyType_Spec binding_lock_spec;
void binding_lock_acquire(PyObject *lock);
/* -1 and an exception of what had to be called without it. */
int binding_lock_release(PyObject *lock);

/* descriptor.c */
extern PyType_Spec binding_descriptor_spec;
/* NULL and an exception, and it is closed. */
PyObject *binding_descriptor_take(const struct binding_state *state, int fd);

/* link.c */
extern PyType_Spec binding_link_spec;

/* server.c */
PyObject *binding_serve(PyObject *module, PyObject *args);
PyObject *binding_fork(PyObject *module, PyObject *unused);

struct afork_server;
/* The server that this process is, or NULL. */
const struct afork_server *binding_current_server(void);
/* The same, or NULL and an exception. */
struct afork_server *binding_serving(int **ret_keep_title);

/* settings.c */
PyObject *binding_detach(PyObject *module, PyObject *flag);
PyObject *binding_keep_title(PyObject *module, PyObject *unused);
PyObject *binding_report_again(PyObject *module, PyObject *unused);
PyObject *binding_make_plain(PyObject *module, PyObject *unused);
/* The socket object that workers fill in, borrowed; or NULL.  It has to end
 * with its last reference. */
PyObject *binding_worker_socket(void);

/* Titles a spare, or a template that was one, unless somebody else has. */
void binding_warm_title(int *is_spare, int on);

/* stats.c */
/* What the loop and the handler know of the process: malloc'ed, or NULL. */
uint8_t *binding_stats(PyObject *handler, const struct afork_server *server,
                       size_t *ret_len);

/* worker.c */
/* The function behind a name whose module is loaded; NULL without an
 * exception if it takes more than looking it up. */
PyObject *binding_find_loaded(const char *name, size_t len);
/* Makes the blank socket object the one of fd (consumed); -1 and an exception.
 */
int binding_fill_socket_take(PyObject *blank, int fd);
/* Calls the function with the socket and the pending arguments, whose
 * descriptors are consumed; -1 with the exception that it has raised. */
int binding_enter(PyObject *handler, PyObject *func, PyObject *sock,
                  struct afork_args *args);
PyObject *binding_change_type(PyObject *module, PyObject *args);
/* Does what entering a function does, with nothing to show for it. */
void binding_warm(PyObject *blank, PyObject *count_exit_handlers);
/* Whether nothing but a flush is left to do at the end of the process. */
int binding_ends_plainly(PyObject *count_exit_handlers, PyObject *threading);
/* By the function that closes a socket object, whatever comes of it. */
void binding_close_socket(PyObject *sock, PyObject *close);

/* stdio.c */
struct binding_layer {
    PyObject *object; /* strong */
    char *image;      /* owned: what it was like with nothing to flush */
};
struct binding_stdio {
    struct binding_stream {
        struct binding_layer text, buffer;
    } streams[2]; /* stdout, stderr */
};
/* To be called when both have just been flushed. */
void binding_stdio_remember(struct binding_stdio *s);
void binding_stdio_forget(struct binding_stdio *s);
/* Flushes what has changed since. */
void binding_stdio_flush(const struct binding_stdio *s, PyObject *flush);

/* mapping.c */
extern PyType_Spec binding_mapping_spec;
PyObject *binding_map_private(PyObject *module, PyObject *args);

/* arena.c: where a template's objects live */
void binding_arena_install(void);
void binding_arena_own(void); /* slabs for a child that becomes a template */
int binding_arena_holds(const void *at);
size_t binding_arena_count(size_t *ret_bytes);

/* freeze.c */
/* Why no object can be made immortal here, or NULL. */
const char *binding_immortal_refused(void);
/* Makes all objects immortal but one; how many, or -1 with an exception.
 * only_new: what refers to them is new as well, or among the roots. */
Py_ssize_t binding_immortalise(PyObject *roots, PyObject *except, int only_new,
                               Py_ssize_t *ret_visited);

/* memory.c: a template's memory around its forks */
/* Python is about to run. */
void binding_memory_command(void);
/* Everything but what the caller writes between forks, at n addresses, is made
 * ready to be shared; alone: no child lives. */
void binding_memory_before_fork(const void *const *keep, size_t n, int alone);
int binding_memory_no_text(void); /* whether text stays as it is */
void binding_memory_collapse(const void *const *keep, size_t n);
PyObject *binding_memory_huge_pages(PyObject *module, PyObject *unused);
PyObject *binding_memory_collapse_now(PyObject *module, PyObject *unused);
PyObject *binding_memory_setup(PyObject *module, PyObject *args);
PyObject *binding_memory_immortalise(PyObject *module, PyObject *args);
PyObject *binding_memory_stats(PyObject *module, PyObject *unused);

/* process.c */
PyObject *binding_spawn(PyObject *module, PyObject *args, PyObject *kwargs);
PyObject *binding_exit_status(PyObject *module, PyObject *pidfd);
PyObject *binding_set_title(PyObject *module, PyObject *title);
PyObject *binding_get_environ(PyObject *module, PyObject *unused);
PyObject *binding_get_umask(PyObject *module, PyObject *unused);

#endif
