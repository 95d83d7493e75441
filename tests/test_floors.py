"""The house stands as docs/architecture.md draws it: imports run downward only."""

import ast
import graphlib
import inspect
import re
from pathlib import Path

import pytest

import neocog

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "neocog"

# A name stands for a module, or for a package with all that is in it.
FLOORS = {
    0: "geometry errors guard foreign",
    1: "dtypes activations reductions",
    2: "steps problem",
    3: "reference network",
    4: "target",
    5: "cpu",
    6: (
        "lifetimes memory program kernels maps pools convolutions depthwise_steps strided "
        "depthwise_gradients weight_gradients compiler winograd_steps winograd_gradients "
        "choices bands layer_calls training_calls aten_calls effects facts propagation preserving "
        "structures substitutes partition fusion stages parameters tuning norm_steps "
        "training_fusion kept training_steps training_forward training_backward"
    ),
    7: "execution handback ops recording running learned fully_connected rewriting",
    8: "functional nn freezing reports backend",
    9: (
        "strokes images idx folders data changes "
        "files factories models checkpoint augmentation evaluation settings distribution batches "
        "training shifts plots runs "
        "sight layers tracing scenes benchmark network_benchmark diagnosis architectures "
        "layer_times answering contenders race training_contenders training_race "
        "interchange exporting locks headers "
        "plain_pools ownership given_inputs layer_words"
    ),
    10: "web cli __main__",
}
FLOOR = {name: floor for floor, names in FLOORS.items() for name in names.split()}

# Who may import whom on the same floor.
BESIDE = {
    "problem": "steps",
    "program": "lifetimes memory",
    "maps": "kernels program",
    "pools": "kernels maps program",
    "convolutions": "depthwise_steps kernels maps program",
    "depthwise_steps": "kernels maps program",
    "strided": "convolutions kernels maps program",
    "depthwise_gradients": "convolutions kernels maps program",
    "winograd_gradients": "kernels maps program winograd_steps",
    "weight_gradients": (
        "convolutions depthwise_gradients kernels maps program winograd_gradients"
    ),
    "compiler": "convolutions maps pools program strided weight_gradients",
    "layer_calls": "maps",
    "aten_calls": "layer_calls",
    "facts": "aten_calls effects layer_calls training_calls",
    "propagation": "facts",
    "substitutes": "propagation",
    "partition": "facts",
    "winograd_steps": "convolutions kernels maps program",
    "choices": "convolutions kernels maps program winograd_steps",
    "bands": "kernels maps program",
    "stages": "bands choices kernels maps pools program",
    "parameters": "choices convolutions kernels program stages",
    "tuning": "choices stages",
    "norm_steps": "kernels maps program",
    "training_calls": "layer_calls",
    "training_fusion": "fusion",
    "kept": "maps norm_steps program",
    "training_steps": (
        "choices convolutions kept kernels maps norm_steps pools program winograd_steps"
    ),
    "training_forward": "choices convolutions fusion kept kernels maps norm_steps pools program "
    "training_steps",
    "training_backward": "convolutions kept maps norm_steps pools program strided "
    "training_steps weight_gradients",
    "learned": "execution handback running",
    "ops": "execution handback",
    "recording": "ops",
    "running": "execution",
    "rewriting": "execution fully_connected learned running",
    "freezing": "reports",
    "backend": "freezing reports",
    "nn": "functional",
    "images": "files strokes",
    "idx": "files images",
    "folders": "images",
    "data": "folders idx images strokes",
    "factories": "files",
    "models": "architectures",
    "checkpoint": "factories files headers models",
    "exporting": "checkpoint files interchange",
    "interchange": "plain_pools",
    "given_inputs": "headers sight",
    "evaluation": "checkpoint data",
    "settings": "augmentation models",
    "batches": "augmentation checkpoint data distribution",
    "training": "batches checkpoint data distribution evaluation models settings",
    "shifts": "checkpoint data evaluation",
    "changes": "files folders idx images",
    "runs": (
        "changes checkpoint data distribution evaluation files headers images locks models plots "
        "settings shifts training"
    ),
    "layers": "given_inputs layer_words ownership sight",
    "tracing": "layer_words layers sight",
    "scenes": "layer_words layers sight",
    "network_benchmark": "architectures models benchmark",
    "answering": "benchmark",
    "contenders": "answering architectures",
    "race": "contenders",
    "training_contenders": "answering architectures contenders",
    "training_race": "race training_contenders",
    "layer_times": "benchmark",
    "diagnosis": "benchmark",
    "cli": "web",
    "__main__": "cli",
}
ALLOWED = {(one, other) for one, others in BESIDE.items() for other in others.split()}

LONGEST_FILE = 450


def modules():
    """Every module of the package: dotted name without "neocog." -> file. "" is the package."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imported_by(name):
    """The modules of the package that a module imports anywhere, be it inside a function."""
    path = MODULES[name]
    package = ["neocog", *name.split(".")] if name else ["neocog"]
    if path.name != "__init__.py":
        package.pop()
    targets = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            targets |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            start = ".".join([*base, *([node.module] if node.module else [])])
            # `from . import x` imports the module x if there is one, else a name of the package.
            for alias in node.names:
                inner = f"{start}.{alias.name}"
                targets.add(inner if inner.removeprefix("neocog.") in MODULES else start)
    ours = {target for target in targets if target == "neocog" or target.startswith("neocog.")}
    return {target.removeprefix("neocog").removeprefix(".") for target in ours} - {name}


def top(name):
    return name.split(".")[0]


def upward(importer, imported):
    """Whether this import breaks the order of the floors."""
    if importer == "":  # the package itself offers what is on the floors below presentation
        return FLOOR[top(imported)] > 9
    if imported == "":
        return FLOOR[top(importer)] < 10
    if top(importer) == top(imported):
        return False  # within one package; cycles are another test
    if FLOOR[top(importer)] == FLOOR[top(imported)]:
        return (top(importer), top(imported)) not in ALLOWED
    return FLOOR[top(importer)] < FLOOR[top(imported)]


def test_the_documentation_shows_the_same_floors():
    text = (PACKAGE.parents[1] / "docs" / "architecture.md").read_text()
    rows = re.findall(r"^\| (\d+) \| ([^|]+) \|", text, re.MULTILINE)
    shown = {name: int(floor) for floor, names in rows for name in re.findall(r"`(\w+)`", names)}
    assert shown == FLOOR


def test_every_module_has_a_floor_and_every_entry_a_module():
    assert {top(name) for name in MODULES if name} == set(FLOOR)


@pytest.mark.parametrize("name", MODULES, ids=lambda name: name or "neocog")
def test_imports_run_downward_only(name):
    wrong = [imported for imported in imported_by(name) if upward(name, imported)]
    assert not wrong, f"neocog.{name} imports from above: {wrong}"


def test_no_imports_form_a_cycle():
    graph = {name: imported_by(name) for name in MODULES if name}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, with the cycle in it


def test_every_allowance_on_one_floor_is_needed():
    used = {(top(name), top(other)) for name in MODULES for other in imported_by(name)}
    assert used >= ALLOWED
    assert all(FLOOR[one] == FLOOR[other] for one, other in ALLOWED)


def test_the_imports_of_a_known_module_are_seen():
    assert {"errors", "foreign", "images", "idx", "folders", "strokes"} == imported_by("data")
    assert "cli" in imported_by("__main__")


def test_no_module_bears_the_name_of_a_public_function():
    # Python binds a submodule to its package's attribute as soon as it is imported.
    for name in neocog.__all__:
        assert inspect.ismodule(getattr(neocog, name)) == (name in MODULES), name


def test_every_file_can_be_read_in_one_sitting():
    files = [
        p
        for f in ("src", "tests", "scripts", "benchmarks", "fuzz")
        for p in (ROOT / f).rglob("*.py")
    ]
    assert len(files) > len(MODULES)
    lengths = {str(p.relative_to(ROOT)): len(p.read_text("utf-8").splitlines()) for p in files}
    assert {file: n for file, n in lengths.items() if n > LONGEST_FILE} == {}
