"""The default template of this process, and Early's.

They belong to the process, not to an event loop. A default template that has
died is replaced when it is needed next; requests that had not reached it move
to the new one.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from . import _hub, _interpreter
from ._hub import hub
from ._process import Process, fork_process, on_template_end

if TYPE_CHECKING:
    from ._fork import Fork

_default: Process | None = None
_early: Process | None = None
#: The object of Fork.default(): it must not end the template by going away.
_fork: Any = None


def default_template() -> Process:
    """The default template, made now if there is none that works."""
    global _default, _fork
    template = _default
    if template is None or template.gone or template.released or template.broken:
        if template is not None:
            on_template_end.pop(template, None)
        new = _default = _interpreter.spawn_template()
        _fork = None
        on_template_end[new] = _replace
        new.be_quiet()
        if template is not None:
            _adopt(new, template, _unsent(template))
        new.flush()
        return new
    return template


def fork_default() -> Process:
    """A new process from the default template."""
    with hub().lock:
        template = default_template()
        _interpreter.update_path(template)
        child = fork_process(template)
        if template.broken:
            default_template()  # moves the request
        return child


def default_fork(wrap: Callable[[Process], Fork]) -> Any:
    """The one Fork object of the default template."""
    global _fork
    with hub().lock:
        template = default_template()
        if _fork is None:
            _fork = wrap(template)
        return _fork


def early_template() -> Process | None:
    """Early's template, while it works."""
    if _early is not None and not _early.gone and not _early.released:
        return _early
    return None


def set_early(template: Process) -> None:
    """Make a template the root of all processes made from now on."""
    global _default, _early, _fork
    with hub().lock:
        _default = _early = template
        _fork = None
        on_template_end[template] = _replace


def _replace(template: Process) -> None:
    """The default template has ended: save what it has not been asked yet."""
    global _default
    on_template_end.pop(template, None)
    if template is not _default or template.channel is None:
        return
    unsent = _unsent(template)
    if not unsent:
        return
    try:
        _default = None
        _adopt(default_template(), template, unsent)
    except OSError as exc:
        for id, fd in unsent:
            for child in _take(template, id, fd):
                child.refuse(exc)
            if fd >= 0:
                os.close(fd)


def _unsent(template: Process) -> list[tuple[int, int]]:
    unsent = []
    while template.channel is not None and (item := template.channel.reclaim()):
        unsent.append(item)
    return unsent


def _adopt(new: Process, old: Process, unsent: list[tuple[int, int]]) -> None:
    """Ask a new template for processes that the old one has not heard of."""
    assert new.channel is not None
    for id, fd in unsent:
        children = _take(old, id, fd)
        if children and children[0].moved:
            # Once: a template that dies at once must not go round.
            old.children.update({child.id: child for child in children})
            if fd >= 0:
                os.close(fd)
            continue
        for child in children:
            child.moved = True
            new.adopt(child)
        if fd >= 0:
            new.channel.request(id, fd)
        elif children:
            new.request_many(children)
    new.flush()


def _take(old: Process, id: int, fd: int) -> list[Process]:
    """The processes of a request that was not sent; without fd it was for many."""
    if fd >= 0:
        return [old.children.pop(id)]
    found = [c for c in old.children.values() if c.batch == id and c.coming]
    for child in found:
        del old.children[child.id]
    return found


def shutdown(seconds: float = 1.0) -> None:
    """End the default template and the hub, for tests of what is left behind.

    Everything made from it must have ended or be closed.
    """
    import time

    global _default, _early, _fork
    template, _default, _early, _fork = _default, None, None, None
    end = time.monotonic() + seconds
    if template is not None:
        on_template_end.pop(template, None)
        template.release()
        while not template.exited:
            if time.monotonic() > end:
                template.kill()
                end += seconds
            hub().wait(end - time.monotonic())
    if _hub._hub is not None:
        _hub._hub.hurry()
    while _hub._hub is not None and _hub._hub.owners() and time.monotonic() < end:
        _hub._hub.wait(end - time.monotonic())
    if _hub._hub is not None:
        _hub._hub.close()
        _hub._hub = None


def _forget(owners: list[object]) -> None:
    global _default, _early, _fork
    _default = _early = _fork = None


_hub.forget_all.append(_forget)
