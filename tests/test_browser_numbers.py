"""Every number that the page of ``neocog explain`` shows, against the reference."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from browsing import box_of

from neocog.tracing import explain_value

if TYPE_CHECKING:
    from playwright.sync_api import Page as Tab

pytestmark = pytest.mark.slow

READ = """async (places) => {
  const { page } = window.neocog;
  const cells = (table) => [...table.querySelectorAll("td.cell")].map((cell) => ({
    padding: cell.classList.contains("padding"), winner: cell.classList.contains("winner"),
    value: Number(cell.dataset.value ?? 0), text: cell.textContent }));
  const found = [];
  for (const [box, channel, y, x] of places) {
    document.documentElement.dataset.shown = "";
    page.go({ box, channel, y, x, all: true, held: true });
    while (document.documentElement.dataset.shown !== [box, channel, y, x].join(",")) {
      await new Promise((done) => setTimeout(done));
    }
    const sum = document.querySelector(".part-sum");
    const check = sum.querySelector(".check").dataset;
    const pool = sum.querySelector("table.value");
    found.push({
      terms: [...sum.querySelectorAll(".term")].map((term) => ({
        channel: Number(term.dataset.input), sum: term.querySelector(".term-sum").textContent,
        input: cells(term.querySelector("table.input")), weight: cells(term.querySelector("table.weight")),
        product: cells(term.querySelector("table.product")) })),
      pool: pool && cells(pool),
      ledger: [...sum.querySelectorAll(".ledger tr")].map((row) => ({
        name: row.dataset.row, value: Number(row.querySelector(".number").dataset.value),
        text: row.querySelector(".number").textContent })),
      matches: check.matches, explained: Number(check.explained), network: Number(check.network),
      field: document.querySelector("[data-field]").dataset.field,
    });
  }
  return found;
}"""  # noqa: E501

KINDS = {
    "padded, activation and max pool": ("padded", "pool"),
    "strided": ("strided", "conv"),
    "dilated, silu": ("dilated", "act"),
    "grouped": ("grouped", "conv"),
    "max pool": ("largest", "pool"),
    "average pool": ("average", "pool"),
    "residual": ("residual", "act"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_200_random_pixels_show_the_reference(tab: Tab, page, network, kind: str) -> None:
    name, last = KINDS[kind]
    index = box_of(page[0], name, last)
    model, x = network
    rng = np.random.default_rng(0)
    size = page[0].data["boxes"][index]["shape"]
    places = [[index, *(int(rng.integers(n)) for n in size)] for _ in range(200)]
    shown = tab.evaluate(READ, places)
    for (_, channel, row, col), found in zip(places, shown, strict=True):
        expected = explain_value(model, x, name, channel, (row, col))
        assert found["matches"] == "true"
        assert found["network"] == expected.network
        assert found["explained"] == pytest.approx(expected.explained, abs=1e-6)
        assert expected.seen is not None
        assert found["field"] == ",".join(str(i) for pair in expected.seen for i in pair)
        if expected.conv is not None:
            check_convolution(found, expected.conv)
        if expected.pool is not None:
            check_pool(found["pool"], expected.pool)
        for line in found["ledger"]:
            assert_written(line["text"], line["value"])


def check_convolution(found, conv) -> None:
    assert [term["channel"] for term in found["terms"]] == list(conv.channels)
    for place, term in enumerate(found["terms"]):
        arrays = (conv.window[place], conv.kernel[place], conv.products[place])
        for cells, array in zip(
            (term["input"], term["weight"], term["product"]), arrays, strict=True
        ):
            assert [cell["value"] for cell in cells] == pytest.approx(array.ravel(), abs=1e-7)
            for cell in cells:
                assert_written(cell["text"], cell["value"])
        padding = [cell["padding"] for cell in term["input"]]
        assert padding == (~conv.taps.inside).ravel().tolist()
        assert_written(term["sum"], float(conv.sums[place]), 1e-6)
    ledger = {line["name"]: line["value"] for line in found["ledger"]}
    assert ledger.get("bias") == (None if conv.bias is None else pytest.approx(conv.bias))
    assert ledger["sum"] == pytest.approx(conv.total + (conv.bias or 0), abs=1e-6)
    if conv.residual is not None:
        assert ledger["other"] == pytest.approx(conv.residual, abs=1e-6)
    if conv.activation.name != "identity":
        assert ledger["act"] == pytest.approx(conv.activated, abs=1e-6)


def check_pool(cells, pool) -> None:
    assert [cell["value"] for cell in cells] == pytest.approx(pool.values.ravel(), abs=1e-5)
    assert [cell["padding"] for cell in cells] == (~pool.taps.inside).ravel().tolist()
    winners = [i for i, cell in enumerate(cells) if cell["winner"]]
    if pool.winner is None:
        assert winners == []
    else:
        assert winners == [pool.winner[0] * len(pool.taps.cols) + pool.winner[1]]


def assert_written(text: str, value: float, slack: float = 0.0) -> None:
    """The text is the value, rounded to the digits it has."""
    plain = text.replace("−", "-").replace("★", "")
    if plain == "":
        return  # beyond the padding
    digits = plain.partition("e")[0].partition(".")[2]
    unit = 10.0 ** -len(digits) * 10.0 ** int(plain.partition("e")[2] or 0)
    assert abs(float(plain) - value) <= 0.5 * unit * (1 + 1e-9) + slack, (text, value)


def test_sums_concatenations_and_the_fully_connected_layer(tab: Tab, page) -> None:
    made = page[0]
    rng = np.random.default_rng(1)
    for name, kind in (("add", "add"), ("cat", "cat"), ("flatten", "flatten"), ("head", "linear")):
        index = box_of(made, name, kind)
        size = [*made.data["boxes"][index]["shape"], 1, 1][:3]
        places = [[index, *(int(rng.integers(n)) for n in size)] for _ in range(50)]
        for place, found in zip(places, tab.evaluate(READ, places), strict=True):
            output = made.scene.boxes[index].output.reshape(1, *size)
            assert found["matches"] == "true"
            assert found["network"] == float(output[0, place[1], place[2], place[3]])
