"""Serve a page on this machine: base and tuned model answer side by side.

fedllm demo
fedllm demo --port 8000 --no-browser
"""

import argparse
import os
import sys
from importlib.util import find_spec
from pathlib import Path

from fedllm.commands.demo_host import OwnHostOnly
from fedllm.commands.demo_page import CSS, AnswerOptions, make_page
from fedllm.commands.options import (
    add_answers,
    log_to_stderr,
    main_of,
    new_parser,
)
from fedllm.config import fedllm_home
from fedllm.errors import AdapterError, ConfigError
from fedllm.runs.listing import run_choices

_HOST = "127.0.0.1"


def run(args: argparse.Namespace) -> int:
    """Serve the page until the command is interrupted."""
    log_to_stderr()
    _require_gradio()
    _require_runs(fedllm_home())
    _serve(args)
    return 0


def _require_gradio() -> None:
    """Check that the package that draws the page is installed.

    Raises:
        ConfigError: Names the command that installs it.
    """
    if find_spec("gradio") is None:
        raise ConfigError("the page needs Gradio: pip install 'fedllm[demo]'")


def _require_runs(home: Path) -> None:
    """Check that there is a run to choose.

    Raises:
        AdapterError: No run here has an adapter.
    """
    if not run_choices(home):
        raise AdapterError(
            f"{home / 'runs'}: no run with an adapter there: start one (see the "
            "README), or name another folder with FEDLLM_HOME"
        )


def _serve(args: argparse.Namespace) -> None:
    """Show the page until the command is interrupted.

    Raises:
        ConfigError: The port is taken.
    """
    # Gradio reports its users to its makers unless this is set before it is imported.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    # It sends a request to its own page, which no proxy may intercept.
    direct = os.environ.get("no_proxy") or os.environ.get("NO_PROXY")
    os.environ["no_proxy"] = ",".join(filter(None, [direct, _HOST]))
    import gradio as gr
    from starlette.middleware import Middleware

    options = AnswerOptions(args.max_new_tokens, args.temperature, args.quantization)
    page = make_page(options, fedllm_home())
    page.queue(default_concurrency_limit=1)
    try:
        _, url, _ = page.launch(
            server_name=_HOST,
            server_port=args.port,
            share=False,
            inbrowser=not args.no_browser,
            prevent_thread_lock=True,
            quiet=True,
            footer_links=[],
            run_history=False,
            ssr_mode=False,
            pwa=False,
            mcp_server=False,
            enable_monitoring=False,
            css=CSS,
            app_kwargs={"middleware": [Middleware(OwnHostOnly, port=args.port)]},
            # The fonts of its own themes would come from elsewhere.
            theme=gr.themes.Default(
                font=["system-ui", "sans-serif"], font_mono=["monospace"]
            ),
        )
    except OSError as error:
        raise ConfigError(
            f"--port {args.port}: cannot be used: {error}; name a free one"
        ) from None
    sys.stdout.write(f"{url} (only on this machine; Ctrl-C ends it)\n")
    sys.stdout.flush()
    page.block_thread()


def _port(text: str) -> int:
    """Read a port; argparse shows the error."""
    value = int(text)
    if not 1 <= value <= 65535:
        raise argparse.ArgumentTypeError(f"must be 1 to 65535 (got {text})")
    return value


def parser() -> argparse.ArgumentParser:
    """Return the command's parser."""
    parser = new_parser("demo", __doc__)
    parser.add_argument(
        "--port",
        type=_port,
        default=7860,
        metavar="N",
        help="of the page (default: %(default)s)",
    )
    parser.add_argument(
        "--no-browser", action="store_true", help="only print the page's address"
    )
    add_answers(parser, default_bits="as in training")
    return parser


main = main_of(parser, run)

if __name__ == "__main__":
    main()
