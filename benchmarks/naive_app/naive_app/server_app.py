"""Flower's own FedAvg over all LoRA factors; prints the seconds of the rounds."""

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
    started = time.monotonic()
    result = strategy.start(
        grid, arrays, num_rounds=int(context.run_config["num-server-rounds"])
    )
    if not result.train_metrics_clientapp:
        raise RuntimeError("no client of the naive app answered")
    print(f"naive rounds took {time.monotonic() - started:.3f} s", flush=True)
