"""Single pictures: every kind of file, every kind of damage, and the framing of digits."""

import io
import os
import socket

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw, features

from neocog.data import load
from neocog.errors import InvalidData
from neocog.images import expand, open_picture, probe, read_picture
from neocog.strokes import frame_digit, is_framed, is_light, otsu

GREY = np.arange(12, dtype=np.uint8).reshape(3, 4) * 20
COLOUR = np.stack([GREY, 255 - GREY, GREY // 2], axis=2)


def saved(path, image, **options):
    image.save(path, **options)
    return path


@pytest.fixture(scope="module")
def digits():
    """One of each class, uint8 [10, 28, 28]."""
    test = load().test
    first = [int(torch.nonzero(test.labels == label)[0]) for label in range(10)]
    return test.images[first, 0].numpy()


# --- kinds of files -------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif", "webp", "pgm"])
def test_a_grey_file_comes_back_exactly(tmp_path, suffix):
    options = {"lossless": True} if suffix == "webp" else {}
    path = saved(tmp_path / f"a.{suffix}", Image.fromarray(GREY), **options)
    # WebP knows no grey: its pixels come back as colours, and grey again when asked for.
    picture = read_picture(path, 1, (3, 4))
    assert picture.tensor.dtype == torch.uint8
    assert picture.tensor.shape == (1, 3, 4)
    assert np.array_equal(picture.tensor[0].numpy(), GREY)
    assert picture.original_size == (3, 4)


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif", "ppm"])
def test_a_colour_file_comes_back_exactly(tmp_path, suffix):
    path = saved(tmp_path / f"a.{suffix}", Image.fromarray(COLOUR))
    picture = read_picture(path, 3, (3, 4))
    assert np.array_equal(picture.tensor.permute(1, 2, 0).numpy(), COLOUR)
    assert picture.notes == ()


def test_another_number_of_channels_is_converted_and_said(tmp_path):
    grey = saved(tmp_path / "grey.png", Image.fromarray(GREY))
    picture = read_picture(grey, 3, (3, 4))
    assert all(np.array_equal(channel, GREY) for channel in picture.tensor)
    assert picture.notes == ("grey repeated as red, green and blue: the network takes 3 channels",)
    colour = saved(tmp_path / "colour.png", Image.fromarray(COLOUR))
    picture = read_picture(colour, 1, (3, 4))
    luma = COLOUR @ [0.299, 0.587, 0.114]
    assert np.abs(picture.tensor[0].numpy() - luma).max() <= 1
    assert picture.notes == ("colour reduced to grey: the network takes 1 channel",)


def test_no_picture_gives_two_channels(tmp_path):
    path = saved(tmp_path / "a.png", Image.fromarray(GREY))
    with pytest.raises(InvalidData, match=r"a\.png: .* 1 channel .* or 3 .* takes 2"):
        read_picture(path, 2, (3, 4))


def test_another_size_is_resized_and_said(tmp_path):
    path = saved(tmp_path / "a.png", Image.new("L", (40, 20), 70))
    picture = read_picture(path, 1, (10, 20))
    assert picture.tensor.shape == (1, 10, 20)
    assert set(picture.tensor.unique().tolist()) == {70}
    assert picture.original_size == (20, 40)
    assert picture.notes == ("resized from 20 x 40 to 10 x 20",)
    assert read_picture(path, 1, (10, 10)).notes == (
        "resized from 20 x 40 to 10 x 10, which changes its proportions",
    )


@pytest.mark.parametrize(
    ("orientation", "undo"),
    [
        (1, lambda a: a),
        (2, lambda a: a[:, ::-1]),
        (3, lambda a: a[::-1, ::-1]),
        (4, lambda a: a[::-1]),
        (5, lambda a: a.T),
        (6, lambda a: np.rot90(a, -1)),
        (7, lambda a: a[::-1, ::-1].T),
        (8, lambda a: np.rot90(a, 1)),
    ],
)
@pytest.mark.parametrize("suffix", ["png", "tif", "lzw.tif", "webp", "avif", "jpg"])
def test_the_exif_orientation_is_honoured(tmp_path, suffix, orientation, undo):
    if suffix == "avif" and not features.check("avif"):
        pytest.skip("NOT TESTED: AVIF (Pillow was built without)")
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {
        "webp": {"lossless": True},
        "lzw.tif": {"compression": "tiff_lzw"},
        "avif": {"quality": 100},
        "jpg": {"quality": 100},
    }.get(suffix, {})
    path = saved(tmp_path / f"a.{suffix}", Image.fromarray(GREY), exif=exif, **options)
    expected = undo(GREY)
    picture = read_picture(path, 1, expected.shape)
    exact = suffix not in ("avif", "jpg")
    # of neighbours that differ by 20 or more, a lossy file leaves more than half of that
    assert np.abs(picture.tensor[0].numpy() - expected.astype(float)).max() <= (0 if exact else 9)
    assert picture.original_size == probe(path)[0] == expected.shape
    turned = "turned upright as its EXIF orientation says"
    assert (turned in picture.notes) == (orientation != 1)


def test_transparency_is_laid_on_white(tmp_path):
    rgba = np.zeros((1, 3, 4), dtype=np.uint8)
    rgba[0, :, 0] = 200  # a red of which all, half and nothing is seen
    rgba[0, :, 3] = [255, 128, 0]
    picture = read_picture(saved(tmp_path / "a.png", Image.fromarray(rgba)), 3, (1, 3))
    seen = picture.tensor[:, 0].T.tolist()
    assert seen[0] == [200, 0, 0]
    assert seen[1][0] == pytest.approx(227, abs=1)
    assert seen[1][1] == pytest.approx(127, abs=1)
    assert seen[2] == [255, 255, 255]
    assert picture.notes == ("transparency laid on white",)


def test_an_alpha_channel_that_hides_nothing_is_not_worth_a_note(tmp_path):
    opaque = np.dstack([COLOUR, np.full((3, 4), 255, dtype=np.uint8)])
    picture = read_picture(saved(tmp_path / "a.png", Image.fromarray(opaque)), 3, (3, 4))
    assert np.array_equal(picture.tensor.permute(1, 2, 0).numpy(), COLOUR)
    assert picture.notes == ()


def test_grey_with_alpha_and_grey_with_a_transparent_level_stay_grey(tmp_path):
    la = Image.merge("LA", [Image.fromarray(GREY), Image.new("L", (4, 3), 0)])
    image, notes = open_picture(saved(tmp_path / "la.png", la))
    assert (image.mode, image.getextrema()) == ("L", (255, 255))
    assert notes == ["transparency laid on white"]
    keyed = saved(tmp_path / "keyed.png", Image.fromarray(GREY), transparency=0)
    image, notes = open_picture(keyed)
    assert image.mode == "L"
    assert np.array_equal(np.asarray(image), np.where(GREY == 0, 255, GREY))


def test_a_palette_is_grey_if_the_entries_in_use_are(tmp_path):
    indices = np.array([[0, 1], [2, 1]], dtype=np.uint8)
    greys = Image.fromarray(indices, "P")
    greys.putpalette([0, 0, 0, 90, 90, 90, 200, 200, 200, 255, 0, 0])
    image, _ = open_picture(saved(tmp_path / "grey.png", greys))
    assert image.mode == "L"
    assert np.asarray(image).tolist() == [[0, 90], [200, 90]]
    colours = greys.copy()
    colours.putpalette([0, 0, 0, 90, 0, 0, 200, 200, 200])
    image, _ = open_picture(saved(tmp_path / "colour.png", colours))
    assert image.mode == "RGB"
    assert np.asarray(image)[0, 1].tolist() == [90, 0, 0]


def test_a_transparent_palette_entry_becomes_white(tmp_path):
    image = Image.fromarray(np.array([[0, 1]], dtype=np.uint8), "P")
    image.putpalette([10, 20, 30, 90, 0, 0])
    path = saved(tmp_path / "a.gif", image, transparency=0)
    assert np.asarray(open_picture(path)[0])[0].tolist() == [[255, 255, 255], [90, 0, 0]]


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bits_become_8(tmp_path, suffix):
    deep = np.array([[0, 257, 128 * 257, 65535]], dtype=np.uint16)
    image, notes = open_picture(saved(tmp_path / f"a.{suffix}", Image.fromarray(deep)))
    assert np.asarray(image).tolist() == [[0, 1, 128, 255]]
    assert notes == ["reduced to 8 bits"]


def test_fractions_become_8_bits_and_a_nan_is_refused(tmp_path):
    values = np.array([[0, 0.5, 1]], dtype=np.float32)
    image, _ = open_picture(saved(tmp_path / "a.tif", Image.fromarray(values)))
    assert np.asarray(image).tolist() == [[0, 128, 255]]
    values[0, 1] = np.nan
    path = saved(tmp_path / "nan.tif", Image.fromarray(values))
    with pytest.raises(InvalidData, match=r"nan\.tif: its values reach from nan to nan"):
        open_picture(path)
    far = saved(tmp_path / "far.tif", Image.fromarray(values * np.nan_to_num(np.inf)))
    with pytest.raises(InvalidData, match="expected 0 to 1"):
        open_picture(far)


def test_bilevel_and_cmyk_pictures(tmp_path):
    bilevel = Image.fromarray(GREY > 100)
    image, _ = open_picture(saved(tmp_path / "a.png", bilevel))
    assert np.array_equal(np.asarray(image), (GREY > 100) * np.uint8(255))
    cmyk = Image.new("CMYK", (2, 2), (0, 255, 255, 0))
    image, notes = open_picture(saved(tmp_path / "a.tif", cmyk))
    assert image.getpixel((0, 0)) == (255, 0, 0)
    assert notes == ["CMYK converted to RGB"]


def test_of_a_film_the_first_frame_is_read_and_that_is_said(tmp_path):
    frames = [Image.new("L", (4, 4), level) for level in (10, 200)]
    path = saved(tmp_path / "a.gif", frames[0], save_all=True, append_images=frames[1:])
    image, notes = open_picture(path)
    assert image.getpixel((0, 0)) == 10
    assert notes == ["only the first frame is read"]


# --- damage ---------------------------------------------------------------------------------------


def test_what_is_no_picture_is_named(tmp_path):
    with pytest.raises(InvalidData, match=r"gone\.png: no such file"):
        open_picture(tmp_path / "gone.png")
    with pytest.raises(InvalidData, match="is a folder, expected a picture"):
        open_picture(tmp_path)
    (tmp_path / "text.png").write_text("not a picture")
    with pytest.raises(InvalidData, match=r"text\.png: not a picture .*\(13 bytes\)"):
        open_picture(tmp_path / "text.png")
    (tmp_path / "empty.png").touch()
    with pytest.raises(InvalidData, match=r"empty\.png: not a picture .*\(0 bytes\)"):
        open_picture(tmp_path / "empty.png")


@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "bmp", "tif", "webp"])
def test_a_truncated_file_is_one_line_that_names_it(tmp_path, suffix):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    whole = saved(tmp_path / f"whole.{suffix}", Image.fromarray(noise)).read_bytes()
    path = tmp_path / f"cut.{suffix}"
    for share in (0.9, 0.5, 0.1):
        path.write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(InvalidData) as caught:
            open_picture(path)
        assert f"cut.{suffix}: " in str(caught.value)
        assert "\n" not in str(caught.value)


def test_damaged_bytes_never_raise_anything_else(tmp_path):
    noise = np.random.default_rng(1)
    pixels = noise.integers(0, 256, (16, 16, 3), dtype=np.uint8)
    path, refused = tmp_path / "damaged", 0
    for suffix in ("png", "gif", "tiff", "bmp"):
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, suffix)
        for _ in range(60):
            data = bytearray(buffer.getvalue())
            for place in noise.integers(0, min(len(data), 200), 4):
                data[place] = noise.integers(0, 256)
            path.write_bytes(data)
            try:
                open_picture(path)
            except InvalidData:
                refused += 1
    assert refused > 100  # most of the damage is seen, and all of it in the one way


def test_what_is_no_file_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "gone.png").symlink_to("nowhere")
    (tmp_path / "loop.png").symlink_to("loop.png")
    (tmp_path / "null.png").symlink_to("/dev/null")
    with socket.socket(socket.AF_UNIX) as listening:
        here = os.getcwd()
        os.chdir(tmp_path)  # a socket's name may have 107 characters
        listening.bind("socket.png")
        os.chdir(here)
        for name, reason in {
            "pipe": "is a pipe, expected a picture",
            "gone": "is a link to a file that is not there, expected a picture",
            "loop": "cannot be read (Too many levels of symbolic links)",
            "null": "is a character device, expected a picture",
            "socket": "is a socket, expected a picture",
        }.items():
            path = tmp_path / f"{name}.png"
            for read in (open_picture, probe):
                with pytest.raises(InvalidData) as caught:
                    read(path)
                assert str(caught.value) == f"{path}: {reason}"


def test_damaged_exif_data_do_not_cost_the_picture(tmp_path):
    path = saved(tmp_path / "a.png", Image.fromarray(GREY), exif=b"Exif\0\0no TIFF at all")
    image, notes = open_picture(path)
    assert np.array_equal(np.asarray(image), GREY)
    assert notes == ["its EXIF data are damaged: taken as it stands in the file"]
    assert probe(path) == (GREY.shape, True)


# --- folders of pictures --------------------------------------------------------------------------


def test_folders_expand_to_their_pictures_in_natural_order(tmp_path):
    inner = tmp_path / "inner"
    (inner / "deep").mkdir(parents=True)
    (inner / ".hidden").mkdir()
    blank = Image.new("L", (2, 2))
    for name in ("10.png", "2.PNG", "deep/1.jpg", ".thumb.png", ".hidden/x.png"):
        blank.save(inner / name)
    (inner / "notes.txt").write_text("no picture")
    single = saved(tmp_path / "odd.name", blank, format="png")
    found = expand([single, inner])
    assert [str(path.relative_to(tmp_path)) for path in found] == [
        "odd.name",
        "inner/2.PNG",
        "inner/10.png",
        "inner/deep/1.jpg",
    ]


def test_nothing_to_expand_is_an_error(tmp_path):
    with pytest.raises(InvalidData, match="gone: no such file or folder"):
        expand([tmp_path / "gone"])
    with pytest.raises(InvalidData, match="this folder holds no picture"):
        expand([tmp_path])


# --- background and framing -----------------------------------------------------------------------


def test_a_picture_the_other_way_round_is_inverted_for_a_network_of_one_background(tmp_path):
    paper = np.full((10, 10), 230, dtype=np.uint8)
    paper[3:7, 3:7] = 20
    path = saved(tmp_path / "paper.png", Image.fromarray(paper))
    plain = read_picture(path, 1, (10, 10), background="mixed")
    assert np.array_equal(plain.tensor[0].numpy(), paper)
    assert np.array_equal(read_picture(path, 1, (10, 10), background="light").tensor, plain.tensor)
    inverted = read_picture(path, 1, (10, 10), background="dark")
    assert np.array_equal(inverted.tensor[0].numpy(), 255 - paper)
    assert inverted.notes == ("inverted: the network has learned pictures on a dark background",)


def test_which_way_round_is_judged_within_the_picture(digits):
    assert not any(is_light(digit) for digit in digits)
    assert all(is_light(255 - digit) for digit in digits)
    shaded = (110 - digits[3] * 0.3).astype(np.uint8)  # ink on paper in the dark: all below 128
    assert is_light(shaded)
    assert is_light(np.full((5, 5), 255, dtype=np.uint8))
    assert not is_light(np.zeros((5, 5), dtype=np.uint8))


def test_otsu_splits_two_levels_in_the_middle_and_agrees_with_brute_force():
    assert otsu(np.array([[10, 10, 10, 30]], dtype=np.uint8)) == 19.5
    grey = np.random.default_rng(2).normal([[60], [170]], 20, (2, 500)).clip(0, 255)
    grey = grey.astype(np.uint8)

    def between(level):
        low, high = grey[grey <= level], grey[grey > level]
        return len(low) * len(high) * (low.mean() - high.mean()) ** 2

    levels = range(int(grey.min()), int(grey.max()))
    assert between(int(otsu(grey))) == pytest.approx(max(between(level) for level in levels))


def test_mnists_digits_are_framed_and_shifted_ones_are_not(digits):
    everything = load(val_fraction=0).train.images[:, 0].numpy()
    assert is_framed(everything).all()
    assert not is_framed(np.roll(digits, 3, axis=2)).any()
    assert not is_framed(255 - digits).any()
    assert not is_framed(np.zeros((2, 28, 28), dtype=np.uint8)).any()
    assert not is_framed(np.zeros((2, 32, 32), dtype=np.uint8)).any()


def test_a_framed_digit_is_left_alone_or_only_inverted(tmp_path, digits):
    for digit in digits:
        path = saved(tmp_path / "a.png", Image.fromarray(digit))
        picture = read_picture(path, 1, (28, 28), digit_like=True)
        assert np.array_equal(picture.tensor[0].numpy(), digit)
        assert picture.notes == ()
        path = saved(tmp_path / "b.png", Image.fromarray(255 - digit))
        picture = read_picture(path, 1, (28, 28), digit_like=True)
        assert np.array_equal(picture.tensor[0].numpy(), digit)
        assert picture.notes == ("inverted: the network has learned light digits on black",)


@pytest.mark.parametrize("ink_on_paper", [False, True])
def test_a_large_digit_anywhere_is_brought_into_mnists_frame(tmp_path, digits, ink_on_paper):
    for label, digit in enumerate(digits):
        scene = Image.new("L", (300, 200), 0)
        scene.paste(Image.fromarray(digit).resize((112, 112)), (150, 60))
        values = np.asarray(scene).astype(float)
        # paper lit from one side, with its grain; the pen is not quite black
        paper = np.random.default_rng(label).normal(np.linspace(160, 205, 300), 4, values.shape)
        levels = paper * (1 - values / 300) if ink_on_paper else values
        image = Image.fromarray(levels.clip(0, 255).astype(np.uint8))
        path = saved(tmp_path / "a.png", image.convert("RGB"))
        picture = read_picture(path, 1, (28, 28), digit_like=True)
        framed = picture.tensor[0].numpy()
        assert is_framed(framed[None]).all()
        assert framed.max() == 255
        assert framed[0].max() == 0
        assert np.corrcoef(framed.ravel(), digit.ravel())[0, 1] > 0.8
        assert any("inverted" in note for note in picture.notes) == ink_on_paper
        assert any("colour reduced to grey" in note for note in picture.notes)
        assert any("cut out of 200 x 300, fitted into 20 x 20" in n for n in picture.notes)


def test_a_thin_line_keeps_its_brightness_and_a_dot_its_shape():
    page = Image.new("L", (400, 400), 255)
    ImageDraw.Draw(page).line((200, 20, 200, 380), fill=0, width=6)
    framed, _ = frame_digit(np.asarray(page))
    lit_rows, lit_columns = np.flatnonzero(framed.any(axis=1)), np.flatnonzero(framed.any(axis=0))
    assert framed.max() == 255
    assert (len(lit_rows), len(lit_columns)) == (20, 1)
    assert (lit_rows[0], lit_columns[0]) == (4, 14)


def test_the_grain_of_paper_is_no_stroke():
    paper = np.random.default_rng(3).normal(np.linspace(120, 200, 90), 6, (70, 90))
    paper = paper.astype(np.uint8)
    same, notes = frame_digit(paper)
    assert np.array_equal(same, paper)
    assert notes == ["no stroke found: the picture is of one shade"]


@given(data=st.data(), height=st.integers(1, 40), width=st.integers(1, 40))
def test_any_picture_is_framed_or_said_to_be_blank(data, height, width):
    pixels = data.draw(st.binary(min_size=height * width, max_size=height * width))
    grey = np.frombuffer(pixels, dtype=np.uint8).reshape(height, width)
    framed, notes = frame_digit(grey)
    blank = notes == ["no stroke found: the picture is of one shade"]
    assert framed.shape == (grey.shape if blank else (28, 28))
    assert blank or framed.max() >= 32


def test_a_blank_page_is_said(tmp_path):
    path = saved(tmp_path / "blank.png", Image.new("L", (50, 40), 250))
    picture = read_picture(path, 1, (28, 28), digit_like=True)
    assert picture.tensor.shape == (1, 28, 28)
    assert picture.notes[0] == "no stroke found: the picture is of one shade"
    assert picture.notes[1].startswith("resized from 40 x 50 to 28 x 28")
