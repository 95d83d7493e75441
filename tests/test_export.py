"""`neocog export` and `neocog.export`: files that compute what the network does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_networks
import torch
import torch.nn.functional as F
from export_tools import NETWORK, RUN, net, operators, printed, refused, run_onnx
from run_tools import done, options
from torch import Tensor, nn

import neocog
from neocog import exporting, interchange, models
from neocog.checkpoint import Preprocessing, load_model

SOURCES = str(Path(neocog.__file__).parent)


def check(model: nn.Module, path: Path, x: Tensor, **how: Any) -> exporting.Exported:
    """Exports a network, and compares on pictures that the export has not seen."""
    exported = neocog.export(model, path, x.shape[1:], **how)
    assert exported.error <= exporting.TOLERANCE and exported.bytes == path.stat().st_size
    with torch.no_grad():
        wanted = list(tiny_networks.leaves(model(x)))
    got = RUN[path.suffix](path, x)
    for one, other in zip(got, wanted, strict=True):
        assert one.shape == other.shape and one.dtype == other.dtype
        assert (one - other).abs().max() <= exporting.TOLERANCE * other.abs().max()
    return exported


class Every(nn.Module):
    """Each layer of neocog.nn, with paddings and pools of all kinds."""

    def __init__(self) -> None:
        super().__init__()
        layers = neocog.nn
        pool = layers.MaxPool2d(3, 2, 1, ceil_mode=True)
        self.same = layers.Conv2d(3, 8, 4, padding="same", dilation=2)  # one side gets more
        self.reflect = layers.Conv2d(8, 8, 3, padding=1, padding_mode="reflect", groups=4)
        self.first = layers.ConvBlock(8, 12, 3, padding=1, activation="leaky_relu", pool=pool)
        self.second = layers.ConvBlock(12, 12, (1, 3), padding=(0, 1), activation="hardswish")
        self.third = layers.ConvBlock(
            12, 6, 3, 2, 1, bias=False, activation="gelu",
            pool=layers.AvgPool2d(2, 1, 1, count_include_pad=False),
        )  # fmt: skip
        self.last = layers.AvgPool2d(2, divisor_override=3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Two outputs."""
        x = self.first(self.reflect(self.same(x)))
        x = self.second(x, x)
        return {"maps": x, "small": self.last(self.third(x))}


# ------------------------------------------------------------------------- what is exported


@pytest.fixture(scope="module")
def run(tmp_path_factory, bars) -> Path:
    """A run that has learned to tell bars apart."""
    folder = tmp_path_factory.mktemp("export") / "bars-1"
    done(*options(bars, epochs=1), "--no-mlp", "--out", folder)
    return folder


@pytest.mark.slow
def test_a_trained_run_reads_the_same_in_onnx_runtime(run: Path, workplace: Path) -> None:
    import onnxruntime

    lines = printed(run).splitlines()
    path = workplace / "bars-1.onnx"
    assert lines[0].startswith("bars-1.onnx  (ONNX, opset ")
    assert lines[1].startswith("takes input float32 [batch, 1, 12, 12]: (pixel / 255 - mean) / std")
    assert lines[2] == "gives output float32 [batch, 3]"
    assert lines[3].startswith(f"checked in ONNX Runtime {onnxruntime.__version__} with batches of")
    loaded, pixels = load_model(str(run)), torch.from_numpy(tiny.pictures(4)[0])[:, None]
    x = loaded.preprocessing.apply(pixels)
    with torch.no_grad():
        wanted = loaded.model(x)
    (got,) = run_onnx(path, x)
    assert (got - wanted).abs().max() <= exporting.TOLERANCE * wanted.abs().max()

    session = onnxruntime.InferenceSession(path)
    assert session.get_inputs()[0].shape == ["batch", 1, 12, 12]
    assert session.get_outputs()[0].shape == ["batch", 3]
    about = json.loads(session.get_modelmeta().custom_metadata_map["neocog"])
    assert about["classes"] == list(tiny.CLASSES) and about["in_shape"] == [1, 12, 12]
    kept = about["preprocessing"]
    how = Preprocessing(**{**kept, "mean": tuple(kept["mean"]), "std": tuple(kept["std"])})
    assert how == loaded.preprocessing and not about["raw"]
    assert operators(path) == {
        f"::{n}" for n in ["Conv", "Relu", "MaxPool", "AveragePool", "Reshape", "Gemm"]
    }
    assert SOURCES not in path.read_bytes().decode("latin-1")


@pytest.mark.parametrize("name", [pytest.param("r.onnx", marks=pytest.mark.slow), "r.pt2"])
def test_raw_takes_pixels(run: Path, workplace: Path, name: str) -> None:
    found = json.loads(printed(run, "--raw", "--out", name, "--json"))
    assert found["inputs"] == [{"name": "input", "dtype": "uint8", "shape": ["batch", 1, 12, 12]}]
    assert found["path"] == name and found["bytes"] == Path(name).stat().st_size
    assert found["values"] == "pixels 0..255" and 0 <= found["error"] <= exporting.TOLERANCE
    loaded, pixels = load_model(str(run)), torch.from_numpy(tiny.pictures(4)[0])[:, None]
    with torch.no_grad():
        wanted = loaded.model(loaded.preprocessing.apply(pixels))
    (got,) = RUN[Path(name).suffix](name, pixels)
    assert (got - wanted).abs().max() <= exporting.TOLERANCE * wanted.abs().max()


def test_a_trained_run_comes_back_from_torch_export(run: Path, workplace: Path) -> None:
    lines = printed(run / "best.safetensors", "--out", "b.pt2").splitlines()
    assert (
        lines[0].startswith("b.pt2  (torch.export, ") and f"torch {torch.__version__}" in lines[3]
    )
    extra = {"neocog.json": ""}
    program = torch.export.load("b.pt2", extra_files=extra)
    assert json.loads(extra["neocog.json"])["classes"] == list(tiny.CLASSES)
    weights = load_model(str(run)).model.state_dict()
    assert {name: torch.equal(t, weights[name]) for name, t in program.state_dict.items()} == (
        dict.fromkeys(weights, True)
    )
    assert SOURCES not in Path("b.pt2").read_bytes().decode("latin-1")


def architecture(name: str) -> tuple[nn.Module, Tensor]:
    """A well-known network on small pictures, its batch norms away from where they begin."""
    found = models.ARCHITECTURES[name]
    torch.manual_seed(0)
    model = tiny_networks.ready(found.make())
    side = 28 if name == "digits" else 32
    return model, torch.randn(5, found.in_shape[0], side, side)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "ending"),
    [("digits", ".pt2"), ("digits", ".onnx"), ("resnet18", ".onnx"), ("mobilenet_v2", ".onnx")],
)
def test_well_known_networks(tmp_path: Path, name: str, ending: str) -> None:
    model, x = architecture(name)
    exported = check(model, tmp_path / f"x{ending}", x)
    classes = 10 if name == "digits" else 1000
    assert exported.outputs == (exporting.Port("output", "float32", ("batch", classes)),)


@pytest.mark.parametrize("ending", [pytest.param(".onnx", marks=pytest.mark.slow), ".pt2"])
def test_neocogs_layers_come_out_as_standard_operators(tmp_path: Path, ending: str) -> None:
    torch.manual_seed(0)
    path = tmp_path / f"x{ending}"
    exported = check(Every().eval(), path, torch.randn(5, 3, 16, 20))
    assert [(port.name, port.shape) for port in exported.outputs] == [
        ("output_0", ("batch", 12, 9, 11)), ("output_1", ("batch", 6, 3, 3)),
    ]  # fmt: skip
    found = operators(path)
    known = "aten." if ending == ".pt2" else "::"
    assert {name for name in found if not name.startswith(known)} <= {"<built-in function getitem>"}
    assert found >= ({"::Conv", "::MaxPool"} if ending == ".onnx" else {"aten.conv2d.default"})


@pytest.mark.parametrize("ceil", [False, True])
@pytest.mark.parametrize(
    ("size", "stride", "padding"), [(3, 2, 1), ((4, 3), (3, 2), (2, 1)), (2, 3, 0), (3, (), 0)]
)
def test_a_pool_with_a_divisor_is_spelled_out(
    size: Any, stride: Any, padding: Any, ceil: bool
) -> None:
    """Windows hold at most 12 numbers of at most 9, whose sums are exact; then come two roundings.

    The quotients are at most 108 / 5 < 32, where float32 steps by 2^-19.
    """
    torch.manual_seed(0)
    x = torch.randint(-9, 10, (2, 3, 13, 16)).float()
    options = (size, stride, padding, ceil, True, 5)
    wanted = F.avg_pool2d(x, *options)
    got = interchange.SPELLED_OUT[torch.ops.aten.avg_pool2d.default](x, *options)
    assert got.shape == wanted.shape and (got - wanted).abs().max() <= 2 * 2.0**-19


@pytest.mark.slow
@pytest.mark.parametrize("name", ["in_place", "padded", "foreign_layers"])
def test_networks_of_many_kinds(tmp_path: Path, name: str) -> None:
    check(tiny_networks.make(name), tmp_path / "x.onnx", tiny_networks.images(5))


def test_what_is_no_map_and_what_goes_straight_through(tmp_path: Path) -> None:
    model = net(lambda m, x: [m.first(x).argmax(1), torch.cat([x, x]), (x > 0).sum(), x])
    exported = check(model, tmp_path / "x.pt2", tiny_networks.images(5))
    assert [(port.dtype, port.shape[:1]) for port in exported.outputs] == [
        ("int64", ("batch",)), ("float32", ("2*batch",)), ("int64", ()), ("float32", ("batch",)),
    ]  # fmt: skip


@pytest.mark.slow
def test_the_opset_is_the_one_asked_for(workplace: Path) -> None:
    import onnx

    assert json.loads(printed(NETWORK, "--opset", 18, "--json"))["opset"] == 18
    assert onnx.load(f"{NETWORK}.onnx").opset_import[0].version == 18
    before = Path(f"{NETWORK}.onnx").read_bytes()
    message = refused(NETWORK, "--opset", 99, "--force")
    assert message.startswith("opset 99: torch.onnx does not have it")
    assert Path(f"{NETWORK}.onnx").read_bytes() == before


@pytest.mark.parametrize(
    ("spec", "name"),
    [("runs/bars-1.5", "bars-1.5"), ("runs/best.safetensors", "best"), (NETWORK, NETWORK),
     ("some.where:made", "made")],
)  # fmt: skip
def test_the_file_is_called_like_the_model(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, spec: str, name: str
) -> None:
    Path("runs/bars-1.5").mkdir(parents=True)
    Path("runs/best.safetensors").touch()
    monkeypatch.setattr(exporting, "NEEDED", ("no_such_package",))
    assert refused(spec).startswith(f"{name}.onnx: ONNX files are made and checked with")
