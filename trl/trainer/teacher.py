"""A frozen teacher to learn from: how it is opened and checked, and what it predicts."""

from typing import Any

from torch import nn

from trl.engine.forest import Batch
from trl.engine.measures import Comparison
from trl.engine.reference import frozen
from trl.engine.teacher import predictions
from trl.models import liger, load, shards
from trl.models.unwrap import unwrap
from trl.notices import notify_once
from trl.trainer.base import BaseTrainer
from trl.trainer.method import Component

# The share of token ids that may stand for other tokens: tokenizers of one family rename some reserved ones.
RENAMED = 0.01


class Teacher(Component):
    """The model whose distributions a student learns: `given` as a model, a name or a path, else named by `args`.

    It stays whole on every process, in evaluation mode, and is no part of what is saved. Raises ValueError if there is
    none, or if it is the student itself.
    """

    def __init__(self, given: Any, args: Any, student: Any) -> None:
        named = getattr(args, "teacher_model_name_or_path", None)
        given = named if given is None else given
        if given is None:
            raise ValueError(
                "teacher_model is missing: pass a model, a name or a path, or set teacher_model_name_or_path"
            )
        if not isinstance(given, str):
            if unwrap(given) is unwrap(student):
                raise ValueError(
                    "teacher_model is the very model that trains, so that it would move too: pass a copy, or its name"
                )
            for option in ("teacher_model_init_kwargs", "teacher_model_revision"):
                if getattr(args, option, None):
                    raise ValueError(f"{option} is for a teacher given by name or path; this one is already loaded")
        elif named is not None and given != named:
            notify_once(f"teacher_model={given!r} is the teacher, and not teacher_model_name_or_path={named!r}")
        self.given, self.model = given, given

    @property
    def name(self) -> str:
        if isinstance(self.given, str):
            return self.given
        base = unwrap(self.given)
        return getattr(getattr(base, "config", None), "_name_or_path", "") or type(base).__name__

    def comparison(self, batch: Batch, *, temperature: float = 1.0, **options: Any) -> Comparison:
        """The teacher's predictions of a batch, for `engine.score.score`; `options` are those of the divergence."""
        return Comparison(predictions(self.model, batch, temperature=temperature), **options)

    # --- as a part of the trainer ---------------------------------------------------------------------------------

    def on_ready(self, trainer: BaseTrainer) -> None:
        args, model = trainer.args, self.given
        if isinstance(model, str):
            with shards.loaded_whole():  # ranks call it without waiting for each other
                model = load.load_causal_lm(model, **self._loading(args))
        elif shards.is_partitioned(model):
            raise ValueError(
                f"the teacher {self.name} was loaded under ZeRO-3, which partitioned its weights: give its name or "
                "path (it is then loaded whole), or load it before the config is made"
            )
        self._check_vocabulary(trainer, model)
        if args.world_size > 1:
            load.replace_device_map(model, args.device)
        if not getattr(unwrap(model), "is_quantized", False) and not getattr(model, "hf_device_map", None):
            model = model.to(args.device)
        liger.patch(model, args)
        self.model = frozen(model, trainer.compute_loss_context_manager)
        trainer.attachment.serve_too(unwrap(model)._trl_attachment, "the teacher")

    @staticmethod
    def _loading(args: Any) -> dict[str, Any]:
        found = dict(args.teacher_model_init_kwargs or {})
        if args.teacher_model_revision is not None:
            found.setdefault("revision", args.teacher_model_revision)
        if args.trust_remote_code:
            found.setdefault("trust_remote_code", True)
        return found

    def _check_vocabulary(self, trainer: BaseTrainer, model: nn.Module) -> None:
        """Raise ValueError if the distributions of teacher and student are not over the same tokens."""
        ours, theirs = (unwrap(each).config.get_text_config().vocab_size for each in (trainer.model, model))
        if ours != theirs:
            raise ValueError(
                f"the teacher {self.name} predicts {theirs:,} tokens and the student {ours:,}: their distributions can "
                "be compared only over one vocabulary. Give a teacher with the student's, or bring both to one size "
                "with resize_token_embeddings"
            )
        if not isinstance(self.given, str):
            return
        try:
            tokenizer = load.load_tokenizer(self.given)
        except ValueError:
            return  # a teacher without a tokenizer of its own
        names = trainer.processing_class.get_vocab()
        own = {index: token for token, index in tokenizer.get_vocab().items()}
        others = [token for token, index in names.items() if own.get(index, token) != token]
        if len(others) > RENAMED * len(names):
            first = min(others, key=lambda token: names[token])
            raise ValueError(
                f"the teacher {self.name} has another tokenizer: token {names[first]} is {own[names[first]]!r} there "
                f"and {first!r} here, and {len(others):,} of {len(names):,} tokens differ. Give a teacher with the "
                "student's tokenizer"
            )
        if others:
            notify_once(f"{len(others)} of {len(names):,} tokens have other names in the teacher's tokenizer")

    def report(self, trainer: BaseTrainer) -> list[str]:
        weights = [*self.model.parameters()]
        count = sum(each.numel() for each in weights)
        size = sum(each.numel() * each.element_size() for each in weights) / 2**20
        dtypes = sorted({str(each.dtype).removeprefix("torch.") for each in weights})
        return [f"teacher: {self.name}, {count:,} parameters in {', '.join(dtypes)} ({size:,.1f} MiB), frozen"]
