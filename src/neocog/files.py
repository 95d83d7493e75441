"""Files on disk: written so that nobody reads half of one, and read with that in mind."""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import safetensors

from .errors import InvalidModel

if TYPE_CHECKING:  # torch takes a second or two to import, and names of files do without
    from torch import Tensor

KINDS = {
    stat.S_IFDIR: "is a folder",
    stat.S_IFIFO: "is a pipe",
    stat.S_IFSOCK: "is a socket",
    stat.S_IFCHR: "is a character device",
    stat.S_IFBLK: "is a block device",
}
"""What a path may be instead of a file, by the kinds of stat."""


def not_a_file(path: Path | str) -> str | None:
    """What keeps ``path`` from being read as a file ("is a pipe", "no such file"), None if nothing.

    To be asked before it is opened: a pipe that nobody writes to is waited for without end, and
    a device may never come to one. Links are followed.

    Raises:
        OSError: it cannot be told, for instance in a folder that may not be entered.
    """
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return "is a link to a file that is not there" if os.path.islink(path) else "no such file"
    except NotADirectoryError:
        return "no such file"
    return None if stat.S_ISREG(mode) else KINDS.get(stat.S_IFMT(mode), "is no regular file")


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
    reason = not_a_file(path)
    if reason is not None:
        raise InvalidModel(f"{path}: {reason}")
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
