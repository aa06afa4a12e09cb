"""Federated, private fine-tuning of language models as a Flower app."""

import logging

# PEFT imports bitsandbytes before we do, which then misses, aloud, a kernel for a
# packing that fedllm.models.loading switches off.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
