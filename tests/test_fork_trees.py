"""fork and fork_many: trees of templates, and what their processes share."""

from __future__ import annotations

import asyncio
import os
import resource
from pathlib import Path

import pytest

import afork

from .scripts.api_ask import ask, read_all


@pytest.fixture
def loop_factory():
    """What happens in the process is the same for every kind of loop."""
    return asyncio.new_event_loop


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def test_children_have_what_was_prepared(arun):
    async def main():
        f = afork.Fork.new().eval("x = [1]").require("json")
        a = f.fork().eval("x.append('a')")
        f.eval("x.append(2)")
        b = f.fork()
        assert await ask(a, "(x, json.dumps(1))") == ([1, "a"], "1")
        assert await ask(b, "x") == [1, 2]
        assert await ask(f, "x") == [1, 2]

    arun(main)


def test_copies_of_arguments(arun):
    """Each process has those that were pending when it was forked, and its own."""

    async def main():
        r, w = os.pipe()
        f = afork.Fork.new().send_arg("a").send_fh(r)
        one = f.fork().send_arg("one")
        f.send_arg("b").send_fh(w)
        two = f.fork()
        os.close(r)
        os.close(w)
        what = "[a if isinstance(a, str) else a.mode for a in args]"
        assert await ask(one, what) == ["a", "rb", "one"]
        assert await ask(two, what) == ["a", "rb", "b", "wb"]
        assert await ask(f, what) == ["a", "rb", "b", "wb"]

    arun(main)


def test_closed_handles_of_a_child_are_its_own(arun):
    async def main():
        r, w = os.pipe()
        f = afork.Fork.new().send_fh(w)
        os.close(w)
        a = f.fork()
        assert await ask(a, "args[0].close()") is None
        assert await ask(f, "args[0].write(b'open')") == 4
        with open(r, "rb") as file:
            assert file.read() == b"open"

    arun(main)


def test_tree_of_depth_4(arun):
    async def main():
        root = afork.Fork.new_exec().eval("path = ['root']")
        f, line = root, [root]
        for depth in range(4):
            f = f.fork().eval("path.append(int(args[0]))", str(depth))
            line.append(f)
        for f in line:
            await f.ready()
        pids = [f.pid for f in line]
        assert [parent_of(pid) for pid in pids] == [os.getpid(), *pids[:-1]]
        # the last first: a process that has forked runs as a copy
        assert await ask(line[-1], "path") == ["root", 0, 1, 2, 3]
        assert await ask(line[2].fork(), "path") == ["root", 0, 1]
        assert await ask(line[1], "path") == ["root", 0]

    arun(main)


def test_every_process_of_a_tree_ends_with_status(arun):
    async def main():
        root = afork.Fork.new().eval("import os")
        a = root.fork()
        b = a.fork()
        c = b.fork()
        await c.ready()
        for f, code in ((c, 3), (b, 2), (a, 1)):
            f.eval("def end(sock, code): os._exit(int(code))").send_arg(str(code))
            (await f.run("end")).close()
        assert [await f.wait() for f in (a, b, c)] == [1, 2, 3]
        assert [f.returncode for f in (a, b, c)] == [1, 2, 3]
        root.close()
        assert await root.wait() == 0

    arun(main)


def test_a_process_that_has_forked_runs_as_a_copy(arun):
    async def main():
        f = await afork.Fork.new().ready()
        original = f.pid
        child = await f.fork().ready()
        assert parent_of(child.pid) == original
        pid, parent = await ask(f, "(os.getpid(), os.getppid())")
        assert parent == original
        assert pid == f.pid != original
        assert await f.wait() == 0
        # the original is still there, and reports its child
        assert parent_of(child.pid) == original
        assert await ask(child, "os.getppid()") == original
        assert await child.wait() == 0

    arun(main)


def test_the_silent_reaper_goes_with_its_last_child(arun):
    async def main():
        f = await afork.Fork.new().ready()
        with open(os.pidfd_open(f.pid), "rb") as reaper:
            child = await f.fork().ready()
            assert await ask(f, "1") == 1
            assert await f.wait() == 0
            loop = asyncio.get_running_loop()
            gone = loop.create_future()
            loop.add_reader(reaper, lambda: gone.done() or gone.set_result(True))
            try:
                await child.ready()
                assert not gone.done()
                child.close()
                assert await child.wait() == 0
                assert await gone
            finally:
                loop.remove_reader(reaper)

    arun(main)


def test_fork_many(arun):
    async def main():
        f = afork.Fork.new().eval("x = 1").send_arg("shared")
        processes = f.fork_many(10)
        assert len({id(p) for p in processes}) == 10
        for n, p in enumerate(processes):
            p.send_arg(str(n))
        answers = await asyncio.gather(*(ask(p, "(args, x)") for p in processes))
        assert answers == [(("shared", str(n)), 1) for n in range(10)]
        assert len({p.pid for p in processes}) == 10
        assert [await p.wait() for p in processes] == [0] * 10

    arun(main)


def test_fork_many_none_one_and_wrong_numbers(arun):
    async def main():
        f = afork.Fork.new()
        assert f.fork_many(0) == []
        (one,) = f.fork_many(1)
        assert await ask(one, "42") == 42
        for n in (-1, 2**40):
            with pytest.raises(ValueError, match=f"n must be 0 to 4194304: {n}"):
                f.fork_many(n)
        with pytest.raises(TypeError, match="float"):
            f.fork_many(2.5)
        f.close()

    arun(main)


def test_fork_many_1000():
    """More than a request carries, and than the socket takes at once."""

    async def main():
        r, w = os.pipe()
        f = afork.Fork.new_exec().eval("import os").send_fh(w)
        os.close(w)
        f.eval("def count(sock, out): out.write(b'.')")
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        total = 1000 if limit >= 4096 else 200  # each takes three here
        processes = f.fork_many(total)
        for p in processes:
            p.run("count")
        f.close()
        codes = await asyncio.gather(*(p.wait() for p in processes))
        assert codes == [0] * total
        assert len({p.pid for p in processes}) == total
        with open(r, "rb") as file:
            assert file.read() == b"." * total
        assert await f.wait() == 0

    asyncio.run(asyncio.wait_for(main(), 30))


def test_fork_many_without_a_loop(run_script):
    """Configuring waits for the socket: there is nobody else to send it."""
    run_script(
        """
        import asyncio, os
        import afork

        r, w = os.pipe()
        template = afork.Fork.new().send_fh(w).eval("def f(s, w, n): w.write(n)")
        inner, other = template.fork_many(2)
        other.close()
        for process in inner.fork_many(3):
            process.send_arg(b"x").run("f")
        os.close(w)
        template.close()
        inner.close()
        del process
        assert os.read(r, 1) == b"x"
        assert len(os.read(r, 1) + os.read(r, 1)) == 2
        os.close(r)
        """.replace("\n        ", "\n"),
    )


def test_fork_many_of_one_whose_socket_is_to_come(arun):
    """Configured, forked and closed before it is there."""

    async def main():
        f = afork.Fork.new().eval("x = 1")
        first, second, third = f.fork_many(3)
        assert second.pid is None
        one, two = first.eval("x += 1").fork_many(2)
        third.close()
        del second
        assert await asyncio.gather(ask(one, "x"), ask(two, "x")) == [2, 2]
        first.close()
        assert await third.wait() == 0
        assert await first.wait() == 0
        f.close()
        assert await f.wait() == 0

    arun(main)


def test_fork_many_handed_over(arun):
    """A template is not given away before its children's sockets are here."""

    async def main():
        f = afork.Fork.new()
        children = f.fork_many(50)
        other = afork.Fork.new_from_fh(await f.to_fh())
        assert await asyncio.gather(*(ask(c, "7") for c in children)) == [7] * 50
        assert await ask(other.fork(), "8") == 8
        other.close()

    arun(main)


def test_fork_after_run_is_refused(arun):
    async def main():
        f = afork.Fork.new()
        (await f.run("os.getpid")).close()
        with pytest.raises(afork.ClosedError, match="fork after run"):
            f.fork()
        with pytest.raises(afork.ClosedError, match="fork_many after run"):
            f.fork_many(2)

    arun(main)


def test_subclass_stays_what_it_is(arun):
    class Mine(afork.Fork):
        pass

    async def main():
        f = Mine.new()
        g = f.fork()
        assert type(f) is type(g) is Mine
        assert type(Mine()) is Mine
        assert await ask(g, "1") == 1

    arun(main)


def test_fork_of_the_default_template_shares_what_it_has_loaded(arun):
    async def main():
        default = afork.Fork.default().eval("shared = 1").require("fractions")
        assert await ask(afork.Fork.new(), "shared") == 1
        assert await ask(afork.Fork(), "fractions.__name__") == "fractions"
        assert await ask(default.fork(), "shared") == 1

    arun(main)


def test_processes_hold_no_socket_of_siblings(arun):
    """A second holder would hide the end of a process."""

    async def main():
        template = afork.Fork.new_exec()
        a, b, c = template.fork_many(3)
        for f in (a, b, c):
            await f.ready()
        assert await ask(c, "len(os.listdir('/proc/self/fd'))") == 5
        sock = await b.eval("def f(sock): sock.recv(1)").run("f")
        a.kill()
        assert await a.wait() == -9
        b.kill()
        assert await read_all(sock) == b""
        template.close()

    arun(main)


def test_random_numbers_differ(arun):
    async def main():
        f = afork.Fork.new().require("random", "uuid", "ssl")
        what = "(random.random(), str(uuid.uuid4()), ssl.RAND_bytes(8))"
        answers = [await ask(p, what) for p in f.fork_many(3)]
        for column in zip(*answers, strict=True):
            assert len(set(column)) == 3

    arun(main)
