"""Language models with a value head, as loops of one's own hold them: logits, loss and values of one forward pass."""

import tempfile
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import AutoModelForSeq2SeqLM

from trl.models import adapters, load
from trl.models.unwrap import unwrap
from trl.models.value_head import (
    HEAD_FILE,
    VALUE_HEAD,
    ValueHead,
    add_head,
    head_weights,
    load_head,
    save_head,
    saved_head,
    value_head,
)
from trl.notices import notify_once

HEAD_OPTIONS = ("summary_dropout_prob", "v_head_initializer_range", "v_head_init_strategy")


class AutoModelForCausalLMWithValueHead(nn.Module):
    """A causal language model with a value head on its last hidden states.

    `pretrained_model` is the model (a `PeftModel` if it has an adapter), `v_head` the head, which is a part of it. What
    this class does not have is the model's: `config`, `device`, `generation_config` and so on.

    `options` are those of `models.value_head.ValueHead`. A model that has a head keeps it.
    """

    hidden_states = "hidden_states"

    def __init__(self, pretrained_model: nn.Module, **options: Any) -> None:
        super().__init__()
        unknown = [name for name in options if name not in HEAD_OPTIONS]
        if unknown:
            raise TypeError(f"{type(self).__name__} has no argument {', '.join(unknown)}: {', '.join(HEAD_OPTIONS)}")
        self.pretrained_model: Any = pretrained_model
        if value_head(unwrap(pretrained_model)) is None:
            add_head(pretrained_model, **options)

    @classmethod
    def from_pretrained(cls, source: Any, *, peft_config: Any = None, **kwargs: Any) -> Any:
        """A model by name, path or instance, with its value head: the one saved with it, else a new one.

        An adapter's folder is opened with its base, and trains. `peft_config` puts a new adapter on. The options of
        the head are those of the constructor; all others go to `from_pretrained` of the model.
        """
        options = {name: kwargs.pop(name) for name in HEAD_OPTIONS if name in kwargs}
        if kwargs.pop("reward_adapter", None) is not None:
            raise ValueError("reward_adapter: score completions with a reward model, or a pipeline, of its own")
        kwargs.pop("is_trainable", None)  # an adapter that is opened here trains
        model = source
        if isinstance(source, str | Path):
            model = cls._loaded(str(source), **kwargs)
        elif kwargs:
            raise ValueError(f"{', '.join(kwargs)} are for a model given by name or path; this one is already loaded")
        if peft_config is not None:
            model = adapters.wrap(model, peft_config)
        made = cls(model, **options)
        weights = saved_head(source) if isinstance(source, str | Path) else None
        if weights is not None:
            load_head(made.v_head, weights, str(source))
            notify_once(f"{source} has a value head, which is taken up")
        return made

    @staticmethod
    def _loaded(name: str, **kwargs: Any) -> Any:
        return load.load_causal_lm(name, **kwargs)

    @property
    def v_head(self) -> ValueHead:
        return value_head(unwrap(self.pretrained_model))

    def __setattr__(self, name: str, value: Any) -> None:
        if name == VALUE_HEAD:
            add_head(self.pretrained_model, value)  # torch would keep it here, beside the one that is used
        else:
            super().__setattr__(name, value)

    @property
    def is_peft_model(self) -> bool:
        return hasattr(self.pretrained_model, "get_base_model")

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # A property that raises AttributeError ends up here too.
            if name in ("pretrained_model", VALUE_HEAD):
                raise
            return getattr(super().__getattr__("pretrained_model"), name)

    def forward(
        self,
        input_ids: Tensor | None = None,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        return_past_key_values: bool = False,
        **kwargs: Any,
    ) -> tuple[Any, ...]:
        """Logits [B, T, V] in fp32, the loss (None without `labels`) and the value of each position [B, T]; and the
        cache, if it is asked for."""
        kwargs["output_hidden_states"] = True
        found = self.pretrained_model(
            input_ids=input_ids, attention_mask=attention_mask, past_key_values=past_key_values, **kwargs
        )
        values = self.v_head(getattr(found, self.hidden_states)[-1])[..., 0]
        answer = found.logits.float(), found.loss, values
        return (*answer, found.past_key_values) if return_past_key_values else answer

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """`generate` of the model."""
        return self.pretrained_model.generate(*args, **kwargs)

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """The model (or its adapter) as transformers and PEFT save it, and the head in a file beside it."""
        self.pretrained_model.save_pretrained(save_directory, **kwargs)
        save_head(head_weights(self.v_head), save_directory)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> Any:
        """The model (or its adapter) and the head, to the Hub."""
        from huggingface_hub import upload_file

        answer = self.pretrained_model.push_to_hub(repo_id, **kwargs)
        with tempfile.TemporaryDirectory() as folder:
            save_head(head_weights(self.v_head), folder)
            named = {name: kwargs[name] for name in ("token", "revision", "commit_message") if name in kwargs}
            upload_file(path_or_fileobj=str(Path(folder, HEAD_FILE)), path_in_repo=HEAD_FILE, repo_id=repo_id, **named)
        return answer


class AutoModelForSeq2SeqLMWithValueHead(AutoModelForCausalLMWithValueHead):
    """The same for an encoder-decoder: values of the decoder's positions. No trainer here takes one."""

    hidden_states = "decoder_hidden_states"
    is_encoder_decoder = True

    @staticmethod
    def _loaded(name: str, **kwargs: Any) -> Any:
        return load.load_of(AutoModelForSeq2SeqLM, name, **kwargs)
