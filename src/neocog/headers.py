"""JSON that a file brings along, read without trusting it: every value is of its type and range."""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Iterator, Mapping
from typing import Any

from .errors import InvalidModel

LARGEST = 2**31 - 1
"""Of a size or a count: no tensor has a longer axis here."""

_NUMBERS = ("loss", "accuracy", "val_loss", "val_accuracy")


def read_object(text: str) -> dict[str, Any]:
    """The JSON object that a text is; InvalidModel, in one line, if it is none."""
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise InvalidModel("is nested too deeply") from error
    except ValueError as error:  # no JSON, or a number of thousands of digits
        raise InvalidModel(f"is no JSON: {error}") from error
    if not isinstance(value, dict):
        raise _wrong("it", value, "a JSON object")
    return value


class Fields:
    """The values of a JSON object, each asked for by its key and expected type.

    Every method raises InvalidModel naming the key, its value and what was expected.
    ``name`` is what the object is called, for an object in another.
    """

    def __init__(self, values: Mapping[str, Any], name: str = "") -> None:
        self._values, self._name, self._asked = values, f"{name}." if name else "", set[str]()

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def text(self, key: str) -> str:
        """A string."""
        value = self._get(key)
        return value if isinstance(value, str) else self._refuse(key, "a string")

    def flag(self, key: str) -> bool:
        """True or false."""
        value = self._get(key)
        return value if isinstance(value, bool) else self._refuse(key, "true or false")

    def whole(self, key: str, low: int = 0) -> int:
        """A whole number from ``low`` to :data:`LARGEST`."""
        value = self._get(key)
        if _is_whole(value) and low <= value <= LARGEST:
            return value
        return self._refuse(key, f"a whole number from {low} to {LARGEST}")

    def number(self, key: str, low: float, high: float) -> float:
        """A number in a range, ends included."""
        value = self._get(key)
        if _is_number(value) and low <= value <= high:
            return float(value)
        return self._refuse(key, f"a number from {low:g} to {high:g}")

    def numbers(self, key: str, low: float, high: float) -> tuple[float, ...]:
        """A list of at least one number in a range."""
        value = self._get(key)
        right = lambda item: _is_number(item) and low <= item <= high  # noqa: E731
        if isinstance(value, list) and value and all(map(right, value)):
            return tuple(map(float, value))
        return self._refuse(key, f"a list of numbers from {low:g} to {high:g}")

    def sizes(self, key: str, count: int) -> tuple[int, ...]:
        """A list of so many whole numbers from 1, whose product is at most :data:`LARGEST`."""
        value = self._get(key)
        right = lambda item: _is_whole(item) and 1 <= item <= LARGEST  # noqa: E731
        sizes = value if isinstance(value, list) and all(map(right, value)) else []
        if len(sizes) == count and math.prod(sizes) <= LARGEST:
            return tuple(sizes)
        return self._refuse(key, f"{count} whole numbers from 1, their product at most {LARGEST}")

    def texts(self, key: str) -> tuple[str, ...]:
        """A list of strings."""
        value = self._get(key)
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            return tuple(value)
        return self._refuse(key, "a list of strings")

    def objects(self, key: str) -> list[Fields]:
        """A list of objects."""
        value = self._get(key)
        if isinstance(value, list) and all(isinstance(item, dict) for item in value):
            return [Fields(item, f"{self._name}{key}[{i}]") for i, item in enumerate(value)]
        return self._refuse(key, "a list of objects")

    def object(self, key: str) -> Fields:
        """An object."""
        value = self._get(key)
        if isinstance(value, dict):
            return Fields(value, f"{self._name}{key}")
        return self._refuse(key, "an object")

    def end(self) -> None:
        """Nothing else may be there."""
        for key in self._values:
            if key not in self._asked:
                raise InvalidModel(f"{self._name}{reprlib.repr(key)} means nothing")

    def _get(self, key: str) -> Any:
        self._asked.add(key)
        if key not in self._values:
            raise InvalidModel(f"{self._name}{key} is missing")
        return self._values[key]

    def _refuse(self, key: str, expected: str) -> Any:
        raise _wrong(f"{self._name}{key}", self._values[key], expected)


def check_history(values: Fields) -> None:
    """Raises InvalidModel unless training can go on from these values of a checkpoint."""
    values.number("seconds", 0, math.inf)
    networks: set[str] | None = None
    for number, row in enumerate(values.objects("history"), 1):
        if row.whole("epoch", 1) != number:
            raise InvalidModel(f"history[{number - 1}] is not of epoch {number}")
        found = {name for name in ("cnn", "mlp") if name in row}
        if networks not in (None, found) or "cnn" not in found:
            raise InvalidModel(f"history[{number - 1}] is of {sorted(found)}, expected cnn and mlp")
        networks = found
        for name in found:
            for key in _NUMBERS:
                row.object(name).number(key, 0, math.inf)
    if "spent" in values:
        spent = values.object("spent")
        for part in spent:
            spent.number(part, 0, math.inf)


def _wrong(name: str, value: object, expected: str) -> InvalidModel:
    return InvalidModel(f"{name} is {reprlib.repr(value)}, expected {expected}")


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    """Finite, and small enough for a float."""
    if _is_whole(value):
        return abs(value) < 2**53
    return isinstance(value, float) and math.isfinite(value)
