"""Writes the screens beside this file: an SFT and a GRPO run in a terminal of 80 and of 200 columns, and in a log file.

    python docs/screens/make.py [folder]

Runs `trl sft` and `trl grpo` on a small random model, in a pseudo-terminal, and keeps the text that
stands in the terminal in the middle of the run and at its end.
"""

import codecs
import fcntl
import json
import os
import pty
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import termios
from pathlib import Path

REWARDS = '''
def vowels(completions, **columns):
    """The share of characters that are vowels."""
    return [sum(map(text.lower().count, "aeiou")) / max(len(text), 1) for text in map(last, completions)]


def short(completions, **columns):
    return [1.0 if len(last(each)) < 100 else 0.0 for each in completions]


def last(completion):
    return completion if isinstance(completion, str) else completion[-1]["content"]
'''
SHARED = (
    *("--model_name_or_path", "model", "--use_cpu", "--learning_rate", "1e-2", "--logging_steps", "1"),
    *("--gradient_checkpointing", "false"),
)
RUNS = {
    "sft": (
        *("--dataset_name", "chats.jsonl", "--dataset_train_split", "train[16:]", "--dataset_test_split", "train[:16]"),
        *("--max_steps", "20", "--per_device_train_batch_size", "4", "--max_length", "80", "--output_dir", "sums"),
        *("--eval_strategy", "steps", "--eval_steps", "5", "--save_steps", "5", *SHARED),
    ),
    "grpo": (
        *("--dataset_name", "prompts.jsonl", "--reward_funcs", "rewards.py:vowels", "rewards.py:short"),
        *("--reward_weights", "1", "0.5", "--num_generations", "8", "--max_completion_length", "24"),
        *("--per_device_train_batch_size", "16", "--max_steps", "20", "--output_dir", "vowels", *SHARED),
        *("--save_strategy", "no"),
    ),
}
COMPLETIONS = ("--log_completions", "--num_completions_to_print", "3", "--max_steps", "1")


def prepare(folder: Path) -> None:
    """The model and the rows."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from trl.demo.model import demo_model

    AutoTokenizer.from_pretrained(str(demo_model())).save_pretrained(folder / "model")
    file = folder / "model" / "tokenizer.json"
    content = json.loads(file.read_text())
    known = content["model"]  # the first tokens alone: a small head is fast
    known["vocab"] = {token: place for token, place in known["vocab"].items() if place < 2048}
    known["merges"] = [pair for pair in known["merges"] if "".join(pair) in known["vocab"]]
    file.write_text(json.dumps(content))
    tokenizer = AutoTokenizer.from_pretrained(str(folder / "model"))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        tie_word_embeddings=True, pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    asked = [("What is {} + {}?", "{}"), ("{} 加 {} 等于多少?", "答案是 {} 🙂")]
    chats, prompts = [], []
    for first in range(12):
        for second in range(12):
            question, answer = asked[(first + second) % 2]
            user = {"role": "user", "content": question.format(first, second)}
            assistant = {"role": "assistant", "content": answer.format(first + second)}
            chats.append({"messages": [user, assistant]})
            prompts.append({"prompt": [user]})
    for name, rows in (("chats", chats), ("prompts", prompts)):
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    (folder / "rewards.py").write_text(REWARDS)


class Terminal:
    """The text that stands in a terminal after the control codes that rich and tqdm write."""

    CODES = re.compile(r"\x1b\[([?0-9;]*)([A-Za-z])|\x1b\][^\x07]*\x07")

    def __init__(self) -> None:
        self.lines, self.row, self.column = [""], 0, 0
        self.begun = ""  # a code of which the rest is still to come

    def write(self, text: str) -> None:
        text, place = self.begun + text, 0
        last = text.rfind("\x1b")
        end = last if last >= 0 and not self.CODES.match(text, last) else len(text)
        text, self.begun = text[:end], text[end:]
        for code in self.CODES.finditer(text):
            self._print(text[place : code.start()])
            place = code.end()
            count, what = code.group(1), code.group(2)
            if what == "A":
                self.row = max(self.row - int(count or 1), 0)
            elif what == "K":
                self.lines[self.row] = "" if count == "2" else self.lines[self.row][: self.column]
        self._print(text[place:])

    def _print(self, text: str) -> None:
        for each in text:
            if each == "\n":
                self.row, self.column = self.row + 1, 0
                self.lines += [""] * (self.row + 1 - len(self.lines))
            elif each == "\r":
                self.column = 0
            else:
                line = self.lines[self.row].ljust(self.column)
                self.lines[self.row] = line[: self.column] + each + line[self.column + 1 :]
                self.column += 1

    def text(self) -> str:
        return "\n".join(line.rstrip() for line in self.lines).strip("\n") + "\n"


def in_terminal(command: list[str], folder: Path, columns: int, middle: str, environment: dict[str, str]) -> str:
    """What stands in a terminal when `middle` has been written, and at the end."""
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    environment = {**environment, "TERM": "xterm-256color"}
    process = subprocess.Popen(command, cwd=folder, env=environment, stdout=follower, stderr=follower, stdin=follower)
    os.close(follower)
    terminal, frame = Terminal(), ""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    while True:
        try:
            part = os.read(leader, 65536)
        except OSError:  # the process has closed its end
            break
        if not part:
            break
        terminal.write(decoder.decode(part))
        if not frame and middle in terminal.text().splitlines()[-1]:  # the bar is what a frame ends with
            frame = terminal.text()
    if process.wait():
        raise SystemExit(f"{' '.join(command)} has failed:\n{terminal.text()}")
    return f"--- in the middle ---\n\n{frame}\n--- at the end ---\n\n{terminal.text()}"


def main() -> None:
    target = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent)
    target.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "HF_HUB_OFFLINE": "1"}
    environment.pop("COLUMNS", None)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder)
        for method, options in RUNS.items():
            command = [sys.executable, "-m", "trl.cli.main", method, *options]
            typed = f"$ trl {method} {' '.join(options)}\n\n"
            middle = "step 12/20"
            output = folder / options[options.index("--output_dir") + 1]
            for columns in (80, 200):
                shutil.rmtree(output, ignore_errors=True)
                screen = in_terminal(command, folder, columns, middle, environment)
                (target / f"{method}-{columns}.txt").write_text(typed + screen, encoding="utf-8")
            shutil.rmtree(output, ignore_errors=True)
            logged = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True)
            (target / f"{method}-log.txt").write_text(typed + logged.stdout + logged.stderr, encoding="utf-8")
        command = [sys.executable, "-m", "trl.cli.main", "grpo", *RUNS["grpo"], *COMPLETIONS]
        screen = in_terminal(command, folder, 80, "no middle", environment)
        (target / "completions-80.txt").write_text(screen.partition("--- at the end ---\n\n")[2], encoding="utf-8")


if __name__ == "__main__":
    main()
