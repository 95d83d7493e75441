"""A process that runs cases: a crash or a hang ends it, and nothing else.

``python -m fuzz.child`` reads cases from its input, one line each, and answers each with a line.
With ``--apart`` it runs every case in a fork of its own, as shrinking needs it.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import logging
import os
import resource
import select
import signal
import sys
from typing import Any

import torch

from .comparing import judge_fairly
from .program import Case

Answer = dict[str, Any]
"""``findings``: a list of (kind, where, detail); ``invalid``: PyTorch's reason, or empty;
``spoilt``: whether the process had better not go on."""


def answer(line: str, engine: str) -> Answer:
    """What becomes of a case."""
    verdict = judge_fairly(Case.parse(line), engine)
    found = [(f.kind, f.where, f.detail) for f in verdict.findings]
    return {"findings": found, "invalid": verdict.invalid, "spoilt": spoilt()}


def spoilt() -> bool:
    """Whether an error left this process inside a transformation of functions."""
    inside = torch._C._functorch.peek_interpreter_stack() is not None
    return inside or torch.autograd.forward_ad._current_level >= 0


def answer_apart(line: str, engine: str, timeout: float) -> Answer:
    """The same in a fork; the end of the fork is a finding."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        with os.fdopen(writing, "w") as out:
            out.write(json.dumps(answer(line, engine)))
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        ready, _, _ = select.select([pipe], [], [], timeout)
        text = pipe.read() if ready else b""
    if not ready:
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if not ready:
        return ended("hangs", f"more than {timeout:g} s")
    if not text:
        return ended("crashes", f"signal {os.WTERMSIG(status)}")
    found: Answer = json.loads(text)
    return found


def ended(kind: str, how: str) -> Answer:
    """The answer of a process that cannot give one."""
    return {"findings": [(kind, "process", how)], "invalid": "", "spoilt": True}


def main() -> None:
    """Answer cases until there are no more."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--engine", default="neocog")
    parser.add_argument("--apart", action="store_true")
    parser.add_argument("--timeout", type=float, default=60)
    asked = parser.parse_args()
    # Answers have a channel of their own; whatever a program prints goes elsewhere.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    faulthandler.enable()
    logging.disable(logging.CRITICAL)
    _, most = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (0, most))
    torch.set_num_threads(1)
    for line in sys.stdin:
        if asked.apart:
            found = answer_apart(line, asked.engine, asked.timeout)
        else:
            found = answer(line, asked.engine)
        print(json.dumps(found), file=answers, flush=True)


if __name__ == "__main__":
    main()
