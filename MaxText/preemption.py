"""SIGTERM, SIGINT and the end of max_run_hours as a request to save and stop, in every phase of a run.

Until there is something to save, the first one ends the process at once with EXIT_RESUME. After that the loop reads
`requested` between steps. A second one ends the process wherever it is: a thread of its own reads the signals, because
the main thread may be inside a call that does not return.
"""

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from types import FrameType
from typing import Any

EXIT_RESUME = 75  # "resume me": interrupted, nothing lost, the same command continues

_SECONDS_TO_TRY_AGAIN = 0.1


class Stopped(BaseException):
    """A request to stop came while something was under way that can be given up."""


class StopSignals:
    """Requests to stop; entered once, by the main thread, at the start of the process.

    Attributes:
        requested: the signal that came, in words; empty until then.
        alone: whether this process may give up something by itself, as no other one takes part in it.
    """

    def __init__(self):
        self.requested = ""
        self.alone = True
        self._hours = 0.0
        self._saves = False  # whether there is a loop that saves
        self._giving_up = False  # whether the handler may raise Stopped
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._previous_fd = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM):
            self._previous[number] = signal.signal(number, self._on_signal)
        threading.Thread(target=self._watch, args=(self._reader,), name="signals", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._previous_fd)
        self._writer.close()  # ends the thread

    def stop_after(self, hours: float, elapsed_seconds: float) -> None:
        """Requests a stop when the process is `hours` old; it is `elapsed_seconds` old now."""
        self._hours = hours
        signal.setitimer(signal.ITIMER_REAL, max(hours * 3600 - elapsed_seconds, 1e-3))

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """While entered, somebody looks at `requested`, and saves."""
        self._saves = True
        try:
            yield
        finally:
            self._saves = False

    @contextlib.contextmanager
    def may_give_up(self) -> Iterator[None]:
        """A block that a request to stop ends with Stopped, even in the middle; it must be fit to be left there."""
        self._giving_up = self.alone
        try:
            try:
                if self.requested and self.alone:
                    raise Stopped
                yield
            finally:
                self._giving_up = False
        finally:  # the handler may have raised in the lines above
            self._giving_up = False

    def wait_for(self, function: Callable[[], Any]) -> Any:
        """The function's result; a request to stop leaves its thread behind, with Stopped."""
        executor = futures.ThreadPoolExecutor(1, "given up on stop")
        try:
            with self.may_give_up():
                return executor.submit(function).result()
        finally:
            executor.shutdown(wait=False)

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        self._note(number)
        if self._giving_up:
            # A finalizer's exceptions are lost: if this one comes in one, it comes again.
            signal.setitimer(signal.ITIMER_REAL, _SECONDS_TO_TRY_AGAIN)
            raise Stopped

    def _note(self, number: int) -> None:
        if not self.requested:
            timed_out = number == signal.SIGALRM
            self.requested = f"max_run_hours={self._hours:g}" if timed_out else signal.Signals(number).name

    def _watch(self, reader: socket.socket) -> None:
        asked = 0
        with reader:
            while received := reader.recv(1):
                number = received[0]
                if number not in self._previous:
                    continue
                self._note(number)
                asked += number != signal.SIGALRM
                if not self._saves:
                    _leave(f"{self.requested}: there is nothing to save; the same command goes on", EXIT_RESUME)
                if asked == 2:
                    name = signal.Signals(number).name
                    _leave(f"{name} again: stopping at once; what was saved before is whole", 128 + number)


def _leave(line: str, code: int) -> None:
    """Ends the process without waiting for anything; only what the kernel does by itself is cleaned up."""
    with contextlib.suppress(OSError):
        os.write(1, f"{line}\n".encode())
    os._exit(code)
