"""Objects that a template shares for good: what changes, and what does not."""

from __future__ import annotations

import asyncio
import decimal
import importlib.util
import sys
import sysconfig
import textwrap
from pathlib import Path

import pytest

import afork
from afork import _memory

from .conftest import need, read_all
from .scripts.api_ask import ask
from .scripts.memory_tools import DATA, SCAN, stats

SERVER = Path(sys.executable).with_name("afork-serve")

#: Whether there are immortal objects to be made.
IMMORTAL = sys.version_info >= (3, 12) and not sysconfig.get_config_var(
    "Py_GIL_DISABLED"
)


@pytest.fixture
def loop_factory():
    """What happens in the template is the same for every kind of loop."""
    return asyncio.new_event_loop


def test_it_chains(arun):
    async def main():
        template = afork.Fork.new_exec()
        assert template.eval("x = 1").freeze() is template
        await template.ready()
        found = await stats(template.fork())
        assert found["frozen"] is True
        assert found["gc_frozen"] > 1000
        if IMMORTAL:
            assert found["immortal"] == "used"
            assert found["immortal_objects"] > 5000
        else:
            assert found["immortal"] in ("Python before 3.12", "free-threaded Python")
            assert found["immortal_objects"] == 0
        template.close()

    arun(main)


def test_workers_read_without_copying(arun):
    async def main():
        plain = afork.Fork.new_exec().eval(DATA + SCAN)
        frozen = afork.Fork.new_exec().eval(DATA + SCAN).freeze()
        before, expected = await ask(plain.fork(), "cost()")
        for _ in range(2):
            after, result = await ask(frozen.fork(), "cost()")
            assert result == expected
            if IMMORTAL:
                # What was read has 50 MB; without, that is what a first scan copies.
                assert after < 1000
        assert before >= 0
        plain.close()
        frozen.close()

    arun(main)


@pytest.mark.skipif(not IMMORTAL, reason="no immortal objects")
def test_what_is_immortal(arun):
    """All that can be reached, what tp_traverse does not tell included."""
    code = """
    import sys, datetime
    class Class:
        "its doc"
        slot = "of the class " * 2
        def method(self, argument_name=("a default", [1.25])):
            local_name = "a constant " * 1
            return local_name, 123456.5, ("nested", 7654321)
    instance = Class()
    instance.attribute = "value" * 3
    value = {"key" * 5: {"inner" * 5: [frozenset({"member" * 5}), b"bytes" * 5]}}
    generator = (x for x in ["yielded" * 5])
    next(generator)

    def counts():
        code = Class.method.__code__
        objects = [
            Class, Class.__dict__["method"], Class.__name__, Class.__doc__, Class.slot,
            Class.__mro__, code, *code.co_consts, *code.co_names, code.co_names,
            code.co_filename, code.co_linetable, code.co_name, code.co_qualname,
            *Class.method.__defaults__, instance, instance.attribute,
            *value, *value.values(), generator, datetime, datetime.datetime,
            sys.modules, sys.path, int.__mro__, *dict.__dict__.values(),
        ]
        inner = value["key" * 5]
        objects += [*inner, *inner["inner" * 5], *inner["inner" * 5][0]]
        return [repr(x)[:50] for x in objects if sys.getrefcount(x) < 1 << 30]
    """

    async def main():
        template = afork.Fork.new_exec().eval(code)
        assert len(await ask(template.fork(), "counts()")) > 10
        frozen = afork.Fork.new_exec().eval(code).freeze()
        assert await ask(frozen.fork(), "counts()") == []
        # And what is made in the worker is mortal.
        assert await ask(frozen.fork(), "sys.getrefcount([]) < 5") is True
        template.close()
        frozen.close()

    arun(main)


@pytest.mark.skipif(not IMMORTAL, reason="no immortal objects")
def test_what_is_loaded_after_the_call_is_shared_as_well(arun):
    async def main():
        template = afork.Fork.new_exec().freeze().eval("late = [['one']]")
        assert await ask(template.fork(), "sys.getrefcount(late[0]) > 1 << 30") is True
        # After the first fork it is not: its children have copies of it.
        template.eval("later = [['another']]")
        assert await ask(template.fork(), "sys.getrefcount(later[0]) < 100") is True
        assert await ask(template.fork(), "sys.getrefcount(late[0]) > 1 << 30") is True
        template.close()

    arun(main)


def test_after_a_spare_was_made_it_is_an_error(arun):
    """A spare is a fork that the user has not seen: the message names it."""

    async def main():
        template = await afork.Fork.new_exec().spares(1).ready()
        async with asyncio.timeout(10):
            while not (await template.stats())["spares"]["ready"]:
                pass
        template.freeze()
        with pytest.raises(afork.RemoteError, match=r"before spares\(\)"):
            await template.ready()
        template.close()

    arun(main)


def test_after_the_first_fork_it_is_an_error(arun):
    async def main():
        template = afork.Fork.new_exec()
        assert await ask(template.fork(), "1") == 1
        template.freeze()
        for f in (template, template.fork()):
            with pytest.raises(afork.RemoteError) as info:
                await f.ready()
            assert (info.value.stage, info.value.type) == ("set", "RuntimeError")
            assert info.value.message.startswith(
                "freeze() must come before the first fork"
            )
        template.close()

    arun(main)


def test_templates_of_a_frozen_one(arun):
    """Each can be frozen before its own first fork."""

    async def main():
        root = afork.Fork.new_exec().eval("a = ['a' * 50]").freeze()
        f = root.fork().eval("b = ['b' * 50]; a.append('c' * 50)").freeze()
        what = "[sys.getrefcount(x) > 1 << 30 for x in (a[0], a[1], b[0])]"
        assert await ask(f.fork(), what) == [IMMORTAL] * 3
        assert await ask(root.fork(), "len(a)") == 1
        f.close()
        root.close()

    arun(main)


def test_what_is_inherited_is_not_visited_again(arun):
    """Nor what was frozen before; what is new is found all the same."""
    late = """
    class Late:
        names = [["one" * 9], {"two" * 9: ("three" * 9,)}]
    flat = "four" * 9
    def refs():
        import sys
        one, two = Late.names
        found = (Late, Late.names, one[0], *two, *two.values(), flat, refs.__code__)
        return [sys.getrefcount(x) > 1 << 30 for x in found]
    """

    async def main():
        root = afork.Fork.new_exec().eval(DATA).freeze()
        all_of_it = await stats(root.fork())
        f = root.fork().eval(textwrap.dedent(late))
        assert await ask(f.fork(), "refs()") == [IMMORTAL] * 7
        new = await stats(f.fork())
        again = root.fork().fork()  # without having run anything
        assert (await stats(again))["visited_objects"] == all_of_it["visited_objects"]
        if IMMORTAL:
            assert all_of_it["visited_objects"] > 13_000  # the dictionaries
            assert new["visited_objects"] < 3000
            assert new["immortal_objects"] > all_of_it["immortal_objects"]
        else:
            assert all_of_it["visited_objects"] == new["visited_objects"] == 0
        # Asked for, it looks at everything: what was put into an older list, too.
        whole = root.fork().eval("data.append('late' * 9)").freeze()
        refcount = "__import__('sys').getrefcount(data[-1]) > 1 << 30"
        assert await ask(whole.fork(), refcount) is IMMORTAL
        found = await stats(whole.fork())
        assert (found["visited_objects"] > 13_000) is IMMORTAL
        root.close()
        f.close()

    arun(main)


def test_a_frozen_process_can_run_itself(arun):
    async def main():
        assert await ask(afork.Fork.new().eval("x = 3").freeze(), "x") == 3
        f = afork.Fork.default()
        assert f is not None
        g = f.fork().freeze()
        assert await ask(g.fork(), "1") == await ask(g, "1") == 1

    arun(main)


def test_a_plain_process_refuses():
    f = afork.Fork.new_exec(command=[SERVER])
    with pytest.raises(afork.AforkError, match="freeze needs a process in afork mode"):
        f.freeze()
    f.close()
    with pytest.raises(afork.ClosedError, match="freeze after close"):
        f.freeze()


def test_the_socket_still_ends_with_its_last_reference(arun):
    """The one object of a template that must not be immortal."""

    async def main():
        template = afork.Fork.new_exec().freeze()
        what = "sys.getrefcount(sock) < 100"
        assert await ask(template.fork(), what) is True
        template.close()

    arun(main)


# -- what workers of a frozen template do

OBJECTS = """
import array, gc, sys, weakref, collections, functools

class Dying(list):
    died = []
    def __del__(self):
        self.died.append(len(self))

class Node:
    __slots__ = ("next", "__weakref__")

old = Dying([1, 2])
cycle = Node(); cycle.next = cycle
ref = weakref.ref(cycle)
values = weakref.WeakValueDictionary(cycle=cycle)
seen = []
called = weakref.ref(old, lambda ref: seen.append(ref))
numbers = array.array("d", range(1000))
counter = collections.Counter("abracadabra")

def count():
    try:
        n = 0
        while True:
            n += (yield n) or 1
    finally:
        seen.append("closed")

generator = count()
next(generator)

@functools.lru_cache(10)
def fib(n):
    return n if n < 2 else fib(n - 1) + fib(n - 2)

fib(20)

def deep(n):
    return 0 if not n else 1 + deep(n - 1)

def nested(n):
    top = []
    for _ in range(n):
        top = [top]
    return top

tower = nested(100_000)
"""

BEHAVIOUR = {
    "collection": "[gc.collect() >= 0 and gc.collect(1) >= 0 for _ in range(3)] == [True] * 3",
    "garbage of its own": "[setattr(n, 'next', n) for n in [Node() for _ in range(50)]] and gc.collect() >= 40",
    "finaliser of its own": "Dying([1]).__class__ is Dying and Dying.died == [1]",
    "recursion": "deep(sys.getrecursionlimit() // 2) > 100",
    "deep structure": "str(type(nested(100_000))) and gc.collect() is not None",
    "weak references": "ref() is cycle and values['cycle'] is cycle and called() is old",
    "a new weak reference": "weakref.ref(old)() is old and weakref.getweakrefcount(old) >= 1",
    "generators": "[next(generator), generator.send(5), generator.close(), seen] == [1, 6, None, ['closed']]",
    "arrays": "(numbers.append(1.5), sum(numbers), len(numbers.tobytes())) == (None, 499501.5, 8008)",
    "caches": "fib(30) == 832040 and fib.cache_info().currsize == 10",
    "changes": "(old.append(3), old.pop(), counter.update('zz'), counter['z'], len(old)) == (None, 3, None, 2, 2)",
    "new attributes": "setattr(Node, 'extra', 'x' * 9) or Node().extra == 'x' * 9",
    "subclasses": "type('Sub', (Dying,), {})([1, 2]).pop() == 2 and len(Dying.__subclasses__()) <= 1",
    "unfreezing": "gc.unfreeze() or gc.collect() >= 0",
    "dying by name": "globals().pop('old') and globals().pop('tower') and gc.collect() >= 0",
}


@pytest.mark.parametrize("freeze", [True, False], ids=["frozen", "plain"])
def test_what_workers_do(arun, freeze):
    async def main():
        template = afork.Fork.new_exec().eval(OBJECTS)
        if freeze:
            template.freeze()
        answers = await asyncio.gather(
            *(ask(template.fork(), what) for what in BEHAVIOUR.values())
        )
        wrong = [
            name for name, answer in zip(BEHAVIOUR, answers, strict=True) if not answer
        ]
        assert not wrong
        template.close()

    arun(main)


def test_too_deep_recursion(arun):
    async def main():
        template = afork.Fork.new_exec().eval(OBJECTS).freeze()
        f = template.fork().eval("deep(10**6)")
        with pytest.raises(afork.RemoteError) as info:
            await f.ready()
        assert info.value.type == "RecursionError"
        assert await ask(template.fork(), "deep(100)") == 100
        template.close()

    arun(main)


@pytest.mark.skipif(not IMMORTAL, reason="no immortal objects")
def test_shared_objects_are_not_finalised(arun):
    """As the manual says."""

    async def main():
        template = afork.Fork.new_exec().eval(OBJECTS).freeze()
        what = "(globals().pop('old'), gc.collect()) and Dying.died"
        assert await ask(template.fork(), what) == []
        template.close()

    arun(main)


def test_numpy(arun):
    need("numpy", importlib.util.find_spec("numpy") is not None, "numpy is not here")
    code = """
    import numpy
    matrix = numpy.arange(250_000, dtype=float).reshape(500, 500)
    objects = numpy.array([{"a": i} for i in range(100)], dtype=object)
    view = matrix[::2]
    """

    async def main():
        template = afork.Fork.new_exec().eval(code).freeze()
        what = "(float((matrix @ matrix.T).trace()), objects[7], view.shape, bool(view.base is matrix.base))"
        expected = (
            float(sum(i * i for i in range(250_000))),
            {"a": 7},
            (250, 500),
            True,
        )
        for _ in range(2):
            assert await ask(template.fork(), what) == expected
        template.close()

    arun(main)


def test_types_of_extensions(arun):
    """Their objects are counted in C, some of them without the collector."""
    code = """
    import array, collections, ctypes, datetime, decimal, io, itertools, re
    import sqlite3, struct, zlib

    class Point(ctypes.Structure):
        _fields_ = [("x", ctypes.c_int), ("next", ctypes.c_void_p)]

    point, words = Point(3), (ctypes.c_char_p * 2)(b"a", b"b")
    when = datetime.datetime(2026, 11, 25, tzinfo=datetime.timezone.utc)
    price = decimal.Decimal("1.10")
    pattern = re.compile("(a+)(b*)")
    numbers, queue = array.array("i", range(1000)), collections.deque(range(9), 5)
    ordered = collections.OrderedDict.fromkeys("abc")
    default = collections.defaultdict(list, a=[1])
    database = sqlite3.connect(":memory:", check_same_thread=False)
    database.execute("create table t (n)")
    database.executemany("insert into t values (?)", [(i,) for i in range(100)])
    packer, text = struct.Struct("<IH"), io.StringIO("some text")
    counter, press = itertools.count(5), zlib.compressobj()

    def use():
        import gc
        found = []
        for _ in range(3):
            default["b"].append(2)
            ordered.move_to_end("a")
            queue.append(9)
            numbers.append(1)
            point.x += 1
            gc.collect()
        found += [point.x, words[1], str(when + datetime.timedelta(1)), price * 3]
        found += [pattern.match("aab").groups(), len(numbers), list(queue)]
        found += ["".join(ordered), dict(default), packer.pack(1, 2), text.read(4)]
        found += [database.execute("select sum(n) from t").fetchone(), next(counter)]
        found += [zlib.decompress(press.compress(b"x" * 99) + press.flush())]
        database.close()
        return repr(found)
    """

    async def main():
        template = afork.Fork.new_exec().eval(code).freeze()
        expected = repr(
            [
                *(6, b"b", "2026-11-26 00:00:00+00:00", decimal.Decimal("3.30")),
                *(("aa", "b"), 1003, [7, 8, 9, 9, 9], "bca"),
                {"a": [1], "b": [2, 2, 2]},
                *(b"\1\0\0\0\2\0", "some", (4950,), 5, b"x" * 99),
            ]
        )
        for _ in range(2):
            assert await ask(template.fork(), "use()") == expected
        template.close()

    arun(main)


def test_threads_in_the_template(arun):
    code = """
    import threading
    stop = threading.Event()
    def work():
        while not stop.is_set():
            d = {str(i): [i] for i in range(100)}
    threads = [threading.Thread(target=work, daemon=True) for _ in range(3)]
    for t in threads: t.start()
    """

    async def main():
        # That there are threads at a fork is deprecated, and that is said.
        template = afork.Fork.new_exec().eval(code).eval(OBJECTS).freeze()
        for _ in range(3):
            assert await ask(template.fork(), "fib(25)") == 75025
        template.eval("stop.set()\nfor t in threads: t.join()")
        await template.ready()
        template.close()

    arun(main)


# -- the default: gc.freeze


def test_every_template_is_frozen_for_the_collector(arun):
    async def main():
        template = afork.Fork.new_exec()
        first = (await stats(template.fork()))["gc_frozen"]
        assert first > 1000
        template.eval("more = [[] for _ in range(1000)]")
        assert (await stats(template.fork()))["gc_frozen"] >= first + 1000
        # Garbage of the time between is not kept.
        template.eval(
            """
            import gc, weakref
            class Cycle: pass
            gc.disable()
            gc.enable()
            it = Cycle(); it.it = it; ref = weakref.ref(it); del it
            """
        )
        assert await ask(template.fork(), "ref()") is None
        template.close()

    arun(main)


def test_perl_s_protocol_has_it_too(arun):
    async def main():
        f = afork.Fork.new_exec(command=[SERVER])
        f.eval(
            "def frozen(sock): import gc; sock.sendall(b'%d' % gc.get_freeze_count())"
        )
        assert int(await read_all(await f.fork().run("frozen"))) > 1000
        f.close()

    arun(main)


def test_stats_of_a_process_that_is_no_template():
    found = _memory.stats()
    assert found["collapse"] == "not yet"
    assert found["immortal"] == "not asked for"
    assert {type(x) for x in found.values()} <= {int, str, bool}
