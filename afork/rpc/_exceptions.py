"""Exceptions that cross from a process to its caller.

What crosses is the text of an exception, always, and the exception itself
where the codec is one that pickles: each link of its ``__cause__`` chain as a
pickle of its own, so that what cannot be loaded over there costs that link and
not the others. The caller gets the exception with a `RemoteError` at the
innermost end of the chain; it holds the text, so the process's traceback is
printed above the caller's.
"""

from __future__ import annotations

import sys

from .. import _afork, _child
from ._bulk import close_all, refused
from ._codecs import _BUILT_IN, Codec

TYPE_CHECKING = False  # see afork/__init__.py
if TYPE_CHECKING:
    from typing import Any, TypeAlias

    #: Stage, type, message and traceback of a RemoteError.
    Text: TypeAlias = tuple[str, str, str, str]
    #: Pickle, notes, suppress_context, and what else a group has.
    Link: TypeAlias = tuple[bytes, tuple[str, ...], bool, "Group | None"]
    #: Whether made of message and members alone; message; members.
    Group: TypeAlias = tuple[bool, str, tuple["Member", ...]]
    #: An exception, its cause, the cause of that ...
    Chain: TypeAlias = tuple[Link, ...]
    #: Empty chain if it does not pickle; type and message.
    Member: TypeAlias = tuple[Chain, str, str]

#: Bytes of one text that are sent at most.
TEXT_MAX = 64 << 10

#: Exceptions of one chain or group that are sent as such, at most.
_LINKS_MAX = 1000

#: Those that mean something else to whoever runs a generator or a future.
_CONTROL = (StopIteration, StopAsyncIteration)

_pickle = _BUILT_IN["pickle"]

# Not by assignment: a class may have made its attributes read-only.
_set_cause = BaseException.__dict__["__cause__"].__set__
_set_suppress = BaseException.__dict__["__suppress_context__"].__set__


def encode_exception(
    exc: BaseException, codec: Codec, stage: str = "run"
) -> tuple[bytes, tuple[int, ...]]:
    """The payload of a message about an exception, and its descriptors.

    Never raises, whatever the exception is made of. The caller owns the
    descriptors, as with :meth:`Codec.encode`.

    Args:
        exc: The exception.
        codec: That of the call. Exceptions are sent as text alone if it does
            not pickle.
        stage: What was being done, for `RemoteError`.
    """
    text = _text_of(stage, exc)
    if not codec.pickles:
        return _pack(text), ()
    try:
        encoder = _Encoder(codec)
        chain = encoder.chain(exc)
        return _pickle.encode((text, chain, encoder.why))
    except BaseException:  # no memory or descriptor for a large one
        pass
    try:
        return _pickle.encode((text, (), ""))
    except BaseException:
        return _NO_MEMORY, ()


def decode_exception(
    payload: bytes, fds: tuple[int, ...], codec: Codec
) -> BaseException:
    """The exception of a message, to be raised.

    Args:
        payload: As received.
        fds: The descriptors that came with it. Consumed, always.
        codec: That of the call, as in :func:`encode_exception`.

    Raises:
        ProtocolError: the message is not about an exception.
        OSError, MemoryError: it is too large for this process.
    """
    from .._errors import RemoteError

    try:
        if codec.pickles:
            text, chain, why = _pickle.decode(payload, fds)
        else:
            close_all(fds)
            strings = _afork.unpack_strings(payload)
            text, chain, why = (
                tuple(str(x, "utf-8", "replace") for x in strings),
                (),
                "",
            )
        if len(text) != 4 or any(type(x) is not str for x in text):
            raise TypeError("not the text of an exception")
        remote = RemoteError(*text)
        reasons = [why] if why else []
        exc = _load_chain(chain, codec, text[0], reasons)
    except (OSError, MemoryError):
        raise
    except Exception as error:
        raise refused("something that is no exception") from error
    if exc is None:
        if reasons:
            remote.add_note(f"afork: it could not be raised as itself: {reasons[0]}")
        return remote
    last: BaseException = exc
    seen = {id(last)}
    while last.__cause__ is not None and id(last.__cause__) not in seen:
        last = last.__cause__
        seen.add(id(last))
    _link(last, remote)
    return exc


def _reason(error: BaseException) -> str:
    type_, message = _child._describe(error)
    return _cut(type_ + b": " + message)


def note_search_path(exc: BaseException) -> None:
    """Add to an error about a name that was not found where it was searched."""
    if not isinstance(exc, (ImportError, AttributeError)):
        return
    note = "afork: sys.path of the process that has searched:"
    for entry in sys.path:
        note += f"\n  {entry!r}"
    module = getattr(exc, "obj", None)
    if isinstance(module, type(sys)):
        file = getattr(module, "__file__", None)
        note += f"\nand the module {module.__name__!r} comes from {file!r}"
    try:
        exc.add_note(note)
    except Exception:  # a class of its own mind about attributes
        pass


# -- text


def _cut(text: bytes, end: bool = False) -> str:
    if len(text) <= TEXT_MAX:
        return text.decode("utf-8", "replace")
    kept = TEXT_MAX - 32
    mark = f"[{len(text) - kept} bytes cut]"
    if end:
        return f"{mark}\n{text[-kept:].decode('utf-8', 'ignore')}"
    return f"{text[:kept].decode('utf-8', 'ignore')} {mark}"


def _text_of(stage: str, exc: BaseException) -> Text:
    try:
        _, _, type_, message, trace, _ = _child._failure(stage, exc)
        # The end of a traceback says more than its beginning.
        return stage, _cut(type_), _cut(message), _cut(trace, end=True)
    except BaseException:  # no memory
        return stage, type(exc).__name__, "", ""


def _pack(text: Text) -> bytes:
    try:
        return _pack_strings([x.encode("utf-8", "replace") for x in text])
    except BaseException:
        return _NO_MEMORY_TEXT


_pack_strings = _afork.pack_strings

#: Made beforehand.
_NO_MEMORY = _pickle.dumps((("run", "MemoryError", "", ""), (), ""))
_NO_MEMORY_TEXT = _pack_strings((b"run", b"MemoryError", b"", b""))


# -- exceptions


class _Encoder:
    """Pickles the exceptions of one message."""

    def __init__(self, codec: Codec) -> None:
        self.codec = codec
        #: Those that were visited; a chain can be a circle.
        self.seen: dict[int, BaseException] = {}
        #: Why the first of them could not be pickled.
        self.why = ""

    def chain(self, exc: BaseException | None) -> Chain:
        """As far as it can be pickled; the rest has to remain text."""
        links = []
        while exc is not None and (link := self.link(exc)) is not None:
            links.append(link)
            exc = exc.__cause__
        return tuple(links)

    def link(self, exc: BaseException) -> Link | None:
        if not isinstance(exc, Exception) or isinstance(exc, _CONTROL):
            return None
        if id(exc) in self.seen or len(self.seen) >= _LINKS_MAX:
            return None
        self.seen[id(exc)] = exc
        group = None
        data = b""
        try:
            value: object = exc
            if isinstance(exc, ExceptionGroup):
                plain = _is_plain(type(exc))
                group = plain, exc.message, tuple(map(self.member, exc.exceptions))
                if plain:
                    value = type(exc), exc.__dict__
            try:
                data = self.codec.dumps(value)
            except BaseException:
                if group is None:
                    raise
            notes = tuple(x for x in getattr(exc, "__notes__", ()) if type(x) is str)
            return data, notes, exc.__suppress_context__, group
        except BaseException as error:  # all of it is foreign code
            if len(self.seen) == 1:
                self.why = _reason(error)
            return None

    def member(self, exc: BaseException) -> Member:
        type, message = map(_cut, _child._describe(exc))
        return self.chain(exc), type, message


def _is_plain(cls: type[ExceptionGroup[Any]]) -> bool:
    """Whether it is made as every ExceptionGroup: of a message and members."""
    return all(
        getattr(cls, name) is getattr(ExceptionGroup, name)
        for name in ("__new__", "__init__", "__reduce__", "__reduce_ex__")
    )


def _load_chain(
    chain: Chain, codec: Codec, stage: str, reasons: list[str]
) -> Exception | None:
    """The first exception of a chain, with its causes as far as they load.

    Args:
        reasons: Gets why the next one did not.
    """
    first = last = None
    for link in chain:
        exc = _load(link, codec, stage, reasons)
        if exc is None:
            break
        if last is None:
            first = exc
        else:
            _link(last, exc)
        last = exc
    return first


def _link(exc: BaseException, cause: BaseException) -> None:
    suppress = exc.__suppress_context__
    _set_cause(exc, cause)  # which says True to the other
    _set_suppress(exc, suppress)


def _load(link: Link, codec: Codec, stage: str, reasons: list[str]) -> Exception | None:
    data, notes, suppress, group = link
    try:
        if group is None:
            exc = codec.loads(data)
        else:
            exc = _load_group(data, group, codec, stage)
        if not isinstance(exc, Exception) or isinstance(exc, _CONTROL):
            return None
        if notes and getattr(exc, "__notes__", None) != list(notes):
            exc.__notes__ = list(notes)  # its own way to pickle has left them out
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # its constructor is foreign code
        reasons.append(_reason(error))
        return None
    _set_suppress(exc, suppress)
    return exc


def _load_group(data: bytes, group: Group, codec: Codec, stage: str) -> object:
    from .._errors import RemoteError

    plain, message, members = group
    loaded: list[Exception] = []
    for chain, type_, text in members:
        member = _load_chain(chain, codec, stage, [])
        loaded.append(RemoteError(stage, type_, text) if member is None else member)
    try:
        found = codec.loads(data)
        if not plain:
            return found
        exc = found[0](message, loaded)
        exc.__dict__.update(found[1])
        return exc
    except Exception:
        # A class that is not known here. What its members are matters more.
        return ExceptionGroup(message, loaded)
