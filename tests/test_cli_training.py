"""`neocog train`: what a run leaves behind, and its options."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import numpy as np
import pytest
import tiny
from PIL import Image
from run_tools import KEPT, MLP, content, done, metrics_of, options, refused
from typer.testing import CliRunner

from neocog.checkpoint import BEST, LAST, load
from neocog.cli import build_app
from neocog.runs import Run


@pytest.mark.slow
def test_a_run_leaves_all_that_it_promises(bars, workplace):
    result = done(*options(bars, epochs=40), "--out", "run")
    folder = workplace / "run"
    names = {path.name for path in folder.iterdir()}
    pages = {name for name in names if name.endswith(".html")}
    pictures = {name for name in names - pages if name.startswith(("right-", "wrong-"))}
    plots = {"training.png", "shifts.png"}
    assert names == {*KEPT, "metrics.json", *plots, *pictures, *pages} and pictures
    assert {Path(name).stem for name in pages} == {Path(name).stem for name in pictures}
    for name in plots | pictures:
        with Image.open(folder / name) as image:
            image.load()
    metrics = metrics_of(folder)
    assert 0.9 <= metrics["test_accuracy"] <= 1
    assert list(metrics["shifted"]) == ["0", "1", "2", "3", "4"]
    for row in metrics["shifted"].values():
        assert set(row) == {"cnn", "mlp"} and all(0 <= share <= 1 for share in row.values())
    assert metrics["shifted"]["0"] == {
        "cnn": metrics["test_accuracy"],
        "mlp": metrics["mlp_test_accuracy"],
    }
    assert metrics["weights"]["mlp"] >= metrics["weights"]["cnn"]
    assert metrics["test"]["accuracy"] == metrics["test_accuracy"]
    assert [row["epoch"] for row in metrics["history"]] == list(range(1, 41))
    assert {name for name in metrics["examples"].values() if name} == pictures
    for name, file in (("cnn", BEST), ("mlp", MLP)):
        header = load(folder / file).header
        assert header.architecture == metrics["architecture"][name]
        assert (header.classes, header.in_shape) == (tiny.CLASSES, (1, tiny.SIDE, tiny.SIDE))
        assert (header.epoch, header.accuracy) == (
            metrics["best_epoch"][name],
            metrics["val_accuracy"][name],
        )
        row = metrics["history"][header.epoch - 1][name]
        assert row["val_loss"] == min(row[name]["val_loss"] for row in metrics["history"])
    assert load(folder / LAST).header.epoch == 40
    for heading in ("network", "perceptron", "shifted by", "4 pixels", "Next:"):
        assert heading in result.stdout
    commands = result.stdout.splitlines()[-4:]
    for command, line in zip(("evaluate", "summary", "predict", "explain"), commands, strict=True):
        assert f" {command} run" in line
    for page in pages:
        text = (folder / page).read_text(encoding="utf-8")
        assert page in result.stdout and '"serve": false' in text
    assert result.stdout.count("epoch ") >= 40 and result.stderr == ""


def test_the_options_are_what_is_trained_with(bars, workplace):
    arguments = [bars, "--arch", "4C3-P2-3", "--epochs", 2, "--batch-size", 7, "--lr", 0.5e-3]
    done(*arguments, "--seed", 11, "--threads", 1, "--no-mlp", "--no-augment", "--out", "run")
    config = json.loads(Path("run", "config.json").read_text())
    wanted = {"architecture": "4C3-P2-3", "epochs": 2, "batch_size": 7, "lr": 0.5e-3, "seed": 11}
    assert wanted.items() <= config["settings"].items()
    assert (config["threads"], config["device"]) == (1, "cpu")
    assert (config["settings"]["mlp"], config["augmentation"]) == (False, None)
    metrics = metrics_of(workplace / "run")
    assert (metrics["seed"], len(metrics["history"]), metrics["mlp_test_accuracy"]) == (11, 2, None)
    assert set(metrics["shifted"]["4"]) == {"cnn"} and not Path("run", MLP).exists()


@pytest.mark.parametrize("name", ["my run's", "-run"])
def test_the_last_lines_are_commands_that_can_be_typed(bars, workplace, name):
    result = done(*options(bars, epochs=1), "--no-mlp", f"--out={name}")
    lines = result.stdout.splitlines()[-4:]
    for line, command in zip(lines, ("evaluate", "summary", "predict", "explain"), strict=True):
        words = shlex.split(line)
        arguments = words[words.index(command) :]
        assert Path(arguments[1]) == Path(name)
        typed = CliRunner().invoke(build_app(), arguments)
        assert typed.exit_code == 0, (line, typed.output)


def test_pictures_that_cannot_be_read_are_counted_and_the_run_goes_on(workplace):
    bars = tiny.folder(Path("mine"))
    Path("mine", "left", "bad.png").write_text("no picture")
    where = Path("mine").absolute()
    reason = f"{where}/left/bad.png: not a picture in any format that can be read (10 bytes)"
    result = done(*options(bars, epochs=1), "--out", "run")
    assert result.stdout.splitlines()[:2] == [
        "note: 1 of 61 pictures cannot be read, left out:",
        f"note: {reason}",
    ]
    assert metrics_of(Path("run"))["pictures"]["unreadable"] == 1
    assert f"note: {reason}" in done("--resume", "run").stdout
    message = f"1 of 61 pictures cannot be read: {reason}"
    assert refused("--resume", "run", "--strict") == message
    assert refused(*options(bars, epochs=1), "--strict") == message


def test_distortions_and_engine_are_what_is_trained_with(bars, workplace):
    more = ("--shift", 1.5, "--rotation", 5, "--flip", "--crop", 0.2)
    result = done(*options(bars, epochs=1), *more, "--out", "run")
    assert "rotation 5°" in result.stdout and "shift 1.5 px, crop 20%, flip" in result.stdout
    assert "layer by layer" in result.stdout and "waiting for batches" in result.stdout
    assert "Neither was shown a shifted picture" not in result.stdout
    config = json.loads(Path("run", "config.json").read_text())
    wanted = {"shift": 1.5, "rotation": 5.0, "flip": True, "crop": 0.2}
    assert {**wanted, "engine": "eager"}.items() <= config["settings"].items()
    assert wanted.items() <= config["augmentation"].items()
    assert metrics_of(workplace / "run")["engine"] == "eager"


def test_a_run_from_before_there_were_engines_goes_on_layer_by_layer(bars, workplace):
    done(*options(bars), "--out", "run")
    path = Path("run", "config.json")
    config = json.loads(path.read_text())
    for name in ("engine", "shift", "rotation", "flip", "crop"):
        del config["settings"][name]
    del config["workers"]
    path.write_text(json.dumps(config))
    run = Run.open(Path("run"))
    assert (run.settings.engine, run.workers) == ("eager", 1)
    before = metrics_of(workplace / "run")
    assert "2 epochs are done" in done("--resume", "run").stdout
    assert metrics_of(workplace / "run") == before


@pytest.mark.slow
def test_neocog_computes_the_steps_unless_told_otherwise(bars, workplace):
    arguments = [bars, "--arch", tiny.ARCHITECTURE, "--epochs", 1, "--no-mlp", "--out", "run"]
    assert "the whole step compiled" in " ".join(done(*arguments).stdout.split())
    assert Run.open(Path("run")).settings.engine == metrics_of(Path("run"))["engine"] == "neocog"


@pytest.mark.slow
def test_the_architecture_ends_with_the_classes_unless_said(bars, workplace):
    done(bars, "--epochs", 1, "--threads", 1, "--no-mlp", "--out", "run")
    assert load(Path("run", BEST)).header.architecture == "32C3-P2-64C3-P2-3"


@pytest.mark.slow
@pytest.mark.parametrize("option", [("--seed", 4), ("--lr", 0.02), ("--batch-size", 8)])
def test_an_option_makes_a_difference_and_the_same_ones_do_not(bars, workplace, option):
    for out, more in (("one", ()), ("two", ()), ("other", option)):
        done(*options(bars), *more, "--out", out)
    one, two, other = (metrics_of(workplace / out) for out in ("one", "two", "other"))
    assert one == two
    assert one["history"] != other["history"]
    assert Path("one", BEST).read_bytes() == Path("two", BEST).read_bytes()


def test_json_alone_goes_to_stdout(bars, workplace):
    result = done(*options(bars), "--out", "run", "--json")
    printed = json.loads(result.stdout)
    assert printed.pop("run") == "run"
    pages = printed.pop("pages")
    assert pages and all(page.startswith("run/") and Path(page).is_file() for page in pages)
    assert printed == json.loads(Path("run", "metrics.json").read_text(encoding="utf-8"))
    assert "epoch 2/2" in result.stderr


@pytest.mark.slow
def test_no_run_is_overwritten(bars, workplace):
    for number in (1, 2):
        done(*options(bars, epochs=1))
        assert (workplace / f"runs/bars-{number}/metrics.json").is_file()
    before = content(workplace)
    message = refused(*options(bars, epochs=1), "--out", "runs/bars-1")
    assert (
        message.startswith("--out runs/bars-1: holds something already") and "--resume" in message
    )
    assert content(workplace) == before


def test_an_empty_folder_may_be_the_run(bars, workplace):
    Path("run").mkdir()
    done(*options(bars, epochs=1), "--out", "run")
    assert Path("run", "metrics.json").is_file()


def test_colour_pictures_make_a_run(workplace):
    images, labels = tiny.pictures(12)
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        path = Path("colours", tiny.CLASSES[label], f"{number}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.stack([image, 255 - image, image // 2], axis=2)).save(path)
    done(*options(Path("colours")), "--out", "run")
    assert load(Path("run", BEST)).header.in_shape == (3, tiny.SIDE, tiny.SIDE)
    examples = metrics_of(workplace / "run")["examples"]
    with Image.open(Path("run", examples["right"] or examples["wrong"])) as image:
        assert image.mode == "RGB"
