/*
 * The function that a process was made for: finding it, entering it, ending.
 *
 * A forked process copies every page that it writes, and Python code writes
 * counts and caches wherever it goes: most of what a start costs is page
 * faults.  So the plain case runs no Python code of ours.  Whatever is out of
 * the ordinary is left to afork/_child.py.
 */
#include "binding.h"

#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "fd.h"

/* An attribute; of a module from where it is, past the caches of its type. */
static PyObject *
get_attribute(PyObject *from, PyObject *name)
{
    PyObject *found = NULL;

    if (PyModule_CheckExact(from))
        found = PyDict_GetItemWithError(PyModule_GetDict(from), name);
    if (found || PyErr_Occurred())
        return Py_XNewRef(found);
    return PyObject_GetAttr(from, name);
}

/* Follows a dotted path of attributes; NULL with an exception set. */
static PyObject *
get_path(PyObject *from, const char *path, size_t len)
{
    PyObject *found = Py_NewRef(from);

    while (found) {
        const char *dot = memchr(path, '.', len);
        size_t n = dot ? (size_t)(dot - path) : len;
        PyObject *name = PyUnicode_FromStringAndSize(path, (Py_ssize_t)n);

        Py_SETREF(found, name ? get_attribute(found, name) : NULL);
        Py_XDECREF(name);
        if (!dot)
            break;
        path += n + 1;
        len -= n + 1;
    }
    return found;
}

PyObject *
binding_find_loaded(const char *name, size_t len)
{
    const char *split = memchr(name, ':', len);
    size_t n;
    PyObject *text, *module, *found = NULL;

    for (const char *at = name;
         !split && (at = memchr(at, '.', len - (size_t)(at - name)));)
        if (!memchr(at + 1, '.', len - (size_t)(at + 1 - name)))
            split = at;
        else
            at++;
    n = split ? (size_t)(split - name) : 0;
    text = split ? PyUnicode_FromStringAndSize(name, (Py_ssize_t)n)
                 : PyUnicode_FromString("__main__");
    /* PyImport_GetModule would look into the module's spec as well. */
    module =
        text ? PyDict_GetItemWithError(PyImport_GetModuleDict(), text) : NULL;
    Py_XINCREF(module);
    Py_XDECREF(text);
    if (module) {
        const char *path = split ? split + 1 : name;

        found = get_path(module, path, len - (size_t)(path - name));
        Py_DECREF(module);
    }
    if (found && !PyCallable_Check(found))
        Py_CLEAR(found);
    PyErr_Clear(); /* the slow way finds it, or says why not */
    return found;
}

/* Whether instances of both look the same in memory. */
static int
same_layout(PyTypeObject *a, PyTypeObject *b)
{
    const unsigned long heap = Py_TPFLAGS_HEAPTYPE;
    PyObject *slots_a, *slots_b;

    if (!(PyType_GetFlags(a) & PyType_GetFlags(b) & heap))
        return 0;
    slots_a = ((PyHeapTypeObject *)a)->ht_slots;
    slots_b = ((PyHeapTypeObject *)b)->ht_slots;
    return a->tp_base == b->tp_base && a->tp_basicsize == b->tp_basicsize &&
           a->tp_itemsize == b->tp_itemsize &&
           a->tp_dictoffset == b->tp_dictoffset &&
           a->tp_weaklistoffset == b->tp_weaklistoffset && slots_a &&
           slots_b && PyObject_RichCompareBool(slots_a, slots_b, Py_EQ) == 1;
}

/*
 * Changes the type of an object to one of the same layout.  Assigning to
 * __class__ refuses types with slots and weak references, whose layout it
 * does not look at closely enough.
 */
PyObject *
binding_change_type(PyObject *module, PyObject *args)
{
    PyObject *object, *type;
    PyTypeObject *old;

    (void)module;
    if (!PyArg_ParseTuple(args, "OO!:change_type", &object, &PyType_Type,
                          &type))
        return NULL;
    old = Py_TYPE(object);
    if (!same_layout(old, (PyTypeObject *)type)) {
        if (!PyErr_Occurred())
            PyErr_SetString(PyExc_TypeError, "the layout differs");
        return NULL;
    }
    Py_INCREF(type);
    Py_SET_TYPE(object, (PyTypeObject *)type);
    Py_DECREF(old);
    Py_RETURN_NONE;
}

/*
 * A blank socket object, made by the template, becomes the socket of fd: what
 * socket.socket.__init__ does, but for the code of it.
 */
int
binding_fill_socket_take(PyObject *blank, int fd)
{
    PyTypeObject *base = Py_TYPE(blank)->tp_base;
    PyObject *args = Py_BuildValue("(iiii)", AF_UNIX, SOCK_STREAM, 0, fd);
    int r = args ? base->tp_init(blank, args, NULL) : -1;

    if (r < 0)
        afork_fd_close(&fd);
    Py_XDECREF(args);
    return r;
}

/* A new Python object for a pending argument; its descriptor is consumed. */
static PyObject *
arg_object(PyObject *handler, struct afork_arg *arg)
{
    const char *data = (const char *)arg->data;
    int fd = arg->fd;

    switch (arg->kind) {
    case AFORK_ARG_BYTES:
        return PyBytes_FromStringAndSize(data, (Py_ssize_t)arg->len);
    case AFORK_ARG_TEXT:
        return PyUnicode_DecodeUTF8(data, (Py_ssize_t)arg->len,
                                    "surrogatepass");
    case AFORK_ARG_HANDLE:
        arg->fd = AFORK_NOFD;
        return PyObject_CallMethod(handler, "handle", "i", fd);
    case AFORK_ARG_LOST:
        break;
    }
    PyErr_SetString(PyExc_SystemError, "a lost descriptor reached run");
    return NULL;
}

static PyObject *
call(PyObject *handler, PyObject *func, PyObject *const *stack, size_t n)
{
    PyObject *result = PyObject_Vectorcall(func, stack, n, NULL);

    if (result && Py_TYPE(result)->tp_as_async &&
        Py_TYPE(result)->tp_as_async->am_await)
        Py_SETREF(result, PyObject_CallMethod(handler, "finish", "O", result));
    return result;
}

int
binding_enter(PyObject *handler, PyObject *func, PyObject *sock,
              struct afork_args *args)
{
    PyObject *few[8] = {NULL}, **stack = few, *result = NULL;
    size_t n = args->n + 1, have;

    /* The heap is touched only if there are many. */
    if (n > sizeof few / sizeof *few)
        stack = PyMem_Calloc(n, sizeof *stack);
    if (!stack) {
        PyErr_NoMemory();
        return -1;
    }
    stack[0] = sock;
    for (have = 1; have < n; have++) {
        stack[have] = arg_object(handler, &args->list[have - 1]);
        if (!stack[have])
            break;
    }
    if (have == n)
        result = call(handler, func, stack, n);
    while (--have > 0)
        Py_DECREF(stack[have]);
    if (stack != few)
        PyMem_Free(stack);
    Py_XDECREF(result);
    return result ? 0 : -1;
}

/*
 * What a spare does in advance: each page that a start writes first costs it
 * a fault.  The names are those that every interpreter has loaded.
 */
void
binding_warm(PyObject *blank, PyObject *count_exit_handlers)
{
    static const char code[] = "def f(*a, **k): return [*a], {**k}, f'{a}'\n"
                               "f(1, b'', x=2.5)\n";
    static const char name[] = "builtins.len";
    PyObject *names = PyDict_New(), *done = NULL, *sock = NULL;
    int pair[2];

    if (names)
        done = PyRun_String(code, Py_file_input, names, names);
    Py_XDECREF(done);
    Py_XDECREF(names);
    Py_XDECREF(binding_find_loaded(name, sizeof name - 1));
    if (afork_fd_pair(pair) == 0) {
        /* Another one: the blank itself is for the function. */
        sock = PyObject_CallFunction((PyObject *)Py_TYPE(blank)->tp_base,
                                     "iiii", AF_UNIX, SOCK_STREAM, 0, pair[0]);
        done = sock ? PyObject_CallMethod(sock, "close", NULL) : NULL;
        if (!sock)
            afork_fd_close(&pair[0]);
        Py_XDECREF(done);
        Py_XDECREF(sock);
        afork_fd_close(&pair[1]);
    }
    done = PyObject_CallNoArgs(count_exit_handlers);
    Py_XDECREF(done);
    PyErr_Clear();
}

int
binding_ends_plainly(PyObject *count_exit_handlers, PyObject *threading)
{
    PyObject *count;
    long handlers = -1;

    if (PyDict_GetItemWithError(PyImport_GetModuleDict(), threading))
        return 0;
    count = PyObject_CallNoArgs(count_exit_handlers);
    if (count)
        handlers = PyLong_AsLong(count);
    Py_XDECREF(count);
    PyErr_Clear();
    return handlers == 0;
}

/*
 * Closed here rather than by the kernel, which tears down the memory of a
 * process before its descriptors: the application sees the end of file that
 * much earlier.  And closed rather than let go of, which would be worth a
 * ResourceWarning.
 */
void
binding_close_socket(PyObject *sock, PyObject *close)
{
    PyObject *result = PyObject_CallOneArg(close, sock);

    Py_XDECREF(result);
    PyErr_Clear(); /* ECONNRESET and the like: it is closed */
}
