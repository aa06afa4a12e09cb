"""Before a run: the noise, the loss to expect, the memory, the kind of adapter.

In: settings, and frontier.json: private federations that were run, with their losses. Out: plans,
predictions, advice with numbers, a drawing. It reads no client's data, so nothing here costs
privacy, and it predicts only inside what was measured (`prediction`).
It must not import Flower, `fedllm.strategy`, `fedllm.training` or `fedllm.evaluation`; only
`memory` imports torch, inside its function.
"""
