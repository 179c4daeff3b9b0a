/* The module afork._afork: its functions, its types, its constants. */
#include "binding.h"

#include <errno.h>
#include <stdio.h>
#include <stdio_ext.h>
#include <string.h>

#include "link.h"
#include "spares.h"

PyObject *
binding_oserror_name(int status, PyObject *filename)
{
    errno = -status;
    return filename
               ? PyErr_SetFromErrnoWithFilenameObject(PyExc_OSError, filename)
               : PyErr_SetFromErrno(PyExc_OSError);
}

PyObject *
binding_oserror(int status)
{
    return status == -ENOMEM ? PyErr_NoMemory()
                             : binding_oserror_name(status, NULL);
}

void
binding_strs_release(struct binding_strs *s)
{
    for (size_t i = 0; i < s->n; i++)
        PyBuffer_Release(&s->buffers[i]);
    PyMem_Free(s->buffers);
    PyMem_Free(s->strs);
    memset(s, 0, sizeof *s);
}

int
binding_strs_get(struct binding_strs *s, PyObject *sequence)
{
    PyObject *fast =
        PySequence_Fast(sequence, "a sequence of bytes is needed");
    size_t n;

    memset(s, 0, sizeof *s);
    if (!fast)
        return -1;
    n = (size_t)PySequence_Fast_GET_SIZE(fast);
    s->strs = PyMem_Calloc(n ? n : 1, sizeof *s->strs);
    s->buffers = PyMem_Calloc(n ? n : 1, sizeof *s->buffers);
    if (!s->strs || !s->buffers) {
        PyErr_NoMemory();
        goto fail;
    }
    for (; s->n < n; s->n++) {
        PyObject *item = PySequence_Fast_GET_ITEM(fast, (Py_ssize_t)s->n);

        if (PyObject_GetBuffer(item, &s->buffers[s->n], PyBUF_SIMPLE) < 0)
            goto fail;
        s->strs[s->n].data = s->buffers[s->n].buf;
        s->strs[s->n].len = (size_t)s->buffers[s->n].len;
    }
    Py_DECREF(fast);
    return 0;
fail:
    Py_DECREF(fast);
    binding_strs_release(s);
    return -1;
}

static PyObject *
unpack_strings(PyObject *module, PyObject *payload)
{
    PyObject *list = NULL;
    struct afork_str str;
    struct afork_strs walk;
    Py_buffer view;
    int r;

    (void)module;
    if (PyObject_GetBuffer(payload, &view, PyBUF_SIMPLE) < 0)
        return NULL;
    list = PyList_New(0);
    walk.at = view.buf;
    walk.end = walk.at + view.len;
    while (list && (r = afork_wire_next(&walk, &str)) != 0) {
        PyObject *item = NULL;

        if (r < 0)
            PyErr_SetString(PyExc_ValueError, "malformed string list");
        else
            item = PyBytes_FromStringAndSize((const char *)str.data,
                                             (Py_ssize_t)str.len);
        if (!item || PyList_Append(list, item) < 0)
            Py_CLEAR(list);
        Py_XDECREF(item);
    }
    PyBuffer_Release(&view);
    return list;
}

static PyObject *
pack_strings(PyObject *module, PyObject *sequence)
{
    struct binding_strs s;
    PyObject *bytes = NULL;
    int64_t len;

    (void)module;
    if (binding_strs_get(&s, sequence) < 0)
        return NULL;
    len = afork_wire_list_size(s.strs, s.n);
    if (len < 0)
        binding_oserror((int)len);
    else
        bytes = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)len);
    if (bytes)
        afork_wire_put_list((uint8_t *)PyBytes_AS_STRING(bytes), s.strs, s.n);
    binding_strs_release(&s);
    return bytes;
}

/* Where memory is: to find out whether it lies in a mapping of ours. */
static PyObject *
buffer_address(PyObject *module, PyObject *obj)
{
    Py_buffer view;
    PyObject *pair;

    (void)module;
    if (PyObject_GetBuffer(obj, &view, PyBUF_SIMPLE) < 0)
        return NULL;
    pair =
        Py_BuildValue("Kn", (unsigned long long)(uintptr_t)view.buf, view.len);
    PyBuffer_Release(&view);
    return pair;
}

/* What C code has printed into its own buffer, which Python knows nothing of.
 * Not every stream: one that another thread reads from is locked. */
static PyObject *
flush_stdout(PyObject *module, PyObject *unused)
{
    (void)module;
    (void)unused;
    if (__fpending(stdout)) {
        Py_BEGIN_ALLOW_THREADS
        fflush(stdout);
        Py_END_ALLOW_THREADS
    }
    Py_RETURN_NONE;
}

static PyMethodDef functions[] = {
    {"serve", binding_serve, METH_VARARGS, NULL},
    {"fork", binding_fork, METH_NOARGS, NULL},
    {"detach", binding_detach, METH_O, NULL},
    {"keep_title", binding_keep_title, METH_NOARGS, NULL},
    {"report_again", binding_report_again, METH_NOARGS, NULL},
    {"make_plain", binding_make_plain, METH_NOARGS, NULL},
    {"memory_setup", binding_memory_setup, METH_VARARGS, NULL},
    {"huge_pages", binding_memory_huge_pages, METH_NOARGS, NULL},
    {"memory_collapse", binding_memory_collapse_now, METH_NOARGS, NULL},
    {"memory_stats", binding_memory_stats, METH_NOARGS, NULL},
    {"immortalise", binding_memory_immortalise, METH_VARARGS, NULL},
    {"spawn", (PyCFunction)(void (*)(void))binding_spawn,
     METH_VARARGS | METH_KEYWORDS, NULL},
    {"exit_status", binding_exit_status, METH_O, NULL},
    {"change_type", binding_change_type, METH_VARARGS, NULL},
    {"set_title", binding_set_title, METH_O, NULL},
    {"get_environ", binding_get_environ, METH_NOARGS, NULL},
    {"get_umask", binding_get_umask, METH_NOARGS, NULL},
    {"map_private", binding_map_private, METH_VARARGS, NULL},
    {"pack_strings", pack_strings, METH_O, NULL},
    {"buffer_address", buffer_address, METH_O, NULL},
    {"flush_stdout", flush_stdout, METH_NOARGS, NULL},
    {"unpack_strings", unpack_strings, METH_O, NULL},
    {NULL, NULL, 0, NULL},
};

static int
add_constants(PyObject *module)
{
#define ADD(name, letter, text)                                    \
    if (PyModule_AddIntConstant(module, "CMD_" #name, letter) < 0) \
        return -1;
    AFORK_COMMANDS(ADD)
#undef ADD
#define ADD(name, letter, text)                                    \
    if (PyModule_AddIntConstant(module, "REP_" #name, letter) < 0) \
        return -1;
    AFORK_REPORTS(ADD)
#undef ADD
    if (PyModule_AddIntConstant(module, "FRAME_MAX", AFORK_FRAME_MAX) < 0)
        return -1;
    if (PyModule_AddIntConstant(module, "LINK_FRAME_MAX",
                                AFORK_LINK_FRAME_MAX) < 0)
        return -1;
    if (PyModule_AddIntConstant(module, "SPARES_MAX", AFORK_SPARES_MAX) < 0)
        return -1;
    return PyModule_AddIntConstant(module, "HANDLES_MAX", AFORK_HANDLES_MAX);
}

static int
add_type(PyObject *module, PyType_Spec *spec, PyTypeObject **ret_type)
{
    *ret_type = (PyTypeObject *)PyType_FromModuleAndSpec(module, spec, NULL);
    return *ret_type ? PyModule_AddType(module, *ret_type) : -1;
}

static int
module_exec(PyObject *module)
{
    struct binding_state *state = PyModule_GetState(module);

    state->on_entered = PyUnicode_InternFromString("_on_entered");
    state->on_reports = PyUnicode_InternFromString("_on_reports");
    state->children = PyUnicode_InternFromString("children");
    if (!state->on_entered || !state->on_reports || !state->children)
        return -1;
    if (add_type(module, &binding_channel_spec, &state->channel_type) < 0 ||
        add_type(module, &binding_link_spec, &state->link_type) < 0 ||
        add_type(module, &binding_lock_spec, &state->lock_type) < 0 ||
        add_type(module, &binding_descriptor_spec, &state->descriptor_type) <
            0 ||
        add_type(module, &binding_poller_spec, &state->poller_type) < 0)
        return -1;
    state->mapping_type = (PyTypeObject *)PyType_FromModuleAndSpec(
        module, &binding_mapping_spec, NULL);
    if (!state->mapping_type)
        return -1;
    return add_constants(module);
}

static int
module_traverse(PyObject *module, visitproc visit, void *arg)
{
    struct binding_state *state = PyModule_GetState(module);

    Py_VISIT(state->channel_type);
    Py_VISIT(state->link_type);
    Py_VISIT(state->poller_type);
    Py_VISIT(state->lock_type);
    Py_VISIT(state->descriptor_type);
    Py_VISIT(state->mapping_type);
    return 0;
}

static int
module_clear(PyObject *module)
{
    struct binding_state *state = PyModule_GetState(module);

    Py_CLEAR(state->channel_type);
    Py_CLEAR(state->link_type);
    Py_CLEAR(state->poller_type);
    Py_CLEAR(state->lock_type);
    Py_CLEAR(state->descriptor_type);
    Py_CLEAR(state->mapping_type);
    Py_CLEAR(state->on_entered);
    Py_CLEAR(state->on_reports);
    Py_CLEAR(state->children);
    return 0;
}

static PyModuleDef_Slot slots[] = {
    {Py_mod_exec, (void *)(uintptr_t)module_exec},
#ifdef Py_MOD_MULTIPLE_INTERPRETERS_NOT_SUPPORTED
    /* fork() in a subinterpreter is refused by CPython itself. */
    {Py_mod_multiple_interpreters, Py_MOD_MULTIPLE_INTERPRETERS_NOT_SUPPORTED},
#endif
    {0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "afork._afork",
    .m_doc =
        "The C core of afork: control sockets, the template server, spawn.",
    .m_size = sizeof(struct binding_state),
    .m_methods = functions,
    .m_slots = slots,
    .m_traverse = module_traverse,
    .m_clear = module_clear,
};

struct binding_state *
binding_state_of(PyTypeObject *type)
{
    PyObject *module = PyType_GetModuleByDef(type, &definition);

    return module ? PyModule_GetState(module) : NULL;
}

PyMODINIT_FUNC
PyInit__afork(void)
{
    return PyModuleDef_Init(&definition);
}
