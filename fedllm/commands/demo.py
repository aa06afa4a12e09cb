"""Ask the base and a tuned model side by side, on a page that only this machine sees.

python -m fedllm.commands.demo
"""

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fedllm.asking import Asker, Turn, find_subject
from fedllm.config import fedllm_home
from fedllm.errors import AdapterError, ConfigError, FedllmError
from fedllm.reporting.record import read_run
from fedllm.reporting.verdict import NOT_ADVICE, SMALL_MODEL, verdict

_NAMES = {"peft_best": "the best round", "peft_final": "the last round"}

Histories = dict[str, list[Turn]]
"""What each model was asked and said, the oldest turn first."""


def main(arguments: list[str] | None = None) -> None:
    """Run the command until it is interrupted; an error is one line and exit status 1."""
    args = _parser().parse_args(arguments)
    try:
        page(fedllm_home() / "runs", args.max_new_tokens).launch(
            server_name="127.0.0.1",
            server_port=args.port,
            share=False,
            footer_links=["settings"],
            run_history=False,
            inbrowser=not args.no_browser,
        )
    except FedllmError as error:
        sys.exit(f"{type(error).__name__}: {error}")
    except OSError as error:
        sys.exit(f"--port {args.port}: {error}; name another")


class Answering:
    """The models of one adapter at a time, loaded when they are first asked."""

    def __init__(self, max_new_tokens: int) -> None:
        self._max_new_tokens = max_new_tokens
        self._asker: Asker | None = None

    def ask(
        self, folder: Path, question: str, histories: Histories
    ) -> Iterator[Histories]:
        """Yield what was said so far, as the base and then the tuned model answer.

        Args:
            folder: The adapter.
            question: What both are asked.
            histories: What was said before; not changed.

        Raises:
            FedllmError: The adapter or its base cannot be loaded.
        """
        asker = self._of(folder)
        said = {name: list(histories.get(name, ())) for name, _ in asker.both()}
        for name, tuned in asker.both():
            before, answer = said[name], ""
            for piece in asker.answer(question, tuned, before, self._max_new_tokens):
                answer += piece
                said = said | {name: [*before, (question, answer.strip())]}
                yield said

    def _of(self, folder: Path) -> Asker:
        """Return who answers for an adapter; the one before leaves memory first."""
        if self._asker is None or self._asker.subject.folder != folder:
            self._asker = None
            self._asker = Asker(find_subject(str(folder), fedllm_home()))
        return self._asker


def runs_with_adapters(runs: Path) -> list[Path]:
    """Return the folders of the runs that have an adapter, newest first.

    Raises:
        AdapterError: There is none.
    """
    # A name begins with its time.
    found = sorted(runs.glob("*"), key=lambda run: run.name, reverse=True)
    kept = [run for run in found if not run.is_symlink() and adapters(run)]
    if not kept:
        raise AdapterError(
            f"{runs}: no run with an adapter: start one (see the README)"
        )
    return kept


def adapters(run: Path) -> list[tuple[str, Path]]:
    """Return a run's adapters and what to call them: best, last, then by round."""
    named = [(text, run / name) for name, text in _NAMES.items()]
    rounds = [
        (int(number), folder)
        for folder in run.glob("peft_*")
        if (number := folder.name.removeprefix("peft_")).isdigit()
    ]
    numbered = [(f"round {number}", folder) for number, folder in sorted(rounds)]
    return [(text, folder) for text, folder in named + numbered if folder.is_dir()]


def told_of(run: Path) -> str:
    """Return what was promised and reached in a run, in Markdown; of a damaged one, why."""
    try:
        record = read_run(run)
        statement = str(record.privacy["statement"])
    except (FedllmError, KeyError) as error:
        return f"**This run's folder is damaged:** {error}"
    worth = verdict(record.result) if record.result else f"The run is {record.state}."
    return f"**Privacy.** {statement}\n\n**Worth.** {worth}"


def page(runs: Path, max_new_tokens: int) -> Any:
    """Return the page, not yet served.

    Args:
        runs: The folder of all runs.
        max_new_tokens: Where an answer is cut at the latest.

    Raises:
        ConfigError: Gradio is not installed.
        AdapterError: No run has an adapter.
    """
    found, answering = runs_with_adapters(runs), Answering(max_new_tokens)
    choices = [(run.name, str(run)) for run in found]
    # Before it is imported, which would ask for its newest version.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio as gr
    except ImportError:
        raise ConfigError(
            "the page needs Gradio: pip install -e '.[demo]' in fedllm's folder; "
            "`python evaluate.py --interactive --base` needs nothing more"
        ) from None

    def chosen(run: str) -> tuple[Any, ...]:
        folders = [(text, str(folder)) for text, folder in adapters(Path(run))]
        rounds = gr.Dropdown(choices=folders, value=folders[0][1])
        return rounds, told_of(Path(run)), *forgotten()

    def forgotten() -> tuple[Any, ...]:
        return {}, [], []

    def asked(question: str, folder: str, histories: Histories) -> Iterator[Any]:
        question = question.strip()
        if not question:
            yield question, histories, _chat(histories, "base"), _chat(
                histories, "tuned"
            )
            return
        try:
            for said in answering.ask(Path(folder), question, histories):
                yield "", said, _chat(said, "base"), _chat(said, "tuned")
        except FedllmError as error:
            raise gr.Error(str(error), duration=None) from None

    with gr.Blocks(title="fedllm", analytics_enabled=False) as blocks:
        gr.Markdown("# fedllm: base and tuned model")
        with gr.Row():
            run = gr.Dropdown(choices, value=choices[0][1], label="Run")
            folder = gr.Dropdown(label="Adapter")
        statement = gr.Markdown()
        with gr.Row():
            # Its own buttons would send a conversation to a hub, or forget one half.
            plain = {"height": 360, "buttons": ["copy"], "render_markdown": False}
            base = gr.Chatbot(label="Base model", **plain)
            tuned = gr.Chatbot(label="Tuned model", **plain)
        question = gr.Textbox(label="Question", autofocus=True)
        with gr.Row():
            ask, clear = gr.Button("Ask", variant="primary"), gr.Button("Forget all")
        gr.Markdown(f"{SMALL_MODEL} {NOT_ADVICE}")
        histories = gr.State({})
        said = [histories, base, tuned]
        gr.on([blocks.load, run.change], chosen, run, [folder, statement, *said])
        folder.input(forgotten, None, said)
        clear.click(forgotten, None, said)
        gr.on(
            [ask.click, question.submit],
            asked,
            [question, folder, histories],
            [question, *said],
        )
    # One model is in memory, and one question is answered at a time.
    return blocks.queue(default_concurrency_limit=1)


def _chat(histories: Histories, name: str) -> list[dict[str, str]]:
    """Return a conversation as the page shows it."""
    turns: Sequence[Turn] = histories.get(name, [])
    return [
        {"role": role, "content": text}
        for question, answer in turns
        for role, text in (("user", question), ("assistant", answer))
    ]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--port", type=int, default=7860)
    parser.add_argument("--max-new-tokens", type=int, default=96, metavar="N")
    parser.add_argument(
        "--no-browser", action="store_true", help="only say where the page is"
    )
    return parser


if __name__ == "__main__":
    main()
