"""Merges checkpoints of a run with another model, by the package mergekit."""

import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from trl.models.adapters import has_adapter
from trl.models.unwrap import unwrap

# Settings that a method of merging has, in addition to the paths and the dtype.
_TRIMMED = {
    "policy_model_weight": 1.0,
    "policy_model_density": [1.0, 0.7, 0.1],
    "target_model_weight": 1.0,
    "target_model_density": [1.0],
    "normalize": 1.0,
}
METHODS: dict[str, dict[str, Any]] = {
    "linear": {"policy_model_weight": 0.5, "target_model_weight": 0.5},
    "ties": _TRIMMED,
    "dare_ties": _TRIMMED,
    "slerp": {"t_values": 0.5},
}


class MergeConfig:
    """How a checkpoint, the policy, is merged with another model, the target. The attributes may be changed.

    `method` is one of

    - `linear`: the weighted mean of both (`policy_model_weight`, `target_model_weight`),
    - `ties` and `dare_ties`: the target, and of the policy's distance from it the share `policy_model_density`, the
      largest changes or random ones (Yadav et al. 2023, arXiv:2306.01708; Yu et al. 2023, arXiv:2311.03099). Upstream
      measures from the policy, which gives the target back,
    - `slerp`: the point `t_values` of the arc from the policy to the target.

    A list in the place of a number is spread over the layers. `policy_model_path` is set by `MergeModelCallback`;
    `target_model_path=None` is the model that the run started from. `dtype=None` keeps the weights' own.
    """

    policy_model_weight: float | list[float]
    target_model_weight: float | list[float]
    policy_model_density: float | list[float]
    target_model_density: float | list[float]
    normalize: float
    t_values: float | list[float]

    def __init__(self, method: str = "linear") -> None:
        if method not in METHODS:
            raise ValueError(f"method={method!r} is not one of {', '.join(METHODS)}")
        self.method = method
        self.policy_model_path: str | None = None
        self.target_model_path: str | None = None
        self.dtype: str | None = None
        for name, value in METHODS[method].items():
            setattr(self, name, list(value) if isinstance(value, list) else value)

    def recipe(self) -> dict[str, Any]:
        """What mergekit reads, as a dictionary. ValueError without the paths of both models."""
        policy, target = self.policy_model_path, self.target_model_path
        if policy is None or target is None:
            raise ValueError("policy_model_path and target_model_path must name the two models to merge")
        found: dict[str, Any] = {"merge_method": self.method, "dtype": self.dtype}
        if self.method == "slerp":
            both = [{"model": policy}, {"model": target}]
            return {**found, "base_model": policy, "models": both, "parameters": {"t": self.t_values}}
        each = {
            policy: {"weight": self.policy_model_weight},
            target: {"weight": self.target_model_weight},
        }
        if self.method != "linear":
            each[policy]["density"] = self.policy_model_density
            each[target]["density"] = self.target_model_density
            found |= {"base_model": target, "parameters": {"normalize": self.normalize}}
        return {**found, "models": [{"model": path, "parameters": own} for path, own in each.items()]}

    def create(self) -> Any:
        """The same as mergekit's `MergeConfiguration`."""
        require_mergekit("MergeConfig.create")
        from mergekit.config import MergeConfiguration

        return MergeConfiguration.model_validate(self.recipe())


def require_mergekit(what: str) -> None:
    if find_spec("mergekit") is None:
        raise ImportError(f"{what} needs the package mergekit, which is not installed: pip install mergekit")


def merge_models(config: Any, out_path: str | Path) -> None:
    """Write the model that mergekit's configuration describes, with its tokenizer, into `out_path`."""
    require_mergekit("merge_models")
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    with tempfile.TemporaryDirectory() as cache:  # of adapters that are merged into their bases
        options = MergeOptions(cuda=torch.cuda.is_available(), lora_merge_cache=cache, quiet=True)
        run_merge(config, str(out_path), options=options)


class MergeModelCallback(TrainerCallback):
    """Merges the last checkpoint with another model when the run is over, or each one with
    `merge_at_every_checkpoint`. The folder `merged` of the checkpoint holds the result. An adapter is merged into its
    base first.

    `merge_config=None`: the mean of the checkpoint and of the model that the run started from. `push_to_hub` uploads
    what was merged. ImportError without the package mergekit; ValueError, before step 1, for a run that saves nothing
    or has no model to merge with.
    """

    def __init__(
        self,
        merge_config: MergeConfig | None = None,
        merge_at_every_checkpoint: bool = False,
        push_to_hub: bool = False,
    ) -> None:
        require_mergekit("MergeModelCallback")
        self.merge_config = merge_config or MergeConfig()
        self.merge_at_every_checkpoint, self.push_to_hub = merge_at_every_checkpoint, push_to_hub

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if getattr(args.save_strategy, "value", args.save_strategy) == "no":
            raise ValueError("MergeModelCallback merges checkpoints, and save_strategy='no' keeps none: choose another")
        config = self.merge_config
        config.target_model_path = config.target_model_path or name_of(model)
        if not config.target_model_path:
            raise ValueError("the model has no path of its own to merge with: set target_model_path of MergeConfig")

    def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if self.merge_at_every_checkpoint:
            self._merge(args, state, model)

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if not self.merge_at_every_checkpoint:
            self._merge(args, state, model)

    def _merge(self, args: Any, state: Any, model: Any) -> None:
        if not state.is_world_process_zero:
            return
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        base = f"{name_of(model)}+" if has_adapter(model) else ""  # mergekit's words for a base and its adapter
        self.merge_config.policy_model_path = f"{base}{folder}"
        merge_models(self.merge_config.create(), folder / "merged")
        if self.push_to_hub:
            from huggingface_hub import create_repo, upload_folder

            name = f"{Path(args.output_dir).name}_checkpoint-{state.global_step}_merged"
            upload_folder(repo_id=create_repo(name, exist_ok=True).repo_id, folder_path=folder / "merged")


def name_of(model: Any) -> str:
    """The name or path that the model, or an adapter's base, was loaded by; empty if there is none."""
    return getattr(getattr(unwrap(model), "config", None), "_name_or_path", "") or ""
