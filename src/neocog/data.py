"""Data sets: pictures in classes, in parts to train on, to choose by and to be judged by.

:func:`load` reads whatever it is given: nothing (the digits that neocog brings along), IDX files
(:mod:`neocog.idx`) or a folder of class folders (:mod:`neocog.folders`). :func:`from_arrays` takes
arrays. All end in a :class:`DataSet`, checked, in bytes, with notes on what was done on the way.

No random generator decides which picture goes where: each class's pictures are ordered by a
SHA-256 of their pixels, and the first ones are held out. The same pictures give the same parts
under every version of every library, and in whatever order the files are listed.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image

from .errors import InvalidData
from .folders import read_folder
from .foreign import text_of
from .idx import is_idx, read_idx
from .images import Contents, Part, Size, as_tensor, resized
from .strokes import FIELD, is_framed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import ArrayLike

SAMPLE = 2000
"""Traits of all pictures (background, framing) are judged by at most about so many of them."""

SCARCE = "no class has more than 1 picture to train on"

LEVELS = np.arange(256) / 255
"""What a byte stands for: 0 to 1."""


@dataclass(frozen=True, eq=False)
class Split:
    """One part of a data set: images uint8 [N, C, H, W] and their labels int64 [N]."""

    images: torch.Tensor
    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, eq=False)
class DataSet:
    """Pictures in classes, split.

    Attributes:
        name: what to call it: "digits", or the folder's name.
        classes: class names; a label is an index into them.
        train: what to learn from.
        val: what to choose the best epoch by; ``None`` if ``val_fraction`` was 0, or if there are
            too few pictures to carve it from.
        test: what to report; never used for a choice.
        notes: what was done to the pictures, one sentence each, for the user to read.
        unreadable: the pictures left out since they cannot be read, a line each: file and reason.
    """

    name: str
    classes: tuple[str, ...]
    train: Split
    val: Split | None
    test: Split
    notes: tuple[str, ...] = ()
    unreadable: tuple[str, ...] = ()

    @property
    def in_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of every picture."""
        channels, height, width = self.train.images.shape[1:]
        return channels, height, width

    @cached_property
    def mean(self) -> tuple[float, ...]:
        """Mean of each channel over the train part, pixels counted from 0 to 1."""
        return tuple(float(share @ LEVELS) for share in self._histograms)

    @cached_property
    def std(self) -> tuple[float, ...]:
        """Standard deviation of each channel over the train part, pixels counted from 0 to 1.

        A channel of one value has 1.0 here, so that dividing by it does no harm.
        """
        pairs = zip(self._histograms, self.mean, strict=True)
        variances = [float(share @ (LEVELS - mean) ** 2) for share, mean in pairs]
        return tuple(v**0.5 if v > 1e-12 else 1.0 for v in variances)

    @cached_property
    def _histograms(self) -> np.ndarray:
        """The share of each of the 256 levels in each channel of the train part: [C, 256]."""
        counts = np.zeros((self.in_shape[0], 256), dtype=np.int64)
        # Picture by picture: np.bincount of everything at once would take 8 bytes for each pixel.
        for image in self.train.images.numpy():
            for row, channel in zip(counts, image, strict=True):
                row += np.bincount(channel.ravel(), minlength=256)
        return counts / counts.sum(axis=1, keepdims=True)

    @cached_property
    def background(self) -> str:
        """``"dark"`` or ``"light"`` if at least 9 in 10 training pictures have such a border.

        A border is dark if its median is in the lowest quarter of the range, light in the highest.
        ``"mixed"`` otherwise: photographs, where inverting a picture would make no sense.
        """
        x = _sample(self.train.images).mean(axis=1)
        border = np.concatenate([x[:, 0], x[:, -1], x[:, :, 0], x[:, :, -1]], axis=1)
        level = np.median(border, axis=1)
        if (level < 64).mean() >= 0.9:
            return "dark"
        return "light" if (level >= 192).mean() >= 0.9 else "mixed"

    @cached_property
    def digit_like(self) -> bool:
        """Whether at least 95 % of the training pictures are framed as MNIST's digits are.

        Then a picture for prediction is to be framed so too
        (:func:`neocog.strokes.frame_digit`, which :func:`neocog.images.read_picture` calls).
        """
        if self.in_shape != (1, FIELD, FIELD):
            return False
        return bool(is_framed(_sample(self.train.images)[:, 0]).mean() >= 0.95)


def load(
    path: Path | str | None = None,
    *,
    val_fraction: float = 0.1,
    test_fraction: float = 0.2,
    size: int | Size | None = None,
    colour: bool | None = None,
    seed: int = 0,
    strict: bool = False,
) -> DataSet:
    """Reads a data set.

    Args:
        path: ``None`` for the embedded digits (5,000 of MNIST's, of which 1,000 always the same are
            the test part); a folder with IDX files, or one of these; or a folder of class folders,
            perhaps under train/, val/ and test/.
        val_fraction: share of each class of the train part to carve off for validation, where the
            data brings no validation part. Of a val/ without a test/, the val/ is the test part.
        test_fraction: share of each class to hold out as test part, where the data brings none.
        size: resize every picture to (height, width), or to a square. ``None`` leaves them, and
            brings pictures of a folder that differ to the most common size.
        colour: ``True`` for 3 channels, ``False`` for 1; ``None`` for as many as the pictures have.
        seed: another seed carves off another validation part. The test part stays.
        strict: refuse a folder with pictures that cannot be read; else they are left out, and
            listed in the notes.

    Raises:
        InvalidData: one line on what is wrong, naming the file or the argument.
    """
    _check_fractions(val_fraction, test_fraction)
    contents = _read(path, _as_size(size), colour, strict)
    name = "digits" if path is None else text_of(Path(path).resolve().name)
    return _assemble(name, contents, val_fraction, test_fraction, seed)


def from_arrays(
    images: ArrayLike | torch.Tensor,
    labels: ArrayLike | torch.Tensor,
    classes: Sequence[str],
    *,
    name: str = "arrays",
    val_fraction: float = 0.1,
    test_fraction: float = 0.2,
    seed: int = 0,
) -> DataSet:
    """Makes a data set of arrays or tensors; it is split as :func:`load` splits.

    Args:
        images: [N, H, W] or [N, C, H, W]; whole numbers 0 to 255, or floats 0 to 1.
        labels: [N], whole numbers 0 to ``len(classes) - 1``, each at least once.
        classes: at least 2 names, no two alike.
        name, val_fraction, test_fraction, seed: see :class:`DataSet` and :func:`load`.

    Raises:
        InvalidData: a shape, a type or a value that does not fit; NaN and infinities among them.
    """
    _check_fractions(val_fraction, test_fraction)
    pixels = _as_bytes(np.asarray(images))
    numbers = _as_labels(np.asarray(labels), len(pixels), len(classes))
    if len(set(classes)) != len(classes):
        twice = next(c for c in classes if list(classes).count(c) > 1)
        raise InvalidData(f"classes: {twice!r} stands there twice, expected different names")
    contents = Contents({"train": (pixels, numbers)}, list(classes), [])
    return _assemble(name, contents, val_fraction, test_fraction, seed)


# --- checks ---------------------------------------------------------------------------------------


def _check_fractions(val_fraction: float, test_fraction: float) -> None:
    if not 0 <= val_fraction <= 0.5:
        raise InvalidData(f"val_fraction={val_fraction}: expected 0 to 0.5")
    if not 0 < test_fraction <= 0.5:
        raise InvalidData(f"test_fraction={test_fraction}: expected more than 0, at most 0.5")


def _as_size(size: int | Size | None) -> Size | None:
    if isinstance(size, int):
        size = (size, size)
    if size is not None and (len(size) != 2 or min(size) < 1):
        raise InvalidData(f"size={size}: expected (height, width), both at least 1")
    return size


def _as_bytes(images: np.ndarray) -> np.ndarray:
    """``images`` as uint8 [N, C, H, W], or InvalidData."""
    if images.ndim not in (3, 4) or 0 in images.shape:
        raise InvalidData(
            f"images: shape {list(images.shape)}, expected [N, H, W] or [N, C, H, W] without a 0"
        )
    if images.ndim == 4 and images.shape[3] in (1, 3) and images.shape[1] not in (1, 3):
        raise InvalidData(
            f"images: shape {list(images.shape)} looks like [N, H, W, C], expected [N, C, H, W]"
        )
    if images.dtype.kind not in "fiub":
        raise InvalidData(f"images: dtype {images.dtype}, expected uint8 or floats 0 to 1")
    is_float = images.dtype.kind == "f"
    if is_float and not np.isfinite(images).all():
        bad = np.argwhere(~np.isfinite(images))
        where = ", ".join(map(str, bad[0]))
        raise InvalidData(
            f"images: {len(bad)} values are NaN or infinite, the first ({images[tuple(bad[0])]}) "
            f"at [{where}]; expected finite numbers 0 to 1"
        )
    top = 1 if is_float or images.dtype == bool else 255
    low, high = images.min(), images.max()
    if low < 0 or high > top:
        kind = "floats" if is_float else "whole numbers"
        raise InvalidData(f"images: {kind} from {low} to {high}, expected 0 to {top}")
    if top == 1:
        images = np.rint(images * np.float32(255))
    images = images.astype(np.uint8)
    return images if images.ndim == 4 else images[:, None]


def _as_labels(labels: np.ndarray, count: int, classes: int) -> np.ndarray:
    """``labels`` as int64 [count], every class present, or InvalidData."""
    if labels.shape != (count,):
        raise InvalidData(
            f"labels: shape {list(labels.shape)}, expected [{count}], one for each image"
        )
    if labels.dtype.kind not in "iu":
        raise InvalidData(f"labels: dtype {labels.dtype}, expected whole numbers")
    if labels.min() < 0 or labels.max() >= classes:
        raise InvalidData(
            f"labels: from {labels.min()} to {labels.max()}, expected 0 to {classes - 1} for "
            f"{classes} classes"
        )
    absent = np.setdiff1d(np.arange(classes), labels)
    if len(absent):
        raise InvalidData(f"labels: class {absent[0]} of {classes} has no picture")
    return labels.astype(np.int64)


# --- parts ----------------------------------------------------------------------------------------


def _assemble(
    name: str, contents: Contents, val_fraction: float, test_fraction: float, seed: int
) -> DataSet:
    """Makes up the parts that are missing from those that are there."""
    parts, classes, notes = contents.parts, contents.classes, list(contents.notes)
    if len(classes) < 2:
        raise InvalidData(f"{name}: {len(classes)} class, expected at least 2 to tell apart")
    shapes = {images.shape[1:] for images, _ in parts.values()}
    if len(shapes) > 1:
        raise InvalidData(f"{name}: parts of [C, H, W] {sorted(shapes)}, expected the same in all")
    train, val, test = parts["train"], parts.get("val"), parts.get("test")
    if test is None and val is not None:
        notes.append("no test part: the validation part serves as one")
        test, val = val, None
    elif test is None:
        train, test = _hold_out(*train, test_fraction, seed=0)
        if test is None:
            raise InvalidData(f"{name}: {SCARCE}, expected at least 2, of which one to test with")
        notes.append(f"no test part: {len(test[1])} pictures of all classes held out as one")
    if val is None and val_fraction > 0:
        train, val = _hold_out(*train, val_fraction, seed)
        if val is None:
            notes.append(f"no validation part: {SCARCE}")
    return DataSet(
        name,
        tuple(classes),
        _as_split(*train),
        None if val is None else _as_split(*val),
        _as_split(*test),
        tuple(notes),
        contents.unreadable,
    )


def _hold_out(
    images: np.ndarray, labels: np.ndarray, fraction: float, seed: int
) -> tuple[Part, Part | None]:
    """(what stays, what is held out): ``fraction`` of each class, both in the order given.

    A class of at least 2 pictures has at least one on either side; a single picture stays. Where
    every class has but one, nothing can be held out: ``None``.
    """
    salt = seed.to_bytes(8, "little", signed=True)
    digests = [hashlib.sha256(salt + image.tobytes()).digest() for image in images]
    held = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        members = sorted(np.flatnonzero(labels == label), key=lambda i: digests[i])
        count = max(1, int(len(members) * fraction + 0.5)) if len(members) > 1 else 0
        held[members[:count]] = True
    kept = images[~held], labels[~held]
    return kept, (images[held], labels[held]) if held.any() else None


def _as_split(images: np.ndarray, labels: np.ndarray) -> Split:
    # A copy: an array read from a file's bytes is read-only, and torch warns of such.
    return Split(torch.from_numpy(images.copy()), torch.from_numpy(labels.copy()))


def _read(
    path: Path | str | None, size: Size | None, colour: bool | None, strict: bool
) -> Contents:
    """Whatever kind of data ``path`` names."""
    if path is None:
        found = _embedded()
    else:
        path = Path(path)
        if not path.exists():
            raise InvalidData(f"{path}: no such file or folder")
        if not is_idx(path):
            if path.is_dir():
                return read_folder(path, size, colour, strict)
            raise InvalidData(
                f"{path}: expected a folder, or an IDX file named like train-images-idx3-ubyte"
            )
        found = read_idx(path)
    notes = list(found.notes)
    parts = {
        part: (_refit(x, size, colour, notes, part), y) for part, (x, y) in found.parts.items()
    }
    return Contents(parts, found.classes, notes)


def _embedded() -> Contents:
    """The embedded digits: a mosaic read row by row, classes in order, the test part held out."""
    with resources.files("neocog").joinpath("assets/digits.png").open("rb") as file:
        mosaic = np.asarray(Image.open(file))
    rows, columns = (side // FIELD for side in mosaic.shape)
    tiles = mosaic.reshape(rows, FIELD, columns, FIELD).swapaxes(1, 2)
    images = tiles.reshape(-1, 1, FIELD, FIELD)
    labels = np.arange(len(images)) * 10 // len(images)
    train, test = _hold_out(images, labels, 0.2, seed=0)
    assert test is not None, "there are 500 pictures of each class"
    return Contents(
        {"train": train, "test": test},
        [str(digit) for digit in range(10)],
        ["5000 handwritten digits of MNIST, embedded in neocog"],
    )


def _refit(
    images: np.ndarray, size: Size | None, colour: bool | None, notes: list[str], part: str
) -> np.ndarray:
    """Grey pictures of one size, uint8 [N, 1, H, W], in the size and the channels asked for."""
    own = images.shape[2:]
    if size is not None and own != size:
        pictures = (resized(Image.fromarray(image[0]), size) for image in images)
        images = np.stack([as_tensor(picture).numpy() for picture in pictures])
        notes.append(f"{part}: resized from {own[0]} x {own[1]} to {size[0]} x {size[1]}, as asked")
    if colour:
        images = np.repeat(images, 3, axis=1)
        notes.append(f"{part}: grey repeated as red, green and blue, as asked")
    return images


def _sample(images: torch.Tensor) -> np.ndarray:
    """About :data:`SAMPLE` of the pictures, evenly spaced."""
    return images[:: max(1, len(images) // SAMPLE)].numpy()
