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
#include "link_type.h"

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

int
binding_link_check(const Link *l)
{
    if (!l->closed)
        return 0;
    binding_oserror(-EBADF);
    return -1;
}

void
binding_link_leave(Link *l)
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

int
binding_link_wait(Link *l, short events)
{
    struct pollfd p = {.fd = l->link.fd, .events = events};

    Py_BEGIN_ALLOW_THREADS
    /* A number that ends the wait for another reason comes back at once. */
    poll(&p, 1, -1);
    Py_END_ALLOW_THREADS
    return PyErr_CheckSignals() < 0 ? -1 : binding_link_check(l);
}

static int
flush_waiting(Link *l)
{
    int r;

    while ((r = afork_link_flush(&l->link)) == 0) {
        if (!l->link.out.crowded) {
            if (binding_link_wait(l, POLLOUT) < 0)
                return -1;
            continue;
        }
        Py_BEGIN_ALLOW_THREADS
        poll(NULL, 0, AFORK_OUTQ_BACK_OFF);
        Py_END_ALLOW_THREADS
        if (PyErr_CheckSignals() < 0 || binding_link_check(l) < 0)
            return -1;
    }
    if (r < 0)
        binding_oserror(r);
    return r < 0 ? -1 : 1;
}

int
binding_link_wait_arg(const char *name, PyObject *const *args,
                      Py_ssize_t nargs, Py_ssize_t max)
{
    if (check_nargs(name, nargs, 0, max) < 0)
        return -1;
    return nargs ? PyObject_IsTrue(args[0]) : 0;
}

static PyObject *
link_flush(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    Link *l = (Link *)self;
    int r, wait = binding_link_wait_arg("flush", args, nargs, 1);

    if (wait < 0 || binding_link_check(l) < 0)
        return NULL;
    if (!wait) {
        r = afork_link_flush(&l->link);
        return r < 0 ? binding_oserror(r) : PyBool_FromLong(r);
    }
    l->users++;
    r = flush_waiting(l);
    binding_link_leave(l);
    return r < 0 ? NULL : PyBool_FromLong(r);
}

static PyObject *
link_detach(PyObject *self, PyObject *unused)
{
    Link *l = (Link *)self;
    int fd;

    (void)unused;
    if (binding_link_check(l) < 0)
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
    if (binding_link_check(l) < 0)
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
    {"receive", (PyCFunction)(void (*)(void))binding_link_receive,
     METH_FASTCALL, NULL},
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
