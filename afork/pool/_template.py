"""The process that those of a pool are forked from."""

from __future__ import annotations

import asyncio

from afork import _afork
from afork._fork import Fork
from afork._interpreter import update_path
from afork.rpc._rpc import Setup

#: Seconds in which our own has to end.
_GRACE = 1.0


class Template:
    """A given one, or one of our own: made when needed, replaced when it has died."""

    def __init__(self, given: Fork | None, setup: Setup, modules: list[str]) -> None:
        self._own = given is None
        self._fork = given
        self._setup = setup
        #: All that each process would import: it is part of how long a lost one
        #: takes to be replaced.
        self._modules = modules
        self._main_told = False
        self._handed_out = False
        #: A process of it has been initialised: should it die, it is not because
        #: it cannot work.
        self.proven = False
        if given is not None:
            self._prepare(given)

    def get(self) -> Fork:
        """The process.

        Raises:
            OSError: ours cannot be started.
        """
        fork = self._fork
        if fork is None or self._is_replaceable(fork):
            self.proven = False  # also if there will be none
            fork = self._fork = Fork.new()
            self._prepare(fork)
        return fork

    def hand_out(self) -> Fork:
        """The process, for the user to prepare: another would not be the same."""
        fork = self.get()
        self._handed_out = True
        return fork

    def _is_replaceable(self, fork: Fork) -> bool:
        return self._own and not self._handed_out and _is_dead(fork)

    def _prepare(self, fork: Fork) -> None:
        fork.require(*self._modules)
        if self._setup.needs_main or self._main_told:
            self._tell_main(fork)

    def need_main(self) -> None:
        """A function of the main program is called: load it once, for all."""
        if not self._main_told and "main" in self._setup.values:
            self._tell_main(self.get())

    def _tell_main(self, fork: Fork) -> None:
        self._main_told = True
        process = fork._process
        if process.has_main or process.channel is None:
            return
        update_path(process)
        main = self._setup.values["main"]
        process.channel.strings(_afork.CMD_SET, [b"main", main])
        process.flush()

    def is_lost(self) -> bool:
        """Whether it has died although it had worked, and will be replaced."""
        fork = self._fork
        return self.proven and fork is not None and self._is_replaceable(fork)

    def close(self) -> None:
        """Let ours end."""
        if self._own and self._fork is not None:
            self._fork.close()

    def kill(self) -> None:
        """End ours now."""
        if self._own and self._fork is not None:
            try:
                self._fork.kill()
            except ProcessLookupError:
                pass

    async def end(self) -> None:
        """Wait for the end of ours, which was closed."""
        if not self._own or self._fork is None:
            return
        for _ in range(2):
            try:
                async with asyncio.timeout(_GRACE):
                    await self._fork.wait()
                    return
            except TimeoutError:
                self.kill()
            except Exception:  # nobody knows how it has ended
                self.kill()
                return


def _is_dead(fork: Fork) -> bool:
    process = fork._process
    return process.gone or process.broken or process.error is not None
