"""Threads with a stack of 64 KiB, where PyTorch lives: kernels are compiled and run there."""

import os
import subprocess
import sys

import pytest

SCRIPT = """
import sys, threading
import torch
from torch import nn
import neocog, neocog.functional as F

x, w = torch.ones(2, 3, 32, 32), torch.ones(7, 3, 3, 3, requires_grad=True)
model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3))
trained = torch.compile(model, backend="neocog")

def gradients():
    F.conv_block(x, w, activation="relu").sum().backward()
    F.max_pool2d(x.clone().requires_grad_(), 3, 2).sum().backward()

CASES = {
    "convolve": lambda: F.conv2d(torch.ones(1, 5, 9, 9), torch.ones(6, 5, 3, 3)),
    "gradients": gradients,
    "freeze": lambda: neocog.freeze(model.eval(), x)(x),
    "train": lambda: trained(x).sum().backward(),
}
if sys.argv[1] == "train":
    trained(x)  # Dynamo itself needs more
threading.stack_size(64 << 10)
done = []
thread = threading.Thread(target=lambda: (CASES[sys.argv[1]](), done.append(True)))
thread.start()
thread.join()
print(*done, threading.stack_size() >> 10)
"""


@pytest.mark.slow
@pytest.mark.parametrize("case", ["convolve", "gradients", "freeze", "train"])
def test_a_thread_with_a_small_stack(case):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, case],
        env=os.environ | {"NEOCOG_CACHE_DIR": "off"}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["True", "64"], "the size for new threads is as it was"
