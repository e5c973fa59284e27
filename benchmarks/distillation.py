"""Distillation: GKD and on-policy distillation of this library against TRL 1.16, in one run.

Both sides train the same student under the same teacher on the same token ids in the same order, with the same seed,
batch size, optimizer settings and gradient checkpointing, each in a process of its own; the two are asked in turn to
train for a few steps. How to make the environment of TRL 1.16 is in `sft.py`.

    python benchmarks/distillation.py --upstream upstream/bin/python --method gkd --layers 6 --teacher-layers 12

    gkd            completions of the data (lmbda = 0)
    distillation   completions that stand in for those that the student would sample; sampling is not measured

The student is the first `--layers` layers of a model, the teacher its first `--teacher-layers` (default: all). Rows are
made here: prompts of 20 to 60 tokens, completions of `--median` tokens in the median, log-normal. Time, memory and
losses are those of `preference.py`; positions are those of both models. `--json` keeps all numbers.
"""

import argparse
import json
import random
import tempfile
from pathlib import Path
from typing import Any

import common

WORKER = "distillation_worker.py"


def made_rows(count: int, vocabulary: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of random tokens, each prompt once."""
    draw = random.Random(options.seed)

    def ids(length: int) -> list[int]:
        return [draw.randrange(100, vocabulary) for _ in range(length)]

    rows = []
    for _ in range(count):
        prompt = ids(draw.randint(20, 60))
        length = max(4, round(draw.lognormvariate(0.0, 0.6) * options.median))
        rows.append({"prompt_ids": prompt, "completion_ids": ids(min(length, options.max_length - len(prompt)))})
    return rows


def save_model(source: str, layers: int | None, folder: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    config = AutoConfig.from_pretrained(source)
    config.num_hidden_layers = layers or config.num_hidden_layers
    AutoModelForCausalLM.from_pretrained(source, config=config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    from transformers import AutoTokenizer

    model, settings = common.model_of(options), common.settings_of(options)
    step = options.batch_size * options.accumulation
    rows = made_rows(settings["total_steps"] * step, len(AutoTokenizer.from_pretrained(model)), options)
    measured = rows[options.steps * step : options.steps * step * (options.rounds + 1)]
    distinct = 2 * sum(len(row["prompt_ids"]) + len(row["completion_ids"]) for row in measured)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_model(model, options.layers, folder / "student")
        save_model(model, options.teacher_layers, folder / "teacher")
        (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
        settings |= {
            "model": str(folder / "student"), "teacher": str(folder / "teacher"), "method": options.method,
            "rows_file": str(folder / "rows.json"), "beta": options.beta,
            "learning_rate": 1e-4 if options.lora else 1e-5,
        }  # fmt: skip
        sides, ready, ends = common.measured(WORKER, settings, options, folder)
    report: dict[str, Any] = {
        "settings": {key: value for key, value in settings.items() if key not in ("rows_file", "model", "teacher")},
        "model": Path(model).name,
        "teacher_layers": options.teacher_layers,
        "distinct": distinct,
        "state": 4 * 3 * ready["ours"]["trained_parameters"],  # gradient and two moments, fp32
        "digits": 3,
        "sides": {name: common.side_report(side, ready[name], ends[name], distinct) for name, side in sides.items()},
    }
    common.compare(report)
    return report


def show(report: dict[str, Any]) -> None:
    print(f"{report['settings']['method']}, beta {report['settings']['beta']:g}, "
          f"teacher of {report['teacher_layers'] or 'all'} layers", end="; ")  # fmt: skip
    common.show_model(report)
    common.show_sides(report)
    print()
    common.show_table(report, "distinct tokens a second")
    common.show_comparison(report)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=["gkd", "distillation"], default="gkd")
    parser.add_argument("--teacher-layers", type=int, help="keep this many layers of the teacher")
    parser.add_argument("--beta", type=float, default=0.5, help="of the divergence")
    parser.add_argument("--median", type=int, default=120, help="tokens of a completion")
    common.add_options(parser, batch_size=4, steps=1, rounds=3)
    options = parser.parse_args()
    common.tell(measure(options), show, options)


if __name__ == "__main__":
    main()
