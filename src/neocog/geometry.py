"""Window arithmetic along one axis: which inputs a sliding window covers, and how often it fits.

A window of ``size`` K slides over an axis of ``n`` inputs. Output ``o`` looks at the K positions

    q = o*stride - low + k*dilation          k = 0 .. K-1

of the axis, where position 0 is the first input and ``low``/``high`` positions of padding stand
before and after the inputs. With a ``base_dilation`` B the inputs themselves are spread out: input
``i`` stands at position ``i*B`` and nothing between two of them (that is how the gradient of a
strided convolution reads its input). B = 1 is the ordinary convolution.

Sizes may be plain integers or symbolic ones (``torch.SymInt``): ``out_size`` uses only
``+ - * //``. Everything else enumerates positions and wants plain integers. Nothing here checks
its arguments; :mod:`neocog.problem` does, once, when a problem is built.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import gcd


@dataclass(frozen=True)
class Phase:
    """Outputs ``start + step*j`` for ``j < count``: those that share the same taps.

    Tap ``(k, offset)`` multiplies kernel element ``k`` with input ``stride*j + offset``; an index
    outside ``[0, n)`` is padding. No taps: these outputs are zero. Only ``count`` depends on the
    size of the input, so that a kernel made for a window serves every size.
    """

    start: int
    step: int
    count: int
    stride: int
    taps: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Window:
    """A sliding window along one axis; all fields in elements, see the module's docstring.

    ``low`` and ``high`` may be negative in gradients: positions are then cut off instead of added.
    ``ceil`` also counts a last window that hangs over the end, as ``ceil_mode`` of PyTorch's pools.
    """

    size: int
    stride: int = 1
    dilation: int = 1
    low: int = 0
    high: int = 0
    base_dilation: int = 1
    ceil: bool = False

    @property
    def span(self) -> int:
        """Positions from the first to the last tap: ``dilation*(size-1) + 1``."""
        return self.dilation * (self.size - 1) + 1

    def out_size(self, n: int) -> int:
        """How many windows fit: ``floor((I - D(K-1) - 1 + low + high)/S) + 1``.

        ``I`` is the extent of the spread-out inputs, ``(n-1)*base_dilation + 1``. The result is
        below 1 if the window is larger than the padded input. In ceil mode the quotient is rounded
        up, but the last window must start at an input or in the low padding, never in the high
        padding (the rule of torch's ``pooling_output_shape``).
        """
        slack = self._extent(n) + self.low + self.high - self.span
        if not self.ceil:
            return slack // self.stride + 1
        out = (slack + self.stride - 1) // self.stride + 1
        if self._starts_past_the_inputs(out - 1, n):
            out = out - 1
        return out

    def formula(self, n: int) -> str:
        """The output size with its numbers: ``floor((28 - 1*(3-1) - 1 + 1 + 1)/1) + 1 = 28``."""
        extent = f"{n}" if self.base_dilation == 1 else f"(({n}-1)*{self.base_dilation}+1)"
        quotient = (
            f"({extent} - {self.dilation}*({self.size}-1) - 1 + {self.low} + {self.high})"
            f"/{self.stride}"
        )
        out = self.out_size(n)
        if not self.ceil:
            return f"floor({quotient}) + 1 = {out}"
        if self._starts_past_the_inputs(out, n) and self._rounded_up(n) > out:
            return f"ceil({quotient}) + 1 - 1 (the last would start past the input) = {out}"
        return f"ceil({quotient}) + 1 = {out}"

    def taps(self, o: int, n: int) -> tuple[tuple[int, int], ...]:
        """The ``(kernel index, input index)`` pairs that output ``o`` covers, padding left out."""
        found = []
        for k in range(self.size):
            i, between = divmod(self._position(o, k), self.base_dilation)
            if between == 0 and 0 <= i < n:
                found.append((k, i))
        return tuple(found)

    def padded_taps(self, o: int, n: int) -> tuple[int, ...]:
        """The kernel indices of output ``o`` on an input or on padding.

        All of them, but for a window that ceil mode lets hang over the end of the high padding.
        """
        end = self._extent(n) + self.high
        return tuple(k for k in range(self.size) if -self.low <= self._position(o, k) < end)

    def adjoint(self, n: int) -> Window:
        """The window that leads from ``out_size(n)`` outputs back to ``n`` inputs.

        Output o reads input i through tap k exactly if the adjoint's output i reads o through its
        tap ``size-1-k``. Stride and base dilation change places. From ``i*B = o*S - low + k*D``
        and ``k' = size-1-k`` follows ``o*S = i*B - (span-1-low) + k'*D``, so the low padding is
        ``span-1-low``; the high one is what makes the size come out as n.
        """
        low = self.span - 1 - self.low
        extent = (self.out_size(n) - 1) * self.stride + 1
        return Window(
            size=self.size,
            stride=self.base_dilation,
            dilation=self.dilation,
            low=low,
            high=(n - 1) * self.base_dilation + self.span - extent - low,
            base_dilation=self.stride,
        )

    def exchanged(self, n: int) -> Window:
        """The window of the weight's gradient, which leads from ``n`` inputs to ``size`` outputs.

        Its output k reads through tap o the input that output o of this one reads through tap k:
        the position ``o*stride - low + k*dilation`` is the same, seen from k. Stride and dilation
        change places; the high padding is what makes the size come out.
        """
        out = self.out_size(n)
        span = self.stride * (out - 1) + 1
        return Window(
            size=out,
            stride=self.dilation,
            dilation=self.stride,
            low=self.low,
            high=(self.size - 1) * self.dilation + span - self._extent(n) - self.low,
            base_dilation=self.base_dilation,
        )

    @property
    def phase_count(self) -> int:
        """How many phases there are: see :meth:`phases`."""
        return self.base_dilation // gcd(self.stride, self.base_dilation)

    def phases(self, n: int) -> tuple[Phase, ...]:
        """The outputs sorted by the taps that meet an input; see :class:`Phase`.

        A tap meets an input if its position is a multiple of the base dilation B. Outputs that are
        ``B // gcd(stride, B)`` apart are whole multiples of B apart, hence share their taps.
        All phases are listed, also those without taps (zeros) or, on short axes, with count 0.
        """
        step, out = self.phase_count, self.out_size(n)
        phases = []
        for start in range(step):
            positions = [(k, self._position(start, k)) for k in range(self.size)]
            phases.append(
                Phase(
                    start=start,
                    step=step,
                    count=(out - start + step - 1) // step,
                    stride=step * self.stride // self.base_dilation,
                    taps=tuple(
                        (k, q // self.base_dilation)
                        for k, q in positions
                        if q % self.base_dilation == 0
                    ),
                )
            )
        return tuple(phases)

    def unused(self, n: int) -> tuple[int, ...]:
        """The inputs in ``[0, n)`` that no window reaches."""
        used = {i for o in range(self.out_size(n)) for _, i in self.taps(o, n)}
        return tuple(i for i in range(n) if i not in used)

    def _extent(self, n: int) -> int:
        return (n - 1) * self.base_dilation + 1

    def _position(self, o: int, k: int) -> int:
        return o * self.stride - self.low + k * self.dilation

    def _starts_past_the_inputs(self, o: int, n: int) -> bool:
        return o * self.stride >= self._extent(n) + self.low

    def _rounded_up(self, n: int) -> int:
        slack = self._extent(n) + self.low + self.high - self.span
        return (slack + self.stride - 1) // self.stride + 1


def same_padding(size: int, dilation: int = 1) -> tuple[int, int]:
    """The ``(low, high)`` padding under which a window of stride 1 keeps the size of its axis.

    PyTorch's ``padding='same'``: an odd total puts the extra position on the high side.
    """
    total = dilation * (size - 1)
    return total // 2, total - total // 2


@dataclass(frozen=True)
class ReceptiveField:
    """What one output of a stack of windows sees of the first input, along one axis.

    ``size`` inputs wide; neighbouring outputs are ``jump`` inputs apart; output 0 begins at input
    ``start`` (negative: in the padding). ``ReceptiveField()`` is the input looking at itself.
    ``period``: after so many inputs a circular padding begins anew; 0 if several do, at different
    places; None without one.
    """

    size: int = 1
    jump: int = 1
    start: int = 0
    period: int | None = None

    def through(self, window: Window, circle: int | None = None) -> ReceptiveField:
        """The field after one more layer on top; ValueError for a base dilation other than 1.

        ``circle``: the layer's padding is circular, on a map of so many values.
        """
        if window.base_dilation != 1:
            raise ValueError(
                f"a receptive field grows through windows of base dilation 1, got {window}"
            )
        period = None if circle is None or window.low == window.high == 0 else circle * self.jump
        return ReceptiveField(
            size=self.size + (window.span - 1) * self.jump,
            jump=self.jump * window.stride,
            start=self.start - window.low * self.jump,
            period=joined_periods((self.period, period)),
        )

    def interval(self, o: int, n: int) -> tuple[int, int]:
        """The inputs ``first .. stop-1`` that output ``o`` may depend on, cut to ``[0, n)``.

        Every input it does depend on lies inside. Dilation leaves gaps, and the padding of a layer
        in between can hide inputs at the ends. Where circular padding leads to the opposite edge,
        ``stop`` is above n, and the inputs go on from 0: 27, 30 of n = 28 are 27, 0 and 1. All of
        them, (0, n), if the circle does not close after n inputs exactly.
        """
        first = self.start + o * self.jump
        stop = first + self.size
        if self.period is None or (first >= 0 and stop <= n):
            return min(max(first, 0), n), min(max(stop, 0), n)
        if self.period != n or self.size >= n:
            return 0, n
        return first % n, first % n + self.size


def joined_periods(periods: Iterable[int | None]) -> int | None:
    """The :attr:`ReceptiveField.period` of what sees through several of them."""
    found = {period for period in periods if period is not None}
    return None if not found else found.pop() if len(found) == 1 else 0
