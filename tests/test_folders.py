"""Folders of class folders: layouts, sizes, colours, notes, and what cannot be used."""

import os

import numpy as np
import pytest
import torch
from PIL import Image

from neocog import folders
from neocog.data import load
from neocog.errors import InvalidData

RANDOM = np.random.default_rng(0)


def noise(*shape):
    return RANDOM.integers(0, 256, shape, dtype=np.uint8)


def as_set(images):
    return {image.numpy().tobytes() for image in images}


def write_pictures(folder, per_class, shape=(6, 5)):
    """Class folders of noise; returns {class: {pixels as bytes}}."""
    written = {}
    for name, count in per_class.items():
        (folder / name).mkdir(parents=True)
        images = noise(count, *shape)
        for number, image in enumerate(images):
            Image.fromarray(image).save(folder / name / f"{number}.png")
        written[name] = {image.tobytes() for image in images}
    return written


def test_class_folders_are_split_by_us(tmp_path):
    written = write_pictures(tmp_path, {"10": 10, "9": 20, "cat": 5})
    data = load(tmp_path, val_fraction=0.2)
    assert data.classes == ("9", "10", "cat")
    assert torch.bincount(data.test.labels).tolist() == [4, 2, 1]
    assert torch.bincount(data.val.labels).tolist() == [3, 2, 1]
    assert torch.bincount(data.train.labels).tolist() == [13, 6, 3]
    for label, name in enumerate(data.classes):
        parts = [s.images[s.labels == label] for s in (data.train, data.val, data.test)]
        assert as_set(torch.cat(parts)) == written[name]
    assert data.notes == ("no test part: 7 pictures of all classes held out as one",)


def test_the_split_does_not_depend_on_file_names(tmp_path):
    write_pictures(tmp_path, {"a": 12, "b": 12})
    before = load(tmp_path)
    for path in tmp_path.glob("*/*.png"):
        path.rename(path.with_name(f"x{99 - int(path.stem)}.png"))
    after = load(tmp_path)
    assert as_set(before.test.images) == as_set(after.test.images)
    assert as_set(before.val.images) == as_set(after.val.images)


def test_a_class_of_one_picture_keeps_it_for_training(tmp_path):
    write_pictures(tmp_path, {"a": 1, "b": 2})
    data = load(tmp_path)
    assert data.train.labels.tolist() == [0, 1]
    assert data.test.labels.tolist() == [1]
    assert data.val is None
    assert data.notes[1] == "no validation part: no class has more than 1 picture to train on"
    write_pictures(tmp_path / "single", {"a": 1, "b": 1})
    with pytest.raises(InvalidData, match="no class has more than 1 picture .* at least 2"):
        load(tmp_path / "single")


@pytest.mark.parametrize("names", [("train", "val", "test"), ("Training", "valid", "testing")])
def test_train_val_and_test_folders(tmp_path, names):
    written = [write_pictures(tmp_path / name, {"a": 4, "b": 3}) for name in names]
    data = load(tmp_path)
    for split, pictures in zip((data.train, data.val, data.test), written, strict=True):
        assert as_set(split.images) == pictures["a"] | pictures["b"]
        assert split.labels.tolist() == [0] * 4 + [1] * 3
    assert data.notes == ()


def test_a_val_folder_alone_is_the_test_part(tmp_path):
    write_pictures(tmp_path / "train", {"a": 10, "b": 10})
    written = write_pictures(tmp_path / "val", {"a": 3})
    (tmp_path / "docs").mkdir()
    data = load(tmp_path)
    assert as_set(data.test.images) == written["a"]
    assert (len(data.train), len(data.val)) == (18, 2)
    assert data.notes == (
        "passed over the folder docs/ beside train/",
        "no test part: the validation part serves as one",
    )


def test_a_train_folder_alone_is_split(tmp_path):
    write_pictures(tmp_path / "train", {"a": 10, "b": 10})
    data = load(tmp_path)
    assert (len(data.train), len(data.val), len(data.test)) == (14, 2, 4)


def test_a_class_may_be_called_train(tmp_path):
    write_pictures(tmp_path, {"bus": 4, "train": 4})
    assert load(tmp_path).classes == ("bus", "train")


def test_hidden_files_are_ignored_and_others_said(tmp_path):
    write_pictures(tmp_path, {"a": 3, "b": 3, ".git": 2, "__MACOSX": 2})
    (tmp_path / "a" / ".DS_Store").write_text("")
    (tmp_path / "README.md").write_text("")
    for name in ("Thumbs.db", "notes.txt"):
        (tmp_path / "b" / name).write_text("")
    data = load(tmp_path)
    assert data.classes == ("a", "b")
    assert data.notes[0] == "passed over 2 files that are no pictures: notes.txt, Thumbs.db"


def test_sizes_that_differ_are_resized_to_the_most_common(tmp_path):
    write_pictures(tmp_path, {"a": 4, "b": 4}, (6, 5))
    for number in range(3):
        Image.new("L", (9, 9), 50).save(tmp_path / "a" / f"odd{number}.png")
    data = load(tmp_path)
    assert data.in_shape == (1, 6, 5)
    assert data.notes[0] == "3 of 11 pictures resized to 6 x 5 (the most common size)"
    asked = load(tmp_path, size=9)
    assert asked.in_shape == (1, 9, 9)
    assert asked.notes[0] == "8 of 11 pictures resized to 9 x 9 (as asked)"


def test_of_equally_common_sizes_the_smallest(tmp_path):
    for number, side in enumerate((8, 6, 7)):
        write_pictures(tmp_path, {f"{number}": 2}, (side, side))
    assert load(tmp_path).in_shape == (1, 6, 6)


def test_mixed_grey_and_colour_become_colour_and_that_is_said(tmp_path):
    grey = write_pictures(tmp_path, {"a": 3})["a"]
    colour = write_pictures(tmp_path, {"b": 3}, (6, 5, 3))["b"]
    data = load(tmp_path, val_fraction=0)
    assert data.in_shape == (3, 6, 5)
    images = torch.cat([data.train.images, data.test.images])
    labels = torch.cat([data.train.labels, data.test.labels])
    assert as_set(images[labels == 0][:, 1]) == grey
    assert as_set(images[labels == 1].permute(0, 2, 3, 1)) == colour
    assert data.notes[0] == (
        "3 of 6 pictures: grey repeated as red, green and blue, since the others are in colour"
    )
    forced = load(tmp_path, colour=False)
    assert forced.in_shape == (1, 6, 5)
    assert forced.notes[0] == "3 of 6 pictures reduced from colour to grey, as asked"
    (tmp_path / "b").rename(tmp_path.parent / f"{tmp_path.name}-b")
    write_pictures(tmp_path, {"c": 2})
    asked = load(tmp_path, colour=True)
    assert asked.in_shape == (3, 6, 5)
    assert asked.notes[0] == "5 of 5 pictures: grey repeated as red, green and blue, as asked"


def test_turned_and_transparent_pictures_are_counted_in_the_notes(tmp_path):
    write_pictures(tmp_path, {"a": 3, "b": 3}, (6, 5))
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(noise(5, 6)).save(tmp_path / "a" / "turned.png", exif=exif)
    for number in range(2):
        layers = [Image.fromarray(noise(6, 5)) for _ in range(2)]
        Image.merge("LA", layers).save(tmp_path / "b" / f"glass{number}.png")
    data = load(tmp_path)
    assert data.in_shape == (1, 6, 5)
    assert data.notes[:2] == (
        "1 picture: turned upright as its EXIF orientation says",
        "2 pictures: transparency laid on white",
    )


# --- errors of folders ----------------------------------------------------------------------------


def make(*folders_and_files):
    """A maker of a folder with these in it: "a/" a folder, "a/x.png" a picture, else a text."""

    def fill(root):
        for name in folders_and_files:
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if name.endswith("/"):
                path.mkdir(exist_ok=True)
            elif name.endswith(".png"):
                Image.fromarray(noise(4, 4)).save(path)
            else:
                path.write_text("text")

    return fill


@pytest.mark.parametrize(
    ("fill", "message"),
    [
        (make(), "set: is empty, expected a folder of pictures for each class"),
        (make("x.png"), "set: holds no folder, expected a folder of pictures for each class"),
        (make("a/x.png"), r"set: only a/ in it, expected .* \(at least 2 classes\)"),
        (make("a/x.png", "b/"), "b: this class folder holds no picture"),
        (make("a/x.png", "b/notes.txt", "b/.x.png"), "b: this class folder holds no picture"),
        (make("train/a/1.png", "train/b/1.png", "test/"), "test: no class folder in it"),
        (make("train/a/1.png", "train/b/1.png", "val/a/"), "val/a: this class folder holds no"),
        (make("train/a/1.png", "train/b/1.png", "test/c/1.png"), "test/c: no class of that name"),
        (make("train/", "test/a/x.png"), "train: no class folder in it"),
        (make("val/a/x.png", "test/a/x.png"), "val/ but no train/ in it|test/ but no train/"),
        (make("a/x.png", "b/y.jpg"), r"y\.jpg: not a picture in any format .*\(4 bytes\)"),
    ],
)
def test_folders_that_cannot_be_used(tmp_path, fill, message):
    (tmp_path / "set").mkdir()
    fill(tmp_path / "set")
    with pytest.raises(InvalidData, match=message) as caught:
        load(tmp_path / "set")
    assert "\n" not in str(caught.value)


def test_pictures_that_cannot_be_read_are_listed_and_left_out(tmp_path):
    """Some fail at their header, one further on; none has a say in size or colour."""
    write_pictures(tmp_path, {"a": 3, "b": 3}, (6, 5))
    whole = load(tmp_path)
    colour = tmp_path / "b" / "cut.png"
    Image.fromarray(noise(60, 60, 3)).save(colour)
    colour.write_bytes(colour.read_bytes()[:2000])
    (tmp_path / "a" / "none.png").write_bytes(b"")
    os.mkfifo(tmp_path / "a" / "pipe.png")
    (tmp_path / "a" / "gone.png").symlink_to("nowhere.png")
    data = load(tmp_path)
    assert data.in_shape == whole.in_shape == (1, 6, 5)
    for part in ("train", "val", "test"):
        assert torch.equal(getattr(data, part).images, getattr(whole, part).images)
        assert torch.equal(getattr(data, part).labels, getattr(whole, part).labels)
    reasons = [
        "a/gone.png: is a link to a file that is not there, expected a picture",
        "a/none.png: not a picture in any format that can be read (0 bytes)",
        "a/pipe.png: is a pipe, expected a picture",
        "b/cut.png: damaged or truncated picture (",
    ]
    assert len(data.unreadable) == 4
    for line, reason in zip(data.unreadable, reasons, strict=True):
        assert line.startswith(f"{tmp_path}/{reason}")
    assert data.notes[:5] == ("4 of 10 pictures cannot be read, left out:", *data.unreadable)
    with pytest.raises(InvalidData, match="4 of 10 pictures cannot be read: ") as caught:
        load(tmp_path, strict=True)
    assert all(line in str(caught.value) for line in data.unreadable)
    assert load(tmp_path, colour=True).notes[5:] == load(tmp_path / ".", colour=True).notes[5:]


def test_a_class_or_a_part_without_a_readable_picture_is_refused(tmp_path):
    for part in ("train", "test"):
        write_pictures(tmp_path / part, {"a": 2, "b": 1})
    (tmp_path / "test" / "b" / "0.png").write_text("text")
    assert load(tmp_path).test.labels.tolist() == [0, 0]
    (tmp_path / "test" / "a" / "0.png").write_text("text")
    (tmp_path / "test" / "a" / "1.png").write_text("text")
    with pytest.raises(InvalidData, match=r"test is left without a picture: .*a/0\.png: .*a/1"):
        load(tmp_path)
    Image.new("L", (6, 5)).save(tmp_path / "test" / "a" / "0.png")
    (tmp_path / "train" / "b" / "0.png").write_text("text")
    with pytest.raises(InvalidData, match=r"class b is left without a picture: .*b/0\.png: not a"):
        load(tmp_path)
    for path in tmp_path.glob("t*/*/*.png"):
        path.write_text("text")
    with pytest.raises(InvalidData, match="6 of 6 pictures cannot be read: "):
        load(tmp_path)


def test_tiffs_that_lie_on_their_side_have_the_size_they_are_read_in(tmp_path):
    """The common size is theirs: what was probed wrongly would not fit where it is decoded to."""
    for name, orientation in (("a", 6), ("b", 8)):
        (tmp_path / name).mkdir()
        exif = Image.Exif()
        exif[0x0112] = orientation
        for number in range(3):
            image = Image.fromarray(noise(4, 9))
            image.save(tmp_path / name / f"{number}.tif", exif=exif)
    data = load(tmp_path)
    assert data.in_shape == (1, 9, 4)
    assert data.notes[0] == "6 pictures: turned upright as its EXIF orientation says"


def test_names_that_are_no_text_are_spelled_out(tmp_path):
    write_pictures(tmp_path, {"a": 3, "b": 3})
    os.rename(tmp_path / "b", os.fsencode(tmp_path) + b"/b\xff\xec")
    assert load(tmp_path).classes == ("a", "b\\xff\\xec")


def test_a_set_too_large_for_memory_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    write_pictures(tmp_path, {"a": 2, "b": 2}, (10, 10))
    monkeypatch.setattr(folders, "MAX_BYTES", 399)
    with pytest.raises(InvalidData, match=r"4\*1\*10\*10 = 400 bytes .* at most 399 .*--size"):
        load(tmp_path)
    assert load(tmp_path, size=9).in_shape == (1, 9, 9)
