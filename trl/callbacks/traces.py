"""Answers of a model as an evaluation in Weights & Biases Weave."""

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any

from transformers import TrainerCallback

from .answers import answers_of, as_text, prompts_of
from .merging import name_of


class WeaveCallback(TrainerCallback):
    """Logs to Weave, at each evaluation, what the model answers to the prompts of the evaluation set.

    `scorers` are functions of a prompt and its answer, by their names: their scores are logged with each answer, and
    their means as `avg_<name>`. `project_name` is read where no Weave client is there yet; default: the project of the
    wandb run under way. `dataset_name` and `model_name` are names for Weave alone. The other arguments are those of
    `LogCompletionsCallback`. ImportError without the package weave; ValueError if no project is known.
    """

    def __init__(
        self,
        trainer: Any,
        project_name: str | None = None,
        scorers: Mapping[str, Callable[[str, str], Any]] | None = None,
        generation_config: Any = None,
        num_prompts: int | None = None,
        dataset_name: str = "eval_dataset",
        model_name: str | None = None,
    ) -> None:
        if find_spec("weave") is None:
            raise ImportError("WeaveCallback needs the package weave, which is not installed: pip install weave")
        self.trainer, self.project_name, self.scorers = trainer, project_name, dict(scorers or {})
        self.generation_config, self.dataset_name, self.model_name = generation_config, dataset_name, model_name
        self.prompts = prompts_of(trainer, num_prompts)
        self._latest = -1

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._connect(state)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self._latest:
            return
        self._latest = state.global_step
        found = answers_of(self.trainer, self.prompts, self.generation_config)
        if not state.is_world_process_zero:
            return
        self._connect(state)
        from weave import EvaluationLogger

        name = self.model_name or name_of(self.trainer.model) or "model"
        how = self.generation_config.to_dict() if self.generation_config is not None else None
        about = {"training_step": state.global_step, "model_name": name, "generation_config": how}
        log = EvaluationLogger(model=name, dataset=self.dataset_name, eval_attributes=about)
        scores: dict[str, list[Any]] = {scorer: [] for scorer in self.scorers}
        for prompt, answer in zip(map(as_text, self.prompts), found, strict=True):
            line = log.log_prediction(inputs={"prompt": prompt}, output=answer)
            for scorer, function in self.scorers.items():
                scores[scorer].append(function(prompt, answer))
                line.log_score(scorer=scorer, score=scores[scorer][-1])
            line.finish()
        means = {f"avg_{scorer}": sum(each) / len(each) for scorer, each in scores.items() if each}
        log.log_summary({"total_predictions": len(found), **means})

    def _connect(self, state: Any) -> None:
        import weave

        if not state.is_world_process_zero or weave.get_client() is not None:
            return
        project = self.project_name
        if project is None and find_spec("wandb") is not None:
            import wandb

            project = f"{wandb.run.entity}/{wandb.run.project}" if wandb.run is not None else None
        if project is None:
            raise ValueError("WeaveCallback knows no project: pass project_name, or call weave.init before training")
        weave.init(project)
