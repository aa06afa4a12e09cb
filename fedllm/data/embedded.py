"""Data sets that come with the package, each a folder of shards and a record here."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class EmbeddedData:
    """A data set that comes with the package.

    Attributes:
        name: What `data.name` takes.
        folder: Holds train*.jsonl, validation*.jsonl and test*.jsonl.
        licence: The licence in a sentence.
        language: Its language, as the Hugging Face hub tags it.
        tags: What else a model trained on it is tagged with there.
        caution: A warning beside the answers of a model trained on it.
    """

    name: str
    folder: Path
    licence: str
    language: str
    tags: tuple[str, ...]
    caution: str


OWN = "own"
"""What `data.name` takes if each client names rows of its own: there are no others, and no
rows that come with the package judge the run."""

BUILT_IN_DATA = EmbeddedData(
    name="wordnet-medical",
    folder=Path(__file__).parent / "wordnet_medical",
    licence=(
        "of WordNet 3.0, whose definitions it holds (permissive; the text lies beside "
        "the data)"
    ),
    language="en",
    tags=("medical",),
    caution="This is a language model's text, not medical advice.",
)

PREFERENCES = EmbeddedData(
    name="wordnet-medical-preferences",
    folder=Path(__file__).parent / "wordnet_medical_preferences",
    licence=BUILT_IN_DATA.licence,
    language="en",
    tags=("medical", "preference"),
    caution=BUILT_IN_DATA.caution,
)

EMBEDDED: Mapping[str, EmbeddedData] = {
    data.name: data for data in (BUILT_IN_DATA, PREFERENCES)
}
