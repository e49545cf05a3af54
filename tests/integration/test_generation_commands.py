"""decode.py, evaluate.py and serve.py on a model trained here, which knows three functions by heart."""

import http.client
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest
from matplotlib import axes

from MaxText import checkpoint_manifest, decode, evaluate
from MaxText.inference import runs
from MaxText.input_pipeline import token_block_writer, tokenizer
from tests import support

FUNCTIONS = {
    "add_two": ("a, b", "The sum of both.", "    return a + b\n"),
    "first_of": ("xs", "The first element.", "    return xs[0]\n"),
    "shout": ("text", "In capitals.", "    return text.upper()\n"),
}
TESTS = {"add_two": "(1, 2) == 3", "first_of": "([4, 5]) == 4", "never_seen": "(7) == 'seven'"}


def prompt_of(name):
    arguments, sentence, _ = FUNCTIONS.get(name, ("n", "In words.", ""))
    return f'def {name}({arguments}):\n    """ {sentence} """\n'


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The directory of a run of two epochs over many copies of the functions."""
    folder = tmp_path_factory.mktemp("generation")
    texts = [prompt_of(name) + body for name, (_, _, body) in FUNCTIONS.items()]
    tokenizer.train(texts * 3, 300, folder / "tokenizer")
    encoder = tokenizer.load(str(folder / "tokenizer"))
    for part, copies in (("train", 250), ("heldout", 20)):
        writer = token_block_writer.TokenBlockWriter(folder / part, encoder, 512, 2**20)
        writer.add(encoder.encode(texts * copies), copies * sum(map(len, texts)))
        writer.finish("a test", "none", {})
    keys = support.SMALL | {
        "run_name": "known",
        "base_output_directory": folder,
        "base_emb_dim": 64,
        "head_dim": 16,
        "base_mlp_dim": 128,
        "vocab_size": 320,
        "mtp_num_layers": 1,
        "attention_type": "differential_v2",
        "max_target_length": 64,
        "per_device_batch_size": 8,
        "steps": "auto",
        "num_epoch": 2,
        "learning_rate": 4e-3,
        "dataset_type": "grain",
        "grain_train_files": folder / "train",
        "grain_eval_files": folder / "heldout",
        "tokenizer_path": folder / "tokenizer",
        "checkpoint_every_epoch": "true",
        "checkpoint_period": 10**6,
        "eval_interval": -1,
        "enable_tensorboard": "false",
        "log_period": 20,
        "jax_cache_dir": "",
    }
    settings = [f"{key}={value}" for key, value in keys.items()]
    command = [
        sys.executable,
        str(support.ROOT / "MaxText/train.py"),
        str(support.ROOT / "configs/base.yml"),
        *settings,
    ]
    done = subprocess.run(command, env=os.environ | {"JAX_NUM_CPU_DEVICES": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / "known"


def command(capsys, entry, *words):
    code = entry.main([str(word) for word in words])
    return code, *capsys.readouterr()


def test_decode_goes_on_with_what_it_knows(run, capsys):
    prompt = prompt_of("add_two").rstrip()
    code, out, _ = command(capsys, decode, run, f"prompt={prompt}", "temperature=0", "max_tokens=30")
    assert code == 0
    assert out.startswith(prompt_of("add_two") + "    return a + b\n")
    assert "ended by: stop]" in out
    code, guessing, _ = command(
        capsys, decode, run, f"prompt={prompt}", "temperature=0", "max_tokens=30", "speculative_tokens=1"
    )
    assert guessing.split("\n[")[0] == out.split("\n[")[0]
    assert float(re.search(r"([\d.]+) tokens a step", guessing)[1]) > 1.5


def test_decode_takes_a_config_a_checkpoint_and_typed_prompts(run, capsys, monkeypatch):
    step = max(int(path.name) for path in (run / "checkpoints").iterdir())
    for target in (run / "config.yml", run / "checkpoints" / str(step)):
        code, out, err = command(capsys, decode, target, "prompt=def shout", "temperature=0", "max_tokens=40")
        assert code == 0 and "return text.upper()" in out, err
    typed = iter(["def first_of(xs):", '    """ The first element. """', "."])
    monkeypatch.setattr("builtins.input", lambda: next(typed, None) or (_ for _ in ()).throw(EOFError))
    code, out, _ = command(capsys, decode, run, "--interactive", "temperature=0", "max_tokens=20")
    assert code == 0 and "return xs[0]" in out
    code, out, _ = command(
        capsys, decode, run, "prompt=def ", "num_samples=2", "best_of=5", "temperature=1", "max_tokens=8"
    )
    means = [float(mean) for mean in re.findall(r"of 2, mean log-probability (-[\d.]+)", out)]
    assert len(means) == 2 and means[0] >= means[1]


def ask(port, method, path, body=None):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request(method, path, json.dumps(body), {"Content-Type": "application/json"})
    answer = connection.getresponse()
    status, content = answer.status, json.loads(answer.read())
    connection.close()
    return status, content


def test_the_server_as_a_command(run, user_environment):
    """It compiles first, answers on this machine only, and ends with code 0 when it is told to."""
    words = [sys.executable, str(support.ROOT / "MaxText/serve.py"), str(run), "serve_port=0", "decode_rows=2"]
    environment = user_environment | {"JAX_NUM_CPU_DEVICES": "1", "JAX_PLATFORMS": "cpu"}
    with subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout and server.stderr
            said = [server.stdout.readline() for _ in range(2)]
            assert said[0].startswith("compiling for 2 rows and lengths 65"), (said, server.stderr.read())
            port = int(re.fullmatch(r"known on http://127\.0\.0\.1:(\d+)/v1/completions; Ctrl-C ends\n", said[1])[1])
            assert ask(port, "GET", "/health")[1]["status"] == "ok"
            body = {"prompt": "def shout", "temperature": 0, "max_tokens": 30}
            status, answer = ask(port, "POST", "/v1/completions", body)
            assert status == 200 and "return text.upper()" in answer["choices"][0]["text"]
            if sys.platform == "linux":
                bound = pathlib.Path(f"/proc/{server.pid}/net/tcp").read_text().split()
                assert f"0100007F:{port:04X}" in bound and f"00000000:{port:04X}" not in bound
            server.terminate()
            assert server.wait(60) == 0, server.stderr.read()
        finally:
            server.kill()


def test_a_run_of_two_slices_is_decoded_on_one_device(run, capsys, monkeypatch):
    info = runs.TrainedRun.info

    def of_slices(self, step):
        saved = info(self, step)
        return saved | {"config": saved["config"] | {"dcn_data_parallelism": 2, "ici_fsdp_parallelism": 4}}

    monkeypatch.setattr(runs.TrainedRun, "info", of_slices)
    code, out, err = command(capsys, decode, run, "prompt=def shout", "temperature=0", "max_tokens=40")
    assert code == 0 and "return text.upper()" in out, err


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["{run}"], 2, "no prompt is given"),
        (["{run}", "prompt=x", "temprature=1"], 2, "did you mean temperature"),
        (["{run}", "prompt=x", "base_mlp_dim=96"], 1, "base_mlp_dim: 128 there, 96 here"),
        (["{run}", "prompt=x", "speculative_tokens=2"], 2, "use speculative_tokens=1"),
        (["{run}", "prompt=" + "x" * 400], 1, "the length the model reads"),
        (["{run}", "prompt=a\udcff"], 1, "'\\udcff' is no character"),
        (["{run}/nowhere", "prompt=x"], 1, "is no run"),
        (["{run}", "prompt=x", "y"], 1, "settings are written key=value"),
        (["{run}", "prompt=x", "ici_data_parallelism=3", "ici_fsdp_parallelism=5"], 2, "ici_fsdp_parallelism=5"),
    ],
)
def test_decode_says_what_is_wrong(run, capsys, words, code, message):
    got, _, err = command(capsys, decode, *(word.format(run=run) for word in words))
    assert (got, message in err) == (code, True), err


@pytest.fixture(scope="module")
def problems(tmp_path_factory):
    path = tmp_path_factory.mktemp("problems") / "HumanEval.jsonl"
    lines = []
    for number, (name, call) in enumerate(TESTS.items()):
        solution = FUNCTIONS.get(name, ("", "", "    return 'seven'\n"))[2]
        test = f"def check(candidate):\n    assert candidate{call}\n"
        lines.append({"task_id": f"HumanEval/{number}", "prompt": prompt_of(name), "entry_point": name})
        lines[-1] |= {"canonical_solution": solution, "test": test}
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.mark.skipif(sys.platform != "linux", reason="the sandbox needs Linux")
def test_humaneval_of_every_epoch(run, problems, capsys):
    words = [run, "task=humaneval", f"task_file={problems}", "num_samples=4", "temperature=0.1", "max_tokens=20"]
    words += ["allow_unsafe_sandbox=true", "decode_rows=8"]
    code, out, err = command(capsys, evaluate, *words, "checkpoints=epochs")
    assert code == 0, err
    assert "sandbox: " in out and "with HumanEval: not known to be compared" in out
    (folder,) = (run / "evaluation").glob("humaneval-*")
    scores = [json.loads(line) for line in (folder / "scores.jsonl").read_text().splitlines()]
    assert [record["step"] for record in scores] == sorted(int(p.name) for p in (run / "checkpoints").iterdir())
    assert len(scores) == 2
    assert scores[-1]["scores"]["pass@1"] == pytest.approx(2 / 3)
    assert scores[-1]["scores"]["pass@1_standard_error"] > 0.1
    assert scores[-1]["tokens"] == scores[-1]["step"] * 8 * 64
    assert (folder / "scores.png").stat().st_size > 5000
    header, *samples = map(json.loads, (folder / f"{scores[-1]['step']}.jsonl").read_text().splitlines())
    assert header["settings"]["temperature"] == 0.1 and len(samples) == 12
    by_number = sorted((s["problem"], s["sample"], s["completion"]) for s in samples)
    assert by_number[0][2].startswith("\n    return a + b")

    # Interrupted after two samples: the others are made again, and are the same.
    last = folder / f"{scores[-1]['step']}.jsonl"
    last.write_text("".join(last.read_text().splitlines(keepends=True)[:3]))
    (folder / "scores.jsonl").unlink()
    code, out, err = command(capsys, evaluate, *words, "checkpoints=last")
    assert code == 0 and "2 of 12 samples are graded already" in out, err
    again = map(json.loads, last.read_text().splitlines()[1:])
    assert sorted((s["problem"], s["sample"], s["completion"]) for s in again) == by_number
    code, out, _ = command(capsys, evaluate, *words, "checkpoints=last")
    assert code == 0 and "scored before" in out


@pytest.mark.skipif(sys.platform != "linux", reason="the sandbox needs Linux")
def test_infilling_held_out_loss_and_the_summary(run, capsys):
    code, out, err = command(
        capsys, evaluate, run, "task=infilling", "infilling_problems=3", "max_tokens=8", "allow_unsafe_sandbox=true"
    )
    assert code == 0 and "exact_match" in out and "syntax_valid" in out, err
    code, out, err = command(capsys, evaluate, run, "task=heldout", "checkpoints=all", "eval_steps=1")
    assert code == 0, err
    bits = [float(value) for value in re.findall(r"^\|.*bits_per_byte ([\d.]+)", out, re.MULTILINE)]
    assert len(bits) == len(list((run / "checkpoints").iterdir())) and bits[-1] < 0.5
    code, out, err = command(capsys, evaluate, "summary", run)
    assert code == 0 and "best by bits_per_byte: checkpoint" in out and "best by exact_match" in out, err


def held_out(capsys, run, *words):
    """What was said, and the losses of the checkpoints."""
    code, out, err = command(capsys, evaluate, run, "task=heldout", "checkpoints=all", *words)
    assert code == 0, err
    return out, re.findall(r"^\|.* loss ([\d.]+)", out, re.MULTILINE)


def trained_anew(run, step, other):
    """Gives a checkpoint the weights of another."""
    folder = run / "checkpoints"
    shutil.rmtree(folder / str(step))
    shutil.copytree(folder / str(other), folder / str(step))
    checkpoint_manifest.write(folder / str(step), step)


def test_other_held_out_data_lengths_and_weights_are_measured_anew(run, tmp_path, capsys):
    copy = shutil.copytree(run, tmp_path / "known", ignore=shutil.ignore_patterns("evaluation"))
    _, losses = held_out(capsys, copy)
    assert held_out(capsys, copy)[0].count("scored before") == 2
    for words in (
        ["max_target_length=32"],
        [f"grain_eval_files={run.parent / 'train'}"],
        ["rope_factor=4", "original_max_position_embeddings=16"],
    ):
        out, others = held_out(capsys, copy, *words)
        assert "scored before" not in out and others != losses, words
    first, last = checkpoint_manifest.steps_in(copy / "checkpoints")[::-1]
    trained_anew(copy, first, last)
    out, others = held_out(capsys, copy)
    assert out.count("scored before") == 1 and others == [losses[1]] * 2


def test_branches_are_scored_with_the_run_and_drawn_where_they_begin(run, tmp_path, capsys, monkeypatch):
    """A copy of the run's last checkpoint stands for a branch from its first one."""
    copy = shutil.copytree(run, tmp_path / "known", ignore=shutil.ignore_patterns("evaluation"))
    code, _, err = command(capsys, evaluate, "branches", copy, "task=heldout")
    assert code == 1 and "has no branches; train some with branch_decay_from=<step>" in err
    last, first = checkpoint_manifest.steps_in(copy / "checkpoints")
    branch = copy / "branches" / f"{first}-{last}"
    shutil.copytree(copy / "checkpoints" / str(last), branch / "checkpoints" / str(last))
    _, losses = held_out(capsys, copy)
    drawn = {}
    monkeypatch.setattr(axes.Axes, "errorbar", lambda _, x, y, *__, label, **___: drawn.update({label: (x, y)}))
    monkeypatch.setattr(axes.Axes, "legend", lambda _: None)
    code, out, err = command(capsys, evaluate, "branches", copy, "task=heldout")
    assert code == 0 and f"best by bits_per_byte: checkpoint {last} of " in out, err
    table = out[out.index("| run") :]
    assert re.findall(r"^\| (\S+) .* loss ([\d.]+)", table, re.MULTILINE) == [
        *(("known", loss) for loss in losses), (branch.name, losses[1])
    ]  # fmt: skip
    (tokens, bits), (begins, decayed) = drawn["bits_per_byte"], drawn["bits_per_byte, decayed"]
    assert (begins, decayed) == (tokens[:1], bits[1:])


@pytest.mark.skipif(sys.platform != "linux", reason="the sandbox needs Linux")
def test_another_file_of_problems_has_results_of_its_own(run, problems, tmp_path, capsys):
    (tmp_path / "two.jsonl").write_text("".join(problems.read_text().splitlines(keepends=True)[:2]))
    words = [run, "task=humaneval", "temperature=0", "max_tokens=20", "allow_unsafe_sandbox=true"]
    for file, score in ((problems, "66.67%"), (tmp_path / "two.jsonl", "100.00%")):
        code, out, err = command(capsys, evaluate, *words, f"task_file={file}")
        assert code == 0 and f"pass@1 {score}" in out, err
    assert "scored before" in command(capsys, evaluate, *words, f"task_file={problems}")[1]
    assert "scored before" not in command(capsys, evaluate, *words, f"task_file={problems}", "decode_rows=3")[1]


@pytest.mark.skipif(sys.platform != "linux", reason="the sandbox needs Linux")
def test_samples_of_a_checkpoint_are_not_added_to_after_it_was_trained_anew(run, problems, tmp_path, capsys):
    copy = shutil.copytree(run, tmp_path / "known", ignore=shutil.ignore_patterns("evaluation"))
    words = [copy, "task=humaneval", f"task_file={problems}", "max_tokens=20", "allow_unsafe_sandbox=true"]
    assert command(capsys, evaluate, *words)[0] == 0
    trained_anew(copy, *checkpoint_manifest.steps_in(copy / "checkpoints"))
    code, _, err = command(capsys, evaluate, *words)
    assert code == 1 and "was made with other settings (settings: {" in err and "'checkpoint': " in err, err
    assert "use another file, or delete this one" in err


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["{run}", "checkpoints=7"], 1, "has no checkpoint 7; there are"),
        (["{run}", "checkpoints=some"], 2, "use last, all, epochs or the number of a step"),
        (["{run}", "task=mbpp"], 1, "MBPP needs the path"),
        (["{run}", "task=chess"], 2, "must be one of humaneval, mbpp, infilling, infilling_multi_line, heldout"),
        (["summary", "{run}/nowhere"], 1, "is no run"),
        (["summary"], 1, "no run is given"),
    ],
)
def test_evaluate_says_what_is_wrong(run, capsys, words, code, message):
    got, _, err = command(capsys, evaluate, *(word.format(run=run) for word in words))
    assert (got, message in err) == (code, True), err


def test_without_words_the_commands_say_how_they_are_used(capsys):
    for entry in (decode, evaluate):
        assert entry.main([]) == 2
        assert entry.main(["--help"]) == 0
    assert capsys.readouterr().out.count("usage: ") == 2
