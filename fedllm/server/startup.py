"""Start or resume a run: returns a ready federation."""

PACKAGES = ("flwr", "torch", "transformers", "peft", "trl", "bitsandbytes")
