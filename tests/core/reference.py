"""The protocol a second time, in plain Python: what the C core is compared with.

Also `Peer`, the application's end of a socket, for driving a server.
"""

import array
import os
import socket
import struct
from dataclasses import dataclass, field

HEAD = struct.Struct("=BI")
COMMANDS = {
    "EVAL": b"e",
    "ARGS": b"a",
    "HANDLE": b"h",
    "FORK": b"f",
    "RUN": b"r",
    "EVAL_TYPED": b"E",
    "TEXT": b"t",
    "IMPORT": b"m",
    "SET": b"s",
    "FORK_ID": b"F",
    "FORK_MANY": b"M",
    "SPARES": b"w",
    "STATS": b"q",
    "READY": b"y",
    "EXEC": b"x",
    "SPAWN": b"X",
}
REPORTS = {
    "STARTED": b"p",
    "STARTED_BARE": b"n",
    "ERROR": b"e",
    "RUNNING": b"r",
    "SOCKET": b"c",
    "STATS": b"q",
    "EXITED": b"x",
    "DONE": b"d",
    "FAILED": b"f",
    "SPAWNED": b"s",
    "SPAWNED_BARE": b"b",
}
# Where a descriptor rides: on a byte behind the frame, or on its header.
TO_PROCESS = {ord("h"): "behind", ord("F"): "first"}
TO_APPLICATION = {ord("p"): "first", ord("s"): "first", ord("c"): "first"}
FRAME_MAX = 16 << 20


class ProtocolError(Exception):
    pass


def put_ber(n: int) -> bytes:
    groups = [n & 0x7F]
    while n := n >> 7:
        groups.append(n & 0x7F | 0x80)
    return bytes(reversed(groups))


def get_ber(data: bytes) -> tuple[int, int]:
    """Return a number and how many bytes it took."""
    n = 0
    for used, byte in enumerate(data, 1):
        n = n << 7 | byte & 0x7F
        if not byte & 0x80:
            if n >= 1 << 32 or put_ber(n) != data[:used]:
                break
            return n, used
    raise ProtocolError


def put_list(strings) -> bytes:
    return b"".join(put_ber(len(s)) + s for s in strings)


def get_list(data: bytes) -> list[bytes]:
    strings = []
    while data:
        length, used = get_ber(data)
        data = data[used:]
        if length > len(data):
            raise ProtocolError
        strings.append(data[:length])
        data = data[length:]
    return strings


def frame(letter: bytes, payload: bytes = b"") -> bytes:
    return HEAD.pack(letter[0], len(payload)) + payload


@dataclass
class Reader:
    """Frames out of (byte, descriptors on it) pairs, one at a time.

    A descriptor is sent on the first byte of a header, but accepted on any: the
    kernel joins the bytes before it with its own, and nobody can tell.
    """

    carry: dict = field(default_factory=TO_PROCESS.copy)
    frame_max: int = FRAME_MAX
    frames: list = field(default_factory=list)  # (letter, payload, fd or None)
    error: str = ""
    data: bytearray = field(default_factory=bytearray)
    fd: object = None

    def feed(self, byte: int, fds=()) -> None:
        if not self.error:
            self.error = self.step(byte, fds)

    def step(self, byte: int, fds) -> str:
        data = self.data
        if len(fds) > 1:
            return "EPROTO"
        if len(data) < HEAD.size:
            if fds and self.fd is not None:
                return "EPROTO"
            data.append(byte)
            self.fd = fds[0] if fds else self.fd
            if len(data) < HEAD.size:
                return ""
            letter, length = HEAD.unpack(data)
            if (self.carry.get(letter) == "first") != (self.fd is not None):
                return "EPROTO"
            if length > self.frame_max:
                return "EMSGSIZE"
        elif len(data) == HEAD.size + HEAD.unpack_from(data)[1]:
            if byte or not fds:  # it should have been the descriptor's
                return "EPROTO"
            self.fd = fds[0]
            self.deliver()
            return ""
        else:
            if fds:
                return "EPROTO"
            data.append(byte)
        letter, length = HEAD.unpack_from(data)
        if len(data) == HEAD.size + length and self.carry.get(letter) != "behind":
            self.deliver()
        return ""

    def deliver(self) -> None:
        self.frames.append((self.data[0], bytes(self.data[HEAD.size :]), self.fd))
        self.data.clear()
        self.fd = None


LINK_HEAD = struct.Struct("=IBBHQ")
LINK_FRAME_MAX = 1 << 20


def link_frame(kind=0, number=0, payload=b"", nfds=0, zero=0) -> bytes:
    return LINK_HEAD.pack(len(payload), kind, nfds, zero, number) + payload


def recvmsgs(sends, size=1 << 16):
    """Yield what calls of recvmsg give after these sends, as Linux does it.

    It joins sends, up to the end of the first that has descriptors; these come
    with the first part of a send that does not fit.
    """
    queue = [(bytes(data), tuple(fds)) for data, fds in sends]
    while queue:
        got, received = b"", ()
        while queue and len(got) < size and not received:
            data, received = queue.pop(0)
            taken = size - len(got)
            got += data[:taken]
            if data[taken:]:
                queue.insert(0, (data[taken:], ()))
        yield got, received


@dataclass
class LinkReader:
    """Frames of a link out of what each recvmsg gave: bytes and descriptors."""

    frames: list = field(default_factory=list)  # (kind, number, payload, fds)
    error: str = ""
    data: bytes = b""
    fds: tuple = ()  # for a frame whose head is not complete
    head: tuple | None = None  # of the frame that is not complete
    head_fds: tuple = ()

    def feed(self, data: bytes, fds=()) -> None:
        if not self.error:
            self.error = self.step(data, fds)

    def step(self, data: bytes, fds) -> str:
        self.data += data
        fds = tuple(fds)
        while True:
            if self.head is None:
                if len(self.data) < LINK_HEAD.size:
                    break
                head = LINK_HEAD.unpack_from(self.data)
                length, _, nfds, zero, _ = head
                if zero or length > LINK_FRAME_MAX:
                    return "EPROTO"
                if nfds or self.fds:
                    # Those that came with the first part of this head, or new.
                    mine, fds = (self.fds, fds) if self.fds else (fds, ())
                    if len(mine) != nfds:
                        return "EPROTO"
                    self.head_fds, self.fds = mine, ()
                self.head = head
                self.data = self.data[LINK_HEAD.size :]
            length, kind, _, _, number = self.head
            if len(self.data) < length:
                break
            payload, self.data = self.data[:length], self.data[length:]
            self.frames.append((kind, number, payload, self.head_fds))
            self.head, self.head_fds = None, ()
        if fds:  # for a frame that has begun, whose head is not complete
            if self.fds or self.head is not None or not self.data:
                return "EPROTO"
            self.fds = fds
        return ""


class Peer:
    """The application's end: sends commands, takes reports, never waits long."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        sock.settimeout(20)

    def __enter__(self) -> "Peer":
        return self

    def __exit__(self, *exc) -> None:
        self.sock.close()

    def send(self, letter: str, payload: bytes = b"", *fds: int) -> None:
        """Send one command by name, fds where its letter says."""
        data = frame(COMMANDS[letter], payload)
        if TO_PROCESS.get(data[0]) == "first":
            socket.send_fds(self.sock, [data], fds)
            return
        self.sock.sendall(data)
        if fds:
            socket.send_fds(self.sock, [b"\0"], fds)

    def send_list(self, letter: str, *strings: bytes) -> None:
        self.send(letter, put_list(strings))

    def eval(self, *strings: bytes) -> None:
        self.send_list("EVAL", *strings)

    def handle(self, fd: int) -> None:
        self.send("HANDLE", b"", fd)

    def fork(self, number: int = 0) -> "Peer":
        """Ask for a fork, by id or the original's way; return its socket."""
        ours, theirs = socket.socketpair()
        with theirs:
            if number:
                self.send("FORK_ID", struct.pack("=Q", number), theirs.fileno())
            else:
                self.handle(theirs.fileno())
                self.send("FORK")
        return Peer(ours)

    def fork_many(self, *numbers: int) -> dict[int, "Peer"]:
        """Ask for several at once; return their sockets, which come back."""
        self.send("FORK_MANY", struct.pack(f"={len(numbers)}Q", *numbers))
        return dict(self.socket() for _ in numbers)

    def socket(self) -> tuple[int, "Peer"]:
        """Take one SOCKET report: its id, and the end that came with it."""
        ((_, number, fd),) = self.expect("SOCKET")
        return number, Peer(socket.socket(fileno=fd))

    def run(self, name: bytes) -> None:
        self.send("RUN", name)

    def exact(self, n: int) -> bytes:
        """Return n bytes that carry no descriptor; fewer at end of file."""
        data = b""
        while len(data) < n:
            try:
                more = self.sock.recv(min(n - len(data), 1 << 20))
            except ConnectionResetError:  # it left something of ours unread
                more = b""
            if not more:
                break
            data += more
        return data

    def report(self):
        """Return the next report as a tuple, its name first; None at the end."""
        try:
            head, fds, _, _ = socket.recv_fds(self.sock, 1, 9)
        except ConnectionResetError:  # it left something of ours unread
            return None
        if not head:
            return None
        letter, length = HEAD.unpack(head + self.exact(HEAD.size - 1))
        name = {v[0]: k for k, v in REPORTS.items()}[letter]
        assert len(fds) == (letter in TO_APPLICATION)
        return name, *parse(name, self.exact(length), fds)

    def reports(self) -> list:
        """Return all that comes until end of file."""
        found = []
        while report := self.report():
            found.append(report)
        return found

    def expect(self, *names: str) -> list:
        """Take one report for each of the names; closes pidfds."""
        got = [self.report() for _ in names]
        assert [r and r[0] for r in got] == list(names)
        return got

    def rest(self) -> bytes:
        """Return the bytes up to end of file."""
        return self.exact(1 << 62)


def parse(name: str, payload: bytes, fds) -> tuple:
    """Take the payload of a report apart."""
    match name:
        case "STARTED" | "SPAWNED":
            pid = struct.unpack_from("=I", payload, len(payload) - 4)[0]
            (fd,) = fds
            with open(f"/proc/self/fdinfo/{fd}") as info:
                pid_of_fd = [x for x in info if x.startswith("Pid:")]
            os.close(fd)
            # -1: it has ended and been reaped by now
            assert pid_of_fd[0].split()[1] in (str(pid), "-1")
            return struct.unpack("=I" if name == "STARTED" else "=QI", payload)
        case "SOCKET":
            return (*struct.unpack("=Q", payload), *fds)
        case "STARTED_BARE":
            return struct.unpack("=I", payload)
        case "SPAWNED_BARE":
            return struct.unpack("=QI", payload)
        case "ERROR":
            stage, number, *texts = (s.decode() for s in get_list(payload))
            assert len(texts) == 4
            return stage, int(number), *texts
        case "EXITED":
            number, pid, status, *usage = struct.unpack("=QIi18q", payload)
            return number, pid, status, usage
        case "FAILED":
            return struct.unpack("=QiB", payload)
        case "STATS":
            return (*struct.unpack_from("=Q", payload), payload[8:])
        case "DONE":
            return struct.unpack("=Q", payload[:8])
    assert not payload
    return ()


def exec_payload(
    argv,
    *,
    program=None,
    search=b"",
    cwd=b"",
    env=None,
    handles=0,
    cwd_handle=-1,
    mask=-1,
    group=-1,
    session=0,
    fds=(),
) -> bytes:
    """Encode the payload of EXEC; fds are (from, to), from >= 0 a handle."""
    envc = -1 if env is None else len(env)
    head = struct.pack(
        "=7i", handles, cwd_handle, mask, group, session, len(argv), envc
    )
    pairs = array.array("i", [n for pair in fds for n in pair]).tobytes()
    program = argv[0] if program is None else program
    return put_list([head, pairs, program, search, cwd, *argv, *(env or ())])
