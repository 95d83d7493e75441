"""Checkpoints: what goes in comes out, and whatever is wrong with a file is said in one line."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

import pytest
import safetensors.torch
import tiny
import torch
from torch import Tensor, nn

from neocog import models
from neocog.checkpoint import (
    BEST,
    LAST,
    Checkpoint,
    Header,
    Preprocessing,
    build,
    load,
    load_model,
    save,
)
from neocog.errors import InvalidModel
from neocog.files import remove_leftovers, write_atomically

HEADER = Header(
    architecture="4C3-P2-3",
    in_shape=(1, 8, 8),
    preprocessing=Preprocessing((0.25,), (0.5,), "dark", digit_like=True),
    classes=("à", "b-2", "3"),
    epoch=7,
    accuracy=0.9375,
)


def network(header: Header = HEADER) -> nn.Module:
    torch.manual_seed(3)
    return models.parse(header.architecture, header.in_shape).eval()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A checkpoint as it should be."""
    path = tmp_path / "some.safetensors"
    save(path, Checkpoint(HEADER, network().state_dict()))
    return path


def rewritten(path: Path, tensors: dict[str, Tensor] | None = None, **changes: object) -> Path:
    """The checkpoint with other tensors or with other values in its header."""
    kept = load(path)
    values = {**json.loads(HEADER.to_json()), **changes}
    state = {k: v.contiguous() for k, v in (tensors or kept.tensors).items()}
    path.write_bytes(safetensors.torch.save(state, {"neocog": json.dumps(values)}))
    return path


def test_all_of_a_checkpoint_comes_back(path):
    optimizer = {"step/0": torch.tensor(3.0), "more": torch.arange(6.0).reshape(2, 3).t()}
    numbers = {"loss": 0.1 + 0.2, "accuracy": 1.0, "val_loss": 0.1, "val_accuracy": 0.7}
    resume = {"history": [{"epoch": 1, "cnn": numbers}], "seconds": 1.5}
    save(path, Checkpoint(HEADER, network().state_dict(), optimizer, resume))
    back = load(path)
    assert back.header == HEADER
    assert back.resume == resume
    for given, found in ((network().state_dict(), back.tensors), (optimizer, back.resume_tensors)):
        assert list(sorted(given)) == list(sorted(found))
        assert all(torch.equal(given[name], found[name]) for name in given)


def test_a_loaded_model_answers_as_the_saved_one(path):
    loaded = load_model(str(path))
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(loaded.model(x), network()(x))
    assert not loaded.model.training
    assert (loaded.in_shape, loaded.classes) == (HEADER.in_shape, HEADER.classes)
    assert (loaded.source, loaded.architecture) == (str(path), HEADER.architecture)
    assert loaded.preprocessing == HEADER.preprocessing
    assert loaded.model.state_dict().keys() == network().state_dict().keys()
    loaded.model(x).sum().backward()  # it can be trained on


def test_weights_outlive_their_file(path):
    loaded = load_model(str(path))
    before = {name: tensor.clone() for name, tensor in loaded.model.state_dict().items()}
    path.write_bytes(bytes(path.stat().st_size))
    after = loaded.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_preprocessing_by_hand():
    how = Preprocessing((0.0, 0.2, 0.5), (1.0, 0.5, 0.25))
    images = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 3, 1, 1).expand(2, 3, 4, 5)
    out = how.apply(images)
    assert out.dtype == torch.float32 and out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out[1, :, 2, 2], torch.tensor([0.0, 0.0, 2.0]))
    assert torch.equal(how.apply(images.float()), out)


def test_a_truncated_checkpoint_is_refused_wherever_it_ends(path):
    whole = path.read_bytes()
    for length in (0, 1, 7, 8, 9, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(InvalidModel, match="damaged or truncated") as caught:
            load_model(str(path))
        assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


def test_what_is_no_checkpoint_is_refused(path, tmp_path):
    path.write_bytes(b"\x89PNG\r\n" + bytes(500))
    with pytest.raises(InvalidModel, match="not a checkpoint, or a damaged or truncated one"):
        load_model(str(path))
    with pytest.raises(InvalidModel, match="no such file or folder; expected a run directory"):
        load_model(str(tmp_path / "missing.safetensors"))
    with pytest.raises(InvalidModel, match=f"not a run directory, it holds no {BEST}"):
        load_model(str(tmp_path))
    save(tmp_path / LAST, Checkpoint(HEADER, network().state_dict()))
    with pytest.raises(InvalidModel, match="no epoch of this run was finished.*--resume"):
        load_model(str(tmp_path))


def test_weights_without_metadata_are_refused(path):
    safetensors.torch.save_file(network().state_dict(), path)
    with pytest.raises(InvalidModel, match=r"not neocog's metadata.*expected package\.module:fact"):
        load_model(str(path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 2}, "is of format 2, this neocog reads format 1"),
        ({"architecture": "8C3-P2-3"}, "tensor '0.weight' is 4x1x3x3; architecture 8C3-P2-3 has 8"),
        ({"architecture": "4C3-3"}, "tensor '2.weight' is 3x64; architecture 4C3-3 has 3x256"),
        ({"architecture": "4C3-P2-5-3"}, "tensor '2.weight' is 3x64; architecture 4C3-P2-5-3 has"),
        ({"architecture": "4C3-4C3-P2-3"}, "has no tensor '1.weight'; architecture 4C3-4C3-P2-3"),
        ({"architecture": "4X3"}, "token 1, '4X3', means nothing"),
        ({"in_shape": [2, 8, 8]}, "tensor '0.weight' is 4x1x3x3; architecture 4C3-P2-3 has 4x2x3"),
        (
            {"in_shape": [1, 8]},
            "cannot be read (in_shape is [1, 8], expected 3 whole",
        ),
        ({"in_shape": "no"}, "metadata that cannot be read"),
        ({"classes": ["a", "b"]}, "names 2 classes, its architecture 4C3-P2-3 has 3"),
        (
            {"preprocessing": {"mean": [0]}},
            "that cannot be read (preprocessing.std is missing)",
        ),
        ({"surprise": 1}, "metadata that cannot be read ('surprise' means nothing)"),
    ],
)
def test_a_header_that_does_not_fit_is_refused(path, changes, message):
    with pytest.raises(InvalidModel, match=re.escape(message)) as caught:
        load_model(str(rewritten(path, **changes)))
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


def test_tensors_that_do_not_fit_are_named(path):
    state = dict(network().state_dict())
    with pytest.raises(InvalidModel, match=re.escape("has a tensor 'extra' of 2x2 that arch")):
        load_model(str(rewritten(path, {**state, "extra": torch.zeros(2, 2)})))
    with pytest.raises(InvalidModel, match=r"'0\.bias' is torch\.int64; .* has torch\.float32"):
        load_model(str(rewritten(path, {**state, "0.bias": torch.zeros(4, dtype=torch.int64)})))


def test_half_precision_weights_become_float32(path):
    halves = {name: tensor.half() for name, tensor in network().state_dict().items()}
    model = load_model(str(rewritten(path, halves))).model
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert torch.equal(model.state_dict()["0.weight"], halves["0.weight"].float())


def test_a_header_that_is_no_json_is_refused(path):
    state = {k: v.contiguous() for k, v in network().state_dict().items()}
    path.write_bytes(safetensors.torch.save(state, {"neocog": "{"}))
    with pytest.raises(InvalidModel, match="metadata that cannot be read"):
        load(path)


# --- models that others wrote


FACTORIES = """
import torch
from torch import nn
import neocog.nn as cog

def plain():
    return nn.Sequential(cog.ConvBlock(1, 4, 3, padding="same", pool=cog.MaxPool2d(2)),
                         nn.Flatten(), nn.Linear(64, 3))

def speaking():
    model = plain()
    model.in_shape, model.classes, model.mean, model.std = [1, 8, 8], "abc", [0.5], [2]
    return model

def wrong_shape():
    model = plain()
    model.in_shape = (8, 8)
    return model

def number(): return 7
def broken(): raise KeyError("no\\nwidth")
constant = 7
"""


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A working directory with the package "ours" in it."""
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "__init__.py").write_text("")
    (tmp_path / "ours" / "nets.py").write_text(FACTORIES)
    (tmp_path / "ours" / "unfinished.py").write_text("def f(:\n")
    (tmp_path / "ours" / "needy.py").write_text("import not_installed_anywhere\n")
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for name in [name for name in sys.modules if name.split(".")[0] == "ours"]:
        del sys.modules[name]


def test_a_factory_of_the_working_directory(workplace):
    path = list(sys.path)
    loaded = load_model("ours.nets:plain")
    assert sys.path == path
    assert loaded.model(torch.zeros(1, 1, 8, 8)).shape == (1, 3)
    assert (loaded.in_shape, loaded.classes, loaded.architecture) == (None, (), None)
    assert loaded.preprocessing == Preprocessing((0.0,), (1.0,))
    assert loaded.source == "ours.nets:plain" and not loaded.model.training


def test_a_factory_may_say_what_it_takes(workplace):
    loaded = load_model("ours.nets:speaking")
    assert (loaded.in_shape, loaded.classes) == ((1, 8, 8), ("a", "b", "c"))
    assert loaded.preprocessing == Preprocessing((0.5,), (2.0,))


@pytest.mark.parametrize("kind", ["ours.safetensors", "state.pt", "wrapped.pth", "plain.bin"])
def test_weights_for_a_factory(workplace, kind):
    wanted = network().state_dict()
    file = workplace / kind
    if kind == "ours.safetensors":
        save(file, Checkpoint(HEADER, wanted, {"optimizer": torch.ones(1)}, {"seconds": 1}))
    elif kind == "wrapped.pth":
        torch.save({"state_dict": wanted, "epoch": 3}, file)
    else:
        torch.save(wanted, file)
    loaded = load_model("ours.nets:plain", file)
    assert all(torch.equal(v, wanted[k]) for k, v in loaded.model.state_dict().items())
    knows = kind == "ours.safetensors"
    assert loaded.in_shape == (HEADER.in_shape if knows else None)
    assert loaded.classes == (HEADER.classes if knows else ())


def test_weights_never_run_code(workplace):
    class Evil:
        def __reduce__(self):
            return os.mkdir, ("evil",)

    torch.save({"0.weight": Evil()}, "evil.pt")
    with pytest.raises(InvalidModel, match=r"evil\.pt: neither safetensors nor a state dict"):
        load_model("ours.nets:plain", Path("evil.pt"))
    assert not Path("evil").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "neither safetensors nor a state dict"),
        (b"PK\x03\x04 and no more", "neither safetensors nor a state dict"),
        ([torch.zeros(1)], "holds list, expected a dict of tensors"),
        ({"0.weight": 3}, "holds dict, expected a dict of tensors"),
        ({"0.weight": torch.zeros(1)}, "tensor '0.weight' is 1; ours.nets:plain has 4x1x3x3"),
        ({}, "has no tensor '0.weight'; ours.nets:plain has one of 4x1x3x3"),
    ],
)
def test_weights_that_do_not_fit_are_refused(workplace, content, message):
    file = Path("weights.pt")
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        torch.save(content, file)
    with pytest.raises(InvalidModel, match=re.escape(message)) as caught:
        load_model("ours.nets:plain", file)
    assert str(caught.value).startswith("weights.pt: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nowhere.at_all:f", "cannot be imported: ModuleNotFoundError: No module named 'nowhere'"),
        ("ours.nowhere:f", "cannot be imported: ModuleNotFoundError: No module named 'ours.now"),
        ("ours.needy:f", "ModuleNotFoundError: No module named 'not_installed_anywhere'"),
        ("ours.unfinished:f", "cannot be imported: SyntaxError"),
        ("ours.nets:missing", "'missing' is nothing in module 'ours.nets'"),
        ("ours.nets:constant", "'constant' is no function but int in module 'ours.nets'"),
        ("ours.nets:number", "number() made int, expected a torch.nn.Module"),
        ("ours.nets:broken", "broken() failed: KeyError: 'no\\nwidth'"),
        ("ours.nets:wrong_shape", "in_shape is (8, 8), expected (channels, height, width)"),
        ("ours.nets", "no such file or folder; expected a run directory, a checkpoint"),
        ("ours.nets:", "no such file or folder"),
        (":f", "no such file or folder"),
    ],
)
def test_a_factory_that_makes_no_model_is_refused(workplace, spec, message):
    with pytest.raises(InvalidModel, match=re.escape(message)) as caught:
        load_model(spec)
    assert "\n" not in str(caught.value)


def test_weights_beside_a_checkpoint_or_missing_are_refused(workplace, path):
    with pytest.raises(InvalidModel, match="has its own weights"):
        load_model(str(path), path)
    with pytest.raises(InvalidModel, match=r"nowhere\.pt: no such file"):
        load_model("ours.nets:plain", Path("nowhere.pt"))
    with pytest.raises(InvalidModel, match=r"ours: is a folder"):
        load_model("ours.nets:plain", Path("ours"))


# --- writing


def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(path, monkeypatch):
    old = path.read_bytes()
    for error in (OSError(28, "No space left on device"), KeyboardInterrupt()):

        def fail(*args: object, error: BaseException = error) -> None:
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fail)
            with pytest.raises(type(error)):
                save(path, Checkpoint(HEADER, network().state_dict(), {"x": torch.ones(9)}))
        assert path.read_bytes() == old
        assert list(path.parent.iterdir()) == [path]


def test_what_a_killed_process_left_is_removed(path):
    (path.parent / ".some.safetensors.12ab34cd.part").write_bytes(b"half")
    remove_leftovers(path.parent)
    assert list(path.parent.iterdir()) == [path]


def test_new_files_have_the_usual_permissions(path, tmp_path):
    (tmp_path / "usual").write_text("")
    assert path.stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path):
    with tiny.full_disk(tmp_path / "disk", "256k") as disk:
        path = disk / "some.safetensors"
        save(path, Checkpoint(HEADER, network().state_dict()))
        old = path.read_bytes()
        big = Checkpoint(HEADER, network().state_dict(), {"moments": torch.zeros(100_000)})
        with pytest.raises(OSError, match="No space left on device") as caught:
            save(path, big)
        assert caught.value.filename == str(path)
        assert path.read_bytes() == old and list(disk.iterdir()) == [path]
        write_atomically(disk / "small.json", b"{}")  # what was begun is freed again
    assert torch.equal(
        build(Checkpoint(HEADER, network().state_dict()), "x")(torch.ones(1, 1, 8, 8)),
        network()(torch.ones(1, 1, 8, 8)),
    )


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        write_atomically(tmp_path / "nowhere" / "file", b"")
    assert caught.value.filename == str(tmp_path / "nowhere" / "file")
