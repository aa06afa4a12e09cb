"""Federated, private fine-tuning of language models as a Flower app."""

import logging
import sys

# PEFT imports bitsandbytes before we do, which then misses, aloud, a kernel for a
# packing that fedllm.models.loading switches off.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

# For the same CPUs bitsandbytes fetches native code from a hub and runs it, and so would
# transformers, if a package `kernels` is installed. None makes its import fail, as Python
# documents; the types know modules only.
sys.modules.setdefault("kernels", None)  # type: ignore[arg-type]
