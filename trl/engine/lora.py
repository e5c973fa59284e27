"""A linear layer and its low-rank adapter (Hu et al. 2021, arXiv:2106.09685) in one autograd function.

    y = x W' + bias + s dropout(x) A' B'

`T` tokens, `I` and `O` features in and out, `R` the rank: x [T, I], W [O, I], A [R, I], B [O, R], y [T, O].

PEFT computes the terms apart, with three more tensors of y's size in the forward pass and one in the backward pass. It
keeps a copy of x in the dtype of A (float32, also over layers in half precision), another one after dropout, and a copy
of W under autocast. Here the low-rank term is added into the product. Kept are x as it is multiplied, x A' [T, R], and
one byte an entry of dropout. In half precision A and B are rounded for the product, as autocast does; their gradients
have their own dtype.

The base must be frozen and the adapter plain. Everything else keeps PEFT's forward: other variants (DoRA), quantised or
sharded weights, adapters that are merged, off or several, modules with hooks. That is decided at each call.
"""

import sys
import types
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils import checkpoint
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

WEIGHTS = (nn.Parameter, FakeTensor)  # not those of FSDP (views, DTensor), of torchao, of bitsandbytes
INPUTS = (Tensor, *WEIGHTS)
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# An operation in place would change what selective checkpointing holds.
HOLDING = (checkpoint._CachingTorchDispatchMode, checkpoint._CachedTorchDispatchMode)


def attach(model: nn.Module) -> None:
    """Have the model's LoRA layers compute in one function wherever they are plain. Idempotent.

    Each such layer gets a `forward` of its own, which stays after training: what is saved or merged has nothing of it.
    There are no second derivatives with it; `detach` gives PEFT's forward back.
    """
    peft: Any = sys.modules.get("peft.tuners.lora.layer")
    for each in model.modules() if peft is not None else ():
        if type(each) is peft.Linear and "forward" not in vars(each):
            each.forward = types.MethodType(forward, each)


def detach(model: nn.Module) -> None:
    """Give the model's LoRA layers PEFT's forward back."""
    for each in model.modules():
        if getattr(vars(each).get("forward"), "__func__", None) is forward:
            del each.forward


# A method is pickled by its name: a layer that is read from a file has PEFT's own.
def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The `forward` of a LoRA layer: x [..., I] -> [..., O]."""
    found = None if args or kwargs else _plain(self, x)
    if found is None:
        return type(self).forward(self, x, *args, **kwargs)
    return _LowRank.apply(x, *found) if torch.is_grad_enabled() else _product(x, *found)[0]


class _How(NamedTuple):
    scale: float  # s, divided by what dropout keeps on average
    dropout: float
    dtype: torch.dtype  # in which is multiplied


def _plain(layer: Any, x: Tensor) -> Any:
    """What `_LowRank` takes after x, or None where PEFT's own forward is needed."""
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._are_functorch_transforms_active()
    if traced or type(x) not in INPUTS:
        return None
    base = _weights(layer.base_layer)
    if base is None or any(each is not None and each.requires_grad for each in base):
        return None
    if layer._disable_adapters or layer.merged_adapters or layer.lora_variant or not layer.cast_input_dtype_enabled:
        return None
    names = [name for name in layer.active_adapters if name in layer.scaling]
    if len(names) != 1:
        return None
    (name,), parts = names, layer._modules
    down, up = (_weights(parts[kind]._modules.get(name)) for kind in ("lora_A", "lora_B"))
    scale, dropout = layer.scaling[name], _probability(parts["lora_dropout"]._modules.get(name))
    if down is None or up is None or dropout is None or not isinstance(scale, int | float):
        return None
    cast = torch.is_autocast_enabled(x.device.type)
    dtype = torch.get_autocast_dtype(x.device.type) if cast else base[0].dtype
    if down[1] is not None or up[1] is not None or not (cast or x.dtype == dtype):
        return None
    for each in (x, base[0], down[0], up[0]):
        if each.dtype != dtype and each.dtype != torch.float32:
            return None
    return *base, down[0], up[0], _How(scale / (1 - dropout), dropout, dtype)


def _weights(module: Any) -> tuple[Any, Any] | None:
    """Weight and bias of a module that does nothing but multiply by its weight, which is here and whole; else None."""
    own = vars(module)
    if type(module) is not nn.Linear or "forward" in own or any(own[hooks] for hooks in HOOKS):
        return None
    weight = own["_parameters"].get("weight")
    if type(weight) not in WEIGHTS or hasattr(weight, "ds_id"):  # of ZeRO-3
        return None
    return weight, own["_parameters"].get("bias")


def _probability(module: Any) -> float | None:
    """That of dropping an entry; None if the module is no plain dropout."""
    if type(module) is nn.Identity:
        return 0.0
    if type(module) is not nn.Dropout or module.p == 1:
        return None
    return module.p if module.training else 0.0


def _product(
    x: Tensor, weight_OI: Tensor, bias_O: Tensor | None, down_RI: Tensor, up_OR: Tensor, how: _How
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """y [..., O], and what gradients are made of: x [T, I], s dropout(x) A' [T, R] and what dropout keeps [T, I]."""
    dtype, keeps_TI = how.dtype, None
    x_TI = dropped_TI = x.reshape(-1, x.shape[-1]).to(dtype)
    if how.dropout:
        keeps_TI = torch.empty_like(x_TI, dtype=torch.uint8).bernoulli_(1 - how.dropout)
        dropped_TI = x_TI * keeps_TI
    low_TR = torch.mm(dropped_TI, down_RI.to(dtype).t()) * how.scale
    del dropped_TI
    y_TO = F.linear(x_TI, weight_OI.to(dtype), None if bias_O is None else bias_O.to(dtype))
    held = any(isinstance(mode, HOLDING) for mode in _get_current_dispatch_mode_stack())
    y_TO = (torch.addmm if held else Tensor.addmm_)(y_TO, low_TR, up_OR.to(dtype).t())
    return y_TO.view(*x.shape[:-1], y_TO.shape[-1]), x_TI, low_TR, keeps_TI


class _LowRank(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None, down_RI: Tensor, up_OR: Tensor, how: _How
    ) -> Tensor:
        y, x_TI, low_TR, keeps_TI = _product(x, weight_OI, bias_O, down_RI, up_OR, how)
        for_x, for_down, for_up = (ctx.needs_input_grad[place] for place in (0, 3, 4))
        ctx.save_for_backward(
            x_TI if for_down else None,
            keeps_TI if for_down or for_x else None,
            low_TR if for_up else None,
            weight_OI if for_x else None,
            down_RI if for_x else None,
            up_OR if for_x or for_down else None,
        )
        ctx.how, ctx.shape, ctx.dtypes = how, x.shape, (x.dtype, down_RI.dtype, up_OR.dtype)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        x_TI, keeps_TI, low_TR, weight_OI, down_RI, up_OR = ctx.saved_tensors
        dtype, (dtype_of_x, dtype_of_down, dtype_of_up) = ctx.how.dtype, ctx.dtypes
        slope_TO = slope.reshape(-1, slope.shape[-1])
        of_x = of_down = of_up = None
        low_slope_TR: Any = None
        if up_OR is not None:
            low_slope_TR = torch.mm(slope_TO, up_OR.to(dtype)).mul_(ctx.how.scale)
        if keeps_TI is not None:
            keeps_TI = keeps_TI.to(dtype)
        if weight_OI is not None:
            of_x = torch.mm(low_slope_TR, down_RI.to(dtype))
            of_x = of_x if keeps_TI is None else of_x.mul_(keeps_TI)
            of_x = of_x.addmm_(slope_TO, weight_OI.to(dtype)).view(ctx.shape).to(dtype_of_x)
        if x_TI is not None:
            dropped_TI = x_TI if keeps_TI is None else keeps_TI.mul_(x_TI)
            of_down = torch.mm(low_slope_TR.t(), dropped_TI).to(dtype_of_down)
        if low_TR is not None:
            of_up = torch.mm(slope_TO.t(), low_TR).to(dtype_of_up)
        return of_x, None, None, of_down, of_up, None
