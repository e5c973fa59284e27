"""The reference policy: chosen once, always the policy as it was at the start.

A reference scores a batch as the policy does, without gradients and dropout. It gets the policy's wrapped model, which
holds an adapter's base and frozen twin, and whose hooks gather sharded weights.
"""

import contextlib
import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from trl.engine.probe import attach
from trl.models import adapters
from trl.models.low_bits import LOW_BITS, join, split
from trl.models.shards import deep_copy, is_partitioned, local_weights
from trl.models.unwrap import evaluating, unwrap

from .forest import Batch
from .head import TokenStats
from .score import score


class Reference(ABC):
    """A frozen policy to compare the trained one with."""

    description: str

    def __init__(self) -> None:
        self._low: dict[str, Tensor] = {}  # lower halves of bfloat16 weights that follow the policy

    @abstractmethod
    def model_of(self, policy: nn.Module) -> contextlib.AbstractContextManager[nn.Module]:
        """The model to score with."""

    @contextlib.contextmanager
    def standing_in(self, policy: nn.Module) -> Iterator[nn.Module]:
        """A model to call as the reference within the context, without gradients and dropout."""
        with torch.no_grad(), self.model_of(policy) as model, evaluating(model):
            yield model

    def score(self, policy: nn.Module, batch: Batch, **asked: Any) -> TokenStats:
        """The reference's log-probs of a batch laid out for the policy; `asked` are options of `engine.score.score`."""
        with self.standing_in(policy) as model:
            return score(model, batch, **asked)

    def follow(self, policy: nn.Module, share: float) -> None:
        """Move the reference towards the policy: `share` is the weight of the policy, 0 to 1.

        TR-DPO's soft update (Gorbatovski et al. 2024, arXiv:2404.09656, equation 6). A bfloat16 weight would lose
        changes smaller than 1/256 of it, so the reference also keeps its lower half (`models.low_bits`). Raises
        ValueError for a reference without weights of its own.
        """
        theirs = self._policy_weights(policy)
        weights = self.weights()
        with torch.no_grad():
            for name, weight in self._own_weights().items():
                low, target = weights.get(f"{name}.{LOW_BITS}"), theirs[name].to(weight.device)
                if low is None:
                    weight.lerp_(target.to(weight.dtype), share)
                else:
                    high, rest = split(join(weight, low).lerp_(target.float(), share))
                    weight.copy_(high)
                    low.copy_(rest)

    def weights(self) -> dict[str, Tensor]:
        """The weights that `follow` changes, by name: part of a checkpoint."""
        own = self._own_weights()
        for name, weight in own.items():
            if weight.dtype == torch.bfloat16 and name not in self._low:
                self._low[name] = torch.zeros_like(weight, dtype=torch.int16)
        return {**own, **{f"{name}.{LOW_BITS}": low for name, low in self._low.items()}}

    def _own_weights(self) -> dict[str, Tensor]:
        """The weights that belong only to the reference."""
        return {}

    def _policy_weights(self, policy: nn.Module) -> dict[str, Tensor]:
        """The policy's weights, under the names of the reference's weights."""
        raise ValueError(f"the reference is {self.description}, which cannot follow the policy")


class Frozen(Reference):
    """A separate model."""

    def __init__(self, model: nn.Module, description: str) -> None:
        super().__init__()
        self.model, self.description = model, description

    @contextlib.contextmanager
    def model_of(self, policy: nn.Module) -> Iterator[nn.Module]:
        yield self.model

    def _own_weights(self) -> dict[str, Tensor]:
        return local_weights(unwrap(self.model))

    def _policy_weights(self, policy: nn.Module) -> dict[str, Tensor]:
        return local_weights(unwrap(policy))


class AdapterOff(Reference):
    """The policy without its adapter."""

    description = "the model with its adapter off"

    @contextlib.contextmanager
    def model_of(self, policy: nn.Module) -> Iterator[nn.Module]:
        with adapters.without(peft_model(policy)):
            yield policy


class Twin(Reference):
    """The policy with a frozen copy of its adapter in the adapter's place."""

    description = "a frozen copy of the adapter as it was at the start"

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        adapters.add_twin(model)

    @contextlib.contextmanager
    def model_of(self, policy: nn.Module) -> Iterator[nn.Module]:
        with adapters.as_twin(self.model):
            yield policy

    def _own_weights(self) -> dict[str, Tensor]:
        return adapters.twin_weights(self.model)

    def _policy_weights(self, policy: nn.Module) -> dict[str, Tensor]:
        return adapters.adapter_of_twin(self.model)


class Itself(Reference):
    """The policy itself: for log-probs that are computed before the first step."""

    description = "the model itself, before its first step"

    @contextlib.contextmanager
    def model_of(self, policy: nn.Module) -> Iterator[nn.Module]:
        yield policy


def choose(
    model: nn.Module,
    explicit: nn.Module | None = None,
    *,
    follows: bool = False,
    precision: Callable[[], Any] = contextlib.nullcontext,
) -> Reference:
    """The reference of a policy before training: `explicit` if given, else the model as it is now.

    A new adapter is switched off, and a trained adapter gets a frozen twin. All other models are copied, also a model
    that trains weights beneath its adapter. `follows`: the reference will move towards the policy, so it needs weights
    of its own. `precision` enters the autocast that it will run under (see `probe.attach`).
    """
    if explicit is not None:
        return Frozen(frozen(explicit, precision), f"the model given ({type(unwrap(explicit)).__name__})")
    description = "a frozen copy of the model as it was at the start"
    if not adapters.has_adapter(model):
        return Frozen(frozen(deep_copy(model), precision), description)
    beneath = adapters.trains_beneath(model)
    if beneath:
        more = f" and {len(beneath) - 1} more" if len(beneath) > 1 else ""
        description += f", because weights beneath the adapter train: {beneath[0]}{more}"
        return Frozen(frozen(deep_copy(model), precision), description)
    return AdapterOff() if adapters.is_untouched(model) and not follows else Twin(model)


def frozen(model: nn.Module, precision: Callable[[], Any] = contextlib.nullcontext) -> nn.Module:
    """The model without gradients and dropout, attached to the engine in the precision that it runs in."""
    model.requires_grad_(False)
    model.eval()
    attach(model, precision)
    return model


def create_reference_model(model: nn.Module, num_shared_layers: int | None = None, pattern: str | None = None) -> Any:
    """A frozen copy of a model. Trainers make their own reference, and an adapter needs no second model at all.

    With `num_shared_layers` the embeddings and as many first layers are one and the same in both models, so that they
    take memory once; they no longer train. `pattern` names the first layer that is not shared, such as
    "transformer.h.{layer}". Raises ValueError if the model has no such layer.
    """
    if num_shared_layers is None and pattern is None:
        return deep_copy(model).requires_grad_(False).eval()
    if is_partitioned(model):
        raise ValueError("num_shared_layers: weights that ZeRO-3 has partitioned cannot be shared; leave it out")
    names, count = [name for name, _ in model.named_parameters()], num_shared_layers or 0
    stacks = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    first = pattern.format(layer=count) if pattern is not None else f"{stacks[0]}.{count}." if stacks else ""
    end = next((place for place, name in enumerate(names) if first and first in name), None)
    if end is None:
        raise ValueError(f"num_shared_layers={count}: {type(unwrap(model)).__name__} has no layer `{first or count}`")
    shared = {id(each): each.requires_grad_(False) for each in (model.get_parameter(name) for name in names[:end])}
    return copy.deepcopy(model, dict(shared)).requires_grad_(False).eval()


def peft_model(model: nn.Module) -> Any:
    """The model that carries the adapter, without wrappers for several processes. ValueError if there is none."""
    while not hasattr(model, "peft_config"):
        inner = getattr(model, "module", None) or getattr(model, "_orig_mod", None)
        if inner is None:
            raise ValueError(f"{type(model).__name__} carries no adapter")
        model = inner
    return model
