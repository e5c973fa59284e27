"""Sampling in this process: a prompt is prefilled once, finished rows leave, and waiting ones take their place.

Cost is the tokens sampled, not rows times the longest. The cache is allocated once. A row's tokens end at the column
that all rows are at, as in a left-padded batch, so that masks, windows and positions are transformers' own.

`B` rows that decode together, `T` columns, `V` vocabulary.
"""

import inspect
import math
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    Cache,
    DynamicCache,
)

from trl.data.batching.collate import Branch, Tree
from trl.data.tokenizing.chat import end_tokens
from trl.engine.forest import flat, moved
from trl.engine.linear import few_rows
from trl.engine.score import without_mask
from trl.models.shards import is_sharded
from trl.models.unwrap import evaluating, unwrap
from trl.notices import notify_once
from trl.rollout.cache import ColumnCache
from trl.rollout.draws import Cached, Draws, Prompt, Row, by_length, on
from trl.rollout.exchange import anyone
from trl.rollout.filters import FURTHER, filters, penalties
from trl.rollout.round_weights import adapter_merged, held_whole

from .types import Completion, Request, Sampling

ROWS = 256  # that decode together, at most
CACHE_BYTES = 2**30  # of keys and values; on an accelerator half of what is free
PREFILL_TOKENS = 4096  # of a prefill, padding included
DEAD_SHARE = 0.2  # of the rows, from which on they are taken out
# Tokens of each row between two looks at them. A look waits for the device; what a row draws after its end is dropped.
READ_EVERY = {"cpu": 1, "default": 8}


def stop_ids(model: nn.Module, tokenizer: Any) -> set[int]:
    """The tokens that end a completion: the end tokens of the model's own `generate`, that of the tokenizer, and those
    that end a turn in the chat template."""
    base = unwrap(model)
    own = getattr(base, "generation_config", None) or base.config
    ends = own.eos_token_id
    found = end_tokens(tokenizer) | set(ends if isinstance(ends, list | tuple) else [ends])
    # A tokenizer may know more tokens than the model does.
    return {each for each in found - {None} if each < base.get_input_embeddings().num_embeddings}


def sampling_of(fields: Any, model: nn.Module, tokenizer: Any, max_new_tokens: int, /, **asked: Any) -> Sampling:
    """The sampling that a config's `SamplingFields` describe. `generation_kwargs` override the fields, and `asked`,
    further arguments of `generate`, override both."""
    further = {**(fields.generation_kwargs or {}), **asked}
    found = {
        "max_new_tokens": max_new_tokens,
        "temperature": fields.temperature,
        "top_k": fields.top_k,
        "top_p": fields.top_p,
        "min_p": fields.min_p,
        "repetition_penalty": fields.repetition_penalty,
    }
    for name in list(found):
        if name in further:
            found[name] = further.pop(name)
    stops = stop_ids(model, tokenizer) | set(_as_list(further.pop("eos_token_id", None)))
    strings = tuple(_as_list(further.pop("stop_strings", None)))
    for name in ("do_sample", "num_return_sequences", "use_cache", "pad_token_id", "bos_token_id"):
        further.pop(name, None)
    return Sampling(**found, stop_ids=tuple(sorted(stops - {None})), stop_strings=strings, further=further)


def _as_list(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, list | tuple | set) else [value]


class InProcessSampler:
    """Draws completions with the model that trains, on its own device.

    At most `max_rows` rows decode together, and their cache holds at most `max_cache_tokens`; neither changes a sample.
    The tokenizer is asked for `stop_strings` alone. A model whose cache is not one of keys and values (state-space
    layers and the like) is served by its own `generate`, with one notice.
    """

    def __init__(self, tokenizer: Any = None, *, max_rows: int = ROWS, max_cache_tokens: int | None = None) -> None:
        self.tokenizer, self.max_rows, self.max_cache_tokens = tokenizer, max_rows, max_cache_tokens
        self.model: nn.Module | None = None

    def sync(self, model: nn.Module, version: int) -> None:
        """Draw with this model from now on: it is in this process, and nothing is copied."""
        self.model = model

    @torch.no_grad()
    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[list[Completion]]:
        """`samples` completions of each request, in the order of the requests."""
        model = self.model
        if model is None:
            raise ValueError("the sampler has no model yet: call sync(model, version) first")
        unknown = [name for name in sampling.further if name not in FURTHER]
        if unknown:
            raise ValueError(
                f"generation_kwargs: {', '.join(unknown)} not understood here; known are {', '.join(FURTHER)}"
            )
        with evaluating(model), few_rows(model):
            if self._is_served(model):
                device = unwrap(model).get_input_embeddings().weight.device
                with adapter_merged(model), held_whole(model, device):
                    return _Run(self, model, requests, sampling).drawn()
            if is_sharded(model):
                base = unwrap(model)
                raise ValueError(
                    f"{type(base).__name__} is served by its own generate ({base._trl_sampled}), in which each rank "
                    "calls the model as often as it needs, while sharded weights (FSDP) are gathered by all "
                    "ranks at once: train this model unsharded"
                )
            return [_by_generate(model, request, sampling) for request in requests]

    @torch.no_grad()
    def stream(self, request: Request, sampling: Sampling) -> Iterator[Completion]:
        """One completion of a request, as far as it goes, after each of its tokens; the last one is that of `generate`.
        A model that is served by its own `generate` gives the last one alone."""
        model = self.model
        if model is None:
            raise ValueError("the sampler has no model yet: call sync(model, version) first")
        with evaluating(model), few_rows(model):
            if not self._is_served(model):
                yield _by_generate(model, request._replace(samples=1), sampling)[0]
                return
            run = _Run(self, model, [request._replace(samples=1)], sampling)
            run._refill()
            run.read_every = 1
            while run.active and (row := run.active[0]) is not None:
                yield Completion(row.ids, row.logps, False)
                run._advance()
            yield run.done[0, request.first]

    def _is_served(self, model: nn.Module) -> bool:
        """Whether the model's first tokens after two prompts of different lengths are those without a cache: a numeric
        check, made once for each model."""
        base = unwrap(model)
        if not hasattr(base, "_trl_sampled"):
            fault = _first_fault(self, model)
            if fault is not None:
                base._trl_prefills_padded = True  # the row of prompts may be what it does not take
                fault = _first_fault(self, model)
            base._trl_sampled = fault
            if fault is not None:
                notify_once(f"completions are drawn by the model's own generate, without refilling: {fault}")
        return base._trl_sampled is None


class _Run:
    """One call: what waits, what is under way, what is done."""

    def __init__(self, sampler: InProcessSampler, model: nn.Module, requests: Sequence[Request], sampling: Sampling):
        self.model, self.requests, self.sampling, self.tokenizer = model, requests, sampling, sampler.tokenizer
        base = unwrap(model)
        self.device = base.get_input_embeddings().weight.device
        self.longest = max((len(request.prompt_ids) for request in requests), default=0)
        most = sampler.max_cache_tokens or _tokens_that_fit(base, self.device)
        wanted = sum(request.samples for request in requests)
        # Columns for the longest row; where others wait, as many again before what is held must be moved to the left.
        self.capacity = self.longest + sampling.max_new_tokens
        self.rows = max(1, min(sampler.max_rows, wanted, most // self.capacity))
        if self.rows < wanted:
            self.capacity += sampling.max_new_tokens
            self.rows = max(1, min(sampler.max_rows, most // self.capacity))
        if self.device.type == "cuda" and self.rows < min(sampler.max_rows, wanted) // 2:
            notify_once("few completions are drawn together: the keys and values of more do not fit into free memory")
        self.waiting = deque((index, request.first + each) for index, request in enumerate(requests)
                             for each in range(request.samples))  # fmt: skip
        self.prompts: dict[int, Prompt] = {}
        self.left = {index: request.samples for index, request in enumerate(requests)}
        self.done: dict[tuple[int, int], Completion] = {}
        self.active: list[Row | None] = []
        self.cache: ColumnCache | None = None
        self.kwargs = _accepted(base)
        self.is_sharded = is_sharded(model)
        attachment = getattr(base, "_trl_attachment", None)
        takes_rows = "logits_to_keep" in self.kwargs and not getattr(base, "_trl_prefills_padded", False)
        self.is_flat = attachment is not None and attachment.is_flat and takes_rows
        self.penalties, self.filters = penalties(sampling, self.device), filters(sampling, self.device)
        self.read_every = READ_EVERY.get(self.device.type, READ_EVERY["default"])
        if self.penalties or sampling.stop_strings:
            self.read_every = 1  # both read the tokens so far on the host
        self.stop_1V = torch.zeros(1, 0, dtype=torch.bool)  # which tokens stop, where these are ruled out at first
        self.least = sampling.further.get("min_new_tokens") or 0 if sampling.stop_ids else 0

    def drawn(self) -> list[list[Completion]]:
        self._refill()
        while self.active:
            self._advance()
        while self._someone_asks(False):
            self.model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=self.device), use_cache=False)
        return [
            [self.done[index, request.first + each] for each in range(request.samples)]
            for index, request in enumerate(self.requests)
        ]

    def _someone_asks(self, here: bool) -> bool:
        """Whether this rank or another is about to call the model. All ranks gather sharded weights together, so a rank
        that has finished answers each call of the others by one of its own; not where weights are whole for a while."""
        return anyone(here, self.device) if self.is_sharded else here

    # --- prompts --------------------------------------------------------------------------------------------------

    def _refill(self) -> None:
        """Waiting samples into free rows, until there is none of either."""
        free = [place for place, row in enumerate(self.active) if row is None]
        free += range(len(self.active), self.rows)
        while free and self.waiting:
            entering = [self.waiting.popleft() for _ in range(min(len(free), len(self.waiting)))]
            self._prefill(list(dict.fromkeys(index for index, _ in entering if index not in self.prompts)))
            rows = [Row(index, number, self.requests[index], self.prompts[index], self.sampling.max_new_tokens)
                    for index, number in entering]  # fmt: skip
            draws = Draws(rows, 1, self.device)
            self._draw(draws, torch.stack([row.prompt.logits_V for row in rows]))
            self._read(draws)
            for row in rows:
                if not row.finished and len(row.ids) < row.longest:
                    self._enter(row, free.pop(0))
                else:
                    self._finish(row)

    def _enter(self, row: Row, place: int) -> None:
        if self.cache is None:
            layers = len(row.prompt.cached)
            self.cache = ColumnCache(layers, self.rows, self.capacity, at=self.longest)
        while len(self.active) <= place:
            self.active.append(None)
        self.active[place] = row
        self.cache.put(place, row.prompt.cached)
        self.cache.first = min(self.cache.first, self.cache.at - len(row.prompt.ids))
        self._forget(row.request)

    def _forget(self, request: int) -> None:
        """Drop a prompt's keys when its last sample has entered."""
        self.left[request] -= 1
        if not self.left[request]:
            self.prompts.pop(request, None)

    def _prefill(self, indices: list[int]) -> None:
        for group in self._groups(indices):
            prompts = [self.requests[index].prompt_ids for index in group]
            if self.is_flat:
                caches, logits_BV = self._prefilled_flat(prompts)
            else:
                caches, logits_BV = self._prefilled_padded(prompts)
            for place, index in enumerate(group):
                self.prompts[index] = Prompt(prompts[place], caches[place], logits_BV[place])

    def _prefilled_flat(self, prompts: list[Any]) -> tuple[list[Cached], Tensor]:
        """The prompts in one row: keys and values of each, and what its end predicts, [B, V]. No mask is made."""
        row = flat([Tree(Branch(list(ids), [False] * len(ids))) for ids in prompts])
        lengths = [len(ids) for ids in prompts]
        inputs = {name: moved(row[name], self.device) for name in ("input_ids", "position_ids", "segments")}
        last_B = on(torch.tensor(lengths).cumsum(0) - 1, self.device)
        cache = DynamicCache()
        self._someone_asks(True)
        logits = self.model(**without_mask(inputs), past_key_values=cache, logits_to_keep=last_B, use_cache=True).logits
        parts = [[kept[0].split(lengths, 1) for kept in (layer.keys, layer.values)] for layer in cache.layers]
        caches = [[(keys[place], values[place]) for keys, values in parts] for place in range(len(prompts))]
        return caches, logits[0].float()

    def _prefilled_padded(self, prompts: list[Any]) -> tuple[list[Cached], Tensor]:
        """The same for a model that takes no flat row: the prompts as rows, padded on the left."""
        width = max(map(len, prompts))
        ids = torch.zeros(len(prompts), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for place, prompt in enumerate(prompts):
            ids[place, width - len(prompt) :] = torch.tensor(list(prompt))
            mask[place, width - len(prompt) :] = 1
        cache = DynamicCache()
        logits_BV = self._forward(ids, mask, (mask.cumsum(1) - 1).clamp(min=0), cache)
        caches = [
            [(layer.keys[place, :, -length:], layer.values[place, :, -length:]) for layer in cache.layers]
            for place, length in enumerate(map(len, prompts))
        ]
        return caches, logits_BV

    def _groups(self, indices: list[int]) -> Iterator[list[int]]:
        """Prompts of like lengths together, so that little is padded."""
        group: list[int] = []
        for index in sorted(indices, key=lambda each: len(self.requests[each].prompt_ids)):
            width = len(self.requests[index].prompt_ids)
            if group and (len(group) + 1) * width > PREFILL_TOKENS:
                yield group
                group = []
            group.append(index)
        if group:
            yield group

    def _forward(self, ids: Tensor, mask: Tensor, positions: Tensor, cache: Cache) -> Tensor:
        """What the last column predicts, [B, V], fp32."""
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        inputs = {name: on(value, self.device) for name, value in inputs.items() if name in self.kwargs}
        further = {"logits_to_keep": 1} if "logits_to_keep" in self.kwargs else {}
        self._someone_asks(True)
        return self.model(**inputs, past_key_values=cache, **further, use_cache=True).logits[:, -1].float()

    # --- one token of every row -----------------------------------------------------------------------------------

    def _advance(self) -> None:
        """A few tokens of every row, drawn before the host looks at them."""
        cache = self.cache
        assert cache is not None
        if cache.at == cache.capacity:
            cache.shift(self.longest + self.sampling.max_new_tokens)
        alive = [place for place, row in enumerate(self.active) if row is not None]
        rows = [row for row in self.active if row is not None]
        room = min(cache.capacity - cache.at, max(row.longest - len(row.ids) for row in rows))
        ids = [0 if row is None else row.ids[-1] for row in self.active]
        lengths = [1 if row is None else row.length for row in self.active]
        draws = Draws(rows, min(self.read_every, room), self.device)
        token_B, length_B = on(torch.tensor(ids), self.device), on(torch.tensor(lengths), self.device)
        alive_R = None if len(alive) == len(self.active) else on(torch.tensor(alive), self.device)
        cache.first = cache.at + 1 - max(lengths)
        for _ in range(draws.steps):
            # A row's tokens are those of the last columns, the new one included.
            column_T = torch.arange(cache.first, cache.at + 1, device=self.device)
            mask = (column_T[None] > cache.at - length_B[:, None]).long()
            logits_BV = self._forward(token_B[:, None], mask, length_B[:, None] - 1, cache)
            cache.at += 1
            token_R = self._draw(draws, logits_BV if alive_R is None else logits_BV.index_select(0, alive_R))
            token_B = token_R if alive_R is None else token_B.index_copy(0, alive_R, token_R)
            length_B = length_B + 1
        self._read(draws)
        for place, row in zip(alive, rows, strict=True):
            if row.finished or len(row.ids) == row.longest:
                self._finish(row)
                self.active[place] = None
        if self.waiting:
            self._refill()
        self._close_ranks()

    def _close_ranks(self) -> None:
        alive = [place for place, row in enumerate(self.active) if row is not None]
        if len(self.active) - len(alive) > DEAD_SHARE * len(self.active) or not alive:
            assert self.cache is not None
            if alive:
                self.cache.keep(alive)
            self.active = [self.active[place] for place in alive]

    def _draw(self, draws: Draws, logits_RV: Tensor) -> Tensor:
        """The next token of each row, by its own random number: [R]."""
        sampling = self.sampling
        greedy = sampling.temperature == 0
        scale = 1.0 if greedy else sampling.temperature
        scores_RV = self._filtered(draws, logits_RV)
        if greedy:
            token_R = scores_RV.argmax(-1)
        else:
            cumulative_RV = scores_RV.softmax(-1).cumsum(-1)
            # Keep the draw strictly below the total mass, so that rounding cannot select a zero-probability token.
            sum_R = cumulative_RV[:, -1]
            wanted_R = torch.minimum(draws.uniform_KR[draws.done] * sum_R, sum_R.nextafter(torch.zeros_like(sum_R)))
            # Past the end only where the logits are not numbers.
            token_R = torch.searchsorted(cumulative_RV, wanted_R[:, None], right=True)[:, 0].clamp(
                max=scores_RV.shape[1] - 1
            )
        tempered_RV = logits_RV if scale == 1.0 else logits_RV / scale
        draws.add(token_R, tempered_RV.gather(1, token_R[:, None])[:, 0] - tempered_RV.logsumexp(-1))
        return token_R

    def _read(self, draws: Draws) -> None:
        """What was drawn, into the rows: each as far as its end."""
        stops = set(self.sampling.stop_ids)
        for tokens, logps in zip(*draws.read(), strict=True):
            for row, token, logp in zip(draws.rows, tokens, logps, strict=True):
                if row.finished or len(row.ids) == row.longest:
                    continue
                if math.isnan(logp):
                    raise ValueError(
                        f"the model's logits are not finite numbers at token {len(row.ids)} of a completion: its "
                        "weights have diverged, or it overflows in this dtype (in fp16: try bf16)"
                    )
                row.ids.append(token)
                row.logps.append(logp)
                row.finished = token in stops or self._stopped(row)

    def _stopped(self, row: Row) -> bool:
        strings = self.sampling.stop_strings
        if not strings:
            return False
        if self.tokenizer is None:
            raise ValueError("stop_strings need the tokenizer: InProcessSampler(tokenizer)")
        tail = self.tokenizer.decode(row.ids[-max(map(len, strings)) - 8 :])
        last = self.tokenizer.decode(row.ids[-max(map(len, strings)) - 8 : -1])
        return any(string in tail and string not in last for string in strings)

    def _filtered(self, draws: Draws, logits_RV: Tensor) -> Tensor:
        """Scores of the tokens that can be sampled: penalties and excluded tokens first, then the filters."""
        scores_RV = logits_RV
        if self.penalties:
            scores_RV = scores_RV.clone()
            # They read the ids. Rows of one length go together, so that there is no padding to be taken for a token.
            for places, ids in by_length(draws.rows):
                scores_RV[places] = self.penalties(ids.to(self.device), scores_RV[places])
        if any(len(row.ids) + draws.done < self.least for row in draws.rows):
            scores_RV = scores_RV.masked_fill(self._stops_of(scores_RV) & draws.early_R1(self.least), -torch.inf)
        return self.filters(None, scores_RV) if self.filters else scores_RV

    def _stops_of(self, scores_RV: Tensor) -> Tensor:
        """Which tokens stop, [1, V]."""
        if not self.stop_1V.numel():
            stop_V = torch.zeros(scores_RV.shape[1], dtype=torch.bool)
            stop_V[list(self.sampling.stop_ids)] = True
            self.stop_1V = on(stop_V[None], self.device)
        return self.stop_1V

    def _finish(self, row: Row) -> None:
        if row not in self.active:
            self._forget(row.request)  # it never entered
        self.done[row.request, row.number] = Completion(row.ids, row.logps, row.finished)


def _tokens_that_fit(base: Any, device: torch.device) -> int:
    """Tokens whose keys and values have room, by the sizes in the model's configuration."""
    config = base.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    size = (
        torch.get_autocast_dtype(device.type).itemsize
        if torch.is_autocast_enabled(device.type)
        else base.dtype.itemsize
    )
    room = CACHE_BYTES
    if device.type == "cuda":
        # What torch holds and does not use is free too, whoever freed it: a training step does so.
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        room = (torch.cuda.mem_get_info(device)[0] + unused) // 2
    return room // (2 * config.num_hidden_layers * heads * width * size)


def _accepted(base: Any) -> set[str]:
    return set(inspect.signature(type(base).forward).parameters)


def _first_fault(sampler: InProcessSampler, model: nn.Module) -> str | None:
    """What is wrong with the cache that is kept here for this model, in one sentence, or None."""
    base = unwrap(model)
    vocabulary = base.config.get_text_config().vocab_size
    prompts = [[(start + 7 * index) % vocabulary for index in range(length)] for start, length in ((11, 3), (23, 6))]
    requests = [Request(prompt, 1, (0, index)) for index, prompt in enumerate(prompts)]
    sampling = Sampling(max_new_tokens=3, temperature=0)
    try:
        for [completion], prompt in zip(_Run(sampler, model, requests, sampling).drawn(), prompts, strict=True):
            ids = torch.tensor([prompt + completion.ids], device=base.get_input_embeddings().weight.device)
            logits = model(input_ids=ids, use_cache=False).logits[0].float()
            logps = logits.log_softmax(-1)[len(prompt) - 1 : -1]
            ours = torch.tensor(completion.logps, device=logps.device)
            theirs = logps.gather(1, ids[0, len(prompt) :, None])[:, 0]
            rounds = logits.dtype != torch.float32 or next(base.parameters()).dtype != torch.float32
            if not torch.allclose(ours, theirs, atol=0.2 if rounds or torch.is_autocast_enabled() else 1e-3):
                return "tokens after a shared cache are not those without it"
    except Exception as error:
        return f"its cache is not one of keys and values ({type(error).__name__}: {str(error).splitlines()[0][:100]})"
    return None


def _by_generate(model: nn.Module, request: Request, sampling: Sampling) -> list[Completion]:
    """The model's own `generate`, one request at a time, seeded by the request."""
    base = unwrap(model)
    device = base.get_input_embeddings().weight.device
    found = []
    for number in range(request.first, request.first + request.samples):
        # One at a time, so that a sample does not depend on the others.
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(int(np.random.SeedSequence([*request.seed, number]).generate_state(1)[0]))
            settings = {
                "max_new_tokens": min(sampling.max_new_tokens, request.limit or sampling.max_new_tokens),
                "do_sample": sampling.temperature != 0,
                "repetition_penalty": sampling.repetition_penalty,
                "eos_token_id": list(sampling.stop_ids) or None,
                "pad_token_id": sampling.stop_ids[0] if sampling.stop_ids else 0,
                **sampling.further,
            }
            if sampling.temperature != 0:
                settings |= {"temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p}
                settings |= {"min_p": sampling.min_p} if sampling.min_p else {}
            ids = torch.tensor([list(request.prompt_ids)], device=device)
            output = base.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), output_logits=True, return_dict_in_generate=True,
                **settings,
            )  # fmt: skip
        tokens = output.sequences[0, ids.shape[1] :].tolist()
        scale = sampling.temperature or 1.0
        logps = [
            (logits[0].float() / scale).log_softmax(-1)[token].item()
            for logits, token in zip(output.logits, tokens, strict=True)
        ]
        found.append(Completion(tokens, logps, bool(tokens) and tokens[-1] in sampling.stop_ids))
    return found
