"""How well `trl plan` foretells memory.

    python benchmarks/plan_accuracy.py                  # predicted against measured peaks of real runs, on the CPU
    python benchmarks/plan_accuracy.py --only dpo        # those whose name contains a word
    python benchmarks/plan_accuracy.py --tracked         # against torch's MemTracker on 8B shapes without values

A real run is a process of its own: SmolLM2's shape with few layers and random weights, two optimizer steps. Its memory
is what its resident set grows by, from before the model is made; freed memory goes back to the system at once (glibc's
settings, as `--exact-memory` of the other benchmarks), and a tiny run of the same kind before has loaded all code. The
last column is of the plan without a trace, which the line before step 1 has for a small model on a CPU.
`--tracked` runs six layers of 8B shapes forward and backward on fake tensors under torch's `MemTracker`, which counts
what the plan extrapolates from one and two. (With all layers it takes many minutes.)
"""

import argparse
import ctypes
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

HERE = Path(__file__).resolve().parent
GIB = 2**30
EXACT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_MMAP_MAX_": "1000000", "MALLOC_TOP_PAD_": "0"}

# What differs from: sft, all weights, float32, 4 layers, 2 rows of 256 + 256 tokens, checkpointing, fused AdamW.
REAL: dict[str, dict[str, Any]] = {
    "sft": {},
    "sft kept": {"checkpointing": False},
    "sft bf16 autocast": {"autocast": True},
    "sft bf16 autocast kept": {"autocast": True, "checkpointing": False},
    "sft bf16 weights": {"dtype": "bfloat16", "autocast": True},
    "sft accumulated": {"accumulation": 2, "rows": 1},
    "sft adafactor": {"optim": "adafactor"},
    "sft sgd": {"optim": "sgd", "rows": 4},
    "sft adamw not fused": {"optim": "adamw_torch"},
    "sft long": {"prompt": 1024, "completion": 1024, "rows": 1, "checkpointing": False},
    "sft lora": {"lora": True, "checkpointing": False},
    "sft lora 6 layers": {"lora": True, "layers": 6, "rows": 4},
    "sft lora bf16": {"lora": True, "dtype": "bfloat16", "autocast": True, "checkpointing": False, "rows": 4},
    "dpo": {"method": "dpo"},
    "dpo lora kept": {"method": "dpo", "lora": True, "checkpointing": False},
    "dpo bf16 autocast": {"method": "dpo", "autocast": True, "layers": 6},
    "kto": {"method": "kto", "rows": 4},
    "kto lora kept": {"method": "kto", "rows": 4, "lora": True, "checkpointing": False, "accumulation": 2},
    "reward": {"method": "reward", "checkpointing": False},
    "reward lora": {"method": "reward", "lora": True, "rows": 4, "checkpointing": False},
    "grpo": {"method": "grpo", "rows": 8, "prompt": 64, "completion": 64},
    "grpo lora kept": {"method": "grpo", "rows": 8, "prompt": 128, "completion": 96, "lora": True,
                       "checkpointing": False},
    "grpo wide": {"method": "grpo", "rows": 16, "prompt": 32, "completion": 48, "layers": 2},
    "grpo bf16 weights": {"method": "grpo", "rows": 8, "prompt": 64, "completion": 64, "dtype": "bfloat16",
                          "autocast": True},
    "rloo": {"method": "rloo", "rows": 8, "prompt": 64, "completion": 64, "layers": 2},
    "online dpo": {"method": "online-dpo", "rows": 8, "prompt": 64, "completion": 64, "layers": 2},
    "ppo": {"method": "ppo", "rows": 4, "prompt": 64, "completion": 64},
    "gkd": {"method": "gkd", "rows": 4, "prompt": 64, "completion": 64, "layers": 2},
}  # fmt: skip
SAMPLING = ("grpo", "rloo", "online-dpo", "ppo")  # draw completions, whose length is that of the case
DEFAULT = {"method": "sft", "dtype": "float32", "autocast": False, "lora": False, "layers": 4, "rows": 2, "prompt": 256,
           "completion": 256, "accumulation": 1, "checkpointing": True, "optim": "adamw_torch_fused"}  # fmt: skip


def config_of(case: dict[str, Any], tiny: bool) -> Any:
    from transformers import AutoConfig

    from trl.demo.model import demo_model

    config = AutoConfig.from_pretrained(demo_model())
    config.num_hidden_layers = case["layers"]
    config.layer_types = None if getattr(config, "layer_types", None) is None else config.layer_types[: case["layers"]]
    if tiny:
        config.hidden_size, config.intermediate_size, config.num_hidden_layers = 48, 64, 1
        config.num_attention_heads = config.num_key_value_heads = 2
        config.head_dim = 24
    return config


def rows_of(case: dict[str, Any], count: int) -> Any:
    """Tokenised rows of the given lengths, as the trainers make them."""
    from datasets import Dataset

    ids = [100 + place % 4000 for place in range(case["prompt"] + case["completion"])]
    prompt, completion = ids[: case["prompt"]], ids[case["prompt"] :]
    # Prompts differ, so that no two rows share one.
    prompts = [[200 + row, *prompt[1:]] for row in range(count)]
    if case["method"] in ("sft", "gkd"):
        untrained = 1 if case["method"] == "sft" else case["prompt"]
        columns: dict[str, Any] = {"input_ids": [[*each, *completion] for each in prompts], "loss_mask": None}
        columns["loss_mask"] = [[False] * untrained + [True] * (len(ids) - untrained)] * count
    elif case["method"] == "kto":
        columns = {"prompt_ids": prompts, "completion_ids": [completion] * count, "label": [True, False] * (count // 2)}
        columns["kl_completion_ids"] = [completion[::-1]] * count
    elif case["method"] in SAMPLING:
        columns = {"prompt": ["" for _ in prompts], "prompt_ids": prompts}
    else:
        columns = {
            "prompt_ids": prompts,
            "chosen_ids": [completion] * count,
            "rejected_ids": [completion[::-1]] * count,
        }
    return Dataset.from_dict({**columns, "row": list(range(count))})


def lora(case: dict[str, Any]) -> Any:
    from peft import LoraConfig

    return LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM") if case["lora"] else None


def arguments(case: dict[str, Any], folder: str) -> Any:
    import trl
    from trl.methods import METHODS

    name = METHODS[case["method"]].name
    own: dict[str, Any] = {"max_length": case["prompt"] + case["completion"]}
    if case["method"] in SAMPLING:
        own = {"max_completion_length": case["completion"]}
        own |= {} if name == "OnlineDPO" else {"max_prompt_length": case["prompt"]}
        own |= {"num_generations": 8} if name in ("GRPO", "RLOO") else {}
        own |= {"beta": 0.0} if name in ("GRPO", "RLOO") else {"num_iterations": 1} if name == "PPO" else {}
    elif name == "GKD":  # the first step on the data's answers, the second on its own
        own |= {"max_new_tokens": case["completion"], "lmbda": 0.5}
    return name, getattr(trl, f"{name}Config")(
        output_dir=folder, use_cpu=True, bf16=case["autocast"], optim=case["optim"], max_steps=2, report_to="none",
        save_strategy="no", disable_tqdm=True, logging_steps=1, gradient_checkpointing=case["checkpointing"],
        per_device_train_batch_size=case["rows"], gradient_accumulation_steps=case["accumulation"], **own,
    )  # fmt: skip


def trained(case: dict[str, Any], tiny: bool, folder: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    import trl
    from trl.demo.model import demo_model

    name, args = arguments(case, folder)
    config = config_of(case, tiny)
    kind: Any = AutoModelForCausalLM
    if case["method"] == "reward":
        config.num_labels, kind = 1, AutoModelForSequenceClassification
    torch.manual_seed(0)
    model = kind.from_config(config, dtype=getattr(torch, case["dtype"]))
    rest: dict[str, Any] = {"reward_funcs": [_length]} if case["method"] in SAMPLING else {}
    if case["method"] == "gkd":
        rest["teacher_model"] = kind.from_config(config, dtype=getattr(torch, case["dtype"]))
    trainer = getattr(trl, f"{name}Trainer")(
        model=model, args=args, train_dataset=rows_of(case, 32), peft_config=lora(case),
        processing_class=AutoTokenizer.from_pretrained(demo_model()), **rest)  # fmt: skip
    trainer.train()


def _length(completions: list[Any], **kwargs: Any) -> list[float]:
    return [float(hash(str(each)) % 7) for each in completions]


def real(case: dict[str, Any]) -> dict[str, Any]:
    """The plan of a case and what its run took, in this process."""
    import torch
    from common_worker import Memory

    from trl.plan import plan
    from trl.plan.reading import run_of

    torch.set_num_threads(case["threads"])
    with tempfile.TemporaryDirectory() as folder:
        _, args = arguments(case, folder)
        run = run_of(
            case["method"], config_of(case, False), args, dtype=case["dtype"], adapter=lora(case),
            prompt=case["prompt"], completion=case["completion"], device="cpu",
            teacher=config_of(case, False) if case["method"] == "gkd" else None,
            trained=case["completion"] / (case["prompt"] + case["completion"]) if case["method"] == "gkd" else 1.0,
        )  # fmt: skip
        found = plan(run)
        phase = found.peak
        trained(case, True, folder)
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        memory = Memory("cpu")
        memory.mark()
        trained(case, False, folder)
        return {
            "predicted": phase.total,
            "estimated": plan(run, rough=True).peak.total,
            "measured": memory.growth(),
            "how": memory.how,
            "phases": {each.name: each.parts for each in found.phases()},
        }


def in_process(case: dict[str, Any], mode: str) -> dict[str, Any]:
    environment = {**os.environ, **EXACT, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, __file__, mode, json.dumps(case)], env=environment, text=True,
                          capture_output=True)  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{case}: {done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="cases whose name contains this")
    parser.add_argument("--tracked", action="store_true", help="against MemTracker on 8B shapes")
    parser.add_argument("--parts", action="store_true", help="print the plan's parts of each case, in MiB")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write all numbers here")
    parser.add_argument("--one-real", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--one-tracked", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    for mode, function in (("real", real), ("tracked", tracked)):
        if (case := getattr(options, f"one_{mode}")) is not None:
            print(json.dumps(function(case)))
            return
    cases, default, mode = (TRACKED, SHAPED, "tracked") if options.tracked else (REAL, DEFAULT, "real")
    found: dict[str, Any] = {}
    print(f"{'':28}{'predicted':>12}{'measured':>12}{'error':>9}   that of the estimate", flush=True)
    for name, case in cases.items():
        if options.only and options.only not in name:
            continue
        each = in_process({**default, **case, "threads": options.threads}, f"--one-{mode}")
        found[name] = each
        error = each["predicted"] / each["measured"] - 1
        rough = f"{each['estimated'] / each['measured'] - 1:+9.1%}" if "estimated" in each else ""
        sizes = f"{each['predicted'] / GIB:10.3f} G{each['measured'] / GIB:10.3f} G"
        print(f"{name:28}{sizes}{error:+9.1%}{rough}", flush=True)
        if options.parts:
            for phase, parts in each["phases"].items():
                print(
                    f"    {phase}: " + ", ".join(f"{part} {size / 2**20:.0f}" for part, size in parts.items() if size)
                )
    errors = [abs(each["predicted"] / each["measured"] - 1) for each in found.values()]
    print(f"{len(errors)} cases: median error {statistics.median(errors):.1%}, largest {max(errors):.1%}")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1), encoding="utf-8")


# --- against MemTracker ---------------------------------------------------------------------------------------------

SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", dict(vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
                                  num_attention_heads=32, num_key_value_heads=8)),
    "qwen3": ("Qwen3Config", dict(vocab_size=151936, hidden_size=4096, intermediate_size=12288, num_hidden_layers=36,
                                  num_attention_heads=32, num_key_value_heads=8, head_dim=128)),
    "mistral": ("MistralConfig", dict(vocab_size=32768, hidden_size=4096, intermediate_size=14336,
                                      num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
                                      sliding_window=1024)),
    "gemma2": ("Gemma2Config", dict(vocab_size=256000, hidden_size=3584, intermediate_size=14336,
                                    num_hidden_layers=42, num_attention_heads=16, num_key_value_heads=8,
                                    head_dim=256)),
}  # fmt: skip
# What differs from: six layers of Llama 8B, sft, bfloat16, all weights, 2 rows of 1024 + 1024 tokens, checkpointing.
TRACKED: dict[str, dict[str, Any]] = {
    "sft": {},
    "sft kept": {"checkpointing": False},
    "sft autocast over float32": {"dtype": "float32", "autocast": True},
    "sft autocast kept": {"dtype": "float32", "autocast": True, "checkpointing": False},
    "sft accumulated": {"accumulation": 4},
    "sft 8 rows": {"rows": 8},
    "sft lora": {"lora": True},
    "sft lora kept": {"lora": True, "checkpointing": False},
    "sft qlora": {"lora": True, "bits": 4},
    "sft lora autocast": {"lora": True, "dtype": "float32", "autocast": True},
    "dpo": {"method": "dpo"},
    "dpo lora": {"method": "dpo", "lora": True},
    "dpo lora kept": {"method": "dpo", "lora": True, "checkpointing": False},
    "kto lora": {"method": "kto", "lora": True, "rows": 4},
    "reward": {"method": "reward"},
    "grpo lora": {"method": "grpo", "lora": True, "rows": 16, "prompt": 512, "completion": 512},
    "ppo": {"method": "ppo", "rows": 4, "prompt": 512, "completion": 512},
    "sft qwen3 kept": {"shape": "qwen3", "checkpointing": False},
    "dpo mistral lora": {"shape": "mistral", "method": "dpo", "lora": True},
    "sft mistral": {"shape": "mistral"},
    "sft gemma2 lora": {"shape": "gemma2", "lora": True, "prompt": 512, "completion": 512},
}  # fmt: skip
SHAPED: dict[str, Any] = {
    "shape": "llama", "method": "sft", "dtype": "bfloat16", "autocast": False, "lora": False, "bits": 0, "rows": 2,
    "prompt": 1024, "completion": 1024, "accumulation": 1, "checkpointing": True,
}  # fmt: skip


def tracked(case: dict[str, Any]) -> dict[str, Any]:
    """What the plan extrapolates of activations and gradients, and what MemTracker counts with all layers."""
    import contextlib

    import torch
    import transformers
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.distributed._tools.mem_tracker import MemTracker

    from trl.engine.device import standing_for
    from trl.methods import METHODS
    from trl.plan import Plan, Run
    from trl.plan import trace as traces
    from trl.plan.shapes import layers_of

    torch.set_num_threads(case["threads"])
    kind, sizes = SHAPES[case["shape"]]
    run = Run(
        getattr(transformers, kind)(**{**sizes, "num_hidden_layers": 6}), case["method"],
        dtype=getattr(torch, case["dtype"]),
        autocast=torch.bfloat16 if case["autocast"] else None, adapter=lora(case), bits=case["bits"],
        rows=case["rows"], accumulation=case["accumulation"], prompt=case["prompt"], completion=case["completion"],
        checkpointing=case["checkpointing"], has_reference=case["method"] in ("dpo", "kto"),
        head=METHODS[case["method"]].head,
    )  # fmt: skip
    found = Plan(run)
    predicted = max(held.total for held in found.sections(found.amount))
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with standing_for("cuda"):
        model, batch, teacher = traces.prepared(run, layers_of(run.config), found.amount, mode)
        held = sum(each.numel() * each.element_size() for each in model.parameters())
        held += sum(
            each.grad.numel() * each.grad.element_size() for each in model.parameters() if each.grad is not None
        )
        cast = torch.autocast("cpu", run.autocast) if run.autocast else contextlib.nullcontext()
        tracker: Any = MemTracker()
        handle = SimpleNamespace(remove=lambda: None)  # it would put hooks on weights that take no gradient
        for weight in model.parameters():
            if not weight.requires_grad:
                tracker._param_to_grad_hook_handles[weight] = (handle, handle)
        tracker.track_external(model)
        passes = traces.score

        def anew(*args: Any, **kwargs: Any) -> Any:  # its statistics of modules, which we do not read, know one pass
            tracker.reset_mod_stats()
            return passes(*args, **kwargs)

        traces.score = anew
        with mode, tracker:
            with cast:
                total = traces._loss(run, model, batch, teacher)
            total.backward()
    peak = max(sum(sizes.values()) if "Total" not in sizes else sizes["Total"]
               for sizes in tracker.get_tracker_snapshot("peak").values())  # fmt: skip
    return {"predicted": predicted, "measured": peak - held, "phases": {}}


if __name__ == "__main__":
    main()
