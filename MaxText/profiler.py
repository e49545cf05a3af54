"""A profile of a few steps, as JAX's own profiler writes it, for TensorBoard's profile page or XProf."""

from pathlib import Path

import jax


class Profiler:
    """Starts before step `first` of this launch and stops after `steps` steps; does nothing when disabled."""

    def __init__(self, directory: Path, *, enabled: bool, first: int, steps: int):
        self._directory = directory
        self._start = first if enabled else -1
        self._stop = first + steps if enabled else -1

    def before_step(self, launched_steps: int) -> None:
        """Call before dispatching; `launched_steps` counts the steps dispatched since the launch."""
        if launched_steps == self._start:
            jax.profiler.start_trace(str(self._directory))
        elif launched_steps == self._stop:
            self.close()

    def close(self) -> None:
        """Ends a profile that is under way."""
        if self._stop >= 0:
            self._stop = -1
            jax.profiler.stop_trace()
