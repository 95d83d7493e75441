"""The page of ``neocog explain`` in a browser: pointing, playing, trying, remembering."""

from __future__ import annotations

import json
import re
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from browsing import box_of, go, opened, state, wait
from explained import CLASSES, Broken, Unknown

import neocog
from neocog.web.page import make_page
from neocog.web.payload import About
from neocog.web.server import Server

if TYPE_CHECKING:
    from playwright.sync_api import Browser
    from playwright.sync_api import Page as Tab

pytestmark = pytest.mark.slow


# Pointing


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *(("padded", "conv"), ("strided", "conv"), ("dilated", "conv"), ("grouped", "conv")),
        *(("residual", "add"), ("residual", "act"), ("largest", "pool"), ("average", "pool")),
    ],
)
def test_a_border_pixel_by_mouse(tab: Tab, page, name: str, kind: str) -> None:
    go(tab, box=box_of(page[0], name, kind), channel=1, y=2, x=2)
    canvas = tab.locator("canvas.large")
    cell = float(canvas.get_attribute("data-cell"))
    canvas.hover(position={"x": cell / 2, "y": cell / 2})
    wait(tab)
    found = state(tab)
    assert (found["y"], found["x"], found["held"]) == (0, 0, False)
    tables = tab.locator(".part-sum table.input, .part-sum table.value").first
    # the corner of a window of 3x3 over a row and a column of padding
    assert tables.locator("td.padding").count() == 5
    assert tab.locator(".check").get_attribute("data-matches") == "true"
    canvas.click(position={"x": cell / 2, "y": cell * 1.5})
    wait(tab)
    assert (state(tab)["y"], state(tab)["held"]) == (1, True)
    canvas.hover(position={"x": cell * 2.5, "y": cell * 2.5})
    assert (state(tab)["y"], state(tab)["x"]) == (1, 0)  # held
    tab.keyboard.press("Escape")
    assert state(tab)["held"] is False


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *((name, "conv") for name in ("padded", "strided", "dilated", "grouped", "residual")),
        *(("largest", "pool"), ("average", "pool")),
    ],
)
def test_a_border_pixel_by_keyboard(tab: Tab, page, name: str, kind: str) -> None:
    index = box_of(page[0], name, kind)
    go(tab, box=index, channel=0, y=1, x=1)
    tab.locator("canvas.large").focus()
    for key in ("ArrowUp", "ArrowLeft", "ArrowLeft", "PageDown"):
        tab.keyboard.press(key)
        wait(tab)
    found = state(tab)
    assert (found["channel"], found["y"], found["x"]) == (1, 0, 0)
    tables = tab.locator(".part-sum table.input, .part-sum table.value")
    assert tables.first.locator("td.padding").count() == 5
    assert tab.locator(".check").get_attribute("data-matches") == "true"
    assert tab.evaluate("() => document.activeElement.className") == "large"
    assert "row 0, column 0" in tab.locator(".part-map .readout").inner_text()


def test_a_finger_points_too(browser: Browser, page) -> None:
    with opened(
        browser, page[1], has_touch=True, viewport={"width": 360, "height": 740}, is_mobile=True
    ) as tab:
        go(tab, box=box_of(page[0], "padded", "conv"), channel=0, y=9, x=9)
        canvas = tab.locator("canvas.large")
        cell = float(canvas.get_attribute("data-cell"))
        canvas.tap(position={"x": cell * 0.5, "y": cell * 0.5})
        wait(tab)
        assert (state(tab)["y"], state(tab)["x"]) == (0, 0)


# Play and try


def test_play_fills_the_map_and_stops_at_its_end(tab: Tab, page) -> None:
    index = box_of(page[0], "strided", "conv")
    go(tab, box=index, channel=0, y=2, x=2)
    tab.evaluate("() => { window.neocog.page.player.speed = 5; }")
    tab.locator('[data-key="play"]').click()
    tab.wait_for_function("() => window.neocog.page.state.filled > 2")
    tab.locator('[data-key="play"]').click()  # pause
    paused = state(tab)
    assert paused["filled"] == paused["y"] * 5 + paused["x"] + 1
    tab.locator('[data-key="next"]').click()
    assert state(tab)["filled"] == paused["filled"] + 1
    tab.locator('[data-key="back"]').click()
    assert state(tab)["filled"] == paused["filled"]
    tab.evaluate("() => { window.neocog.page.player.speed = 200; }")
    tab.locator('[data-key="play"]').click()
    tab.wait_for_function("() => window.neocog.page.state.filled === 25")
    tab.wait_for_function("() => !window.neocog.page.player.playing")
    assert (state(tab)["y"], state(tab)["x"]) == (4, 4)
    tab.locator('[data-key="whole"]').click()
    assert state(tab)["filled"] is None


def test_what_is_not_played_yet_is_not_drawn(tab: Tab, page) -> None:
    go(tab, box=box_of(page[0], "strided", "conv"), channel=0, y=0, x=1, filled=2)
    pixels = tab.evaluate(
        """() => { const canvas = document.querySelector("canvas.large");
        const context = canvas.getContext("2d"), cell = canvas.width / 5;
        return [0, 4].map((at) => { const area = context.getImageData(at * cell + 3, at * cell + 3, cell - 6, cell - 6).data;
        return new Set(Array.from({ length: area.length / 4 }, (_, i) => area.slice(4 * i, 4 * i + 3).join())).size; }); }"""  # noqa: E501
    )
    assert pixels[0] == 1 and pixels[1] > 1  # one colour, and hatching


@pytest.mark.parametrize(
    "setting",
    [{"stride": 2}, {"padding": 0}, {"dilation": 2}, {"size": 5}, {"size": 1}, {"size": 4}],
    ids=str,
)
def test_try_computes_another_window(tab: Tab, page, network, setting: dict[str, int]) -> None:
    made, model = page[0], network[0]
    index = box_of(made, "grouped", "conv")
    go(tab, box=index, channel=3, y=0, x=0)
    for name, value in setting.items():
        tab.locator(f'[data-key="try-{name}"]').fill(str(value))
    own = {"size": 3, "stride": 1, "padding": 1, "dilation": 1, **setting}
    size = own["size"]
    kernel = model.grouped.weight.detach()
    grown = torch.zeros(*kernel.shape[:2], size, size)
    for y in range(size):
        for x in range(size):
            ky, kx = y - (size - 3) // 2, x - (size - 3) // 2
            if 0 <= ky < 3 and 0 <= kx < 3:
                grown[:, :, y, x] = kernel[:, :, ky, kx]
    source = made.scene.boxes[made.scene.boxes[index].inputs[0]].output
    window = (own["stride"], own["padding"], own["dilation"], 3)
    expected = torch.nn.functional.conv2d(source, grown, None, *window)[0, 3]
    shape = f"size {expected.shape[0]}×{expected.shape[1]} "
    tab.wait_for_function(
        "(text) => document.querySelector('.trial').textContent.includes(text)", arg=shape
    )
    values = json.loads(tab.locator(".trial").get_attribute("data-values"))
    assert values == pytest.approx(expected.ravel().tolist(), abs=1e-5)
    assert f"= {expected.shape[0]}" in tab.locator(".trial .formula").first.inner_text()


def test_try_a_pool_and_a_window_that_does_not_fit(tab: Tab, page) -> None:
    made = page[0]
    index = box_of(made, "average", "pool")
    go(tab, box=index, channel=2, y=0, x=0)
    tab.locator('[data-key="try-size"]').fill("2")
    tab.wait_for_function("() => document.querySelector('.trial').textContent.includes('6×6')")
    source = made.scene.boxes[made.scene.boxes[index].inputs[0]].output
    expected = torch.nn.functional.avg_pool2d(source, 2, 1, 1, count_include_pad=False)[0, 2]
    values = json.loads(tab.locator(".trial").get_attribute("data-values"))
    assert values == pytest.approx(expected.ravel().tolist(), abs=1e-6)
    tab.locator('[data-key="try-size"]').fill("9")
    tab.wait_for_function("() => document.querySelector('.trial .bad')")
    assert "floor((5 - 1*(9-1) - 1 + 1 + 1)/1) + 1 = -1" in tab.locator(".trial").inner_text()
    tab.locator('[data-key="try-reset"]').click()
    assert tab.locator('[data-key="try-size"]').input_value() == "3"


# Language, theme, address


def test_korean_and_english(tab: Tab, page) -> None:
    go(tab, box=box_of(page[0], "padded", "pool"), channel=0, y=0, x=0)
    assert tab.evaluate("() => document.documentElement.lang") == "en"
    assert "max pool 2×2" in tab.locator(".part-map").inner_text()
    tab.locator('[data-key="lang"]').click()
    wait(tab)
    assert tab.evaluate("() => document.documentElement.lang") == "ko"
    shown = tab.locator("#app").inner_text()
    assert "최대 풀링 2×2" in shown and "이 숫자는 어디에서 왔을까" in shown
    # nothing is left in English but names, formulas and the model's own words
    words = set(re.findall(r"[A-Za-z]{4,}", shown)) - {"neocog", "English", "floor", "relu", "silu"}
    names = {box["name"] for box in page[0].data["boxes"]} | set(CLASSES)
    own = {"sampler", "image", "conv", "bias", "direct", "pool", "native", "pack"}
    plan = set(re.findall(r"[A-Za-z]{4,}", tab.locator(".facts").inner_text()))
    assert words - names - own - plan == set()


def test_both_languages_say_the_same_things(tab: Tab) -> None:
    keys = tab.evaluate(
        """async () => { const { LANGUAGES } = await import("neocog/texts");
        return Object.values(LANGUAGES).map((texts) => [...Object.keys(texts),
          ...Object.keys(texts.kinds), ...Object.keys(texts.words)]); }"""
    )
    assert keys[0] == keys[1]


def test_a_korean_browser_starts_in_korean(browser: Browser, page) -> None:
    with opened(browser, page[1], locale="ko-KR") as tab:
        assert tab.evaluate("() => document.documentElement.lang") == "ko"


def test_the_address_brings_everything_back(browser: Browser, tab: Tab, page) -> None:
    index = box_of(page[0], "dilated", "act")
    go(tab, box=index, channel=4, y=3, x=1, held=True, lang="ko", theme="dark")
    wanted = f"#box={index}&channel=4&at=3,1"
    tab.wait_for_function("(text) => location.hash.startsWith(text)", arg=wanted)
    address = tab.url
    with opened(browser, address) as again:
        found = state(again)
        wanted = {"box": index, "channel": 4, "y": 3, "x": 1, "held": True}
        assert {name: found[name] for name in wanted} == wanted
        assert (found["lang"], found["theme"]) == ("ko", "dark")
        assert again.evaluate("() => document.documentElement.dataset.theme") == "dark"


@pytest.mark.parametrize("address", ["#box=999&channel=77&at=99,99", "#box=x&at=1", "#%%%"])
def test_addresses_of_nothing_show_something(browser: Browser, page, address: str) -> None:
    with opened(browser, page[1].absolute().as_uri() + address) as tab:
        assert tab.locator(".check").get_attribute("data-matches") == "true"


@pytest.mark.parametrize("width", [360, 780, 1250, 1920])
def test_no_page_is_wider_than_its_window(browser: Browser, page, width: int) -> None:
    with opened(browser, page[1], viewport={"width": width, "height": 900}) as tab:
        for name, kind in (("padded", "pool"), ("residual", "act"), ("head", "linear")):
            go(tab, box=box_of(page[0], name, kind), channel=0, y=0, x=0)
            across = tab.evaluate("() => document.documentElement.scrollWidth")
            assert across <= width, (name, across)


def test_everything_can_be_reached_and_has_a_name(tab: Tab) -> None:
    unnamed = tab.evaluate(
        """() => [...document.querySelectorAll("button, input, canvas[role]")].filter((element) =>
        !(element.textContent.trim() || element.getAttribute("aria-label") || element.labels?.length
          || element.title)).map((element) => element.outerHTML)"""
    )
    assert unnamed == []
    reached = set()
    for _ in range(60):
        tab.keyboard.press("Tab")
        reached.add(tab.evaluate("() => (document.activeElement.dataset.key ?? '').split('-')[0]"))
    assert {"lang", "theme", "card", "tab", "map", "play", "channel", "scale"} <= reached


# Larger, unknown and broken networks


def test_what_is_not_in_the_file_is_said(browser: Browser, network, tmp_path: Path) -> None:
    model, x = network
    about = About(model="sampler", image="image", command="neocog explain sampler image --serve")
    made = make_page(model, x[None], about, layers=["grouped"], budget=2000, timed=False)
    with opened(browser, made.save(tmp_path / "small.html")) as tab:
        go(tab, box=box_of(made, "padded", "conv"), channel=0, y=0, x=0)
        assert "--serve" in tab.locator(".missing").inner_text()
        go(tab, box=box_of(made, "grouped", "conv"), channel=0, y=0, x=0)
        assert tab.locator(".check").get_attribute("data-matches") == "true"


def test_a_served_page_has_every_number(browser: Browser, network) -> None:
    model, x = network
    made = make_page(model, x[None], About("sampler", "image"), serve=True, timed=False)
    with Server(made) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with opened(browser, server.url) as tab:
            for index, box in enumerate(made.data["boxes"]):
                if box["kind"] != "image":
                    go(tab, box=index, channel=1, y=0, x=0)
                    assert tab.locator(".check").get_attribute("data-matches") == "true"
        server.shutdown()


def test_a_server_that_stops_is_said(browser: Browser, network) -> None:
    model, x = network
    made = make_page(model, x[None], About("sampler", "image"), serve=True, timed=False)
    server = Server(made)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    context = browser.new_context()
    tab = context.new_page()
    tab.goto(server.url)
    wait(tab)
    server.shutdown()
    server.server_close()
    tab.evaluate("(box) => window.neocog.page.go({ box })", box_of(made, "head", "linear"))
    tab.wait_for_selector("[role=alert]")
    assert "is the server still running" in tab.locator(".part-sum").inner_text()
    context.close()


def test_a_notebooks_frame_shows_the_page(browser: Browser, page, tmp_path: Path) -> None:
    host = tmp_path / "notebook.html"
    host.write_text(f"<!doctype html><meta charset=utf-8>{page[0]._repr_html_()}", encoding="utf-8")
    tab = browser.new_page()
    errors: list[str] = []
    tab.on("pageerror", lambda error: errors.append(str(error)))
    tab.goto(host.as_uri())
    check = tab.frame_locator("iframe").locator(".check")
    check.wait_for()
    assert check.get_attribute("data-matches") == "true"
    assert errors == []
    tab.close()


def test_a_vector_of_many_values(browser: Browser, tmp_path: Path) -> None:
    torch.manual_seed(0)
    layers = (torch.nn.Conv2d(3, 48, 3, padding=1), torch.nn.Flatten())
    made = neocog.explain(torch.nn.Sequential(*layers), torch.randn(3, 56, 56), timed=False)
    with opened(browser, made.save(tmp_path / "long.html")) as tab:
        go(tab, box=2, channel=150_000)
        assert tab.locator(".check").get_attribute("data-matches") == "true"


def test_a_step_that_neocog_does_not_know(browser: Browser, tmp_path: Path) -> None:
    torch.manual_seed(0)
    made = neocog.explain(Unknown().eval(), torch.randn(1, 8, 8))
    with opened(browser, made.save(tmp_path / "unknown.html")) as tab:
        go(tab, box=box_of(made, "shuffle", "plain"), channel=0, y=0, x=0)
        assert "does not know this step" in tab.locator(".part-sum").inner_text()


def test_a_network_that_fails_says_where_and_why(browser: Browser, tmp_path: Path) -> None:
    made = neocog.explain(Broken(), torch.randn(1, 6, 6))
    with opened(browser, made.save(tmp_path / "broken.html")) as tab:
        text = tab.locator(".failure").inner_text()
        assert "The network stops here" in text and "takes 100 numbers" in text
        assert tab.locator(".check").get_attribute("data-matches") == "true"


def test_colours_tell_signs_apart_for_everybody(tab: Tab) -> None:
    """Positive and negative differ in blue-yellow, which red-green blindness leaves."""
    found = tab.evaluate(
        """async () => { const { colour } = await import("neocog/colours");
        return ["light", "dark"].map((theme) => [-1, -0.5, 0.5, 1].map((share) => colour(share, theme))); }"""  # noqa: E501
    )
    for theme in found:
        blueness = [b - r for r, _, b in theme]
        assert blueness[0] < -60 and blueness[1] < -60 and blueness[2] > 60 and blueness[3] > 60
