"""`use_liger_kernel`: what liger-kernel is asked to patch, and that the engine's own head and loss stay."""

import sys
import types

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from tests.trainer.helpers import DEFAULTS, chat_rows, pair_rows
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
from trl.models import liger

RUN = {**DEFAULTS, "per_device_train_batch_size": 2, "max_steps": 2}


class StandIn:
    """A package `liger_kernel` whose kernels are torch's. It records what it is asked for and which modules ran."""

    def __init__(self):
        self.asked, self.ran = [], []

    def apply(self, rope=True, cross_entropy=False, fused_linear_cross_entropy=True, rms_norm=True, swiglu=True,
              model=None):  # fmt: skip
        self.asked.append({"rope": rope, "losses": [cross_entropy, fused_linear_cross_entropy],
                           "rms_norm": rms_norm, "swiglu": swiglu})  # fmt: skip
        if fused_linear_cross_entropy:
            model.forward = types.MethodType(lambda own, *_, **__: pytest.fail("liger's own head was called"), model)
        for layer in model.model.layers:
            if rms_norm:
                self._bind(layer.input_layernorm)
            if swiglu:
                self._bind(layer.mlp)

    def _bind(self, module):
        def forward(own, *args):
            self.ran.append(own)
            return type(own).forward(own, *args)

        module.forward = types.MethodType(forward, module)


@pytest.fixture
def stand_in(monkeypatch):
    found = StandIn()
    names = ("liger_kernel", "liger_kernel.transformers", "liger_kernel.transformers.monkey_patch")
    package, inner, patches = (types.ModuleType(name) for name in names)
    patches.MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": found.apply}
    inner._apply_liger_kernel_to_instance = lambda model, **kwargs: found.apply(model=model, **kwargs)
    package.transformers, inner.monkey_patch = inner, patches
    for name, module in zip(names, (package, inner, patches), strict=True):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr("transformers.integrations.liger.is_liger_kernel_available", lambda: True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    return found


def test_sft_with_an_adapter_keeps_the_engines_head(tmp_path, tiny_path, stand_in, capsys):
    def losses(**options):
        args = SFTConfig(str(tmp_path), **RUN, **options)
        trainer = SFTTrainer(tiny_path, args, train_dataset=chat_rows(8), peft_config=LoraConfig(r=4))
        trainer.train()
        return [each["loss"] for each in trainer.state.log_history if "loss" in each], trainer

    plain, _ = losses()
    assert not stand_in.asked
    ours, trainer = losses(use_liger_kernel=True, liger_kernel_config={"rope": False})
    assert ours == plain
    # By us before the probe, and by `Trainer` when training begins.
    assert stand_in.asked == [{"rope": False, "losses": [False, False], "rms_norm": True, "swiglu": True}] * 2
    base = trainer.model.get_base_model()
    assert {type(each).__name__ for each in stand_in.ran} == {"LlamaRMSNorm", "LlamaMLP"}
    assert all(any(own is each for each in base.modules()) for own in stand_in.ran)
    assert "rms_norm, swiglu by liger-kernel" in capsys.readouterr().out


def test_the_reference_is_patched_as_the_policy_is(tmp_path, tiny_path, stand_in):
    def trainer(explicit):
        stand_in.ran.clear()
        args = DPOConfig(str(tmp_path), use_liger_kernel=True, beta=0.1, **RUN)
        reference = AutoModelForCausalLM.from_pretrained(tiny_path) if explicit else None
        made = DPOTrainer(tiny_path, ref_model=reference, args=args, train_dataset=pair_rows(8))
        made.train()
        return made

    for explicit in (False, True):
        made = trainer(explicit)
        policy, reference = (list(each.modules()) for each in (made.model, made.ref_model))
        for modules in (policy, reference):
            assert sum(any(own is each for each in modules) for own in stand_in.ran) > 4
        assert made.state.log_history[0]["loss"] == pytest.approx(0.6931, abs=1e-4)


def test_what_torch_compile_compiles_beside_it(tmp_path, tiny_path, stand_in):
    settings = {**RUN, "use_liger_kernel": True, "torch_compile": True, "torch_compile_backend": "eager"}
    trainer = SFTTrainer(tiny_path, SFTConfig(str(tmp_path), **settings), train_dataset=chat_rows(8))
    # The stand-in leaves the norm after attention of both layers.
    assert any("torch_compile: 2 parts" in line for line in trainer.report())


def test_losses_of_liger_are_left_out_in_one_sentence(tmp_path, tiny_path, stand_in, capsys):
    args = SFTConfig(str(tmp_path), **RUN, use_liger_kernel=True,
                     liger_kernel_config={"fused_linear_cross_entropy": True, "swiglu": False})  # fmt: skip
    SFTTrainer(tiny_path, args, train_dataset=chat_rows(8)).train()
    assert capsys.readouterr().out.count("fused_linear_cross_entropy left out") == 1
    assert {str(each["losses"]) for each in stand_in.asked} == {"[False, False]"}


def test_what_cannot_run_is_refused_before_anything_loads(tmp_path, tiny_path, stand_in, monkeypatch):
    def start(**options):
        args = SFTConfig(str(tmp_path), **RUN, use_liger_kernel=True, **options)
        return SFTTrainer("a-model-that-is-not-there", args, train_dataset=chat_rows(8))

    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    monkeypatch.delitem(sys.modules, "liger_kernel.transformers")
    monkeypatch.delitem(sys.modules, "liger_kernel.transformers.monkey_patch")
    with pytest.raises(ImportError, match=r"pip install 'trl\[liger\]'"):
        start()
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match="need a GPU, and this run is on cpu"):
        start()


def test_parts_and_families_that_liger_does_not_know(tmp_path, tiny_path, stand_in, capsys):
    args = SFTConfig(str(tmp_path), **RUN, use_liger_kernel=True, liger_kernel_config={"geglu": True})
    with pytest.raises(ValueError, match="geglu unknown for models of type llama; known are rope, rms_norm, swiglu"):
        SFTTrainer(tiny_path, args, train_dataset=chat_rows(8))
    args = SFTConfig(str(tmp_path), **RUN, use_liger_kernel=True)
    liger.check(args)
    other = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=64))
    liger.patch(other, args)
    assert "no kernels for models of type gpt2" in capsys.readouterr().out and not liger.patched(other)


def test_a_patched_model_decodes_as_before(tiny_path, tmp_path, stand_in):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_path), AutoTokenizer.from_pretrained(tiny_path)
    ids = tokenizer("the cat sat", return_tensors="pt").input_ids
    before = model.generate(ids, max_new_tokens=5, do_sample=False)
    args = SFTConfig(str(tmp_path), **RUN, use_liger_kernel=True)
    liger.check(args)
    liger.patch(model, args)
    assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False), before) and stand_in.ran
