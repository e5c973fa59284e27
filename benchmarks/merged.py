"""Drawing with a LoRA adapter: its two products in every layer against weights with the adapter merged in.

    python benchmarks/merged.py --layers 2 --rows 8 64 --threads 1

SmolLM2-135M-Instruct or its first layers, fp32, r=16 on all linear layers. Both sides are this library's sampler on
the same prompts; no token stops, so both draw equally many. They take turns. Merged weights are a copy of the model,
made before the clock starts: what is measured is the most that merging can gain. The time of merging all layers, into
buffers that are there already, is printed beside it.
"""

import argparse
import copy
import json
import statistics
import time
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from rollout import QUESTIONS, sample
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl.demo.model import demo_model
from trl.engine.probe import attach
from trl.rollout.generate import InProcessSampler
from trl.rollout.types import Request, Sampling


def opened(layers: int | None) -> Any:
    model = AutoModelForCausalLM.from_pretrained(demo_model(), dtype=torch.float32)
    if layers:
        model.model.layers = model.model.layers[:layers]
        model.config.num_hidden_layers = layers
    torch.manual_seed(0)
    config = LoraConfig(r=16, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(model, config).eval()
    for name, weight in model.named_parameters():
        if ".lora_B." in name:
            weight.data *= 0.02  # a small change, as a trained one is
    return model


def seconds_to_merge(model: Any) -> float:
    """The time of W + s B A for every layer."""
    layers = [each for each in model.modules() if hasattr(each, "lora_A") and "default" in each.lora_A]
    buffers = [torch.empty_like(each.weight) for each in layers]
    with torch.no_grad():
        for _ in range(2):
            start = time.perf_counter()
            for layer, buffer in zip(layers, buffers, strict=True):
                a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
                torch.addmm(layer.weight, b, a, alpha=layer.scaling["default"], out=buffer)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--layers", type=int, help="the first layers of the model [all]")
    parser.add_argument("--rows", type=int, nargs="+", default=[8, 64], help="completions that are drawn together")
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", help="a file for the numbers")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    tokenizer = AutoTokenizer.from_pretrained(demo_model())
    model = opened(options.layers)
    merged = copy.deepcopy(model).merge_and_unload()
    for each in (model, merged):
        attach(each)
    print(f"merging takes {seconds_to_merge(model):.3f} s", flush=True)
    prompts = [
        tokenizer.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True,
                                      return_dict=True)["input_ids"]
        for question in QUESTIONS
    ]  # fmt: skip
    sampling = Sampling(max_new_tokens=options.max_new_tokens, stop_ids=())
    found: dict[str, Any] = {"layers": options.layers, "threads": options.threads}
    for rows in options.rows:
        rates: dict[str, list[float]] = {"adapter": [], "merged": []}
        for number in range(options.rounds + 1):
            requests = [Request(ids, rows // len(prompts), (number, at)) for at, ids in enumerate(prompts)]
            sides = {"adapter": model, "merged": merged}
            for side in sides if number % 2 else reversed(sides):
                start = time.process_time()
                drawn = sample(InProcessSampler(), sides[side], requests, sampling)
                tokens = sum(len(each.ids) for group in drawn for each in group)
                if number:  # the first is a warm-up
                    rates[side].append(tokens / (time.process_time() - start) * options.threads)
        ratios = [b / a for a, b in zip(*rates.values(), strict=True)]
        found[rows] = {"ratios": ratios, **{side: statistics.median(each) for side, each in rates.items()}}
        print(f"{rows} rows: adapter {found[rows]['adapter']:.1f}, merged {found[rows]['merged']:.1f} tokens a second, "
              f"{statistics.median(ratios):.2f}× ({min(ratios):.2f} – {max(ratios):.2f})", flush=True)  # fmt: skip
    if options.json:
        with open(options.json, "w") as file:
            json.dump(found, file)


if __name__ == "__main__":
    main()
