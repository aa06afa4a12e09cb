"""Measure and prompt a model: held-out loss, multiple choice, open answers, generation.

Enters: a model with or without an adapter, and public rows or a question. Leaves: scores,
texts. `public_rows` scores a run's adapters: validation rows choose a round, test rows
report, and the two are never mixed. `inference` serves `fedllm evaluate` and `fedllm demo`.
Must not import Flower.
"""
