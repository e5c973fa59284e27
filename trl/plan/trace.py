"""The memory of a micro-batch, measured on tensors that have shapes and no values.

A model of one layer and one of two are run forward and backward through the library's own engine under torch's
`FakeTensorMode`, while what is alive is counted. What a third layer would add is what the second did, section by
section: the forward pass, the head's backward pass, that of the layer next to the head, that of the layer next to the
embedding, and the embedding's.
"""

import contextlib
import copy
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from trl.engine import linear, lora
from trl.engine.device import of_kind, standing_for
from trl.engine.forest import Batch
from trl.engine.head import CHUNK_ELEMENTS
from trl.engine.measures import Comparison
from trl.engine.probe import attach_unprobed
from trl.engine.scalar import scalars
from trl.engine.score import score
from trl.engine.teacher import predictions
from trl.models.offload import SMALLEST_OFFLOADED, enable_checkpointing
from trl.models.unwrap import evaluating, unwrap

from .run import TAUGHT, Run
from .shapes import empty, layers_of, policy, trees

CHUNKS = 3  # of the head, from which on more of them take no more memory


class Held(NamedTuple):
    """Bytes alive at a moment, beyond the weights: activations, and gradients of weights."""

    activations: float
    gradients: float

    @property
    def total(self) -> float:
        return self.activations + self.gradients

    def beyond(self, one: "Held", layers: int) -> "Held":
        """With this many layers, where this is with two and `one` with one."""
        return Held(*(a + (b - a) * (layers - 1) for a, b in zip(one, self, strict=True)))


def micro_batch(run: Run, amount: int) -> list[Held]:
    """The highest of each section of a forward and a backward pass over a micro-batch of `amount` (see `shapes.trees`).

    Gradients that earlier micro-batches have left (`run.accumulates`) are not counted, those that this one makes are.
    """
    with torch.random.fork_rng(devices=[]), standing_for(run.device, CHUNKS):
        one, two = (_sections(run, layers, amount) for layers in (1, 2))
    layers = layers_of(run.config)
    return [last.beyond(first, layers) for first, last in _aligned(one, two)]


def estimated(run: Run, amount: int) -> list[Held]:
    """About what `micro_batch` finds, from the sizes of the model alone."""
    text = run.config.get_text_config()
    hidden, layers = text.hidden_size, layers_of(run.config)
    inner = getattr(text, "intermediate_size", None) or 4 * hidden
    tokens = amount if run.samples else amount * run.tokens_of_row
    itemsize = (run.autocast or run.dtype).itemsize
    # Of a layer: what norms, projections, attention and the feed-forward part save; the residual stream.
    layer = tokens * itemsize * (12 * hidden + 4 * inner)
    stream = tokens * hidden * max(itemsize, run.dtype.itemsize)
    kept = layer + stream * layers if run.checkpointing else (layer + stream) * layers
    elements = of_kind(CHUNK_ELEMENTS, run.device)
    head = 0.0
    if run.head == "CausalLM":
        chunks = 3 if run.adapter is None else 4  # a frozen head has its gradient in the forward pass
        head = 4.0 * (chunks * min(elements, tokens * text.vocab_size) + 3 * tokens * hidden)
        weight = text.vocab_size * hidden
        head += 4.0 * weight if run.adapter is None else 0.0  # its gradient
        if itemsize < run.dtype.itemsize:  # its copy under autocast
            head += itemsize * weight
        if itemsize == 2 and run.device == "cpu" and not linear._has_half_products():
            head += 4.0 * weight
    return [Held(kept + head, 0.0)]


def _aligned(one: Mapping[str, Held], two: Mapping[str, Held]) -> Iterator[tuple[Held, Held]]:
    """The sections of a model of one layer beside those of a model of two."""
    for name, held in two.items():
        if name == "layer 1":  # the only layer is both the first and the last
            name = "layer 0" if "layer 0" in one else "end"
        yield one[name], held


def _sections(run: Run, layers: int, amount: int) -> dict[str, Held]:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    model, batch, teacher = prepared(run, layers, amount, mode)
    half = run.device == "cpu" and (run.dtype in linear.HALF or run.autocast is not None)
    products = linear.half_products(torch.device("cpu"), half)
    alive = _Alive(in_place=not isinstance(products, TorchDispatchMode))
    _watch(model, layers, alive, gradients=not run.accumulates)
    cast = torch.autocast("cpu", run.autocast) if run.autocast is not None else contextlib.nullcontext()
    with mode, alive, products, _offloaded(model, run):
        with cast:
            total = _loss(run, model, batch, teacher)
        alive.section("forward")
        total.backward()
        del total
        alive.section("end")
    return alive.sections


def prepared(run: Run, layers: int, amount: int, mode: FakeTensorMode) -> tuple[nn.Module, Batch, nn.Module | None]:
    """The policy with `layers` layers, a micro-batch of `amount` and the teacher, if there is one, without values."""
    model = policy(run, layers)
    attachment = attach_unprobed(model)
    if run.bits:
        lora.detach(model)  # over quantised weights, which are whole here, PEFT's forward runs
    if run.critic is not None:
        attach_unprobed(unwrap(model).critic)
    if run.checkpointing:
        enable_checkpointing(model)
        if hasattr(model, "enable_input_require_grads"):
            model.enable_input_require_grads()
    model.train()
    teacher = None
    if run.teacher is not None and run.method in TAUGHT:
        teacher = empty(run.teacher, run.dtype, layers=1)
        attach_unprobed(teacher)
        teacher = _fake_model(teacher.requires_grad_(False).eval(), mode)
    model = _fake_model(model, mode)
    if run.accumulates:
        with mode:
            for weight in model.parameters():
                weight.grad = torch.empty_like(weight) if weight.requires_grad else None
    return model, _fake(attachment.batch(trees(run, amount)), mode), teacher


def _loss(run: Run, model: nn.Module, batch: Batch, teacher: nn.Module | None) -> Tensor:
    """What the method's loss reads of the policy, summed."""
    if run.head != "CausalLM":
        return scalars(model, batch).sum()
    if teacher is not None and run.method != "minillm":
        comparison = Comparison(predictions(teacher, batch), beta=0.5)
        stats = score(model, batch, entropy=True, top1=True, comparison=comparison, logp_grad=False)
        assert stats.divergence_N is not None
        return stats.divergence_N.sum()
    pairs = run.method in ("dpo", "kto", "orpo", "cpo", "bco")
    stats = score(
        model,
        batch,
        entropy=True,
        top1=run.method in ("sft", "dpo"),
        mean_logit=pairs,
        values=run.has_value_head or run.critic is not None,
        temperature=0.7 if run.method == "ppo" else 1.0,
    )
    if run.method == "dpo" and run.has_reference:
        with torch.no_grad(), evaluating(model):  # the reference has the policy's shape
            reference = score(model, batch).logp_N
        return (stats.logp_N - reference).sum()
    return stats.logp_N.sum() if stats.value_N is None else (stats.logp_N + stats.value_N).sum()


def _offloaded(model: nn.Module, run: Run) -> Any:
    """As `models.offload.on_host`: what is saved for the backward pass is not counted until it is read."""
    if not run.offloading or run.device == "cpu":
        return contextlib.nullcontext()
    weights = {id(weight.untyped_storage()) for weight in model.parameters()}

    def pack(tensor: Tensor) -> Any:
        stays = tensor.numel() < SMALLEST_OFFLOADED or id(tensor.untyped_storage()) in weights
        return tensor if stays else (tensor.shape, tensor.dtype)

    def unpack(packed: Any) -> Tensor:
        return packed if isinstance(packed, Tensor) else torch.empty(packed[0], dtype=packed[1])

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


def _watch(model: nn.Module, layers: int, alive: "_Alive", gradients: bool) -> None:
    """Have `alive` told where the backward pass is, and of the gradients that it has made."""
    base = unwrap(model)
    stack = next((each for each in base.modules() if isinstance(each, nn.ModuleList) and len(each) == layers), None)
    places = [] if stack is None else [(layer, f"layer {number + 1}") for number, layer in enumerate(stack)]
    if places:
        places[-1] = (places[-1][0], "head")  # what ran backward when the gradient of the last layer's output is known
        places.append((base.get_input_embeddings(), "layer 0"))
    for module, name in places:

        def after(module: Any, inputs: Any, output: Any, name: str = name) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            if hidden.requires_grad:
                hidden.register_hook(lambda slope: alive.section(name))

        module.register_forward_hook(after)
    if gradients:
        for weight in model.parameters():
            if weight.requires_grad:
                weight.register_post_accumulate_grad_hook(alive.add_gradient)


class _Alive(TorchDispatchMode):
    """Counts the bytes of the tensors that operations make while it is on, as long as they live."""

    def __init__(self, in_place: bool = True) -> None:
        super().__init__()
        self.in_place = in_place
        self.bytes = self.peak = self.gradients = 0
        self.highest = Held(0, 0)  # of the section under way
        self.sections: dict[str, Held] = {}
        self.seen: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        self._look()
        given = {id(each.untyped_storage()) for each in tree_iter((args, kwargs)) if isinstance(each, Tensor)}
        found = func(*args, **(kwargs or {}))
        for each in tree_iter(found):
            if isinstance(each, Tensor) and id(storage := each.untyped_storage()) not in given:
                self._add(storage)
        # The backward pass adds gradients up in place, but for tensors without values: then what was added to is gone
        # by the next operation.
        if not (self.in_place and func is torch.ops.aten.add.Tensor and not torch.is_grad_enabled()):
            self._look()
        return found

    def _add(self, storage: Any) -> None:
        if storage in self.seen:
            return
        self.seen.add(storage)
        size = storage.nbytes()
        self.bytes += size
        weakref.finalize(storage, self._free, size)

    def _look(self) -> None:
        self.peak = max(self.peak, self.bytes)
        if self.bytes > self.highest.total:
            self.highest = Held(self.bytes - self.gradients, self.gradients)

    def _free(self, size: int) -> None:
        self.bytes -= size

    def add_gradient(self, weight: Tensor) -> None:
        """A gradient that has been made is no activation any more."""
        assert weight.grad is not None
        self.gradients += weight.grad.untyped_storage().nbytes()

    def section(self, name: str) -> None:
        """The section under way ends here, and has this name."""
        if name not in self.sections:
            self.sections[name] = self.highest
        else:
            self.sections[name] = max(self.sections[name], self.highest, key=lambda held: held.total)
        self.highest = Held(0, 0)
        self._look()


def _fake_model(model: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """The model with tensors of `mode` in place of its own; ties are kept."""
    twins: dict[int, Any] = {}
    with mode:
        for tensor in [*model.parameters(), *model.buffers()]:
            twin: Tensor = torch.empty(tensor.shape, dtype=tensor.dtype)
            if isinstance(tensor, nn.Parameter):
                twin = nn.Parameter(twin, requires_grad=tensor.requires_grad)
            twins[id(tensor)] = twin
        return copy.deepcopy(model, twins)


def _fake(value: Any, mode: FakeTensorMode) -> Any:
    if isinstance(value, Tensor):
        return mode.from_tensor(value)
    if isinstance(value, dict):
        return {key: _fake(each, mode) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_fake(each, mode) for each in value)
    return value
