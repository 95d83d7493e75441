"""What people expect of neocog.freeze: arguments, results, random numbers, refusals, copies."""

from __future__ import annotations

import copy
import io
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from border import alone, check, compiled, equal, left_alone, maps, net, programs, same_results
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import neocog
from neocog.errors import NeocogError, Unsupported

# ------------------------------------------------------------------------------------- arguments


class Scaled(nn.Module):
    """With positional, named and keyword-only arguments, numbers and None."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 1)

    def forward(
        self, x: Tensor, scale: float = 1.0, mask: Tensor | None = None, *, add: int = 0
    ) -> Tensor:
        y = torch.relu(self.a(x)) * scale + add
        return self.b(y if mask is None else y * mask)


MASK = (torch.arange(36.0).reshape(6, 6) % 2) + 0.5


@pytest.mark.parametrize("example", [
    lambda: maps(), lambda: (maps(), 2.0), lambda: [maps(), 2.0, None],
    lambda: {"x": maps(), "scale": 2.0}, lambda: {"x": maps(), "mask": MASK, "add": 1},
    lambda: (maps(1, 3, 9, 9),),
], ids=["tensor", "tuple", "list", "dict", "dict with a mask", "another size"])  # fmt: skip
def test_examples_and_calls(example: Callable[[], object]):
    """Whatever the example was, calls with other arguments are right as well."""
    model = Scaled().eval()
    fast = neocog.freeze(model, example())
    with torch.no_grad():
        for args, named in (
            ((maps(),), {}), ((maps(),), {"scale": 2.0}), ((maps(), 2.0), {}),
            ((maps(), 2, None), {"add": 3}), ((), {"x": maps(), "mask": MASK}),
            ((maps(), 0.5, MASK), {}), ((maps(), -1.5), {"mask": None}), ((maps(),), {"add": 1}),
        ):  # fmt: skip
            equal(fast(*args, **named), model(*args, **named))


def test_structured_arguments():
    """Lists, dicts and pairs of tensors."""

    def flow(m, pair, options):
        return m.b(torch.relu(m.a(pair[0] + pair[1]))) * options["gain"] + options["bias"]

    model = net(flow).eval()
    args = ([maps(), maps(seed=4)], {"gain": torch.tensor(2.0), "bias": 1.0})
    check(model, *args, way="freeze")


def test_several_tensors_of_other_types():
    """Integers index, booleans mask, doubles scale."""

    def flow(m, x, index, mask, scale):
        y = m.a(x)[:, index] * mask
        return y, (y.double() * scale).float()

    args = (maps(), torch.tensor([2, 0]), torch.ones(6, 6) > 0, torch.tensor(3.0).double())
    check(net(flow).eval(), *args, way="freeze")


def test_a_shape_is_no_example():
    """It says what was expected."""
    model = Scaled().eval()
    with pytest.raises(NeocogError, match=r"example: expected .*\(3, 64, 64\)"):
        neocog.freeze(model, (3, 64, 64))


@pytest.mark.parametrize("shape", [(2, 4, 8, 8), (2, 1, 8, 8), (4, 8, 8)])
def test_a_wrong_number_of_channels(shape: tuple[int, ...]):
    """Named beside the right one, at the call and as an example."""
    model = Scaled().eval()
    fast = neocog.freeze(model, maps())
    for call in (
        lambda: fast(maps(*shape)),
        lambda: neocog.freeze(model, maps(*shape))(maps(*shape)),
    ):
        with pytest.raises((NeocogError, RuntimeError), match=r"(?s)expected.*3 channels") as error:
            call()
        assert str(error.value).count("\n") == 0


# --------------------------------------------------------------------------------------- results

Pair = namedtuple("Pair", "first second")


@dataclass
class Output:
    """As detectors and transformers return them."""

    logits: Tensor
    features: tuple[Tensor, ...]
    scale: float = 2.0


STRUCTURES: dict[str, Callable[[Tensor, Tensor], object]] = {
    "dict": lambda y, z: {"y": y, "z": z, "n": 3},
    "namedtuple": lambda y, z: Pair(y, [z, None]),
    "nested": lambda y, z: [(y, {"a": [z, (y, 1.5, "s")]}), None, True],
    "ordered dict": lambda y, z: OrderedDict(out=y, aux=z),
    "return type": lambda y, z: torch.max(z, 1),
    "size": lambda y, z: (y, z.shape),
    "device and dtype": lambda y, z: (y, z.device, z.dtype),
    "list": lambda y, z: [y, z],
    "one of a tuple": lambda y, z: (y,),
}


@pytest.mark.parametrize("name", STRUCTURES)
@pytest.mark.parametrize("way", ["freeze", "compile"])
def test_structures_of_results(name: str, way: str):
    made = STRUCTURES[name]
    check(net(lambda m, x: made(m.a(x), torch.relu(m.b(m.a(x))))), maps(), way=way)


def test_a_dataclass():
    model = net(lambda m, x: Output(m.b(m.a(x)), (torch.relu(m.a(x)),))).eval()
    made = neocog.freeze(model, maps())(maps())
    with torch.no_grad():
        wanted = model(maps())
    assert type(made) is Output and made.scale == 2.0
    equal(made.logits, wanted.logits)
    same_results(made.features, wanted.features)


# --------------------------------------------------------------------- random numbers and values


RANDOM: dict[str, Callable[..., object]] = {
    "randn": lambda m, x: m.b(m.a(x) + torch.randn(2, 4, 6, 6)),
    "randn_like": lambda m, x: m.b((lambda y: y + torch.randn_like(y))(m.a(x))),
    "dropout": lambda m, x: m.b(F.dropout(torch.relu(m.a(x)), 0.5, training=True)),
    "dropout2d": lambda m, x: m.b(F.dropout2d(m.a(x), 0.5, training=True)),
    "uniform_": lambda m, x: m.b(m.a(x) * torch.empty(4, 1, 1).uniform_()),
    "randint": lambda m, x: m.a(x)[:, torch.randint(0, 4, (2,))],
    "bernoulli": lambda m, x: m.b(m.a(x) * torch.bernoulli(torch.full((2, 4, 1, 1), 0.5))),
    "rand_mask": lambda m, x: m.b(m.a(x)) * (torch.rand(2, 1, 1, 1) > 0.5),
    "before layers": lambda m, x: m.b(m.a(x + 0.1 * torch.randn_like(x))),
    "drawn in vain": lambda m, x: (torch.rand(3), m.b(m.a(x)))[1],
}


@pytest.mark.parametrize("name", RANDOM)
@pytest.mark.parametrize("way", ["freeze", "compile", "train"])
def test_random_numbers(name: str, way: str):
    """Eager's with the same seed, and fresh ones in the next call."""
    model = net(RANDOM[name])
    call = check(model, maps(), way=way)
    if name != "drawn in vain":
        torch.manual_seed(1)
        with torch.no_grad():
            results = [call(maps()) for _ in range(6)]
        assert any(not torch.equal(results[0], other) for other in results[1:])


VALUES: dict[str, Callable[..., object]] = {
    "branch": lambda m, x: m.a(x) if x.sum() > 0 else -m.a(x),
    "item": lambda m, x: m.b(m.a(x)) * x.abs().max().item(),
    "loop": lambda m, x: sum(m.a(x) for _ in range(int(x.sum() > 0) + 1)),
    "nonzero": lambda m, x: m.a(x)[:, :, :, torch.nonzero(x[0, 0, 0, :6] > 0)[:, 0]],
    "boolean index": lambda m, x: m.a(x)[:, (x.sum((0, 2, 3)) > -1e9).new_ones(4) > 0],
    "unique": lambda m, x: m.a(x).sum() * torch.unique(x.sign()).numel(),
    "numpy": lambda m, x: m.a(x) * float(x.numpy().max()),
}


@pytest.mark.parametrize("name", VALUES)
def test_control_flow_on_values(name: str):
    """Runs in PyTorch, is right for other values, and the report says why."""
    model = net(VALUES[name]).eval()
    fast = neocog.freeze(model, maps())
    with torch.no_grad():
        for x in (maps(), -maps(), maps().abs() + 2):
            equal(fast(x), model(x))


@pytest.mark.parametrize("name", ["branch", "item", "numpy"])
def test_what_cannot_be_captured(name: str):
    """Runs whole in PyTorch with the reason; ``strict`` raises."""
    model = net(VALUES[name]).eval()
    fast = neocog.freeze(model, maps())
    fast(maps())
    whole = neocog.report(fast)[0].whole
    assert whole and "\n" not in whole
    with left_alone(model), pytest.raises(Unsupported):
        neocog.freeze(model, maps(), strict=True)


def test_strict_takes_what_can_be_captured():
    fast = neocog.freeze(Scaled().eval(), maps(), strict=True)
    fast(maps())
    assert programs(fast) == 1


def test_an_error_of_the_model_is_the_models():
    """Raised when it is called, in its own words."""

    def flow(m, x):
        raise LookupError("no weights for this size")

    with pytest.raises(LookupError, match="no weights for this size"):
        neocog.freeze(net(flow).eval(), maps())(maps())


# -------------------------------------------------------------------------------------- gradients


def test_gradients_asked_of_a_frozen_model():
    """Right, or refused in one clear sentence; a result without a past would drop them."""
    model, x = Scaled().eval(), maps().requires_grad_()
    fast = neocog.freeze(model, maps())
    try:
        made = fast(x)
    except NeocogError as error:
        assert "gradient" in str(error) and "\n" not in str(error)
        return
    assert made.requires_grad
    made.square().sum().backward()
    own, x.grad = x.grad, None
    model(x).square().sum().backward()
    equal(own, x.grad, "gradient", 2e-5)


def test_no_gradients_asked():
    """Weights that need gradients do not make the results need them."""
    fast = neocog.freeze(Scaled().eval(), maps())
    assert not fast(maps()).requires_grad
    with torch.no_grad():
        assert not fast(maps().requires_grad_()).requires_grad


# ----------------------------------------------------------------------------------- other graphs


def with_norms() -> nn.Module:
    layers = (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 2, 1))
    torch.manual_seed(0)
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 3))
    model(maps())
    return model.eval().requires_grad_(False)


GRAPHS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "export": lambda m: torch.export.export(m, (maps(),)).module(),
    "decomposed": lambda m: torch.export.export(m, (maps(),)).run_decompositions().module(),
    "make_fx": lambda m: make_fx(m)(maps()),
    "make_fx of fakes": lambda m: make_fx(m, tracing_mode="fake", _allow_non_fake_inputs=True)(
        maps()
    ),
    "symbolic_trace": lambda m: torch.fx.symbolic_trace(m),
}


@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.parametrize("way", ["freeze", "compile"])
def test_graphs_of_pytorch(name: str, way: str):
    """ATen operators are compiled like any other."""
    model = with_norms()
    graph = GRAPHS[name](model)
    call = neocog.freeze(graph, maps()) if way == "freeze" else compiled(graph)
    with torch.no_grad():
        equal(call(maps()), model(maps()))
        equal(call(maps() + 1), model(maps() + 1))
    assert programs(call) == 1 and not neocog.report(call)[0].whole


def test_an_exported_graph_with_a_free_batch():
    model = with_norms()
    batch = torch.export.Dim("batch", min=1, max=64)
    graph = torch.export.export(model, (maps(),), dynamic_shapes=({0: batch},)).module()
    fast = neocog.freeze(graph, maps())
    with torch.no_grad():
        for n in (2, 3, 5):
            equal(fast(maps(n, 3, 8, 8)), model(maps(n, 3, 8, 8)))


# --------------------------------------------------------------------------- as one object of many


def test_a_readable_repr():
    """Short; with the model's name and what became of it."""
    text = repr(neocog.freeze(Scaled().eval(), maps()))
    assert "Scaled" in text and "object at 0x" not in text and len(text) < 2000


@pytest.mark.parametrize("copies", [
    copy.deepcopy, copy.copy, lambda fast: through_a_file(fast),
], ids=["deepcopy", "copy", "save and load"])  # fmt: skip
def test_copies(copies: Callable[[object], object]):
    """Weights and options go along, code is compiled anew; a deep copy's weights are its own."""
    model = Scaled().eval()
    fast = neocog.freeze(model, maps(), exact=True)
    twin = copies(fast)
    with torch.no_grad():
        wanted = model(maps())
        equal(twin(maps()), wanted)
        equal(twin(maps(1, 3, 9, 9), scale=2.0), model(maps(1, 3, 9, 9), scale=2.0))
        if copies is not copy.copy:
            model.a.weight.zero_()
            equal(twin(maps()), wanted)
    assert twin.exact is True


def through_a_file(fast: object) -> object:
    file = io.BytesIO()
    torch.save(fast, file)
    assert file.tell() < 200_000, "machine code or plans have been written"
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_inside_other_models():
    """nn.Sequential(fast, head) trains its head; the frozen part stays in eval mode."""
    model, head = with_norms(), nn.Linear(3, 2)
    whole = nn.Sequential(neocog.freeze(model, maps()), head)
    whole(maps()).square().sum().backward()
    assert head.weight.grad is not None
    assert {id(p) for p in head.parameters()} <= {id(p) for p in whole.parameters()}
    with torch.no_grad():
        equal(whole(maps()), head(model(maps())))
    for training in (True, False):
        whole.train(training)
        with torch.no_grad():
            equal(whole(maps()), head(model(maps())))
    assert "Linear" in repr(whole)


@pytest.mark.parametrize("backend", ["eager", "neocog"])
@alone
def test_frozen_and_compiled(backend: str):
    """torch.compile of a frozen model itself, and of one that holds it, under gradients."""
    model, head = with_norms(), nn.Linear(3, 2)
    fast = neocog.freeze(model, maps())
    torch._dynamo.reset()
    with torch.no_grad():
        equal(
            torch.compile(lambda x: fast(x).relu(), backend=backend)(maps()), model(maps()).relu()
        )
    made = torch.compile(lambda x: head(fast(x)), backend=backend)(maps())
    made.square().sum().backward()
    own = head.weight.grad.clone()
    head.zero_grad()
    head(model(maps())).square().sum().backward()
    equal(own, head.weight.grad, "gradient", 2e-5)
