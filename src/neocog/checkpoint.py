"""Checkpoints: safetensors files that know which network they belong to.

The header of each file carries, under the key ``neocog``, a JSON object (:class:`Header`): format
version, architecture, input shape, preprocessing, class names, epoch and validation accuracy. What
is needed to go on training lies in the same file, its tensors under names that begin with
``resume/`` and the rest as JSON under the key ``resume``: weights and optimizer are one file and
cannot disagree. Nothing is ever pickled.

Files are written beside their place and renamed into it (:mod:`neocog.files`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from . import models
from .errors import InvalidModel, NeocogError
from .factories import check_tensors, from_factory, is_factory, read_weights
from .files import read_safetensors, write_atomically
from .foreign import readable
from .headers import Fields, check_history, read_object

FORMAT = 1
BEST, LAST = "best.safetensors", "last.safetensors"
RESUME = "resume/"
BACKGROUNDS = ("dark", "light", "mixed")
_LARGE = 1e30


@dataclass(frozen=True)
class Preprocessing:
    """What happens to a picture's bytes on their way into a network.

    Attributes:
        mean, std: one number a channel, of pixel values scaled to 0..1.
        background: ``"dark"`` or ``"light"`` if the pictures it was trained on are so, else
            ``"mixed"``.
        digit_like: trained on digits framed as MNIST's.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    background: str = "mixed"
    digit_like: bool = False

    def apply(self, images: Tensor) -> Tensor:
        """``(images/255 - mean) / std``.

        Args:
            images: [N, C, H, W] with values 0..255, uint8 or float.

        Returns:
            float32 [N, C, H, W] in channels_last order, on the device of ``images``.
        """
        mean = torch.tensor(self.mean, device=images.device).view(-1, 1, 1)
        std = torch.tensor(self.std, device=images.device).view(-1, 1, 1)
        scaled = images.to(torch.float32).sub(255 * mean).div_(255 * std)
        return scaled.contiguous(memory_format=torch.channels_last)


@dataclass(frozen=True)
class Header:
    """What a checkpoint says about its weights.

    ``accuracy`` is the share of the validation pictures read rightly, 0..1, after ``epoch``
    epochs.
    """

    architecture: str
    in_shape: tuple[int, int, int]
    preprocessing: Preprocessing
    classes: tuple[str, ...]
    epoch: int = 0
    accuracy: float = 0.0

    def to_json(self) -> str:
        """The metadata of the file."""
        return json.dumps({"format": FORMAT, **asdict(self)})

    @staticmethod
    def from_json(text: str) -> Header:
        """The header that :meth:`to_json` wrote; InvalidModel if it is none."""
        with _metadata():
            values = Fields(read_object(text))
            version = values.whole("format")
            if version == FORMAT:
                return _header(values)
        raise InvalidModel(f"is of format {version}, this neocog reads format {FORMAT}")


def _header(values: Fields) -> Header:
    channels, height, width = values.sizes("in_shape", 3)
    how = values.object("preprocessing")
    mean, std = how.numbers("mean", -_LARGE, _LARGE), how.numbers("std", 1 / _LARGE, _LARGE)
    for name, numbers in (("mean", mean), ("std", std)):
        if len(numbers) not in (1, channels):
            raise InvalidModel(
                f"preprocessing.{name} has {len(numbers)} numbers for {channels} channels"
            )
    background = how.text("background") if "background" in how else "mixed"
    if background not in BACKGROUNDS:
        known = ", ".join(BACKGROUNDS)
        raise InvalidModel(f"preprocessing.background is {background!r:.40}, expected {known}")
    digit_like = how.flag("digit_like") if "digit_like" in how else False
    how.end()
    header = Header(
        architecture=values.text("architecture"),
        in_shape=(channels, height, width),
        preprocessing=Preprocessing(mean, std, background, digit_like),
        classes=values.texts("classes"),
        epoch=values.whole("epoch") if "epoch" in values else 0,
        accuracy=values.number("accuracy", 0, 1) if "accuracy" in values else 0.0,
    )
    values.end()
    return header


@contextmanager
def _metadata() -> Iterator[None]:
    """Lets an InvalidModel say where the value that is wrong stands."""
    try:
        yield
    except InvalidModel as error:
        raise InvalidModel(f"has metadata that cannot be read ({error})") from error


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in memory.

    ``tensors`` are the model's; ``resume_tensors`` (without their prefix) and ``resume`` are what
    training left to go on from, empty in every file but the last.
    """

    header: Header
    tensors: Mapping[str, Tensor]
    resume_tensors: Mapping[str, Tensor] = field(default_factory=dict)
    resume: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run, in evaluation mode.

    Attributes:
        model: from float32 [N, C, H, W], preprocessed, to logits [N, classes].
        in_shape: (C, H, W) of a picture; None if a third-party model does not say.
        preprocessing: how a picture's bytes become the input.
        classes: names by index; empty if a third-party model does not say.
        source: where it came from, for messages: a file's path, or the factory.
        architecture: the shorthand; None for a third-party model.
    """

    model: nn.Module
    in_shape: tuple[int, int, int] | None
    preprocessing: Preprocessing
    classes: tuple[str, ...]
    source: str
    architecture: str | None = None


def save(path: Path, checkpoint: Checkpoint) -> None:
    """Writes a checkpoint atomically; OSError as :func:`neocog.files.write_atomically`."""
    tensors = dict(checkpoint.tensors)
    tensors |= {RESUME + name: tensor for name, tensor in checkpoint.resume_tensors.items()}
    metadata = {"neocog": checkpoint.header.to_json()}
    if checkpoint.resume:
        metadata["resume"] = json.dumps(checkpoint.resume)
    # safetensors refuses tensors that share memory or are strided; a copy is neither
    plain = {
        name: tensor.detach().to("cpu").clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    write_atomically(path, safetensors.torch.save(plain, metadata=metadata))


def load(path: Path) -> Checkpoint:
    """Reads a checkpoint written by :func:`save`.

    Raises:
        InvalidModel: no such file, damaged or truncated, or without neocog's metadata.
    """
    metadata, tensors = read_safetensors(path)
    if "neocog" not in metadata:
        raise InvalidModel(
            f"{path}: has weights but not neocog's metadata, so its architecture is not known; "
            f"expected package.module:factory with --weights {path}"
        )
    try:
        header = Header.from_json(metadata["neocog"])
        resume = _resume(metadata.get("resume"))
    except ValueError as error:
        raise InvalidModel(f"{path}: {error}") from error
    return Checkpoint(
        header,
        {name: value for name, value in tensors.items() if not name.startswith(RESUME)},
        {
            name.removeprefix(RESUME): value
            for name, value in tensors.items()
            if name.startswith(RESUME)
        },
        resume,
    )


def _resume(text: str | None) -> dict[str, Any]:
    if text is None:
        return {}
    with _metadata():
        values = read_object(text)
        check_history(Fields(values))
    return values


def load_model(spec: str, weights: Path | None = None) -> LoadedModel:
    """The model that a MODEL argument names.

    Args:
        spec: a run directory (its best checkpoint), a checkpoint, or ``package.module:factory``.
        weights: for a factory, the file its weights come from: safetensors, or a state dict saved
            by ``torch.save`` (read with ``weights_only=True``, so it cannot run code).

    Raises:
        InvalidModel: whatever keeps it from being loaded, in one line.
    """
    path = Path(spec)
    if path.exists():
        if weights is not None:
            raise InvalidModel(
                f"--weights {weights} goes with package.module:factory; {spec} has its own weights"
            )
        return _from_checkpoint(_best_of_run(path) if path.is_dir() else path)
    if is_factory(spec):
        return _from_factory(spec, weights)
    raise InvalidModel(
        f"model '{readable(spec)}': no such file or folder; expected a run directory, a checkpoint "
        "(.safetensors) or package.module:factory"
    )


def build(checkpoint: Checkpoint, source: Path | str) -> nn.Module:
    """The network of a checkpoint with its weights, in evaluation mode.

    Raises:
        InvalidModel, InvalidProblem: the weights do not fit the architecture, or that is none.
    """
    header = checkpoint.header
    try:
        # "meta" allocates nothing: a header that lies about sizes is found out before that
        with torch.device("meta"):
            model = models.parse(header.architecture, header.in_shape)
    except NeocogError as error:
        raise InvalidModel(f"{source}: {error}") from error
    check_tensors(model, checkpoint.tensors, source, f"architecture {header.architecture}")
    classes = models.class_count(header.architecture)
    if len(header.classes) != classes:
        raise InvalidModel(
            f"{source}: names {len(header.classes)} classes, its architecture "
            f"{header.architecture} has {classes}"
        )
    wanted = model.state_dict()
    tensors = {name: tensor.to(wanted[name].dtype) for name, tensor in checkpoint.tensors.items()}
    model.load_state_dict(tensors, assign=True)
    return model.eval()


def _from_checkpoint(path: Path) -> LoadedModel:
    checkpoint = load(path)
    header = checkpoint.header
    return LoadedModel(
        build(checkpoint, path),
        header.in_shape,
        header.preprocessing,
        header.classes,
        str(path),
        header.architecture,
    )


def _best_of_run(folder: Path) -> Path:
    best = folder / BEST
    if best.exists():
        return best
    if (folder / LAST).exists():
        raise InvalidModel(
            f"{folder}: no epoch of this run was finished; expected neocog train --resume {folder}"
        )
    raise InvalidModel(f"{folder}: not a run directory, it holds no {BEST}")


def _from_factory(spec: str, weights: Path | None) -> LoadedModel:
    """A third-party model; shape, preprocessing and classes from the weights' header if it has one.

    Otherwise the module may say them itself, in attributes ``in_shape``, ``classes``, ``mean`` and
    ``std``; without ``mean`` and ``std`` it gets pixel values scaled to 0..1.
    """
    model = from_factory(spec)
    header = None
    if weights is not None:
        metadata, tensors = read_weights(weights)
        if "neocog" in metadata:
            try:
                header = Header.from_json(metadata["neocog"])
            except InvalidModel as error:
                raise InvalidModel(f"{weights}: {error}") from error
        tensors = {k: value for k, value in tensors.items() if not k.startswith(RESUME)}
        check_tensors(model, tensors, weights, spec)
        model.load_state_dict(tensors)
    model.eval()
    if header is not None:
        return LoadedModel(model, header.in_shape, header.preprocessing, header.classes, spec)
    try:
        shape = getattr(model, "in_shape", None)
        in_shape = None if shape is None else tuple(int(size) for size in shape)
        if in_shape is not None and (len(in_shape) != 3 or min(in_shape) < 1):
            raise ValueError(f"in_shape is {shape}, expected (channels, height, width)")
        preprocessing = Preprocessing(
            tuple(map(float, getattr(model, "mean", (0.0,)))),
            tuple(map(float, getattr(model, "std", (1.0,)))),
        )
        classes = tuple(map(str, getattr(model, "classes", ())))
    except (TypeError, ValueError) as error:
        raise InvalidModel(f"{spec}: an attribute of the module is wrong: {error}") from error
    return LoadedModel(model, in_shape, preprocessing, classes, spec)
