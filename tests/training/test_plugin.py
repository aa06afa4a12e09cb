"""A callback or a collator of an installed package, and what is none."""

import re
from dataclasses import replace
from typing import Any

import pytest

from fedllm.errors import ConfigError
from fedllm.training import plugin
from fedllm.training.plugin import load_plugin
from tests.helpers.clients import PLAIN, assert_same
from tests.helpers.rows import ROOT

SOURCE = """
from transformers.trainer_callback import TrainerCallback
from fedllm.models.answer_loss import collate

seen = []

class Counter(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        seen.append(state.global_step)

def first_token_alone():
    def collator(rows):
        cut = []
        for row in rows:
            labels = list(row["labels"])
            first = next(i for i, label in enumerate(labels) if label >= 0)
            labels[first + 1 :] = [-100] * (len(labels) - first - 1)
            cut.append({"input_ids": row["input_ids"], "labels": labels})
        return collate(cut, 0)
    return collator

def nothing():
    return None
"""


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A package `fedllm_ours`, as pip leaves it, and a module beside it that is none."""
    site = tmp_path / "site"
    about = site / "fedllm_ours-1.0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: fedllm-ours\n")
    (about / "top_level.txt").write_text("fedllm_ours\n")
    (site / "fedllm_ours.py").write_text(SOURCE)
    (site / "delivered.py").write_text(SOURCE)
    page = (ROOT / "docs/own-data-and-models.md").read_text("utf-8")
    (example,) = re.findall(r"```python\n(from transformers .*?)```", page, re.DOTALL)
    (about / "top_level.txt").write_text("fedllm_ours\nours\n")
    (site / "ours").mkdir()
    (site / "ours" / "steps.py").write_text(example)
    monkeypatch.syspath_prepend(str(site))
    plugin._packages.cache_clear()
    yield
    plugin._packages.cache_clear()


@pytest.fixture
def client(make_client):
    return make_client()


def test_a_callback_is_called_beside_ours(installed, client):
    import fedllm_ours  # type: ignore[import-not-found]

    config = replace(PLAIN, local_steps=3, plugin="fedllm_ours:Counter")

    with_plugin = client.train(config)

    assert fedllm_ours.seen == [1, 2, 3]
    assert_same(with_plugin.arrays, client.train(replace(config, plugin="")).arrays)


def test_a_collator_makes_the_batches(installed, client):
    config = replace(PLAIN, plugin="fedllm_ours:first_token_alone")
    got = client.train(config).arrays

    def cut(row: dict[str, Any]) -> dict[str, Any]:
        first = next(i for i, label in enumerate(row["labels"]) if label >= 0)
        labels = [
            label if i == first else -100 for i, label in enumerate(row["labels"])
        ]
        return {**row, "labels": labels}

    plain = client.train(replace(config, plugin="")).arrays
    client.examples[:] = [cut(row) for row in client.examples]
    assert_same(got, client.train(replace(config, plugin="")).arrays)
    with pytest.raises(AssertionError):
        assert_same(got, plain)


def test_the_page_s_example_halves_the_rate_after_ten_steps(installed, client):
    config = replace(PLAIN, local_steps=11)
    ten = client.train(replace(config, local_steps=10)).arrays
    eleven = client.train(config).arrays

    got = client.train(replace(config, plugin="ours.steps:Halve")).arrays

    halfway = {name: (ten[name] + eleven[name]) / 2 for name in ten}
    assert_same(got, halfway)


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("os:getcwd", "'os' is no package"),
        ("delivered:Counter", "'delivered' is no package"),
        ("fedllm.training.sft:train_adapter", "'fedllm' is no package"),
        ("missing_package:make", "'missing_package' is no package"),
        ("fedllm_ours:missing", "no attribute 'missing'"),
        ("fedllm_ours.missing:make", "fedllm_ours.missing:make"),
        ("fedllm_ours:nothing", "returns a NoneType"),
    ],
)
def test_what_is_no_plugin_is_one_line(installed, name, problem):
    with pytest.raises(ConfigError, match=problem) as caught:
        load_plugin(name)

    assert "\n" not in str(caught.value)
