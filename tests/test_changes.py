"""What is said of files that have changed since a network was trained on them."""

import gzip

import numpy as np
import pytest
from PIL import Image

from neocog.changes import compared, listing
from neocog.errors import InvalidData

BEFORE = {"cat": {"1.png": "a", "2.png": "b", "3.png": "c"}, "dog": {"1.png": "d", "2.png": "e"}}


@pytest.mark.parametrize(
    ("now", "said"),
    [
        (BEFORE, []),
        ({**BEFORE, "elk": {"1.png": "f"}}, ["class elk added (1 picture)"]),
        ({"cat": BEFORE["cat"]}, ["class dog removed (2 pictures)"]),
        ({"cat": BEFORE["cat"], "hound": BEFORE["dog"]}, ["class dog renamed to hound"]),
        # most of its pictures are still the same
        (
            {"cats": {"1.png": "a", "2.png": "b"}, "dog": BEFORE["dog"]},
            ["class cat renamed to cats", "cats: 3 then, 2 now", "1 file removed (cat/3.png)"],
        ),
        # one of two is not most
        (
            {"cat": BEFORE["cat"], "hound": {"1.png": "d"}},
            ["class hound added (1 picture)", "class dog removed (2 pictures)"],
        ),
        (
            {"cat": {**BEFORE["cat"], "4.png": "x"}, "dog": BEFORE["dog"]},
            ["cat: 3 then, 4 now", "1 file added (cat/4.png)"],
        ),
        (
            {"cat": {**BEFORE["cat"], "2.png": "x"}, "dog": BEFORE["dog"]},
            ["1 file changed (cat/2.png)"],
        ),
        # from one class to another, and under another name
        (
            {"cat": {"1.png": "a", "2.png": "b"}, "dog": {**BEFORE["dog"], "c.png": "c"}},
            ["cat: 3 then, 2 now", "dog: 2 then, 3 now", "1 file moved (cat/3.png to dog/c.png)"],
        ),
        (
            {"cat": {f"{n}.png": str(n) for n in range(4, 9)}, "dog": BEFORE["dog"]},
            [
                "cat: 3 then, 5 now",
                "5 files added (cat/4.png, cat/5.png, cat/6.png and 2 more)",
                "3 files removed (cat/1.png, cat/2.png, cat/3.png)",
            ],
        ),
    ],
)
def test_what_has_changed(now, said):
    assert compared(BEFORE, now) == said


def test_two_files_of_one_content_are_two_files():
    before = {"a": {"1.png": "x", "2.png": "x"}}
    assert compared(before, {"a": {"3.png": "x", "4.png": "y"}}) == [
        "1 file moved (a/1.png to a/3.png)",
        "1 file added (a/4.png)",
        "1 file removed (a/2.png)",
    ]


def test_folders_are_listed_by_class_and_part(tmp_path):
    for name in ("train/a/1.png", "train/a/deep/2.png", "train/b/1.png", "test/b/1.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (2, 2), len(name)).save(tmp_path / name)
    (tmp_path / "train" / "a" / "notes.txt").write_text("no picture")
    (tmp_path / "train" / "b" / "gone.png").symlink_to("nowhere")
    found = listing(str(tmp_path))
    assert {name: list(files) for name, files in found.items()} == {
        "train/a": ["1.png", "deep/2.png"],
        "train/b": ["1.png", "gone.png"],
        "test/b": ["1.png"],
    }
    digests = [digest for files in found.values() for digest in files.values()]
    assert len(set(digests)) == 4  # two names have one length, and so one picture
    assert found["train/b"]["gone.png"] == "is a link to a file that is not there"


def test_idx_files_are_listed_by_name(tmp_path):
    for kind in ("images-idx3", "labels-idx1"):
        (tmp_path / f"train-{kind}-ubyte.gz").write_bytes(gzip.compress(np.zeros(3).tobytes()))
    found = listing(str(tmp_path))
    assert list(found) == [""]
    assert list(found[""]) == ["train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"]
    now = {"": {**found[""], "train-images-idx3-ubyte.gz": "x"}}
    assert compared(found, now) == ["1 file changed (train-images-idx3-ubyte.gz)"]


def test_the_digits_have_no_files_and_nowhere_is_an_error(tmp_path):
    assert listing(None) == {}
    with pytest.raises(InvalidData, match="no such file or folder"):
        listing(str(tmp_path / "gone"))
