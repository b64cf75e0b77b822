"""Ctrl-C and SIGTERM, looked at between two batches so that what they leave is usable."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any


class Interruption:
    """SIGINT and SIGTERM as a flag that is looked at between batches. A second one acts at once, as without this.

    A signal that nobody looked at is raised at the end of the block, so that none is lost.
    """

    def __init__(self) -> None:
        self.process = os.getpid()
        self.signal: int | None = None
        self.before: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
            for number in (signal.SIGINT, signal.SIGTERM):
                self.before[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self.process:  # a loader's worker inherits this: Ctrl-C is the main process's business
            if number == signal.SIGTERM:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        self.signal = number
        self._restore()

    def _restore(self) -> None:
        while self.before:
            number, handler = self.before.popitem()
            signal.signal(number, handler)

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        self._restore()
        if kind is None:
            self.check()

    def check(self) -> None:
        """Raise what the signal stands for."""
        if self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        if self.signal == signal.SIGTERM:
            raise SystemExit(128 + signal.SIGTERM)
