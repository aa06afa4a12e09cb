"""The libraries that a client imports ahead of a message."""

import subprocess
import sys

import pytest

IMPORTS = """
import gc, sys
from fedllm.client.preload import import_libraries
collections = []
gc.callbacks.append(lambda *_: collections.append(_))
import_libraries(quantized=True, per_example=sys.argv[1] == "record")
gc.callbacks.clear()
import torch
print(len(collections), gc.isenabled(), gc.get_freeze_count() > 100_000)
print("torch._inductor.compile_fx" in sys.modules, torch.compile.__module__)
print(*("fedllm.training.sft" in sys.modules, "peft" in sys.modules))
"""


@pytest.mark.parametrize("unit", ["none", "record"])
def test_a_client_imports_only_what_it_takes_and_collects_no_garbage_meanwhile(unit):
    command = [sys.executable, "-c", IMPORTS, unit]
    done = subprocess.run(command, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "0 True True",
        "False torch",
        "True True" if unit == "none" else "False True",
    ]
