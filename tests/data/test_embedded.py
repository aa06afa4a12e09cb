"""Data sets that come with the package."""

import pytest

from fedllm.config import DataConfig
from fedllm.data.embedded import BUILT_IN_DATA, EMBEDDED
from fedllm.data.rows import load_public, load_rows


def test_the_built_in_data_are_the_default():
    assert DataConfig().name == BUILT_IN_DATA.name == "wordnet-medical"


@pytest.mark.parametrize("name", EMBEDDED)
def test_an_embedded_data_set_has_rows_in_every_split_and_a_licence_beside_them(name):
    is_pairs = "preference" in EMBEDDED[name].tags
    config = DataConfig(name=name, format="preference" if is_pairs else "auto")

    assert len(load_rows(config)) > 0
    for split in ("validation", "test"):
        rows = load_public(config, split)
        assert rows is not None and len(rows) > 0
    assert list(EMBEDDED[name].folder.glob("LICENSE*"))
    assert EMBEDDED[name].licence and EMBEDDED[name].caution
