/*
 * The server loop's callbacks in Python terms, and the only fork().
 *
 * The loop runs without the GIL; each callback takes it for as long as it
 * needs.  What a command means is in afork/_child.py, whose handler object is
 * called from here.
 */
#include "binding.h"

#include <errno.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <unistd.h>

#include "proctitle.h"
#include "serve.h"

extern char **environ;

enum {
    PAGE = 4096,
    LOCK_SIZE = 32, /* of what CPython makes anew in a forked process */
    CACHED = 7,     /* blocks of a size that malloc keeps at hand */
};

struct py_server {
    PyObject *handler;             /* strong */
    PyObject *func;                /* strong: what run has found, or NULL */
    PyObject *sock;                /* strong: blank until run fills it */
    PyObject *close;               /* strong: what closes it */
    PyObject *count_exit_handlers; /* strong */
    PyObject *name_threading, *name_flush; /* strong: made before any fork */
    struct binding_stdio stdio;            /* as it was at the last fork */
    int keep_title;                        /* the title was set by hand */
    int spare_title;                       /* the title is that of a spare */
    PyThreadState *thread;                 /* released while the loop waits */
    int dirty;        /* Python has run since the last fork */
    int interested;   /* signals may have handlers in Python */
    int clear_atexit; /* the process has exit handlers a child must not run */
    struct py_server *outer;
    struct afork_server server; /* last: its end is seldom written */
};

_Static_assert(offsetof(struct py_server, server.spares.list) <= PAGE,
               "what is written at each fork is in one page");

/* The innermost server of this process; one thread serves. */
static struct py_server *current;

/* Whatever went wrong inside a callback itself, as a failure without text. */
static void
fail_bare(struct afork_failure *failure)
{
    static const struct afork_str none = {(const uint8_t *)"", 0};

    PyErr_WriteUnraisable(NULL);
    afork_failure_set(failure, "internal", ENOMEM, none, none, none, none);
}

/* Fills a failure from (stage, errno, type, message, traceback, filename). */
static int
get_failure(PyObject *tuple, struct afork_failure *failure)
{
    struct afork_str s[4];
    const char *stage, *text[4];
    Py_ssize_t len[4];
    int error;

    if (!PyArg_ParseTuple(tuple, "siy#y#y#y#", &stage, &error, &text[0],
                          &len[0], &text[1], &len[1], &text[2], &len[2],
                          &text[3], &len[3]))
        return -1;
    for (int i = 0; i < 4; i++) {
        s[i].data = (const uint8_t *)text[i];
        s[i].len = (size_t)len[i];
    }
    if (afork_failure_set(failure, stage, error, s[0], s[1], s[2], s[3]) < 0) {
        PyErr_NoMemory();
        return -1;
    }
    return 0;
}

/* The handler's answer: None, or a failure. */
static int
take_answer(PyObject *answer, struct afork_failure *failure)
{
    int r = -1;

    if (answer == Py_None)
        r = 0;
    else if (!answer || get_failure(answer, failure) < 0)
        fail_bare(failure);
    Py_XDECREF(answer);
    return r;
}

static int
op_command(void *self, uint8_t letter, const uint8_t *payload, size_t len,
           struct afork_failure *ret_failure)
{
    struct py_server *p = self;
    int r;

    PyEval_RestoreThread(p->thread);
    p->dirty = 1;
    binding_memory_command();
    binding_warm_title(&p->spare_title, 0);
    r = take_answer(PyObject_CallMethod(p->handler, "command", "iy#", letter,
                                        len ? (const char *)payload : "",
                                        (Py_ssize_t)len),
                    ret_failure);
    p->thread = PyEval_SaveThread();
    return r;
}

static int
op_find(void *self, const uint8_t *name, size_t len,
        struct afork_failure *ret_failure)
{
    static const char title[] = "afork: worker ";
    struct py_server *p = self;
    const char *text = len ? (const char *)name : "";
    char full[256];
    int r = 0;

    PyEval_RestoreThread(p->thread);
    if (!p->server.plain)
        p->func = binding_find_loaded(text, len);
    if (!p->func) {
        p->dirty = 1;
        r = take_answer(PyObject_CallMethod(p->handler, "find", "y#", text,
                                            (Py_ssize_t)len),
                        ret_failure);
        if (r == 0)
            p->func = PyObject_GetAttrString(p->handler, "func");
    }
    if (r == 0 && !p->keep_title) {
        size_t room = sizeof full - sizeof title;

        memcpy(full, title, sizeof title - 1);
        memcpy(full + sizeof title - 1, text, len < room ? len : room);
        afork_proctitle_set(full,
                            sizeof title - 1 + (len < room ? len : room));
    }
    p->thread = PyEval_SaveThread();
    return r;
}

static void
op_warm(void *self)
{
    struct py_server *p = self;

    PyEval_RestoreThread(p->thread);
    binding_warm_title(&p->spare_title, !p->keep_title);
    binding_warm(p->sock, p->count_exit_handlers);
    p->thread = PyEval_SaveThread();
}

static uint8_t *
op_stats(void *self, size_t *ret_len)
{
    struct py_server *p = self;
    uint8_t *data;

    PyEval_RestoreThread(p->thread);
    p->dirty = 1;
    data = binding_stats(p->handler, &p->server, ret_len);
    p->thread = PyEval_SaveThread();
    return data;
}

static void
op_interrupted(void *self)
{
    struct py_server *p = self;

    /* Mostly the end of a child: no reason to touch the memory that the next
     * fork shares. */
    if (!p->dirty && !p->interested)
        return;
    PyEval_RestoreThread(p->thread);
    p->dirty = 1; /* a handler may have printed */
    if (PyErr_CheckSignals() < 0)
        PyErr_WriteUnraisable(p->handler);
    p->thread = PyEval_SaveThread();
}

static char *const *
op_environ(void *self)
{
    (void)self;
    return environ;
}

static void
die_with(pid_t parent)
{
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (getppid() != parent)
        _exit(1);
}

/* fork(2) with CPython's hooks around it.  Needs the GIL; -errno. */
static pid_t
fork_python(struct afork_server *server)
{
    pid_t parent = getpid(), pid;
    int saved;

    PyOS_BeforeFork();
    pid = fork();
    saved = errno;
    /* Before the hooks: they are foreign code. */
    if (pid == 0 && server)
        afork_server_forked(server, parent);
    else if (pid == 0)
        die_with(parent);
    if (pid == 0)
        PyOS_AfterFork_Child();
    else
        PyOS_AfterFork_Parent(); /* also when the fork has failed */
    return pid < 0 ? -saved : pid;
}

/* Whether a method of the handler returns True; complains if it raises. */
static int
answers_true(PyObject *handler, const char *method, PyObject *arg)
{
    PyObject *answer = PyObject_CallMethod(handler, method, "O", arg);
    int yes = answer == Py_True;

    if (!answer)
        PyErr_WriteUnraisable(handler);
    Py_XDECREF(answer);
    return yes;
}

/*
 * The next few blocks of the size of a lock come from neighbouring addresses:
 * a forked process makes all its locks anew, and each would be in another
 * page.
 */
static void
gather_locks(void)
{
    void *blocks[16 * CACHED];
    int n = sizeof blocks / sizeof *blocks;

    for (int i = 0; i < n; i++)
        blocks[i] = malloc(LOCK_SIZE);
    while (n-- > 0) /* the last ones are cached: all before were fragments */
        free(blocks[n]);
}

/* What has to be looked at anew once Python has run. */
static void
before_fork(struct py_server *p)
{
    p->clear_atexit = answers_true(p->handler, "before_fork", p->sock);
    binding_stdio_remember(&p->stdio);
    p->interested = afork_signals_foreign();
    gather_locks();
    p->dirty = 0;
}

/* What the loop writes to between forks stays out of the shared pages. */
static void
prepare_memory(struct py_server *p)
{
    const void *keep[] = {p, (char *)(p + 1) - 1, p->server.in.payload,
                          p->server.out.buf, p->server.children.list};

    binding_memory_before_fork(keep, sizeof keep / sizeof *keep,
                               p->server.children.n == 0);
}

static pid_t
op_fork(void *self)
{
    struct py_server *p = self;
    pid_t pid;

    PyEval_RestoreThread(p->thread);
    prepare_memory(p);
    /* Between two forks of an idle template no Python runs. */
    if (p->dirty) {
        before_fork(p);
        if (p->server.image_pages)
            afork_image_clear(&p->server.image);
    }
    pid = fork_python(&p->server);
    if (pid == 0 && p->clear_atexit) {
        answers_true(p->handler, "clear_atexit", Py_None);
        p->clear_atexit = 0;
    }
    p->thread = PyEval_SaveThread();
    return pid;
}

static const struct afork_ops ops = {
    .command = op_command,
    .find = op_find,
    .fork = op_fork,
    .warm = op_warm,
    .stats = op_stats,
    .interrupted = op_interrupted,
    .environ = op_environ,
};

/* Runs the function; what it raises stays set. */
static void
enter(struct py_server *p)
{
    int fd = p->server.sock;

    p->server.sock = AFORK_NOFD;
    if (p->dirty)
        answers_true(p->handler, "adapt", p->sock);
    if (binding_fill_socket_take(p->sock, fd) == 0)
        binding_enter(p->handler, p->func, p->sock, &p->server.args);
}

/* Lets go of the socket, unless the function has kept it. */
static void
close_socket(struct py_server *p)
{
    if (Py_REFCNT(p->sock) == 1)
        binding_close_socket(p->sock, p->close);
}

/* The end of the process, unless there is more to do than Python has code
 * for. */
static void
end(struct py_server *p)
{
    int plainly =
        binding_ends_plainly(p->count_exit_handlers, p->name_threading);

    /* Who reads the end of file may rely on what was written before it. */
    if (plainly) {
        binding_stdio_flush(&p->stdio, p->name_flush);
        close_socket(p);
    }
    if (p->server.trial) /* as late as can be: what comes behind is not seen */
        afork_image_note(p->server.trial);
    if (plainly) {
        /* Taking down the memory takes as long as a start: who has just been
         * told goes first, should it be waiting for this CPU. */
        sched_yield();
        _exit(0);
    }
}

static void
py_server_free(struct py_server *p)
{
    afork_server_free(&p->server);
    binding_stdio_forget(&p->stdio);
    Py_XDECREF(p->handler);
    Py_XDECREF(p->func);
    Py_XDECREF(p->sock);
    Py_XDECREF(p->close);
    Py_XDECREF(p->count_exit_handlers);
    Py_XDECREF(p->name_threading);
    Py_XDECREF(p->name_flush);
    free(p);
}

/* In a page of its own, as it is written at each fork by both processes: by
 * chance it would lie across two. */
static struct py_server *
py_server_alloc(void)
{
    const size_t size = (sizeof(struct py_server) + PAGE - 1) / PAGE * PAGE;
    struct py_server *p = aligned_alloc(PAGE, size);

    if (p)
        memset(p, 0, sizeof *p);
    return p;
}

/* A strong reference to an attribute that is not needed there any more. */
static PyObject *
take_attribute(PyObject *from, const char *name)
{
    PyObject *value = PyObject_GetAttrString(from, name);

    if (value && PyObject_DelAttrString(from, name) < 0)
        Py_CLEAR(value);
    return value;
}

PyObject *
binding_serve(PyObject *module, PyObject *args)
{
    struct py_server *p;
    PyObject *handler, *failure = Py_None, *result = NULL;
    int fd, plain, r;

    (void)module;
    if (!PyArg_ParseTuple(args, "ipO|O:serve", &fd, &plain, &handler,
                          &failure))
        return NULL;
    p = py_server_alloc();
    if (!p)
        return PyErr_NoMemory();
    afork_server_init_take(&p->server, fd, plain, &ops, p);
    p->handler = Py_NewRef(handler);
    p->dirty = 1;
    if (!binding_memory_no_text())
        p->server.trial_function = "afork._child.trial";
    p->sock = take_attribute(handler, "blank");
    p->close = take_attribute(handler, "close");
    p->count_exit_handlers =
        PyObject_GetAttrString(handler, "count_exit_handlers");
    p->name_threading = PyUnicode_InternFromString("threading");
    p->name_flush = PyUnicode_InternFromString("flush");
    if (!p->sock || !p->close || !p->count_exit_handlers ||
        !p->name_threading || !p->name_flush ||
        (failure != Py_None && get_failure(failure, &p->server.failure) < 0)) {
        py_server_free(p);
        return NULL;
    }
    p->outer = current;
    current = p;

    p->thread = PyEval_SaveThread();
    r = afork_serve(&p->server);
    PyEval_RestoreThread(p->thread);

    if (r == AFORK_ENTER)
        enter(p);
    else if (r != AFORK_END)
        Py_XDECREF(PyObject_CallMethod(p->handler, "broken", "i", -r));
    if (!PyErr_Occurred()) {
        end(p);
        close_socket(p);
        result = Py_NewRef(Py_None);
    } else {
        p->sock = NULL; /* stays open: a traceback is going to be written */
    }
    current = p->outer;
    py_server_free(p);
    return result;
}

/* For a main program that becomes a template; the child dies with it. */
PyObject *
binding_fork(PyObject *module, PyObject *unused)
{
    pid_t pid;

    (void)module;
    (void)unused;
    pid = fork_python(NULL);
    return pid < 0 ? binding_oserror_name((int)pid, NULL)
                   : PyLong_FromLong(pid);
}

PyObject *
binding_worker_socket(void)
{
    return current ? current->sock : NULL;
}

const struct afork_server *
binding_current_server(void)
{
    return current ? &current->server : NULL;
}

struct afork_server *
binding_serving(int **ret_keep_title)
{
    if (!current) {
        PyErr_SetString(PyExc_RuntimeError, "not in a server process");
        return NULL;
    }
    *ret_keep_title = &current->keep_title;
    return &current->server;
}
