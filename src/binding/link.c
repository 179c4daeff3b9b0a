/*
 * Link: one end of an RPC connection.
 *
 * Only two things in it wait, and they let go of the GIL for it: receive, which
 * alone uses what was received, and flush, which looks at the queue afresh
 * when it has waited.  So another thread may send meanwhile.
 */
#include "binding.h"

#include <errno.h>
#include <limits.h>
#include <poll.h>
#include <string.h>
#include <sys/socket.h>

#include "fd.h"
#include "link.h"

enum { BACK_OFF = 10 /* milliseconds */ };

typedef struct {
    PyObject_HEAD
    struct afork_link link;
    int users;     /* calls in which other code may run, also in this thread */
    int receiving; /* one of them is receive */
    int closed;    /* the last of them is to free the link */
} Link;

static PyObject *
link_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    Link *l;
    int fd;

    if (kwargs && PyDict_GET_SIZE(kwargs)) {
        PyErr_SetString(PyExc_TypeError, "Link takes no keyword arguments");
        return NULL;
    }
    if (!PyArg_ParseTuple(args, "i:Link", &fd))
        return NULL;
    if (fd < 0)
        return binding_oserror(-EBADF);
    l = (Link *)type->tp_alloc(type, 0);
    if (!l) {
        afork_fd_close(&fd);
        return NULL;
    }
    afork_link_init_take(&l->link, fd);
    return (PyObject *)l;
}

static void
link_dealloc(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);

    afork_link_free(&((Link *)self)->link);
    type->tp_free(self);
    Py_DECREF(type);
}

static int
check_open(const Link *l)
{
    if (!l->closed)
        return 0;
    binding_oserror(-EBADF);
    return -1;
}

static void
leave(Link *l)
{
    if (--l->users == 0 && l->closed)
        afork_link_free(&l->link);
}

static int
check_nargs(const char *name, Py_ssize_t n, Py_ssize_t min, Py_ssize_t max)
{
    if (n >= min && n <= max)
        return 0;
    PyErr_Format(PyExc_TypeError, "%s takes %zd to %zd arguments (%zd given)",
                 name, min, max, n);
    return -1;
}

/* The numbers of a sequence: how many, or -1 with an exception set. */
static Py_ssize_t
get_fds(PyObject *sequence, int fds[AFORK_FDPASS_MAX])
{
    PyObject *fast =
        PySequence_Fast(sequence, "a sequence of descriptors is needed");
    Py_ssize_t n;

    if (!fast)
        return -1;
    for (n = 0; n < PySequence_Fast_GET_SIZE(fast); n++) {
        long fd;

        if (n == AFORK_FDPASS_MAX) {
            PyErr_Format(PyExc_ValueError, "more than %d descriptors",
                         (int)AFORK_FDPASS_MAX);
            break;
        }
        fd = PyLong_AsLong(PySequence_Fast_GET_ITEM(fast, n));
        if (fd == -1 && PyErr_Occurred())
            break;
        if (fd < 0 || fd > INT_MAX) {
            binding_oserror(-EBADF);
            break;
        }
        fds[n] = (int)fd;
    }
    Py_DECREF(fast);
    return PyErr_Occurred() ? -1 : n;
}

static PyObject *
link_send(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    Link *l = (Link *)self;
    int fds[AFORK_FDPASS_MAX], r;
    unsigned long long id;
    Py_ssize_t n = 0;
    Py_buffer payload;
    long kind;

    if (check_nargs("send", nargs, 3, 4) < 0)
        return NULL;
    kind = PyLong_AsLong(args[0]);
    if (kind == -1 && PyErr_Occurred())
        return NULL;
    if (kind < 0 || kind > UINT8_MAX) {
        PyErr_SetString(PyExc_ValueError, "kind is not a byte");
        return NULL;
    }
    id = PyLong_AsUnsignedLongLong(args[1]);
    if (id == (unsigned long long)-1 && PyErr_Occurred())
        return NULL;
    if (nargs == 4 && (n = get_fds(args[3], fds)) < 0)
        return NULL;
    if (PyObject_GetBuffer(args[2], &payload, PyBUF_SIMPLE) < 0)
        return NULL;
    /* Behind everything that may have run foreign code. */
    r = l->closed ? -EBADF
                  : afork_link_send(&l->link, (uint8_t)kind, id, payload.buf,
                                    (size_t)payload.len, fds, (size_t)n);
    PyBuffer_Release(&payload);
    if (r == -E2BIG)
        return PyErr_Format(PyExc_ValueError, "frame over the cap of %d bytes",
                            (int)AFORK_LINK_FRAME_MAX);
    if (r < 0)
        return binding_oserror(r);
    Py_RETURN_NONE;
}

/* Waits without the GIL, then runs signal handlers; -1 with an exception. */
static int
wait_for(Link *l, short events)
{
    struct pollfd p = {.fd = l->link.fd, .events = events};

    Py_BEGIN_ALLOW_THREADS
    /* A number that ends the wait for another reason comes back at once. */
    poll(&p, 1, -1);
    Py_END_ALLOW_THREADS
    return PyErr_CheckSignals() < 0 ? -1 : check_open(l);
}

static int
flush_waiting(Link *l)
{
    uint64_t before;
    int r;

    while ((r = afork_link_flush(&l->link)) == 0) {
        before = l->link.out.sent;
        if (wait_for(l, POLLOUT) < 0)
            return -1;
        r = afork_link_flush(&l->link);
        if (r)
            break;
        /* Writable, but nothing was taken: the limit on descriptors in
         * flight, about whose end nobody tells. */
        if (l->link.out.sent == before) {
            Py_BEGIN_ALLOW_THREADS
            poll(NULL, 0, BACK_OFF);
            Py_END_ALLOW_THREADS
            if (PyErr_CheckSignals() < 0 || check_open(l) < 0)
                return -1;
        }
    }
    if (r < 0)
        binding_oserror(r);
    return r < 0 ? -1 : 1;
}

/* One optional argument that says whether to wait. */
static int
get_wait(const char *name, PyObject *const *args, Py_ssize_t nargs,
         Py_ssize_t max)
{
    if (check_nargs(name, nargs, 0, max) < 0)
        return -1;
    return nargs ? PyObject_IsTrue(args[0]) : 0;
}

static PyObject *
link_flush(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    Link *l = (Link *)self;
    int r, wait = get_wait("flush", args, nargs, 1);

    if (wait < 0 || check_open(l) < 0)
        return NULL;
    if (!wait) {
        r = afork_link_flush(&l->link);
        return r < 0 ? binding_oserror(r) : PyBool_FromLong(r);
    }
    l->users++;
    r = flush_waiting(l);
    leave(l);
    return r < 0 ? NULL : PyBool_FromLong(r);
}

static PyObject *
fds_tuple(const struct afork_link_frame *frame)
{
    PyObject *tuple = PyTuple_New(frame->nfds); /* () is only one object */

    for (Py_ssize_t i = 0; tuple && i < frame->nfds; i++) {
        PyObject *fd = PyLong_FromLong(frame->fds[i]);

        if (!fd)
            Py_CLEAR(tuple);
        else
            PyTuple_SET_ITEM(tuple, i, fd);
    }
    return tuple;
}

static PyObject *
frame_tuple(const struct afork_link_frame *frame)
{
    PyObject *parts[4] = {
        PyLong_FromLong(frame->kind),
        PyLong_FromUnsignedLongLong(frame->id),
        PyBytes_FromStringAndSize((const char *)frame->payload,
                                  (Py_ssize_t)frame->len),
        fds_tuple(frame),
    };
    PyObject *tuple = PyTuple_New(4);
    int i;

    for (i = 0; tuple && i < 4; i++) {
        if (!parts[i])
            Py_CLEAR(tuple);
        else
            PyTuple_SET_ITEM(tuple, i, Py_NewRef(parts[i]));
    }
    for (i = 0; i < 4; i++)
        Py_XDECREF(parts[i]);
    return tuple;
}

/*
 * Appends complete frames up to limit; -1 with an exception.  A frame and its
 * descriptors leave the link when they are in the list.
 */
static int
collect(Link *l, PyObject *list, Py_ssize_t limit)
{
    struct afork_link_frame frame;

    while (PyList_GET_SIZE(list) < limit &&
           afork_link_peek(&l->link, &frame)) {
        PyObject *tuple = frame_tuple(&frame);
        int r = tuple ? PyList_Append(list, tuple) : -1;

        Py_XDECREF(tuple);
        if (r < 0 && PyList_GET_SIZE(list) == 0)
            return -1;
        if (r < 0) { /* no memory: the next call tries again */
            PyErr_Clear();
            break;
        }
        afork_link_take(&l->link);
    }
    return 0;
}

/* One recvmsg: 1 when there may be frames, 0 not now or not any more, -1. */
static int
fill(Link *l, int wait)
{
    int r;

    if (wait) {
        Py_BEGIN_ALLOW_THREADS
        r = afork_link_fill(&l->link, 1);
        Py_END_ALLOW_THREADS
        if (check_open(l) < 0)
            return -1;
    } else {
        r = afork_link_fill(&l->link, 0);
    }
    if (r == -EPIPE)
        return 0;
    if (r == -EINTR)
        return PyErr_CheckSignals() < 0 ? -1 : 1;
    if (r < 0)
        binding_oserror(r);
    /* The socket itself is a non-blocking one. */
    if (r == 0 && wait)
        return wait_for(l, POLLIN) < 0 ? -1 : 1;
    return r < 0 ? -1 : r;
}

static PyObject *
receive(Link *l, int wait, Py_ssize_t limit)
{
    PyObject *list = PyList_New(0);
    int r = 1;

    if (!list)
        return NULL;
    while (r > 0) {
        if (collect(l, list, limit) < 0)
            r = -1;
        else if (PyList_GET_SIZE(list))
            break;
        else
            r = fill(l, wait);
        if (r > 0 && !wait) {
            r = collect(l, list, limit);
            break;
        }
    }
    if (r < 0)
        Py_CLEAR(list);
    return list;
}

static PyObject *
link_receive(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    Link *l = (Link *)self;
    int wait = get_wait("receive", args, nargs, 2);
    Py_ssize_t limit = 128;
    PyObject *list;

    if (wait < 0)
        return NULL;
    if (nargs == 2) {
        limit = PyLong_AsSsize_t(args[1]);
        if (limit == -1 && PyErr_Occurred())
            return NULL;
        if (limit < 1) {
            PyErr_SetString(PyExc_ValueError, "limit is less than 1");
            return NULL;
        }
    }
    if (check_open(l) < 0)
        return NULL;
    if (l->receiving) {
        PyErr_SetString(PyExc_RuntimeError,
                        "another call of receive is not done yet");
        return NULL;
    }
    l->receiving = 1;
    l->users++;
    list = receive(l, wait, limit);
    l->receiving = 0;
    leave(l);
    return list;
}

static PyObject *
link_detach(PyObject *self, PyObject *unused)
{
    Link *l = (Link *)self;
    int fd;

    (void)unused;
    if (check_open(l) < 0)
        return NULL;
    if (l->users) {
        PyErr_SetString(PyExc_RuntimeError, "the link is in use");
        return NULL;
    }
    fd = l->link.fd;
    l->link.fd = AFORK_NOFD;
    l->closed = 1;
    afork_link_free(&l->link);
    return PyLong_FromLong(fd);
}

static PyObject *
link_shutdown(PyObject *self, PyObject *unused)
{
    Link *l = (Link *)self;

    (void)unused;
    if (check_open(l) < 0)
        return NULL;
    shutdown(l->link.fd, SHUT_WR); /* ENOTCONN: the peer has gone already */
    Py_RETURN_NONE;
}

static PyObject *
link_close(PyObject *self, PyObject *unused)
{
    Link *l = (Link *)self;

    (void)unused;
    if (!l->closed) {
        l->closed = 1;
        if (l->users)
            shutdown(l->link.fd, SHUT_RDWR); /* wakes those that wait */
        else
            afork_link_free(&l->link);
    }
    Py_RETURN_NONE;
}

static PyObject *
link_fileno(PyObject *self, PyObject *unused)
{
    Link *l = (Link *)self;

    (void)unused;
    return PyLong_FromLong(l->closed ? AFORK_NOFD : l->link.fd);
}

static PyObject *
get_pending(PyObject *self, void *unused)
{
    Link *l = (Link *)self;
    int pending = 0;

    (void)unused;
    /* What a call that runs has received is its own. */
    if (!l->closed && !l->receiving)
        pending = afork_link_ready(&l->link) || l->link.status == -EPROTO;
    return PyBool_FromLong(pending);
}

static PyObject *
get_queued(PyObject *self, void *unused)
{
    (void)unused;
    return PyLong_FromSize_t(afork_outq_len(&((Link *)self)->link.out));
}

static PyObject *
get_eof(PyObject *self, void *unused)
{
    (void)unused;
    return PyBool_FromLong(((Link *)self)->link.status == -EPIPE);
}

static PyMethodDef methods[] = {
    {"send", (PyCFunction)(void (*)(void))link_send, METH_FASTCALL, NULL},
    {"flush", (PyCFunction)(void (*)(void))link_flush, METH_FASTCALL, NULL},
    {"receive", (PyCFunction)(void (*)(void))link_receive, METH_FASTCALL,
     NULL},
    {"detach", link_detach, METH_NOARGS, NULL},
    {"shutdown", link_shutdown, METH_NOARGS, NULL},
    {"close", link_close, METH_NOARGS, NULL},
    {"fileno", link_fileno, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef getset[] = {
    {"pending", get_pending, NULL, NULL, NULL},
    {"queued", get_queued, NULL, NULL, NULL},
    {"eof", get_eof, NULL, NULL, NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot link_slots[] = {
    {Py_tp_new, (void *)(uintptr_t)link_new},
    {Py_tp_dealloc, (void *)(uintptr_t)link_dealloc},
    {Py_tp_methods, methods},
    {Py_tp_getset, getset},
    {Py_tp_doc, "Link(fd): owns the connected socket fd."},
    {0, NULL},
};

PyType_Spec binding_link_spec = {
    .name = "afork._afork.Link",
    .basicsize = sizeof(Link),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = link_slots,
};
