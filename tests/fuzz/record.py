"""Make the seed corpus anew: what afork really sends, as strace saw it.

That of the links is made up: what matters is where frames are cut.

python tests/fuzz/record.py        (wants strace and an installed afork)
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import afork

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "core"))

from reference import (  # noqa: E402
    HEAD,
    TO_PROCESS,
    get_list,
    link_frame,
    put_list,
)

SESSION = """
import sys
sys.path.append(sys.argv[1])
import asyncio, contextlib, os, socket, afork

async def start(*args, **kwargs):
    process = await afork.create_subprocess_exec(*args, **kwargs)
    await process.wait()

async def main():
    f = afork.Fork.new().require("json", "textwrap")
    f.eval("def f(sock, *args): sock.recv(1)", "text", b"bytes")
    f.send_arg("text", b"bytes", "").send_fh(0)
    for child in (f.fork().send_fh(0, 1).send_arg("x"), f.fork()):
        (await child.run("f")).close()
    await f.ready()
    await f.set(title="title", umask=0o22).fork().exec("true", stdout=afork.SOCKET)
    for fork in (f.eval("1 / 0").fork(), afork.Fork.new()):
        with contextlib.suppress(afork.RemoteError):
            await fork.run("os.nothing")
    await start("true", stdout=-1)
    for missing in ({"cwd": "/nonexistent"}, {"env": {"A": "1"}}):
        with contextlib.suppress(OSError):
            await start("/nonexistent", **missing)

asyncio.run(main())
"""

LINE = re.compile(r'(\d+) +sendmsg\((\d+<.*?>), .*?iov_base="(.*?)"(.*)\) = (\d+)$')


def record() -> list[tuple[bool, list[tuple[bytes, bool]]]]:
    """Return the conversations: whether an application's, and its sends."""
    with tempfile.NamedTemporaryFile("r") as log:
        strace = ["strace", "-f", "-y", "-e", "trace=sendmsg", "-xx", "-s", "100000"]
        place = str(Path(afork.__file__).parent.parent)
        command = [*strace, "-o", log.name, sys.executable, "-I", "-c", SESSION, place]
        # Environment and folder are recorded too.
        subprocess.run(command, check=True, timeout=60, env={"PATH": "/bin"}, cwd="/")
        lines = log.read().splitlines()
    streams: dict = {}
    application = lines[0].split()[0]
    for line in lines:
        if match := LINE.match(line):
            pid, sock, text, rest, sent = match.groups()
            data = bytes.fromhex(text.replace("\\x", ""))[: int(sent)]
            sends = streams.setdefault((pid == application, sock), [])
            sends.append((data, "SCM_RIGHTS" in rest))
    return [(to_process, sends) for (to_process, _), sends in streams.items()]


def frames(data: bytes, carry: dict):
    while data:
        letter, length = HEAD.unpack_from(data)
        end = HEAD.size + length
        yield chr(letter), data[HEAD.size : end]
        data = data[end + (carry.get(letter) == "behind") :]


def without_paths(sends):
    """Replace settings that name the folders of this machine."""
    for data, fd in sends:
        done = b""
        while data[:1] == b"s":
            end = HEAD.size + HEAD.unpack_from(data)[1]
            strings = get_list(data[HEAD.size : end])
            for n, key in enumerate(strings[:-1]):
                if key in (b"path", b"prefix"):
                    strings[n + 1] = put_list([b"/usr"] * 4)
            payload = put_list(strings)
            done += HEAD.pack(ord("s"), len(payload)) + payload
            data = data[end:]
        yield done + data, fd


def for_reader(to_process: bool, sends) -> bytes:
    out = bytes([to_process])
    for number, (data, fd) in enumerate(sends):
        for at in range(0, len(data), 255):
            part = data[at : at + 255]
            out += bytes([(fd and not at) | (number & 1) << 2, len(part)]) + part
    return out


def for_strings(letter: str, payload: bytes) -> bytes | None:
    if letter in "eaEtms":
        return b"\1\0" + payload
    if letter in "xX":
        return b"\2\3" + payload[8 * (letter == "X") :]
    return None


def for_link() -> set[bytes]:
    """Return streams of frames, in one send, and cut with a recvmsg between."""

    def send(data: bytes, fds: int = 0, receive: bool = True) -> bytes:
        return bytes([fds | receive << 2, len(data)]) + data

    def by_link(payload: bytes, fds: int = 0, receive: bool = True) -> bytes:
        return bytes([fds | receive << 2 | 8, len(payload)]) + payload

    plain, one = link_frame(1, 2, b"abc"), link_frame(3, 4, b"defg", 1)
    two = link_frame(5, 6, b"", 2)
    return {
        send(plain),
        send(plain + plain, receive=False) + send(one, 1) + send(two, 2),
        send(plain + plain[:7]) + send(plain[7:]),
        send(one[:7], 1) + send(one[7:17]) + send(one[17:]) + send(plain),
        send(one[:17], 1) + send(one[17:], receive=False) + send(two, 2),
        send(plain, 1, receive=False) + send(one),
        send(one, 2),
        send(link_frame(1, zero=1)),
        send(link_frame(1)[:4] + b"\xff" * 12),
        by_link(b"abc") + by_link(b"d", 1, False) + by_link(b"e", 3) + send(plain),
    }


def main() -> None:
    corpus: dict[str, set[bytes]] = {"reader": set(), "strings": set(), "serve": set()}
    corpus["link"] = for_link()
    for to_process, raw in record():
        sends = list(without_paths(raw)) if to_process else raw
        data = b"".join(part for part, _ in sends)
        corpus["reader"].add(for_reader(to_process, sends))
        if not to_process:
            errors = [b"\3\0" + p for letter, p in frames(data, {}) if letter == "e"]
            corpus["strings"].update(errors)
            continue
        for flags in (0, 2, 1):  # as it is; forks fail; plain
            corpus["serve"].add(bytes([flags, 0]) + data)
        # as the commands of a forked process, which end in running something
        if len(data) < 64:
            fork = b"F\x08\0\0\0" + b"12345678"
            corpus["serve"].add(bytes([4, len(data) * 4]) + fork + data)
        for letter, payload in frames(data, TO_PROCESS):
            found = for_strings(letter, payload)
            corpus["strings"].update([found] if found else [])
    for name, inputs in corpus.items():
        folder = HERE / "corpus" / f"fuzz_{name}"
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob("[0-9][0-9]"):  # others are finds of the fuzzer
            old.unlink()
        for number, data in enumerate(sorted(inputs, key=lambda d: (len(d), d))):
            (folder / f"{number:02}").write_bytes(data)
        print(name, len(inputs), "inputs,", sum(map(len, inputs)), "bytes")


if __name__ == "__main__":
    main()
