"""Which weights the output of a model depends on, by the graph that autograd keeps of a forward pass."""

from typing import Any

import torch
from torch import nn

from trl.models.unwrap import evaluating


def all_take_part(model: nn.Module) -> bool:
    """Whether every weight that trains takes part in every forward pass, so that each step gives it a gradient.

    Found out on a few tokens. False also where it depends on the tokens or on chance: experts, skipped layers.
    """
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "to_dict"):
        return False  # not a model of transformers
    settings = {**config.to_dict(), **config.get_text_config().to_dict()}
    if any("expert" in name or ("layerdrop" in name and value) for name, value in settings.items()):
        return False
    wanted = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    device = next(model.parameters()).device
    with evaluating(model), torch.enable_grad():
        output = getattr(model(input_ids=torch.arange(4, device=device)[None], use_cache=False), "logits", None)
    return output is not None and wanted <= _weights_of(output)


def _weights_of(output: torch.Tensor) -> set[int]:
    """The ids of the parameters that a tensor was computed from, as far as they need gradients."""
    found, seen, rest = set(), set(), [output.grad_fn]
    while rest:
        node = rest.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):  # where the gradient of a parameter arrives
            found.add(id(node.variable))
        rest += [each for each, _ in node.next_functions]
    return found
