"""One client's rows to an update: TRL's trainer, or DP-SGD of our own.

Enters: an `AdaptedModel`, labelled examples, a `RoundTask` with the global arrays. Leaves: a
`result.Trained`, and the model as it was but for the trained values. `sft` is for client-level
privacy and none; `dp_sgd` is record level and ends in the mechanism of `fedllm.privacy`. Must
not import Flower; `sft` alone imports TRL, `activation_compression` bitsandbytes.
"""
