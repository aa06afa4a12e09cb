"""A run on disk: its folder, checkpoint, state, record and list, and how it is resumed.

In: what a run writes. Out: the state to resume from, a `RunRecord` for page, card and list.
Every file is whole or absent; docs/reliability.md, "What a crash leaves", has the order of
writes. It must not import `fedllm.server`, `fedllm.client`, `fedllm.strategy` or
`fedllm.reporting`, and reads without torch.
"""
