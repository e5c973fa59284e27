"""Memory of a run by part and phase, and what of it fits a card."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from trl.data.batching.collate import Tree
from trl.models.low_bits import CHUNK, OUTSIDE_THEIR_STEP

from . import cost
from .cards import CARDS, Card
from .run import PAIRS, Run
from .trace import Linear, activations, empty_model, layers_of, tree

GIB = 2**30
RESERVE = 0.8 * GIB  # the driver's context, the libraries' workspaces
MOMENTS = {  # bytes a weight of what an optimizer keeps, besides float32 copies and lower halves
    "adamw_8bit": 2.0, "adamw_bnb_8bit": 2.0, "paged_adamw_8bit": 2.0, "ademamix_8bit": 3.0, "lion_8bit": 1.0,
    "paged_lion_8bit": 1.0, "adafactor": 0.05, "sgd": 0.0, "lion_32bit": 4.0, "paged_lion_32bit": 4.0,
    "adagrad": 4.0, "rmsprop": 4.0, "rmsprop_bnb": 4.0, "rmsprop_bnb_8bit": 1.0,
}  # fmt: skip
ADAM = 8.0  # two float32 moments


@dataclass(frozen=True)
class Weights:
    """What is known of a model's weights: numbers and bytes."""

    total: int
    trained: int  # that train
    trained_bytes: int  # of those; PEFT keeps adapters in float32
    quantised: int  # that `bits` applies to
    head: int  # the embedding and, unless it is tied, the head
    largest_layer: int
    products: float  # weights that a token is multiplied with, without the head
    dtype_bytes: int

    def bytes(self, bits: int, nested: bool) -> float:
        if not bits:
            return float(self.total * self.dtype_bytes)
        scales = {8: 0.01, 4: 0.127 / 8 if nested else 0.5 / 8}[bits]  # one for each 64 weights, in 4 or 1 bytes
        return self.quantised * (bits / 8 + scales) + (self.total - self.quantised) * self.dtype_bytes


def weights_of(config: PreTrainedConfig, dtype: torch.dtype, adapter: Any = None) -> Weights:
    """Counts the weights of the model on the meta device."""
    model: Any = empty_model(config, None, dtype, adapter)
    parameters = {id(each): each for each in model.parameters()}
    trained = sum(each.numel() for each in parameters.values() if each.requires_grad)
    inner = model.get_base_model() if adapter is not None else model
    ends = {id(inner.get_input_embeddings().weight): inner.get_input_embeddings().weight}
    if (head := inner.get_output_embeddings()) is not None:
        ends[id(head.weight)] = head.weight
    linear = {
        id(module.weight): module.weight.numel()
        for module in inner.modules()
        if isinstance(module, nn.Linear) and id(module.weight) not in ends and not _is_adapter(module, parameters)
    }
    text = config.get_text_config()
    experts = getattr(text, "num_local_experts", None) or getattr(text, "num_experts", None) or 1
    active = (getattr(text, "num_experts_per_tok", None) or 1) / experts if experts > 1 else 1.0
    stacked = sum(each.numel() for each in parameters.values() if each.ndim == 3)  # the experts of a layer
    frozen = {key: size for key, size in linear.items() if not parameters[key].requires_grad or adapter is None}
    body = sum(each.numel() for key, each in parameters.items() if key not in ends)
    return Weights(
        total=sum(each.numel() for each in parameters.values()),
        trained=trained,
        trained_bytes=sum(each.numel() * each.element_size() for each in parameters.values() if each.requires_grad),
        quantised=sum(frozen.values()) + stacked,
        head=sum(each.numel() for each in ends.values()),
        largest_layer=body // layers_of(config),
        products=sum(linear.values()) + stacked * active,
        dtype_bytes=dtype.itemsize,
    )


def _is_adapter(module: nn.Linear, parameters: dict[int, Any]) -> bool:
    return parameters[id(module.weight)].requires_grad and any(not each.requires_grad for each in parameters.values())


@dataclass(frozen=True)
class Phase:
    """A moment of a step at which memory has a maximum, and what it holds then, in bytes."""

    name: str
    parts: dict[str, float]

    @property
    def total(self) -> float:
        return sum(self.parts.values())


@dataclass
class Plan:
    """Memory, time and cost of a run. Bytes are those of one process.

    `card` is what it runs on, if that is known. `utilisation` is the share of the card's speed that training reaches.
    """

    run: Run
    card: Card | None = None
    utilisation: float = 0.35
    notes: list[str] = field(default_factory=list)
    steps: int | None = None
    price_per_hour: float | None = None

    @cached_property
    def weights(self) -> Weights:
        return weights_of(self.run.config, self.run.dtype, self.run.adapter)

    @property
    def shards(self) -> tuple[int, int, int]:
        """By how many the weights, the gradients and the optimizer's state of a process are divided."""
        run = self.run
        n = run.processes
        return {"ddp": (1, 1, 1), "zero1": (1, 1, n), "zero2": (1, n, n)}.get(run.sharding, (n, n, n))

    # --- what is always there ---------------------------------------------------------------------------------------

    @cached_property
    def held(self) -> dict[str, float]:
        run, found = self.run, {}
        by_weights, _, by_state = self.shards
        weights = self.weights
        adapter = weights.trained if run.adapter is not None else 0
        base = Weights(**{**vars(weights), "total": weights.total - adapter})
        found["weights"] = base.bytes(run.bits, run.nested) / by_weights
        if adapter:
            found["adapter"] = weights.trained_bytes / by_weights
        found["optimizer"] = weights.trained * self._bytes_of_state() / by_state
        if run.has_reference and run.adapter is None:
            found["reference"] = weights.total * weights.dtype_bytes / by_weights
        if run.critic:
            critic = weights.total
            found["critic"] = critic * weights.dtype_bytes / by_weights
            found["optimizer"] += critic * self._bytes_of_state() / by_state
        if run.frozen:
            found["other models"] = float(
                sum(weights_of(each, run.dtype).total * run.dtype.itemsize for each in run.frozen)
            )
        found["reserve"] = RESERVE
        return found

    def _bytes_of_state(self) -> float:
        run = self.run
        if run.optim.startswith("paged"):
            self._note("paged optimizer states move to the host when the card is full; they are counted as on the card")
        moments = MOMENTS.get(run.optim, ADAM)
        if run.dtype == torch.float32 or run.adapter is not None:
            return moments
        if run.sharding.startswith("zero") and run.processes > 1:
            return moments + 4.0  # DeepSpeed's float32 copy
        if any(word in run.optim for word in OUTSIDE_THEIR_STEP) or run.dtype == torch.float16:
            return moments + 2.0  # held in float32
        return moments + 2.0  # the lower halves

    def _note(self, sentence: str) -> None:
        if sentence not in self.notes:
            self.notes.append(sentence)

    # --- activations ------------------------------------------------------------------------------------------------

    def _trees(self, rows: int) -> list[Tree]:
        run = self.run
        if run.samples:
            longest = run.prompt + run.completion
            count = max(1, min(run.generations, (run.budget - run.prompt) // max(run.completion, 1)))
            groups = max(1, run.tokens_of_micro_batch // (run.prompt + count * run.completion))
            if run.tokens_of_micro_batch <= longest:
                count = 1
            return [tree(row, run.prompt, [run.completion] * count) for row in range(groups)]
        if run.method in PAIRS:
            return [tree(row, run.prompt, [run.completion] * 2) for row in range(rows)]
        whole = run.prompt + run.completion
        untrained = int(whole * (1 - run.trained))
        return [tree(row, max(untrained, 1), [whole - max(untrained, 1)]) for row in range(rows)]

    def _traced(self, rows: int) -> Linear:
        run = self.run
        return activations(
            run.config,
            self._trees(rows),
            dtype=run.dtype,
            autocast=run.autocast,
            adapter=run.adapter,
            checkpointing=run.checkpointing,
        )

    @cached_property
    def _one_and_two(self) -> tuple[float, float]:
        layers = layers_of(self.run.config)
        one = self._traced(1).of(layers)
        return (one, one) if self.run.samples else (one, self._traced(2).of(layers))

    def activations(self, rows: int) -> float:
        """Bytes of activations of a micro-batch of `rows` rows, at their peak."""
        one, two = self._one_and_two
        found = one + (two - one) * (rows - 1)
        if self.run.offloading:
            self._note("activations that are offloaded to the host are counted as those of one layer")
            found /= layers_of(self.run.config)
        return found

    # --- phases -----------------------------------------------------------------------------------------------------

    def phases(self, rows: int | None = None) -> list[Phase]:
        run, weights = self.run, self.weights
        rows = run.rows if rows is None else rows
        by_weights, by_grads, _ = self.shards
        trained = weights.trained_bytes + (weights.total * weights.dtype_bytes if run.critic else 0)
        gradients = trained / by_grads
        buckets = {"buckets": float(trained)} if run.processes > 1 and by_grads == 1 else {}
        head = min(gradients, weights.head * weights.dtype_bytes / by_grads) if run.adapter is None else gradients
        gathered: dict[str, float] = {}
        if by_weights > 1:
            gathered = {"gathered": (2 * weights.largest_layer + weights.head) * float(weights.dtype_bytes)}
        elif run.bits:
            gathered = {"dequantised": weights.largest_layer / 7 * float(weights.dtype_bytes)}
        live = self.activations(rows)
        whole = gradients if run.accumulation > 1 else head
        keeps_low_halves = run.dtype == torch.bfloat16 and run.adapter is None and by_weights == 1
        chunk = min(weights.trained, CHUNK) * 8.0 if keeps_low_halves else 0.0
        found = [
            Phase("backward", {**self.held, "gradients": whole, **buckets, **gathered, "activations": live}),
            Phase("optimizer step", {**self.held, "gradients": gradients, **buckets, "float32 chunk": chunk}),
        ]
        if run.samples:
            free = self.card.memory * GIB - sum(self.held.values()) - sum(gathered.values()) if self.card else None
            each = cost.cache_bytes(run.config, run.prompt + run.completion, run.dtype)
            at_once = run.rows * run.accumulation
            if free is not None:
                at_once = max(1, min(at_once, int(free * 0.8 / each)))
            found.append(Phase("sampling", {**self.held, **gathered, f"cache of {at_once} rows": at_once * each}))
        return found

    @property
    def peak(self) -> Phase:
        return max(self.phases(), key=lambda phase: phase.total)

    def fits(self, rows: int | None = None) -> bool:
        assert self.card is not None
        return max(phase.total for phase in self.phases(rows)) <= self.card.memory * GIB

    def largest_rows(self) -> int:
        """Rows of the largest micro-batch that fits the card; 0 if none does."""
        assert self.card is not None
        rest = self.card.memory * GIB - max(phase.total for phase in self.phases(1))
        one, two = self._one_and_two
        if rest < 0:
            return 0
        return 1 + int(rest / max(two - one, 1.0)) if two > one else 1

    # --- time -------------------------------------------------------------------------------------------------------

    def seconds_of_step(self) -> tuple[float, float]:
        """Seconds of an optimizer step: training, and sampling where the method samples."""
        assert self.card is not None
        flops = cost.flops_of_step(self.run, self.weights.products)
        held = self.held["weights"] + self.held.get("adapter", 0.0)
        sampling = cost.seconds_of_sampling(self.run, held, self.card.bandwidth * 1e9 * self.utilisation)
        return flops / (self.card.tflops * 1e12 * self.utilisation), sampling

    # --- words ------------------------------------------------------------------------------------------------------

    def advice(self) -> Iterator[str]:
        """What to change, if it does not fit, and what is left, if it does."""
        if self.card is None:
            return
        run, have = self.run, self.card.memory * GIB
        spare = have - self.peak.total
        if spare >= 0:
            yield f"fits, with {spare / GIB:.1f} GiB to spare"
            if not run.samples and (most := self.largest_rows()) > run.rows:
                yield f"--per_device_train_batch_size {most} would fit too"
            return
        yield f"does not fit: {-spare / GIB:.1f} GiB too much in the phase `{self.peak.name}`"
        most = 0 if run.samples else self.largest_rows()
        if 0 < most < run.rows:
            times = -(-run.rows * run.accumulation // most)
            flags = f"--per_device_train_batch_size {most} --gradient_accumulation_steps {times}"
            yield f"{flags} fits, with the same gradient"
            return
        if not run.checkpointing:
            yield "--gradient_checkpointing keeps one layer's activations at a time"
        if run.adapter is None:
            yield "--use_peft trains an adapter: gradients and optimizer state of a hundredth of the weights"
        elif not run.bits:
            yield "--load_in_4bit holds the frozen weights in a quarter of the memory"
        if run.processes == 1:
            yield "--accelerate_config fsdp2 --num_processes N divides weights, gradients and optimizer state by N"
        if self.peak.name == "backward" and (run.prompt + run.completion) > 1024 and not run.samples:
            yield "--max_length cuts the longest rows; activations are proportional to tokens"

    def to_dict(self) -> dict[str, Any]:
        """Everything that is known, with GiB in place of bytes."""
        run, phases, peak = self.run, self.phases(), self.peak
        timed = self.card is not None and self.card.tflops > 0
        seconds = self.seconds_of_step() if timed else None
        hours = self.steps * sum(seconds) / 3600 if seconds and self.steps else None
        trained = f"{self.weights.trained:,} of {self.weights.total:,} weights train"
        each = f"{run.rows} rows a micro-batch" if not run.samples else f"{run.tokens_of_micro_batch:,} tokens at most"
        what = f"{run.method}: {trained}, in {str(run.dtype).removeprefix('torch.')}"
        return {
            "what": f"{what}{f' ({run.bits} bits frozen)' if run.bits else ''}; prompts of {run.prompt:,} and "
            f"completions of {run.completion:,} tokens, {each}, {run.accumulation} accumulated, {run.processes} "
            f"process{'es (' + run.sharding + ')' if run.processes > 1 else ''}",
            "phases": [
                {
                    "name": phase.name,
                    "parts": {name: size / GIB for name, size in phase.parts.items() if size},
                    "total": phase.total / GIB,
                }
                for phase in phases
            ],
            "peak": peak.total / GIB,
            "peak_phase": peak.name,
            "card": self.card.memory if self.card else None,
            "fits": self.fits() if self.card else None,
            "largest_micro_batch": self.largest_rows() if self.card and not run.samples else None,
            "advice": list(self.advice()),
            "cards": self.cards_that_fit(),
            "tokens_of_step": run.tokens_of_step,
            "utilisation": self.utilisation,
            "seconds_of_step": seconds,
            "steps": self.steps,
            "hours": hours,
            "processes": run.processes,
            "cost": hours * self.price_per_hour * run.processes if hours and self.price_per_hour else None,
            "notes": self.notes,
        }

    def cards_that_fit(self) -> list[str]:
        """The names of all cards with room for the run as it is."""
        found = []
        for name, card in CARDS.items():
            if max(phase.total for phase in Plan(self.run, card).with_traces(self).phases()) <= card.memory * GIB:
                found.append(name)
        return found

    def with_traces(self, other: "Plan") -> "Plan":
        """This plan with what another one of the same run has measured."""
        self.__dict__.update(_one_and_two=other._one_and_two, weights=other.weights)
        return self


def plan(run: Run, card: Card | str | None = None, utilisation: float = 0.35) -> Plan:
    """The plan of a run on a card, given by its name in `CARDS` or as a `Card`."""
    if isinstance(card, str):
        if card not in CARDS:
            raise ValueError(f"there is no card {card!r}; known are {', '.join(CARDS)}, or give --gpu_memory in GiB")
        card = CARDS[card]
    return Plan(run, card, utilisation)
