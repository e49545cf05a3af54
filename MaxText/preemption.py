"""SIGTERM and SIGINT as a request to save and stop, that the loop looks at between steps."""

import signal
from types import FrameType
from typing import Any


class StopSignals:
    """While entered, SIGTERM and SIGINT ask the loop to save and stop; a second one ends the process at once."""

    def __init__(self):
        self.requested = ""  # the name of the signal that came; printing in a handler is not safe
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        self.requested = signal.Signals(number).name
        for each in self._previous:
            signal.signal(each, signal.SIG_DFL)
