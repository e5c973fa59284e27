"""Samplers that ask two models: the second completion of a prompt is the reference's, or that of a mixture."""

import copy
import inspect
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache

from trl.engine.reference import Frozen, Reference
from trl.models.unwrap import evaluating, unwrap

from .generate import InProcessSampler
from .types import Completion, Request, Sampler, Sampling


class InTurn:
    """The samples of a prompt by two samplers in turn: those with an even number by the first."""

    def __init__(self, first: Sampler, second: Sampler) -> None:
        self.samplers = first, second

    def sync(self, model: nn.Module, version: int) -> None:
        for sampler in self.samplers:
            sampler.sync(model, version)

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[list[Completion]]:
        """`samples` completions of each request, in the order of their numbers."""
        found: list[dict[int, Completion]] = [{} for _ in requests]
        for turn, sampler in enumerate(self.samplers):
            numbered = [
                (place, number)
                for place, request in enumerate(requests)
                for number in range(request.first, request.first + request.samples)
                if number % 2 == turn
            ]
            own = [requests[place]._replace(samples=1, first=number) for place, number in numbered]
            # Also with nothing to ask: ranks whose weights are sharded call the model together.
            groups = sampler.generate(own, sampling)
            for (place, number), (completion,) in zip(numbered, groups, strict=True):
                found[place][number] = completion
        return [[each[number] for number in sorted(each)] for each in found]


class ReferenceSampler:
    """Draws completions with the reference of the policy that it is given."""

    def __init__(self, sampler: InProcessSampler, reference: Reference) -> None:
        self.sampler, self.reference = sampler, reference
        self.policy: nn.Module | None = None
        self.version = 0

    def sync(self, model: nn.Module, version: int) -> None:
        self.policy, self.version = model, version

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[list[Completion]]:
        assert self.policy is not None
        with self.reference.standing_in(self.policy) as model:
            self.sampler.sync(model, self.version)
            return self.sampler.generate(requests, sampling)


class MixtureSampler:
    """Draws completions with the geometric mixture of policy and reference: `share()` is the reference's share of the
    logits, 0 to 1. ValueError for a model whose cache is not one of keys and values."""

    def __init__(self, sampler: InProcessSampler, reference: Reference, share: Callable[[], float]) -> None:
        self.sampler, self.reference, self.share = sampler, reference, share
        self.mixture: Mixture | None = None

    def sync(self, model: nn.Module, version: int) -> None:
        if self.mixture is None or self.mixture.policy is not model:
            self.mixture = Mixture(model, self.reference)
        self.sampler.sync(self.mixture, version)

    @torch.no_grad()
    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[list[Completion]]:
        assert self.mixture is not None
        self.mixture.share = self.share()
        with evaluating(self.mixture):
            is_served = self.sampler._is_served(self.mixture)
        if not is_served:
            raise ValueError(
                f"{type(unwrap(self.mixture.policy)).__name__} cannot be mixed with its reference token by token "
                f"({self.mixture._trl_sampled}): pass a sampler= of your own, or train with another method"
            )
        return self.sampler.generate(requests, sampling)


class Mixture(nn.Module):
    """A model whose logits are `(1 - share) policy + share reference`, so that its distribution is the geometric
    mixture of both: Munos et al. 2023, arXiv:2312.00886, equation 8. Its cache holds the layers of both models."""

    _trl_sampled: str | None

    def __init__(self, policy: nn.Module, reference: Reference, share: float = 0.5) -> None:
        super().__init__()
        base = unwrap(policy)
        self.policy, self.reference, self.share = policy, reference, share
        # Registered, so that whether weights are sharded is seen of both.
        self.frozen = reference.model if isinstance(reference, Frozen) else None
        self.config = copy.deepcopy(base.config)
        self.config.get_text_config().num_hidden_layers *= 2  # what a cached token costs
        self.accepted = set(inspect.signature(type(base).forward).parameters)
        self.layers = 0  # of the policy, in the cache

    @property
    def dtype(self) -> torch.dtype:
        return unwrap(self.policy).dtype

    def get_input_embeddings(self) -> Any:
        return unwrap(self.policy).get_input_embeddings()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        logits_to_keep: int = 0,
        use_cache: bool = False,
    ) -> SimpleNamespace:
        """The mixed logits [B, T, V] in fp32, as `logits`."""
        given = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "logits_to_keep": logits_to_keep or None,
        }
        given = {name: value for name, value in given.items() if value is not None and name in self.accepted}
        own, theirs = self._caches(past_key_values)
        logits = self.policy(**given, past_key_values=own, use_cache=use_cache).logits.float()
        with self.reference.standing_in(self.policy) as model:
            others = model(**given, past_key_values=theirs, use_cache=use_cache).logits.float()
        if logits.shape != others.shape:
            raise ValueError(
                f"policy and reference have {logits.shape[-1]} and {others.shape[-1]} tokens: their logits cannot be "
                "mixed; pass a ref_model with the policy's vocabulary"
            )
        if isinstance(past_key_values, DynamicCache):
            self.layers = len(own.layers)
            past_key_values.layers.extend([*own.layers, *theirs.layers])
        return SimpleNamespace(logits=torch.lerp(logits, others, self.share))

    def _caches(self, whole: Any) -> tuple[Any, Any]:
        """The caches of both models: new ones for a prefill, else their layers of the one that is given."""
        if whole is None:
            return None, None
        if isinstance(whole, DynamicCache):
            return DynamicCache(), DynamicCache()
        return _Part(whole, slice(None, self.layers)), _Part(whole, slice(self.layers, None))


class _Part(Cache):
    """Some layers of a cache."""

    def __init__(self, whole: Any, part: slice) -> None:
        super().__init__(layers=whole.layers[part])
        self.whole = whole

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self.whole.get_query_offset(layer_idx)
