"""A contender without torch, for tests of the conductor: it behaves as its engine's name says.

Writes its process id and what it was asked into the race's folder.
"""

import json
import os
import sys
import time
from pathlib import Path

engine, network, batch, threads, folder = sys.argv[1:]
diary = Path(folder) / "diary.txt"
times = iter([3.0, 1.0, 2.0, 9.0])


def answer(do: str) -> dict:
    if engine == "fails" and do == "prepare":
        return {"ok": False, "reason": "RuntimeError: no kernel for it"}
    if engine == "hangs" and do == "time":
        time.sleep(600)
    if engine == "dies" and do == "time" and next(times) < 3:
        print("first a warning\nout of luck", file=sys.stderr)
        os._exit(7)
    if engine == "forgets" and do == "memory":
        return {"ok": False, "reason": "OSError: no /proc"}
    return {"ok": True, **ANSWERS.get(do, dict)()}


NAN = float("nan")
LOSSES = {"wrong": [2.0, 1.1, 0.5], "nan": [2.0, NAN, 0.5]}
ANSWERS = {
    "prepare": lambda: {"import_s": 2.0, "prepare_s": 0.5, "first_call_s": 0.25},
    "check": lambda: {"error": {"wrong": 0.5, "nan": NAN}.get(engine, 1e-6)},
    "time": lambda: {"ms": next(times), "calls": 4},
    "limit": lambda: {"peak": 1e9, "multiply_adds": 1e6},
    "kept": lambda: {"kept_bytes": 1000 if engine == "neocog" else 3000, "allocated_bytes": 1000},
    "peak": lambda: {"peak_bytes": 2000, "gradient_bytes": 500},
    "losses": lambda: {"losses": LOSSES.get(engine, [2.0, 1.0, 0.5])},
    "reference": lambda: {"losses": [2.0, 1.0002]},
    "memory": lambda: {"peak_mb": 8.0, "steady_mb": 4.0, "winograd_mb": None},
}

for line in sys.stdin:
    asked = json.loads(line)["do"]
    with diary.open("a") as file:
        print(os.getpid(), engine, batch, threads, asked, file=file)
    print(json.dumps(answer(asked)), flush=True)
