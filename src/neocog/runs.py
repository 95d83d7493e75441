"""The directory of a run: everything a training leaves, and all that is needed to go on with one.

    config.json        what was asked for, and the data's fingerprint
    pictures.json      the data's files with a digest each, to tell later what has changed
    last.safetensors   the state after the last finished epoch, to resume from
    best.safetensors   the network at its lowest validation loss; mlp.safetensors likewise
    metrics.json       the results: accuracies, shift table, history
    training.png  shifts.png  right-*.png  wrong-*.png, and a page (.html) about each of the two

Each file is written whole or not at all. In what order does not matter: whatever a killed run
left unfinished, the resumed one does again, with the same result.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import platform
import re
import shutil
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from . import data, images, models, plots, shifts
from .changes import compared, listing
from .checkpoint import BEST, LAST, Checkpoint, Header, Preprocessing, build, load, save
from .data import DataSet
from .distribution import Group
from .errors import InvalidData, InvalidModel
from .evaluation import evaluate, logits
from .files import remove_leftovers, write_atomically
from .foreign import as_json, path_of, text_of
from .headers import read_object
from .locks import locked
from .settings import InvalidSetting, Settings, choose_device, engine_on
from .training import Trainer, time_shares

CONFIG, METRICS, PICTURES = "config.json", "metrics.json", "pictures.json"
FORMAT = 1
FILES = {"cnn": BEST, "mlp": "mlp.safetensors"}
"""Where the best state of each network is kept."""


class Changed(InvalidData):
    """The pictures are not those that a run was trained on; ``found`` are those there are now."""

    def __init__(self, message: str, found: DataSet) -> None:
        super().__init__(message)
        self.found = found


@dataclass(frozen=True)
class Source:
    """Where a run's pictures come from: the arguments of :func:`neocog.data.load`."""

    path: str | None = None
    size: int | None = None

    def load(self, seed: int, strict: bool = False) -> DataSet:
        """The data set; InvalidData if it cannot be read, or not whole though ``strict``."""
        return data.load(self.path, size=self.size, seed=seed, strict=strict)


@dataclass(frozen=True)
class Run:
    """A run directory and what its config.json says.

    ``threads`` are those of each of ``workers`` processes that it began with.
    """

    folder: Path
    source: Source
    settings: Settings
    device: str
    threads: int
    fingerprint: str
    workers: int = 1

    @staticmethod
    def create(trainer: Trainer, source: Source, *, out: Path | None, threads: int) -> Run:
        """Makes the directory, with the untrained state in it so that it can be resumed at once.

        Args:
            trainer: ready to train.
            source: of its data.
            out: the directory, new or empty; None takes the first free ``runs/<data>-<n>``.
            threads: that torch uses.

        Raises:
            InvalidSetting: ``out`` holds something already.
            OSError: it cannot be written; then nothing is left of it.
        """
        folder, is_new = _new_folder(trainer.data.name, out)
        run = Run(
            folder,
            source,
            trainer.settings,
            str(trainer.device),
            threads,
            fingerprint(trainer.data),
            trainer.group.size,
        )
        try:
            write_json(folder / CONFIG, run._config(trainer))
            write_json(folder / PICTURES, listing(source.path))
            run.save(trainer)
        except BaseException:
            if is_new:
                shutil.rmtree(folder, ignore_errors=True)
            else:
                for name in (CONFIG, PICTURES, LAST):
                    (folder / name).unlink(missing_ok=True)
            raise
        return run

    @staticmethod
    def open(folder: Path) -> Run:
        """The run in a directory; InvalidModel if there is none."""
        path = folder / CONFIG
        if not folder.is_dir():
            raise InvalidModel(f"{folder}: no such run directory")
        if not path.is_file():
            raise InvalidModel(f"{folder}: not a run directory, it holds no {CONFIG}")
        try:
            config = read_object(path.read_text(encoding="utf-8"))
            if config["format"] != FORMAT:
                raise ValueError(f"format {config['format']!r}, this neocog reads {FORMAT}")
            return Run(
                folder,
                Source(
                    None
                    if config["data"]["path"] is None
                    else path_of(str(config["data"]["path"])),
                    config["data"]["size"],
                ),
                # A run from before there were engines goes on as it began.
                Settings(**{"engine": "eager", **config["settings"]}),
                str(config["device"]),
                int(config["threads"]),
                str(config["data"]["fingerprint"]),
                int(config.get("workers", 1)),
            )
        except (ValueError, TypeError, KeyError, OverflowError) as error:
            raise InvalidModel(f"{path}: cannot be read: {error}") from error

    @staticmethod
    def of(model: str) -> Run | None:
        """The run that a MODEL argument names, by its directory or by one of its checkpoints."""
        path = Path(model)
        folder = path.parent if path.name in (*FILES.values(), LAST) and path.is_file() else path
        return Run.open(folder) if (folder / CONFIG).is_file() else None

    def locked(self, note: Callable[[str], object]) -> AbstractContextManager[None]:
        """Keeps other processes from training this run, see :func:`neocog.locks.locked`."""
        return locked(self.folder / CONFIG, note)

    def load_data(self, strict: bool = False) -> DataSet:
        """The pictures of the run.

        Raises:
            Changed: they are not the ones it began with; says what has changed.
            InvalidData: they cannot be read, or not all of them though ``strict``.
        """
        try:
            found = self.source.load(self.settings.seed, strict)
        except InvalidData as error:
            what = self.changes()
            if not what:
                raise
            since = f"since {text_of(self.folder)} was begun"
            raise InvalidData(f"{error} ({since}: {what})") from error
        if fingerprint(found) != self.fingerprint:
            what = self.changes() or self._changes_to(found)
            where, run = text_of(self.source.path or found.name), text_of(self.folder)
            raise Changed(f"{where}: not the pictures that {run} was trained on: {what}", found)
        return found

    def changes(self) -> str:
        """What became of its data's files since it began, for example "class cat added (3
        pictures); 1 file removed (dog/1.png)"; empty if nothing did, or if that is not known."""
        try:
            before = read_object((self.folder / PICTURES).read_text(encoding="utf-8"))
            return "; ".join(compared(before, listing(self.source.path)))
        except (OSError, ValueError, TypeError, AttributeError):
            return ""  # a run from before there was such a file, or what is in it is none

    def _changes_to(self, found: DataSet) -> str:
        """What config.json and the pictures themselves tell, where the files do not."""
        config = read_object((self.folder / CONFIG).read_text(encoding="utf-8"))["data"]
        then, now = config["classes"], list(found.classes)
        if then != now:
            return f"classes {', '.join(then)} then, {', '.join(now)} now"
        if tuple(config["in_shape"]) != found.in_shape:
            shapes = ["x".join(map(str, shape)) for shape in (config["in_shape"], found.in_shape)]
            return f"{shapes[0]} then, {shapes[1]} now"
        if (self.folder / PICTURES).is_file():
            return "the same files, but read otherwise: by other versions of neocog or Pillow"
        return "other pictures in the same classes"

    def resume(self, found: DataSet, group: Group | None = None) -> Trainer:
        """The trainer as it was after the last finished epoch; InvalidModel if it is damaged.

        The first worker reads the file, the others of ``group`` are given what is in it.
        """
        group = group or Group()
        device = choose_device(self.device)
        trainer = Trainer(found, self.settings, preprocessing_of(found), device, group)
        path = self.folder / LAST
        checkpoint: Checkpoint | None = None
        if group.first:
            remove_leftovers(self.folder)
            checkpoint = load(path)
        begun: Checkpoint = group.from_first(checkpoint)
        kept = begun.resume
        try:
            trainer.restore(
                begun.resume_tensors, kept["history"], kept["seconds"], kept.get("spent")
            )
        except (KeyError, InvalidModel) as error:
            raise InvalidModel(f"{path}: cannot be resumed from: {error}") from error
        return trainer

    def save(self, trainer: Trainer) -> None:
        """Writes the state after an epoch; first the best networks, if they are of this epoch."""
        epoch = len(trainer.history)
        for name, learner in trainer.learners.items():
            if epoch and trainer.best_epoch(name) == epoch:
                best = Checkpoint(_header(trainer, name), learner.best.state_dict())
                save(self.folder / FILES[name], best)
        last = Checkpoint(
            _header(trainer, "cnn"),
            trainer.learners["cnn"].best.state_dict(),
            trainer.tensors(),
            {"history": trainer.history, "seconds": trainer.seconds, "spent": trainer.spent},
        )
        save(self.folder / LAST, last)

    def kept(self) -> int:
        """How many epochs a resumed run need not do again; InvalidModel if that cannot be read."""
        return load(self.folder / LAST).header.epoch

    def finish(self, trainer: Trainer) -> dict[str, Any]:
        """Judges the best networks by the test part; writes and returns the metrics."""
        found, how = trainer.data, trainer.preprocessing
        best = {name: load(self.folder / FILES[name]) for name in trainer.learners}
        networks = {
            name: build(checkpoint, self.folder / FILES[name]).to(trainer.device)
            for name, checkpoint in best.items()
        }
        table = shifts.table(networks, found.test, how)
        metrics: dict[str, Any] = {
            "test_accuracy": table["0"]["cnn"],
            "mlp_test_accuracy": table["0"].get("mlp"),
            "shifted": table,
            "weights": {name: models.weight_count(network) for name, network in networks.items()},
            "architecture": {name: best[name].header.architecture for name in best},
            "best_epoch": {name: best[name].header.epoch for name in best},
            "val_accuracy": {name: best[name].header.accuracy for name in best},
            "test": evaluate(networks["cnn"], found.test, how, found.classes).to_dict(),
            "pictures": {
                "train": len(found.train),
                "val": len(trainer.val),
                "test": len(found.test),
                "unreadable": len(found.unreadable),
            },
            "seed": self.settings.seed,
            "threads": self.threads,
            "device": self.device,
            "engine": engine_on(trainer.device, self.settings),
            "workers": trainer.group.size,
            "seconds": round(trainer.seconds, 2),
            "time_shares": time_shares(trainer.spent),
            "versions": versions(),
            "history": trainer.history,
        }
        answers = logits(networks["cnn"], found.test.images, how).argmax(dim=1)
        metrics["examples"], metrics["example_classes"] = self._write_examples(found, answers, how)
        write_atomically(self.folder / "training.png", plots.training_curve(trainer.history))
        write_atomically(self.folder / "shifts.png", plots.shift_curve(table))
        write_json(self.folder / METRICS, metrics)
        return metrics

    def _write_examples(
        self, found: DataSet, answers: Tensor, how: Preprocessing
    ) -> tuple[dict[str, str | None], dict[str, int]]:
        """A test picture read rightly and one read wrongly as PNG files: names or None, classes.

        Chosen are the first that come back from the file as they are: a picture that reading
        would frame or invert anew might be read otherwise than it was here.
        """
        names: dict[str, str | None] = {}
        labels: dict[str, int] = {}
        right = answers == found.test.labels
        for kind, candidates in (("right", right.nonzero()), ("wrong", (~right).nonzero())):
            names[kind] = None
            for index in candidates.flatten().tolist()[:50]:
                png = _as_png(found.test.images[index])
                if _comes_back(png, found.test.images[index], how):
                    labels[kind] = int(found.test.labels[index])
                    truth = _safe(found.classes[labels[kind]])
                    answer = (
                        "" if kind == "right" else f"-as-{_safe(found.classes[answers[index]])}"
                    )
                    name = f"{kind}-{truth}{answer}.png"
                    write_atomically(self.folder / path_of(name), png)
                    names[kind] = name
                    break
        return names, labels

    def _config(self, trainer: Trainer) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "data": {
                "path": None if self.source.path is None else text_of(self.source.path),
                "size": self.source.size,
                "name": trainer.data.name,
                "in_shape": trainer.data.in_shape,
                "classes": trainer.data.classes,
                "fingerprint": self.fingerprint,
            },
            "settings": asdict(self.settings),
            "architecture": {
                name: learner.architecture for name, learner in trainer.learners.items()
            },
            "augmentation": None if trainer.augmentation is None else asdict(trainer.augmentation),
            "device": self.device,
            "threads": self.threads,
            "workers": self.workers,
            "versions": versions(),
        }


def preprocessing_of(found: DataSet) -> Preprocessing:
    """What networks trained on a data set expect of a picture."""
    return Preprocessing(found.mean, found.std, found.background, found.digit_like)


def fingerprint(found: DataSet) -> str:
    """SHA-256 over all pictures, labels and class names, in their parts."""
    digest = hashlib.sha256(repr(found.classes).encode())
    for part in (found.train, found.val, found.test):
        if part is not None:
            digest.update(repr(tuple(part.images.shape)).encode())
            for tensor in (part.images, part.labels):
                digest.update(tensor.contiguous().view(torch.uint8).reshape(-1).numpy().data)
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Of what the numbers may depend on."""
    return {
        "neocog": metadata.version("neocog"),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def write_json(path: Path, value: Any) -> None:
    """Writes JSON, indented, in one piece; OSError if it cannot."""
    write_atomically(path, (as_json(value) + "\n").encode())


def _new_folder(name: str, out: Path | None) -> tuple[Path, bool]:
    """(an empty directory for a run, whether it was made just now)."""
    if out is None:
        for number in itertools.count(1):
            folder = Path("runs", path_of(f"{_safe(name) or 'data'}-{number}"))
            try:
                folder.mkdir(parents=True)
                return folder, True
            except FileExistsError:
                continue
    assert out is not None
    if out.exists() and not out.is_dir():
        raise InvalidSetting(f"--out {out}: is a file, expected a new or empty directory")
    if out.is_dir() and any(out.iterdir()):
        raise InvalidSetting(
            f"--out {out}: holds something already; expected a new or empty directory, or "
            "--resume to go on with a run"
        )
    is_new = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    return out, is_new


def _header(trainer: Trainer, name: str) -> Header:
    epoch = len(trainer.history)
    return Header(
        architecture=trainer.learners[name].architecture,
        in_shape=trainer.data.in_shape,
        preprocessing=trainer.preprocessing,
        classes=tuple(trainer.data.classes),
        epoch=epoch,
        accuracy=trainer.history[-1][name]["val_accuracy"] if epoch else 0.0,
    )


def _as_png(picture: Tensor) -> bytes:
    """uint8 [1 or 3, H, W] as a PNG file."""
    pixels = picture.permute(1, 2, 0).numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).save(buffer, "PNG")
    return buffer.getvalue()


def _comes_back(png: bytes, picture: Tensor, how: Preprocessing) -> bool:
    """Whether reading the file gives the very picture."""
    channels, height, width = picture.shape
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "picture.png")
        path.write_bytes(png)
        read = images.read_picture(
            path,
            channels,
            (height, width),
            background=how.background,
            digit_like=how.digit_like,
        )
    return torch.equal(read.tensor, picture)


def _safe(name: str) -> str:
    """A name as part of a file's name."""
    return re.sub(r"[^\w.]+", "_", name).strip("._")
