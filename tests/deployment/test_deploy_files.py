"""What deploy/ promises: who may read which key, and which port the network sees."""

import json
import re
import shlex
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from flwr.supernode.cli.flower_supernode import _parse_args_run_supernode

from fedllm.commands import superlink, supernode

DEPLOY = Path(__file__).parents[2] / "deploy"
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
SERVICES = COMPOSE["services"]
NODES = ("node-1", "node-2", "node-3")


def manifests(name: str) -> dict:
    documents = yaml.safe_load_all((DEPLOY / "kubernetes" / name).read_text())
    return {document["kind"]: document for document in documents}


def containers(name: str) -> dict:
    pod = manifests(name)["Deployment"]["spec"]["template"]["spec"]
    return {container["name"]: container for container in pod["containers"]}


def mounted(service: str) -> dict[str, str]:
    """Return what a service sees: path inside -> path under the federation's folder."""
    pairs = [volume.split(":") for volume in SERVICES[service]["volumes"]]
    text = [
        ":".join(pair).replace("${FEDERATION:?}", "${FEDERATION}") for pair in pairs
    ]
    return {line.split(":")[1]: line.split(":")[0] for line in text}


@pytest.mark.parametrize("service", SERVICES)
def test_every_service_is_bounded_unprivileged_and_watched(service):
    told = SERVICES[service]
    assert told["user"] == "${FEDLLM_UID:-1000}"
    assert told["read_only"] is True
    assert told["cap_drop"] == ["ALL"]
    assert told["security_opt"] == ["no-new-privileges:true"]
    assert {"cpus", "memory"} <= set(told["deploy"]["resources"]["limits"])
    assert told["healthcheck"]["test"][0] == "CMD"
    # A pinned image of others, or one of ours.
    assert re.fullmatch(
        r"fedllm-(server|client)|\w+:\d+\.\d+\.\d+-\w+@sha256:[0-9a-f]{64}",
        told["image"],
    )


def test_each_node_has_its_own_key_data_and_state_and_nobody_the_cas():
    keys = {node: mounted(node)["/keys/node"] for node in NODES}
    assert keys == {node: f"${{FEDERATION}}/keys/nodes/{node}" for node in NODES}
    for node in NODES:
        assert mounted(node)["/data/rows.jsonl"].endswith(f"/data/{node}.jsonl")
        assert mounted(node)["/state"] == f"${{FEDERATION}}/{node}"
        assert set(mounted(node)) == {
            "/keys/ca.crt", "/keys/node", "/data/rows.jsonl", "/state", "/state/models",
        }  # fmt: skip
    for service in SERVICES:
        for path in mounted(service).values():
            assert not path.endswith("ca.key")
            private = re.search(r"/keys/nodes/[^.]+$", path)
            assert not private or service in NODES


def test_a_node_reads_the_shared_models_and_the_server_alone_writes_them():
    for service, told in SERVICES.items():
        modes = [v.split(":/state/models")[1] for v in told["volumes"] if "models" in v]
        assert modes == {"superlink": [""], "gate": []}.get(service, [":ro"])


def test_the_network_sees_the_gate_alone():
    assert [s for s in SERVICES if "ports" in SERVICES[s]] == ["superlink"]
    assert SERVICES["superlink"]["ports"] == ["${FEDLLM_GATE_PORT:-9192}:9192"]
    assert SERVICES["gate"]["network_mode"] == "service:superlink"
    service, policy = (
        manifests("server.yaml")[k] for k in ("Service", "NetworkPolicy")
    )
    assert [p["port"] for p in service["spec"]["ports"]] == [9192]
    (rule,) = policy["spec"]["ingress"]
    assert [p["port"] for p in rule["ports"]] == [9192]
    commands = [" ".join(service["command"]) for service in SERVICES.values()]
    commands += [" ".join(c["args"]) for c in containers("node.yaml").values()]
    assert not any("--host" in c or "--insecure" in c for c in commands)


def test_a_node_connects_to_the_gate_and_to_nothing_else():
    assert COMPOSE["networks"]["federation"] == {"internal": True}
    for node in NODES:
        assert SERVICES[node]["networks"] == ["federation"]
    # The server fetches models, and its port is published.
    assert SERVICES["superlink"]["networks"] == ["federation", "outside"]
    policy = manifests("node.yaml")["NetworkPolicy"]["spec"]
    assert policy["policyTypes"] == ["Ingress", "Egress"] and "ingress" not in policy
    gate, names = policy["egress"]
    assert gate["to"] == [{"podSelector": {"matchLabels": {"app": "superlink"}}}]
    assert [port["port"] for port in gate["ports"]] == [9192]
    assert {port["port"] for port in names["ports"]} == {53}
    assert len(names["to"]) == 1


def test_kubernetes_types_what_compose_types():
    server, node = containers("server.yaml"), containers("node.yaml")
    assert server["superlink"]["args"] == SERVICES["superlink"]["command"]
    assert server["gate"]["command"] == SERVICES["gate"]["command"]
    assert node["supernode"]["args"] == SERVICES["node-1"]["command"]
    for container in (*server.values(), *node.values()):
        assert {"cpu", "memory"} <= set(container["resources"]["limits"])
        assert container["securityContext"]["readOnlyRootFilesystem"] is True
        assert "livenessProbe" in container
    images = {service["image"] for service in SERVICES.values()}
    assert {c["image"] for c in (*server.values(), *node.values())} == images


def stages(dockerfile: str) -> dict[str, tuple[str, str]]:
    """Return what each stage builds on, and its own lines."""
    parts = re.split(r"^FROM (\S+) AS (\S+)\n", dockerfile, flags=re.MULTILINE)[1:]
    return {
        name: (of, lines)
        for of, name, lines in zip(parts[::3], parts[1::3], parts[2::3], strict=True)
    }


def test_the_images_are_pinned_and_not_root():
    found = stages((DEPLOY / "Dockerfile").read_text())
    others = [of for of, _ in found.values() if of not in found]
    assert len(others) == 1
    assert re.search(r":\d+\.\d+\.\d+-slim-\w+@sha256:[0-9a-f]{64}$", others[0])
    for image in ("server", "client", "client-cuda"):
        base = found[found[image][0]][1]
        assert "USER 10001:10001\n" in base
        assert "USER" not in found[image][1]


def locked(name: str) -> dict[str, tuple[set[str], int]]:
    """Return the versions of each package of a lock, and the fewest hashes of one."""
    found: dict[str, tuple[set[str], int]] = {}
    for entry in re.split(r"\n(?=\S)", (DEPLOY / name).read_text().strip()):
        package, version = re.match(r"([\w.-]+)==([^\s;]+)", entry).groups()
        hashes = len(re.findall(r"--hash=sha256:[0-9a-f]{64}\b", entry))
        versions, fewest = found.get(package, (set(), hashes))
        found[package] = (versions | {version}, min(fewest, hashes))
    return found


def test_the_images_install_only_files_whose_hash_is_known():
    found = stages((DEPLOY / "Dockerfile").read_text())
    installs = [
        line
        for _, lines in found.values()
        for line in re.findall(r"pip install ((?:.|\\\n)*?)(?:;| &&|\n(?! ))", lines)
    ]
    assert len(installs) == 6
    for line in installs:
        assert "--no-deps" in line
        is_locked = "--require-hashes" in line and "--only-binary :all:" in line
        is_ours = line.rstrip(" \\\n").endswith("--no-build-isolation .")
        is_torch_alone = '--index-url "$TORCH_INDEX_URL"' in line and "torch" in line
        assert is_locked or is_ours or is_torch_alone, line
    assert "EXTRA_INDEX" not in (DEPLOY / "Dockerfile").read_text()


def test_the_locks_are_the_tested_versions_each_with_a_hash():
    pins: dict[str, set[str]] = {}
    for line in (DEPLOY / "constraints.txt").read_text().splitlines():
        package, version = re.match(r"([\w.-]+)==([^\s;]+)", line).groups()
        pins.setdefault(package, set()).add(version)
    packages, torch = locked("requirements.lock"), locked("torch.lock")
    assert {"flwr", "transformers", "peft", "trl", "hatchling", "pip"} <= set(packages)
    assert "torch" in torch and not set(torch) & set(packages)
    for package, (versions, fewest) in (packages | torch).items():
        assert versions <= pins.get(package, versions), package
        assert fewest >= 1, package
    project = tomllib.loads((DEPLOY.parent / "pyproject.toml").read_text())["project"]
    asked = {re.match(r"[\w-]+", line)[0] for line in project["dependencies"]}
    assert asked <= set(packages | torch)
    for name in ("requirements.lock", "torch.lock"):
        assert (DEPLOY / name).stat().st_size < 1_000_000


def test_the_client_with_cuda_is_the_client_with_another_torch():
    found = stages((DEPLOY / "Dockerfile").read_text())
    entry = [line for line in found["client"][1].splitlines() if line]
    assert [line for line in found["client-cuda"][1].splitlines() if line] == entry
    # An index with a CPU build of torch must not reach it.
    assert "TORCH_INDEX_URL" in found["base"][1]
    assert "TORCH_INDEX_URL" not in found["base-cuda"][1] + found["app"][1]
    assert found["base"][0] == found["base-cuda"][0] == "app"


def test_the_images_name_the_version_and_licence_of_the_package():
    of, lines = stages((DEPLOY / "Dockerfile").read_text())["app"]
    labels = dict(re.findall(r'opencontainers\.image\.([\w.]+)="(.*?)"', lines))
    project = tomllib.loads((DEPLOY.parent / "pyproject.toml").read_text())["project"]
    assert labels["title"] == project["name"]
    assert labels["version"] == project["version"]
    assert labels["licenses"] == "Apache-2.0"
    name, digest = of.split("@")
    assert labels["base.name"] == f"docker.io/library/{name}"
    assert labels["base.digest"] == digest
    assert labels["revision"] == "${REVISION}" and "ARG REVISION" in lines


UNITS = sorted((DEPLOY / "systemd").glob("*.service"))
EACH_UNIT = pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)


def settings(unit: Path) -> dict[str, list[str]]:
    """Return key -> values of a unit, in the order of their lines."""
    found: dict[str, list[str]] = {}
    for key, value in re.findall(r"^(\w+)=(.*)$", unit.read_text(), re.MULTILINE):
        found.setdefault(key, []).append(value)
    return found


@EACH_UNIT
def test_a_unit_runs_as_a_user_of_its_own_that_can_become_no_other(unit):
    told = settings(unit)

    assert told["User"][0].startswith("fedllm-")
    assert told["NoNewPrivileges"] == told["ProtectHome"] == ["yes"]
    assert told["CapabilityBoundingSet"] == [""]
    assert told["ProtectSystem"] == ["strict"] and told["UMask"] == ["0077"]
    assert {"MemoryMax", "TasksMax"} <= set(told)


@pytest.mark.parametrize("name", ["fedllm-superlink", "fedllm-supernode"])
def test_what_holds_updates_or_rows_reaches_nobody_that_its_unit_does_not_name(name):
    told = settings(DEPLOY / "systemd" / f"{name}.service")

    assert told["IPAddressDeny"] == ["any"]
    assert told["IPAddressAllow"] == ["localhost"]


def test_the_units_type_what_the_commands_and_the_page_know():
    commands = [settings(unit)["ExecStart"][0] for unit in UNITS]
    gate, link, node = (shlex.split(command) for command in commands)
    page = (DEPLOY.parent / "docs" / "deployment.md").read_text()

    _, others = superlink.parser().parse_known_args(link[2:])
    assert link[1] == "superlink" and others == []
    _, others = supernode.parser().parse_known_args(node[2:])
    assert node[1] == "supernode"
    _parse_args_run_supernode().parse_args(others)
    assert gate[1:3] == ["run", "--config"] and "caddy run --config" in page
    assert not {"--host", "--insecure"} & {*link, *node}
    folders = {word for command in (gate, link, node) for word in command}
    folders = {word for word in folders if word.startswith(("/etc", "/var"))}
    assert len(folders) == 6
    assert {folder for folder in folders if folder not in page} == set()


@EACH_UNIT
def test_systemd_understands_a_unit_and_finds_little_exposed(unit, tmp_path):
    if shutil.which("systemd-analyze") is None:
        pytest.skip("needs systemd-analyze")
    # The programs that it names need not be here.
    text = re.sub(
        r"^ExecStart=\S+", "ExecStart=/bin/true", unit.read_text(), flags=re.M
    )
    here = tmp_path / unit.name
    here.write_text(text)

    verify = ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no"]
    checked = subprocess.run([*verify, str(here)], capture_output=True, text=True)
    assert (checked.returncode, checked.stderr) == (0, "")
    exposure = ["systemd-analyze", "security", "--offline=true", "--threshold=15"]
    checked = subprocess.run([*exposure, str(here)], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


def test_the_dashboard_shows_the_names_that_a_run_serves():
    board = json.loads((DEPLOY / "grafana.json").read_text())
    source = (DEPLOY.parent / "fedllm/reporting/metrics_server.py").read_text()
    shown = {
        name.removesuffix("_total")
        for panel in board["panels"]
        for target in panel["targets"]
        for name in re.findall(r"fedllm_\w+", target["expr"])
    }

    assert shown == set(re.findall(r'"(fedllm_\w+)"', source))
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
