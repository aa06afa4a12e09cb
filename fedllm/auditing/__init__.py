"""The audit of a run: hostile replies, noise, order, ledger and canaries.

In: the settings of a run, or its folder. Out: checks with numbers, a certified lower bound on
epsilon, PASS or FAIL. Every check goes through the strategy that a run would make, on a toy
adapter (`harness`); record level trains one client on the real base (`canary_records`).
It must not import `fedllm.server` or `fedllm.client`: it audits what they use, not them.
"""
