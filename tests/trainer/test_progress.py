"""What a run shows: the bar and its table, the lines of a log file, the summary, and the report in groups."""

import io
import math
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoTokenizer, PrinterCallback, ProgressCallback, TrainerControl, TrainerState

import trl
from tests.trainer.helpers import chat_rows, sft, tiny
from trl import screen
from trl.notices import notify_once
from trl.rollout.completions import Table
from trl.trainer import report
from trl.trainer.progress import Bar, RichProgressCallback
from trl.trainer.summary import findings, mean_of, summary

ARGS = SimpleNamespace(disable_tqdm=False, log_all=False, device=torch.device("cpu"), output_dir="nowhere",
                       should_save=True, load_best_model_at_end=False, max_completion_length=64)  # fmt: skip
CONTROL = TrainerControl()
GRPO = SimpleNamespace(method="grpo", reports={})


@pytest.fixture(scope="module")
def tokenizer(small_path: str) -> Any:
    return AutoTokenizer.from_pretrained(small_path)


def entry(step: int, **more: float) -> dict[str, Any]:
    """A log entry of GRPO with what is not shown among what is."""
    return {"loss": 0.1 / step, "reward": 0.5 + step / 100, "reward_std": 0.25, "rewards/a/mean": 0.5,
            "frac_reward_zero_std": 0.75, "completions/clipped_ratio": 0.5, "clip_ratio/low_mean": 0.0,
            "num_tokens": 100 * step, "epoch": step / 10, "learning_rate": 1e-5, **more}  # fmt: skip


def run(callback: RichProgressCallback, entries: list[dict[str, Any]], state: TrainerState | None = None,
        args: Any = ARGS, before_last: Any = None) -> TrainerState:  # fmt: skip
    """The events of a run that logs the entries, one a step."""
    state = state or TrainerState(max_steps=len(entries))
    state.is_world_process_zero = getattr(state, "is_world_process_zero", True)
    callback.on_train_begin(args, state, CONTROL)
    for step, logs in enumerate(entries, 1):
        state.global_step, state.epoch = step, logs.get("epoch")
        if step == len(entries) and before_last is not None:
            before_last()
        callback.on_step_end(args, state, CONTROL)
        state.log_history.append({**logs, "step": step})
        callback.on_log(args, state, CONTROL, logs=logs)
    callback.on_train_end(args, state, CONTROL)
    return state


def first_process(steps: int) -> TrainerState:
    return TrainerState(max_steps=steps, is_world_process_zero=True)


@pytest.mark.parametrize("width", [80, 200])
def test_a_terminal_shows_the_metrics_of_the_method(width: int) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=width, height=40, color_system=None)
    entries = [entry(step) for step in range(1, 13)]
    run(RichProgressCallback(GRPO, console), entries, first_process(12))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    shown = [line for line in text.splitlines() if line.startswith(("reward", "clip_ratio", "loss"))]
    last = [line.split() for line in shown[-2:]]
    # One function's mean is the reward; the loss of GRPO tells nothing.
    assert {line.split()[0] for line in shown} == {"reward", "reward_std"}
    wide = ["0.51", "0.62"] if width == 200 else []
    assert last[0] == ["reward", "0.51", "0.62", "+0.11", *wide, "▁▂▂▃▄▄▅▅▆▇▇█"]
    assert last[1] == ["reward_std", "0.25", "0.25", "+0", *(["0.25"] * 2 if wide else []), "▅" * 12]
    assert all(len(line) <= width for line in text.splitlines() if "\x1b" not in line)
    bar = next(line for line in reversed(text.splitlines()) if "step 12/12" in line)
    assert "reward 0.62" in bar and "in all" in bar
    assert width == 80 or "epoch 1.20" in bar  # a narrow bar leaves it out


def test_a_notice_stands_above_the_bar(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=80, height=40, color_system=None)
    sentence = "a reward that is always the same, told while the bar stands"
    run(
        RichProgressCallback(GRPO, console),
        [entry(1), entry(2)],
        first_process(2),
        before_last=lambda: notify_once(sentence),
    )
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert f"trl: {sentence}" in [line.rpartition("\x1b[2K")[2] for line in lines]
    assert capsys.readouterr().out == "" and not type(sys.stdout).__name__.startswith("FileProxy")


def test_the_lines_of_a_log_file_are_the_logged_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    entries = [entry(step, reward=math.pi * step) for step in (1, 2, 3)]
    run(RichProgressCallback(GRPO), entries, first_process(3))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step=")]
    assert len(lines) == 3
    for step, (line, logged) in enumerate(zip(lines, entries, strict=True), 1):
        found = dict(pair.split("=") for pair in line.split())
        assert found["step"] == f"{step}/3" and float(found["epoch"]) == step / 10
        for name in ("reward", "reward_std", "frac_reward_zero_std", "completions/clipped_ratio"):
            assert float(found[name]) == pytest.approx(logged[name], rel=1e-5)
        assert "clip_ratio/low_mean" not in found and "loss" not in found
        assert int(found["tokens_per_second"]) > 0 and float(found["memory_gb"]) > 0
    everything = RichProgressCallback(GRPO).line(
        SimpleNamespace(**{**vars(ARGS), "log_all": True}), first_process(3), entries[0]
    )
    assert entries[0].items() <= everything.items()


def test_other_processes_show_nothing(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    notify_once("a notice of another process")
    run(RichProgressCallback(GRPO), [entry(1), entry(2)], TrainerState(max_steps=2, is_world_process_zero=False))
    assert capsys.readouterr() == ("", "")


def test_a_run_in_a_log_file(tmp_path: Any, tokenizer: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Lines and summary of a real run; the log history has what it had before."""
    trainer = sft(tmp_path, tiny(tokenizer), tokenizer, chat_rows(16), eval_rows=chat_rows(4, 1), max_steps=4,
                  eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2, max_length=48,
                  truncation_mode="keep_end", per_device_train_batch_size=2, gradient_checkpointing=False)  # fmt: skip
    capsys.readouterr()
    trainer.train()
    printed = capsys.readouterr()
    out = printed.out.splitlines()
    trained = [each for each in trainer.state.log_history if "loss" in each]
    lines = [dict(pair.split("=") for pair in line.split()) for line in out if line.startswith("step=")]
    assert [float(line["loss"]) for line in lines if "loss" in line] == pytest.approx(
        [each["loss"] for each in trained], rel=1e-5
    )
    evaluated = [each["eval_loss"] for each in trainer.state.log_history if "eval_loss" in each]
    assert [float(line["eval_loss"]) for line in lines if "eval_loss" in line] == pytest.approx(evaluated, rel=1e-5)
    assert all(isinstance(value, int | float) for each in trained for value in each.values())
    numbers = [screen.number(each["loss"]) for each in (trained[0], trained[-1])]
    assert f"trl: loss: {numbers[0]} at step 1, {numbers[1]} at step 4" in out
    first, last = map(screen.number, evaluated)
    assert f"trl: eval_loss: {first} at step 2, {last} at step 4" in out
    best = min((loss, step) for loss, step in zip(evaluated, (2, 4), strict=True))
    assert any(f"the best is {tmp_path}/checkpoint-{best[1]} (lowest eval_loss" in line for line in out)
    cut = trainer.reports["train"].rows_cut
    assert cut and f"trl: warning: {cut} of 16 rows were cut; the report before step 1 says how much" in out
    assert any(line.startswith("trl: chat: trl chat --model_name_or_path") for line in out)
    assert printed.err == ""


def test_whose_callbacks_stay(tmp_path: Any, tokenizer: Any) -> None:
    def callbacks(*given: Any, **settings: Any) -> list[Any]:
        config = trl.SFTConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True, **settings)
        rows, model = chat_rows(2), tiny(tokenizer)
        trainer = trl.SFTTrainer(model, config, train_dataset=rows, processing_class=tokenizer, callbacks=list(given))
        return trainer.callback_handler.callbacks

    for settings in ({}, {"disable_tqdm": True}):
        shown = [each for each in callbacks(**settings) if isinstance(each, ProgressCallback | PrinterCallback)]
        assert [type(each) for each in shown] == [trl.RichProgressCallback]
    own = trl.RichProgressCallback()
    assert [each for each in callbacks(own) if isinstance(each, ProgressCallback)] == [own] and own.trainer is not None


def test_the_summary_is_of_the_log_history() -> None:
    history = [{**entry(step), "step": step} for step in range(1, 21)]
    state = TrainerState(max_steps=20, global_step=20, log_history=history)
    lines = summary(GRPO, ARGS, state, "reward", 61.0, 20)
    before, after = (mean_of([each["reward"] for each in part]) for part in (history[:5], history[-5:]))
    # Five numbers in steps of 0.01: a deviation of sqrt(2.5) steps, and Student's quantile 2.776.
    assert before.value == pytest.approx(0.53) and before.half == pytest.approx(
        0.01 * 2.776 * math.sqrt(2.5 / 5), rel=0.02
    )
    assert lines["result"][:2] == [
        "result: 20 steps in 1:01; 2,000 tokens seen",
        f"reward: 0.51 at step 1, 0.7 at step 20; mean of the first 5 log entries 0.53 ± {before.half:.2g}, of the "
        f"last 5 0.68 ± {after.half:.2g} (95% interval)",
    ]
    constant, clipped = findings(GRPO, ARGS, history)
    assert "in 75% of the groups all completions had the same reward" in constant
    assert clipped == "lately 50% of the completions were cut at max_completion_length=64"
    flat = [{**each, "reward": 0.5 + (-1) ** step / 10} for step, each in enumerate(history)]
    lines = summary(GRPO, ARGS, TrainerState(log_history=flat), "reward", 1.0, 20)
    assert lines["result"][2].endswith("is within the noise")
    state.best_model_checkpoint, state.best_metric = "out/checkpoint-10", 0.7
    args = SimpleNamespace(**{**vars(ARGS), "greater_is_better": True, "metric_for_best_model": "reward"})
    assert summary(GRPO, args, state, "reward", 1.0, 20)["checkpoint"] == [
        "checkpoint: the best is out/checkpoint-10 (highest eval_reward, 0.7)"
    ]


def test_a_run_that_breaks_off_gives_the_terminal_back() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=80, color_system=None)
    callback, before = RichProgressCallback(GRPO, console), (sys.stdout, sys.stderr)
    callback.on_train_begin(ARGS, first_process(2), CONTROL)
    assert sys.stdout is not before[0]
    callback.close()
    assert (sys.stdout, sys.stderr) == before and callback.live is None


def test_a_narrow_bar_drops_facts_from_the_front() -> None:
    console = Console(file=io.StringIO(), width=60, color_system=None)
    console.print(Bar(3, 10, ["epoch 0.30", "loss 2.3", "1,000 tokens/s", "2.0 GB", "0:10:00 left"], (1, 4)))
    [line] = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert (
        line.startswith("step 3/10, evaluating 1/4") and line.rstrip().endswith("0:10:00 left") and "epoch" not in line
    )


@pytest.mark.parametrize(
    ("values", "width", "line"),
    [
        ([], 5, ""),
        ([1, 2, 3], 5, "▁▅█"),
        ([1, 1, 3, 3], 2, "▁█"),
        ([2, 2], 5, "▅▅"),
        ([math.nan, 0, 1, math.inf], 9, "▁█"),
    ],
)
def test_a_sparkline(values: list[float], width: int, line: str) -> None:
    assert screen.sparkline(values, width) == line


def test_numbers() -> None:
    assert [screen.number(each) for each in (0.0, 1.23456, 12345.6, 123456, 0.00012345, math.nan, "a")] == [
        "0", "1.235", "12,346", "123,456", "1.23e-04", "nan", "a"
    ]  # fmt: skip
    assert screen.change(0.5) == "+0.5" and screen.change(-2.0) == "-2" and screen.duration(3723) == "1:02:03"
    assert screen.duration(61.4) == "1:01"
    assert screen.key_values({"a": 1, "b": 0.1234567, "c": "x y", "d": ""}) == "a=1 b=0.123457 c='x y' d=''"


def test_the_report_is_grouped_and_said_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(report, "_printed", set())
    data = ["train: 3 rows read, 3 kept", "warning: 1 row cut", "row 0: 你好 🙂"]
    lines = [*data, "model: 5 of 5 parameters train", "  caution: a low rate", "engine: flat rows", "steps: 3"]
    console = Console(file=io.StringIO(), force_terminal=True, width=30, color_system=None)
    monkeypatch.setattr(report, "get_console", lambda: console)
    report.print_report(lines, {"train": data, "eval": ["warning: 9 rows cut"]})
    shown = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert [line.rstrip() for line in shown if line.strip()] == [
        "data     train: 3 rows read, 3", "         kept", "         row 0: 你好 🙂", "model    5 of 5 parameters",
        "         train", "engine   flat rows", "plan     steps: 3", "caution  1 row cut",
        "         a low rate",
    ]  # fmt: skip
    monkeypatch.setattr(report, "get_console", lambda: Console(file=io.StringIO()))
    report.print_report([*lines, "steps: 4"], {"eval": data})
    assert capsys.readouterr().out.splitlines() == [
        "trl: report: as before, but for this", "trl: steps: 4", "trl: warning: eval: 1 row cut",
        "trl: caution: a low rate",
    ]  # fmt: skip


def test_wide_characters_keep_their_columns() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=24, color_system=None)
    screen.paragraphs(console, {"data": ["row 0: 今天天气很好,我们去公园吧 🙂🙂"]})
    for line in console.file.getvalue().splitlines():  # type: ignore[attr-defined]
        from rich.cells import cell_len

        assert cell_len(line) <= 24 and (not line or line.startswith(("data  ", "      ")))


def test_completions_are_shown_as_text(capsys: pytest.CaptureFixture[str]) -> None:
    prompt = '[{"role": "user", "content": "2 + 2 等于多少?"}]'
    rows = [
        {"step": 3, "mode": "train", "prompt": prompt, "completion": f"it is [bold]{n}[/bold]", "right": right,
         "short": 0.5, "advantage": 0.25, "note": "n"}
        for n, right in ((4, 1.0), (5, None))
    ]  # fmt: skip
    Table.show(rows, 3, weights={"right": 2.0, "short": 1.0})
    shown = capsys.readouterr().out
    assert "step 3, prompt: user: 2 + 2 等于多少?" in shown and "role" not in shown
    assert shown.count("prompt:") == 1 and "it is [bold]4[/bold]" in shown
    found = [each.strip() for line in shown.splitlines() for each in line.split("│")]
    assert [each for each in found if "×" in each or "total" in each] == [
        "right 1 × 2", "short 0.5 × 1", "total 2.5", "short 0.5 × 1", "total 0.5"
    ]  # fmt: skip
    Table.show(rows, 3, limit=1, weights={"right": 2.0})
    assert "right 1" in (shown := capsys.readouterr().out) and "total" not in shown and "[bold]5" not in shown
