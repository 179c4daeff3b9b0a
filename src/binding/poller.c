/*
 * Poller: the epoll instance of an application, and who is told of an event.
 *
 * It is what runs between an event and the process that it is about, once for
 * every wake-up.
 */
#include "channel.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>

#include "fd.h"

enum { EVENTS = 256 };

/* Of one descriptor. */
struct watched {
    PyObject *owner;   /* strong: what to call with the events; or a process */
    PyObject *channel; /* strong: its Channel, if it is a process */
};

typedef struct {
    PyObject_HEAD
    PyObject *lock;        /* strong: a Lock, held while events are handled */
    struct watched *table; /* owned: by descriptor */
    int cap;
    int epoll; /* owned */
} Poller;

static PyObject *
poller_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    struct binding_state *state = binding_state_of(type);
    Poller *p = state ? (Poller *)type->tp_alloc(type, 0) : NULL;

    (void)args;
    (void)kwargs;
    if (!p)
        return NULL;
    p->epoll = epoll_create1(EPOLL_CLOEXEC);
    if (p->epoll < 0) {
        binding_oserror(-errno);
        Py_DECREF(p);
        return NULL;
    }
    p->lock = PyObject_CallNoArgs((PyObject *)state->lock_type);
    if (!p->lock)
        Py_CLEAR(p);
    return (PyObject *)p;
}

static int
poller_traverse(PyObject *self, visitproc visit, void *arg)
{
    Poller *p = (Poller *)self;

    Py_VISIT(Py_TYPE(self));
    Py_VISIT(p->lock);
    for (int fd = 0; fd < p->cap; fd++) {
        Py_VISIT(p->table[fd].owner);
        Py_VISIT(p->table[fd].channel);
    }
    return 0;
}

/* Forgets a descriptor: 1 if it was known. */
static int
forget(Poller *p, int fd)
{
    struct watched old;

    if (fd < 0 || fd >= p->cap || !p->table[fd].owner)
        return 0;
    old = p->table[fd];
    p->table[fd] = (struct watched){NULL, NULL};
    Py_DECREF(old.owner); /* may run anything */
    Py_XDECREF(old.channel);
    return 1;
}

static int
poller_clear(PyObject *self)
{
    Poller *p = (Poller *)self;

    for (int fd = 0; fd < p->cap; fd++)
        forget(p, fd);
    return 0;
}

static void
poller_dealloc(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    Poller *p = (Poller *)self;

    PyObject_GC_UnTrack(self);
    poller_clear(self);
    free(p->table);
    Py_XDECREF(p->lock);
    afork_fd_close(&p->epoll);
    type->tp_free(self);
    Py_DECREF(type);
}

static int
grow(Poller *p, int fd)
{
    int cap = p->cap ? p->cap : 64;
    struct watched *table;

    if (fd < p->cap)
        return 0;
    while (cap <= fd)
        cap *= 2; /* descriptors are far fewer than INT_MAX / 2 */
    table = realloc(p->table, (size_t)cap * sizeof *table);
    if (!table)
        return -ENOMEM;
    memset(table + p->cap, 0, (size_t)(cap - p->cap) * sizeof *table);
    p->table = table;
    p->cap = cap;
    return 0;
}

static int
control(Poller *p, int operation, int fd, unsigned events)
{
    struct epoll_event event = {.events = events, .data = {.fd = fd}};

    return epoll_ctl(p->epoll, operation, fd, &event) < 0 ? -errno : 0;
}

static PyObject *
watch(Poller *p, int fd, PyObject *owner, PyObject *channel, unsigned events)
{
    int r = fd < 0 ? -EBADF : grow(p, fd);

    if (r == 0)
        r = control(p, EPOLL_CTL_ADD, fd, events);
    if (r < 0)
        return binding_oserror(r);
    forget(p, fd);
    p->table[fd] = (struct watched){Py_NewRef(owner), Py_XNewRef(channel)};
    Py_RETURN_NONE;
}

static PyObject *
poller_watch(PyObject *self, PyObject *args)
{
    PyObject *callback;
    int fd;

    if (!PyArg_ParseTuple(args, "iO:watch", &fd, &callback))
        return NULL;
    return watch((Poller *)self, fd, callback, NULL, EPOLLIN);
}

static PyObject *
poller_watch_process(PyObject *self, PyTypeObject *defining,
                     PyObject *const *args, Py_ssize_t n, PyObject *names)
{
    struct binding_state *state = PyType_GetModuleState(defining);

    if (n != 2 || names || !Py_IS_TYPE(args[0], state->channel_type)) {
        PyErr_SetString(PyExc_TypeError, "a Channel and its process");
        return NULL;
    }
    return watch((Poller *)self, ((Channel *)args[0])->fd, args[1], args[0],
                 EPOLLIN);
}

static PyObject *
poller_change(PyObject *self, PyObject *args)
{
    unsigned events;
    int fd, r;

    if (!PyArg_ParseTuple(args, "iI:change", &fd, &events))
        return NULL;
    r = control((Poller *)self, EPOLL_CTL_MOD, fd, events);
    return r < 0 ? binding_oserror(r) : Py_NewRef(Py_None);
}

/* Must come before the descriptor is closed: numbers are reused. */
static PyObject *
poller_unwatch(PyObject *self, PyObject *arg)
{
    Poller *p = (Poller *)self;
    long fd = PyLong_AsLong(arg);
    int r = 0;

    if (fd == -1 && PyErr_Occurred())
        return NULL;
    if (fd >= 0 && fd < p->cap && p->table[fd].owner)
        r = control(p, EPOLL_CTL_DEL, (int)fd, 0);
    forget(p, fd < p->cap ? (int)fd : AFORK_NOFD);
    return r < 0 ? binding_oserror(r) : Py_NewRef(Py_None);
}

/* Tells whom an event is about. */
static PyObject *
dispatch(const struct binding_state *state, const struct watched *w,
         unsigned events)
{
    if (!w->channel)
        return PyObject_CallFunction(w->owner, "I", events);
    /* There is room again, or no reports to be read: that is for Python. */
    if (events & EPOLLOUT || ((Channel *)w->channel)->plain)
        return PyObject_CallMethod(w->owner, "_on_event", "I", events);
    return binding_channel_tell(state, w->channel, w->owner);
}

static int
handle(const struct binding_state *state, Poller *p)
{
    struct epoll_event events[EVENTS];
    struct watched due[EVENTS];
    int n = epoll_wait(p->epoll, events, EVENTS, 0), failed = 0;

    if (n < 0) {
        if (errno == EINTR)
            return 0; /* they are still there */
        binding_oserror(-errno);
        return -1;
    }
    for (int i = 0; i < n; i++) {
        int fd = events[i].data.fd;

        due[i] = fd < p->cap ? p->table[fd] : (struct watched){NULL, NULL};
        Py_XINCREF(due[i].owner);
        Py_XINCREF(due[i].channel);
    }
    for (int i = 0; i < n; i++) {
        int fd = events[i].data.fd;

        /* An earlier one may have closed it, and its number be another's. */
        if (!failed && due[i].owner && fd < p->cap &&
            p->table[fd].owner == due[i].owner) {
            PyObject *result = dispatch(state, &due[i], events[i].events);

            failed = !result;
            Py_XDECREF(result);
        }
        Py_XDECREF(due[i].owner);
        Py_XDECREF(due[i].channel);
    }
    return failed ? -1 : 0;
}

static PyObject *
poller_drain(PyObject *self, PyTypeObject *defining, PyObject *const *args,
             Py_ssize_t n, PyObject *names)
{
    struct binding_state *state = PyType_GetModuleState(defining);
    Poller *p = (Poller *)self;
    struct binding_raised raised;
    int r;

    (void)args, (void)n, (void)names; /* it takes none */
    binding_lock_acquire(p->lock);
    r = handle(state, p);
    if (r == 0)
        return binding_lock_release(p->lock) < 0 ? NULL : Py_NewRef(Py_None);
    binding_take_raised(&raised);
    if (binding_lock_release(p->lock) < 0)
        PyErr_WriteUnraisable(self);
    binding_put_raised(&raised);
    return NULL;
}

static PyObject *
poller_owners(PyObject *self, PyObject *unused)
{
    Poller *p = (Poller *)self;
    PyObject *list = PyList_New(0);

    (void)unused;
    for (int fd = 0; list && fd < p->cap; fd++)
        if (p->table[fd].owner && PyList_Append(list, p->table[fd].owner) < 0)
            Py_CLEAR(list);
    return list;
}

static PyObject *
poller_close(PyObject *self, PyObject *unused)
{
    (void)unused;
    poller_clear(self);
    afork_fd_close(&((Poller *)self)->epoll);
    Py_RETURN_NONE;
}

static PyObject *
poller_fileno(PyObject *self, PyObject *unused)
{
    (void)unused;
    return PyLong_FromLong(((Poller *)self)->epoll);
}

static PyObject *
get_lock(PyObject *self, void *unused)
{
    (void)unused;
    return Py_NewRef(((Poller *)self)->lock);
}

static PyMethodDef methods[] = {
    {"watch", poller_watch, METH_VARARGS, NULL},
    {"watch_process", (PyCFunction)(void (*)(void))poller_watch_process,
     METH_METHOD | METH_FASTCALL | METH_KEYWORDS, NULL},
    {"change", poller_change, METH_VARARGS, NULL},
    {"unwatch", poller_unwatch, METH_O, NULL},
    {"drain", (PyCFunction)(void (*)(void))poller_drain,
     METH_METHOD | METH_FASTCALL | METH_KEYWORDS, NULL},
    {"owners", poller_owners, METH_NOARGS, NULL},
    {"close", poller_close, METH_NOARGS, NULL},
    {"fileno", poller_fileno, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef getset[] = {
    {"lock", get_lock, NULL, NULL, NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot poller_slots[] = {
    {Py_tp_new, (void *)(uintptr_t)poller_new},
    {Py_tp_dealloc, (void *)(uintptr_t)poller_dealloc},
    {Py_tp_traverse, (void *)(uintptr_t)poller_traverse},
    {Py_tp_clear, (void *)(uintptr_t)poller_clear},
    {Py_tp_methods, methods},
    {Py_tp_getset, getset},
    {Py_tp_doc, "Poller(): an epoll instance and who is told of its events."},
    {0, NULL},
};

PyType_Spec binding_poller_spec = {
    .name = "afork._afork.Poller",
    .basicsize = sizeof(Poller),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC |
             Py_TPFLAGS_IMMUTABLETYPE,
    .slots = poller_slots,
};
