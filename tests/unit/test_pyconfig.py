"""base.yml is a complete manual; files, environment and command line win in this order; bad input is told in words."""

import ast
from pathlib import Path

import pytest
import yaml

from MaxText import config_files, config_rules, pyconfig
from MaxText.pyconfig import ConfigError

CONFIGS = config_files.BASE_PATH.parent
VALIDATE = str(CONFIGS / "validate_10m.yml")
BASE = str(config_files.BASE_PATH)
RUN = "run_name=x"


def problems_of(*argv, environ=None):
    with pytest.raises(ConfigError) as caught:
        pyconfig.parse_command_line(argv, environ or {})
    assert isinstance(caught.value, ValueError)
    assert all(problem in str(caught.value) for problem in caught.value.problems)
    return caught.value.problems


def the_problem(*argv, environ=None):
    problems = problems_of(*argv, environ=environ)
    assert len(problems) == 1, problems
    return problems[0]


def write(path, text):
    path.write_text(text)
    return str(path)


# ---- base.yml, the manual


def test_every_key_has_a_comment_and_a_section_and_there_are_at_most_150():
    keys = config_files.manual()
    assert list(keys) == list(yaml.safe_load(config_files.BASE_PATH.read_text()))
    assert len(keys) <= 150
    for key in keys.values():
        assert key.comment, f"{key.name} has no comment in base.yml"
        assert key.section, f"{key.name} stands in no section of base.yml"
        assert config_files.BASE_PATH.read_text().splitlines()[key.line - 1].startswith(f"{key.name}:")


def test_every_default_has_the_type_it_looks_like_and_is_legal():
    for key in config_files.manual().values():
        assert type(key.default) in (bool, int, float, str)
        if type(key.default) is str:  # 1e-3 without a dot is a string to YAML
            assert pyconfig._number(key.default, whole=False) is None, f"write {key.name} with a dot and a sign: 1.0e-3"
            assert not key.choices or key.default in key.choices
    pyconfig.initialize([BASE, RUN], {})


def test_every_number_has_one_range_and_every_range_a_key():
    limited = [key for _, _, keys in config_rules.LIMITS for key in keys.split()]
    numbers = [key.name for key in config_files.manual().values() if type(key.default) in (int, float)]
    assert sorted(limited) == sorted(numbers), "list each number of base.yml in one row of config_rules.LIMITS"


def test_comments_go_on_in_the_lines_below_and_hold_the_legal_words():
    keys = config_files.manual()
    assert keys["remat_policy"].choices == ("none", "minimal", "attention", "full", "custom")
    assert keys["remat_policy"].comment.endswith("nine keys below say")
    assert keys["dataset_type"].choices == ("embedded", "grain", "hf", "synthetic")
    assert keys["profiler"].choices == ("", "xplane")
    assert keys["dtype"].choices == ("bfloat16", "float32")
    assert keys["jax_cache_dir"].choices == ()
    assert keys["steps"].section == "Run" and keys["mlpwo"].section.startswith("Memory")


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yml")), ids=lambda path: path.name)
def test_every_config_file_loads(path):
    config = pyconfig.initialize([str(path), RUN, "compile_topology=v5e-8"], {})
    assert set(config) == set(config_files.manual())


def test_no_jax_is_imported():
    for module in (pyconfig, config_files, config_rules):
        for node in ast.walk(ast.parse(Path(module.__file__).read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.split(".")[0] in ("jax", "flax", "numpy", "optax") for name in names)


# ---- where a value comes from


def test_the_command_line_wins_over_the_environment_over_the_file_over_its_parent_over_base(tmp_path):
    parent = write(
        tmp_path / "parent.yml", f"base_config: {BASE}\nsteps: 1\nlog_period: 1\neval_steps: 1\nnum_epoch: 1\n"
    )
    child = write(tmp_path / "child.yml", "base_config: parent.yml\nlog_period: 2\neval_steps: 2\nnum_epoch: 2\n")
    config = pyconfig.initialize(
        [child, RUN, "num_epoch=4"], {"M_EVAL_STEPS": "3", "M_NUM_EPOCH": "3", "PATH": "/bin", "MAIL": "x"}
    )
    assert (config.steps, config.log_period, config.eval_steps, config.num_epoch) == (1, 2, 3, 4)
    assert config.base_emb_dim == config_files.manual()["base_emb_dim"].default
    assert "base_config" not in config
    assert parent.endswith("parent.yml")


@pytest.mark.parametrize(
    ("given", "value"),
    [
        ("steps=5_000", 5000),
        ("steps=5e3", 5000),
        ("learning_rate=1e-3", 1e-3),
        ("learning_rate=1", 1.0),
        ("eval_interval=-1", -1),
        ("enable_tensorboard=False", False),
        ("enable_tensorboard=true", True),
        ("tokenizer_path=", ""),
        ("tokenizer_path=a=b.yml", "a=b.yml"),
        ("run_name=007", "007"),
    ],
)
def test_text_becomes_the_type_of_the_default(given, value, tmp_path):
    key, _, text = given.partition("=")
    file = write(tmp_path / "x.yml", f"base_config: {BASE}\n{key}: {text}\n")
    name = [] if key == "run_name" else [RUN]
    for config in (
        pyconfig.initialize([BASE, *name, given], {}),
        pyconfig.initialize([BASE, *name], {f"M_{key.upper()}": text}),
        pyconfig.initialize([file, *name], {}),
    ):
        assert config[key] == value
        assert type(config[key]) is type(value)


@pytest.mark.parametrize(
    ("given", "rule"),
    [
        ("steps=2.5", "whole number"),
        ("steps=100.0", "whole number"),
        ("steps=", "whole number"),
        ("steps=1,000", "write 1000"),
        ("steps=inf", "whole number"),
        ("learning_rate=fast", "must be a number or auto, such as 0.001"),
        ("adam_eps=fast", "must be a number, such as 1e-08"),
        ("learning_rate=nan", "must be a number"),
        ("enable_tensorboard=yes", "true or false"),
        ("enable_tensorboard=1", "true or false"),
        ("dtype=bf16", "must be one of bfloat16, float32; did you mean bfloat16?"),
        ("profiler=trace", 'must be one of "", xplane'),
    ],
)
def test_text_of_another_type_is_an_error_with_its_place(given, rule, tmp_path):
    key, _, text = given.partition("=")
    file = write(tmp_path / "x.yml", f"base_config: {BASE}\n{key}: {text}\n")
    for argv, environ, place in (
        ([BASE, RUN, given], {}, "command line"),
        ([BASE, RUN], {f"M_{key.upper()}": text}, f"environment M_{key.upper()}"),
        ([file, RUN], {}, "x.yml:2"),
    ):
        problem = the_problem(*argv, environ=environ)
        assert problem.startswith(f"{key}={text} (") and place in problem and rule in problem


def test_the_config_is_frozen():
    config = pyconfig.initialize([VALIDATE], {})
    with pytest.raises(AttributeError):
        config.steps = 3
    with pytest.raises(AttributeError):
        config.no_such_key  # noqa: B018


@pytest.mark.parametrize("name", ["plain", "007", "null", "1e-3", "a b", "ünï", "yes", "#x: y"])
def test_the_written_config_loads_again_without_a_parent(name, tmp_path):
    config = pyconfig.initialize([VALIDATE, f"run_name={name}", "adam_eps=1e-17", "tokenizer_path=", "steps=3"], {})
    text = pyconfig.to_yaml(config)
    path = tmp_path / "config.yml"
    path.write_text(text, encoding="utf-8")
    assert pyconfig.initialize([str(path)], {}) == config
    assert list(yaml.safe_load(text)) == list(config_files.manual())


# ---- bad input


def test_an_unknown_key_names_the_nearest_and_its_place(tmp_path):
    file = write(tmp_path / "x.yml", f"base_config: {BASE}\n\nper_device_batchsize: 3\n")
    problem = the_problem(file, RUN)
    assert "did you mean per_device_batch_size?" in problem and "x.yml:3" in problem
    assert "learning_rate" in the_problem(BASE, RUN, "lerning_rate=1")
    assert "environment M_STESP" in the_problem(BASE, RUN, environ={"M_STESP": "1"})
    assert "did you mean steps" in the_problem(BASE, RUN, environ={"M_STESP": "1"})
    assert "sdc_check_interval" in the_problem(BASE, RUN, "sdc=1")
    assert "--help" in the_problem(BASE, RUN, "zzzz=1")
    assert "M_STEPS=1" in the_problem(BASE, RUN, environ={"M_steps": "1"})
    assert "only a config file" in the_problem(BASE, RUN, "base_config=a")


def test_all_problems_are_told_at_once(tmp_path):
    file = write(tmp_path / "x.yml", f"base_config: {BASE}\nstpes: 3\nsteps: 0\ndtype: int8\n")
    argv = [file, "head_dim=7", "warmup=1", "--log_period=1", "num_vocab_tiling=x"]
    problems = problems_of(*argv, environ={"M_ADAM_B1": "1", "M_NOPE_NOPE": ""})
    words = [
        "stpes",
        "steps=0",
        "dtype=int8",
        "head_dim=7",
        "warmup",
        "log_period",
        "num_vocab_tiling=x",
        "adam_b1=1.0",
    ]
    words += ["nope_nope", "run_name"]
    assert len(problems) == len(words)
    for word in words:
        assert sum(word in problem for problem in problems) == 1, word
    with pytest.raises(ConfigError, match=r"^10 errors in the config:\n  - "):
        pyconfig.initialize(argv, {"M_ADAM_B1": "1", "M_NOPE_NOPE": ""})


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--steps=100"], "write steps=100"),
        (["--steps", "100"], "write steps=100"),
        (["--learning-rate", "1e-3"], "write learning_rate=1e-3"),
        (["--eval_interval", "-1"], "write eval_interval=-1"),
        (["-steps=100"], "write steps=100"),
        (["--stesp=100"], "did you mean steps=100?"),
        (["--dry_run"], "did you mean --dry-run?"),
        (["--hlep"], "did you mean --help?"),
        (["--zzzzzzz"], "the options are --help"),
        (["steps", "100"], "write steps=100, without spaces"),
        (["steps", "=", "100"], "write steps=100, without spaces"),
        (["steps", "--dry-run"], "write steps=<value>"),
        (["stesp"], "did you mean steps"),
        (["steps=1", "steps=2"], "given twice on the command line, steps=1 and steps=2"),
        ([VALIDATE], "two config files"),
    ],
)
def test_a_slip_on_the_command_line_is_told_how_to_write_it(argv, message):
    assert message in the_problem(BASE, RUN, *argv)


def test_no_file_or_a_missing_file_lists_those_there_are(tmp_path):
    assert "usage:" in the_problem() and "validate_10m.yml" in the_problem()
    assert "usage:" in the_problem("steps=3")
    for wrong in ("configs/validate10m.yml", "validate_10m"):
        problem = the_problem(wrong)
        assert wrong in problem and "base.yml, " in problem
        assert "did you mean" in problem.partition("validate_10m.yml?")[0]
    file = write(tmp_path / "x.yml", "\nbase_config: nowhere.yml\n")
    assert "x.yml:2: base_config: " in the_problem(file) and "nowhere.yml: no such file" in the_problem(file)
    assert "cannot be read" in the_problem(str(tmp_path))
    (tmp_path / "x.bin").write_bytes(b"\xff\xfe\x00\x01")
    assert "not UTF-8 text" in the_problem(str(tmp_path / "x.bin"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps: 1\n", "add base_config: "),
        ("", "add base_config: "),
        ("base_config: x.yml\n", "leads back"),
        (f"base_config: {BASE}\nsteps: 1\nsteps: 2\n", "x.yml:3: steps is already set at "),
        (f"base_config: {BASE}\nsteps: [1]\n", "x.yml:2: steps holds a list"),
        (f"base_config: {BASE}\nsteps: a: b\n", "x.yml:2: not YAML"),
        (f"base_config: {BASE}\n\tsteps: 1\n", "not YAML"),
        ("steps=100\n", "write steps: 100, not steps=100"),
        (f"base_config: {BASE}\nsteps: !!python/object/apply:os.abort []\n", "holds a list"),
    ],
)
def test_a_bad_file_is_told_with_its_line(text, message, tmp_path):
    assert message in the_problem(write(tmp_path / "x.yml", text), RUN)


def test_a_value_that_is_not_understood_is_not_compared_with_others():
    assert "num_vocab_tiling=x" in the_problem(BASE, RUN, "num_vocab_tiling=x", "max_target_length=500")
    assert "num_vocab_tiling=0" in the_problem(BASE, RUN, "num_vocab_tiling=0", "max_target_length=500")


@pytest.mark.parametrize("name", ["a/b", "..", ".", " a", "a\\b", "/", "a\nb", "n" * 256])
def test_a_run_name_is_a_plain_directory_name(name):
    assert "run_name" in the_problem(BASE, f"run_name={name}")
    assert "is not given" in the_problem(BASE, "run_name=")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("ici_fsdp_parallelism=3", "ici_fsdp_parallelism=3 does not divide base_emb_dim=256; use 1, 2, 4 or 8"),
        ("ici_tensor_parallelism=8", "does not divide base_num_query_heads=4; use 1, 2 or 4"),
        ("ici_tensor_parallelism=4 base_num_kv_heads=2", "does not divide base_num_kv_heads=2; use 1 or 2"),
        ("ici_tensor_parallelism=4 base_mlp_dim=1022", "does not divide base_mlp_dim=1022; use 1 or 2"),
        ("ici_tensor_parallelism=4 vocab_size=49153", "does not divide vocab_size=49153; use 1"),
        ("base_num_kv_heads=3", "base_num_kv_heads=3 does not divide base_num_query_heads=4; use 1, 2 or 4"),
        ("attention_type=differential", "base_num_kv_heads=1: attention_type=differential takes heads in pairs"),
        ("attention_type=v2", "must be one of standard, differential, differential_v2"),
        ("num_vocab_tiling=7", "num_vocab_tiling=7 does not divide max_target_length=512; use 1, 2, 4 or 8"),
        ("head_dim=63", "use head_dim=64"),
        ("ici_fsdp_parallelism=-1", "at most one may be -1"),
        ("load_full_state_path=a load_parameters_path=b", "keep the first"),
        ("query_proj=device", "use remat_policy=custom"),
        ("base_output_directory=", "such as base_output_directory=outputs"),
        ("dataset_type=grain eval_interval=-1", "needs grain_train_files="),
        ("dataset_type=grain eval_interval=-1 grain_train_files=/no/such", "/no/such: there is no such directory"),
        (f"dataset_type=grain eval_interval=-1 grain_train_files={CONFIGS}", f"{CONFIGS / 'manifest.json'}"),
        ("steps=0", "steps=0 (command line): must be at least 1"),
        ("eval_interval=0", "must be -1 or at least 1"),
        ("learning_rate_schedule_steps=-2", "must be -1 or at least 1"),
        ("ici_data_parallelism=0", "must be -1 or at least 1"),
        ("gradient_accumulation_steps=0", "must be at least 1"),
        ("learning_rate=0", "must be greater than 0"),
        ("adam_b2=1", "must be at least 0 and below 1"),
        ("warmup_steps_fraction=1.1", "must be from 0 to 1"),
        ("init_weights_seed=-1", "must be from 0"),
        ("gradient_clipping_threshold=-1", "must be at least 0"),
    ],
)
def test_an_impossible_value_is_told_with_numbers_and_fix(argv, message):
    assert message in the_problem(BASE, RUN, *argv.split())


def test_evaluation_needs_held_out_data(tmp_path):
    (tmp_path / "manifest.json").touch()
    problem = the_problem(BASE, RUN, "dataset_type=grain", f"grain_train_files={tmp_path}")
    assert "needs grain_eval_files=" in problem


@pytest.mark.parametrize(
    "argv",
    [
        "ici_tensor_parallelism=4",  # one K/V head is replicated
        "ici_tensor_parallelism=2 base_num_kv_heads=2",
        "ici_data_parallelism=2 ici_fsdp_parallelism=-1",
        "remat_policy=custom query_proj=device",
        "load_parameters_path=b",
        "warmup_steps_fraction=1 adam_b1=0 gradient_clipping_threshold=0 eval_steps=-1",
    ],
)
def test_what_is_legal_is_accepted(argv):
    pyconfig.initialize([BASE, RUN, *argv.split()], {})


def test_prepared_data_with_a_manifest_is_accepted(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "manifest.json").write_text("{}")
    monkeypatch.setenv("HOME", str(tmp_path))
    config = pyconfig.initialize(
        [BASE, RUN, "dataset_type=grain", "grain_train_files=~/data", f"grain_eval_files={tmp_path / 'data'}"], {}
    )
    assert config.grain_train_files == "~/data"


def test_the_mesh_must_fit_the_devices():
    def problems(devices, *argv):
        return config_rules.mesh_problems(pyconfig.initialize([BASE, RUN, *argv], {}), devices)

    data, fsdp, tensor = (f"{key}={{}}".format for key in config_rules.MESH_KEYS)
    for legal in ((data(8),), (data(2), fsdp(2), tensor(2)), (data(-1), fsdp(2), tensor(4)), (data(1), fsdp(-1))):
        assert problems(8, *legal) == []
    assert problems(1) == []
    assert "use ici_data_parallelism=4 or ici_fsdp_parallelism=4" in problems(8, data(2), fsdp(2))[0].replace(
        ", ", " or "
    )
    assert "= 2, but there are 1 devices; use ici_data_parallelism=1" in problems(1, data(2))[0]
    assert (
        "use ici_data_parallelism=-1 ici_fsdp_parallelism=1 ici_tensor_parallelism=1"
        in problems(3, data(2), fsdp(2))[0]
    )
    assert "does not divide the 8 devices" in problems(8, tensor(2), fsdp(8))[0]
    assert "make it 1, 2, 4 or 8" in problems(8, tensor(2), fsdp(8))[0]
    assert problems(3, data(1), fsdp(-1)) == [
        "on 3 devices, ici_fsdp_parallelism=3 does not divide base_emb_dim=256; use 1"
    ]
    assert "ici_tensor_parallelism=8 does not divide base_num_query_heads=4" in problems(8, data(1), tensor(-1))[0]
    problem = problems(8, data(1), tensor(4))[0]  # tensor=8 would not divide the 4 heads and is not offered
    assert problem.endswith("but there are 8 devices; use ici_data_parallelism=2 or ici_fsdp_parallelism=2")


# ---- help


@pytest.mark.parametrize("flag", ["--help", "-h"])
@pytest.mark.parametrize("file", [[], [VALIDATE]])
def test_help_lists_every_key_with_its_comment(flag, file):
    command = pyconfig.parse_command_line([*file, flag], {})
    assert command.config is None
    joined = " ".join(command.message.split())
    for key in config_files.manual().values():
        assert f" {key.name} " in joined and key.comment in joined, key.name
    assert max(len(line) for line in command.message.splitlines()) <= 140
    assert command.message.startswith("usage:")
    assert ("* run_name" in command.message) == bool(file)


def test_explain_tells_the_value_its_place_and_its_meaning():
    for argv in (["--explain", "log_period"], ["--explain=log_period"], ["log_period=?"]):
        text = pyconfig.parse_command_line([VALIDATE, *argv], {}).message
        assert text.startswith("log_period = 10\n")
        assert "validate_10m.yml:7" in text and "whole number" in text
        assert config_files.manual()["log_period"].comment in text
    assert "set by   command line" in pyconfig.explain("steps", [VALIDATE, "steps=7"], {"M_STEPS": "8"})
    assert "set by   environment M_STEPS" in pyconfig.explain("steps", [VALIDATE], {"M_STEPS": "8"})
    assert "base.yml:" in pyconfig.explain("adam_eps", [VALIDATE], {}) and ", the default" in pyconfig.explain(
        "dtype", [], {}
    )
    assert "one of bfloat16, float32" in pyconfig.explain("dtype", [], {})
    assert "did you mean steps" in the_problem(VALIDATE, "--explain", "stesp")
    assert "unknown key" in the_problem(VALIDATE, "zzzz=?")
    assert "--explain needs a key" in the_problem(VALIDATE, "--explain")


def test_dry_run_is_told_apart():
    assert pyconfig.parse_command_line([VALIDATE, "--dry-run"], {}).dry_run
    command = pyconfig.parse_command_line([VALIDATE, "steps=3"], {})
    assert (command.dry_run, command.message, command.config.steps) == (False, None, 3)
