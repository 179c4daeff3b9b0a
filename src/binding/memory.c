/*
 * The memory of a template, made ready before it is copied by a fork: frozen,
 * so that the workers' collectors leave it alone, and in huge pages if it is
 * large.  What was done, and why not, is in the dictionary of memory_stats.
 */
#define _GNU_SOURCE
#include "binding.h"

#include <errno.h>
#include <sys/stat.h>
#ifdef __GLIBC__
#include <malloc.h>
#endif

#include "hugepage.h"
#include "serve.h"

/* Below it there is nothing to gain: measured, see docs/design.rst. */
#define LARGE ((int64_t)30 << 20)

static struct {
    /* Switched off. */
    int no_collapse, no_file, no_gc_freeze, no_immortal, no_text;
    int gc_frozen; /* the collector's objects have been frozen once */
    int changed;   /* Python has run since the last fork */
    int uncollapsed;
    int frozen;           /* freeze() was asked for */
    Py_ssize_t immortal;  /* objects that it has made so */
    Py_ssize_t visited;   /* looked into for that, the last time */
    const char *collapse; /* what became of it */
    struct afork_collapse collapsed;
    uint64_t file_bytes; /* moved into files, altogether */
} m = {.changed = 1, .uncollapsed = 1, .collapse = "not yet"};

void
binding_memory_command(void)
{
    m.changed = m.uncollapsed = 1;
    binding_arena_own(); /* who runs code before it forks is a template */
}

static int
call(const char *module, const char *function)
{
    PyObject *imported = PyImport_ImportModule(module), *result = NULL;

    if (imported)
        result = PyObject_CallMethod(imported, function, NULL);
    Py_XDECREF(imported);
    Py_XDECREF(result);
    return result ? 0 : -1;
}

static const char *
huge_word(enum afork_huge huge)
{
    static const char *const words[] = {
        [AFORK_HUGE_OK] = "ok",
        [AFORK_HUGE_NEVER] = "no huge pages",
        [AFORK_HUGE_NO_COLLAPSE] = "old kernel",
    };

    return words[huge];
}

/* What the system has of huge pages: "ok" or what is missing. */
PyObject *
binding_memory_huge_pages(PyObject *module, PyObject *unused)
{
    (void)module;
    (void)unused;
    return PyUnicode_FromString(huge_word(afork_huge_probe()));
}

static int
has_threads(void)
{
    struct stat st;

    /* One link for each, after those of every folder. */
    return stat("/proc/self/task", &st) < 0 || st.st_nlink > 3;
}

/* Returns the state for the statistics; never fails. */
static const char *
collapse(const void *const *keep, size_t n)
{
    int (*movable)(const void *at) = binding_arena_holds;
    enum afork_huge huge;
    int64_t size;

    if (m.no_collapse)
        return "switched off";
    size = afork_huge_private();
    if (size < 0)
        return "no procfs";
    if (size + (int64_t)m.file_bytes < LARGE)
        return "small";
    huge = afork_huge_probe();
    if (huge != AFORK_HUGE_OK)
        return huge_word(huge);
#ifdef __GLIBC__
    malloc_trim(0);
#endif
    /* Nobody else's memory: who allocates may rely on zeros in what was given
     * back (MADV_DONTNEED), or let a mapping grow beyond the end of the file.
     * And other threads would go on writing. */
    if (m.no_file || has_threads())
        movable = NULL;
    if (afork_huge_collapse(keep, n, movable, &m.collapsed) < 0)
        return "no procfs";
    m.file_bytes += m.collapsed.moved;
    return m.collapsed.bytes || m.file_bytes ? "used" : "refused";
}

void
binding_memory_collapse(const void *const *keep, size_t n)
{
    m.collapse = collapse(keep, n);
    m.uncollapsed = 0;
}

static int
has_forked(void)
{
    const struct afork_server *server = binding_current_server();

    return server && server->forked;
}

void
binding_memory_before_fork(const void *const *keep, size_t n, int alone)
{
    int failed = 0;

    if (m.changed && m.frozen && !has_forked()) {
        failed = call("afork._memory", "freeze_new");
    } else if (m.changed && !m.no_gc_freeze) {
        /* From the second time on there is only what is new to look at, and
         * what is garbage by now would be kept for ever. */
        if (m.gc_frozen)
            PyGC_Collect();
        failed = call("gc", "freeze");
        m.gc_frozen = 1;
    }
    if (failed < 0)
        PyErr_WriteUnraisable(NULL);
    if (m.changed) /* else each fork would copy the page */
        m.changed = 0;
    /* While a child lives it would be copied instead of moved. */
    if (m.uncollapsed && alone)
        binding_memory_collapse(keep, n);
}

/* In a main program that is about to fork a template of itself. */
PyObject *
binding_memory_collapse_now(PyObject *module, PyObject *unused)
{
    (void)module;
    (void)unused;
    binding_memory_collapse(NULL, 0);
    Py_RETURN_NONE;
}

PyObject *
binding_memory_setup(PyObject *module, PyObject *args)
{
    int no_arena;

    (void)module;
    if (!PyArg_ParseTuple(args, "pppppp:memory_setup", &no_arena,
                          &m.no_collapse, &m.no_file, &m.no_gc_freeze,
                          &m.no_immortal, &m.no_text))
        return NULL;
    if (!no_arena && afork_huge_probe() != AFORK_HUGE_NEVER)
        binding_arena_install();
    Py_RETURN_NONE;
}

int
binding_memory_no_text(void)
{
    return m.no_text;
}

/* What became of the arrangement of text, in a server process. */
static const char *
text_word(const struct afork_server *s)
{
    if (m.no_text)
        return "switched off";
    if (!s)
        return "not yet";
    if (s->image_error)
        return "refused";
    if (s->image_pages)
        return "used";
    return s->trial_pid ? "trial" : s->tried ? "nothing to gain" : "not yet";
}

/* immortalise(roots, only_new): the objects of this process; how many were not
 * immortal yet. */
PyObject *
binding_memory_immortalise(PyObject *module, PyObject *args)
{
    PyObject *roots;
    int only_new;
    Py_ssize_t n = 0;

    (void)module;
    if (!PyArg_ParseTuple(args, "O!p:immortalise", &PyList_Type, &roots,
                          &only_new))
        return NULL;
    if (has_forked()) {
        PyErr_SetString(PyExc_RuntimeError,
                        "freeze() must come before the first fork, and "
                        "before spares(), which forks in advance");
        return NULL;
    }
    if (!m.no_immortal) {
        n = binding_immortalise(roots, binding_worker_socket(), only_new,
                                &m.visited);
        if (n < 0)
            return NULL;
    }
    m.immortal += n;
    m.frozen = m.gc_frozen = 1;
    m.changed = 0;
    return PyLong_FromSsize_t(n);
}

PyObject *
binding_memory_stats(PyObject *module, PyObject *unused)
{
    size_t bytes, arenas = binding_arena_count(&bytes);
    const char *refused = binding_immortal_refused();
    const struct afork_server *server = binding_current_server();

    (void)module;
    (void)unused;
    if (!m.frozen)
        refused = "not asked for";
    else if (m.no_immortal)
        refused = "switched off";
    return Py_BuildValue(
        "{snsnsLsLsssKsKsisKsisOsnsnsssssnsi}", "arenas", (Py_ssize_t)arenas,
        "arena_bytes", (Py_ssize_t)bytes, "private_bytes",
        (long long)afork_huge_private(), "huge_bytes",
        (long long)afork_huge_bytes(), "collapse", m.collapse,
        "collapsed_bytes", (unsigned long long)m.collapsed.bytes,
        "refused_bytes", (unsigned long long)m.collapsed.refused,
        "collapse_errno", m.collapsed.error, "file_bytes",
        (unsigned long long)m.file_bytes, "file_errno", m.collapsed.move_error,
        "frozen", m.frozen ? Py_True : Py_False, "immortal_objects",
        m.immortal, "visited_objects", m.visited, "immortal",
        refused ? refused : "used", "text", text_word(server), "text_bytes",
        server ? (Py_ssize_t)server->image_pages * 4096 : 0, "text_errno",
        server ? server->image_error : 0);
}
