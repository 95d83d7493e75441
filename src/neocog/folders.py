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
from .foreign import text_of
from .images import (
    MAX_BYTES,
    Contents,
    Part,
    Parts,
    Size,
    as_tensor,
    is_hidden,
    left_out,
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


@dataclass(frozen=True)
class _Picture:
    path: Path
    label: int
    size: Size
    is_grey: bool


@dataclass(frozen=True)
class _Shape:
    """The size and the number of channels of all pictures, and what that takes."""

    size: Size
    channels: int
    notes: tuple[str, ...]


def read_folder(
    path: Path, size: Size | None, colour: bool | None, strict: bool = False
) -> Contents:
    """Reads a folder of class folders.

    Args:
        path: the folder.
        size: (height, width) of all pictures; ``None`` takes the most common one.
        colour: 3 channels or 1; ``None`` takes 3 if any picture is in colour.
        strict: refuse pictures that cannot be read, instead of leaving them out.

    Returns:
        Without train/, everything is in the part "train".

    Raises:
        InvalidData: naming the file or folder at fault.
    """
    folders, notes = parts_of(path)
    classes = [text_of(folder.name) for folder in class_folders(folders["train"])]
    if len(classes) < 2:
        found = f"only {classes[0]}/" if classes else "no class folder"
        raise InvalidData(f"{folders['train']}: {found} in it, {LAYOUT} (at least 2 classes)")
    listed: dict[str, list[_Picture]] = {}
    others: list[Path] = []
    broken: dict[Path, str] = {}
    for part, folder in folders.items():
        listed[part], passed_over = _list_part(folder, classes, broken)
        others += passed_over
    if others:
        names = ", ".join(other.name for other in others[:5]) + (", ..." if others[5:] else "")
        notes.append(f"passed over {_count(len(others), 'file')} that are no pictures: {names}")

    count = sum(map(len, listed.values())) + len(broken)
    parts, more = _decode_all(path, listed, size, colour, broken)
    unreadable = tuple(broken[one] for one in sorted(broken, key=natural))
    notes += left_out(unreadable, count, strict)
    for part, (_, labels) in parts.items():
        for label in sorted(set(range(len(classes))) - set(labels.tolist())):
            if part == "train" or not len(labels):
                where = f"class {classes[label]}" if len(labels) else part
                raise InvalidData(
                    f"{path}: {where} is left without a picture: {'; '.join(unreadable)}"
                )
    return Contents(parts, classes, [*notes, *more], unreadable)


def parts_of(path: Path) -> tuple[dict[str, Path], list[str]]:
    """The folders of class folders by part, and notes on folders passed over."""
    folders = class_folders(path)
    if not folders:
        empty = "is empty" if not any(path.iterdir()) else "holds no folder"
        raise InvalidData(f"{path}: {empty}, {LAYOUT} (or IDX files)")
    known: dict[str, Path] = {}
    for folder in folders:
        if folder.name.lower() in PART:
            known.setdefault(PART[folder.name.lower()], folder)
    # A class may be called "train" as well (and hold pictures of trains).
    if len(known) < len(folders) and not ("train" in known and class_folders(known["train"])):
        return {"train": path}, []
    if "train" not in known:
        raise InvalidData(f"{path}: {known.popitem()[1].name}/ but no train/ in it, {LAYOUT}")
    ignored = [folder.name for folder in folders if folder not in known.values()]
    return known, [f"passed over the folder {name}/ beside train/" for name in ignored]


def class_folders(path: Path) -> list[Path]:
    """The folders in ``path`` without hidden ones, in natural order: one for each class."""
    folders = [entry for entry in path.iterdir() if entry.is_dir() and not is_hidden(entry.name)]
    return sorted(folders, key=natural)


def _list_part(
    folder: Path, classes: list[str], broken: dict[Path, str]
) -> tuple[list[_Picture], list[Path]]:
    """The pictures of train/, val/ or test/ with their headers read, and what else lies there.

    Those whose header cannot be read go to ``broken``, with the reason.
    """
    pictures: list[_Picture] = []
    others: list[Path] = []
    folders = class_folders(folder)
    for class_folder in folders:
        name = text_of(class_folder.name)
        if name not in classes:
            raise InvalidData(f"{class_folder}: no class of that name under train/")
        paths, passed_over = list_pictures(class_folder)
        if not paths:
            raise InvalidData(f"{class_folder}: this class folder holds no picture")
        label = classes.index(name)
        for path in paths:
            try:
                pictures.append(_Picture(path, label, *probe(path)))
            except InvalidData as error:
                broken[path] = str(error)
        others += passed_over
    if not folders:
        raise InvalidData(f"{folder}: no class folder in it, {LAYOUT}")
    return pictures, others


def _decode_all(
    path: Path,
    listed: dict[str, list[_Picture]],
    size: Size | None,
    colour: bool | None,
    broken: dict[Path, str],
) -> tuple[Parts, list[str]]:
    """The pictures of each part in one shape, and notes on what that took.

    Those that cannot be decoded go to ``broken``. They have no say in the shape either: where it
    is another without them, all pictures are decoded once more.
    """
    shape = _choose_shape(path, listed, size, colour)
    while True:
        done: Counter[str] = Counter()
        parts = {part: _decode(listed[part], shape, done, broken) for part in listed}
        listed = {part: [p for p in listed[part] if p.path not in broken] for part in listed}
        again = _choose_shape(path, listed, size, colour)
        if (again.size, again.channels) == (shape.size, shape.channels):
            counted = [f"{_count(number, 'picture')}: {what}" for what, number in done.items()]
            return parts, [*again.notes, *counted]
        shape = again


def _choose_shape(
    path: Path, listed: dict[str, list[_Picture]], size: Size | None, colour: bool | None
) -> _Shape:
    everything = [picture for pictures in listed.values() for picture in pictures]
    if not everything:
        return _Shape(size or (1, 1), 1, ())
    size, notes = _choose_size(everything, size)
    channels, more = _choose_channels(everything, colour)
    _check_memory(path, len(everything), channels, size)
    return _Shape(size, channels, (*notes, *more))


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
    pictures: list[_Picture], shape: _Shape, done: Counter[str], broken: dict[Path, str]
) -> Part:
    """Pictures as uint8 [N, C, H, W] and int64 [N]; what was done to them is counted.

    Those that cannot be decoded go to ``broken`` and have no row.
    """
    images = np.empty((len(pictures), shape.channels, *shape.size), dtype=np.uint8)
    labels: list[int] = []
    for picture in pictures:
        try:
            image, notes = open_picture(picture.path)
        except InvalidData as error:
            broken[picture.path] = str(error)
            continue
        done.update(notes)
        image = image.convert("L" if shape.channels == 1 else "RGB")
        if (image.height, image.width) != shape.size:
            image = resized(image, shape.size)
        images[len(labels)] = as_tensor(image).numpy()
        labels.append(picture.label)
    return images[: len(labels)], np.array(labels, dtype=np.int64)


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
