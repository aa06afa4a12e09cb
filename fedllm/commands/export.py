"""Merge an adapter into its unquantised base, as a model that needs no PEFT.

    fedllm export --peft-path RUN/peft_final --out my-model

A personal adapter is not private: it is merged only with --allow-personal. Nothing leaves
this machine unless --push-to-hub names a repository.
"""

import argparse
import os
import shutil
import sys
from pathlib import Path

from fedllm.commands.options import (
    add_fetch_base,
    add_json,
    add_out,
    main_of,
    new_parser,
    write_json,
)
from fedllm.config import fedllm_home
from fedllm.errors import AdapterError, ModelError


def run(args: argparse.Namespace) -> int:
    """Write the merged model and print its folder."""
    # A user cannot act on what transformers logs while it loads.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from fedllm.adapters.files import read_base_name
    from fedllm.models.location import require_at_hand

    out = Path(args.out).expanduser()
    adapter = Path(args.peft_path).expanduser()
    _require_leave(adapter, args.allow_personal)
    if not args.fetch_base:
        require_at_hand(read_base_name(adapter), str(adapter))
    export(adapter, out, args.quantize)
    if args.push_to_hub:
        _push(out, args.push_to_hub)
    if args.json:
        write_json({"model": str(out.absolute()), "pushed_to": args.push_to_hub})
    else:
        sys.stdout.write(f"{args.out}\n")
    return 0


def _require_leave(adapter: Path, is_allowed: bool) -> None:
    """Check that a personal adapter is not merged, and perhaps handed on, by mistake.

    Raises:
        AdapterError: It is one, and the flag is not there.
    """
    from fedllm.adapters.files import read_origin

    if not is_allowed and adapter.is_dir() and read_origin(adapter).get("personal"):
        raise AdapterError(
            f"{adapter}: is a personal adapter, trained on a node's own rows without noise, "
            "and may hold what they say: --allow-personal exports it all the same"
        )


def export(adapter: Path, out: Path, bits: int = 0) -> None:
    """Write the merged model in float32 or quantised, its tokenizer and its card.

    Args:
        adapter: Folder of an adapter, ours or plain PEFT's.
        out: A folder that does not exist yet.
        bits: 4 or 8 to quantise the merged model by bitsandbytes, else 0.

    Raises:
        AdapterError: The adapter is missing or damaged, its tokenizer does not fit the base,
            or `out` exists.
        ModelError: The base cannot be loaded, or not quantised on this machine.
        FedllmError: A file of the adapter's run is damaged.
    """
    from fedllm.adapters.files import (
        load_adapter,
        load_adapter_tokenizer,
        read_base_name,
    )
    from fedllm.models.loading import load_base, load_quantised

    if out.exists():
        raise AdapterError(f"--out: {out} exists already: name a new folder")
    base_name = read_base_name(adapter)
    tokenizer = load_adapter_tokenizer(adapter, base_name)
    card = _card(adapter.resolve())
    # In bfloat16 small updates would be lost in rounding, and so would digits of a base
    # that is saved in float16 or float32.
    base = load_base(base_name, 0, fedllm_home(), in_float32=True)
    merged = load_adapter(base, adapter).merge_and_unload()
    # Renamed at the end, so that a folder of this name is always complete.
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    merged.save_pretrained(str(partial))
    if bits:
        quantised = load_quantised(str(partial), bits)
        shutil.rmtree(partial)
        quantised.save_pretrained(str(partial))
    tokenizer.save_pretrained(str(partial))
    if card is not None:
        (partial / "README.md").write_text(card)
    partial.rename(out)


def _card(adapter: Path) -> str | None:
    """Return the merged model's card; None for an adapter that no run of ours made."""
    from fedllm.adapters.files import read_origin
    from fedllm.reporting.card import card
    from fedllm.runs.directory import CONFIG_FILE
    from fedllm.runs.record import read_run

    run, own = adapter.parent, adapter / "README.md"
    if read_origin(adapter).get("personal") and own.is_file():
        # Its warning stays with it.
        return own.read_text("utf-8")
    return card(read_run(run), merged=True) if (run / CONFIG_FILE).is_file() else None


def _push(folder: Path, name: str) -> None:
    """Upload a folder to a new private repository of the Hugging Face hub.

    Raises:
        ModelError: The hub rejects it, or has a repository of that name already.
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


def parser() -> argparse.ArgumentParser:
    """Return the command's parser."""
    parser = new_parser("export", __doc__)
    parser.add_argument(
        "--peft-path", required=True, metavar="DIR", help="adapter folder"
    )
    add_out(parser, "a new folder", required=True)
    parser.add_argument(
        "--quantize",
        type=int,
        choices=(4, 8),
        default=0,
        help="bits, by bitsandbytes; default: float32",
    )
    parser.add_argument(
        "--allow-personal",
        action="store_true",
        help="also merge a personal adapter, which is not private",
    )
    parser.add_argument(
        "--push-to-hub",
        metavar="OWNER/NAME",
        help="also upload it, to a new private repository",
    )
    add_fetch_base(parser)
    add_json(parser)
    return parser


main = main_of(parser, run)

if __name__ == "__main__":
    main()
