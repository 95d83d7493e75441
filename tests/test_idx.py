"""IDX files: every name they go by, and every way they can be broken."""

import gzip
import os
import struct
import tracemalloc

import numpy as np
import pytest
import torch

from neocog.data import load
from neocog.errors import InvalidData

RANDOM = np.random.default_rng(0)


def noise(*shape):
    return RANDOM.integers(0, 256, shape, dtype=np.uint8)


def idx(array):
    header = struct.pack(f">{1 + array.ndim}I", 0x800 + array.ndim, *array.shape)
    return header + array.astype(np.uint8).tobytes()


def write_idx(folder, images, labels, part="train", prefix="", joint="-", packed=False):
    folder.mkdir(exist_ok=True)
    for kind, array in (("images", images), ("labels", labels)):
        name = f"{prefix}{part}-{kind}{joint}idx{array.ndim}-ubyte"
        if packed:
            (folder / f"{name}.gz").write_bytes(gzip.compress(idx(array)))
        else:
            (folder / name).write_bytes(idx(array))
    return folder


TRAIN, TRAIN_LABELS = noise(20, 6, 5), np.arange(20) % 4
TEST, TEST_LABELS = noise(8, 6, 5), np.arange(8) % 4


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("joint", ["-", "."])
@pytest.mark.parametrize("test_part", ["t10k", "test"])
@pytest.mark.parametrize("prefix", ["", "kuzushiji-"])
def test_idx_files_under_all_their_names(tmp_path, packed, joint, test_part, prefix):
    write_idx(tmp_path, TRAIN, TRAIN_LABELS, "train", prefix, joint, packed)
    write_idx(tmp_path, TEST, TEST_LABELS, test_part, prefix, joint, packed)
    data = load(tmp_path, val_fraction=0)
    assert np.array_equal(data.train.images[:, 0].numpy(), TRAIN)
    assert np.array_equal(data.train.labels.numpy(), TRAIN_LABELS)
    assert np.array_equal(data.test.images[:, 0].numpy(), TEST)
    assert np.array_equal(data.test.labels.numpy(), TEST_LABELS)
    assert data.train.images.dtype == torch.uint8
    assert data.train.labels.dtype == torch.int64
    assert data.name == tmp_path.name
    assert data.notes == ()


def test_of_several_idx_sets_one_file_chooses_its_own(tmp_path):
    for prefix, images in (("a-", TRAIN), ("b-", 255 - TRAIN)):
        write_idx(tmp_path, images, TRAIN_LABELS, "train", prefix, packed=True)
        write_idx(tmp_path, TEST, TEST_LABELS, "t10k", prefix, packed=True)
    with pytest.raises(InvalidData, match=r"holds 2 data sets \(a, b\): name a file of one"):
        load(tmp_path)
    data = load(tmp_path / "b-t10k-labels-idx1-ubyte.gz", val_fraction=0)
    assert np.array_equal(data.train.images[:, 0].numpy(), 255 - TRAIN)


def test_emnists_pictures_are_turned_and_its_labels_numbered_from_zero(tmp_path):
    write_idx(tmp_path, TRAIN, TRAIN_LABELS + 1, "train", "emnist-letters-")
    write_idx(tmp_path, TEST, TEST_LABELS + 1, "test", "emnist-letters-")
    data = load(tmp_path, val_fraction=0)
    assert np.array_equal(data.train.images[:, 0].numpy(), TRAIN.swapaxes(1, 2))
    assert np.array_equal(data.train.labels.numpy(), TRAIN_LABELS)
    assert data.classes == ("1", "2", "3", "4")
    assert "rows and columns exchanged" in data.notes[0]


def test_idx_without_a_test_part_is_split_by_us(tmp_path):
    data = load(write_idx(tmp_path, TRAIN, TRAIN_LABELS), val_fraction=0)
    assert torch.bincount(data.test.labels).tolist() == [1] * 4
    assert torch.bincount(data.train.labels).tolist() == [4] * 4
    assert data.notes == ("no test part: 4 pictures of all classes held out as one",)


def test_a_gz_that_a_browser_has_unpacked_is_read_all_the_same(tmp_path):
    write_idx(tmp_path, TRAIN, TRAIN_LABELS)
    for path in list(tmp_path.iterdir()):
        path.rename(f"{path}.gz")
    assert len(load(tmp_path).classes) == 4


def broken_idx(tmp_path, name, content):
    write_idx(tmp_path, TRAIN, TRAIN_LABELS)
    (tmp_path / name).write_bytes(content)
    return tmp_path


IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (IMAGES, idx(TRAIN)[:-1], r"truncated, 615 bytes found, expected count\*rows\*cols \+ 16 ="
         r" 20\*6\*5 \+ 16 = 616"),
        (IMAGES, idx(TRAIN) + b"\0", r"too long, more than 616 bytes found, expected .* = 616"),
        (IMAGES, idx(TRAIN)[:7], "truncated, 7 bytes where the header takes 16"),
        (IMAGES, b"", "truncated, 0 bytes where the header takes 16"),
        (IMAGES, idx(noise(20, 30)), r"starts with 0x00000802, expected 0x00000803 \(IDX images"),
        (IMAGES, b"\x89PNG" + idx(TRAIN)[4:], "starts with 0x89504E47, expected 0x00000803"),
        (IMAGES, idx(noise(20, 0, 5)), r"holds nothing, its header says 20\*0\*5"),
        (IMAGES, gzip.compress(idx(TRAIN))[:-20], "damaged or truncated gzip file"),
        (IMAGES, b"\x1f\x8b" + bytes(30), "damaged or truncated gzip file"),
        (LABELS, idx(TRAIN_LABELS)[:-3], r"truncated, 25 bytes found, expected count \+ 8 = "
         r"20 \+ 8 = 28"),
        (LABELS, idx(TRAIN), r"starts with 0x00000803, expected 0x00000801 \(IDX labels"),
        (LABELS, idx(TRAIN_LABELS[:19]), f"19 labels for the 20 images of {IMAGES}"),
        (LABELS, idx(np.zeros(20)), "1 class, expected at least 2"),
    ],
)  # fmt: skip
def test_broken_idx_files(tmp_path, name, content, message):
    with pytest.raises(InvalidData, match=message) as caught:
        load(broken_idx(tmp_path, name, content))
    assert "\n" not in str(caught.value)
    assert "expected at least 2" in message or name in str(caught.value)


def test_no_more_is_unpacked_than_the_header_says(tmp_path):
    """64 MiB of zeros, packed into 64 KiB, behind a header that says 600 bytes."""
    write_idx(tmp_path, TRAIN, TRAIN_LABELS, packed=True)
    bomb = gzip.compress(idx(TRAIN) + bytes(2**26), compresslevel=1)
    (tmp_path / f"{IMAGES}.gz").write_bytes(bomb)
    tracemalloc.start()
    try:
        with pytest.raises(InvalidData, match=r"too long, more than 616 bytes found, expected"):
            load(tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 2**23
    finally:
        tracemalloc.stop()


def test_a_header_is_not_believed_before_its_bytes_are_there(tmp_path):
    for count, message in (
        (2**20, "truncated, 616 bytes found"),
        (2**31, "at most 8589934592 are"),
    ):
        lying = struct.pack(">4I", 0x803, count, 64, 64) + TRAIN.tobytes()
        tracemalloc.start()
        try:
            with pytest.raises(InvalidData, match=message):
                load(broken_idx(tmp_path, IMAGES, lying))
            assert tracemalloc.get_traced_memory()[1] < 2**23
        finally:
            tracemalloc.stop()


def test_what_is_no_file_is_not_waited_for(tmp_path):
    write_idx(tmp_path, TRAIN, TRAIN_LABELS)
    (tmp_path / LABELS).unlink()
    os.mkfifo(tmp_path / LABELS)
    with pytest.raises(InvalidData, match=f"{LABELS}: is a pipe, expected an IDX file"):
        load(tmp_path)


def test_idx_files_that_do_not_go_together(tmp_path):
    write_idx(tmp_path, TRAIN, TRAIN_LABELS)
    (tmp_path / LABELS).unlink()
    with pytest.raises(InvalidData, match=f"labels are missing, expected {LABELS} beside it"):
        load(tmp_path)
    write_idx(tmp_path, TRAIN, TRAIN_LABELS)
    write_idx(tmp_path, TEST, TEST_LABELS + 1, "t10k")
    with pytest.raises(InvalidData, match="t10k-labels-idx1-ubyte: label 4 is never trained on"):
        load(tmp_path)
    write_idx(tmp_path, noise(8, 5, 6), TEST_LABELS, "t10k")
    with pytest.raises(InvalidData, match=r"\(1, 5, 6\), \(1, 6, 5\).*expected the same in all"):
        load(tmp_path)
    (tmp_path / IMAGES).unlink()
    with pytest.raises(InvalidData, match=r"no train-images-idx3-ubyte\[\.gz\] in it"):
        load(tmp_path)
