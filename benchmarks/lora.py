"""LoRA layers in one autograd function (`trl/engine/lora.py`) against PEFT's own forward, in one process.

    python benchmarks/lora.py [--tokens 2048] [--rank 16] [--layers 4] [--rounds 7] [--threads 1]

First single layers of SmolLM2's shapes, forward and backward, then whole steps of SFT with an adapter on all linear
layers (the model's first layers; forward, backward and AdamW on one flat row). Prints, for each precision and dropout,
the median of seconds that the processor worked (work beside it counts less in them than in time on the clock), for PEFT
and ours, the median ratio of rounds that alternate, the bytes of tensors that are alive at once beyond weights and
inputs, and the largest difference of gradients (relative, by norm). "float32" is all in float32, "autocast" multiplies
in bfloat16 over float32 weights, "bfloat16" has bfloat16 weights and a float32 adapter. A processor without
instructions for bfloat16 multiplies copies in float32, as training does on it.
"""

import argparse
import contextlib
import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from common import model_of
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from trl.data.batching.collate import Branch, Tree
from trl.engine import linear, lora
from trl.engine.probe import attach
from trl.engine.score import score
from trl.models.offload import enable_checkpointing
from trl.plan.trace import _Alive

SHAPES = ((576, 576), (576, 192), (576, 1536), (1536, 576))
WAYS: dict[str, Callable[[nn.Module], None]] = {"PEFT": lora.detach, "ours": lora.attach}


def precision_of(name: str) -> contextlib.ExitStack:
    stack = contextlib.ExitStack()
    if name == "autocast":
        stack.enter_context(torch.autocast("cpu", torch.bfloat16))
    stack.enter_context(linear.half_products(torch.device("cpu"), name != "float32"))
    return stack


def compared(
    name: str, model: nn.Module, once: Callable[[], Any], precision: str, rounds: int, step: Callable = lambda: None
) -> None:
    """Run both ways in turn, and print a row of the table. `step` changes the weights after `once`."""
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    peaks, gradients = {}, {}
    with precision_of(precision):
        for number in range(rounds + 1):
            for way in list(WAYS) if number % 2 else reversed(WAYS):
                WAYS[way](model)
                started = time.process_time()
                once()
                step()
                if number:  # the first is a warm-up
                    seconds[way].append(time.process_time() - started)
        for way, change in WAYS.items():
            change(model)
            torch.manual_seed(0)
            model.zero_grad()
            with _Alive(in_place=False) as alive:
                once()
            peaks[way] = alive.peak / 2**20
            gradients[way] = [each.grad.clone() for each in model.parameters() if each.grad is not None]
    ratios = [theirs / ours for theirs, ours in zip(seconds["PEFT"], seconds["ours"], strict=True)]
    apart = max(
        ((ours - theirs).norm() / theirs.norm().clamp(min=1e-12)).item()
        for ours, theirs in zip(gradients["ours"], gradients["PEFT"], strict=True)
    )
    print(
        f"| {name} | {precision} | {statistics.median(seconds['PEFT']):.3f} : {statistics.median(seconds['ours']):.3f} "
        f"| {statistics.median(ratios):.2f}× ({min(ratios):.2f} – {max(ratios):.2f}) "
        f"| {peaks['PEFT']:,.1f} : {peaks['ours']:,.1f} | {peaks['ours'] / peaks['PEFT']:.2f} | {apart:.0e} |",
        flush=True,
    )


def one_layer(shape: tuple[int, int], dropout: float, precision: str, options: argparse.Namespace) -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(*shape, bias=False))
    base.to(torch.bfloat16 if precision == "bfloat16" else torch.float32)
    settings = {"r": options.rank, "lora_alpha": 2 * options.rank, "lora_dropout": dropout, "target_modules": ["0"]}
    model = get_peft_model(base, LoraConfig(**settings, init_lora_weights=False)).train()
    x = torch.randn(options.tokens, shape[0]).to(base[0].weight.dtype).requires_grad_()
    slope = torch.randn(options.tokens, shape[1])

    def once() -> None:
        out = model(x)
        out.backward(slope.to(out.dtype))
        x.grad = None

    name = f"{shape[0]} → {shape[1]}" + (f", dropout {dropout}" if dropout else "")
    compared(name, model, once, precision, options.rounds)


def steps(dropout: float, precision: str, checkpointing: bool, options: argparse.Namespace) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_of(options), dtype=torch.float32)
    model.model.layers = model.model.layers[: options.layers]
    model.config.num_hidden_layers = options.layers
    model.to(torch.bfloat16 if precision == "bfloat16" else torch.float32)
    torch.manual_seed(0)
    adapter = LoraConfig(
        r=options.rank, lora_alpha=2 * options.rank, lora_dropout=dropout, target_modules="all-linear",
        task_type="CAUSAL_LM", init_lora_weights=False,
    )  # fmt: skip
    policy = get_peft_model(model, adapter)
    for name, weight in policy.named_parameters():
        if "lora_B" in name:
            weight.data.mul_(0.01)  # an adapter that changes little, as one in training
    attachment = attach(policy)
    if checkpointing:
        enable_checkpointing(model)
        policy.enable_input_require_grads()
    policy.train()
    optimizer = torch.optim.AdamW([each for each in policy.parameters() if each.requires_grad], lr=1e-6, fused=True)
    rows = 8
    length = options.tokens // rows
    ids = torch.randint(model.config.vocab_size, (rows, length)).tolist()
    trees = [Tree(Branch(each, [place >= length // 2 for place in range(length)]), row=n) for n, each in enumerate(ids)]
    batch = attachment.batch(trees)

    def once() -> None:
        optimizer.zero_grad()
        score(policy, copy.copy(batch)).logp_N.mean().backward()

    name = f"SFT, {options.layers} layers" + (f", dropout {dropout}" if dropout else "")
    name += ", checkpointing" if checkpointing else ""
    compared(name, policy, once, precision, options.rounds, optimizer.step)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of a model (default: the demo's)")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=2048, help="of a layer's input, and of a step")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dropout", type=float, nargs="+", default=[0.0, 0.05])
    parser.add_argument("--precision", nargs="+", default=["float32", "autocast", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--parts", nargs="+", choices=["layers", "steps"], default=["layers", "steps"])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{options.tokens} tokens, rank {options.rank}, {options.threads} threads, torch {torch.__version__}")
    print("| | precision | seconds, PEFT : ours | PEFT ÷ ours | MiB, PEFT : ours | ours ÷ PEFT | gradients apart |")
    print("|---|---|---|---|---|---|---|")
    for dropout in options.dropout:
        for precision in options.precision:
            if "layers" in options.parts:
                for shape in SHAPES:
                    one_layer(shape, dropout, precision, options)
            if "steps" in options.parts:
                for checkpointing in (False, True):
                    steps(dropout, precision, checkpointing, options)


if __name__ == "__main__":
    main()
