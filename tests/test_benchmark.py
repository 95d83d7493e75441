"""What `neocog bench` measures is right, and measured as it says. No time is ever asserted."""

from __future__ import annotations

import math
import re

import pytest
import torch

from neocog import benchmark, network_benchmark, training
from neocog.architectures import digits
from neocog.benchmark import CALL, CASES, PROGRAM, TORCH, Case
from neocog.cpu import peak
from neocog.errors import NeocogError
from neocog.problem import parse
from neocog.target import TARGETS, host, host_features

TINY = "conv n1 c3x6x6 k19 3x3 p1 | bias | relu | max 2x2"
EVERYONE = {PROGRAM, CALL, *TORCH.values()}
RUNNABLE = [target for target in TARGETS if target.requires <= host_features()]


# The peak


@pytest.mark.parametrize("target", RUNNABLE, ids=lambda target: target.name)
def test_the_peak_kernel_does_the_multiply_adds_it_counts(target):
    trips, items = 3, 2
    program, _, work = benchmark.peak_program(target, items, trips)
    x, y, start = 2.0, 3.0, 1.0
    values = torch.tensor([x, y] + [start] * peak.accumulators(target))
    values = values.repeat_interleave(target.lanes)
    out = torch.full((items * target.lanes,), math.nan)
    program.run(values.data_ptr(), out.data_ptr(), threads=1)
    assert len(values) == peak.values(target)
    each = work // items // target.lanes
    assert out.tolist() == [start * peak.accumulators(target) + each * x * y] * len(out)


@pytest.mark.parametrize("target", RUNNABLE, ids=lambda target: target.name)
def test_the_loop_of_the_peak_kernel_stays_in_registers(target):
    text = peak.emit(target).assembly(target)
    if "vfmadd" not in text:
        pytest.skip(f"{target.name} has no vfmadd to count")
    lines = text.splitlines()
    products = [n for n, line in enumerate(lines) if "vfmadd" in line]
    assert len(products) == peak.UNROLL * peak.accumulators(target)
    loop = lines[products[0] : products[-1] + 1]
    assert not [line for line in loop if "(" in line], "memory is touched between multiply-adds"


def test_the_peak_uses_as_many_accumulators_as_the_largest_register_tile():
    for target in TARGETS:
        assert peak.accumulators(target) == max(nb * mr for nb, mr in target.tiles)
    assert peak.accumulators(TARGETS[0]) >= 24


def test_every_thread_has_its_item_of_the_peak():
    one, two = (benchmark.peak_program(host(), items) for items in (1, 2))
    assert (one[0].steps[0].items, two[0].steps[0].items) == (1, 2)
    assert two[2] == 2 * one[2] == 2 * peak.multiply_adds(host(), benchmark.PEAK_TRIPS)
    assert len(two[1][1]) == 2 * host().lanes


# The cases


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_case_comes_out_as_pytorchs(case):
    benchmark.check(case)


def test_every_case_is_compared_with_pytorch_in_both_layouts():
    for backward, results in ((False, 1), (True, 3)):
        found = benchmark.contenders(Case(TINY, backward))
        assert set(found) == EVERYONE
        assert {len(run()) for run in found.values()} == {results}


def test_pytorch_is_given_the_layouts_it_is_measured_in():
    # An image of one channel is contiguous in both; its strides decide.
    x = torch.rand(2, 1, 5, 4)
    assert benchmark._in("nchw", x).stride() == (20, 20, 4, 1)
    assert benchmark._in("nhwc", x).stride() == (20, 1, 4, 1)


@pytest.mark.parametrize("wrong", sorted(EVERYONE))
def test_a_wrong_result_is_found_before_anything_is_timed(wrong, monkeypatch):
    case = Case(TINY)
    found = benchmark.contenders(case)
    right = found[wrong]
    found[wrong] = lambda: (right()[0] + 0.5,)
    monkeypatch.setattr(benchmark, "contenders", lambda _: found)
    monkeypatch.setattr(benchmark, "interleave", lambda *_: pytest.fail("it was timed"))
    with pytest.raises(benchmark.WrongResult, match=re.escape(TINY)) as caught:
        benchmark.measure(case, rounds=1)
    assert "by up to 0.5" in str(caught.value)
    assert isinstance(caught.value, NeocogError)


def test_names_are_unique_and_read_back():
    assert len({str(case) for case in CASES}) == len(CASES)
    for case in CASES:
        assert parse(str(case.block)) == parse(case.line) == case.block
        assert str(case) == ("backward of " if case.backward else "") + case.line


def test_a_backward_pass_counts_as_two_convolutions():
    adds = 36 * 19 * 27
    assert Case(TINY).multiply_adds == adds
    assert Case(TINY, backward=True).multiply_adds == 2 * adds


# Measuring


def test_contenders_take_turns_and_the_median_counts(monkeypatch):
    calls = []
    now = iter([0.5, 1.5, 7.0, 9.0, 2.0, 1.0, 8.0, 3.0])  # two to warm up, three rounds of two
    monkeypatch.setattr(benchmark, "_seconds", lambda run, repeats: (run(), next(now))[1])
    monkeypatch.setattr(benchmark, "_interruptions", lambda: 0)
    contenders = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    times = benchmark.interleave(contenders, rounds=3, sample=0.1)
    assert times.seconds == {"a": 7.0, "b": 3.0}
    assert "".join(calls) == "aabb" + 3 * "aabb"  # each sample after a call that is not timed
    assert (times.samples, times.disturbed) == (6, 0)


def test_short_calls_are_repeated_until_they_fill_a_sample(monkeypatch):
    monkeypatch.setattr(benchmark, "_seconds", lambda run, repeats: repeats * 0.3)
    times = benchmark.interleave({"a": lambda: None}, rounds=2, sample=1.0)
    assert times.seconds == {"a": pytest.approx(0.3)}
    assert benchmark._warm_up(lambda: None, 1.0) == 4


def test_an_interrupted_sample_is_taken_again(monkeypatch):
    counts, now = iter([0, 1, 1, 2, 2, 2]), iter([9.0, 8.0, 2.0])
    monkeypatch.setattr(benchmark, "_interruptions", lambda: next(counts))
    monkeypatch.setattr(benchmark, "_seconds", lambda run, repeats: next(now))
    assert benchmark._sample(lambda: None, 1) == (2.0, True)


def test_a_sample_that_is_always_interrupted_is_counted(monkeypatch):
    counts, now = iter(range(1000)), iter([5.0, 4.0, 3.0] + [6.0] * benchmark.TRIES)
    monkeypatch.setattr(benchmark, "_interruptions", lambda: next(counts))
    monkeypatch.setattr(benchmark, "_seconds", lambda run, repeats: next(now))
    monkeypatch.setattr(benchmark, "_warm_up", lambda run, sample: 1)
    times = benchmark.interleave({"a": lambda: None}, rounds=1)
    assert (times.seconds, times.samples, times.disturbed) == ({"a": 3.0}, 1, 1)


def test_threads_are_put_back():
    before = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError), benchmark.threads(before + 1):
        assert torch.get_num_threads() == before + 1
        raise ZeroDivisionError
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("backward", [False, True])
def test_a_row_says_what_was_measured(backward):
    case = Case(TINY, backward)
    with benchmark.threads(1):
        row = benchmark.measure(case, rounds=1, sample=1e-5)
    plain = row.plain()
    assert list(plain)[:4] == ["block", "gflops", "peak_gflops", "share"]
    assert plain["block"] == str(case)
    assert plain["peak_gflops"] > 0
    assert plain["share"] == pytest.approx(plain["gflops"] / plain["peak_gflops"])
    operations = 2 * case.multiply_adds
    assert plain["gflops"] == pytest.approx(1e-6 * operations / plain["program_ms"])
    both = (plain["torch_contiguous_ms"], plain["torch_channels_last_ms"])
    assert plain["torch_ms"] == min(both)
    assert plain["ratio"] == pytest.approx(min(both) / plain["call_ms"])
    assert (plain["threads"], plain["rounds"], plain["samples"]) == (1, 1, 5)
    assert plain["target"] == host().name


# The network


def test_the_network_is_the_one_that_is_trained():
    assert training.Settings().architecture == network_benchmark.ARCHITECTURE


@pytest.mark.parametrize("case", network_benchmark.CASES, ids=str)
def test_the_network_comes_out_as_pytorchs(case):
    row = network_benchmark.measure_network(case, rounds=1, sample=1e-5)
    plain = row.plain()
    sides = {"neocog": network_benchmark.OURS.values(), "torch": TORCH.values()}
    for side, names in sides.items():
        each = [plain[f"{name.replace(' ', '_')}_ms"] for name in names]
        assert plain[f"{side}_ms"] == min(each) > 0
    assert plain["ratio"] == pytest.approx(plain["torch_ms"] / plain["neocog_ms"])
    task = "training step" if case.training else "inference"
    assert (plain["task"], plain["batch"]) == (task, case.batch)


def test_a_wrong_network_is_found(monkeypatch):
    case = network_benchmark.NetworkCase(training=False, batch=1)
    found = network_benchmark.contenders(case)
    right = found["torch channels_last"]
    found["torch channels_last"] = lambda: right() + 1
    monkeypatch.setattr(network_benchmark, "contenders", lambda _: found)
    with pytest.raises(benchmark.WrongResult, match="torch channels_last"):
        network_benchmark.measure_network(case, rounds=1)


def test_a_training_step_moves_the_weights():
    network = digits()
    before = [p.detach().clone() for p in network.parameters()]
    step = network_benchmark._step(network, torch.rand(4, 1, 28, 28), torch.arange(4))
    first = step()
    assert first.item() == pytest.approx(math.log(10), abs=0.5)
    moved = [not torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True)]
    assert any(moved)
