"""Merge an adapter into its unquantised base, as a model that needs no PEFT.

python -m fedllm.commands.export --peft-path RUN/peft_final --out my-model
"""

import argparse
import os
import shutil
import sys
from pathlib import Path

from fedllm.config import fedllm_home
from fedllm.errors import AdapterError, FedllmError

_CARD = "README.md"


def main(arguments: list[str] | None = None) -> None:
    """Run the command; an error is one line and exit status 1."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peft-path", required=True, metavar="DIR")
    parser.add_argument("--out", required=True, metavar="DIR", help="a new folder")
    args = parser.parse_args(arguments)
    # What transformers says while loading is not for this screen.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        export(Path(args.peft_path).expanduser(), Path(args.out).expanduser())
    except FedllmError as error:
        sys.exit(f"{type(error).__name__}: {error}")
    sys.stdout.write(f"{args.out}\n")


def export(adapter: Path, out: Path) -> None:
    """Write the merged model, its tokenizer and the run's card.

    Args:
        adapter: Folder of an adapter, ours or plain PEFT's.
        out: A folder that does not exist yet.

    Raises:
        AdapterError: The adapter is missing or damaged, or `out` exists.
    """
    from fedllm.adapter_files import load_adapter, read_base_name
    from fedllm.models import load_base, load_tokenizer

    if out.exists():
        raise AdapterError(f"--out: {out} exists already: name a new folder")
    base_name = read_base_name(adapter)
    # In bfloat16 small updates would be lost in rounding.
    base = load_base(base_name, 0, fedllm_home()).float()
    merged = load_adapter(base, adapter).merge_and_unload()
    # A folder that is there is a whole one.
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    merged.save_pretrained(str(partial))
    load_tokenizer(base_name).save_pretrained(str(partial))
    for folder in (adapter, adapter.resolve().parent):
        if (folder / _CARD).is_file():
            shutil.copy(folder / _CARD, partial / _CARD)
            break
    partial.rename(out)


if __name__ == "__main__":
    main()
