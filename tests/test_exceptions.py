"""Exceptions that cross: what they keep, and what becomes of those that cannot."""

from __future__ import annotations

import asyncio
import importlib.util
import pickle
import sys
import traceback
from pickle import PickleBuffer

import pytest

import afork
from afork import ProtocolError, RemoteError, SharedBuffer, WorkerLost
from afork.rpc import _exceptions
from afork.rpc._bulk import BULK, put
from afork.rpc._codecs import find_codec
from afork.rpc._exceptions import (
    TEXT_MAX,
    decode_exception,
    encode_exception,
    note_search_path,
)

from .conftest import need, read_all
from .test_limits import free_slots

PICKLE = find_codec("pickle")
JSON = find_codec("json")


def raised(exc, cause=None):
    """The exception with a traceback."""
    try:
        if cause is None:
            raise exc
        raise exc from cause
    except BaseException as caught:
        return caught


def cross(exc, codec=PICKLE, stage="run"):
    """The exception as the other side gets it."""
    payload, fds = encode_exception(exc, codec, stage)
    assert type(payload) is bytes
    assert len(payload) < BULK
    return decode_exception(payload, fds, codec)


def remote_of(exc):
    """The RemoteError at the end of the chain."""
    while exc.__cause__ is not None:
        exc = exc.__cause__
    assert type(exc) is RemoteError
    return exc


class Keyword(Exception):
    """Pickles, and does not unpickle: a common mistake."""

    def __init__(self, a, b):
        super().__init__(a)
        self.b = b


class Reduced(Exception):
    """Its own way to pickle forgets what was added."""

    def __reduce__(self):
        return Reduced, self.args


class Readonly(Exception):
    def __setattr__(self, name, value):
        raise AttributeError("read-only")


class Falsy(Exception):
    def __bool__(self):
        return False


# -- what is kept


@pytest.mark.parametrize(
    "exc",
    [
        ValueError("text", 5),
        KeyError("x"),
        OSError(2, "No such file", "name"),
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "why"),
        TimeoutError(),
        Exception(),
        Falsy("x"),
        RemoteError("eval", "X", "message", "trace\n"),
        WorkerLost("gone", 5, 9, stderr="oops\n"),
        afork.TemplateError("gone", 5, 256),
        asyncio.IncompleteReadError(b"ab", 5),
        TimeoutError("x"),
    ],
)
def test_type_and_arguments(exc):
    got = cross(raised(exc))
    assert type(got) is type(exc)
    assert (got.args, str(got)) == (exc.args, str(exc))
    assert got.__dict__ == exc.__dict__
    remote = remote_of(got)
    assert remote.stage == "run"
    assert remote.type.endswith(type(exc).__qualname__)
    assert remote.message == str(exc)
    assert "in raised" in remote.traceback


def test_attributes_and_notes():
    exc = ValueError("x")
    exc.add_note("one")
    exc.add_note("two\nlines")
    exc.extra = {"a": [1]}
    got = cross(exc)
    assert got.__notes__ == ["one", "two\nlines"]
    assert got.extra == {"a": [1]}
    assert "two\nlines" in remote_of(got).traceback


def test_notes_survive_a_class_that_forgets_them():
    exc = Reduced("x")
    exc.add_note("note")
    assert cross(exc).__notes__ == ["note"]


def test_notes_that_are_none():
    for notes in ("text", 5, None, [5, "kept"]):
        exc = ValueError("x")
        exc.__notes__ = notes
        got = cross(exc)
        assert type(got) in (ValueError, RemoteError)


def test_read_only_exceptions():
    got = cross(raised(Readonly("x"), KeyError("cause")))
    assert type(got) is Readonly
    assert type(got.__cause__) is KeyError
    assert type(got.__cause__.__cause__) is RemoteError


def test_causes():
    exc = raised(ValueError(1), raised(KeyError(2), raised(Falsy(3))))
    exc.__cause__.add_note("in the middle")
    got = cross(exc)
    chain = [got, got.__cause__, got.__cause__.__cause__]
    assert [type(x) for x in chain] == [ValueError, KeyError, Falsy]
    assert chain[1].__notes__ == ["in the middle"]
    remote = chain[2].__cause__
    assert (remote.type, remote.message) == ("ValueError", "1")
    for name in ("ValueError: 1", "KeyError: 2", "Falsy: 3"):
        assert name in remote.traceback


def test_suppressed_contexts():
    def context(end):
        try:
            try:
                raise KeyError("context")
            except KeyError:
                end()
        except ValueError as exc:
            return exc

    def plain():
        raise ValueError("x")

    def suppressed():
        raise ValueError("x") from None

    got = cross(context(plain))
    assert not got.__suppress_context__
    assert "KeyError: 'context'" in remote_of(got).traceback
    got = cross(context(suppressed))
    assert got.__suppress_context__
    assert "KeyError" not in remote_of(got).traceback


def test_the_remote_traceback_is_printed_above_ours():
    got = cross(raised(ValueError("x"), KeyError("y")))
    text = "".join(traceback.format_exception(raised(got)))
    first = text.index("In the process:")
    assert first < text.index("\nKeyError: 'y'") < text.rindex("\nValueError: x")


def test_our_own_frames_are_not_shown():
    source = "def call(func):\n    func()\n"
    path = _exceptions.__file__.replace("_exceptions", "_invented")
    ours: dict = {}
    exec(compile(source, path, "exec"), ours)

    def user():
        ours["call"](lambda: 1 / 0)

    try:
        ours["call"](user)
    except ZeroDivisionError as exc:
        exc.__traceback__ = exc.__traceback__.tb_next  # this function's
        text = remote_of(cross(exc)).traceback
    # From the user's on everything is shown.
    assert text.count("_invented") == 1
    assert text.index("in user") < text.index("_invented")


def test_an_exception_of_megabytes():
    exc = ValueError(b"x" * 3_000_000)
    payload, fds = encode_exception(exc, PICKLE)
    assert len(fds) == 1
    assert decode_exception(payload, fds, PICKLE).args == exc.args


def test_exceptions_with_codecs_that_do_not_pickle():
    exc = raised(ValueError("x"), KeyError("y"))
    for name in ("json", "bytes", "marshal"):
        got = cross(exc, find_codec(name), "init")
        assert type(got) is RemoteError
        assert (got.stage, got.type, got.message) == ("init", "ValueError", "x")
        assert "KeyError: 'y'" in got.traceback
        assert got.__cause__ is None


def test_cloudpickle():
    found = bool(importlib.util.find_spec("cloudpickle"))
    need("cloudpickle", found, "cloudpickle is not installed")
    exc = ValueError("x")
    exc.func = lambda: 5
    assert type(cross(exc)) is RemoteError
    assert cross(exc, find_codec("cloudpickle")).func() == 5


# -- groups


class Group(ExceptionGroup):
    def derive(self, excs):
        return Group(self.message, excs)


class Unloadable(ExceptionGroup):
    def __new__(cls, errors, code):
        return super().__new__(cls, f"code {code}", errors)

    def __init__(self, errors, code):
        self.code = code


class OwnNew(Unloadable):
    def __reduce__(self):
        return OwnNew, (list(self.exceptions), self.code)


@pytest.mark.parametrize("cls", [ExceptionGroup, Group])
def test_groups(cls):
    inner = ExceptionGroup("inner", [OSError(2, "x")])
    exc = cls(
        "outer", [raised(ValueError(1), KeyError(2)), inner, raised(TypeError(3))]
    )
    exc.add_note("note")
    exc.exceptions[0].add_note("member's")
    exc.extra = 5
    got = cross(raised(exc, RuntimeError("cause")))
    assert type(got) is cls
    assert (got.message, got.extra, got.__notes__) == ("outer", 5, ["note"])
    one, two, three = got.exceptions
    assert (type(one), type(one.__cause__), one.__notes__) == (
        ValueError,
        KeyError,
        ["member's"],
    )
    assert (two.message, two.exceptions[0].errno) == ("inner", 2)
    assert three.args == (3,)
    assert type(got.__cause__) is RuntimeError
    assert "TypeError: 3" in remote_of(got).traceback


def test_members_that_cannot_be_loaded():
    got = cross(
        ExceptionGroup(
            "g", [Keyword(1, 2), ValueError(3), ExceptionGroup("h", [Keyword(4, 5)])]
        )
    )
    one, two, three = got.exceptions
    assert (type(one), one.message) == (RemoteError, "1")
    assert one.type.endswith("Keyword")
    assert type(two) is ValueError
    assert type(three.exceptions[0]) is RemoteError


def test_groups_with_a_constructor_of_their_own():
    got = cross(OwnNew([ValueError(1)], 7))
    assert (type(got), got.code, got.message) == (OwnNew, 7, "code 7")


@pytest.mark.parametrize("member", [ValueError(1), Keyword(1, 2)])
def test_groups_that_cannot_be_loaded(member):
    for exc in (
        Unloadable([member, KeyError(2)], 7),
        type("Local", (ExceptionGroup,), {})("code 7", [member, KeyError(2)]),
    ):
        exc.add_note("note")
        got = cross(exc)
        assert (type(got), got.message) == (ExceptionGroup, "code 7")
        assert [type(x) for x in got.exceptions] == [
            ValueError if type(member) is ValueError else RemoteError,
            KeyError,
        ]
        assert got.__notes__ == ["note"]
        assert type(got.__cause__) is RemoteError


def test_groups_of_more_than_exceptions():
    got = cross(BaseExceptionGroup("g", [KeyboardInterrupt()]))
    assert (type(got), got.type) == (RemoteError, "BaseExceptionGroup")


def test_large_and_deep_groups():
    got = cross(ExceptionGroup("wide", [ValueError(n) for n in range(5000)]))
    assert len(got.exceptions) == 5000
    exc = ValueError("deep")
    for _ in range(5000):
        exc = ExceptionGroup("g", [exc])
    got = cross(exc)
    assert type(got) in (ExceptionGroup, RemoteError)


# -- what becomes a RemoteError


class Refuses(Exception):
    def __reduce__(self):
        raise self


class Exits(Exception):
    def __reduce__(self):
        raise SystemExit(3)


class Recurses(Exception):
    def __reduce__(self):
        return self.__reduce__()

    def __str__(self):
        return str(self)


class Nested(Exception):
    def __reduce__(self):
        return Nested, ([Nested()],)


class Replaced(Exception):
    def __reduce__(self):
        return str, ("no exception",)


class LoadExits(Exception):
    def __init__(self, *args):
        if args:
            raise SystemExit(3)


class NoStr(Exception):
    def __str__(self):
        raise ValueError("no")


_single = ValueError("single")


def get_single():
    return _single


def holding(value):
    exc = ValueError("x")
    exc.value = value
    return exc


def loading_exits():
    exc = LoadExits()
    exc.args = ("x",)
    return exc


@pytest.mark.parametrize(
    "make",
    [
        lambda: SystemExit(3),
        lambda: KeyboardInterrupt(),
        lambda: GeneratorExit(),
        lambda: asyncio.CancelledError(),
        # They would end whoever waits for the exception.
        lambda: StopIteration(5),
        lambda: StopAsyncIteration(),
        lambda: Keyword(1, 2),
        lambda: Refuses("x"),
        lambda: Exits("x"),
        lambda: Recurses("x"),
        lambda: Nested("x"),
        lambda: Replaced("x"),
        loading_exits,
        lambda: holding(lambda: 1),
        lambda: holding(sys),
        lambda: holding(SharedBuffer(1)),
        lambda: type("Local", (Exception,), {})("x"),
    ],
)
@pytest.mark.parametrize("codec", [PICKLE, JSON])
def test_others_become_text(make, codec):
    exc = raised(make(), None)
    got = cross(exc, codec, "encode result")
    assert type(got) is RemoteError
    assert got.stage == "encode result"
    assert got.type.split(".")[-1] == type(exc).__name__
    assert "Traceback" in got.traceback
    assert got.__cause__ is None
    # Down a chain it ends what crosses.
    got = cross(raised(ValueError("above"), exc), codec)
    if codec is PICKLE:
        assert type(got) is ValueError
        got = got.__cause__
    assert (type(got), got.type, got.message) == (RemoteError, "ValueError", "above")
    assert type(exc).__name__ in got.traceback


@pytest.mark.parametrize(
    ("exc", "reason"),
    [
        (Keyword(1, 2), "TypeError: "),  # its constructor
        (holding(lambda: 1), "Can't pickle"),
    ],
)
def test_why_it_became_text_is_noted(exc, reason):
    (note,) = cross(raised(exc)).__notes__
    assert note.startswith("afork: it could not be raised as itself: ")
    assert reason in note
    # Of those that never are, nobody wonders; and the chain's text has the rest.
    for other in (SystemExit(3), StopIteration(5)):
        assert not hasattr(cross(raised(other)), "__notes__")
    assert not hasattr(cross(raised(ValueError(1), exc)), "__notes__")


def test_a_message_that_cannot_be_made():
    got = cross(NoStr("x"))
    assert type(got) is NoStr
    remote = got.__cause__
    assert remote.message.startswith("<no message")
    assert remote.type.endswith("NoStr")


def test_an_exception_that_is_its_own_cause():
    exc = ValueError("x")
    exc.__cause__ = exc
    assert type(cross(exc).__cause__) is RemoteError
    one, two = ValueError(1), KeyError(2)
    one.__cause__, two.__cause__ = two, one
    got = cross(one)
    assert type(got.__cause__) is KeyError
    assert type(got.__cause__.__cause__) is RemoteError


def test_a_long_chain():
    exc = ValueError(0)
    for n in range(1, 5000):
        new = ValueError(n)
        new.__cause__ = exc
        exc = new
    got = cross(exc)
    assert got.args == (4999,)
    count = 0
    while type(got) is ValueError:
        got, count = got.__cause__, count + 1
    assert 100 < count <= 1000
    assert type(got) is RemoteError


def test_an_exception_that_loads_as_one_object(monkeypatch):
    monkeypatch.setattr(Reduced, "__reduce__", lambda self: (get_single, ()))
    for exc in (Reduced("x"), raised(Reduced("x"), Reduced("y"))):
        for _ in range(3):
            got = cross(exc)
            assert got is get_single()
            traceback.format_exception(got)  # ends


@pytest.mark.parametrize("codec", [PICKLE, JSON])
def test_texts_are_cut(codec):
    got = cross(
        type("T" * 1_000_000, (Exception,), {})("x" * 10_000_000 + "end"), codec
    )
    assert type(got) is RemoteError
    assert all(len(x) <= TEXT_MAX for x in (got.type, got.message, got.traceback))
    assert "bytes cut]" in got.message
    assert got.traceback.endswith("end\n")


def test_texts_are_cut_between_characters():
    for n in range(4):
        got = cross(KeyboardInterrupt("a" * n + "€" * 100_000))
        assert "\ufffd" not in got.message
        assert "\ufffd" not in got.traceback


def test_texts_that_are_no_utf_8():
    assert cross(SystemExit("\ud800")).message == "?"


def no_memory(*args):
    raise MemoryError


@pytest.mark.parametrize("codec", [PICKLE, JSON])
def test_no_memory_for_the_text(monkeypatch, codec):
    monkeypatch.setattr(afork._child, "_failure", no_memory)
    remote = remote_of(cross(ValueError("x"), codec))
    assert (remote.type, remote.message, remote.traceback) == ("ValueError", "", "")


def test_no_memory_for_the_exception(monkeypatch):
    monkeypatch.setattr(_exceptions._Encoder, "chain", no_memory)
    got = cross(ValueError("x"))
    assert (type(got), got.type, got.message) == (RemoteError, "ValueError", "x")


def test_no_memory_for_the_message(monkeypatch):
    exc = ValueError("x")
    with monkeypatch.context() as patch:
        patch.setattr(type(PICKLE), "encode", no_memory)
        payload, fds = encode_exception(exc, PICKLE)
    got = decode_exception(payload, fds, PICKLE)
    assert (type(got), got.type) == (RemoteError, "MemoryError")
    with monkeypatch.context() as patch:
        patch.setattr(_exceptions, "_pack_strings", no_memory)
        payload, fds = encode_exception(exc, JSON)
    got = decode_exception(payload, fds, JSON)
    assert (type(got), got.type) == (RemoteError, "MemoryError")


def test_no_descriptor_for_a_large_one():
    exc = ValueError("y" * BULK)
    traceback.format_exception(exc)  # has imported what it needs
    with free_slots(0):
        payload, fds = encode_exception(exc, PICKLE)
    assert not fds
    got = decode_exception(payload, fds, PICKLE)
    assert (type(got), got.type) == (RemoteError, "ValueError")


# -- hostile messages


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\x80\x05N.",
        pickle.dumps(5),
        pickle.dumps(("a", "b")),
        pickle.dumps((("a", "b", "c", "d"), ())),
        pickle.dumps((("a", "b", "c"), (), "")),
        pickle.dumps((("a", "b", "c", 5), (), "")),
        pickle.dumps((("a", "b", "c", "d"), 5, "")),
        pickle.dumps((("a", "b", "c", "d"), (5,), "")),
        b"\x01a\x01b\x01c",
        b"\x01a\x01b\x01c\x01d\x01e",
        b"\x01a\x01b\x01c\x09d",
    ],
)
@pytest.mark.parametrize("codec", [PICKLE, JSON])
def test_messages_that_are_not_about_an_exception(payload, codec):
    with pytest.raises(ProtocolError):
        decode_exception(payload, (), codec)
    with pytest.raises(ProtocolError):
        decode_exception(payload, (put(b"x"),), codec)


# -- where a name was searched


def test_the_search_path_is_noted():
    with pytest.raises(ModuleNotFoundError) as info:
        importlib.import_module("no.such")
    note_search_path(info.value)
    (note,) = info.value.__notes__
    assert all(repr(entry) in note for entry in sys.path)
    assert note in "".join(traceback.format_exception(info.value))


def test_the_file_of_the_module_is_noted():
    with pytest.raises(AttributeError) as info:
        traceback.missing  # noqa: B018
    note_search_path(info.value)
    assert traceback.__file__ in info.value.__notes__[0]


def test_other_errors_have_searched_nothing():
    exc = ValueError("x")
    note_search_path(exc)
    assert not hasattr(exc, "__notes__")


# -- WorkerLost


def test_worker_lost():
    exc = WorkerLost("the worker has died", 55, 11, stderr="one\ntwo\n")
    assert (exc.pid, exc.status, exc.signal, exc.stderr) == (55, 11, 11, "one\ntwo\n")
    assert str(exc) == (
        "the worker has died (pid 55, killed by SIGSEGV)\n\n"
        "Last on its standard error:\n  one\n  two"
    )
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        again = pickle.loads(pickle.dumps(exc, protocol))
        assert type(again) is WorkerLost
        assert again.args == exc.args
        assert again.__dict__ == exc.__dict__
        assert str(again) == str(exc)


@pytest.mark.parametrize(
    ("status", "signal"),
    [(None, None), (0, None), (3 << 8, None), (9, 9), (0x80 | 6, 6)],
)
def test_the_signal_of_worker_lost(status, signal):
    exc = WorkerLost("gone", 5, status)
    assert (exc.signal, exc.stderr) == (signal, "")
    assert "standard error" not in str(exc)


# -- in a process


def test_from_a_process(arun):
    code = """
    from afork.rpc._codecs import find_codec
    from afork.rpc._exceptions import encode_exception

    def fails():
        try:
            {}["key"]
        except KeyError as exc:
            raise LookupError("not there") from exc

    def worker(sock):
        try:
            fails()
        except LookupError as exc:
            sock.sendall(encode_exception(exc, find_codec("pickle"))[0])
    """

    async def main():
        sock = await afork.Fork.new().eval(code).run("worker")
        got = decode_exception(await read_all(sock), (), PICKLE)
        assert type(got) is LookupError
        assert type(got.__cause__) is KeyError
        # Code that was evaluated is shown.
        assert 'raise LookupError("not there") from exc' in remote_of(got).traceback

    arun(main)


def test_buffers_of_exceptions_are_in_their_pickle():
    exc = holding(PickleBuffer(bytearray(b"x" * BULK)))
    got = cross(exc)
    assert got.value == b"x" * BULK
