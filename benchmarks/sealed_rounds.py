"""What a sealed round gives and costs, each figure beside its bound.

    python benchmarks/sealed_rounds.py           each figure beside its bound
    python benchmarks/sealed_rounds.py --steps   what a step at record level costs, by clients

Clients, trustees and the server run in this process, without Flower's processes; three trustees of
whom one may be the server's, if no others are named. Exit status 1 if a bound is passed.
"""

import sys
import tempfile
import time
import tracemalloc
from pathlib import Path
from unittest.mock import patch

import dp_accounting
import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import Message

from fedllm.auditing.harness import Setup, replies_of
from fedllm.auditing.sealed_bench import SealedSetup
from fedllm.client.trustee import Trustee
from fedllm.commands.sealed_parties import SealedParties
from fedllm.config_parsing import parse_run_config
from fedllm.planning.noise import privacy_settings
from fedllm.privacy.agreement import SlotSettings
from fedllm.privacy.joint_sum import largest_batch
from fedllm.privacy.ledger import Ledger
from fedllm.privacy.mechanism import SecureGenerator
from fedllm.privacy.pads import add_pad, fresh_seed, integers_of, residues, seal
from fedllm.privacy.sealed_sum import SealedGrid, deviation, sealed_grid
from fedllm.wire.masking import masked
from fedllm.wire.sealed_messages import PACKETS, SEALED

FEDERATIONS = 1_000
NAMES, COLLUDING, Z, C, CLIENTS = ("a", "b", "c"), 1, 1.342, 0.6, 100
BATCH, STEP_CLIENTS = 64, (4, 20, 100, 300, 1000)
# Values, seconds of a client, seconds of a trustee.
SIZES = ((184_320, 0.05, 0.3), (2_662_400, 0.3, 2.0))


class Bench:
    """The parties of one run, over an adapter of some size."""

    def __init__(
        self, folder: Path, size: int, post_quantum: bool, clients=CLIENTS, records=0
    ) -> None:
        identity = Ed25519PrivateKey.generate()
        self.trustees = [Trustee(n, identity, folder / n) for n in NAMES]
        keys = [t.certificate("run", post_quantum) for t in self.trustees]
        self.settings = SlotSettings(
            run="run",
            slot=1,
            planned_slots=9,
            size=size,
            num_clients=clients,
            num_records=records,
            total_rows=10 * records,
            clipping_norm=C,
            noise_multiplier=Z,
            colluding=COLLUDING,
            trustees=tuple((c.name, c.key) for c in keys),
            adapter="0" * 64,
        )

    def seal(self, update):
        """A client's part after its training."""
        sent = residues(self.settings.grid.encode(update, C))
        packets = []
        for name, key in self.settings.trustees:
            seed = fresh_seed()
            add_pad(sent, seed)
            packets.append(seal(seed, bytes.fromhex(key), self.settings.info(name)))
        return sent, packets

    def packets(self, place):
        """A list of packets to one trustee, as long as the sum has room for."""
        name, key = self.settings.trustees[place]
        info = self.settings.info(name)
        count = self.settings.num_clients
        return [seal(fresh_seed(), bytes.fromhex(key), info) for _ in range(count)]


def timed(work, *arguments):
    # Of the processor: other programs do not count.
    began = time.process_time()
    result = work(*arguments)
    return time.process_time() - began, result


def shown(what, got, bound, unit="s"):
    is_kept = got <= bound
    print(
        f"{what:58} {got:9.4g} {unit}  at most {bound:g}{'' if is_kept else '  ABOVE'}"
    )
    return is_kept


def federation(folder, draw):
    """Whether what a random federation opens, less its noise, is the plain sum."""
    names = [f"t{i}" for i in range(draw.integers(2, 6))]
    size, clients = int(draw.integers(1, 40)), int(draw.integers(1, 9))
    identity = Ed25519PrivateKey.generate()
    trustees = [Trustee(name, identity, folder / name) for name in names]
    hybrid = bool(draw.integers(2))
    keys = [trustee.certificate("run", hybrid) for trustee in trustees]
    settings = SlotSettings(
        run="run",
        slot=1,
        planned_slots=1,
        size=size,
        num_clients=clients,
        clipping_norm=C,
        noise_multiplier=float(draw.uniform(0.3, 4)),
        colluding=int(draw.integers(len(names))),
        trustees=tuple((c.name, c.key) for c in keys),
        adapter="0" * 64,
    )
    plain, total = np.zeros(size, np.int64), np.zeros(size, np.uint32)
    packets = [[] for _ in names]
    # Any number of clients vanish before they reply.
    for _ in range(int(draw.integers(1, clients + 1))):
        update = draw.normal(size=size) * draw.uniform(0, 2)
        integers = settings.grid.encode(update, C)
        plain += integers
        sent = residues(integers)
        for place, (name, key) in enumerate(settings.trustees):
            seed = fresh_seed()
            add_pad(sent, seed)
            packets[place].append(seal(seed, bytes.fromhex(key), settings.info(name)))
        total += sent
    drawn = []
    real = SealedGrid.noise

    def noted(grid, size, generator):
        drawn.append(real(grid, size, generator))
        return drawn[-1]

    with patch.object(SealedGrid, "noise", noted):
        for trustee, asked in zip(trustees, packets, strict=True):
            total -= trustee.tally(settings, asked).vector
    return len(drawn) == len(names) and np.array_equal(
        integers_of(total), plain + sum(drawn)
    )


def opened_sums():
    draw = np.random.default_rng(1)
    equal = 0
    # The disk's waiting is not what is measured.
    with patch("os.fsync", lambda descriptor: None):
        for _ in range(FEDERATIONS):
            with tempfile.TemporaryDirectory() as folder:
                equal += federation(Path(folder), draw)
    what = f"opened sums equal to the plain sum, of {FEDERATIONS:,}"
    print(f"{what:58} {equal:9,}    at least {FEDERATIONS:,}")
    return equal == FEDERATIONS


def errors():
    generator, size = SecureGenerator(), SIZES[0][0]
    for trustees, colluding in ((3, 0), (3, 1), (5, 1)):
        grid = sealed_grid(Z, trustees, colluding, CLIENTS, size)
        total = sum(grid.noise(size, generator) for _ in range(trustees))
        noise = float(np.std(grid.decode(integers_of(residues(total)), C))) / C
        wanted = deviation(Z, trustees, colluding)
        what = f"error over that of a trusted server, k={trustees} c={colluding}"
        print(f"{what:58} {noise / Z:9.4f} x  (sqrt(k / (k - c)) {wanted / Z:.4f})")
        yield shown("  off by", abs(noise / wanted - 1), 0.01, "x")


def epsilons():
    config = run_config()
    settings = privacy_settings(config, 20, SIZES[0][0])
    z, rounds, delta = settings.noise_multiplier, 5, settings.delta
    with tempfile.TemporaryDirectory() as folder:
        ledger = Ledger.create(Path(folder) / "privacy.json", settings)
        for server_round in range(1, rounds + 1):
            ledger.spend(server_round)
    k, c = settings.trustees, settings.colluding
    for name, found, noise in (
        ("epsilon", ledger.epsilons(), z),
        ("epsilon_adapters", ledger.epsilons_of_adapters(), z * (k / (k - c)) ** 0.5),
    ):
        exact = dp_accounting.get_epsilon_gaussian(noise / rounds**0.5, delta)
        off = abs(found.zero_out - exact)
        yield shown(f"ledger's {name} ({exact:.6f}), off by", off, 1e-6, " ")


def run_config():
    return parse_run_config(
        {
            "num-server-rounds": 5,
            "privacy.trust": "trustees",
            "privacy.trustees": ",".join(NAMES),
            "privacy.colluding-trustees": COLLUDING,
            "privacy.delta": 1e-5,
        }
    )


def messages_and_memory(size=1 << 20, clients=6):
    """Count a round's messages, and the server's memory beyond that of a trusted one's."""
    config = run_config()
    settings = privacy_settings(config, clients, size)
    setup = SealedSetup(config, settings, size, make_parties=SealedParties)
    with setup.bench(size, clients) as bench:
        nodes = bench.cohort(1)
        contents = [(node, bench.content(node, np.zeros(size))) for node in nodes]
        replies = [
            tally(bench, place, name, contents)
            for place, name in enumerate(bench.slot.names)
        ]
        sent = []
        bench.sealed_strategy.roster.ask = lambda asked: sent.extend(asked) or replies
        sealed = peak(lambda: bench.strategy.aggregate_train(1, replies_of(contents)))
        number = len(nodes) + len(sent)
    plain = parse_run_config({"num-server-rounds": 5})
    trusted = Setup(plain, privacy_settings(plain, clients, size), size)
    with trusted.bench(size, clients) as bench:
        contents = [(node, bench.content(node, np.zeros(size))) for node in nodes]
        central = peak(lambda: bench.strategy.aggregate_train(1, replies_of(contents)))
    wanted = clients + len(NAMES)
    kept = shown(
        f"messages of {clients} clients, {len(NAMES)} trustees", number, wanted, " "
    )
    more = (sealed - central) / (4 * size)
    return (
        shown("server's memory beyond a trusted one's, in vectors", more, 3, " ")
        and kept
    )


def tally(bench, place, name, contents):
    packets = [c.config_records[SEALED][PACKETS][place] for _, c in contents]
    message = bench.tally_message(name, packets)
    content = bench.parties.answer(message.metadata.dst_node_id, message)
    return Message(masked(content), reply_to=message)


def peak(work):
    """The most bytes that some work holds at once."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def steps():
    """Print a step's messages, bytes and processor time, by clients, post-quantum."""
    print("clients  values    messages  MB up  client s  trustee s  server s")
    for size in (3_840, 184_320):
        for clients in STEP_CLIENTS:
            with tempfile.TemporaryDirectory() as folder:
                bench = Bench(Path(folder), size, True, clients, largest_batch(BATCH))
                update = np.random.default_rng(0).normal(size=size)
                bench.seal(update)
                of_client, (sent, packets) = timed(bench.seal, update)
                asked = bench.packets(0)
                of_trustee, answer = timed(
                    bench.trustees[0].tally, bench.settings, asked
                )
                total = np.zeros(size, np.uint32)
                of_server, _ = timed(add_all, total, sent, answer.vector, clients)
            up = clients * (sent.nbytes + sum(map(len, packets)))
            up += len(NAMES) * answer.vector.nbytes
            print(
                f"{clients:7d}  {size:7,d}  {clients + len(NAMES):8d}  {up / 1e6:6.1f}  "
                f"{of_client:8.4f}  {of_trustee:9.4f}  {of_server:8.4f}"
            )


def add_all(total, sent, answer, clients):
    """The server's part: a sum over clients, less one over trustees."""
    for _ in range(clients):
        total += sent
    for _ in NAMES:
        total -= answer


def main():
    if sys.argv[1:] == ["--steps"]:
        steps()
        return
    kept = []
    for size, of_client, of_trustee in SIZES:
        update = np.random.default_rng(0).normal(size=size)
        for post_quantum in (False, True):
            with tempfile.TemporaryDirectory() as folder:
                bench = Bench(Path(folder), size, post_quantum)
                bench.seal(update)
                seconds, (sent, packets) = timed(bench.seal, update)
                kind = "hybrid" if post_quantum else "classic"
                kept.append(
                    shown(f"{size:,} values, client, {kind}", seconds, of_client)
                )
                asked = bench.packets(0)
                settings, trustee = bench.settings, bench.trustees[0]
                seconds, _ = timed(trustee.tally, settings, asked)
                kept.append(
                    shown(
                        f"{size:,} values, trustee of 100, {kind}", seconds, of_trustee
                    )
                )
                up = sent.nbytes + sum(map(len, packets))
                ratio = up / (4 * size)
                kept.append(
                    shown(f"{size:,} values, bytes up, {kind}", ratio, 1.01, "x")
                )
    kept += errors()
    kept += epsilons()
    kept.append(messages_and_memory())
    kept.append(opened_sums())
    sys.exit(0 if all(kept) else 1)


if __name__ == "__main__":
    main()
