"""Where a base model is, and what is no base model."""

import shutil
from pathlib import Path

import pytest

from fedllm.errors import ModelError
from fedllm.models.known import BUILT_IN_MODEL
from fedllm.models.location import load_config, locate


def test_a_local_folder_is_found_by_its_absolute_path(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tiny_llama.parent)

    assert locate(tiny_llama.name, tmp_path) == str(tiny_llama.resolve())
    assert locate(f"./{tiny_llama.name}", tmp_path) == str(tiny_llama.resolve())


def test_the_built_in_model_is_found_in_the_home_folder(tmp_path: Path) -> None:
    (tmp_path / "models" / BUILT_IN_MODEL.name).mkdir(parents=True)

    assert locate(BUILT_IN_MODEL.name, tmp_path) == str(
        tmp_path / "models/smollm2-135m-instruct"
    )


def test_a_hub_id_stays_as_it_is(tmp_path: Path) -> None:
    assert locate("openlm-research/open_llama_3b_v2", tmp_path) == (
        "openlm-research/open_llama_3b_v2"
    )


@pytest.mark.parametrize(
    "name", ["/no/such", "./no", "~/no-such", "a/b/c", "a b", "a:b"]
)
def test_a_path_that_does_not_exist_is_no_hub_id(name: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is not a folder on this machine"):
        locate(name, tmp_path)


def test_a_folder_without_a_model_raises_an_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="has no config"):
        locate(str(tmp_path), tmp_path)


def test_a_base_with_an_adapter_beside_it_is_refused(
    tiny_llama: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_llama, tmp_path / "base")
    (folder / "adapter_config.json").write_text("{}")

    with pytest.raises(ModelError, match="holds an adapter"):
        locate(str(folder), tmp_path)


def test_a_hub_base_with_an_adapter_in_it_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = "transformers.utils.find_adapter_config_file"
    monkeypatch.setattr(found, lambda name, revision: f"{name}/adapter_config.json")

    with pytest.raises(ModelError, match="owner/base@a+ holds an adapter"):
        load_config("owner/base@" + "a" * 40)


@pytest.mark.parametrize("pin", ["main", "a" * 39, "A" * 40, "a" * 41, ""])
def test_a_pin_is_a_whole_commit(tmp_path: Path, pin: str) -> None:
    with pytest.raises(ModelError, match="commit of 40 hexadecimal digits"):
        locate(f"owner/base@{pin}", tmp_path)
