/* Settings of a process that are the server loop's affair. */
#include "binding.h"

#include <errno.h>
#include <signal.h>
#include <string.h>
#include <sys/prctl.h>

#include "proctitle.h"
#include "serve.h"

/* The title was chosen by the application: run does not change it. */
PyObject *
binding_keep_title(PyObject *module, PyObject *unused)
{
    int *keep_title;

    (void)module;
    (void)unused;
    if (!binding_serving(&keep_title))
        return NULL;
    *keep_title = 1;
    Py_RETURN_NONE;
}

/* The started report goes out once more: somebody else listens now. */
PyObject *
binding_report_again(PyObject *module, PyObject *unused)
{
    int *keep_title;
    struct afork_server *server = binding_serving(&keep_title);

    (void)module;
    (void)unused;
    if (!server)
        return NULL;
    server->started = 0;
    Py_RETURN_NONE;
}

/* From here on a foreign peer listens, who knows no reports. */
PyObject *
binding_make_plain(PyObject *module, PyObject *unused)
{
    int *keep_title;
    struct afork_server *server = binding_serving(&keep_title);

    (void)module;
    (void)unused;
    if (!server)
        return NULL;
    server->plain = 1;
    Py_RETURN_NONE;
}

PyObject *
binding_detach(PyObject *module, PyObject *flag)
{
    int on = PyObject_IsTrue(flag), *keep_title;
    struct afork_server *server = binding_serving(&keep_title);

    (void)module;
    if (on < 0 || !server)
        return NULL;
    server->detached = on;
    if (prctl(PR_SET_PDEATHSIG, on ? 0 : SIGKILL) < 0)
        return binding_oserror(-errno);
    Py_RETURN_NONE;
}

void
binding_warm_title(int *is_spare, int on)
{
    const char *title = on ? "afork: spare" : "afork: template";

    if (on || *is_spare)
        afork_proctitle_set(title, strlen(title));
    *is_spare = on;
}
