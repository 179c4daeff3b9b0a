"""Pending arguments, and the requests that consume them (EXEC and SPAWN)."""

import errno
import os
import struct

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from .reference import exec_payload, put_list

bounded = settings(max_examples=300, deadline=None, database=None, print_blob=True)


class Args:
    def __init__(self, ffi, lib):
        self.ffi, self.lib = ffi, lib
        self.a = ffi.new("struct afork_args *")
        lib.afork_args_init(self.a)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.lib.afork_args_free(self.a)

    def strings(self, kind, data: bytes):
        memory = self.ffi.new("uint8_t[]", data) if data else self.ffi.NULL
        walk = self.ffi.new("struct afork_strs *", (memory, memory + len(data)))
        return self.lib.afork_args_add_list(self.a, kind, walk[0])

    def handle(self, fd):
        return self.lib.afork_args_add_fd_take(self.a, fd)

    def content(self):
        found = []
        for i in range(self.a.n):
            arg = self.a.list[i]
            if arg.kind == self.lib.AFORK_ARG_LOST:
                found.append("lost")
            elif arg.kind == self.lib.AFORK_ARG_HANDLE:
                found.append(arg.fd)
            else:
                found.append(self.ffi.buffer(arg.data, arg.len)[:])
        return found


@pytest.fixture
def args(ffi, lib):
    with Args(ffi, lib) as args:
        yield args


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_order(args, lib):
    before = open_fds()
    fd = os.dup(0)
    assert args.strings(lib.AFORK_ARG_BYTES, put_list([b"a", b""])) == 0
    assert args.handle(fd) == 0
    assert args.strings(lib.AFORK_ARG_TEXT, put_list(["é".encode()])) == 0
    assert args.handle(lib.AFORK_LOSTFD) == 0
    assert args.content() == [b"a", b"", fd, "é".encode(), "lost"]
    kinds = [args.a.list[i].kind for i in range(args.a.n)]
    assert kinds[0] == kinds[1] == lib.AFORK_ARG_BYTES
    assert kinds[3] == lib.AFORK_ARG_TEXT
    assert args.a.handles == 2
    assert lib.afork_args_pop_fd(args.a) == lib.AFORK_LOSTFD
    lib.afork_args_drop(args.a, 1)
    assert lib.afork_args_pop_fd(args.a) == fd
    os.close(fd)  # it was given to us
    assert args.content() == [b"a", b""]
    lib.afork_args_drop(args.a, 100)
    assert args.a.n == args.a.handles == 0
    assert open_fds() == before


def test_cap(args, lib):
    before = open_fds()
    args.a.handles_max = 3
    assert [args.handle(os.dup(0)) for _ in range(5)] == [0] * 3 + [-errno.EMFILE] * 2
    assert args.handle(lib.AFORK_LOSTFD) == -errno.EMFILE
    assert open_fds() == before + 3
    lib.afork_args_drop(args.a, 1)
    assert args.handle(os.dup(0)) == 0
    lib.afork_args_free(args.a)
    assert open_fds() == before


def test_default_cap(args, lib):
    """Those that wait for run, and as many again for one request."""
    results = [args.handle(lib.AFORK_LOSTFD) for _ in range(129)]
    assert results == [0] * 128 + [-errno.EMFILE]


def test_tail(args, lib):
    def tail(n):
        return (
            lib.afork_args_tail_is_handles(args.a, n),
            lib.afork_args_tail_has_lost(args.a, n),
        )

    assert tail(0) == (1, 0)
    assert tail(1) == (0, 0)
    args.handle(lib.AFORK_LOSTFD)
    args.strings(lib.AFORK_ARG_BYTES, put_list([b"x"]))
    args.handle(os.dup(0))
    args.handle(os.dup(0))
    assert [tail(n) for n in range(6)] == [
        (1, 0),
        (1, 0),
        (1, 0),
        (0, 0),
        (0, 1),
        (0, 1),
    ]


@pytest.mark.parametrize("text", ["05", "8000", "0161ff", "ffffffffff"])
def test_malformed_list(args, lib, text):
    data = bytes.fromhex(text)
    assert args.strings(lib.AFORK_ARG_BYTES, data) == -errno.EPROTO


def test_no_memory(args, lib):
    strings = put_list([b"x"] * 40)
    for nth in range(1, 50):
        lib.shim.alloc_fail_at = nth
        r = args.strings(lib.AFORK_ARG_BYTES, strings)
        lib.afork_args_free(args.a)
        if r == 0:
            assert nth > 40
            break
        assert r == -errno.ENOMEM
    lib.shim_reset()
    before = open_fds()
    lib.shim.alloc_fail_at = 1
    assert args.handle(os.dup(0)) == -errno.ENOMEM
    assert open_fds() == before


class Request:
    """A decoded exec request, or a negative error."""

    def __init__(self, ffi, lib, data, args, environ=()):
        self.lib = lib
        memory = ffi.new("uint8_t[]", data) if data else ffi.NULL
        walk = ffi.new("struct afork_strs *", (memory, memory + len(data)))
        keep = [ffi.new("char[]", e) for e in environ]
        self.environ = ffi.new("char *[]", [*keep, ffi.NULL])
        self.q = ffi.new("struct afork_execreq *")
        self.r = lib.afork_execreq_get(self.q, walk[0], args.a, self.environ)
        self.error = self.r
        if self.r < 0:
            return
        x = self.q.exec

        def texts(array):
            found = []
            while array[len(found)]:
                found.append(ffi.string(array[len(found)]))
            return found

        self.argv, self.envp = texts(x.argv), texts(x.envp)
        self.program, self.search = ffi.string(x.program), ffi.string(x.search)
        self.cwd = ffi.string(x.cwd) if x.cwd else None
        self.fds = [(getattr(x.fds[i], "from"), x.fds[i].to) for i in range(x.nfds)]
        self.numbers = (x.cwd_fd, x.mask, x.group, x.session)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.lib.afork_execreq_free(self.q)


@pytest.fixture
def request_of(ffi, lib, args):
    made = []

    def make(data, environ=()):
        made.append(Request(ffi, lib, data, args, environ))
        return made[-1]

    yield make
    for request in made:
        lib.afork_execreq_free(request.q)


def test_smallest_request(request_of):
    r = request_of(exec_payload([b"/bin/true"]), [b"A=1"])
    assert r.error == 0
    assert r.argv == [b"/bin/true"]
    assert r.envp == [b"A=1"]
    assert r.program == b"/bin/true"
    assert r.search == b"/bin:/usr/bin"  # no PATH there
    assert r.cwd is None
    assert r.fds == []
    assert r.numbers == (-1, -1, -1, 0)
    assert r.q.handles == 0


def test_largest_request(request_of, args):
    args.handle(os.dup(0))  # not of this request
    fds = [os.dup(0) for _ in range(3)]
    for fd in fds:
        args.handle(fd)
    r = request_of(
        exec_payload(
            [b"prog", b"", b"x" * 1000],
            program=b"name",
            search=b"/a:/b",
            cwd=b"/tmp",
            env=[b"A=1", b"B="],
            handles=3,
            cwd_handle=1,
            mask=0o77,
            group=0,
            session=1,
            fds=[(0, 7), (2, 0), (-1 - 5, 8)],
        )
    )
    assert r.error == 0
    assert r.argv == [b"prog", b"", b"x" * 1000]
    assert r.envp == [b"A=1", b"B="]
    assert (r.program, r.search, r.cwd) == (b"name", b"/a:/b", b"/tmp")
    assert r.fds == [(fds[0], 7), (fds[2], 0), (5, 8)]
    assert r.numbers == (fds[1], 0o77, 0, 1)
    assert r.q.handles == 3
    assert args.a.n == 4  # they stay where they are


def test_search_path(request_of):
    """That of the environment that the program gets."""
    sent = exec_payload([b"x"], env=[b"PATH=/ignored"], search=b"/a:/b")
    assert request_of(sent, [b"PATH=/own"]).search == b"/a:/b"
    own = exec_payload([b"x"], search=b"/a:/b")
    assert request_of(own, [b"XPATH=1", b"PATH=/own", b"PATH=2"]).search == b"/own"
    assert request_of(own, [b"PATH="]).search == b""
    assert request_of(own, [b"PATHS=/x", b"PATH"]).search == b"/bin:/usr/bin"


def test_empty_environment(request_of):
    assert request_of(exec_payload([b"x"], env=[]), [b"A=1"]).envp == []


def test_lost_descriptor(request_of, args, lib):
    args.handle(lib.AFORK_LOSTFD)
    args.handle(os.dup(0))
    assert request_of(exec_payload([b"x"], handles=1)).error == 0
    assert request_of(exec_payload([b"x"], handles=2)).error == -errno.EMFILE


def head(**change):
    numbers = {
        "handles": 1,
        "cwd": -1,
        "mask": -1,
        "group": -1,
        "session": 0,
        "argc": 1,
        "envc": -1,
    }
    return struct.pack("=7i", *{**numbers, **change}.values())


GOOD = [head(), b"", b"/bin/true", b"", b"", b"true"]


@pytest.mark.parametrize(
    ("at", "change"),
    [
        (0, b""),
        (0, head()[:-1]),
        (0, head() + b"x"),
        (0, head(handles=-1)),
        (0, head(handles=2)),
        (0, head(handles=2**31 - 1)),
        (0, head(cwd=-2)),
        (0, head(cwd=1)),
        (0, head(argc=-1)),
        (0, head(argc=0)),
        (0, head(argc=2)),
        (0, head(argc=2**31 - 1)),
        (0, head(envc=-2)),
        (0, head(envc=1)),
        (0, head(envc=2**31 - 1)),
        (1, b"1234567"),
        (1, struct.pack("=2i", 1, 0)),
        (1, struct.pack("=2i", 0, -1)),
        (1, struct.pack("=2i", 2**31 - 1, 0)),
        (1, struct.pack("=2i", 0, 1) * 257),
        (2, b"nul\0inside"),
        (3, b"\0"),
        (4, b"\0"),
        (5, b"\0"),
    ],
)
def test_malformed_request(request_of, args, at, change):
    args.handle(os.dup(0))
    assert request_of(put_list(GOOD)).error == 0
    bad = [*GOOD[:at], change, *GOOD[at + 1 :]]
    assert request_of(put_list(bad)).error == -errno.EPROTO


def test_every_cut(request_of, args):
    args.handle(os.dup(0))
    data = exec_payload([b"x", b"y"], env=[b"A=1"], handles=1, fds=[(0, 3)])
    for cut in range(len(data)):
        assert request_of(data[:cut]).error == -errno.EPROTO
    assert request_of(data + b"\0").error == -errno.EPROTO
    assert request_of(data).error == 0


def test_request_without_memory(request_of, lib):
    data = exec_payload([b"x"], fds=[(-1, 3)])
    for nth in (1, 2, 3):
        lib.shim.alloc_fail_at = nth
        assert request_of(data).error == -errno.ENOMEM
    lib.shim.alloc_fail_at = 4
    assert request_of(data).error == 0


own = st.integers(-(2**31), -1)


@bounded
@given(
    st.lists(st.binary(max_size=9), max_size=5),
    st.lists(st.tuples(own, st.integers(0, 2**31 - 1)), max_size=4),
)
@example([b""], [(-(2**31), 2**31 - 1)])
def test_request_round_trip(ffi, lib, argv, fds):
    data = exec_payload(argv, program=b"p", fds=fds)
    with Args(ffi, lib) as args, Request(ffi, lib, data, args) as r:
        if any(b"\0" in text for text in argv):
            assert r.error == -errno.EPROTO
        else:
            assert r.error == 0
            assert r.argv == argv
            null = {lib.AFORK_EXEC_NULL: lib.AFORK_NULLFD}
            assert r.fds == [(null.get(old, -1 - old), new) for old, new in fds]
