"""Ctrl-C, SIGTERM and SIGHUP: noted, said at once, and acted on where nothing is lost by it."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class Stopped(KeyboardInterrupt):
    """A run was asked to stop.

    Args:
        number: of the signal.
        state: a sentence that says what has been saved, and where; "": nothing to speak of.
    """

    def __init__(self, number: int, state: str = "") -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number
        self.state = state


class Signals:
    """What has been received. A run stops after its step; where its state is saved already it stops at once (`at_once`).

    The first signal is answered by a line. The second is too, and a third, in a step that does not end, stops at once and
    without saving; while a checkpoint is written nothing does.
    """

    def __init__(self) -> None:
        self.received: list[int] = []
        self._process = os.getpid()
        self._at_once = self._sheltered = False

    def __bool__(self) -> bool:
        return bool(self.received)

    def raise_(self) -> None:
        """Stop.

        Raises:
            Stopped: always.
        """
        raise Stopped(self.received[0] if self.received else signal.SIGINT)  # another process may have it

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Nothing is lost by stopping in here."""
        if self.received:
            self.raise_()
        self._at_once = True
        try:
            yield
        finally:
            self._at_once = False

    @contextmanager
    def sheltered(self) -> Iterator[None]:
        """What is done in here is finished, however many signals come."""
        before, self._sheltered = self._sheltered, True
        try:
            yield
        finally:
            self._sheltered = before

    def note(self, number: int, _frame: Any) -> None:
        """Handle a signal."""
        if os.getpid() != self._process:  # a loader's worker: its run tells it when to end
            return
        self.received.append(number)
        name = signal.Signals(number).name
        if self._at_once and not self._sheltered:
            _say(f"{name}: stopping")
            self.raise_()
        if len(self.received) == 1:
            _say(f"{name}: stopping after this step, saving")
        elif self._sheltered:
            _say(f"{name}: still saving")
        elif len(self.received) == 2:
            _say(f"{name}: still finishing the step; once more stops without saving")
        else:
            self.raise_()


def _say(line: str) -> None:
    """A line on stderr, without Python's buffers: a handler may run in the midst of another write."""
    with contextlib.suppress(OSError):  # nobody listens, which after SIGHUP is to be expected
        os.write(2, f"\n{line}\n".encode() if os.isatty(2) else f"{line}\n".encode())


@contextmanager
def ending() -> Iterator[None]:
    """Ctrl-C, SIGTERM and SIGHUP end what is done in here with a line, so that it leaves nothing half-done."""
    process = os.getpid()

    def stop(number: int, _frame: Any) -> None:
        if os.getpid() == process:  # no loader's worker, which its run tells when to end
            _say(f"{signal.Signals(number).name}: stopping")
            raise Stopped(number)

    with _handled(stop, (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)):
        yield


@contextmanager
def noted() -> Iterator[Signals]:
    """Note the signals that come; their handlers of before are put back at the end."""
    signals = Signals()
    with _handled(signals.note, (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)):
        yield signals


@contextmanager
def _handled(handler: Callable[[int, Any], None], numbers: tuple[int, ...]) -> Iterator[None]:
    before = {}
    if threading.current_thread() is threading.main_thread():  # only there may handlers be set
        for number in numbers:
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores it; so it stays
                before[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
