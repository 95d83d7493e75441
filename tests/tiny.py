"""A data set that is learned in a second: a bright bar in one of three places, and noise."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from neocog import data
from neocog.data import DataSet
from neocog.runs import preprocessing_of
from neocog.settings import Settings
from neocog.training import Trainer

CLASSES = ("left", "middle", "right")
SIDE = 12
ARCHITECTURE = "4C3-P2-6C3-A2-3"


def pictures(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """uint8 [3 * count, 12, 12] and their labels, class after class."""
    random = np.random.default_rng(seed)
    images = random.integers(0, 60, (3 * count, SIDE, SIDE)).astype(np.uint8)
    labels = np.arange(3 * count) // count
    for image, label in zip(images, labels, strict=True):
        column = 1 + 4 * label + random.integers(0, 2)
        image[2:10, column : column + 2] = random.integers(120, 256)
    return images, labels


def dataset(count: int = 30, seed: int = 0) -> DataSet:
    """Three classes of ``count`` pictures, split."""
    return data.from_arrays(*pictures(count), CLASSES, name="bars", val_fraction=0.2, seed=seed)


def folder(where: Path, count: int = 20) -> Path:
    """The same as a folder of class folders of PNG files."""
    images, labels = pictures(count)
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        path = where / CLASSES[label] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return where


def trainer(found: DataSet | None = None, **settings: object) -> Trainer:
    """A trainer of a tiny network, layer by layer: compiling it takes longer than training."""
    found = found or dataset()
    chosen: dict[str, object] = {
        "architecture": ARCHITECTURE,
        "epochs": 4,
        "batch_size": 16,
        "engine": "eager",
    }
    chosen |= settings
    return Trainer(found, Settings(**chosen), preprocessing_of(found))  # type: ignore[arg-type]


@contextlib.contextmanager
def full_disk(where: Path, size: str) -> Iterator[Path]:
    """A disk of so few bytes, mounted; skips the test where that is not allowed."""
    if sys.platform != "linux":
        pytest.skip("NOT TESTED: a full disk (mounting a tmpfs takes Linux)")
    where.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(where)]
    try:
        mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("NOT TESTED: a full disk (there is no mount)")
    if mounted.returncode != 0:
        pytest.skip(f"NOT TESTED: a full disk (mounting a tmpfs: {mounted.stderr.strip()})")
    try:
        yield where
    finally:
        subprocess.run(["umount", str(where)], check=True)
