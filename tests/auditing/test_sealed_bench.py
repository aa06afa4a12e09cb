"""The bench reads what no party can, by a way of its own."""

import numpy as np
import pytest

from fedllm.auditing.sealed_bench import pad, signed
from fedllm.privacy.pads import add_pad
from tests.helpers.audits import quick, sealed_auditor

__all__ = ["quick"]


@pytest.mark.parametrize("size", [1, 3, 4, 5, 70_000])
def test_a_pad_by_aes_alone_is_the_pad_that_is_added(size):
    total, seed = np.zeros(size, np.uint32), bytes(range(32))
    add_pad(total, seed)

    assert np.array_equal(pad(seed, size), total)


def test_residues_are_the_integers_next_to_zero():
    values = np.array([0, 1, 2**31 - 1, 2**31, 2**32 - 1], np.uint32)

    assert signed(values).tolist() == [0, 1, 2**31 - 1, -(2**31), -1]


def test_integers_and_noise_are_read_to_the_last_bit(quick):
    with sealed_auditor()._sealed.bench(64) as bench:
        nodes = bench.cohort(1)
        contents = [(node, bench.content(node, np.full(64, 0.01))) for node in nodes]
        below = sum(bench.integers(content) for _, content in contents)
        bench.release(1, contents)
        noise = sum(bench.noise_of(name) for name in ("a", "b", "c"))
        opened = bench.entered[-1] * len(nodes) * bench.grid.sensitivity

        expected = bench.in_adapters_order(below + noise)

    assert np.array_equal(np.rint(opened / bench.settings.clipping_norm), expected)


def test_nothing_is_written_into_the_home_of_who_audits(quick, tmp_path, monkeypatch):
    monkeypatch.setenv("FEDLLM_HOME", str(tmp_path / "home"))
    with sealed_auditor()._sealed.bench(64) as bench:
        bench.release(1, [])

    assert not (tmp_path / "home").exists()
