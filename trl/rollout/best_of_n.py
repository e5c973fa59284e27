"""Best of n: several answers of a model to each query, and those of the highest reward."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import set_seed

from trl.models.unwrap import evaluating, unwrap


class BestOfNSampler:
    """Samples `sample_size` texts for each query and keeps the `n_candidates` of the highest reward.

    `model` is a language model, with or without a value head around it. `queries_to_scores` takes texts, each a query
    and its answer, and gives a number for each. `length_sampler` returns the longest answer of a query, in tokens.
    `generation_config` and the arguments of `generate` are transformers'; answers are sampled unless `do_sample` says
    otherwise. Stiennon et al. 2020, arXiv:2009.01325, section 4.1.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        queries_to_scores: Callable[[list[str]], Sequence[Any]],
        length_sampler: Callable[[], int],
        sample_size: int = 4,
        seed: int | None = None,
        n_candidates: int = 1,
        generation_config: Any = None,
    ) -> None:
        if not 1 <= n_candidates <= sample_size:
            raise ValueError(f"n_candidates={n_candidates}: give 1 to {sample_size}, the texts that are sampled")
        if seed is not None:
            set_seed(seed)
        self.model = getattr(model, "pretrained_model", model)
        self.tokenizer, self.queries_to_scores, self.length_sampler = tokenizer, queries_to_scores, length_sampler
        self.sample_size, self.n_candidates, self.generation_config = sample_size, n_candidates, generation_config

    @torch.no_grad()
    def generate(
        self, tokenized_query: Any, skip_special_tokens: bool = True, device: Any = None, **generation_kwargs: Any
    ) -> list[list[str]]:
        """The best texts of each query, the best first. A query is a list of token ids or a 1-D tensor; several are a
        list of them, or a tensor [B, T]. ValueError for an empty query, or another number of scores than texts."""
        device = device or unwrap(self.model).get_input_embeddings().weight.device
        found = []
        for place, query in enumerate(_rows(tokenized_query)):
            if not len(query):
                raise ValueError(f"query {place} has no tokens")
            ids = query.to(device)[None]
            options = {"do_sample": True, "pad_token_id": self.tokenizer.pad_token_id, **generation_kwargs}
            with evaluating(self.model):
                drawn = self.model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    generation_config=self.generation_config,
                    max_new_tokens=int(self.length_sampler()),
                    num_return_sequences=self.sample_size,
                    **options,
                )
            texts = self.tokenizer.batch_decode(drawn, skip_special_tokens=skip_special_tokens)
            scores = [float(each) for each in self.queries_to_scores(texts)]
            if len(scores) != len(texts):
                raise ValueError(f"queries_to_scores gave {len(scores)} scores for {len(texts)} texts")
            best = sorted(range(len(texts)), key=lambda each: -scores[each])[: self.n_candidates]
            found.append([texts[each] for each in best])
        return found


def _rows(queries: Any) -> list[Tensor]:
    if isinstance(queries, Tensor) and queries.ndim == 1 or (queries and isinstance(queries[0], int)):
        queries = [queries]
    return [torch.as_tensor(query).flatten() for query in queries]
