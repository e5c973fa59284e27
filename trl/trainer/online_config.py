"""The config of the methods that learn from the model's own completions."""

from dataclasses import dataclass

from trl.config import BaseConfig, ReferenceFields, RolloutFields, RouterFields, SequenceFields


@dataclass
class OnlineConfig(RolloutFields, ReferenceFields, RouterFields, SequenceFields, BaseConfig):
    """What all methods share that learn from the model's own completions."""

    least_generations = 1  # completions of each prompt that the method needs

    _VALID_DICT_FIELDS = [
        *BaseConfig._VALID_DICT_FIELDS,
        *("generation_kwargs", "chat_template_kwargs", "transformers_continuous_batching_config"),
    ]

    def __post_init__(self) -> None:
        if self.num_generations < self.least_generations:
            raise ValueError(
                f"num_generations={self.num_generations}: completions are compared with others of their prompt; "
                f"give {self.least_generations} or more"
            )
        if self.generation_batch_size is not None and self.steps_per_generation is not None:
            raise ValueError("generation_batch_size and steps_per_generation say the same thing: give one of them")
        if self.dynamic_sampling and self.max_refills < 1:
            raise ValueError(f"max_refills={self.max_refills} leaves nothing of dynamic_sampling: give 1 or more")
        if self.replay_buffer_size < 0:
            raise ValueError(f"replay_buffer_size={self.replay_buffer_size}: give a number of groups, 0 for none")
        super().__post_init__()
