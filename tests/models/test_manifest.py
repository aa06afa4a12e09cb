"""The hashes of a model's files."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest

from fedllm.errors import ModelError
from fedllm.models import manifest
from fedllm.models.manifest import file_hashes, folder_digest, forget


@pytest.fixture
def home(tmp_path):
    return tmp_path / "home"


@pytest.fixture
def cached(home, tiny_chat_llama):
    """A model in the cache that other owners' nodes share."""
    return Path(shutil.copytree(tiny_chat_llama, home / "models" / "base"))


def change(path: Path) -> None:
    """Change one byte, and leave size and modification time as they were."""
    status = path.stat()
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


FILES = [
    "model.safetensors",
    "config.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "chat_template.jinja",
]


@pytest.mark.parametrize("name", FILES)
def test_one_changed_byte_of_a_cached_model_is_an_error(home, cached, name):
    file_hashes(cached, home)
    change(cached / name)

    with pytest.raises(ModelError, match=rf"{name}: has changed since it was made"):
        file_hashes(cached, home)


@pytest.mark.parametrize("name", ["adapter_config.json", "merges.txt"])
def test_a_file_that_is_added_to_a_cached_model_is_an_error(home, cached, name):
    file_hashes(cached, home)
    (cached / name).write_text("{}")

    with pytest.raises(ModelError, match=rf"{name}: has changed .*expected None"):
        file_hashes(cached, home)


def test_a_model_that_was_made_anew_is_hashed_anew(home, cached):
    before = file_hashes(cached, home)
    change(cached / "model.safetensors")
    forget(cached, home)

    assert file_hashes(cached, home) != before


def test_a_user_s_own_folder_may_change_and_has_another_digest_then(home, own_llama):
    before = folder_digest(own_llama, home)
    change(own_llama / "model.safetensors")

    after = folder_digest(own_llama, home)
    assert before.split()[1] != after.split()[1]
    assert before.split()[2:] == after.split()[2:]


def test_a_file_that_did_not_change_is_read_once(home, cached, monkeypatch):
    before = file_hashes(cached, home)

    def read(*_):
        raise AssertionError("read again")

    monkeypatch.setattr(manifest.hashlib, "file_digest", read)
    assert file_hashes(cached, home) == before


def test_the_digest_is_the_model_s_and_not_its_place_or_writer_s(
    home, own_llama, tmp_path
):
    other = Path(shutil.copytree(own_llama, tmp_path / "other"))
    config = json.loads((other / "config.json").read_text())
    config |= {"transformers_version": "9.9", "_name_or_path": "x"}
    (other / "config.json").write_text(json.dumps(config))
    assert folder_digest(other, home) == folder_digest(own_llama, tmp_path / "home2")

    config["rope_theta"] = 7.0
    (other / "config.json").write_text(json.dumps(config))
    (other / "chat_template.jinja").write_text("{{ 1 }}")
    ours, theirs = (folder_digest(f, home).split() for f in (own_llama, other))
    assert [a == b for a, b in zip(ours, theirs, strict=True)] == [
        *(True, True),
        *(True, False),
        *(True, False),
    ]


def test_a_home_that_cannot_be_written_costs_the_memory_and_not_the_run(
    own_llama, tmp_path, caplog
):
    (tmp_path / "file").write_text("")
    hashes = file_hashes(own_llama, tmp_path / "file")

    weights = (own_llama / "model.safetensors").read_bytes()
    assert hashes["model.safetensors"] == hashlib.sha256(weights).hexdigest()
    assert "are not kept" in caplog.text


def test_a_damaged_manifest_is_one_line(home, cached):
    file_hashes(cached, home)
    (path,) = (home / "manifests").glob("*.json")
    path.write_text("[")

    with pytest.raises(ModelError, match="is damaged: remove it"):
        file_hashes(cached, home)
