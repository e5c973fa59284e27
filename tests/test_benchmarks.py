"""The parts of `benchmarks/gpu.py` on a large model: the work that is counted, and all of them on the CPU."""

import argparse
import importlib.util
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def scripts():
    """`gpu.py` and `large.py` as modules."""
    found = {}
    for name in ("gpu", "large"):
        spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", FOLDER / f"{name}.py")
        found[name] = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(found[name])
    yield found["gpu"], found["large"]
    for name in found:
        del sys.modules[f"benchmarks_{name}"]


@pytest.fixture(scope="module")
def model(scripts, smol2_path, tmp_path_factory):
    folder = tmp_path_factory.mktemp("large")
    scripts[0].make_models(folder, Path(smol2_path), dry=True, large=True)
    return folder / "8b"


def options(part, model, **others):
    names = {"part": part, "model": str(model), "device": "cpu", "steps": 1, "warm_up": 1, "peak": 1.0}
    return argparse.Namespace(**{**names, **others})


@pytest.mark.parametrize("part", ["sft-full", "sft-lora", "sft-qlora", "dpo-lora", "grpo-update"])
def test_each_part_trains_two_steps(scripts, model, part):
    if part == "sft-qlora":
        pytest.importorskip("bitsandbytes")
    _, large = scripts
    found = large.measured(options(part, model))
    assert len(found["seconds"]) == 1 and found["seconds"][0] > 0 and len(found["losses"]) == 2
    lengths = {"dpo-lora": 4 * (8 + 2 * 8), "grpo-update": 4 * (8 + 4 * 8)}
    assert found["tokens"] == lengths.get(part, 4 * 32)
    assert found["share"] == pytest.approx(found["work"] / found["seconds"][0] / 1e12)
    expected = {"dpo-lora": 0.6931, "grpo-update": 0.0}.get(part, 10.8)  # ln 2; advantages add up to 0; ln 49,200
    assert found["losses"][0] == pytest.approx(expected, abs=0.05)
    assert large.shown(found).startswith(f"{part}, trl ")


def test_the_work_of_a_step(scripts):
    """By hand: 10 weights in layers, 4 in the head, one layer of width 3."""
    _, large = scripts
    sft = large.Part("sft", groups=2, prompt=0, each=1, completion=8, adapter=False)
    # 16 tokens × 14 weights × 2 × 3 passes; 2 × 32 pairs of tokens × 3 × 4 operations × 3.
    assert sft.work(10, 4, 3, 1) == 16 * 14 * 6 + 2 * 32 * 3 * 4 * 3
    assert sft._replace(adapter=True).work(10, 4, 3, 1) == 16 * 14 * 4 + 2 * 32 * 3 * 4 * 3
    dpo = large.Part("dpo", groups=1, prompt=4, each=2, completion=2)
    # 8 tokens, 4 of them trained; forward, backward and the reference; 8 pairs in the prompt, 10 for each completion.
    assert dpo.work(10, 4, 3, 1) == 2 * (10 * 8 + 4 * 4) * 3 + (8 + 20) * 3 * 4 * 4


def test_the_commands_of_parts(scripts, tmp_path):
    gpu, large = scripts
    assert set(gpu.PARTS) == {*large.PARTS, "sampler"}
    asked = argparse.Namespace(parts=["sft-full", "sampler"], dry=False)
    steps = gpu.parts(asked, tmp_path, "/up/bin/python", 989.0)
    assert [each.name for each in steps] == ["sft-full-ours", "sft-full-upstream", "sampler"]
    assert steps[1].command[:4] == ["env", "-u", "PYTHONPATH", "/up/bin/python"]
    assert "--peak 989.0" in " ".join(steps[0].command) and "--dtype bfloat16" in " ".join(steps[2].command)
    minutes = {part: sum(each.limit for each in steps if each.name.startswith(part)) / 60 for part in asked.parts}
    assert max(minutes.values()) + 2 < 9  # with making the model
