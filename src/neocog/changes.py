"""What has become of the files of a data set since a network was trained on them.

A run keeps a *listing* of its files, a digest for each. Compared with a new one it tells which
classes and pictures have come, gone, changed or moved.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

from . import folders, idx
from .errors import InvalidData
from .files import not_a_file
from .foreign import text_of
from .images import list_pictures

Listing = dict[str, dict[str, str]]
"""By class folder, as "train/cat" or "cat", the digest of each picture by its path in there. IDX
files are listed under "", for they hold all classes."""

SHOWN = 3
"""Of more files than so many, only the first are named."""


def listing(path: str | None) -> Listing:
    """The files of a data set; empty for the embedded digits.

    Raises:
        InvalidData: there is no such data set.
    """
    if path is None:
        return {}
    root = Path(path)
    if not root.exists():
        raise InvalidData(f"{path}: no such file or folder")
    if idx.is_idx(root):
        return {"": {text_of(file.name): _digest(file) for file in idx.files_of(root)}}
    found: Listing = {}
    for folder in folders.parts_of(root)[0].values():
        for one in folders.class_folders(folder):
            pictures, _ = list_pictures(one)
            found[text_of(one.relative_to(root).as_posix())] = {
                text_of(picture.relative_to(one).as_posix()): _digest(picture)
                for picture in pictures
            }
    return found


def compared(before: Listing, now: Listing) -> list[str]:
    """What differs, most general first, a phrase each; empty if nothing does."""
    said: list[str] = []
    gone, new = [c for c in before if c not in now], [c for c in now if c not in before]
    renamed: dict[str, str] = {}
    for old in list(gone):
        likely = max(new, key=lambda name: _shared(before[old], now[name]), default=None)
        if likely is not None and 2 * _shared(before[old], now[likely]) > len(before[old]):
            renamed[old] = likely
            gone.remove(old)
            new.remove(likely)
    said += [f"class {old} renamed to {name}" for old, name in renamed.items()]
    said += [f"class {name} added ({_count(len(now[name]))})" for name in new]
    said += [f"class {name} removed ({_count(len(before[name]))})" for name in gone]
    pairs = [(old, renamed.get(old, old)) for old in before if old not in gone]
    for old, name in pairs:
        if len(before[old]) != len(now[name]):
            said.append(f"{name or 'files'}: {len(before[old])} then, {len(now[name])} now")
    return said + _of_files(before, now, pairs)


def _of_files(before: Listing, now: Listing, pairs: Iterable[tuple[str, str]]) -> list[str]:
    """What became of single files of the classes that are still there: (name then, name now)."""
    left: dict[str, str] = {}
    come: dict[str, str] = {}
    changed: list[str] = []
    for old, name in pairs:
        was, is_now = before[old], now[name]
        left |= {_joined(old, file): digest for file, digest in was.items() if file not in is_now}
        come |= {_joined(name, file): digest for file, digest in is_now.items() if file not in was}
        changed += [_joined(name, f) for f in was if f in is_now and was[f] != is_now[f]]
    moved: list[str] = []
    by_digest = {digest: file for file, digest in come.items()}
    for file, digest in list(left.items()):
        target = by_digest.pop(digest, None)
        if target is not None:
            moved.append(f"{file} to {target}")
            del left[file], come[target]
    kinds = {"changed": changed, "moved": moved, "added": list(come), "removed": list(left)}
    return [
        f"{len(files)} {'file' if len(files) == 1 else 'files'} {what} ({_some(files)})"
        for what, files in kinds.items()
        if files
    ]


def _shared(one: Mapping[str, str], other: Mapping[str, str]) -> int:
    """How many contents both have."""
    return (Counter(one.values()) & Counter(other.values())).total()


def _digest(path: Path) -> str:
    """Of a file's bytes; of what is no file, or cannot be read, what it is instead."""
    try:
        reason = not_a_file(path)
        if reason is not None:
            return reason
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:32]
    except OSError as error:
        return str(error.strerror)


def _joined(folder: str, file: str) -> str:
    return f"{folder}/{file}" if folder else file


def _count(number: int) -> str:
    return "1 picture" if number == 1 else f"{number} pictures"


def _some(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
