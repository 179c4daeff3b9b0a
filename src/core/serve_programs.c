/* The server's commands that turn it into a program or start one. */
#define _GNU_SOURCE
#include <errno.h>
#include <signal.h>
#include <string.h>
#include <unistd.h>

#include "execreq.h"
#include "report.h"
#include "serve_parts.h"
#include "spawn.h"

static const char *
failed_name(const struct afork_execreq *q, enum afork_stage stage)
{
    if (stage == AFORK_STAGE_CWD)
        return q->exec.cwd ? q->exec.cwd : "";
    return stage == AFORK_STAGE_EXEC ? q->exec.program : "";
}

int
afork_server_exec(struct afork_server *s, const struct afork_frame *frame)
{
    struct afork_strs list = {frame->payload, frame->payload + frame->len};
    enum afork_stage stage = AFORK_STAGE_SETUP;
    struct afork_execreq q;
    int r;

    afork_spares_set(s, 0);
    if (afork_server_settle(s))
        return AFORK_NEXT;
    r = afork_execreq_get(&q, list, &s->args, s->ops->environ(s->self));
    if (r == -EPROTO)
        return afork_server_protocol_error(s, "malformed exec request");
    if (r < 0)
        return afork_server_fail(s, "exec", -r, "OSError", strerror(-r), "");
    afork_report_started(s);
    afork_server_flush_all(s);
    r = -afork_exec_self(&q.exec, &s->sock, &stage);
    /* Still here: stdio may be gone, so nothing can be executed any more. */
    r = afork_server_fail(s, afork_stage_name(stage), r, "OSError",
                          strerror(r), failed_name(&q, stage));
    afork_execreq_free(&q);
    return r;
}

int
afork_server_spawn(struct afork_server *s, const struct afork_frame *frame)
{
    struct afork_strs list;
    struct afork_execreq q;
    enum afork_stage stage = AFORK_STAGE_SETUP;
    uint64_t id;
    pid_t pid;
    int r;

    if (frame->len < sizeof id)
        return afork_server_protocol_error(s, "malformed spawn request");
    memcpy(&id, frame->payload, sizeof id);
    list.at = frame->payload + sizeof id;
    list.end = frame->payload + frame->len;
    r = afork_execreq_get(&q, list, &s->args, s->ops->environ(s->self));
    if (r == -EPROTO)
        return afork_server_protocol_error(s, "malformed spawn request");
    if (r < 0) {
        /* A lost descriptor or no memory, but those of the request must go. */
        struct afork_exec_head head;
        struct afork_str str;

        if (afork_wire_next(&list, &str) > 0 && str.len == sizeof head) {
            memcpy(&head, str.data, sizeof head);
            afork_args_drop(&s->args, (size_t)head.handles);
        }
    }
    if (r == 0) {
        afork_report_started(s);
        q.exec.deathsig = s->detached ? 0 : SIGKILL;
        q.exec.parent = getpid();
        r = afork_children_reserve(&s->children);
        pid = r < 0 ? r : afork_spawn(&q.exec, &stage);
        afork_args_drop(&s->args, q.handles);
        afork_execreq_free(&q);
        r = pid < 0 ? (int)pid : 0;
        if (pid > 0) {
            afork_children_add(&s->children, pid, id);
            afork_report_spawned(s, id, pid);
        }
    }
    if (r < 0)
        afork_report_failed(s, id, -r, stage);
    return AFORK_NEXT;
}

int
afork_server_refuse_spawn(struct afork_server *s,
                          const struct afork_frame *frame)
{
    uint64_t id;

    if (frame->len < sizeof id)
        return afork_server_protocol_error(s, "malformed spawn request");
    memcpy(&id, frame->payload, sizeof id);
    afork_args_drop(&s->args,
                    s->args.n); /* the descriptors that came with it */
    afork_report_failed(s, id, ECANCELED, AFORK_STAGE_NONE);
    return AFORK_NEXT;
}
