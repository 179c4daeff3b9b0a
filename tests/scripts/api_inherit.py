"""An application in a bad state, which asks its processes what they inherit.

Arguments: a file for the answers (JSON), then "dirty" and numbers of standard
streams to be closed.
"""

import asyncio
import json
import os
import resource
import signal
import socket
import sys

FACTS = """
def facts():
    import ctypes, os, resource
    fds = {}
    for n in map(int, os.listdir("/proc/self/fd")):
        try:
            link = os.readlink(f"/proc/self/fd/{n}").partition(":")[0]
            if "libffi" not in link:  # ctypes, below, keeps its library open
                fds[n] = link
        except OSError:
            pass  # the one that lists them
    with open("/proc/self/status") as file:
        status = dict(line.split(":", 1) for line in file)
    names = ("SigBlk", "SigIgn", "SigCgt", "NoNewPrivs", "Umask", "Threads")
    value = ctypes.c_int()
    ctypes.CDLL(None).prctl(2, ctypes.byref(value))  # PR_GET_PDEATHSIG
    return {
        "fds": fds,
        **{name: status[name].strip() for name in names},
        "cwd": os.getcwd(),
        "leader": [os.getsid(0) == os.getpid(), os.getpgid(0) == os.getpid()],
        "session": os.getsid(0),
        "parent": os.getppid(),
        "limits": {n: resource.getrlimit(n) for n in range(16)},
        "env": dict(os.environ),
        "nice": os.nice(0),
        "deathsig": value.value,
    }
"""
WORKER = (
    FACTS
    + """
def worker(sock):
    import json
    sock.sendall(json.dumps(facts()).encode())
"""
)
PROGRAM = (
    FACTS
    + """
import json, os, sys
text = json.dumps(facts()).encode()
while text:
    text = text[os.write(int(sys.argv[1]), text):]
"""
)


def make_dirty() -> list[object]:
    kept: list[object] = []
    for n in range(10):
        read, write = os.pipe()
        os.set_inheritable(read, True)
        os.set_inheritable(write, n % 2 == 0)
        pair = socket.socketpair()
        pair[0].set_inheritable(True)
        file = open("/dev/null")
        os.set_inheritable(file.fileno(), True)
        kept += [*pair, file]
    assert len(os.listdir("/proc/self/fd")) > 50
    os.dup2(0, 200) if os.path.exists("/proc/self/fd/0") else None
    for number in (signal.SIGHUP, signal.SIGUSR1, signal.SIGQUIT, signal.SIGRTMIN + 3):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGUSR2, lambda *args: None)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    signal.pthread_sigmask(
        signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGUSR2, signal.SIGCHLD, 40}
    )
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.umask(0o027)
    os.environ["API_DIRTY"] = "1"
    os.chdir("/usr")
    return kept


async def read_all(sock):
    data = b""
    while chunk := await asyncio.get_running_loop().sock_recv(sock, 65536):
        data += chunk
    sock.close()
    return json.loads(data)


async def main(afork):
    answers = {"pid": os.getpid(), "env": dict(os.environ)}
    template = await afork.Fork.default().ready()
    answers["template"] = template.pid

    answers["worker"] = await read_all(
        await afork.Fork.new().eval(WORKER).run("worker")
    )
    tree = afork.Fork.new_exec().eval(WORKER)
    answers["tree"] = await read_all(await tree.fork().fork().run("worker"))
    f = afork.Fork.new()
    program = (sys.executable, "-ISc", PROGRAM)
    sock = await f.exec(*program, "7", fds={7: afork.SOCKET})
    answers["exec"] = await read_all(sock)
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    with theirs:
        number = str(theirs.fileno())
        p = await afork.create_subprocess_exec(
            *program, number, pass_fds=(theirs.fileno(),)
        )
    answers["subprocess"] = await read_all(ours)
    answers["number"] = number
    assert await p.wait() == 0
    return answers


if __name__ == "__main__":
    target, *state = sys.argv[1:]
    kept = make_dirty() if "dirty" in state else []
    for n in (0, 1, 2):
        if str(n) in state:
            os.close(n)
    import afork

    answers = asyncio.run(main(afork))
    with open(target, "w") as file:
        json.dump(answers, file)
