"""What a sealed round costs: processor time, bytes and noise, each beside its bound.

    python benchmarks/sealed_rounds.py           each figure beside its bound
    python benchmarks/sealed_rounds.py --steps   what a step at record level costs, by clients

One client, one trustee and the server, in this process and without Flower; three trustees of whom
one may be the server's. Exit status 1 if a bound is passed.
"""

import math
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedllm.client.trustee import Trustee
from fedllm.privacy.agreement import SlotSettings
from fedllm.privacy.joint_sum import largest_batch
from fedllm.privacy.mechanism import SecureGenerator
from fedllm.privacy.pads import add_pad, fresh_seed, integers_of, residues, seal
from fedllm.privacy.sealed_sum import deviation

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
        f"{what:52} {got:9.4f} {unit}  at most {bound:g}{'' if is_kept else '  ABOVE'}"
    )
    return is_kept


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
    size = SIZES[0][0]
    with tempfile.TemporaryDirectory() as folder:
        grid = Bench(Path(folder), size, False).settings.grid
    generator = SecureGenerator()
    total = sum(grid.noise(size, generator) for _ in NAMES)
    noise = float(np.std(grid.decode(integers_of(residues(total)), C))) / C
    wanted = deviation(Z, len(NAMES), COLLUDING)
    off = abs(noise / wanted - 1)
    kept.append(
        shown("noise of all trustees, off z sqrt(k / (k - c)) by", off, 0.01, "x")
    )
    print(
        f"noise over that of a trusted server: {noise / Z:.3f} ({math.sqrt(1.5):.3f})"
    )
    sys.exit(0 if all(kept) else 1)


if __name__ == "__main__":
    main()
