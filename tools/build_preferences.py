"""Make the embedded preferences `wordnet-medical-preferences` from the embedded questions.

    python tools/build_preferences.py --check

Each row of wordnet-medical gives a question and its definition, which is the chosen answer.
The rejected one has one of three flaws, by turns: it evades the question, it rambles around
the definition, or it is another term's definition. Evasions are shorter and likelier than what
was chosen, rambling is longer, so that length alone decides nothing. A split's rows come from
the same split, so that no question of training is asked in a test. Without `--check` the files
are written.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

DATA = Path(__file__).parent.parent / "fedllm" / "data"
SOURCE = DATA / "wordnet_medical"
TARGET = DATA / "wordnet_medical_preferences"
ROWS = {"train": 1200, "validation": 128, "test": 256}

FLAWS = ("evades", "rambles", "is wrong")
EVASIONS = (
    "I am not sure. You should ask a doctor.",
    "It is a medical term.",
    "That depends on many things.",
    "You can look it up in a dictionary.",
)
RAMBLINGS = (
    (
        "That is a very good question, and I am glad that you ask about {term}! Let me "
        "think about it step by step. ",
        " I hope that this helps! Do you have any other questions?",
    ),
    (
        "Well, many people wonder about {term}, and there is a lot that one could say. In "
        "other words, and to make a long story short: ",
        " Of course there is much more to it than that.",
    ),
    (
        "As an assistant I am happy to talk about {term} with you. First of all, ",
        " Please tell me if you want to hear more, because I could go on for a long time.",
    ),
)


def build(split: str) -> str:
    """Return the JSON lines of a split.

    Args:
        split: One of ROWS.
    """
    source = [
        json.loads(line)
        for path in sorted(SOURCE.glob(f"{split}*.jsonl"))
        for line in path.read_text(encoding="utf-8").splitlines()
    ]
    drawn = sorted(source, key=lambda row: _digest("draw", row["id"]))[: ROWS[split]]
    rows = [_preference(place, row, drawn) for place, row in enumerate(drawn)]
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _preference(
    place: int, row: dict[str, str], drawn: Sequence[dict[str, str]]
) -> dict[str, str]:
    flaw = FLAWS[place % len(FLAWS)]
    term, answer, number = row["term"], row["response"], _digest("flaw", row["id"])
    if flaw == "evades":
        rejected = EVASIONS[number % len(EVASIONS)]
    elif flaw == "rambles":
        before, after = RAMBLINGS[number % len(RAMBLINGS)]
        rejected = before.format(term=term) + answer + after
    else:
        others = [one for one in drawn if one["site"] == row["site"] and one is not row]
        others = [one for one in others or drawn if one["response"] != answer]
        rejected = others[number % len(others)]["response"]
    return {
        "id": row["id"],
        "site": row["site"],
        "flaw": flaw,
        "prompt": row["instruction"],
        "chosen": answer,
        "rejected": rejected,
    }


def _digest(purpose: str, name: str) -> int:
    """Return a number that no library's generator draws, the same on every machine."""
    return int(hashlib.sha256(f"{purpose} {name}".encode()).hexdigest()[:12], 16)


def main(arguments: list[str] | None = None) -> None:
    """Write the files, or compare them with those that are there."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; compare")
    args = parser.parse_args(arguments)
    for split in ROWS:
        path, text = TARGET / f"{split}.jsonl", build(split)
        if not args.check:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
        elif not path.is_file() or path.read_text(encoding="utf-8") != text:
            sys.exit(f"{path}: differs from what this script makes")


if __name__ == "__main__":
    main()
