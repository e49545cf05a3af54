"""What `auto` and a decay branch become, and that what they depend on is checked."""

import pytest

from MaxText import optimizers, pyconfig, schedule_plan
from tests import support

WSD = {"lr_schedule_type": "wsd", "warmup_steps_fraction": 0.02, "wsd_decay_steps_fraction": 0.1}


def settled(num_windows=1000, num_parameters=1_078_000_000, **keys):
    config = support.small_config(**keys)
    return schedule_plan.settled(config, num_parameters=num_parameters, num_windows=num_windows, global_batch_size=64)


@pytest.mark.parametrize(
    ("parameters", "rate"), [(1.5e9, 3e-4), (6e9, 1.5e-4), (375_000_000, 6e-4), (10**12, 1e-4), (18_287_872, 1e-3)]
)
def test_learning_rate_by_size(parameters, rate):
    config, lines = settled(learning_rate="auto", num_parameters=int(parameters))
    assert config.learning_rate == pytest.approx(rate)
    assert "1.5e9" in lines[0] and f"{int(parameters):,}" in lines[0]


def test_steps_are_whole_batches_of_all_epochs():
    config, lines = settled(steps="auto", num_epoch=4, dataset_type="embedded")
    assert config.steps == 62  # 4,000 sequences in batches of 64
    assert "4 epochs x 1,000 sequences / 64 a step = 62" in lines[0]
    with pytest.raises(ValueError, match="less than one batch"):
        settled(num_windows=10, steps="auto", num_epoch=4, dataset_type="embedded")


def test_a_config_without_auto_is_left_alone():
    config, lines = settled()
    assert (config, lines) == (support.small_config(), [])


def test_every_epoch_has_its_end_and_the_last_step_is_one():
    ends = schedule_plan.epoch_ends(62, 64, 1000)
    assert ends == [15, 31, 46, 62]
    assert schedule_plan.epoch_ends(61, 64, 1000) == [15, 31, 46]
    assert schedule_plan.epoch_ends(10, 64, 2**40) == []


def test_a_branch_is_the_end_of_a_run_that_long():
    config, lines = settled(**WSD, steps=2000, branch_decay_from=900, run_name="r")
    assert config.steps == config.learning_rate_schedule_steps == 1000
    assert str(schedule_plan.branch_start(config)) == "outputs/r/checkpoints/900"
    assert "the last 100 steps of a run of 1,000" in lines[0]
    rate = optimizers.learning_rate_schedule(config)
    assert float(rate(900)) == pytest.approx(config.learning_rate)
    assert float(rate(901)) < config.learning_rate
    assert float(rate(1000)) == pytest.approx(config.learning_rate * config.learning_rate_final_fraction)
    assert str(schedule_plan.run_directory(config)) == "outputs/r/branches/900-1000"
    longer, _ = settled(**WSD | {"wsd_decay_steps_fraction": 0.5}, steps=2000, branch_decay_from=900, run_name="r")
    assert str(schedule_plan.run_directory(longer)) == "outputs/r/branches/900-1800"
    assert schedule_plan.settled(config, num_parameters=1, num_windows=1, global_batch_size=1)[0] == config
    with pytest.raises(ValueError, match="from step 40 to 1,800"):
        settled(**WSD, steps=2000, branch_decay_from=1900)


def test_a_branch_from_the_last_stable_step_is_no_longer_than_the_run():
    keys = WSD | {"steps": "auto", "num_epoch": 4, "dataset_type": "embedded"}
    for windows in range(16 * 700, 16 * 760, 16):  # 700 steps and more
        whole, _ = settled(windows, **keys)
        branch, _ = settled(windows, **keys, branch_decay_from=schedule_plan.phases(whole)[1])
        assert whole.steps - 1 <= branch.steps <= whole.steps


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"steps": "auto"}, "num_epoch=-1"),
        ({"steps": "auto", "num_epoch": 1, "dataset_type": "synthetic"}, "synthetic never ends"),
        ({"branch_decay_from": 9, "lr_schedule_type": "cosine"}, "lr_schedule_type=wsd"),
        ({"branch_decay_from": 9, **WSD, "load_full_state_path": "x"}, "leave load_full_state_path"),
        ({"steps": "automatic"}, "must be a whole number or auto"),
        ({"log_period": "auto"}, "must be a whole number, such as"),
    ],
)
def test_what_cannot_be_is_said(keys, words):
    with pytest.raises(pyconfig.ConfigError, match=words):
        support.small_config(**keys)
