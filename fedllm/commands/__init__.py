"""What a person types: `python -m fedllm.commands.<name>`."""
