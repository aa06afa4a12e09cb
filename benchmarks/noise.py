"""Time the discrete Gaussian beside the continuous one that it replaced.

    python benchmarks/noise.py

Both draw from AES in counter mode under a key of the operating system; the continuous one
by the inverse of the normal distribution. Alternating, CPU time, median of several pairs.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
from scipy.special import ndtri

from fedllm.privacy.mechanism import SecureGenerator

_SIZES = (3_840, 184_320, 2_662_400)
_CHUNK = 1 << 18


def continuous(size: int) -> None:
    """Draw float64 normal values by the inverse CDF, in chunks."""
    words = SecureGenerator().words()
    for start in range(0, size, _CHUNK):
        part = (words(min(_CHUNK, size - start)) >> np.uint64(12)).astype(np.float64)
        part += 0.5
        part *= 2.0**-52
        ndtri(part, out=part)


def discrete(size: int) -> None:
    """Draw the noise of a release."""
    SecureGenerator().discrete_gaussian(size)


def seconds(draw: Callable[[int], None], size: int) -> float:
    """Return the CPU seconds of one draw."""
    began = time.process_time()
    draw(size)
    return time.process_time() - began


def main() -> None:
    """Print the ratio for each size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=21)
    pairs = parser.parse_args().pairs
    discrete(1)  # makes the table
    for size in _SIZES:
        ratios = [
            seconds(discrete, size) / seconds(continuous, size) for _ in range(pairs)
        ]
        print(
            f"{size:>9,} values: discrete over continuous {statistics.median(ratios):.2f} "
            f"(least {min(ratios):.2f}, most {max(ratios):.2f})"
        )


if __name__ == "__main__":
    main()
