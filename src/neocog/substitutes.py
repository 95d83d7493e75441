"""What stands in a rewritten graph for nodes that PyTorch does not run as it should.

Checkpoints, whose random numbers PyTorch leaves to Inductor, and the gradient of instance_norm.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.utils.checkpoint import checkpoint

from .propagation import written_arguments


class Checkpoint:
    """A graph whose values are computed again for the backward pass.

    What PyTorch puts into a graph for it leaves the random numbers of the second pass to Inductor.
    https://docs.pytorch.org/docs/stable/checkpoint.html
    """

    __name__ = "checkpoint"

    def __init__(self, gm: fx.GraphModule, body: Callable[..., Any]):
        self.gm, self.body = gm, body
        self.written: frozenset[int] | None = None

    def __call__(self, *args: Any) -> Any:
        """The graph's result."""
        if self.written is None:
            self.written = written_arguments(self.gm, args)
        # PyTorch watches arguments for writes; buffers, which the body writes to, are none.
        own = {i: a for i, a in enumerate(args) if i in self.written}
        others = [a for i, a in enumerate(args) if i not in own]

        def run(*given: Any) -> Any:
            left = iter(given)
            return self.body(*(own[i] if i in own else next(left) for i in range(len(args))))

        return checkpoint(run, *others, use_reentrant=False)


def instance_norm(
    input: Tensor, running_mean: Tensor | None = None, running_var: Tensor | None = None,
    weight: Tensor | None = None, bias: Tensor | None = None, use_input_stats: bool = True,
    momentum: float = 0.1, eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    """torch.nn.functional.instance_norm, whose gradient of a single image PyTorch 2.13 gets wrong,
    depending on the layouts of the image and of the gradient that comes."""
    if input.shape[0] != 1 or running_mean is not None or not use_input_stats:
        return F.instance_norm(
            input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps
        )
    x, axes = input.contiguous(), list(range(2, input.dim()))
    var, mean = torch.var_mean(x, axes, correction=0, keepdim=True)
    normal = (x - mean) * torch.rsqrt(var + eps)
    for parameter, apply in ((weight, torch.mul), (bias, torch.add)):
        if parameter is not None:
            normal = apply(normal, parameter.view(1, -1, *[1] * len(axes)))
    return normal
