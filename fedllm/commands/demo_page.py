"""The page of `fedllm demo`: what it shows, and what each part of it does.

What is shown and rejected is in functions that know nothing of Gradio, so that they are
tested where it is not installed.
"""

import contextlib
import gc
import html as standard
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedllm.errors import AdapterError, FedllmError
from fedllm.evaluation.inference import ChatModel, Turn, find_model
from fedllm.reporting.markup import Html, html, join
from fedllm.reporting.sentences import caution, verdict
from fedllm.runs.listing import adapter_names, recommended_adapter, run_choices
from fedllm.runs.record import read_run

logger = logging.getLogger(__name__)

NAMES = ("base", "tuned")

CSS = """
.gradio-container { max-width: 68rem !important; margin: 0 auto !important; }
.statement { border-left: .3rem solid #0072b2; padding: .1rem 0 .1rem 1rem; }
.statement p, .statement li { margin: .4rem 0; }
.statement .privacy { font-size: clamp(1rem, 2.5vw, 1.1rem); line-height: 1.5; }
.statement summary { cursor: pointer; }
input[role=combobox] { text-overflow: ellipsis; padding-right: 1.8rem !important; }
"""


@dataclass(frozen=True)
class AnswerOptions:
    """How the models answer.

    Attributes:
        max_new_tokens: Length of an answer at most.
        temperature: 0.0 is always the likeliest token.
        quantization: Bits of the base; None: as in training.
    """

    max_new_tokens: int
    temperature: float
    quantization: int | None


def about(folder: Path) -> Html:
    """Return a run's privacy statement, verdict and caution as HTML.

    Raises:
        FedllmError: The run is damaged.
    """
    run = read_run(folder)
    statement = run.privacy.get("statement") or "This run has no privacy statement."
    parts = [html('<p class="privacy">{}</p>', statement)]
    if run.privacy.get("not_covered"):
        items = join(html("<li>{}</li>", x) for x in run.privacy["not_covered"])
        parts.append(
            html(
                "<details><summary>Not covered by it (not_covered)</summary>"
                "<ul>{}</ul></details>",
                items,
            )
        )
    if run.result is not None:
        parts.append(html("<p>{}</p>", verdict(run.result)))
    parts.append(html("<p><strong>{}</strong></p>", caution(run.settings)))
    return html('<div class="statement">{}</div>', join(parts))


class Resident:
    """The one model in memory; another adapter takes its place.

    Args:
        options: How the models answer.
        home: Where runs lie.
    """

    def __init__(self, options: AnswerOptions, home: Path) -> None:
        self._options = options
        self._home = home
        self._chat: ChatModel | None = None

    def answers(
        self, folder: Path, question: str, turns: Mapping[str, list[Turn]]
    ) -> Iterator[dict[str, str]]:
        """Yield both answers as they grow, the base's first.

        Args:
            folder: The adapter.
            question: The question to both.
            turns: Each model's conversation so far.

        Raises:
            FedllmError: The adapter or its base cannot be used.
        """
        chat = self._load(folder)
        answers = dict.fromkeys(NAMES, "")
        limits = (self._options.max_new_tokens, self._options.temperature)
        for name in chat.variants():
            pieces = chat.answer(question, name, turns[name], *limits)
            # A page that is closed or cleared ends the generation that it waits for.
            with contextlib.closing(pieces):
                for piece in pieces:
                    answers[name] += piece
                    yield dict(answers)

    def _load(self, folder: Path) -> ChatModel:
        """Return the model with an adapter; a running run may have written it anew."""
        choice = find_model(str(folder), self._home)
        if self._options.quantization is not None:
            choice.quantization = self._options.quantization
        if self._chat is None or self._chat.choice != choice:
            self._chat = None
            # PEFT's modules refer to each other, so only a collection frees the old ones.
            gc.collect()
            self._chat = ChatModel(choice)
        return self._chat


def make_page(options: AnswerOptions, home: Path) -> Any:
    """Return the Gradio page, laid out and with its handlers."""
    import gradio as gr

    handlers = Handlers(options, home)
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
                for name in NAMES
            ]
        question = gr.Textbox(label="Question to both", autofocus=True, max_lines=6)
        with gr.Row():
            ask, clear = gr.Button("Ask", variant="primary"), gr.Button("Clear")
        status = gr.HTML(elem_id="status")
        turns = gr.State(handlers.no_turns())
    conversation = [*chats, turns, status]
    with page:
        answering = gr.on(
            [question.submit, ask.click],
            handlers.ask,
            [run, adapter, question, turns],
            [question, *conversation],
            show_progress="hidden",
            api_visibility="private",
        )
        quietly = {"show_progress": "hidden", "api_visibility": "private"}
        page.load(handlers.open, None, [run, adapter, statement, status], **quietly)
        anew = {"cancels": [answering], **quietly}
        run.input(handlers.choose_run, run, [adapter, statement, *conversation], **anew)
        adapter.input(handlers.clear, None, conversation, **anew)
        # Each conversation has a button of its own, which clears both.
        forget = [clear.click, *(chat.clear for chat in chats)]
        gr.on(forget, handlers.clear, None, conversation, **anew)
    return page


class Handlers:
    """The handlers of the page's parts; an error becomes a line on the page."""

    def __init__(self, options: AnswerOptions, home: Path) -> None:
        self._home = home
        self._resident = Resident(options, home)

    @staticmethod
    def no_turns() -> dict[str, list[Turn]]:
        """Return two conversations without a turn."""
        return {name: [] for name in NAMES}

    def open(self) -> tuple[Any, ...]:
        """Return the runs that there are now, the newest chosen."""
        import gradio as gr

        choices = run_choices(self._home)
        newest = choices[0][1] if choices else None
        adapter, statement, *_, status = self.choose_run(newest)
        return gr.Dropdown(choices, value=newest), adapter, statement, status

    def choose_run(self, run: str | None) -> tuple[Any, ...]:
        """Return a run's statement and adapters, with empty conversations."""
        import gradio as gr

        statement, status, names, chosen = "", "", [], None
        try:
            folder = self._home / "runs" / str(run)
            names, chosen = adapter_names(folder), recommended_adapter(folder)
            self._folder(run, chosen)
            statement = about(folder)
        except Exception as error:  # noqa: BLE001 - the page goes on
            status = _error_line(error)
        *empty, _ = self.clear()
        return gr.Dropdown(names, value=chosen), statement, *empty, status

    def clear(self) -> tuple[Any, ...]:
        """Return empty conversations."""
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
        shown = [_messages(turns[name]) for name in NAMES]
        if not question:
            yield "", *shown, turns, ""
            return
        yield question, *shown, turns, "A model that is not in memory is loaded first."
        try:
            folder = self._folder(run, adapter)
            later = turns
            for answers in self._resident.answers(folder, question, turns):
                later = {n: [*turns[n], (question, answers[n])] for n in NAMES}
                yield "", *(_messages(later[n]) for n in NAMES), turns, ""
            yield "", *(_messages(later[n]) for n in NAMES), later, ""
        except Exception as error:  # noqa: BLE001 - the page goes on
            yield question, *shown, turns, _error_line(error)

    def _folder(self, run: str | None, adapter: str | None) -> Path:
        """Return the folder of an adapter that the page offers.

        Raises:
            AdapterError: The page does not offer it: a browser may send any text.
        """
        folder = self._home / "runs" / str(run)
        offered = run in [name for _, name in run_choices(self._home)]
        if not offered or adapter not in adapter_names(folder):
            raise AdapterError(f"{run}: has no {adapter} any more; reload the page")
        return folder / str(adapter)


def _messages(turns: list[Turn]) -> list[dict[str, str]]:
    """Return a conversation as Gradio takes it, escaped.

    Gradio renders tags as HTML, and would fetch a picture that an answer names.
    """
    roles = ("user", "assistant")
    return [
        {"role": role, "content": standard.escape(text, quote=False)}
        for turn in turns
        for role, text in zip(roles, turn, strict=True)
    ]


def _error_line(error: Exception) -> Html:
    """Return an error as a line of the page; log the traceback of an unforeseen one."""
    if not isinstance(error, FedllmError):
        logger.error("unforeseen, the page goes on", exc_info=error)
    return html("{}: {}", type(error).__name__, error)
