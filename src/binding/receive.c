/* What a Channel receives, and who is told of it. */
#include "channel.h"

#include <errno.h>
#include <string.h>

#include "fd.h"
#include "report.h"

/* One call of receive: frames, and the bytes after which it takes no more. */
enum { RECEIVE_MAX = 256, RECEIVE_BYTES = 1 << 20 };

/* Up to 3.11 an allocation may collect garbage, and what is finalised may read
 * this very channel, whose buffer is in use.  Whether it was on. */
static int
hold_gc(void)
{
#if PY_VERSION_HEX < 0x030c0000
    return PyGC_Disable();
#else
    return 0;
#endif
}

static void
resume_gc(int was_on)
{
    if (was_on)
        PyGC_Enable();
}

/* The next report: 1, or 0 if there is none; one of letter 0, whose descriptor
 * is the negative errno, if the stream is broken. */
static int
next_report(Channel *c, struct afork_frame *ret_frame)
{
    int r;

    if (c->eof)
        return 0;
    *ret_frame = (struct afork_frame){.fd = AFORK_NOFD};
    r = afork_reader_next(&c->in, c->fd, ret_frame);
    if (r == -EPIPE)
        c->eof = 1;
    if (r == 0 || r == -EPIPE)
        return 0;
    if (r > 0 && ret_frame->letter == AFORK_REP_RUNNING &&
        afork_reader_has_early(&c->in))
        r = -EPROTO; /* not what it is to be preceded by */
    if (r < 0) {
        /* What came before it is good, and may own descriptors. */
        c->eof = 1;
        *ret_frame = (struct afork_frame){.fd = r};
    }
    return 1;
}

/* A descriptor becomes a Descriptor or None; NULL and an exception. */
static PyObject *
descriptor_take(const struct binding_state *state, int fd)
{
    return fd < 0 ? Py_NewRef(Py_None) : binding_descriptor_take(state, fd);
}

/* Adds (letter, payload, descriptor), unless something has failed already: 0,
 * or -1 and an exception, with the descriptor closed. */
static int
add_take(const struct binding_state *state, PyObject *list,
         const struct afork_frame *frame, int failed)
{
    PyObject *item = NULL, *last;
    int r = -1;

    if (failed) { /* an exception is set already */
        int fd = frame->letter ? frame->fd : AFORK_NOFD;

        afork_fd_close(&fd);
        return -1;
    }
    last = frame->letter ? descriptor_take(state, frame->fd)
                         : PyLong_FromLong(frame->fd); /* an errno */
    if (last)
        item = Py_BuildValue("iy#O", frame->letter,
                             frame->len ? (const char *)frame->payload : "",
                             (Py_ssize_t)frame->len, last);
    if (item)
        r = PyList_Append(list, item);
    Py_XDECREF(item);
    Py_XDECREF(last);
    return r;
}

/* Whether a report is about the end of a process that is of no interest to
 * anybody: most ends are. */
static int
is_idle_exit(const struct afork_frame *frame, PyObject *children)
{
    unsigned long long id;
    PyObject *key;
    int known;

    if (!children || frame->letter != AFORK_REP_EXITED ||
        frame->len != AFORK_EXITED_SIZE)
        return 0;
    memcpy(&id, frame->payload, sizeof id);
    key = PyLong_FromUnsignedLongLong(id);
    known = key ? PyDict_Contains(children, key) : -1;
    Py_XDECREF(key);
    PyErr_Clear();
    return known == 0;
}

/* Goes on after those that are in the list, leaving out the ends of all but
 * these children: 0, or -1 and an exception. */
static int
receive_into(const struct binding_state *state, Channel *c, PyObject *list,
             PyObject *children)
{
    struct afork_frame frame;
    size_t bytes = 0;
    int r = 0;

    /* Bounds: a peer that never stops must not keep the loop for itself.  What
     * was read ahead is no event any more, so nothing of it is left; and beyond
     * the bounds no more is read ahead. */
    for (int n = 0; (n < RECEIVE_MAX && bytes < RECEIVE_BYTES) ||
                    afork_reader_has_early(&c->in);
         n++) {
        c->in.hold = n >= RECEIVE_MAX || bytes >= RECEIVE_BYTES;
        if (!next_report(c, &frame))
            break;
        bytes += frame.len;
        if (is_idle_exit(&frame, children))
            continue;
        r = add_take(state, list, &frame, 0);
        if (r < 0 || frame.letter == AFORK_REP_RUNNING)
            break; /* the bytes behind it are the user's */
    }
    c->in.hold = 0;
    return r;
}

PyObject *
binding_channel_receive(PyObject *self, PyObject *unused)
{
    const struct binding_state *state = PyType_GetModuleState(Py_TYPE(self));
    Channel *c = (Channel *)self;
    PyObject *list;
    int gc;

    (void)unused;
    if (binding_channel_check(c) < 0)
        return NULL;
    gc = hold_gc();
    list = PyList_New(0);
    if (list && receive_into(state, c, list, NULL) < 0)
        Py_CLEAR(list);
    resume_gc(gc);
    return list;
}

static int
is_started(const struct afork_frame *frame)
{
    return (frame->letter == AFORK_REP_STARTED ||
            frame->letter == AFORK_REP_STARTED_BARE) &&
           frame->len == sizeof(uint32_t);
}

/* Tells a process: started and running at once. */
static PyObject *
call_entered_take(const struct binding_state *state, PyObject *process,
                  uint32_t pid, int pidfd)
{
    PyObject *args[3] = {process, PyLong_FromUnsignedLong(pid),
                         descriptor_take(state, pidfd)};
    PyObject *result = NULL;

    if (args[1] && args[2])
        result = PyObject_VectorcallMethod(state->on_entered, args, 3, NULL);
    Py_XDECREF(args[1]);
    Py_XDECREF(args[2]);
    return result;
}

/*
 * Started and running at once is what nearly all starts consist of: that is
 * told by one call, and anything else as a list.
 */
PyObject *
binding_channel_deliver(PyObject *self, PyTypeObject *defining,
                        PyObject *const *args, Py_ssize_t n, PyObject *names)
{
    struct binding_state *state = PyType_GetModuleState(defining);

    if (n != 1 || names) {
        PyErr_SetString(PyExc_TypeError, "deliver takes a process");
        return NULL;
    }
    return binding_channel_tell(state, self, args[0]);
}

PyObject *
binding_channel_tell(const struct binding_state *state, PyObject *self,
                     PyObject *process)
{
    Channel *c = (Channel *)self;
    struct afork_frame first, second;
    PyObject *list, *children, *result = NULL;
    uint32_t pid;
    int r, more, gc, started = 0;

    if (binding_channel_check(c) < 0)
        return NULL;
    more = next_report(c, &first);
    if (more && is_started(&first)) {
        started = 1;
        memcpy(&pid, first.payload, sizeof pid);
        first.payload = (uint8_t *)&pid; /* the buffer is used again */
        more = next_report(c, &second);
        if (more && second.letter == AFORK_REP_RUNNING && !second.len)
            return call_entered_take(state, process, pid, first.fd);
    }
    gc = hold_gc();
    list = PyList_New(0);
    r = list ? 0 : -1;
    if (started)
        r = add_take(state, list, &first, r);
    else
        second = first;
    children = r == 0 ? PyObject_GetAttr(process, state->children) : NULL;
    if (r == 0)
        PyErr_Clear(); /* without them nothing is left out */
    if (more && !is_idle_exit(&second, children))
        r = add_take(state, list, &second, r);
    if (r == 0 && more && second.letter != AFORK_REP_RUNNING)
        r = receive_into(state, c, list, children);
    resume_gc(gc);
    if (r == 0)
        result = PyObject_CallMethodOneArg(process, state->on_reports, list);
    Py_XDECREF(list);
    Py_XDECREF(children);
    return result;
}
