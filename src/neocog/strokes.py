"""Strokes: which way round a picture of ink is, and how MNIST frames a digit.

A network that has learned light digits on black, each scaled into the same box and centred by its
mass, reads no other. Whoever shows it a photograph of a number on paper owes it the same framing.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

FIELD, BOX = 28, 20
"""MNIST's digits fill a box of 20 x 20 within a field of 28 x 28 pixels."""

BLANK = 16
"""What stands out from the background by fewer grey levels than this is no stroke."""


def is_light(grey: np.ndarray) -> bool:
    """Whether a picture, uint8 [H, W], has a light background: ink on paper, not chalk on slate.

    It has if what stands out from the background most is darker. Background is what the border
    suggests, so that a photograph of paper in the shade is light all the same. A picture of one
    shade is light above mid-grey.
    """
    relief = _relief(grey)
    if not relief.any():
        return bool(grey.flat[0] > 127)
    return bool(-relief.min() > relief.max())


def is_framed(digits: np.ndarray) -> np.ndarray:
    """Which of the pictures, uint8 [N, 28, 28], are framed as MNIST's digits are: bool [N].

    Light strokes on black, 18 to 20 pixels long in the longer direction, with their centre of
    mass within about a pixel of the centre of the field.
    """
    if digits.shape[1:] != (FIELD, FIELD):
        return np.zeros(len(digits), dtype=bool)
    lit = digits >= 32
    longest = np.maximum(_extent(np.any(lit, axis=2)), _extent(np.any(lit, axis=1)))
    # A blank picture has no centre; its extent of 0 rules it out already.
    mass = np.maximum(digits.sum(axis=(1, 2), dtype=np.float64), 1)
    middles = np.arange(FIELD) + 0.5
    y = digits.sum(axis=2) @ middles / mass
    x = digits.sum(axis=1) @ middles / mass
    centre = FIELD / 2
    # MNIST's own centres lie between 14 and 15, for they were shifted by whole pixels.
    centred = (np.abs(y - centre - 0.5) < 1.5) & (np.abs(x - centre - 0.5) < 1.5)
    return (longest >= BOX - 2) & (longest <= BOX) & centred


def frame_digit(grey: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """A picture of one digit, uint8 [H, W] of any size, framed as MNIST's digits are.

    Strokes are what stands out from the background; ink on paper is inverted, and the contrast
    stretched until the background is 0 and the strokes reach 255. The strokes' bounding box is
    scaled, proportions kept, until its longer side is 20 pixels, and placed in a field of 28 x 28
    so that the centre of mass comes to the field's centre (by whole pixels, as in MNIST).

    Returns:
        uint8 [28, 28], and notes. A picture that is framed so already is at most inverted; one that
        shows nothing comes back as it is, in its own size, with a note.
    """
    ink = _ink(grey)
    if ink is None:
        return grey, ["no stroke found: the picture is of one shade"]
    notes = ["inverted: the network has learned light digits on black"] if is_light(grey) else []
    chalk = 255 - grey if notes else grey
    if is_framed(chalk[None])[0]:
        return chalk, notes
    strokes = ink > otsu(np.rint(ink * 255).astype(np.uint8)) / 255
    rows, cols = _span(np.any(strokes, axis=1)), _span(np.any(strokes, axis=0))
    notes.append(
        f"digit of {rows.stop - rows.start} x {cols.stop - cols.start} pixels cut out of "
        f"{grey.shape[0]} x {grey.shape[1]}, fitted into {BOX} x {BOX} and centred by its mass "
        f"in {FIELD} x {FIELD}, as MNIST's digits are"
    )
    return _fit(ink[rows, cols]), notes


def otsu(grey: np.ndarray) -> float:
    """Otsu's threshold of a uint8 picture: the split with the greatest variance between its halves.

    Source: N. Otsu, "A threshold selection method from gray-level histograms", 1979. Levels up to
    the threshold are the dark half. Between two levels with nothing in between, the middle.
    """
    share = np.bincount(grey.ravel(), minlength=256) / grey.size
    below = np.cumsum(share)
    moment = np.cumsum(share * np.arange(256))
    weight = below * (1 - below)
    # between = (w0 w1)(mu1 - mu0)^2 = (mu w0 - m)^2 / (w0 w1); where a half is empty there is none
    between = np.divide(
        (moment[-1] * below - moment) ** 2, weight, out=np.zeros(256), where=weight > 1e-12
    )
    best = np.flatnonzero(between >= between.max() * (1 - 1e-9))
    return float((best[0] + best[-1]) / 2)


def _relief(grey: np.ndarray) -> np.ndarray:
    """How far each pixel lies above its background, float [H, W].

    The background is a plane through the medians of the four edges: light that falls from one side
    is no ink, and a stroke that touches an edge does not tilt the plane.
    """
    height, width = grey.shape
    top, bottom, left, right = (float(np.median(edge)) for edge in _edges(grey))
    down = np.linspace(-0.5, 0.5, height) * (bottom - top)
    across = np.linspace(-0.5, 0.5, width) * (right - left)
    level = float(np.median(np.concatenate(_edges(grey))))
    return grey - (level + down[:, None] + across)


def _ink(grey: np.ndarray) -> np.ndarray | None:
    """The strength of the strokes, float [H, W] in 0..1, or ``None`` if nothing stands out."""
    relief = -_relief(grey) if is_light(grey) else _relief(grey)
    # The grain of paper is no ink: whatever lies within three deviations of the border's own.
    grain = 3 * 1.4826 * float(np.median(np.abs(np.concatenate(_edges(relief)))))
    above = relief[relief > grain]
    peak = float(np.percentile(above, 90)) if above.size else 0.0
    if peak < max(BLANK, 2 * grain):
        return None
    return np.where(relief > grain, np.minimum(relief / peak, 1), 0)


def _fit(ink: np.ndarray) -> np.ndarray:
    """Strokes, float [h, w] cut at their bounding box, in MNIST's frame: uint8 [28, 28]."""
    scale = BOX / max(ink.shape)
    height, width = (max(1, round(side * scale)) for side in ink.shape)
    picture = Image.fromarray(ink.astype(np.float32))
    small = np.asarray(picture.resize((width, height), Image.Resampling.BILINEAR))
    # A thin line fades as it shrinks; MNIST's strokes all reach full brightness.
    small = small / small.max()
    top = _offset(small.sum(axis=1), height)
    left = _offset(small.sum(axis=0), width)
    field = np.zeros((FIELD, FIELD), dtype=np.uint8)
    field[top : top + height, left : left + width] = np.rint(small * 255)
    return field


def _offset(profile: np.ndarray, side: int) -> int:
    """Where to place a profile so that its centre of mass comes to 14 or just above, as MNIST's."""
    centre = float(profile @ (np.arange(side) + 0.5) / profile.sum())
    return int(np.clip(np.ceil(FIELD / 2 - centre), 0, FIELD - side))


def _edges(image: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    return image[0], image[-1], image[:, 0], image[:, -1]


def _span(lit: np.ndarray) -> slice:
    hits = np.flatnonzero(lit)
    return slice(int(hits[0]), int(hits[-1]) + 1)


def _extent(lit: np.ndarray) -> np.ndarray:
    """From the first to the last True of each row of bool [N, n]: lengths [N], 0 where none is."""
    length = lit.shape[1] - lit.argmax(axis=1) - lit[:, ::-1].argmax(axis=1)
    return np.where(lit.any(axis=1), length, 0)
