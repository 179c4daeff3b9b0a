/*
 * Lock: of the application's processes, and what may only be called without it.
 *
 * It is taken as often as its thread wants, like an RLock, which does not say
 * when its last owner lets go of it.  A logging handler, or a callback of the
 * user, may take locks of its own or come back here in another thread: it waits
 * until this one is free.  A signal does not end the wait: nobody holds it long.
 */
#include "binding.h"

#include <pythread.h>

typedef struct {
    PyObject_HEAD
    PyThread_type_lock lock; /* owned */
    unsigned long owner;     /* a thread, if depth is not 0 */
    int depth;
    PyObject *after; /* strong: a list, or NULL for an empty one */
} Lock;

static PyObject *
lock_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    Lock *l = (Lock *)type->tp_alloc(type, 0);

    (void)args;
    (void)kwargs;
    if (!l)
        return NULL;
    l->lock = PyThread_allocate_lock();
    if (!l->lock) {
        Py_DECREF(l);
        return PyErr_NoMemory();
    }
    return (PyObject *)l;
}

static int
lock_traverse(PyObject *self, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(((Lock *)self)->after);
    return 0;
}

static int
lock_clear(PyObject *self)
{
    Py_CLEAR(((Lock *)self)->after);
    return 0;
}

static void
lock_dealloc(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    Lock *l = (Lock *)self;

    PyObject_GC_UnTrack(self);
    lock_clear(self);
    if (l->lock)
        PyThread_free_lock(l->lock);
    type->tp_free(self);
    Py_DECREF(type);
}

static int
acquire(Lock *l, int wait)
{
    unsigned long me = PyThread_get_thread_ident();

    if (l->depth && l->owner == me) {
        l->depth++;
        return 1;
    }
    if (!PyThread_acquire_lock(l->lock, NOWAIT_LOCK)) {
        if (!wait)
            return 0;
        Py_BEGIN_ALLOW_THREADS
        PyThread_acquire_lock(l->lock, WAIT_LOCK);
        Py_END_ALLOW_THREADS
    }
    l->owner = me;
    l->depth = 1;
    return 1;
}

/* Calls what was to be called without the lock: all of it; -1 with the first
 * exception. */
static int
call_all(PyObject *due)
{
    struct binding_raised first = {0};
    int failed = 0;

    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(due); i++) {
        PyObject *callback = PyList_GET_ITEM(due, i);
        PyObject *result = PyObject_CallNoArgs(callback);

        Py_XDECREF(result);
        if (result)
            continue;
        if (failed++)
            PyErr_WriteUnraisable(callback);
        else
            binding_take_raised(&first);
    }
    if (failed)
        binding_put_raised(&first);
    return failed ? -1 : 0;
}

void
binding_lock_acquire(PyObject *self)
{
    acquire((Lock *)self, 1);
}

int
binding_lock_release(PyObject *self)
{
    Lock *l = (Lock *)self;
    PyObject *due;
    int r;

    if (!l->depth || l->owner != PyThread_get_thread_ident()) {
        PyErr_SetString(PyExc_RuntimeError, "the lock is not this thread's");
        return -1;
    }
    if (--l->depth)
        return 0;
    due = l->after;
    l->after = NULL;
    PyThread_release_lock(l->lock);
    if (!due)
        return 0;
    r = call_all(due);
    Py_DECREF(due);
    return r;
}

static PyObject *
lock_acquire(PyObject *self, PyObject *args)
{
    int wait = 1;

    if (!PyArg_ParseTuple(args, "|p:acquire", &wait))
        return NULL;
    return PyBool_FromLong(acquire((Lock *)self, wait));
}

static PyObject *
lock_release(PyObject *self, PyObject *unused)
{
    (void)unused;
    if (binding_lock_release(self) < 0)
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *
lock_enter(PyObject *self, PyObject *unused)
{
    (void)unused;
    acquire((Lock *)self, 1);
    Py_RETURN_NONE;
}

static PyObject *
lock_exit(PyObject *self, PyObject *const *args, Py_ssize_t n)
{
    (void)args;
    (void)n;
    return lock_release(self, NULL);
}

static PyObject *
lock_after(PyObject *self, PyObject *callback)
{
    Lock *l = (Lock *)self;
    int r = -1;

    acquire(l, 1);
    if (!l->after)
        l->after = PyList_New(0);
    if (l->after)
        r = PyList_Append(l->after, callback);
    if (r < 0) {
        struct binding_raised raised;

        binding_take_raised(&raised);
        if (binding_lock_release(self) < 0)
            PyErr_WriteUnraisable(self);
        binding_put_raised(&raised);
        return NULL;
    }
    return lock_release(self, NULL);
}

static PyMethodDef methods[] = {
    {"acquire", lock_acquire, METH_VARARGS, NULL},
    {"release", lock_release, METH_NOARGS, NULL},
    {"after", lock_after, METH_O, NULL},
    {"__enter__", lock_enter, METH_NOARGS, NULL},
    {"__exit__", (PyCFunction)(void (*)(void))lock_exit, METH_FASTCALL, NULL},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot lock_slots[] = {
    {Py_tp_new, (void *)(uintptr_t)lock_new},
    {Py_tp_dealloc, (void *)(uintptr_t)lock_dealloc},
    {Py_tp_traverse, (void *)(uintptr_t)lock_traverse},
    {Py_tp_clear, (void *)(uintptr_t)lock_clear},
    {Py_tp_methods, methods},
    {Py_tp_doc, "Lock(): as an RLock, and after(callback) calls without it."},
    {0, NULL},
};

PyType_Spec binding_lock_spec = {
    .name = "afork._afork.Lock",
    .basicsize = sizeof(Lock),
    .flags =
        Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = lock_slots,
};
