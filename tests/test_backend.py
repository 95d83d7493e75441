"""torch.compile(model, backend="neocog"): weights stay live, and nothing is wrong in silence."""

from __future__ import annotations

import copy
import gc
import os
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator

import pytest
import tiny_networks as tn
import torch
from torch import Tensor, nn

import neocog
from neocog.errors import Unsupported
from neocog.parameters import Live

BOUND = 5e-6
"""Of the largest value, as in test_freezing."""


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    """Dynamo counts recompilations over all models of a process."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def right(compiled: Callable[..., object], model: nn.Module, *args: Tensor) -> bool:
    """Whether the compiled model gives now what the model gives in float64."""
    with torch.no_grad():
        made = list(tn.leaves(compiled(*args)))
        expected = list(tn.leaves(copy.deepcopy(model).double()(*(a.double() for a in args))))
    return len(made) == len(expected) and all(
        a.shape == b.shape and (a.double() - b).abs().max() <= BOUND * max(1e-3, b.abs().max())
        for a, b in zip(made, expected, strict=True)
    )


def every_layer() -> nn.Module:
    """One of each sort of parameter; nothing hides a change of any of them."""
    torch.manual_seed(0)
    return tn.ready(
        nn.Sequential(
            tn.conv(3, 16), nn.BatchNorm2d(16), nn.SiLU(), tn.conv(16, 16),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5),
        )
    )  # fmt: skip


def test_found_by_its_entry_point():
    """In a process that has not imported neocog."""
    program = (
        "import sys, torch; torch.set_num_threads(1); m = torch.nn.ReLU();"
        "assert 'neocog' not in sys.modules;"
        "c = torch.compile(m, backend='neocog', fullgraph=True);"
        "print(c(torch.tensor([[-1., 2.]])).tolist());"
        "assert 'neocog.backend' in sys.modules"
    )
    made = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True,
                          check=False, env=os.environ | {"OMP_WAIT_POLICY": "PASSIVE"})  # fmt: skip
    assert made.returncode == 0, made.stderr
    assert made.stdout.split() == ["[[0.0,", "2.0]]"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"options": {"fast": True}}, "fast.*exact.*strict"),
        ({"mode": "max-autotune"}, "max-autotune"),
    ],
)
def test_options_it_does_not_know(given, message):
    compiled = torch.compile(nn.ReLU(), backend="neocog", **given)
    with pytest.raises(Exception, match=message), torch.no_grad():
        compiled(torch.ones(2, 2))


def test_every_way_to_change_weights():
    """One compiled model; after each change its result is the model's, to the bit's bound."""
    model, x = every_layer(), tn.images()
    compiled = torch.compile(model, backend="neocog", fullgraph=True)
    first, norm, linear = model[0], model[1], model[6]
    other = copy.deepcopy(model.state_dict())
    for t in other.values():
        if t.is_floating_point():
            t.mul_(0.75)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step() -> None:
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    def element(t: Tensor) -> Callable[[], None]:
        def change() -> None:
            t.detach().numpy().reshape(-1)[-1] += 2.0

        return change

    def in_place() -> None:
        with torch.no_grad():
            first.weight.mul_(0.5)

    def same_memory() -> None:
        w = model[3].weight
        w.data = w.data.as_strided(w.shape, (16 * 9, 1, 3 * 16, 16))

    changes: dict[str, Callable[[], object]] = {
        "nothing": lambda: None,
        "in place": in_place,
        "data": lambda: first.weight.data.add_(0.1),
        "one weight": element(first.weight),
        "one bias": element(first.bias),
        "one weight of linear": element(linear.weight),
        "one bias of linear": element(linear.bias),
        "one mean": element(norm.running_mean),
        "one variance": element(norm.running_var),
        "one scale": element(norm.weight),
        "one shift": element(norm.bias),
        "state dict": lambda: model.load_state_dict(other),
        "optimizer": step,
        "parameter replaced": lambda: setattr(
            first, "weight", nn.Parameter(torch.randn_like(first.weight))
        ),
        "storage replaced": lambda: setattr(
            model[3].weight, "data", torch.randn_like(model[3].weight)
        ),
        "channels_last weights": lambda: model.to(memory_format=torch.channels_last),
        "contiguous weights": lambda: model.to(memory_format=torch.contiguous_format),
        "same memory, other strides": same_memory,
        "eps": lambda: setattr(norm, "eps", 0.5),
    }
    previous = None
    for name, change in changes.items():
        change()
        assert right(compiled, model, x), name
        with torch.no_grad():
            result = compiled(x)
            assert torch.equal(result, compiled(x)), name
        if name not in ("nothing", "channels_last weights", "contiguous weights"):
            assert not torch.equal(result, previous), f"{name}: the change changes nothing"
        previous = result
    assert neocog.report(compiled), "the report is still there"


def test_weights_in_new_tensors_at_old_addresses():
    model, x = every_layer(), tn.images()
    compiled = torch.compile(model, backend="neocog")
    for i in range(5):
        model[0].weight = None  # its memory is given back before the next is made
        gc.collect()
        torch.manual_seed(i)
        model[0].weight = nn.Parameter(torch.randn(16, 3, 3, 3))
        assert right(compiled, model, x), i


def test_dynamic_sizes():
    model = tn.make("chain")
    compiled = torch.compile(model, backend="neocog", dynamic=True, fullgraph=True)
    for batch, side in ((2, 12), (3, 16), (1, 8), (2, 12)):
        for channels_last in (False, True):
            assert right(compiled, model, tn.images(batch, side, channels_last))


@pytest.mark.parametrize("name", ["concatenation", "two_outputs", "in_place", "foreign_layers"])
def test_networks(name):
    model, x = tn.make(name), tn.images(channels_last=True)
    compiled = torch.compile(model, backend="neocog")
    for _ in range(2):
        assert right(compiled, model, x)
    (report,) = neocog.report(compiled)
    assert bool(report.handed_back) == (name == "foreign_layers")
    assert not report.whole


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_modes_without_gradients(mode):
    model, x = tn.make("foreign_layers"), tn.images()
    compiled = torch.compile(model, backend="neocog", fullgraph=True)
    with mode():
        for a, b in zip(compiled(x), model(x), strict=True):
            assert torch.allclose(a, b, atol=1e-5)
            assert not a.requires_grad


def functions_behind(result: Tensor) -> list[str]:
    """The names of the functions that autograd will call for ``result``."""
    found, waiting = set(), [result.grad_fn]
    while waiting:
        function = waiting.pop()
        if function is not None and function not in found:
            found.add(function)
            waiting += [f for f, _ in function.next_functions]
    return [f.name() for f in found]


def test_gradients_come_from_our_kernels():
    """Outside no_grad the layers are stages of programs, and their gradients are PyTorch's."""
    model, x = every_layer(), tn.images()
    compiled = torch.compile(model, backend="neocog")
    expected, result = model(x), compiled(x)
    assert torch.allclose(result, expected, atol=1e-6)
    names = functions_behind(result)
    assert names.count("_RunBackward") == 2, "before the SiLU and behind it"
    assert not any("Convolution" in name or "BatchNorm" in name for name in names)
    result.sum().backward()
    own = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    expected.sum().backward()
    assert all(torch.allclose(a, p.grad, atol=1e-4)
               for a, p in zip(own, model.parameters(), strict=True))  # fmt: skip
    (report,) = neocog.report(compiled)
    assert report.programs == 2
    assert not report.whole
    assert any("gradient of silu" in h.reason for h in report.handed_back)
    assert right(compiled, model, x)
    assert any(r.programs == 1 for r in neocog.report(compiled))


def test_strict_raises():
    """For what has to run in PyTorch as a whole, with gradients and without; for nothing less."""
    options = {"strict": True}
    model, x = every_layer(), tn.images()
    compiled = torch.compile(model, backend="neocog", options=options)
    assert right(compiled, model, x)
    assert "_RunBackward" in functions_behind(compiled(x))
    for gradients in (True, False):
        compiled = torch.compile(model, backend="neocog", options=options)
        with (
            torch.set_grad_enabled(gradients), torch.autocast("cpu", torch.bfloat16),
            pytest.raises(Unsupported, match="autocast"),
        ):  # fmt: skip
            compiled(x)


def test_writes_to_shared_memory_stay_where_they_are():
    model = tn.ready(tn.Net(tn.writes_to_a_view, first=tn.conv(3, 4)))
    compiled = torch.compile(model, backend="neocog")
    assert right(compiled, model, tn.images())
    (report,) = neocog.report(compiled)
    assert report.programs == 1
    assert any("shares" in h.reason for h in report.handed_back)


def test_values_cut_the_graph():
    """Dynamo cuts the model where it looks at values: both sides are right."""
    model = tn.ready(tn.Net(tn.looks_at_values, first=tn.conv(3, 4)))
    compiled = torch.compile(model, backend="neocog")
    for x in (tn.images(), -tn.images()):
        assert right(compiled, model, x)


def test_autocast_is_handed_back():
    """The dtype of the result is eager's."""
    model, x = tn.make("winograd"), tn.images()
    compiled = torch.compile(model, backend="neocog")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert compiled(x).dtype == model(x).dtype == torch.bfloat16
    assert right(compiled, model, x)


def test_other_dtypes():
    model = tn.make("residual_add_relu").double()
    x = tn.images().double()
    compiled = torch.compile(model, backend="neocog")
    with torch.no_grad():
        assert torch.equal(compiled(x), model(x))


def test_a_model_that_trains_in_between():
    """In training mode batch norms count; afterwards the new statistics are used."""
    model, x = every_layer(), tn.images()
    compiled = torch.compile(model, backend="neocog")
    assert right(compiled, model, x)
    model.train()
    with torch.no_grad():
        before = model[1].running_mean.clone()
        compiled(x)
    assert not torch.equal(model[1].running_mean, before)
    model.eval()
    assert right(compiled, model, x)


def test_after_a_reset_of_dynamo():
    model, x = every_layer(), tn.images()
    compiled = torch.compile(model, backend="neocog")
    assert right(compiled, model, x)
    torch._dynamo.reset()
    model[0].weight.data.mul_(2)
    assert right(compiled, model, x)


def test_inputs_are_not_kept():
    """After a call nothing holds its pictures."""
    model, x = tn.make("residual_add_relu"), tn.images()
    compiled = torch.compile(model, backend="neocog")
    with torch.no_grad():
        compiled(x)
        compiled(x)
    gone = weakref.ref(x)
    del x
    gc.collect()
    assert gone() is None


def test_live_parameters_know_what_changed():
    """A change of one tensor makes nothing anew that comes from others."""
    model = every_layer()
    frozen = neocog.freeze(model, [tn.images()])
    live = Live(dict(frozen.weights.tensors), frozen.weights.target)
    kept = [live.packed_for(key) for key in frozen.weights.packed]
    live.refresh({})
    for t in kept:
        t.fill_(7.0)
    with torch.no_grad():
        model[3].weight[0, 0, 0, 0] += 1
    live.refresh({})
    untouched = [bool((t == 7.0).all()) for t in kept]
    assert sorted(untouched) == [False, True]


@pytest.mark.parametrize("training", [False, True])
def test_blocks_of_neocog_nn_are_compiled_with_the_rest(training: bool):
    """Its operators are told in PyTorch's, and fused like anybody's."""
    torch.manual_seed(0)
    model = nn.Sequential(
        neocog.nn.ConvBlock(3, 8, 3, padding=1, activation="relu", pool=neocog.nn.MaxPool2d(2)),
        neocog.nn.Conv2d(8, 4, 3, padding="same"), neocog.nn.AvgPool2d(2),
    ).train(training)  # fmt: skip
    expected, x = copy.deepcopy(model), torch.randn(2, 3, 12, 12)
    compiled = torch.compile(model, backend="neocog")
    with torch.set_grad_enabled(training):
        made, wanted = compiled(x), expected(x)
    torch.testing.assert_close(made, wanted, rtol=1e-5, atol=1e-6)
    (report,) = neocog.report(compiled)
    assert report.programs == 1 and not report.handed_back
    if training:
        for out in (made, wanted):
            out.pow(2).sum().backward()
        for p, q in zip(model.parameters(), expected.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-5)
