"""One client's rows to an update: TRL's trainer, or DP-SGD of our own.

Enters: an `AdaptedModel`, labelled examples, a `RoundTask` with the global arrays. Leaves: a
`result.Trained`, and the model as it was but for the trained values. `sft` and `dpo` are
for client-level privacy and none; `dp_sgd` is record level and ends in the mechanism of
`fedllm.privacy`; `objectives` says what differs between answers and preferences. Must not
import Flower; `sft` and `dpo` alone import TRL, `activation_compression` bitsandbytes.
"""
