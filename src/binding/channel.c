/*
 * Channel: the application's end of a process's control socket.
 *
 * Nothing in it blocks, whatever mode the socket is in: so every call is one
 * step under the GIL and threads need no other lock for it.
 */
#include "channel.h"

#include <errno.h>
#include <limits.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>

#include "fd.h"

enum {
    START_BYTES = 14, /* the shortest conversation that ends in RUNNING */
    PARENT_BYTES = 8 << 10, /* of a process that will never report RUNNING */
};

static PyObject *
channel_make(PyTypeObject *type, int fd_take, int plain)
{
    Channel *c = (Channel *)type->tp_alloc(type, 0);

    if (!c) {
        afork_fd_close(&fd_take);
        return NULL;
    }
    c->fd = fd_take;
    c->plain = plain;
    afork_outq_init(&c->out);
    afork_reader_init(&c->in, AFORK_TO_APPLICATION);
    return (PyObject *)c;
}

static PyObject *
channel_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    int fd, plain = 0;

    if (kwargs && PyDict_GET_SIZE(kwargs)) {
        PyErr_SetString(PyExc_TypeError, "Channel takes no keyword arguments");
        return NULL;
    }
    if (!PyArg_ParseTuple(args, "i|p:Channel", &fd, &plain))
        return NULL;
    /* AFORK_NOFD: without a socket yet, frames are queued until attach. */
    return channel_make(type, fd, plain);
}

static void
channel_release(Channel *c)
{
    afork_fd_close(&c->fd);
    afork_outq_free(&c->out);
    afork_reader_free(&c->in);
}

static void
channel_dealloc(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);

    channel_release((Channel *)self);
    type->tp_free(self);
    Py_DECREF(type);
}

int
binding_channel_check(const Channel *c)
{
    if (c->fd >= 0)
        return 0;
    binding_oserror(-EBADF);
    return -1;
}

static PyObject *
status_none(int r)
{
    if (r == -E2BIG)
        return PyErr_Format(PyExc_ValueError, "frame over the cap of %d bytes",
                            (int)AFORK_FRAME_MAX);
    if (r < 0)
        return binding_oserror(r);
    Py_RETURN_NONE;
}

static PyObject *
channel_frame(PyObject *self, PyObject *args)
{
    Channel *c = (Channel *)self;
    Py_buffer payload;
    int letter, r;

    if (!PyArg_ParseTuple(args, "iy*:frame", &letter, &payload))
        return NULL;
    if (payload.len > (Py_ssize_t)AFORK_FRAME_MAX)
        r = -E2BIG;
    else
        r = afork_outq_frame(&c->out, (uint8_t)letter, payload.buf,
                             (size_t)payload.len);
    PyBuffer_Release(&payload);
    return status_none(r);
}

static PyObject *
channel_strings(PyObject *self, PyObject *args)
{
    Channel *c = (Channel *)self;
    struct binding_strs s;
    PyObject *sequence;
    int letter, r;

    if (!PyArg_ParseTuple(args, "iO:strings", &letter, &sequence) ||
        binding_strs_get(&s, sequence) < 0)
        return NULL;
    r = afork_outq_list(&c->out, (uint8_t)letter, s.strs, s.n,
                        AFORK_FRAME_MAX);
    binding_strs_release(&s);
    return status_none(r);
}

/* An int in range, or -1 with an exception set. */
static int
fd_of(PyObject *arg)
{
    long value = PyLong_AsLong(arg);

    if (value == -1 && PyErr_Occurred())
        return -1;
    if (value < 0 || value > INT_MAX) {
        binding_oserror(-EBADF);
        return -1;
    }
    return (int)value;
}

static void
close_all(int *fds, Py_ssize_t n)
{
    while (n-- > 0)
        afork_fd_close(&fds[n]);
}

/* All or none: half of the descriptors of a request would be taken for
 * arguments by everything that is asked for later. */
static PyObject *
channel_handles(PyObject *self, PyObject *arg)
{
    Channel *c = (Channel *)self;
    PyObject *fast =
        PySequence_Fast(arg, "a sequence of descriptors is needed");
    int fds[AFORK_FDPASS_MAX], r = 0;
    Py_ssize_t n, have;

    if (!fast)
        return NULL;
    n = PySequence_Fast_GET_SIZE(fast);
    if (n > AFORK_FDPASS_MAX)
        r = -EINVAL;
    for (have = 0; r == 0 && have < n; have++) {
        int fd = fd_of(PySequence_Fast_GET_ITEM(fast, have));

        r = fd < 0 ? fd : afork_fd_dup(fd);
        if (r < 0)
            break;
        fds[have] = r;
        r = 0;
    }
    Py_DECREF(fast);
    if (r < 0) {
        close_all(fds, have);
        return PyErr_Occurred() ? NULL : binding_oserror(r);
    }
    for (Py_ssize_t i = 0; i < n; i++) {
        r = afork_outq_fd_take(&c->out, AFORK_CARRY_BEHIND, AFORK_CMD_HANDLE,
                               NULL, 0, fds[i], 0);
        if (r < 0) {
            close_all(fds + i + 1, n - i - 1);
            break;
        }
    }
    return status_none(r);
}

/* Queues the request that turns sock, the far end, into process id. */
static int
request_fork_take(Channel *c, int sock, uint64_t id)
{
    int r;

    if (!c->plain)
        return afork_outq_fd_take(&c->out, AFORK_CARRY_FIRST,
                                  AFORK_CMD_FORK_ID, &id, sizeof id, sock, id);
    r = afork_outq_fd_take(&c->out, AFORK_CARRY_BEHIND, AFORK_CMD_HANDLE, NULL,
                           0, sock, id);
    return r < 0 ? r : afork_outq_frame(&c->out, AFORK_CMD_FORK, NULL, 0);
}

/* From here on the process has children: it will never report RUNNING. */
static void
expect_children(Channel *c)
{
    if (!c->plain && !c->in.ahead)
        afork_reader_ahead(&c->in, PARENT_BYTES, 0);
}

static PyObject *
channel_fork(PyObject *self, PyObject *arg)
{
    Channel *c = (Channel *)self;
    uint64_t id = PyLong_AsUnsignedLongLong(arg);
    PyObject *child;
    int pair[2], r;

    if (id == (uint64_t)-1 && PyErr_Occurred())
        return NULL;
    r = afork_fd_pair(pair);
    if (r < 0)
        return binding_oserror(r);
    child = channel_make(Py_TYPE(self), pair[0], c->plain);
    if (!child) {
        afork_fd_close(&pair[1]);
        return NULL;
    }
    expect_children(c);
    if (!c->plain)
        afork_reader_ahead(&((Channel *)child)->in, START_BYTES, 1);
    r = request_fork_take(c, pair[1], id);
    if (r < 0) {
        Py_DECREF(child);
        return binding_oserror(r);
    }
    return child;
}

/* Gives the channel its socket, which a template has sent.  Consumed. */
static PyObject *
channel_attach(PyObject *self, PyObject *arg)
{
    Channel *c = (Channel *)self;
    struct sockaddr_un peer;
    socklen_t len = sizeof peer, size = sizeof(int);
    int fd = fd_of(arg), type = 0, r;

    if (fd < 0)
        return NULL;
    r = c->fd >= 0 ? -EISCONN : 0;
    /* It may have sent anything: only this has the calls that will be used. */
    if (r == 0 && (getpeername(fd, (struct sockaddr *)&peer, &len) < 0 ||
                   getsockopt(fd, SOL_SOCKET, SO_TYPE, &type, &size) < 0))
        r = -errno;
    if (r == 0 && (peer.sun_family != AF_UNIX || type != SOCK_STREAM))
        r = -ENOTSOCK;
    if (r < 0)
        afork_fd_close(&fd);
    else {
        c->fd = fd;
        afork_reader_ahead(&c->in, START_BYTES, 1);
    }
    return status_none(r);
}

/* Queues one request for many processes; its tag is the first id. */
static PyObject *
channel_fork_many(PyObject *self, PyObject *arg)
{
    Channel *c = (Channel *)self;
    Py_buffer ids;
    uint64_t first;
    int r = -EINVAL;

    if (PyObject_GetBuffer(arg, &ids, PyBUF_SIMPLE) < 0)
        return NULL;
    if (ids.len > (Py_ssize_t)AFORK_FRAME_MAX)
        r = -E2BIG;
    else if (ids.len >= (Py_ssize_t)sizeof first) {
        memcpy(&first, ids.buf, sizeof first);
        expect_children(c);
        r = afork_outq_tagged(&c->out, AFORK_CMD_FORK_MANY, ids.buf,
                              (size_t)ids.len, first);
    }
    PyBuffer_Release(&ids);
    return status_none(r);
}

static PyObject *
channel_request(PyObject *self, PyObject *args)
{
    Channel *c = (Channel *)self;
    unsigned long long id;
    int fd;

    if (!PyArg_ParseTuple(args, "Ki:request", &id, &fd))
        return NULL;
    return status_none(request_fork_take(c, fd, id));
}

static PyObject *
channel_reclaim(PyObject *self, PyObject *unused)
{
    Channel *c = (Channel *)self;
    uint64_t id;
    int fd;

    (void)unused;
    if (afork_outq_reclaim(&c->out, &id, &fd))
        return Py_BuildValue("Ki", (unsigned long long)id, fd);
    Py_RETURN_NONE;
}

static PyObject *
channel_flush(PyObject *self, PyObject *unused)
{
    Channel *c = (Channel *)self;
    int r;

    (void)unused;
    if (binding_channel_check(c) < 0)
        return NULL;
    r = afork_outq_flush(&c->out, c->fd);
    return r < 0 ? binding_oserror(r) : PyBool_FromLong(r);
}

static PyObject *
channel_detach(PyObject *self, PyObject *unused)
{
    Channel *c = (Channel *)self;
    int fd = c->fd;

    (void)unused;
    if (binding_channel_check(c) < 0)
        return NULL;
    c->fd = AFORK_NOFD;
    channel_release(c);
    return PyLong_FromLong(fd);
}

static PyObject *
channel_shutdown(PyObject *self, PyObject *unused)
{
    Channel *c = (Channel *)self;

    (void)unused;
    if (c->fd >= 0)
        shutdown(c->fd, SHUT_WR); /* ENOTCONN: the process has gone already */
    Py_RETURN_NONE;
}

static PyObject *
channel_close(PyObject *self, PyObject *unused)
{
    (void)unused;
    channel_release((Channel *)self);
    Py_RETURN_NONE;
}

static PyObject *
channel_fileno(PyObject *self, PyObject *unused)
{
    (void)unused;
    return PyLong_FromLong(((Channel *)self)->fd);
}

static PyObject *
get_queued(PyObject *self, void *unused)
{
    (void)unused;
    return PyLong_FromSize_t(afork_outq_len(&((Channel *)self)->out));
}

static PyObject *
get_crowded(PyObject *self, void *unused)
{
    (void)unused;
    return PyBool_FromLong(((Channel *)self)->out.crowded);
}

static PyObject *
get_eof(PyObject *self, void *unused)
{
    (void)unused;
    return PyBool_FromLong(((Channel *)self)->eof);
}

static PyObject *
get_plain(PyObject *self, void *unused)
{
    (void)unused;
    return PyBool_FromLong(((Channel *)self)->plain);
}

static PyMethodDef methods[] = {
    {"frame", channel_frame, METH_VARARGS, NULL},
    {"strings", channel_strings, METH_VARARGS, NULL},
    {"handles", channel_handles, METH_O, NULL},
    {"fork", channel_fork, METH_O, NULL},
    {"fork_many", channel_fork_many, METH_O, NULL},
    {"attach", channel_attach, METH_O, NULL},
    {"request", channel_request, METH_VARARGS, NULL},
    {"reclaim", channel_reclaim, METH_NOARGS, NULL},
    {"flush", channel_flush, METH_NOARGS, NULL},
    {"receive", binding_channel_receive, METH_NOARGS, NULL},
    {"deliver", (PyCFunction)(void (*)(void))binding_channel_deliver,
     METH_METHOD | METH_FASTCALL | METH_KEYWORDS, NULL},
    {"detach", channel_detach, METH_NOARGS, NULL},
    {"shutdown", channel_shutdown, METH_NOARGS, NULL},
    {"close", channel_close, METH_NOARGS, NULL},
    {"fileno", channel_fileno, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef getset[] = {
    {"queued", get_queued, NULL, NULL, NULL},
    {"crowded", get_crowded, NULL, NULL, NULL},
    {"eof", get_eof, NULL, NULL, NULL},
    {"plain", get_plain, NULL, NULL, NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot channel_slots[] = {
    {Py_tp_new, (void *)(uintptr_t)channel_new},
    {Py_tp_dealloc, (void *)(uintptr_t)channel_dealloc},
    {Py_tp_methods, methods},
    {Py_tp_getset, getset},
    {Py_tp_doc, "Channel(fd, plain=False): owns the socket fd."},
    {0, NULL},
};

PyType_Spec binding_channel_spec = {
    .name = "afork._afork.Channel",
    .basicsize = sizeof(Channel),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = channel_slots,
};
