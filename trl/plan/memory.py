"""Memory of a run by part and phase, and what of it fits a card."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from trl.engine.device import of_kind
from trl.engine.head import CHUNK_ELEMENTS

from . import cost
from .advice import advice
from .cards import CARDS, Card
from .run import PAIRS, Run
from .trace import CHUNKS, Held, estimated, micro_batch
from .weights import Weights, bytes_of, state_bytes, step_bytes, weights_of

GIB = 2**30
MOST_TRACED = 12  # times the smallest micro-batch
RESERVE = {"cuda": 0.8 * GIB, "cpu": 0.03 * GIB}  # the driver's context, the libraries' workspaces


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
    rough: bool = False
    rate: float | None = None  # tokens a second of a process, where they were measured
    traces: dict[int, list[Held]] = field(default_factory=dict)  # what was traced, by the size of the micro-batch

    @cached_property
    def weights(self) -> Weights:
        return weights_of(self.run)

    @property
    def shards(self) -> tuple[int, int, int]:
        """By how many the weights, the gradients and the optimizer's state of a process are divided."""
        run = self.run
        n = run.processes
        return {"ddp": (1, 1, 1), "zero1": (1, 1, n), "zero2": (1, n, n)}.get(run.sharding, (n, n, n))

    # --- what is always there ---------------------------------------------------------------------------------------

    @cached_property
    def held(self) -> dict[str, float]:
        """Bytes that are there in every phase, by part."""
        run, weights = self.run, self.weights
        by_weights, _, by_state = self.shards
        critic = bytes_of(run.critic, run.dtype, "SequenceClassification") if run.critic is not None else 0.0
        adapter = run.adapter is not None
        frozen = weights.frozen_bytes(run.bits, run.nested)
        found = {"weights": (frozen + (0.0 if adapter else weights.trained_bytes - critic)) / by_weights}
        if adapter:
            found["adapter"] = (weights.trained_bytes - critic) / by_weights
        if critic:
            found["critic"] = critic / by_weights
        found["optimizer"] = state_bytes(run, weights) / by_state
        if run.has_reference and not adapter:
            found["reference"] = (weights.total_bytes - critic) / by_weights
        if run.teacher is not None:
            found["teacher"] = bytes_of(run.teacher, run.dtype)
        if run.frozen:
            found["reward models"] = sum(bytes_of(each, run.dtype, "SequenceClassification") for each in run.frozen)
        found["reserve"] = RESERVE[run.device]
        if run.optim.startswith("paged"):
            self._note("paged optimizer states move to the host when the card is full; they are counted as on the card")
        return found

    def _note(self, sentence: str) -> None:
        if sentence not in self.notes:
            self.notes.append(sentence)

    # --- a micro-batch ----------------------------------------------------------------------------------------------

    @property
    def amount(self) -> int:
        """The size of a micro-batch: rows, and tokens in methods that sample."""
        return self.run.tokens_of_micro_batch if self.run.samples else self.run.rows

    def sections(self, amount: float) -> list[Held]:
        """What the sections of a micro-batch hold at their highest, beyond what is always there.

        Small ones are traced as they are. From some chunks of the head on, memory is linear in the size: then two sizes
        are traced.
        """
        first = self.least * self._linear_from
        if amount <= 2 * first and float(amount).is_integer():
            return self._traced(int(amount))
        low, high = (self.least, first) if amount < first and first > self.least else (first, 2 * first)
        share = (amount - low) / (high - low)
        pairs = zip(self._traced(low), self._traced(high), strict=True)
        return [Held(*(a + (b - a) * share for a, b in zip(*pair, strict=True))) for pair in pairs]

    @property
    def least(self) -> int:
        """The size of the smallest micro-batch."""
        return self.run.prompt + self.run.completion if self.run.samples else 1

    @cached_property
    def _linear_from(self) -> int:
        """So many times the smallest micro-batch have `CHUNKS` chunks of the head, or are as many as are traced."""
        run = self.run
        if run.head != "CausalLM":
            return 1
        trained = run.completion * (2 if run.method in PAIRS else 1)
        if run.method in ("sft", "gkd"):
            trained = max(1, int(run.tokens_of_row * run.trained))
        chunk = of_kind(CHUNK_ELEMENTS, run.device) // run.config.get_text_config().vocab_size
        return max(1, min(-(-CHUNKS * chunk // trained), MOST_TRACED))

    def _traced(self, amount: int) -> list[Held]:
        if amount not in self.traces:
            self.traces[amount] = self._micro_batch(amount)
        return self.traces[amount]

    def _micro_batch(self, amount: int) -> list[Held]:
        if not self.rough:
            try:
                return micro_batch(self.run, amount)
            except Exception as error:  # a model's own code may do what tensors without values cannot
                reason = f"{type(error).__name__}: {str(error).splitlines()[0][:100] if str(error) else ''}"
                self._note(
                    f"models of type {self.run.config.model_type} are not traced: activations are estimated from the "
                    f"model's sizes ({reason})"
                )
                self.rough = True
                self.traces.clear()
        return estimated(self.run, amount)

    def activations(self, amount: float) -> float:
        """Bytes of activations of a micro-batch, at their peak."""
        return max(self.sections(amount), key=lambda held: held.total).activations

    # --- phases -----------------------------------------------------------------------------------------------------

    def phases(self, amount: float | None = None) -> list[Phase]:
        """The phases of a step, with micro-batches of `amount` (default: those of the run)."""
        run, weights = self.run, self.weights
        by_weights, by_grads, _ = self.shards
        gradients = weights.trained_bytes / by_grads
        buckets = {"buckets": float(weights.trained_bytes)} if run.processes > 1 and by_grads == 1 else {}
        gathered: dict[str, float] = {}
        if by_weights > 1:
            gathered = {"gathered": (2 * weights.largest_layer + weights.head) * float(weights.dtype_bytes)}
        elif run.bits:
            gathered = {"dequantised": float(weights.largest_quantised * weights.dtype_bytes)}
        sections = self.sections(self.amount if amount is None else amount)
        highest = max(sections, key=lambda held: held.activations + held.gradients / by_grads)
        made = gradients if run.accumulates else highest.gradients / by_grads
        in_backward = {**buckets, **gathered, "gradients": made, "activations": highest.activations}
        found = [
            Phase("backward", {**self.held, **in_backward}),
            Phase("optimizer step", {**self.held, **buckets, "gradients": gradients, "step": self._step()}),
        ]
        if run.samples or run.method == "gkd":  # which writes answers in some of its steps
            found.append(Phase("sampling", {**self.held, **gathered, **self._sampler(gathered)}))
        return found

    def _step(self) -> float:
        zero = self.run.sharding.startswith("zero") and self.run.processes > 1
        return 0.0 if zero else step_bytes(self.run, self.weights, self.shards[0])

    def _sampler(self, gathered: Mapping[str, float]) -> dict[str, float]:
        """Keys and values of the rows that are sampled at once, and what a token of each predicts."""
        run = self.run
        free = None
        if self.card is not None:
            free = self.card.memory * GIB - sum(self.held.values()) - sum(gathered.values())
        return cost.sampler_bytes(run, free, int(self.weights.products))

    @property
    def peak(self) -> Phase:
        return max(self.phases(), key=lambda phase: phase.total)

    def fits(self, amount: float | None = None) -> bool:
        """Whether the run fits the card, with micro-batches of `amount` (default: those of the run)."""
        assert self.card is not None
        return self.highest(amount) <= self.card.memory * GIB

    def highest(self, amount: float | None = None) -> float:
        """Bytes of the largest phase."""
        return max(phase.total for phase in self.phases(amount))

    def largest(self, memory: float | None = None) -> float:
        """The size of the largest micro-batch that fits the card, or `memory` bytes: rows, or tokens where the method
        samples. 0 where the smallest does not fit; at most a million times the run's own."""
        if memory is None:
            assert self.card is not None
            memory = self.card.memory * GIB
        if self.highest(self.least) > memory:
            return 0.0
        fits, fails = float(self.least), 1e6 * self.amount
        if self.highest(fails) <= memory:
            return fails
        while fails - fits > max(1.0, 1e-3 * fits):
            middle = (fits + fails) / 2 if fails < 4 * fits else (fits * fails) ** 0.5
            if self.highest(middle) <= memory:
                fits = middle
            else:
                fails = middle
        if not self.run.samples:
            fits = float(int(fits) + (self.highest(int(fits) + 1) <= memory))
        return fits

    def largest_rows(self) -> int:
        """Rows of the largest micro-batch that fits the card; 0 if none does."""
        return int(self.largest())

    # --- time -------------------------------------------------------------------------------------------------------

    def seconds_of_step(self) -> tuple[float, float]:
        """Seconds of an optimizer step: training, and sampling where the method samples. With a measured rate
        both are in the first."""
        if self.rate is not None:
            return self.run.tokens_of_step / self.rate, 0.0
        assert self.card is not None
        flops = cost.flops_of_step(self.run, self.weights.products)
        held = self.held["weights"] + self.held.get("adapter", 0.0)
        sampling = cost.seconds_of_sampling(self.run, held, self.card.bandwidth * 1e9 * self.utilisation)
        return flops / (self.card.tflops * 1e12 * self.utilisation), sampling

    def _utilisation(self) -> float:
        """The share of the card's speed: as stated, or that of the measured rate."""
        if self.rate is None or self.card is None:
            return self.utilisation
        flops = cost.flops_of_step(self.run, self.weights.products) / self.run.tokens_of_step
        return flops * self.rate / (self.card.tflops * 1e12)

    # --- words ------------------------------------------------------------------------------------------------------

    def advice(self) -> Iterator[str]:
        """What to change, if it does not fit, and what is left, if it does."""
        return advice(self)

    def of(self, run: Run) -> "Plan":
        """The plan of another run on the same card."""
        return Plan(run, self.card, self.utilisation, rough=self.rough)

    def to_dict(self) -> dict[str, Any]:
        """Everything that is known, with GiB in place of bytes."""
        run, phases, peak = self.run, self.phases(), self.peak
        known = self.card is not None and self.card.tflops > 0
        timed = known or self.rate is not None
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
            "utilisation": self._utilisation() if known else 0.0,
            "tokens_per_second": self.rate,
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
        self.__dict__.update(weights=other.weights, held=other.held, traces=other.traces, rough=other.rough)
        return self


def tokens_that_fit(run: Run, memory_bytes: float) -> int:
    """Tokens of the largest micro-batch of a run that fits into this memory beside everything else.

    A row's tokens count as the engine computes them: a prompt once for its completions. 0 where not even the smallest
    micro-batch fits, one row or one completion.
    """
    most = Plan(run).largest(memory_bytes)
    return int(most if run.samples else most * run.tokens_of_row)


def plan(run: Run, card: Card | str | None = None, utilisation: float = 0.35, rough: bool = False) -> Plan:
    """The plan of a run on a card, given by its name in `CARDS` or as a `Card`. `rough`: activations are estimated from
    the sizes of the model, in no time, instead of traced."""
    if isinstance(card, str):
        if card not in CARDS:
            raise ValueError(f"there is no card {card!r}; known are {', '.join(CARDS)}, or give --gpu_memory in GiB")
        card = CARDS[card]
    return Plan(run, card, utilisation, rough=rough)
