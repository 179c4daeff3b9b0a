"""A hostile peer, as a process: python fault_hostile.py KIND FD [SEED].

Speaks on FD to somebody who takes it for a process of afork. It knows the
protocol only from docs/protocol.rst and imports nothing of afork.
"""

import array
import contextlib
import os
import random
import socket
import struct
import sys

kind, number = sys.argv[1], int(sys.argv[2])
sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, 0, number)


def frame(letter, payload=b"", length=None):
    return (
        letter + struct.pack("=I", len(payload) if length is None else length) + payload
    )


def send_with_fds(data, fds):
    rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))
    sock.sendmsg([data], [rights])


def string_list(*strings):
    return b"".join(bytes([len(s)]) + s for s in strings)


def pid(number=None):
    return struct.pack("=I", os.getpid() if number is None else number)


def started(fd=None, who=None):
    """A report of the start, with whatever descriptor."""
    own = os.pidfd_open(os.getpid()) if fd is None else fd
    send_with_fds(frame(b"p", pid(who)), [own])
    if fd is None:
        os.close(own)


null = os.open(os.devnull, os.O_RDWR)

if kind == "random":
    rng = random.Random(int(sys.argv[3]))
    letters = b"pnerxdfsbc"
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        for _ in range(2000):
            n = rng.choice([0, 4, 8, 12, 13, 160, rng.randrange(300)])
            data = frame(bytes([rng.choice(letters)]), rng.randbytes(n))
            if rng.random() < 0.1:
                send_with_fds(data, [null] * rng.randrange(1, 4))
            elif rng.random() < 0.3:
                sock.sendall(frame(b"d", rng.randbytes(8)))
            else:
                sock.sendall(data)
elif kind == "garbage":
    sock.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n" * 100)
elif kind == "length":
    sock.sendall(frame(b"e", b"x" * 1000, 0xFFFFFFFF))
elif kind == "over":
    sock.sendall(frame(b"e", b"x" * 1000, (16 << 20) + 1))
elif kind == "slow":  # announced, within the cap, and never sent
    sock.sendall(frame(b"e", b"x" * 1000, 16 << 20))
elif kind.startswith("fds"):  # wrong numbers of descriptors, where one is due
    n = int(kind[3:])
    if n:
        send_with_fds(frame(b"p", pid()), [null] * n)
    else:
        sock.sendall(frame(b"p", pid()))
elif kind.startswith("stray"):  # and where none is
    send_with_fds(frame(b"d", bytes(8)), [null] * int(kind[5:]))
elif kind == "behind":  # where AnyEvent::Fork puts them
    sock.sendall(frame(b"p", pid()))
    send_with_fds(b"\0", [os.pidfd_open(os.getpid())])
elif kind == "nopidfd":
    started(fd=null)
elif kind == "nopidfd-file":
    started(fd=os.open(__file__, os.O_RDONLY))
elif kind == "pid":
    sock.sendall(frame(b"n", b"\xff\xff\xff\xff"))
elif kind.startswith("size-"):  # reports of wrong sizes: size-LETTER-N
    _, letter, n = kind.split("-")
    sock.sendall(frame(letter.encode(), b"\x01" * int(n)))
elif kind == "error":  # well formed, but not what it says
    sock.sendall(frame(b"e", string_list(b"eval", b"no number", b"", b"", b"", b"")))
elif kind == "errno":
    sock.sendall(frame(b"e", string_list(b"x", b"9" * 100, b"", b"", b"", b"")))
elif kind == "fields":
    sock.sendall(frame(b"e", string_list(b"eval", b"0")))
elif kind == "text":  # not UTF-8: an error all the same
    fields = (b"\xff", b"0", b"Bad\xff", b"\xfe\xff", b"\xff", b"\xff")
    sock.sendall(frame(b"e", string_list(*fields)))
elif kind == "running":
    started()
    sock.sendall(frame(b"r"))
elif kind == "running-twice":  # after the first these are the user's bytes
    started()
    sock.sendall(frame(b"r") + frame(b"r"))
elif kind == "error-running":
    fields = (b"eval", b"0", b"Bad", b"", b"", b"")
    sock.sendall(frame(b"e", string_list(*fields)) + frame(b"r"))
elif kind == "after-garbage":  # descriptors behind what ends the conversation
    sock.sendall(frame(b"?"))
    for _ in range(100):
        started()
elif kind == "unknown-ids":
    started()
    sock.sendall(frame(b"x", struct.pack("=QIi18q", 1 << 60, 1, 0, *[0] * 18)))
    sock.sendall(frame(b"f", struct.pack("=QiB", 1 << 61, -(1 << 31), 255)))
    own = os.pidfd_open(os.getpid())
    send_with_fds(frame(b"s", struct.pack("=QI", 1 << 62, 1)), [own])
    sock.sendall(frame(b"b", struct.pack("=QI", 1 << 62, 1)))
    sock.sendall(frame(b"d", b"\xff" * 8))
elif kind == "duplicates":
    for _ in range(500):
        started()
        sock.sendall(frame(b"d", bytes(8)) + frame(b"n", pid()))
    sock.sendall(frame(b"d", b"\xff" * 8))
elif kind == "template":  # lies about the children that it is asked for
    data = b""
    while b"F" not in data:
        data += sock.recv(4096)  # and so destroys their sockets
    at = data.index(b"F") + 5
    (child,) = struct.unpack_from("=Q", data, at)
    started()
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        if sys.argv[3] == "failed":
            sock.sendall(frame(b"f", struct.pack("=QiB", child, -5, 200)))
            sock.sendall(frame(b"f", struct.pack("=QiB", child, -5, 200)))
        elif sys.argv[3] == "exited":
            report = struct.pack("=QIi18q", child, 1, 0x7F, *[-1] * 18)
            sock.sendall(frame(b"x", report))
        elif sys.argv[3] == "exited-twice":
            report = struct.pack("=QIi18q", child, 1, 9, *[-(1 << 63)] * 18)
            sock.sendall(frame(b"x", report) * 2)
        elif sys.argv[3] == "spawned":
            for _ in range(50):
                own = os.pidfd_open(os.getpid())
                send_with_fds(frame(b"s", struct.pack("=QI", child, 1)), [own])
elif kind == "endless":
    started()
    report = frame(b"d", bytes(8)) * 1000
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        while True:
            sock.sendall(report)
elif kind == "endless-big":
    fields = [b"eval", b"0", b"Bad", b"", b"", b""]
    payload = string_list(*fields)
    payload = payload[:-1] + b"\x83\xff\xff\x7f" + b"x" * 0x7FFFFF
    report = frame(b"e", payload)
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        while True:
            sock.sendall(report)
elif kind == "endless-fds":
    with contextlib.suppress(BrokenPipeError, ConnectionResetError, OSError):
        while True:
            started()
elif kind == "close":
    pass
elif kind == "half":
    sock.sendall(frame(b"e", b"x" * 10, 1000))
elif kind == "head":
    sock.sendall(b"p\4")
elif kind == "first":  # with a descriptor that nobody will get to see
    send_with_fds(b"p", [null])
else:
    sys.exit(f"unknown kind {kind}")

if kind in ("slow",):
    sock.recv(1 << 20)
    while sock.recv(1 << 20):
        pass
