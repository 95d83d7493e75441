"""What PyTorch's functions and operators do besides giving a result."""

from __future__ import annotations

import operator
import types
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._ops import HigherOrderOperator, OpOverload
from torch.utils._pytree import tree_leaves


def storage_of(t: Tensor) -> int:
    """The number of a tensor's memory; 0 if it has none of the usual kind."""
    return t.untyped_storage()._cdata if t.layout == torch.strided else 0


NAMESPACES = frozenset({"aten", "prims", "prim", "neocog"})

NO_OPERATOR = frozenset({
    # what tells about tensors
    "size", "dim", "stride", "numel", "ndimension", "is_contiguous", "nelement", "storage_offset",
    "__get__", "getattr", "is_floating_point", "is_complex", "element_size", "is_tensor",
    "aten.sym_size.int", "aten.sym_stride.int",
    # what may give back what it is given
    "contiguous", "to", "float", "cpu", "type", "type_as", "dropout", "dropout1d", "dropout2d",
    "dropout3d", "alpha_dropout", "feature_dropout", "feature_alpha_dropout", "resolve_conj",
    "resolve_neg", "expand_as", "reshape", "view", "broadcast_tensors",
    # arithmetic with sizes
    "getitem", "__len__", "len", "ceil", "floor", "ge", "gt", "le", "lt", "eq", "ne", "add", "sub",
    "mul", "truediv", "floordiv", "mod", "pow", "neg", "pos", "and_", "or_", "not_", "is_",
    "is_not", "min", "max", "int", "bool", "sqrt", "prod", "tuple", "list", "slice", "contains",
    "isinstance", "sym_int", "sym_float", "sym_max", "sym_min", "sym_sum", "sym_size",
})  # fmt: skip
"""Functions that may do their work without any of ATen's operators, and have no effects."""

SPECIAL = frozenset({
    "register_hook", "register_post_accumulate_grad_hook", "retain_grad", "requires_grad_",
    "backward", "set_", "resize_", "resize_as_", "detach_", "share_memory_",
})  # fmt: skip
"""Functions that change more than values."""


def is_known(function: Any) -> bool:
    """Whether it is one of PyTorch's, or Python's, own functions."""
    if isinstance(function, HigherOrderOperator):
        return False
    if isinstance(function, OpOverload):
        return function.namespace in NAMESPACES
    name = getattr(function, "__name__", "")
    homes = (
        torch, F, Tensor, operator, torch._C._nn, torch._C._TensorBase, torch._VF, torch.special,
        torch.linalg, torch.fft,
    )  # fmt: skip
    if any(getattr(home, name, None) is function for home in homes):
        return True
    return getattr(function, "__module__", "") in ("math", "builtins", "_operator") or (
        isinstance(getattr(function, "__self__", None), property | types.GetSetDescriptorType)
    )


_RUNNING_STATISTICS = {
    "batch_norm": (3, 4, 5),
    "instance_norm": (3, 4, 5),
    "native_batch_norm": (3, 4, 5),
    "cudnn_batch_norm": (3, 4, 5),
    "_native_batch_norm_legit": (3, 4, 5),
    "_batch_norm_impl_index": (3, 4, 5),
}
"""Operators that move running statistics without saying so in their schema: the positions of these,
and of the flag that they do."""


def is_random(func: OpOverload) -> bool:
    """Whether an operator draws from PyTorch's generator."""
    return torch.Tag.nondeterministic_seeded in func.tags


def written(func: OpOverload, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> set[int]:
    """The storages that an operator writes to."""
    found: set[int] = set()
    if func._schema.is_mutable:
        for i, argument in enumerate(func._schema.arguments):
            info = argument.alias_info
            if info is not None and info.is_write:
                value = args[i] if i < len(args) else kwargs.get(argument.name)
                found |= {storage_of(t) for t in tree_leaves(value) if isinstance(t, Tensor)}
    positions = _RUNNING_STATISTICS.get(func._overloadpacket.__name__)
    if positions is not None and len(args) > positions[2] and args[positions[2]] is True:
        found |= {storage_of(args[i]) for i in positions[:2] if isinstance(args[i], Tensor)}
    return found
