"""Rows, and files of rows."""

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
EMBEDDED = ROOT / "fedllm" / "data" / "wordnet_medical"

ROWS = [
    {"instruction": "What is asthma?", "response": "A disorder of the lungs.", "n": 1},
    {"instruction": "Define anæmia.", "response": "Too few red\nblood cells.", "n": 2},
    {"instruction": "What is a tic?", "response": 'A "sudden" twitch, or two.', "n": 3},
]


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_json(path: Path, rows: list[Any]) -> Path:
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def load_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


# Conversations


def turn(role: str, content: str | None) -> dict[str, Any]:
    return {"role": role, "content": content}


MARKER = "zyzzyva"


def write_rows(path: Path, count: int, start: int = 0) -> str:
    rows = [
        {
            "instruction": f"What is the term number {i}?",
            "response": f"It is {MARKER} number {i}, a disorder of the lungs.",
        }
        for i in range(start, start + count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)
