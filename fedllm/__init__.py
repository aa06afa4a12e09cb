"""Federated, private fine-tuning of language models as a Flower app."""
