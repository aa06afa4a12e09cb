"""The script that builds the embedded rows."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from fedllm.config import DataConfig
from fedllm.data.rows import load_public, load_rows
from tests.helpers.rows import EMBEDDED, ROOT

# The script that rebuilds the embedded rows


@pytest.fixture(scope="module")
def build_script() -> ModuleType:
    path = ROOT / "tools" / "build_wordnet_medical.py"
    spec = importlib.util.spec_from_file_location("build_wordnet_medical", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


SYNSETS = """\
  1 This software and database is being provided to you, the LICENSEE
01348530 05 n 02 bacteria 0 bacterium 0 000 | considered to be plants
01350994 05 n 01 coccobacillus 0 001 @ 01348530 n 0000 | a very short bacillus
01370698 05 n 01 erwinia 0 001 @ 01348530 n 0000 | bacteria that attack plants
03247620 06 n 01 drug 0 000 | a substance that is used as a medicine
14777104 27 n 01 Brioschi 0 001 @ 03247620 n 0000 | an antacid
14034177 26 n 01 physical_condition 0 000 | the state of the body
14285662 26 n 05 injury 0 hurt 0 harm 0 trauma 0 blow 0 001 @ 14034177 n 0000 | damage \
caused by accident etc.; "he has an injury"
"""


def test_the_script_words_sorts_and_filters_synsets(
    build_script: ModuleType, tmp_path: Path
) -> None:
    (tmp_path / "data.noun").write_text(SYNSETS)
    lines = "".join(build_script.build(tmp_path).values()).splitlines()
    rows = {row["term"]: row for row in map(json.loads, lines)}
    assert {term: row["site"] for term, row in rows.items()} == {
        "coccobacillus": "microbe",
        "drug": "drug",
        "physical condition": "disease",
        "injury": "injury",
    }
    assert rows["injury"] == {
        "id": "wn30-n14285662",
        "site": "injury",
        "term": "injury",
        "instruction": "What is injury?",
        "response": "Damage caused by accident etc. "
        "It is also called hurt, harm, trauma.",
    }


def test_the_script_splits_as_the_embedded_rows_are_split(
    build_script: ModuleType,
) -> None:
    config = DataConfig()
    splits = {
        "train": load_rows(config),
        "validation": load_public(config, "validation"),
        "test": load_public(config, "test"),
    }
    for split, rows in splits.items():
        assert rows is not None
        assert {build_script.split_of(term) for term in rows["term"]} == {split}


@pytest.mark.skipif(
    not Path("/usr/share/wordnet/data.noun").exists(),
    reason="needs Debian's wordnet-base",
)
def test_the_script_reproduces_every_embedded_byte(build_script: ModuleType) -> None:
    for name, text in build_script.build(Path("/usr/share/wordnet")).items():
        assert (EMBEDDED / name).read_text(encoding="utf-8") == text
