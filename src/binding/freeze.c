/*
 * Immortal objects (PEP 683): reading one does not write to it, so workers do
 * not copy what the template has loaded.
 *
 * Immortal becomes whatever the collector knows and whatever can be reached
 * from that.  An object that the walk does not find stays as it was, which
 * costs memory and nothing else.  The layout of the count is a matter of each
 * version; one that is not known here is left alone.
 */
#include "binding.h"

#include <string.h>

#if defined(Py_GIL_DISABLED)
#define REFUSED "free-threaded Python"
#elif defined(Py_TRACE_REFS)
#define REFUSED "Python that traces references"
#elif SIZEOF_VOID_P < 8
#define REFUSED "32-bit Python"
#elif PY_VERSION_HEX < 0x030C0000
#define REFUSED "Python before 3.12"
#elif PY_VERSION_HEX >= 0x03100000
#define REFUSED "unknown Python version"
#endif

#ifdef REFUSED

const char *
binding_immortal_refused(void)
{
    return REFUSED;
}

Py_ssize_t
binding_immortalise(PyObject *roots, PyObject *except, int only_new,
                    Py_ssize_t *ret_visited)
{
    (void)roots;
    (void)except;
    (void)only_new;
    *ret_visited = 0;
    return 0;
}

#else

static void
set_immortal(PyObject *op)
{
#if PY_VERSION_HEX < 0x030E0000
    op->ob_refcnt = _Py_IMMORTAL_REFCNT;
#else
    op->ob_flags |= _Py_IMMORTAL_FLAGS;
    op->ob_refcnt = _Py_IMMORTAL_INITIAL_REFCNT;
#endif
}

/*
 * Whether the interpreter that runs takes such an object for immortal, too:
 * it may be another build than the one whose headers were used.
 */
static int
is_understood(void)
{
    PyObject *op = PyBytes_FromStringAndSize(NULL, 1 << 10);
    PyObject before;
    int good;

    if (!op) {
        PyErr_Clear();
        return 0;
    }
    before = *op;
    set_immortal(op);
    good = _Py_IsImmortal(op) && _Py_IsImmortal(Py_None);
#if PY_VERSION_HEX >= 0x030E0000
    good = good && PyUnstable_IsImmortal(op);
#endif
    /* The functions, not the macros: they are the interpreter's own. */
    (Py_IncRef)(op);
    (Py_IncRef)(op);
    (Py_DecRef)(op);
    good = good && _Py_IsImmortal(op);
    (Py_DecRef)(op);
    (Py_DecRef)(op); /* would free it */
    good = good && _Py_IsImmortal(op);
#if PY_VERSION_HEX >= 0x030F0000
    {
        PyObject ours = *op;

        /* What the interpreter itself does to an object that is not shared. */
        *op = before;
        good = good && PyUnstable_SetImmortal(op) &&
               op->ob_refcnt_full == ours.ob_refcnt_full;
    }
#endif
    *op = before;
    if (good) /* else it is not known whether it can be freed */
        Py_DECREF(op);
    return good;
}

const char *
binding_immortal_refused(void)
{
    static int understood = -1;

    if (understood < 0)
        understood = is_understood();
    return understood ? NULL : "Python does not agree";
}

struct walk {
    PyObject **stack; /* seen, but what they refer to not yet */
    size_t n, cap;
    PyObject *except;
    int only_new; /* what is immortal has been looked into */
    Py_ssize_t made, visited;
    int failed;
};

/* A tp_traverse visitor: 0 to go on. */
static int
see(PyObject *op, void *arg)
{
    struct walk *w = arg;

    if (!op || op == w->except || _Py_IsImmortal(op))
        return 0;
    set_immortal(op);
    w->made++;
    /* What the collector knows comes by itself, unless that is skipped. */
    if (!w->only_new && PyObject_IS_GC(op) && PyObject_GC_IsTracked(op))
        return 0;
    if (!PyObject_IS_GC(op) && !PyCode_Check(op) &&
        !(Py_TYPE(op)->tp_flags & Py_TPFLAGS_HEAPTYPE))
        return 0; /* a string, a number: refers to nothing */
    if (w->n == w->cap) {
        size_t cap = w->cap ? w->cap * 2 : 1024;
        void *p = PyMem_RawRealloc(w->stack, cap * sizeof *w->stack);

        if (!p) {
            w->failed = 1;
            return 0;
        }
        w->stack = p;
        w->cap = cap;
    }
    w->stack[w->n++] = op;
    return 0;
}

static void
see_code(PyCodeObject *code, struct walk *w)
{
    see(code->co_consts, w);
    see(code->co_names, w);
    see(code->co_exceptiontable, w);
    see(code->co_localsplusnames, w);
    see(code->co_localspluskinds, w);
    see(code->co_filename, w);
    see(code->co_name, w);
    see(code->co_qualname, w);
    see(code->co_linetable, w);
    if (code->_co_cached) {
        see(code->_co_cached->_co_code, w);
        see(code->_co_cached->_co_varnames, w);
        see(code->_co_cached->_co_cellvars, w);
        see(code->_co_cached->_co_freevars, w);
    }
}

static void
see_type(PyTypeObject *type, struct walk *w)
{
    PyObject *dict = PyType_GetDict(type);

    see(dict, w);
    Py_XDECREF(dict);
    see(type->tp_mro, w);
    see(type->tp_bases, w);
    see(type->tp_cache, w);
    if (type->tp_flags & Py_TPFLAGS_HEAPTYPE) {
        PyHeapTypeObject *heap = (PyHeapTypeObject *)type;

        see(heap->ht_name, w);
        see(heap->ht_qualname, w);
        see(heap->ht_slots, w);
    }
}

/* References that tp_traverse does not tell, because no cycle needs them. */
static void
see_hidden(PyObject *op, struct walk *w)
{
    PyTypeObject *type = Py_TYPE(op);

    if (PyDict_Check(op)) {
        PyObject *key, *value;
        Py_ssize_t at = 0;

        while (PyDict_Next(op, &at, &key, &value)) {
            see(key, w);
            see(value, w);
        }
    } else if (PyCode_Check(op)) {
        see_code((PyCodeObject *)op, w);
    } else if (PyType_Check(op)) {
        see_type((PyTypeObject *)op, w);
    } else if (type == &PyMethodDescr_Type || type == &PyMemberDescr_Type ||
               type == &PyGetSetDescr_Type || type == &PyWrapperDescr_Type ||
               type == &PyClassMethodDescr_Type) {
        see(((PyDescrObject *)op)->d_name, w);
        see(((PyDescrObject *)op)->d_qualname, w);
    }
}

static void
look_into(PyObject *op, struct walk *w)
{
    traverseproc traverse = Py_TYPE(op)->tp_traverse;

    w->visited++;
    see((PyObject *)Py_TYPE(op), w);
    if (traverse && PyObject_IS_GC(op))
        traverse(op, see, w);
    see_hidden(op, w);
}

static void
finish(struct walk *w)
{
    while (w->n)
        look_into(w->stack[--w->n], w);
}

/* For each object that the collector knows: 1 to go on. */
static int
take(PyObject *op, void *arg)
{
    struct walk *w = arg;

    see(op, w); /* if it is new and only_new, this puts it on the stack */
    if (!w->only_new && op != w->except)
        look_into(op, w);
    finish(w);
    return 1;
}

Py_ssize_t
binding_immortalise(PyObject *roots, PyObject *except, int only_new,
                    Py_ssize_t *ret_visited)
{
    struct walk w = {.except = except, .only_new = only_new};

    *ret_visited = 0;
    if (binding_immortal_refused())
        return 0;
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(roots); i++) {
        see(PyList_GET_ITEM(roots, i), &w);
        look_into(PyList_GET_ITEM(roots, i), &w);
        finish(&w);
    }
    PyUnstable_GC_VisitObjects(take, &w);
    PyMem_RawFree(w.stack);
    *ret_visited = w.visited;
    if (w.failed) {
        PyErr_NoMemory();
        return -1;
    }
    return w.made;
}

#endif
