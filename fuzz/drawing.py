"""Cases drawn at random, and their source text."""

from __future__ import annotations

import random
from dataclasses import replace

import torch

from .building import Builder, Operation, clean_state
from .inputs import DATA, LAYOUTS, NUMBER, arguments
from .operations import ALWAYS, OPERATIONS, SOMETIMES
from .program import Case, Draw, Input, Step

MODES = {"freeze": 4, "eval": 2, "train": 4, "func": 0.5}
"""How often each way to call a program is drawn."""

CALLS = (
    ("first",), ("first", "first"), ("first", "batch"), ("first", "size"),
    ("first", "batch", "first"), ("first", "size", "batch", "size"), ("first", "none", "first"),
)  # fmt: skip

BETWEEN = ("data", "copy", "load", "replace", "mode", "thaw", "buffers")
"""What happens to the module between calls: see ``acting.meddle``."""

CHOICES: dict[str, dict[str, tuple[object, ...]]] = {
    "": {
        "calls": CALLS,
        "channels_last": (False, False, False, True),
        "negative_weight": (False,) * 20 + (True,),
        "dtype": ("float32",) * 20 + ("float64", "bfloat16"),
        "threads": (1,) * 8 + (2,),
        "aliased": (None,) * 12 + ("same", "view"),
        "form": (
            "tensor", "tuple", "list", "dict", "pair", "answer", "nested", "twice", "argument",
            "mixed",
        ),
    },
    "freeze": {
        "around": ("no_grad", "inference", "grad"),
        "inside": ("", "", "", "", "", "module", "compiled", "eager"),
        "exact": (False, False, True),
        "again": (False,) * 5 + (True,),
        "wrapped": (False,) * 15 + (True,),
    },
    "eval": {
        "around": ("no_grad", "inference", "set_grad_enabled"),
        "training": (False, False, False, True),
        "dynamic": (None, None, None, True, "mark"),
        "fullgraph": (False, False, True),
        "wrapped": (False,) * 8 + (True,),
        "between": (None,) * 4 + BETWEEN,
    },
    "train": {
        "training": (True, True, True, False),
        "still_norms": (False, False, False, True),
        "freeze_some": (0, 0, 0, 2, 3),
        "backward": (
            "each", "each", "sum", "grad", "sgd", "twice", "inside", "checkpoint", "accumulate",
            "some", "reversed", "penalty",
        ),
        "between": (None,) * 8 + BETWEEN,
        "dynamic": (None, None, None, True, "mark"),
    },
    "func": {
        "transform": ("grad", "vmap", "jvp", "vjp", "dual"),
        "where": ("outside", "inside"),
        "of": ("argument", "weight"),
    },
}  # fmt: skip
"""What is chosen for a case besides its steps: for every mode, and for each."""


def draw(seed: int, index: int) -> Case:
    """Case ``index`` of the run with this seed."""
    rng = random.Random(f"{seed}/{index}")
    mode = rng.choices(list(MODES), list(MODES.values()))[0]
    d = Draw(rng)
    for name, options in {**CHOICES[""], **CHOICES[mode]}.items():
        d(name, options, plain=0.4)
    for name in ("return0", "return1", "return2"):
        d.number(name, 7, recent=True)
    inputs = _inputs(rng, mode)
    case = Case(rng.randrange(10**6), inputs, (), mode, d.used)
    with clean_state():
        return Case.parse(str(replace(case, steps=_steps(case, rng))))


def _inputs(rng: random.Random, mode: str) -> tuple[Input, ...]:
    batch, channels = rng.choice((2, 1, 3)), rng.choice((3, 4, 8, 16))
    shape = (batch, channels, rng.choice((8, 6, 7, 9)), rng.choice((8, 6, 7, 9)))
    count = rng.choice((1, 1, 1, 2, 2, 3))
    found: list[Input] = []
    for _ in range(count):
        layout = rng.choice(LAYOUTS) if rng.random() < 0.4 else "dense"
        data = rng.choice(DATA) if rng.random() < 0.3 else "normal"
        grad = mode == "train" and rng.random() < 0.5
        other = rng.random()
        if found and other < 0.3:
            shape = (rng.choice((1, 2, 3, 5)), *shape[1:])
        elif found and other < 0.5:
            shape = (shape[0], rng.choice((3, 4, 8)), *shape[2:])
        found.append(Input(shape, layout, data, grad))
    if mode in ("eval", "train") and rng.random() < 0.1:
        found.append(Input((), NUMBER))
    return tuple(found)


def _builder(case: Case) -> Builder:
    given = arguments(case.inputs, 0, "first", case.seed, torch.float32)
    names = {f"x{i}": value for i, value in enumerate(given)}
    training = case.plan.get("training", case.mode == "train")
    return Builder(names, training)


def _steps(case: Case, rng: random.Random) -> tuple[Step, ...]:
    """Steps that fit one another. Only a few unusual kinds take part in each program."""
    unusual = rng.sample(SOMETIMES, rng.choice((0, 1, 2, 2, 3, 4)))
    if any(spec.layout == NUMBER for spec in case.inputs):
        unusual.append(OPERATIONS["number_argument"])
    kinds: list[Operation] = [*ALWAYS, *unusual]
    weights = [o.weight for o in kinds]
    # Two steps of five are unusual ones, however few kinds there are.
    share = 0.67 * sum(o.weight for o in ALWAYS) / max(1e-9, sum(o.weight for o in unusual))
    weights[len(ALWAYS) :] = [share * o.weight for o in unusual]
    length = rng.choice((2, 3, 4, 5, 6, 8, 10, 14))
    builder, steps = _builder(case), []
    for _ in range(3 * length):
        kind = rng.choices(kinds, weights)[0]
        d = Draw(rng)
        if builder.attempt(kind, d):
            steps.append((kind.name, d.used))
        if len(steps) >= length:
            break
    builder.finish("None")
    return tuple(steps)


def source_of(case: Case) -> str:
    """The module's text."""
    with clean_state():
        builder = _builder(case)
        for name, chosen in case.steps:
            builder.attempt(OPERATIONS[name], Draw(None, chosen))
        return builder.finish(_result(builder, case))


def _result(b: Builder, case: Case) -> str:
    """What forward returns."""
    d = Draw(None, case.plan)
    found = [v.name for v in reversed(b.values)]
    one, two, three = (found[d.number(f"return{i}", len(found))] for i in range(3))
    forms = {
        "tuple": f"({one}, {two}, {three})", "list": f"[{one}, {two}]",
        "dict": f"{{'one': {one}, 'two': {two}}}", "pair": f"parts.Pair({one}, {two})",
        "answer": f"parts.Answer({one}, {two})", "twice": f"({one}, {one})",
        "nested": f"{{'a': [{one}, ({two},)], 'b': {{'c': {three}}}}}",
        "argument": f"({one}, {b.arguments[-1]})",
        "mixed": f"({one}, None, {one}.shape[0], 'text', 1.5)",
    }  # fmt: skip
    return forms.get(case.plan.get("form", "tensor"), one)


def coarseness(case: Case) -> float:
    """How far apart right results of the program may be; 0 for float32's rounding."""
    whole = 0.06 if case.plan.get("dtype") == "bfloat16" else 0.0
    return max((OPERATIONS[name].coarse for name, _ in case.steps), default=whole) or whole
