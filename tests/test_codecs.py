"""Codecs: what they make of values, their names, what an error leaves behind."""

from __future__ import annotations

import importlib.util
import json
import marshal
import math
import os
import pickle
import sys
import types
from pickle import PickleBuffer

import pytest
from hypothesis import given
from hypothesis import strategies as st

from afork import ProtocolError
from afork.rpc import _bulk
from afork.rpc._bulk import BULK
from afork.rpc._codecs import close_all, codec_name, find_codec

from .conftest import need, open_descriptors
from .test_limits import free_slots

PICKLE = find_codec("pickle")
NAMES = ["pickle", "json", "bytes"]
if importlib.util.find_spec("cloudpickle"):
    NAMES.append("cloudpickle")


def through(value, codec=PICKLE):
    """The value as the other side gets it, and the descriptors it took."""
    payload, fds = codec.encode(value)
    assert len(payload) < BULK
    assert type(payload) is bytes
    assert not any(os.get_inheritable(fd) for fd in fds)
    return codec.decode(payload, fds), fds


# -- round trips

plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)
objects = st.recursive(
    plain
    | st.binary()
    | st.complex_numbers(allow_nan=False)
    | st.decimals(allow_nan=False),
    lambda inner: st.tuples(inner, inner) | st.frozensets(st.integers()),
)


@given(objects)
def test_pickle_returns_what_it_was_given(value):
    assert through(value) == (value, ())


@given(plain)
def test_json_returns_what_it_was_given(value):
    assert through(value, find_codec("json")) == (value, ())


@given(st.lists(st.binary(max_size=300)))
def test_bytes_returns_what_it_was_given(value):
    assert through(tuple(value), find_codec("bytes")) == (tuple(value), ())


@given(objects)
def test_small_payloads_are_the_codecs_own_bytes(value):
    assert PICKLE.encode(value) == (pickle.dumps(value, 5), ())


def test_json_is_ascii_and_has_lone_surrogates():
    value = ["\ud800", "ä", 1.5, None]
    payload, fds = find_codec("json").encode(value)
    assert payload.isascii()
    assert find_codec("json").decode(payload, fds) == value


def test_bytes_takes_what_is_like_bytes():
    value = [b"a", bytearray(b"b"), memoryview(b"c")]
    assert through(value, find_codec("bytes"))[0] == (b"a", b"b", b"c")


@pytest.mark.parametrize("value", ["text", b"bytes", 5, None, ("text",), {b"a": 1}])
def test_bytes_refuses_everything_else(value):
    with pytest.raises(TypeError):
        find_codec("bytes").encode(value)


@pytest.mark.parametrize("name", ["json", "pickle", "bytes"])
@pytest.mark.parametrize("payload", [b"\xff", b"[", b"\x80\x05.", b"\x03a"])
def test_bytes_that_mean_nothing_are_an_error(name, payload):
    with pytest.raises(Exception):  # noqa: B017, PT011 - each has its own
        find_codec(name).decode(payload, ())


# -- large payloads


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("near", [-200, -20, -5, -4, -3, -2, -1, 0, 1, 2, 20])
def test_a_payload_around_the_limit(name, near):
    value = ("x" * (BULK + near),) if name == "json" else (b"x" * (BULK + near),)
    codec = find_codec(name)
    result, fds = through(value, codec)
    assert tuple(result) == value
    assert len(fds) == (len(codec.dumps(value)) >= BULK)


@pytest.mark.parametrize("name", NAMES)
def test_a_payload_of_megabytes(name):
    value = [b"x" * 5_000_000] if name == "bytes" else ["x" * 5_000_000, {"a": 1}]
    result, fds = through(value, find_codec(name))
    assert list(result) == value
    assert len(fds) == 1


# -- out-of-band buffers


@pytest.mark.parametrize("kind", [bytes, bytearray])
@pytest.mark.parametrize("near", [-1, 0, 1, 4096])
def test_buffers_from_the_limit_on_are_out_of_band(kind, near):
    data = kind(os.urandom(BULK + near))
    payload, fds = PICKLE.encode(["before", PickleBuffer(data), "after"])
    before, result, after = PICKLE.decode(payload, fds)
    assert (before, bytes(result), after) == ("before", bytes(data), "after")
    assert memoryview(result).readonly == (kind is bytes)
    # Small ones are in the pickle, which then is too large for the socket.
    assert payload[:1] == (b"L" if near < 0 else b"B")
    assert len(fds) == 1


def test_what_was_writable_is_copied_on_write():
    data = bytearray(BULK)
    payload, fds = PICKLE.encode((PickleBuffer(data), PickleBuffer(data)))
    one, two = PICKLE.decode(payload, fds)
    one[:3] = b"abc"
    assert bytes(two[:3]) == bytes(data[:3]) == bytes(3)


def test_what_was_read_only_is_read_only():
    (view,), _ = through([PickleBuffer(bytes(BULK))])
    with pytest.raises(TypeError):
        view[0] = 1


def test_a_sender_may_change_its_buffer_at_once():
    data = bytearray(b"a" * BULK)
    payload, fds = PICKLE.encode(PickleBuffer(data))
    data[:] = b"b" * BULK
    assert bytes(PICKLE.decode(payload, fds)) == b"a" * BULK


@pytest.mark.parametrize("count", [2, 16, 17, 18, 100])
def test_many_buffers_need_few_descriptors(count):
    values = [bytes([n]) * (BULK + n) for n in range(count)]
    result, fds = through([PickleBuffer(x) for x in values])
    assert [bytes(x) for x in result] == values
    assert len(fds) == min(count, 17)
    del result  # mappings


def test_received_buffers_keep_no_descriptor():
    before = len(open_descriptors())
    result = [through(PickleBuffer(bytes(BULK)))[0] for _ in range(20)]
    assert len(open_descriptors()) == before
    assert len(result) == 20


def test_a_large_pickle_with_large_buffers():
    value = ["x" * BULK, PickleBuffer(b"y" * BULK)]
    payload, fds = PICKLE.encode(value)
    assert payload[:1] == b"L"
    text, view = PICKLE.decode(payload, fds)
    assert (text, bytes(view)) == ("x" * BULK, b"y" * BULK)
    assert len(fds) == 2


def test_a_table_makes_a_payload_large():
    # The pickle alone would go by the socket, the table in front of it not.
    data = PickleBuffer(bytes(BULK))
    for size in range(BULK - 100, BULK):
        result, fds = through([b"x" * size, data])
        assert result[0] == b"x" * size
        assert len(fds) in (1, 2)


def test_numpy_arrays(run_script):
    need("numpy", bool(importlib.util.find_spec("numpy")), "numpy is not installed")
    run_script(
        """
        import numpy as np
        from afork.rpc._codecs import find_codec

        codec = find_codec("pickle")

        def through(value):
            payload, fds = codec.encode(value)
            return codec.decode(payload, fds), len(fds)

        for shape in [(), (0,), (5,), (200, 300), (70_000,), (2, 3, 90_000)]:
            for order in "CF":
                array = np.asarray(np.random.random(shape), order=order)
                (result,), n = through([array])
                assert np.array_equal(result, array)
                assert result.flags.f_contiguous == array.flags.f_contiguous
                assert n == (array.nbytes >= 256 << 10), (shape, n)
                if array.size:
                    result.ravel("K")[0] = 7  # writable
                array.flags.writeable = False
                assert not through(array)[0].flags.writeable or array.nbytes < 256 << 10

        strided = np.arange(400_000)[::3]
        assert np.array_equal(through(strided)[0], strided)
        records = np.zeros(70_000, dtype=[("a", "i4"), ("b", "f8")])
        assert through(records)[0].dtype == records.dtype
        objects = np.array([{}, [], None], dtype=object)
        assert through(objects)[0].tolist() == [{}, [], None]
        """.replace("\n        ", "\n"),
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
    )


# -- errors leave nothing behind (the fixture looks for descriptors)


class Unpicklable:
    def __reduce__(self):
        raise ValueError("not me")


def test_a_value_that_does_not_pickle():
    for value in (Unpicklable(), [PickleBuffer(bytes(BULK)), Unpicklable()]):
        with pytest.raises(ValueError, match="not me"):
            PICKLE.encode(value)
    with pytest.raises(TypeError, match="memoryview"):
        PICKLE.encode(memoryview(b"abc"))


def test_no_descriptor_left():
    values = ["x" * BULK, *(PickleBuffer(bytes(BULK)) for _ in range(20))]
    for n in range(18):
        with free_slots(n), pytest.raises(OSError, match="Too many open files"):
            PICKLE.encode(values)
    with free_slots(18):
        payload, fds = PICKLE.encode(values)
    assert len(PICKLE.decode(payload, fds)) == 21


def test_no_memory_left(monkeypatch):
    write, calls = os.write, []

    def failing(fd, data):
        calls.append(fd)
        if len(calls) == 3:
            raise OSError(28, os.strerror(28))
        return write(fd, data)

    monkeypatch.setattr(_bulk.os, "write", failing)
    with pytest.raises(OSError, match="No space left"):
        PICKLE.encode([PickleBuffer(bytes(BULK)) for _ in range(5)])
    assert len(calls) == 3


def test_descriptors_are_consumed_by_failures():
    for codec in map(find_codec, NAMES):
        payload, fds = codec.encode(
            [b"x" * BULK] if codec.name == "bytes" else "x" * BULK
        )
        with pytest.raises(ProtocolError):
            codec.decode(b"L", fds)
        _, fds = PICKLE.encode(PickleBuffer(bytes(BULK)))
        with pytest.raises(Exception):  # noqa: B017, PT011
            codec.decode(payload, fds)
    payload, fds = PICKLE.encode([PickleBuffer(bytes(BULK))])
    with pytest.raises(pickle.UnpicklingError):
        PICKLE.decode(payload[:-3], fds)


def test_buffers_are_nothing_for_a_codec_that_does_not_pickle():
    payload, fds = PICKLE.encode([PickleBuffer(bytes(BULK))])
    with pytest.raises(ProtocolError, match="knows none"):
        find_codec("json").decode(payload, fds)


def test_close_all_goes_on_after_an_error():
    one, two = os.pipe()
    os.close(one)
    close_all((one, two))


# -- codecs of the user


@pytest.fixture
def module(monkeypatch):
    module = types.ModuleType("codec_module")
    module.dumps = lambda value: repr(value)
    module.loads = lambda data: eval(data)
    monkeypatch.setitem(sys.modules, "codec_module", module)
    return module


class Json:
    @staticmethod
    def dumps(value):
        return json.dumps(value, ensure_ascii=False)

    @staticmethod
    def loads(data):
        assert type(data) is bytes
        return json.loads(data)


instance = Json()


def test_a_module_as_codec(module):
    assert codec_name(module) == "codec_module"
    codec = find_codec("codec_module")
    assert not codec.pickles
    for value in (1, "ä", ["x" * BULK]):
        assert through(value, codec)[0] == value


def test_a_class_or_an_instance_as_codec():
    assert codec_name(Json) == f"{__name__}:Json"
    assert codec_name(instance) == f"{__name__}:instance"
    for name in ("Json", "instance"):
        codec = find_codec(f"{__name__}:{name}")
        assert through(["ä", "x" * BULK], codec)[0] == ["ä", "x" * BULK]


def test_an_instance_in_another_module_than_its_class(module):
    module.mine = Json()
    assert codec_name(module.mine) == "codec_module:mine"
    assert find_codec("codec_module:mine").codec is module.mine


def test_modules_of_the_standard_library():
    assert codec_name(marshal) == "marshal"
    assert through((1, b"x" * BULK), find_codec("marshal"))[0] == (1, b"x" * BULK)
    # These are ours, which do more.
    assert codec_name(pickle) == "pickle"
    assert codec_name(json) == "json"


@pytest.mark.parametrize("name", ["pickle", "json", "bytes", "pkg.mod", "pkg.mod:a.b"])
def test_a_name_names_itself(name):
    assert codec_name(name) == name


@pytest.mark.parametrize("name", ["", "a\0b"])
def test_no_name(name):
    with pytest.raises(ValueError, match="not the name"):
        codec_name(name)


def test_objects_that_cannot_be_named(module, monkeypatch):
    class Local(Json):
        pass

    unknown = types.ModuleType("unknown")
    unknown.dumps = unknown.loads = print
    in_main = type("InMain", (Json,), {"__module__": "__main__"})
    monkeypatch.setattr(sys.modules["__main__"], "InMain", in_main, raising=False)
    for codec in (Local, Local(), Json(), unknown, in_main):
        with pytest.raises(TypeError, match="attribute of a module"):
            codec_name(codec)


@pytest.mark.parametrize("codec", [None, 5, print, math, object(), int])
def test_objects_that_are_no_codec(codec):
    with pytest.raises(TypeError, match="no function 'dumps'"):
        codec_name(codec)


def test_names_behind_which_there_is_no_codec():
    with pytest.raises(TypeError, match="no function 'dumps'"):
        find_codec("math")
    with pytest.raises(ModuleNotFoundError) as info:
        find_codec("no.such.module")
    assert repr(sys.path[-1]) in info.value.__notes__[0]
    with pytest.raises(AttributeError) as info:
        find_codec("json:Missing")
    assert json.__file__ in info.value.__notes__[0]


@pytest.mark.parametrize(
    ("made", "got"), [("ä", "ä".encode()), (b"x", b"x"), (bytearray(b"x"), b"x")]
)
def test_what_dumps_may_return(module, made, got):
    module.dumps = lambda value: made
    assert find_codec("codec_module").encode(None) == (got, ())


def test_what_dumps_may_not_return(module):
    module.dumps = lambda value: 5
    with pytest.raises(TypeError, match="has returned int"):
        find_codec("codec_module").encode(None)


# -- cloudpickle


@pytest.fixture
def cloudpickle():
    found = bool(importlib.util.find_spec("cloudpickle"))
    need("cloudpickle", found, "cloudpickle is not installed")
    return find_codec("cloudpickle")


def test_lambdas_and_closures(cloudpickle):
    n = 5
    (plus, data), fds = through(
        (lambda x: x + n, PickleBuffer(bytes(BULK))), cloudpickle
    )
    assert plus(1) == 6
    assert data.nbytes == BULK
    assert len(fds) == 1
    assert cloudpickle.pickles


def test_what_cloudpickle_has_made_is_a_plain_pickle(cloudpickle):
    payload, fds = cloudpickle.encode((lambda: 7, "x"))
    assert PICKLE.decode(payload, fds)[0]() == 7


def test_cloudpickle_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "cloudpickle", None)
    for use in (
        lambda: codec_name("cloudpickle"),
        lambda: find_codec("cloudpickle").encode(1),
    ):
        with pytest.raises(ModuleNotFoundError, match=r"afork\[cloudpickle\]"):
            use()


# -- what it costs


def test_little_is_loaded(run_script):
    done = run_script(
        "import sys\n"
        "import afork._child\n"
        "afork._child.prepare()\n"
        "before = set(sys.modules)\n"
        "import afork.rpc._codecs\n"
        "codec = afork.rpc._codecs.find_codec('pickle')\n"
        "assert codec.decode(*codec.encode((1, 'two'))) == (1, 'two')\n"
        "print(*sorted(set(sys.modules) - before))\n",
        flags=("-S",),
        env={"PYTHONPATH": os.path.dirname(os.path.dirname(_bulk._afork.__file__))},
    )
    new = set(done.stdout.split())
    assert "afork.rpc._codecs" in new
    assert not new & {"asyncio", "json", "logging", "pickle", "random", "re"}
    assert not new & {"afork._errors", "mmap", "threading", "typing", "weakref"}
