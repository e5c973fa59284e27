"""Drawing completions by transformers' continuous batching: paged keys and values, made anew for each round.

What differs from the sampler of `generate.py`:

- One seeded random generator serves all rows, in the order in which they are scheduled. The same round on the same
  machine draws the same completions; another number of prompts, of ranks or of pages in the cache draws others.
- The rows of a step are one row to the model, so that rounding, and with it now and then a token, depends on the
  neighbours.
- It runs in a thread of its own, which autocast does not reach: weights are used in the dtype that they are kept in.
- All requests wait before the first step, so that nothing hangs on timing.
"""

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedConfig
from transformers.generation import ContinuousBatchingConfig
from transformers.generation.continuous_batching.utils import WorkloadHints

from trl.data.batching.collate import Branch, Tree
from trl.engine.score import score
from trl.models.shards import is_sharded
from trl.models.unwrap import evaluating, unwrap

from .generate import PREFILL_TOKENS, _tokens_that_fit
from .types import Completion, Request, Sampling

OPTION = "use_transformers_continuous_batching"
MEMORY_SHARE = 0.5  # of an accelerator's free memory, for keys and values; transformers' own 0.9 leaves none to train
# What the sampler sets itself, and why nobody else may.
OURS = {
    "return_logprobs": "log-probs are always returned",
    "seed": "random numbers follow from the config's seed and the round",
    "max_queue_size": "all requests of a round wait at once",
    "per_request_processors": "all requests of a round are sampled alike",
    "drop_unsupported_processors": "what cannot be honoured is an error",
}
_FIELDS = {each.name for each in dataclasses.fields(ContinuousBatchingConfig)}
# Tokens of a page; its name changed after transformers 5.17.
PAGE = "page_size" if "page_size" in _FIELDS else "block_size"


class ContinuousSampler:
    """Draws completions with the model that trains, by transformers' continuous batching.

    `settings` are fields of transformers' `ContinuousBatchingConfig`, in a dict or as JSON. `max_cache_tokens` bounds
    the cache. The model must have been attached where `top_k`, `top_p` or `min_p` is set: log-probs are then the
    engine's, because transformers gives those that filters have changed.
    """

    def __init__(self, settings: Mapping[str, Any] | str | None = None, *, max_cache_tokens: int | None = None) -> None:
        self.settings, self.max_cache_tokens = _settings(settings), max_cache_tokens
        self.model: nn.Module | None = None

    def check(self, sampling: Sampling) -> None:
        """An error that names what of it transformers cannot honour when it batches continuously."""
        cannot = [f"generation_kwargs[{name!r}]" for name in sampling.further]
        if sampling.repetition_penalty != 1:
            cannot.append("repetition_penalty")
        if sampling.stop_strings:
            cannot.append("stop_strings")
        if cannot:
            raise ValueError(
                f"{OPTION} cannot honour {', '.join(cannot)}: leave it out, and the library's own sampler does"
            )

    def sync(self, model: nn.Module, version: int) -> None:
        """Draw with this model from now on: it is in this process, and nothing is copied."""
        self.model = model

    @torch.no_grad()
    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[list[Completion]]:
        """`samples` completions of each request, in the order of the requests."""
        self.check(sampling)
        if any(request.limit is not None for request in requests):
            raise ValueError(f"{OPTION} has one length for all completions, so that it cannot go on with the turns of "
                             "an environment: leave it out")  # fmt: skip
        model = self.model
        if model is None:
            raise ValueError("the sampler has no model yet: call sync(model, version) first")
        base = unwrap(model)
        with evaluating(model):
            self._check_model(model, base)
            drawn = self._drawn(base, requests, sampling)
            if sampling.temperature != 0 and (sampling.top_k or sampling.top_p < 1 or sampling.min_p):
                drawn = _scored(base, requests, drawn, sampling.temperature)
        return drawn

    def _drawn(self, base: Any, requests: Sequence[Request], sampling: Sampling) -> list[list[Completion]]:
        prompts = [list(request.prompt_ids) for request in requests for _ in range(request.samples)]
        if not prompts:
            return []
        outputs = iter(_batched(base, prompts, _generation(sampling), self._batching(base, requests, sampling)))
        stops = set(sampling.stop_ids)
        return [
            [_completion(next(outputs), stops) for _ in range(request.samples)]
            for request in requests
        ]  # fmt: skip

    def _batching(self, base: Any, requests: Sequence[Request], sampling: Sampling) -> ContinuousBatchingConfig:
        """The user's settings over what the round needs."""
        device, settings = base.device, dict(self.settings)
        page = settings.get("block_size") or settings.setdefault(PAGE, 256 if device.type == "cuda" else 32)
        lengths = [len(request.prompt_ids) for request in requests for _ in range(request.samples)]
        if device.type == "cpu" or self.max_cache_tokens:
            # In pages, of which the last of a row may be all but empty.
            pages = [-(-(length + sampling.max_new_tokens) // page) + 1 for length in lengths]
            most = (self.max_cache_tokens or _tokens_that_fit(base, device)) // page
            settings.setdefault("num_blocks", max(max(pages), min(sum(pages), most)))
        else:
            settings.setdefault("max_memory_percent", MEMORY_SHARE)
        if device.type == "cpu":
            settings.setdefault("max_batch_tokens", max(16, len(lengths), min(sum(lengths), PREFILL_TOKENS)))
        if base.dtype == torch.float32 and "auto_switch_to_flash" in _FIELDS:
            settings.setdefault("auto_switch_to_flash", False)  # its kernels want half precision
        settings.setdefault("disable_nccl_graph_mixing", False)  # it sets the environment, for tensor parallelism alone
        return ContinuousBatchingConfig(
            **settings, return_logprobs=True, drop_unsupported_processors=False, seed=_seed(requests)
        )

    def _check_model(self, model: nn.Module, base: Any) -> None:
        """Whether the model can be served, by a numeric check that is made once for each model."""
        fault: str | None = None
        if is_sharded(model):
            fault = "its weights are sharded (FSDP), and the ranks would not gather them together"
        elif not getattr(base, "_trl_batched", False):
            fault = self._first_fault(model, base)
        if fault is not None:
            raise ValueError(
                f"{OPTION}: transformers does not serve {type(base).__name__} here: {fault}. Leave the option out, and "
                "the library's own sampler draws"
            )
        base._trl_batched = True

    def _first_fault(self, model: nn.Module, base: Any) -> str | None:
        """What is wrong with the log-probs of a few tokens after two prompts, in one sentence, or None."""
        vocabulary = base.config.get_text_config().vocab_size
        prompts = [
            [(start + 7 * index) % vocabulary for index in range(length)] for start, length in ((11, 3), (23, 6))
        ]
        requests = [Request(prompt, 1, (0, index)) for index, prompt in enumerate(prompts)]
        try:
            drawn = self._drawn(base, requests, Sampling(max_new_tokens=3, temperature=0))
        except Exception as error:
            return f"{type(error).__name__}: {str(error).partition(chr(10))[0][:160]}"
        for prompt, [completion] in zip(prompts, drawn, strict=True):
            ids = torch.tensor([prompt + completion.ids], device=base.device)
            logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
            theirs = logits.log_softmax(-1).gather(1, ids[0, len(prompt) :, None])[:, 0].cpu()
            rounds = base.dtype != torch.float32 or torch.is_autocast_enabled(base.device.type)
            if not torch.allclose(torch.tensor(completion.logps), theirs, atol=0.2 if rounds else 1e-3):
                return "tokens after its paged cache are not those without a cache"
        return None


def _settings(given: Mapping[str, Any] | str | None) -> dict[str, Any]:
    name = "transformers_continuous_batching_config"
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except json.JSONDecodeError as error:
            raise ValueError(f"{name} is no JSON: {error}") from error
    if not isinstance(given, Mapping | None):
        raise ValueError(f"{name} is {type(given).__name__}; give fields of ContinuousBatchingConfig in a dict")
    settings = dict(given or {})
    unknown = sorted(settings.keys() - _FIELDS)
    if unknown:
        raise ValueError(f"{name}: {', '.join(unknown)} not known to this transformers; known are {sorted(_FIELDS)}")
    for each in settings.keys() & OURS.keys():
        raise ValueError(f"{name}: leave {each!r} out; {OURS[each]}")
    return settings


def _generation(sampling: Sampling) -> GenerationConfig:
    drawing = {}
    if sampling.temperature != 0:
        drawing = {
            "temperature": float(sampling.temperature),
            "top_k": sampling.top_k or None,
            "top_p": sampling.top_p if sampling.top_p < 1 else None,
            "min_p": sampling.min_p or None,
        }
    return GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        do_sample=sampling.temperature != 0,
        eos_token_id=list(sampling.stop_ids) or [-1],  # without any the model's own would hold
        **drawing,
    )


def _seed(requests: Sequence[Request]) -> int:
    """One for all of them, of the seeds and numbers of each. Ranks that draw of the same prompts differ in these."""
    numbers = [number for request in requests for number in (*request.seed, request.first, request.samples)]
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def _batched(base: Any, prompts: list[list[int]], generation: GenerationConfig,
             batching: ContinuousBatchingConfig) -> list[Any]:  # fmt: skip
    """transformers' output for each prompt."""
    hints = WorkloadHints(max(map(len, prompts)), generation.max_new_tokens, len(prompts))
    devices = [base.device] if base.device.type == "cuda" else []
    with _own_attention(base), torch.random.fork_rng(devices):
        manager = base.init_continuous_batching(
            generation_config=generation, continuous_batching_config=batching, workload_hints=hints
        )
        manager.warmup()
        # Before the start, so that what is scheduled together does not depend on timing.
        names = manager.add_requests(prompts, max_new_tokens=generation.max_new_tokens)
        manager.start()
        try:
            found = _collected(manager, len(names))
        finally:
            manager.stop(hard_stop=True)
            manager.destroy()
    errors = [output.error for output in found.values() if output.error]
    if errors or len(found) < len(names):
        raise RuntimeError(errors[0] if errors else f"{len(names) - len(found)} completions are missing")
    return [found[name] for name in names]


def _collected(manager: Any, count: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    while len(found) < count:
        output = manager.get_result(timeout=1)
        if output is not None:
            found[output.request_id] = output
        elif not manager.is_running():
            break
    return found


@contextlib.contextmanager
def _own_attention(base: nn.Module) -> Iterator[None]:
    """The attention that the model came with, which transformers can make a paged one of; afterwards what it was."""
    configs: list[Any] = list({id(each.config): each.config for each in base.modules()
                    if isinstance(getattr(each, "config", None), PreTrainedConfig)}.values())  # fmt: skip
    before = [config._attn_implementation for config in configs]
    try:
        for config, own in zip(configs, getattr(base, "_trl_attention", before), strict=True):
            config._attn_implementation = own
        yield
    finally:
        for config, own in zip(configs, before, strict=True):
            config._attn_implementation = own


def _completion(output: Any, stops: set[int]) -> Completion:
    ids = list(output.generated_tokens)
    return Completion(ids, list(output.logprobs), bool(ids) and ids[-1] in stops)


def _scored(base: Any, requests: Sequence[Request], drawn: list[list[Completion]],
            temperature: float) -> list[list[Completion]]:  # fmt: skip
    """The completions with the engine's log-probs, a few at a time."""
    return [
        [scored for some in _few(request, group) for scored in _rescored(base, request, some, temperature)]
        for request, group in zip(requests, drawn, strict=True)
    ]


def _few(request: Request, group: list[Completion]) -> Iterator[list[Completion]]:
    """Runs of completions that have, with their prompt, not too many tokens."""
    some: list[Completion] = []
    used = 0
    for completion in group:
        if some and used + len(completion.ids) > PREFILL_TOKENS:
            yield some
            some = []
        used = (used if some else len(request.prompt_ids)) + len(completion.ids)
        some.append(completion)
    if some:
        yield some


def _rescored(base: Any, request: Request, group: list[Completion], temperature: float) -> list[Completion]:
    prompt = list(request.prompt_ids)
    branches = tuple(Branch(each.ids, [True] * len(each.ids)) for each in group)
    batch = base._trl_attachment.batch([Tree(Branch(prompt, [False] * len(prompt)), branches)])
    logp_N = score(base, _moved(batch, base.device), temperature=temperature).logp_N
    parts = logp_N.float().cpu().split([len(each.ids) for each in group])
    return [each._replace(logps=part.tolist()) for each, part in zip(group, parts, strict=True)]


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _moved(each, device) for key, each in value.items()}
    return value
