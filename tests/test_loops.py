"""Templates belong to the process, not to a loop."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import threading

import pytest

import afork

from .conftest import HANG, need
from .scripts.api_ask import PYTHONPATH, ask, code_is_lost_or, ended, read_all


def run_on(loop_factory, main):
    with asyncio.Runner(loop_factory=loop_factory) as runner:
        return runner.run(asyncio.wait_for(main(), HANG))


def test_configured_before_a_loop_runs(arun):
    f = afork.Fork.new().eval("x = 1").send_arg("a")
    template = afork.Fork.new_exec().require("json")
    children = template.fork_many(3)

    async def main():
        assert await ask(f, "(x, args)") == (1, ("a",))
        for child in children:
            assert await ask(child, "json.dumps([])") == "[]"
        template.close()

    arun(main)


def test_more_than_the_socket_takes_before_a_loop_runs(arun):
    """With nobody to send the rest later, the configuring call waits."""
    f = afork.Fork.new().eval("n = 0")
    for _ in range(100):
        f.eval("n += len(args[0])", b"x" * 30_000)
    f.send_arg(b"y" * 3_000_000)

    async def main():
        assert await ask(f, "(n, len(args[0]))") == (3_000_000, 3_000_000)

    arun(main)


def test_run_before_a_loop_runs(arun):
    f = afork.Fork.new().eval("def f(sock): sock.sendall(b'early')")
    run = f.run("f")

    async def main():
        assert await read_all(await run) == b"early"
        assert await f.wait() == 0

    arun(main)


def test_forgotten_before_a_loop_runs(arun, tmp_path):
    f = afork.Fork.new()
    f.eval("def f(sock, path): open(path, 'w').close()").send_arg(str(tmp_path / "x"))
    f.run("f")

    async def main():
        assert await f.wait() == 0
        assert (tmp_path / "x").exists()

    arun(main)


def test_several_runs_share_everything(loop_factory):
    kept = []

    async def first():
        f = await afork.Fork.new().eval("x = [1]").ready()
        worker = afork.Fork.new().eval("def echo(sock): sock.sendall(sock.recv(9))")
        kept.extend([f, worker, await worker.run("echo")])
        return (await afork.Fork.default().ready()).pid

    async def second():
        f, worker, sock = kept
        f.eval("x.append(2)")
        await asyncio.get_running_loop().sock_sendall(sock, b"still")
        assert await read_all(sock) == b"still"
        assert await worker.wait() == 0
        assert await ask(f, "x") == [1, 2]
        assert await ask(afork.Fork.new(), "1") == 1
        return (await afork.Fork.default().ready()).pid

    pid = run_on(loop_factory, first)
    assert run_on(loop_factory, second) == pid
    kept.clear()
    assert run_on(loop_factory, lambda: ask(afork.Fork.new(), "os.getppid()")) == pid


def test_loop_that_ends_with_awaits_pending(loop_factory):
    """asyncio.run cancels them: their processes are killed, others are not."""
    kept = []

    async def first():
        f = await afork.Fork.new().eval("import signal").ready()
        g = await afork.Fork.new().ready()
        kept.extend([f, g])
        kept.append(asyncio.create_task(f.eval("signal.pause()").run("os.getpid")))
        kept.append(asyncio.create_task(g.wait()))
        await asyncio.sleep(0)

    async def second():
        f, g, *tasks = kept
        assert all(task.cancelled() for task in tasks)
        assert await f.wait() == -9
        assert await ask(g, "1") == 1

    run_on(loop_factory, first)
    run_on(loop_factory, second)


def test_two_kinds_of_loops_after_another():
    need("uvloop", importlib.util.find_spec("uvloop") is not None, "no uvloop here")
    import uvloop

    async def main():
        return await ask(afork.Fork.new(), "os.getppid()")

    pids = {
        run_on(factory, main)
        for factory in (
            asyncio.new_event_loop,
            uvloop.new_event_loop,
            asyncio.new_event_loop,
            uvloop.new_event_loop,
        )
    }
    assert len(pids) == 1


def test_two_loops_in_two_threads(loop_factory):
    """They share the default template; each gets its own answers."""
    results: dict[int, list] = {}
    errors = []
    barrier = threading.Barrier(2)

    def work(number: int) -> None:
        async def main():
            barrier.wait(HANG)
            answers = []
            for n in range(20):
                f = afork.Fork.new().send_arg(f"{number} {n}")
                answers.append(await ask(f, "(args[0], os.getppid())"))
                assert await f.wait() == 0
            fs = [afork.Fork.new().send_arg(str(n)) for n in range(20)]
            many = await asyncio.gather(*(ask(f, "args[0]") for f in fs))
            assert many == [str(n) for n in range(20)]
            return answers

        try:
            results[number] = run_on(loop_factory, main)
        except BaseException as exc:
            errors.append(exc)
            barrier.abort()

    threads = [threading.Thread(target=work, args=(n,)) for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    for number in range(2):
        names = [name for name, _ in results[number]]
        assert names == [f"{number} {n}" for n in range(20)]
    assert len({pid for answers in results.values() for _, pid in answers}) == 1


def test_one_loop_is_told_what_the_other_has_read(loop_factory):
    """A thread whose loop is busy does not keep the other from its reports."""
    made = threading.Event()
    done = threading.Event()
    failed = []

    def other() -> None:
        async def main():
            await afork.Fork.new().ready()  # this loop watches as well
            made.set()
            done.wait(HANG)  # and is stuck

        try:
            run_on(loop_factory, main)
        except BaseException as exc:
            failed.append(exc)
            made.set()

    thread = threading.Thread(target=other)
    thread.start()
    made.wait(HANG)

    async def main():
        for _ in range(5):
            f = afork.Fork.new()
            assert await ask(f, "42") == 42
            assert await f.wait() == 0

    try:
        run_on(loop_factory, main)
    finally:
        done.set()
        thread.join()
    assert failed == []


def test_template_made_in_a_thread_that_has_ended(loop_factory):
    """The kernel's death signal is about threads: it must not hit the template."""
    pids = []

    def make() -> None:
        async def main():
            pids.append((await afork.Fork.default().ready()).pid)

        run_on(loop_factory, main)

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    answer = run_on(loop_factory, lambda: ask(afork.Fork.new(), "os.getppid()"))
    assert [answer] == pids


FORKING = """
import asyncio, os, sys
import afork
from tests.scripts.api_ask import ask

async def numbers():
    return (await afork.Fork.default().ready()).pid, await ask(afork.Fork.new(), "os.getppid()")

async def setup():
    worker = afork.Fork.new().eval("def echo(sock): sock.sendall(sock.recv(9) or b'eof')")
    sock = await worker.run("echo")
    waiting = await afork.Fork.new().ready()
    return worker, sock, waiting

with asyncio.Runner() as runner:
    first, same = runner.run(numbers())
    assert first == same
    worker, sock, waiting = runner.run(setup())

    r, w = os.pipe()
    before = os.listdir("/proc/self/fd")
    if (pid := os.fork()) == 0:
        # inherited descriptors of afork are closed, all but what is the user's
        kinds = [os.readlink(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd")
                 if os.path.exists(f"/proc/self/fd/{n}")]
        assert "anon_inode:[pidfd]" not in kinds, kinds
        # objects of the parent are of no use here, and harm nobody
        try:
            asyncio.run(waiting.ready())
        except afork.TemplateError as exc:
            assert "belongs to the one that forked us" in str(exc), exc
        else:
            os._exit(3)
        del waiting, worker
        # a template of its own
        mine, same = asyncio.run(numbers())
        assert mine == same != first, (mine, same, first)
        os.write(w, b"child %d" % mine)
        sys.stdout.flush()
        os._exit(0)
    os.close(w)
    assert os.waitpid(pid, 0)[1] == 0
    text = os.read(r, 99).decode()
    assert text.startswith("child "), text
    print(text.split()[1])

    # nothing has changed for the parent
    async def after():
        assert await numbers() == (first, first)
        await asyncio.get_running_loop().sock_sendall(sock, b"alive")
        assert await asyncio.get_running_loop().sock_recv(sock, 9) == b"alive"
        sock.close()
        assert await worker.wait() == 0
        assert await ask(waiting, "1") == 1
    runner.run(after())
"""


def test_application_that_forks_itself(run_script):
    done = run_script(FORKING, env={**os.environ, "PYTHONPATH": PYTHONPATH})
    assert done.stderr == ""
    assert ended(int(done.stdout)), "the child's template has outlived it"


def test_loop_that_was_closed_in_the_middle(run_script):
    """Its waiters are gone; whoever drains next must not trip over them."""
    run_script(
        """
import asyncio, afork
from tests.scripts.api_ask import ask

loop = asyncio.new_event_loop()
f = afork.Fork.new()
task = loop.create_task(f.ready())
loop.call_soon(loop.stop)
loop.run_forever()
loop.close()
assert not task.done()
task._log_destroy_pending = False
assert asyncio.run(ask(afork.Fork.new(), "1")) == 1
assert asyncio.run(ask(f, "2")) == 2
""",
        env={**os.environ, "PYTHONPATH": PYTHONPATH},
    )


@pytest.mark.parametrize("turn", range(3))
def test_a_loop_per_test(arun, turn):
    async def main():
        assert await ask(afork.Fork.new(), str(turn)) == turn

    arun(main)


def test_grace_that_outlasts_a_loop(loop_factory):
    """What one loop was to do after a while, the next one does."""
    kept = []

    async def first():
        template = afork.Fork.new_exec()
        f = template.fork().eval("import signal\ndef pause(sock): signal.pause()")
        kept.extend([template, f, await f.run("pause")])
        template.kill()
        # the template's end is noticed, and the loop goes
        assert await template.wait() == -9

    async def second():
        _, f, sock = kept
        assert await code_is_lost_or(-9, f)
        sock.close()

    run_on(loop_factory, first)
    run_on(loop_factory, second)
