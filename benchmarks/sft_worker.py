"""One side of `benchmarks/sft.py`: trains with whichever `trl` its interpreter has, a round at a time, when told to.

Beside what `common_worker.py` says, before the first round:

    labels    -> labels    the tokens and labels to train on: written to a file, or compared with one and taken from it

With `shapes` in its settings it trains nothing, and measures matrix products, see `products`.
"""

import json
import sys
import time
from pathlib import Path

import torch
from common_worker import Rounds, converse
from common_worker import Worker as Common
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import trl


class Worker(Common):
    def build(self):
        model = self._model()
        return model, self._trainer(model)

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

    def _trainer(self, model):
        settings = self.settings
        tokenizer = AutoTokenizer.from_pretrained(settings["model"])
        rows = [json.loads(line) for line in Path(settings["rows_file"]).read_text(encoding="utf-8").splitlines()]
        if settings["train_on"] == "completion":
            rows = [{"prompt": row["messages"][:-1], "completion": row["messages"][-1:]} for row in rows]
        from datasets import Dataset, disable_caching, disable_progress_bars

        disable_caching()
        disable_progress_bars()
        args = trl.SFTConfig(
            **self.arguments(),
            packing=settings["packing"],
            completion_only_loss=settings["train_on"] == "completion",
        )
        began = time.perf_counter()
        trainer = trl.SFTTrainer(
            model, args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
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

    def serve(self, request: list[str]) -> None:
        assert request[0] == "labels", request
        self.labels(request[1], Path(request[2]))

    def prepare(self) -> None:
        self.wait()  # for labels

    def about(self) -> dict:
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        embedding = self.model.get_input_embeddings().weight
        head = self.model.get_output_embeddings().weight
        config = self.model.config
        return {
            "adapter_parameters": trained if self.settings["lora"] else 0,
            "layer_shapes": [shape for name, shape in self.layers if ".0." in name],
            "linear_shapes": [shape for name, shape in self.layers if "lm_head" not in name],
            "head_shape": tuple(head.shape),
            "head_trains": head.requires_grad,
            "embedding_parameters": embedding.numel(),
            "attention_width": config.num_attention_heads
            * (getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads),
            "attention_layers": config.num_hidden_layers,
        }


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


def start(settings: dict, answers) -> None:
    if "shapes" in settings:
        products(settings, answers)
    else:
        Worker(settings, answers).run()


if __name__ == "__main__":
    converse(start)
