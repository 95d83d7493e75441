"""Folders of pictures: a folder a class, perhaps under train/, val/ and test/.

Pictures may differ in size and in colour: the headers are read first, which settles one size and
one number of channels for all, and then each picture is decoded straight into its place.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .errors import InvalidData
from .images import (
    Parts,
    Size,
    as_tensor,
    is_hidden,
    list_pictures,
    natural,
    open_picture,
    probe,
    resized,
)

PART = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}
LAYOUT = "expected a folder of pictures for each class, or such folders under train/ and test/"

MAX_BYTES = 8 * 2**30
"""Pictures are held in memory as bytes; a set beyond this is refused before it is decoded."""


@dataclass(frozen=True)
class _Picture:
    path: Path
    label: int
    size: Size
    is_grey: bool


def read_folder(
    path: Path, size: Size | None, colour: bool | None
) -> tuple[Parts, list[str], list[str]]:
    """Reads a folder of class folders.

    Args:
        path: the folder.
        size: (height, width) of all pictures; ``None`` takes the most common one.
        colour: 3 channels or 1; ``None`` takes 3 if any picture is in colour.

    Returns:
        (parts, class names, notes). Without train/, everything is in the part "train".

    Raises:
        InvalidData: naming the file or folder at fault.
    """
    folders, notes = _parts(path)
    classes = [folder.name for folder in _subfolders(folders["train"])]
    if len(classes) < 2:
        found = f"only {classes[0]}/" if classes else "no class folder"
        raise InvalidData(f"{folders['train']}: {found} in it, {LAYOUT} (at least 2 classes)")
    listed, others = {}, []
    for part, folder in folders.items():
        listed[part], passed_over = _list_part(folder, classes)
        others += passed_over
    if others:
        names = ", ".join(other.name for other in others[:5]) + (", ..." if others[5:] else "")
        notes.append(f"passed over {_count(len(others), 'file')} that are no pictures: {names}")

    everything = [picture for pictures in listed.values() for picture in pictures]
    target, note = _choose_size(everything, size)
    notes += note
    channels, note = _choose_channels(everything, colour)
    notes += note
    _check_memory(path, len(everything), channels, target)
    done: Counter[str] = Counter()
    parts = {part: _decode(listed[part], channels, target, done) for part in listed}
    notes += [f"{_count(number, 'picture')}: {what}" for what, number in done.items()]
    return parts, classes, notes


def _parts(path: Path) -> tuple[dict[str, Path], list[str]]:
    """The folders of class folders by part, and notes on folders passed over."""
    folders = _subfolders(path)
    if not folders:
        empty = "is empty" if not any(path.iterdir()) else "holds no folder"
        raise InvalidData(f"{path}: {empty}, {LAYOUT} (or IDX files)")
    known: dict[str, Path] = {}
    for folder in folders:
        if folder.name.lower() in PART:
            known.setdefault(PART[folder.name.lower()], folder)
    # A class may be called "train" as well (and hold pictures of trains).
    if len(known) < len(folders) and not ("train" in known and _subfolders(known["train"])):
        return {"train": path}, []
    if "train" not in known:
        raise InvalidData(f"{path}: {known.popitem()[1].name}/ but no train/ in it, {LAYOUT}")
    ignored = [folder.name for folder in folders if folder not in known.values()]
    return known, [f"passed over the folder {name}/ beside train/" for name in ignored]


def _subfolders(path: Path) -> list[Path]:
    folders = [entry for entry in path.iterdir() if entry.is_dir() and not is_hidden(entry.name)]
    return sorted(folders, key=natural)


def _list_part(folder: Path, classes: list[str]) -> tuple[list[_Picture], list[Path]]:
    """The pictures of train/, val/ or test/ with their headers read, and what else lies there."""
    pictures: list[_Picture] = []
    others: list[Path] = []
    for class_folder in _subfolders(folder):
        if class_folder.name not in classes:
            raise InvalidData(f"{class_folder}: no class of that name under train/")
        paths, passed_over = list_pictures(class_folder)
        if not paths:
            raise InvalidData(f"{class_folder}: this class folder holds no picture")
        label = classes.index(class_folder.name)
        pictures += [_Picture(path, label, *probe(path)) for path in paths]
        others += passed_over
    if not pictures:
        raise InvalidData(f"{folder}: no class folder in it, {LAYOUT}")
    return pictures, others


def _choose_size(pictures: list[_Picture], size: Size | None) -> tuple[Size, list[str]]:
    sizes = Counter(picture.size for picture in pictures)
    why = "as asked"
    if size is None:
        # Among equally common sizes the smallest, which enlarges least.
        size = min(sizes, key=lambda s: (-sizes[s], s[0] * s[1], s))
        why = "the most common size"
    others = len(pictures) - sizes[size]
    if not others:
        return size, []
    some = f"{others} of {_count(len(pictures), 'picture')}"
    return size, [f"{some} resized to {size[0]} x {size[1]} ({why})"]


def _choose_channels(pictures: list[_Picture], colour: bool | None) -> tuple[int, list[str]]:
    grey = sum(picture.is_grey for picture in pictures)
    in_colour = len(pictures) - grey
    of_all = f"of {_count(len(pictures), 'picture')}"
    if colour is False:
        note = f"{in_colour} {of_all} reduced from colour to grey, as asked"
        return 1, [note] if in_colour else []
    if colour is None and not in_colour:
        return 1, []
    why = "as asked" if colour else "since the others are in colour"
    note = f"{grey} {of_all}: grey repeated as red, green and blue, {why}"
    return 3, [note] if grey else []


def _check_memory(path: Path, count: int, channels: int, size: Size) -> None:
    needed = count * channels * size[0] * size[1]
    if needed > MAX_BYTES:
        raise InvalidData(
            f"{path}: {count}*{channels}*{size[0]}*{size[1]} = {needed} bytes of pictures, at most "
            f"{MAX_BYTES} are held in memory: choose a smaller size (--size)"
        )


def _decode(
    pictures: list[_Picture], channels: int, size: Size, done: Counter[str]
) -> tuple[np.ndarray, np.ndarray]:
    """All pictures as uint8 [N, C, H, W] and int64 [N]; what was done to them is counted."""
    images = np.empty((len(pictures), channels, *size), dtype=np.uint8)
    for slot, picture in zip(images, pictures, strict=True):
        image, notes = open_picture(picture.path)
        done.update(notes)
        image = image.convert("L" if channels == 1 else "RGB")
        if picture.size != size:
            image = resized(image, size)
        slot[:] = as_tensor(image).numpy()
    return images, np.array([picture.label for picture in pictures], dtype=np.int64)


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
