"""Drawing completions: the sampler of this library against `model.generate`, in one run.

The other side is called as TRL 1.16's GRPO calls it: every prompt as many times as it has completions, left-padded in
one batch, sampling, until the longest has ended. Same model, prompts, temperature and stop token; lengths are those at
which the model stops by itself. The two take turns; tokens a second count the tokens of completions up to and with the
stop token. Before that, greedy tokens of both are compared.

    python benchmarks/rollout.py                     # SmolLM2-135M-Instruct, 8 prompts, 8 completions each
    python benchmarks/rollout.py --device cuda --dtype bfloat16 --prompts 64 --max-new-tokens 512
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl.demo.model import demo_model
from trl.engine.probe import attach
from trl.rollout.generate import InProcessSampler
from trl.rollout.types import Request, Sampling

QUESTIONS = (
    "What is the capital of France?",
    "Name three primary colours.",
    "Write a short poem about the sea.",
    "How do I boil an egg?",
    "What is 12 plus 30?",
    "Give me one word for very happy.",
    "Explain in two sentences why the sky is blue.",
    "Translate 'good morning' to Spanish.",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", help="folder of a model [SmolLM2-135M-Instruct, from its package]")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--generations", type=int, default=8)
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path, help="a file for the numbers")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    path = options.model or demo_model()
    tokenizer = AutoTokenizer.from_pretrained(path)
    dtype = getattr(torch, options.dtype)
    model, other = (AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(options.device).eval() for _ in range(2))
    attach(model)
    questions = [QUESTIONS[index % len(QUESTIONS)] for index in range(options.prompts)]
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=True
        )["input_ids"]
        for question in questions
    ]
    same = compare_greedy(model, other, tokenizer, prompts, options.device)
    print(f"greedy tokens: {same}")
    rates: dict[str, list[float]] = {"ours": [], "generate": []}
    counts: dict[str, list[int]] = {"ours": [], "generate": []}
    for number in range(options.rounds + 1):
        for side in ("ours", "generate") if number % 2 else ("generate", "ours"):
            start = time.perf_counter()
            if side == "ours":
                tokens = ours(model, tokenizer, prompts, options, number)
            else:
                tokens = theirs(other, tokenizer, prompts, options, number)
            seconds = time.perf_counter() - start
            if number:  # the first is a warm-up
                rates[side].append(tokens / seconds)
                counts[side].append(tokens)
                print(f"round {number}: {side:>8} {tokens:>6} tokens, {tokens / seconds:>7.1f} a second", flush=True)
    ratios = [a / b for a, b in zip(rates["ours"], rates["generate"], strict=True)]
    print(f"\n{'':<24}{'ours':>10}{'generate':>10}")
    for name, table in (("tokens a second", rates), ("tokens a round", counts)):
        print(f"{name:<24}{statistics.median(table['ours']):>10.1f}{statistics.median(table['generate']):>10.1f}")
    print(f"\nours / generate  {statistics.median(ratios):.2f}× (rounds {min(ratios):.2f} – {max(ratios):.2f})")
    cuda = options.device == "cuda"
    found = {"greedy": same, "rates": rates, "counts": counts, "ratios": ratios,
             "device": torch.cuda.get_device_name() if cuda else "cpu",
             "peak_bytes": torch.cuda.max_memory_allocated() if cuda else None}  # fmt: skip
    if options.json:
        options.json.write_text(json.dumps(found, indent=1), encoding="utf-8")


def sample(sampler: Any, model: Any, requests: list[Request], sampling: Sampling) -> Any:
    sampler.sync(model, 0)
    return sampler.generate(requests, sampling)


def ours(model: Any, tokenizer: Any, prompts: list[list[int]], options: Any, seed: int) -> int:
    requests = [Request(prompt, options.generations, (seed, place)) for place, prompt in enumerate(prompts)]
    sampling = Sampling(max_new_tokens=options.max_new_tokens, stop_ids=(tokenizer.eos_token_id,))
    drawn = sample(InProcessSampler(), model, requests, sampling)
    return sum(len(each.ids) for group in drawn for each in group)


def theirs(model: Any, tokenizer: Any, prompts: list[list[int]], options: Any, seed: int) -> int:
    torch.manual_seed(seed)
    repeated = [prompt for prompt in prompts for _ in range(options.generations)]
    inputs = padded(tokenizer, repeated, options.device)
    with torch.no_grad():
        output = model.generate(
            **inputs, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=options.max_new_tokens,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
    completions = output[:, inputs["input_ids"].shape[1] :]
    ended = (completions == tokenizer.eos_token_id).int()
    first = torch.where(ended.any(1), ended.argmax(1) + 1, completions.shape[1])
    return int(first.sum())


def padded(tokenizer: Any, prompts: list[list[int]], device: str) -> Any:
    return tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt").to(device)


def compare_greedy(model: Any, other: Any, tokenizer: Any, prompts: list[list[int]], device: str) -> str:
    sampling = Sampling(max_new_tokens=24, temperature=0, stop_ids=(tokenizer.eos_token_id,))
    drawn = sample(InProcessSampler(), model, [Request(prompt, 1, (0,)) for prompt in prompts], sampling)
    same = 0
    for prompt, [completion] in zip(prompts, drawn, strict=True):
        with torch.no_grad():
            output = other.generate(
                **padded(tokenizer, [prompt], device), do_sample=False, max_new_tokens=24,
                eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
            )  # fmt: skip
        same += completion.ids == output[0, len(prompt) :].tolist()
    return f"the same for {same} of {len(prompts)} prompts"


if __name__ == "__main__":
    main()
