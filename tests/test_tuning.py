"""neocog.freeze(..., tune=True): algorithms chosen by what they took, and kept.

Nothing here depends on how long anything really takes: runs report what the test says.
"""

import pytest
import torch
from torch import nn

import neocog
from neocog import choices, tuning
from neocog.cpu import code_cache
from neocog.problem import parse
from neocog.target import host
from neocog.tuning import Tuner

CONV = parse("conv n1 c32x14x14 k32 3x3 p1")


@pytest.fixture
def fastest(monkeypatch, tmp_path):
    """Says which algorithm is to be the fastest; counts what was measured."""
    code_cache.use(tmp_path)
    measured: list[str] = []
    wanted: list[str] = []

    class Run:
        def __init__(self, target, conv, epilogue, name):
            self.name = name
            measured.append(name)

        def seconds(self) -> float:
            return 1.0 if self.name == wanted[-1] else 2.0

    monkeypatch.setattr(tuning, "_Run", Run)
    yield wanted.append, measured
    code_cache._chosen.clear()


@pytest.mark.parametrize("name", choices.candidates(CONV, (), choices.AVERAGED))
def test_the_fastest_wins(name, fastest):
    want, measured = fastest
    want(name)
    assert Tuner(host())(CONV, (), choices.AVERAGED) == name
    assert sorted(measured) == sorted(choices.candidates(CONV, (), choices.AVERAGED))


def test_another_process_measures_nothing(fastest):
    want, measured = fastest
    want("winograd2")
    assert Tuner(host())(CONV) == "winograd2"
    measured.clear()
    want("direct")
    assert Tuner(host())(CONV) == "winograd2"
    assert not measured


def test_without_a_directory_a_process_measures_once(fastest):
    want, measured = fastest
    code_cache.use(None)
    want("winograd4")
    tuner = Tuner(host())
    assert tuner(CONV) == tuner(CONV) == "winograd4"
    assert len(measured) == len(choices.candidates(CONV))
    want("direct")
    assert Tuner(host())(CONV) == "direct"


def test_threads_have_choices_of_their_own(fastest):
    want, _ = fastest
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        want("winograd2")
        assert Tuner(host())(CONV) == "winograd2"
        torch.set_num_threads(2)
        want("direct")
        assert Tuner(host())(CONV) == "direct"
        torch.set_num_threads(1)
        assert Tuner(host())(CONV) == "winograd2"
    finally:
        torch.set_num_threads(before)


def test_where_there_is_no_choice_nothing_is_measured(fastest):
    _, measured = fastest
    assert Tuner(host())(parse("conv n1 c8x9x9 k8 1x1")) == choices.DIRECT
    assert not measured


def test_a_coarse_algorithm_is_no_candidate_for_what_is_returned():
    assert not set(choices.COARSE) & set(choices.candidates(CONV, (), 0))
    assert set(choices.COARSE) <= set(choices.candidates(CONV, (), choices.AVERAGED))


@pytest.mark.parametrize("batch", [1, 3])
def test_a_tuned_network_is_right(batch):
    """With real measurements, whatever they say."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 7, 2, 3), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 24, 3, 2, 1), nn.Flatten(), nn.Linear(24 * 4 * 4, 10),
    ).eval()  # fmt: skip
    x = torch.randn(batch, 3, 32, 32)
    with torch.no_grad():
        expected = model(x)
        compiled = torch.compile(model, backend="neocog", options={"tune": True})
        for ours in (neocog.freeze(model, x, tune=True)(x), compiled(x)):
            assert (ours - expected).abs().max() < 5e-6 * expected.abs().max()


def test_exact_comes_before_tuned():
    model = nn.Sequential(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU()).eval()
    frozen = neocog.freeze(model, torch.randn(1, 16, 20, 20), exact=True, tune=True)
    (key,) = frozen.plans[-1].natives[0].packed
    assert key.algorithm == choices.SHORT_SUMS
