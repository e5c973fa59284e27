"""`trl eval`: a model, measured on a data set or on tasks of lm-eval."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trl.cli import CommandParser, UsageError, check_file, hide_library_notes, notices_aside, numbers
from trl.data.reading.names import check_path
from trl.evaluate.metrics import METRICS, check_metrics
from trl.models.names import check_model
from trl.options import COUNT, LIMITS, NUMBER_OF, WEIGHT, Limit

DESCRIPTION = """Measures a model, or an adapter on one, on a data set: exact match, pass@k, reward, win rate,
perplexity. Each number has a confidence interval: Wilson's for shares, else the bootstrap's over prompts or rows. The
same command gives the same numbers. --tasks runs tasks of lm-eval (pip install 'trl[lm-eval]')."""
EXAMPLES = """examples:
  trl eval --model_name_or_path out --dataset_name test.jsonl --metrics exact_match
  trl eval --model_name_or_path out --dataset_name test.jsonl --metrics pass@k --num_generations 8 --pass_at 1 4
  trl eval --model_name_or_path out --dataset_name test.jsonl --metrics reward --reward_funcs rewards.py:polite
  trl eval --model_name_or_path out --dataset_name pairs.jsonl --metrics win_rate --judge openai --against chosen
  trl eval --model_name_or_path out --dataset_name texts.jsonl --metrics perplexity --json
  trl eval --model_name_or_path out --tasks arc_easy hellaswag --limit 100"""
DTYPES = ("auto", "bfloat16", "float16", "float32")


def run(argv: Sequence[str], command: str) -> int:
    options = _parser(command).parse_args(argv)
    if not options.tasks and not options.dataset_name:
        raise UsageError("--dataset_name is missing: the rows to measure on; or --tasks of lm-eval.")
    if options.dataset_name and not options.metrics:
        raise UsageError(f"--metrics is missing: some of {', '.join(METRICS)}.")
    if options.dataset_name:
        given = (options.reward_funcs, options.judge, options.against, options.num_generations, options.pass_at)
        try:
            check_metrics(options.metrics, *given)
        except ValueError as error:
            raise UsageError(f"{error}.") from None
    if options.output:
        check_file(options.output)
        if not options.dataset_name:
            raise UsageError("--output holds the completions of --dataset_name, which is missing.")
    if options.dataset_name:
        check_path(options.dataset_name)
    check_model(options.model_name_or_path, options.model_revision)
    with notices_aside(options.json):
        estimates, settings = _measured(options)
    if options.json:
        named = {name: estimate.to_dict() for name, estimate in estimates.items()}
        print(json.dumps({"estimates": named, "settings": settings}, ensure_ascii=False))
    else:
        wide = max(map(len, estimates))
        print("\n".join(f"{name:<{wide}}  {estimate.line()}" for name, estimate in estimates.items()))
        if options.output and options.dataset_name:
            print(f"{options.output} holds the completions")
    return 0


def _measured(options: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """The estimates by name, and how they were made."""
    hide_library_notes()
    import datasets
    from transformers.utils import logging

    datasets.disable_progress_bars()
    logging.disable_progress_bar()
    # What can be wrong is looked at before the model is loaded, which takes longer.
    _check_names(options)
    if options.tasks:
        from trl.evaluate.harness import evaluate_tasks, require_lm_eval

        require_lm_eval(options.tasks)
    if options.dataset_name:
        from trl.data.reading.sources import load

        split = options.split or ("train" if Path(options.dataset_name).is_file() else "test")  # a file has one split
        rows = load(options.dataset_name, split, options.dataset_config)
        rows = rows.select(range(min(options.limit or len(rows), len(rows))))
    model, tokenizer = _opened(options)
    estimates: dict[str, Any] = {}
    settings: dict[str, Any] = {"model": options.model_name_or_path, "dataset": options.dataset_name}
    if options.dataset_name:
        found = _on_rows(model, tokenizer, rows, options)
        estimates, settings = dict(found.estimates), {**settings, **found.settings}
        if options.output:
            with open(options.output, "x", encoding="utf-8") as file:
                file.writelines(json.dumps(sample, ensure_ascii=False) + "\n" for sample in found.samples)
    if options.tasks:
        estimates |= evaluate_tasks(
            model, tokenizer, options.tasks, num_fewshot=options.num_fewshot, limit=options.limit, seed=options.seed
        )
    return estimates, settings


def _parser(command: str) -> argparse.ArgumentParser:
    parser = CommandParser(f"trl {command}", DESCRIPTION, EXAMPLES)
    add = parser.add_argument
    add(
        "--model_name_or_path", required=True, metavar="NAME", help="model: a folder or a name; an adapter's folder too"
    )
    add("--model_revision", metavar="NAME", help="branch, tag or commit of a model on the Hub")
    add("--dtype", default="auto", choices=DTYPES, help="dtype of the weights; auto: the checkpoint's [auto]")
    add("--load_in_4bit", action="store_true", help="quantise the weights to 4 bits at loading")
    add("--trust_remote_code", action="store_true", help="run model code that comes with the checkpoint")
    data = parser.add_argument_group("data and metrics")
    add = data.add_argument
    add("--dataset_name", metavar="NAME", help="data set: a file, a folder, or a name that `datasets` knows")
    add("--dataset_config", metavar="NAME", help="configuration of a named data set")
    add("--split", metavar="NAME", help="split, or a slice of one: test[:100] [test; a file: all of it]")
    add("--columns", metavar="NAMES", help="which column is which part: prompt=question")
    add("--limit", type=numbers(COUNT), metavar="N", help="rows to measure on, from the first on [all]")
    add("--metrics", nargs="+", choices=METRICS, metavar="METRIC", help=f"some of {', '.join(METRICS)}")
    add("--answer_column", metavar="NAME", help="column of the right answer [answer, else solution]")
    add(
        "--pattern",
        type=_regex,
        metavar="REGEX",
        help="its last match in a completion is the answer [the whole completion]",
    )
    add(
        "--reward_funcs", nargs="+", metavar="NAME", help="reward functions, reward models or endpoints, as in trl grpo"
    )
    add("--judge", metavar="NAME", help="judge of pairs for win_rate, as in trl online-dpo [the sum of --reward_funcs]")
    add("--against", metavar="NAME", help="other answers for win_rate: a column, or another model")
    add("--pass_at", nargs="+", type=numbers(COUNT), metavar="K", help="k of pass@k [1 and num_generations]")
    add(
        "--pass_threshold",
        type=numbers(Limit()),
        default=1.0,
        metavar="NUMBER",
        help="least total reward that passes [1.0]",
    )
    add("--max_length", type=numbers(COUNT), metavar="N", help="limit of a row in tokens, for perplexity [none]")
    drawing = parser.add_argument_group("completions")
    add = drawing.add_argument
    add("--num_generations", type=numbers(COUNT), default=1, metavar="N", help="completions of each prompt [1]")
    add("--max_new_tokens", type=numbers(COUNT), default=512, metavar="N", help="limit of a completion in tokens [512]")
    add(
        "--temperature",
        type=numbers(WEIGHT),
        metavar="NUMBER",
        help="softmax temperature [0 with one completion, else 1]",
    )
    add(
        "--top_p",
        type=numbers(LIMITS["top_p"]),
        default=1.0,
        metavar="NUMBER",
        help="total probability of the tokens sampled from [1.0]",
    )
    add(
        "--top_k",
        type=numbers(NUMBER_OF),
        default=0,
        metavar="N",
        help="number of most likely tokens to sample from; 0: all [0]",
    )
    rest = parser.add_argument_group("lm-eval")
    add = rest.add_argument
    add("--tasks", nargs="+", metavar="TASK", help="tasks of lm-eval, such as arc_easy")
    add("--num_fewshot", type=numbers(NUMBER_OF), metavar="N", help="examples before each question [the task's]")
    add = parser.add_argument_group("result").add_argument
    add("--seed", type=numbers(LIMITS["seed"]), default=0, metavar="N", help="random seed of samples and bootstrap [0]")
    between = numbers(Limit(0, 1, above=True, below=True))
    add("--confidence", type=between, default=0.95, metavar="SHARE", help="coverage of the intervals [0.95]")
    add("--output", metavar="FILE.jsonl", help="file for the completions and what was found of each")
    add("--json", action="store_true", help="print one JSON object")
    return parser


def _regex(word: str) -> str:
    try:
        re.compile(word)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"is not a regular expression ({error}): {word}") from None
    return word


def _check_names(options: argparse.Namespace) -> None:
    """Raise UsageError for reward functions and judges that do not exist."""
    from trl.rewards.named import check_names
    from trl.rewards.pairwise import check_judge

    try:
        check_names(options.reward_funcs or ())
        check_judge(options.judge)
    except ValueError as error:
        raise UsageError(str(error)) from None


def _opened(options: argparse.Namespace, name: str | None = None) -> tuple[Any, Any]:
    """The model and its tokenizer, on the accelerator if there is one."""
    import torch

    from trl.models.load import load_causal_lm, load_tokenizer

    name = name or options.model_name_or_path
    given: dict[str, Any] = {"revision": options.model_revision} if options.model_revision else {}
    given |= {"trust_remote_code": True} if options.trust_remote_code else {}
    quantised = {"load_in_4bit": True} if options.load_in_4bit else {}
    tokenizer = load_tokenizer(name, **given)
    model = load_causal_lm(name, dtype=options.dtype, **quantised, **given)
    if torch.accelerator.is_available() and not getattr(model, "is_quantized", False):
        model = model.to(torch.accelerator.current_accelerator())
    return model, tokenizer


def _on_rows(model: Any, tokenizer: Any, rows: Any, options: argparse.Namespace) -> Any:
    from trl.config import columns_of
    from trl.evaluate.evaluation import evaluate

    against = options.against
    if against is not None and against not in rows.column_names:
        if not (Path(against).expanduser().is_dir() or "/" in against):
            columns = ", ".join(rows.column_names)
            raise UsageError(f"--against: {against} is neither a column ({columns}) nor a model's folder or name.")
        against = _opened(options, against)[0]
    return evaluate(
        model,
        tokenizer,
        rows,
        options.metrics,
        reward_funcs=options.reward_funcs,
        judge=options.judge,
        against=against,
        answer_column=options.answer_column,
        pattern=options.pattern,
        num_generations=options.num_generations,
        pass_at=options.pass_at,
        pass_threshold=options.pass_threshold,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        top_k=options.top_k,
        max_length=options.max_length,
        columns=columns_of(options.columns) if options.columns else None,
        seed=options.seed,
        confidence=options.confidence,
    )
