/* What a process tells of itself: the loop's part of it. */
#include "binding.h"

#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "serve.h"

static PyObject *
facts_of(const struct afork_server *s)
{
    const struct afork_spares *p = &s->spares;

    return Py_BuildValue(
        "{s:i,s:s,s:K,s:n,s:{s:I,s:I,s:n,s:K,s:K,s:K},s:n,s:n,s:O}", "pid",
        (int)getpid(), "state", s->failure.payload ? "failed" : "serving",
        "starts", (unsigned long long)s->starts, "children",
        (Py_ssize_t)(s->children.n - p->n) - (s->trial_pid > 0), "spares",
        "most", p->most, "wanted", p->target, "ready",
        (Py_ssize_t)afork_spares_ready(p), "hits", (unsigned long long)p->hits,
        "misses", (unsigned long long)p->misses, "died",
        (unsigned long long)p->died, "arguments", (Py_ssize_t)s->args.n,
        "handles", (Py_ssize_t)s->args.handles, "detached",
        s->detached ? Py_True : Py_False);
}

uint8_t *
binding_stats(PyObject *handler, const struct afork_server *server,
              size_t *ret_len)
{
    PyObject *facts = facts_of(server), *answer = NULL;
    uint8_t *data = NULL;
    Py_ssize_t len = 0;
    char *text;

    if (facts)
        answer = PyObject_CallMethod(handler, "stats", "O", facts);
    if (answer && PyBytes_AsStringAndSize(answer, &text, &len) == 0) {
        data = malloc(len ? (size_t)len : 1);
        if (data && len)
            memcpy(data, text, (size_t)len);
    }
    if (PyErr_Occurred())
        PyErr_WriteUnraisable(handler);
    Py_XDECREF(answer);
    Py_XDECREF(facts);
    *ret_len = (size_t)len;
    return data;
}
