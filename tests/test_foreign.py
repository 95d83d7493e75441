"""Names that a terminal, a page or a shell would obey: spelled out wherever they are shown."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from rich.text import Text
from typer.testing import CliRunner, Result

import neocog
from neocog import models
from neocog.checkpoint import Checkpoint, Header, Preprocessing, save
from neocog.cli import build_app
from neocog.cli.terminal import SafeConsole
from neocog.foreign import all_shown, as_json, quoted, readable, shown, shown_lines, text_of

posix = pytest.mark.skipif(os.name == "nt", reason="NOT TESTED: no such names of files here")

ESCAPES = "l\x1b]0;owned\x07\x1b[2J"
TURNED = "m\u202eexe.\u2066\u200b\n\r[red]:cat:"
BYTES = os.fsdecode(b"r\xff\xc2\x9b31m\x7f")
NAMES = (ESCAPES, TURNED, BYTES)
CLASSES = tuple(map(text_of, NAMES))
OBEYED = [*map(chr, range(32)), *map(chr, range(0x7F, 0xA0)), "\u2028", "\udcff", "\ud800"]
OBEYED += ["\u200b", "\u200d", "\u200e", "\u202a", "\u202e", "\u2066", "\u2069", "\u061c"]
OBEYED += ["\ufeff", "\u00ad", "\u3164", "\U000e0041"]
FORBIDDEN = set(OBEYED) - {"\n"}


def run(*arguments: object) -> Result:
    plain = {"COLUMNS": "200", "FORCE_COLOR": None, "TTY_COMPATIBLE": None}
    return CliRunner().invoke(build_app(), [*map(str, arguments)], env=plain)


def clean(*arguments: object, code: int = 0) -> Result:
    """The result of a call whose output, both streams, holds nothing that is obeyed."""
    result = run(*arguments)
    assert result.exit_code == code, (result.output, result.exception)
    printed = result.stdout_bytes + result.stderr_bytes
    assert not FORBIDDEN & set(printed.decode("utf-8")), printed
    return result


# The functions


@pytest.mark.parametrize("char", OBEYED, ids=ascii)
def test_what_is_obeyed_or_not_seen_is_spelled_out(char):
    spelled = "\\xff" if char == "\udcff" else ascii(char)[1:-1]  # a byte of a file's name
    assert shown(f"a{char}b") == f"a{spelled}b"


@pytest.mark.parametrize("text", ["", "à é", "한글", "ひらがな", "عربي", "C:\\new", "🐈", "a  b"])
def test_what_can_be_read_stays(text):
    assert shown(text) == shown_lines(text) == text


@posix
def test_bytes_of_a_name_are_read_as_utf_8(tmp_path):
    stray = os.fsencode("한\u202e글").decode("ascii", "surrogateescape")  # under an ASCII locale
    assert readable(stray) == text_of(stray) == "한\u202e글"
    assert shown(stray) == "한\\u202e글"
    assert quoted(f"{stray[:3]} b") == "'한 b'"
    assert all_shown([f"{stray}\udcff"]) == ["한\\u202e글\\xff"]
    assert readable(f"a\udcff{stray}") == "a\\xff한\u202e글"
    assert json.loads(as_json(stray)) == stray


@given(st.text())
def test_nothing_obeyed_is_left_whatever_the_text(text):
    for found in (shown(text), shown(shown(text)), quoted(text) if "\0" not in text else ""):
        assert not set(OBEYED) & set(found)
    assert shown(shown(text)) == shown(text)
    assert shown_lines("\n".join((text, text))).count("\n") == 2 * text.count("\n") + 1
    assert json.loads(as_json([text, {text: 1.5}])) == [text, {text: 1.5}]
    assert not FORBIDDEN & set(as_json([text]))


def test_json_has_no_nan():
    with pytest.raises(ValueError, match="JSON"):
        as_json([float("nan")])


@dataclass(frozen=True)
class Named:
    name: str
    parts: tuple[object, ...]


def test_all_text_in_a_value_is_spelled_out():
    value = {"\x1b": [Named("\x07", ("\u202e", 1, None, [2.5])), ("\n",)], "plain": b"\x1b"}
    expected = {"\\x1b": [Named("\\x07", ("\\u202e", 1, None, [2.5])), ("\\n",)], "plain": b"\x1b"}
    assert all_shown(value) == expected


@posix
@pytest.mark.parametrize("name", [*NAMES, "a b", "it's", "back\\slash\x1b'", "한글\u202e", "plain"])
def test_a_shell_takes_a_quoted_word_for_what_it_was(name):
    shell = ["bash", "-c", f"printf %s {quoted(name)}"]
    printed = subprocess.run(shell, capture_output=True, check=True)
    assert printed.stdout == os.fsencode(name)


def test_the_console_spells_out_whatever_it_is_given(capsys):
    console = SafeConsole(width=80)
    console.print("a\x1bb\x07 [red]c[/red] :cat:")
    console.print(Text("d\u202e"), Text("e", style="bold"))
    assert capsys.readouterr().out == "a\\x1bb\\x07 [red]c[/red] :cat:\nd\\u202e e\n"


# The commands


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a checkpoint of such classes, and pictures of such names."""
    monkeypatch.chdir(tmp_path)
    header = Header("2C3-P2-3", (1, 12, 12), Preprocessing((0.2,), (0.3,)), CLASSES)
    torch.manual_seed(0)
    state = models.parse(header.architecture, header.in_shape).state_dict()
    save(tmp_path / f"{TURNED}.safetensors", Checkpoint(header, state))
    images, labels = tiny.pictures(6)
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        path = tmp_path / f"data{ESCAPES}" / NAMES[label] / f"{number}{TURNED}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return tmp_path


@posix
def test_every_command_spells_names_out(place):
    model, data = f"{TURNED}.safetensors", f"data{ESCAPES}"
    picture = next((place / data / BYTES).iterdir())
    spelled = shown(TURNED)
    assert spelled in clean("summary", model).stdout
    found = clean("evaluate", model, data).stdout
    assert all(shown(name) in found for name in NAMES)
    found = clean("predict", model, picture).stdout
    assert shown(picture) in found and all(shown(name) in found for name in NAMES)
    assert json.loads(clean("summary", model, "--json").stdout)["model"] == model
    found = json.loads(clean("evaluate", model, data, "--json").stdout)
    assert {row["name"] for row in found["classes"]} == set(CLASSES) and found["model"] == model
    found = json.loads(clean("predict", model, picture, "--json").stdout)
    assert {row["class"] for row in found[0]["top"]} == set(CLASSES)  # the names themselves
    at = ("--layer", "1", "--channel", "0", "--at", "0,0")
    assert "check: " in clean("explain", model, picture, *at).stdout
    found = clean("explain", model, picture, "--no-times", "--out", "p\x1b.html").stdout
    assert found.startswith("p\\x1b.html  (")
    page = (place / "p\x1b.html").read_text(encoding="utf-8")
    assert not FORBIDDEN & set(page)
    assert all(json.dumps(shown(name))[1:-1] in page for name in NAMES)
    found = clean("export", model, "--out", "x\x1b.pt2").stdout
    assert found.startswith("x\\x1b.pt2  (")


@posix
def test_a_training_with_such_names(place):
    data, out = f"data{ESCAPES}", f"run{TURNED}"
    options = ("--arch", "2C3-P2-3", "--epochs", "1", "--engine", "eager", "--no-mlp")
    found = clean("train", data, "--out", out, "--threads", "1", *options).stdout
    assert f"run         {shown(out)}\n" in found and f" evaluate {quoted(out)}\n" in found
    config = json.loads((place / out / "config.json").read_text(encoding="utf-8"))
    assert sorted(config["data"]["classes"]) == sorted(CLASSES)
    for page in (place / out).glob("*.html"):
        assert not FORBIDDEN & set(page.read_text(encoding="utf-8"))
    assert shown(out) in clean("train", "--resume", out).stdout


@posix
@pytest.mark.parametrize(
    "arguments",
    [
        ("predict", ESCAPES, "x.png"),
        ("summary", TURNED),
        ("summary", BYTES),
        ("train", BYTES),
        ("train", "--resume", ESCAPES),
        ("export", "2C3-3", "--out", f"{ESCAPES}/x.onnx"),
        ("explain", "2C3-10", f"{BYTES}.png"),
        ("bench", "--blocks", "--json", f"{ESCAPES}/x"),
        ("bench", "--blocks", "--filter", TURNED),
        ("inspect", f"conv {ESCAPES}"),
        (ESCAPES,),
        (f"--{ESCAPES}",),
        ("train", f"--{ESCAPES}"),
        ("summary", "2C3-3", BYTES),
    ],
    ids=ascii,
)
def test_errors_spell_out_what_was_typed(arguments, workplace):
    result = clean(*arguments, code=2)
    spelled = ("\\x1b", "\\xff", "\\u202e")
    assert result.stdout == ""
    assert any(code in result.stderr for code in spelled)
    if "Usage: " not in result.stderr:
        assert result.stderr.count("\n") == 1


def test_what_is_logged_is_spelled_out(caplog):
    assert run("doctor", "--help").exit_code == 0  # the command line prepares the log
    logging.getLogger("neocog").warning("the layers of %s", ESCAPES)
    assert caplog.messages == [f"the layers of {shown(ESCAPES)}"]


def test_a_notebook_s_page_spells_out_its_names():
    torch.manual_seed(0)
    named = neocog.explain(
        models.parse("2C3-3", (1, 6, 6)), torch.zeros(1, 6, 6), classes=NAMES, name=TURNED
    )
    assert not FORBIDDEN & set(named.html()) and not set(OBEYED) & set(repr(named))
    assert named.data["classes"] == [shown(name) for name in NAMES]


@posix
def test_an_encoding_without_these_letters_is_no_error(tmp_path):
    environment = {**os.environ, "PYTHONIOENCODING": "latin-1"}
    call = [sys.executable, "-m", "neocog", "summary", str(tmp_path / "한글\udcff")]
    result = subprocess.run(call, capture_output=True, env=environment, check=False)
    assert (result.returncode, result.stdout) == (2, b"")
    assert b"\\ud55c\\uae00\\xff" in result.stderr and result.stderr.count(b"\n") == 1
