/* Link.receive: frames as tuples. */
#include "link_type.h"

#include <errno.h>
#include <poll.h>

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
        if (binding_link_check(l) < 0)
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
        return binding_link_wait(l, POLLIN) < 0 ? -1 : 1;
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

PyObject *
binding_link_receive(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    Link *l = (Link *)self;
    int wait = binding_link_wait_arg("receive", args, nargs, 2);
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
    if (binding_link_check(l) < 0)
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
    binding_link_leave(l);
    return list;
}
