"""What the workers of the benchmarks share: memory, rounds of training, and the conversation with the driver.

A worker is started by the driver and not by hand: `python x_worker.py SETTINGS.json`. Requests come as lines on the
standard input, answers leave as JSON lines on the standard output; what libraries print goes to the standard error.

    (start)   -> ready     the model is loaded, the data in place, the trainer built
    round     -> round     so many optimizer steps: wall time, processor time, positions computed
    finish    -> finish    losses, peak memory, maybe a profile

Only torch, transformers and `trl` are imported, so that the same file serves both environments.
"""

import json
import os
import resource
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from transformers import TrainerCallback

import trl


class Memory:
    """Memory that training adds: the highest since `mark`, less that at `mark`, in bytes."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"
        self.before = self.highest = 0
        self.how = "allocated on the device"

    def mark(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
            return
        self.before = self.highest = _resident()
        try:
            Path("/proc/self/clear_refs").write_text("5")  # the kernel starts its record of the highest anew
            self.how = "resident, the kernel's record"
            self._watched = _kernel_record() - self.before > 2**28
        except OSError:
            self._watched = True
        if self._watched:
            self.how = "resident, sampled every 5 ms"
            threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            self.highest = max(self.highest, _resident())
            time.sleep(0.005)

    def growth(self) -> int:
        if self.cuda:
            return torch.cuda.max_memory_allocated() - self.before
        return (self.highest if self._watched else _kernel_record()) - self.before


def _resident() -> int:
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:  # no /proc: the highest ever is all there is
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _kernel_record() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError("no VmHWM")


class Rounds(TrainerCallback):
    """Holds the training loop still between rounds, until the driver asks for the next."""

    def __init__(self, worker: "Worker") -> None:
        self.worker = worker

    def on_train_begin(self, args, state, control, **kwargs):
        self.worker.wait()

    def on_step_begin(self, args, state, control, **kwargs):
        settings = self.worker.settings
        if settings["profile"] and state.global_step == settings["total_steps"] - 1:
            self.worker.profile_starts()

    def on_step_end(self, args, state, control, **kwargs):
        worker = self.worker
        worker.profile_ends()
        if (state.global_step % worker.settings["steps"]) == 0 and state.global_step <= worker.settings["round_steps"]:
            worker.round_ends()
            worker.wait()


class Worker:
    """One side. A benchmark says what `build` makes and what else it has to tell."""

    def __init__(self, settings: dict, answers) -> None:
        self.settings, self.answers = settings, answers
        self.device = settings["device"]
        if settings["threads"]:
            torch.set_num_threads(settings["threads"])
        self.positions = 0
        self.started = self.cpu_started = 0.0
        self.profiler = self.profile_table = None
        self.memory = Memory(self.device)
        self.model, self.trainer = self.build()
        models = [self.model, *self.further_models()]
        # Weights come lazily from the file: what reads them first must not count as training.
        with torch.no_grad():
            for model in models:
                for parameter in model.parameters():
                    parameter.to(self.device).sum().item()
        for embedding in {id(each): each for each in (model.get_input_embeddings() for model in models)}.values():
            embedding.register_forward_pre_hook(self._count)

    # --- what a benchmark supplies --------------------------------------------------------------------------------

    def build(self):
        """The model that trains, and its trainer."""
        raise NotImplementedError

    def further_models(self) -> list:
        """Models beside it whose forward passes count."""
        return []

    def about(self) -> dict:
        """What else the driver is told when this side is ready."""
        return {}

    def of_round(self) -> dict:
        """What else the driver is told of a round that has ended."""
        return {}

    def at_end(self) -> dict:
        """What else the driver is told after training."""
        return {}

    def prepare(self) -> None:
        """What is left to do with the driver before training."""

    def serve(self, request: list[str]) -> None:
        """A request that only this benchmark knows, while `prepare` waits for it."""
        raise ValueError(f"unknown request {request}")

    # --- for all of them ------------------------------------------------------------------------------------------

    def arguments(self) -> dict:
        """Training arguments that are the same whatever is trained."""
        settings = self.settings
        return {
            "output_dir": settings["output_dir"],
            "max_length": settings["max_length"],
            "per_device_train_batch_size": settings["batch_size"],
            "gradient_accumulation_steps": settings["accumulation"],
            "max_steps": settings["total_steps"],
            "learning_rate": settings["learning_rate"],
            "lr_scheduler_type": "constant",
            "warmup_steps": 0,
            "weight_decay": 0.0,
            "max_grad_norm": 1.0,
            "optim": settings["optim"],
            "seed": settings["seed"],
            "train_sampling_strategy": "sequential",
            "gradient_checkpointing": settings["checkpointing"],
            "bf16": settings["precision"] == "bf16",
            "use_cpu": self.device == "cpu",
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "dataloader_pin_memory": self.device == "cuda",
        }

    def _count(self, module, inputs) -> None:
        self.positions += inputs[0].numel()

    def say(self, kind: str, **what) -> None:
        self.answers.write(json.dumps({"kind": kind, **what}) + "\n")
        self.answers.flush()

    def wait(self) -> None:
        """Serve requests until one asks for training to go on."""
        line = sys.stdin.readline()
        request = line.split()
        if not request:  # the driver is gone
            os._exit(1)
        if request[0] == "round":
            self.positions = 0
            self.started, self.cpu_started = time.perf_counter(), time.process_time()
        elif request[0] != "finish":
            self.serve(request)

    def round_ends(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()
        seconds, cpu = time.perf_counter() - self.started, time.process_time() - self.cpu_started
        self.say("round", seconds=seconds, cpu_seconds=cpu, positions=self.positions, **self.of_round())

    def run(self) -> None:
        self.say(
            "ready",
            versions={
                "python": sys.version.split()[0],
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "trl": trl.__version__,
            },
            threads=torch.get_num_threads(),
            device=torch.cuda.get_device_name() if self.device == "cuda" else "cpu",
            attention=self.model.config._attn_implementation,
            built_in=self.built_in,
            trained_parameters=sum(p.numel() for p in self.model.parameters() if p.requires_grad),
            **self.about(),
        )
        self.prepare()
        self.memory.mark()
        self.trainer.train()
        losses = [entry["loss"] for entry in self.trainer.state.log_history if "loss" in entry]
        self.say("finish", losses=losses, growth=self.memory.growth(), how=self.memory.how,
                 profile=self.profile_table, **self.at_end())  # fmt: skip

    # --- beside training ------------------------------------------------------------------------------------------

    def profile_starts(self) -> None:
        from torch.profiler import ProfilerActivity, profile

        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if self.device == "cuda" else [])
        self.profiler = profile(activities=activities, record_shapes=True)
        self.profiler.start()

    def profile_ends(self) -> None:
        if self.profiler is None:
            return
        self.profiler.stop()
        order = "self_cuda_time_total" if self.device == "cuda" else "self_cpu_time_total"
        averages, shapes = self.profiler.key_averages(), self.profiler.key_averages(group_by_input_shape=True)
        self.profile_table = (
            averages.table(sort_by=order, row_limit=18, max_name_column_width=48)
            + "\n"
            + shapes.table(sort_by=order, row_limit=24, max_name_column_width=32, max_shapes_column_width=64)
        )
        self.profiler = None


def converse(start: Callable[[dict, object], None]) -> None:
    """Read the settings, keep the standard output for answers, and start."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    start(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), answers)
