"""Merge an adapter into its unquantised base, as a model that needs no PEFT.

python -m fedllm.commands.export --peft-path RUN/peft_final --out my-model

Nothing leaves this machine unless --push-to-hub names where to.
"""

import argparse
import os
import shutil
import sys
from pathlib import Path

from fedllm.config import fedllm_home
from fedllm.errors import AdapterError, FedllmError, ModelError


def main(arguments: list[str] | None = None) -> None:
    """Run the command; an error is one line and exit status 1."""
    args = _parser().parse_args(arguments)
    # What transformers says while loading is not for this screen.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        out = Path(args.out).expanduser()
        export(Path(args.peft_path).expanduser(), out, args.quantize)
        if args.push_to_hub:
            _push(out, args.push_to_hub)
    except FedllmError as error:
        sys.exit(f"{type(error).__name__}: {error}")
    sys.stdout.write(f"{args.out}\n")


def export(adapter: Path, out: Path, bits: int = 0) -> None:
    """Write the merged model in float32 or quantised, its tokenizer and its card.

    Args:
        adapter: Folder of an adapter, ours or plain PEFT's.
        out: A folder that does not exist yet.
        bits: 4 or 8 to quantise the merged model by bitsandbytes, else 0.

    Raises:
        AdapterError: The adapter is missing or damaged, or `out` exists.
        ModelError: The base cannot be loaded, or not quantised on this machine.
        FedllmError: A file of the adapter's run is damaged.
    """
    from fedllm.adapters.files import load_adapter, read_base_name
    from fedllm.models.loading import load_base, load_quantised, load_tokenizer

    if out.exists():
        raise AdapterError(f"--out: {out} exists already: name a new folder")
    base_name = read_base_name(adapter)
    card = _card(adapter.resolve().parent)
    # In bfloat16 small updates would be lost in rounding.
    base = load_base(base_name, 0, fedllm_home()).float()
    merged = load_adapter(base, adapter).merge_and_unload()
    # A folder that is there is a whole one.
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    merged.save_pretrained(str(partial))
    if bits:
        quantised = load_quantised(str(partial), bits)
        shutil.rmtree(partial)
        quantised.save_pretrained(str(partial))
    load_tokenizer(base_name).save_pretrained(str(partial))
    if card is not None:
        (partial / "README.md").write_text(card)
    partial.rename(out)


def _card(run: Path) -> str | None:
    """Return the merged model's card; None for an adapter that no run of ours made."""
    from fedllm.reporting.card import card
    from fedllm.runs.directory import CONFIG_FILE
    from fedllm.runs.record import read_run

    return card(read_run(run), merged=True) if (run / CONFIG_FILE).is_file() else None


def _push(folder: Path, name: str) -> None:
    """Upload a folder to a new private repository of the Hugging Face hub.

    Raises:
        ModelError: The hub refuses, or has a repository of that name.
    """
    from huggingface_hub import HfApi

    hub = HfApi()
    try:
        hub.create_repo(name, private=True, exist_ok=False)
        hub.upload_folder(repo_id=name, folder_path=str(folder))
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[:1]
        raise ModelError(
            f"--push-to-hub: {name}: {''.join(first)}; the model is in {folder}"
        ) from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peft-path", required=True, metavar="DIR")
    parser.add_argument("--out", required=True, metavar="DIR", help="a new folder")
    parser.add_argument(
        "--quantize",
        type=int,
        choices=(4, 8),
        default=0,
        help="bits, by bitsandbytes; default: float32",
    )
    parser.add_argument(
        "--push-to-hub",
        metavar="OWNER/NAME",
        help="also upload it, to a new private repository",
    )
    return parser


if __name__ == "__main__":
    main()
