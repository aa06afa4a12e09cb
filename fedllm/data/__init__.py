"""Rows to labelled tokens: read, share, format, tokenise.

Enters: `data.*` settings and a client's file. Leaves: labelled examples, the only form that
training and evaluation take. `readers` and `tables` know file formats, `folders` splits,
`embedded` the data sets that come with the package, `columns`, `turns` and `shapes` what a row
is, `held_out` which rows a client trains on, `partitions` how virtual clients share them,
`prompts` the wording, `rendering` what of it is learned, `tokens` the tokens and labels. Must not import Flower, but for
flwr-datasets' partitioners; `datasets` and transformers only inside functions.
"""
