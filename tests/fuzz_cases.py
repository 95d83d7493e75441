"""Programs that went wrong once, each the smallest of its kind: name -> case of the fuzzer."""

from __future__ import annotations

from typing import Any

from fuzz.program import Case, Input, Step

CONV: Step = ("conv", {})
NARROW: Step = ("conv", {"kernel": 1, "out": 4})


def case(
    mode: str, *steps: Step | str, inputs: tuple[Input, ...] = (Input((2, 3, 8, 8)),), **plan: Any
) -> Case:
    """A case; a step that is only named gets the plainest choices."""
    full = tuple((s, {}) if isinstance(s, str) else s for s in steps)
    return Case(1, inputs, full, mode, plan)


TRAINED = (Input((2, 3, 8, 8), grad=True),)
TWO = (Input((2, 8, 9, 9)), Input((3, 8, 9, 9)))
BRIGHT = (Input((4, 3, 32, 32), data="stain"),)
CHANNELS_LAST = (Input((2, 3, 8, 8), layout="channels_last"),)

KNOWN = {
    "grad mode switched inside": case("train", "grad_switch", CONV, inputs=TRAINED),
    "grad mode switched on": case(
        "train", ("grad_mode", {"steps": 3}), CONV,
        ("grad_switch", {"mode": "torch.enable_grad()"}), CONV, inputs=TRAINED,
    ),
    "straight through": case("train", CONV, "custom", CONV, inputs=TRAINED),
    "gradient reversed": case(
        "train", CONV, ("custom", {"kind": "parts.Reversed.apply({x})"}), CONV, inputs=TRAINED
    ),
    "convolution in a custom function": case("train", "custom_conv", CONV),
    "backward inside": case("train", CONV, "activation", CONV, backward="inside"),
    "frozen inside a compiled function": case("freeze", CONV, inside="compiled"),
    "frozen inside, new sizes": case("freeze", CONV, inside="eager", calls=["first", "size"]),
    "unused branch": case(
        "train", ("unused", {"how": "F.interpolate({l}({x}), scale_factor=2)"}), CONV
    ),
    "data attribute": case("train", CONV, ("detached", {"spelled": "{x}.data"}), CONV),
    "data attribute, inference": case("eval", CONV, ("detached", {"spelled": "{x}.data"}), CONV),
    "data attribute, frozen": case("freeze", CONV, ("detached", {"spelled": "{x}.data"}), CONV),
    "negative bit of a weight": case("freeze", CONV, negative_weight=True),
    "negative bit of a weight, compiled": case("eval", CONV, negative_weight=True),
    "negative bit of an input": case("eval", CONV, inputs=(Input((2, 3, 8, 8), "negative"),)),
    "tensor subclass": case("eval", CONV, "activation", CONV, wrapped=True),
    "tensor subclass, frozen": case("freeze", CONV, "activation", CONV, wrapped=True),
    **{
        f"{transform} of {of}, {where}": case("func", CONV, "activation", "pool", transform=transform, of=of, where=where)
        for transform in ("grad", "vmap", "jvp", "vjp") for of in ("argument", "weight")
        for where in ("inside", "outside")
    },
    "scripted function": case("freeze", CONV, "scripted", CONV),
    "scripted control flow": case("freeze", CONV, ("scripted", {"kind": "parts.padded({x}, 2)"})),
    "device of an input: a new tensor": case("freeze", CONV, ("device", {"how": "{x} + torch.zeros(1, device={x}.device)"})),
    "device of an input: asked": case("freeze", CONV, ("branch", {"asked": "{x}.is_cpu"})),
    "device of an input: its type": case("freeze", CONV, ("branch", {"asked": "{x}.device.type == 'cpu'"})),
    "device of an input: positions": case("freeze", CONV, "embedded"),
    "device of an input: coordinates": case(
        "freeze",
        ("device", {"how": "torch.cat([{x}, torch.linspace(-1, 1, {x}.shape[3], device={x}.device).view(1, 1, 1, -1).expand({x}.shape[0], 1, {x}.shape[2], -1)], 1)"}),
        CONV,
    ),
    "recurrent": case("freeze", CONV, "recurrent"),
    "to a device": case("freeze", "device", CONV),
    "to the CPU": case("freeze", ("device", {"how": "{x}.cpu()"}), CONV),
    "to another tensor": case("freeze", ("device", {"how": "{x}.to({x})"}), CONV),
    "constants on a device": case("freeze", ("device", {"how": "{x} + torch.ones(1, 1).to({x}.device)"}), CONV),
    "cached on the module": case("freeze", CONV, "cached"),
    "cached on the module, by type": case("freeze", CONV, ("cached", {"made": "torch.arange({x}.shape[3]).type_as({x})"})),
    "number of a constant": case("freeze", CONV, ("constant", {"how": "{x} * {x}.new_full((1, 1), self.{n}[0])"})),
    "slice written in place": case("freeze", CONV, ("slice_", {}), ("write_all", {"spelled": "{x} += 0.5"})),
    "part of a map written": case("freeze", CONV, "write_part"),
    "contiguous between convolutions": case(
        "freeze", CONV, ("view", {"spelled": "{x}.contiguous()"}), NARROW, "activation",
        ("view", {"spelled": "{x}.view({x}.shape[0], {x}.shape[1], -1)"}), inputs=CHANNELS_LAST,
    ),
    "layout of a channels_last model": case("train", CONV, channels_last=True),
    "strides asked for": case("freeze", CONV, "strided", inputs=CHANNELS_LAST),
    "is_contiguous asked for": case("freeze", CONV, "activation", "branch", inputs=CHANNELS_LAST),
    "two batches": case("freeze", CONV, "activation", ("conv", {"of": 3}), "activation", inputs=TWO, form="tuple", return1=2),
    "two batches, trained": case("train", CONV, "activation", ("conv", {"of": 3}), "activation", inputs=TWO, form="tuple", return1=2),
    "standardised weights": case(
        "freeze",
        *(("sequence", {"kind": "parts.Standardised({c}, {o}, 3, padding=1)", "out": n}) for n in (8, 16, 8)),
    ),
    "dropout of nothing, in place": case(
        "train", CONV, "norm", "dropout", ("activation", {"kind": "nn.LeakyReLU(0.1, inplace=True)"}), CONV
    ),
    "frozen weight, trained bias": case("train", CONV, CONV, "frozen"),
    "frozen weights, trained biases": case("train", CONV, CONV, "frozen", ("frozen", {"layer": 1})),
    "batch norm of a bright picture": case("train", NARROW, "norm", inputs=BRIGHT),
    "result with fields": case("freeze", CONV, form="answer"),
    "hook that counts": case("freeze", CONV, ("module_hook", {"hook": "register_forward_hook(parts.count_calls)"})),
}  # fmt: skip
