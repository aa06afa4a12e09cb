"""The ServerApp: parse the run config, run the federation."""

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedllm.config_parsing import parse_run_config
from fedllm.deployment.ray_walls import warn_of_superlink
from fedllm.errors import FedllmError
from fedllm.logs import one_line_failure, show_log

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Train; a FedllmError ends the run as failed, with one line."""
    show_log()
    warn_of_superlink(grid)
    try:
        config = parse_run_config(context.run_config)
        from fedllm.server.startup import set_up

        set_up(config, grid, context.run_id).run()
    except FedllmError as error:
        one_line_failure(error)
        raise
