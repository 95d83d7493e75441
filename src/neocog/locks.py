"""One process trains a run: its directory is locked by the file that begins it.

The lock is the operating system's (flock; on Windows a byte far behind the file's end): it goes
with the process that holds it, however that ends, and leaves no file behind. Others read the
directory as before.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import NeocogError

_TAKEN = {errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES, errno.EDEADLK}
_FAR = 2**30


class RunInUse(NeocogError, RuntimeError):
    """A run that another process is training."""


@contextmanager
def locked(path: Path, note: Callable[[str], object]) -> Iterator[None]:
    """Holds the lock of ``path``, a file that exists and is never replaced, or says why not.

    Args:
        path: of the file; what is said names its directory.
        note: is told in one line if this file system has no locks; then nothing is held.

    Raises:
        RunInUse: another process holds it.
        OSError: the file cannot be opened for writing, for instance on a read-only disk.
    """
    folder = path.parent
    try:
        handle = os.open(path, os.O_RDWR)
    except OSError as error:
        why = f"{os.strerror(error.errno or 0)}; a run that goes on writes into its directory"
        raise OSError(error.errno, why, str(path)) from error
    try:
        try:
            _take(handle)
        except OSError as error:
            if error.errno in _TAKEN:
                raise RunInUse(
                    f"{folder}: is being trained by another process; expected one at a time"
                ) from error
            why = os.strerror(error.errno or 0)
            note(f"{folder} cannot be locked ({why}): a second --resume would not be noticed")
        yield
    finally:
        os.close(handle)


if sys.platform == "win32":
    import msvcrt

    def _take(handle: int) -> None:
        os.lseek(handle, _FAR, os.SEEK_SET)
        msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)

else:
    import fcntl

    def _take(handle: int) -> None:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
