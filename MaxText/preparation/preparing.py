"""The whole of a preparation: find the units, scan them, choose, encode, and vouch for the result with manifests.

In: a config. Out: `out`/train, /heldout, /tokenizer and report.json. Every step leaves files in a folder whose name is
a hash of the source and of all settings; run again after a kill, it goes on from them. The result holds no time,
host name or worker count: the same source and settings give the same bytes.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ml_collections import FrozenConfigDict

from MaxText.evaluation import humaneval, mbpp
from MaxText.input_pipeline import inputs, token_block_writer, token_blocks, tokenizer
from MaxText.preparation import choosing, pool, ray_pool, tasks
from MaxText.preparation.tasks import PARTS, Settings, Workplace

REPORT = "report.json"
TOKENIZER = "tokenizer"
REPORT_SECONDS = 5
ENGINES = {"local": pool.run, "ray": ray_pool.run}
SHOWN_FAILURES = 5
Log = Callable[[str], None]


def prepare(config: FrozenConfigDict, log: Log) -> int:
    """Prepare what `config.source` names into `config.out`; 0 complete, 1 some units failed and a rerun may mend it.

    Raises:
        ValueError: the source, a setting or what lies in `out` will not do; unfinished work of others is never deleted.
        OSError: `out` cannot be written.
    """
    if not config.source or not config.out:
        raise ValueError(f"source={config.source} out={config.out}: both are needed, such as source=dir:src out=data")
    if "://" in config.out:
        raise ValueError(
            f"out={config.out}: must be a folder of a disk or of a mounted bucket, as what is written there is read "
            "without URLs; prepare into a folder and copy it"
        )
    out = Path(config.out).expanduser()
    given = _given_tokenizer(config, out / TOKENIZER)
    settings = _settings(config, given)
    benchmarks = read_benchmarks(config.decontaminate)
    started = time.monotonic()
    units = inputs.find_units(config.source, inputs.UNIT_BYTES, log)
    work = {
        "version": [tasks.VERSION, token_blocks.FORMAT_VERSION],
        "settings": dataclasses.asdict(settings),
        "tokenizer": given.fingerprint if given else [tokenizer.num_token_ids(config), tokenizer.CODE_PATTERN],
        "benchmarks": benchmarks,
        "units": [unit.to_json() for unit in units],
    }
    digest = hashlib.sha256(json.dumps(work, sort_keys=True).encode()).hexdigest()[:16]
    if (out / REPORT).is_file():
        return _check_complete(out, digest, log)
    whole = out.absolute()  # other processes may work in other folders
    workplace = Workplace(whole / f".work-{digest}", whole)
    with _alone(out):
        for other in sorted(set(whole.glob(".work-*")) - {workplace.folder}):
            _refuse_others(other, work)
        if not (workplace.folder / "work.json").is_file():
            workplace.write_json(workplace.folder / "work.json", work)
        numbers = [unit.number for unit in units]
        sizes = {unit.number: unit.size for unit in units}
        workers = config.prepare_workers or len(os.sched_getaffinity(0))
        engine = ENGINES[config.prepare_engine]
        if _run(workplace, "scan", sizes, engine, workers, log):
            return 1
        dropped = _choose(workplace, numbers, settings, tokenizer.num_token_ids(config), given, log)
        encoder = given or _trained_tokenizer(str(out / workplace.read_json("chosen.json")["tokenizer"]))
        _delete_half_written(workplace)
        sizes = {number: max(_chosen_bytes(workplace, number), 1) for number in numbers}
        if _run(workplace, "encode", sizes, engine, workers, log):
            return 1
        _delete_half_written(workplace)
        report = _finish(workplace, units, settings, benchmarks, encoder, dropped, digest)
        shutil.rmtree(workplace.folder)
    for line in _closing(report, out, time.monotonic() - started):
        log(line)
    return 0


def read_benchmarks(names: str) -> dict[str, str]:
    """The problems that no document may hold, by <benchmark>/<problem>.

    Args:
        names: `humaneval`, and files of problems, separated by commas.

    Raises:
        ValueError: there is no such file, or it holds no problems.
    """
    found: dict[str, str] = {}
    for name in filter(None, map(str.strip, names.split(","))):
        if name == "humaneval" or "mbpp" in Path(name).name:
            task = humaneval.load("") if name == "humaneval" else mbpp.load(name)
            found |= {problem.name: problem.prompt + problem.solution for problem in task.problems}
            continue
        try:
            lines = Path(name).expanduser().read_text().splitlines()
            rows = [json.loads(line) for line in lines if line.strip()]
            texts = ["\n".join(value for value in row.values() if isinstance(value, str)) for row in rows]
        except (OSError, ValueError, AttributeError) as error:
            raise ValueError(
                f"decontaminate={name}: must be humaneval, or a .jsonl file with one problem a line ({error})"
            ) from error
        found |= {f"{Path(name).name}/{number}": text for number, text in enumerate(texts)}
    return found


def _settings(config: FrozenConfigDict, given: tokenizer.Tokenizer | None) -> Settings:
    needed = {"repo_name", "file_sep"}
    if config.repositories and given is not None and not needed <= given.special_ids.keys():
        raise ValueError(
            f"repositories=true needs tokens for {' and '.join(sorted(needed))}, and tokenizer_path="
            f"{config.tokenizer_path} has {sorted(given.special_ids) or 'none'}; use another one or repositories=false"
        )
    return Settings(
        text_column=config.text_column,
        line_rules=config.line_rules,
        drop_generated=config.drop_generated,
        syntax_check=config.syntax_check,
        licenses=tuple(sorted({name.strip().lower() for name in config.licenses.split(",")} - {""})),
        secrets=config.secrets,
        near_duplicate_threshold=config.near_duplicate_threshold,
        held_out_one_in=config.held_out_one_in,
        repositories=config.repositories,
        eos_id=given.eos_id if given else -1,
        vocab_size=given.vocab_size if given else -1,
    )


def _given_tokenizer(config: FrozenConfigDict, copy: Path) -> tokenizer.Tokenizer | None:
    if not config.tokenizer_path:
        return None
    if Path(config.tokenizer_path).expanduser().resolve().is_relative_to(copy.resolve()):
        raise ValueError(
            f"tokenizer_path={config.tokenizer_path} lies in {copy}, which a preparation writes anew; move it "
            "elsewhere, or give another out"
        )
    given = tokenizer.load(config.tokenizer_path)
    tokenizer.check_fits(given, config.tokenizer_path, tokenizer.num_token_ids(config))
    return given


@contextlib.contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Keep a second preparation out of the folder for as long as this one lives."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"out={out} is being prepared by another process; wait for it, or give another out"
            ) from None
        yield
        (out / ".lock").unlink()


def _refuse_others(folder: Path, work: dict[str, Any]) -> None:
    try:
        other = json.loads((folder / "work.json").read_text())
        names = [name for name, value in json.loads(json.dumps(work)).items() if other.get(name) != value]
    except (OSError, ValueError, AttributeError):
        names = ["settings"]
    raise ValueError(
        f"{folder} holds unfinished work with other {', '.join(names).replace('units', 'files of the source')}: repeat "
        "the command that began it, give another out, or delete that folder"
    )


def _delete_half_written(workplace: Workplace) -> None:
    """Delete what killed processes left of shards and reports; whoever prepares is alone in the folder."""
    patterns = [f"{REPORT}.*.tmp", *(f"{part}/tokens-*.tmp" for part in PARTS)]
    for leftover in (path for pattern in patterns for path in workplace.out.glob(pattern)):
        leftover.unlink()


def _check_complete(out: Path, digest: str, log: Log) -> int:
    try:
        report = json.loads((out / REPORT).read_text())
        work, tokens = report["work"], report["tokens"]["train"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"out={out} holds a {REPORT}, which no preparation wrote; give another out") from None
    if work != digest:
        raise ValueError(
            f"out={out} holds data of another source or other settings, or of another version of this program; give "
            "another out, or delete it first"
        )
    if (leftover := out / f".work-{digest}").is_dir():  # of one that was killed while it deleted this
        with _alone(out):
            shutil.rmtree(leftover)
    log(f"{out} is complete already: {tokens:,} training tokens")
    return 0


def _trained_tokenizer(path: str) -> tokenizer.Tokenizer:
    trained = tokenizer.load(path)
    trained.name = "byte-level BPE trained on this data"  # no path of this machine
    return trained


def _run(workplace: Workplace, task: str, sizes: dict[int, int], engine: Any, workers: int, log: Log) -> bool:
    """Do the task for the units for which it is not done; says how it goes. True if any failed."""
    todo = [number for number in sizes if not workplace.done(task, number).is_file()]
    if len(todo) < len(sizes):
        log(f"{task}: {len(sizes) - len(todo):,} of {len(sizes):,} units are done already")
    total = sum(sizes[number] for number in todo)
    started = told = time.monotonic()
    read = finished = 0

    def progress(size: int) -> None:
        nonlocal read, told
        read += size
        now = time.monotonic()
        if now - told > REPORT_SECONDS:
            told, rate = now, max(read, 1) / (now - started)
            log(
                f"{task}: {finished:,} of {len(todo):,} units, {read / 1e6:,.0f} of about {total / 1e6:,.0f} MB, "
                f"{rate / 1e6:.1f} MB/s, about {max(total - read, 0) / rate:,.0f} s left"
            )

    def done(number: int) -> None:
        nonlocal finished
        finished += 1

    failures = engine(task, todo, workplace, workers, progress, done) if todo else {}
    seconds = max(time.monotonic() - started, 1e-9)
    log(f"{task}: {finished:,} units, {read / 1e6:,.1f} MB in {seconds:.1f} s, {read / 1e6 / seconds:.1f} MB/s")
    for number, story in sorted(failures.items())[:SHOWN_FAILURES]:
        log(f"{task}: UNIT {number} FAILED: {story}")
    if failures:
        log(f"{task}: {len(failures):,} units failed; the same command tries these again")
    return bool(failures)


def _choose(
    workplace: Workplace,
    numbers: Sequence[int],
    settings: Settings,
    vocab_size: int,
    given: tokenizer.Tokenizer | None,
    log: Log,
) -> dict[str, int]:
    """Deduplicate and split, and see to the tokenizer; what was dropped at this point, by reason."""
    if workplace.file("chosen", 0, "npy").is_file() and (workplace.folder / "chosen.json").is_file():
        return workplace.read_json("chosen.json")["dropped"]
    started = time.monotonic()
    dropped = choosing.choose(
        workplace, numbers, settings.near_duplicate_threshold, settings.held_out_one_in, settings.repositories
    )
    log(f"choose: duplicates of all units dropped: {dict(dropped)} ({time.monotonic() - started:.1f} s)")
    folder = workplace.out / TOKENIZER
    shutil.rmtree(folder, ignore_errors=True)
    if given is not None:
        name = given.save(folder)
    else:
        texts = choosing.sample_texts(workplace, numbers)
        if not texts:
            raise ValueError("there is no text to train a tokenizer on; for token ids, give their tokenizer_path")
        log(f"tokenizer: training a byte-level BPE of {vocab_size:,} on {sum(map(len, texts)) / 1e6:.1f} MB")
        tokenizer.train(texts, vocab_size, folder)
        name = ""
    content = {"tokenizer": str(Path(TOKENIZER) / name), "dropped": dict(dropped)}
    workplace.write_json(workplace.folder / "chosen.json", content)
    return content["dropped"]


def _chosen_bytes(workplace: Workplace, number: int) -> int:
    """What is to be encoded for a shard, roughly: the compressed texts of the unit, as they lie on the disk."""
    return workplace.file("scan", number, "texts").stat().st_size * inputs.COMPRESSION


def _finish(
    workplace: Workplace,
    units: Sequence[inputs.Unit],
    settings: Settings,
    benchmarks: Iterable[str],
    encoder: tokenizer.Tokenizer,
    chosen_dropped: dict[str, int],
    digest: str,
) -> dict[str, Any]:
    """Write the manifests, the held-out one first, and the report; returns the report."""
    scans = [json.loads(workplace.done("scan", unit.number).read_text()) for unit in units]
    counts = {
        name: sum((Counter(scan[name]) for scan in scans), Counter()) for name in ("dropped", "tagged", "bad", "totals")
    }
    counts["dropped"] += Counter(chosen_dropped)
    hits = [hit for scan in scans for hit in scan["hits"]]
    compared = _documents_by_benchmark(benchmarks, hits)
    encoded = [json.loads(workplace.done("encode", unit.number).read_text()) for unit in units]
    place = f"{units[0].kind}:{units[0].place}" if units[0].place else units[0].kind
    by = "repository" if settings.repositories else "text"
    rule = f"held out if the first 8 bytes of sha256({by}), big-endian, mod {settings.held_out_one_in} == 0"
    manifests = {}
    for part in PARTS[::-1]:
        results = [result[part] for result in encoded if part in result]
        if part == "heldout" and not results:
            if settings.held_out_one_in:
                raise ValueError(
                    f"no document was held out of {counts['totals']['records']:,}; lower held_out_one_in="
                    f"{settings.held_out_one_in}, or set it to 0 for no held-out data"
                )
            continue
        if not results:
            raise ValueError(f"no document is left of {counts['totals']['records']:,}: {_in_words(counts['dropped'])}")
        manifests[part] = token_block_writer.write_manifest(
            workplace.out / part,
            encoder,
            token_block_writer.BLOCK_TOKENS,
            [token_blocks.Shard(**result["shard"]) for result in results],
            max_token_id=max(result["max_token_id"] for result in results),
            source_bytes=sum(result["source_bytes"] for result in results),
            dropped=dict(sorted((counts["dropped"] + counts["bad"]).items())),
            split_rule=rule,
            source=place,
            preparation={
                "settings": dataclasses.asdict(settings),
                "benchmarks": compared,
                "tagged": dict(sorted(counts["tagged"].items())),
                "bad": dict(sorted(counts["bad"].items())),
                "totals": dict(sorted(counts["totals"].items())),
            },
        )
    report = {
        "work": digest,
        "source": place,
        **{name: dict(sorted(counter.items())) for name, counter in counts.items()},
        "documents": {part: manifest.documents for part, manifest in manifests.items()},
        "tokens": {part: manifest.tokens for part, manifest in manifests.items()},
        "source_bytes": {part: manifest.source_bytes for part, manifest in manifests.items()},
        "hits": hits,
        "bad_records": [bad for scan in scans for bad in scan["bad_records"]],
    }
    workplace.write_json(workplace.out / REPORT, report)
    return report


def _documents_by_benchmark(problems: Iterable[str], hits: Iterable[dict[str, str]]) -> dict[str, int]:
    """How many documents were left out for holding a piece of each benchmark that they were compared with."""
    found = {(hit["problem"].partition("/")[0], hit["location"]) for hit in hits}
    counts = Counter(benchmark for benchmark, _ in found)
    return {benchmark: counts[benchmark] for benchmark in sorted({name.partition("/")[0] for name in problems})}


def _closing(report: dict[str, Any], out: Path, seconds: float) -> Iterator[str]:
    totals = report["totals"]
    size = totals.get("bytes", 0)
    yield f"READ: {totals.get('records', 0):,} records, {size / 1e6:,.1f} MB of {report['source']}"
    if report["bad"]:
        yield f"BAD RECORDS, skipped: {_in_words(report['bad'])}; each with its place in {out / REPORT}"
        for location, reason, detail in report["bad_records"][:SHOWN_FAILURES]:
            printable = location.encode(errors="backslashreplace").decode()  # not every name of a file is UTF-8
            yield f"  {printable}: {reason}{': ' if detail else ''}{detail}"
    yield f"DROPPED: {_in_words(report['dropped'])}"
    if report["tagged"]:
        yield f"KEPT, but counted: {_in_words(report['tagged'])}"
    if report["hits"]:
        problems = len({hit["problem"] for hit in report["hits"]})
        documents = report["dropped"]["contaminated"]
        yield f"CONTAMINATED: {documents:,} documents with {problems} problems; in {out / REPORT}"
    for part, tokens in report["tokens"].items():
        share = report["source_bytes"][part] / tokens
        yield f"{part.upper()}: {tokens:,} tokens of {report['documents'][part]:,} documents, {share:.2f} bytes a token"
    yield f"TIME: {seconds:.1f} s, {size / 1e6 / seconds:.2f} MB/s"
    heldout = f" grain_eval_files={out / 'heldout'}" if "heldout" in report["tokens"] else " eval_interval=-1"
    yield f"To train on it: dataset_type=grain grain_train_files={out / 'train'}{heldout}"


def _in_words(counts: dict[str, int]) -> str:
    return ", ".join(f"{reason} {count:,}" for reason, count in sorted(counts.items())) or "none"
