"""A profile of a few steps, as JAX's own profiler writes it, for TensorBoard's profile page or XProf."""

from pathlib import Path

import jax


class Profiler:
    """Starts before step `first` of this launch and stops after `steps` steps; does nothing when disabled."""

    def __init__(self, directory: Path, *, enabled: bool, first: int, steps: int):
        self._directory = directory
        self._enabled = enabled
        self._first, self._stop = first, first + steps
        self._running = False

    def before_step(self, launched_steps: int) -> None:
        """Call before dispatching; `launched_steps` counts the steps dispatched since the launch."""
        if self._enabled and launched_steps == self._first:
            jax.profiler.start_trace(str(self._directory))
            self._running = True
        elif launched_steps == self._stop:
            self.close()

    def close(self) -> None:
        """Ends a profile that is under way."""
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
