"""The page of ``neocog explain`` without a browser: data, budget, server, commands."""

from __future__ import annotations

import base64
import json
import re
import socket
import struct
import threading
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from explained import CLASSES, Broken, Unknown, sampler
from PIL import Image
from typer.testing import CliRunner, Result

import neocog
from neocog import models
from neocog.cli import build_app
from neocog.errors import InvalidProblem
from neocog.scenes import record
from neocog.web import server
from neocog.web.page import Page, make_page
from neocog.web.payload import About, payload
from neocog.web.server import Server

ABOUT = About(model="a model", image="a picture")


@pytest.fixture(scope="module")
def page() -> Page:
    model, x = sampler()
    return neocog.explain(model, x, classes=CLASSES)


def values(blob: dict[str, str]) -> np.ndarray:
    kind = np.int8 if blob.get("type") == "int8" else np.float32
    return np.frombuffer(zlib.decompress(base64.b64decode(blob["data"])), kind)


def test_a_small_network_is_exact_throughout(page: Page) -> None:
    assert all(exact for _, exact in page.layers())
    for box, shown in zip(page.scene.boxes, page.data["boxes"], strict=True):
        assert shown["map"]["type"] == "float32"
        assert np.array_equal(values(shown["map"]), box.output.numpy().reshape(-1))


def test_kernels_are_the_models(page: Page) -> None:
    model, _ = sampler()
    boxes = {(box["name"], box["kind"]): box for box in page.data["boxes"]}
    kernel = boxes["grouped", "conv"]["kernel"]
    assert kernel["shape"] == [6, 2, 3, 3]
    assert np.array_equal(values(kernel), model.grouped.weight.detach().numpy().reshape(-1))
    assert boxes["head", "linear"]["kernel"]["shape"] == [4, 12, 1, 1]


def test_facts_of_a_convolution_and_of_a_pool(page: Page) -> None:
    boxes = {(box["name"], box["kind"]): box for box in page.data["boxes"]}
    conv, pool = boxes["padded", "conv"], boxes["padded", "pool"]
    assert conv["formulas"][0] == "floor((19 - 1*(3-1) - 1 + 1 + 1)/1) + 1 = 19"
    assert (conv["weights"], conv["biases"], conv["multiplyAdds"]) == (54, 6, 54 * 380)
    assert conv["dense"] == 380 * 6 * 380
    assert pool["formulas"][0] == "floor((19 - 1*(2-1) - 1 + 0 + 0)/2) + 1 = 9"
    assert pool["unused"] == {"rows": (18,), "cols": ()}
    times = [block for block in page.data["blocks"] if block["plan"]]
    assert len(times) == 6 and all(block["microseconds"] > 0 for block in times)


def test_probabilities_are_the_softmax(page: Page) -> None:
    model, x = sampler()
    with torch.no_grad():
        expected = torch.softmax(model(x[None])[0].double(), 0)
    assert page.data["probabilities"] == pytest.approx(expected.tolist())
    assert page.data["classes"] == list(CLASSES)


def test_dead_channels_are_named() -> None:
    model, x = sampler()
    with torch.no_grad():
        model.padded.weight[2] = 0
        model.padded.bias[2] = -1
    data = neocog.explain(model, x, timed=False).data
    dead = {box["kind"]: box["dead"] for box in data["boxes"] if box["name"] == "padded"}
    assert dead == {"conv": [], "act": [2], "pool": [2]}


# Budgets


def test_pictures_stand_where_the_budget_ends() -> None:
    model = models.resnet18(10).eval()
    x = torch.randn(1, 3, 32, 32)
    page = make_page(model, x, ABOUT, budget=400_000, timed=False)
    exact = {name for name, is_exact in page.layers() if is_exact}
    assert "conv1" in exact and "layer4.1.conv2" not in exact
    spent = 0
    for box, shown in zip(page.scene.boxes[1:], page.data["boxes"][1:], strict=True):
        if shown["map"] is None:  # a step inside a block that is pictures only
            assert "data" not in shown.get("kernel", {})
        elif shown["map"]["type"] == "int8":
            largest = np.array(shown["largest"])[:, None]
            steps = values(shown["map"]).reshape(len(largest), -1)
            wrong = np.abs(steps / 127 * largest - box.output.numpy().reshape(steps.shape))
            assert (wrong <= largest / 254 * 1.001 + 1e-12).all()
        else:
            spent += 4 * box.output.numel()
        if "data" in shown.get("kernel", {}):
            spent += 4 * shown["weights"]
    assert 0 < spent <= 400_000


def test_layers_asked_for_come_first() -> None:
    model = models.resnet18(10).eval()
    x = torch.randn(1, 3, 32, 32)
    page = make_page(model, x, ABOUT, layers=["layer1.1.conv2"], budget=250_000, timed=False)
    assert dict(page.layers())["layer1.1.conv2"]
    with pytest.raises(InvalidProblem, match=r"'layer4.1.conv2' takes 9,4.* bytes.*--serve"):
        make_page(model, x, ABOUT, layers=["layer4.1.conv2"], budget=250_000, timed=False)
    with pytest.raises(InvalidProblem, match="no layer 'layer9'; there are: conv1, bn1"):
        make_page(model, x, ABOUT, layers=["layer9"], timed=False)


# Models that are not whole, and what is no model's input


def test_a_model_that_fails_is_shown_with_its_error() -> None:
    page = neocog.explain(Broken(), torch.randn(1, 6, 6))
    assert [box["name"] for box in page.data["boxes"]] == ["image", "conv", "relu", "flatten"]
    assert "takes 100 numbers" in page.data["error"]
    assert page.data["probabilities"] is None


def test_plain_boxes_have_pictures_and_no_arithmetic() -> None:
    page = neocog.explain(Unknown(), torch.randn(1, 8, 8))
    kinds = [box["kind"] for box in page.data["boxes"]]
    assert kinds == ["image", "conv", "plain", "plain"]


@pytest.mark.parametrize("image", [torch.zeros(1, 4, 4, dtype=torch.uint8), "a.png"])
def test_an_image_must_be_what_the_model_takes(image: Any) -> None:
    with pytest.raises(InvalidProblem, match="image must be a tensor of float32"):
        neocog.explain(sampler()[0], image)


def test_explaining_leaves_the_model_as_it_was() -> None:
    model, x = sampler()
    model.train()
    model.norm.eval()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    neocog.explain(model, x)
    assert model.training and model.padded.training and not model.norm.training
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_not_a_number_can_be_shown() -> None:
    model, x = sampler()
    x[0, 3, 4] = float("nan")
    text = neocog.explain(model, x, timed=False).html()
    json.loads(scene_text(text))


# The file


def scene_text(html: str) -> str:
    found = re.search(r'<script type="application/json" id="scene">(.*?)</script>', html, re.DOTALL)
    assert found is not None
    return found.group(1)


def test_the_file_holds_everything_and_names_no_other_place(page: Page, tmp_path: Path) -> None:
    path = page.save(tmp_path / "page.html")
    html = path.read_text(encoding="utf-8")
    assert re.findall(r"(?:src|href)=\"(?!data:)[^\"]*\"", html) == []
    assert "http" not in re.sub(r'http-equiv="[^"]*"', "", html)
    modules = json.loads(re.search(r'<script type="importmap">(.*?)</script>', html).group(1))
    for address in modules["imports"].values():
        source = base64.b64decode(address.partition(",")[2]).decode()
        wanted = re.findall(r'from "([^"]+)"', source)
        assert set(wanted) <= set(modules["imports"])
    assert len(html) < 400_000


def test_names_cannot_break_out_of_the_page() -> None:
    model, x = sampler()
    evil = "</script><script>alert(1)</script>"
    page = make_page(model, x[None], About(model=evil, image=evil), timed=False)
    assert evil not in page.html()
    assert json.loads(scene_text(page.html()))["model"] == evil


def test_a_notebook_shows_the_page_in_a_frame(page: Page) -> None:
    shown = page._repr_html_()
    assert shown.startswith("<iframe") and shown.count("<iframe") == 1
    assert "importmap" in shown and '"importmap"' not in shown  # escaped inside srcdoc
    assert "save(path)" in repr(page)


# The server


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[Page, str]]:
    model, x = sampler()
    page = make_page(model, x[None], ABOUT, serve=True, timed=False)
    with Server(page) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield page, server.url
        server.shutdown()


def fetched(url: str, **headers: str) -> bytes:
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers)) as answer:
        return answer.read()


def test_a_served_page_holds_pictures_and_its_server_the_numbers(served: tuple[Page, str]) -> None:
    page, url = served
    assert page.data["serve"] and fetched(url).decode() == page.html()
    shown = [box["map"]["type"] for box in page.data["boxes"] if box["map"]]
    assert shown == ["float32", *["int8"] * (len(page.data["blocks"]) - 1)]
    for index, box in enumerate(page.scene.boxes):
        found = np.frombuffer(fetched(f"{url}map/{index}"), "<f4")
        assert np.array_equal(found, box.output.numpy().reshape(-1))
    found = np.frombuffer(fetched(f"{url}kernel/1/5"), "<f4")
    model, _ = sampler()
    assert np.array_equal(found, model.padded.weight[5].detach().numpy().reshape(-1))


@pytest.mark.parametrize(
    "path", ["map/99", "kernel/0/0", "kernel/1/6", "../etc/passwd", "map/-1", "map/1/", "x"]
)
def test_other_requests_find_nothing(served: tuple[Page, str], path: str) -> None:
    with pytest.raises(urllib.error.HTTPError) as found:
        fetched(served[1] + path)
    assert found.value.code == 404


def answered(url: str, request: bytes) -> bytes:
    """All that the server says to some bytes, until it hangs up."""
    host, port = url.removeprefix("http://").strip("/").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as line:
        line.sendall(request)
        line.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: line.recv(2**16), b""))


HOSTILE = {
    b"GET /map/" + b"1" * 5000: 404,
    b"GET /kernel/1/" + b"9" * 5000: 404,
    b"GET /kernel/" + b"9" * 5000 + b"/1": 404,
    b"GET /map/" + b"0" * 60_000: 404,
    b"GET /map/" + b"1" * 70_000: 414,
    b"GET /map/999999999": 404,
    b"GET /map/9999999999": 404,
    b"GET /kernel/1/999999999": 404,
    b"GET /map/-1": 404,
    b"GET /map/+1": 404,
    b"GET /map/1e3": 404,
    b"GET /map/0x1": 404,
    b"GET /map/1.0": 404,
    b"GET /map/1?a": 404,
    b"GET /map/1#a": 404,
    b"GET /map/": 404,
    b"GET /map": 404,
    b"GET /map/%31": 404,
    b"GET /kernel/1": 404,
    b"GET /kernel/1/": 404,
    "GET /map/\u0661".encode(): 404,
    "GET /map/\u00b2".encode("latin-1"): 404,
    "GET /map/\uff11".encode(): 404,
    b"GET /map/\xff\xfe": 404,
    b"GET /map/\x00": 404,
    b"GET http://127.0.0.1/map/1": 404,
    b"GET / /": 400,
    b"\x16\x03\x01": 400,
    b"POST /map/1": 501,
}


@pytest.mark.parametrize("request_line", HOSTILE, ids=lambda line: ascii(line[:30]))
def test_hostile_requests_are_answered_and_nothing_is_printed(
    served: tuple[Page, str], request_line: bytes, capfd: pytest.CaptureFixture[str]
) -> None:
    url = served[1]
    answer = answered(url, request_line + b" HTTP/1.1\r\nHost: localhost\r\n\r\n")
    status = re.search(rb"^(?:HTTP/1.[01] |Error code: )(\d+)", answer, re.M)
    status = status or re.search(rb"Error code: (\d+)", answer)
    assert status is not None and int(status.group(1)) == HOSTILE[request_line], answer[:200]
    assert fetched(f"{url}map/0")  # it goes on
    assert capfd.readouterr() == ("", "")


def test_who_leaves_or_says_nothing_is_no_error(
    served: tuple[Page, str], capfd: pytest.CaptureFixture[str]
) -> None:
    url = served[1]
    host, port = url.removeprefix("http://").strip("/").split(":")
    reset = struct.pack("ii", 1, 0)
    for said in (b"", b"GET /", b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"):
        line = socket.create_connection((host, int(port)), timeout=20)
        line.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
        line.sendall(said)
        line.close()
    assert fetched(url)
    assert answered(url, b"") == b""
    assert capfd.readouterr() == ("", "")
    assert server._Handler.timeout == server.PATIENCE > 0


def test_the_server_answers_under_its_own_name_only(served: tuple[Page, str]) -> None:
    with pytest.raises(urllib.error.HTTPError) as found:
        fetched(served[1], Host="evil.example")
    assert found.value.code == 403


# The command


def call(*arguments: str) -> Result:
    return CliRunner().invoke(build_app(), ["explain", *arguments], env={"COLUMNS": "200"})


def test_the_command_writes_a_page(workplace: Path) -> None:
    result = call("4C3-P2-10", "test:7")
    assert result.exit_code == 0, result.output
    assert result.output.startswith("test-7.html  (")
    data = json.loads(scene_text(Path("test-7.html").read_text(encoding="utf-8")))
    assert data["truth"] is not None and data["model"] == "4C3-P2-10"


def test_the_command_as_json(workplace: Path) -> None:
    result = call("4C3-P2-10", "test:7", "--out", "page.html", "--json", "--no-times")
    found = json.loads(result.output)
    assert found["page"] == "page.html" and found["bytes"] == Path("page.html").stat().st_size
    assert found["exact"] == ["0", "1", "2"]


def test_the_command_says_what_is_picture_only(workplace: Path) -> None:
    size = ["--input", "1,28,28"]
    result = call("8C3-P2-16C3-P2-10", "test:7", *size, "--budget", "0.06", "--no-times")
    assert "pictures only, without exact numbers: 1" in result.output
    assert "explain 8C3-P2-16C3-P2-10 test:7 --input 1,28,28 --serve" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layer", "1", "--channel", "0"], "--at is missing"),
        (["--at", "1,2"], "--layer is missing"),
        (["--budget", "0"], "--budget 0: expected a number of megabytes above 0"),
        (["--budget", "1e308"], "--budget 1e+308"),
        (["--layers", "nine"], "no layer 'nine'"),
        (["--out", "."], "--out .: is a folder"),
        (["--out", "no/x.html"], "--out no/x.html: no is no folder"),
        (["--serve", "--json"], "--serve goes with neither"),
    ],
)
def test_wrong_arguments_are_one_line(workplace: Path, arguments: list[str], message: str) -> None:
    result = call("4C3-P2-10", "test:7", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr and len(result.stderr.splitlines()) == 1
    assert list(workplace.iterdir()) == []


def test_the_page_never_replaces_the_picture(workplace: Path) -> None:
    Image.new("L", (28, 28)).save("digit.png")
    before = Path("digit.png").read_bytes()
    result = call("4C3-P2-10", "digit.png", "--out", "digit.png")
    assert result.exit_code == 2 and "would overwrite digit.png" in result.stderr
    assert Path("digit.png").read_bytes() == before


def test_a_page_replaces_no_file_unless_told_to(workplace: Path) -> None:
    Path("test-7.html").write_text("mine", encoding="utf-8")
    result = call("4C3-P2-10", "test:7", "--no-times")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == (
        "error: test-7.html: is there already; expected --force to replace it, or another name by "
        "--out FILE\n"
    )
    for more in (["--out", "test-7.html"], ["--out", "./test-7.html"]):
        assert call("4C3-P2-10", "test:7", "--no-times", *more).exit_code == 2
    assert Path("test-7.html").read_text(encoding="utf-8") == "mine"
    place = ("--layer", "1", "--channel", "0", "--at", "0,0")
    assert call("4C3-P2-10", "test:7", *place).exit_code == 0  # writes none
    assert call("4C3-P2-10", "test:7", "--no-times", "--force").exit_code == 0
    assert "neocog" in Path("test-7.html").read_text(encoding="utf-8")


def test_a_network_that_does_not_fit_is_shown_as_far_as_it_goes(workplace: Path) -> None:
    result = call("4C3-P2-4C20p0-10", "test:7")
    assert result.exit_code == 2
    assert "kernel 20x20 is larger than the 14x14" in result.stderr
    data = json.loads(scene_text(Path("test-7.html").read_text(encoding="utf-8")))
    assert "floor((14 - 1*(20-1) - 1 + 0 + 0)/1) + 1 = -5" in data["error"]
    assert {box["name"] for box in data["boxes"]} == {"image", "0"}


def test_summary_lists_a_network_up_to_the_layer_that_fails(workplace: Path) -> None:
    arguments = ["summary", "4C3-P2-4C20p0-10"]
    result = CliRunner().invoke(build_app(), arguments, env={"COLUMNS": "200"})
    assert result.exit_code == 2
    assert "4x14x14" in result.stdout and "kernel 20x20" in result.stderr


def test_payload_of_a_scene_of_vectors() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 3), torch.nn.ReLU(), torch.nn.Softmax(1)).eval()
    scene = record(model, torch.randn(1, 6))
    data = payload(scene, ABOUT)
    assert [box["kind"] for box in data["boxes"]] == ["image", "linear", "act", "plain"]
    assert sum(data["probabilities"]) == pytest.approx(1, abs=1e-5)
    assert data["probabilities"] == scene.boxes[-1].output[0].double().tolist()
