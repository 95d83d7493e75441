"""Machine code on disk: what is loaded, what is refused, and what happens to damaged files."""

from __future__ import annotations

import ast
import logging
import multiprocessing
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from neocog import compiler, functional, kernels
from neocog.cpu import code_cache, copy, lanes, runtime
from neocog.cpu.code_cache import Entry
from neocog.target import TARGETS, host

pytestmark = pytest.mark.skipif(not hasattr(os, "geteuid"), reason="owners and modes are POSIX")

KEY, OTHER = "a" * 64, "b" * 64
ENTRY = Entry("kernel", ("x*", "n"), b"\x7fELF\n\0 code \n" * 50)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A directory of this test's own, not made yet."""
    monkeypatch.setattr(code_cache, "_chosen", [])
    code_cache.use(tmp_path / "cache")
    return tmp_path / "cache"


def file_of(cache: Path, key: str = KEY) -> Path:
    return cache / f"{key}.code"


# ------------------------------------------------------------------------------------- kernels


def forget() -> None:
    for known in (kernels.kernel, kernels.copy_kernel, compiler.forward):
        known.cache_clear()


def test_warm_code_runs_without_building_ir(cache, monkeypatch) -> None:
    x, w = torch.ones(2, 5, 6, 7), torch.arange(2.0 * 5 * 9).reshape(2, 5, 3, 3)
    forget()
    cold = functional.conv2d(x, w, padding=1)
    files = {file.name: file.stat().st_ino for file in cache.iterdir()}
    assert len(files) > 1

    def refuse(*_: Any) -> None:
        raise AssertionError("IR is built although the code is on disk")

    forget()
    with monkeypatch.context() as patched:
        patched.setattr(lanes.Emitter, "__init__", refuse)
        warm = functional.conv2d(x, w, padding=1)
        forget()
    assert torch.equal(cold, warm)
    torch.testing.assert_close(warm, F.conv2d(x, w, padding=1))
    assert files == {file.name: file.stat().st_ino for file in cache.iterdir()}


def test_a_loaded_kernel_still_shows_its_ir(cache) -> None:
    cold, warm = (runtime.cached(copy.border, host()) for _ in range(2))
    assert (cold.name, cold.fields) == (warm.name, warm.fields) == ("border", copy.BORDER)
    assert "define void" in warm.llvm_ir and cold.llvm_ir == warm.llvm_ir
    assert "ret" in warm.assembly(host())


@pytest.mark.parametrize("damage", ["empty", "torn", "flipped", "renamed", "symlink", "writable"])
def test_damaged_code_is_compiled_anew_and_replaced(cache, tmp_path, damage) -> None:
    runtime.cached(copy.border, host())
    (file,) = cache.iterdir()
    good = file.read_bytes()
    if damage == "symlink":
        file.rename(tmp_path / "elsewhere")
        file.symlink_to(tmp_path / "elsewhere")
    elif damage == "writable":
        file.chmod(0o666)
    elif damage == "renamed":
        code_cache.store(OTHER, ENTRY)
        file_of(cache, OTHER).rename(file)
    else:
        flipped = bytes([*good[:-9], good[-9] ^ 1, *good[-8:]])
        file.write_bytes({"empty": b"", "torn": good[:-5], "flipped": flipped}[damage])
    assert code_cache.load(file.stem) is None
    assert runtime.cached(copy.border, host()).address
    assert file.read_bytes() == good and not file.is_symlink()
    assert file.stat().st_mode & 0o777 == 0o600
    assert code_cache.load(file.stem).name == "border"


def test_what_cannot_be_hashed_by_source_is_not_kept(cache) -> None:
    def emit(target):  # may change while neocog's sources do not
        return copy.border(target)

    assert runtime.cached(emit, host()).name == "border"
    assert not cache.exists()


# --------------------------------------------------------------------------------------- files


def test_entries_come_back(cache) -> None:
    assert code_cache.load(KEY) is None and not cache.exists()
    code_cache.store(KEY, ENTRY)
    assert code_cache.load(KEY) == ENTRY and code_cache.load(OTHER) is None
    assert cache.stat().st_mode & 0o777 == 0o700
    assert [file.name for file in cache.iterdir()] == [file_of(cache).name]


def test_every_flipped_byte_is_noticed(cache) -> None:
    code_cache.store(KEY, ENTRY)
    good = file_of(cache).read_bytes()
    for at in range(0, len(good), 7):
        file_of(cache).write_bytes(good[:at] + bytes([good[at] ^ 0x10]) + good[at + 1 :])
        assert code_cache.load(KEY) is None, at
        file_of(cache).write_bytes(good[:at])
        assert code_cache.load(KEY) is None, at


def refused(caplog, *words: str) -> None:
    """Nothing is kept or loaded, and exactly one warning says why."""
    caplog.clear()
    with caplog.at_level(logging.WARNING, "neocog"):
        for _ in range(3):
            code_cache.store(OTHER, ENTRY)
            assert code_cache.load(OTHER) is None
            assert code_cache.load(KEY) is None
        assert runtime.cached(copy.border, host()).address  # goes on without
    (record,) = caplog.records
    assert all(word in record.getMessage() for word in words), record.getMessage()


def test_a_directory_that_others_may_write_to_is_refused(cache, caplog) -> None:
    code_cache.store(KEY, ENTRY)
    for mode in (0o770, 0o707):
        cache.chmod(mode)
        code_cache.use(cache)
        refused(caplog, str(cache), "others may write")
    cache.chmod(0o755)
    assert code_cache.load(KEY) == ENTRY


def test_a_directory_of_another_user_is_refused(cache, caplog, monkeypatch) -> None:
    code_cache.store(KEY, ENTRY)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    refused(caplog, str(cache), "another user")


def test_a_symlink_is_refused(cache, caplog, tmp_path) -> None:
    code_cache.store(KEY, ENTRY)
    cache.rename(tmp_path / "real")
    cache.symlink_to(tmp_path / "real")
    refused(caplog, str(cache), "cannot be used")
    assert len(list((tmp_path / "real").iterdir())) == 1


def test_a_file_in_the_place_of_the_directory_is_refused(cache, caplog) -> None:
    cache.write_text("not a directory")
    refused(caplog, str(cache), "cannot be used")


@pytest.mark.parametrize("call", ["replace", "open"])
def test_a_full_or_read_only_disk_costs_only_time(cache, caplog, monkeypatch, call) -> None:
    code_cache.store(KEY, ENTRY)
    real = getattr(os, call)

    def full(*args: Any, **options: Any) -> Any:
        if call == "open" and not args[1] & os.O_WRONLY:
            return real(*args, **options)
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched, caplog.at_level(logging.WARNING, "neocog"):
        patched.setattr(code_cache.os, call, full)
        for _ in range(2):
            code_cache.store(OTHER, ENTRY)
        assert runtime.cached(copy.border, host()).address
        assert code_cache.load(KEY) == ENTRY
    assert [r.getMessage() for r in caplog.records if "No space" in r.getMessage()] == [
        caplog.records[0].getMessage()
    ]
    assert [file.name for file in cache.iterdir()] == [file_of(cache).name]  # nothing half done


def test_what_was_used_longest_ago_goes_first(cache, monkeypatch) -> None:
    keys = [str(n) * 64 for n in range(4)]
    for age, key in enumerate(keys[:3]):
        code_cache.store(key, ENTRY)
        os.utime(file_of(cache, key), (1000 + age, 1000 + age))
    size = file_of(cache, keys[0]).stat().st_size
    assert code_cache.load(keys[0]) == ENTRY  # used now
    monkeypatch.setattr(code_cache, "LIMIT", 3 * size + 10)
    code_cache.store(keys[3], ENTRY)
    assert [key for key in keys if code_cache.load(key)] == [keys[0], keys[2], keys[3]]
    monkeypatch.setattr(code_cache, "LIMIT", size - 1)
    code_cache.store(KEY, ENTRY)
    assert not file_of(cache).exists()


def write_often(folder: str, number: int) -> None:
    code_cache.use(folder)
    entry = Entry(f"kernel{number}", (), bytes([number]) * 200_000)
    for _ in range(100):
        code_cache.store(KEY, entry)
        seen = code_cache.load(KEY)
        assert seen is not None and set(seen.code) == {int(seen.name[-1])}


def test_two_processes_write_at_once(cache) -> None:
    spawn = multiprocessing.get_context("spawn")
    children = [spawn.Process(target=write_often, args=(str(cache), n)) for n in (1, 2)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0, 0]
    assert [file.name for file in cache.iterdir()] == [file_of(cache).name]


# ---------------------------------------------------------------------------- directory and key


def test_where_the_directory_is(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(code_cache, "_chosen", [])
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("NEOCOG_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert code_cache.directory() == tmp_path / ".cache" / "neocog"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert code_cache.directory() == tmp_path / ".cache" / "neocog"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert code_cache.directory() == tmp_path / "xdg" / "neocog"
    monkeypatch.setenv("NEOCOG_CACHE_DIR", str(tmp_path / "own"))
    assert code_cache.directory() == tmp_path / "own"
    monkeypatch.setenv("NEOCOG_CACHE_DIR", "off")
    assert code_cache.directory() is None
    code_cache.use(tmp_path)
    assert code_cache.directory() == tmp_path
    code_cache.use(None)
    assert code_cache.directory() is None


def test_the_key_knows_all_that_determines_the_code(monkeypatch) -> None:
    calls = [(copy.pack, (target, flag)) for target in TARGETS for flag in (True, False)]
    calls += [(copy.border, (TARGETS[0],)), (copy.pack_weights, (TARGETS[0], 4, True))]
    keys = [code_cache.key(function, args, level) for function, args in calls for level in "12"]
    for part in ("_sources", "_machine"):
        monkeypatch.setattr(code_cache, part, lambda: "another")
        keys.append(code_cache.key(copy.border, (TARGETS[0],), "1"))
    assert len(set(keys)) == len(keys) and None not in keys


@dataclass(frozen=True)
class Plan:
    sizes: tuple[int, ...]
    flag: bool | int | float


def test_descriptions_tell_plans_apart() -> None:
    values = [1, 1.0, True, "1", None, (1,), ((1,),), (1, 1), 0.0, -0.0, (), frozenset({1})]
    values += [Plan((1, 2), True), Plan((12,), True), Plan((1, 2), 1), Plan((1, 2), 1.0)]
    assert len({code_cache.describe(value) for value in values}) == len(values)
    with pytest.raises(TypeError, match=r"\[1\] is a list"):
        code_cache.describe([1])


def test_keys_do_not_change_from_process_to_process() -> None:
    show = (
        "from neocog.cpu import code_cache, copy; from neocog.target import TARGETS;"
        "print([code_cache.key(copy.pack, (t, True)) for t in TARGETS])"
    )
    said = {
        subprocess.run(
            [sys.executable, "-c", show], env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True, check=True, text=True,
        ).stdout
        for seed in ("1", "2")
    }  # fmt: skip
    assert said == {f"{[code_cache.key(copy.pack, (t, True)) for t in TARGETS]}\n"}


def test_the_digest_covers_what_emitters_import() -> None:
    package = Path(code_cache.__file__).parents[1]
    covered = {path for name in code_cache._SOURCES for path in package.glob(name)}
    for path in covered:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level:
                base = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
                files = [base.with_suffix(".py"), *(base / f"{n.name}.py" for n in node.names)]
                used = {file for file in files if file.exists()}
                assert used and used <= covered, f"{path.name} imports {used - covered or base}"
