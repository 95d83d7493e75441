"""Files on disk: written so that nobody reads half of one, and read with that in mind."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import safetensors
from torch import Tensor

from .errors import InvalidModel


def write_atomically(path: Path, data: bytes) -> None:
    """Writes a file so that ``path`` holds its old content or all of the new, never a part.

    Raises:
        OSError: naming ``path``, for instance when the disk is full. The old file is untouched and
            nothing is left beside it.
    """
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    with _naming(path):
        try:
            with open(beside, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, path)
        except BaseException:  # Ctrl-C too
            with suppress(OSError):
                beside.unlink()
            raise
        _sync_folder(path.parent)


def remove_leftovers(folder: Path) -> None:
    """Removes what a killed process left of :func:`write_atomically` in ``folder``."""
    for leftover in folder.glob(".*.part"):
        leftover.unlink(missing_ok=True)


def read_safetensors(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of a safetensors file.

    Raises:
        InvalidModel: there is no such file, or it is damaged or truncated.
    """
    if not path.is_file():
        raise InvalidModel(f"{path}: {'is a folder' if path.is_dir() else 'no such file'}")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            # cloned, for the originals are windows into a file that may be replaced
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
            return file.metadata() or {}, tensors
    except safetensors.SafetensorError as error:
        reason = " ".join(str(error).split())
        raise InvalidModel(
            f"{path}: not a checkpoint, or a damaged or truncated one ({reason})"
        ) from error


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Lets an OSError name the file that was to be written, not the one beside it."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, os.strerror(error.errno or 0), str(path)) from error


def _sync_folder(folder: Path) -> None:
    """Makes a rename last through a power cut; where folders cannot be opened, it does anyway."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
