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

/* Follows a dotted path of attributes; NULL with an exception set. */
static PyObject *
get_path(PyObject *from, const char *path, size_t len)
{
    PyObject *found = Py_NewRef(from);

    while (found) {
        const char *dot = memchr(path, '.', len);
        size_t n = dot ? (size_t)(dot - path) : len;
        PyObject *name = PyUnicode_FromStringAndSize(path, (Py_ssize_t)n);

        Py_SETREF(found, name ? PyObject_GetAttr(found, name) : NULL);
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

/*
 * A blank socket object, made by the template, becomes the socket of fd: what
 * socket.socket.__init__ does, but for the code of it.
 */
static PyObject *
fill_socket_take(PyObject *blank, int fd)
{
    PyTypeObject *base = Py_TYPE(blank)->tp_base;
    PyObject *args = Py_BuildValue("(iiii)", AF_UNIX, SOCK_STREAM, 0, fd);

    if (!args || base->tp_init(blank, args, NULL) < 0) {
        afork_fd_close(&fd);
        Py_XDECREF(args);
        return NULL;
    }
    Py_DECREF(args);
    return Py_NewRef(blank);
}

int
binding_enter(PyObject *handler, PyObject *func, PyObject *blank, int fd,
              PyObject *args)
{
    size_t n = (size_t)PyList_GET_SIZE(args);
    PyObject *result = NULL, *sock;
    PyObject **stack = PyMem_Calloc(n + 1, sizeof *stack);

    sock = stack ? fill_socket_take(blank, fd) : PyErr_NoMemory();
    if (sock) {
        stack[0] = sock;
        for (size_t i = 0; i < n; i++)
            stack[i + 1] = PyList_GET_ITEM(args, (Py_ssize_t)i);
        result = PyObject_Vectorcall(func, stack, n + 1, NULL);
    }
    PyMem_Free(stack);
    if (result && Py_TYPE(result)->tp_as_async &&
        Py_TYPE(result)->tp_as_async->am_await)
        Py_SETREF(result, PyObject_CallMethod(handler, "finish", "O", result));
    /*
     * What the function has let go of is closed here, not at the end: the
     * application sees the end of file before the process is torn down.
     */
    Py_XDECREF(sock);
    Py_XDECREF(result);
    return result ? 0 : -1;
}

static void
flush_stream(const char *name, PyObject *flush)
{
    PyObject *stream = PySys_GetObject(name), *result = NULL;

    if (stream && stream != Py_None)
        result = PyObject_CallMethodNoArgs(stream, flush);
    Py_XDECREF(result);
    PyErr_Clear(); /* closed, or a reader that has gone */
}

void
binding_end_plainly(PyObject *count_exit_handlers, PyObject *threading,
                    PyObject *flush)
{
    PyObject *count;
    long handlers = -1;

    if (PyDict_GetItemWithError(PyImport_GetModuleDict(), threading))
        return;
    count = PyObject_CallNoArgs(count_exit_handlers);
    if (count)
        handlers = PyLong_AsLong(count);
    Py_XDECREF(count);
    PyErr_Clear();
    if (handlers != 0)
        return;
    flush_stream("stdout", flush);
    flush_stream("stderr", flush);
    _exit(0);
}
