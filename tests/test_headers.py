"""The metadata of checkpoints, whatever stands there: read, or refused in one line."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from neocog import models
from neocog.checkpoint import Checkpoint, Header, Preprocessing, build, load, load_model
from neocog.cli import build_app
from neocog.errors import InvalidModel

HEADER = Header("2C3-P2-3", (1, 4, 4), Preprocessing((0.25,), (0.5,)), ("a", "b", "c"), 1, 0.5)
ROW = {"epoch": 1, "cnn": {"loss": 1.0, "accuracy": 0.5, "val_loss": 1, "val_accuracy": 0.5}}
RESUME = {"history": [ROW], "seconds": 1.5, "spent": {"step": 1.0}}
VALUES = json.loads(HEADER.to_json())
STATE = models.parse(HEADER.architecture, HEADER.in_shape).state_dict()


def written(path: Path, header: str, resume: str | None = None) -> Path:
    metadata = {"neocog": header, **({} if resume is None else {"resume": resume})}
    path.write_bytes(safetensors.torch.save({k: v.clone() for k, v in STATE.items()}, metadata))
    return path


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where the values of some JSON stand, itself included."""
    inside = value.items() if isinstance(value, dict) else []
    inside = enumerate(value) if isinstance(value, list) else inside
    return [path, *(place for key, item in inside for place in places(item, (*path, key)))]


def changed(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """A copy with another value in that place; without one if it is Ellipsis."""
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    if len(path) == 1 and new is ...:
        del copy[path[0]]
    else:
        copy[path[0]] = changed(copy[path[0]], path[1:], new)
    return copy


ODD = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(10**300, 10**310)
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["1", "0.5", "nan", "9C99999999999999-3", "9" * 5000 + "C3-3", "2C3-P0-3"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)


@given(st.sampled_from(places(VALUES)[1:]), ODD | st.just(...))
def test_a_header_with_any_value_changed_is_read_or_refused(at, new):
    try:
        header = Header.from_json(json.dumps(changed(VALUES, at, new)))
        model = build(Checkpoint(header, STATE), "here")
    except InvalidModel as error:
        assert len(str(error)) < 1000
        return
    how = header.preprocessing
    assert [type(size) for size in header.in_shape] == [int] * 3
    assert all(isinstance(name, str) for name in header.classes) and len(header.classes) == 3
    assert all(type(v) is float and math.isfinite(v) for v in (*how.mean, *how.std))
    assert min(how.std) > 0 and type(how.digit_like) is bool and type(header.epoch) is int
    assert Header.from_json(header.to_json()) == header
    assert model(torch.zeros(1, *header.in_shape)).shape == (1, 3)


@given(ODD)
def test_any_json_for_a_header_is_refused(value):
    with pytest.raises(InvalidModel, match="cannot be read"):
        Header.from_json(json.dumps(value))


@given(st.text() | st.text('[]{}:,"0123456789eE+-.ntf\\u'))
def test_any_text_for_a_header_is_refused(text):
    with pytest.raises(InvalidModel, match="cannot be read"):
        Header.from_json(text)


@given(st.sampled_from(places(RESUME)[1:]), ODD | st.just(...))
def test_what_training_left_is_read_or_refused(tmp_path_factory, at, new):
    path = tmp_path_factory.getbasetemp() / "resumed.safetensors"
    written(path, HEADER.to_json(), json.dumps(changed(RESUME, at, new)))
    try:
        kept = load(path).resume
    except InvalidModel as error:
        assert "metadata that cannot be read" in str(error)
        return
    assert kept["seconds"] >= 0
    for number, row in enumerate(kept["history"], 1):
        assert row["epoch"] == number and math.isfinite(row["cnn"]["val_loss"])


HOSTILE = {
    "nested lists": "[" * 100_000,
    "nested objects": '{"a":' * 50_000 + "1" + "}" * 50_000,
    "nested in a field": HEADER.to_json()[:-1] + ', "b": ' + "[" * 9000 + "]" * 9000 + "}",
    "a list": "[1]",
    "a number": "1",
    "null": "null",
    "5,000 digits": HEADER.to_json().replace('"epoch": 1', '"epoch": ' + "1" * 5000),
    "400 digits": HEADER.to_json().replace("0.25", "1" * 400),
    "a string": HEADER.to_json().replace("0.25", '"0.25"'),
    "not a number": HEADER.to_json().replace("0.25", "NaN"),
    "infinity": HEADER.to_json().replace("0.25", "1e999"),
    "true": HEADER.to_json().replace('"format": 1', '"format": true'),
    "names": HEADER.to_json().replace('["a", "b", "c"]', "[1, 2, 3]"),
    "no deviation": HEADER.to_json().replace("0.5]", "0]"),
    "an impossible size": HEADER.to_json().replace("[1, 4, 4]", "[1, 65536, 65536]"),
    "two channels": HEADER.to_json().replace("0.25", "0.25, 0.25"),
    "controls": HEADER.to_json().replace("mixed", "\\u001b[31m\\u202e"),
}


@pytest.mark.parametrize("what", HOSTILE)
@pytest.mark.parametrize("command", ["summary", "evaluate"])
def test_on_the_command_line_that_is_one_line_and_exit_code_2(tmp_path, what, command):
    path = written(tmp_path / "hostile.safetensors", HOSTILE[what])
    result = CliRunner().invoke(build_app(), [command, str(path)])
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith(f"error: {path}: has metadata that cannot be read (")
    assert (
        result.stderr.count("\n") == 1 and result.stderr.isascii() and "\x1b" not in result.stderr
    )


@pytest.mark.parametrize(
    "text", ["[" * 100_000, "[]", '{"format": 1e400}', "{}", "\x00", "1" * 5000]
)
def test_a_run_with_an_unreadable_configuration(tmp_path, text):
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    result = CliRunner().invoke(build_app(), ["train", "--resume", str(tmp_path)])
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith(f"error: {tmp_path / 'config.json'}: cannot be read: ")
    assert result.stderr.count("\n") == 1


def test_a_factory_s_weights_with_such_a_header_name_their_file(tmp_path, monkeypatch):
    (tmp_path / "made_here.py").write_text(
        f"from neocog import models\ndef net(): return models.parse({HEADER.architecture!r})\n",
        encoding="utf-8",
    )
    monkeypatch.chdir(tmp_path)
    path = written(tmp_path / "weights.safetensors", "[" * 100_000)
    with pytest.raises(InvalidModel, match="weights.safetensors: has metadata that cannot be read"):
        load_model("made_here:net", path)
