"""Finds passwords and keys that were left in source files, to drop the file or to blank them.

In: a text. Out: the kinds found, or the text without them. Only forms that are hardly ever anything else: the
published formats of the big services, private keys, and long random strings assigned to a name that says so. Each
pattern has a literal that is looked for first, which makes the whole 10 times as fast.
"""

import math
import re
from collections import Counter

REDACTED = "REDACTED"
MIN_ENTROPY = 3.5  # bits a character, below which an assigned string is taken for a word or a placeholder
# kind, literals of which one must be there (in lower case), pattern; group "secret" is what is blanked
_RULES = [
    (kind, literals.split(), re.compile(pattern))
    for kind, literals, pattern in (
        ("aws_key", "akia asia", r"\b(?P<secret>(?:AKIA|ASIA)[0-9A-Z]{16})\b"),
        ("github_token", "ghp_ gho_ ghu_ ghs_ ghr_ github_pat_", r"\b(?P<secret>gh[pousr]_\w{36,}|github_pat_\w{50,})"),
        ("google_key", "aiza", r"\b(?P<secret>AIza[\w-]{35})"),
        ("slack_token", "xox", r"\b(?P<secret>xox[abprs]-[\w-]{10,})"),
        ("stripe_key", "k_live_", r"\b(?P<secret>[sr]k_live_\w{16,})"),
        ("openai_key", "sk-", r"\b(?P<secret>sk-(?:proj-|ant-)?[\w-]{32,})"),
        ("hugging_face_token", "hf_", r"\b(?P<secret>hf_[A-Za-z]{34})\b"),
        ("pypi_token", "pypi-ag", r"\b(?P<secret>pypi-Ag[\w-]{50,})"),
        ("json_web_token", "eyj", r"\b(?P<secret>eyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,})"),
        ("private_key", "private key", r"-----BEGIN [A-Z ]*PRIVATE KEY-----(?P<secret>[^-]{64,})-----END"),
        (
            "url_password",
            "://",
            r"://[\w.~-]{1,64}:(?P<secret>[^\s:/@'\"{}<>$%*]{6,64})@[\w.-]+\.\w",
        ),
        ("assigned_secret", "secret token key passw", r"['\"](?P<secret>[\w+/=.~-]{20,200})['\"]"),
    )
]


# What must stand before an assigned secret, on its line: a name that says so, and a sign.
_NAME = re.compile(r"(?i)(?:secret|token|api_?key|passw(?:or)?d|private_?key|access_?key)\w*['\"]?\]?\s*[:=]\s*$")
NAME_CHARACTERS = 80


def find(text: str) -> list[tuple[str, int, int]]:
    """The secrets in a text: (kind, first character, the one after the last), in order and apart from each other.

    Secrets that overlap are one, of the kind of the first.
    """
    lower = text.lower()
    found = []
    for kind, literals, pattern in _RULES:
        if not any(literal in lower for literal in literals):
            continue
        for match in pattern.finditer(text):
            if kind not in _DOUBTFUL or _DOUBTFUL[kind](text, match):
                found.append((kind, *match.span("secret")))
    found.sort(key=lambda item: item[1:])
    apart: list[tuple[str, int, int]] = []
    for kind, start, stop in found:
        if apart and start < apart[-1][2]:
            kind, start, last = apart.pop()
            stop = max(stop, last)
        apart.append((kind, start, stop))
    return apart


def redact(text: str, found: list[tuple[str, int, int]]) -> str:
    """The text with a fixed word in place of each secret."""
    pieces, last = [], 0
    for _, start, stop in found:
        pieces += [text[last:start], REDACTED]
        last = stop
    return "".join([*pieces, text[last:]])


def _is_mixed(secret: str) -> bool:
    """Whether it holds digits and letters, as a placeholder such as `password` does not."""
    return any(map(str.isdigit, secret)) and any(map(str.isalpha, secret))


def _is_url_password(text: str, match: re.Match[str]) -> bool:
    return _is_mixed(match["secret"])


def _is_assigned(text: str, match: re.Match[str]) -> bool:
    """Whether it looks drawn at random, many different digits and letters, and its name says what it is."""
    secret = match["secret"]
    if not _is_mixed(secret) or not _NAME.search(text[max(match.start() - NAME_CHARACTERS, 0) : match.start()]):
        return False
    counts = Counter(secret).values()
    entropy = -sum(count / len(secret) * math.log2(count / len(secret)) for count in counts)
    return entropy > min(MIN_ENTROPY, math.log2(len(secret)) - 0.5)


_DOUBTFUL = {"assigned_secret": _is_assigned, "url_password": _is_url_password}
