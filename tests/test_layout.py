"""The tests mirror the package: tests/<package>/test_<module>.py for each module."""

import ast
import subprocess
import sys

from tests.helpers.rows import ROOT

# Modules without a test file of their own, and what tests them.
UNMIRRORED = {
    "adapters/kinds/kind.py": "the contract that tests/adapters/kinds/ holds every kind to",
    "auditing/harness.py": "runs every check of tests/auditing/",
    "auditing/hostile_replies.py": "a list of replies, sent by tests/auditing/test_auditor.py",
    "client/run_client.py": "log lines and seconds: tests/client/test_log.py",
    "client/sealed_roles.py": "real and simulated trustees: tests/client/test_sealing.py",
    "client_app.py": "a screen of wiring, run by tests/slow/",
    "commands/demo_page.py": "tests/commands/test_demo.py",
    "data/conversations.py": "turns that are learned: tests/data/test_shapes.py",
    "data/columns.py": "names of columns: tests/data/test_shapes.py",
    "data/turns.py": "turns of every form: tests/data/test_shapes.py",
    "deployment/flower_programs.py": "tests/commands/test_superlink.py and test_supernode.py",
    "errors.py": "names alone",
    "evaluation/inference.py": "asked by tests/commands/test_evaluate.py and test_demo.py",
    "logs.py": "the log's form, read from real runs in tests/slow/",
    "privacy/release_ledger.py": "both ledgers: tests/privacy/test_ledger.py, test_joint_ledger.py",
    "privacy/record_claims.py": "claims of whole runs: tests/server/test_privacy_account.py",
    "privacy/protected_record.py": "statements: tests/privacy/test_joint_ledger.py",
    "privacy/sealed_claims.py": "statements: tests/privacy/test_joint_ledger.py, test_sealed_dp.py",
    "reporting/sentences.py": "wording, read in tests/reporting/test_page.py",
    "reporting/style.py": "a style sheet: tests/reporting/test_browser.py looks at it",
    "runs/listing.py": "listed by tests/commands/test_runs.py and test_demo.py",
    "runs/record.py": "read by tests/commands/test_runs.py and tests/reporting/",
    "server_app.py": "a screen of wiring, run by tests/slow/",
    "server/account.py": "what every account has: tests/server/test_privacy_account.py",
    "strategy/round_stats.py": "a record, filled in tests/strategy/test_fedavg.py",
    "strategy/server_noise.py": "both units: test_client_level_dp.py, test_joint_record_dp.py",
    "training/objectives.py": "the table: tests/test_contributing.py, test_dpo.py, test_sft.py",
    "training/preference_loss.py": "beside TRL's: tests/training/test_dpo.py",
    "training/client_trainer.py": "one device, FedProx: tests/training/test_sft.py, test_dpo.py",
    "wire/resumed_run.py": "real clients of a resumed run: tests/server/test_startup.py",
    "wire/task_identity.py": "every message of tests/helpers/flower_messages.py",
}

# Test files without a module of their name, and what they test.
EXTRA = {
    "adapters/kinds/test_contract.py": "every kind over one contract",
    "models/test_architectures.py": "every architecture through models, training, adapters",
    "deployment/test_deploy_files.py": "the folder deploy/",
    "reporting/test_browser.py": "report.html in a browser",
    "server/test_faults.py": "faults across the server's modules",
    "test_contributing.py": "the rows of CONTRIBUTING.md's table",
    "test_docs.py": "the commands of the pages",
    "test_layout.py": "this mirror",
    "test_package.py": "what is built and published",
}
OTHER_FOLDERS = {"slow", "stress", "tools"}

ROOMS = [
    "adapters",
    "auditing",
    "client",
    "commands",
    "data",
    "deployment",
    "evaluation",
    "models",
    "node",
    "planning",
    "privacy",
    "reporting",
    "runs",
    "server",
    "strategy",
    "training",
    "wire",
]
PURE = ("privacy", "strategy", "wire")
HEAVY = ("torch", "transformers", "peft")


def modules() -> set[str]:
    found = (ROOT / "fedllm").rglob("*.py")
    names = {path.relative_to(ROOT / "fedllm").as_posix() for path in found}
    return {name for name in names if not name.endswith("__init__.py")}


def mirrored() -> set[str]:
    """Return the modules that the test files are named after, and EXTRA's files."""
    found = set()
    for path in (ROOT / "tests").rglob("test_*.py"):
        inner = path.relative_to(ROOT / "tests")
        if inner.parts[0] in OTHER_FOLDERS:
            continue
        if inner.as_posix() in EXTRA:
            continue
        found.add((inner.parent / inner.name.removeprefix("test_")).as_posix())
    return found


def test_every_module_has_a_test_file_of_its_name_or_a_reason():
    assert modules() - mirrored() == set(UNMIRRORED)


def test_every_test_file_is_named_after_a_module_or_stands_among_the_others():
    assert mirrored() - modules() == set()


def test_the_tests_of_privacy_strategy_and_wire_import_no_model_library():
    names = [
        f"tests.{package}.{path.stem}"
        for package in PURE
        for path in sorted((ROOT / "tests" / package).glob("test_*.py"))
    ]
    script = f"import sys, {', '.join(names)}; print({{*{HEAVY}}} & {{*sys.modules}})"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True
    )

    assert done.stdout == "set()\n", done.stderr


def test_there_are_seventeen_rooms_and_each_opens_with_what_it_is_for():
    rooms = {path.parent.name for path in (ROOT / "fedllm").glob("*/__init__.py")}
    assert rooms == set(ROOMS)
    for room in ROOMS:
        text = (ROOT / "fedllm" / room / "__init__.py").read_text()
        head = ast.get_docstring(ast.parse(text)) or ""
        assert 3 <= len(head.splitlines()) <= 10, room
        if room != "commands":  # the topmost room, which may import all
            assert "import" in head, f"{room}: what it must not import"
