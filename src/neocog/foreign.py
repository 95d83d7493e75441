"""Text that others wrote, shown to people: names of files, classes and layers, and messages.

A name may hold what a terminal or a browser obeys instead of showing it: escape sequences that
move the cursor, clear the screen or change its title; marks that turn the direction of reading
(https://www.unicode.org/reports/tr9/), so that ``cod.exe`` looks like ``exe.doc``; characters
without width; and, in names of files, bytes that are no text at all. Here each is spelled out as
Python spells it: ``\\x1b``, ``\\u202e``. Whatever is printed passes through here.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import unicodedata
from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

Value = TypeVar("Value")

_KINDS = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
"""Unicode's controls, formats (direction, zero width), surrogates, ends of lines and paragraphs."""

_BLANK = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0")
"""Letters and marks of which nothing is seen."""

_UNUSUAL = re.compile(r"[^ -~]")


def shown(text: object) -> str:
    """``str(text)`` in one line, in which every character is seen and none is obeyed."""
    return _UNUSUAL.sub(lambda found: _spelled(found[0]), str(text))


def shown_lines(text: object) -> str:
    """The same for text of several lines, whose ends and tabs stay."""
    return _UNUSUAL.sub(lambda f: f[0] if f[0] in "\n\t" else _spelled(f[0]), str(text))


def all_shown(value: Value) -> Value:
    """The value with all text in it as :func:`shown`: in lists, tuples, dicts, dataclasses."""
    found: Any = value
    if isinstance(value, str):
        found = shown(value)
    elif isinstance(value, Mapping):
        found = {all_shown(key): all_shown(item) for key, item in value.items()}
    elif isinstance(value, list):
        found = [all_shown(item) for item in value]
    elif isinstance(value, tuple):
        found = tuple(all_shown(item) for item in value)
    elif is_dataclass(value) and not isinstance(value, type):
        parts = {part.name: getattr(value, part.name) for part in fields(value) if part.init}
        found = replace(value, **{name: all_shown(part) for name, part in parts.items()})
    return found


def as_json(value: Any, indent: int | None = 2) -> str:
    """A value as JSON that reads back the same; ValueError for NaN, which JSON has not.

    What would be obeyed stands there as JSON's own escapes.
    """
    text = json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False)
    return _UNUSUAL.sub(lambda found: _in_json(found[0]), text)


def quoted(word: object) -> str:
    """A word as it is typed in a shell, ``$'...'`` (bash, zsh) if some of it cannot be seen."""
    text = str(word)
    if shown(text) == text:
        return shlex.quote(text)
    plain = {"\\": r"\\", "'": r"\'"}
    parts = (
        "".join(f"\\x{byte:02x}" for byte in os.fsencode(char))
        if _spelled(char) != char
        else plain.get(char, char)
        for char in text
    )
    return f"$'{''.join(parts)}'"


def _spelled(char: str) -> str:
    if unicodedata.category(char) in _KINDS or char in _BLANK:
        return char.encode("unicode_escape").decode("ascii")
    return char


def _in_json(char: str) -> str:
    # json.dumps has escaped what lies below the space; its own line ends are all that is left
    return char if char == "\n" or _spelled(char) == char else json.dumps(char)[1:-1]
