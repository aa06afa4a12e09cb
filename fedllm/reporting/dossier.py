"""The dossier of a run: what it claims and who decides, for those who must sign.

The order is that of NIST SP 800-226. Then the tests that the EDPB names in opinion 28/2024, the
controls of SATRE 3.3.07, and a paragraph for a data protection impact assessment. It states
facts, each with the file and key that it comes from; it claims neither that a model is anonymous
nor that anything is lawful.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedllm.privacy.wording import plain
from fedllm.reporting.edpb import edpb_section
from fedllm.reporting.facts import NOT_KNOWN, Line, Section, fact, of_file
from fedllm.runs.record import RunRecord

_CONFIG, _PRIVACY = "config.json", "privacy.json"
_OWN = "fedllm (docs/privacy.md)"


def dossier_sections(run: RunRecord) -> list[Section]:
    """Return the sections of a finished run's dossier, in order."""
    return [
        _claim(run),
        _unit(run),
        _relation(run),
        _trust(run),
        _correctness(run),
        _data(run),
        _side_channels(run),
        edpb_section(run),
        _egress(run),
        _assessment(run),
    ]


def _claim(run: RunRecord) -> Section:
    privacy = run.privacy
    is_private = privacy.get("unit") != "none"
    epsilon = (
        plain(privacy.get("epsilon")) if is_private else "none: nothing is bounded"
    )
    lines = [
        fact("Statement", privacy.get("statement"), f"{_PRIVACY}: statement"),
        fact("Epsilon", epsilon, f"{_PRIVACY}: epsilon"),
        of_file("Delta", privacy, _PRIVACY, "delta", "{:g}"),
        of_file("Releases", privacy, _PRIVACY, "num_rounds"),
        fact(
            "Epsilon against who sees the adapters alone",
            _plain(privacy, "epsilon_adapters"),
            f"{_PRIVACY}: epsilon_adapters",
        ),
        of_file("Strength, in words", privacy, _PRIVACY, "strength"),
        fact("Released", _recommended(run), "result.json: recommended"),
        Line(
            "Earlier and later runs over the same people",
            "not in this epsilon: each node's own ledger counts what it was promised",
            _OWN,
        ),
    ]
    return Section("1. The claim", lines)


def _plain(privacy: Mapping[str, Any], key: str) -> str | None:
    """Return an epsilon in words; a null is of another unit or kind of run."""
    if key not in privacy:
        return None
    return plain(privacy[key]) if privacy[key] is not None else "does not apply"


def _recommended(run: RunRecord) -> str | None:
    """Return the name of the recommended adapter, without the machine's own path."""
    name = (run.result or {}).get("recommended")
    return None if name is None else Path(str(name)).name


def _unit(run: RunRecord) -> Section:
    unit = run.privacy.get("unit")
    meaning = {
        "client": "all data of one client; of a client with several nodes, one node's",
        "record": "one example of one client",
        "none": "nothing is protected: no noise was added",
    }.get(str(unit))
    if run.privacy.get("person_column"):
        column = run.privacy["person_column"]
        meaning = f"all rows of one person in one client, by the column {column!r}"
    return Section(
        "2. Unit of privacy",
        [
            of_file("Unit", run.privacy, _PRIVACY, "unit"),
            fact("It stands for", meaning, f"{_PRIVACY}: unit, person_column"),
            of_file("Clients", run.privacy, _PRIVACY, "population_size"),
            Line("Whether one person has rows at several clients", NOT_KNOWN),
        ],
    )


def _relation(run: RunRecord) -> Section:
    privacy = run.privacy
    return Section(
        "3. Neighbouring relation",
        [
            of_file("Relation", privacy, _PRIVACY, "neighbouring_relation"),
            fact(
                "Epsilon, replace-one",
                _plain(privacy, "epsilon_replace_one"),
                f"{_PRIVACY}: epsilon_replace_one",
            ),
            fact(
                "Epsilon of a person with rows at two clients",
                _plain(privacy, "epsilon_two_clients"),
                f"{_PRIVACY}: epsilon_two_clients",
            ),
            of_file("Sampling", privacy, _PRIVACY, "sampling"),
            of_file(
                "Sampling probability",
                privacy,
                _PRIVACY,
                "sampling_probability",
                "{:.4g}",
            ),
        ],
    )


def _trust(run: RunRecord) -> Section:
    privacy = run.privacy
    if privacy.get("unit") == "none":
        noise = "nobody: no noise was added"
    elif privacy.get("trustees"):
        noise = (
            f"{privacy['trustees']} trustees, of whom {privacy.get('colluding')} may tell "
            "the server theirs"
        )
    elif privacy.get("unit") == "record" and privacy.get("noise") != "joint":
        noise = "each client; epsilon is what the clients report"
    else:
        noise = "the server, which sees what each client sends before the noise"
    return Section(
        "4. Trust model",
        [
            fact("Who adds the noise", noise, f"{_PRIVACY}: unit, noise, trustees"),
            Line("Which code ran at the nodes", NOT_KNOWN),
            Line(
                "Whether each node's owner approved the run",
                "not known here: each node's own page has it (fedllm node dossier)",
                "",
            ),
            Line("Whether the network was encrypted", NOT_KNOWN),
        ],
        "What a node's owner chose is in that node's own page.",
    )


def _correctness(run: RunRecord) -> Section:
    privacy, versions = run.privacy, run.config.get("versions") or {}
    audit = run.audit or {}
    verdict = None
    if audit:
        verdict = "passed" if audit.get("passed") is True else "FAILED"
    chain = privacy.get("chain")
    links = None
    if chain is not None:
        links = f"{len(chain)} rounds, each with the hash of the one before"
    elif privacy.get("unit") != "none":
        links = (
            "none: an older version of fedllm began this ledger, so an edit that contradicts "
            "nothing does not show"
        )
    return Section(
        "5. Correctness of the implementation",
        [
            of_file("Accountant", privacy, _PRIVACY, "accountant"),
            of_file(
                "Noise multiplier", privacy, _PRIVACY, "noise_multiplier", "{:.4g}"
            ),
            of_file("Clipping norm", privacy, _PRIVACY, "clipping_norm"),
            fact("Chain of rounds in the ledger", links, f"{_PRIVACY}: chain"),
            fact("Audit of this run's settings", verdict, "audit.json: passed"),
            fact("What an audit can show", audit.get("meaning"), "audit.json: meaning"),
            *(
                fact(f"Version of {name}", version, f"{_CONFIG}: versions.{name}")
                for name, version in versions.items()
            ),
            Line(
                "Whether the program was reviewed by a person outside of it", NOT_KNOWN
            ),
        ],
    )


def _data(run: RunRecord) -> Section:
    settings = run.settings
    where = f"{_CONFIG}: run_config."
    return Section(
        "6. Data",
        [
            *(
                fact(name, _setting(settings, key), f"{where}{key}")
                for name, key in (
                    ("Data set", "data.name"),
                    (
                        "Rows declared public, which chose a round",
                        "data.public-validation",
                    ),
                    ("Rows declared public, which reported", "data.public-test"),
                    ("Rows declared public, which trained", "data.public-train"),
                    ("Base model", "model.name"),
                )
            ),
            of_file("Digest of the base model", run.config, _CONFIG, "base_digest"),
            Line("How the data was collected, and under which legal basis", NOT_KNOWN),
            Line("Whether the base model saw the same data before", NOT_KNOWN),
            Line("How many people the rows are of", NOT_KNOWN),
        ],
        "The program sees rows, and neither where they come from nor why they may be used.",
    )


def _setting(settings: Mapping[str, Any], key: str) -> str | None:
    value = settings.get(key)
    return "none set" if value == "" else value


def _side_channels(run: RunRecord) -> Section:
    items = run.privacy.get("not_covered") or []
    lines = [
        fact(f"Not covered, {number}", text, f"{_PRIVACY}: not_covered")
        for number, text in enumerate(items, 1)
    ]
    return Section(
        "7. Side channels, and what else the claim leaves out",
        lines or [Line("Not covered", NOT_KNOWN)],
    )


def _egress(run: RunRecord) -> Section:
    settings = run.settings
    where = f"{_CONFIG}: run_config."
    noise = run.privacy.get("unit") != "none"
    return Section(
        "Egress controls (SATRE 3.3.07)",
        [
            fact(
                "Noise before release (owner: the server's operator; under record level "
                "each node's)",
                "on" if noise else "off",
                f"{_PRIVACY}: unit",
            ),
            fact(
                "Stop at a largest epsilon of this run (owner: who starts the run)",
                settings.get("privacy.max-epsilon") or "none set",
                f"{where}privacy.max-epsilon",
            ),
            Line(
                "Largest epsilon over all runs (owner: each node's owner, node config "
                "max-epsilon)",
                "not known here: each node's own page has it",
            ),
            Line(
                "Approval of each run before data is touched (owner: each node's owner)",
                "not known here: each node's own page has it",
            ),
            fact(
                "Test of memorised text before release (owner: the server's operator)",
                "done" if run.memorised is not None else None,
                "memorised.json",
            ),
            fact(
                "Audit before release (owner: the server's operator)",
                "done" if run.audit is not None else None,
                "audit.json",
            ),
            Line(
                "Decision that the adapter may leave (owner: the body that the environment's "
                "policy names)",
                NOT_KNOWN,
            ),
        ],
        "SATRE asks whether model artefacts may be exported, and which technical controls are "
        "required before. Which controls suffice is the environment's own policy.",
    )


def _assessment(run: RunRecord) -> Section:
    privacy, settings = run.privacy, run.settings
    clients = privacy.get("population_size")
    epsilon = (
        "without differential privacy"
        if privacy.get("unit") == "none"
        else f"with differential privacy (unit: {privacy.get('unit')}, epsilon "
        f"{plain(privacy.get('epsilon'))}, delta {privacy.get('delta'):g}, relation: "
        f"{privacy.get('neighbouring_relation')})"
    )
    text = (
        f"An adapter of the language model {settings.get('model.name')} was trained on rows "
        f"that stayed at {clients} clients, in {run.rounds_done} rounds, {epsilon}. What left "
        "a client was an update of the adapter's values, and what was released are adapters. "
        "The bound is on what a release adds to what an attacker can conclude about the unit; "
        "it is no statement that a person cannot be found in the model. Remaining risks are "
        "those of section 7 and of the tests that were not done. Whether the processing is "
        "necessary and proportionate, whether the model is anonymous, and whether it may be "
        "used, the controller decides."
    )
    source = f"{_PRIVACY}, {_CONFIG}, metrics.jsonl"
    return Section(
        "A paragraph for a data protection impact assessment",
        [fact("Description", text, source)],
    )
