"""Tensors that are not plain memory, or no longer the value they were."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable

import kernel_tools as kt
import pytest
import torch
import torch.nn.functional as F
from border import alone, check, compiled, equal, inference, maps, net, same_results, ways
from torch import Tensor, nn
from torch.func import functional_call
from torch.testing._internal.two_tensor import TwoTensor

import neocog
import neocog.functional as NF


@ways
@alone
def test_data_attribute(way: str):
    """``.data`` is a value without a past: what made it gets no gradient."""
    check(net(lambda m, x: m.b(torch.relu(m.a(x)).data)), maps(), way=way)


@alone
def test_data_beside_the_value_itself():
    def flow(m, x):
        y = torch.relu(m.a(x))
        return m.b(y) * torch.sigmoid(m.b(y.data)), m.a.weight.data.sum()

    check(net(flow), maps().requires_grad_(), way="train")


@alone
def test_data_that_is_written():
    """A write through ``.data`` changes the map, unseen by autograd."""

    def flow(m, x):
        y = m.a(x)
        y.data.mul_(0.5)
        return m.b(y)

    check(net(flow), maps().requires_grad_(), way="train")


# ------------------------------------------------------------------------------- tensor subclasses


def layers() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()


def two(t: Tensor) -> TwoTensor:
    """A pair of tensors without storage of its own."""
    return TwoTensor(t.detach().clone(), t.detach() * 2)


def same_pairs(made: object, wanted: object) -> None:
    assert isinstance(made, TwoTensor) and isinstance(wanted, TwoTensor)
    for name in ("a", "b"):
        equal(getattr(made, name).detach(), getattr(wanted, name).detach(), name)


@ways
@alone
def test_an_input_that_is_a_subclass(way: str):
    model, x = layers(), maps()
    call = neocog.freeze(model, x) if way == "freeze" else compiled(model)
    with torch.set_grad_enabled(way == "train"):
        same_pairs(call(two(x)), model(two(x)))


@ways
@alone
def test_a_weight_that_is_a_subclass(way: str):
    model, x = layers(), maps()
    model[0].weight = nn.Parameter(two(model[0].weight))
    call = neocog.freeze(model, x) if way == "freeze" else compiled(model)
    with torch.set_grad_enabled(way == "train"):
        same_pairs(call(x), model(x))


@alone
def test_functional_on_a_subclass():
    model, x = layers(), maps()
    made = NF.conv2d(two(x), model[0].weight)
    same_pairs(made, F.conv2d(two(x), model[0].weight))


@ways
@alone
def test_a_subclass_that_only_has_a_name(way: str):
    """``class Picture(Tensor): pass`` is plain memory; the result's type is PyTorch's."""
    model, x = layers(), maps().as_subclass(Picture)
    call = neocog.freeze(model, x) if way == "freeze" else compiled(model)
    with torch.set_grad_enabled(way == "train"):
        made, wanted = call(x), model(x)
    assert type(made) is type(wanted)
    equal(made.as_subclass(Tensor), wanted.as_subclass(Tensor))


class Picture(Tensor):
    """A tensor by another name."""


def in_a_process_group() -> None:
    """DTensor and FSDP2, compiled: what PyTorch gives."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

    logging.getLogger("neocog").setLevel("ERROR")  # it says that PyTorch computes on DTensors
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    mesh = init_device_mesh("cpu", (1,))
    wanted = layers()(maps())
    model = layers()
    for layer in (model[0], model[2]):
        for name in ("weight", "bias"):
            whole = distribute_tensor(getattr(layer, name).data, mesh, [Replicate()])
            setattr(layer, name, nn.Parameter(whole))
    made = compiled(model)(distribute_tensor(maps(), mesh, [Replicate()]))
    assert isinstance(made, DTensor)
    equal(made.full_tensor(), wanted)
    model, eager = layers(), layers()
    fully_shard(model, mesh=mesh)
    made = compiled(model)(maps())
    equal(made, wanted)
    made.square().sum().backward()
    eager(maps()).square().sum().backward()
    for p, q in zip(model.parameters(), eager.parameters(), strict=True):
        equal(p.grad.full_tensor(), q.grad, "gradient", 2e-5)
    dist.destroy_process_group()


@pytest.mark.slow
def test_sharded_models():
    """In an interpreter of its own: the group of processes is the whole process's."""
    kt.in_child("test_border_memory", "in_a_process_group", PYTHONWARNINGS="ignore",
                TORCH_LOGS="-all", TORCH_CPP_LOG_LEVEL="ERROR")  # fmt: skip


# ------------------------------------------------------------------------------ bits and storage


def negative(shape: tuple[int, ...]) -> Tensor:
    """Numbers of which memory holds the negatives."""
    made = torch.complex(maps(*shape), maps(*shape, seed=4)).conj().imag
    assert made.is_neg()
    return made


@ways
def test_a_weight_with_the_negative_bit(way: str):
    model, x = nn.Conv2d(3, 4, 3, bias=False), maps()
    model.weight = nn.Parameter(negative((4, 3, 3, 3)), requires_grad=way == "train")
    wanted = F.conv2d(x, model.weight.detach().resolve_neg())
    call = neocog.freeze(model.eval(), x) if way == "freeze" else compiled(model)
    equal(call(x).detach(), wanted)


@ways
def test_an_input_with_the_negative_bit(way: str):
    model, x = layers(), negative((2, 3, 8, 8))
    wanted = model(x.resolve_neg()).detach()
    call = neocog.freeze(model, maps()) if way == "freeze" else compiled(model)
    with torch.set_grad_enabled(way == "train"):
        made = call(x)
    equal(made.detach(), wanted)


def test_an_intermediate_with_the_negative_bit():
    def flow(m, x):
        y = torch.view_as_complex(m.a(x).unflatten(3, (3, 2))).conj().imag
        return m.b(y)

    for way in ("freeze", "compile", "train"):
        check(net(flow), maps(), way=way)


@inference
@alone
def test_an_expanded_scalar_and_a_view_of_nothing(way: str):
    """Strides of zero, an offset into a storage, a batch of none."""
    model = layers()
    base = maps(5, 7, 9, 11)
    for x in (torch.ones(1, 1, 1, 1).expand(2, 3, 8, 8), base[1:3, 2:5, 1:, 3:], base[:0, :3]):
        call = neocog.freeze(model, x) if way == "freeze" else compiled(model)
        with torch.no_grad():
            equal(call(x), model(x))


@alone
def test_meta_and_fake_tensors():
    """Shapes without data give shapes, from PyTorch; never a read."""
    from torch._subclasses import FakeTensorMode

    model = layers()
    frozen = neocog.freeze(model, maps())
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        made = frozen(mode.from_tensor(maps()))
    assert made.shape == (2, 4, 6, 6) and isinstance(made, torch._subclasses.FakeTensor)


# ------------------------------------------------------------------------------------- transforms


def pooled(w: Tensor, x: Tensor) -> Tensor:
    return F.max_pool2d(F.relu(F.conv2d(x, w)), 2).sum()


def means(w: Tensor, x: Tensor) -> Tensor:
    return F.conv2d(x, w).mean((2, 3))


TRANSFORMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "vmap of grad": lambda w, x: torch.func.vmap(
        torch.func.grad(lambda w, x: pooled(w, x[None])), (None, 0)
    )(w, x),
    "vmap": lambda w, x: torch.func.vmap(lambda w, x: pooled(w, x[None]), (None, 0))(w, x),
    "grad": lambda w, x: torch.func.grad(pooled)(w, x),
    "jvp": lambda w, x: torch.func.jvp(lambda w: pooled(w, x), (w,), (w,))[1],
    "vjp": lambda w, x: torch.func.vjp(lambda w: pooled(w, x), w)[1](torch.ones(()))[0],
    "jacrev": lambda w, x: torch.func.jacrev(lambda w: means(w, x))(w),
    "jacfwd": lambda w, x: torch.func.jacfwd(lambda w: means(w, x))(w),
    "hessian": lambda w, x: torch.func.hessian(lambda w: F.conv2d(x, w).tanh().sum())(w[:1]),
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@alone
def test_transforms_inside(transform: Callable[[Tensor, Tensor], Tensor]):
    """Dynamo inlines them: what arrives are wrappers of functorch."""
    w, x = maps(4, 3, 3, 3), maps(2, 3, 8, 7)
    made = compiled(transform)(w, x)
    equal(made, transform(w, x), bound=2e-5)


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@alone
def test_transforms_with_layers_around(transform: Callable[[Tensor, Tensor], Tensor]):
    """A layer before and one behind, so that there is something to compile."""

    def whole(w: Tensor, x: Tensor) -> Tensor:
        y = F.relu(F.conv2d(x, w[:3], padding=1))
        return transform(w, y).sum() + F.conv2d(y, w).square().sum()

    w, x = maps(4, 3, 3, 3), maps(2, 3, 8, 7)
    equal(compiled(whole)(w, x), whole(w, x), bound=2e-5)


def of_a_call(name: str) -> Callable[[Callable[[Tensor], Tensor], Tensor], object]:
    return {
        "vmap": lambda f, x: torch.func.vmap(lambda y: f(y[None])[0])(x),
        "jvp": lambda f, x: torch.func.jvp(f, (x,), (x * 0.5,)),
        "grad": lambda f, x: torch.func.grad(lambda y: f(y).square().sum())(x),
        "vjp": lambda f, x: torch.func.vjp(f, x)[1](torch.ones(2, 4, 6, 6))[0],
        "forward-mode": forward_mode,
    }[name]


def forward_mode(f: Callable[[Tensor], Tensor], x: Tensor) -> object:
    import torch.autograd.forward_ad as forward

    with forward.dual_level():
        made = forward.unpack_dual(f(forward.make_dual(x, x * 0.5)))
        return made.primal, made.tangent


@pytest.mark.parametrize("name", ["vmap", "jvp", "grad", "vjp", "forward-mode"])
@pytest.mark.parametrize("way", ["freeze", "compile"])
@alone
def test_transforms_of_a_call(name: str, way: str):
    """Of a frozen or compiled model: PyTorch's result or a clear refusal, nothing dropped."""
    model, x, transform = layers(), maps(), of_a_call(name)
    call = neocog.freeze(model, x) if way == "freeze" else compiled(model)
    wanted = transform(model, x)
    try:
        made = transform(call, x)
    except (neocog.errors.NeocogError, torch._dynamo.exc.TorchDynamoException, RuntimeError) as e:
        assert isinstance(e, neocog.errors.NeocogError) or way == "compile", e
        assert any(word in str(e).lower() for word in ("transform", "vmap", "tangent", "gradient"))
        return
    same_results(
        [t.detach() for t in torch.utils._pytree.tree_leaves(made)],
        [t.detach() for t in torch.utils._pytree.tree_leaves(wanted)],
        2e-5,
    )


@alone
def test_per_sample_gradients_of_a_compiled_model():
    """functional_call under vmap and grad, as torch.func's tutorials have it."""
    model = layers()
    weights = {n: p.detach() for n, p in model.named_parameters()}

    def loss_of(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(model, weights, (x[None],)).square().sum()

    each = torch.func.vmap(torch.func.grad(loss_of), (None, 0))
    wanted = each(weights, maps())
    for name, g in compiled(copy.copy(each))(weights, maps()).items():
        equal(g, wanted[name], name, 2e-5)
