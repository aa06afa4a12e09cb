"""Write docs/architectures.md from what small models of each architecture do.

Each is made at random, trained, saved, opened again by PEFT, exported and asked, in 0, 8 and
4 bit, and compared with transformers' own forward (tests/helpers/architecture_checks.py).
Takes some minutes of one core.

    python tools/write_architectures.py
    python tools/write_architectures.py --check
"""

import argparse
import os
import sys
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.helpers.architectures import Architecture

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
PAGE = ROOT / "docs" / "architectures.md"

HEAD = """# Architectures

<!-- Written by tools/write_architectures.py: edit that. -->

`model.name` takes any causal language model that transformers knows without code of its own. The
table says of which it was tried: for each a small random model was trained, saved, opened by plain
PEFT, exported and asked, in 0, 8 and 4 bit, and compared with transformers' own forward pass with
labels (`tools/write_architectures.py`; `pytest tests/models/test_architectures.py -m "slow or not
slow"`).

"""

TAIL = """
- **auto adapts**: what `adapter.target-modules="auto"` means, by PEFT's own table or by the names of
  such layers elsewhere (fused queries, keys and values; GPT-2's `Conv1D`, which is a linear layer the
  other way round). Layers of a vision or audio tower are never adapted.
- **loss**: *in parts* runs the output layer on the answer's tokens alone. *The model's* is
  transformers' own forward, for heads that cap or scale their scores (Gemma 2, Cohere, Granite).
- **attention**: *ours* has gradients in float32, which a CPU computes faster.
- **packed**: rows without padding, their common beginning computed once.
- **a pass**: examples of one pass at record level. *One* is slower, and as private: only layouts that
  keep examples apart to the last bit share a pass.
- **ok**: the loss equals the model's to 1e-5, and gradients of a trainer's step, gradients of each
  example against a loop, logits of the adapter that PEFT opened and of the unquantised export to 1e-4,
  all relative and in float32, so that only the order of sums differs. In 8 and 4 bit the export is
  quantised anew: it opens and answers.

Not in the list does not mean that it fails. At a model's first use one forward pass of transformers'
own on a few public tokens is compared with ours. What differs is left to the library, and one line
of the log says so; a model on which transformers' own forward fails raises an error before the first
step.

Not adapted are:

- experts, whose weights are one tensor for all (Mixtral, Qwen3-MoE, DeepSeek, GPT-OSS). There PEFT
  takes `gate_proj`, `up_proj` and `down_proj` for the experts', so layers of that name, of a shared
  expert too, raise an error if they are named, and `all-linear` leaves them out;
- of a state space layer (Mamba, Falcon-H1) all but `in_proj`: the model reads the other weights
  itself. For the same reason those stay in 16 bit, as `kv_b_proj` of DeepSeek does in 8 bit.

At record level a base with dropout of its own (OPT, GPT-2 as published) raises an error that names it.
`train.max-length` may not be above the model's positions, and a row with a token for which the model
has no embedding raises an error before the first step.
"""

COLUMNS = [
    *("architecture", "model type", "`auto` adapts", "loss", "attention", "packed"),
    *("a pass", "0 bit", "8 bit", "4 bit"),
]


def page() -> str:
    """Return the whole page."""
    from tests.helpers.architectures import ARCHITECTURES

    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    with tempfile.TemporaryDirectory() as home:
        os.environ["FEDLLM_HOME"] = home
        for number, architecture in enumerate(ARCHITECTURES):
            cells = _cells(architecture, Path(home) / str(number))
            lines.append("| " + " | ".join(cells) + " |")
    return HEAD + "\n".join(lines) + "\n" + TAIL


def _cells(architecture: "Architecture", folder: Path) -> list[str]:
    """Return an architecture's row."""
    from tests.helpers.architecture_checks import Trial, facts, faults, save_model

    save_model(architecture, folder / "model")
    cells = [architecture.name, f"`{architecture.model_type}`"]
    for bits in (0, 8, 4):
        trial = Trial.load(folder / "model", bits, folder)
        if bits == 0:
            cells += facts(trial)
        cells.append("; ".join(faults(trial)) or "ok")
    return cells


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    is_check = parser.parse_args().check
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # Small models warn of what their size alone makes odd.
    warnings.simplefilter("ignore")
    text = page()
    if not is_check:
        PAGE.write_text(text, encoding="utf-8")
    elif not PAGE.exists() or PAGE.read_text("utf-8") != text:
        sys.exit(f"{PAGE} differs from what the models do: run this without --check")


if __name__ == "__main__":
    main()
