"""The models of a run on the meta device, and the micro-batch of a run: shapes without values."""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedConfig,
)

from trl.data.batching.collate import Branch, Tree
from trl.engine.forest import unshared
from trl.models import adapters
from trl.models.shards import loaded_whole
from trl.models.value_head import ValueHead, add_critic, add_head

from .run import PAIRS, Run

_KINDS = {
    "CausalLM": (AutoModelForCausalLM, None),
    "SequenceClassification": (AutoModelForSequenceClassification, 1),
    "TokenClassification": (AutoModelForTokenClassification, 2),
}


def layers_of(config: PreTrainedConfig) -> int:
    return config.get_text_config().num_hidden_layers


def empty(config: PreTrainedConfig, dtype: torch.dtype, head: str = "CausalLM", layers: int | None = None) -> Any:
    """The model of a configuration on the meta device, which holds nothing; with `layers` of its layers, or all."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    if layers is not None:
        if isinstance(vars(text).get("layer_types"), list):
            text.layer_types = list(text.layer_types)[:layers]
        text.num_hidden_layers = layers
    kind, labels = _KINDS[head]
    if labels is not None:
        config.num_labels = labels
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config  # `bits` says what is quantised
    with torch.device("meta"), loaded_whole():  # ZeRO-3 would cut it up, with all processes
        try:
            return kind.from_config(config, dtype=dtype)
        except ValueError as error:
            if "Unrecognized configuration class" not in str(error):
                raise
            names = {"CausalLM": "language model", "SequenceClassification": "model that scores"}
            what = f"models of type {config.model_type} have no {names.get(head, head)}"
            raise ValueError(f"{what} that is trained here (encoder-decoders and vision models are not)") from error


def policy(run: Run, layers: int | None = None) -> Any:
    """The model that a run trains, with its adapter, its value function and the dtypes that training gives them."""
    model = empty(run.config, run.dtype, run.head, layers)
    with torch.device("meta"):
        if run.adapter is not None:
            model = adapters.wrap(model, copy.deepcopy(run.adapter))
        if run.bits and run.dtype == torch.bfloat16:
            for name, weight in model.named_parameters():  # as `models.adapters.prepare_quantised` does
                if weight.requires_grad and ".lora_" in name and "magnitude" not in name:
                    weight.data = weight.data.to(run.dtype)
        if run.held_in_float32 and run.autocast is None and not run.bits:
            model.float()
        elif run.held_in_float32:
            for weight in model.parameters():
                weight.data = weight.data.float() if weight.requires_grad else weight.data
        if run.critic is not None:
            critic = empty(run.critic, run.dtype, "SequenceClassification", layers)
            add_critic(model, critic.requires_grad_(True))
        elif run.has_value_head:
            size = run.config.get_text_config().hidden_size
            add_head(model, ValueHead(size, summary_dropout_prob=0.0)).requires_grad_(True)
    return model


def trees(run: Run, amount: int) -> list[Tree]:
    """A micro-batch of `amount` rows; in methods that sample, of at most `amount` tokens (one completion at least)."""
    if run.samples:
        found = list(_sampled(run, amount))
    else:
        found = [_row(run, row) for row in range(amount)]
    return found if run.shares else unshared(found)


def _row(run: Run, row: int) -> Tree:
    if run.head == "SequenceClassification":  # the last token of each completion is scored
        return tree(row, run.prompt, [run.completion] * 2, last=True)
    if run.method == "orpo":
        return tree(row, run.prompt, [run.completion] * 2, trained_root=True)
    if run.method in PAIRS:
        return tree(row, run.prompt, [run.completion] * 2)
    if run.method in ("sft", "gkd"):
        whole = run.prompt + run.completion
        untrained = int(whole * (1 - run.trained))
        return Tree(Branch([1] * whole, [False] * untrained + [True] * (whole - untrained)), row=row)
    return tree(row, run.prompt, [run.completion])


def _sampled(run: Run, tokens: int) -> Iterator[Tree]:
    """Groups of completions under their prompts, one completion at least."""
    prompt = run.prompt if run.shares else 0
    each = run.completion if run.shares else run.prompt + run.completion
    row = 0
    while row == 0 or tokens >= prompt + each:
        count = max(1, min(run.generations, (tokens - prompt) // each))
        yield tree(row, run.prompt, [run.completion] * count)
        tokens -= prompt + count * each
        row += 1


def tree(row: int, prompt: int, completions: list[int], trained_root: bool = False, last: bool = False) -> Tree:
    """A prompt of `prompt` tokens with completions of the given lengths, of which all tokens train, or the `last`."""
    branches = tuple(
        Branch([1] * length, [not last or place == length - 1 for place in range(length)]) for length in completions
    )
    return Tree(Branch([1] * prompt, [trained_root] * prompt), branches, row=row)
