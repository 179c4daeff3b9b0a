"""An application that will be killed: python fault_application.py STATE FIFO.

Gets its processes into a state, prints their pids on one line, and waits.
Whoever stops at a stop-point prints its pid by itself, into the FIFO.
"""

from __future__ import annotations

import asyncio
import sys
import threading

import afork

SLEEP = """
import signal
def sleep(sock, *args):
    signal.pthread_sigmask(signal.SIG_BLOCK, range(1, signal.NSIG))
    signal.sigwait([signal.SIGUSR1])
"""

state, fifo = sys.argv[1:]
STOP = f"""
import os, signal
fd = os.open({fifo!r}, os.O_WRONLY)
os.write(fd, b"%d\\n" % os.getpid())
os.close(fd)
while True:
    signal.pause()
"""
STOP_FUNCTION = "def stop(sock):\n" + "".join(f"    {x}\n" for x in STOP.splitlines())
HOOK = "def stop():\n" + "".join(f"    {x}\n" for x in STOP.splitlines())
SHELL = f"echo $$ > {fifo}; exec sleep 1000"
keep = []


async def ready(*forks):
    for f in forks:
        await f.ready()
    keep.extend(forks)
    return [f.pid for f in forks]


async def main():
    template = afork.Fork.default()
    pids = await ready(template)
    if state == "started":
        pids += await ready(afork.Fork.new(), afork.Fork.new().fork())
    elif state == "eval":
        keep.append(afork.Fork.new().eval(STOP))
    elif state == "template-eval":
        pids += await ready(afork.Fork.new())
        template.eval(STOP)
    elif state == "template-loop":
        pids += await ready(afork.Fork.new())
        template.eval(STOP.replace("signal.pause()", "pass"))
    elif state == "require":
        sys.path.insert(0, fifo + ".modules")
        keep.append(afork.Fork.new().require("fault_stops"))
    elif state == "mid-frame":
        f = afork.Fork.new().eval(STOP)
        f.eval("pass", "x" * (8 << 20))  # more than fits into the socket
        assert f._process.channel.queued
        keep.append(f)
    elif state == "before-fork":
        template.eval(HOOK + "\nimport os\nos.register_at_fork(before=stop)")
        keep.append(afork.Fork.new())
    elif state == "after-fork":
        template.eval(HOOK + "\nimport os\nos.register_at_fork(after_in_child=stop)")
        keep.append(afork.Fork.new())
    elif state == "running":
        for f in (afork.Fork.new(), afork.Fork.new_exec().fork()):
            keep.append(await f.eval(STOP_FUNCTION).run("stop"))
            pids.append(f.pid)
            keep.append(f)
    elif state == "deaf":  # reads nothing, and blocks every signal
        for _ in range(3):
            f = afork.Fork.new().eval(SLEEP)
            keep.append(await f.run("sleep"))
            pids.append(f.pid)
    elif state == "exec":
        f = afork.Fork.new()
        await f.exec("sh", "-c", SHELL)
        pids.append(f.pid)
    elif state == "spawn":
        p = await afork.create_subprocess_exec("sh", "-c", SHELL)
        pids.append(p.pid)
        keep.append(p)
    elif state == "tree":
        a = afork.Fork.new_exec()
        b = a.fork()
        c = b.fork()
        d = c.fork().eval(STOP_FUNCTION)
        pids += await ready(a, b, c, d)
        keep.append(await d.run("stop"))
    elif state == "detached":
        f = afork.Fork.new().set(detach=True).eval(STOP_FUNCTION)
        keep.append(await f.run("stop"))
        pids.append(-f.pid)
    else:
        sys.exit(f"unknown state {state}")
    print(*pids, flush=True)
    await asyncio.Event().wait()


if state == "thread":  # its template cannot be told by the kernel that we die
    state = "started"
    thread = threading.Thread(target=asyncio.run, args=(main(),))
    thread.start()
    thread.join()
else:
    asyncio.run(main())
