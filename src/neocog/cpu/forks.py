"""What a forked child may rely on: no lock that nobody will open.

A fork copies memory and one thread. Locks that others held stay closed in the child for good,
and what they were changing stays as it was. So neocog's locks are opened in the child; LLVM, whose
own locks nobody can open, is held still while the process forks; and whoever guards memory that may
be half written asks :func:`generation`.
"""

from __future__ import annotations

import os
import threading
import weakref
from typing import Any

import llvmlite.binding as llvm

_locks: weakref.WeakSet[Any] = weakref.WeakSet()
_generation = 0


def lock() -> threading.RLock:
    """A re-entrant lock that is open in a forked child, whoever held it."""
    made = threading.RLock()
    _locks.add(made)
    return made


def open_in_child(kind: type) -> None:
    """Open the locks of a class's cached properties, which Python 3.11 has, in a forked child."""
    found = (getattr(value, "lock", None) for value in vars(kind).values())
    _locks.update(lock for lock in found if lock is not None)


def generation() -> int:
    """How many forks lie between this process and the first that imported neocog."""
    return _generation


# llvmlite's calls hold this lock: whoever has it knows that no thread is inside LLVM (0.50).
_llvm = llvm.ffi.lib._lock


def _after() -> None:
    _llvm.__exit__(None, None, None)


def _in_child() -> None:
    global _generation
    _generation += 1
    for lock in _locks:
        lock._at_fork_reinit()  # as Python does with its own (3.9)
    _after()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_llvm.__enter__, after_in_parent=_after, after_in_child=_in_child)
