"""Seconds and memory per round with 100, 1,000 and 10,000 virtual clients.

Flower's own simulation engine and fedllm's own ServerApp (sampling, clipping, secure
noise, ledger, saving), with clients that train nothing: each replies at once with arrays
of the adapter's shapes (stub_clients.py). So what is measured is everything but training.

    python benchmarks/scale.py
    python benchmarks/scale.py --clients 100 1000 --kind ffa-lora --profile 30

`--profile SECONDS` samples the simulation's process with py-spy (pip install py-spy) from
its first replies on, and prints which functions its threads were in.
"""

import argparse
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import tomllib
import uuid
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
_MARK = "FEDLLM_SCALE_RUN"


def main() -> None:
    args = _parser().parse_args()
    cores = os.cpu_count()
    print(
        f"{cores} cores, load {os.getloadavg()[0]:.1f}, Python "
        f"{platform.python_version()}, flwr {version('flwr')}, ray {version('ray')}; "
        f"adapter {args.kind}, rank {args.rank}, {args.rounds} rounds"
    )
    print(
        "clients  s/round  ms/client  aggregate s  server MiB  Ray MiB  all MiB  MB up"
    )
    each = []
    with tempfile.TemporaryDirectory(prefix="fedllm-scale-") as folder:
        app = _write_app(Path(folder) / "app")
        for clients in args.clients:
            each.append(_measure(app, clients, args, Path(folder)))
    if len(each) > 1:
        _say_constant(each)


def _measure(app: Path, clients: int, args: Any, folder: Path) -> tuple[int, float]:
    """Run one federation; print its line; return (clients, median seconds a round)."""
    rows = folder / "rows.jsonl"
    rows.write_text('{"instruction": "q", "response": "a"}\n', encoding="utf-8")
    config = {
        "data.name": str(rows),
        "num-server-rounds": args.rounds,
        "adapter.kind": args.kind,
        "adapter.rank": args.rank,
        "privacy.noise-probe": False,
        "strategy.evaluate-examples": 0,
        "strategy.wait-for-clients": 600.0,
    }
    if args.model:
        config["model.name"] = args.model
    values = " ".join(f"{k}={json.dumps(v)}" for k, v in config.items())
    command = [sys.executable, "-m", "fedllm.commands.simulate", str(app)]
    command += ["--num-supernodes", str(clients), "--run-config", values]
    mark = uuid.uuid4().hex
    env = os.environ | {_MARK: mark}
    env["PYTHONPATH"] = f"{ROOT}{os.pathsep}{env.get('PYTHONPATH', '')}"
    watch = _Watch(mark, args.profile)
    watch.start()
    output = ""
    with subprocess.Popen(
        command,
        cwd=folder,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as running:
        assert running.stdout is not None
        for line in running.stdout:
            output += line
            if "round 1/" in line:
                watch.in_rounds.set()
    watch.stop()
    found = re.search(r"run folder: (\S+)", output)
    if running.returncode or found is None:
        sys.exit(f"{clients} clients:\n{output[-4000:]}")
    text = (Path(found[1]) / "metrics.jsonl").read_text("utf-8")
    lines = [json.loads(line) for line in text.splitlines()][1:]
    for said in lines:
        if said["clients_answered"] != clients or said["clients_rejected"]:
            sys.exit(f"{clients} clients: not every reply was usable: {said}")
    seconds = statistics.median(sum(line["seconds"].values()) for line in lines)
    aggregate = statistics.median(line["seconds"]["aggregate"] for line in lines)
    server, ray, everything = watch.peaks
    print(
        f"{clients:7d} {seconds:8.2f} {1000 * seconds / clients:10.2f} "
        f"{aggregate:12.2f} {server:11.0f} {ray:8.0f} {everything:8.0f} "
        f"{lines[-1]['megabytes_up']:6.1f}",
        flush=True,
    )
    watch.say_profile()
    return clients, seconds


def _say_constant(each: list[tuple[int, float]]) -> None:
    """Print the line through the smallest and the largest, and who leaves it."""
    (few, quick), (many, slow) = min(each), max(each)
    slope = (slow - quick) / (many - few)
    print(
        f"seconds a round = {quick - slope * few:.2f} + {1000 * slope:.2f} ms x clients"
    )
    for clients, seconds in each:
        line = quick + slope * (clients - few)
        print(f"  {clients:6d} clients: {seconds / line:.2f} of the line")


class _Watch(threading.Thread):
    """Samples the memory (Pss) of the run's processes; may start py-spy on one."""

    def __init__(self, mark: str, profile: int) -> None:
        super().__init__(daemon=True)
        self.peaks = (0.0, 0.0, 0.0)
        """MiB at the peak: the simulation's process, Ray's, all of the run."""
        self._mark = f"{_MARK}={mark}".encode()
        self._profile = profile
        self._raw = Path(tempfile.gettempdir()) / f"fedllm-scale-{mark}.raw"
        self._sampler: subprocess.Popen[bytes] | None = None
        self._ended = threading.Event()
        self.in_rounds = threading.Event()
        """To be set when clients answer: what comes before is not profiled."""

    def run(self) -> None:
        while not self._ended.wait(1.0):
            sizes: Counter[str] = Counter()
            for folder in Path("/proc").glob("[0-9]*"):
                try:
                    if self._mark not in (folder / "environ").read_bytes():
                        continue
                    name = (folder / "cmdline").read_bytes().decode("utf-8", "replace")
                    roll = (folder / "smaps_rollup").read_text()
                except OSError:
                    continue
                kind = _kind(name)
                found = re.search(r"^Pss:\s+(\d+)", roll, re.M)
                sizes[kind] += int(found[1]) if found else 0
                wanted = self._profile and self.in_rounds.is_set()
                if kind == "server" and wanted and self._sampler is None:
                    self._begin_profile(int(folder.name))
            now = [sizes["server"], sizes["ray"], sum(sizes.values())]
            self.peaks = tuple(  # type: ignore[assignment]
                max(a, b / 1024) for a, b in zip(self.peaks, now, strict=True)
            )

    def stop(self) -> None:
        self._ended.set()
        self.join()

    def _begin_profile(self, pid: int) -> None:
        beside = Path(sys.executable).parent / "py-spy"
        program = str(beside) if beside.exists() else shutil.which("py-spy")
        if program is None:
            sys.exit("--profile needs py-spy: pip install py-spy")
        command = [program, "record", "--pid", str(pid), "--nonblocking", "--gil"]
        command += ["--duration", str(self._profile), "--format", "raw"]
        self._sampler = subprocess.Popen(
            [*command, "--output", str(self._raw)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def say_profile(self) -> None:
        """Print the share of samples that each function, with its callees, was in."""
        if self._sampler is None:
            return
        self._sampler.wait(timeout=60)
        if not self._raw.exists():
            print("  no profile: py-spy may not trace processes here")
            return
        within: Counter[str] = Counter()
        total = 0
        for line in self._raw.read_text("utf-8", "replace").splitlines():
            stack, _, count = line.rpartition(" ")
            total += int(count)
            for frame in {re.sub(r":\d+\)$", ")", f) for f in stack.split(";")}:
                within[frame] += int(count)
        self._raw.unlink()
        for frame, count in within.most_common(25):
            print(f"  {100 * count / max(total, 1):5.1f} %  {frame}")


def _kind(command: str) -> str:
    """Tell the processes of a run apart by how they were started."""
    if "ray" in command.split("\0")[0] or "/ray/" in command:
        return "ray"
    return "server" if "flwr-simulation" in command else "other"


def _write_app(folder: Path) -> Path:
    """Make an app of fedllm's ServerApp and config, and the stub's ClientApp."""
    folder.mkdir()
    shutil.copy(Path(__file__).parent / "stub_clients.py", folder)
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    config = text.split("[tool.flwr.app.config]", 1)[1].split("\n[", 1)[0]
    assert tomllib.loads(config)
    (folder / "fedllm_server.py").write_text(
        "from fedllm.server_app import app\n\n__all__ = ['app']\n", encoding="utf-8"
    )
    (folder / "pyproject.toml").write_text(
        '[project]\nname = "scale-stub"\nversion = "1.0.0"\ndescription = "stub"\n'
        'license = "Apache-2.0"\ndependencies = ["flwr[simulation]"]\n'
        '[tool.flwr.app]\npublisher = "fedllm"\nfab-include = ["*.py"]\n'
        "[tool.flwr.app.components]\n"
        'serverapp = "fedllm_server:app"\nclientapp = "stub_clients:app"\n'
        f"[tool.flwr.app.config]{config}\n",
        encoding="utf-8",
    )
    return folder


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clients", type=int, nargs="+", default=[100, 1000, 10000])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kind", default="lora-core", help="adapter.kind")
    parser.add_argument("--rank", type=int, default=8, help="adapter.rank")
    parser.add_argument("--model", help="model.name: gives the adapter its shapes")
    parser.add_argument("--profile", type=int, default=0, metavar="SECONDS")
    return parser


if __name__ == "__main__":
    main()
