"""A page on this machine: the base and a run's tuned model answer side by side.

python -m fedllm.commands.demo
python -m fedllm.commands.demo --port 8000 --no-browser
"""

import argparse
import contextlib
import gc
import html
import logging
import os
import sys
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fedllm.commands.options import positive_int, temperature
from fedllm.config import fedllm_home
from fedllm.errors import AdapterError, ConfigError, FedllmError
from fedllm.evaluation.inference import ChatModel, Turn, find_model
from fedllm.reporting.sentences import caution, verdict
from fedllm.runs.listing import adapter_names, first_choice, run_choices
from fedllm.runs.record import read_run

logger = logging.getLogger(__name__)

_HOST = "127.0.0.1"
_NAMES = ("base", "tuned")

_CSS = """
.gradio-container { max-width: 68rem !important; margin: 0 auto !important; }
.statement { border-left: .3rem solid #0072b2; padding: .1rem 0 .1rem 1rem; }
.statement p, .statement li { margin: .4rem 0; }
.statement .privacy { font-size: clamp(1rem, 2.5vw, 1.1rem); line-height: 1.5; }
.statement summary { cursor: pointer; }
input[role=combobox] { text-overflow: ellipsis; padding-right: 1.8rem !important; }
"""


def main(arguments: list[str] | None = None) -> None:
    """Run the command; an error is one line and exit status 1."""
    args = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    try:
        _require_gradio()
        _require_runs(fedllm_home())
        _serve(args)
    except FedllmError as error:
        sys.exit(f"{type(error).__name__}: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


def _require_gradio() -> None:
    """Refuse to start without the package that draws the page.

    Raises:
        ConfigError: Names the command that installs it.
    """
    if find_spec("gradio") is None:
        raise ConfigError("the page needs Gradio: pip install 'fedllm[demo]'")


def _require_runs(home: Path) -> None:
    """Refuse to start where there is nothing to choose.

    Raises:
        AdapterError: No run here has an adapter.
    """
    if not run_choices(home):
        raise AdapterError(
            f"{home / 'runs'}: no run with an adapter there: start one (see the "
            "README), or name another folder with FEDLLM_HOME"
        )


def about(folder: Path) -> str:
    """Return, as HTML, what a run promises, what it was worth, what answers are worth.

    Raises:
        FedllmError: The run is damaged.
    """
    run = read_run(folder)
    statement = run.privacy.get("statement") or "This run has no privacy statement."
    parts = [f'<p class="privacy">{html.escape(statement)}</p>']
    if run.privacy.get("not_covered"):
        items = "".join(
            f"<li>{html.escape(str(x))}</li>" for x in run.privacy["not_covered"]
        )
        parts.append(
            "<details><summary>Not covered by it (not_covered)</summary>"
            f"<ul>{items}</ul></details>"
        )
    if run.result is not None:
        parts.append(f"<p>{html.escape(verdict(run.result))}</p>")
    parts.append(f"<p><strong>{html.escape(caution(run.settings))}</strong></p>")
    return f'<div class="statement">{"".join(parts)}</div>'


class Resident:
    """The one model in memory; another adapter takes its place.

    Args:
        args: The command line.
        home: Where runs lie.
    """

    def __init__(self, args: argparse.Namespace, home: Path) -> None:
        self._args = args
        self._home = home
        self._asker: ChatModel | None = None

    def answers(
        self, folder: Path, question: str, turns: Mapping[str, list[Turn]]
    ) -> Iterator[dict[str, str]]:
        """Yield both answers as they grow, the base's first.

        Args:
            folder: The adapter.
            question: What is asked now.
            turns: What each model was asked before, and answered itself.

        Raises:
            FedllmError: The adapter or its base cannot be used.
        """
        asker = self._load(folder)
        said = dict.fromkeys(_NAMES, "")
        for name, tuned in asker.both():
            limits = (self._args.max_new_tokens, self._args.temperature)
            pieces = asker.answer(question, tuned, turns[name], *limits)
            # A page that is closed or cleared ends the generation that it waits for.
            with contextlib.closing(pieces):
                for piece in pieces:
                    said[name] += piece
                    yield dict(said)

    def _load(self, folder: Path) -> ChatModel:
        """Return the model with an adapter; a running run may have written it anew."""
        subject = find_model(str(folder), self._home)
        if self._args.quantization is not None:
            subject.quantization = self._args.quantization
        if self._asker is None or self._asker.subject != subject:
            self._asker = None
            # PEFT's modules know each other, so that only a collection frees the old.
            gc.collect()
            self._asker = ChatModel(subject)
        return self._asker


def _serve(args: argparse.Namespace) -> None:
    """Show the page until the command is interrupted.

    Raises:
        ConfigError: The port is taken.
    """
    # Gradio counts its users unless it is told not to, before it is imported.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    # It asks its own page for a sign of life, and no proxy may stand between.
    direct = os.environ.get("no_proxy") or os.environ.get("NO_PROXY")
    os.environ["no_proxy"] = ",".join(filter(None, [direct, _HOST]))
    import gradio as gr

    page = _page(args, fedllm_home())
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
            css=_CSS,
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


def _page(args: argparse.Namespace, home: Path) -> Any:
    """Lay out the page and say what each part does."""
    import gradio as gr

    does = _Handlers(args, home)
    with gr.Blocks(title="fedllm", analytics_enabled=False) as page:
        gr.Markdown("# Base and tuned, side by side")
        with gr.Row():
            run = gr.Dropdown(label="Run", interactive=True, scale=3, min_width=300)
            adapter = gr.Dropdown(label="Adapter", interactive=True)
        statement = gr.HTML()
        with gr.Row(equal_height=True):
            chats = [
                gr.Chatbot(
                    label=name,
                    height=None,
                    min_height=150,
                    max_height=420,
                    min_width=300,
                    render_markdown=False,
                    feedback_options=None,
                    buttons=[],
                )
                for name in _NAMES
            ]
        question = gr.Textbox(label="Question to both", autofocus=True, max_lines=6)
        with gr.Row():
            ask, clear = gr.Button("Ask", variant="primary"), gr.Button("Clear")
        status = gr.HTML(elem_id="status")
        turns = gr.State(does.no_turns())
    said = [*chats, turns, status]
    with page:
        asked = gr.on(
            [question.submit, ask.click],
            does.ask,
            [run, adapter, question, turns],
            [question, *said],
            show_progress="hidden",
            api_visibility="private",
        )
        quietly = {"show_progress": "hidden", "api_visibility": "private"}
        page.load(does.open, None, [run, adapter, statement, status], **quietly)
        anew = {"cancels": [asked], **quietly}
        run.input(does.choose_run, run, [adapter, statement, *said], **anew)
        adapter.input(does.clear, None, said, **anew)
        # A conversation has a button of its own: what is forgotten, both forget.
        forget = [clear.click, *(chat.clear for chat in chats)]
        gr.on(forget, does.clear, None, said, **anew)
    return page


class _Handlers:
    """What the page's parts do; an error becomes a line on the page, which goes on."""

    def __init__(self, args: argparse.Namespace, home: Path) -> None:
        self._home = home
        self._resident = Resident(args, home)

    @staticmethod
    def no_turns() -> dict[str, list[Turn]]:
        return {name: [] for name in _NAMES}

    def open(self) -> tuple[Any, ...]:
        """Offer the runs that there are now, the newest chosen."""
        import gradio as gr

        choices = run_choices(self._home)
        newest = choices[0][1] if choices else None
        adapter, statement, *_, status = self.choose_run(newest)
        return gr.Dropdown(choices, value=newest), adapter, statement, status

    def choose_run(self, run: str | None) -> tuple[Any, ...]:
        """Show a run's statement and its adapters, and forget what was said."""
        import gradio as gr

        statement, status, names, chosen = "", "", [], None
        try:
            folder = self._home / "runs" / str(run)
            names, chosen = adapter_names(folder), first_choice(folder)
            self._folder(run, chosen)
            statement = about(folder)
        except Exception as error:  # noqa: BLE001 - the page goes on
            status = _told(error)
        *empty, _ = self.clear()
        return gr.Dropdown(names, value=chosen), statement, *empty, status

    def clear(self) -> tuple[Any, ...]:
        """Forget what was said."""
        return [], [], self.no_turns(), ""

    def ask(
        self,
        run: str | None,
        adapter: str | None,
        question: str,
        turns: dict[str, list[Turn]],
    ) -> Iterator[tuple[Any, ...]]:
        """Yield the box, both conversations, the turns and the status, as they grow."""
        question = question.strip()
        shown = [_messages(turns[name]) for name in _NAMES]
        if not question:
            yield "", *shown, turns, ""
            return
        yield question, *shown, turns, "A model that is not in memory is loaded first."
        try:
            folder = self._folder(run, adapter)
            later = turns
            for said in self._resident.answers(folder, question, turns):
                later = {n: [*turns[n], (question, said[n])] for n in _NAMES}
                yield "", *(_messages(later[n]) for n in _NAMES), turns, ""
            yield "", *(_messages(later[n]) for n in _NAMES), later, ""
        except Exception as error:  # noqa: BLE001 - the page goes on
            yield question, *shown, turns, _told(error)

    def _folder(self, run: str | None, adapter: str | None) -> Path:
        """Return the folder of an adapter that is on offer.

        Raises:
            AdapterError: It is not on offer: the browser may send any text.
        """
        folder = self._home / "runs" / str(run)
        offered = run in [name for _, name in run_choices(self._home)]
        if not offered or adapter not in adapter_names(folder):
            raise AdapterError(f"{run}: has no {adapter} any more; reload the page")
        return folder / str(adapter)


def _messages(turns: list[Turn]) -> list[dict[str, str]]:
    """Return a conversation as Gradio wants it.

    It would take tags for HTML, and a picture in an answer would be asked of its server.
    """
    roles = ("user", "assistant")
    return [
        {"role": role, "content": html.escape(text, quote=False)}
        for turn in turns
        for role, text in zip(roles, turn, strict=True)
    ]


def _told(error: Exception) -> str:
    """Return an error as a line of the page; the terminal has what is not foreseen."""
    if not isinstance(error, FedllmError):
        logger.error("unforeseen, the page goes on", exc_info=error)
    return html.escape(f"{type(error).__name__}: {error}")


def _port(text: str) -> int:
    """Read a port; argparse shows the error."""
    value = int(text)
    if not 1 <= value <= 65535:
        raise argparse.ArgumentTypeError(f"must be 1 to 65535 (got {text})")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--port", type=_port, default=7860, metavar="N")
    parser.add_argument(
        "--no-browser", action="store_true", help="only say where the page is"
    )
    parser.add_argument("--max-new-tokens", type=positive_int, default=96, metavar="N")
    parser.add_argument(
        "--temperature",
        type=temperature,
        default=0.0,
        help="0.0: always the likeliest token",
    )
    parser.add_argument(
        "--quantization",
        type=int,
        choices=(0, 4, 8),
        help="bits of the base; default: as in training",
    )
    return parser


if __name__ == "__main__":
    main()
