"""How long a micro-batch takes, without a row."""

from fedllm.config import PrivacyConfig, RunConfig, TrainConfig
from fedllm.training import step_time
from fedllm.training.per_example_gradients import PerExample
from fedllm.training.step_time import seconds_of_micro_batch


def test_a_full_micro_batch_of_the_longest_public_tokens_is_timed(
    make_client, monkeypatch
):
    client = make_client()
    client.set(client.start())
    before, passes = client.get(), []
    real = PerExample.gradients

    def note(self, examples, size):
        passes.append((len(examples), size, len(examples[0]["input_ids"])))
        return real(self, examples, size)

    monkeypatch.setattr(PerExample, "gradients", note)
    times = iter([0.0, 9.0, 10.0, 12.5])
    monkeypatch.setattr(step_time.time, "monotonic", lambda: next(times, 0.0))
    config = RunConfig(
        train=TrainConfig(batch_size=3, max_length=32),
        privacy=PrivacyConfig(unit="record"),
    )

    seconds = seconds_of_micro_batch(client, config)

    # The second pass counts: the first also tries what later ones rely on.
    assert seconds == 2.5
    assert passes == [(3, 3, 32)] * 2
    assert all((value == before[name]).all() for name, value in client.get().items())
    assert not client.model.training
