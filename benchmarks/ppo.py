"""PPO of this library against TRL 1.12, the last release with a trainer for it, in one run.

Both sides sample responses to the same prompts, score them with the same reward model and take the same number of
optimizer steps. TRL trains a value model of the policy's size beside it; this library has a value head on the policy's
hidden states.

    python benchmarks/ppo.py --upstream upstream/bin/python --model FOLDER
    python benchmarks/ppo.py --upstream upstream/bin/python --model FOLDER --task instructions --response 53

The first samples responses of one length to prompts of one length, so that nothing is padded on either side. The second
has the prompts of `examples/grpo_instructions.py`, and a response ends where the policy ends it; FOLDER is then an
instruction-tuned model. Neither side checkpoints activations: TRL 1.12 takes `gradient_checkpointing` and never turns
it on, so that `--checkpointing` changes this library alone.

`--upstream` is the interpreter of an environment with TRL 1.12.0 (made as `sft.py` says for 1.16). The sides run in
processes of their own, in turn, `--turns` times. The first update of each process is a warm-up. `--json` keeps all
numbers.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
EPOCHS = 4


def work(settings: dict[str, Any]) -> dict[str, Any]:
    """One side: seconds of each update, and the memory that training adds."""
    import torch
    from common_worker import Memory
    from datasets import Dataset
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
        TrainerCallback,
    )

    import trl

    ours = int(trl.__version__.split(".")[0]) >= 2
    device, folder = settings["device"], settings["model"]
    if settings["threads"]:
        torch.set_num_threads(settings["threads"])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    pad = tokenizer.pad_token_id

    def scorer(seed: int) -> Any:
        torch.manual_seed(seed)
        config = AutoConfig.from_pretrained(folder)
        config.num_labels, config.pad_token_id = 1, pad
        return AutoModelForSequenceClassification.from_config(config, dtype=torch.float32).to(device)

    draw = torch.Generator().manual_seed(0)
    updates, batch = settings["updates"], settings["batch"]
    if settings["task"] == "random":
        rows = [torch.randint(100, len(tokenizer), (settings["prompt"],), generator=draw).tolist()
                for _ in range(updates * batch)]  # fmt: skip
    else:
        sys.path.insert(0, str(HERE.parent / "examples"))
        from grpo_instructions import WORDS
        from grpo_instructions import rows as instructions

        rows = [tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)
                for row in instructions(updates * batch, WORDS, seed=0)]  # fmt: skip
    policy = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device)
    reward_model = scorer(1)
    memory, stamps = Memory(device), []

    def now() -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    class Stamps(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            stamps.append(now())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            stamps.append(now())

    common = {
        "output_dir": settings["output_dir"], "per_device_train_batch_size": settings["micro"],
        "gradient_accumulation_steps": batch // settings["micro"], "num_ppo_epochs": EPOCHS, "report_to": "none",
        "response_length": settings["response"], "bf16": device == "cuda", "use_cpu": device == "cpu",
        "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1,
        "gradient_checkpointing": settings["checkpointing"],
        "num_sample_generations": 0, "learning_rate": 1e-6,
    }  # fmt: skip
    if settings["task"] != "random":
        common["stop_token"] = "eos"
    data = Dataset.from_dict({"input_ids": rows})
    memory.mark()
    if ours:
        import dataclasses

        common["max_tokens_per_micro_batch"] = settings["budget"]
        config = trl.PPOConfig(**common, max_steps=updates * EPOCHS, shuffle_dataset=False)
        trainer = trl.PPOTrainer(args=config, processing_class=tokenizer, model=policy, reward_model=reward_model,
                                 train_dataset=data, callbacks=[Stamps()])  # fmt: skip
        if settings["task"] == "random":
            trainer.sampling = dataclasses.replace(trainer.sampling, stop_ids=())
    else:
        from trl.experimental.ppo import PPOConfig, PPOTrainer

        config = PPOConfig(**common, total_episodes=updates * batch)
        trainer = PPOTrainer(args=config, processing_class=tokenizer, model=policy, ref_model=None,
                             reward_model=reward_model, value_model=scorer(2), train_dataset=data,
                             callbacks=[Stamps()])  # fmt: skip
    trainer.train()
    seconds = [end - start for start, end in zip(stamps, stamps[1:], strict=False)]
    if ours:
        seconds = [sum(seconds[place : place + EPOCHS]) for place in range(0, len(seconds), EPOCHS)]
    weights = sum(each.numel() for each in policy.parameters())
    return {
        "seconds": seconds[1:],
        # What training adds to the policy and the reward model, which both sides are given; and all of it.
        "growth": memory.growth(),
        "peak": torch.cuda.max_memory_allocated() if device == "cuda" else memory.growth() + 8 * weights,
        "versions": f"torch {torch.__version__}, trl {trl.__version__}",
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "weights": weights,
    }


def run(name: str, python: str, settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment |= {"HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
    if name == "ours":
        further = [each for each in os.environ.get("PYTHONPATH", "").split(os.pathsep) if each]
        environment["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), *further])
    given, found = folder / "settings.json", folder / "found.json"
    given.write_text(json.dumps({**settings, "output_dir": str(folder / name)}), encoding="utf-8")
    found.unlink(missing_ok=True)
    done = subprocess.run([python, str(HERE / "ppo.py"), "--work", str(given), str(found)], env=environment,
                          cwd=folder, capture_output=True, text=True)  # fmt: skip
    if not found.exists():
        raise SystemExit(f"the {name} side ended with status {done.returncode}:\n{done.stderr[-3000:]}")
    return json.loads(found.read_text())


def main() -> None:
    if sys.argv[1:2] == ["--work"]:
        given, target = sys.argv[2:4]
        Path(target).write_text(json.dumps(work(json.loads(Path(given).read_text()))))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--upstream", metavar="PYTHON", help="interpreter of an environment with TRL 1.12")
    parser.add_argument("--model", required=True, help="folder of the policy")
    parser.add_argument("--task", choices=["random", "instructions"], default="random")
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations in the backward pass")
    parser.add_argument("--budget", type=int, help="tokens of a micro-batch of this library [its own choice]")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--updates", type=int, default=4, help="of each process, the first a warm-up")
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--batch", type=int, default=16, help="responses of an update")
    parser.add_argument("--micro", type=int, default=4, help="of them in a batch")
    parser.add_argument("--prompt", type=int, default=96, help="tokens of a random prompt")
    parser.add_argument("--response", type=int, default=64, help="tokens of a response, at most")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path, help="write all numbers here")
    options = parser.parse_args()
    settings = {**vars(options), "model": str(Path(options.model).absolute()), "json": None, "upstream": None}
    sides = {"ours": sys.executable, **({"upstream": options.upstream} if options.upstream else {})}
    turns: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(options.turns):
            for name, python in sides.items():
                turns[name].append(run(name, python, settings, Path(folder)))
    medians = {name: statistics.median([s for each in found for s in each["seconds"]]) for name, found in turns.items()}
    for name, found in turns.items():
        print(f"{name:9} {found[0]['versions']}; {found[0]['device']}; policy of {found[0]['weights']:,} weights")
        print(f"          {medians[name]:.2f} s an update of {options.batch} responses; memory growth "
              f"{found[0]['growth'] / 2**30:.2f} GiB, peak {found[0]['peak'] / 2**30:.2f} GiB")  # fmt: skip
    if "upstream" in turns:
        ours, theirs = turns["ours"][0], turns["upstream"][0]
        print(f"time upstream / ours {medians['upstream'] / medians['ours']:.2f}×; memory ours / upstream: growth "
              f"{ours['growth'] / theirs['growth']:.2f}×, peak {ours['peak'] / theirs['peak']:.2f}×")  # fmt: skip
    if options.json:
        options.json.write_text(
            json.dumps({"settings": settings | {"json": None}, "turns": turns}, indent=1, default=str)
        )


if __name__ == "__main__":
    main()
