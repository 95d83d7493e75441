"""Single pictures: from any file that Pillow reads to the bytes a network takes.

A picture arrives turned, transparent, in 16 bits, in colour where the network has learned grey,
or as ink on paper where it has learned light strokes on black. Each of these is put right here,
and each is said: a list of notes comes back with every picture.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps

from .errors import InvalidData
from .files import not_a_file
from .foreign import text_of
from .strokes import frame_digit, is_light

SUFFIXES = frozenset(
    [".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png"]
    + [".pnm", ".ppm", ".tga", ".tif", ".tiff", ".webp"]
)
"""File name endings, in lower case, of what counts as a picture inside a folder."""

GREY_MODES = frozenset({"1", "L", "LA", "I", "I;16", "I;16B", "I;16L", "I;16N", "F"})

MAX_BYTES = 8 * 2**30
"""Pictures are held in memory as bytes; a set beyond this is refused before it is decoded."""

Size = tuple[int, int]
"""(height, width) in pixels."""

Part = tuple[np.ndarray, np.ndarray]
"""Images uint8 [N, C, H, W] and their labels int64 [N]."""

Parts = dict[str, Part]
"""What a data set's files hold: "train", and perhaps "val" and "test"."""


@dataclass(frozen=True, eq=False)
class Contents:
    """What the files of a data set hold.

    Attributes:
        parts: the pictures; without a part "test", or "val", it is to be made of "train".
        classes: names by label.
        notes: what was done to the pictures, one sentence each.
        unreadable: the pictures left out since they cannot be read, a line each: file and reason.
    """

    parts: Parts
    classes: list[str]
    notes: list[str]
    unreadable: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class PreparedPicture:
    """One picture as a network takes it.

    Attributes:
        tensor: uint8 [C, H, W], 0 is black.
        original_size: (height, width) of the file's picture, turned upright.
        notes: what was done to it on the way, one sentence each, in order.
    """

    tensor: torch.Tensor
    original_size: Size
    notes: tuple[str, ...]


def read_picture(
    path: Path | str,
    channels: int,
    size: Size,
    *,
    background: str | None = None,
    digit_like: bool = False,
) -> PreparedPicture:
    """Reads one picture file for a network.

    Args:
        path: the file.
        channels: 1 (grey) or 3 (colour), as the network takes. Another kind of picture is
            converted, with a note.
        size: (height, width) that the network takes. Another size is resized, with a note.
        background: ``"dark"`` or ``"light"`` if every picture the network has learned is so
            (:attr:`neocog.data.DataSet.background`): a grey picture the other way round is
            inverted, with a note.
        digit_like: the network has learned digits framed as MNIST's are
            (:attr:`neocog.data.DataSet.digit_like`): see :func:`neocog.strokes.frame_digit`.

    Raises:
        InvalidData: the file is missing, damaged or no picture, or ``channels`` is not 1 or 3.
    """
    if channels not in (1, 3):
        raise InvalidData(
            f"{path}: a picture gives 1 channel (grey) or 3 (colour), the network takes {channels}"
        )
    image, notes = open_picture(path)
    original_size = (image.height, image.width)
    notes += _channel_note(image, channels)
    image = image.convert("L" if channels == 1 else "RGB")
    if digit_like:
        pixels, more = frame_digit(np.asarray(image))
        notes += more
        image = Image.fromarray(pixels)
    elif channels == 1 and background in ("dark", "light"):
        own = "light" if is_light(np.asarray(image)) else "dark"
        if own != background:
            image = ImageOps.invert(image)
            notes.append(f"inverted: the network has learned pictures on a {background} background")
    if (image.height, image.width) != size:
        notes.append(_resize_note(image, size))
        image = resized(image, size)
    return PreparedPicture(as_tensor(image), original_size, tuple(notes))


def expand(paths: Iterable[Path | str]) -> list[Path]:
    """The pictures that ``paths`` name: files as they are, folders as all pictures below them.

    Inside a folder, hidden files and whatever does not end in one of :data:`SUFFIXES` are passed
    over, and numbers in names sort as numbers (2.png before 10.png).

    Raises:
        InvalidData: a path that does not exist, or a folder without a picture.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            pictures, _ = list_pictures(path)
            if not pictures:
                raise InvalidData(f"{path}: this folder holds no picture")
            found += pictures
        elif path.exists():
            found.append(path)
        else:
            raise InvalidData(f"{path}: no such file or folder")
    return found


def left_out(unreadable: Sequence[str], count: int, strict: bool) -> list[str]:
    """Notes on those of ``count`` pictures that cannot be read and are left out.

    Args:
        unreadable: a line each: the file and the reason.
        count: how many pictures there are, these among them.
        strict: refuse to go on without them.

    Raises:
        InvalidData: naming all of them, if ``strict``, or if no other picture is left.
    """
    if not unreadable:
        return []
    said = f"{len(unreadable)} of {count} pictures cannot be read"
    if count == 1:
        raise InvalidData(unreadable[0])
    if strict or len(unreadable) == count:
        raise InvalidData(f"{said}: {'; '.join(unreadable)}")
    return [f"{said}, left out:", *unreadable]


def list_pictures(folder: Path) -> tuple[list[Path], list[Path]]:
    """All files below ``folder``, hidden ones left out: (pictures by their ending, the others)."""
    pictures: list[Path] = []
    others: list[Path] = []
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not is_hidden(name)]
        for name in files:
            if not is_hidden(name):
                path = Path(parent, name)
                (pictures if path.suffix.lower() in SUFFIXES else others).append(path)
    return sorted(pictures, key=natural), sorted(others, key=natural)


def is_hidden(name: str) -> bool:
    """Whether a file or folder is one that systems leave behind: .DS_Store, __MACOSX."""
    return name.startswith(".") or name == "__MACOSX"


def natural(path: Path | str) -> tuple[list[str | int], str]:
    """A sort key under which numbers count as numbers: 2.png comes before 10.png."""
    # Splitting by a group alternates text and digits, so that like is compared with like.
    pieces = re.split(r"([0-9]+)", str(path))
    return [int(p) if p.isdecimal() else p.casefold() for p in pieces], str(path)


def open_picture(path: Path | str) -> tuple[Image.Image, list[str]]:
    """Reads a picture file into mode ``L`` or ``RGB``, upright and opaque.

    The EXIF orientation is honoured, transparency is laid on white, 16 bits become 8, palettes
    and CMYK are resolved, and only the first frame of a film is taken.

    Returns:
        The picture, and notes on what was done to it.

    Raises:
        InvalidData: naming the file and what is wrong with it.
    """
    with _opened(path) as file:
        orientation = _orientation(file)  # asked first, for a TIFF is turned as it is loaded
        file.load()
        notes: list[str] = []
        if getattr(file, "n_frames", 1) > 1:
            notes.append("only the first frame is read")
        if orientation is None:
            notes.append("its EXIF data are damaged: taken as it stands in the file")
            return _plain(file, notes), notes
        if orientation != 1:
            notes.append("turned upright as its EXIF orientation says")
        is_turned = file.format == "TIFF"
        return _plain(file if is_turned else ImageOps.exif_transpose(file), notes), notes


def probe(path: Path | str) -> tuple[Size, bool]:
    """((height, width), is it grey?) of what :func:`open_picture` would return, read cheaply.

    Most formats tell from their header, so damage further on goes unseen.

    Raises:
        InvalidData: naming the file and what is wrong with it.
    """
    with _opened(path) as file:
        height, width = file.height, file.width
        # Four orientations exchange rows and columns; of a TIFF, Pillow tells the size upright.
        if (_orientation(file) or 1) >= 5 and file.format != "TIFF":
            height, width = width, height
        return (height, width), _is_grey(file)


def resized(image: Image.Image, size: Size) -> Image.Image:
    """``image`` at (height, width), anti-aliased when it shrinks."""
    height, width = size
    return image.resize((width, height), Image.Resampling.BILINEAR)


def as_tensor(image: Image.Image) -> torch.Tensor:
    """A picture of mode ``L`` or ``RGB`` as uint8 [C, H, W]."""
    pixels = np.array(image, dtype=np.uint8)
    channels_first = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    return torch.from_numpy(np.ascontiguousarray(channels_first))


@contextmanager
def _opened(path: Path | str) -> Iterator[Image.Image]:
    """A picture file; whatever goes wrong with it becomes one line that names the file."""
    try:
        reason = not_a_file(path)
        if reason is not None:
            expected = "" if reason == "no such file" else ", expected a picture"
            raise InvalidData(reason + expected)
        # Not by its name: then Pillow maps it into memory where it can, and mixes up the rows and
        # columns of a TIFF that lies on its side.
        with warnings.catch_warnings(), open(path, "rb") as data:
            # Pillow warns of metadata it passes over; of the picture itself it raises.
            warnings.filterwarnings("ignore", module=r"PIL\.")
            with Image.open(data) as file:
                yield file
    # Given damaged bytes, Pillow's decoders raise a dozen types, from SyntaxError to zlib.error.
    except Exception as error:
        raise InvalidData(f"{text_of(path)}: {_said(error, path)}") from error


def _said(error: Exception, path: Path | str) -> str:
    """Why a picture cannot be read, in one line."""
    if isinstance(error, InvalidData):
        return str(error)
    if isinstance(error, Image.UnidentifiedImageError):
        return f"not a picture in any format that can be read ({os.path.getsize(path):,} bytes)"
    if isinstance(error, OSError) and error.errno is not None:  # decoders raise OSError without
        return f"cannot be read ({os.strerror(error.errno)})"
    reason = " ".join(str(error).split()) or type(error).__name__
    return f"damaged or truncated picture ({reason})"


def _orientation(image: Image.Image) -> int | None:
    """EXIF's orientation, 1 (upright) to 8; None where the EXIF data are no such."""
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # Pillow's parser raises whatever damaged bytes lead it to
        return None
    return value if value in range(1, 9) else 1


def _is_grey(image: Image.Image) -> bool:
    if image.mode in ("P", "PA"):
        palette = np.array(image.getpalette("RGB")).reshape(-1, 3)
        # Only the entries in use: a palette's unused tail often holds some default's colours.
        used = palette[np.unique(np.asarray(image.getchannel(0)))]
        return bool((used == used[:, :1]).all())
    return image.mode in GREY_MODES


def _plain(image: Image.Image, notes: list[str]) -> Image.Image:
    """``image`` in mode L or RGB, opaque; what that took is added to ``notes``."""
    target = "L" if _is_grey(image) else "RGB"
    if image.mode == "F" or image.mode.startswith("I"):
        notes.append("reduced to 8 bits")
        return _eight_bits(image)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        if rgba.getchannel("A").getextrema() != (255, 255):
            notes.append("transparency laid on white")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    elif image.mode == "CMYK":
        notes.append("CMYK converted to RGB")
    return image.convert(target)


def _eight_bits(image: Image.Image) -> Image.Image:
    """A picture of whole numbers 0..65535, or of fractions 0..1, in 8 bits."""
    values = np.asarray(image, dtype=np.float64)
    full = 1 if image.mode == "F" else 65535
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= full):  # so written that a NaN fails too
        raise InvalidData(f"its values reach from {low:g} to {high:g}, expected 0 to {full}")
    return Image.fromarray(np.rint(values * (255 / full)).astype(np.uint8))


def _channel_note(image: Image.Image, channels: int) -> list[str]:
    if image.mode == "RGB" and channels == 1:
        return ["colour reduced to grey: the network takes 1 channel"]
    if image.mode == "L" and channels == 3:
        return ["grey repeated as red, green and blue: the network takes 3 channels"]
    return []


def _resize_note(image: Image.Image, size: Size) -> str:
    note = f"resized from {image.height} x {image.width} to {size[0]} x {size[1]}"
    stretch = (image.width * size[0]) / (image.height * size[1])
    return note if 0.99 < stretch < 1.01 else note + ", which changes its proportions"
