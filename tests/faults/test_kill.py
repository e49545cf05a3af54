"""The short version of kill.py: a few instants, seeded."""

import pytest

from tests import support
from tests.faults import kill


@pytest.mark.slow
@pytest.mark.faults
def test_killed_and_resumed_it_is_the_same_run_bit_for_bit(tmp_path, user_environment):
    harness = kill.Harness(tmp_path, user_environment, support.ROOT / ".pytest_cache/jax_kill", seed=2)
    kills = harness.run_with_kills("killed", 4)
    assert len(kills) >= 3 and max(each.reached for each in kills) > kill.PERIOD, kills
    for each, steps in kill.lost_steps(kills):
        # Saving in the background, training goes on, at most until the next save.
        assert steps <= kill.PERIOD * (2 if each.asynchronous else 1), kills
