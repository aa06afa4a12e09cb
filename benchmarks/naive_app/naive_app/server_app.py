"""Flower's own FedAvg over all LoRA factors; prints the seconds of its two rounds.

The first pays for starting the clients' processes.
"""

import itertools
import time

from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from naive_app.client_app import load_model
from peft import get_peft_model_state_dict

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Train, and say how long the rounds took."""
    state = get_peft_model_state_dict(load_model(context.run_config))
    arrays = ArrayRecord({k: v.detach().float() for k, v in state.items()})
    strategy = FedAvg(fraction_train=1.0, fraction_evaluate=0.0)
    # Flower asks for its nodes once a second: waiting for them is not counted.
    while not list(grid.get_node_ids()):
        time.sleep(0.2)
    ends = []

    def note(server_round: int, arrays: ArrayRecord) -> None:
        ends.append(time.monotonic())

    rounds = int(context.run_config["num-server-rounds"])
    result = strategy.start(grid, arrays, num_rounds=rounds, evaluate_fn=note)
    if len(result.train_metrics_clientapp) != rounds:
        raise RuntimeError("not every round of the naive app was answered")
    # Flower calls `note` before the first round too.
    cold, warm = (after - before for before, after in itertools.pairwise(ends))
    print(f"naive rounds took {cold:.3f} and {warm:.3f} s", flush=True)
