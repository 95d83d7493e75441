"""Batches made ready in the background: the same ones however long that takes; errors come out."""

from __future__ import annotations

import threading
import time
from contextlib import closing
from dataclasses import replace

import pytest
import tiny
import torch

from neocog.batches import AHEAD, Batch, Batches
from neocog.distribution import Group
from neocog.training import nothing_spent


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def epoch(batches: Batches, pause: float = 0.0) -> list[Batch]:
    found = []
    with closing(batches.epoch(seeded(), nothing_spent())) as stream:
        for batch in stream:
            time.sleep(pause)
            found.append(batch)
    return found


def test_a_slow_reader_gets_what_a_fast_one_gets_and_what_needs_no_thread():
    batches = tiny.trainer().batches
    fast, slow = epoch(batches), epoch(batches, 0.01)
    generator = seeded()
    order = torch.randperm(len(batches.split), generator=generator)
    direct = [batches.prepare(chosen, generator) for chosen in order.split(batches.size)]
    assert len(fast) == len(batches) == len(direct)
    for one, two, three in zip(fast, slow, direct, strict=True):
        assert torch.equal(one.x, two.x) and torch.equal(one.x, three.x)
        assert torch.equal(one.labels, two.labels) and torch.equal(one.labels, three.labels)


def test_workers_parts_make_up_the_batch_and_an_empty_one_has_no_share():
    alone = replace(tiny.trainer(batch_size=25).batches, augmentation=None)
    size = 3
    parts = [epoch(replace(alone, group=Group(rank, size))) for rank in range(size)]
    for number, whole in enumerate(epoch(alone)):
        mine = [part[number] for part in parts]
        assert all(batch.count == len(whole.x) for batch in mine)
        assert torch.equal(torch.cat([b.x for b in mine]), whole.x)
        assert sum(b.share for b in mine) == pytest.approx(1)
    generator = seeded()
    ones = [replace(alone, group=Group(r, size)).prepare(torch.tensor([3]), generator)
            for r in range(size)]  # fmt: skip
    assert sorted(b.share for b in ones) == [0, 0, 1] and all(len(b.x) == 1 for b in ones)


def test_what_goes_wrong_in_the_background_is_raised_and_the_thread_ends(monkeypatch):
    batches = tiny.trainer().batches
    before = threading.active_count()
    prepare, calls = Batches.prepare, []

    def failing(self, *arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise OSError("the disk is gone")
        return prepare(self, *arguments)

    monkeypatch.setattr(Batches, "prepare", failing)
    with pytest.raises(OSError, match="the disk is gone"):
        epoch(batches)
    assert threading.active_count() == before


def test_an_epoch_left_early_prepares_no_more_than_was_ahead(monkeypatch):
    batches = tiny.trainer(batch_size=4).batches
    prepare, calls = Batches.prepare, []

    def counted(self, *arguments):
        calls.append(arguments)
        return prepare(self, *arguments)

    monkeypatch.setattr(Batches, "prepare", counted)
    before = threading.active_count()
    with closing(batches.epoch(seeded(), nothing_spent())) as stream:
        next(stream)
    assert threading.active_count() == before and len(calls) <= 1 + AHEAD < len(batches)


def test_time_is_told_apart():
    spent = nothing_spent()
    assert list(tiny.trainer().batches.epoch(seeded(), spent))
    assert spent["data"] > 0 and spent["preparing"] > 0 and spent["step"] == 0
