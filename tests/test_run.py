"""Whole runs: from the command line as a user starts them, and within this process where starting is not the point."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from conftest import ROOT, SELF_CORRECTION, build_model, teach_format
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import train

SPLIT_KEYS = {
    *(f"{name}_attempt{number}" for name in ("flexible_acc", "unanswered") for number in (1, 2)),
    *(f"{a}_to_{b}" for a, b in (("unanswered", "correct"), ("wrong", "correct"))),
    *(f"{b}_to_{a}" for a, b in (("unanswered", "correct"), ("wrong", "correct"))),
    *(f"wrong_{what}" for what in ("answered", "mended", "repeated")),
}
TRAIN_KEYS = {
    "event",
    "stage",
    "step",
    "reward_attempt1",
    "reward_attempt2",
    "reward_gap",
    "loss",
    "kl_attempt1",
    "kl_attempt2",
    "grad_norm",
    "learning_rate",
    "acc_attempt1",
    "acc_attempt2",
    "completion_tokens_attempt1",
    "completion_tokens_attempt2",
    "truncated_attempt1",
    "truncated_attempt2",
    *SPLIT_KEYS,
    "seconds_rollout",
    "seconds_update",
    "tokens_per_second",
    "peak_memory_gb",
}
EVAL_KEYS = {
    "event",
    "checkpoint",
    "n",
    "acc_attempt1",
    "acc_attempt2",
    "delta",
    "delta_i_to_c",
    "delta_c_to_i",
    *SPLIT_KEYS,
    "reward_attempt1",
    "reward_attempt2",
    "edit_distance_ratio",
}
TIMINGS = {"seconds_rollout", "seconds_update", "tokens_per_second", "peak_memory_gb", "seconds", "adapter"}
STEPS = 6  # a stage: 24 rows, 8 a step, 2 epochs
BROKEN_NETWORK = {"WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9"}


@pytest.fixture(scope="module")
def model_dir(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose attempts earn rewards that differ."""
    return teach_format(build_model(tmp_path_factory.mktemp("taught")), data_dir, steps=30)


@pytest.fixture(scope="module")
def config_file(model_dir: Path, data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model's run: two stages of six steps, a checkpoint every two."""
    config = {
        "run_name": "run",
        "wandb_project": "score-tests",
        "model": {"name": str(model_dir), "max_seq_length": 160, "lora": {"r": 4, "alpha": 8, "dropout": 0.1}},
        "dataset": {"name": str(data_dir), "input_field": "question", "target_field": "answer"},
        "prompts": {"self_correction": "?"},
        "train": {
            "stage1_batch_size": 8,
            "stage2_batch_size": 8,
            "stage1_epochs": 2,
            "stage2_epochs": 2,
            "micro_batch_size": 4,
            "learning_rate": 0.02,
            "max_new_tokens_attempt1": 8,
            "max_new_tokens_attempt2": 12,
            "max_prompt_length_attempt1": 48,
            "max_prompt_length_attempt2": 100,
            "seed": 1,
            "checkpoint_every": 2,
            "warmup_steps": 3,
            "lr_decay": 0.5,
        },
    }
    file = tmp_path_factory.mktemp("config") / "run.yaml"
    file.write_text(yaml.safe_dump(config))
    return file


def arguments(config_file: Path, out: Path, *more: str) -> list[str]:
    return [
        "--config",
        str(config_file),
        "--set",
        f"prompts.self_correction={SELF_CORRECTION}",
        "--set",
        f"output.dir={out}",
        *more,
    ]


def command_line(argv: list[str], environment: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    """`python train.py ...` to its end, as from a shell, without a W&B login."""
    return subprocess.run(
        [sys.executable, "train.py", *argv],
        cwd=ROOT,
        env=no_login(environment),
        text=True,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
        timeout=600,
    )


def no_login(more: dict[str, str] | None = None) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    return kept | {"NETRC": os.devnull, "WANDB_SILENT": "true"} | (more or {})


def start_and_signal(
    argv: list[str], folder: Path, stage: int, step: int, number: int, environment: dict[str, str] | None = None
) -> SimpleNamespace:
    """Starts a run and sends it a signal once (stage, step) is in its metrics."""
    process = subprocess.Popen(
        [sys.executable, "train.py", *argv],
        cwd=ROOT,
        env=no_login(environment),
        text=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    deadline = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < deadline:
        if any((e.get("stage"), e.get("step")) == (stage, step) for e in events(folder)):
            process.send_signal(number)
            break
        time.sleep(0.02)
    stdout, stderr = process.communicate(timeout=300)
    return SimpleNamespace(returncode=process.returncode, stdout=stdout, stderr=stderr)


def events(folder: Path) -> list[dict[str, Any]]:
    """The whole lines of metrics.jsonl, read strictly: NaN is no JSON."""
    file = folder / "metrics.jsonl"
    lines = file.read_text().split("\n")[:-1] if file.exists() else []

    def refuse(word: str) -> None:
        raise ValueError(f"{word} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in lines]


def without_timings(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if key not in TIMINGS} for line in lines]


def adapter_bytes(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


def assert_same_run(folder: Path, other: Path) -> None:
    assert without_timings(events(folder)) == without_timings(events(other))
    assert (folder / "samples.jsonl").read_text() == (other / "samples.jsonl").read_text()
    for stage in ("stage1", "stage2"):
        assert adapter_bytes(folder / stage) == adapter_bytes(other / stage), stage


@pytest.fixture(scope="module")
def full_run(config_file: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """One whole run from the command line. Tests that write work on a copy."""
    out = tmp_path_factory.mktemp("full")
    done = command_line(arguments(config_file, out))
    assert done.returncode == 0, done.stderr
    return SimpleNamespace(folder=out / "run", stdout=done.stdout, stderr=done.stderr, out=out)


@pytest.fixture
def run_here(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., tuple[int, str]]]:
    """run_here(*flags) -> (exit code, all that was printed) of a run in this process, its folder under tmp_path."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def run(*flags: str, out: Path = tmp_path) -> tuple[int, str]:
        argv = arguments(config_file, out, "--set", "wandb_project=null", *flags)
        monkeypatch.setattr(sys, "argv", ["train.py", *argv])
        try:
            code = train.main(*train.parse_command_line(argv))
        except train.UserError as error:
            return 2, str(error)
        printed = capsys.readouterr()
        return code, printed.out + printed.err

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


# --------------------------------------------------------------------------------------------------- a whole run


def test_metrics_of_a_full_run(full_run: SimpleNamespace) -> None:
    lines = events(full_run.folder)
    steps = [line for line in lines if line["event"] == "train"]
    assert [(line["stage"], line["step"]) for line in steps] == [
        (stage, step + 1) for stage in (1, 2) for step in range(STEPS)
    ]
    order = [line["checkpoint"] if line["event"] == "eval" else line["stage"] for line in lines]
    assert order == ["pretrain", *[1] * STEPS, "stage1", *[2] * STEPS, "stage2"]
    for line in steps:
        assert set(line) >= TRAIN_KEYS
        assert line["reward_gap"] == pytest.approx(line["reward_attempt2"] - line["reward_attempt1"])
        assert 0 <= line["acc_attempt1"] <= 1
        assert 1 <= line["completion_tokens_attempt1"] <= 8
        assert 1 <= line["completion_tokens_attempt2"] <= 12
        assert all(math.isfinite(line[key]) for key in ("loss", "grad_norm", "kl_attempt1", "kl_attempt2"))
    assert steps[0]["kl_attempt1"] == steps[0]["kl_attempt2"] == 0, (
        "the first batch is sampled from the reference itself"
    )
    assert steps[-1]["kl_attempt1"] > 0
    assert {line["reward_attempt2"] for line in steps} != {0.0}, "a run without rewards shows nothing"
    for line in lines:
        assert line["delta_i_to_c"] == pytest.approx(line["unanswered_to_correct"] + line["wrong_to_correct"])
        assert line["delta_c_to_i"] == pytest.approx(line["correct_to_unanswered"] + line["correct_to_wrong"])
        for n in (1, 2):
            assert line[f"flexible_acc_attempt{n}"] >= line[f"acc_attempt{n}"]
        assert line["acc_attempt1"] + line["wrong_answered"] + line["unanswered_attempt1"] == pytest.approx(1)
        if line["event"] == "eval":
            assert set(line) >= EVAL_KEYS
            assert line["n"] == 6
            assert line["delta"] == pytest.approx(line["acc_attempt2"] - line["acc_attempt1"])
            assert line["delta"] == pytest.approx(line["delta_i_to_c"] - line["delta_c_to_i"])


def test_results_of_a_full_run(full_run: SimpleNamespace, config_file: Path) -> None:
    folder = full_run.folder
    results = json.loads((folder / "results.json").read_text())
    assert set(results) >= {"run_name", "evals", "versions", "device", "seconds_total", "git_commit"}
    assert results["run_name"] == "run"
    assert results["evals"] == [line for line in events(folder) if line["event"] == "eval"]
    assert results["versions"]["torch"] == torch.__version__.split("+")[0] or torch.__version__.startswith(
        results["versions"]["torch"]
    )
    table = (folder / "results.md").read_text().strip()
    assert table in full_run.stdout, "the table is printed at the end"
    main, title, split = table.split("\n\n")
    assert title.startswith("Corrections")
    for part in (main, split):
        assert [row.split("|")[1].strip() for row in part.splitlines()[2:]] == ["pretrain", "stage1", "stage2"]
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    expected = train.read_config(
        str(config_file), [f"prompts.self_correction={SELF_CORRECTION}", f"output.dir={full_run.out}"]
    )
    assert train.read_config(str(folder / "config.yaml")) == expected


def test_samples_of_a_full_run(full_run: SimpleNamespace) -> None:
    samples = [json.loads(line) for line in (full_run.folder / "samples.jsonl").read_text().splitlines()]
    evaluated = [s for s in samples if s["event"] == "eval"]
    assert [s["checkpoint"] for s in evaluated] == ["pretrain"] * 6 + ["stage1"] * 6 + ["stage2"] * 6
    steps = {(s["stage"], s["step"]) for s in samples if s["event"] == "train"}
    assert len(steps) == 2 * STEPS
    for sample in samples:
        assert {"question", "target", "text_attempt1", "text_attempt2", "reward_attempt1", "reward_attempt2"} <= set(
            sample
        )
        assert {"answer_attempt1", "answer_attempt2"} <= set(sample)


def test_test_rows_are_never_trained_on(full_run: SimpleNamespace, data_dir: Path) -> None:
    questions = {
        name: {json.loads(line)["question"] for line in (data_dir / f"{name}.jsonl").read_text().splitlines()}
        for name in ("train", "test")
    }
    samples = [json.loads(line) for line in (full_run.folder / "samples.jsonl").read_text().splitlines()]
    assert {s["question"] for s in samples if s["event"] == "train"} <= questions["train"]
    assert {s["question"] for s in samples if s["event"] == "eval"} == questions["test"]


def test_adapters_of_a_full_run_load_with_plain_peft(full_run: SimpleNamespace, model_dir: Path) -> None:
    ids, logits = torch.tensor([[20, 30, 40, 50]]), {}
    for place in ("stage1/step_2", "stage1/step_4", "stage1", "stage2/step_2", "stage2/step_4", "stage2"):
        base = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
        model = PeftModel.from_pretrained(base, full_run.folder / place)
        assert model.peft_config["default"].base_model_name_or_path == str(model_dir)
        with torch.no_grad():
            logits[place] = model(input_ids=ids).logits
        assert AutoTokenizer.from_pretrained(full_run.folder / place).decode([20, 30]) != ""
    places = list(logits)
    assert all(not torch.equal(logits[a], logits[b]) for a in places for b in places if a < b), "each step moved it"


def test_checkpoints_hold_no_pickles_and_no_base_weights(full_run: SimpleNamespace) -> None:
    files = [file for file in full_run.folder.rglob("*") if file.is_file() and "wandb" not in file.parts]
    assert {file.suffix for file in files} <= {
        ".safetensors",
        ".json",
        ".jsonl",
        ".jinja",
        ".txt",
        ".md",
        ".yaml",
        ".png",
    }
    assert (full_run.folder / "stage1" / "step_2" / "optimizer.safetensors").exists()
    assert all("lora_" in name for name in load_file(full_run.folder / "stage1" / "adapter_model.safetensors"))
    assert not [file for file in files if file.name.startswith(".") or "tmp" in file.name], (
        "nothing half-written is left"
    )


def test_wandb_without_a_login_goes_offline(full_run: SimpleNamespace) -> None:
    assert list(full_run.folder.glob("wandb/offline-run-*")), full_run.stdout


def test_the_shipped_default_smokes_from_the_command_line(tmp_path: Path) -> None:
    done = command_line(["--config", "configs/tiny.yaml", "--smoke", "8", "--set", f"output.dir={tmp_path}"])
    assert done.returncode == 0, done.stderr
    (folder,) = tmp_path.iterdir()
    assert folder.name.endswith("-smoke")
    lines = events(folder)
    assert [line["checkpoint"] for line in lines if line["event"] == "eval"] == ["pretrain", "stage1", "stage2"]
    assert {line["n"] for line in lines if line["event"] == "eval"} == {8}
    assert {line["stage"] for line in lines if line["event"] == "train"} == {1, 2}
    assert (folder / "stage1" / "step_1" / "adapter_model.safetensors").exists()


def test_the_shipped_default_runs_both_stages(tmp_path: Path) -> None:
    short = ["train.stage1_epochs=0.06", "train.stage2_epochs=0.03", "eval.max_examples=32", f"output.dir={tmp_path}"]
    done = command_line(["--config", "configs/tiny.yaml", *[word for key in short for word in ("--set", key)]])
    assert done.returncode == 0, done.stderr
    (folder,) = tmp_path.iterdir()
    stages = [line["stage"] for line in events(folder) if line["event"] == "train"]
    assert {1, 2} == set(stages)
    assert all((folder / stage / "adapter_model.safetensors").exists() for stage in ("stage1", "stage2"))


def test_generations_of_one_prompt_stand_together_and_differ(
    run_here: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The leave-one-out baseline takes consecutive rows as one prompt's."""
    seen, inner = [], train.improve

    def spy(policy: Any, optimizer: Any, attempts: list[Any], *rest: Any) -> dict[str, Any]:
        seen.append(attempts)
        return inner(policy, optimizer, attempts, *rest)

    monkeypatch.setattr(train, "improve", spy)
    code, printed = run_here("--set", "train.num_generations=3", "--set", "train.stage2_epochs=0")
    assert code == 0, printed
    assert len(seen) == STEPS
    for first, second in seen:
        assert len(first.prompts) == len(second.prompts) == 8 * 3
        groups = [first.prompts[row : row + 3] for row in range(0, 24, 3)]
        assert all(group[0] == group[1] == group[2] for group in groups)
        assert len({tuple(group[0]) for group in groups}) == 8
        assert any(first.completions[row] != first.completions[row + 1] for row in range(0, 24, 3))


# ------------------------------------------------------------------------------------------------ smoke and eval-only


def test_smoke_replaces_the_last_smoke_and_leaves_the_run_alone(
    run_here: Callable[..., Any], full_run: SimpleNamespace, tmp_path: Path
) -> None:
    shutil.copytree(full_run.folder, tmp_path / "run")
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    for _ in range(2):
        code, printed = run_here("--smoke", "8")
        assert code == 0, printed
        lines = events(tmp_path / "run-smoke")
        assert [line["stage"] for line in lines if line["event"] == "train"] == [1, 1, 2, 2]
        assert [line["n"] for line in lines if line["event"] == "eval"] == [6, 6, 6]
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before
    code, printed = run_here(
        "--smoke", "4", "--start-stage", "2", "--resume-adapter", str(tmp_path / "run-smoke" / "stage1")
    )
    assert code == 0, printed
    assert [line["stage"] for line in events(tmp_path / "run-smoke") if line["event"] == "train"][-1] == 2


@pytest.mark.parametrize("place", [None, "stage1", "stage2/step_2"])
def test_eval_only_gives_the_runs_numbers_and_trains_nothing(
    run_here: Callable[..., Any], full_run: SimpleNamespace, tmp_path: Path, place: str | None
) -> None:
    adapter = ["--resume-adapter", str(full_run.folder / place)] if place else []
    code, printed = run_here("--eval-only", *adapter)
    assert code == 0, printed
    (line,) = events(tmp_path / "run")
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["evals"] == [line]
    assert line["adapter"] == (str(full_run.folder / place) if place else None)
    known = {e["checkpoint"]: e for e in events(full_run.folder) if e["event"] == "eval"}.get(place or "pretrain")
    if known:
        assert {key: line[key] for key in EVAL_KEYS - {"checkpoint"}} == {
            key: known[key] for key in EVAL_KEYS - {"checkpoint"}
        }
    assert not list((tmp_path / "run").glob("stage*"))


def test_eval_only_needs_no_train_batch(run_here: Callable[..., Any]) -> None:
    code, printed = run_here("--eval-only", "--set", "train.stage1_batch_size=1000")
    assert code == 0, printed


def test_eval_only_beside_a_run_changes_none_of_its_lines(
    run_here: Callable[..., Any], full_run: SimpleNamespace, tmp_path: Path
) -> None:
    shutil.copytree(full_run.folder, tmp_path / "run")
    code, printed = run_here("--eval-only", "--resume-adapter", str(tmp_path / "run" / "stage2"))
    assert code == 0, printed
    assert events(tmp_path / "run")[:-1] == events(full_run.folder)
    assert adapter_bytes(tmp_path / "run" / "stage2") == adapter_bytes(full_run.folder / "stage2")
    folders = full_run.folder, tmp_path / "run"
    before, after = (json.loads((folder / "results.json").read_text()) for folder in folders)
    assert {key for key in before if before[key] != after[key]} == {"evals"}, "time and command are the run's"


# --------------------------------------------------------------------------------------------------- stage 2 alone


def test_stage_two_from_stage_ones_adapter_equals_the_full_runs_stage_two(
    run_here: Callable[..., Any], full_run: SimpleNamespace, tmp_path: Path
) -> None:
    code, printed = run_here("--start-stage", "2", "--resume-adapter", str(full_run.folder / "stage1"))
    assert code == 0, printed
    assert adapter_bytes(tmp_path / "run" / "stage2") == adapter_bytes(full_run.folder / "stage2")
    mine, theirs = (
        [line for line in without_timings(events(f)) if line.get("stage") == 2 or line["event"] == "eval"]
        for f in (tmp_path / "run", full_run.folder)
    )
    assert mine == theirs


def test_stage_two_from_a_mid_stage_checkpoint_into_the_same_folder(
    run_here: Callable[..., Any], full_run: SimpleNamespace, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    code, printed = run_here("--set", "train.stage2_epochs=0")
    assert code == 0, printed
    assert not (folder / "stage2").exists()
    assert adapter_bytes(folder / "stage1") == adapter_bytes(full_run.folder / "stage1")
    before = events(folder)
    again = ["--start-stage", "2", "--resume-adapter", str(folder / "stage1" / "step_2")]
    code, printed = run_here(*again)
    assert code == 0, printed
    assert events(folder)[: len(before)] == before, "Stage I's lines stay"
    assert [line["step"] for line in events(folder) if line.get("stage") == 2] == list(range(1, STEPS + 1))
    assert adapter_bytes(folder / "stage1") == adapter_bytes(full_run.folder / "stage1")
    assert adapter_bytes(folder / "stage2") != adapter_bytes(full_run.folder / "stage2")
    # a second time there is a Stage II to lose
    code, printed = run_here(*again)
    assert (code, len(printed.splitlines())) == (2, 1)
    assert "--overwrite" in printed
    first = adapter_bytes(folder / "stage2")
    code, printed = run_here(*again, "--overwrite")
    assert code == 0, printed
    assert adapter_bytes(folder / "stage2") == first
    assert (folder / "stage1" / "step_2" / "adapter_model.safetensors").exists()
    assert [line["step"] for line in events(folder) if line.get("stage") == 2] == list(range(1, STEPS + 1))


def test_stage_two_stopped_before_its_first_step_resumes_from_its_own_adapter(
    run_here: Callable[..., Any], full_run: SimpleNamespace, tmp_path: Path
) -> None:
    """The folder's own Stage I is complete too, but Stage II was to begin from elsewhere."""
    folder, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    shutil.copytree(full_run.folder / "stage1" / "step_2", elsewhere)
    start = ["--start-stage", "2", "--resume-adapter", str(elsewhere)]
    ends = []
    for flags in (start, [*start, "--resume"]):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(full_run.folder, folder, ignore=shutil.ignore_patterns("stage2"))
        lines = [line for line in events(folder) if line.get("stage") != 2 and line.get("checkpoint") != "stage2"]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        code, printed = run_here(*flags)
        assert code == 0, printed
        assert [e["adapter"] for e in events(folder) if "adapter" in e] == [str(elsewhere)]
        ends.append(adapter_bytes(folder / "stage2"))
    assert ends[0] == ends[1] != adapter_bytes(full_run.folder / "stage2")


def test_stage_two_with_other_prompts_evaluates_the_pretrained_model_anew(
    run_here: Callable[..., Any], full_run: SimpleNamespace, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(full_run.folder, folder, ignore=shutil.ignore_patterns("stage2"))
    adapter = ["--resume-adapter", str(folder / "stage1"), "--overwrite"]
    code, printed = run_here("--start-stage", "2", *adapter, "--set", "eval.max_examples=4")
    assert code == 0, printed
    (pretrain,) = [e for e in events(folder) if e.get("checkpoint") == "pretrain"]
    assert pretrain["n"] == 4
    assert [e["step"] for e in events(folder) if e.get("stage") == 1] == list(range(1, STEPS + 1)), "Stage I stays"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("model.lora.r=8", ["model.lora.r", "4", "8"]),
        ("model.lora.alpha=16", ["model.lora.alpha"]),
        ("model.lora.target_modules=[q_proj, v_proj]", ["target_modules"]),
        ("model.name=OTHER", ["model.name"]),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused_in_one_line(
    run_here: Callable[..., Any], full_run: SimpleNamespace, tmp_path: Path, change: str, words: list[str]
) -> None:
    change = change.replace("OTHER", str(build_model(tmp_path / "other"))) if "OTHER" in change else change
    for flags in (["--start-stage", "2"], ["--eval-only"]):
        code, printed = run_here(*flags, "--resume-adapter", str(full_run.folder / "stage1"), "--set", change)
        assert (code, len(printed.splitlines())) == (2, 1)
        assert all(word in printed for word in [*words, "stage1"])
    assert not (tmp_path / "run").exists()


# ----------------------------------------------------------------------------------------- nothing is lost or redone


def test_a_second_run_does_not_overwrite_the_first(
    run_here: Callable[..., Any], full_run: SimpleNamespace, tmp_path: Path
) -> None:
    shutil.copytree(full_run.folder, tmp_path / "run")
    code, printed = run_here()
    assert (code, len(printed.splitlines())) == (2, 1)
    assert "--resume" in printed
    assert_same_run(tmp_path / "run", full_run.folder)
    code, printed = run_here("--overwrite", "--set", "train.stage1_epochs=0", "--set", "train.stage2_epochs=0")
    assert code == 0, printed
    assert [line["event"] for line in events(tmp_path / "run")] == ["eval"]


def test_resuming_a_finished_run_adds_nothing(
    run_here: Callable[..., Any], full_run: SimpleNamespace, tmp_path: Path
) -> None:
    shutil.copytree(full_run.folder, tmp_path / "run")
    code, printed = run_here("--resume")
    assert code == 0, printed
    assert_same_run(tmp_path / "run", full_run.folder)


def test_resuming_with_other_mathematics_is_refused(
    run_here: Callable[..., Any], full_run: SimpleNamespace, tmp_path: Path
) -> None:
    shutil.copytree(full_run.folder, tmp_path / "run")
    code, printed = run_here(
        "--resume", "--set", "train.beta1=0.5", "--set", "train.seed=9", "--set", "eval.batch_size=3"
    )
    assert (code, len(printed.splitlines())) == (2, 1)
    assert "train.beta1" in printed
    assert "train.seed" in printed
    assert "eval.batch_size" not in printed
    assert_same_run(tmp_path / "run", full_run.folder)


def test_resuming_on_other_rows_is_refused(run_here: Callable[..., Any], data_dir: Path, tmp_path: Path) -> None:
    folder, data = tmp_path / "run", tmp_path / "data"
    shutil.copytree(data_dir, data)
    flags = ["--set", f"dataset.name={data}", "train.stage1_epochs=1", "train.stage2_epochs=0"]
    assert run_here(*flags)[0] == 0
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    rows = (data / "train.jsonl").read_text()
    (data / "train.jsonl").write_text(rows.replace("10+0=?", "10+10=?"))
    code, printed = run_here("--resume", *flags)
    assert (code, printed.splitlines()) == (
        2, [f"--resume: {folder / 'stage1'} was trained on other rows or prompts of {data}; put them back, or start a "
            "new run with --set run_name=NAME"])  # fmt: skip
    assert {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()} == before
    (data / "train.jsonl").write_text(rows)
    assert run_here("--resume", *flags)[0] == 0


def test_stage_two_alone_asks_nothing_of_stage_ones_batches(
    run_here: Callable[..., Any], full_run: SimpleNamespace, tmp_path: Path
) -> None:
    start = ["--start-stage", "2", "--resume-adapter", str(full_run.folder / "stage1")]
    code, printed = run_here(*start, "--set", "train.stage1_batch_size=500", "train.stage2_epochs=0.4")
    assert code == 0, printed
    assert [line["global_step"] for line in events(tmp_path / "run") if line.get("stage") == 2] == [1]
    code, printed = run_here("--set", "train.stage1_batch_size=500", "run_name=other")
    assert (code, printed.splitlines()) == (
        2, ["train.stage1_batch_size: 500 is more than the 24 train examples; lower it"])  # fmt: skip


@pytest.mark.parametrize(
    "lost",
    [
        ["stage1", "stage2"],  # nothing saved yet: from the beginning
        ["stage1/state.json", "stage2"],  # killed while Stage I's end was being written
        ["stage2"],  # killed in the evaluation after Stage I
        ["stage2/state.json", "stage2/step_4/state.json"],
        ["stage2/state.json"],
    ],
    ids=str,
)
def test_resume_goes_on_from_the_newest_complete_checkpoint(
    run_here: Callable[..., Any], full_run: SimpleNamespace, tmp_path: Path, lost: list[str]
) -> None:
    """The lines past it are there already, with a half-written last one: they are redone, not doubled."""
    folder = tmp_path / "run"
    shutil.copytree(full_run.folder, folder)
    for place in lost:
        shutil.rmtree(folder / place) if (folder / place).is_dir() else (folder / place).unlink()
    with (folder / "metrics.jsonl").open("a") as stream:
        stream.write('{"event": "train", "stage": 2, "st')
    code, printed = run_here("--resume")
    assert code == 0, printed
    assert_same_run(folder, full_run.folder)
    assert (folder / "results.md").read_text() == (full_run.folder / "results.md").read_text()


def test_the_learning_rate_of_every_step_is_a_trapezoid(
    run_here: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Warm-up over three steps, and over the last two of six (lr_decay 0.5) it falls, in each stage anew."""
    used, step = [], train.torch.optim.AdamW.step

    def recorded(optimizer: Any, *args: Any, **how: Any) -> Any:
        used.extend(group["lr"] for group in optimizer.param_groups)
        return step(optimizer, *args, **how)

    monkeypatch.setattr(train.torch.optim.AdamW, "step", recorded)
    code, printed = run_here()
    assert code == 0, printed
    expected = [0.02 * share for share in (1 / 3, 2 / 3, 1, 1, 2 / 3, 1 / 3)] * 2
    assert used == pytest.approx(expected)
    logged = [line["learning_rate"] for line in events(tmp_path / "run") if line["event"] == "train"]
    assert logged == used


@pytest.mark.parametrize(("steps", "decay", "shares"), [
    (4, 0.0, [1, 1, 1, 1]),
    (4, 1.0, [1, 0.75, 0.5, 0.25]),
    (5, 0.4, [1, 1, 1, 1, 0.5]),
    (2, 0.1, [1, 1]),  # less than a step
])  # fmt: skip
def test_a_decay_ends_one_step_above_zero(steps: int, decay: float, shares: list[float]) -> None:
    keys = SimpleNamespace(learning_rate=1.0, warmup_steps=0, lr_decay=decay)
    assert [train.learning_rate(step, steps, keys) for step in range(1, steps + 1)] == pytest.approx(shares)


def test_old_mid_stage_checkpoints_are_pruned_on_request(run_here: Callable[..., Any], tmp_path: Path) -> None:
    code, printed = run_here(
        "--set", "train.checkpoint_every=1", "--set", "output.keep_checkpoints=2", "--set", "train.stage2_epochs=0"
    )
    assert code == 0, printed
    assert sorted(path.name for path in (tmp_path / "run" / "stage1").glob("step_*")) == ["step_4", "step_5"]


@pytest.fixture(scope="module")
def interrupted(config_file: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A run that got Ctrl-C in its first stage."""
    out = tmp_path_factory.mktemp("interrupted")
    argv = arguments(config_file, out)
    done = start_and_signal(argv, out / "run", 1, 1, signal.SIGINT, BROKEN_NETWORK)
    return SimpleNamespace(done=done, argv=argv, folder=out / "run", out=out)


def test_ctrl_c_saves_and_says_how_to_go_on(interrupted: SimpleNamespace) -> None:
    assert interrupted.done.returncode == 130, interrupted.done.stderr
    assert "Traceback" not in interrupted.done.stderr
    step = max(line["step"] for line in events(interrupted.folder) if line["event"] == "train")
    assert step < STEPS
    assert (interrupted.folder / "stage1" / f"step_{step}" / "state.json").exists()
    seen = [interrupted.folder / name for name in ("results.md", "curves.png")]
    assert f"So far: {seen[0]}, {seen[1]}." in interrupted.done.stderr
    assert all(file.exists() for file in seen)
    command = interrupted.done.stderr.strip().rpartition("Continue with: ")[2]
    assert shlex.split(command) == ["python", "train.py", *interrupted.argv, "--resume"]


def test_an_interrupted_run_ends_as_if_it_had_not_been(interrupted: SimpleNamespace, full_run: SimpleNamespace) -> None:
    done = command_line([*interrupted.argv, "--resume"])
    assert done.returncode == 0, done.stderr
    assert_same_run(interrupted.folder, full_run.folder)


def test_an_unreachable_wandb_server_goes_offline(interrupted: SimpleNamespace) -> None:
    assert list(interrupted.folder.glob("wandb/offline-run-*")), interrupted.done.stdout


def test_a_killed_run_ends_as_if_it_had_not_been(
    config_file: Path, run_here: Callable[..., Any], full_run: SimpleNamespace, tmp_path: Path
) -> None:
    killed = start_and_signal(
        arguments(config_file, tmp_path, "--set", "wandb_project=null"), tmp_path / "run", 2, 1, signal.SIGKILL
    )
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "run" / "stage2" / "state.json").exists()
    code, printed = run_here("--resume")
    assert code == 0, printed
    assert_same_run(tmp_path / "run", full_run.folder)


# ------------------------------------------------------------------------------------------------- validation


VALIDATION = ["--set", "eval.validation=8", "eval.samples=2", "wandb_project=null"]


@pytest.fixture(scope="module")
def validated(config_file: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A run that keeps 8 of its 24 train rows out: two stages of four steps, a checkpoint after the second of each."""
    out = tmp_path_factory.mktemp("validated")
    done = command_line(arguments(config_file, out, *VALIDATION))
    assert done.returncode == 0, done.stderr
    return SimpleNamespace(folder=out / "run", stdout=done.stdout)


def test_validation_rows_are_evaluated_at_every_checkpoint_and_never_trained_on(
    validated: SimpleNamespace, data_dir: Path
) -> None:
    lines = events(validated.folder)
    assert [(line["checkpoint"], line["n"]) for line in lines if line["event"] == "eval" and "held_out" in line] == [
        (f"stage{stage}/step_{step}", 8) for stage, step in ((1, 0), (1, 2), (1, 4), (2, 2), (2, 4))]  # fmt: skip
    order = [line.get("checkpoint") or (line["stage"], line["step"]) for line in lines]
    assert order == [
        "pretrain", "stage1/step_0", (1, 1), (1, 2), "stage1/step_2", (1, 3), (1, 4), "stage1/step_4", "stage1",
        (2, 1), (2, 2), "stage2/step_2", (2, 3), (2, 4), "stage2/step_4", "stage2"]  # fmt: skip
    assert {line["checkpoint"]: line["global_step"] for line in lines if "held_out" in line} == {
        "stage1/step_0": 0, "stage1/step_2": 2, "stage1/step_4": 4, "stage2/step_2": 6, "stage2/step_4": 8}  # fmt: skip
    rows = [json.loads(line) for line in (validated.folder / "samples.jsonl").read_text().splitlines()]
    held_out = {row["question"] for row in rows if "held_out" in row}
    tested = {row["question"] for row in rows if row["event"] == "eval" and "held_out" not in row}
    trained = {row["question"] for row in rows if row["event"] == "train"}
    given = {json.loads(line)["question"] for line in (data_dir / "train.jsonl").read_text().splitlines()}
    assert len(held_out) == 8
    assert trained
    assert held_out <= given
    assert not held_out & (tested | trained)
    assert all("vote_parallel_2" not in line for line in lines if "held_out" in line), "votes are for the test rows"


def test_validation_is_reported_as_such(validated: SimpleNamespace) -> None:
    table = (validated.folder / "results.md").read_text()
    assert re.search(r"^\| stage2/step_2 \(validation\) ", table, re.MULTILINE)
    assert re.search(r"^\| stage2 ", table, re.MULTILINE)
    (line,) = [line for line in validated.stdout.splitlines() if line.startswith("Best on the 8 validation rows: ")]
    scores = {line["checkpoint"]: line["acc_attempt2"] for line in events(validated.folder) if "held_out" in line}
    del scores["stage1/step_0"]  # before any training
    best = max(reversed(scores), key=scores.get)  # the latest of equals
    folder = {"stage1/step_4": "stage1", "stage2/step_4": "stage2"}.get(best, best)
    assert line.split(": ")[1].startswith(f"{validated.folder / folder}, Acc@t2 {scores[best]:.3f}")
    card = (validated.folder / "stage2" / "step_2" / "README.md").read_text()
    assert "`stage2/step_2` is this adapter on held-out rows" in card


@pytest.mark.parametrize(("stage", "step"), [(1, 2), (2, 2)])
def test_a_run_killed_in_its_validation_goes_on_as_if_it_had_not_been(
    run_here: Callable[..., Any], validated: SimpleNamespace, tmp_path: Path, stage: int, step: int
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(validated.folder, folder)
    for later in ("stage1", "stage2")[stage - 1 :]:
        (folder / later / "state.json").unlink()
    if stage == 1:
        shutil.rmtree(folder / "stage2")
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    here = next(i for i, line in enumerate(lines) if f'"stage{stage}/step_{step}"' in line)
    (folder / "metrics.jsonl").write_text("".join(lines[:here]))
    code, printed = run_here(*VALIDATION, "--resume")
    assert code == 0, printed
    assert_same_run(folder, validated.folder)


def test_a_checkpoint_made_by_a_signal_is_no_reason_to_validate(
    run_here: Callable[..., Any], validated: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    improve, steps = train.improve, []

    def signalled(*args: Any) -> Any:
        steps.append(1)
        if len(steps) == 1:  # step 1, where no checkpoint is due
            os.kill(os.getpid(), signal.SIGTERM)
        return improve(*args)

    monkeypatch.setattr(train, "improve", signalled)
    with monkeypatch.context() as patch:
        patch.setattr(train, "SIGNALS_SEEN", [])
        code, _ = run_here(*VALIDATION)
    assert code == 130
    assert (tmp_path / "run" / "stage1" / "step_1" / "state.json").exists()
    code, printed = run_here(*VALIDATION, "--resume")
    assert code == 0, printed
    assert_same_run(tmp_path / "run", validated.folder)


def test_stage_two_alone_validates_from_its_start_and_warns_of_an_adapter_that_saw_other_rows(
    run_here: Callable[..., Any], validated: SimpleNamespace, full_run: SimpleNamespace, tmp_path: Path
) -> None:
    start = ["--start-stage", "2", "--resume-adapter"]
    short = ["--set", "train.checkpoint_every=1", "output.keep_checkpoints=1"]
    for name, adapter, warned in (("own", validated.folder, False), ("other", full_run.folder, True)):
        code, printed = run_here(*start, str(adapter / "stage1"), *VALIDATION, *short, "--set", f"run_name={name}")
        assert code == 0, printed
        assert ("may have seen the eval.validation ones" in printed) == warned
        found = [line["checkpoint"] for line in events(tmp_path / name) if "held_out" in line]
        assert found == [f"stage2/step_{step}" for step in range(5)]
    code, printed = run_here("--smoke", "4", *VALIDATION)
    assert code == 0, printed
    assert {line["n"] for line in events(tmp_path / "run-smoke") if "held_out" in line} == {4}


def test_validation_rows_are_the_same_for_every_seed_and_leave_rows_to_train_on(
    run_here: Callable[..., Any], validated: SimpleNamespace, tmp_path: Path
) -> None:
    rows = [train.Example(str(i), "", []) for i in range(30)]
    kept, held_out = train.hold_out(rows, 10)
    assert sorted(rows.index(row) for row in kept + held_out) == list(range(30))
    assert {row.question for row in train.hold_out(rows[::-1], 10)[1]} == {row.question for row in held_out}
    twice = train.hold_out(rows + rows, 10)
    assert not {row.question for row in twice[0]} & {row.question for row in twice[1]}
    assert train.hold_out(rows, 0) == (rows, [])
    code, printed = run_here("--set", "eval.validation=24")
    assert (code, printed.strip()) == (2, "eval.validation: 24 leaves nothing of 24 train examples; lower it")
    shutil.copytree(validated.folder, tmp_path / "run", dirs_exist_ok=True)
    code, printed = run_here("--resume", *VALIDATION, "--set", "eval.validation=4")
    assert code == 2
    assert "eval.validation 8 -> 4" in printed


# ------------------------------------------------------------------------------------------------------ ends in trouble


def test_a_run_whose_steps_are_never_finite_ends_with_advice(
    run_here: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(train, "k3", lambda log_probs, _: log_probs * math.nan)
    code, printed = run_here("--set", "train.max_skipped_steps=3")
    assert code == 1
    assert "learning_rate" in printed
    steps = [line for line in events(tmp_path / "run") if line["event"] == "train"]
    assert [line["skipped"] for line in steps] == [True] * 3
    assert not (tmp_path / "run" / "stage1" / "state.json").exists()


def test_a_reward_that_raises_ends_the_run_by_name(
    run_here: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def odd_reward(predictions: list[str], targets: list[str], extract: Any) -> list[float]:
        raise KeyError("inside")

    monkeypatch.setitem(train.REWARD_FNS, "odd_reward", odd_reward)
    code, printed = run_here("--set", "reward.fn=odd_reward")
    assert code == 2
    assert "odd_reward" in printed
    assert "Traceback" not in printed


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ("dataset.input_field=qestion", "dataset.input_field"),
        ("dataset.name=no/where", "dataset.name"),
        ("model.name=no/where", "model.name"),
        ("train.stage1_batch_size=1000", "train.stage1_batch_size"),
        ("train.max_prompt_length_attempt2=57", "train.max_prompt_length_attempt2"),
    ],
)
def test_faults_of_data_and_model_exit_with_2_and_leave_the_name_free(
    run_here: Callable[..., Any], change: str, key: str
) -> None:
    code, printed = run_here("--set", change)
    assert code == 2
    assert printed.strip().splitlines()[-1].startswith(key)
    code, printed = run_here("--set", "train.stage1_epochs=0", "--set", "train.stage2_epochs=0")
    assert code == 0, printed


def test_a_place_that_cannot_be_written_is_named(run_here: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    code, printed = run_here(out=tmp_path / "file")
    assert code == 2
    assert "output.dir" in printed


def test_a_run_of_before_a_key_existed_goes_on_with_its_default(make_config: Any, tmp_path: Path) -> None:
    tree, file = make_config().model_dump(), tmp_path / "config.yaml"
    del tree["train"]["oversample"], tree["prompts"]["examples"]
    file.write_text(yaml.safe_dump(tree))
    train.check_same_config(file, make_config())
    with pytest.raises(train.UserError, match="train.oversample 1 -> 2"):
        train.check_same_config(file, make_config({"train.oversample": 2, "train.num_generations": 2}))


def test_a_run_with_a_key_that_is_gone_is_refused_by_its_name(make_config: Any, tmp_path: Path) -> None:
    tree, file = make_config().model_dump(), tmp_path / "config.yaml"
    tree["train"]["bygone"] = 0.0
    file.write_text(yaml.safe_dump(tree))
    with pytest.raises(train.UserError, match="train.bygone, which is no key any more"):
        train.check_same_config(file, make_config())
