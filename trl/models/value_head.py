"""Value functions: a head on a language model's hidden states, or a critic, a model of its own.

Both are parts of the policy's module, so that one optimizer, one wrapper and one forward pass serve the policy and its
values. Neither is saved among the policy's weights: the head is written to a file beside them, a critic to a folder.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from trl.models.shards import whole_weights
from trl.models.unwrap import SCALAR_HEAD, unwrap

VALUE_HEAD = "v_head"
CRITIC = "critic"
HEAD_FILE = "value_head.safetensors"
CRITIC_FOLDER = "value_model"
_PREFIX = f"{VALUE_HEAD}."
STRATEGIES = (None, "zero", "normal")


class ValueHead(nn.Module):
    """A linear layer from hidden states to values, [..., H] -> [..., 1], with dropout before it.

    strategy             the weights: None, drawn as torch draws a linear layer's; "normal", of standard deviation
                         `initializer_range`; "zero", so that every value is 0 at first
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        summary_dropout_prob: float | None = 0.1,
        v_head_initializer_range: float = 0.2,
        v_head_init_strategy: str | None = None,
    ) -> None:
        super().__init__()
        if v_head_init_strategy not in STRATEGIES:
            raise ValueError(f"v_head_init_strategy={v_head_init_strategy!r} is none of None, 'normal', 'zero'")
        self.dropout = nn.Dropout(summary_dropout_prob or 0.0)
        self.summary = nn.Linear(hidden_size, 1)
        if v_head_init_strategy is not None:
            size = v_head_initializer_range if v_head_init_strategy == "normal" else 0.0
            nn.init.normal_(self.summary.weight, std=size)
            nn.init.zeros_(self.summary.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        weight = self.summary.weight
        # Autocast off: a value is a number of some size, of which bfloat16 keeps three digits.
        with torch.autocast(hidden.device.type, enabled=False):
            return self.summary(self.dropout(hidden.to(weight.device, weight.dtype)))


def value_head(base: Any) -> Any:
    return getattr(base, VALUE_HEAD, None)


def critic(base: Any) -> Any:
    return getattr(base, CRITIC, None)


def add_head(model: nn.Module, head: ValueHead | None = None, **options: Any) -> ValueHead:
    """Put a value head on the model inside `model`: `head`, or a new one by `options`, which are `ValueHead`'s."""
    base = unwrap(model)
    own = base.get_output_embeddings()
    if own is None:
        raise ValueError(f"{type(base).__name__} has no language-model head, so that it is no policy to value")
    hidden_size = getattr(own, "in_features", None) or base.config.get_text_config().hidden_size
    if head is None:
        head = ValueHead(hidden_size, **options).to(_device(own))
    if head.summary.in_features != hidden_size:
        raise ValueError(
            f"the value head is for hidden states of {head.summary.in_features} numbers; those of "
            f"{type(base).__name__} have {hidden_size}"
        )
    base.add_module(VALUE_HEAD, head)
    _leave_out(base, [f"{_PREFIX}{name}" for name in head.state_dict()])
    return head


def add_critic(model: nn.Module, own: nn.Module) -> None:
    """Make a model that scores (`AutoModelForSequenceClassification` with one label) the critic of the policy."""
    base, inside = unwrap(model), unwrap(own)
    head = getattr(inside, SCALAR_HEAD, None)
    labels = getattr(head, "out_features", None)
    if labels != 1:
        what = "no scoring head" if head is None else f"{labels} scores for each token"
        raise ValueError(
            f"value_model is a {type(inside).__name__} with {what}: give a model with one, as "
            "AutoModelForSequenceClassification.from_pretrained(..., num_labels=1) loads it"
        )
    if inside.config.get_text_config().vocab_size < base.config.get_text_config().vocab_size:
        raise ValueError(
            f"value_model knows {inside.config.get_text_config().vocab_size:,} tokens and the policy "
            f"{base.config.get_text_config().vocab_size:,}: both read the same token ids"
        )
    base.add_module(CRITIC, own)
    _leave_out(base, [f"{CRITIC}.{name}" for name in own.state_dict()])


def _device(head: nn.Module) -> torch.device:
    device = next(head.parameters()).device
    return torch.device("cpu") if device.type == "meta" else device


def _leave_out(base: Any, names: list[str]) -> None:
    """`save_pretrained` of the policy leaves these weights out, which no plain language model reads."""
    base._keys_to_ignore_on_save = {*(getattr(base, "_keys_to_ignore_on_save", None) or ()), *names}


# --- files ----------------------------------------------------------------------------------------------------------


def head_weights(head: nn.Module) -> dict[str, Tensor]:
    """The weights of a head, whole on every rank, on the host. Ranks with sharded weights call it together."""
    found = {}
    for name, weight in whole_weights(head):
        together = weight.full_tensor() if hasattr(weight, "full_tensor") else weight
        found[name] = together.detach().cpu().contiguous().clone()
    return found


def save_head(weights: dict[str, Tensor], folder: str | Path) -> None:
    Path(folder).mkdir(parents=True, exist_ok=True)
    save_file({f"{_PREFIX}{name}": weight for name, weight in weights.items()}, str(Path(folder) / HEAD_FILE))


def saved_head(folder: str | Path) -> dict[str, Tensor] | None:
    """The weights of the value head in a folder: of this library's file, or of a checkpoint that has them among the
    model's; None where there are none."""
    folder = Path(folder)
    if not folder.is_dir():
        return None
    if (folder / HEAD_FILE).exists():
        return _without_prefix(load_file(folder / HEAD_FILE))
    found: dict[str, Tensor] = {}
    for path in _files_with_heads(folder):
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as weights:
                found |= {name: weights.get_tensor(name) for name in weights.keys() if name.startswith(_PREFIX)}
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
            found |= {name: weight for name, weight in state.items() if name.startswith(_PREFIX)}
    return _without_prefix(found) or None


def _files_with_heads(folder: Path) -> list[Path]:
    for index in folder.glob("*.index.json"):
        files = json.loads(index.read_text())["weight_map"]
        return sorted({folder / file for name, file in files.items() if name.startswith(_PREFIX)})
    names = ("model.safetensors", "adapter_model.safetensors", "pytorch_model.bin")
    return [folder / name for name in names if (folder / name).exists()]


def _without_prefix(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(_PREFIX): weight for name, weight in weights.items()}


def load_head(head: ValueHead, weights: dict[str, Tensor], source: str) -> None:
    """Copy saved weights into a head. ValueError if they do not fit."""
    own = head.state_dict()
    if {name: weight.shape for name, weight in weights.items()} != {name: each.shape for name, each in own.items()}:
        shapes = ", ".join(f"{name} {list(weight.shape)}" for name, weight in weights.items())
        raise ValueError(f"the value head in {source} ({shapes}) does not fit this model's hidden states")
    head.load_state_dict(weights)
