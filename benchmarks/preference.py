"""Learning from preferences: DPO, KTO and reward models of this library against TRL 1.16, in one run.

Both sides train the same weights on the same token ids in the same order, with the same seed, batch size, optimizer
settings and gradient checkpointing. Each side is a process of its own in its own environment; the two are asked in turn
to train for a few steps, and whichever is not asked waits, so that both see the same machine. The rows are tokenised
and cut once, here; both are given ids. How to make the environment of TRL 1.16 is in `sft.py`.

    python benchmarks/preference.py --upstream upstream/bin/python --method dpo --data long --rows dpo_en_demo.json

    dpo     pairs. The reference is a frozen copy of the model, with `--lora` the model with its adapter off
    kto     one completion of each pair, good ones and bad ones in turn, so that a prompt comes once. The divergence
            from the reference is estimated on the same completions of other prompts on both sides. TRL estimates it
            for each micro-batch, this library over the whole optimizer step: losses are equal with `--accumulation 1`
            alone
    reward  pairs, and one scoring head, saved once. Padded with a token that stands in no row: the score is read at the
            last token that is not padding, which with TRL would else not be the token that ends a turn, where that
            token pads too

Rows are pairs of any shape that this library reads, or those of AlpacaEval; without `--rows` they are made here. There
is one pair of each prompt, and only such as fit whole into `--max-length`: a cut would leave completions shorter than
they are. `--data short` takes all of them, `--data long` those that answer a conversation, with an earlier answer in
the prompt. Real ones:

    pip download --no-deps --no-binary :all: llamafactory==0.9.5
    tar xzf llamafactory-0.9.5.tar.gz
    ... --data long --rows llamafactory-0.9.5/data/dpo_en_demo.json       (106 conversations of 300)

    pip download --no-deps alpaca-eval==0.1.7
    unzip alpaca_eval-0.1.7-py3-none-any.whl 'alpaca_eval/evaluators_configs/claude/*'
    ... --data short --rows alpaca_eval/evaluators_configs/claude/annotations_seed0_configs.json   (1,476 prompts)

Both libraries set every dropout of the model to zero in these methods, an adapter's too, unless told otherwise
(`--keep-dropout`; losses then differ by chance).

What is printed, per side:

    time        median over the rounds of the wall time of a round (the first, a warm-up, left out). The ratio is taken
                round by round, both sides having trained on the same rows, and its median, least and greatest shown;
                processor time (of all threads) tells the two apart where others use the machine too
    memory      highest resident memory (on a GPU: allocated) while training less that before the first step, with
                model, reference and data in place; and the same without gradients and optimizer state
    positions   what all forward passes computed, of the policy and of the reference, padding included, counted at the
                embedding
    distinct    tokens that these passes need: without padding, a prompt once in each pass that it takes part in,
                however many completions of the batch follow it. Passes: the policy and the reference; of KTO also the
                policy on completions of other prompts, which the reference takes together with the rows' own; of a
                reward model one
    efficiency  distinct tokens over positions
    loss        of every step, and the largest difference between the sides
"""

import argparse
import json
import random
import statistics
import tempfile
from pathlib import Path
from typing import Any

import common
from sft import WORDS

WORKER = "preference_worker.py"
LEARNING_RATES = {"dpo": (5e-6, 1e-4), "kto": (5e-6, 1e-4), "reward": (1e-5, 1e-4)}  # of all weights, of an adapter
Row = dict[str, Any]


def made_pairs(count: int, seed: int) -> list[Row]:
    """Pairs of random words, every second one after an exchange; lengths are log-normal."""
    draw = random.Random(seed)

    def turn(role: str, median: float) -> dict[str, str]:
        words = max(3, round(draw.lognormvariate(0.0, 0.7) * median))
        return {"role": role, "content": " ".join(draw.choice(WORDS) for _ in range(words)) + "."}

    return [
        {
            "prompt": [turn("user", 30), turn("assistant", 120), turn("user", 20)][-1 if number % 2 else 0 :],
            "chosen": [turn("assistant", 90)],
            "rejected": [turn("assistant", 90)],
        }
        for number in range(count)
    ]


def read_pairs(path: Path) -> list[Row]:
    """Rows of a JSON or JSON Lines file; those that AlpacaEval's judges decided become pairs of one exchange."""
    text = path.read_text(encoding="utf-8")
    raw = json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in text.splitlines()]
    if not {"output_1", "output_2", "preference"} <= set(raw[0]):
        return raw
    pairs = []
    for row in raw:
        outputs = [row["output_1"], row["output_2"]]
        if row["preference"] not in (1, 2) or not all(outputs) or outputs[0] == outputs[1]:
            continue
        better = row["preference"] - 1
        question = "\n".join(part for part in (row["instruction"], row.get("input")) if part)
        pairs.append({
            "prompt": [{"role": "user", "content": question}],
            "chosen": [{"role": "assistant", "content": outputs[better]}],
            "rejected": [{"role": "assistant", "content": outputs[1 - better]}],
        })  # fmt: skip
    return pairs


def prompt_of(row: Row) -> Any:
    """What stands before the answers, in whatever shape: a text or turns."""
    for name in ("conversations", "prompt", "question"):
        if name in row:
            return row[name]
    return row["chosen"][:-1]


def token_rows(pairs: list[Row], tokenizer: Any, options: argparse.Namespace) -> list[Row]:
    """The pairs of the kind that `--data` asks for as token ids, in the order in which both sides take them."""
    from datasets import Dataset, disable_caching, disable_progress_bars

    from trl.data.tokenizing.comparisons import prepare_preferences
    from trl.data.tokenizing.mismatched import mismatched

    disable_caching()
    disable_progress_bars()
    random.Random(options.seed).shuffle(pairs)  # judged pairs stand in the order of prompts
    pairs = list({json.dumps(prompt_of(pair)): pair for pair in pairs}.values())
    if options.data == "long":
        pairs = [pair for pair in pairs if isinstance(prompt_of(pair), list) and len(prompt_of(pair)) > 2]
    if not pairs:
        raise SystemExit("no pair answers a conversation: give other --rows, or --data short")
    prepared, _ = prepare_preferences(Dataset.from_list(pairs), tokenizer, kind="pairs")
    rows = [
        row for row in prepared.to_list()
        if len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"])) <= options.max_length
    ]  # fmt: skip
    if len(rows) < options.batch_size:
        raise SystemExit(f"{len(rows)} of {len(pairs)} pairs fit into {options.max_length} tokens: raise --max-length")
    if options.method != "kto":
        return rows
    single = [
        {"prompt_ids": row["prompt_ids"], "completion_ids": row["rejected_ids" if number % 2 else "chosen_ids"],
         "label": number % 2 == 0, "row": number}
        for number, row in enumerate(rows)
    ]  # fmt: skip
    return mismatched(Dataset.from_list(single), seed=options.seed, max_length=options.max_length).to_list()


COMPLETIONS = {
    "dpo": ("chosen_ids", "rejected_ids"),
    "reward": ("chosen_ids", "rejected_ids"),
    "kto": ("completion_ids", "kl_completion_ids"),
}
# How many forward passes a prompt takes part in, and a completion.
PASSES = {"dpo": (2, 2), "kto": (3, 2), "reward": (1, 1)}


def distinct_tokens(rows: list[Row], options: argparse.Namespace) -> int:
    """What the forward passes over these rows need, see the top."""
    of_prompt, of_completion = PASSES[options.method]
    needed = 0
    for start in range(0, len(rows), options.batch_size):
        batch = rows[start : start + options.batch_size]
        needed += of_prompt * sum(map(len, {tuple(row["prompt_ids"]) for row in batch}))
        needed += of_completion * sum(len(row[name]) for row in batch for name in COMPLETIONS[options.method])
    return needed


def save_model(options: argparse.Namespace, model: str, tokenizer: Any, folder: Path) -> None:
    """The weights that both sides start from, and from which upstream loads its reference."""
    import torch
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    transformers.logging.set_verbosity_error()  # layers that are left out
    transformers.logging.disable_progress_bar()
    config = AutoConfig.from_pretrained(model)
    if options.layers:
        config.num_hidden_layers = options.layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[: options.layers]
    config.pad_token_id = tokenizer.pad_token_id
    torch.manual_seed(options.seed)
    kind = AutoModelForCausalLM
    if options.method == "reward":
        kind, config.num_labels = AutoModelForSequenceClassification, 1
    if any(Path(model).glob("*.safetensors")):
        made = kind.from_pretrained(model, config=config, dtype=torch.float32)
    else:  # a configuration and a tokenizer alone: weights of that shape, at random
        made = kind.from_config(config, dtype=torch.float32)
    made.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def pad_with_what_no_row_has(tokenizer: Any, rows: list[Row]) -> None:
    used = {token for row in rows for name, ids in row.items() if name.endswith("_ids") for token in ids}
    for token in [*tokenizer.all_special_ids, *sorted(tokenizer.added_tokens_decoder), *range(len(tokenizer))]:
        if token not in used:
            tokenizer.pad_token = tokenizer.convert_ids_to_tokens(token)
            return


def measure(options: argparse.Namespace) -> dict[str, Any]:
    from transformers import AutoTokenizer

    model = common.model_of(options)
    tokenizer = AutoTokenizer.from_pretrained(model)
    pairs = read_pairs(options.rows) if options.rows else made_pairs(options.seed_rows, options.seed)
    rows = token_rows(pairs, tokenizer, options)
    pad_with_what_no_row_has(tokenizer, rows)
    found = len(rows)
    settings = common.settings_of(options)
    per_round = options.batch_size * options.accumulation * options.steps
    wanted = settings["total_steps"] * options.batch_size * options.accumulation
    rows = [{**rows[index % found], "row": index} for index in range(wanted)]

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_model(options, model, tokenizer, folder / Path(model).name)
        (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
        rate = options.learning_rate or LEARNING_RATES[options.method][options.lora]
        settings |= {
            "model": str(folder / Path(model).name), "rows_file": str(folder / "rows.json"), "method": options.method,
            "data": options.data, "learning_rate": rate, "lora_dropout": options.lora_dropout,
            "keep_dropout": options.keep_dropout,
        }  # fmt: skip
        sides, ready, ends = common.measured(WORKER, settings, options, folder)

    measured = rows[per_round : per_round * (options.rounds + 1)]
    distinct = distinct_tokens(measured, options)
    lengths = {
        what: [len(row[name]) for row in measured for name in names]
        for what, names in (("prompt", ("prompt_ids",)), ("completion", COMPLETIONS[options.method]))
    }
    report: dict[str, Any] = {
        "settings": {key: value for key, value in settings.items() if key not in ("rows_file", "model")},
        "model": Path(model).name,
        "rows": options.rows.name if options.rows else f"generated, {options.seed_rows} pairs",
        "rows_found": found,
        "rows_measured": len(measured),
        "distinct": distinct,
        "median_prompt": statistics.median(lengths["prompt"]),
        "median_completion": statistics.median(lengths["completion"]),
        "longest_prompt": max(lengths["prompt"]),
        "longest_completion": max(lengths["completion"]),
        "state": 4 * 3 * ready["ours"]["trained_parameters"],  # gradient and two moments, fp32
        "digits": 3,
        "sides": {
            name: {**common.side_report(side, ready[name], ends[name], distinct), "reference": ready[name]["reference"]}
            for name, side in sides.items()
        },
    }
    common.compare(report)
    return report


def show(report: dict[str, Any]) -> None:
    settings = report["settings"]
    rate = settings["learning_rate"]
    print(f"{settings['method']}, prompts {settings['data']}; learning rate {rate:g}", end="; ")
    common.show_model(report)
    print(f"rows: {report['rows']}, {report['rows_found']} of this kind, {report['rows_measured']} measured; tokens in "
          f"the median: prompt {report['median_prompt']:.0f}, completion {report['median_completion']:.0f}; at most "
          f"{report['longest_prompt']} and {report['longest_completion']}")  # fmt: skip
    common.show_sides(report)
    if settings["method"] != "reward":
        print("reference: " + "; ".join(f"{name} {side['reference']}" for name, side in report["sides"].items()))
    print()
    distinct: common.Line = ("distinct tokens", lambda side: f"{report['distinct']:,}")
    common.show_table(report, "distinct tokens a second", after=[distinct])
    common.show_comparison(report)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=sorted(PASSES), default="dpo")
    parser.add_argument("--data", choices=["long", "short"], default="long", help="which prompts, see above")
    parser.add_argument("--rows", type=Path, help="JSON or JSON Lines of pairs")
    parser.add_argument("--seed-rows", type=int, default=512, metavar="N", help="pairs to make when no rows are given")
    common.add_options(parser, batch_size=4, steps=1, rounds=3)
    parser.add_argument("--lora-dropout", type=float, default=0.05, help="dropout of the adapter")
    parser.add_argument("--keep-dropout", action="store_true", help="do not set dropout to zero")
    parser.add_argument("--learning-rate", type=float,
                        help="default: 5e-6 (a reward model 1e-5), with --lora 1e-4")  # fmt: skip
    options = parser.parse_args()
    common.tell(measure(options), show, options)


if __name__ == "__main__":
    main()
