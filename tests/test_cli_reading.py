"""`neocog evaluate` and `neocog predict` as they are typed."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from reading_tools import as_json, bar_picture, learned, one, printed, refused
from typer.testing import CliRunner

from neocog import data, models
from neocog.checkpoint import BEST, Checkpoint, Header, Preprocessing, load, save
from neocog.cli import build_app
from neocog.cli.reading_view import MATRIX, print_evaluation
from neocog.evaluation import ClassScore, Evaluation

DIGITS = Header(
    architecture="4C3-P4-10",
    in_shape=(1, 28, 28),
    preprocessing=Preprocessing((0.13,), (0.31,), "dark", digit_like=True),
    classes=tuple("0123456789"),
)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run that has learned to tell bars apart, on pictures beside it."""
    return learned(tmp_path_factory.mktemp("reading"))


@pytest.fixture
def workplace(tmp_path, monkeypatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def digits_model(path: Path, **changes: Any) -> Path:
    """A checkpoint of an untrained reader of digits."""
    torch.manual_seed(1)
    header = Header(**{**vars(DIGITS), **changes})
    network = models.parse(header.architecture, header.in_shape)
    save(path, Checkpoint(header, network.state_dict()))
    return path


# --- evaluate


def assert_adds_up(found: dict[str, Any], count: int) -> None:
    """Every number of an evaluation follows from its confusion matrix."""
    confusion = np.array(found["confusion"])
    assert confusion.sum() == found["count"] == count
    assert found["accuracy"] == pytest.approx(np.trace(confusion) / count)
    for k, row in enumerate(found["classes"]):
        assert row["count"] == confusion[k].sum()
        for name, of in (("recall", row["count"]), ("precision", confusion[:, k].sum())):
            share = pytest.approx(confusion[k, k] / of, abs=1e-6) if of else None
            assert row[name] == share


def test_a_run_is_judged_by_its_own_test_pictures(run):
    found = as_json("evaluate", run)
    metrics = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    assert found["accuracy"] == metrics["test_accuracy"] >= 0.9
    assert found["data"] == "bars" and found["model"] == str(run / BEST)
    assert [row["name"] for row in found["classes"]] == list(tiny.CLASSES)
    assert {k: found[k] for k in metrics["test"]} == metrics["test"]
    assert_adds_up(found, metrics["pictures"]["test"])


def test_what_is_printed_are_the_same_numbers(run):
    found, text = as_json("evaluate", run), printed("evaluate", run)
    share = f"{100 * found['accuracy']:.1f} %"
    assert f"{share} of the {found['count']} test pictures of bars read rightly" in text
    for row in found["classes"]:
        numbers = rf"{row['count']} +{100 * row['recall']:.1f} % +{100 * row['precision']:.1f} %"
        assert re.search(rf"^{row['name']} +{numbers}", text, re.MULTILINE)
    for name, counts in zip(tiny.CLASSES, found["confusion"], strict=True):
        shown = " +".join(str(n) if n else r"\." for n in counts)
        assert re.search(rf"^{name} +{shown} *$", text, re.MULTILINE)


def test_a_checkpoint_is_judged_by_pictures_of_any_size_and_kind(run, workplace):
    images, labels = tiny.pictures(6, seed=9)
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        path = Path("large", tiny.CLASSES[label], f"{number}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).convert("RGB").resize((24, 24)).save(path)
    found = as_json("evaluate", run / BEST, "large")
    assert any("12 x 12" in note for note in found["notes"])
    assert_adds_up(found, 3)


def test_a_reader_of_digits_is_judged_by_neocogs_own(workplace):
    found = as_json("evaluate", digits_model(Path("digits.safetensors")))
    assert found["data"] == "digits" and found["notes"] == [
        "5000 handwritten digits of MNIST, embedded in neocog"
    ]
    assert all(row["count"] == 100 for row in found["classes"])
    assert_adds_up(found, 1000)


def test_other_class_names_are_said(run, workplace):
    tiny.folder(Path("bars"), 4)
    Path("bars", "right").rename(Path("bars", "zebra"))
    (note,) = [n for n in as_json("evaluate", run, "bars")["notes"] if "are taken for" in n]
    assert "classes of bars (zebra) are taken for those of the network (right)" in note


def test_classes_are_told_apart_by_name_wherever_they_stand(run, workplace):
    before = as_json("evaluate", run, tiny.folder(Path("bars"), 8))
    assert [row["count"] for row in before["classes"]] == [2, 2, 2]
    Path("bars", "middle").rename(Path("bars", "zebra"))  # now the last of three
    for extra in sorted(Path("bars", "zebra").iterdir())[4:]:  # 1 of 4 is held out
        extra.unlink()
    after = as_json("evaluate", run, "bars")
    assert [row["name"] for row in after["classes"]] == ["left", "zebra", "right"]
    assert [row["count"] for row in after["classes"]] == [2, 1, 2]
    assert after["confusion"][0] == before["confusion"][0]
    assert after["confusion"][2] == before["confusion"][2]


def test_a_score_of_no_pictures_is_not_a_number(run, workplace):
    """No picture of one class is tested, and none is taken for another."""
    for part in ("train", "test"):
        tiny.folder(Path("bars", part), 8)
    for image in Path("bars", "test", "left").iterdir():
        image.unlink()
    Path("bars", "test", "left").rmdir()
    found = as_json("evaluate", run, "bars")
    assert_adds_up(found, 16)
    assert found["classes"][0]["count"] == 0 and found["classes"][0]["recall"] is None
    never = [row["name"] for row in found["classes"] if row["precision"] is None]
    text = printed("evaluate", run, "bars")
    (line,) = [line for line in text.splitlines() if line.startswith("left  ") and "." not in line]
    assert line.split()[:3] == ["left", "0", "–"]
    assert ("left" in never) == (line.split()[3] == "–")


def test_another_number_of_classes_is_refused(run, workplace):
    tiny.folder(Path("bars"), 4)
    for image in Path("bars", "right").iterdir():
        image.unlink()
    Path("bars", "right").rmdir()
    message = refused("evaluate", run, "bars")
    assert message == f"{run / BEST}: tells 3 classes apart, bars has 2 (left, middle)"
    Path("bars", "new").mkdir()
    Image.fromarray(bar_picture(0)).save("bars/new/1.png")
    tiny.folder(Path("bars"), 4)
    message = refused("evaluate", run, "bars")
    assert message.endswith("bars has 4 (left, middle, new, right); new is none of the network's")


def test_a_model_of_other_channels_is_refused(workplace):
    model = digits_model(
        Path("two.safetensors"), in_shape=(2, 28, 28), preprocessing=Preprocessing((0, 0), (1, 1))
    )
    message = refused("evaluate", model)
    assert message == f"{model}: takes 2 channels, pictures give 1 (grey) or 3 (colour)"
    tiny.folder(Path("bars"), 1)
    assert refused("predict", model, "bars") == message


def test_weights_of_no_use_are_refused(workplace):
    model = digits_model(Path("nan.safetensors"))
    kept = load(model)
    tensors = {name: torch.full_like(tensor, torch.nan) for name, tensor in kept.tensors.items()}
    save(model, Checkpoint(kept.header, tensors))
    assert "its answers are not finite" in refused("evaluate", model)
    tiny.folder(Path("bars"), 1)
    assert "its answers are not finite" in refused("predict", model, "bars")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("nowhere", "model 'nowhere': no such file or folder; expected a run directory"),
        ("empty", f"empty: not a run directory, it holds no {BEST}"),
        ("text.txt", "text.txt: not a checkpoint, or a damaged or truncated one"),
        ("good nowhere", "nowhere: no such file or folder"),
        ("good empty", "empty: "),
        ("good text.txt", "text.txt: expected a folder, or an IDX file"),
        ("good --threads 0 --", "--threads 0: expected at least 1"),
        ("good --input 1,28,28", "--input 1,28,28: good says itself what it takes"),
        ("good --weights good", "good has its own weights"),
    ],
)
def test_bad_input_to_evaluate_is_refused_in_one_line(workplace, arguments, message):
    Path("empty").mkdir()
    Path("text.txt").write_text("no pictures")
    digits_model(Path("good"))
    if arguments.endswith(" --"):  # the last --threads counts: leave out call's own
        result = CliRunner().invoke(build_app(), ["evaluate", *arguments.split()[:-1]])
        assert result.exit_code == 2 and result.stderr == f"error: {message}\n"
    else:
        assert message in refused("evaluate", *arguments.split())


def test_of_many_classes_the_worst_confusions_are_listed(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    count = MATRIX + 1
    confusion = 9 * np.eye(count, dtype=int)
    confusion[2, 5], confusion[7, 1] = 3, 40
    names = [f"class{k}" for k in range(count)]
    scores = tuple(ClassScore(name, 9, 1.0, 1.0) for name in names)
    result = Evaluation(0.5, 1.0, 9 * count + 43, scores, tuple(map(tuple, confusion.tolist())))
    print_evaluation("model", "data", [], result)
    shown = capsys.readouterr().out.split("most often confused")[1]
    assert re.findall(r"class(\d+) +class(\d+) +(\d+)", shown) == [
        ("7", "1", "40"),
        ("2", "5", "3"),
    ]


# --- predict


@pytest.mark.parametrize("label", range(3))
def test_a_picture_is_read(run, workplace, label):
    Image.fromarray(bar_picture(label)).save("one.png")
    found = one(run, "one.png")
    assert found["image"] == "one.png" and found["notes"] == []
    assert found["top"][0]["class"] == tiny.CLASSES[label]
    shares = [row["probability"] for row in found["top"]]
    assert sum(shares) == pytest.approx(1, abs=1e-9) and shares == sorted(shares, reverse=True)
    assert sorted(row["class"] for row in found["top"]) == sorted(tiny.CLASSES)
    text = printed("predict", run, "one.png")
    assert text.startswith("one.png\n")
    first = text.splitlines()[1]
    assert re.match(rf"  {tiny.CLASSES[label]} +{100 * shares[0]:.1f} %", first)


@pytest.mark.parametrize(("top", "rows"), [(1, 1), (2, 2), (3, 3), (99, 3)])
def test_so_many_classes_are_printed(run, workplace, top, rows):
    Image.fromarray(bar_picture(1)).save("one.png")
    everything = one(run, "one.png", "--top", 3)["top"]
    assert one(run, "one.png", "--top", top)["top"] == everything[:rows]
    assert len(printed("predict", run, "one.png", "--top", top).splitlines()) == 1 + rows


def test_a_folder_is_read_in_the_order_of_its_numbers(run, workplace):
    Path("some/below").mkdir(parents=True)
    for name, label in (("10.png", 0), ("2.png", 1), ("below/1.PNG", 2)):
        Image.fromarray(bar_picture(label)).save(Path("some", name))
    Path("some", "notes.txt").write_text("passed over")
    Path("some", ".hidden.png").write_text("passed over")
    Image.fromarray(bar_picture(0)).save("alone.png")
    found = as_json("predict", run, "some", "alone.png")
    read = {row["image"]: row["top"][0]["class"] for row in found}
    assert list(read) == [str(Path("some", n)) for n in ("2.png", "10.png", "below/1.PNG")] + [
        "alone.png"
    ]
    assert list(read.values()) == ["middle", "left", "right", "left"]


def test_a_picture_is_read_alike_alone_and_among_others(run, workplace):
    for label in range(3):
        Image.fromarray(bar_picture(label)).save(f"{label}.png")
    together = as_json("predict", run, "0.png", "1.png", "2.png")
    for label, row in enumerate(together):
        alone = one(run, f"{label}.png")
        assert [r["class"] for r in alone["top"]] == [r["class"] for r in row["top"]]
        for mine, theirs in zip(alone["top"], row["top"], strict=True):
            assert mine["probability"] == pytest.approx(theirs["probability"], abs=1e-6)


def test_ink_on_paper_is_inverted_and_that_is_said(run, workplace):
    Image.fromarray(bar_picture(2)).save("chalk.png")
    Image.fromarray(255 - bar_picture(2)).save("ink.png")
    found = one(run, "ink.png")
    assert found["notes"] == ["inverted: the network has learned pictures on a dark background"]
    assert found["top"] == one(run, "chalk.png")["top"]
    assert f"  note: {found['notes'][0]}\n" in printed("predict", run, "ink.png")


def test_a_dark_digit_on_light_paper_is_read_as_its_negative(workplace):
    model = digits_model(Path("digits.safetensors"))
    digit = data.load().test.images[123, 0].numpy()
    Image.fromarray(digit).save("chalk.png")
    Image.fromarray(255 - digit).save("ink.png")
    chalk, ink = one(model, "chalk.png", "--top", 10), one(model, "ink.png", "--top", 10)
    assert chalk["notes"] == []
    assert ink["notes"] == ["inverted: the network has learned light digits on black"]
    assert ink["top"] == chalk["top"] and len(ink["top"]) == 10
    assert sum(row["probability"] for row in ink["top"]) == pytest.approx(1, abs=1e-9)


def test_a_large_photographed_digit_is_framed_as_those_learned(workplace):
    model = digits_model(Path("digits.safetensors"))
    digit = Image.fromarray(255 - data.load().test.images[123, 0].numpy())
    page = Image.new("RGB", (400, 300), (235, 230, 220))
    page.paste(digit.resize((140, 140)).convert("RGB"), (200, 90))
    page.save("page.jpg", quality=95)
    notes = one(model, "page.jpg")["notes"]
    assert "colour reduced to grey: the network takes 1 channel" in notes
    assert "inverted: the network has learned light digits on black" in notes
    assert len(notes) == 3


def test_transparency_is_laid_on_white(run, workplace):
    alpha = bar_picture(0)
    Image.fromarray(alpha).save("plain.png")
    ink = np.stack([np.zeros_like(alpha), alpha], axis=2)  # black, seen through as the bar is
    Image.fromarray(ink, "LA").save("alpha.png")
    found = one(run, "alpha.png")
    assert found["notes"] == [
        "transparency laid on white",
        "inverted: the network has learned pictures on a dark background",
    ]
    for mine, theirs in zip(found["top"], one(run, "plain.png")["top"], strict=True):
        assert mine["class"] == theirs["class"]
        assert mine["probability"] == pytest.approx(theirs["probability"], abs=0.02)


def test_a_picture_is_turned_as_its_exif_data_say(run, workplace):
    upright = bar_picture(2)
    Image.fromarray(upright).save("upright.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned right by 90 degrees
    Image.fromarray(np.rot90(upright, 1).copy()).save("lying.png", exif=exif)
    found = one(run, "lying.png")
    assert found["notes"] == ["turned upright as its EXIF orientation says"]
    assert found["top"] == one(run, "upright.png")["top"]
    assert found["top"][0]["class"] == "right"


def test_the_examples_of_a_run_are_read_as_the_run_has_read_them(run):
    metrics = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    right = metrics["examples"]["right"]
    found = one(run, run / right)
    assert right == f"right-{found['top'][0]['class']}.png" and found["notes"] == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("cut.png", "cut.png: damaged or truncated picture ("),
        ("good.png cut.png --strict", "1 of 2 pictures cannot be read: cut.png: damaged or trun"),
        ("cut.png empty", "2 of 2 pictures cannot be read: cut.png: damaged or truncated picture"),
        ("text.txt", "text.txt: not a picture in any format that can be read (11 bytes)"),
        ("hollow.png", "hollow.png: not a picture in any format that can be read (0 bytes)"),
        ("nan.tiff", "nan.tiff: its values reach from nan to nan, expected 0 to 1"),
        ("nowhere.png", "nowhere.png: no such file or folder"),
        ("empty", "empty: this folder holds no picture"),
        ("good.png --top 0", "--top 0: expected at least 1"),
        ("good.png --input 1,8,8", "says itself what it takes"),
        ("good.png --weights cut.png", "has its own weights"),
    ],
)
def test_bad_input_to_predict_is_refused_in_one_line(run, workplace, arguments, message):
    Path("empty").mkdir()
    Path("text.txt").write_text("no picture\n")
    Path("hollow.png").write_bytes(b"")
    Image.fromarray(bar_picture(1)).save("good.png")
    Path("cut.png").write_bytes(Path("good.png").read_bytes()[:-40])
    Image.fromarray(np.full((5, 5), np.nan, dtype=np.float32)).save("nan.tiff")
    assert message in refused("predict", run, *arguments.split())


def test_what_cannot_be_read_is_listed_and_left_out(run, workplace):
    Path("some").mkdir()
    for n in (1, 3):
        Image.fromarray(bar_picture(n % 3)).save(f"some/{n}.png")
    Path("some", "2.png").write_text("no picture")
    os.mkfifo("some/4.png")
    found = as_json("predict", run, "some", "gone.png")
    assert [row["image"] for row in found] == [*(f"some/{n}.png" for n in (1, 2, 3, 4)), "gone.png"]
    assert [row["error"] for row in found] == [
        None,
        "some/2.png: not a picture in any format that can be read (10 bytes)",
        None,
        "some/4.png: is a pipe, expected a picture",
        "gone.png: no such file or folder",
    ]
    assert [row["top"] for row in found] == [
        row["top"] if row["error"] is None else [] for row in found
    ]
    for row, label in ((found[0], 1), (found[2], 0)):
        assert row["top"][0]["class"] == tiny.CLASSES[label]
    text = printed("predict", run, "some", "gone.png").splitlines()
    at = text.index("some/2.png")
    assert text[at + 1] == "  left out: not a picture in any format that can be read (10 bytes)"
    assert text[-1] == "note: 3 of 5 pictures cannot be read, left out"


FACTORY = """
from torch import nn

def net():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
"""


def test_a_third_party_model_is_told_what_it_takes(workplace):
    Path("theirs.py").write_text(FACTORY)
    Image.fromarray(bar_picture(1)).save("one.png")
    try:
        message = refused("predict", "theirs:net", "one.png")
        assert message == "theirs:net: does not say what it takes; expected --input C,H,W"
        found = one(Path("theirs:net"), "one.png", "--input", "1,8,8")
        assert sorted(row["class"] for row in found["top"]) == ["0", "1", "2"]
        message = refused("predict", "theirs:net", "one.png", "--input", "1,9,9")
        assert message.startswith("theirs:net: cannot take pictures of 1x9x9: ")
        for wrong in ("1,8", "1,8,0", "a,b,c", "1,8,-8"):
            message = refused("predict", "theirs:net", "one.png", "--input", wrong)
            assert message.endswith("expected C,H,W, three whole numbers of at least 1")
    finally:
        sys.modules.pop("theirs", None)
