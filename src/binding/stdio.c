/*
 * Flushing standard output and error at the end of a worker.
 *
 * Asking a stream to flush writes to it and to a dozen of other pages, each
 * of which the worker would have to copy first.  Most have written nothing:
 * then the stream looks, byte for byte, as it did when the template had just
 * flushed it.
 */
#include "binding.h"

#include <stdio.h>
#include <stdio_ext.h>
#include <string.h>

static const char *const names[2] = {"stdout", "stderr"};

/* The part of an object that is its type's own. */
static const char *
body(PyObject *object)
{
    return (const char *)object + sizeof(PyObject);
}

static size_t
body_size(PyObject *object)
{
    return (size_t)Py_TYPE(object)->tp_basicsize - sizeof(PyObject);
}

static void
forget(struct binding_layer *layer)
{
    Py_CLEAR(layer->object);
    PyMem_Free(layer->image);
    layer->image = NULL;
}

/* Steals the object; 0 unless it is exactly of a type of the io module. */
static int
remember(struct binding_layer *layer, PyObject *object, const char *type)
{
    PyObject *io = PyImport_ImportModule("io");
    PyObject *wanted = io ? PyObject_GetAttrString(io, type) : NULL;
    int ok = object && wanted && (PyObject *)Py_TYPE(object) == wanted;

    if (ok)
        layer->image = PyMem_Malloc(body_size(object));
    ok = layer->image != NULL;
    if (ok) {
        memcpy(layer->image, body(object), body_size(object));
        layer->object = Py_NewRef(object);
    }
    Py_XDECREF(io);
    Py_XDECREF(wanted);
    Py_XDECREF(object);
    PyErr_Clear(); /* it is flushed, then, whether it needs it or not */
    return ok;
}

void
binding_stdio_forget(struct binding_stdio *s)
{
    for (int i = 0; i < 2; i++) {
        forget(&s->streams[i].text);
        forget(&s->streams[i].buffer);
    }
}

void
binding_stdio_remember(struct binding_stdio *s)
{
    binding_stdio_forget(s);
    for (int i = 0; i < 2; i++) {
        struct binding_stream *stream = &s->streams[i];
        PyObject *text = PySys_GetObject(names[i]);

        Py_XINCREF(text);
        if (remember(&stream->text, text, "TextIOWrapper"))
            remember(&stream->buffer,
                     PyObject_GetAttrString(stream->text.object, "buffer"),
                     "BufferedWriter");
    }
}

static int
unchanged(const struct binding_layer *layer)
{
    return layer->object && memcmp(layer->image, body(layer->object),
                                   body_size(layer->object)) == 0;
}

void
binding_stdio_flush(const struct binding_stdio *s, PyObject *flush)
{
    for (int i = 0; i < 2; i++) {
        const struct binding_stream *stream = &s->streams[i];
        PyObject *now = PySys_GetObject(names[i]), *result;

        if (!now || now == Py_None)
            continue;
        if (now == stream->text.object && unchanged(&stream->text) &&
            unchanged(&stream->buffer))
            continue;
        Py_INCREF(now); /* its flush may replace it */
        result = PyObject_CallMethodNoArgs(now, flush);
        Py_XDECREF(result);
        Py_DECREF(now);
        PyErr_Clear(); /* closed, or a reader that has gone */
    }
    if (__fpending(stdout)) /* only then: its lock is on a shared page */
        fflush(stdout);
}
