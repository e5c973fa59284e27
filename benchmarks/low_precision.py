"""bfloat16 weights with their lower halves against float32 weights with bfloat16 autocast, and against bfloat16 alone.

    python benchmarks/low_precision.py --method sft --rows alpaca_en_demo.json --steps 200 --json sft.json
    python benchmarks/low_precision.py --method dpo --rows dpo_en_demo.json --steps 200 --json dpo.json

All weights train, from the same start (the model rounded to bfloat16), on the same rows. Four runs:

    float32            float32 weights, bfloat16 autocast
    float32, seed 1    the same, rows in another order: the noise that the others are held against
    bfloat16           what the trainer does with bfloat16 weights by itself
    bfloat16, plain    the optimizer on the bfloat16 weights alone, as PyTorch has it

For each run: the loss (means over tenths of the run), how far the weights walked (the norm of the whole change, of its
float32 weights), which share of the entries changed, and the bytes a weight of weights and optimizer state. `--rows`
names a file of conversations, instructions or pairs; without it rows are made.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import model_of
from preference import made_pairs, read_pairs
from sft import chats, read_rows
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer

import trl
from trl.models.low_bits import LOW_BITS, join

RATES = {"sft": 2e-5, "dpo": 1e-6}
RUNS = {
    "float32": (torch.float32, 0, False),
    "float32, seed 1": (torch.float32, 1, False),
    "bfloat16": (torch.bfloat16, 0, False),
    "bfloat16, plain": (torch.bfloat16, 0, True),
}


def start_of(options: argparse.Namespace) -> Any:
    """The model that all runs start from: bfloat16, its first layers if fewer are asked for."""
    model = AutoModelForCausalLM.from_pretrained(model_of(options), dtype=torch.bfloat16)
    if options.layers:
        model.model.layers = model.model.layers[: options.layers]
        model.config.num_hidden_layers = options.layers
    return model


def trainer_of(options: argparse.Namespace, rows: list[Any], dtype: torch.dtype, seed: int, plain: bool) -> Any:
    name = {"sft": "SFT", "dpo": "DPO"}[options.method]
    base = getattr(trl, f"{name}Trainer")
    kind = type(base.__name__, (base,), {"create_optimizer": Trainer.create_optimizer}) if plain else base
    config = getattr(trl, f"{name}Config")(
        output_dir=str(options.folder), max_steps=options.steps, per_device_train_batch_size=options.batch_size,
        learning_rate=options.learning_rate or RATES[options.method], lr_scheduler_type="constant", logging_steps=1,
        max_length=options.max_length, bf16=True, seed=seed, report_to="none", save_strategy="no", disable_tqdm=True,
        gradient_checkpointing=False, use_cpu=options.device == "cpu",
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(model_of(options))
    return kind(start_of(options).to(dtype), args=config, train_dataset=rows, processing_class=tokenizer)


def run(options: argparse.Namespace, rows: list[Any], dtype: torch.dtype, seed: int, plain: bool) -> dict[str, Any]:
    trainer = trainer_of(options, rows, dtype, seed, plain)
    start = {name: p.detach().float().cpu() for name, p in start_of(options).named_parameters()}
    trainer.train()
    state = trainer.optimizer.optimizer.state
    squares = changed = total = size = 0.0
    with torch.no_grad():
        for name, p in trainer.model.named_parameters():
            low = state[p].get(LOW_BITS)
            moved = (p.float() if low is None else join(p.data, low)).cpu() - start[name]
            squares += moved.double().square().sum().item()
            changed += (moved != 0).sum().item()
            total += moved.numel()
            size += sum(each.nbytes for each in (p, *state[p].values()) if torch.is_tensor(each))
    losses = torch.tensor([line["loss"] for line in trainer.state.log_history if "loss" in line])
    return {
        "loss": [part.mean().item() for part in losses.tensor_split(10)],
        "walked": squares**0.5,
        "changed": changed / total,
        "bytes": size / total,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=sorted(RATES), default="sft")
    parser.add_argument("--rows", type=Path, help="file of rows; default: made rows")
    parser.add_argument("--count", type=int, default=1000, help="rows used at most")
    parser.add_argument("--model", type=Path, help="folder of the model; default: the demo's")
    parser.add_argument("--layers", type=int, help="use the first layers alone")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--learning-rate", type=float, help="default: 2e-5 for sft, 1e-6 for dpo")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="write the results there")
    options = parser.parse_args()
    if options.method == "sft":
        rows = read_rows(options.rows) if options.rows else chats(options.count, 0)
    else:
        rows = read_pairs(options.rows) if options.rows else made_pairs(options.count, 0)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        options.folder = folder
        for name, (dtype, seed, plain) in RUNS.items():
            found[name] = run(options, rows[: options.count], dtype, seed, plain)
    print(f"\n{'run':18} {'walked':>10} {'changed':>8} {'bytes':>6}  mean loss of each tenth")
    for name, each in found.items():
        curve = " ".join(f"{loss:.4f}" for loss in each["loss"])
        print(f"{name:18} {each['walked']:10.5f} {each['changed']:8.1%} {each['bytes']:6.1f}  {curve}")
    if options.json:
        versions = {"torch": torch.__version__, "trl": trl.__version__, "device": options.device}
        options.json.write_text(json.dumps({"versions": versions, "runs": found}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
