"""Augmentation: what is done to pictures, by chance that a generator settles."""

from __future__ import annotations

import math

import pytest
import tiny
import torch

from neocog import data
from neocog.augmentation import Augmentation


def centres(images: torch.Tensor) -> torch.Tensor:
    """[N, 2]: row and column of each picture's centre of mass, from the middle of the picture."""
    mass = images[:, 0].double()
    total = mass.sum(dim=(1, 2))
    rows = torch.arange(mass.shape[1]) - (mass.shape[1] - 1) / 2
    cols = torch.arange(mass.shape[2]) - (mass.shape[2] - 1) / 2
    return (
        torch.stack([(mass.sum(2) @ rows.double()), (mass.sum(1) @ cols.double())], 1)
        / (total[:, None])
    )


def blobs(count: int) -> torch.Tensor:
    """The same blob in the very middle of each of ``count`` pictures of 28 x 28."""
    line = torch.arange(28) - 13.5
    one = 255 * torch.exp(-(line[:, None] ** 2 + line[None] ** 2) / 40)
    return one.to(torch.uint8).expand(count, 1, 28, 28)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_turning_scaling_and_slanting_leave_every_picture_where_it_is():
    moved = centres(Augmentation(bend=0.0)(blobs(500), seeded(0)))
    assert moved.abs().max() < 0.02


def test_bending_moves_pictures_hardly_and_on_average_nowhere():
    moved = centres(Augmentation()(blobs(3000), seeded(0)))
    assert moved.mean(dim=0).abs().max() < 4 * 0.5 / math.sqrt(3000)
    assert moved.std(dim=0).max() < 0.5
    # and the same measurement does see pictures that are moved, by up to 2 pixels evenly
    shifted = centres(Augmentation(shift=2.0)(blobs(3000), seeded(0)))
    assert shifted.std(dim=0).min() > 1.0


def test_the_augmentation_of_training_never_shifts():
    trainer = tiny.trainer()
    assert trainer.augmentation is not None and trainer.augmentation.shift == 0
    assert tiny.trainer(augment=False).augmentation is None


def test_augmentation_is_settled_by_its_generator_and_differs_from_picture_to_picture():
    images = blobs(8)
    one = Augmentation()(images, seeded(3))
    assert torch.equal(one, Augmentation()(images, seeded(3)))
    assert not torch.equal(one, Augmentation()(images, seeded(4)))
    assert all(not torch.equal(one[0], other) for other in one[1:])
    assert one.dtype == torch.float32 and one.shape == images.shape
    assert one.min() >= 0 and one.max() <= 255


def test_without_any_amount_a_picture_stays_as_it_is():
    images = torch.randint(0, 256, (3, 3, 9, 14), dtype=torch.uint8, generator=seeded(1))
    still = Augmentation(rotation=0, scale=0, shear=0, bend=0)(images, seeded(0))
    torch.testing.assert_close(still, images.float(), rtol=0, atol=1e-2)


@pytest.mark.parametrize(("fill", "darkest"), [("zeros", 0), ("border", 199)])
def test_what_comes_in_from_outside(fill, darkest):
    light = torch.full((200, 1, 20, 20), 200, dtype=torch.uint8)
    lowest = Augmentation(fill=fill)(light, seeded(0)).min()
    assert lowest >= darkest and (lowest < 1) == (fill == "zeros")


@pytest.mark.parametrize(("invert", "fill"), [(False, "zeros"), (True, "border")])
def test_training_fills_as_the_background_is(invert, fill):
    images, labels = tiny.pictures(10)
    found = data.from_arrays(255 - images if invert else images, labels, tiny.CLASSES)
    augmentation = tiny.trainer(found).augmentation
    assert augmentation is not None and augmentation.fill == fill


STILL = {"rotation": 0.0, "scale": 0.0, "shear": 0.0, "bend": 0.0}


def test_a_part_of_a_batch_is_distorted_as_within_the_whole():
    images = torch.randint(0, 256, (7, 1, 12, 12), dtype=torch.uint8, generator=seeded(1))
    how = Augmentation(shift=2.0, flip=True, crop=0.3)
    whole = how(images, seeded(3))
    parts = [how(images, seeded(3), part) for part in (slice(0, 3), slice(3, 7))]
    # positions of up to 12 pixels, known to float32's 6e-8, times a slope of up to 255 a pixel
    torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=1e-2)


def test_every_other_picture_is_mirrored():
    images = torch.zeros(400, 1, 8, 8, dtype=torch.uint8)
    images[:, :, :, :3] = 200
    shown = Augmentation(**STILL, flip=True)(images, seeded(0))
    left, right = (shown[:, 0, 4, column] > 100 for column in (1, -2))
    assert torch.equal(left, ~right)
    assert abs(int(left.sum()) - 200) < 4 * 10  # four times the standard deviation
    torch.testing.assert_close(shown[right], images[right].float().flip(3), rtol=0, atol=1e-2)


def test_a_crop_is_a_window_of_the_picture_enlarged():
    ramp = torch.arange(0, 200, 10, dtype=torch.uint8).expand(300, 1, 20, 20)
    shown = Augmentation(**STILL, crop=0.5)(ramp, seeded(0))[:, 0, 10]
    slopes = (shown[:, 14] - shown[:, 5]) / 9 / 10  # of what was 1 a pixel
    assert slopes.min() >= 0.5 - 1e-3 and slopes.max() <= 1 + 1e-3
    assert slopes.std() > 0.1
    # what is seen lies inside: the window's sides are at least half a new pixel from the border
    assert shown.min() >= 0 and shown[:, 1:-1].max() <= 190
    assert shown[:, 0].std() > 10 and shown[:, -1].std() > 10


def test_the_options_of_training_are_what_is_done():
    how = tiny.trainer(shift=1.5, rotation=5.0, flip=True, crop=0.2).augmentation
    assert how == Augmentation(shift=1.5, rotation=5.0, flip=True, crop=0.2, fill=how.fill)
    assert tiny.trainer().augmentation == Augmentation(fill=how.fill)
