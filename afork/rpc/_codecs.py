"""Codecs: how the values of calls become bytes, and by which name they go.

Every worker imports this: it loads little, and nothing that registers a
callback at fork. Hence ``_pickle`` itself; ``pickle`` would load ``re``.
"""

from __future__ import annotations

import _pickle
import sys
from _io import BytesIO
from copyreg import dispatch_table
from functools import cache

from .. import _afork, _child
from ._buffers import Outgoing, find_shared, live, unwrap
from ._bulk import BULK, close_all, refused

__all__ = ["Codec", "close_all", "codec_name", "find_codec"]

TYPE_CHECKING = False  # see afork/__init__.py
if TYPE_CHECKING:
    from _pickle import PickleBuffer
    from collections.abc import Callable
    from types import ModuleType
    from typing import Any

_dumps = _pickle.dumps
_loads = _pickle.loads


class Codec:
    """A codec of any kind, as calls use it.

    Attributes:
        name: By which :func:`find_codec` finds it.
        pickles: Whether exceptions may cross as pickles.
    """

    pickles = False

    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return f"<codec {self.name}>"

    def encode(self, value: object) -> tuple[bytes, tuple[int, ...]]:
        """The payload of a message, less than 256 KiB, and its descriptors.

        The caller owns the descriptors: close them with :func:`close_all`
        once they are queued.

        Raises:
            OSError: no descriptor or no memory for a large payload.
            TypeError, ...: whatever the codec says of a value.
        """
        payload = self.dumps(value)
        if len(payload) < BULK:
            return payload, ()
        return Outgoing().finish(payload)

    def decode(self, payload: bytes, fds: tuple[int, ...]) -> Any:
        """The value of a message.

        Args:
            payload: As received.
            fds: The descriptors that came with it. Consumed, always.

        Raises:
            ProtocolError: payload and descriptors do not fit together.
            OSError: a large payload cannot be mapped.
            ValueError, ...: whatever the codec says of bytes.
        """
        if not fds:
            return self.loads(payload)
        text, buffers = unwrap(payload, fds)
        if buffers is not None:
            raise refused("buffers with a codec that knows none")
        return self.loads(text)

    def dumps(self, value: object) -> bytes:
        """The bytes of a value, all in one piece."""
        raise NotImplementedError

    def loads(self, data: bytes | memoryview) -> Any:
        """The value of bytes that `dumps` has made."""
        raise NotImplementedError


class _Large(BaseException):
    """Stops a pickle: it needs another way."""


def _small_only(buffer: PickleBuffer) -> bool:
    # Not a closure that collects the large ones: that would cost every small
    # call what only a large one needs. That one starts again instead.
    raw = buffer.raw()
    if raw.nbytes >= BULK or find_shared(raw) is not None:
        raise _Large
    return True


class _Reducers(dict[type, "Callable[[Any], Any]"]):
    """Our reducers, then everybody's, even those registered later."""

    __missing__ = dispatch_table.__getitem__


class _Pickle(Codec):
    pickles = True

    def encode(self, value: object) -> tuple[bytes, tuple[int, ...]]:
        try:
            payload = _dumps(value, 5, buffer_callback=_small_only)
        except _Large:
            pass
        except TypeError:
            # Perhaps of a SharedBuffer, which does not pickle but with ours.
            if not live:
                raise
        else:
            if len(payload) < BULK:
                return payload, ()
            return Outgoing().finish(payload)
        outgoing = Outgoing()
        return outgoing.finish(self._dump(value, outgoing.add))

    def _dump(self, value: object, add: Callable[[PickleBuffer], bool]) -> bytes:
        """A pickle whose buffers are offered to `add`."""
        if not live:
            return _dumps(value, 5, buffer_callback=add)
        from ._shared import reducers

        file = BytesIO()
        pickler = _pickle.Pickler(file, 5, buffer_callback=add)
        pickler.dispatch_table = _Reducers(reducers)
        pickler.dump(value)
        return file.getvalue()

    def decode(self, payload: bytes, fds: tuple[int, ...]) -> Any:
        if not fds:
            return _loads(payload)
        text, buffers = unwrap(payload, fds)
        return _loads(text, buffers=buffers)

    def dumps(self, value: object) -> bytes:
        return _dumps(value, 5)

    def loads(self, data: bytes | memoryview) -> Any:
        return _loads(data)


def _cloudpickle() -> ModuleType:
    try:
        return __import__("cloudpickle")
    except ModuleNotFoundError as exc:
        if exc.name != "cloudpickle":
            raise
        raise ModuleNotFoundError(
            "the codec 'cloudpickle' needs the package cloudpickle: install "
            "afork[cloudpickle]",
            name="cloudpickle",
        ) from None


class _CloudPickle(_Pickle):
    """Functions by value where they cannot be imported; decoding is pickle's."""

    def encode(self, value: object) -> tuple[bytes, tuple[int, ...]]:
        outgoing = Outgoing()
        return outgoing.finish(self._dump(value, outgoing.add))

    def _dump(self, value: object, add: Callable[[PickleBuffer], bool]) -> bytes:
        make = _cloudpickle().Pickler
        if live:
            from ._shared import reducers

            # Its own table is a chain of the class; ours goes in front.
            table = make.dispatch_table.new_child(reducers)
            make = type(make)("Pickler", (make,), {"dispatch_table": table})
        file = BytesIO()
        make(file, 5, buffer_callback=add).dump(value)
        return file.getvalue()

    def dumps(self, value: object) -> bytes:
        return _cloudpickle().dumps(value, 5)  # type: ignore[no-any-return]


@cache
def _json() -> tuple[Callable[[object], str], Callable[[str], Any]]:
    import json  # loads re: not before it is needed

    encoder = json.JSONEncoder(separators=(",", ":"))
    return encoder.encode, json.JSONDecoder().decode


class _Json(Codec):
    def dumps(self, value: object) -> bytes:
        return _json()[0](value).encode("ascii")

    def loads(self, data: bytes | memoryview) -> Any:
        return _json()[1](str(data, "utf-8"))


class _Bytes(Codec):
    def dumps(self, value: object) -> bytes:
        if not isinstance(value, (tuple, list)):
            raise TypeError(
                "the codec 'bytes' takes a tuple of bytes-like objects, "
                f"not {type(value).__name__}"
            )
        if live:
            from ._shared import SharedBuffer, refuse

            if any(isinstance(item, SharedBuffer) for item in value):
                refuse()  # whoever sends one does not expect a copy
        return _afork.pack_strings(value)

    def loads(self, data: bytes | memoryview) -> tuple[bytes, ...]:
        return tuple(_afork.unpack_strings(data))


class _Foreign(Codec):
    """An object of the user with two functions."""

    def __init__(self, name: str, codec: Any) -> None:
        super().__init__(name)
        self.codec = codec

    def dumps(self, value: object) -> bytes:
        data = self.codec.dumps(value)
        if type(data) is bytes:
            return data
        if isinstance(data, str):
            return data.encode("utf-8", "surrogatepass")
        if isinstance(data, (bytes, bytearray, memoryview)):
            return bytes(data)
        raise TypeError(
            f"dumps of the codec {self.name} has returned {type(data).__name__}, "
            "not bytes or str"
        )

    def loads(self, data: bytes | memoryview) -> Any:
        return self.codec.loads(bytes(data))


_BUILT_IN: dict[str, Codec] = {
    "pickle": _Pickle("pickle"),
    "json": _Json("json"),
    "bytes": _Bytes("bytes"),
    "cloudpickle": _CloudPickle("cloudpickle"),
}


def _checked(codec: Any, name: str) -> Any:
    for function in ("dumps", "loads"):
        if not callable(getattr(codec, function, None)):
            raise TypeError(
                f"{name} is no codec: it has no function {function!r}. The built-in "
                f"codecs are {', '.join(_BUILT_IN)}"
            )
    return codec


def find_codec(name: str) -> Codec:
    """The codec of a name that :func:`codec_name` has made.

    Raises:
        ImportError, AttributeError: there is no such module or attribute.
        TypeError: what is found there is no codec.
    """
    built_in = _BUILT_IN.get(name)
    if built_in is not None:
        return built_in
    module, _, path = name.partition(":")
    try:
        found: Any = _child._import(module)
        for attribute in path.split(".") if path else ():
            found = getattr(found, attribute)
    except (ImportError, AttributeError) as exc:
        from ._exceptions import note_search_path

        note_search_path(exc)
        raise
    return _Foreign(name, _checked(found, name))


def codec_name(codec: str | object) -> str:
    """The text by which a process finds a codec.

    Args:
        codec: "pickle", "json", "bytes", "cloudpickle", "pkg.mod" or
            "pkg.mod:attribute"; or a module, a class, or an object that is an
            attribute of a module.

    Raises:
        TypeError: no codec, or one that cannot be found by a name.
        ValueError: no name.
        ModuleNotFoundError: cloudpickle is not installed.
    """
    if isinstance(codec, str):
        name = codec
        if not name or "\0" in name:
            raise ValueError(f"not the name of a codec: {name!r}")
    else:
        name = _name_of(codec)
    if name == "cloudpickle":
        _cloudpickle()  # now, and not at the first call
    return name


def _name_of(codec: object) -> str:
    modules = sys.modules
    module = getattr(codec, "__name__", None)
    if isinstance(codec, type(sys)):
        _checked(codec, repr(codec))
        if module != "__main__" and modules.get(module or "") is codec:
            return str(module)
    elif isinstance(codec, type):
        _checked(codec, repr(codec))
        found: object = modules.get(codec.__module__)
        for attribute in codec.__qualname__.split("."):
            found = getattr(found, attribute, None)
        if found is codec and codec.__module__ != "__main__":
            return f"{codec.__module__}:{codec.__qualname__}"
    else:
        _checked(codec, repr(codec))
        # Where its class comes from, it will be as a rule.
        home = type(codec).__module__
        for module in (home, *tuple(modules)):
            names = getattr(modules.get(module), "__dict__", {})
            if module in ("__main__", "__mp_main__"):
                continue
            for attribute, value in tuple(names.items()):
                if value is codec:
                    return f"{module}:{attribute}"
    raise TypeError(
        f"{codec!r} has no name by which a process could import it: make it an "
        "attribute of a module and give that, or its name, 'package.module:attribute'"
        " ('__main__:attribute' for processes forked from the main program)"
    )
