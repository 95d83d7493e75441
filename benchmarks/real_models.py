"""Real models, unchanged: are they captured, are they right, are they as they were afterwards?

    pip install -r benchmarks/real_models_needs.txt
    pip install --no-deps -r benchmarks/third_party.txt -r benchmarks/real_models.txt
    python benchmarks/real_models.py [--json FILE] [--resume] [--only TEXT ...] [--each N]
        [--limit SECONDS] [--parts NAME ...]

Networks of other people's packages (real_model_table.py), weights at random, each in a process of
its own: ``neocog.freeze`` on one picture, then on a batch of two, then on one again. A row says

- ``verdict``: "native" (compiled in whole or in part), "pytorch" (the report says that everything
  runs there, and why), "refused" (Unsupported and the like, with the reason), "failed" (another
  error, or no answer in time), and whether results are ``wrong``;
- natives, programs, the share of multiply-adds, and what runs in PyTorch by reason;
- ``errors``: the largest difference from the model in float64 over its largest value, frozen and
  eager. Right is at most max(3e-6, 4 times eager's), for each tensor of the result;
- ``changed``: what ``freeze`` changed on the model: weights, buffers, attributes, hooks, random
  state; ``left``: fake or meta tensors on it after the calls; ``alike``: what the model computes
  after all this is what an untouched twin computes, bit for bit;
- ``export``: whether ``torch.export.export`` captures it, not strict and strict, in how many
  seconds of the processor, and what it changed; ``fake``: whether it runs on fake tensors;
  ``fake_inputs``: the same, but only the inputs are fake, and what follows from them.
"""

from __future__ import annotations

import argparse
import collections
import inspect
import json
import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import real_model_table
import torch
import torch._dynamo
import torch.export
from real_model_checks import (
    compare,
    differences,
    kind,
    processor,
    same,
    state,
    tensors,
    without_data,
)
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

import neocog
import neocog.freezing
import neocog.reports
from neocog.errors import NeocogError

INTEREST = ("smp: Unet", "diffusers: AutoencoderKL, decoder", "smp: FPN", "monai: UNet")
"""Names that begin like this are listed with their errors at the end."""


def build(network: real_model_table.Network, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The network in eval mode, the same every time; what would hide errors gets numbers.

    Scales of zero or next to it, which some give their residual branches, and statistics of batch
    norms that were never collected.
    """
    torch.manual_seed(0)
    model = network.make().eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.6, 1.6)
        for p in model.parameters():
            if p.is_floating_point() and p.numel() and p.abs().max() < 1e-3:
                p.normal_(0, 0.02)
    return model if dtype is torch.float32 else model.to(dtype)


def one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:400]


def copies(args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(a.clone() for a in args)


def double(args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(a.double() if a.is_floating_point() else a for a in args)


def truths(network: real_model_table.Network, inputs: list[tuple[Tensor, ...]]) -> Any:
    """The results in float64, or why there are none."""
    try:
        model = build(network, torch.float64)
        torch.set_default_dtype(torch.float64)
        return [model(*copies(double(x))) for x in inputs], ""
    except Exception as error:
        return None, one_line(error)
    finally:
        torch.set_default_dtype(torch.float32)


def frozen_row(network: real_model_table.Network) -> dict[str, Any]:
    """What becomes of the network in ``neocog.freeze``."""
    torch.manual_seed(1)
    inputs = [network.inputs(1), network.inputs(2)]
    try:
        twin = build(network)
        given = [copies(x) for x in inputs]
        eager = [twin(*x) for x in given]
    except Exception as error:  # the package is missing, or wants something else
        return {"verdict": "not made", "why": one_line(error)}
    exact, why = truths(network, inputs)
    row: dict[str, Any] = {"float64": why} if why else {}
    exact = eager if exact is None else exact
    model = build(network)
    before, start = state(model), time.process_time()
    try:
        frozen = neocog.freeze(model, list(copies(inputs[0])))
    except Exception as error:
        refused = isinstance(error, NeocogError)
        row.update(verdict="refused" if refused else "failed", why=one_line(error))
        row["changed"] = differences(before, state(model))
    else:
        row["freeze_s"] = round(time.process_time() - start, 2)
        row["changed"] = differences(before, state(model))
        row.update(answers(frozen, inputs, given, eager, exact))
    row["left"] = without_data(model)
    row["alike"] = alike(model, inputs, eager)
    return row


def answers(frozen: Any, inputs: Any, given: Any, eager: Any, exact: Any) -> dict[str, Any]:
    """The report, and the results for one, two, and one picture again.

    ``given``: the inputs as eager has left them; some models write to them.
    """
    row: dict[str, Any] = {}
    report = neocog.report(frozen)[0]
    row["verdict"] = "pytorch" if report.whole else "native"
    row["why"] = report.whole
    row.update(natives=len(report.layers), programs=report.programs, share=round(report.share, 4))
    row["in_pytorch"] = [
        {"call": h.name, "count": h.count, "reason": h.reason} for h in report.handed_back
    ]
    for key, i in (("errors", 0), ("errors_of_two", 1), ("errors_again", 0)):
        x = copies(inputs[i])
        try:
            row[key] = compare(frozen(*x), eager[i], exact[i])
            if not all(map(same, x, given[i])):
                row[key].update(right=False, why="leaves other arguments behind than eager")
        except Exception as error:
            row[key] = {"right": False, "why": one_line(error)}
    return row


def alike(model: nn.Module, inputs: Any, eager: Any) -> str:
    """Empty, or how the model differs now from its twin."""
    try:
        for x, expected in zip(inputs, eager, strict=True):
            y = model(*copies(x))
            if kind(y) != kind(expected) or not all(
                same(a, b) for (_, a), (_, b) in zip(tensors(y), tensors(expected), strict=True)
            ):
                return "other numbers"
    except Exception as error:
        return one_line(error)
    return ""


def captured(network: real_model_table.Network, how: Callable[..., Any]) -> dict[str, Any]:
    """Whether a way to capture works on the network: seconds, or why not; what it changed."""
    torch.manual_seed(1)
    inputs = network.inputs(1)
    model = build(network)
    expected = build(network)(*copies(inputs))
    before, start = state(model), time.process_time()
    row: dict[str, Any] = {"ok": True}
    try:
        run = how(model, copies(inputs))
    except Exception as error:
        row = {"ok": False, "why": one_line(error)}
    row["s"] = round(time.process_time() - start, 2)
    row["changed"], row["left"] = differences(before, state(model)), without_data(model)
    if row["ok"] and run is not None:
        try:
            row.update(compare(run(*copies(inputs)), expected, expected))
        except Exception as error:
            row.update(right=False, why=one_line(error))
    return row


def exported(strict: bool) -> Callable[..., Any]:
    def how(model: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
        return torch.export.export(model, inputs, strict=strict).module()

    return how


def on_fake_tensors(model: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """Everything is fake: parameters and what the model makes as well."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        model(*map(mode.from_tensor, inputs))


def on_fake_inputs(model: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """What depends on the inputs is fake; what depends on the model alone has values."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    model(*map(mode.from_tensor, inputs))


CAPTURES: dict[str, Callable[..., Any]] = {
    "fake": on_fake_tensors,
    "fake_inputs": on_fake_inputs,
    "export": exported(False),
    "export_strict": exported(True),
}


def child(name: str, parts: list[str], limit: int, out: int) -> None:
    """Measures one network; prints a line of JSON for each part as soon as it is known."""
    # The processor's seconds, not the clock's: others may be using the machine.
    resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 5))
    os.dup2(out, 1)
    os.dup2(out, 2)
    network = real_model_table.networks()[name]
    if network.stub:
        real_model_table.without_absent()

    def part(key: str, make: Callable[[], Any]) -> None:
        print("PART " + json.dumps({key: None}), flush=True)
        print("PART " + json.dumps({key: make()}, default=str), flush=True)

    network.make()  # imports the package, which may draw random numbers
    with torch.no_grad():
        for key in parts:
            # Each makes the network anew: the one before has left it as it was, or it has not.
            if key == "frozen":
                part(key, lambda: frozen_row(network))
            else:
                part(key, lambda key=key: captured(network, CAPTURES[key]))


def measure(name: str, limit: int, parts: list[str]) -> dict[str, Any]:
    """The row of one network, from a process of its own."""
    with tempfile.TemporaryFile("w+") as said:
        # Forked before anything is computed: what takes seconds to import is imported once.
        process = multiprocessing.get_context("fork").Process(
            target=child, args=(name, parts, limit, said.fileno())
        )
        process.start()
        process.join(20 * limit)
        end = f"exit code {process.exitcode}"
        if process.exitcode == -signal.SIGXCPU:
            end = f"no answer within {limit} s of the processor's time"
        if process.is_alive():
            end = f"no answer within {20 * limit} s"
            process.kill()
            process.join()
        said.seek(0)
        lines = said.read().splitlines()
    row: dict[str, Any] = {"network": name}
    for text in lines:
        if text.startswith("PART "):
            row.update(json.loads(text.removeprefix("PART ")))
    if "frozen" in parts and row.get("frozen") is None:
        *_, last = [text for text in lines if text.strip()] or [""]
        row["frozen"] = {
            "verdict": "failed" if "frozen" in row else "not made",
            "why": f"{end}: {last}"[:400],
        }
    row.setdefault("frozen", {"verdict": "not asked"})
    for key, value in row.items():
        if value is None:
            row[key] = {"ok": False, "why": end}
    return row


def right(row: dict[str, Any]) -> bool:
    """Whether every answer of the frozen network was right."""
    parts = [v for k, v in row["frozen"].items() if k.startswith("errors")]
    return all(part["right"] for part in parts)


def untouched(row: dict[str, Any]) -> bool:
    """Whether the model is as it was."""
    frozen = row["frozen"]
    return not (frozen.get("changed") or frozen.get("left") or frozen.get("alike"))


def line(row: dict[str, Any]) -> str:
    frozen = row["frozen"]
    text = f"{row['network']}: {frozen['verdict']}"
    if frozen.get("errors"):
        text += f", {frozen['natives']} layers in {frozen['programs']} programs"
        errors = frozen["errors"]
        if "frozen" in errors:
            text += f", off by {errors['frozen']:.1e} (eager {errors['eager']:.1e})"
        for key, part in frozen.items():
            if key.startswith("errors") and not part["right"]:
                text += f"; WRONG, {key}: {part.get('why')}"
    if frozen.get("why"):
        text += f"; {frozen['why']}"
    for key in ("changed", "left", "alike"):
        if frozen.get(key):
            text += f"; {key.upper()}: {frozen[key]}"[:200]
    for key in CAPTURES:
        if key in row:
            part = row[key]
            text += f"\n  {key}: {'ok' if part['ok'] else 'no'}, {part.get('s', 0)} s"
            text += f" {part.get('why', '')[:160]}"
            text += f" CHANGED {part['changed'][:3]}" if part.get("changed") else ""
    return text


def counts(rows: list[dict[str, Any]]) -> dict[str, Any]:
    made = [row for row in rows if row["frozen"]["verdict"] != "not made"]
    verdicts = collections.Counter(row["frozen"]["verdict"] for row in made)
    found: dict[str, Any] = {"networks": len(made), **verdicts}
    found["wrong"] = sum(not right(row) for row in made)
    found["models changed"] = sum(not untouched(row) for row in made)
    for key in CAPTURES:
        parts = [row[key] for row in made if key in row]
        if parts:
            found[f"{key}: captured"] = sum(bool(part["ok"]) for part in parts)
            found[f"{key}: wrong"] = sum(
                part["ok"] and not part.get("right", True) for part in parts
            )
            found[f"{key}: models changed"] = sum(bool(part.get("changed")) for part in parts)
    return found


def versions(rows: list[dict[str, Any]]) -> dict[str, str]:
    found = {}
    for package in {row["network"].split(":")[0] for row in rows} | {"torch"}:
        name = {"smp": "segmentation_models_pytorch"}.get(package, package).replace("_", "-")
        try:
            found[package] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[package] = "unknown"
    return dict(sorted(found.items()))


def by_turns(names: Iterable[str], each: int | None) -> list[str]:
    """One of each package after the other, so that a run that is stopped has seen all packages."""
    seen: collections.Counter[str] = collections.Counter()
    keys = {}
    for name in names:
        package = name.split(":")[0]
        keys[name] = seen[package]
        seen[package] += 1
    chosen = (name for name in keys if each is None or keys[name] < each)
    return sorted(chosen, key=keys.__getitem__)


def main() -> None:
    parser = argparse.ArgumentParser(description=inspect.cleandoc(__doc__).splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--resume", action="store_true", help="keep the rows that FILE has")
    parser.add_argument(
        "--only", nargs="+", default=[""], help="networks whose name holds one of these"
    )
    parser.add_argument("--each", type=int, help="so many of each package")
    parser.add_argument(
        "--limit", type=int, default=150, help="seconds of one processor for each network"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--parts", nargs="+", default=["frozen", *CAPTURES], help="neocog: frozen")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    os.environ["HF_HUB_OFFLINE"] = "1"
    rows: list[dict[str, Any]] = []
    if options.resume and options.json.exists():
        rows = json.loads(options.json.read_text())["rows"]
    done = {row["network"] for row in rows}
    names = [n for n in real_model_table.networks() if any(part in n for part in options.only)]
    for name in by_turns(names, options.each):
        if name in done:
            continue
        rows.append(measure(name, options.limit, options.parts))
        print(line(rows[-1]), flush=True)
        if options.json is not None:
            about = {
                "command": " ".join(["python", "benchmarks/real_models.py", *sys.argv[1:]]),
                "processor": processor(), "threads": options.threads,
                "versions": versions(rows), "counts": counts(rows), "rows": rows,
            }  # fmt: skip
            options.json.write_text(json.dumps(about, indent=1) + "\n")
    for row in rows:
        if row["network"].startswith(INTEREST) and row["frozen"].get("errors"):
            errors = row["frozen"]["errors"]
            print(f"{row['network']}: {'pass' if right(row) else 'FAIL'} {errors}")
    print(json.dumps(counts(rows), indent=1))


if __name__ == "__main__":
    main()
