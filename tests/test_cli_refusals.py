"""`neocog train` refuses bad input in one line, exit code 2, with nothing written."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from run_tools import content, done, options, refused

from neocog.checkpoint import BEST, LAST


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
        ("cut --strict", "cut/b/2.png: damaged or truncated picture ("),
        ("nan --strict", "nan/c/3.tiff: its values reach from nan to nan, expected 0 to 1"),
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
        ("bars --engine jit", "engine='jit': expected neocog or eager"),
        ("bars --shift -1", "shift=-1.0: expected a number of at least 0"),
        ("bars --shift 7", "shift=7: expected at most half of the pictures' 12 pixels"),
        ("bars --rotation 200", "rotation=200.0: expected a number from 0 to 180"),
        ("bars --crop 1", "crop=1.0: expected a number from 0 to 0.9"),
        ("bars --flip --no-augment", "flip=True: expected none without augmentation"),
        ("--resume empty --flip", "--flip does not go with --resume"),
        ("--resume empty --engine eager", "--engine does not go with --resume"),
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
    if "--" not in arguments.removesuffix(" --strict"):
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
    name = f"left/{one.name}"
    assert f"not the pictures that run was trained on: 1 file changed ({name})" in message
