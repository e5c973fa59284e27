"""One side of `benchmarks/sft.py`: trains with whichever `trl` its interpreter has, a round at a time, when told to.

It is started by the driver and not by hand: `python sft_worker.py SETTINGS.json`. Requests come as lines on the
standard input, answers leave as JSON lines on the standard output; what libraries print goes to the standard error.

    (start)   -> ready     the model is loaded, the data tokenised, the trainer built
    labels    -> labels    the tokens and labels to train on: written to a file, or compared with one and taken from it
    round     -> round     so many optimizer steps: wall time, processor time, positions computed
    finish    -> finish    losses, peak memory, maybe a profile

With `shapes` in its settings it trains nothing, and measures matrix products, see `products`.

Only torch, transformers and `trl` are imported, so that the same file serves both environments.
"""

import json
import os
import resource
import sys
import threading
import time
from pathlib import Path

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, TrainerCallback

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
    def __init__(self, settings: dict, answers) -> None:
        self.settings, self.answers = settings, answers
        self.device = settings["device"]
        if settings["threads"]:
            torch.set_num_threads(settings["threads"])
        self.positions = 0
        self.started = self.cpu_started = 0.0
        self.profiler = self.profile_table = None
        self.memory = Memory(self.device)
        self.model = self._model()
        self.trainer = self._trainer()
        # Weights come lazily from the file: what reads them first must not count as training.
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.to(self.device).sum().item()
        self.model.get_input_embeddings().register_forward_pre_hook(self._count)

    # --- what is trained ----------------------------------------------------------------------------------------

    def _model(self):
        settings, folder = self.settings, Path(self.settings["model"])
        config = AutoConfig.from_pretrained(folder)
        if settings["layers"]:
            config.num_hidden_layers = settings["layers"]
            if getattr(config, "layer_types", None):
                config.layer_types = config.layer_types[: settings["layers"]]
        torch.manual_seed(settings["seed"])
        if any(folder.glob("*.safetensors")):
            model = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32)
        else:  # a configuration and a tokenizer alone: weights of that shape, at random
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        self.layers = [(name, tuple(module.weight.shape)) for name, module in model.named_modules()
                       if isinstance(module, torch.nn.Linear)]  # fmt: skip
        if settings["lora"]:
            import peft

            torch.manual_seed(settings["seed"])
            model = peft.get_peft_model(model, peft.LoraConfig(
                r=settings["lora_r"], lora_alpha=2 * settings["lora_r"], lora_dropout=0.0, bias="none",
                target_modules="all-linear", task_type="CAUSAL_LM"))  # fmt: skip
        return model

    def _trainer(self):
        settings = self.settings
        tokenizer = AutoTokenizer.from_pretrained(settings["model"])
        rows = [json.loads(line) for line in Path(settings["rows_file"]).read_text(encoding="utf-8").splitlines()]
        if settings["train_on"] == "completion":
            rows = [{"prompt": row["messages"][:-1], "completion": row["messages"][-1:]} for row in rows]
        from datasets import Dataset, disable_caching, disable_progress_bars

        disable_caching()
        disable_progress_bars()
        args = trl.SFTConfig(
            output_dir=settings["output_dir"],
            max_length=settings["max_length"],
            packing=settings["packing"],
            per_device_train_batch_size=settings["batch_size"],
            gradient_accumulation_steps=settings["accumulation"],
            max_steps=settings["total_steps"],
            learning_rate=settings["learning_rate"],
            lr_scheduler_type="constant",
            warmup_steps=0,
            weight_decay=0.0,
            max_grad_norm=1.0,
            optim=settings["optim"],
            seed=settings["seed"],
            train_sampling_strategy="sequential",
            completion_only_loss=settings["train_on"] == "completion",
            gradient_checkpointing=settings["checkpointing"],
            bf16=settings["precision"] == "bf16",
            use_cpu=self.device == "cpu",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=self.device == "cuda",
        )
        began = time.perf_counter()
        trainer = trl.SFTTrainer(
            self.model, args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
            callbacks=[Rounds(self)])  # fmt: skip
        self.built_in = time.perf_counter() - began
        return trainer

    def data(self) -> tuple[list[list[int]], list[list[bool]]]:
        """What the rows became: token ids, and which tokens are trained."""
        ids, masks = [], []
        for row in self.trainer.train_dataset:
            mask = [label != -100 for label in row["labels"]] if "labels" in row else list(map(bool, row["loss_mask"]))
            mask[:1] = [False]  # nothing predicts the first token
            ids.append(list(row["input_ids"]))
            masks.append(mask)
        return ids, masks

    def labels(self, what: str, file: Path) -> None:
        """Write this side's tokens and labels, or take the other's labels where they differ, and say where."""
        ids, masks = self.data()
        if what == "write":
            file.write_text(json.dumps([ids, masks]), encoding="utf-8")
            self.say("labels", tokens=[len(row) for row in ids], trained=[sum(mask) for mask in masks])
            return
        other_ids, other_masks = json.loads(file.read_text(encoding="utf-8"))
        rows = sum(left != right for left, right in zip(ids, other_ids, strict=True))
        differ = sum(a != b for pair in zip(masks, other_masks, strict=True) for a, b in zip(*pair, strict=False))
        if differ and not rows:
            from datasets import Dataset

            labels = [[token if kept else -100 for token, kept in zip(*pair, strict=True)]
                      for pair in zip(ids, other_masks, strict=True)]  # fmt: skip
            self.trainer.train_dataset = Dataset.from_dict({"input_ids": ids, "labels": labels})
        self.say("labels", rows=rows, differ=differ)

    def _count(self, module, inputs) -> None:
        self.positions += inputs[0].numel()

    # --- the conversation with the driver -------------------------------------------------------------------------

    def say(self, kind: str, **what) -> None:
        self.answers.write(json.dumps({"kind": kind, **what}) + "\n")
        self.answers.flush()

    def wait(self) -> None:
        """Serve requests until one asks for training to go on."""
        while True:
            line = sys.stdin.readline()
            request = line.split()
            if not request:  # the driver is gone
                os._exit(1)
            if request[0] == "labels":
                self.labels(request[1], Path(request[2]))
                return
            elif request[0] == "round":
                self.positions = 0
                self.started, self.cpu_started = time.perf_counter(), time.process_time()
                return
            elif request[0] == "finish":
                return
            else:
                raise ValueError(f"unknown request {line!r}")

    def round_ends(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()
        seconds, cpu = time.perf_counter() - self.started, time.process_time() - self.cpu_started
        self.say("round", seconds=seconds, cpu_seconds=cpu, positions=self.positions)

    def run(self) -> None:
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        embedding = self.model.get_input_embeddings().weight
        head = self.model.get_output_embeddings().weight
        config = self.model.config
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
            attention=config._attn_implementation,
            built_in=self.built_in,
            trained_parameters=trained,
            adapter_parameters=trained if self.settings["lora"] else 0,
            layer_shapes=[shape for name, shape in self.layers if ".0." in name],
            linear_shapes=[shape for name, shape in self.layers if "lm_head" not in name],
            head_shape=tuple(head.shape),
            head_trains=head.requires_grad,
            embedding_parameters=embedding.numel(),
            attention_width=config.num_attention_heads
            * (getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads),
            attention_layers=config.num_hidden_layers,
        )
        self.wait()  # for labels
        self.memory.mark()
        self.trainer.train()
        losses = [entry["loss"] for entry in self.trainer.state.log_history if "loss" in entry]
        self.say("finish", losses=losses, growth=self.memory.growth(), how=self.memory.how, profile=self.profile_table)

    # --- beside training ---------------------------------------------------------------------------------------------

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


def products(settings: dict, answers) -> None:
    """Answer each line with the rate, in FLOP/s, of the matrix products of a step: output and both gradients.

    `shapes` lists (rows of the batch, rows and columns of the weight). A process of its own, so that its memory is not
    taken for a side's.
    """
    dtype = torch.bfloat16 if settings["precision"] == "bf16" else torch.float32
    device = settings["device"]
    if settings["threads"]:
        torch.set_num_threads(settings["threads"])

    def made(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=dtype, device=device)

    # Results go where there is memory already: what allocation costs is not the processor's rate.
    tensors = [(made(count, columns), made(rows, columns), made(count, rows), made(count, rows), made(count, columns),
                made(rows, columns)) for count, rows, columns in settings["shapes"]]  # fmt: skip
    work = sum(6.0 * count * rows * columns for count, rows, columns in settings["shapes"])

    def once() -> float:
        began = time.perf_counter()
        for inputs, weight, slope, output, input_slope, weight_slope in tensors:
            torch.mm(inputs, weight.T, out=output)
            torch.mm(slope, weight, out=input_slope)
            torch.mm(slope.T, inputs, out=weight_slope)
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    for _ in sys.stdin:
        once()
        seconds: list[float] = []
        while sum(seconds) < 0.5:
            seconds.append(once())
        answers.write(json.dumps({"kind": "products", "rate": work * len(seconds) / sum(seconds)}) + "\n")
        answers.flush()


def main() -> None:
    # The answers keep the standard output to themselves.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    settings = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    if "shapes" in settings:
        products(settings, answers)
    else:
        Worker(settings, answers).run()


if __name__ == "__main__":
    main()
