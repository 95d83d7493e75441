"""`neocog train` as it is typed: what it leaves, how it is stopped and gone on with, bad input."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from typer.testing import CliRunner, Result

from neocog import runs
from neocog.checkpoint import BEST, LAST, load
from neocog.cli import build_app
from neocog.runs import Run
from neocog.training import Learner

MLP = "mlp.safetensors"
EPOCHS = 40
KEPT = ["best.safetensors", "config.json", "last.safetensors", "mlp.safetensors"]


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    """`--threads` sets the threads of the process that runs the tests: put them back."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def bars(tmp_path_factory) -> Path:
    """The folder of pictures that all runs here learn from."""
    return tiny.folder(tmp_path_factory.mktemp("data") / "bars")


@pytest.fixture
def workplace(tmp_path, monkeypatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def call(*arguments: object) -> Result:
    plain = {"COLUMNS": "200", "FORCE_COLOR": None, "TTY_COMPATIBLE": None}
    return CliRunner().invoke(build_app(), ["train", *map(str, arguments)], env=plain)


def options(bars: Path, epochs: int = 2, seed: int = 3) -> list[str]:
    """The arguments of a run of a second, with the rate that learns bars soon."""
    found = [str(bars), "--arch", tiny.ARCHITECTURE, "--threads", "1", "--batch-size", "16"]
    return [*found, "--lr", "0.01", "--epochs", str(epochs), "--seed", str(seed)]


def done(*arguments: object) -> Result:
    result = call(*arguments)
    assert result.exit_code == 0, result.output
    return result


def refused(*arguments: object) -> str:
    """The one line on stderr of a call that must fail."""
    result = call(*arguments)
    assert result.exit_code == 2, (result.output, result.exception)
    lines = result.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    return lines[0].removeprefix("error: ")


def metrics_of(folder: Path) -> dict[str, Any]:
    """A run's metrics without the time it took."""
    found = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    assert found.pop("seconds") > 0
    return found


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# --- what a run leaves


@pytest.mark.slow
def test_a_run_leaves_all_that_it_promises(bars, workplace):
    result = done(*options(bars, epochs=40), "--out", "run")
    folder = workplace / "run"
    names = {path.name for path in folder.iterdir()}
    pictures = {name for name in names if name.startswith(("right-", "wrong-"))}
    plots = {"training.png", "shifts.png"}
    assert names == {*KEPT, "metrics.json", *plots, *pictures} and pictures
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
    for command in ("evaluate run", "summary run", "predict run", "explain run"):
        assert f" {command}" in result.stdout
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


# --- stopped and gone on with


@pytest.fixture(scope="module")
def whole(bars, tmp_path_factory) -> Path:
    """A run that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    done(*options(bars, EPOCHS), "--out", folder)
    return folder


def assert_ended_alike(folder: Path, whole: Path) -> None:
    assert metrics_of(folder) == metrics_of(whole)
    assert {path.name for path in folder.iterdir()} == {path.name for path in whole.iterdir()}
    for name in (BEST, MLP):
        assert (folder / name).read_bytes() == (whole / name).read_bytes()
    one, other = (load(path / LAST) for path in (folder, whole))
    for kind in ("tensors", "resume_tensors"):
        mine, theirs = getattr(one, kind), getattr(other, kind)
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)


IN_A_TERMINAL = """
import runpy, signal
signal.signal(signal.SIGINT, signal.default_int_handler)
runpy.run_module("neocog", run_name="__main__", alter_sys=True)
"""
"""`python -m neocog` that heeds Ctrl-C even where whoever runs the tests has had it ignored."""


def stopped_by(number: int, folder: Path, arguments: list[str], epochs: int) -> tuple[int, str]:
    """Trains in a process of its own, sends it a signal once ``epochs`` are saved.

    Returns its exit code and what it printed.
    """
    process = subprocess.Popen(
        [sys.executable, "-c", IN_A_TERMINAL, "train", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        deadline = time.monotonic() + 120
        while not (folder / BEST).exists() or load(folder / LAST).header.epoch < epochs:
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline, "the epochs were not finished in 120 s"
            time.sleep(0.005)
        os.kill(process.pid, number)
        printed = process.communicate(timeout=120)[0]
    finally:
        process.kill()
        process.wait()
    return process.returncode, printed


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="NOT TESTED: a kill (it takes POSIX signals)")
def test_a_run_killed_twice_ends_as_one_that_was_not(bars, whole, tmp_path):
    folder = tmp_path / "run"
    begun = [*options(bars, EPOCHS), "--out", str(folder)]
    for arguments, epochs in ((begun, 1), (["--resume", str(folder)], 12)):
        code, printed = stopped_by(signal.SIGKILL, folder, arguments, epochs)
        assert code == -signal.SIGKILL, printed
        assert epochs <= load(folder / LAST).header.epoch < EPOCHS
        assert not (folder / "metrics.json").exists()
    (folder / f".{LAST}.0123abcd.part").write_bytes(b"what a kill within a write leaves")
    result = done("--resume", folder)
    assert "epochs are done" in result.stdout
    assert_ended_alike(folder, whole)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="NOT TESTED: Ctrl-C (it takes POSIX signals)")
def test_ctrl_c_stops_cleanly(bars, whole, tmp_path):
    folder = tmp_path / "run"
    arguments = [*options(bars, EPOCHS), "--out", str(folder)]
    code, printed = stopped_by(signal.SIGINT, folder, arguments, 5)
    assert code == 130, printed
    epochs = load(folder / LAST).header.epoch
    assert f"stopped; {epochs} of {EPOCHS} epochs are kept. Go on by" in printed
    assert f"train --resume {folder}" in printed and "Traceback" not in printed
    assert sorted(path.name for path in folder.iterdir()) == KEPT
    done("--resume", folder)
    assert_ended_alike(folder, whole)


def interrupt(*arguments: object, **options: object) -> None:
    raise KeyboardInterrupt


def test_ctrl_c_before_a_run_has_begun_leaves_nothing(bars, workplace, monkeypatch):
    for where, name in ((runs, "fingerprint"), (runs.Source, "load"), (runs, "save")):
        with monkeypatch.context() as patch:
            patch.setattr(where, name, interrupt)
            assert call(*options(bars), "--out", "run").exit_code == 130
        assert not Path("run", "config.json").exists()
    done(*options(bars), "--out", "run")


@pytest.mark.slow
def test_ctrl_c_while_results_are_drawn_can_be_gone_on_from(bars, workplace, monkeypatch):
    done(*options(bars), "--out", "whole")
    with monkeypatch.context() as patch:
        patch.setattr(runs.plots, "shift_curve", interrupt)
        result = call(*options(bars), "--out", "run")
    assert result.exit_code == 130 and "stopped; 2 of 2 epochs are kept" in result.stdout
    assert not Path("run", "metrics.json").exists()
    done("--resume", "run")
    assert_ended_alike(Path("run"), Path("whole"))


def test_a_finished_run_may_be_resumed_and_stays_as_it_is(bars, workplace):
    done(*options(bars), "--out", "run")
    before = content(workplace)
    result = done("--resume", "run")
    assert "2 epochs are done" in result.stdout and "epoch 1/" not in result.stdout
    assert content(workplace) == before


def failing_in_epoch(epoch: int, name: str) -> Callable[..., tuple[float, int]]:
    """Learner.step, but for a loss that is NaN in the second step of an epoch."""
    step, calls = Learner.step, 0

    def patched(self: Learner, x: Any, labels: Any, lr: float) -> tuple[float, int]:
        nonlocal calls
        calls += self.architecture == name
        value, right = step(self, x, labels, lr)
        steps = -(-42 // 16)
        return (math.nan if calls == (epoch - 1) * steps + 2 else value), right

    return patched


@pytest.mark.slow
def test_a_run_that_diverges_keeps_the_epochs_before(bars, workplace, monkeypatch):
    done(*options(bars, epochs=4), "--out", "whole")
    assert metrics_of(Path("whole"))["pictures"]["train"] == 42
    with monkeypatch.context() as patch:
        patch.setattr(Learner, "step", failing_in_epoch(3, tiny.ARCHITECTURE))
        message = refused(*options(bars, epochs=4), "--out", "run")
    assert message.startswith("the loss became nan in epoch 3, step 2 of 3 (cnn, architecture ")
    assert "the state after epoch 2 is kept; try a learning rate below 0.01" in message
    assert load(Path("run", LAST)).header.epoch == 2
    assert sorted(path.name for path in Path("run").iterdir()) == KEPT
    done("--resume", "run")
    assert_ended_alike(Path("run"), Path("whole"))


# --- a full disk


WIDE = ("--arch", "16C3-P2-16C3-P2-3")
"""Weights of 12 KB, and 12 KB of the perceptron: last.safetensors holds them four times."""


def larger(disk: Path) -> None:
    command = ["mount", "-o", "remount,size=8m", str(disk)]
    subprocess.run(command, check=True, capture_output=True)


@pytest.mark.slow
def test_a_disk_that_fills_while_training_leaves_what_was_and_can_be_gone_on_from(bars, tmp_path):
    whole, arguments = tmp_path / "whole", [*options(bars, epochs=3), *WIDE]
    done(*arguments, "--out", whole)
    with tiny.full_disk(tmp_path / "disk", "200k") as disk:
        folder = disk / "run"
        message = refused(*arguments, "--out", folder)
        assert message.startswith(f"{folder}/") and message.endswith(": No space left on device")
        assert load(folder / LAST).header.epoch == 0
        for path in folder.iterdir():  # none is half written
            assert path.name in KEPT
            if path.name != "config.json":
                load(path)
        assert Run.open(folder).settings.epochs == 3
        larger(disk)
        done("--resume", folder)
        assert_ended_alike(folder, whole)


@pytest.mark.slow
def test_a_disk_that_fills_while_results_are_drawn_leaves_the_run(bars, tmp_path):
    with tiny.full_disk(tmp_path / "disk", "96k") as disk:
        folder = disk / "run"
        message = refused(*options(bars, epochs=1), "--out", folder)
        assert message.endswith(".png: No space left on device")
        names = {path.name for path in folder.iterdir()}
        assert names >= set(KEPT) and "metrics.json" not in names
        for path in folder.glob("*.png"):
            with Image.open(path) as image:
                image.load()
        larger(disk)
        done("--resume", folder)
        assert metrics_of(folder)["history"][-1]["epoch"] == 1


@pytest.mark.parametrize("exists", [False, True])
def test_a_disk_too_small_to_begin_is_left_empty(bars, tmp_path, exists):
    with tiny.full_disk(tmp_path / "disk", "64k") as disk:
        folder = disk / "run"
        if exists:
            folder.mkdir()
        message = refused(*options(bars), *WIDE, "--out", folder)
        assert message == f"{folder / LAST}: No space left on device"
        assert list(disk.rglob("*")) == ([folder] if exists else [])


# --- bad input


def picture(path: str, data: bytes | None = None) -> None:
    """A picture file of its own class folder, or one that holds ``data``."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    if data is None:
        Image.fromarray(tiny.pictures(1)[0][0]).save(path)
    else:
        Path(path).write_bytes(data)


@pytest.fixture
def bad(workplace, bars) -> Path:
    """A working directory full of what cannot be trained on."""
    Path("empty").mkdir()
    Path("text.txt").write_text("no pictures")
    for folder in ("hollow", "cut", "nan", "flat"):
        for name in "abc":
            picture(f"{folder}/{name}/1.png")
            picture(f"{folder}/{name}/2.png")
    Path("hollow/b/1.png").unlink()
    Path("hollow/b/2.png").unlink()
    picture("cut/b/2.png", Path("cut/b/1.png").read_bytes()[:90])
    values = np.full((12, 12), 0.5, dtype=np.float32)
    values[3, 4] = math.nan
    Image.fromarray(values).save("nan/c/3.tiff")
    picture("single/a/1.png")
    picture("single/a/2.png")
    Path("bars").symlink_to(bars)
    return workplace


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("nowhere", "nowhere: no such file or folder"),
        ("empty", "empty: "),
        ("text.txt", "text.txt: expected a folder, or an IDX file named like train-images"),
        ("hollow", "hollow/b: this class folder holds no picture"),
        ("single", "only a/ in it"),
        ("cut", "cut/b/2.png: damaged or truncated picture ("),
        ("nan", "nan/c/3.tiff: its values reach from nan to nan, expected 0 to 1"),
        ("bars --arch 4X3-3", "token 1, '4X3', means nothing; expected 32C3"),
        ("bars --arch 4C0-3", "token 1, '4C0': expected numbers of at least 1"),
        ("bars --arch 4C3-P2", "ends with 'P2', expected the number of classes"),
        ("bars --arch 4C3-P2-4", "ends with 4 classes, bars has 3"),
        ("bars --arch 4C13p0-3", "floor((12 - 1*(13-1) - 1 + 0 + 0)/1) + 1 = 0, expected at least"),
        ("bars --arch 4C3-P13-3", "pool 13x13 is larger than the 12x12 that reach it"),
        ("bars --arch 999999999C3-3", "weights (34 GiB), expected at most 1,073,741,824"),
        ("bars --epochs 0", "epochs=0: expected at least 1"),
        ("bars --epochs -1", "epochs=-1: expected at least 1"),
        ("bars --batch-size 0", "batch_size=0: expected at least 1"),
        ("bars --lr nan", "lr=nan: expected a finite number above 0"),
        ("bars --lr inf", "lr=inf: expected a finite number above 0"),
        ("bars --lr 0", "lr=0.0: expected a finite number above 0"),
        ("bars --seed -1", "seed=-1: expected 0 to 2^63 - 1"),
        ("bars --threads 0", "--threads 0: expected at least 1"),
        ("bars --size 0", "size=(0, 0): expected (height, width), both at least 1"),
        ("bars --device tpu", "device 'tpu': expected cpu or cuda"),
        ("bars --out text.txt", "--out text.txt: is a file, expected a new or empty directory"),
        ("bars --out text.txt/run", "text.txt/run"),
        ("--resume nowhere", "nowhere: no such run directory"),
        ("--resume text.txt", "text.txt: no such run directory"),
        ("--resume empty", "empty: not a run directory, it holds no config.json"),
        ("bars --resume empty", "PATH does not go with --resume"),
        ("--resume empty --arch 3", "--arch does not go with --resume: a run goes on as it began"),
        ("--resume empty --batch-size 3", "--batch-size does not go with --resume"),
        ("--resume empty --no-mlp", "--no-mlp does not go with --resume"),
        ("--resume empty --device cpu", "--device does not go with --resume"),
    ],
)
def test_bad_input_is_refused_in_one_line_and_nothing_is_written(bad, arguments, message):
    before = content(bad)
    if "--" not in arguments:
        arguments += " --epochs 1"
    assert message in refused(*arguments.split())
    assert content(bad) == before and not Path("runs").exists()


def test_cuda_is_refused_where_there_is_none(bars, workplace):
    if torch.cuda.is_available():
        pytest.skip("NOT TESTED: CUDA missing (there is CUDA here)")
    message = refused(bars, "--device", "cuda", "--out", "run")
    assert message.startswith("device 'cuda': PyTorch ") and message.endswith("; expected cpu")
    assert not Path("run").exists()


def test_a_folder_that_may_not_be_written_is_named(bars, workplace):
    Path("runs").write_text("a file where the runs would go")
    assert "runs" in refused(*options(bars))


@pytest.mark.parametrize(
    ("file", "data", "message"),
    [
        ("config.json", b"{", "config.json: cannot be read: "),
        ("config.json", b"[]", "config.json: cannot be read: "),
        ("config.json", b'{"format": 9}', "format 9, this neocog reads 1"),
        ("config.json", b"\xff\xfe", "config.json: cannot be read: "),
        (LAST, b"", "last.safetensors: not a checkpoint, or a damaged or truncated one"),
        (LAST, None, "last.safetensors: no such file"),
        (LAST, "best", "last.safetensors: cannot be resumed from: "),
    ],
)
def test_a_damaged_run_is_not_resumed(bars, workplace, file, data, message):
    done(*options(bars, epochs=1), "--out", "run")
    path = Path("run", file)
    if data is None:
        path.unlink()
    else:
        path.write_bytes(Path("run", BEST).read_bytes() if data == "best" else data)
    before = content(workplace)
    assert message in refused("--resume", "run")
    assert content(workplace) == before


def test_a_run_whose_pictures_have_changed_is_not_resumed(workplace):
    folder = tiny.folder(workplace / "mine")
    done(*options(folder, epochs=1), "--out", "run")
    one = next((folder / "left").iterdir())
    one.write_bytes(next((folder / "right").iterdir()).read_bytes())
    message = refused("--resume", "run")
    assert "the pictures are not those that run was begun with" in message
