"""The guide's scripts and commands, one after the other, as its reader runs them: in a shell, in one working folder."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest

from .conftest import LLAMA, Guide, changes, lay_out, log_of, newest_step, shell

pytestmark = pytest.mark.slow

# After a script: what it leaves behind in the process, since it saves nothing.
AFTER_PPO = """
import runpy
names = runpy.run_path("ppo_train.py", run_name="__main__")
kind, dtype = names["AutoModelForCausalLMWithValueHead"], names["torch"].bfloat16
before = kind.from_pretrained("./sft_final", torch_dtype=dtype).pretrained_model.state_dict()
after = names["model"].pretrained_model.state_dict()
assert before.keys() <= after.keys() and all(tensor.isfinite().all() for tensor in after.values())
moved = [name for name in before if not before[name].equal(after[name].to(dtype))]
assert all("lora_" in name or "v_head" in name for name in moved)
moved = [name for name in moved if "lora_" in name]
print("steps", names["trainer"].steps_taken, "kl", names["stats"]["objective/kl"], "moved", len(moved))
"""
# Merged weights against base and adapter side by side, without this library; the base alone answers otherwise.
COMPARE = f"""
import sys
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("./merged_model")
inputs = tokenizer("What comes after 3?", return_tensors="pt")
base = AutoModelForCausalLM.from_pretrained("{LLAMA}", dtype=torch.float32).eval()
merged = AutoModelForCausalLM.from_pretrained("./merged_model", dtype=torch.float32).eval()
with torch.no_grad():
    alone, together = base(**inputs).logits, merged(**inputs).logits
    adapted = PeftModel.from_pretrained(base, "./sft_final").eval()(**inputs).logits
assert not any(name == "trl" or name.startswith("trl.") for name in sys.modules)
print("gap", float((together - adapted).abs().max()), "effect", float((alone - adapted).abs().max()))
"""


def check_opens(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An adapter's folder is opened by PEFT and by transformers, and both give the same logits."""
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.chdir(folder)  # the base model has its name on the Hub
    inputs = AutoTokenizer.from_pretrained(name)("What comes after 3?", return_tensors="pt")
    ways = (AutoPeftModelForCausalLM, AutoModelForCausalLM)
    ours, theirs = (kind.from_pretrained(name, dtype="float32").eval()(**inputs).logits for kind in ways)
    assert float((ours - theirs).detach().abs().max()) < 1e-4


@pytest.fixture(scope="module")
def folder(guide: Guide, hub: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The guide's working folder, with its scripts in it."""
    found = lay_out(hub, tmp_path_factory.mktemp("guide") / "work")
    for name in ("sft_train.py", "dpo_train.py", "ppo_train.py", "grpo_train.py"):
        (found / name).write_text(guide.text(f"# {name}"), encoding="utf-8")
    return found


@pytest.fixture(scope="module")
def sft_output(folder: Path, guide: Guide) -> str:
    """What `sft_train.py` prints; it leaves `sft_output` and `sft_final`, which all else begins with."""
    return shell(folder, guide.text("export WANDB_DISABLED") + guide.text("python3 sft_train.py\n"))


def test_sft_train(folder: Path, guide: Guide, sft_output: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """4-bit weights, old argument names, a `prompt` column beside `messages`, an adapter, an absent tracker."""
    assert "read as conversations in `messages`" in sft_output
    assert "WANDB_DISABLED is set: nothing is reported to wandb" in sft_output
    for old, new in (
        ("max_seq_length", "max_length"),
        ("tokenizer", "processing_class"),
        ("warmup_ratio", "warmup_steps"),
    ):
        assert re.search(f"{old}.*{new}", sft_output), old
    lines = log_of(folder / "sft_output" / "checkpoint-9")  # 24 rows, 8 a step, 3 times
    assert len(lines) == 9 and lines[-1]["loss"] < lines[0]["loss"]
    assert (folder / "sft_final" / "tokenizer_config.json").exists()
    assert changes(folder / "sft_output" / "checkpoint-3", folder / "sft_final") > 0
    check_opens(folder, "sft_final", monkeypatch)
    listed = shell(folder, guide.text("ls -lh"))
    assert listed.count("adapter_model.safetensors") == 3  # save_total_limit


def test_sft_train_resumes(folder: Path, guide: Guide, sft_output: str) -> None:
    """The script reads no arguments; the flag works all the same, and the steps that follow are the same ones."""
    whole = log_of(folder / "sft_output" / "checkpoint-9")
    out = shell(folder, guide.text("python3 sft_train.py --resume_from_checkpoint"))
    assert "--resume_from_checkpoint on the command line: training resumes from sft_output/checkpoint-6/" in out
    again = log_of(folder / "sft_output" / "checkpoint-9")
    assert [line["loss"] for line in again] == [line["loss"] for line in whole]
    assert len(re.findall(r" loss=", out)) == 3


def test_the_merged_model_gives_the_logits_of_the_adapter(folder: Path, guide: Guide, sft_output: str) -> None:
    out = shell(folder, guide.text("python3 << 'EOF'"))
    assert "已保存合并后的模型" in out
    (folder / "compare.py").write_text(COMPARE)
    numbers = re.search(r"gap (\S+) effect (\S+)", shell(folder, "python3 compare.py"))
    assert numbers is not None
    gap, effect = float(numbers[1]), float(numbers[2])
    assert 0 < 5 * gap < effect  # the merged weights are rounded to bfloat16


def test_dpo_train(folder: Path, sft_output: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An adapter that transformers loads frozen, and a reference given beside it: it trains all the same."""
    out = shell(folder, "python3 dpo_train.py")
    assert "the model was loaded with a frozen adapter inside: the adapter is made trainable" in out
    assert "reference: the model given" in out
    assert "32 rows read, 32 kept" in out
    first, *rest = log_of(folder / "dpo_output" / "checkpoint-4")
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6) and first["rewards/margins"] == 0
    assert len(rest) == 3
    assert all(line["loss"] != first["loss"] and line["rewards/margins"] != 0 for line in rest)
    assert changes(folder / "sft_final", folder / "dpo_final") > 0
    check_opens(folder, "dpo_final", monkeypatch)


def test_ppo_train(folder: Path, sft_output: str) -> None:
    """No data set is handed over, responses hold their queries, and the loop's batches have no text beside them."""
    (folder / "after_ppo.py").write_text(AFTER_PPO)
    out = shell(folder, "python3 after_ppo.py")
    assert "target_kl=6.0 has no effect without early_stopping" in out
    assert "value function: a head on the policy's hidden states" in out
    assert "responses begin with their query, which is taken off" in out
    assert "steered to 6 nats a completion" in out
    found = re.search(r"steps (\d+) kl (\S+) moved (\d+)", out)
    assert found is not None and math.isfinite(float(found[2]))
    assert int(found[1]) == 6  # two batches of the nine reviews, three times
    assert int(found[3]) > 0


def check_grpo(folder: Path) -> tuple[list[float], int]:
    """The rewards of a run's rounds, and how many of its weights have changed."""
    step = newest_step(folder / "grpo_output")
    last = folder / "grpo_output" / f"checkpoint-{step}"
    state = json.loads((last / "trainer_state.json").read_text())
    assert (step, state["epoch"]) == (12, 3.0)  # two prompts, two steps each, 3 times
    rewards = [line["reward"] for line in log_of(last) if "reward" in line]
    assert len(rewards) == 6
    return rewards, changes(folder / "Qwen" / "Qwen2.5-7B-Instruct", last, "model.safetensors")


def test_grpo_train(folder: Path) -> None:
    """Plain prompts with a reward for messages, batches of four and eight completions, an older argument.

    The guide's reward compares a number with the list of all answers, and so it is 0 for every completion: that is
    told, and no weight changes.
    """
    out = shell(folder, "python3 grpo_train.py")
    assert "1 prompts × 8 completions each, drawn at once; trained on in 2 steps of 4 completions" in out
    assert "reads chat messages, and prompts and completions are strings" in out
    assert "gave 0 to every row 5 times in a row" in out
    assert check_grpo(folder) == ([0.0] * 6, 0)


def test_grpo_train_learns_where_its_reward_is_mended(folder: Path, guide: Guide) -> None:
    script, ours = guide.text("# grpo_train.py"), "== answer[0]:"  # a round here is of one prompt
    assert script.count("== answer:") == 1
    (folder / "grpo_mended.py").write_text(script.replace("== answer:", ours), encoding="utf-8")
    shell(folder, "rm -rf grpo_output; python3 grpo_mended.py")
    rewards, moved = check_grpo(folder)
    assert any(0 < reward < 1 for reward in rewards) and moved > 0


def test_the_two_commands(folder: Path, guide: Guide, monkeypatch: pytest.MonkeyPatch) -> None:
    """One after the other: the second starts from the adapter that the first has saved."""
    for line in guide.of("test_the_two_commands"):
        out = shell(folder, line)
    assert "reference: a frozen copy of the adapter as it was at the start" in out
    assert "The trained adapter is in ./cli_dpo_output" in out
    state = json.loads((folder / "cli_dpo_output" / "checkpoint-8" / "trainer_state.json").read_text())
    assert (state["global_step"], state["epoch"]) == (8, 1.0)
    assert newest_step(folder / "cli_sft_output") == 18  # 48 rows, 8 a step, 3 times
    assert changes(folder / "cli_sft_output", folder / "cli_dpo_output") > 0
    check_opens(folder, "cli_dpo_output", monkeypatch)
