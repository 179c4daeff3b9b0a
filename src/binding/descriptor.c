/*
 * Descriptor: one that was received, until somebody takes it.
 *
 * Whatever goes wrong between a report and who it is for, its last reference
 * closes it.
 */
#include "binding.h"

#include <errno.h>

#include "fd.h"

typedef struct {
    PyObject_HEAD
    int fd; /* owned */
} Descriptor;

PyObject *
binding_descriptor_take(const struct binding_state *state, int fd)
{
    PyTypeObject *type = state->descriptor_type;
    Descriptor *d = (Descriptor *)type->tp_alloc(type, 0);

    if (d)
        d->fd = fd;
    else
        afork_fd_close(&fd);
    return (PyObject *)d;
}

static void
descriptor_dealloc(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);

    afork_fd_close(&((Descriptor *)self)->fd);
    type->tp_free(self);
    Py_DECREF(type);
}

static PyObject *
descriptor_fileno(PyObject *self, PyObject *unused)
{
    int fd = ((Descriptor *)self)->fd;

    (void)unused;
    return fd < 0 ? binding_oserror(-EBADF) : PyLong_FromLong(fd);
}

static PyObject *
descriptor_detach(PyObject *self, PyObject *unused)
{
    PyObject *number = descriptor_fileno(self, unused);

    if (number)
        ((Descriptor *)self)->fd = AFORK_NOFD;
    return number;
}

static PyMethodDef methods[] = {
    {"detach", descriptor_detach, METH_NOARGS, NULL},
    {"fileno", descriptor_fileno, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot descriptor_slots[] = {
    {Py_tp_dealloc, (void *)(uintptr_t)descriptor_dealloc},
    {Py_tp_methods, methods},
    {Py_tp_doc, "Descriptor: owns a number; detach() gives it away."},
    {0, NULL},
};

PyType_Spec binding_descriptor_spec = {
    .name = "afork._afork.Descriptor",
    .basicsize = sizeof(Descriptor),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE |
             Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = descriptor_slots,
};
