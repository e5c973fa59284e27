"""A step of training on a model of eight billion weights: one part, by whichever `trl` the interpreter has.

    python benchmarks/large.py sft-lora --model FOLDER --device cuda --json FILE

`gpu.py --parts` makes the model (Llama 3's 8B shape, random bf16 weights) and runs a part in both libraries, one after
the other, because two models do not fit on one card. Rows are random token ids, all of one length, and every token of
a row of SFT trains. Checkpointing is on, attention is what each library chooses, upstream's fused head is on (TRL 1.16
has no other).

    sft-full      4 rows of 2,048 tokens, all weights, AdamW with 8-bit moments
    sft-lora      the same with an adapter (r=16 on all linear layers) over bf16 weights
    sft-qlora     the same over 4-bit weights (nf4)
    dpo-lora      4 pairs: a prompt of 512 tokens, two completions of 512; the reference is the model without adapter
    grpo-update   4 prompts of 512 tokens with 8 completions of 512 each, which are given: training alone is timed

Steps a second are counted from the end of a step to the end of the next, less what GRPO takes to draw and judge. Tokens
are those of the task: a prompt that completions share counts once. So does the work, which is counted without
recomputation: 2 operations for a weight and token forward, 2 for the gradient of the input, 2 for that of a weight that
trains; a reference is one more forward pass. The share is of the card's dense bf16 peak, where `--peak` gives it.
"""

import argparse
import json
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

import trl

OURS = int(trl.__version__.split(".")[0]) >= 2


class Part(NamedTuple):
    """`groups` prompts of `prompt` tokens, with `each` completions of `completion` tokens."""

    method: str
    groups: int
    prompt: int
    each: int
    completion: int
    adapter: bool = True
    four_bits: bool = False

    def tokens(self) -> int:
        return self.groups * (self.prompt + self.each * self.completion)

    def trained(self) -> int:
        return self.tokens() if self.method == "sft" else self.groups * self.each * self.completion

    def work(self, layers: int, head: int, width: int, depth: int) -> float:
        """Operations of a step. `layers` and `head` are numbers of weights, `width` that of all heads together."""
        seen = self.prompt**2 / 2 + self.each * (self.prompt * self.completion + self.completion**2 / 2)
        reference = 1 if self.method == "dpo" else 0
        products = 2.0 * (layers * self.tokens() + head * self.trained())
        return products * ((2 if self.adapter else 3) + reference) + 4.0 * self.groups * seen * width * depth * (
            3 + reference
        )


PARTS = {
    "sft-full": Part("sft", 4, 0, 1, 2048, adapter=False),
    "sft-lora": Part("sft", 4, 0, 1, 2048),
    "sft-qlora": Part("sft", 4, 0, 1, 2048, four_bits=True),
    "dpo-lora": Part("dpo", 4, 512, 2, 512),
    "grpo-update": Part("grpo", 4, 512, 8, 512),
}


def dried(part: Part) -> Part:
    """A part with short rows."""
    return part._replace(prompt=part.prompt // 64, completion=part.completion // 64, each=min(part.each, 4))


class Clock(TrainerCallback):
    """When each step ended, and the seconds that were not training."""

    def __init__(self, device: str) -> None:
        self.device, self.ends, self.apart = device, [], []
        self.drawing = 0.0

    def now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.ends.append(self.now())
        self.apart.append(self.drawing)
        self.drawing = 0.0

    def outside(self, function: Any) -> Any:
        """The function, its time kept apart."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            began = self.now()
            result = function(*args, **kwargs)
            self.drawing += self.now() - began
            return result

        return timed

    def seconds(self) -> list[float]:
        """Of each step but the first."""
        spans = zip(self.ends, self.ends[1:], self.apart[1:], strict=False)
        return [end - begin - apart for begin, end, apart in spans]


def ids_of(draw: random.Random, count: int, vocabulary: int) -> list[int]:
    return [draw.randrange(300, vocabulary) for _ in range(count)]


def opened(options: argparse.Namespace, part: Part) -> Any:
    further: dict[str, Any] = {}
    if part.four_bits:
        from transformers import BitsAndBytesConfig

        further["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
    return AutoModelForCausalLM.from_pretrained(
        options.model, dtype=torch.bfloat16, device_map={"": options.device}, **further
    )


def trainer_of(options: argparse.Namespace, part: Part, model: Any, folder: str, clock: Clock) -> Any:
    from datasets import Dataset, disable_progress_bars

    disable_progress_bars()
    dry, cuda = options.device == "cpu", options.device == "cuda"
    steps = options.steps + options.warm_up
    settings: dict[str, Any] = {
        "output_dir": folder, "max_steps": steps, "learning_rate": 1e-5, "lr_scheduler_type": "constant", "bf16": cuda,
        "use_cpu": not cuda, "report_to": "none", "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True,
        "gradient_checkpointing": True, "per_device_train_batch_size": part.groups, "warmup_steps": 0,
        "optim": "adamw_8bit" if part.method == "sft" and not part.adapter and not dry else "adamw_torch_fused",
    }  # fmt: skip
    further: dict[str, Any] = {"processing_class": AutoTokenizer.from_pretrained(options.model), "callbacks": [clock]}
    if part.adapter:
        import peft

        further["peft_config"] = peft.LoraConfig(
            r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
        )
    if part.method != "grpo":
        settings["train_sampling_strategy"] = "sequential"  # both sides take the rows as they come
    draw, vocabulary = random.Random(0), model.config.vocab_size
    if part.method == "sft":
        rows = [ids_of(draw, part.completion, vocabulary) for _ in range(part.groups * steps)]
        data = Dataset.from_dict({"input_ids": rows, "labels": rows})
        args = trl.SFTConfig(**settings, max_length=part.completion)
        return trl.SFTTrainer(model, args, train_dataset=data, **further)
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    if part.method == "dpo":
        lengths = (part.prompt, part.completion, part.completion)
        pairs = [
            {name: ids_of(draw, length, vocabulary) for name, length in zip(names, lengths, strict=True)}
            for _ in range(part.groups * steps)
        ]
        args = trl.DPOConfig(**settings, max_length=part.prompt + part.completion)
        return prepared(trl.DPOTrainer)(model=model, args=args, train_dataset=Dataset.from_list(pairs), **further)
    return grpo(options, part, model, settings, further, clock)


def prepared(base: type) -> type:
    """TRL's trainer for rows of token ids; this library's takes them as they are."""
    if OURS:
        return base

    class Prepared(base):  # type: ignore[misc, valid-type]
        def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
            return dataset

    return Prepared


def grpo(options: argparse.Namespace, part: Part, model: Any, settings: dict[str, Any], further: dict[str, Any],
         clock: Clock) -> Any:  # fmt: skip
    from datasets import Dataset

    draw, vocabulary = random.Random(1), model.config.vocab_size
    count = part.groups * (options.steps + options.warm_up)
    words = [" ".join(f"{draw.randrange(10)}" for _ in range(part.prompt // 2)) for _ in range(count)]
    settings["per_device_train_batch_size"] = part.each
    args = trl.GRPOConfig(
        **settings, gradient_accumulation_steps=part.groups, num_generations=part.each, temperature=1.0, beta=0.0,
        max_completion_length=part.completion,
    )  # fmt: skip

    def reward(completions: Any, **columns: Any) -> list[float]:
        return [draw.random() for _ in completions]

    data = Dataset.from_dict({"prompt": words})
    trainer = trl.GRPOTrainer(model=model, reward_funcs=reward, args=args, train_dataset=data, **further)

    def given() -> list[int]:
        return ids_of(draw, part.completion, vocabulary)

    if OURS:
        trainer.sampler = Given(given)
        trainer.collect = clock.outside(trainer.collect)
    else:
        trainer._generate_single_turn = lambda prompts, *_, **__: ([given() for _ in prompts], None)
        trainer._generate_and_score_completions = clock.outside(trainer._generate_and_score_completions)
    return trainer


class Given:
    """This library's sampler, with completions that are given."""

    def __init__(self, given: Any) -> None:
        self.given = given

    def sync(self, model: Any, version: int) -> None:
        pass

    def generate(self, requests: Any, sampling: Any) -> Any:
        from trl.rollout.types import Completion

        return [
            [Completion(ids, [-1.0] * len(ids), False) for ids in (self.given() for _ in range(each.samples))]
            for each in requests
        ]


def measured(options: argparse.Namespace) -> dict[str, Any]:
    part = dried(PARTS[options.part]) if options.device == "cpu" else PARTS[options.part]
    model = opened(options, part)
    head = model.get_output_embeddings()
    linear = [each for each in model.modules() if isinstance(each, nn.Linear) and each is not head]
    config = model.config
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    work = part.work(
        sum(each.in_features * each.out_features for each in linear), head.in_features * head.out_features,
        config.num_attention_heads * size, config.num_hidden_layers,
    )  # fmt: skip
    clock = Clock(options.device)
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(options, part, model, folder, clock)
        trainer.train()
    seconds = clock.seconds()[options.warm_up - 1 :]
    middle = statistics.median(seconds)
    cuda = options.device == "cuda"
    return {
        "part": options.part,
        "library": f"trl {trl.__version__}",
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "torch": torch.__version__,
        "seconds": seconds,
        "tokens": part.tokens(),
        "tokens_per_second": part.tokens() / middle,
        "work": work,
        "share": work / middle / (options.peak * 1e12) if options.peak else None,
        "peak_bytes": torch.cuda.max_memory_allocated() if cuda else None,
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
    }


def shown(found: dict[str, Any]) -> str:
    share = "" if found["share"] is None else f", {found['share']:.1%} of the peak"
    memory = "" if found["peak_bytes"] is None else f", {found['peak_bytes'] / 2**30:.2f} GiB at the peak"
    return (
        f"{found['part']}, {found['library']}: {statistics.median(found['seconds']):.3f} s a step "
        f"({min(found['seconds']):.3f} – {max(found['seconds']):.3f}), {found['tokens_per_second']:,.0f} tokens/s"
        f"{share}{memory}; losses {' '.join(f'{each:.4f}' for each in found['losses'])}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--model", required=True, help="folder with a tokenizer and weights")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda", help="cpu: short rows")
    parser.add_argument("--steps", type=int, default=4, help="steps that are timed")
    parser.add_argument("--warm-up", type=int, default=2, help="steps before, at least one")
    parser.add_argument("--peak", type=float, help="dense bf16 operations of the device, in TFLOP/s")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found = measured(options)
    print(shown(found), flush=True)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
