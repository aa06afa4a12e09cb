"""A run for people: its page, model card, plots, and rounds sent to a tracker.

In: a run folder, read as a `RunRecord`. Out: report.html, README.md, a tracker's files, and the
four files of a comparison. Nothing here may end a run: a failure is one line in the log.
It must not import `fedllm.server`, `fedllm.client` or `fedllm.evaluation`.
"""
