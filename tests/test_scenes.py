"""Scenes: what is recorded of a run, box by box, against the model itself."""

from __future__ import annotations

import pytest
import torch
from explained import IN_SHAPE, Broken, Unknown, sampler
from torch import Tensor, nn

from neocog import models
from neocog import network as net
from neocog.errors import InvalidProblem
from neocog.scenes import Scene, record
from neocog.sight import Beyond, Field


@pytest.fixture(scope="module")
def scene() -> Scene:
    model, x = sampler()
    return record(model, x[None])


def named(scene: Scene, name: str) -> list[net.Op | None]:
    return [box.op for box in scene.boxes if box.name == name]


def test_the_last_box_is_what_the_model_returns(scene: Scene) -> None:
    model, x = sampler()
    with torch.no_grad():
        assert torch.equal(scene.boxes[-1].output, model(x[None]))
    assert scene.error is None
    assert torch.equal(scene.boxes[0].output[0], x)


def test_a_fused_block_becomes_its_steps(scene: Scene) -> None:
    kinds = [type(op) for op in named(scene, "padded")]
    assert kinds == [net.Convolution, net.Activation, net.Pooling]
    kinds = [type(op) for op in named(scene, "residual")]
    assert kinds == [net.Convolution, net.Arithmetic, net.Activation]
    own = [box.own for box in scene.boxes if box.name == "residual"]
    assert own == [False, False, True]  # only the last is the network's own number


def test_every_box_can_be_computed_from_the_boxes_it_reads(scene: Scene) -> None:
    checked = 0
    for box in scene.boxes[1:]:
        inputs = [scene.boxes[i].output for i in box.inputs]
        expected = computed(scene, box.op, inputs)
        if expected is not None:
            torch.testing.assert_close(box.output, expected, rtol=1e-4, atol=1e-5)
            checked += 1
    assert checked >= 18


def computed(scene: Scene, op: net.Op | None, inputs: list[Tensor]) -> Tensor | None:
    """An operation in plain PyTorch; None for convolutions and pools with windows of their own."""
    given = scene.parameters
    match op:
        case net.Convolution(conv, weight, bias):
            window = (conv.rows.stride, conv.rows.low, conv.rows.dilation, conv.groups)
            b = None if bias is None else given[bias]
            return nn.functional.conv2d(inputs[0], given[weight], b, *window)
        case net.Linear(weight, bias):
            return inputs[0] @ given[weight].T + given[bias or ""]
        case net.BatchNorm(net.Norm(mean, var, weight, bias, eps)):
            moments = (given[mean], given[var], given[weight or ""], given[bias or ""])
            return nn.functional.batch_norm(inputs[0], *moments, eps=eps)
        case net.Activation(act):
            return {"relu": torch.relu, "silu": nn.functional.silu}[act.name](inputs[0])
        case net.Arithmetic("add"):
            return inputs[0] + inputs[1]
        case net.Concat():
            return torch.cat(inputs, 1)
        case net.Flatten():
            return inputs[0].flatten(1)
        case net.Pooling(pool):
            size, stride, padding = pool.rows.size, pool.rows.stride, pool.rows.low
            if pool.kind == "max":
                return nn.functional.max_pool2d(inputs[0], size, stride, padding)
            return nn.functional.avg_pool2d(
                inputs[0], (size, pool.cols.size), None if size > 3 else stride, padding,
                count_include_pad=pool.count_include_pad,
            )  # fmt: skip
    return None


def test_blocks_hold_what_a_fused_epilogue_would(scene: Scene) -> None:
    names = [[scene.boxes[i].name for i in block] for block in scene.blocks()]
    assert names[0] == ["image"]
    assert ["padded"] * 3 in names
    assert ["strided", "norm", "relu"] in names
    assert ["dilated", "dilated", "add"] in names
    assert sorted(i for block in scene.blocks() for i in block) == list(range(len(scene.boxes)))


def test_layers_are_numbered_as_summary_numbers_them() -> None:
    from neocog.layers import describe

    model, x = sampler()
    found = {box.layer.index: box.layer.name for box in record(model, x[None]).boxes if box.layer}
    assert found == {info.index: info.name for info in describe(model, IN_SHAPE)}


def test_receptive_fields_reach_through_residuals_and_pools(scene: Scene) -> None:
    sights = {box.name: box.sight for box in scene.boxes}
    # 3x3 conv: 3; pool 2: 4, jump 2; 3x3 stride 2: 8, jump 4; 3x3 dilated by 2: 24, jump 4
    add = next(box for box in scene.boxes if box.name == "add").sight
    assert isinstance(add, Field) and (add.rows.size, add.rows.jump) == (24, 4)
    assert sights["mean"] is Beyond.ALL and sights["head"] is Beyond.ALL


def test_in_place_layers_do_not_change_what_was_recorded() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(inplace=True))
    x = torch.randn(1, 1, 5, 5)
    scene = record(model, x)
    assert bool((scene.boxes[1].output < 0).any())
    assert torch.equal(scene.boxes[2].output, scene.boxes[1].output.relu())


def test_in_place_sums_of_a_residual_network() -> None:
    model = models.resnet18(10).eval()
    x = torch.randn(1, 3, 32, 32)
    scene = record(model, x)
    with torch.no_grad():
        assert torch.equal(scene.boxes[-1].output, model(x))
    adds = [box for box in scene.boxes if isinstance(box.op, net.Arithmetic)]
    assert len(adds) == 8
    for box in adds:
        a, b = (scene.boxes[i].output for i in box.inputs)
        assert torch.equal(box.output, a + b)


def test_what_neocog_does_not_know_is_a_plain_box() -> None:
    torch.manual_seed(0)
    scene = record(Unknown(), torch.randn(1, 1, 8, 8))
    assert [box.op is None for box in scene.boxes[1:]] == [False, True, True]
    assert [box.name for box in scene.boxes[1:]] == ["first", "shuffle", "last"]
    assert scene.boxes[3].inputs == (2,)


def test_a_model_that_fails_leaves_what_it_passed() -> None:
    scene = record(Broken(), torch.randn(1, 1, 6, 6))
    assert [box.name for box in scene.boxes] == ["image", "conv", "relu", "flatten"]
    assert scene.error is not None
    assert "layer 2 (head, Linear)" in str(scene.error)
    assert "100 x 10" in str(scene.error) and "got 144" in str(scene.error)


def test_dropout_and_identity_are_passed_over() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Dropout(), nn.Identity(), nn.ReLU())
    scene = record(model, torch.randn(1, 1, 5, 5))
    assert [box.name for box in scene.boxes] == ["image", "0", "3"]
    assert scene.boxes[2].inputs == (1,)


def test_a_batch_of_several_is_refused() -> None:
    with pytest.raises(InvalidProblem, match=r"batch of one picture, got \(2, 1, 5, 5\)"):
        record(nn.Conv2d(1, 1, 3), torch.zeros(2, 1, 5, 5))


# Ways to write a model that a recording can get wrong


class Flow(nn.Module):
    """A function of a convolution's module and the input."""

    def __init__(self, flow, **modules: nn.Module) -> None:
        super().__init__()
        self.flow = flow
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        return self.flow(self, x)


class Pair(nn.Module):
    """A layer that takes a list and returns a dictionary."""

    def forward(self, xs: list[Tensor]) -> dict[str, Tensor]:
        return {"joined": torch.cat(xs, 1)}


class Standardised(nn.Conv2d):
    """A convolution that computes its weights."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.conv2d(x, self.weight - self.weight.mean(), self.bias)


def scene_of(flow, **modules: nn.Module) -> Scene:
    torch.manual_seed(0)
    model = Flow(flow, **modules).eval()
    x = torch.randn(1, 2, 6, 6)
    scene = record(model, x.clone())
    with torch.no_grad():
        assert scene.answer is not None
        assert torch.equal(scene.boxes[scene.answer].output, model(x.clone()))
    for box in scene.boxes[1:]:
        assert box.inputs, box.name
        expected = computed(scene, box.op, [scene.boxes[i].output for i in box.inputs])
        if expected is not None:
            torch.testing.assert_close(box.output, expected, rtol=1e-4, atol=1e-5)
    return scene


def test_lists_and_dictionaries_of_a_layer() -> None:
    flow = lambda m, x: m.pair([x, m.conv(x)])["joined"]  # noqa: E731
    scene = scene_of(flow, conv=nn.Conv2d(2, 2, 1), pair=Pair())
    assert isinstance(scene.boxes[-1].op, net.Concat)
    assert scene.boxes[-1].inputs == (0, 1)


def test_a_constant_operand_is_no_box() -> None:
    scene = scene_of(
        lambda m, x: m.conv(x) * torch.full((1, 3, 1, 1), 2.0), conv=nn.Conv2d(2, 3, 1)
    )
    assert scene.boxes[-1].op is None and scene.boxes[-1].inputs == (1,)


def test_weights_that_a_model_computes() -> None:
    a, b = Standardised(2, 3, 3), Standardised(3, 3, 3)
    scene = scene_of(lambda m, x: m.b(m.a(x)), a=a, b=b)
    convs = [box for box in scene.boxes if isinstance(box.op, net.Convolution)]
    for box, module in zip(convs, (a, b), strict=True):
        assert isinstance(box.op, net.Convolution)
        wanted = module.weight - module.weight.mean()
        assert torch.equal(scene.parameters[box.op.weight], wanted.detach())


def test_values_written_behind_the_back() -> None:
    def flow(m, x):
        y = m.conv(x)
        y[:, 0] = 0
        z = y + 1
        y[:, 1].zero_()
        return torch.cat([y, z], 1)

    scene = scene_of(flow, conv=nn.Conv2d(2, 3, 1))
    assert [box.op is None for box in scene.boxes if box.name in ("setitem", "in place")] == [
        True
    ] * 2


def test_a_dropout_that_drops_is_no_identity() -> None:
    torch.manual_seed(0)
    model = Flow(lambda m, x: nn.functional.dropout(m.conv(x), 0.5), conv=nn.Conv2d(2, 3, 1)).eval()
    scene = record(model, torch.randn(1, 2, 6, 6))
    assert scene.boxes[-1].op is None and scene.boxes[-1].inputs == (1,)


def test_a_residual_given_by_name_and_first() -> None:
    import neocog.nn as cog

    flow = lambda m, x: m.block(residual=m.conv(x), input=x)  # noqa: E731
    scene = scene_of(flow, conv=nn.Conv2d(2, 3, 1), block=cog.ConvBlock(2, 3, 3, padding=1))
    (add,) = [box for box in scene.boxes if isinstance(box.op, net.Arithmetic)]
    assert add.inputs == (2, 1)


def test_a_layer_used_twice() -> None:
    scene = scene_of(lambda m, x: m.conv(m.conv(x)), conv=nn.Conv2d(2, 2, 3, padding=1))
    assert [box.name for box in scene.boxes] == ["image", "conv", "conv"]


def test_pools_of_a_class_of_their_own() -> None:
    class Same(nn.MaxPool2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(nn.functional.pad(x, (0, 1, 0, 1)))

    scene = scene_of(lambda m, x: m.pool(x), pool=Same(2, 1))
    assert scene.boxes[-1].op is None


def test_the_answer_is_what_is_returned_not_what_comes_last() -> None:
    def flow(m, x):
        y = m.conv(x)
        m.conv(y)
        return y

    assert scene_of(flow, conv=nn.Conv2d(2, 2, 1)).answer == 1


def test_a_model_that_writes_to_its_input_leaves_the_callers_alone() -> None:
    x = torch.ones(1, 2, 3, 3)
    scene = record(Flow(lambda m, x: x.mul_(2)), x)
    assert bool((x == 1).all()) and bool((scene.boxes[0].output == 1).all())


def test_a_block_whose_residual_is_its_input() -> None:
    import neocog.nn as cog

    block = cog.ConvBlock(2, 2, 3, padding=1)
    scene = scene_of(lambda m, x: m.block(x, residual=x), block=block)
    kinds = [type(box.op) for box in scene.boxes[1:]]
    assert kinds == [net.Convolution, net.Arithmetic, net.Activation]
    assert scene.boxes[2].inputs == (1, 0)


def test_whatever_a_model_raises_is_said() -> None:
    def flow(m, x):
        raise KeyError("size")

    scene = record(Flow(flow), torch.zeros(1, 1, 3, 3))
    assert "KeyError: 'size'" in str(scene.error)


def test_weights_of_a_parametrisation_are_no_boxes() -> None:
    conv = nn.utils.parametrizations.weight_norm(nn.Conv2d(2, 3, 3))
    scene = scene_of(lambda m, x: m.conv(x), conv=conv)
    assert [box.inputs for box in scene.boxes] == [(), (0,)]


def test_products_with_what_is_no_number_are_plain() -> None:
    model = Flow(lambda m, x: m.conv(x) * float("nan"), conv=nn.Conv2d(2, 3, 1))
    assert record(model, torch.zeros(1, 2, 3, 3)).boxes[-1].op is None
