"""Text that others wrote, shown to people: names of files, classes and layers, and messages.

A name may hold what a terminal or a browser obeys instead of showing it: escape sequences that
move the cursor, clear the screen or change its title; marks that turn the direction of reading
(https://www.unicode.org/reports/tr9/), so that ``cod.exe`` looks like ``exe.doc``; characters
without width; and, in names of files, bytes that are no text at all. Here each is spelled out as
Python spells it: ``\\x1b``, ``\\u202e``, and a byte ``\\xff``. Whatever is printed passes through
here.

Names of files are bytes to Linux, and UTF-8 almost everywhere. Python reads them by the locale's
encoding, ASCII under ``LC_ALL=C``, and what does not fit becomes lone surrogates, which no file and
no terminal takes; they are read as UTF-8 here.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import unicodedata
from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

Value = TypeVar("Value")

_KINDS = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
"""Unicode's controls, formats (direction, zero width), surrogates, ends of lines and paragraphs."""

_BLANK = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0")
"""Letters and marks of which nothing is seen."""

_UNUSUAL = re.compile(r"[^ -~]")


_BYTES = re.compile("[\udc80-\udcff]+")
"""What Python makes of a file name's bytes that the locale's encoding does not know."""


def shown(text: object) -> str:
    """``str(text)`` in one line, in which every character is seen and none is obeyed."""
    return _UNUSUAL.sub(lambda found: _spelled(found[0]), _decoded(str(text)))


def shown_lines(text: object) -> str:
    """The same for text of several lines, whose ends and tabs stay."""
    return _UNUSUAL.sub(
        lambda found: found[0] if found[0] in "\n\t" else _spelled(found[0]), _decoded(str(text))
    )


def readable(text: str) -> str:
    """``text`` with the bytes that file names leave in it read as UTF-8, ``\\xff`` if they are not.

    Unlike :func:`shown` this leaves what a terminal would obey: for JSON, files and pages, which
    escape it themselves.
    """
    return _BYTES.sub(
        lambda run: "".join(map(_spelled, run[0])),
        _decoded(text),
    )


def text_of(name: Path | str) -> str:
    """A file's name as text, under whatever locale Python has read it; else as :func:`readable`."""
    name = str(name)
    try:
        return os.fsencode(name).decode("utf-8")
    except UnicodeError:  # as it stands, where the locale could read it: EUC-KR, for instance
        return readable(name)


def path_of(text: str) -> str:
    """The path that :func:`text_of` tells so, as Python spells it under this process's locale."""
    if os.path.exists(text):
        return text
    try:
        return os.fsdecode(text.encode("utf-8"))
    except UnicodeError:
        return text


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
    text = _decoded(str(word))
    if all(_spelled(char) == char for char in text):
        return shlex.quote(text)
    plain = {"\\": r"\\", "'": r"\'"}
    parts = (
        "".join(f"\\x{byte:02x}" for byte in _bytes_of(char))
        if _spelled(char) != char
        else plain.get(char, char)
        for char in text
    )
    return f"$'{''.join(parts)}'"


def _decoded(text: str) -> str:
    """With runs of stray bytes read as UTF-8 as far as they are; the others stay surrogates."""
    return _BYTES.sub(
        lambda run: run[0].encode("ascii", "surrogateescape").decode("utf-8", "surrogateescape"),
        text,
    )


def _bytes_of(char: str) -> bytes:
    """As a file's name holds it."""
    try:
        return os.fsencode(char)
    except UnicodeError:  # decoded here: the locale knows no such character
        return char.encode("utf-8")


def _spelled(char: str) -> str:
    if "\udc80" <= char <= "\udcff":
        return f"\\x{ord(char) - 0xDC00:02x}"
    if unicodedata.category(char) in _KINDS or char in _BLANK:
        return char.encode("unicode_escape").decode("ascii")
    return char


def _in_json(char: str) -> str:
    # json.dumps has escaped what lies below the space; its own line ends are all that is left
    return char if char == "\n" or _spelled(char) == char else json.dumps(char)[1:-1]
