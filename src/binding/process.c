/* Starting programs, and asking about processes, in Python terms. */
#define _GNU_SOURCE
#include "binding.h"

#include <errno.h>
#include <limits.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "proctitle.h"
#include "spawn.h"

/* A NULL-terminated array of the strings of a sequence of bytes; the strings
 * are borrowed from the sequence, the array is to be freed. */
static char **
get_vector(PyObject *sequence)
{
    Py_ssize_t n = PyTuple_Check(sequence) ? PyTuple_GET_SIZE(sequence) : -1;
    char **vector;

    if (n < 0) {
        PyErr_SetString(PyExc_TypeError, "a tuple of bytes is needed");
        return NULL;
    }
    vector = PyMem_Calloc((size_t)n + 1, sizeof *vector);
    if (!vector) {
        PyErr_NoMemory();
        return NULL;
    }
    for (Py_ssize_t i = 0; i < n; i++) {
        /* Refuses a NUL inside, which would cut the string. */
        if (PyBytes_AsStringAndSize(PyTuple_GET_ITEM(sequence, i), &vector[i],
                                    NULL) < 0) {
            PyMem_Free(vector);
            return NULL;
        }
    }
    return vector;
}

static struct afork_fdmap *
get_fds(PyObject *sequence, size_t *ret_n)
{
    Py_ssize_t n = PyTuple_Check(sequence) ? PyTuple_GET_SIZE(sequence) : -1;
    struct afork_fdmap *fds;

    if (n < 0 || n > 256) {
        PyErr_SetString(PyExc_TypeError, "a tuple of (from, to) is needed");
        return NULL;
    }
    fds = PyMem_Calloc((size_t)n + 1, sizeof *fds);
    if (!fds) {
        PyErr_NoMemory();
        return NULL;
    }
    for (Py_ssize_t i = 0; i < n; i++) {
        if (!PyArg_ParseTuple(PyTuple_GET_ITEM(sequence, i), "ii",
                              &fds[i].from, &fds[i].to)) {
            PyMem_Free(fds);
            return NULL;
        }
    }
    *ret_n = (size_t)n;
    return fds;
}

PyObject *
binding_spawn(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"program", "argv", "env", "fds", NULL};
    PyObject *py_argv, *py_env, *py_fds, *filename = NULL, *result = NULL;
    struct afork_fdmap *fds = NULL;
    char **argv = NULL, **env = NULL;
    const char *program;
    enum afork_stage stage;
    struct afork_exec x;
    pid_t pid;

    (void)module;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "yOOO:spawn", names,
                                     &program, &py_argv, &py_env, &py_fds))
        return NULL;
    memset(&x, 0, sizeof x);
    argv = get_vector(py_argv);
    env = argv ? get_vector(py_env) : NULL;
    fds = env ? get_fds(py_fds, &x.nfds) : NULL;
    if (!fds)
        goto out;
    x.program = program;
    x.argv = argv;
    x.envp = env;
    x.cwd_fd = AFORK_NOFD;
    x.mask = -1;
    x.group = -1;
    x.session = 1; /* what a terminal sends to the application is not for it */
    x.fds = fds;
    /*
     * The kernel delivers the death signal when the *thread* that spawned
     * ends; the main thread lives as long as the process.  From another
     * thread, end of file on the control socket has to do.
     */
    if (syscall(SYS_gettid) == getpid()) {
        x.deathsig = SIGKILL;
        x.parent = getpid();
    }

    /* Milliseconds, and no other thread is kept from anything it must not do
     * meanwhile: the child is sealed. */
    Py_BEGIN_ALLOW_THREADS
    pid = afork_spawn(&x, &stage);
    Py_END_ALLOW_THREADS
    if (pid < 0) {
        filename = PyUnicode_DecodeFSDefault(program);
        if (filename)
            binding_oserror_name((int)pid, filename);
    } else {
        result = PyLong_FromLong(pid);
    }
out:
    Py_XDECREF(filename);
    PyMem_Free(fds);
    PyMem_Free(env);
    PyMem_Free(argv);
    return result;
}

/* From linux/pidfd.h of 6.15; older headers do not have it. */
struct pidfd_info_v0 {
    uint64_t mask;
    uint64_t cgroupid;
    uint32_t pid, tgid, ppid;
    uint32_t ids[8];
    int32_t exit_code;
};
#define PIDFD_GET_INFO_V0 _IOWR(0xFF, 11, struct pidfd_info_v0)
#define PIDFD_INFO_EXIT_BIT (UINT64_C(1) << 3)

PyObject *
binding_exit_status(PyObject *module, PyObject *pidfd)
{
    struct pidfd_info_v0 info;
    long fd = PyLong_AsLong(pidfd);

    (void)module;
    if (fd == -1 && PyErr_Occurred())
        return NULL;
    memset(&info, 0, sizeof info);
    info.mask = PIDFD_INFO_EXIT_BIT;
    if (fd < 0 || fd > INT_MAX ||
        ioctl((int)fd, PIDFD_GET_INFO_V0, &info) < 0 ||
        !(info.mask & PIDFD_INFO_EXIT_BIT))
        Py_RETURN_NONE;
    return PyLong_FromLong(info.exit_code);
}

PyObject *
binding_set_title(PyObject *module, PyObject *title)
{
    Py_ssize_t len;
    char *text;

    (void)module;
    if (PyBytes_AsStringAndSize(title, &text, &len) < 0)
        return NULL;
    /* A process whose procfs is hidden keeps its old name. */
    afork_proctitle_set(text, (size_t)len);
    Py_RETURN_NONE;
}

/* The environment as programs would inherit it, a list of NAME=VALUE. */
PyObject *
binding_get_environ(PyObject *module, PyObject *unused)
{
    PyObject *list = PyList_New(0);

    (void)module;
    (void)unused;
    for (char **at = environ; list && at && *at; at++) {
        PyObject *item = PyBytes_FromString(*at);

        if (!item || PyList_Append(list, item) < 0)
            Py_CLEAR(list);
        Py_XDECREF(item);
    }
    return list;
}

/*
 * umask(2) can only be read by changing it, which another thread's new file
 * would notice.  Linux 4.7 and newer tell it in procfs, which is slow, so
 * that is for processes that have other threads.
 */
PyObject *
binding_get_umask(PyObject *module, PyObject *unused)
{
    struct stat task;
    char line[256];
    unsigned int mask = 0;
    int found = 0;
    FILE *file;

    (void)module;
    (void)unused;
    /* A directory has as many links as subdirectories, and two of its own. */
    if (stat("/proc/self/task", &task) == 0 && task.st_nlink == 3) {
        mask = umask(0777);
        umask((mode_t)mask);
        return PyLong_FromUnsignedLong(mask);
    }
    file = fopen("/proc/self/status", "re");
    if (!file)
        return PyErr_SetFromErrnoWithFilename(PyExc_OSError,
                                              "/proc/self/status");
    while (!found && fgets(line, sizeof line, file))
        found = sscanf(line, "Umask: %o", &mask) == 1;
    fclose(file);
    if (!found)
        return binding_oserror(-ENOTSUP);
    return PyLong_FromUnsignedLong(mask);
}
