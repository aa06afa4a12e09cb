r"""Rebuild the embedded data set `wordnet-medical` from WordNet 3.0, row by row.

The definitions are WordNet's; the wording of the questions, the choice of synsets and
the sites are ours. Get WordNet (Debian package wordnet-base, 1:3.0-37) and compare:

    apt-get download wordnet-base && dpkg-deb -x wordnet-base_*.deb wordnet
    python tools/build_wordnet_medical.py \
        --wordnet wordnet/usr/share/wordnet --check

Without `--check` the shards are written to `--out`.
"""

import argparse
import hashlib
import json
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

EMBEDDED = Path(__file__).parent.parent / "fedllm" / "data" / "wordnet_medical"

# A site is all that lies below its root synsets (offsets in data.noun). Where a synset
# lies below roots of two sites, the first site has it.
SITES = {
    "treatment": [1024392, 657604],  # medical procedure, medical care
    "medical science": [6045562],  # medical science
    "drug": [3247620],  # drug
    "microbe": [1348530, 1328702],  # bacteria, virus
    "mental health": [14373582, 14083790],  # psychological state, mental disorder
    "cancer": [14235200],  # tumor
    "injury": [14285662],  # injury
    "infectious disease": [14127211, 14174549],  # infectious disease, infection
    "symptom": [6798187, 14299637],  # symptom (an indication), symptom (medicine)
    "disease": [14034177],  # physical condition
    "anatomy": [5220461],  # body part
}

# WordNet's body parts and microbes are also those of fowl and of crops.
NOT_MEDICAL = re.compile(
    r"\b(plants?|leaf|leaves|flowers?|moss|algae|botany|birds?|fowls?|fish|fishes"
    r"|insects?|arthropods?|crustaceans?|invertebrates?|reptiles?"
    r"|amphibians?|horses?|sheep|cattle|swine|hog|zoology)\b",
    re.IGNORECASE,
)
FILTERED_SITES = ("anatomy", "microbe")
SHORTEST_DEFINITION = 16  # characters: "an antacid" teaches nothing
MOST_SYNONYMS = 3
ALSO_CALLED = " It is also called "
SHARDS = {"train": 2, "validation": 1, "test": 1}
QUESTIONS = 100
OPTIONS = 4


@dataclass(frozen=True)
class Synset:
    """One line of data.noun."""

    offset: int
    words: list[str]
    hypernyms: list[int]
    gloss: str

    @property
    def definition(self) -> str:
        """The gloss up to its first quoted example."""
        return re.split(r';?\s*"', self.gloss)[0].strip()


def read_synsets(path: Path) -> dict[int, Synset]:
    """Read a WordNet data file (wndb(5WN)): offset to synset."""
    synsets = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith(" "):  # the licence
            continue
        head, gloss = line.split("|", 1)
        fields = head.split()
        num_words = int(fields[3], 16)
        words = [fields[4 + 2 * i].replace("_", " ") for i in range(num_words)]
        pointers = fields[4 + 2 * num_words :]
        hypernyms = [
            int(pointers[2 + 4 * i])
            for i in range(int(pointers[0]))
            if pointers[1 + 4 * i] == "@"
        ]
        offset = int(fields[0])
        synsets[offset] = Synset(offset, words, hypernyms, gloss.strip())
    return synsets


def sites_of(synsets: dict[int, Synset]) -> dict[int, str]:
    """Return the site of each synset that lies below a root of one."""
    hyponyms = defaultdict(list)
    for synset in synsets.values():
        for hypernym in synset.hypernyms:
            hyponyms[hypernym].append(synset.offset)
    sites: dict[int, str] = {}
    for site, roots in SITES.items():
        waiting, seen = [root for root in roots if root in synsets], set[int]()
        while waiting:
            offset = waiting.pop()
            if offset not in seen:
                seen.add(offset)
                sites.setdefault(offset, site)
                waiting += hyponyms[offset]
    return sites


def is_wanted(synset: Synset, site: str) -> bool:
    """Tell whether a synset becomes a row."""
    if len(synset.definition) < SHORTEST_DEFINITION:
        return False
    return site not in FILTERED_SITES or not NOT_MEDICAL.search(synset.definition)


def make_row(synset: Synset, site: str) -> dict[str, str]:
    """Word a synset as a question and its answer."""
    term, synonyms = synset.words[0], synset.words[1 : 1 + MOST_SYNONYMS]
    definition = synset.definition
    response = definition[0].upper() + definition[1:].removesuffix(".") + "."
    if synonyms:
        response += f"{ALSO_CALLED}{', '.join(synonyms)}."
    return {
        "id": f"wn30-n{synset.offset:08d}",
        "site": site,
        "term": term,
        "instruction": f"What is {term}?",
        "response": response,
    }


def split_of(term: str) -> str:
    """Return the split of a term: the same question never lies in two of them."""
    number = _hash(term.lower())
    if number % 10:
        return "train"
    return "test" if number // 10 % 2 else "validation"


def multiple_choice(rows: list[dict[str, str]]) -> list[dict[str, object]]:
    """Ask for the definition of a term among those of other terms of its site.

    Synonyms are left off: they would give the answer away; so are terms with several
    meanings. Which terms are asked, which definitions stand beside the right one and
    where that one stands follow from hashes.
    """
    terms = Counter(row["term"] for row in rows)
    questions: list[dict[str, object]] = []
    for row in sorted(rows, key=lambda row: _hash(row["term"])):
        right = _definition(row)
        others = {_definition(r) for r in rows if r["site"] == row["site"]} - {right}
        if terms[row["term"]] > 1 or len(others) < OPTIONS - 1:
            continue
        if len(questions) == QUESTIONS:
            break
        options = sorted(others, key=lambda text: _hash(row["term"] + text))
        options = options[: OPTIONS - 1]
        place = _hash(row["id"]) % OPTIONS
        options.insert(place, right)
        question = {"id": row["id"], "question": row["instruction"]}
        questions.append(question | {"options": options, "answer": place})
    return questions


def _definition(row: dict[str, str]) -> str:
    return row["response"].split(ALSO_CALLED)[0]


def _hash(text: str) -> int:
    return int(hashlib.sha256(text.encode()).hexdigest(), 16)


def build(wordnet: Path) -> dict[str, str]:
    """Return the text of each file by its name."""
    synsets = read_synsets(wordnet / "data.noun")
    lines = defaultdict(list)
    for offset, site in sorted(sites_of(synsets).items()):
        if is_wanted(synsets[offset], site):
            row = make_row(synsets[offset], site)
            text = json.dumps(row, ensure_ascii=False) + "\n"
            lines[split_of(row["term"])].append(text)
    questions = multiple_choice([json.loads(line) for line in lines["test"]])
    choice = "".join(json.dumps(q, ensure_ascii=False) + "\n" for q in questions)
    return {"choice.jsonl": choice} | {
        name: "".join(shard)
        for split, count in SHARDS.items()
        for name, shard in _cut(split, lines[split], count)
    }


def _cut(split: str, lines: list[str], count: int) -> Iterator[tuple[str, list[str]]]:
    """Cut a split into shards: a file of an app bundle is at most 1 MB."""
    size = -(-len(lines) // count)
    for i in range(count):
        name = f"{split}.jsonl" if count == 1 else f"{split}-{i}.jsonl"
        yield name, lines[i * size : (i + 1) * size]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--wordnet", type=Path, default=Path("/usr/share/wordnet"))
    parser.add_argument("--out", type=Path, default=EMBEDDED)
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    args = parser.parse_args()
    if not (args.wordnet / "data.noun").exists():
        sys.exit(f"{args.wordnet}: no data.noun there; see the head of this script")
    shards = build(args.wordnet)
    differ = []
    for name, text in shards.items():
        path = args.out / name
        if not args.check:
            args.out.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8", newline="")
        elif not path.exists() or path.read_bytes() != text.encode():
            differ.append(name)
        print(f"{name}: {text.count(chr(10))} rows, {len(text.encode())} bytes")
    if differ:
        sys.exit(f"differs from {args.out}: {', '.join(differ)}")


if __name__ == "__main__":
    main()
