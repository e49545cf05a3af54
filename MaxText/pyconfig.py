"""The configuration of a run: base.yml, a config file and its parents, M_<KEY>, key=value; checked, then frozen.

In: the command line and the environment. Out: a FrozenConfigDict, or a ConfigError that holds every problem found.
Nothing remembers where a value came from once the config is made: `explain` resolves it again and tells, so that the
frozen config holds the keys of base.yml and nothing else.
"""

import dataclasses
import math
import shutil
import sys
import textwrap
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_collections
import yaml

from MaxText import config_files, config_rules
from MaxText.config_files import BASE_PATH, Key, Setting, manual
from MaxText.config_rules import AUTO

FLAGS = ("--help", "-h", "--explain", "--dry-run")
USAGE = """\
usage: python MaxText/train.py CONFIG.yml [key=value ...] [--dry-run] [--explain KEY] [--help]

  python MaxText/train.py configs/validate_10m.yml steps=100
  python MaxText/train.py configs/validate_10m.yml run_name=x per_device_batch_size=16 --dry-run
  python MaxText/train.py configs/validate_10m.yml --explain learning_rate

A value comes from configs/base.yml, then the config file and its parents, then M_<KEY> in the environment
(M_STEPS=100), then key=value on the command line; the last one wins."""


class ConfigError(ValueError):
    """Everything that is wrong with a configuration, in words for the user, who needs no traceback."""

    def __init__(self, problems: Sequence[str]):
        self.problems = tuple(problems)
        lines = "".join(f"\n  - {problem}" for problem in problems)
        super().__init__(
            f"{len(problems)} errors in the config:{lines}" if len(problems) > 1 else f"error: {problems[0]}"
        )


@dataclasses.dataclass(frozen=True)
class CommandLine:
    """What the user asked for: a run of config or, where message is set, that text on the screen and exit code 0."""

    config: ml_collections.FrozenConfigDict | None
    dry_run: bool
    message: str | None


@dataclasses.dataclass
class _Arguments:
    path: str | None = None
    explain: str | None = None
    help: bool = False
    dry_run: bool = False
    settings: list[Setting] = dataclasses.field(default_factory=list)
    problems: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class _Resolved:
    """Values with where each was set, and the problems so far; bad holds the keys whose value is not what was meant."""

    values: dict[str, Any]
    origins: dict[str, str]
    problems: list[str]
    bad: set[str]


def initialize(argv: Sequence[str], environ: Mapping[str, str]) -> ml_collections.FrozenConfigDict:
    """The checked, frozen config of a config file and overrides: argv is [path of the file, "key=value", ...].

    Raises:
      ConfigError: with every problem found, each with its fix.
    """
    return _checked(_split(argv), environ)


def parse_command_line(argv: Sequence[str], environ: Mapping[str, str]) -> CommandLine:
    """What a user asks for with argv, the words after the program's name: a run, a dry run, or help.

    Raises:
      ConfigError: with every problem found, each with its fix.
    """
    arguments = _split(argv)
    if arguments.help:
        return CommandLine(config=None, dry_run=False, message=help_text(arguments.path))
    if arguments.explain is not None:
        return CommandLine(config=None, dry_run=False, message=_explain(arguments.explain, arguments, environ))
    return CommandLine(config=_checked(arguments, environ), dry_run=arguments.dry_run, message=None)


def with_run_name(argv: Sequence[str], name: str) -> list[str]:
    """argv with a run name, for commands that make no run."""
    return list(argv) if any(word.startswith("run_name=") for word in argv) else [*argv, f"run_name={name}"]


def config_or_exit_code(argv: Sequence[str], environ: Mapping[str, str]) -> ml_collections.FrozenConfigDict | int:
    """The config that a command's words give; if they ask for help or cannot be, that is printed: the exit code."""
    try:
        command = parse_command_line(argv, environ)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    if command.message is not None:
        print(command.message)
        return 0
    assert command.config is not None
    return command.config


def help_text(yaml_path: str | None) -> str:
    """How to use the command line, then every key with its value in this config file (base.yml if None)."""
    values = _without_problems(_Arguments(path=yaml_path), {}).values
    width = min(max(shutil.get_terminal_size((120, 24)).columns, 100), 140)
    title = f"Every key, its value in {config_files.shown(Path(yaml_path or BASE_PATH))}, and its meaning:"
    lines = [USAGE, "", f"{title} (* differs from configs/base.yml)" if yaml_path else title]
    section = None
    for key in manual().values():
        if key.section != section:
            section = key.section
            lines += ["", section]
        mark = " " if values[key.name] == key.default else "*"
        head = f"{mark} {key.name:<31} {_text(values[key.name]):<22} "
        comment = textwrap.wrap(key.comment, width - 57, break_on_hyphens=False)
        if len(head) > 57:
            comment.insert(0, "")
        lines += [head + comment[0], *(" " * 57 + line for line in comment[1:])]
    return "\n".join(line.rstrip() for line in lines)


def explain(key: str, argv: Sequence[str], environ: Mapping[str, str]) -> str:
    """What one key means, the value it has under argv and environ, and where that value was set.

    Raises:
      ConfigError: when there is no such key; the nearest one is named.
    """
    return _explain(key, _split(argv), environ)


def to_yaml(config: ml_collections.ConfigDict) -> str:
    """The config as a YAML file that sets every key, in base.yml's order; `initialize` loads it again unchanged."""
    values = {name: config[name] for name in manual()}
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=1000)


def _checked(arguments: _Arguments, environ: Mapping[str, str]) -> ml_collections.FrozenConfigDict:
    if arguments.path is None:
        there = ", ".join(config_files.config_files())
        raise ConfigError([*arguments.problems, f"no config file is given; there are {there}\n\n{USAGE}"])
    resolved = _resolve(arguments.path, arguments, environ)
    keys, values = manual(), resolved.values
    outside = {key: rule for key, rule in config_rules.out_of_range(values).items() if key not in resolved.bad}
    for key, rule in outside.items():
        given = f"{key}={_text(values[key])} ({resolved.origins[key]})"
        resolved.problems.append(f"{given}: must be {rule}, such as the default, {_text(keys[key].default)}")
    defaults = {key.name: key.default for key in keys.values()}
    resolved.problems += config_rules.contradictions(values, defaults, ignore=resolved.bad | outside.keys())
    if resolved.problems:
        raise ConfigError(resolved.problems)
    return ml_collections.FrozenConfigDict(values)


def _explain(name: str, arguments: _Arguments, environ: Mapping[str, str]) -> str:
    key = manual().get(name)
    if name in ("", "<value>"):
        raise ConfigError(["--explain needs a key, such as --explain steps"])
    if key is None:
        raise ConfigError([_unknown(name, "--explain")])
    resolved = _without_problems(arguments, environ)
    kind = {bool: "true or false", int: "whole number", float: "number", str: "text"}[type(key.default)]
    rows = {
        "meaning": key.comment,
        "type": "one of " + ", ".join(map(_text, key.choices)) if key.choices else kind,
        "set by": resolved.origins[key.name],
        "default": f"{_text(key.default)} ({key.origin})",
        "section": key.section,
        "change": f"{key.name}=... on the command line, or M_{key.name.upper()}=... in the environment",
    }
    value = f"{key.name} = {_text(resolved.values[key.name])}"
    return "\n".join([value, *(f"  {name:<8} {row}" for name, row in rows.items())])


def _without_problems(arguments: _Arguments, environ: Mapping[str, str]) -> _Resolved:
    resolved = _resolve(arguments.path or str(BASE_PATH), arguments, environ)
    if resolved.problems:
        raise ConfigError(resolved.problems)
    return resolved


def _resolve(path: str, arguments: _Arguments, environ: Mapping[str, str]) -> _Resolved:
    """The values that base.yml, the files, the environment and the command line give, in this order."""
    keys = manual().values()
    resolved = _Resolved(
        values={key.name: key.default for key in keys},
        origins={key.name: f"{key.origin}, the default" for key in keys},
        problems=list(arguments.problems),
        bad=set(),
    )
    files = config_files.settings_of(Path(path).expanduser(), resolved.problems)
    if files is None:
        resolved.bad.update(manual())  # the values were never read, so there is nothing to check
    for settings in files or ():
        _apply(settings.values(), resolved)
    _apply(_environment(environ, resolved.problems), resolved)
    first: dict[str, Setting] = {}
    for setting in arguments.settings:
        if first.setdefault(setting.key, setting) is not setting:
            both = f"{setting.key}={first[setting.key].text} and {setting.key}={setting.text}"
            resolved.problems.append(f"{setting.key} is given twice on the command line, {both}; keep one")
    _apply(first.values(), resolved)
    return resolved


def _apply(settings: Iterable[Setting], resolved: _Resolved) -> None:
    for setting in settings:
        key = manual().get(setting.key)
        if key is None:
            resolved.problems.append(_unknown(setting.key, setting.origin))
            continue
        try:
            resolved.values[key.name] = _parse(setting.text, key)
            resolved.origins[key.name] = setting.origin
        except ValueError as error:
            resolved.problems.append(f"{key.name}={setting.text} ({setting.origin}): {error}")
            resolved.bad.add(key.name)


def _parse(text: str, key: Key) -> bool | int | float | str:
    """The value that text means for this key. Raises: ValueError with the rule and the fix."""
    if isinstance(key.default, str):
        if key.choices and text not in key.choices:
            raise ValueError(f"must be one of {', '.join(map(_text, key.choices))}{_did_you_mean(text, key.choices)}")
        return text
    if isinstance(key.default, bool):
        if text.strip() not in ("true", "false", "True", "False"):
            raise ValueError("must be true or false")
        return text.strip() in ("true", "True")
    if text == AUTO and AUTO in key.choices:
        return AUTO
    whole = isinstance(key.default, int)
    number = _number(text, whole)
    if number is None:
        plain = text.replace(",", "").replace(" ", "")
        advice = f"; write {plain}" if plain != text and _number(plain, whole) is not None else ""
        kind = f"{'whole ' if whole else ''}number{' or auto' if key.choices else ''}"
        raise ValueError(f"must be a {kind}, such as {_text(key.default)}{advice}")
    return number


def _number(text: str, whole: bool) -> int | float | None:
    try:
        if whole:
            return int(text)
    except ValueError:
        pass  # 5e3 is a whole number too
    try:
        number = float(text)
    except ValueError:
        return None
    if whole:
        return int(number) if "e" in text.lower() and number.is_integer() else None
    return number if math.isfinite(number) else None


def _environment(environ: Mapping[str, str], problems: list[str]) -> Iterator[Setting]:
    for name, text in sorted(environ.items()):
        if name.startswith("M_") and name != name.upper() and name[2:].lower() in manual():
            problems.append(f"environment {name}={text}: keys are in capitals there; write {name.upper()}={text}")
        elif name.startswith("M_"):
            yield Setting(name[2:].lower(), text, f"environment {name}")


def _split(argv: Sequence[str]) -> _Arguments:
    """The words of the command line sorted by what they are; what fits nowhere becomes a problem."""
    arguments, rest = _Arguments(), list(argv)
    while rest:
        word = rest.pop(0)
        name, equals, text = word.partition("=")
        if word in ("--help", "-h"):
            arguments.help = True
        elif word == "--dry-run":
            arguments.dry_run = True
        elif name == "--explain":
            arguments.explain = text if equals else _next_value(rest)
        elif word.startswith("-"):
            arguments.problems.append(_dashed(name, text if equals else _next_value(rest)))
        elif equals and text == "?":
            arguments.explain = name
        elif equals and not _is_file(word):
            arguments.settings.append(Setting(name, text, "command line"))
        elif arguments.path is None:
            arguments.path = word
        elif _is_file(word):
            problem = f"two config files are given, {arguments.path} and {word}; give one, and let it name the other"
            arguments.problems.append(f"{problem} with base_config:")
        else:
            if rest and rest[0] == "=":
                rest.pop(0)
            given = f"{word}={_next_value(rest)}"
            known = f"{word} has no value; write {given}, without spaces"
            arguments.problems.append(known if word in manual() else _unknown(word, "command line"))
    return arguments


def _dashed(flag: str, text: str) -> str:
    key = flag.lstrip("-").replace("-", "_")
    if key in manual():
        return f"{flag}: keys are written without dashes; write {key}={text}"
    options = {option.strip("-").replace("-", "_"): option for option in FLAGS}
    close = config_files.nearest(key, [*options, *manual()])
    meant = options.get(close[0], f"{close[0]}={text}") if close else None
    advice = f"did you mean {meant}?" if meant else f"the options are {', '.join(FLAGS)}"
    return f"{flag}: there is no such option; {advice}"


def _next_value(rest: list[str]) -> str:
    """Takes the next word if it looks like the value of the word before it."""
    if rest and "=" not in rest[0] and not rest[0].startswith("--") and not _is_file(rest[0]):
        return rest.pop(0)
    return "<value>"


def _is_file(word: str) -> bool:
    return word.endswith((".yml", ".yaml")) and word.partition("=")[0] not in manual()


def _unknown(name: str, origin: str) -> str:
    if name == "base_config":
        return f"base_config ({origin}): only a config file names its parent; give another config file instead"
    return f"{name} ({origin}): unknown key{_did_you_mean(name, manual()) or '; --help lists every key'}"


def _did_you_mean(word: str, words: Collection[str]) -> str:
    close = config_files.nearest(word, words)
    return f"; did you mean {' or '.join(close)}?" if close else ""


def _text(value: bool | int | float | str) -> str:
    """The value as the user would write it."""
    return str(value).lower() if isinstance(value, bool) else str(value) if value != "" else '""'
