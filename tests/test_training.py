"""Training: what is learned, that it can be repeated and resumed to the bit, what is refused."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import tiny
import torch
from torch import nn

from neocog import data, models, shifts
from neocog.checkpoint import Preprocessing
from neocog.data import DataSet, Split
from neocog.errors import InvalidModel, NeocogError
from neocog.settings import InvalidSetting, Settings, choose_device, engine_on
from neocog.training import WARM_UP, Diverged, Trainer, learning_rate, time_shares


@pytest.fixture(autouse=True)
def one_thread():
    """The numbers depend on the number of threads: all tests here compute with one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def trained(stop: int | None = None, found: DataSet | None = None, **settings: object) -> Trainer:
    """A tiny trainer after ``stop`` epochs, or after all of them."""
    trainer = tiny.trainer(found, **settings)
    while not trainer.finished and stop != len(trainer.history):
        trainer.run_epoch()
    return trainer


def snapshot(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.tensors().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# --- what an epoch leaves


def test_each_epoch_adds_a_row_to_the_history():
    trainer = tiny.trainer(epochs=2)
    rows = [trainer.run_epoch(), trainer.run_epoch()]
    assert trainer.history == rows and trainer.finished
    assert [row["epoch"] for row in rows] == [1, 2]
    for row in rows:
        assert set(row) == {"epoch", "cnn", "mlp"}
        for name in ("cnn", "mlp"):
            assert set(row[name]) == {"loss", "accuracy", "val_loss", "val_accuracy"}
            assert row[name]["loss"] > 0 and row[name]["val_loss"] > 0
            for share, count in (("accuracy", trainer.data.train), ("val_accuracy", trainer.val)):
                hits = row[name][share] * len(count)
                assert 0 <= hits <= len(count) and hits == pytest.approx(round(hits))
    assert trainer.seconds >= sum(trainer.spent[part] for part in ("data", "step", "validation"))


def test_shares_of_time_are_of_the_epochs_and_what_runs_beside_them_is_not_counted():
    spent = {"data": 1.0, "step": 6.0, "validation": 3.0, "preparing": 5.0}
    assert time_shares(spent) == {"data": 0.1, "step": 0.6, "validation": 0.3, "preparing": 0.5}
    assert set(time_shares(tiny.trainer().spent).values()) == {0.0}


def test_the_step_is_called_after_each_batch_and_the_last_may_be_smaller():
    trainer = tiny.trainer(epochs=1, batch_size=25)
    count = len(trainer.data.train)
    assert count % 25 and trainer.steps == math.ceil(count / 25)
    calls = []
    row = trainer.run_epoch(lambda *call: calls.append(call))
    assert [call[:2] for call in calls] == [(n + 1, trainer.steps) for n in range(trainer.steps)]
    assert calls[-1][2] == {name: row[name]["loss"] for name in ("cnn", "mlp")}


def test_both_networks_learn_to_tell_bars_apart():
    trainer = trained(epochs=40, lr=0.01)
    for name in ("cnn", "mlp"):
        assert trainer.history[-1][name]["loss"] < trainer.history[0][name]["loss"] / 2
        assert trainer.history[-1][name]["val_accuracy"] >= 0.9


def test_the_best_epoch_has_the_lowest_validation_loss_and_is_the_last_of_equal_ones():
    trainer = tiny.trainer()
    losses = [3.0, 1.0, 2.0, 1.0, 1.5]
    trainer.history = [{"epoch": n, "cnn": {"val_loss": x}} for n, x in enumerate(losses, 1)]
    assert trainer.best_epoch("cnn") == 4


def test_colour_pictures_are_learned_from():
    grey, labels = tiny.pictures(20)
    images = np.stack([grey, 255 - grey, grey // 2], axis=1)
    trainer = trained(found=data.from_arrays(images, labels, tiny.CLASSES), epochs=2)
    assert trainer.data.in_shape == (3, tiny.SIDE, tiny.SIDE)
    assert len(trainer.preprocessing.mean) == 3
    assert trainer.tensors()["cnn/model/0.weight"].shape == (4, 3, 3, 3)
    assert math.isfinite(trainer.history[-1]["cnn"]["val_loss"])


def test_the_averaged_network_is_what_is_kept():
    trainer = trained(epochs=2)
    learner = trainer.learners["cnn"]
    assert not torch.equal(learner.best[0].weight, learner.model[0].weight)
    assert learner.model.state_dict().keys() == learner.best.state_dict().keys()


# --- chance


def test_a_seed_settles_everything():
    one, other = trained(2, seed=5), trained(2, seed=5)
    assert one.history == other.history
    assert same(one.tensors(), other.tensors())


def test_the_global_generator_is_neither_used_nor_moved():
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    one = trained(2)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(2)
    assert same(one.tensors(), trained(2).tensors())


def test_another_seed_is_another_run():
    one, other = tiny.trainer(seed=0), tiny.trainer(seed=1)
    for name in ("cnn", "mlp"):
        weights = [t.learners[name].model.state_dict() for t in (one, other)]
        assert not same(*weights)
    assert one.run_epoch() != other.run_epoch()


@pytest.mark.parametrize("before", [0, 1, 3])
def test_a_restored_run_ends_as_an_uninterrupted_one(before):
    whole = trained()
    begun = trained(before)
    kept, history = snapshot(begun), list(begun.history)
    resumed = tiny.trainer()
    resumed.restore(kept, history, 12.5)
    assert resumed.seconds == 12.5 and same(resumed.tensors(), kept)
    while not resumed.finished:
        resumed.run_epoch()
    assert resumed.history == whole.history
    assert same(resumed.tensors(), whole.tensors())


def test_the_state_of_another_network_is_refused():
    kept = snapshot(trained(1))
    other = tiny.trainer(architecture="5C3-P2-6C3-A2-3")
    with pytest.raises(InvalidModel, match="the saved state is not of this run") as caught:
        other.restore(kept, [], 0.0)
    assert "\n" not in str(caught.value)
    missing = {name: tensor for name, tensor in kept.items() if not name.startswith("mlp/")}
    with pytest.raises(InvalidModel, match="the saved state is not of this run"):
        tiny.trainer().restore(missing, [], 0.0)


# --- divergence


def test_a_rate_far_too_high_is_said_to_diverge():
    trainer = tiny.trainer(lr=1e30)
    with pytest.raises(Diverged, match=r"in epoch 1, step \d+ of 4 \(.*try a learning rate below"):
        while not trainer.finished:
            trainer.run_epoch()
    assert trainer.history == []


def test_divergence_names_network_epoch_and_step_and_keeps_what_was():
    trainer = trained(1)
    kept, history = snapshot(trainer), list(trainer.history)

    def poison(step: int, steps: int, losses: dict[str, float]) -> None:
        if step == 2:
            with torch.no_grad():
                next(trainer.learners["mlp"].model.parameters()).fill_(math.nan)

    architecture = trainer.learners["mlp"].architecture
    message = f"the loss became nan in epoch 2, step 3 of 4 (mlp, architecture {architecture}); "
    message += "the state after epoch 1 is kept; try a learning rate below 0.002"
    with pytest.raises(Diverged, match=re.escape(message)):
        trainer.run_epoch(poison)
    assert trainer.history == history
    again = tiny.trainer()
    again.restore(kept, history, 0.0)
    again.run_epoch()
    assert same(again.tensors(), trained(2).tensors())


@pytest.mark.parametrize("name", ["cnn", "mlp"])
def test_a_weight_that_the_last_step_ruined_is_found(name):
    trainer = tiny.trainer()

    def poison(step: int, steps: int, losses: dict[str, float]) -> None:
        if step == steps:
            with torch.no_grad():
                list(trainer.learners[name].model.parameters())[-1][0] = math.inf

    with pytest.raises(Diverged, match=rf"weight is not finite in epoch 1, step 4 of 4 \({name},"):
        trainer.run_epoch(poison)
    assert trainer.history == []


# --- settings


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("epochs", 0, "at least 1"),
        ("epochs", -3, "at least 1"),
        ("batch_size", 0, "at least 1"),
        ("lr", math.nan, "a finite number above 0"),
        ("lr", math.inf, "a finite number above 0"),
        ("lr", 0.0, "a finite number above 0"),
        ("lr", -0.1, "a finite number above 0"),
        ("seed", -1, "0 to 2^63 - 1"),
        ("seed", 2**63, "0 to 2^63 - 1"),
        ("shift", -1.0, "a number of at least 0"),
        ("shift", math.nan, "a number of at least 0"),
        ("rotation", 181.0, "a number from 0 to 180"),
        ("crop", 0.95, "a number from 0 to 0.9"),
        ("crop", -0.1, "a number from 0 to 0.9"),
    ],
)
def test_a_setting_out_of_range_is_named(name, value, expected):
    with pytest.raises(InvalidSetting, match=re.escape(f"{name}={value}: expected {expected}")):
        Settings(**{name: value})


def test_an_engine_that_is_not_there_is_refused():
    with pytest.raises(InvalidSetting, match="engine='eagre': expected neocog or eager"):
        Settings(engine="eagre")


@pytest.mark.parametrize("given", [{"shift": 2.0}, {"rotation": 5.0}, {"flip": True}])
def test_distortions_do_not_go_with_pictures_as_they_are(given):
    ((name, value),) = given.items()
    message = f"{name}={value}: expected none without augmentation"
    with pytest.raises(InvalidSetting, match=message):
        Settings(augment=False, **given)


def test_a_shift_out_of_the_picture_is_refused():
    with pytest.raises(InvalidSetting, match="shift=7: expected at most half of the .* 12 pixels"):
        tiny.trainer(shift=7.0)


def test_the_largest_seed_is_taken():
    assert trained(1, seed=2**63 - 1, epochs=1).finished


def test_a_shorthand_that_means_nothing_is_refused_at_once():
    with pytest.raises(InvalidModel, match="'4X3', means nothing"):
        Settings(architecture="4X3-3")


def test_data_without_a_validation_part_is_refused():
    found = data.from_arrays(*tiny.pictures(6), tiny.CLASSES, val_fraction=0)
    with pytest.raises(InvalidSetting, match="no validation part: expected a val_fraction above 0"):
        tiny.trainer(found)


def test_another_number_of_classes_is_refused():
    message = "architecture '4C3-P2-4': ends with 4 classes, bars has 3"
    with pytest.raises(InvalidModel, match=message):
        tiny.trainer(architecture="4C3-P2-4")


@pytest.mark.parametrize("name", ["tpu", "", "cud", "cuda:x", "cuda:99"])
def test_a_device_that_is_not_here_is_refused(name):
    if name.startswith("cuda:") and torch.cuda.is_available():
        pytest.skip("NOT TESTED: CUDA missing (there is CUDA here)")
    with pytest.raises(InvalidSetting, match=f"device '{name}': .*expected cpu"):
        choose_device(name)


def test_settings_errors_are_value_errors_and_the_cpu_is_always_here():
    assert issubclass(InvalidSetting, NeocogError) and issubclass(InvalidSetting, ValueError)
    assert choose_device("cpu") == torch.device("cpu")


# --- engines


@pytest.mark.slow
def test_the_compiled_step_learns_as_layer_by_layer_and_keeps_the_same_state():
    one, other = trained(2, engine="neocog", batch_size=41), trained(2, batch_size=41)
    assert one.tensors().keys() == other.tensors().keys()
    for name in ("cnn", "mlp"):
        # A product in a few bits less, as of Winograd, is off by 1e-5 of a layer's largest value.
        assert one.history[-1][name]["loss"] == pytest.approx(other.history[-1][name]["loss"], 1e-4)
    resumed = tiny.trainer(engine="neocog", batch_size=41)
    begun = trained(1, engine="neocog", batch_size=41)
    resumed.restore(snapshot(begun), begun.history, begun.seconds, begun.spent)
    resumed.run_epoch()
    assert same(resumed.tensors(), one.tensors())


def test_another_device_than_the_cpu_is_computed_layer_by_layer():
    assert engine_on(torch.device("cpu"), Settings()) == "neocog"
    assert engine_on(torch.device("cuda"), Settings()) == "eager"


# --- the perceptron beside


@pytest.mark.parametrize("architecture", ["4C3-P2-6C3-A2-3", "1C1-P12-3", "16C5-P2-32C3-40-3"])
def test_the_perceptron_has_at_least_as_many_weights_and_hardly_more(architecture):
    trainer = tiny.trainer(architecture=architecture)
    cnn, mlp = (models.weight_count(trainer.learners[n].model) for n in ("cnn", "mlp"))
    of_one_unit = math.prod(trainer.data.in_shape) + 1 + 3
    assert mlp >= cnn and (mlp - cnn < of_one_unit or mlp == of_one_unit + 3)
    assert not models.has_convolution(trainer.learners["mlp"].architecture)


@pytest.mark.parametrize("settings", [{"architecture": "8-3"}, {"mlp": False}])
def test_no_perceptron_beside_a_perceptron_or_unasked(settings):
    trainer = trained(1, **settings)
    assert list(trainer.learners) == ["cnn"] and set(trainer.history[0]) == {"epoch", "cnn"}


def test_the_network_is_the_same_with_and_without_a_perceptron_beside():
    one, other = trained(2), trained(2, mlp=False)
    cnn = {name: t for name, t in one.tensors().items() if name.startswith("cnn/")}
    assert same(cnn, other.tensors())


# --- learning rate


def test_the_learning_rate_rises_to_its_peak_and_falls_to_nothing():
    assert learning_rate(0.0, 2.0) == pytest.approx(0.02)
    assert learning_rate(WARM_UP / 2, 2.0) == pytest.approx(1.0)
    assert learning_rate(WARM_UP, 2.0) == pytest.approx(2.0)
    assert learning_rate((1 + WARM_UP) / 2, 2.0) == pytest.approx(1.0)
    assert learning_rate(1.0, 2.0) == pytest.approx(0.0)
    rates = [learning_rate(n / 200, 1.0) for n in range(201)]
    peak = round(WARM_UP * 200)
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert min(rates[:-1]) > 0


# --- shifted test pictures


@pytest.mark.parametrize(
    ("rows", "cols", "expected"),
    [
        (0, 0, [[1, 2, 3], [4, 5, 6]]),
        (1, 0, [[0, 0, 0], [1, 2, 3]]),
        (-1, 1, [[0, 4, 5], [0, 0, 0]]),
        (0, -2, [[3, 0, 0], [6, 0, 0]]),
        (2, 0, [[0, 0, 0], [0, 0, 0]]),
        (0, -7, [[0, 0, 0], [0, 0, 0]]),
    ],
)
def test_a_shift_by_hand(rows, cols, expected):
    moved = shifts.shifted(torch.tensor([[1, 2, 3], [4, 5, 6]], dtype=torch.uint8), rows, cols)
    assert moved.tolist() == expected and moved.dtype == torch.uint8


def test_the_shift_table_averages_the_four_directions():
    class TopRow(nn.Module):
        """Sees class 1 in whatever has light in its top two rows."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.stack([torch.full((len(x),), 0.5), x[:, 0, :2].amax(dim=(1, 2))], dim=1)

    images = torch.zeros(2, 1, 9, 9, dtype=torch.uint8)
    images[1, 0, 1, 4] = 255
    split = Split(images, torch.tensor([0, 1]))
    found = shifts.table({"cnn": TopRow()}, split, Preprocessing((0.0,), (1.0,)))
    # down loses the light from 1 pixel on, up from 2 on, left and right keep it
    assert found == {
        "0": {"cnn": 1.0},
        "1": {"cnn": 0.875},
        "2": {"cnn": 0.75},
        "3": {"cnn": 0.75},
        "4": {"cnn": 0.75},
    }
