"""torch.ops.neocog.* on tensors that do not belong together: refused before memory is read.

Kernels read raw memory, so that a gradient or winners of another shape would be read behind their
end. What is wrong is fuzzed in a child process, which would die of it.
"""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from neocog import ops
from neocog.errors import InvalidProblem
from neocog.problem import pooling

WINDOW = ([1, 1], [1, 1, 1, 1], [1, 1], 1)
MAX, MEAN = str(pooling("max", 2)), str(pooling("mean", 2))
ALL = [True, True, True, True]


def whole(*shape):
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randint(-3, 4, shape, generator=generator).float()


def backward_call(epilogue):
    """Arguments of a right call of conv_block_backward, by name."""
    x, w = whole(2, 3, 8, 6), whole(4, 3, 3, 3)
    b = whole(4) if "bias" in epilogue else None
    r = whole(2, 4, 8, 6) if "add" in epilogue else None
    out, winners, before = ops.conv_block(x, w, b, r, *WINDOW, epilogue, True)
    result = before if before.numel() else out
    return {
        "grad": torch.ones_like(out), "x": x, "weight": w,
        "result": result if "relu" in epilogue else None, "winners": winners,
    }  # fmt: skip


def backward(call, epilogue, needs=ALL):
    return ops.conv_block_backward(*call.values(), *WINDOW, epilogue, needs)


def test_a_pools_gradient_of_another_size():
    with pytest.raises(
        InvalidProblem, match=r"grad must have shape \(8, 64, 32, 32\), .*got \(1, 1"
    ):
        ops.pool_backward(whole(1, 1, 1, 1), whole(0).byte(), [8, 64, 64, 64], MAX, False)


def given_back(t):
    t = t.clone()
    t.untyped_storage().resize_(0)
    return t


WRONG = {
    "grad, one row more": ("grad", lambda t: whole(*t.shape[:2], t.shape[2] + 1, t.shape[3])),
    "grad, one number": ("grad", lambda t: whole(1, 1, 1, 1)),
    "grad, three dimensions": ("grad", lambda t: t[0]),
    "grad, double": ("grad", lambda t: t.double()),
    "grad, no memory": ("grad", given_back),
    "x, another batch": ("x", lambda t: t[:1]),
    "x, other channels": ("x", lambda t: t[:, :2]),
    "x, half": ("x", lambda t: t.half()),
    "weight, other outputs": ("weight", lambda t: t[:3]),
    "weight, integers": ("weight", lambda t: t.int()),
    "weight, no memory": ("weight", given_back),
    "result, missing": ("result", lambda t: None),
    "result, smaller": ("result", lambda t: t[:, :, :1]),
    "result, integers": ("result", lambda t: t.int()),
    "winners, none": ("winners", lambda t: t.new_empty(0)),
    "winners, another type": ("winners", lambda t: t.int()),
    "winners, smaller": ("winners", lambda t: t[:1]),
    "winners, another order": ("winners", lambda t: t.contiguous()),
    "winners, no memory": ("winners", given_back),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRONG)
def test_one_tensor_that_does_not_belong(kind):
    epilogue = f"bias | add | relu | {MAX}"
    call = backward_call(epilogue)
    assert backward(call, epilogue)[0].shape == call["x"].shape
    name, change = WRONG[kind]
    call[name] = change(call[name])
    said = f"{name}|grad|input" if name in ("x", "weight") else name
    with pytest.raises(InvalidProblem, match=said):
        backward(call, epilogue)


def test_before_a_mean_the_result_has_the_convolutions_shape():
    epilogue = f"relu | {MEAN}"
    call = backward_call(epilogue)
    needs = [True, True, False, False]
    backward(call, epilogue, needs)
    with pytest.raises(InvalidProblem, match=r"result must have shape \(2, 4, 8, 6\)"):
        backward(call | {"result": call["grad"]}, epilogue, needs)


def test_winners_that_no_forward_pass_stores_give_nothing_and_write_nowhere():
    x = whole(2, 5, 6, 6)
    for step in (pooling("max", 2), pooling("max", 3, 2, 1), pooling("max", 17, 1, 8)):
        out, winners = ops.pool(x, str(step), True)
        none = torch.full_like(winners, 255 if winners.dtype == torch.uint8 else 2**31 - 1)
        gx = ops.pool_backward(torch.ones_like(out), none, x.shape, str(step), False)
        assert not gx.any()
        mixed = torch.where(winners == winners.flatten()[0], none, winners)
        mixed = torch.empty_like(winners).copy_(mixed)
        gx = ops.pool_backward(torch.ones_like(out), mixed, x.shape, str(step), False)
        assert gx.sum() == (mixed == winners).sum()


ODD = {
    "x on meta": lambda x, w, b: (x.to("meta"), w, b),
    "weight on meta": lambda x, w, b: (x, w.to("meta"), b),
    "bias on meta": lambda x, w, b: (x, w, b.to("meta")),
    "no memory": lambda x, w, b: (given_back(x), w, b),
    "weight without memory": lambda x, w, b: (x, given_back(w), b),
    "bias without memory": lambda x, w, b: (x, w, given_back(b)),
    "bias of a matrix": lambda x, w, b: (x, w, b[None]),
    "bias too short": lambda x, w, b: (x, w, b[:3]),
    "double": lambda x, w, b: (x.double(), w, b),
    "double bias": lambda x, w, b: (x, w, b.double()),
}


@pytest.mark.parametrize("kind", ODD)
def test_a_forward_pass_on_what_kernels_cannot_read(kind):
    x, w, b = ODD[kind](whole(2, 3, 8, 6), whole(4, 3, 3, 3), whole(4))
    with pytest.raises(InvalidProblem):
        ops.conv_block(x, w, b, None, *WINDOW, "bias", False)


def test_pools_of_what_kernels_cannot_read():
    for x in (given_back(whole(1, 2, 4, 4)), whole(1, 2, 4, 4).double(), whole(2, 4, 4)):
        with pytest.raises(InvalidProblem):
            ops.pool(x, MAX, False)


def test_negated_values_are_read_as_they_are():
    """PyTorch's dispatcher resolves the bit before a kernel sees the tensor."""
    x = torch.complex(whole(2, 3, 8, 6), whole(2, 3, 8, 6)).conj().imag
    assert x.is_neg()
    w = whole(4, 3, 3, 3)
    ours = ops.conv_block(x, w, None, None, *WINDOW, "", False)[0]
    assert torch.equal(ours, F.conv2d(x, w, padding=1))


FUZZ = """
import random, sys, torch
from neocog import ops
from neocog.errors import NeocogError
from neocog.problem import pooling
draw = random.Random(int(sys.argv[1]))
pools = [str(pooling("max", 2)), str(pooling("mean", 3, 2, 1)), str(pooling("max", 3, 1, 1))]
def shape(near):
    sizes = list(near)
    for _ in range(draw.randint(1, 2)):
        kind = draw.randrange(4)
        if not sizes or kind == 0: sizes.insert(draw.randint(0, len(sizes)), draw.randint(1, 3))
        elif kind == 1: sizes.pop(draw.randrange(len(sizes)))
        else: sizes[draw.randrange(len(sizes))] = draw.choice([0, 1, 2, 3, 9, 300])
    return sizes
def odd(t):
    if t is None: return torch.ones(draw.choice([0, 1, 5]))
    kind = draw.randrange(5)
    if kind == 0: return t.to(draw.choice([torch.float64, torch.uint8, torch.int32, torch.bool]))
    if kind == 1: return t.expand(t.shape).transpose(0, -1) if t.dim() > 1 else t
    if kind == 2: return t[..., :-1] if t.dim() and t.shape[-1] else t
    return torch.ones(shape(t.shape)).to(t.dtype)
refused = 0
for _ in range(int(sys.argv[2])):
    window = ([draw.randint(1, 2)] * 2, [draw.randint(0, 1)] * 4, [1, 1], 1)
    steps = draw.choice(["", "bias", "relu", "bias | add | relu"])
    pooled = draw.choice(["", *pools])
    epilogue = " | ".join(part for part in (steps, pooled) if part)
    x, w = torch.ones(2, 3, 8, 7), torch.ones(4, 3, 3, 3)
    b = torch.ones(4) if "bias" in epilogue else None
    plain = ops.conv_block(x, w, None, None, *window, "", False)[0]
    r = torch.ones_like(plain) if "add" in epilogue else None
    out, winners, before = ops.conv_block(x, w, b, r, *window, epilogue, True)
    result = (before if before.numel() else out) if "relu" in epilogue else None
    first = [x, w, b, r]
    second = [torch.ones_like(out), x, w, result, winners]
    third = list(ops.pool(x, pools[0], True))
    for given in (first, second, third):
        given[draw.randrange(len(given))] = odd(given[draw.randrange(len(given))])
    needs = [draw.random() < 0.7 for _ in range(4)]
    for call in (
        lambda: ops.conv_block(*first, *window, epilogue, draw.random() < 0.5),
        lambda: ops.conv_block_backward(*second, *window, epilogue, needs),
        lambda: ops.pool_backward(*third, shape(x.shape), pools[0], draw.random() < 0.5),
        lambda: ops.pool(odd(x), draw.choice(pools), draw.random() < 0.5),
    ):
        try: call()
        except (NeocogError, RuntimeError, IndexError): refused += 1
print(refused)
"""


@pytest.mark.slow
def test_fuzzed_calls_are_refused_or_right_and_never_crash():
    calls = 150
    done = subprocess.run(
        [sys.executable, "-c", FUZZ, "1", str(calls)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) > calls, "most are wrong"
