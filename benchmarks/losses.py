"""The first losses of SFT, DPO, KTO and GRPO, to the bit: what a change that moves no number must leave as it is.

    python benchmarks/losses.py --json before.json          # at the commit before
    python benchmarks/losses.py --against before.json       # at the commit after, on the same machine

Rows are the demo's orders. SFT trains an adapter, DPO and KTO train all weights (KTO in two accumulated micro-batches),
GRPO draws 8 completions of each prompt and trains on them in two steps with a reference. Ends with status 1 if a loss
or a gradient norm differs in any bit. Bits depend on the processor and the number of threads, so both runs belong on
one machine.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import peft
import torch
from common import model_of
from transformers import AutoModelForCausalLM, AutoTokenizer

import trl

ITEMS = ("soup", "pizza", "burger", "salad", "taco", "curry", "wrap")
NAMES = ("Anna", "Ben", "Clara", "David", "Emma")


def orders(count: int) -> list[tuple[list[dict[str, str]], str, str]]:
    """Prompts, right tickets and wrong ones."""
    found = []
    for number in range(count):
        item, wrong = ITEMS[number % len(ITEMS)], ITEMS[(number + 1) % len(ITEMS)]
        name, few = NAMES[number % len(NAMES)], 1 + number % 4
        asked = f"{name} wants {few} {item}, please." + " As soon as you can." * (number % 3)
        ticket = '{{"name": "{}", "count": {}, "item": "{}"}}'
        prompt = [{"role": "user", "content": asked}]
        found.append((prompt, ticket.format(name, few, item), ticket.format(name, few, wrong)))
    return found


def said(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def shortness(completions: list[Any], **kwargs: Any) -> list[float]:
    return [-float(len(each[-1]["content"])) for each in completions]


def trainer_of(method: str, options: argparse.Namespace, folder: str) -> Any:
    path = model_of(options)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    if options.layers:
        model.model.layers = model.model.layers[: options.layers]
        model.config.num_hidden_layers = options.layers
    rows = orders(64)
    common: dict[str, Any] = {
        "output_dir": folder, "max_steps": options.steps, "logging_steps": 1, "report_to": "none",
        "save_strategy": "no", "disable_tqdm": True, "use_cpu": True, "gradient_checkpointing": False,
    }  # fmt: skip
    rest: dict[str, Any] = {"processing_class": AutoTokenizer.from_pretrained(path)}
    if method == "sft":
        args = trl.SFTConfig(**common, per_device_train_batch_size=4, learning_rate=1e-3)
        adapter = peft.LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
        data = [{"messages": [*prompt, *said(right)]} for prompt, right, _ in rows]
        return trl.SFTTrainer(model, args, train_dataset=data, peft_config=adapter, **rest)
    if method == "dpo":
        args = trl.DPOConfig(**common, per_device_train_batch_size=4, learning_rate=1e-5)
        data = [{"prompt": prompt, "chosen": said(right), "rejected": said(wrong)} for prompt, right, wrong in rows]
        return trl.DPOTrainer(model, args=args, train_dataset=data, **rest)
    if method == "kto":
        args = trl.KTOConfig(**common, per_device_train_batch_size=4, gradient_accumulation_steps=2, learning_rate=1e-5)
        data = [
            {"prompt": prompt, "completion": said(answer), "label": label}
            for prompt, right, wrong in rows
            for answer, label in ((right, True), (wrong, False))
        ]
        return trl.KTOTrainer(model, args=args, train_dataset=data, **rest)
    args = trl.GRPOConfig(
        **common, per_device_train_batch_size=8, steps_per_generation=2, num_generations=8, max_completion_length=16,
        learning_rate=1e-5, beta=0.04,
    )  # fmt: skip
    return trl.GRPOTrainer(model, shortness, args, train_dataset=[{"prompt": prompt} for prompt, _, _ in rows], **rest)


def losses(method: str, options: argparse.Namespace) -> list[list[str]]:
    """Loss and gradient norm of each step, as hexadecimal floats."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(method, options, folder)
        trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    return [[float(line[name]).hex() for name in ("loss", "grad_norm")] for line in lines]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=["sft", "dpo", "kto", "grpo"])
    parser.add_argument("--model", type=Path, help="folder of the model; default: the demo's")
    parser.add_argument("--layers", type=int, help="use the first layers alone")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the numbers there")
    parser.add_argument("--against", type=Path, help="numbers to compare with")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found = {method: losses(method, options) for method in options.methods}
    if options.json:
        options.json.write_text(json.dumps(found, indent=1), encoding="utf-8")
    known = json.loads(options.against.read_text(encoding="utf-8")) if options.against else found
    differ = False
    for method, lines in found.items():
        first = next(
            (step for step, pair in enumerate(zip(lines, known[method], strict=True)) if pair[0] != pair[1]), None
        )
        differ |= first is not None
        verdict = "equal" if first is None else f"differ from step {first + 1} on"
        ends = f"{float.fromhex(lines[0][0]):.4f} -> {float.fromhex(lines[-1][0]):.4f}"
        print(f"{method:5} {len(lines)} losses {ends}" + f"  {verdict}" * bool(options.against))
    sys.exit(int(differ))


if __name__ == "__main__":
    main()
