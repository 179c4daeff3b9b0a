"""Pool: what it promises when nothing goes wrong, option by option."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import pickle
import threading
from functools import partial

import pytest

import afork

from .conftest import need
from .scripts.fault_tools import log  # noqa: F401 - a fixture
from .scripts.pool_tools import Seen, check, gone, turn


def test_call(arun, jobs):
    async def main():
        async with afork.Pool(max=2) as pool:
            assert await pool.call(jobs.add, 1) == 1
            assert await pool.call(jobs.add, 1, b=2) == 3
            assert await pool.call(jobs.echo, 1, x=2) == ((1,), {"x": 2})
            assert await asyncio.gather(
                *(pool.call(jobs.add, i, i) for i in range(100))
            ) == [2 * i for i in range(100)]
            check(pool)
            stats = pool.stats()
            assert 1 <= len(stats.pids) <= 2
            assert stats.counts.done == 103
            assert (stats.waiting, stats.running, stats.busy) == (0, 0, 0)
        assert pool.stats().pids == ()

    arun(main)


@pytest.mark.parametrize("name", [True, False])
def test_bound_to_a_function(arun, jobs, name):
    async def main():
        async with afork.Pool("pool_jobs.add" if name else jobs.add, max=1) as pool:
            assert await pool(1, b=2) == 3
            with pytest.raises(TypeError, match="function of its own"):
                pool.call(jobs.add, 1, 2)
            with pytest.raises(TypeError, match="argument"):
                await pool()
            assert [x async for x in pool.map(None, range(3))] == [0, 1, 2]
        async with afork.Pool(jobs.count, max=1) as pool:
            assert [x async for x in pool.stream(None, 40)] == list(range(40))
        async with afork.Pool(max=1) as pool:
            with pytest.raises(TypeError, match="use call"):
                pool(1)
            with pytest.raises(TypeError, match="function is needed"):
                pool.call("pool_jobs.add", 1)
            with pytest.raises(
                TypeError, match=r"^with_options\(\) .*: x, y\. .*timeo"
            ):
                pool.with_options(y=1, retries=1, x=2)

    arun(main)


def test_exceptions(arun, jobs):
    async def main():
        async with afork.Pool(max=1) as pool:
            with pytest.raises(KeyError, match="x") as info:
                await pool.call(jobs.fail, KeyError, "x")
            assert isinstance(info.value.__cause__, afork.RemoteError)
            with pytest.raises(afork.RemoteError, match="SystemExit"):
                await pool.call(jobs.fail, SystemExit, 3)
            with pytest.raises(afork.RemoteError, match="StopIteration"):
                await pool.call(jobs.fail, StopIteration)
            with pytest.raises(Exception, match=r"pickle|local"):
                pool.call(lambda: 1)
            with pytest.raises(Exception, match="pickle"):
                pool.call(jobs.add, threading.Lock())
            pid = await pool.call(jobs.pid)
            assert pool.stats().pids == (pid,), "the same process all the time"
            assert pool.stats().counts.failed == 3
            check(pool)

    arun(main)


def test_streams(arun, jobs, tmp_path):
    path = str(tmp_path / "log")

    async def main():
        async with afork.Pool(max=1) as pool:
            assert [x async for x in pool.stream(jobs.count, 50)] == list(range(50))
            stream = pool.stream(jobs.count_and_fail, 5)
            assert [await anext(stream) for _ in range(5)] == list(range(5))
            with pytest.raises(ValueError, match="5"):
                await anext(stream)
            async with pool.stream(jobs.forever, path) as stream:
                assert [await anext(stream) for _ in range(30)] == list(range(30))
            pid = await pool.call(jobs.pid)  # behind its end
            assert (tmp_path / "log").read_text() == "closed\n"
            stream = pool.stream(jobs.forever, path)
            assert await anext(stream) == 0
            del stream
            assert await pool.call(jobs.pid) == pid, "closed, not killed"
            with pytest.raises(ValueError, match="neither"):
                pool.with_options(timeout=1).stream(jobs.count, 1)

    arun(main)


@pytest.mark.parametrize("load", [1, 3])
def test_priorities_and_order(arun, jobs, gate, tmp_path, load):
    path = str(tmp_path / "order")

    async def main():
        async with afork.Pool(max=1, load=load) as pool:
            seen = Seen()
            first = pool.with_options(on_event=seen).call(jobs.hold, gate.path)
            await seen.held(1)
            # The process has these already, if it may have more than one.
            fill = [pool.call(jobs.note, path, "fill") for _ in range(load - 1)]
            calls = [
                pool.with_options(priority=p).call(jobs.note, path, f"{p}{i}")
                for i, p in enumerate([0, 5, -1, 5, 0])
            ]
            check(pool)
            gate.open()
            await asyncio.gather(first, *fill, *calls)
        order = (tmp_path / "order").read_text().split()
        assert order == ["fill"] * (load - 1) + ["51", "53", "00", "04", "-12"]

    arun(main)


def test_sizes(arun, jobs, gate):
    """Grows to max under load, keeps idle ones ready, shrinks to idle."""

    async def main():
        async with afork.Pool(idle=1, max=3, stop=0.01) as pool:
            seen = Seen()
            view = pool.with_options(on_event=seen)
            await pool.call(jobs.pid)
            calls = [view.call(jobs.hold, gate.path)]
            await seen.held(1)
            # One is busy: another one is made ready, though nothing waits.
            while pool.stats().idle != 1:
                await asyncio.sleep(0)
            assert len(pool.stats().pids) == 2
            calls += [view.call(jobs.hold, gate.path) for _ in range(4)]
            await seen.held(3)
            check(pool)
            assert pool.stats().busy == 3
            assert pool.stats().waiting == 2
            gate.open(5)
            await asyncio.gather(*calls)
            while len(pool.stats().pids) > 1:
                await asyncio.sleep(0)
            check(pool)
            assert pool.stats().idle == 1

    arun(main)


def test_idle_ones_are_there_before_the_first_call(arun):
    async def main():
        async with afork.Pool(idle=2, max=3) as pool:
            while pool.stats().idle < 2:
                await asyncio.sleep(0)
            os.kill(pool.stats().pids[0], 9)
            while pool.stats().counts.started < 3 or pool.stats().idle < 2:
                await asyncio.sleep(0)
            assert pool.stats().counts.lost == 1

    arun(main)


def test_no_process_without_a_call(arun, jobs):
    async def main():
        async with afork.Pool(max=3, stop=0.01) as pool:
            await turn(5)
            assert pool.stats().counts.started == 0
            await pool.call(jobs.pid)
            while pool.stats().pids:
                await asyncio.sleep(0)
            assert await pool.call(jobs.add, 1) == 1

    arun(main)


def test_start_spaces_the_starts(arun, jobs, gate):
    async def main():
        for start, processes in ((0.01, 3), (1000, 1)):
            seen = Seen()
            async with afork.Pool(max=3, start=start, on_event=seen) as pool:
                calls = [pool.call(jobs.hold, gate.path) for _ in range(3)]
                await seen.held(processes)
                await turn(3)
                assert pool.stats().counts.started == processes
                gate.open(3)
                await asyncio.gather(*calls)

    arun(main)


def test_load(arun, jobs, gate):
    """More than one call at a time in a process, one after the other."""

    async def main():
        async with afork.Pool(max=1, load=4) as pool:
            seen = Seen()
            calls = [pool.with_options(on_event=seen).call(jobs.hold, gate.path)]
            calls += [pool.call(jobs.add, i) for i in range(5)]
            await seen.held(1)
            check(pool)
            assert (pool.stats().running, pool.stats().waiting) == (4, 2)
            gate.open()
            assert await asyncio.gather(*calls) == [None, 0, 1, 2, 3, 4]

    arun(main)


def test_asynchronous(arun, jobs):
    async def main():
        async with afork.Pool(max=2, load=5, asynchronous=True) as pool:
            pids = await asyncio.gather(*(pool.call(jobs.meet, 5) for _ in range(5)))
            assert len(set(pids)) == 1
            assert await pool.call(jobs.add_async, 1, b=2) == 3
            with pytest.raises(ValueError, match="synchronous"):
                pool.with_options(capture=True)
            seen = Seen()
            view = pool.with_options(on_event=seen, timeout=0.02)
            with pytest.raises(TimeoutError):
                await view.call(jobs.wait)
            call = pool.with_options(on_event=seen).call(jobs.wait)
            await seen.held(2)
            call.cancel()
            pid = await pool.call(jobs.meet, 6)
            assert pid == pids[0], "only its task has ended"
            assert pool.stats().counts.lost == 0
        async with afork.Pool(jobs.add_async, asynchronous=True) as pool:
            assert await pool(3, b=4) == 7

    arun(main)


def test_init_and_done(arun, jobs, tmp_path):
    path = tmp_path / "log"

    async def main():
        template = afork.Fork.new().send_arg("pending")
        options = {"init": jobs.init, "initargs": (1, [2]), "template": template}
        async with afork.Pool(max=1, **options) as pool:
            assert await pool.call(jobs.get_state) == ["pending", 1, [2]]
        options = {"init": "pool_jobs.init_done", "initargs": (str(path),)}
        async with afork.Pool(max=1, done=jobs.done, **options) as pool:
            pid = await pool.call(jobs.pid)
        assert path.read_text() == f"done {pid}\n"
        assert await template.fork().ready(), "a given template is not ended"

    arun(main)


@pytest.mark.parametrize("load", [1, 2])
def test_recycled_by_calls(arun, jobs, load):
    async def main():
        async with afork.Pool(max=1, load=load, max_calls=3) as pool:
            calls = [pool.call(jobs.pid) for _ in range(9)]
            pids = await asyncio.gather(*calls)
            assert [pids.count(x) for x in dict.fromkeys(pids)] == [3, 3, 3]
            assert pool.stats().counts.recycled == 3
            assert pool.stats().counts.lost == 0
            check(pool)

    arun(main)


def test_recycled_by_age_and_memory(arun, jobs):
    async def main():
        async with afork.Pool(max=1, max_age=1e-6) as pool:
            assert len({await pool.call(jobs.pid) for _ in range(3)}) == 3
        async with afork.Pool(max=1, max_rss=256 << 20) as pool:
            first = await pool.call(jobs.pid)
            assert await pool.call(jobs.grow, 400 << 20) == first
            assert await pool.call(jobs.pid) != first
            assert pool.stats().counts.recycled == 1

    arun(main)


@pytest.mark.parametrize("load", [1, 3])
def test_retire(arun, jobs, load):
    """A process that asks for it gets no further calls, and ends."""

    async def main():
        async with afork.Pool(max=1, load=load) as pool:
            calls = [pool.call(jobs.retire) for _ in range(load)]
            pids = await asyncio.gather(*calls)
            assert len(set(pids)) == 1
            assert await pool.call(jobs.pid) != pids[0]
            await gone(pids)
            assert pool.stats().counts.lost == 0

    arun(main)


def test_events(arun, jobs):
    async def main():
        everything, some = Seen(), Seen()
        async with afork.Pool(max=1, on_event=everything) as pool:
            first = pool.call(jobs.progress, 3)
            assert await first == 3
            assert [e.call_id for e in everything.all] == [first.id] * 3
            assert everything.args() == [("progress", i) for i in range(3)]
            await pool.with_options(on_event=some).call(jobs.progress, 2)
            assert len(everything.all) == 3
            assert some.args() == [("progress", 0), ("progress", 1)]

    arun(main)


def test_events_whose_callback_raises(arun, jobs):
    def bad(event):
        raise ZeroDivisionError

    async def main():
        told = Seen()
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda loop, context: told(context["exception"]))
        async with afork.Pool(max=1, on_event=bad) as pool:
            assert await pool.call(jobs.progress, 2) == 2
        assert [type(x) for x in told.all] == [ZeroDivisionError] * 2

    arun(main)


def test_capture_and_output(arun, jobs, capfd):
    async def main():
        async with afork.Pool(max=1) as pool:
            view = pool.with_options(capture=True)
            captured = await view.call(jobs.write, "x")
            assert captured == afork.Captured("x", b"x out\n", b"x err\n")
            assert captured.truncated is False
            much = await view.call(jobs.write, "x" * (17 << 20))
            assert much.truncated is True
            assert (len(much.stdout), len(much.stderr)) == (16 << 20, 16 << 20)
            assert much.stdout.endswith(b"x out\n")
            assert await pool.call(jobs.write, "y") == "y"
        out, err = Seen(), Seen()
        async with afork.Pool(max=1, stdout=out, stderr=err) as pool:
            await pool.call(jobs.write, "z")
            assert await out.first(1) == ["z out"]
            assert await err.first(1) == ["z err"]

    arun(main)
    assert "y out\n" in capfd.readouterr().out


def test_contextvars(arun, jobs):
    async def main():
        async with afork.Pool(max=1, contextvars=["pool_jobs:variable"]) as pool:
            assert await pool.call(jobs.get_variable) == "unset"
            token = jobs.variable.set("here")
            assert await pool.call(jobs.get_variable) == "here"
            jobs.variable.reset(token)
            assert await pool.call(jobs.get_variable) == "unset"
        with pytest.raises(TypeError, match="is not a context variable"):
            afork.Pool(contextvars=["pool_jobs:add"])
        with pytest.raises(ValueError, match="pickles"):
            afork.Pool(contextvars=["pool_jobs:variable"], codec="json")

    arun(main)


OPTIONS = [
    {"max": 0},
    {"load": 0},
    {"idle": 2, "max": 1},
    {"idle": -1},
    {"start": -1},
    {"stop": 0},
    {"stderr": "head"},
    {"codec": "no_such_codec"},
    {"func": lambda: 1},
    {"init": lambda: 1},
    {"init": "pool_jobs.init", "initargs": (threading.Lock(),)},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_options_that_mean_nothing(options):
    with pytest.raises((ValueError, TypeError, ImportError)):
        afork.Pool(**options)


def test_options_of_views(arun, jobs):
    async def main():
        async with afork.Pool(max=1) as pool:
            for bad in ({"timeout": 0}, {"timeout": -1}, {"no_such": 1}):
                with pytest.raises((ValueError, TypeError)):
                    pool.with_options(**bad)
            view = pool.with_options(priority=3).with_options(retries=1)
            assert view._options.priority == 3
            assert await view.call(jobs.add, 1) == 1

    arun(main)


def our_notes(exc):
    """What we add: pickle and json add their own from CPython 3.14 on."""
    notes = getattr(exc, "__notes__", [])
    return [note for note in notes if note.startswith("afork: ")]


def test_what_cannot_be_pickled_is_explained(arun, jobs):
    def inside():
        pass

    async def main():
        kinds = AttributeError, TypeError, pickle.PicklingError  # differ by version
        async with afork.Pool(max=1) as pool:
            for args, kwargs, advice in (
                ((lambda: 1,), {}, "top of a module, or give codec="),
                ((inside,), {}, "top of a module, or give codec="),
                ((partial(inside),), {}, "top of a module"),
                ((jobs.echo,), {"value": inside}, "top of a module"),
                ((jobs.echo, (x for x in ())), {}, "such as a list"),
                ((jobs.echo, [threading.Lock()]), {}, "such as a list"),
            ):
                with pytest.raises(kinds) as theirs:
                    pickle.dumps((args, kwargs))
                with pytest.raises(kinds) as info:
                    pool.call(*args, **kwargs)
                assert type(info.value) is type(theirs.value)
                (note,) = our_notes(info.value)
                assert advice in note
        with pytest.raises(TypeError) as info:
            afork.Pool(init=jobs.init, initargs=(threading.Lock(),))
        assert "such as a list" in our_notes(info.value)[0]
        async with afork.Pool(max=1, codec="json") as pool:
            with pytest.raises(TypeError) as info:
                pool.call(jobs.echo, 1)
            assert our_notes(info.value) == []

    arun(main)


def test_what_cloudpickle_cannot_send_either(arun):
    found = bool(importlib.util.find_spec("cloudpickle"))
    need("cloudpickle", found, "cloudpickle is not installed")

    async def main():
        async with afork.Pool(max=1, codec="cloudpickle") as pool:
            assert await pool.call(lambda: 1) == 1
            with pytest.raises(TypeError) as info:
                pool.call(lambda x: x, (x for x in ()))
            assert "such as a list" in our_notes(info.value)[0]

    arun(main)
