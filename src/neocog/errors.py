"""Every error that neocog raises on purpose.

The command line turns each into one line and exit code 2.
"""


class NeocogError(Exception):
    """Base of all errors raised on purpose."""


class InvalidProblem(NeocogError, ValueError, RuntimeError):
    """Sizes, windows or channels that fit no layer.

    PyTorch raises ``RuntimeError`` for mismatched shapes and ``ValueError`` for bad arguments, so
    code that catches either goes on working.
    """


class Unsupported(NeocogError, NotImplementedError):
    """Valid in PyTorch but not covered by neocog's kernels: handed back to PyTorch, and said."""


class InvalidData(NeocogError, ValueError):
    """A data set or picture that cannot be read or used."""


class InvalidModel(NeocogError, ValueError):
    """A checkpoint, run folder or model factory that cannot be read or used."""


class NotExported(NeocogError, RuntimeError):
    """A model that cannot be exported, or whose export would compute something else."""
