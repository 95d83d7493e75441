"""neocog.report: what became of a model, frozen or compiled, and how it reads."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import tiny_networks as tn
import torch
from torch import nn

import neocog


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    """Dynamo counts recompilations over all models of a process."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_a_model_that_is_covered():
    (report,) = neocog.report(neocog.freeze(tn.make("residual_add_relu"), tn.images()))
    assert report.handed_back == ()
    assert report.programs == 1
    assert report.share == 1.0
    assert report.multiply_adds == 2 * 12 * 16 * 9 * (3 * 19 + 19 * 19)
    assert len(report.layers) == 2
    assert not report.whole


def test_what_was_handed_back():
    (report,) = neocog.report(neocog.freeze(tn.make("foreign_layers"), tn.images()))
    assert report.programs == 2
    names = {h.name.rpartition(".")[2]: h for h in report.handed_back}
    assert set(names) == {"conv_transpose2d", "cos", "sin"}
    transposed = names["conv_transpose2d"]
    assert (transposed.count, transposed.multiply_adds) == (1, 8 * 6 * 4 * 12 * 16 * 2)
    assert "no kernel" in transposed.reason
    assert report.share == pytest.approx(
        report.multiply_adds / (report.multiply_adds + transposed.multiply_adds)
    )
    assert "conv_transpose2d" in str(report)


def test_report_of_something_else():
    with pytest.raises(ValueError, match="compiled"):
        neocog.report(lambda x: x)


class Cut(nn.Module):
    """No parameters, and two graphs."""

    def forward(self, x):
        y = torch.relu(x)
        torch._dynamo.graph_break()
        return torch.sigmoid(y)


def test_models_without_parameters():
    for model, graphs in ((nn.Sequential(nn.ReLU(), nn.MaxPool2d(2)), 1), (Cut(), 2)):
        compiled = torch.compile(model, backend="neocog")
        assert len(neocog.report(compiled)) == 0
        with torch.no_grad():
            compiled(tn.images())
        assert [r.programs for r in neocog.report(compiled)] == [1] * graphs


def test_functions():
    def function(x):
        return torch.relu(x)

    compiled = torch.compile(function, backend="neocog")
    compiled(tn.images())
    (report,) = neocog.report(compiled)
    assert report.programs == 1


def test_two_models_of_one_class():
    models = [nn.Sequential(tn.conv(3, c)).eval() for c in (4, 5)]
    compiled = [torch.compile(model, backend="neocog") for model in models]
    with torch.no_grad():
        for one in compiled:
            one(tn.images())
    assert [len(neocog.report(one)) for one in compiled] == [1, 1]
    shapes = [neocog.report(one)[0].layers[0] for one in compiled]
    assert "k4" in shapes[0] or "2x4x" in shapes[0]
    assert shapes[0] != shapes[1]


def test_a_table_in_a_notebook():
    reports = neocog.report(neocog.freeze(tn.make("foreign_layers"), tn.images()))
    table = reports._repr_html_()
    assert table.count("<tr>") == 6 and "conv_transpose2d" in table
    assert "<" not in neocog.report(neocog.freeze(nn.ReLU().eval(), tn.images()))[0].layers[0]
