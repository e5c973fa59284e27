"""Tiny models of every family the engine promises, and the naive reference they are held against."""

import torch
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from trl.data.batching.collate import Branch, Tree

VOCABULARY = 97
_SMALL = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
          "num_attention_heads": 4, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1,
          "eos_token_id": 2}  # fmt: skip
_GROUPED = {**_SMALL, "num_key_value_heads": 2}

# Windows are shorter than the test's sequences, so that they matter.
FLAT = {
    "llama": ("llama", _GROUPED),
    "qwen2": ("qwen2", _GROUPED),
    "qwen2-window": ("qwen2", {**_GROUPED, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}),
    "qwen3": ("qwen3", {**_GROUPED, "head_dim": 8}),
    "mistral-window": ("mistral", {**_GROUPED, "sliding_window": 6, "head_dim": 8}),
    "gemma2": ("gemma2", {**_GROUPED, "head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 8,
                          "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0}),
    "gemma3": ("gemma3_text", {**_GROUPED, "head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 8,
                               "layer_types": ["sliding_attention", "full_attention"]}),
    "phi3": ("phi3", _GROUPED),
    "phi3-window": ("phi3", {**_GROUPED, "sliding_window": 6}),
    "olmo": ("olmo", _GROUPED),
    "gpt_neox": ("gpt_neox", _SMALL),
    "gpt2": ("gpt2", {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128,
                      "bos_token_id": 1, "eos_token_id": 2}),
    "opt": ("opt", {"vocab_size": VOCABULARY, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2,
                    "num_attention_heads": 4, "max_position_embeddings": 128, "word_embed_proj_dim": 32}),
    "qwen3_moe": ("qwen3_moe", {**_GROUPED, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2,
                                "moe_intermediate_size": 16}),
    "gpt_oss": ("gpt_oss", {**_GROUPED, "head_dim": 8, "sliding_window": 6, "num_local_experts": 4,
                            "num_experts_per_tok": 2, "layer_types": ["sliding_attention", "full_attention"]}),
    "cohere": ("cohere", {**_GROUPED, "logit_scale": 0.25}),
    "granite": ("granite", {**_GROUPED, "logits_scaling": 4.0}),
}  # fmt: skip

# Refused in one flat row; right when padded.
REFUSED = {
    "stablelm": ("stablelm", _GROUPED),
    "nemotron": ("nemotron", _GROUPED),
    "bloom": ("bloom", {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4, "pad_token_id": 0,
                        "bos_token_id": 1, "eos_token_id": 2}),
    "codegen": ("codegen", {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128,
                            "n_ctx": 128, "rotary_dim": 4, "bos_token_id": 1, "eos_token_id": 2}),
    "falcon_mamba": ("falcon_mamba", {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2,
                                      "state_size": 4, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}),
    "lfm2": ("lfm2", {**_GROUPED, "layer_types": ["conv", "full_attention"]}),
    "minimax": ("minimax", {**_GROUPED, "head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1,
                            "block_size": 8,
                            "layer_types": ["linear_attention", "full_attention"]}),
}  # fmt: skip


def build(name: str, seed: int = 0, **changes: object) -> torch.nn.Module:
    family, settings = {**FLAT, **REFUSED}[name]
    config = AutoConfig.for_model(family, **{**settings, **changes})
    torch.manual_seed(seed)
    # Eager attention is the definition: up to transformers 5.17, Gemma 2's SDPA left its score cap out.
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        # Initial weights are so small that a wrong layer would hide below the tolerance.
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def forest(seed: int = 0) -> list[Tree]:
    """A plain sequence, a prompt with three branches (one masked inside), a prompt with one, two tokens alone."""
    generator = torch.Generator().manual_seed(seed)

    def ids(count: int) -> list[int]:
        return torch.randint(3, VOCABULARY, (count,), generator=generator).tolist()

    def branch(count: int, mask: list[int] | None = None) -> Branch:
        return Branch(ids(count), mask or [1] * count)

    return [
        Tree(branch(13), row=0),
        Tree(Branch(ids(9), [0] * 9), (branch(7), branch(4, [0, 1, 1, 0]), branch(1)), row=1),
        Tree(Branch(ids(2), [0] * 2), (branch(11),), row=2),
        Tree(branch(2), row=3),
    ]


def naive(model: torch.nn.Module, trees: list[Tree], temperature: float = 1.0) -> dict[str, torch.Tensor]:
    """One sequence at a time through the model's own forward, full logits, plain autograd."""
    logits, targets = [], []
    for tree in trees:
        leaves = tree.branches or (Branch([], []),)
        for leaf in leaves:
            ids = torch.tensor([*tree.root.ids, *leaf.ids])
            mask = torch.tensor([*tree.root.mask, *leaf.mask]).bool()
            mask[0] = False
            row = model(input_ids=ids[None], attention_mask=torch.ones_like(ids)[None], use_cache=False).logits[0]
            row = row[-len(ids) :]
            logits.append(row[:-1][mask[1:]])
            targets.append(ids[1:][mask[1:]])
    logits_NV, target_N = torch.cat(logits).float() / temperature, torch.cat(targets)
    logp_NV = F.log_softmax(logits_NV, -1)
    p_NV = logp_NV.exp()
    return {
        "logp": logp_NV.gather(1, target_N[:, None])[:, 0],
        "entropy": -(p_NV * logp_NV).sum(-1),
        "top1": (logits_NV.argmax(-1) == target_N).float(),
        "mean_logit": logits_NV.mean(-1),
        "sum_sq": (p_NV**2).sum(-1),
    }


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def checkpoint_layers(base: torch.nn.Module, reentrant: bool) -> None:
    """Recompute activations in the backward pass; transformers renamed the switch in 5.2x."""
    enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})
    base.enable_input_require_grads()
