"""What a module keeps: buffers, counters, things cached on itself."""

from __future__ import annotations

from ..building import Builder, Operation
from ..program import Draw


def counter(b: Builder, d: Draw) -> None:
    """A buffer or an attribute that counts calls."""
    name = b.name("n")
    x = b.pick(d)
    kind = d("kind", ("torch.zeros(())", "torch.zeros((), dtype=torch.long)", "0"))
    b.prepare(f"self.{name} = 0" if kind == "0" else f"self.register_buffer({name!r}, {kind})")
    how = d("how", ("self.{n} += 1", "self.{n} = self.{n} + 1", "self.{n}.add_(1)"))
    b.line(how.format(n=name))
    if d("read", (True, False)):
        b.let(f"{x.name} * (1 + 0.1 * self.{name})")


def average(b: Builder, d: Draw) -> None:
    """A running mean of the module's own."""
    x = b.map(d)
    name = b.name("ema")
    b.prepare(f"self.register_buffer({name!r}, torch.zeros({x.shape[1]}))")
    mean = f"{x.name}.detach().mean((0, 2, 3))"
    how = d(
        "how",
        (
            "self.{n}.mul_(0.9).add_({m}, alpha=0.1)", "self.{n}.copy_({m})", "self.{n}.lerp_({m}, 0.1)",
            "self.{n} = self.{n} * 0.9 + {m} * 0.1", "self.{n}.data = {m}", "self.{n}[:] = {m}",
        ),
    )  # fmt: skip
    b.line(how.format(n=name, m=mean))
    if d("read", (True, False)):
        b.let(f"{x.name} - self.{name}.view(1, -1, 1, 1)")


def cached(b: Builder, d: Draw) -> None:
    """A grid kept on self and made anew when the size changes."""
    x = b.map(d)
    name = b.name("grid")
    made = d(
        "made",
        (
            "torch.arange({x}.shape[3], device={x}.device, dtype={x}.dtype)",
            "torch.arange({x}.shape[3]).type_as({x})",
            "torch.linspace(0, 1, {x}.shape[3]).to({x})",
            "torch.ones_like({x}[:1])",
            "torch.zeros({x}.shape[2:], device={x}.device) + 0.5",
        ),
    )
    b.prepare(f"self.{name}, self.{name}_size = None, None")
    b.line(
        f"if self.{name}_size != {x.name}.shape[2:]:\n"
        f"    self.{name} = {made.format(x=x.name)}\n"
        f"    self.{name}_size = {x.name}.shape[2:]"
    )
    b.let(f"{x.name} + self.{name}")


def remembered(b: Builder, d: Draw) -> None:
    """Something of a call that stays on self."""
    x = b.pick(d)
    name = b.name("last")
    b.prepare(f"self.{name} = None")
    b.line(
        f"self.{name} = {d('what', ('{x}.shape', '{x}.detach()', '{x}.shape[0]', '{x}', '({x}.dtype, {x}.device)')).format(x=x.name)}"
    )


def appended(b: Builder, d: Draw) -> None:
    """A list on self that grows."""
    x = b.pick(d)
    name = b.name("log")
    b.prepare(f"self.{name} = []")
    b.line(f"self.{name}.append({x.name}.{d('what', ('dim()', 'shape', 'detach()'))})")


def constant(b: Builder, d: Draw) -> None:
    """Tensors made of numbers, and numbers read out of tensors that never change."""
    x = b.map(d)
    name = b.name("k")
    b.prepare(f"self.register_buffer({name!r}, torch.tensor([8.0, 16.0]))")
    how = d(
        "how",
        (
            "{x} * self.{n}[0]", "{x} * {x}.new_full((1, 1), float(self.{n}[0]))", "{x} * self.{n}[0].item()",
            "{x} * {x}.new_full((1, 1), self.{n}[0])", "{x} + torch.tensor([0.5]).to({x})",
            "{x} * torch.tensor(2.0)", "{x} + {x}.new_tensor([0.5, 1.0]).sum()", "{x} * int(self.{n}[1])",
            "{x} + self.{n}.sum() * 0.1", "{x} * len(self.{n}.tolist())",
        ),
    )  # fmt: skip
    b.let(how.format(x=x.name, n=name))


TABLE = (
    Operation(3, counter), Operation(3, average), Operation(3, cached), Operation(2, remembered),
    Operation(1, appended), Operation(3, constant),
)  # fmt: skip
