"""The weights of a run's models: how many there are, how many bytes they take, and what their optimizer keeps."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from trl.models.low_bits import CHUNK, PIECE, slices

from .run import Run
from .shapes import empty, layers_of, policy

MOMENTS = {  # bytes a weight of what an optimizer keeps, besides float32 copies and lower halves
    "adamw_8bit": 2.0, "adamw_bnb_8bit": 2.0, "paged_adamw_8bit": 2.0, "ademamix_8bit": 3.0, "lion_8bit": 1.0,
    "paged_lion_8bit": 1.0, "adafactor": 0.02, "sgd": 0.0, "lion_32bit": 4.0, "paged_lion_32bit": 4.0,
    "adagrad": 4.0, "rmsprop": 4.0, "rmsprop_bnb": 4.0, "rmsprop_bnb_8bit": 1.0,
}  # fmt: skip
ADAM = 8.0  # two float32 moments
# Float32 numbers that a step makes for each weight of the largest tensor, or of all that it steps on at once.
OF_LARGEST = {"adafactor": 2.0, "adamw_torch": 2.0, "adagrad": 1.0, "rmsprop": 1.0}
# Optimizers that step on a large bfloat16 weight in slices (`models.low_bits.BY_ELEMENT`).
SLICED = ("adamw_torch", "adamw_torch_fused", "sgd", "adagrad", "rmsprop", "adamw_8bit", "adamw_bnb_8bit", "lion_8bit",
          "lion_32bit", "rmsprop_bnb", "rmsprop_bnb_8bit", "rmsprop_bnb_32bit")  # fmt: skip
OF_ALL = {"adamw_torch": 1.0, "adagrad": 1.0, "rmsprop": 1.0}  # where torch steps on all tensors of a device together


@dataclass(frozen=True)
class Weights:
    """What is known of a model's weights: numbers and bytes."""

    total: int
    total_bytes: int  # before quantisation
    trained: int  # that train
    trained_bytes: int  # of those; PEFT keeps adapters in float32
    half: tuple[int, ...]  # sizes of the bfloat16 tensors that train, in their order
    largest: int  # of the tensors that train, the largest
    embedding: int  # weights of embeddings that train
    quantised: int  # that `bits` applies to
    largest_quantised: int
    head: int  # the embedding and, unless it is tied, the head
    largest_layer: int
    products: float  # weights that a token is multiplied with, without the head
    dtype_bytes: int

    def frozen_bytes(self, bits: int, nested: bool) -> float:
        """Bytes of the weights that do not train."""
        held = float(self.total_bytes - self.trained_bytes)
        if not bits:
            return held
        scales = {8: 0.01, 4: 0.127 / 8 if nested else 0.5 / 8}[bits]  # one for each 64 weights, in 4 or 1 bytes
        return held - self.quantised * self.dtype_bytes + self.quantised * (bits / 8 + scales)


def weights_of(run: Run) -> Weights:
    """Counts the weights of the model that a run trains, on the meta device."""
    model = policy(run)
    parameters: dict[int, Any] = {id(each): each for each in model.parameters()}
    trained = [each for each in parameters.values() if each.requires_grad]
    inner = model.get_base_model() if run.adapter is not None else model
    ends = {id(inner.get_input_embeddings().weight): inner.get_input_embeddings().weight}
    if (head := inner.get_output_embeddings()) is not None:
        ends[id(head.weight)] = head.weight
    linear = {
        id(module.weight): module.weight.numel()
        for module in inner.modules()
        if isinstance(module, nn.Linear) and id(module.weight) not in ends and not _is_adapter(module, parameters)
    }
    text = run.config.get_text_config()
    experts = getattr(text, "num_local_experts", None) or getattr(text, "num_experts", None) or 1
    active = (getattr(text, "num_experts_per_tok", None) or 1) / experts if experts > 1 else 1.0
    stacked = sum(each.numel() for each in parameters.values() if each.ndim == 3)  # the experts of a layer
    frozen = {key: size for key, size in linear.items() if not parameters[key].requires_grad or run.adapter is None}
    body = sum(each.numel() for key, each in parameters.items() if key not in ends)
    return Weights(
        total=sum(each.numel() for each in parameters.values()),
        total_bytes=_bytes(parameters.values()),
        trained=sum(each.numel() for each in trained),
        trained_bytes=_bytes(trained),
        half=tuple(each.numel() for each in trained if each.dtype == torch.bfloat16),
        largest=max((each.numel() for each in trained), default=0),
        embedding=sum(
            {
                id(each.weight): each.weight.numel()
                for each in inner.modules()
                if isinstance(each, nn.Embedding) and each.weight.requires_grad
            }.values()
        ),
        quantised=sum(frozen.values()) + stacked,
        largest_quantised=max(frozen.values(), default=0),
        head=sum(each.numel() for each in ends.values()),
        largest_layer=body // layers_of(run.config),
        products=sum(linear.values()) + stacked * active,
        dtype_bytes=run.dtype.itemsize,
    )


def bytes_of(config: PreTrainedConfig, dtype: torch.dtype, head: str = "CausalLM") -> float:
    """Bytes of the weights of a model that is only read."""
    return float(_bytes(empty(config, dtype, head).parameters()))


def _bytes(weights: Iterable[Any]) -> int:
    return sum(each.numel() * each.element_size() for each in weights)


def _is_adapter(module: nn.Linear, parameters: dict[int, Any]) -> bool:
    return parameters[id(module.weight)].requires_grad and any(not each.requires_grad for each in parameters.values())


def state_bytes(run: Run, weights: Weights) -> float:
    """Bytes that the optimizer keeps, over all weights that train."""
    each = MOMENTS.get(run.optim, ADAM)
    found = each * weights.trained
    if run.optim.endswith("_8bit"):
        found += 3 * each * weights.embedding  # transformers has its moments kept in 32 bits
    if run.sharding.startswith("zero") and run.processes > 1 and run.dtype != torch.float32:
        return found + 4.0 * weights.trained  # DeepSpeed's float32 copy
    return found + 2.0 * sum(weights.half)  # the lower halves


def step_bytes(run: Run, weights: Weights, shards: int = 1) -> float:
    """Bytes that an optimizer step makes and drops again, at their highest. `shards`: by how many the weights are
    divided."""

    def own(sizes: list[int]) -> float:
        if run.device == "cuda" and run.optim in OF_ALL:
            return OF_ALL[run.optim] * 4.0 * sum(sizes)
        return OF_LARGEST.get(run.optim, 0.0) * 4.0 * max(sizes)

    if not weights.half:
        return own([weights.largest, weights.trained - weights.largest]) / shards
    found = 0.0
    for sizes in _chunks(-(-size // shards) for size in weights.half):
        beside = 6.0  # of each weight: a float32 weight and its gradient in the place of the lower half
        if sizes[0] > CHUNK and run.optim in SLICED:
            sizes, beside = [slices(sizes[0], CHUNK)[0].stop], 8.0  # the lower halves stay
        # Gradients go before weights are split, a piece at a time.
        splitting = 2.0 * sum(sizes) + 2.0 * max(sizes) + 12.0 * min(max(sizes), PIECE)
        found = max(found, beside * sum(sizes) + own(sizes), splitting)
    return found


def _chunks(sizes: Iterable[int]) -> Iterable[list[int]]:
    """The sizes of the bfloat16 tensors that `models.low_bits` joins at once."""
    chunk: list[int] = []
    for size in sizes:
        if chunk and sum(chunk) + size > CHUNK:
            yield chunk
            chunk = []
        chunk.append(size)
    if chunk:
        yield chunk
