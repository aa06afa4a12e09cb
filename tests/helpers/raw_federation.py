"""A ServerApp of one round, for nodes that the test itself plays.

Its messages, its reading of replies and its rejections are fedllm's; nothing is trained on
the server, and what it read is written to a file.
"""

import json
import time
from pathlib import Path
from typing import Any

from flwr.app import ConfigRecord, Context
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

PYPROJECT = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"
[project]
name = "raw-federation"
version = "0.1.0"
description = "A round for nodes that a test plays"
license = "Apache-2.0"
dependencies = []
[tool.flwr.app]
publisher = "test"
[tool.flwr.app.components]
serverapp = "raw_federation:app"
clientapp = "raw_federation:client"
[tool.flwr.app.config]
settings = "{}"
out = ""
nodes = 1
"""

client = ClientApp()
app = ServerApp()


def write_app(folder: Path) -> Path:
    """Write the app that this module is."""
    folder.mkdir()
    (folder / "pyproject.toml").write_text(PYPROJECT)
    (folder / "raw_federation.py").write_text(Path(__file__).read_text())
    return folder


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Ask every node once, and write what each reply was read as."""
    from fedllm.adapters.peft_model import initial_arrays
    from fedllm.adapters.resolve import adapter_spec
    from fedllm.config_parsing import parse_run_config
    from fedllm.models.location import load_config
    from fedllm.server.reply_stream import ReplyStream
    from fedllm.strategy.fedavg import AdapterFedAvg
    from fedllm.wire.messages import array_record, read_reply

    given = context.run_config
    config = parse_run_config(json.loads(str(given["settings"])))
    spec = adapter_spec(config.adapter, load_config(config.model.name), config.seed)
    start = initial_arrays(spec)
    while len(nodes := sorted(grid.get_node_ids())) < int(given["nodes"]):
        time.sleep(0.2)
    strategy = AdapterFedAvg(config, start, nodes)
    asked = strategy.configure_train(1, array_record(start), ConfigRecord(), grid)
    out, read = Path(str(given["out"])), dict[str, Any]()
    for message in ReplyStream(grid, list(asked), config.strategy.round_timeout):
        reply = read_reply(message, strategy.shapes, config.wire.encoding)
        values = next(iter((reply.arrays or {}).values()), None)
        first = None if values is None else float(values.flat[0])
        read[str(reply.node_id)] = {"code": reply.code, "first": first}
        out.with_suffix(".part").write_text(json.dumps(read))
        out.with_suffix(".part").replace(out)
