"""neocog.functional against torch.nn.functional: signatures, results, gradients, hand-backs.

Whole numbers go in; torch computes in float64, neocog in float32, and both are compared with
``==``, behind averages within the bound of float32.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from typing import Any

import kernel_tools as kt
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import forward_ad

from neocog import functional, handback
from neocog.problem import pooling

LAST = torch.channels_last


def whole(*shape: int, seed: int = 0, last: bool = False) -> Tensor:
    made = torch.tensor(kt.integers(shape, seed), dtype=torch.float32)
    return made.to(memory_format=LAST) if last and made.dim() == 4 else made


def results(call: Callable[..., Tensor], tensors: list[Tensor | None], dtype: Any) -> list[Tensor]:
    """The result of a call and the gradients of all its tensors."""
    leaves = [None if t is None else t.detach().to(dtype).requires_grad_() for t in tensors]
    y = call(*leaves)
    grad = whole(*y.shape, seed=99).to(dtype)
    given = [t for t in leaves if t is not None]
    return [y.detach(), *torch.autograd.grad(y, given, grad)]


def same(
    ours: Callable[..., Tensor],
    theirs: Callable[..., Tensor],
    tensors: list[Tensor | None],
    exact: bool = True,
) -> None:
    """Results and gradients are equal (after an average: nearly), in values and shapes."""
    bound = {} if exact else {"rtol": 16 * 2.0**-24, "atol": 64 * 2.0**-24}
    pairs = zip(
        results(ours, tensors, torch.float32), results(theirs, tensors, torch.float64), strict=True
    )
    for our, their in pairs:
        assert our.dtype == torch.float32
        torch.testing.assert_close(our.double(), their, **(bound or {"rtol": 0, "atol": 0}))


# --------------------------------------------------------------------------------- signatures


def declared(schema: Any) -> dict[str, Any]:
    """The arguments and defaults of one of torch's operators, as its documentation has them."""
    plain: dict[str, Any] = {}
    for argument in schema.arguments:
        value = argument.default_value if argument.has_default_value() else inspect.Parameter.empty
        value = None if value == [] else value[0] if isinstance(value, list) else value
        plain["input" if argument.name == "self" else argument.name] = value
    return plain


@pytest.mark.parametrize("name", ["conv2d", "avg_pool2d"])
def test_signatures_of_operators(name: str) -> None:
    ours = inspect.signature(getattr(functional, name)).parameters
    theirs = declared(getattr(torch.ops.aten, name).default._schema)
    assert {n: p.default for n, p in ours.items()} == theirs


def test_signature_of_max_pool2d() -> None:
    def plain(function: Any) -> list[Any]:
        return [(p.name, p.default) for p in inspect.signature(function).parameters.values()]

    assert plain(functional.max_pool2d) == plain(F._max_pool2d)


def test_conv_block_begins_like_conv2d() -> None:
    conv = list(inspect.signature(functional.conv2d).parameters.values())
    block = list(inspect.signature(functional.conv_block).parameters.values())
    assert block[: len(conv)] == conv
    assert all(p.kind is p.KEYWORD_ONLY for p in block[len(conv) :])


# ----------------------------------------------------------------- results over all arguments

EXAMPLES = settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
PAIR = st.integers(1, 3) | st.tuples(st.integers(1, 3), st.integers(1, 3))


@st.composite
def conv_calls(draw: st.DrawFn) -> tuple[list[Tensor | None], dict[str, Any]]:
    """Tensors and keyword arguments of conv2d that fit each other."""
    groups, batch = draw(st.integers(1, 3)), draw(st.none() | st.integers(0, 2))
    into, out = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 7, 17]))
    kernel = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    padding = draw(
        st.integers(0, 2)
        | st.tuples(st.integers(0, 2), st.integers(0, 3))
        | st.sampled_from(["same", "valid"])
    )
    stride, dilation = (1 if padding == "same" else draw(PAIR)), draw(PAIR)
    span = [d * (k - 1) + 1 for d, k in zip(np.broadcast_to(dilation, 2), kernel, strict=True)]
    size = [int(s) + draw(st.integers(0, 6)) for s in span]
    shape = (groups * into, *size) if batch is None else (batch, groups * into, *size)
    x, w = whole(*shape, last=draw(st.booleans())), whole(groups * out, into, *kernel, seed=1)
    if draw(st.booleans()):
        w = w.to(memory_format=LAST)
    b = whole(groups * out, seed=2) if draw(st.booleans()) else None
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    return [x, w, b], options


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Using padding='same'")
@EXAMPLES
@given(conv_calls())
def test_conv2d(call: tuple[list[Tensor | None], dict[str, Any]]) -> None:
    tensors, options = call
    same(
        lambda x, w, b=None: functional.conv2d(x, w, b, **options),
        lambda x, w, b=None: F.conv2d(x, w, b, **options),
        tensors,
    )


@st.composite
def pool_calls(draw: st.DrawFn, dilated: bool) -> tuple[Tensor, dict[str, Any]]:
    """An input and the keyword arguments of a pool that fit each other."""
    kernel = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    padding = tuple(draw(st.integers(0, k // 2)) for k in kernel)
    dilation = draw(PAIR) if dilated else 1
    span = [d * (k - 1) + 1 for d, k in zip(np.broadcast_to(dilation, 2), kernel, strict=True)]
    size = [
        max(1, int(s) - 2 * p) + draw(st.integers(0, 6)) for s, p in zip(span, padding, strict=True)
    ]
    leading = draw(st.sampled_from([(1,), (3,), (19,), (2, 3), (0, 2), (2, 1)]))
    options = {
        "kernel_size": kernel
        if kernel[0] != kernel[1]
        else draw(st.sampled_from([kernel, kernel[0]])),
        "stride": draw(st.none() | PAIR),
        "padding": padding,
        "ceil_mode": draw(st.booleans()),
    }
    if dilated:
        options["dilation"] = dilation
    return whole(*leading, *size, last=draw(st.booleans())), options


def meets_input(x: Tensor, options: dict[str, Any]) -> bool:
    """Whether no window lies on padding alone, where torch's gradient is undefined."""
    ones = torch.zeros(1, *x.shape[-3:])
    return bool(F.max_pool2d(ones, **options).isfinite().all())


@pytest.mark.slow
@EXAMPLES
@given(pool_calls(dilated=True))
def test_max_pool2d(call: tuple[Tensor, dict[str, Any]]) -> None:
    x, options = call
    assume(meets_input(x, options))
    same(lambda x: functional.max_pool2d(x, **options), lambda x: F.max_pool2d(x, **options), [x])


@pytest.mark.slow
@EXAMPLES
@given(pool_calls(dilated=False), st.booleans(), st.none() | st.sampled_from([1, 5, -3]))
def test_avg_pool2d(call: tuple[Tensor, dict[str, Any]], include: bool, divisor: Any) -> None:
    x, options = call
    options |= {"count_include_pad": include, "divisor_override": divisor}
    same(
        lambda x: functional.avg_pool2d(x, **options),
        lambda x: F.avg_pool2d(x, **options),
        [x],
        exact=False,
    )


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda y: y,
    "relu": F.relu,
    "leaky_relu": lambda y: F.leaky_relu(y, 0.25),
}
POOLS = {
    None: lambda y: y,
    pooling("max", 2): lambda y: F.max_pool2d(y, 2),
    pooling("max", 3, 2, 1, 1, True): lambda y: F.max_pool2d(y, 3, 2, 1, 1, True),
    pooling("mean", 2): lambda y: F.avg_pool2d(y, 2),
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("pool", POOLS, ids=str)
@pytest.mark.parametrize("batched", [True, False])
def test_conv_block(activation: str, pool: Any, batched: bool) -> None:
    """Through a residual too; all four gradients."""

    def ours(x: Tensor, w: Tensor, b: Tensor, r: Tensor) -> Tensor:
        return functional.conv_block(
            x, w, b, 1, 1, activation=activation, negative_slope=0.25, pool=pool, residual=r
        )

    def theirs(x: Tensor, w: Tensor, b: Tensor, r: Tensor) -> Tensor:
        return POOLS[pool](ACTIVATIONS[activation](F.conv2d(x, w, b, 1, 1) + r))

    tensors = [whole(2, 3, 7, 6), whole(19, 3, 3, 3, seed=1), whole(19, seed=2)]
    residual = whole(2, 19, 7, 6, seed=3)
    if not batched:
        tensors[0], residual = tensors[0][0], residual[0]
    same(ours, theirs, [*tensors, residual], exact=True)


SPELLINGS = [1, 2, (2,), [2], (2, 1), [1, 2], torch.Size([2, 2]), np.int64(2)]


@pytest.mark.parametrize("value", SPELLINGS, ids=repr)
def test_sizes_may_be_spelt_as_in_torch(value: Any) -> None:
    x, w = whole(1, 2, 9, 9), whole(3, 2, 3, 3, seed=1)
    for name in ("stride", "padding", "dilation"):
        assert torch.equal(
            functional.conv2d(x, w, **{name: value}), F.conv2d(x, w, **{name: value})
        )
    assert torch.equal(functional.max_pool2d(x, value), F.max_pool2d(x, value))
    assert torch.equal(functional.avg_pool2d(x, 2, value), F.avg_pool2d(x, 2, value))


def test_an_empty_stride_is_the_kernel() -> None:
    x = whole(1, 2, 9, 9)
    for stride in (None, [], ()):
        assert functional.max_pool2d(x, (3, 2), stride).shape == (1, 2, 3, 4)
        assert functional.avg_pool2d(x, (3, 2), stride).shape == (1, 2, 3, 4)


def test_indices() -> None:
    x = whole(2, 3, 8, 8)
    for index in (x, x[0]):
        ours = functional.max_pool2d(index, 3, 2, 1, return_indices=True)
        theirs = F.max_pool2d(index, 3, 2, 1, return_indices=True)
        assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])


def test_a_view_whose_signs_are_flipped_when_read() -> None:
    """The imaginary part of a conjugate: its memory holds the opposite numbers."""
    x = torch.complex(whole(1, 2, 5, 5), whole(1, 2, 5, 5, seed=1)).conj().imag
    assert x.is_neg() and x.dtype == torch.float32
    w = whole(3, 2, 3, 3)
    assert torch.equal(functional.conv2d(x, w), F.conv2d(x, w))
    assert torch.equal(functional.max_pool2d(x, 2), F.max_pool2d(x, 2))


# -------------------------------------------------------------------------- handed back to torch


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """The warnings of the logger ``neocog`` so far."""
    handback.warn_once.cache_clear()
    caplog.set_level(logging.WARNING, logger="neocog")
    return lambda: [r.getMessage() for r in caplog.records if r.name == "neocog"]


def block(library: Any, dtype: Any = torch.float32, **options: Any) -> Tensor:
    x, w = whole(1, 2, 5, 5).to(dtype), whole(3, 2, 3, 3, seed=1).to(dtype)
    if library is functional:
        return functional.conv_block(x, w, **options)
    y = F.conv2d(x, w)
    return y if not options else F.leaky_relu(y, options["negative_slope"])


def over_weights(library: Any) -> Callable[[Tensor], Tensor]:
    return lambda w: library.conv2d(whole(1, 2, 5, 5), w)


def tangent(library: Any) -> Tensor:
    with forward_ad.dual_level():
        w = forward_ad.make_dual(*(t[0] for t in TANGENT))
        return forward_ad.unpack_dual(over_weights(library)(w)).tangent


TANGENT = (whole(3, 2, 3, 3),), (whole(3, 2, 3, 3, seed=1),)
LEAKY = {"activation": "leaky_relu", "negative_slope": -0.5}
BACK: dict[str, tuple[Callable[[Any], Tensor], str]] = {
    "float64": (lambda lib: block(lib, torch.float64), "dtype torch.float64"),
    "bfloat16": (lambda lib: block(lib, torch.bfloat16), "dtype torch.bfloat16"),
    "slope": (lambda lib: block(lib, **LEAKY), "negative slope"),
    "no channels": (
        lambda lib: lib.conv2d(torch.ones(1, 0, 4, 4), torch.ones(2, 0, 3, 3)),
        "size of 0",
    ),
    "max of float64": (lambda lib: lib.max_pool2d(whole(1, 2, 4, 4).double(), 2), "max_pool2d"),
    "max of integers": (lambda lib: lib.max_pool2d(whole(1, 2, 4, 4).long(), 2), "torch.int64"),
    "mean of bfloat16": (lambda lib: lib.avg_pool2d(whole(1, 2, 4, 4).bfloat16(), 2), "avg_pool2d"),
    "indices": (
        lambda lib: lib.max_pool2d(whole(1, 2, 4, 4), 2, return_indices=True)[1],
        "indices",
    ),
    "another device": (
        lambda lib: lib.conv2d(whole(1, 2, 4, 4).to("meta"), whole(1, 2, 3, 3).to("meta")),
        "device meta",
    ),
    "vmap": (lambda lib: torch.func.vmap(over_weights(lib))(whole(4, 3, 2, 3, 3)), "torch.func"),
    "jvp": (lambda lib: torch.func.jvp(over_weights(lib), *TANGENT)[1], "torch.func"),
    "dual numbers": (tangent, "forward-mode"),
}


@pytest.mark.parametrize("name", BACK)
def test_handed_back(name: str, warnings: Callable[[], list[str]]) -> None:
    """The result is torch's own, and one warning says why, once."""
    call, reason = BACK[name]
    theirs = call(F)
    for _ in range(2):
        ours = call(functional)
        assert (ours.shape, ours.dtype, ours.device) == (theirs.shape, theirs.dtype, theirs.device)
        assert ours.is_meta or torch.equal(ours, theirs)
    (message,) = warnings()
    assert reason in message and "handed back to PyTorch" in message


def test_autocast_is_handed_back(warnings: Callable[[], list[str]]) -> None:
    x, w = whole(1, 2, 5, 5), whole(3, 2, 3, 3)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = functional.conv2d(x, w), F.conv2d(x, w)
    assert ours.dtype == theirs.dtype == torch.bfloat16 and torch.equal(ours, theirs)
    assert len(warnings()) == 1 and "autocast" in warnings()[0]


def test_double_backward_is_handed_back(warnings: Callable[[], list[str]]) -> None:
    def second(library: Any) -> list[Tensor]:
        x, w = (t.requires_grad_() for t in (whole(1, 2, 6, 6), whole(3, 2, 3, 3, seed=1)))
        y = library.max_pool2d(library.conv2d(x, w), 2).square().sum()
        first = torch.autograd.grad(y, (x, w), create_graph=True)
        return [*first, *torch.autograd.grad(sum(g.square().sum() for g in first), (x, w))]

    for ours, theirs in zip(second(functional), second(F), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert len(warnings()) == 2 and all("double backward" in w for w in warnings())


def test_nothing_that_is_covered_is_handed_back(warnings: Callable[[], list[str]]) -> None:
    x, w = whole(2, 4, 8, 8).requires_grad_(), whole(4, 1, 3, 3).requires_grad_()
    y = functional.conv_block(x, w, padding="same", groups=4, activation="relu")
    y = functional.avg_pool2d(functional.max_pool2d(y, 3, 1, 1), 2)
    functional.conv2d(y[0], whole(2, 4, 1, 1)).sum().backward()
    functional.max_pool2d(torch.ones(0, 2, 4, 4), 2)
    assert warnings() == []
