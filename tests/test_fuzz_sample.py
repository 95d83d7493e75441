"""Random programs beside PyTorch: a fixed sample, and that the fuzzer sees what it should see."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import fuzz_cases
import pytest
import torch
from torch import nn

from fuzz.__main__ import Child
from fuzz.acting import Run
from fuzz.building import Builder, clean_state
from fuzz.comparing import differences, exactly
from fuzz.drawing import draw, source_of
from fuzz.operations import OPERATIONS
from fuzz.program import Case, Draw
from fuzz.shrinking import shrink

SEED = 2
SAMPLE = 40


@pytest.fixture(scope="module")
def child() -> Iterator[Callable[[Case], list[str]]]:
    """A process that runs cases, replaced when one ends it; its findings as text."""
    running = [Child("neocog", timeout=60)]

    def ask(case: Case) -> list[str]:
        if not running[-1].alive:
            running[-1].end()
            running.append(Child("neocog", timeout=60))
        answer = running[-1].ask(case)
        return [": ".join(finding) for finding in answer["findings"]]

    yield ask
    running[-1].end()


def again(case: Case) -> str:
    return f"python -m fuzz --case '{case}'"


@pytest.mark.slow
def test_a_sample_of_programs(child):
    found = {again(case): child(case) for case in (draw(SEED, i) for i in range(SAMPLE))}
    assert {line: findings for line, findings in found.items() if findings} == {}


@pytest.mark.slow
@pytest.mark.parametrize("name", fuzz_cases.KNOWN)
def test_programs_that_went_wrong_once(child, name):
    case = fuzz_cases.KNOWN[name]
    assert child(case) == [], again(case)


# The fuzzer itself


@pytest.mark.parametrize("name", fuzz_cases.KNOWN)
def test_known_programs_contain_all_their_steps(name):
    case = fuzz_cases.KNOWN[name]
    wanted = len(case.steps)
    shorter = {source_of(Case(1, case.inputs, case.steps[:n], case.mode)) for n in range(wanted)}
    assert source_of(Case(1, case.inputs, case.steps, case.mode)) not in shorter


def test_a_case_runs_again_from_its_line():
    for i in range(30):
        case = draw(3, i)
        assert Case.parse(str(case)) == case == draw(3, i)
        assert source_of(Case.parse(str(case))) == source_of(case)


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_kind_of_step_can_be_written(name):
    given = {"x0": torch.randn(2, 4, 8, 8), "x1": 0.5}
    with clean_state():
        builder = Builder(given, training=True)
        for before in ("conv", "activation"):
            assert builder.attempt(OPERATIONS[before], Draw(None, {"out": 4}))
        lines = len(builder.setup) + len(builder.body)
        assert builder.attempt(OPERATIONS[name], Draw(None))
        assert len(builder.setup) + len(builder.body) > lines
        builder.finish("None")


def test_what_is_no_case():
    for text in ('{"seed":1}', '{"inputs":[{}],"steps":[]}', "[]", "nonsense"):
        with pytest.raises(ValueError, match=r"case|Expecting"):
            Case.parse(text)


def test_shrinking_keeps_what_a_finding_needs():
    case = next(c for c in (draw(1, i) for i in range(99)) if len(c.steps) > 7 and len(c.plan) > 2)
    needed = {case.steps[1][0], case.steps[6][0]}
    option = next(iter(case.plan))

    def holds(smaller: Case) -> bool:
        return needed <= {name for name, _ in smaller.steps} and option in smaller.plan

    smallest = shrink(case, holds, 500)
    assert sorted(name for name, _ in smallest.steps) == sorted(needed)
    assert list(smallest.plan) == [option]
    assert not any(chosen for _, chosen in smallest.steps)


def test_the_end_of_a_process_is_a_finding():
    child = Child("eager", timeout=60)
    child._process.kill()
    assert child.ask(draw(1, 0))["findings"][0][0] == "crashes"
    assert not child.alive
    child.end()


PROGRAM = fuzz_cases.case(
    "train", "counter", fuzz_cases.CONV, "norm", "activation", "module_hook", "cached",
    inputs=fuzz_cases.TRAINED, form="dict", return1=2,
)  # fmt: skip


class Planted(Run):
    """A run with a fault: ``spoil(model, result, arguments)`` is what comes out."""

    spoil: Callable[..., object]

    def _compiled(self, function, fullgraph=False):
        def wrapped(*given):
            return self.spoil(self.model, function(*given), given)

        return wrapped


def kinds(spoil: Callable[..., object]) -> set[str]:
    """What the comparison says of a fault."""
    torch._dynamo.reset()
    source = source_of(PROGRAM)
    eager = Run(PROGRAM, source, "plain").observe()
    exact = exactly(PROGRAM, source, 1)
    planted = Planted(PROGRAM, source, "planted")
    planted.spoil = spoil
    try:
        seen = planted.observe()
        return {f.kind for f in differences(PROGRAM, eager, seen, exact)}
    finally:
        torch.set_grad_enabled(True)


def one(change: Callable[[torch.Tensor], object]) -> Callable[..., object]:
    """A fault of the first result."""
    return lambda model, result, given: {**result, "one": change(result["one"])}


def done(change: Callable[..., object]) -> Callable[..., object]:
    """A fault beside the results."""

    def spoil(model, result, given):
        change(model, given)
        return result

    return spoil


def _one_off(share: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(t: torch.Tensor) -> torch.Tensor:
        off = torch.zeros_like(t)
        off[(0,) * t.dim()] = share * float(t.detach().abs().max())
        return t + off

    return change


class _ZeroGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):
        return torch.zeros_like(g)


FAULTS: dict[str, tuple[Callable[..., object], set[str]]] = {
    "a wrong number": (one(_one_off(1e-4)), {"numbers"}),
    "not a number": (one(lambda t: t.where(t != t.max(), torch.nan)), {"numbers"}),
    "a wrong layout": (
        one(lambda t: t.contiguous(memory_format=torch.channels_last)), {"strides"}
    ),
    "a wrong type": (one(lambda t: t.double()), {"dtype"}),
    "a wrong shape": (one(lambda t: t[:1]), {"shape"}),
    "a dropped gradient": (one(lambda t: t.detach()), {"requires_grad"}),
    "a zero gradient": (one(_ZeroGradient.apply), {"gradient"}),
    "a missing result": (
        lambda model, result, given: {"one": result["one"]}, {"structure"}
    ),
    "another container": (
        lambda model, result, given: tuple(result.values()), {"value", "structure"}
    ),
    "a result that is an argument": (one(lambda t: t.mul_(1)), set()),
    "a written argument": (
        done(lambda model, given: given[0].data.add_(1)), {"argument"}
    ),
    "an attribute without data": (
        done(lambda model, given: setattr(model, attribute(model), torch.ones(8, device="meta"))),
        {"model"},
    ),
    "an attribute too many": (done(lambda model, given: setattr(model, "new", 1)), {"model"}),
    "a wrong buffer": (
        done(lambda model, given: next(model.buffers()).add_(1)), {"model"}
    ),
    "a lost hook": (
        done(lambda model, given: [m._forward_hooks.clear() for m in model.modules()]), {"model"}
    ),
    "a flag": (done(lambda model, given: model.eval()), {"model"}),
    "a parameter that is none any more": (
        done(lambda model, given: freeze_last(model)), {"model"}
    ),
    "random numbers": (done(lambda model, given: torch.rand(1)), {"process"}),
    "the grad mode": (done(lambda model, given: torch.set_grad_enabled(False)), {"process"}),
}  # fmt: skip


def attribute(model: nn.Module) -> str:
    return next(n for n in model.__dict__ if n.startswith("grid") and not n.endswith("size"))


def freeze_last(model: nn.Module) -> None:
    list(model.parameters())[-1].requires_grad_(False)


def test_float64_computes_the_same_program():
    source = source_of(PROGRAM)
    eager, exact = Run(PROGRAM, source, "plain").observe(), exactly(PROGRAM, source, 1)
    for name in ("call 0: result['one']", "gradient of m3.weight"):
        off = (eager[name].data - exact[name].data).abs().max()
        assert 0 < off < 1e-5 * exact[name].data.abs().max(), name


def test_nothing_is_found_where_nothing_is_wrong():
    assert kinds(lambda model, result, given: result) == set()
    assert kinds(one(_one_off(1e-6))) == set()


@pytest.mark.parametrize("name", FAULTS)
def test_planted_faults_are_seen(name):
    spoil, expected = FAULTS[name]
    assert expected <= kinds(spoil)
