"""Machine code on disk: what one process compiled, the next one loads.

An entry is one file, ``<key>.code``: a line with a checksum, a line of JSON that says what the code
is, and the object code. The key is a SHA-256 over everything that determines the code (see
:func:`key`); a different compiler, processor or emitter therefore asks for other files, and stale
ones are never met.

Loading code means running it, so nothing is read that somebody else may have written: the
directory and the file must belong to this user, be writable by no one else and be no symlinks.
Damaged files count as absent and are replaced. Writers write beside and rename. Whatever the file
system refuses is logged once (``logging.getLogger("neocog")``); neocog then compiles as if there
were no cache.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
import os
import secrets
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import llvmlite
import llvmlite.binding as llvm

LIMIT = 256 << 20
"""Bytes the cache may hold in all; the files used longest ago go first."""

_MAGIC = b"neocog-code-1"
_CODE, _PART = ".code", ".part"
_PACKAGE = Path(__file__).parents[1]
_SOURCES = (
    "cpu/*.py", "target.py", "geometry.py", "steps.py", "activations.py", "reductions.py",
    "dtypes.py", "errors.py", "problem.py",
)  # fmt: skip
"""The emitters and all they import, within the package."""

_log = logging.getLogger("neocog")


@dataclasses.dataclass(frozen=True)
class Entry:
    """Object code and what is needed to call it."""

    name: str
    """The symbol of the kernel's entry."""
    fields: tuple[str, ...]
    """The fields its steps pass."""
    code: bytes
    """A relocatable object file."""


# ------------------------------------------------------------------------------------- directory

_chosen: list[Path | None] = []  # what `use` was given, if it was


def use(directory: str | os.PathLike[str] | None) -> None:
    """Keep code in ``directory`` from now on in this process; None: keep nothing on disk."""
    _chosen[:] = [None if directory is None else Path(directory).absolute()]
    _warn.cache_clear()


def directory() -> Path | None:
    """Where code is kept; None: nowhere.

    What :func:`use` said, else ``$NEOCOG_CACHE_DIR`` (``off``: nowhere), else
    ``$XDG_CACHE_HOME/neocog``, else ``~/.cache/neocog``.
    """
    if not hasattr(os, "geteuid"):  # owners and modes say nothing here
        return None
    if _chosen:
        return _chosen[0]
    named = os.environ.get("NEOCOG_CACHE_DIR", "")
    if named:
        return None if named == "off" else Path(named).absolute()
    home = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG base directory specification: relative paths are to be ignored.
    base = Path(home) if os.path.isabs(home) else Path(os.path.expanduser("~/.cache"))
    return base / "neocog" if base.is_absolute() else None


@functools.lru_cache(64)
def _warn(message: str) -> None:
    """Log a warning; the same one only once."""
    _log.warning("%s; kernels are compiled anew in each process", message)


@contextlib.contextmanager
def _opened(create: bool) -> Iterator[int | None]:
    """A descriptor of the directory, None if there is none to be trusted.

    All files are reached through it, so that nobody can exchange the directory after the check.
    """
    path = directory()
    descriptor = None if path is None else _open_directory(path, create)
    try:
        yield descriptor
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _open_directory(path: Path, create: bool) -> int | None:
    try:
        if create:
            path.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileExistsError):
                path.mkdir(mode=0o700)
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError as error:  # a symlink is one: ELOOP or ENOTDIR
        _warn(f"code cache {path} cannot be used ({error.strerror or error})")
        return None
    if not _ours(os.fstat(descriptor)):
        os.close(descriptor)
        _warn(f"code cache {path} belongs to another user or others may write to it")
        return None
    return descriptor


def _ours(status: os.stat_result) -> bool:
    """Whether the file is this user's and nobody else may write to it."""
    return status.st_uid == os.geteuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


# ------------------------------------------------------------------------------------------- key


def key(function: Callable[..., Any], args: tuple[Any, ...], *context: str) -> str | None:
    """The name of the code that ``function(*args)`` emits; ``context``: the compiler's settings.

    None for a function from outside ``neocog.cpu``: only the sources of neocog's own emitters are
    part of the key, and code must never outlive the source it came from.
    """
    module, name = function.__module__ or "", getattr(function, "__qualname__", "<")
    sources = _sources()
    if sources is None or "<" in name or not module.startswith(f"{__package__}."):
        return None
    parts = [sources, _machine(), *context, f"{module}.{name}", describe(args)]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def describe(value: Any) -> str:
    """A text that two values share only if they are equal, the same in every process.

    Takes numbers, texts, None, tuples, frozensets and dataclasses of these. ``repr`` would not do:
    it shows sets in an order that changes from process to process, and may leave fields out.

    Raises:
        TypeError: for any other type.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return f"{type(value).__name__}:{value!r}"
    if isinstance(value, tuple):
        return f"({','.join(map(describe, value))})"
    if isinstance(value, frozenset):
        return f"{{{','.join(sorted(map(describe, value)))}}}"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        kind = type(value)
        fields = (f"{f.name}={describe(getattr(value, f.name))}" for f in dataclasses.fields(value))
        return f"{kind.__module__}.{kind.__qualname__}({','.join(fields)})"
    raise TypeError(f"plan: {value!r} is a {type(value).__name__}, no part of a code cache's key")


@functools.cache
def _sources() -> str | None:
    """A digest of the emitters and of what they read; None where there are no sources to read."""
    digest = hashlib.sha256()
    try:
        for path in (path for name in _SOURCES for path in sorted(_PACKAGE.glob(name))):
            digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    except OSError:
        return None
    if not Path(__file__).exists():  # compiled files or an archive only: nothing was read
        return None
    return digest.hexdigest()


_sources()  # as near as can be to the moment at which Python reads the same files


@functools.cache
def _machine() -> str:
    """The processor and the compiler."""
    version = ".".join(map(str, llvm.llvm_version_info))
    return "\0".join([
        llvm.get_process_triple(), llvm.get_host_cpu_name(),
        llvm.get_host_cpu_features().flatten(), version, llvmlite.__version__,
    ])  # fmt: skip


# ----------------------------------------------------------------------------------------- files


def load(key: str) -> Entry | None:
    """The entry called ``key``, if there is a sound one."""
    with _opened(create=False) as directory:
        if directory is None:
            return None
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        try:
            file = os.open(key + _CODE, flags, dir_fd=directory)
        except OSError:  # absent; or a symlink, which `store` replaces
            return None
        try:
            status = os.fstat(file)
            if not stat.S_ISREG(status.st_mode) or not _ours(status) or status.st_size > LIMIT:
                return None
            with open(file, "rb", closefd=False) as stream:
                entry = _decode(key, stream.read())
            if entry is not None:
                with contextlib.suppress(OSError):  # a read-only file system
                    os.utime(file)  # used now
            return entry
        except OSError:
            return None
        finally:
            os.close(file)


def store(key: str, entry: Entry) -> None:
    """Keep ``entry`` under ``key``, and remove what was used longest ago beyond :data:`LIMIT`."""
    data = _encode(key, entry)
    if len(data) > LIMIT:
        return
    with _opened(create=True) as directory:
        if directory is None:
            return
        part = f"{key}.{secrets.token_hex(8)}{_PART}"
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            with open(os.open(part, flags, 0o600, dir_fd=directory), "wb") as stream:
                stream.write(data)
            os.replace(part, key + _CODE, src_dir_fd=directory, dst_dir_fd=directory)
            _trim(directory)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.unlink(part, dir_fd=directory)
            _warn(f"code cache cannot be written ({error.strerror or error})")


def _encode(key: str, entry: Entry) -> bytes:
    about = {"key": key, "name": entry.name, "fields": entry.fields, "size": len(entry.code)}
    body = json.dumps(about).encode() + b"\n" + entry.code
    return b"%s %s\n%s" % (_MAGIC, hashlib.sha256(body).hexdigest().encode(), body)


def _decode(key: str, data: bytes) -> Entry | None:
    head, _, body = data.partition(b"\n")
    if head != b"%s %s" % (_MAGIC, hashlib.sha256(body).hexdigest().encode()):
        return None
    line, _, code = body.partition(b"\n")
    about = json.loads(line)  # as it was written: the checksum holds
    if about["key"] != key or about["size"] != len(code):
        return None
    return Entry(about["name"], tuple(about["fields"]), code)


def _trim(directory: int) -> None:
    """Remove files, those used longest ago first, until the rest fits :data:`LIMIT`."""
    found = []
    with os.scandir(directory) as files:
        for file in files:
            if file.name.endswith((_CODE, _PART)):
                with contextlib.suppress(OSError):  # another process was quicker
                    status = file.stat(follow_symlinks=False)
                    found.append((status.st_mtime_ns, file.name, status.st_size))
    total = sum(size for _, _, size in found)
    for _, name, size in sorted(found):
        if total <= LIMIT:
            break
        with contextlib.suppress(OSError):
            os.unlink(name, dir_fd=directory)
        total -= size
