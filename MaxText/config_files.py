"""What stands in configs/: base.yml as the manual of every key, and a config file with its parents as settings.

In: a path. Out: `Key`s and `Setting`s with their lines; problems in words go to a list, to be told all at once.
base.yml is read down to its comments (`a | b: meaning` are a key's legal words). A setting stays text until the type
of its key is known, so that 1e-3, a string to YAML, is the same number in a file as on the command line.
"""

import dataclasses
import difflib
import functools
import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path

import yaml

BASE_PATH = Path(__file__).resolve().parent.parent / "configs" / "base.yml"


@dataclasses.dataclass(frozen=True)
class Key:
    """One entry of base.yml; choices are the legal words of a text key, empty where any text will do."""

    name: str
    default: bool | int | float | str
    section: str
    comment: str
    choices: tuple[str, ...]
    line: int

    @property
    def origin(self) -> str:
        return f"{shown(BASE_PATH)}:{self.line}"


@dataclasses.dataclass(frozen=True)
class Setting:
    """A value as it was written, and where."""

    key: str
    text: str
    origin: str


@functools.cache
def manual() -> Mapping[str, Key]:
    """Every key there is, by name, in the order of base.yml."""
    text = BASE_PATH.read_text(encoding="utf-8")
    defaults, lines = yaml.safe_load(text), text.splitlines()
    keys = {}
    for name, value in yaml.compose(text, yaml.SafeLoader).value:
        number = name.start_mark.line
        titles = (re.fullmatch(r"# -{2,} (.*?) -{2,}", line) for line in reversed(lines[:number]))
        comment = [lines[number][value.end_mark.column :]]
        for line in lines[number + 1 :]:
            if not re.match(r"\s+#", line):  # a comment at the margin belongs to no key
                break
            comment.append(line)
        meaning = " ".join(line.strip().removeprefix("#").strip() for line in comment)
        words = [choice.partition(":")[0].strip().strip('"') for choice in meaning.split(" | ")]
        keys[name.value] = Key(
            name=name.value,
            default=defaults[name.value],
            section=next((title[1] for title in titles if title), ""),
            comment=meaning,
            choices=tuple(words) if len(words) > 1 else (),
            line=number + 1,
        )
    return keys


def settings_of(path: Path, problems: list[str]) -> list[dict[str, Setting]] | None:
    """The settings of the file's ancestors below base.yml, eldest first, and of the file itself; None if unreadable."""
    chain: list[dict[str, Setting]] = []
    seen: list[Path] = []
    named_by = ""
    while (settings := _read(path, named_by, problems)) is not None:
        seen.append(path.resolve())
        if seen[-1] == BASE_PATH:
            return chain[::-1]
        parent = settings.pop("base_config", None)
        chain.append(settings)
        if parent is None and settings.keys() >= manual().keys():  # a whole config, as a run directory holds it
            return chain[::-1]
        if parent is None:
            base = Path(os.path.relpath(BASE_PATH, path.resolve().parent)).as_posix()
            problems.append(f"{shown(path)} names no parent and does not set every key; add base_config: {base}")
            return None
        path, named_by = path.parent / Path(parent.text).expanduser(), f"{parent.origin}: base_config: "
        if path.resolve() in seen:
            problems.append(f"{named_by}{parent.text} leads back to a file it came from; name base.yml instead")
            return None
    return None


def _read(path: Path, named_by: str, problems: list[str]) -> dict[str, Setting] | None:
    """The settings of one file, or None where it cannot be read."""
    file = shown(path)
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), yaml.SafeLoader)
    except FileNotFoundError:
        there = config_files()
        meant = [other for other in there if Path(other).stem == path.stem] or nearest(file, there)
        advice = f"did you mean {meant[0]}? " if meant else ""
        problems.append(f"{named_by}{file}: no such file; {advice}The config files are {', '.join(there)}")
        return None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        problems.append(f"{named_by}{file}: cannot be read ({reason}); give a YAML file, such as {config_files()[-1]}")
        return None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{file}:{mark.line + 1}" if mark else file
        problems.append(f"{where}: not YAML ({getattr(error, 'problem', error)}); write one `key: value` a line")
        return None
    if root is not None and not isinstance(root, yaml.MappingNode):
        problems.append(f"{file}: not made of `key: value` lines; write steps: 100, not steps=100")
        return None
    settings: dict[str, Setting] = {}
    for name, value in root.value if root else ():
        origin = f"{file}:{name.start_mark.line + 1}"
        if not isinstance(name, yaml.ScalarNode) or not isinstance(value, yaml.ScalarNode):
            problems.append(f"{origin}: {name.value} holds a list or a mapping; give one value")
        elif name.value in settings:
            problems.append(f"{origin}: {name.value} is already set at {settings[name.value].origin}; keep one")
        else:
            text = "" if value.tag == "tag:yaml.org,2002:null" else value.value
            settings[name.value] = Setting(name.value, text, origin)
    return settings


def config_files() -> list[str]:
    """The files in configs/, as the user would write them."""
    return [shown(path) for path in sorted(BASE_PATH.parent.glob("*.yml"))]


def shown(path: Path) -> str:
    """The path relative to the working directory, or as it is where it lies elsewhere."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


def nearest(word: str, words: Collection[str]) -> list[str]:
    """At most three of the words that a user who wrote word may have meant, the likeliest first."""
    close = difflib.get_close_matches(word.lower(), words, n=3, cutoff=0.6)
    if close and difflib.SequenceMatcher(None, close[0], word.lower()).ratio() > 0.85:
        return close[:1]  # a slip of the finger
    return close or [other for other in words if len(word) > 2 and word.lower() in other.split("_")][:3]
