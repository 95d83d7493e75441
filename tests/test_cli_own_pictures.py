"""`neocog evaluate`, `predict` and `explain` by the pictures a run was trained on, or what became
of them."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from reading_tools import as_json, learned, refused
from typer.testing import CliRunner

from neocog import models, tracing
from neocog.checkpoint import BEST, load
from neocog.cli import build_app
from neocog.cli.shared import program
from neocog.runs import Run


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run that has learned to tell bars apart, on pictures beside it."""
    return learned(tmp_path_factory.mktemp("reading"))


@pytest.fixture
def workplace(tmp_path, monkeypatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_checkpoint_of_a_run_is_judged_by_the_runs_own_pictures(run):
    assert as_json("evaluate", run / BEST) == as_json("evaluate", run)


def test_a_checkpoint_away_from_its_run_is_not_judged_by_digits(run, workplace):
    Path("alone.safetensors").write_bytes((run / BEST).read_bytes())
    for command in (("evaluate",), ("predict", "test:0")):
        message = refused(command[0], "alone.safetensors", *command[1:])
        assert message.endswith(
            "alone.safetensors was trained on pictures of its own (left, middle, right), and lies "
            "in no run directory that says where they are"
        )


def test_test_n_is_a_test_picture_of_the_run(run):
    test = Run.open(run).load_data().test
    found = as_json("predict", run, *(f"test:{n}" for n in range(len(test))))
    assert [row["image"] for row in found] == [f"test:{n}" for n in range(len(test))]
    truth = [tiny.CLASSES[label] for label in test.labels]
    right = sum(row["top"][0]["class"] == name for row, name in zip(found, truth, strict=True))
    assert right / len(test) == as_json("evaluate", run)["accuracy"]
    last = len(test) - 1
    message = refused("predict", run, f"test:{last + 1}")
    assert message == f"test:{last + 1}: expected test:0 to test:{last}, the test pictures of bars"


def test_explain_takes_the_runs_own_picture(run):
    test = Run.open(run).load_data().test
    arguments = ["explain", run, "test:7", "--layer", 1, "--channel", 0, "--at", "5,5", "--json"]
    result = CliRunner().invoke(build_app(), list(map(str, arguments)))
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    how = load(run / BEST).header.preprocessing
    x = how.apply(test.images[7:8])[0]
    window = json.loads(result.stdout)["explained"]
    model = models.parse(tiny.ARCHITECTURE, (1, tiny.SIDE, tiny.SIDE)).eval()
    model.load_state_dict(load(run / BEST).tensors)
    expected = tracing.explain_value(model, x, 1, 0, (5, 5)).explained
    assert found["matches"] and window == expected


# --- a folder that has changed


@pytest.fixture
def own(run, workplace) -> Path:
    """A copy of the run and of its pictures, which may be changed: ``run`` and ``bars``."""
    shutil.copytree(run.parent / "bars", "bars")
    shutil.copytree(run, "run")
    config = Path("run", "config.json")
    before, after = str(run.parent / "bars"), str(Path("bars").absolute())
    config.write_text(config.read_text("utf-8").replace(before, after), "utf-8")
    return Path("run")


def test_what_has_changed_since_is_said(own):
    assert as_json("evaluate", own)["data"] == "bars"
    Path("bars", "left", "0.png").unlink()
    shutil.copy("bars/right/40.png", "bars/middle/new one.png")
    command = f"evaluate run {Path('bars').absolute()}"
    message = refused("evaluate", own)
    assert message.startswith(
        f"{Path('bars').absolute()}: not the pictures that run was trained on"
    )
    assert "left: 20 then, 19 now; middle: 20 then, 21 now" in message
    assert "1 file added (middle/new one.png); 1 file removed (left/0.png)" in message
    assert message.endswith(f"to judge it by these all the same: {program()} {command}")
    for other in (("predict", own, "test:1"), ("train", "--resume", own)):
        assert "1 file removed (left/0.png)" in refused(*other)
    notes = as_json(*command.split())["notes"]
    assert notes[-1].startswith("since run was trained: left: 20 then, 19 now; middle:")
    Path("bars", "left").rename("bars/links")
    assert "class left renamed to links" in refused("evaluate", own)
    shutil.rmtree("bars/links")
    assert "class left removed (20 pictures)" in refused("evaluate", own)
    shutil.rmtree("bars/right")  # one class is no data set any more
    message = refused("evaluate", own)
    assert "only middle/ in it" in message and "class right removed (20 pictures)" in message


def test_of_an_older_run_the_classes_are_compared(own):
    Path("run", "pictures.json").unlink()
    assert as_json("evaluate", own)["data"] == "bars"
    Path("bars", "left", "0.png").unlink()
    assert "trained on: other pictures in the same classes; to" in refused("evaluate", own)
    Path("bars", "left").rename("bars/links")
    message = refused("evaluate", own)
    assert "trained on: classes left, middle, right then, links, middle, right now;" in message


@pytest.mark.slow
def test_korean_names_are_the_same_under_an_ascii_locale(workplace):
    tiny.folder(Path("bars"), 8)
    for old, new in zip(tiny.CLASSES, ("왼쪽", "가운데", "오른쪽"), strict=True):
        Path("bars", old).rename(Path("bars", new))
    Path("bars", "왼쪽", "0.png").rename(Path("bars", "왼쪽", "그림.png"))
    plain = {k: v for k, v in os.environ.items() if not k.startswith(("LC_", "PYTHON", "LANG"))}
    ascii_only = {
        **plain,
        "LC_ALL": "C",
        "PYTHONUTF8": "0",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }

    def typed(*arguments: str) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, "-m", "neocog", *arguments, "--threads", "1"]
        return subprocess.run(line, env=ascii_only, capture_output=True, text=True, check=False)

    made = typed(
        *("train", "bars", "--arch", "2C3-3", "--epochs", "1", "--no-mlp", "--engine", "eager"),
        *("--out", "실행", "--json"),
    )
    assert made.returncode == 0, made.stderr
    here = as_json("evaluate", "실행")
    there = typed("evaluate", "실행", "--json")
    assert there.returncode == 0, there.stderr
    assert json.loads(there.stdout)["classes"] == here["classes"]
    assert {row["name"] for row in here["classes"]} == {"왼쪽", "가운데", "오른쪽"}
    Path("bars", "왼쪽", "그림.png").unlink()
    message = typed("evaluate", "실행").stderr  # spelled out, if the terminal is ASCII too
    message = re.sub(r"\\u([0-9a-f]{4})", lambda found: chr(int(found[1], 16)), message)
    assert (
        refused("evaluate", "실행").partition(": not the")[2].partition("; to judge")[0] in message
    )
    assert "1 file removed (왼쪽/그림.png)" in message
