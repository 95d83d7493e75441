"""IDX files, as MNIST, Fashion-MNIST and EMNIST are published.

A header of big-endian 32-bit numbers (a magic number, then the sizes), then the bytes themselves.
The magic number is 0x00000800 plus the number of dimensions: 3 for images, 1 for labels; the 08
says unsigned bytes. Files may be gzipped, and their names tell what they hold::

    [PREFIX]train-images-idx3-ubyte[.gz]   [PREFIX]t10k-images-idx3-ubyte[.gz]
    [PREFIX]train-labels-idx1-ubyte[.gz]   [PREFIX]t10k-labels-idx1-ubyte[.gz]

with ``.idx`` for ``-idx`` and ``test`` for ``t10k`` where a publisher spells them so.
"""

from __future__ import annotations

import gzip
import io
import math
import re
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from .errors import InvalidData
from .files import not_a_file
from .images import MAX_BYTES, Contents, Parts

NAME = re.compile(
    r"(?P<prefix>.*?)(?P<part>train|t10k|test|val)-(?P<kind>images|labels)"
    r"[-.]idx\d-ubyte(\.gz)?",
    re.IGNORECASE,
)
PART = {"train": "train", "t10k": "test", "test": "test", "val": "val"}


def is_idx(path: Path) -> bool:
    """Whether ``path`` is named like an IDX file, or is a folder with such a file in it."""
    if path.is_dir():
        return any(NAME.fullmatch(entry.name) for entry in path.iterdir())
    return NAME.fullmatch(path.name) is not None


def read_idx(path: Path) -> Contents:
    """Reads a set of IDX files: the folder they lie in, or any one of them.

    Returns:
        Images [N, 1, H, W]. Labels are numbered anew from 0 in the order of their values, which
        become the class names.

    Raises:
        InvalidData: a file is missing, damaged or of another length than its header says, or
            images and labels do not go together.
    """
    prefix, files = _choose(path)
    if ("train", "images") not in files:
        raise InvalidData(f"{path}: no {prefix}train-images-idx3-ubyte[.gz] in it")
    raw = {part: _read_pair(part, prefix, files) for part, kind in files if kind == "images"}
    values = np.unique(raw["train"][1])
    parts: Parts = {}
    for part, (images, labels) in raw.items():
        unknown = np.setdiff1d(labels, values)
        if len(unknown):
            raise InvalidData(f"{files[part, 'labels']}: label {unknown[0]} is never trained on")
        parts[part] = images[:, None], np.searchsorted(values, labels).astype(np.int64)
    notes = []
    if prefix.lower().startswith("emnist"):
        parts = {part: (x.swapaxes(2, 3), labels) for part, (x, labels) in parts.items()}
        notes.append("EMNIST's files hold every picture with rows and columns exchanged: undone")
    return Contents(parts, [str(value) for value in values], notes)


def files_of(path: Path) -> list[Path]:
    """The files of the set that ``path`` names; InvalidData if it names several."""
    return sorted(_choose(path)[1].values())


def _choose(path: Path) -> tuple[str, dict[tuple[str, str], Path]]:
    """The prefix of the set that ``path`` names, and its files by (part, kind)."""
    folder = path if path.is_dir() else path.parent
    sets: dict[str, dict[tuple[str, str], Path]] = {}
    for entry in sorted(folder.iterdir()):  # a plain file sorts before its .gz: it is preferred
        match = NAME.fullmatch(entry.name)
        if match:
            key = PART[match["part"].lower()], match["kind"].lower()
            sets.setdefault(match["prefix"], {}).setdefault(key, entry)
    if path != folder:
        match = NAME.fullmatch(path.name)
        assert match is not None, "is_idx() has been asked"
        return match["prefix"], sets[match["prefix"]]
    if len(sets) > 1:
        names = ", ".join(prefix.rstrip("-_") or "(no prefix)" for prefix in sets)
        raise InvalidData(f"{path}: holds {len(sets)} data sets ({names}): name a file of one")
    return next(iter(sets.items()))


def _read_pair(
    part: str, prefix: str, files: dict[tuple[str, str], Path]
) -> tuple[np.ndarray, np.ndarray]:
    images_path = files[part, "images"]
    labels_path = files.get((part, "labels"))
    if labels_path is None:
        name = images_path.name.replace("images", "labels").replace("idx3", "idx1")
        raise InvalidData(f"{images_path}: its labels are missing, expected {name} beside it")
    images = _read_array(images_path, 3)
    labels = _read_array(labels_path, 1)
    if len(images) != len(labels):
        raise InvalidData(
            f"{labels_path}: {len(labels)} labels for the {len(images)} images of "
            f"{images_path.name}"
        )
    return images, labels


def _read_array(path: Path, dimensions: int) -> np.ndarray:
    """The uint8 array of one IDX file that must have that many dimensions."""
    header = 4 + 4 * dimensions
    with _unpacked(path) as file:
        start = file.read(header)
        if len(start) < header:
            raise InvalidData(
                f"{path}: truncated, {len(start)} bytes where the header takes {header}"
            )
        magic, *shape = struct.unpack(f">{1 + dimensions}I", start)
        wanted = 0x800 + dimensions
        if magic != wanted:
            kind = "images" if dimensions == 3 else "labels"
            raise InvalidData(
                f"{path}: starts with 0x{magic:08X}, expected 0x{wanted:08X} (IDX {kind} of bytes)"
            )
        product, expected = "*".join(map(str, shape)), math.prod(shape)
        if expected > MAX_BYTES:
            raise InvalidData(
                f"{path}: its header says {product} = {expected} bytes, at most {MAX_BYTES} are "
                "held in memory"
            )
        # No more than the header says, and one byte to tell: 1 MB of gzip can hold 1 GB of zeros.
        data = _at_most(file, expected + 1)
    if len(data) != expected:
        formula = "count*rows*cols" if dimensions == 3 else "count"
        found = f"truncated, {header + len(data)} bytes"
        if len(data) > expected:
            found = f"too long, more than {header + expected} bytes"
        raise InvalidData(
            f"{path}: {found} found, expected {formula} + {header} = "
            f"{product} + {header} = {header + expected}"
        )
    if 0 in shape:
        raise InvalidData(f"{path}: holds nothing, its header says {product}")
    return np.frombuffer(data, dtype=np.uint8).reshape(shape)


@contextmanager
def _unpacked(path: Path) -> Iterator[io.BufferedIOBase]:
    """The file's bytes, unzipped as they are read."""
    reason = not_a_file(path)
    if reason is not None:
        raise InvalidData(f"{path}: {reason}, expected an IDX file")
    try:
        with path.open("rb") as file:
            # Told by the content, for browsers unpack a .gz and leave its name, or the other way
            # round.
            packed = file.peek(2).startswith(b"\x1f\x8b")
            yield gzip.GzipFile(fileobj=file) if packed else file
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InvalidData(f"{path}: damaged or truncated gzip file ({error})") from error
    except OSError as error:
        raise InvalidData(f"{path}: cannot be read ({error.strerror})") from error


def _at_most(file: io.BufferedIOBase, size: int) -> bytearray:
    """The next ``size`` bytes, or as many as there are; memory only for these."""
    data = bytearray()
    while piece := file.read(min(size - len(data), io.DEFAULT_BUFFER_SIZE * 128)):
        data += piece
    return data
