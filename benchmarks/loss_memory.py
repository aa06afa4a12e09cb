"""Memory of the loss: logits whole against in chunks.

    python benchmarks/loss_memory.py

One forward and backward pass of the loss alone, on OpenLLaMA 3B's head (hidden 3200,
vocabulary 32,000, bfloat16, random weights) at 512 positions. Each setting runs in a
process of its own; what it adds is its peak resident memory less that before the pass.
Linux only. memory.py measures a whole training step.
"""

import os
import subprocess
import sys

import torch

from fedllm.models import answer_loss

HIDDEN, VOCABULARY, POSITIONS = 3200, 32_000, 512
CHUNKS = {"whole": POSITIONS, "chunked": answer_loss._TOKENS_PER_CHUNK}
BOUND = 0.5


def main() -> None:
    """Print each setting's added memory, and whether their ratio is within the bound."""
    if len(sys.argv) == 2:
        _measure(CHUNKS[sys.argv[1]])
        return
    added, gradients = {}, {}
    for name in CHUNKS:
        done = subprocess.run(
            [sys.executable, __file__, name],
            capture_output=True,
            text=True,
            check=True,
            timeout=120,
        )
        added[name], gradients[name] = map(float, done.stdout.split())
        print(f"{name:8} {added[name]:6.0f} MB added, |gradient| {gradients[name]:.6g}")
    ratio = added["chunked"] / added["whole"]
    print(f"ratio {ratio:.2f}, bound {BOUND}: {'PASS' if ratio <= BOUND else 'FAIL'}")


def _measure(chunk: int) -> None:
    """Print the megabytes that a pass adds, and the norm of the rows' gradient."""
    torch.manual_seed(0)
    answer_loss._TOKENS_PER_CHUNK = chunk
    head = torch.nn.Linear(HIDDEN, VOCABULARY, bias=False, dtype=torch.bfloat16)
    head.requires_grad_(False)
    rows = torch.randn(POSITIONS, HIDDEN, dtype=torch.bfloat16, requires_grad=True)
    wanted = torch.randint(VOCABULARY, (POSITIONS,))
    # The first product allocates the matrix library's own buffers.
    head(rows[:1].detach())
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = _peak()
    answer_loss._ChunkedLosses.apply(rows, wanted, head).mean().backward()
    assert rows.grad is not None
    print(_peak() - before, float(rows.grad.float().norm()))


def _peak() -> float:
    """Return this process's peak resident memory in megabytes."""
    with open(f"/proc/{os.getpid()}/status") as file:
        line = next(line for line in file if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1000


if __name__ == "__main__":
    main()
