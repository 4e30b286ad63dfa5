"""A disk that is full or forbids to write, numbers that are not finite, secrets: what must not cost or leak anything.

Runs are forked as in test_kill.py. A fault strikes one writer, once the first checkpoint is there; the run ends with a
line that names the place, that checkpoint is whole, and --resume without the fault ends as the run that never failed.
"""

from __future__ import annotations

import builtins
import errno
import io
import json
import math
import os
import resource
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft.peft_model
import pytest
import safetensors
import transformers
from conftest import ROOT, assert_same_ending, build_model, ending, fork_run, no_curves, output

import train

STEPS = 3  # a stage, with a checkpoint after each
SHORT = [
    f"train.stage1_epochs={STEPS / 6}",
    f"train.stage2_epochs={STEPS / 6}",
    "train.checkpoint_every=1",
    "output.keep_checkpoints=null",
]
SECRETS = {"WANDB_API_KEY": "5ec12e7" * 6, "HF_TOKEN": "hf_5ecretsecret", "HUGGING_FACE_HUB_TOKEN": "hf_0ther5ecret"}


@pytest.fixture(scope="module")
def short_run(tiny_run: Callable[..., list[str]]) -> Callable[..., list[str]]:
    """As tiny_run, of three steps a stage; `more` may be flags and keys to --set."""
    return lambda out, *more: tiny_run(out, *SHORT, *more)


@pytest.fixture(scope="module")
def whole(short_run: Callable[..., list[str]], tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """The run without a fault, with each of its checkpoints."""
    out = tmp_path_factory.mktemp("whole")
    code = fork_run(short_run(out), out / "log", no_curves)
    assert code == 0, output(out / "log")
    return SimpleNamespace(folder=out / "run", ending=ending(out / "run"))


def modules_in(folder: Path) -> None:
    """Makes transformers copy a model's own code into this folder."""
    transformers.dynamic_module_utils.HF_MODULES_CACHE = str(folder / "modules")


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below, the place of the folder itself, which a model card names, left out."""
    files = [file for file in folder.rglob("*") if file.is_file()]
    return {str(file.relative_to(folder)): file.read_bytes().replace(str(folder).encode(), b"") for file in files}


# ----------------------------------------------------------------------------------------------------- disk faults


class Full(io.FileIO):
    """A file on a disk with room for one more byte."""

    def write(self, data: Any) -> int:
        super().write(bytes(data)[:1])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def fault_in_open(name: str, number: int, due: Callable[[], bool]) -> None:
    """Files of this name cannot be opened for writing (EACCES), or not be written (ENOSPC)."""
    inner = builtins.open

    def opens(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        mine = isinstance(file, str | Path) and Path(file).name == name and set(mode) & set("wax+") and due()
        if not mine:
            return inner(file, mode, *args, **kwargs)
        if number == errno.EACCES:
            raise PermissionError(number, os.strerror(number), str(file))
        how = os.O_WRONLY | os.O_CREAT | (os.O_APPEND if "a" in mode else os.O_TRUNC)
        stream = io.BufferedWriter(Full(os.open(file, how, 0o600), "w"))
        return stream if "b" in mode else io.TextIOWrapper(stream, encoding="utf-8")

    builtins.open = io.open = opens


def fault_in_call(module: Any, name: str, number: int, due: Callable[[], bool], of: str = "") -> None:
    """A function fails as the system's own would; `of`: only for a file of this name."""
    inner = getattr(module, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        if due() and (not of or Path(args[-1]).name == of):
            raise OSError(number, os.strerror(number))
        return inner(*args, **kwargs)

    setattr(module, name, call)


def fault_in_rust(module: Any, name: str, number: int, due: Callable[[], bool], error: type[Exception]) -> None:
    """A writer of safetensors or tokenizers fails with its own class and words, and half a file."""
    inner = getattr(module, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        if not due():
            return inner(*args, **kwargs)
        raise error(f"Error while serializing: I/O error: {os.strerror(number)} (os error {number})")

    setattr(module, name, call)


def fault_in_fsync_of_a_checkpoint(number: int, due: Callable[[], bool]) -> None:
    inner = os.fsync

    def call(descriptor: int) -> None:
        if due() and "step_2" in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(number, os.strerror(number))
        inner(descriptor)

    os.fsync = call


def fault_in_tokenizer(number: int, due: Callable[[], bool]) -> None:
    inner = transformers.PreTrainedTokenizerFast._save_pretrained

    def save(self: Any, *args: Any, **kwargs: Any) -> Any:
        if due():
            raise Exception(f"{os.strerror(number)} (os error {number})")
        return inner(self, *args, **kwargs)

    transformers.PreTrainedTokenizerFast._save_pretrained = save


def opening(name: str) -> Callable[..., None]:
    return partial(fault_in_open, name)


def calling(module: Any, name: str, **more: Any) -> Callable[..., None]:
    return lambda number, due: fault_in_call(module, name, number, due, **more)


def writing_weights(module: Any, name: str) -> Callable[..., None]:
    return lambda number, due: fault_in_rust(module, name, number, due, safetensors.SafetensorError)


# The writer that fails, and the place that its line names, in the run folder.
WRITERS = {
    "metrics.jsonl": (opening("metrics.jsonl"), "metrics.jsonl"),
    "samples.jsonl": (opening("samples.jsonl"), "samples.jsonl"),
    "results.json": (opening(".results.json.tmp"), "results.json"),
    "results.md": (opening(".results.md.tmp"), "results.md"),
    "curves.png": (opening(".curves.png.tmp"), "curves.png"),
    "the adapter": (writing_weights(peft.peft_model, "safe_save_file"), "stage1/step_2"),
    "adapter_config.json": (opening("adapter_config.json"), "stage1/step_2"),
    "the optimizer": (writing_weights(train, "save_file"), "stage1/step_2"),
    "tokenizer.json": (fault_in_tokenizer, "stage1/step_2"),
    "tokenizer_config.json": (opening("tokenizer_config.json"), "stage1/step_2"),
    "the model card": (opening("README.md"), "stage1/step_2"),
    "state.json": (opening("state.json"), "stage1/step_2"),
    "fsync": (calling(os, "fsync"), "results.json"),
    "fsync of a checkpoint": (fault_in_fsync_of_a_checkpoint, "stage1/step_2"),
    "rename of a checkpoint": (calling(os, "rename"), "stage1/step_2"),
    "replacing results.json": (calling(os, "replace", of="results.json"), "results.json"),
    "moving the stage's end": (calling(os, "replace", of="adapter_model.safetensors"), "stage1"),
    "making a folder": (calling(os, "mkdir"), "stage1/step_2"),
}


@pytest.mark.parametrize(
    ("writer", "number"),
    [(writer, errno.ENOSPC) for writer in WRITERS]
    + [
        (writer, errno.EACCES)
        for writer in (
            "samples.jsonl",
            "results.json",
            "curves.png",
            "the adapter",
            "state.json",
            "rename of a checkpoint",
        )
    ],
)
def test_a_write_that_fails_costs_nothing(
    short_run: Callable[..., list[str]], whole: SimpleNamespace, tmp_path: Path, writer: str, number: int
) -> None:
    install, place = WRITERS[writer]
    folder, log = tmp_path / "run", tmp_path / "log"
    first = folder / "stage1" / "step_1"

    def before() -> None:
        if writer != "curves.png":
            no_curves()
        install(number, lambda: (first / "state.json").exists())

    code = fork_run(short_run(tmp_path), log, before)
    assert code in (1, 2), output(log)
    (line,) = output(log).splitlines()
    assert line.startswith(f"{folder / place}: cannot be written: ")
    assert os.strerror(number) in line
    assert line.endswith("; mend that and go on with --resume")
    assert contents(first) == contents(whole.folder / "stage1" / "step_1")
    assert fork_run(short_run(tmp_path, "--resume"), log, no_curves) == 0, output(log)
    assert_same_ending(folder, whole, writer)


def test_a_config_that_cannot_be_written_costs_nothing(
    short_run: Callable[..., list[str]], whole: SimpleNamespace, tmp_path: Path
) -> None:
    """config.yaml is written first of all: also over the one of the run that is resumed."""
    folder, log = tmp_path / "run", tmp_path / "log"

    def stopped(name: str, due: Callable[[], bool]) -> None:
        no_curves()
        fault_in_open(name, errno.ENOSPC, due)

    for flags in ([], ["--resume"]):
        code = fork_run(short_run(tmp_path, *flags), log, partial(stopped, ".config.yaml.tmp", lambda: True))
        assert (code, len(output(log).splitlines())) == (1, 1)
        assert output(log).startswith(f"{folder / 'config.yaml'}: cannot be written: No space left on device")
        if not flags:
            late = partial(stopped, "metrics.jsonl", (folder / "stage1/step_1/state.json").exists)
            assert fork_run(short_run(tmp_path), log, late) == 1
            before = contents(folder)
    assert contents(folder).items() >= before.items()
    assert fork_run(short_run(tmp_path, "--resume"), log, no_curves) == 0, output(log)
    assert_same_ending(folder, whole, "config.yaml")


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (peft.peft_model, "safe_save_file"),
        (train, "save_file"),
        (transformers.PreTrainedTokenizerFast, "save_pretrained"),
    ],
    ids=["adapter", "optimizer", "tokenizer"],
)
def test_errors_of_libraries_written_in_rust_are_named(
    short_run: Callable[..., list[str]], tmp_path: Path, module: Any, name: str
) -> None:
    """A true error, by a limit on the size of files: their words and classes are theirs."""
    log = tmp_path / "log"

    def before() -> None:
        no_curves()
        inner = getattr(module, name)

        def limited(*args: Any, **kwargs: Any) -> Any:
            hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
            resource.setrlimit(resource.RLIMIT_FSIZE, (20, hard))
            try:
                return inner(*args, **kwargs)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))

        setattr(module, name, limited)

    assert fork_run(short_run(tmp_path), log, before) == 1, output(log)
    (line,) = output(log).splitlines()
    assert line.startswith(f"{tmp_path}/run/stage1/step_1: cannot be written: ")
    assert "File too large" in line


# -------------------------------------------------------------------------------------- numbers that are not finite


def gradients_break_at(*moments: tuple[int, int]) -> Callable[[], None]:
    """In these (stage, step) one weight's gradient is infinite; the loss is as finite as ever."""

    def before() -> None:
        no_curves()
        accumulate, improve, now = train.accumulate_gradients, train.improve, [0, 0]

        def count(policy: Any, optimizer: Any, attempts: Any, stage: int, config: Any) -> dict[str, Any]:
            now[:] = [stage, now[1] + 1 if now[0] == stage else 1]
            return improve(policy, optimizer, attempts, stage, config)

        def break_one(policy: Any, *rest: Any) -> list[dict[str, float]]:
            stats = accumulate(policy, *rest)
            if tuple(now) in moments:
                list(policy.trainable.values())[-1].grad.view(-1)[0] = math.inf
            return stats

        train.improve, train.accumulate_gradients = count, break_one

    return before


BY_EIGHT = [
    "train.stage1_batch_size=8",
    "train.stage1_epochs=1",
    "train.stage2_batch_size=8",
    "train.stage2_epochs=1",
    "train.max_skipped_steps=2",
]


def test_a_gradient_that_is_not_finite_skips_its_step_alone(
    short_run: Callable[..., list[str]], tmp_path: Path
) -> None:
    folder, log = tmp_path / "run", tmp_path / "log"
    code = fork_run(short_run(tmp_path, *BY_EIGHT), log, gradients_break_at((1, 2), (2, 1), (2, 3)))
    assert code == 0, output(log)  # two in all, in a row, would have ended it
    lines = train.read_lines(folder / "metrics.jsonl")
    steps = {(line["stage"], line["step"]): line for line in lines if line["event"] == "train"}
    assert [place for place, line in steps.items() if line["skipped"]] == [(1, 2), (2, 1), (2, 3)]
    for line in steps.values():
        assert math.isfinite(line["loss"])
        assert (line["grad_norm"] is None) == line["skipped"], "JSON has no infinity"
    weights = [
        contents(folder / place)["adapter_model.safetensors"]
        for place in ("stage1/step_1", "stage1/step_2", "stage1", "stage2/step_1")
    ]
    assert weights[0] == weights[1] != weights[2] == weights[3]
    samples = train.read_lines(folder / "samples.jsonl")
    for (stage, step), line in steps.items():
        count = sum((row.get("stage"), row.get("step")) == (stage, step) for row in samples)
        assert count == (8 if line["skipped"] else 4), "all that went into a skipped step is kept to look at"


def test_too_many_skipped_steps_in_a_row_end_the_run_and_keep_the_checkpoint_before(
    short_run: Callable[..., list[str]], tmp_path: Path
) -> None:
    folder, log = tmp_path / "run", tmp_path / "log"
    assert fork_run(short_run(tmp_path, *BY_EIGHT), log, gradients_break_at((2, 1), (2, 2))) == 1
    (line,) = output(log).splitlines()
    assert line == (
        "loss or gradient was not finite in 2 steps in a row (stage 2, step 2); their samples are in "
        f"{folder}/samples.jsonl; lower train.learning_rate"
    )
    last, end = (contents(folder / place)["adapter_model.safetensors"] for place in ("stage2/step_1", "stage1"))
    assert last == end
    assert fork_run(short_run(tmp_path, *BY_EIGHT, "--resume"), log, no_curves) == 0, output(log)
    assert contents(folder / "stage2")["adapter_model.safetensors"] != end


def test_a_reward_that_is_not_finite_ends_the_run_and_costs_nothing(
    short_run: Callable[..., list[str]], whole: SimpleNamespace, tmp_path: Path
) -> None:
    folder, log = tmp_path / "run", tmp_path / "log"
    first = folder / "stage1" / "step_1"

    def before() -> None:
        no_curves()
        inner = train.REWARD_FNS["format_and_match"]

        def grade(*args: Any) -> list[float]:
            rewards = inner(*args)
            return [math.nan, *rewards[1:]] if (first / "state.json").exists() else rewards

        train.REWARD_FNS["format_and_match"] = grade

    assert fork_run(short_run(tmp_path), log, before) == 2
    (line,) = output(log).splitlines()
    assert line.startswith("reward.fn: reward function 'format_and_match' returned nan for ")
    assert contents(first) == contents(whole.folder / "stage1" / "step_1")
    assert fork_run(short_run(tmp_path, "--resume"), log, no_curves) == 0, output(log)
    assert_same_ending(folder, whole, "reward")


# ------------------------------------------------------------------------------------------------------------ secrets


def test_keys_and_tokens_are_written_nowhere(short_run: Callable[..., list[str]], tmp_path: Path) -> None:
    def before() -> None:
        os.environ |= SECRETS | {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}

    flags = ["wandb_project=score-tests", "train.stage2_epochs=0"]
    code = fork_run(short_run(tmp_path, *flags), tmp_path / "log", before)
    assert code == 0, output(tmp_path / "log")
    assert list(tmp_path.glob("run/wandb/offline-run-*")), "W&B was there to tell them"
    files = contents(tmp_path)
    assert {"log.out", "log.err", "run/config.yaml", "run/results.json", "run/metrics.jsonl"} <= set(files)
    told = [(place, name) for place, text in files.items() for name, value in SECRETS.items() if value.encode() in text]
    assert told == []


def test_code_that_comes_with_a_model_is_run_only_when_asked_for(
    short_run: Callable[..., list[str]], tmp_path: Path
) -> None:
    assert train.ModelConfig(name="x").trust_remote_code is False
    for file in (ROOT / "configs").glob("*.yaml"):
        assert train.read_config(str(file)).model.trust_remote_code is False, file
    model, marker = build_model(tmp_path / "model"), tmp_path / "it_ran"
    config = json.loads((model / "config.json").read_text())
    own = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    (model / "config.json").write_text(json.dumps(config | {"model_type": "own", "auto_map": own}))
    (model / "own.py").write_text(f"open({str(marker)!r}, 'w').close()\n")
    log = tmp_path / "log"
    assert fork_run(short_run(tmp_path, f"model.name={model}"), log) == 2
    (line,) = output(log).splitlines()
    assert line.startswith("model.name: ")
    assert "trust_remote_code" in line
    assert not marker.exists()
    trusting = short_run(tmp_path, f"model.name={model}", "model.trust_remote_code=true")
    fork_run(trusting, log, partial(modules_in, tmp_path))
    assert marker.exists(), "and the model of this test does run code when it is asked to"
