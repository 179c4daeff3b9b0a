"""Log records of workers reach the application's loggers, once."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import io
import logging
import os
import pickle
import resource
import signal
import socket

import pytest

import afork
from afork.rpc import _logs
from afork.rpc._logs import RECORD_MAX, LogRelay
from afork.rpc._output import OutputPipe

from .conftest import open_descriptors

PRELUDE = """
import logging, os, signal, sys, threading, warnings

def start(handle, *args):
    from afork.rpc._logs import install
    install(handle.detach(), *args)
"""


class Records(logging.Handler):
    """What has been handled; can be waited for."""

    def __init__(self):
        super().__init__(1)
        self.records = []
        self.changed = asyncio.Event()

    def emit(self, record):
        self.records.append(record)
        self.changed.set()

    async def until(self, count):
        while len(self.records) < count:
            self.changed.clear()
            await self.changed.wait()

    @property
    def messages(self):
        return [record.getMessage() for record in self.records]


@pytest.fixture
def logger(request):
    """A logger of the test's own, that handles everything."""
    found = logging.getLogger(f"test_logs.{request.function.__name__}")
    found.setLevel(1)
    yield found
    found.handlers.clear()
    found.filters.clear()
    found.setLevel(logging.NOTSET)
    found.propagate = True


class Worker:
    """A worker whose records are relayed, entered with start(handle, ...)."""

    def __init__(self, relay, f, sock, err):
        self.relay = relay
        self.f = f
        self.sock = sock
        self.err = err

    async def end(self, code=0):
        """Wait for its end; what it has written to its standard error."""
        assert await self.f.wait() == code
        self.relay.close()
        self.sock.close()
        text = self.err.tail()
        self.err.close()
        return text


async def start(code, name, *, template=None, extra=None, relay=None):
    loop = asyncio.get_running_loop()
    relay = relay or LogRelay(loop, extra=extra or {})
    err = OutputPipe(loop, None)
    f = (template or afork.Fork.new()).eval(PRELUDE).eval(code)
    f.eval(
        """
        def work(sock, handle, err, name):
            from afork.rpc._redirect import redirect
            redirect(err.fileno(), 2)
            err.close()
            body(sock, handle, name)
        """
    )
    f.send_fh(relay.write_fd, err.write_fd).send_arg(name)
    relay.close_write()
    err.close_write()
    return Worker(relay, f, await f.run("work"), err)


def test_a_record_is_what_it_was(arun, logger):
    async def main():
        seen = Records()
        logger.addHandler(seen)
        worker = await start(
            """
            def body(sock, handle, name):
                start(handle, 10)
                logging.getLogger(name).info(
                    "%s and %d", "text", 5, extra={"user": "anna", "n": 1}
                )
                sock.recv(1)
            """,
            logger.name,
            extra={"pool": "mine"},
        )
        await seen.until(1)  # while it lives
        (record,) = seen.records
        assert (record.name, record.levelno, record.levelname) == (
            logger.name,
            logging.INFO,
            "INFO",
        )
        assert (record.msg, record.args) == ("text and 5", None)
        assert (record.user, record.n, record.pool) == ("anna", 1, "mine")
        assert record.worker_pid == record.process == worker.f.pid
        assert (record.funcName, record.threadName) == ("body", "MainThread")
        assert record.lineno == 4
        worker.sock.setblocking(True)
        worker.sock.send(b"x")
        assert await worker.end() == ""

    arun(main)


def test_tracebacks_are_text(arun, logger):
    async def main():
        stream = io.StringIO()
        handler = logging.StreamHandler(stream)
        seen = Records()
        logger.addHandler(handler)
        logger.addHandler(seen)
        logger.propagate = False
        worker = await start(
            """
            def body(sock, handle, name):
                start(handle, 10)
                class Mine(Exception):  # cannot be pickled
                    pass
                try:
                    raise Mine("oops")
                except Mine:
                    logging.getLogger(name).exception("it failed", stack_info=True)
            """,
            logger.name,
        )
        assert await worker.end() == ""
        (record,) = seen.records
        assert record.exc_info is None
        text = stream.getvalue()
        assert text.startswith("it failed\nTraceback (most recent call last):\n")
        assert "Mine: oops\nStack (most recent call last):\n" in text

    arun(main)


def test_extras_of_any_kind(arun, logger):
    async def main():
        seen = Records()
        logger.addHandler(seen)
        worker = await start(
            """
            class Foreign:  # in no module of the application
                def __repr__(self):
                    return "<foreign>"

            class Broken:
                def __reduce__(self):
                    raise KeyError
                def __repr__(self):
                    raise ValueError

            def body(sock, handle, name):
                start(handle, 10)
                extra = {
                    "a": {"list": [1, (2, 3)]}, "b": Foreign(), "c": lambda: 0,
                    "d": Broken(), "e": threading.Lock(),
                }
                logging.getLogger(name).info("extras", extra=extra)
            """,
            logger.name,
        )
        assert await worker.end() == ""
        (record,) = seen.records
        assert record.a == {"list": [1, (2, 3)]}
        assert record.b == "<foreign>"
        assert record.c.startswith("<function ")
        assert record.d == "<Broken, whose repr raised ValueError>"
        assert "lock" in record.e

    arun(main)


def test_arguments_that_do_not_fit(arun, logger):
    """Told where logging tells it; the next record arrives."""

    async def main():
        seen = Records()
        logger.addHandler(seen)
        worker = await start(
            """
            def body(sock, handle, name):
                start(handle, 10)
                logging.getLogger(name).info("%d", "text")
                logging.getLogger(name).info("next")
            """,
            logger.name,
        )
        text = await worker.end()
        assert text.startswith("--- Logging error ---\n")
        assert seen.messages == ["next"]

    arun(main)


# -- threads, forks, crashes


def test_threads_and_forked_processes(arun, logger):
    """Records do not mix, none is lost, and each writer's are in order."""

    async def main():
        seen = Records()
        logger.addHandler(seen)
        logger.propagate = False
        worker = await start(
            """
            def body(sock, handle, name):
                start(handle, 10)
                logger = logging.getLogger(name)

                def log(writer):
                    for i in range(200):
                        logger.debug("%s %d %s", writer, i, "x" * (i * 37 % 5000))

                pid = os.fork()
                if pid == 0:
                    log("child")
                    os._exit(0)
                threads = [
                    threading.Thread(target=log, args=(f"thread{i}",))
                    for i in range(4)
                ]
                for t in threads:
                    t.start()
                for t in threads:
                    t.join()
                os.waitpid(pid, 0)
            """,
            logger.name,
        )
        await seen.until(1000)
        assert await worker.end() == ""
        order = {}
        for record in seen.records:
            assert record.worker_pid == worker.f.pid
            writer, i, text = record.getMessage().split(" ")
            assert (record.process == worker.f.pid) == (writer != "child")
            assert len(text) == int(i) * 37 % 5000
            order.setdefault(writer, []).append(int(i))
        assert order == {
            writer: list(range(200))
            for writer in ("child", "thread0", "thread1", "thread2", "thread3")
        }

    arun(main)


def test_a_crash_right_after_a_record(arun, logger):
    async def main():
        seen = Records()
        logger.addHandler(seen)
        worker = await start(
            """
            def body(sock, handle, name):
                start(handle, 10)
                for i in range(50):
                    logging.getLogger(name).info("%d", i)
                os.kill(os.getpid(), signal.SIGKILL)
            """,
            logger.name,
        )
        assert await worker.end(-9) == ""
        assert seen.messages == [str(i) for i in range(50)]

    arun(main)


def test_more_than_the_socket_holds(arun, logger):
    """The worker waits until the application's loop turns; nothing is lost."""

    async def main():
        seen = Records()
        logger.addHandler(seen)
        logger.propagate = False
        worker = await start(
            """
            def body(sock, handle, name):
                start(handle, 10)
                for i in range(3000):
                    logging.getLogger(name).info("%d %s", i, "x" * 1000)
            """,
            logger.name,
        )
        await seen.until(3000)
        assert await worker.end() == ""
        numbers = [int(m.split(" ")[0]) for m in seen.messages]
        assert numbers == list(range(3000))

    arun(main)


def test_endless_logging_does_not_keep_the_loop(arun, logger):
    async def main():
        seen = Records()
        logger.addHandler(seen)
        logger.propagate = False
        worker = await start(
            """
            def body(sock, handle, name):
                start(handle, 10)
                pid = os.fork()
                if pid:
                    sock.send(b"%d" % pid)
                    signal.pause()
                while True:
                    logging.getLogger(name).info("x")
            """,
            logger.name,
        )
        loop = asyncio.get_running_loop()
        pid = int(await loop.sock_recv(worker.sock, 100))
        counts = []
        read = worker.relay._read

        def counting(*args):
            before = len(seen.records)
            read(*args)
            counts.append(len(seen.records) - before)

        worker.relay._read = counting
        await seen.until(2000)
        assert max(counts) <= 64
        worker.relay.drain()  # of what never ends
        worker.relay._read = read
        worker.f.send_signal(signal.SIGKILL)
        os.kill(pid, signal.SIGKILL)
        assert await worker.end(-9) == ""

    arun(main)


# -- who decides


LEVELS = """
def body(sock, handle, name):
    start(handle, *eval(name))
    for name in "", "a", "a.b", "c":
        for level in "debug", "info", "warning":
            getattr(logging.getLogger("test_levels" + name), level)(level)
"""


@pytest.mark.parametrize("with_levels", [False, True])
def test_levels(arun, with_levels):
    """The application's decide, also what it sets later."""

    async def main():
        root, loggers = logging.getLogger(), {}
        seen = Records()
        root.addHandler(seen)
        old = root.level
        try:
            root.setLevel(logging.INFO)
            for name, level in ("a", 30), ("a.b", 10), ("c", 20):
                loggers[name] = logging.getLogger(f"test_levels{name}")
                loggers[name].setLevel(level)
            args = (20, _logs.levels()) if with_levels else (20,)
            worker = await start(LEVELS, repr(args))
            loggers["c"].setLevel(30)
            assert await worker.end() == ""
        finally:
            root.setLevel(old)
            root.removeHandler(seen)
            for x in loggers.values():
                x.setLevel(logging.NOTSET)
        got = [(r.name[len("test_levels") :], r.levelname) for r in seen.records]
        # Without the other levels the worker goes by the root's.
        assert got == [
            ("", "INFO"),
            ("", "WARNING"),
            ("a", "WARNING"),
            *([("a.b", "DEBUG")] if with_levels else []),
            ("a.b", "INFO"),
            ("a.b", "WARNING"),
            ("c", "WARNING"),
        ]

    arun(main)


def test_what_a_template_has_configured_is_dropped(arun, logger):
    async def main():
        seen = Records()
        logger.addHandler(seen)
        template = afork.Fork.new().eval(
            """
            import logging, logging.handlers, sys
            logging.basicConfig(level=logging.ERROR)
            name = args[0]
            mine = logging.getLogger(name)
            mine.addHandler(logging.StreamHandler(sys.stdout))
            mine.addHandler(
                logging.handlers.MemoryHandler(9, target=logging.StreamHandler())
            )
            mine.propagate = False
            mine.disabled = True
            mine.setLevel(logging.CRITICAL)
            logging.disable(logging.CRITICAL)
            """,
            logger.name,
        )
        worker = await start(
            f"""
            def body(sock, handle, name):
                start(handle, 10, {{"{logger.name}.child": 10}})
                logging.getLogger(name).info("once")
                logging.getLogger(name + ".child").debug("child")
            """,
            logger.name,
            template=template.fork(),
        )
        assert await worker.end() == ""
        assert seen.messages == ["once", "child"]
        template.close()

    arun(main)


def test_filters_and_propagation_of_the_application(arun, logger):
    async def main():
        loop = asyncio.get_running_loop()
        found = []
        loop.set_exception_handler(lambda loop, c: found.append(c["exception"]))
        seen, above = Records(), Records()
        child = logger.getChild("child")
        child.addHandler(seen)
        logger.addHandler(above)

        def allow(record):
            if record.msg == "raise":
                raise RuntimeError
            return record.msg != "refused"

        child.addFilter(allow)
        worker = await start(
            """
            def body(sock, handle, name):
                start(handle, 10)
                for message in "refused", "raise", "passed", "quiet":
                    logging.getLogger(name + ".child").info(message)
                    sock.send(b"x")
                    sock.recv(1)
            """,
            logger.name,
        )
        for step in range(4):
            await loop.sock_recv(worker.sock, 1)
            worker.relay.drain()
            child.propagate = step < 2
            await loop.sock_sendall(worker.sock, b"x")
        assert await worker.end() == ""
        assert seen.messages == ["passed", "quiet"]
        assert above.messages == ["passed"]
        assert [type(exc) for exc in found] == [RuntimeError]
        child.handlers.clear()
        child.filters.clear()
        child.propagate = True

    arun(main)


def test_install_twice(arun, logger):
    async def main():
        seen = Records()
        logger.addHandler(seen)
        worker = await start(
            """
            def body(sock, handle, name):
                import socket
                a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                start(a, 10)
                start(handle, 10)
                logging.getLogger(name).info("once")
                assert b.recv(9) == b""
                b.close()
            """,
            logger.name,
        )
        assert await worker.end() == ""
        assert seen.messages == ["once"]

    arun(main)


# -- sizes, garbage, limits


def test_long_records_are_cut(arun, logger):
    async def main():
        seen = Records()
        logger.addHandler(seen)
        logger.propagate = False
        worker = await start(
            """
            def body(sock, handle, name):
                start(handle, 10)
                logger = logging.getLogger(name)
                logger.info("whole" + "x" * 200000)
                logger.info("\\u20ac" * 3000000)
                try:
                    raise ValueError("y" * 3000000)
                except ValueError:
                    logger.exception("m" * 3000000, extra={
                        "short": "kept", "long": "z" * 3000000,
                        **{f"many{i}": [str(i) * 1000] for i in range(1000)},
                    })
                logger.info("\\ud800" * 3000000)
                logger.info("next")
            """,
            logger.name,
        )
        await seen.until(5)
        assert await worker.end() == ""
        whole, euro, both, strange, following = seen.records
        assert whole.msg == "whole" + "x" * 200000
        assert euro.msg.startswith("\u20ac" * 40000)
        assert euro.msg.endswith(" characters cut]")
        assert both.msg.startswith("m" * 100000)
        assert "y" * 50000 in both.exc_text
        assert both.exc_text.startswith("Traceback")
        assert both.short == "kept"
        assert 900 < len(both.long) < 1100
        assert both.many0.startswith("['0000")
        assert both.lineno
        assert strange.msg.endswith(" characters cut]")
        assert following.msg == "next"

    arun(main)


def test_a_smaller_socket(arun, logger):
    """A system may limit the buffers of sockets: more is cut, nothing lost."""

    async def main():
        relay = LogRelay(asyncio.get_running_loop())
        with socket.socket(fileno=os.dup(relay.write_fd)) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16384)
        seen = Records()
        logger.addHandler(seen)
        logger.propagate = False
        worker = await start(
            """
            def body(sock, handle, name):
                start(handle, 10)
                logging.getLogger(name).info("x" * 100000)
                logging.getLogger(name).info("y" * 100)
            """,
            logger.name,
            relay=relay,
        )
        assert await worker.end() == ""
        assert seen.messages[0].startswith("x" * 8000)
        assert seen.messages[0].endswith(" characters cut]")
        assert seen.messages[1] == "y" * 100

    arun(main)


@pytest.mark.parametrize(
    "packet",
    [
        b"garbage",
        b"x" * (RECORD_MAX + 1),
        pickle.dumps(5),
        pickle.dumps({"name": "x"}),
        pickle.dumps({"name": 5, "levelno": 5}),
        pickle.dumps({"name": "x", "levelno": "5"}),
    ],
    ids=["bytes", "long", "number", "short", "name", "level"],
)
def test_garbage_is_one_warning(arun, packet):
    async def main():
        seen = Records()
        logging.getLogger("afork").addHandler(seen)
        try:
            relay = LogRelay(asyncio.get_running_loop())
            with socket.socket(fileno=os.dup(relay.write_fd)) as sock:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2 * len(packet))
                sock.send(packet)
                sock.send(packet)
                await seen.until(1)
                relay.drain()
                with pytest.raises(ConnectionError):
                    sock.send(b"more")
            relay.close()
        finally:
            logging.getLogger("afork").removeHandler(seen)
        (record,) = seen.records
        assert record.levelno == logging.WARNING
        assert "not read any more" in record.getMessage()

    arun(main)


def test_the_application_has_gone(arun, logger):
    """A worker that was told to outlive it says what matters on its stderr."""

    async def main():
        relay = LogRelay(asyncio.get_running_loop())
        worker = await start(
            """
            def body(sock, handle, name):
                start(handle, 10)
                sock.recv(1)
                logging.getLogger(name).info("info")
                logging.getLogger(name).warning("warning")
            """,
            logger.name,
            relay=relay,
        )
        relay.close()
        relay.close()
        relay.drain()
        worker.sock.setblocking(True)
        worker.sock.send(b"x")
        assert await worker.end() == "warning\n"

    arun(main)


def test_a_handler_closes_the_relay(arun, logger):
    async def main():
        class Closing(Records):
            def emit(self, record):
                super().emit(record)
                worker.relay.close()

        seen = Closing()
        logger.addHandler(seen)
        worker = await start(
            """
            def body(sock, handle, name):
                start(handle, 10)
                sock.recv(1)
                for i in range(3):
                    logging.getLogger(name).debug("%d", i)
            """,
            logger.name,
        )
        # The loop does not turn until all have been sent.
        worker.sock.setblocking(True)
        worker.sock.send(b"x")
        assert worker.sock.recv(1) == b""
        await seen.until(3)
        assert seen.messages == ["0", "1", "2"]
        assert worker.relay._sock.fileno() < 0
        assert await worker.end() == ""

    arun(main)


def test_bad_extra(arun):
    async def main():
        for name in ("name", "message", "worker_pid"):
            with pytest.raises(ValueError, match=name):
                LogRelay(asyncio.get_running_loop(), extra={name: 1})

    arun(main)


def test_no_descriptor_left(arun):
    async def main():
        loop = asyncio.get_running_loop()
        filler = [os.open("/dev/null", os.O_RDONLY)]
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        limit = max(open_descriptors()) + 3  # two that the test gives back
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
        try:
            with contextlib.suppress(OSError):
                while True:
                    filler.append(os.dup(filler[0]))
            for _ in range(2):
                with pytest.raises(OSError, match="Too many"):
                    LogRelay(loop)
                os.close(filler.pop())
            LogRelay(loop).close()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            for fd in filler:
                os.close(fd)

    arun(main)


def test_what_outlives_its_loop(loop_factory):
    loop = loop_factory()
    relays = [LogRelay(loop) for _ in range(2)]
    loop.close()
    relays[0].close()
    relays[0].close()
    del relays
    gc.collect()
    # The leak guard looks at the rest.
