/* Private mappings of descriptors, seen through memoryviews.  What mmap.mmap
 * does, except that no duplicate of the descriptor is kept: thousands of
 * buffers may have arrived, descriptors are few. */
#include "binding.h"

#include <errno.h>
#include <sys/mman.h>

struct mapping {
    PyObject_HEAD
    void *at; /* owned, NULL before it is mapped */
    size_t len;
    int writable;
};

static void
mapping_dealloc(PyObject *self)
{
    struct mapping *m = (struct mapping *)self;
    PyTypeObject *type = Py_TYPE(self);

    if (m->at)
        munmap(m->at, m->len);
    type->tp_free(self);
    Py_DECREF(type);
}

static int
mapping_getbuffer(PyObject *self, Py_buffer *view, int flags)
{
    struct mapping *m = (struct mapping *)self;

    return PyBuffer_FillInfo(view, self, m->at, (Py_ssize_t)m->len,
                             !m->writable, flags);
}

static PyType_Slot mapping_slots[] = {
    {Py_tp_dealloc, (void *)(uintptr_t)mapping_dealloc},
    {Py_bf_getbuffer, (void *)(uintptr_t)mapping_getbuffer},
    {0, NULL},
};

PyType_Spec binding_mapping_spec = {
    .name = "afork._afork.Mapping",
    .basicsize = sizeof(struct mapping),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = mapping_slots,
};

PyObject *
binding_map_private(PyObject *module, PyObject *args)
{
    struct binding_state *state = PyModule_GetState(module);
    struct mapping *m;
    PyObject *view;
    Py_ssize_t len;
    void *at;
    int fd, writable;

    if (!PyArg_ParseTuple(args, "inp", &fd, &len, &writable))
        return NULL;
    m = (struct mapping *)state->mapping_type->tp_alloc(state->mapping_type,
                                                        0);
    if (!m)
        return NULL;
    at = mmap(NULL, (size_t)len, writable ? PROT_READ | PROT_WRITE : PROT_READ,
              MAP_PRIVATE, fd, 0);
    if (at == MAP_FAILED) {
        binding_oserror(-errno);
        Py_DECREF(m);
        return NULL;
    }
    m->at = at;
    m->len = (size_t)len;
    m->writable = writable;
    view = PyMemoryView_FromObject((PyObject *)m);
    Py_DECREF(m);
    return view;
}
