"""No convolution or pooling of training, evaluating or explaining runs in PyTorch's own kernels."""

import re

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from neocog import data, evaluation, models, tracing
from neocog.checkpoint import Preprocessing
from neocog.settings import ENGINES, Settings
from neocog.training import Trainer

PYTORCHS = re.compile(r"(conv|pool|mkldnn|onednn|xnn|slow_conv|thnn|im2col|unfold)", re.IGNORECASE)
OURS = {"neocog::conv_block", "neocog::conv_block_backward"}


def operators(run) -> set[str]:
    """The names of all operators that ran."""
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        run()
    return {event.key for event in recorded.key_averages()}


def foreign(names: set[str]) -> set[str]:
    return {
        n
        for n in names
        if PYTORCHS.search(n) and not n.startswith("neocog::") and "neocog_" not in n
    }


@pytest.fixture(scope="module")
def digits():
    found = data.load()
    few = data.Split(found.train.images[:96], found.train.labels[:96])
    return data.DataSet(found.name, found.classes, few, few, few, ())


@pytest.fixture(scope="module")
def preprocessing(digits) -> Preprocessing:
    from neocog.runs import preprocessing_of

    return preprocessing_of(digits)


@pytest.mark.parametrize("engine", ENGINES)
def test_training_runs_in_our_kernels(digits, preprocessing, engine):
    trainer = Trainer(digits, Settings(epochs=2, engine=engine), preprocessing)
    trainer.run_epoch()  # compiling calls PyTorch's functions on tensors without data
    names = operators(trainer.run_epoch)
    if engine == "eager":  # a compiled step is no operator
        assert names >= OURS
    assert foreign(names) == set()


def test_evaluation_runs_in_our_kernels(digits, preprocessing):
    model = models.parse("32C3-P2-64C3-A2-10", digits.in_shape)
    names = operators(
        lambda: evaluation.evaluate(model, digits.test, preprocessing, digits.classes)
    )
    assert "neocog::conv_block" in names
    assert foreign(names) == set()


def test_explaining_runs_in_our_kernels(digits, preprocessing):
    model = models.parse("8C3-P2-10", digits.in_shape)
    x = preprocessing.apply(digits.test.images[:1].float())
    names = operators(lambda: tracing.explain_value(model, x, 1, 0, (0, 0)))
    assert "neocog::conv_block" in names
    assert foreign(names) == set()


def test_the_pattern_would_notice_pytorchs_kernels():
    x, w = torch.randn(1, 1, 8, 8), torch.randn(1, 1, 3, 3, requires_grad=True)

    def run() -> None:
        torch.nn.functional.max_pool2d(torch.nn.functional.conv2d(x, w), 2).sum().backward()

    names = foreign(operators(run))
    assert any("convolution_backward" in n for n in names)
    assert any("max_pool2d" in n for n in names)
