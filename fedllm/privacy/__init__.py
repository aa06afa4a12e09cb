"""The mechanism, the accounting and the ledgers of differential privacy.

In: vectors and numbers. Out: noised sums, epsilons, privacy.json, sentences. It may import NumPy,
SciPy and dp-accounting, and of this package `errors` and `atomic_files` alone: no torch, no
Flower, no run config. So it can be read, tested and trusted apart from everything else.

    from fedllm.privacy.accounting import calibrate
    calibrate(8.0, 3, 1e-5, "all", 1.0)  # 1.0396
"""
