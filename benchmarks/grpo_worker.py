"""One side of `benchmarks/grpo.py`: trains with whichever `trl` its interpreter has, as `common_worker.py` says.

Both sides are given messages, and tokenise them themselves. Where completions are drawn is wrapped: tokens and time are
counted there, and the completions that the driver made take the place of what was drawn in the first steps.
"""

import json
import time
from pathlib import Path

import torch
from common_worker import Rounds, converse
from preference_worker import OURS, Preference, draw_adapter
from transformers import AutoModelForCausalLM, AutoTokenizer

import trl

# Of a round: seconds of drawing and judging, completions and their tokens, those cut at the greatest length.
COUNTED = ("drawing", "tokens", "completions", "cut")


class GRPO(Preference):
    def build(self):
        settings = self.settings
        self.counted = dict.fromkeys(COUNTED, 0)
        self.given = Given(settings)
        self.tokenizer = AutoTokenizer.from_pretrained(settings["model"])
        model = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=torch.float32)
        arguments = {name: value for name, value in self.arguments().items() if name != "max_length"}
        config = trl.GRPOConfig(
            **arguments,
            num_generations=settings["generations"],
            max_completion_length=settings["max_completion_length"],
            temperature=1.0,
            beta=0.0,
            shuffle_dataset=False,
        )
        began = time.perf_counter()
        trainer = trl.GRPOTrainer(
            model=model,
            reward_funcs=ended if settings["binary_reward"] else Spread(settings["generations"]),
            args=config,
            train_dataset=self._rows(),
            processing_class=self.tokenizer,
            peft_config=self._adapter(),
            callbacks=[Rounds(self)],
        )
        self.built_in = time.perf_counter() - began
        if OURS:
            trainer.sampler = Sampler(trainer.sampler, self)
            trainer.collect = self._timed(trainer.collect)
        else:
            trainer._generate_single_turn = self._drawing(trainer._generate_single_turn)
            trainer._generate_and_score_completions = self._timed(trainer._generate_and_score_completions)
        if settings["lora"]:
            draw_adapter(trainer.model, settings["seed"])
        return trainer.model, trainer

    def _rows(self):
        from datasets import Dataset, disable_caching, disable_progress_bars

        disable_caching()
        disable_progress_bars()
        return Dataset.from_list(json.loads(Path(self.settings["rows_file"]).read_text(encoding="utf-8")))

    def _timed(self, function):
        """The function that draws and judges, its time counted."""

        def timed(*args, **kwargs):
            began = time.perf_counter()
            result = function(*args, **kwargs)
            if self.device == "cuda":
                torch.cuda.synchronize()
            self.counted["drawing"] += time.perf_counter() - began
            return result

        return timed

    def _drawing(self, function):
        """TRL's function from prompts to completions: a prompt stands there as many times as it has completions."""

        def drawing(prompts, images, fields, generations, *args, **kwargs):
            def draw():
                return function(prompts, images, fields, generations, *args, **kwargs)[0]

            def take():
                return [ids for prompt in prompts[::generations] for ids in self.given.of(prompt, generations)]

            return self.drawn(draw, take), None

        return drawing

    def drawn(self, draw, take):
        """The completions of one step, counted: drawn, or such as the driver has made."""
        found = draw() if self.given.draws() else None
        if self.given.next():
            found = take()
        counted = self.counted
        counted["tokens"] += sum(map(len, found))
        counted["completions"] += len(found)
        counted["cut"] += sum(ids[-1] != self.tokenizer.eos_token_id for ids in found)
        return found

    def of_round(self) -> dict:
        counted, self.counted = self.counted, dict.fromkeys(COUNTED, 0)
        return counted

    def at_end(self) -> dict:
        history = [entry for entry in self.trainer.state.log_history if "loss" in entry]
        return {
            "gradients": [entry["grad_norm"] for entry in history],
            "without_spread": [entry["frac_reward_zero_std"] for entry in history],
        }

    def about(self) -> dict:
        return {}


class Given:
    """Completions that the driver has made, for so many steps."""

    def __init__(self, settings: dict) -> None:
        pairs = json.loads(Path(settings["given_file"]).read_text(encoding="utf-8"))
        self.completions = {tuple(prompt): completions for prompt, completions in pairs}
        self.steps, self.always = settings["given_steps"], settings["injected"]
        self.taken = 0

    def draws(self) -> bool:
        """Whether this step draws, be it for the warm-up alone."""
        return not self.always

    def next(self) -> bool:
        """Whether the next step takes its completions from here."""
        self.taken += 1
        return self.taken <= self.steps

    def of(self, prompt, count: int) -> list:
        found = self.completions.get(tuple(prompt))
        if found is None:
            raise SystemExit("a prompt has other tokens than those that the driver has found")
        return found[:count]


class Sampler:
    """This library's sampler, its completions counted."""

    def __init__(self, sampler, worker: GRPO) -> None:
        self.sampler, self.worker = sampler, worker

    def sync(self, model, version):
        self.sampler.sync(model, version)

    def generate(self, requests, sampling):
        groups = []

        def draw():
            groups.extend(self.sampler.generate(requests, sampling))
            return [each.ids for group in groups for each in group]

        def take():
            from trl.rollout.types import Completion

            groups[:] = [
                [Completion(ids, [0.0] * len(ids), ids[-1] in sampling.stop_ids) for ids in of_prompt]
                for of_prompt in (self.worker.given.of(each.prompt_ids, each.samples) for each in requests)
            ]
            return [each.ids for group in groups for each in group]

        self.worker.drawn(draw, take)
        return groups


class Spread:
    """How many different characters a completion has; and a little for its place in the group, so that no group is
    without spread, whatever was drawn."""

    __name__ = "spread"

    def __init__(self, generations: int) -> None:
        self.generations = generations

    def __call__(self, completions, **columns) -> list[float]:
        return [
            len(set(completion[0]["content"])) / 30 + 0.01 * (place % self.generations)
            for place, completion in enumerate(completions)
        ]


def ended(completions, **columns) -> list[float]:
    """1 for a completion that ends with a full stop: groups of few tokens, or of many, have no spread."""
    return [float(completion[0]["content"].rstrip().endswith(".")) for completion in completions]


def start(settings: dict, answers) -> None:
    GRPO(settings, answers).run()


if __name__ == "__main__":
    converse(start)
