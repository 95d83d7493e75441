"""What native code may read, and when it may run: every kind of tensor and state of PyTorch."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from neocog import guard
from neocog.sight import Follow

X = torch.arange(6.0).reshape(2, 3)


class Watched(torch.Tensor):
    """A subclass with memory of its own that is asked about every function."""


class Unasked(torch.Tensor):
    """A subclass that leaves PyTorch's functions alone, as Parameter does."""

    __torch_function__ = torch._C._disabled_torch_function_impl


class UnaskedParameter(nn.Parameter):
    """As libraries derive their own parameters."""


def inference():
    with torch.inference_mode():
        return torch.ones(2)


def inference_parameter():
    with torch.inference_mode():
        return nn.Parameter(torch.ones(2))


PLAIN = {
    "tensor": lambda: X,
    "transposed": lambda: X.t(),
    "expanded": lambda: X[:1].expand(5, 3),
    "channels_last": lambda: torch.ones(1, 2, 3, 4).contiguous(memory_format=torch.channels_last),
    "result with a history": lambda: torch.ones(2, requires_grad=True) * 2,
    "parameter": lambda: nn.Parameter(X),
    "buffer": lambda: nn.Buffer(X),
    "parameter of a class of its own": lambda: UnaskedParameter(X),
    "subclass without a say": lambda: X.as_subclass(Unasked),
    "inference tensor": inference,
    "view of an inference tensor": lambda: inference().view(2, 1),
    "inference parameter": inference_parameter,
    "integers": lambda: torch.arange(3),
    "half": lambda: X.half(),
    "without elements": lambda: torch.empty(0, 3),
    "shared": lambda: X.clone().share_memory_(),
    "of NumPy": lambda: torch.from_numpy(X.clone().numpy()),
    "resolved negative": lambda: negative().resolve_neg(),
    "dense again": lambda: X.to_sparse().to_dense(),
}


def fake():
    with FakeTensorMode():
        return torch.ones(2)


def negative():
    return torch.ones(2, dtype=torch.complex64).conj().imag


def given_back():
    t = torch.ones(2, 3)
    t.untyped_storage().resize_(0)
    return t


def leaked():
    kept = []
    torch.vmap(lambda t: (kept.append(t), t)[1])(X)
    return kept[0]


OTHERS = {
    "fake": (fake, "a fake tensor (it has a shape, and no values)"),
    "meta": (lambda: X.to("meta"), "device meta (kernels exist for cpu)"),
    "wrapper subclass": (lambda: TwoTensor(X, X), "a tensor subclass (TwoTensor)"),
    "parameter of a wrapper": (
        lambda: nn.Parameter(TwoTensor(X, X)),
        "a tensor subclass (TwoTensor)",
    ),
    "subclass": (lambda: X.as_subclass(Watched), "a tensor subclass (Watched)"),
    "not made yet": (nn.UninitializedParameter, "a tensor subclass (UninitializedParameter)"),
    "negative bit": (negative, "the negative bit (values are negated when they are read)"),
    "conjugate bit": (
        lambda: torch.ones(2, dtype=torch.complex64).conj(),
        "the conjugate bit (values are conjugated when they are read)",
    ),
    "sparse": (lambda: X.to_sparse(), "layout torch.sparse_coo"),
    "sparse rows": (lambda: X.to_sparse_csr(), "layout torch.sparse_csr"),
    "mkldnn": (lambda: X.to_mkldnn(), "layout torch._mkldnn"),
    "quantized": (
        lambda: torch.quantize_per_tensor(X, 0.1, 0, torch.qint8),
        "a quantized tensor",
    ),
    "nested": (lambda: torch.nested.nested_tensor([X, X]), "a nested tensor"),
    "nested, jagged": (
        lambda: torch.nested.nested_tensor([X, X], layout=torch.jagged),
        "a tensor subclass (NestedTensor)",
    ),
    "zeros": (lambda: torch._efficientzerotensor(2), "a tensor of zeros without memory"),
    "storage given back": (given_back, "a storage without memory (resized to 0)"),
    "functional": (lambda: torch._to_functional_tensor(X), "a functional tensor"),
    "leaked out of vmap": (leaked, "a transform of torch.func"),
}


@pytest.mark.parametrize("kind", PLAIN)
def test_memory_of_the_cpu_is_plain(kind):
    t = PLAIN[kind]()
    assert guard.plain(t)
    assert guard.why_not(t) is None


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", OTHERS)
def test_everything_else_is_not_and_the_reason_says_what_it_is(kind):
    make, reason = OTHERS[kind]
    t = make()
    assert not guard.plain(t)
    assert guard.why_not(t) == reason


class Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


class Function(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


def inside(run):
    """What :func:`guard.interrupted` says where ``run`` calls the function it is given."""
    heard = []

    def listen(*args):
        heard.append(guard.interrupted())
        return args[0] if args else None

    run(listen)
    assert heard
    assert guard.interrupted() is None, "it is over"
    return heard[0]


def within(manager):
    def run(listen):
        with manager():
            listen()

    return run


def functionalized(listen):
    torch.func.functionalize(lambda t: listen(t) + 1)(X)


INTERRUPTED = {
    "autocast": (within(lambda: torch.autocast("cpu")), "autocast is on"),
    "vmap": (lambda f: torch.vmap(f)(X), "a transform of torch.func"),
    "grad": (lambda f: torch.func.grad(lambda t: f(t).sum())(X), "a transform of torch.func"),
    "jvp": (lambda f: torch.func.jvp(f, (X,), (X,)), "a transform of torch.func"),
    "jacrev": (lambda f: torch.func.jacrev(f)(X), "a transform of torch.func"),
    "functionalize": (functionalized, "a transform of torch.func"),
    "dual level": (within(forward_ad.dual_level), "forward-mode differentiation"),
    "dispatch mode": (within(Dispatch), "a dispatch mode (Dispatch)"),
    "counting": (
        within(lambda: FlopCounterMode(display=False)),
        "a dispatch mode (_FlopCounterMode)",
    ),
    "fake": (within(FakeTensorMode), "a dispatch mode (FakeTensorMode)"),
    "make_fx": (lambda f: make_fx(f)(X), "a dispatch mode (ProxyTorchDispatchMode)"),
    "make_fx, fake": (
        lambda f: make_fx(f, tracing_mode="fake")(X),
        "a dispatch mode (FakeTensorMode)",
    ),
    "function mode": (within(Function), "a function mode (Function)"),
    "jit": (lambda f: torch.jit.trace(lambda t: f(t) + 1, X), "torch.jit traces"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("state", INTERRUPTED)
def test_states_in_which_pytorch_has_to_see_its_operators(state):
    run, reason = INTERRUPTED[state]
    assert inside(run) == reason


FREE = {
    "nothing": lambda f: f(),
    "no_grad": within(torch.no_grad),
    "inference": within(torch.inference_mode),
    "device": within(lambda: torch.device("cpu")),
    "autocast of another device": within(lambda: torch.autocast("cuda", enabled=True)),
    "autocast, switched off": within(lambda: torch.autocast("cpu", enabled=False)),
    "profiler": within(torch.profiler.profile),
    "saved tensors' hooks": within(
        lambda: torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t)
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("state", FREE)
def test_states_that_forbid_nothing(state):
    assert inside(FREE[state]) is None


def test_a_default_device_is_no_interruption_and_a_mode_beside_it_is():
    torch.set_default_device("cpu")
    try:
        assert guard.interrupted() is None
        with Function():
            assert guard.interrupted() == "a function mode (Function)"
    finally:
        torch.set_default_device(None)


def test_the_modes_that_record_for_explanations_let_kernels_run():
    """They follow neocog's layers, whose own numbers are to be explained."""
    with Follow(X):
        assert guard.own_mode()
        assert guard.interrupted() is None
        with Function():
            assert guard.interrupted() == "a function mode (Function)"
    assert not guard.own_mode()


def test_a_mode_lets_its_own_handler_run():
    """Inside the handler the mode is off, as PyTorch has it."""
    heard = []

    class Asks(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            heard.append(guard.interrupted())
            return function(*args, **(kwargs or {}))

    with Asks():
        torch.relu(X)
    assert heard == [None]
