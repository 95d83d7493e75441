"""neocog.freeze: results of compiled networks, their plans, and their reports."""

from __future__ import annotations

import copy
import threading

import numpy as np
import pytest
import tiny_networks as tn
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import neocog
from neocog import running
from neocog.errors import InvalidModel, Unsupported

BOUND = 5e-6
"""Of the largest value: what float32 in another order of sums, and Winograd, may differ by."""


def exact(model: nn.Module, *args: Tensor) -> list[Tensor]:
    """Eager in float64."""
    with torch.no_grad():
        return list(tn.leaves(copy.deepcopy(model).double()(*(a.double() for a in args))))


def near(result: object, expected: list[Tensor]) -> bool:
    """Every tensor within the bound, of the same shape, float32."""
    made = list(tn.leaves(result))
    return len(made) == len(expected) and all(
        a.shape == b.shape
        and a.dtype == torch.float32
        and bool(((a.double() - b).abs() <= BOUND * max(1e-3, b.abs().max())).all())
        for a, b in zip(made, expected, strict=True)
    )


def same(a: object, b: object) -> bool:
    """Bit by bit; NaN equals NaN."""
    pairs = list(zip(tn.leaves(a), tn.leaves(b), strict=True))
    return bool(pairs) and all(torch.equal(x.view(torch.int32), y.view(torch.int32))
                               for x, y in pairs)  # fmt: skip


@pytest.fixture(scope="module")
def frozen():
    """Every network of the table, frozen on contiguous maps."""
    return {name: neocog.freeze(tn.make(name), tn.images()) for name in tn.NETWORKS}


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("name", tn.NETWORKS)
def test_equals_eager(frozen, name, channels_last):
    """On both layouts, after a run on NaN: what it leaves in scratch must not matter."""
    x, model = tn.images(channels_last=channels_last), frozen[name]
    model(torch.full_like(x, float("nan")))
    result = model(x)
    assert near(result, exact(tn.make(name), x))
    assert same(result, model(x))
    for t in tn.leaves(result):
        if t.dim() == 4 and name != "foreign_layers":
            format = torch.channels_last if channels_last else torch.contiguous_format
            assert t.is_contiguous(memory_format=format)
        assert not t.requires_grad


@pytest.mark.parametrize("name", tn.NETWORKS)
def test_the_structure_is_that_of_the_model(frozen, name):
    x = tn.images()
    made, expected = frozen[name](x), tn.make(name)(x)
    assert torch.utils._pytree.tree_structure(made) == torch.utils._pytree.tree_structure(expected)


@pytest.mark.parametrize("name", ["chain", "concatenation", "winograd", "pools"])
def test_many_sizes_through_one(frozen, name):
    for batch, side in ((1, 4), (5, 12), (3, 10), (0, 12), (2, 12)):
        x = tn.images(batch, side)
        assert (
            near(frozen[name](x), exact(tn.make(name), x))
            if batch
            else all(
                t.shape == u.shape
                for t, u in zip(
                    tn.leaves(frozen[name](x)), tn.leaves(tn.make(name)(x)), strict=True
                )
            )
        ), (batch, side)


@pytest.mark.parametrize("name", ["squeeze_and_excite", "separable", "shared_weights", "winograd"])
def test_threads_do_not_change_a_bit(frozen, name):
    x, results = tn.images(4, 24), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(frozen[name](x))
    assert same(*results)


def test_two_callers_at_once(frozen):
    model, inputs = frozen["concatenation"], [tn.images(1 + i, 12) * (i + 1) for i in range(2)]
    expected, wrong = [model(x) for x in inputs], []

    def call(i: int) -> None:
        torch.set_num_threads(1)
        for _ in range(30):
            if not same(model(inputs[i]), expected[i]):
                wrong.append(i)

    callers = [threading.Thread(target=call, args=(i,)) for i in range(2)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


def test_callers_with_more_shapes_than_are_kept():
    """One drops plans while another looks them up."""
    model, sides = (
        neocog.freeze(tn.make("pools"), tn.images()),
        range(8, 8 + running.PLANS_KEPT + 4),
    )
    expected, right = {side: model(tn.images(1, side)) for side in sides}, []

    def call() -> None:
        for side in sides:
            right.append(same(model(tn.images(1, side)), expected[side]))

    callers = [threading.Thread(target=call) for _ in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert right == [True] * 3 * len(sides)
    assert len(model.plans) == running.PLANS_KEPT


def test_two_callers_with_a_new_shape():
    """One makes the plan, the other waits for it."""
    model, results = neocog.freeze(tn.make("vectors"), tn.images()), []
    x = tn.images(3, 8)

    def call() -> None:
        results.append(model(x))

    callers = [threading.Thread(target=call) for _ in range(2)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(results) == 2
    assert all(near(r, exact(tn.make("vectors"), x)) for r in results)


def test_plans_are_bounded():
    model = neocog.freeze(nn.Sequential(tn.conv(3, 4), nn.ReLU()).eval(), tn.images())
    for side in range(1, running.PLANS_KEPT + 4):
        model(tn.images(1, side))
    assert len(model.plans) == running.PLANS_KEPT
    assert len(model.weights.packed) == 1, "weights are packed anew for each size"


def test_weights_are_packed_once_for_all_sizes():
    model = tn.ready(nn.Sequential(tn.conv(3, 32), nn.ReLU(), nn.Conv2d(32, 48, 3, 2), nn.ReLU()))
    frozen = neocog.freeze(model, tn.images())
    for side in (7, 16, 31, 64, 90):
        x = tn.images(2, side)
        assert near(frozen(x), exact(model, x))
    algorithms = {(key.weight, key.algorithm) for key in frozen.weights.packed}
    assert len(frozen.weights.packed) == len(algorithms)


def test_training_mode_is_refused():
    model = tn.make("chain")
    model[1].train()
    with pytest.raises(InvalidModel, match=r"eval\(\)"):
        neocog.freeze(model, tn.images())


def test_a_model_trained_after_freezing():
    """A new shape would run its batch norms on the batch and change their statistics."""
    model = tn.make("chain")
    made = neocog.freeze(model, tn.images())
    model.train()
    with pytest.raises(InvalidModel, match=r"eval\(\)"):
        made(tn.images(3))


@pytest.mark.parametrize("bad", [None, 3.0, np.zeros((1, 3, 4, 4), np.float32)])
def test_arguments_that_are_no_tensors(frozen, bad):
    """The model refuses them in its own words."""
    with pytest.raises(TypeError, match="conv2d"):
        frozen["chain"](bad)


def test_arguments_of_wrong_shape(frozen):
    with pytest.raises(RuntimeError):
        frozen["chain"](tn.images(channels=4))


def test_double_runs_in_pytorch():
    model = tn.make("residual_add_relu").double()
    x = tn.images().double()
    made = neocog.freeze(model, x)
    with torch.no_grad():
        assert torch.equal(made(x), model(x))
    (report,) = neocog.report(made)
    assert report.programs == 0
    assert report.share == 0
    assert any("float64" in h.reason for h in report.handed_back)


def test_double_weights_are_refused_as_in_pytorch():
    model = nn.Sequential(tn.conv(3, 4), tn.conv(4, 4).double()).eval()
    with pytest.raises(RuntimeError):
        neocog.freeze(model, tn.images())(tn.images())


@pytest.mark.parametrize("name", ["chain", "foreign_layers"])
def test_inference_mode(name):
    """Frozen, called and given tensors made in inference mode."""
    expected = exact(tn.make(name), tn.images())
    with torch.inference_mode():
        x = tn.images()
        made = neocog.freeze(tn.make(name), x)
        assert near(made(x), expected)
    assert near(made(x), expected)
    assert near(made(tn.images()), expected)


def test_arguments_that_need_gradients(frozen):
    """PyTorch computes them, of the arguments and of the weights."""
    model, x = tn.make("chain"), tn.images().requires_grad_()
    made = neocog.freeze(model, tn.images())
    made(x).sum().backward()
    (expected,) = torch.autograd.grad(model(x).sum(), x)
    assert torch.equal(x.grad, expected)
    with torch.no_grad():
        assert not frozen["chain"](x).requires_grad


def test_strided_arguments(frozen):
    """Views with gaps, transposed and expanded, are packed like any other."""
    wide = torch.randn(2, 3, 12, 40, generator=torch.Generator().manual_seed(5))
    for x in (wide[:, :, :, 3:35:2], wide.transpose(2, 3)[:, :, :12, :],
              wide[:1, :, :, :16].expand(3, 3, 12, 16)):  # fmt: skip
        assert near(frozen["residual_add_relu"](x), exact(tn.make("residual_add_relu"), x))


@pytest.mark.parametrize("name", tn.NETWORKS)
def test_results_are_fresh(frozen, name):
    x = tn.images()
    first = frozen[name](x)
    kept = [t.clone() for t in tn.leaves(first)]
    frozen[name](x + 1)
    assert same(first, kept)
    own = {t.untyped_storage().data_ptr() for t in tn.leaves(first)}
    assert len(own) == len(kept), "two results share memory"
    assert torch.equal(x, tn.images()), "the argument has been written to"


def test_the_model_is_left_alone():
    model = tn.make("chain")
    before = {n: (id(t), t.clone()) for n, t in model.state_dict(keep_vars=True).items()}
    neocog.freeze(model, tn.images())(tn.images())
    after = model.state_dict(keep_vars=True)
    assert {n: id(t) for n, t in after.items()} == {n: i for n, (i, _) in before.items()}
    assert all(torch.equal(after[n], t) for n, (_, t) in before.items())


def test_a_counter_of_the_model_counts():
    """What a model writes to its own buffers, a frozen model writes too."""

    def flow(m, x):
        m.calls += 1
        return F.relu(m.first(x))

    model = tn.Net(flow, first=tn.conv(3, 4)).eval()
    model.register_buffer("calls", torch.zeros(()))
    made = neocog.freeze(model, tn.images())
    made(tn.images())
    made(tn.images())
    assert model.calls.item() == 2


def test_a_buffer_that_the_model_replaces():
    """It does so in every call: a graph cannot, PyTorch runs the model."""

    def flow(m, x):
        m.calls = m.calls + 1
        return m.first(x)

    model = tn.Net(flow, first=tn.conv(3, 4)).eval()
    model.register_buffer("calls", torch.zeros(()))
    with pytest.raises(Unsupported, match="calls"):
        neocog.freeze(model, tn.images(), strict=True)
    made = neocog.freeze(model, tn.images())
    assert model.calls.item() == 0
    made(tn.images())
    made(tn.images())
    assert model.calls.item() == 2


def test_an_argument_that_the_model_writes():
    """nn.ReLU(inplace=True) on the argument changes the caller's tensor, as in PyTorch."""
    model = nn.Sequential(nn.ReLU(inplace=True), tn.conv(3, 4)).eval()
    made, x = neocog.freeze(model, tn.images()), tn.images()
    expected = exact(model, tn.images().relu())
    assert near(made(x), expected)
    assert torch.equal(x, tn.images().relu())


def test_values_and_their_foreign_writes_in_order():
    def flow(m, x):
        y = m.first(x)
        y.mul_(2.0)
        z = F.relu(y)
        return torch.cos(z) + z, y

    model = tn.ready(tn.Net(flow, first=tn.conv(3, 4)))
    x = tn.images()
    assert near(neocog.freeze(model, x)(x), exact(model, x))


def test_several_arguments():
    def flow(m, x, gate, other):
        return F.relu(m.first(x) * gate), m.first(other) + gate

    model = tn.ready(tn.Net(flow, first=tn.conv(3, 19)))
    args = (tn.images(), torch.randn(2, 19, 1, 1), tn.images(2, 6))
    assert near(neocog.freeze(model, args)(*args), exact(model, *args))
    assert near(neocog.freeze(model, list(args))(args[0], args[1], args[0]),
                exact(model, args[0], args[1], args[0]))  # fmt: skip


def test_outputs_that_nothing_computes():
    """An argument, a parameter, a constant and one result twice come back as they are."""

    def flow(m, x):
        y = m.first(x)
        return x, m.first.bias, None, 3, (y, y)

    model, x = tn.ready(tn.Net(flow, first=tn.conv(3, 4))), tn.images()
    made = neocog.freeze(model, x)(x)
    assert made[0] is x
    assert torch.equal(made[1], model.first.bias)
    assert made[2:4] == (None, 3)
    assert made[4][0] is made[4][1]


def test_maps_of_one_pixel():
    model = tn.ready(nn.Sequential(tn.conv(19, 8), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(),
                                   nn.Linear(8, 5), nn.Sigmoid()))  # fmt: skip
    x = torch.randn(3, 19, 1, 1)
    for y in (x, x.contiguous(memory_format=torch.channels_last)):
        assert near(neocog.freeze(model, y)(y), exact(model, y))


def test_flatten_keeps_pytorchs_order():
    """Height, width and channels in the order of the weights of the linear layer that follows."""
    for layers in ((), (nn.ReLU(),), (tn.conv(3, 5),), (nn.MaxPool2d(2),)):
        model, x = nn.Sequential(*layers, nn.Flatten()).eval(), tn.images(channels_last=True)
        made = neocog.freeze(model, x)
        for y in (x, tn.images()):
            assert near(made(y), exact(model, y))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_not_numbers_pass_as_in_pytorch(value):
    """Every result that is NaN or infinite in PyTorch is so here, and no other."""
    model = tn.ready(nn.Sequential(tn.conv(3, 19), nn.BatchNorm2d(19), nn.ReLU(), nn.MaxPool2d(2),
                                   tn.conv(19, 8), nn.LeakyReLU(), nn.AvgPool2d(2)))  # fmt: skip
    x = tn.images(side=16)
    x[0, 1, 7, 9] = value
    for y in (x, x.contiguous(memory_format=torch.channels_last)):
        made, eager = neocog.freeze(model, y, exact=True)(y), model(y)
        finite = torch.isfinite(eager)
        assert not finite.all()
        assert torch.equal(torch.isnan(made), torch.isnan(eager))
        assert torch.equal(torch.isfinite(made), finite)
        assert torch.equal(made[~finite & ~eager.isnan()], eager[~finite & ~eager.isnan()])


@pytest.mark.parametrize("function", [F.relu, F.relu6, F.silu, F.hardswish, F.hardsigmoid, F.gelu,
                                      F.leaky_relu, torch.sigmoid, torch.tanh])  # fmt: skip
def test_activations_at_the_ends(function):
    """Alone and behind a 1x1 convolution that copies its input."""
    ends = [0.0, -0.0, 1e-40, -1e-40, 2e37, -2e37, -float("inf"), float("nan"), -90.0, 90.0, -3.0,
            3.0, 6.0, 1e-3]  # fmt: skip
    x = torch.tensor(ends).reshape(1, 1, 2, 7)
    identity = nn.Conv2d(1, 1, 1, bias=False)
    nn.init.ones_(identity.weight)
    for layers in ({}, {"c": identity}):
        model = tn.Net(lambda m, x, has=bool(layers): function(m.c(x) if has else x), **layers)
        made, expected = neocog.freeze(model.eval(), x)(x), function(x.double()).float()
        torch.testing.assert_close(made, expected, rtol=2e-6, atol=1e-37, equal_nan=True)


def test_exact_keeps_to_the_definition():
    """Whole numbers: sums are exact in any order, but not through Winograd's fractions."""
    model, x = nn.Sequential(tn.conv(32, 32, bias=False)).eval(), torch.zeros(1, 32, 16, 16)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        x.copy_(torch.randint(-4, 5, x.shape, generator=generator))
        w = model[0].weight
        w.copy_(torch.randint(-4, 5, w.shape, generator=generator))
        assert torch.equal(neocog.freeze(model, x, exact=True)(x), model(x))


def test_autocast():
    """PyTorch runs the model, in the data type it asks for."""
    x, model = tn.images(), tn.make("chain")
    made = neocog.freeze(model, x)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert torch.equal(made(x), model(x))
        assert made(x).dtype == torch.bfloat16


def test_values_decide():
    model = tn.ready(tn.Net(tn.looks_at_values, first=tn.conv(3, 4)))
    with pytest.raises(Unsupported, match="values"):
        neocog.freeze(model, tn.images(), strict=True)
    made = neocog.freeze(model, tn.images())
    (report,) = neocog.report(made)
    assert "values" in report.whole
    for x in (tn.images(), -tn.images()):
        assert torch.equal(made(x), model(x))
