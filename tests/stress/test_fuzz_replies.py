"""A short run of the fuzzer; the long one is typed: python -m tests.stress.fuzz_replies."""

import pytest

from fedllm.privacy.mechanism import Checked, clipped_update
from tests.stress.fuzz_replies import fuzz


@pytest.mark.parametrize("encoding", ["float32", "float16", "int8"])
def test_no_random_reply_raises_or_adds_more_than_the_clipping_norm(encoding):
    worst, codes = fuzz(encoding, 300, start=11)

    # It reaches the bound, and both sides of what is turned away.
    assert 0.99 < worst <= 1 + 1e-9
    assert codes[""] > 10 and codes["malformed"] > 10 and codes["not-finite"] > 1


def test_the_fuzzer_finds_a_clip_that_is_off(monkeypatch):
    def loose(arrays, reference, clipping_norm):
        checked = clipped_update(arrays, reference, clipping_norm)
        if checked.update is None:
            return checked
        return Checked(checked.update * (1 + 1e-6))

    monkeypatch.setattr("fedllm.strategy.client_level_dp.clipped_update", loose)
    with pytest.raises(AssertionError, match="C by"):
        fuzz("float32", 200, start=11)
