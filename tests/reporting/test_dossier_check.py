"""A dossier that was edited, or is of an edited ledger, does not pass."""

import json
import shutil

import pytest

from fedllm.errors import FedllmError
from fedllm.privacy.chain import Chain
from fedllm.privacy.ledger import Ledger
from fedllm.reporting.dossier_check import node_ends, verify_dossier
from fedllm.reporting.dossier_file import write_dossier
from fedllm.signatures import server_key
from tests.helpers.dossiers import chain_of, finished, node_file


@pytest.fixture
def key(tmp_path):
    return server_key(tmp_path / "home")


@pytest.fixture
def folder(tmp_path, key):
    made = finished(tmp_path / "run")
    write_dossier(made, key)
    return made


def said(folder, key=None, nodes=()) -> dict[bool | None, list[str]]:
    """The lines of a check, by how they ended."""
    trusted = None if key is None else key.public_key()
    lines: dict[bool | None, list[str]] = {True: [], False: [], None: []}
    for finding in verify_dossier(folder, nodes, trusted):
        assert "\n" not in finding.text
        lines[finding.passed].append(finding.text)
    return lines


def test_a_whole_dossier_passes_and_without_nodes_its_end_stays_open(folder, key):
    lines = said(folder, key)

    assert lines[False] == []
    assert [line for line in lines[None] if "is not excluded" in line] == lines[None]
    assert len(lines[None]) == 1 and "--head" in lines[None][0]
    assert "ledger: a chain of 3 rounds, whole" in lines[True]


def test_a_node_that_was_asked_for_the_last_round_closes_the_end(folder, key, tmp_path):
    node = node_file(tmp_path / "n.json", chain_of(folder), 2, 3, key)
    lines = said(folder, key, [node])

    assert lines[False] == lines[None] == []
    assert "end: nodes vouch for all 3 rounds" in lines[True]


def test_a_node_of_earlier_rounds_leaves_the_end_open(folder, key, tmp_path):
    node = node_file(tmp_path / "n.json", chain_of(folder), 1, 2, key)

    (line,) = said(folder, key, [node])[None]
    assert "vouch for 2 of 3 rounds" in line and "is not excluded" in line


def test_a_ledger_that_was_made_anew_and_shorter_is_found_by_a_nodes_end(
    folder, key, tmp_path
):
    chain = chain_of(folder)
    ends = [
        node_file(tmp_path / "holds.json", chain, 3, 3, key),
        node_file(tmp_path / "asked.json", chain, 2, 3, key),
    ]
    shutil.rmtree(folder)
    finished(folder, rounds=2)
    write_dossier(folder, key)

    found = said(folder, key, ends)[False]
    assert len(found) == 2
    assert "holds an end of 3 rounds that this ledger does not have" in found[0]
    assert "asked for round 3, which the ledger of a finished run lacks" in found[1]


def test_a_chain_of_the_same_length_with_another_round_is_found(folder, key, tmp_path):
    settings = Ledger.load(folder / "privacy.json").settings
    true = Chain("", settings)
    for server_round in (1, 3):
        true.append(server_round)
    node = node_file(tmp_path / "n.json", true, 2, 3, key)

    (found,) = said(folder, key, [node])[False]
    assert "holds an end of 2 rounds that this ledger does not have" in found


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("dossier.html", "page: dossier.html was changed"),
        ("metrics.jsonl", "source: metrics.jsonl was changed"),
        ("privacy.json", "source: privacy.json was changed"),
    ],
)
def test_a_file_that_was_changed_afterwards_shows(folder, key, name, line):
    with (folder / name).open("a") as file:
        file.write(" ")

    (found,) = said(folder, key)[False]
    assert found.startswith(line)


def edit(folder, change):
    path = folder / "dossier.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_a_line_that_was_edited_breaks_the_signature(folder, key):
    def change(content):
        content["signed"]["sections"][0]["lines"][1]["value"] = "0.1"

    edit(folder, change)
    assert said(folder, key)[False][0].startswith("signature: not of the key")


@pytest.mark.parametrize("name", ["../home/signing/server", "a\0b", "..", ""])
def test_a_dossier_from_elsewhere_reads_no_file_outside_its_folder(folder, name):
    edit(folder, lambda content: content["signed"].update(files={name: "0" * 64}))

    lines = said(folder)
    assert [x for x in lines[None] if "is not here" in x and x.startswith("source")]
    assert not any(line.startswith("source") for line in lines[True] + lines[False])


def test_a_round_that_was_deleted_from_the_signed_ledger_breaks_its_chain(folder, key):
    def change(content):
        ledger = content["signed"]["ledger"]
        del ledger["chain"][1], ledger["releases"][1]
        ledger["num_rounds"] = 2

    edit(folder, change)
    assert any("the ledger was edited" in line for line in said(folder, key)[False])


def test_a_dossier_of_another_key_is_not_the_servers(folder, key, tmp_path):
    write_dossier(folder, server_key(tmp_path / "thief"))

    (found,) = said(folder, key)[False]
    assert found.startswith("key: is not SHA256:")
    assert any(line.startswith("key: whose it is") for line in said(folder)[None])


def test_an_end_of_another_key_or_an_edited_one_does_not_pass(folder, key, tmp_path):
    chain = chain_of(folder)
    other = node_file(tmp_path / "o.json", chain, 2, 3, server_key(tmp_path / "thief"))
    edited = node_file(tmp_path / "e.json", chain, 2, 3, key)
    content = json.loads(edited.read_text())
    content["ends"][0]["head"] = str(chain.head_at(3))
    edited.write_text(json.dumps(content))

    found = said(folder, key, [other, edited])[False]
    assert "signed by another key" in found[0] and "not signed as it stands" in found[1]


def test_a_ledger_without_a_chain_is_said_to_have_none(tmp_path, key):
    folder = finished(tmp_path / "old")
    path = folder / "privacy.json"
    content = json.loads(path.read_text())
    del content["chain"]
    path.write_text(json.dumps(content))
    write_dossier(folder, key)
    lines = said(folder, key)

    assert lines[False] == []
    assert any("older version" in line for line in lines[None])
    assert "an older version of fedllm" in (folder / "dossier.html").read_text()


def test_a_node_that_knows_nothing_of_the_run_and_a_wrong_file_are_named(
    folder, key, tmp_path
):
    foreign = finished(tmp_path / "foreign", rounds=1)
    content = json.loads((foreign / "privacy.json").read_text())
    node = node_file(tmp_path / "n.json", chain_of(folder), 2, 3, key)
    ends = json.loads(node.read_text())
    ends["ends"][0]["head"] = "of-another-run 1 ab"
    node.write_text(json.dumps(ends))

    assert content["unit"] == "client"
    assert any(
        "nothing of this run" in line for line in said(folder, key, [node])[None]
    )
    with pytest.raises(FedllmError, match="was not written by fedllm node dossier"):
        said(folder, key, [folder / "config.json"])


def test_of_a_log_the_last_end_of_each_run_is_kept_but_none_of_a_refusal():
    def line(head, asked, **more):
        entry = {"event": "asked", "ledger-head": head, "round": asked}
        return {**entry, "ledger-key": "k", "ledger-signature": "s", **more}

    lines = [
        line("a 0 00", 1),
        line("b 0 00", 1),
        line("a 1 11", 2),
        line("a 9 99", 10, refused="no"),
        {"event": "answered"},
    ]
    kept = {end["head"]: end["round"] for end in node_ends(lines)}
    assert kept == {"a 1 11": 2, "b 0 00": 1}
