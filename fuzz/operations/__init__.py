"""What programs are made of: one table of kinds of steps."""

from __future__ import annotations

from ..building import Operation
from . import borders, gradients, layers, shapes, state, writes

ALWAYS: tuple[Operation, ...] = (*layers.TABLE, *shapes.TABLE)
"""Kinds that every program may contain."""

SOMETIMES: tuple[Operation, ...] = (
    *writes.TABLE,
    *gradients.TABLE,
    *state.TABLE,
    *borders.TABLE,
)
"""Kinds of which each program gets a few, so that it says something about them."""

OPERATIONS = {operation.name: operation for operation in (*ALWAYS, *SOMETIMES)}
