"""Prompt and measure an adapter: of any run of ours, or plain PEFT's."""

import argparse
import json
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fedllm.commands.options import positive_int, temperature
from fedllm.config import DataConfig, RunConfig, fedllm_home
from fedllm.errors import DataError, FedllmError
from fedllm.evaluation.inference import ChatModel, Turn, find_model
from fedllm.reporting.sentences import NOT_ADVICE


def main(arguments: list[str] | None = None) -> None:
    """Run the command; an error is one line and exit status 1."""
    parser = _parser()
    args = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    measured = args.benchmark or args.held_out or args.off_topic or args.open
    if not (args.question or args.interactive or measured):
        parser.error(
            "say what to do: --question, --interactive, --benchmark, --held-out, "
            "--off-topic, --open"
        )
    if args.json and args.interactive:
        parser.error("--interactive is a conversation: it has no --json")
    if args.float32 and args.quantization:
        parser.error("--float32 is for an unquantised base: it has no --quantization")
    try:
        _run(args)
    except FedllmError as error:
        sys.exit(f"{type(error).__name__}: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


def _run(args: argparse.Namespace) -> None:
    subject = find_model(args.peft_path, fedllm_home())
    if args.quantization is not None:
        subject.quantization = args.quantization
    if args.float32:
        subject.quantization, subject.in_float32 = 0, True
    report: dict[str, Any] = {"answers_for": subject.described}
    _say(args, subject.described)
    asker = ChatModel(subject)
    if args.held_out:
        report["held_out"] = _held_out(args, asker)
    if args.benchmark:
        report["benchmark"] = _benchmark(args, asker, Path(args.benchmark))
    if args.off_topic:
        report["off_topic"] = _off_topic(args, asker)
    if args.open:
        report["open"] = _open(args, asker, Path(args.open))
    if args.question:
        report["question"] = args.question
        report["answers"] = _answer(args, asker, args.question)
        report["note"] = NOT_ADVICE
        _say(args, NOT_ADVICE)
    if args.json:
        sys.stdout.write(json.dumps(report, indent=2) + "\n")
    if args.interactive:
        _interact(args, asker)


def _names(args: argparse.Namespace, asker: ChatModel) -> list[tuple[str, bool]]:
    """Return which models are asked: (name, with the adapter)."""
    return asker.both() if args.base else asker.both()[-1:]


def _answer(
    args: argparse.Namespace,
    asker: ChatModel,
    question: str,
    histories: Mapping[str, Sequence[Turn]] | None = None,
) -> dict[str, str]:
    """Stream the answers of each model, each after its own history."""
    answers = {}
    histories = histories or {}
    for name, tuned in _names(args, asker):
        _say(args, f"\n{name}: ", end="")
        pieces = []
        for piece in asker.answer(
            question,
            tuned,
            histories.get(name, ()),
            args.max_new_tokens,
            args.temperature,
        ):
            _say(args, piece, end="")
            pieces.append(piece)
        _say(args, "")
        answers[name] = "".join(pieces).strip()
    _say(args, "")
    return answers


def _held_out(args: argparse.Namespace, asker: ChatModel) -> dict[str, Any]:
    """Measure loss and perplexity on the run's public test rows."""
    from fedllm.data.rows import load_public
    from fedllm.data.tokens import tokenize

    config = asker.subject.config
    data = config.data if config else DataConfig()
    length = config.train.max_length if config else RunConfig().train.max_length
    rows = load_public(data, "test")
    if rows is None:
        raise DataError(
            "--held-out: this run has no public test rows (data.public-test)"
        )
    examples = tokenize(rows, asker.tokenizer, data, length).examples
    return _losses(args, asker, examples, "test rows", _names(args, asker))


def _off_topic(args: argparse.Namespace, asker: ChatModel) -> dict[str, Any]:
    """Measure the loss of base and tuned model on general knowledge: forgetting shows."""
    from datasets import Dataset

    from fedllm.data.tokens import tokenize
    from fedllm.evaluation.open_answers import off_topic_rows

    data = DataConfig(prompt_column="question", response_column="answer")
    length = RunConfig().train.max_length
    rows = Dataset.from_list(off_topic_rows())
    examples = tokenize(rows, asker.tokenizer, data, length).examples
    return _losses(args, asker, examples, "off-topic questions", asker.both())


def _losses(
    args: argparse.Namespace,
    asker: ChatModel,
    examples: Sequence[Mapping[str, Any]],
    what: str,
    names: Sequence[tuple[str, bool]],
) -> dict[str, Any]:
    """Measure the loss of models on labelled examples.

    Args:
        args: The command line.
        asker: The models.
        examples: Rows with `input_ids` and `labels`.
        what: What the rows are, in a sentence.
        names: Which models: (name, with the adapter).
    """
    from fedllm.evaluation.held_out_loss import held_out

    scores = {}
    for name, tuned in names:
        with asker.adapter(tuned):
            score = held_out(asker.model, examples, asker.tokenizer.pad_token_id or 0)
        scores[name] = {
            "loss": score.loss,
            "perplexity": score.perplexity,
            "num_examples": score.num_examples,
            "num_tokens": score.num_tokens,
        }
        _say(
            args,
            f"{name}: loss {score.loss:.3f}, perplexity {score.perplexity:.2f} on "
            f"{score.num_examples} {what} ({score.num_tokens} answer tokens)",
        )
    return scores


def _benchmark(
    args: argparse.Namespace, asker: ChatModel, path: Path
) -> dict[str, Any]:
    """Score multiple choice."""
    from fedllm.evaluation.multiple_choice import load_questions, multiple_choice

    questions = load_questions(path)
    scores = {}
    for name, tuned in _names(args, asker):
        with asker.adapter(tuned):
            score = multiple_choice(
                asker.model, asker.tokenizer, questions, asker.prompt
            )
        low, high = score.interval
        scores[name] = {
            "accuracy": score.accuracy,
            "accuracy_per_byte": score.accuracy_per_byte,
            "num_questions": score.num_questions,
            "chance": score.chance,
            "interval_95": [low, high],
        }
        _say(
            args,
            f"{name}: accuracy {score.accuracy:.3f} (95 % interval {low:.3f} to "
            f"{high:.3f}) on {score.num_questions} questions; chance {score.chance:.3f}; "
            f"by byte instead of by token {score.accuracy_per_byte:.3f}",
        )
    return scores


def _open(args: argparse.Namespace, asker: ChatModel, path: Path) -> dict[str, Any]:
    """Let the models answer open questions, and hold that against the references."""
    from fedllm.evaluation.open_answers import load_open_questions, score_answers

    rows = load_open_questions(path)
    scores = {}
    for name, tuned in _names(args, asker):
        told = (args.max_new_tokens, args.temperature)
        answers = ["".join(asker.answer(r["question"], tuned, (), *told)) for r in rows]
        score = score_answers(answers, [row["answer"] for row in rows])
        scores[name] = asdict(score)
        _say(
            args,
            f"{name}: exact match {score.exact_match:.3f}, ROUGE-L {score.rouge_l:.3f} "
            f"on {score.num_questions} open questions",
        )
    return scores


def _interact(args: argparse.Namespace, asker: ChatModel) -> None:
    """Answer questions until the input ends; each model remembers its own answers."""
    _say(args, f"{NOT_ADVICE} An empty line ends, /new forgets what was said.")
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
        for name, answer in _answer(args, asker, question, histories).items():
            histories.setdefault(name, []).append((question, answer))


def _say(args: argparse.Namespace, text: str, end: str = "\n") -> None:
    """Write to the screen, unless JSON is asked for."""
    if not args.json:
        sys.stdout.write(text + end)
        sys.stdout.flush()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--peft-path",
        metavar="DIR",
        help="adapter folder; default: what the latest run recommends",
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
    parser.add_argument("--json", action="store_true", help="write one JSON object")
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
        help="bits of the base; default: as in training, 4 for plain PEFT",
    )
    parser.add_argument(
        "--float32",
        action="store_true",
        help="unquantised and in float32, for numbers beside another program's",
    )
    return parser


if __name__ == "__main__":
    main()
