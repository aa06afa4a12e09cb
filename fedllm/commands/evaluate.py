"""Ask a tuned model, or measure it: with the adapter of a run, or one of plain PEFT.

fedllm evaluate --question "What is asthma?" --base
fedllm evaluate --held-out --json
fedllm evaluate --personal --question "What is asthma?"

`--personal` is for a node: base, shared and personal answer side by side, and it names the one
that the node's own held-out rows chose (fedllm node personal).
"""

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedllm.commands.options import (
    add_answers,
    add_fetch_base,
    add_json,
    log_to_stderr,
    main_of,
    new_parser,
    write_json,
)
from fedllm.config import DataConfig, RunConfig, TrainConfig, fedllm_home
from fedllm.errors import DataError
from fedllm.evaluation.inference import (
    BASE,
    CandidatesChat,
    ChatModel,
    ModelChoice,
    Turn,
    find_model,
)
from fedllm.reporting.sentences import NOT_ADVICE

if TYPE_CHECKING:
    from fedllm.evaluation.held_out_loss import HeldOut


def run(args: argparse.Namespace) -> int:
    """Measure and ask what the options name."""
    _check(args)
    log_to_stderr()
    report: dict[str, Any] = {}
    chat = _personal(args, report) if args.personal is not None else _chat(args)
    report["answers_for"] = chat.choice.described
    _print(args, chat.choice.described)
    if args.held_out:
        report["held_out"] = _held_out(args, chat)
    if args.benchmark:
        report["benchmark"] = _benchmark(args, chat, Path(args.benchmark))
    if args.off_topic:
        report["off_topic"] = _off_topic(args, chat)
    if args.open:
        report["open"] = _open(args, chat, Path(args.open))
    if args.question:
        report["question"] = args.question
        report["answers"] = _answer(args, chat, args.question)
        report["note"] = NOT_ADVICE
        _print(args, NOT_ADVICE)
    if args.json:
        write_json(report)
    if args.interactive:
        _interact(args, chat)
    return 0


def _chat(args: argparse.Namespace) -> ChatModel:
    """Return the model of an adapter folder or of the latest run.

    Raises:
        ModelError: The adapter's base is not on this machine, and may not be fetched.
    """
    from fedllm.models.location import require_at_hand

    choice = find_model(args.peft_path, fedllm_home())
    if args.peft_path and not args.fetch_base:
        require_at_hand(choice.base_name, str(choice.folder))
    if args.quantization is not None:
        choice.quantization = args.quantization
    if args.float32:
        choice.quantization, choice.in_float32 = 0, True
    return ChatModel(choice)


def _personal(args: argparse.Namespace, report: dict[str, Any]) -> ChatModel:
    """Return base, shared and personal of this node, and report the choice among them.

    Raises:
        NodeError: There is no personal adapter here.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from fedllm.client.personal import candidates, latest_choice

    delivery, choice = latest_choice(args.personal)
    adapted, arrays = candidates(delivery)
    report |= {"chosen": choice.choice, "losses": choice.losses, "rows": choice.rows}
    described = f"answers: {delivery.config.model.name}; {choice}"
    config = delivery.config
    model = ModelChoice(
        choice.folder, config.model.name, config.model.quantization, described, config
    )
    return CandidatesChat(model, adapted, arrays)


def _check(args: argparse.Namespace) -> None:
    """Check that the options name something to do and fit together.

    Raises:
        argparse.ArgumentError: They do not.
    """
    measures = args.benchmark or args.held_out or args.off_topic or args.open
    problem = None
    if not (args.question or args.interactive or measures):
        problem = (
            "name what to do: --question, --interactive, --benchmark, --held-out, "
            "--off-topic, --open"
        )
    elif args.json and args.interactive:
        problem = "--interactive is a conversation: it has no --json"
    elif args.personal is not None and (
        args.peft_path or args.float32 or args.quantization is not None
    ):
        problem = (
            "--personal is of a run and its base: it has no --peft-path, --quantization "
            "or --float32"
        )
    elif args.float32 and args.quantization:
        problem = "--float32 is for an unquantised base: it has no --quantization"
    if problem:
        raise argparse.ArgumentError(None, problem)


def _names(args: argparse.Namespace, chat: ChatModel) -> list[str]:
    """Return the names of the models to ask."""
    is_all = args.base or args.personal is not None
    return chat.variants() if is_all else chat.variants()[-1:]


def _answer(
    args: argparse.Namespace,
    chat: ChatModel,
    question: str,
    histories: Mapping[str, Sequence[Turn]] | None = None,
) -> dict[str, str]:
    """Stream the answers of each model, each after its own history."""
    answers = {}
    histories = histories or {}
    for name in _names(args, chat):
        _print(args, f"\n{name}: ", end="")
        pieces = []
        for piece in chat.answer(
            question,
            name,
            histories.get(name, ()),
            args.max_new_tokens,
            args.temperature,
        ):
            _print(args, piece, end="")
            pieces.append(piece)
        _print(args, "")
        answers[name] = "".join(pieces).strip()
    _print(args, "")
    return answers


def _held_out(args: argparse.Namespace, chat: ChatModel) -> dict[str, Any]:
    """Measure loss and perplexity on the run's public test rows."""
    from fedllm.data.rows import load_public
    from fedllm.data.tokens import tokenize

    config = chat.choice.config
    data = config.data if config else DataConfig()
    train = config.train if config else RunConfig().train
    length = train.max_length
    rows = load_public(data, "test")
    if rows is None:
        raise DataError(
            "--held-out: this run has no public test rows (data.public-test)"
        )
    tokenized = tokenize(rows, chat.tokenizer, data, length, whole_texts=True)
    examples = tokenized.packed(length)
    if not examples:
        raise DataError("--held-out: nothing can be learned from the public test rows")
    return _losses(args, chat, examples, "test rows", _names(args, chat), train)


def _off_topic(args: argparse.Namespace, chat: ChatModel) -> dict[str, Any]:
    """Measure the loss of base and tuned model on general knowledge: what was forgotten."""
    from datasets import Dataset

    from fedllm.data.tokens import tokenize
    from fedllm.evaluation.open_answers import off_topic_rows

    data = DataConfig(prompt_column="question", response_column="answer")
    length = RunConfig().train.max_length
    rows = Dataset.from_list(off_topic_rows())
    examples = tokenize(rows, chat.tokenizer, data, length).examples
    return _losses(args, chat, examples, "off-topic questions", chat.variants())


def _losses(
    args: argparse.Namespace,
    chat: ChatModel,
    examples: Sequence[Mapping[str, Any]],
    what: str,
    names: Sequence[str],
    train: TrainConfig | None = None,
) -> dict[str, Any]:
    """Measure the loss of models on labelled examples.

    Args:
        args: The command line.
        chat: Base and tuned model.
        examples: Rows as tokens, as the objective takes them.
        what: What the rows are, in words.
        names: The models.
        train: Gives the objective; None: the answers' own loss.
    """
    from fedllm.evaluation.held_out_loss import held_out

    scores: dict[str, dict[str, float | None]] = {}
    for name in names:
        with chat.adapter(name):
            pad = chat.tokenizer.pad_token_id or 0
            score = held_out(chat.model, examples, pad, train)
        scores[name] = {
            "loss": score.loss,
            "perplexity": score.perplexity,
            "num_examples": score.num_examples,
            "num_tokens": score.num_tokens,
        }
        if score.preferred is not None:
            scores[name] |= {
                "perplexity": None,
                "pairs_preferred": score.preferred if name != BASE else None,
                "pairs_likelier": score.likelier,
            }
            _print(args, f"{name}: {_pairs_text(name, score)}")
            continue
        _print(
            args,
            f"{name}: loss {score.loss:.3f}, perplexity {score.perplexity:.2f} on "
            f"{score.num_examples} {what} ({score.num_tokens} answer tokens)",
        )
    return scores


def _pairs_text(name: str, score: "HeldOut") -> str:
    """Return the score on pairs in words; the base rewards no answer."""
    preferred = (
        "" if name == BASE else f"{score.preferred:.1%} are preferred as chosen; "
    )
    return (
        f"loss {score.loss:.3f} a pair on {score.num_examples} pairs; {preferred}the chosen "
        f"answer is the likelier one in {score.likelier:.1%}"
    )


def _benchmark(args: argparse.Namespace, chat: ChatModel, path: Path) -> dict[str, Any]:
    """Score multiple choice."""
    from fedllm.evaluation.multiple_choice import load_questions, multiple_choice

    questions = load_questions(path)
    scores = {}
    for name in _names(args, chat):
        with chat.adapter(name):
            score = multiple_choice(chat.model, chat.tokenizer, questions, chat.prompt)
        low, high = score.interval
        scores[name] = {
            "accuracy": score.accuracy,
            "accuracy_per_byte": score.accuracy_per_byte,
            "num_questions": score.num_questions,
            "chance": score.chance,
            "interval_95": [low, high],
        }
        _print(
            args,
            f"{name}: accuracy {score.accuracy:.3f} (95 % interval {low:.3f} to "
            f"{high:.3f}) on {score.num_questions} questions; chance {score.chance:.3f}; "
            f"by byte instead of by token {score.accuracy_per_byte:.3f}",
        )
    return scores


def _open(args: argparse.Namespace, chat: ChatModel, path: Path) -> dict[str, Any]:
    """Score the models' answers to open questions against the references."""
    from fedllm.evaluation.open_answers import load_open_questions, score_answers

    rows = load_open_questions(path)
    scores = {}
    for name in _names(args, chat):
        limits = (args.max_new_tokens, args.temperature)
        answers = [
            "".join(chat.answer(row["question"], name, (), *limits)) for row in rows
        ]
        score = score_answers(answers, [row["answer"] for row in rows])
        scores[name] = asdict(score)
        _print(
            args,
            f"{name}: exact match {score.exact_match:.3f}, ROUGE-L {score.rouge_l:.3f} "
            f"on {score.num_questions} open questions",
        )
    return scores


def _interact(args: argparse.Namespace, chat: ChatModel) -> None:
    """Answer questions until the input ends; each model remembers its own answers."""
    _print(args, f"{NOT_ADVICE} An empty line ends, /new forgets the conversation.")
    histories: dict[str, list[Turn]] = {}
    while True:
        try:
            question = input("> ").strip()
        except EOFError:
            return
        if not question:
            return
        if question == "/new":
            histories = {}
            continue
        for name, answer in _answer(args, chat, question, histories).items():
            histories.setdefault(name, []).append((question, answer))


def _print(args: argparse.Namespace, text: str, end: str = "\n") -> None:
    """Print at once, unless JSON is asked for."""
    if not args.json:
        sys.stdout.write(text + end)
        sys.stdout.flush()


def parser() -> argparse.ArgumentParser:
    """Return the command's parser."""
    parser = new_parser("evaluate", __doc__)
    parser.add_argument(
        "--peft-path",
        metavar="DIR",
        help="adapter folder; default: what the latest run recommends",
    )
    parser.add_argument(
        "--personal",
        nargs="?",
        const="",
        metavar="RUN",
        help="base, shared and personal of this node; default: of its newest run",
    )
    parser.add_argument("--question", metavar="TEXT", help="ask one question")
    parser.add_argument(
        "--base", action="store_true", help="let the untuned model answer beside it"
    )
    parser.add_argument(
        "--held-out", action="store_true", help="loss on the run's public test rows"
    )
    parser.add_argument(
        "--benchmark",
        metavar="FILE.jsonl",
        help="multiple choice: lines with question, options, answer (an index)",
    )
    parser.add_argument(
        "--open",
        metavar="FILE.jsonl",
        help="exact match and ROUGE-L: lines with question and answer",
    )
    parser.add_argument(
        "--off-topic",
        action="store_true",
        help="loss of base and tuned model on general knowledge",
    )
    parser.add_argument(
        "--interactive", action="store_true", help="ask again and again"
    )
    add_fetch_base(parser)
    add_json(parser)
    add_answers(parser, default_bits="as in training, 4 for plain PEFT")
    parser.add_argument(
        "--float32",
        action="store_true",
        help="unquantised and in float32, for numbers beside another program's",
    )
    return parser


main = main_of(parser, run)

if __name__ == "__main__":
    main()
