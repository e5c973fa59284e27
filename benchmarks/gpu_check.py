"""Numbers of a GPU against those of float32 on padded rows: what to run first on a new card.

    python benchmarks/gpu_check.py layouts --model FOLDER --rows pairs.json     log-probs and gradients
    python benchmarks/gpu_check.py steps --model FOLDER                         SFT, DPO and GRPO, GPU against CPU
    python benchmarks/gpu_check.py greedy --model FOLDER                        the sampler against `generate`
    python benchmarks/gpu_check.py head --vocabulary 128256                     memory and time of the chunked head

    layouts  pairs with a shared prompt. The reference is transformers' own forward pass on padded rows in float32, with
             a log-softmax of all logits. Against it: flat rows in float32, flat rows in bfloat16 (autocast, and
             bfloat16 weights), and as a yardstick transformers on padded rows under the same autocast. For each the
             mean and the largest difference of log-probs, the norm of the gradient, and the norm of the gradient's
             difference over that of the reference
    steps    loss and gradient norm of 4 optimizer steps of each method, in float32 on the CPU, and in float32 and under
             bfloat16 autocast on the device. GRPO trains on completions that are the same everywhere
    greedy   24 tokens of 8 prompts, in float32 and in bfloat16
    head     log-probs and gradients of 16,384 tokens by this library's head, and by logits in float32

Each prints its numbers, and writes them to the file that `--json` names.
"""

import argparse
import contextlib
import json
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from losses import orders, said, shortness
from preference import read_pairs
from rollout import QUESTIONS, compare_greedy
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import trl
from trl.data.batching.collate import Branch, Tree
from trl.engine import kernel as kernel_of
from trl.engine.forest import padded
from trl.engine.head import Readout, token_stats
from trl.engine.probe import attach
from trl.engine.score import score
from trl.rollout.types import Completion


def moved(value: Any, device: str) -> Any:
    if torch.is_tensor(value):
        return value.to(device)
    return {key: moved(each, device) for key, each in value.items()} if isinstance(value, dict) else value


def peak(device: str) -> int:
    return torch.cuda.max_memory_allocated() if device == "cuda" else 0


def waited(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


# --- layouts ------------------------------------------------------------------------------------------------------


def trees_of(options: argparse.Namespace) -> list[Tree]:
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    trees: list[Tree] = []
    names = ("prompt", "chosen", "rejected")
    for number, row in enumerate(read_pairs(options.rows)):
        root, *answers = (tokenizer(row[name], add_special_tokens=False)["input_ids"] for name in names)
        if root and all(answers) and len(root) + max(map(len, answers)) <= options.max_length:
            branches = tuple(Branch(ids, [True] * len(ids)) for ids in answers)
            trees.append(Tree(Branch(root, [False] * len(root)), branches, number))
        if len(trees) == options.count:
            break
    return trees


def plain(model: Any, batch: dict[str, Any]) -> Tensor:
    """Log-probs of the trained tokens from all logits of a padded batch, [N]."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.flatten(0, 1)
    logp_NV = logits[batch["predict_N"]].float().log_softmax(-1)
    return logp_NV.gather(1, batch["target_N"][:, None])[:, 0]


def layouts(options: argparse.Namespace) -> dict[str, Any]:
    trees, device = trees_of(options), options.device
    calls = 0
    kernel = kernel_of.varlen_attn

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        return kernel(*args, **kwargs)

    kernel_of.varlen_attn = counted
    ways = {
        "padded float32": (torch.float32, False, False),
        "padded autocast": (torch.float32, False, True),
        "flat float32": (torch.float32, True, False),
        "flat autocast": (torch.float32, True, True),
        "flat bfloat16 weights": (torch.bfloat16, True, False),
    }
    found: dict[str, Any] = {"sequences": 2 * len(trees)}
    reference: tuple[Tensor, Tensor] | None = None
    for name, (dtype, flat, autocast) in ways.items():
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype).to(device)
        calls = 0
        attachment = attach(model) if flat else None
        calls = 0
        batch = moved(padded(trees) if attachment is None else attachment.batch(trees), device)
        with torch.autocast(device, torch.bfloat16) if autocast else contextlib.nullcontext():
            logp_N = plain(model, batch) if attachment is None else score(model, batch).logp_N
        logp_N.mean().neg().backward()
        gradient = torch.cat([p.grad.float().flatten() for p in model.parameters() if p.grad is not None])
        logp_N = logp_N.detach().float()
        reference = reference or (logp_N, gradient)
        gap_N = (logp_N - reference[0]).abs()
        found[name] = {
            "flat": attachment is not None and attachment.is_flat,
            "kernel_calls": calls,
            "loss": -logp_N.mean().item(),
            "mean_gap": gap_N.mean().item(),
            "largest_gap": gap_N.max().item(),
            "bias": (logp_N - reference[0]).mean().item(),
            "gradient_norm": gradient.norm().item(),
            "gradient_difference": ((gradient - reference[1]).norm() / reference[1].norm()).item(),
        }
        print(f"{name:22} " + " ".join(f"{key} {value:.6g}" for key, value in found[name].items()), flush=True)
    kernel_of.varlen_attn = kernel
    return found


# --- steps --------------------------------------------------------------------------------------------------------


class Fixed:
    """A sampler whose completions hang on the names of the samples alone."""

    def sync(self, model: Any, version: int) -> None:
        pass

    def generate(self, requests: Any, sampling: Any) -> list[list[Completion]]:
        def completion(name: tuple[int, ...], most: int) -> Completion:
            draw = random.Random(str(name))
            ids = [draw.randrange(300, 2000) for _ in range(draw.randint(3, most - 1))] + [sampling.stop_ids[0]]
            return Completion(ids, [-7.0] * len(ids), True)

        return [
            [completion((*each.seed, each.first + at), sampling.max_new_tokens) for at in range(each.samples)]
            for each in requests
        ]


def curve(method: str, options: argparse.Namespace, device: str, bf16: bool, folder: str) -> list[list[float]]:
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    rows, rest = orders(64), {"processing_class": AutoTokenizer.from_pretrained(options.model)}
    common: dict[str, Any] = {
        "output_dir": folder, "max_steps": 4, "logging_steps": 1, "report_to": "none", "save_strategy": "no",
        "disable_tqdm": True, "use_cpu": device == "cpu", "bf16": bf16, "gradient_checkpointing": False,
        "learning_rate": 1e-4,
    }  # fmt: skip
    trainer: Any
    if method == "sft":
        args = trl.SFTConfig(**common, per_device_train_batch_size=8)
        data = [{"messages": [*prompt, *said(right)]} for prompt, right, _ in rows]
        trainer = trl.SFTTrainer(model, args, train_dataset=data, **rest)
    elif method == "dpo":
        args = trl.DPOConfig(**common, per_device_train_batch_size=8)
        data = [{"prompt": prompt, "chosen": said(right), "rejected": said(wrong)} for prompt, right, wrong in rows]
        trainer = trl.DPOTrainer(model, args=args, train_dataset=data, **rest)
    else:
        args = trl.GRPOConfig(**common, per_device_train_batch_size=16, num_generations=8, max_completion_length=24)
        data = [{"prompt": prompt} for prompt, _, _ in rows]
        trainer = trl.GRPOTrainer(model, shortness, args, train_dataset=data, sampler=Fixed(), **rest)
    trainer.train()
    return [[line["loss"], line["grad_norm"]] for line in trainer.state.log_history if "loss" in line]


def steps(options: argparse.Namespace) -> dict[str, Any]:
    ways = {"CPU float32": ("cpu", False), "float32": (options.device, False), "autocast": (options.device, True)}
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for method in ("sft", "dpo", "grpo"):
            for name, (device, bf16) in ways.items():
                lines = found[f"{method} {name}"] = curve(method, options, device, bf16, folder)
                told = "  ".join(f"{loss:.6f} ({norm:.5f})" for loss, norm in lines)
                print(f"{method:5} {name:12} loss (gradient norm): {told}", flush=True)
    return found


# --- greedy -------------------------------------------------------------------------------------------------------


def greedy(options: argparse.Namespace) -> dict[str, Any]:
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    prompts = [
        tokenizer.apply_chat_template([{"role": "user", "content": question}], return_dict=True)["input_ids"]
        for question in (QUESTIONS * 8)[:8]
    ]
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        model, other = (
            AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype).to(options.device).eval() for _ in range(2)
        )
        attach(model)
        found[str(dtype)] = compare_greedy(model, other, tokenizer, prompts, options.device)
        print(f"greedy tokens, {dtype}: {found[str(dtype)]}", flush=True)
    return found


# --- head ---------------------------------------------------------------------------------------------------------


def head(options: argparse.Namespace) -> dict[str, Any]:
    device, count, width = options.device, options.tokens, 2048
    torch.manual_seed(0)
    found: dict[str, Any] = {}
    for trained in (True, False):
        layer = torch.nn.Linear(width, options.vocabulary, bias=False, device=device, dtype=torch.bfloat16)
        layer.requires_grad_(trained)
        target_N = torch.randint(0, options.vocabulary, (count,), device=device)
        for name in ("chunked", "logits"):
            for attempt in range(2):  # the first is a warm-up
                hidden_NH = torch.randn(count, width, device=device, dtype=torch.bfloat16, requires_grad=True)
                layer.weight.grad = None
                if device == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated() if device == "cuda" else 0
                began = waited(device)
                if name == "chunked":
                    (logp_N, *_) = token_stats(layer, hidden_NH, target_N, Readout(), options.vocabulary)
                else:
                    logp_N = layer(hidden_NH).float().log_softmax(-1).gather(1, target_N[:, None])[:, 0]
                logp_N.mean().neg().backward()
                seconds = waited(device) - began
                if attempt:
                    key = f"{name}, head {'trained' if trained else 'frozen'}"
                    found[key] = {"growth": peak(device) - before, "seconds": seconds, "loss": -logp_N.mean().item()}
                    print(f"{key:24} growth {found[key]['growth'] / 2**30:.3f} GiB, {1000 * seconds:.1f} ms, loss "
                          f"{found[key]['loss']:.5f}", flush=True)  # fmt: skip
                del logp_N, hidden_NH
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["layouts", "steps", "greedy", "head"])
    parser.add_argument("--model", type=Path, help="folder of the model (not for `head`)")
    parser.add_argument("--rows", type=Path, help="pairs: prompt, chosen and rejected as texts")
    parser.add_argument("--count", type=int, default=16, help="pairs used at most")
    parser.add_argument("--max-length", type=int, default=240)
    parser.add_argument("--tokens", type=int, default=16384, help="trained tokens of `head`")
    parser.add_argument("--vocabulary", type=int, default=128256)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--json", type=Path, help="write the numbers there")
    options = parser.parse_args()
    transformers.logging.disable_progress_bar()
    found = {"layouts": layouts, "steps": steps, "greedy": greedy, "head": head}[options.part](options)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
