"""`torch_compile` where parts run in several ways: adapter on and off, recomputed, and while completions are drawn."""

import pytest
import torch
from peft import LoraConfig

from tests.trainer.helpers import DEFAULTS, pair_rows
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer

ROWS = [{"prompt": row["prompt"][0]["content"]} for row in pair_rows(8)]
ROUNDS = {"num_generations": 4, "per_device_train_batch_size": 4, "max_completion_length": 10, "beta": 0.1,
          "max_tokens_per_micro_batch": 48, "scale_rewards": "none"}  # fmt: skip


def length(completions, **_):
    return [float(len(each)) for each in completions]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch's own look at its inputs
@pytest.mark.parametrize("method", ["dpo", "grpo"])
def test_an_adapters_parts_are_compiled_once_for_each_way_they_run(tmp_path, tiny_path, method):
    """Norms: with an input that has a gradient, one that has none, and without gradients; feed-forward: the latter two.
    Sampling, whose products of few rows replace the layers', compiles nothing."""
    from torch._dynamo.utils import counters

    def losses(**options):
        settings = {**DEFAULTS, "max_steps": 4, "per_device_train_batch_size": 1, "gradient_checkpointing": True,
                    **options}  # fmt: skip
        adapter = LoraConfig(r=4, target_modules="all-linear")
        if method == "dpo":
            args = DPOConfig(str(tmp_path), **settings)
            run = DPOTrainer(tiny_path, args=args, train_dataset=pair_rows(8), peft_config=adapter)
        else:
            args = GRPOConfig(str(tmp_path), **{**settings, **ROUNDS})
            run = GRPOTrainer(tiny_path, length, args, train_dataset=ROWS, peft_config=adapter)
        run.train()
        return [each["loss"] for each in run.state.log_history if "loss" in each]

    plain = losses()
    torch.compiler.reset()
    counters.clear()
    assert losses(torch_compile=True, torch_compile_backend="eager") == pytest.approx(plain, rel=1e-5, abs=1e-6)
    assert counters["stats"]["unique_graphs"] == 5 and not counters["graph_break"]
