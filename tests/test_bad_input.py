"""Whatever a user gets wrong ends with exit code 2 and one line a fault that says what and how to mend it.

Each case is a run in a forked child, in a folder of its own that holds a model, a dataset, a config and an earlier run
of the same name. The earlier run is to survive although most cases give --overwrite: a fault that were noticed too late
would cost it. Most faults must show before the weights are loaded, which takes minutes for a real model.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import transformers
import yaml
from conftest import (
    PLAIN_TEMPLATE,
    SELF_CORRECTION,
    build_data,
    build_model,
    fork_run,
    no_curves,
    output,
    with_keys,
    write_jsonl,
)

import reward_function
import train

CONFIG = {
    "run_name": "test",
    "model": {"name": "model", "max_seq_length": 160, "gradient_checkpointing": False, "lora": {"r": 4, "alpha": 8}},
    "dataset": {"name": "data", "input_field": "question", "target_field": "answer"},
    "prompts": {"self_correction": SELF_CORRECTION},
    "train": {
        "stage1_batch_size": 8,
        "stage2_batch_size": 8,
        "micro_batch_size": 4,
        "max_new_tokens_attempt1": 8,
        "max_new_tokens_attempt2": 12,
        "max_prompt_length_attempt1": 48,
        "max_prompt_length_attempt2": 100,
        "seed": 1,
        "checkpoint_every": 2,
    },
    "eval": {"batch_size": 6},
}
EARLIER = Path("outputs/test")
ADAPTER = "outputs/test/stage1"
STAGE2 = ["--start-stage", "2", "--resume-adapter", ADAPTER, "--overwrite"]


@dataclass
class Case:
    """A bad input: how it differs from a good one, and what is to be said about it."""

    name: str
    says: list[str]  # the lines on stderr; … stands for words that are a library's
    changes: dict[str, Any] = field(default_factory=dict)  # of config keys
    text: str | bytes | None = None  # the config file, if it is more than another key
    flags: list[str] = field(default_factory=lambda: ["--overwrite"])
    prepare: Callable[[], Any] | None = None  # called in the folder
    before: Callable[[], Any] | None = None  # called in the child
    earlier: bool = True  # is there an earlier run?
    loads: bool = False  # does the fault show only after the weights are loaded?
    config: str = "config.yaml"


# ------------------------------------------------------------------------------------------------- ways to be wrong


def rows(*odd: dict[str, Any], split: str = "train", good: int = 12) -> Callable[[], Any]:
    """A split of good rows and then odd ones."""
    return lambda: write_jsonl(
        Path(f"data/{split}.jsonl"), [{"question": f"{i}+2=?", "answer": str(i + 2)} for i in range(good)] + list(odd)
    )


def write(file: str, content: str | bytes) -> Callable[[], Any]:
    return lambda: Path(file).write_bytes(content if isinstance(content, bytes) else content.encode())


def remove(*places: str) -> Callable[[], Any]:
    return lambda: [shutil.rmtree(p) if Path(p).is_dir() else Path(p).unlink() for p in places]


def truncate(file: str) -> Callable[[], Any]:
    return lambda: os.truncate(file, os.path.getsize(file) // 2 - 3)


def edit_json(file: str, **changes: Any) -> Callable[[], Any]:
    return lambda: Path(file).write_text(json.dumps(json.loads(Path(file).read_text()) | changes))


def reward(fn: Callable[..., Any]) -> Callable[[], Any]:
    return lambda: reward_function.register_reward("odd")(fn)


def extractor(fn: Callable[..., Any]) -> Callable[[], Any]:
    return lambda: reward_function.register_extractor("odd")(fn)


def raise_it(*_: Any) -> Any:
    raise KeyError("inside")


def raise_on_outputs(text: str) -> str:
    return text if len(text) < 3 else raise_it()  # targets have two digits


def other_weights() -> None:
    build_model(Path("other"), hidden=64)
    shutil.copy("other/model.safetensors", "model/model.safetensors")


def without_a_layer() -> None:
    weights = train.load_file("model/model.safetensors")
    train.save_file(
        {k: v for k, v in weights.items() if ".layers.1.mlp" not in k},
        "model/model.safetensors",
        metadata={"format": "pt"},
    )


def parquet_of(columns: dict[str, list[Any]]) -> None:
    remove("data/train.jsonl")()
    datasets.Dataset.from_dict(columns).to_parquet("data/train.parquet")


NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
ONE_TURN = PLAIN_TEMPLATE.replace("in messages", "in messages[:2]")
NO_HISTORY = PLAIN_TEMPLATE.replace("in messages", "in messages[-1:]")

BILLIONS = (
    yaml.safe_dump({k: v for k, v in CONFIG.items() if k != "train"})
    + "train:\n- &a [1]\n"
    + "".join(
        f"- &{after} [{', '.join([f'*{name}'] * 9)}]\n" for name, after in zip("abcdefghij", "bcdefghijk", strict=True)
    )
)

SKIP = ", or leave such rows out with dataset.skip_faulty_rows=true"
CASES = [
    # ---- the config file
    Case(
        "config missing",
        [
            "--config nowhere.yaml: cannot be read (No such file or directory)",
        ],
        config="nowhere.yaml",
    ),
    Case("config is a folder", ["--config data: cannot be read (Is a directory)"], config="data"),
    Case("config below a file", ["--config config.yaml/x: cannot be read (Not a directory)"], config="config.yaml/x"),
    Case("config empty", ["--config config.yaml: must be a mapping of keys to values, and is empty"], text=""),
    Case(
        "config only a comment",
        [
            "--config config.yaml: must be a mapping of keys to values, and is empty",
        ],
        text="# nothing\n",
    ),
    Case(
        "config a list",
        [
            "--config config.yaml: must be a mapping of keys to values, and is list",
        ],
        text="- a\n- b\n",
    ),
    Case("config a word", ["--config config.yaml: must be a mapping of keys to values, and is str"], text="words"),
    Case(
        "config with tabs",
        [
            "--config config.yaml: not valid YAML: …, line 2, column 1: seed: 1 ^",
        ],
        text="train:\n\tseed: 1\n",
    ),
    Case("config unclosed", ["--config config.yaml: not valid YAML: …"], text="run_name: [a"),
    Case("config not text", ["--config config.yaml: cannot be read (…)"], text=b"\xff\xfe\x00\x81"),
    Case("config with a NUL", ["--config config.yaml: not valid YAML: …"], text=b"run_name: \x00a"),
    Case("config with a date that is none", ["--config config.yaml: not valid YAML: …"], text="run_name: 2025-13-13"),
    Case("config with a number that is none", ["--config config.yaml: not valid YAML: …"], text="run_name: !!int ''"),
    Case(
        "config with a truth that is none",
        [
            "--config config.yaml: not valid YAML: …",
        ],
        text="run_name: !!bool maybe",
    ),
    Case(
        "config with a Python object",
        [
            "--config config.yaml: not valid YAML: …",
        ],
        text="run_name: !!python/object/apply:os.getcwd []",
    ),
    Case("config nested without end", ["--config config.yaml: not valid YAML: …"], text="[" * 5000),
    Case("config two documents", ["--config config.yaml: not valid YAML: …"], text="a: 1\n---\nb: 2\n"),
    Case(
        "config of billions of numbers",
        [
            "train: input should be a valid dictionary or instance of TrainConfig (got …)",
        ],
        text=BILLIONS,
    ),
    # ---- keys and values
    Case(
        "unknown key",
        [
            "train.learnin_rate: unknown key; did you mean train.learning_rate?",
        ],
        {"train.learnin_rate": 1e-5},
    ),
    Case("unknown section", ["modle: unknown key; did you mean model?"], {"modle": {}}),
    Case(
        "key in another section",
        [
            "learning_rate: unknown key; it belongs to train.learning_rate",
        ],
        {"learning_rate": 1e-5},
    ),
    Case("key of two lines", ["train.'a\\nb': unknown key; did you mean train.beta2?"], {"train.a\nb": 1}),
    Case("key that is a number", ["7: keys should be strings (got 7)"], text=yaml.safe_dump(CONFIG | {7: 1})),
    Case(
        "text for a number",
        [
            "train.learning_rate: input should be a valid number (got 'high')",
        ],
        {"train.learning_rate": "high"},
    ),
    Case(
        "text for an integer",
        [
            "train.micro_batch_size: input should be a valid integer (got '8')",
        ],
        {"train.micro_batch_size": "8"},
    ),
    Case(
        "fraction for an integer",
        [
            "train.micro_batch_size: input should be a valid integer (got 8.5)",
        ],
        {"train.micro_batch_size": 8.5},
    ),
    Case("truth for a number", ["train.alpha: input should be a valid number (got True)"], {"train.alpha": True}),
    Case("number for text", ["run_name: input should be a valid string (got 7)"], {"run_name": 7}),
    Case(
        "list for a section",
        [
            "train: input should be a valid dictionary or instance of TrainConfig (got [1])",
        ],
        {"train": [1]},
    ),
    Case(
        "null for a section",
        [
            "model: input should be a valid dictionary or instance of ModelConfig (got None)",
        ],
        {"model": None},
    ),
    Case(
        "long text for a number",
        [
            "train.alpha: input should be a valid number (got 'xxxxxxxxxxxx...xxxxxxxxxxxxx')",
        ],
        {"train.alpha": "x" * 100_000},
    ),
    Case("zero rate", ["train.learning_rate: input should be greater than 0 (got 0)"], {"train.learning_rate": 0}),
    Case(
        "negative weight",
        [
            "train.beta1: input should be greater than or equal to 0 (got -0.1)",
        ],
        {"train.beta1": -0.1},
    ),
    Case(
        "not a number",
        [
            "train.beta2: input should be greater than or equal to 0 (got nan)",
        ],
        {"train.beta2": math.nan},
    ),
    Case("infinite", ["train.alpha: input should be a finite number (got inf)"], {"train.alpha": math.inf}),
    Case(
        "zero tokens",
        [
            "train.max_new_tokens_attempt1: input should be greater than or equal to 1 (got 0)",
        ],
        {"train.max_new_tokens_attempt1": 0},
    ),
    Case("dropout of all", ["model.lora.dropout: input should be less than 1 (got 1.0)"], {"model.lora.dropout": 1.0}),
    Case(
        "seed too large",
        [
            "train.seed: input should be less than 4294967296 (got 1180591620717411303424)",
        ],
        {"train.seed": 2**70},
    ),
    Case(
        "unknown choice",
        [
            "train.baseline: input should be 'leave_one_out', 'batch' or 'none' (got 'leave-one-out'); did you mean "
            "leave_one_out?",
        ],
        {"train.baseline": "leave-one-out"},
    ),
    Case(
        "oversampling with nothing to compare",
        [
            "train.oversample: 2 needs rollouts of one problem to compare; raise train.num_generations and set "
            "train.baseline to leave_one_out, or set it to 1",
        ],
        {"train.oversample": 2, "train.num_generations": 1},
    ),
    Case(
        "oversampling with a baseline of the whole batch",
        [
            "train.oversample: 2 needs rollouts of one problem to compare; raise train.num_generations and set "
            "train.baseline to leave_one_out, or set it to 1",
        ],
        {"train.oversample": 2, "train.num_generations": 2, "train.baseline": "batch"},
    ),
    Case(
        "corrections that do not fill a problem's rollouts",
        [
            "train.stage1_corrections: 3 does not divide train.num_generations, which is 4",
        ],
        {"train.num_generations": 4, "train.stage1_corrections": 3},
    ),
    Case(
        "no other first attempt",
        [
            "train.stage2_batch_size: baseline leave_one_out needs at least 2 first attempts a step; raise the batch or "
            "num_generations, or set train.baseline to none",
        ],
        {"train.num_generations": 4, "train.stage2_batch_size": 1, "train.stage2_corrections": 4},
    ),
    Case(
        "unknown decoder",
        [
            "model.decoder: input should be 'auto', 'graph' or 'generate' (got 'grph'); did you mean graph?",
        ],
        {"model.decoder": "grph"},
    ),
    Case(
        "unknown reward",
        [
            "reward.fn: is not registered; registered are exact_match, format_and_match, format_only, "
            "strict_format_and_match; did you mean format_and_match? (got 'format_and_mach')",
        ],
        {"reward.fn": "format_and_mach"},
    ),
    Case(
        "unknown extractor",
        [
            "reward.answer_extractor: is not registered; registered are gsm8k_hash, identity, math_final_answer; did "
            "you mean gsm8k_hash? (got 'gsm8k')",
        ],
        {"reward.answer_extractor": "gsm8k"},
    ),
    *(
        []
        if find_spec("vllm")
        else [
            Case(
                "vllm",
                [
                    "model.fast_inference: needs vLLM: pip install vllm==0.24.0, or set it to false (model.decoder is fast too) "
                    "(got True)",
                ],
                {"model.fast_inference": True},
            )
        ]
    ),
    Case(
        "vllm's share of the memory",
        [
            "model.fast_inference_gpu_mem: input should be less than 1 (got 1.5)",
        ],
        {"model.fast_inference_gpu_mem": 1.5},
    ),
    Case(
        "importance clip",
        [
            "train.importance_clip: input should be greater than 0 (got 0)",
        ],
        {"train.importance_clip": 0},
    ),
    Case(
        "required key missing",
        [
            "run_name: required, and not given",
        ],
        text=yaml.safe_dump({k: v for k, v in CONFIG.items() if k != "run_name"}),
    ),
    Case(
        "required section missing",
        [
            "dataset: required, and not given",
        ],
        text=yaml.safe_dump({k: v for k, v in CONFIG.items() if k != "dataset"}),
    ),
    Case(
        "attempt 2's prompt too short",
        [
            "train.max_prompt_length_attempt2: 50 cannot hold attempt 1's prompt and completion and the instruction "
            "(max_prompt_length_attempt1 48 + max_new_tokens_attempt1 8 + the instruction); raise it above 57",
        ],
        {"train.max_prompt_length_attempt2": 50},
    ),
    Case(
        "sequence too short",
        [
            "model.max_seq_length: 111 cannot hold train.max_prompt_length_attempt2 100 + "
            "train.max_new_tokens_attempt2 12; set it to 112 or more",
        ],
        {"model.max_seq_length": 111},
    ),
    Case(
        "split without a test size",
        [
            "dataset.test_split_size: required with dataset.split: how many of its rows to hold out for test",
        ],
        {"dataset.split": "train"},
    ),
    Case(
        "baseline without company",
        [
            "train.stage1_batch_size: baseline leave_one_out needs at least 2 first attempts a step; raise the batch or "
            "num_generations, or set train.baseline to none",
        ],
        {"train.stage1_batch_size": 1},
    ),
    Case(
        "three faults",
        [
            "train.sed: unknown key; did you mean train.seed?",
            "eval.batch_size: input should be greater than or equal to 1 (got 0)",
            "model.max_seq_length: 50 cannot hold train.max_prompt_length_attempt2 100 + "
            "train.max_new_tokens_attempt2 12; set it to 112 or more",
        ],
        {"train.sed": 1, "eval.batch_size": 0, "model.max_seq_length": 50},
    ),
    Case(
        "run_name climbs out",
        [
            "run_name: string should match pattern '^[A-Za-z0-9][A-Za-z0-9._-]*$' (got '../elsewhere')",
        ],
        {"run_name": "../elsewhere"},
    ),
    Case(
        "run_name is absolute",
        [
            "run_name: string should match pattern '^[A-Za-z0-9][A-Za-z0-9._-]*$' (got '/elsewhere')",
        ],
        {"run_name": "/elsewhere"},
    ),
    Case(
        "run_name is dots",
        [
            "run_name: string should match pattern '^[A-Za-z0-9][A-Za-z0-9._-]*$' (got '..')",
        ],
        {"run_name": ".."},
    ),
    Case(
        "run_name has a line",
        [
            "run_name: string should match pattern '^[A-Za-z0-9][A-Za-z0-9._-]*$' (got 'a\\n')",
        ],
        {"run_name": "a\n"},
    ),
    Case(
        "run_name is long",
        [
            "run_name: string should have at most 200 characters (got 'aaaaaaaaaaaa...aaaaaaaaaaaaa')",
        ],
        {"run_name": "a" * 300},
    ),
    # ---- command line
    Case("no config", ["the following arguments are required: --config (--help lists the flags)"], flags=[], config=""),
    Case("unknown flag", ["unrecognized arguments: --no-such-flag (--help lists the flags)"], flags=["--no-such-flag"]),
    Case(
        "set without value",
        [
            "argument --set: expected at least one argument (--help lists the flags)",
        ],
        flags=["--set"],
    ),
    Case("set without equals", ["--set 'train.seed': must read key.sub=value"], flags=["--set", "train.seed"]),
    Case("set without key", ["--set '=3': must read key.sub=value"], flags=["--set", "=3"]),
    Case(
        "set with an empty part",
        [
            "--set 'train..seed=3': must read key.sub=value",
        ],
        flags=["--set", "train..seed=3"],
    ),
    Case("set below a value", ["--set 'run_name.x=3': 'run_name' is not a section"], flags=["--set", "run_name.x=3"]),
    Case("set of an unknown key", ["train.sed: unknown key; did you mean train.seed?"], flags=["--set", "train.sed=3"]),
    Case(
        "set of a wrong type",
        [
            "train.seed: input should be a valid integer (got 'three')",
        ],
        flags=["--set", "train.seed=three"],
    ),
    Case("set of bad YAML", ["--set 'train.seed=[1': the value is not valid YAML"], flags=["--set", "train.seed=[1"]),
    Case(
        "set of a bad number",
        [
            "--set \"train.seed=!!int ''\": the value is not valid YAML",
        ],
        flags=["--set", "train.seed=!!int ''"],
    ),
    Case("set of two lines", ["--set 'a\\nb': must read key.sub=value"], flags=["--set", "a\nb"]),
    Case(
        "set climbs out",
        [
            "run_name: string should match pattern '^[A-Za-z0-9][A-Za-z0-9._-]*$' (got '../x')",
        ],
        flags=["--set", "run_name=../x"],
    ),
    Case(
        "stage three",
        [
            "argument --start-stage: invalid choice: 3 (choose from 1, 2) (--help lists the flags)",
        ],
        flags=["--start-stage", "3"],
    ),
    Case(
        "stage two without adapter",
        [
            "--start-stage 2: needs --resume-adapter DIR, the Stage I adapter to start from",
        ],
        flags=["--start-stage", "2"],
    ),
    Case(
        "stage two resumed without checkpoint",
        [
            "--start-stage 2: outputs/test has no checkpoint to --resume from; give --resume-adapter DIR",
        ],
        flags=["--start-stage", "2", "--resume"],
        earlier=False,
    ),
    Case(
        "adapter without use",
        [
            "--resume-adapter: goes with --start-stage 2 or --eval-only; --resume continues a run",
        ],
        flags=["--resume-adapter", ADAPTER],
    ),
    Case(
        "resume and overwrite",
        [
            "--overwrite: deletes what --resume would continue; give one of them",
        ],
        flags=["--resume", "--overwrite"],
    ),
    Case("smoke of three", ["--smoke 3: needs at least 4 examples, for two steps of two"], flags=["--smoke", "3"]),
    Case(
        "resume and eval-only",
        [
            "--resume: continues a run, --eval-only trains nothing; give one of them",
        ],
        flags=["--resume", "--eval-only"],
    ),
    Case(
        "smoke of a word",
        [
            "argument --smoke: invalid int value: 'x' (--help lists the flags)",
        ],
        flags=["--smoke", "x"],
    ),
    # ---- run folder
    Case(
        "an earlier run",
        [
            "output.dir: outputs/test already holds a run (metrics.jsonl, stage1, stage2); continue it with "
            "--resume, choose another with --set run_name=NAME, or delete it with --overwrite",
        ],
        flags=[],
    ),
    Case(
        "an earlier Stage II",
        [
            "output.dir: outputs/test already holds a run (stage2); continue it with --resume, choose another with "
            "--set run_name=NAME, or delete it with --overwrite",
        ],
        flags=STAGE2[:-1],
    ),
    Case(
        "overwriting the adapter to start from",
        [
            "--overwrite: would delete the adapter to start from, outputs/test/stage2",
        ],
        flags=["--start-stage", "2", "--resume-adapter", "outputs/test/stage2", "--overwrite"],
    ),
    Case(
        "resume with another config",
        [
            "--resume: outputs/test/config.yaml was made with another config (train.beta1 0.01 -> 0.5; train.seed 1 "
            "-> 9); put these back, or start a new run with --set run_name=NAME",
        ],
        {"train.beta1": 0.5, "train.seed": 9, "eval.batch_size": 3},
        flags=["--resume"],
    ),
    Case(
        "resume with a damaged config",
        [
            "--resume: outputs/test/config.yaml is damaged (…); delete it if no key changed",
        ],
        flags=["--resume"],
        prepare=write("outputs/test/config.yaml", "a: ["),
    ),
    Case(
        "resume with an empty config",
        [
            "--resume: outputs/test/config.yaml is damaged (…); delete it if no key changed",
        ],
        flags=["--resume"],
        prepare=write("outputs/test/config.yaml", ""),
    ),
    Case(
        "resume with a damaged state",
        [
            "outputs/test/stage2/state.json: is damaged; delete it to go on from the checkpoint before it",
        ],
        flags=["--resume"],
        prepare=write("outputs/test/stage2/state.json", "{"),
    ),
    Case(
        "resume with an odd state",
        [
            "outputs/test/stage2/state.json: is damaged; delete it to go on from the checkpoint before it",
        ],
        flags=["--resume"],
        prepare=write("outputs/test/stage2/state.json", "[]"),
    ),
    Case(
        "resume with a damaged optimizer",
        [
            "outputs/test/stage2/step_2/optimizer.safetensors: cannot be read: …; give another adapter or, to "
            "--resume from the checkpoint before it, delete the state.json beside it",
        ],
        flags=["--resume"],
        prepare=lambda: (
            remove("outputs/test/stage2/state.json")(),
            truncate("outputs/test/stage2/step_2/optimizer.safetensors")(),
        ),
    ),
    Case(
        "resume without optimizer",
        [
            "outputs/test/stage2/step_2/optimizer.safetensors: cannot be read: …; give another adapter or, to "
            "--resume from the checkpoint before it, delete the state.json beside it",
        ],
        flags=["--resume"],
        prepare=remove("outputs/test/stage2/state.json", "outputs/test/stage2/step_2/optimizer.safetensors"),
    ),
    Case(
        "resume with a damaged adapter",
        [
            "outputs/test/stage2/adapter_model.safetensors: cannot be read: …; give another adapter or, to --resume "
            "from the checkpoint before it, delete the state.json beside it",
        ],
        flags=["--resume"],
        prepare=truncate("outputs/test/stage2/adapter_model.safetensors"),
    ),
    Case(
        "an earlier run with odd metrics",
        [
            "output.dir: outputs/test already holds a run (stage1, stage2); continue it with --resume, choose "
            "another with --set run_name=NAME, or delete it with --overwrite",
        ],
        flags=[],
        prepare=write("outputs/test/metrics.jsonl", "5\n[1]\n"),
    ),
    Case(
        "output.dir is a file",
        [
            "output.dir: cannot write to config.yaml/test: Not a directory",
        ],
        {"output.dir": "config.yaml"},
    ),
    Case(
        "output.dir below a file",
        [
            "output.dir: cannot write to config.yaml/below/test: Not a directory",
        ],
        {"output.dir": "config.yaml/below"},
    ),
    Case(
        "run folder is a file",
        [
            "output.dir: cannot write to outputs/file: File exists",
        ],
        {"run_name": "file"},
        prepare=write("outputs/file", ""),
    ),
    Case(
        "output.dir with a NUL",
        [
            "output.dir: cannot write to a\0b/test: embedded null byte",
        ],
        {"output.dir": "a\0b"},
    ),
    Case(
        "output.dir with a long name",
        [
            "output.dir: cannot write to …: File name too long",
        ],
        {"output.dir": "a" * 300},
    ),
    # ---- dataset
    Case("dataset missing", ["dataset.name: cannot load nowhere: …"], {"dataset.name": "nowhere"}),
    Case(
        "dataset missing on the hub",
        [
            "dataset.name: cannot load nobody/nothing: …",
        ],
        {"dataset.name": "nobody/nothing"},
    ),
    Case("dataset of an unknown kind", ["dataset.name: cannot load config.yaml: …"], {"dataset.name": "config.yaml"}),
    Case("dataset with a long name", ["dataset.name: cannot load …"], {"dataset.name": "a" * 300}),
    Case(
        "dataset folder empty",
        [
            "dataset.name: data holds no train/test .jsonl, .parquet, .csv files",
        ],
        prepare=remove("data/train.jsonl", "data/test.jsonl"),
    ),
    Case(
        "dataset file empty",
        [
            "dataset.name: cannot load data/train.jsonl: it is empty",
        ],
        prepare=write("data/train.jsonl", ""),
    ),
    Case(
        "dataset without rows",
        [
            "dataset.name: cannot load data/train.parquet: …",
        ],
        prepare=lambda: parquet_of({"question": [], "answer": []}),
    ),
    Case(
        "dataset without test",
        [
            "dataset.name: data has no test split; it has train. Set dataset.split to one of them and "
            "dataset.test_split_size to hold rows out",
        ],
        prepare=remove("data/test.jsonl"),
    ),
    Case(
        "dataset without the split",
        [
            "dataset.split: data has no split 'dev'; it has test, train",
        ],
        {"dataset.split": "dev", "dataset.test_split_size": 3},
    ),
    Case(
        "test size of all",
        [
            "dataset.test_split_size: 6 leaves nothing to train on: test has 6 rows",
        ],
        {"dataset.split": "test", "dataset.test_split_size": 6},
    ),
    Case(
        "no input column",
        [
            "dataset.input_field: no column 'qestion' in data (train); it has question, answer; did you mean question?",
        ],
        {"dataset.input_field": "qestion"},
    ),
    Case(
        "no target column",
        [
            "dataset.target_field: no column 'solution' in data (train); it has question, answer; did you mean "
            "question?",
        ],
        {"dataset.target_field": "solution"},
    ),
    Case("jsonl cut short", ["dataset.name: cannot load data/train.jsonl: …"], prepare=truncate("data/train.jsonl")),
    Case(
        "jsonl no JSON",
        [
            "dataset.name: cannot load data/train.jsonl: …",
        ],
        prepare=write("data/train.jsonl", "question,answer\n1,2\n"),
    ),
    Case(
        "jsonl binary",
        [
            "dataset.name: cannot load data/train.jsonl: …",
        ],
        prepare=write("data/train.jsonl", bytes(range(256))),
    ),
    Case(
        "parquet corrupt",
        [
            "dataset.name: cannot load data/train.parquet: …",
        ],
        prepare=lambda: (remove("data/train.jsonl")(), write("data/train.parquet", b"PAR1" + bytes(90))()),
    ),
    Case(
        "question a list",
        [
            "dataset.input_field: row 0 of train in data is a list, not text; mend or remove the row" + SKIP,
        ],
        prepare=rows({"question": ["q"], "answer": "1"}, good=0),
    ),
    Case(
        "question null",
        [
            "dataset.input_field: row 12 of train in data is null, not text; mend or remove the row" + SKIP,
        ],
        prepare=rows({"question": None, "answer": "1"}),
    ),
    Case(
        "question empty",
        [
            "dataset.input_field: row 12 of train in data is empty; mend or remove the row" + SKIP,
        ],
        prepare=rows({"question": " ", "answer": "1"}),
    ),
    Case(
        "target null",
        [
            "dataset.target_field: row 12 of train in data is null, not text; mend or remove the row" + SKIP,
        ],
        prepare=rows({"question": "q", "answer": None}),
    ),
    Case(
        "target empty",
        [
            "dataset.target_field: row 3 of test in data is empty; mend or remove the row" + SKIP,
        ],
        prepare=rows({"question": "q", "answer": ""}, split="test", good=3),
    ),
    Case(
        "target a truth",
        [
            "dataset.target_field: row 0 of train in data is a bool, not text; mend or remove the row" + SKIP,
        ],
        prepare=rows({"question": "q", "answer": True}, good=0),
    ),
    Case(
        "target without answer",
        [
            "dataset.target_field: row 0 of train in data: gsm8k_hash finds no answer in '2'; mend the row or choose "
            "another reward.answer_extractor" + SKIP,
        ],
        {"reward.answer_extractor": "gsm8k_hash"},
        prepare=rows(),
    ),
    Case(
        "fewer rows than a batch",
        [
            "train.stage2_batch_size: 30 is more than the 24 train examples; lower it",
        ],
        {"train.stage2_batch_size": 30},
    ),
    Case(
        "less than a step",
        [
            "train.stage1_epochs: 0.1 of 24 examples is less than one step of 8; raise it, or set 0 to skip the stage",
        ],
        {"train.stage1_epochs": 0.1},
    ),
    Case(
        "train rows all test rows",
        [
            "dataset.name: every train row of data is also a test row; nothing is left to learn",
        ],
        prepare=lambda: shutil.copy("data/test.jsonl", "data/train.jsonl"),
    ),
    Case(
        "prompts over budget",
        [
            "train.max_prompt_length_attempt1: all 24 train prompts are longer than 4 tokens; the shortest has 25",
        ],
        {"train.max_prompt_length_attempt1": 4},
    ),
    Case(
        "instruction over budget",
        [
            "train.max_prompt_length_attempt2: 60 cannot hold attempt 1's prompt (48) and completion (8) and the "
            "instruction (30 tokens); set it to 86 or more",
        ],
        {"train.max_prompt_length_attempt2": 60},
    ),
    # ---- model, tokenizer, template
    Case(
        "model missing",
        [
            "model.name: no tokenizer at nowhere (no folder here, so a hub id): …",
        ],
        {"model.name": "nowhere"},
    ),
    Case(
        "model missing on the hub",
        [
            "model.name: no tokenizer at nobody/nothing (no folder here, so a hub id): …",
        ],
        {"model.name": "nobody/nothing"},
    ),
    Case("model with a long name", ["model.name: no tokenizer at …"], {"model.name": "a" * 300}),
    Case(
        "model is a file",
        [
            "model.name: no tokenizer at config.yaml (no folder here, so a hub id): …",
        ],
        {"model.name": "config.yaml"},
    ),
    Case(
        "model without tokenizer",
        [
            "model.name: model has no tokenizer (tokenizer.json)",
        ],
        prepare=remove("model/tokenizer.json", "model/tokenizer_config.json"),
    ),
    Case(
        "model with a damaged tokenizer",
        [
            "model.name: no tokenizer at model: …",
        ],
        prepare=truncate("model/tokenizer.json"),
    ),
    Case(
        "model without weights",
        [
            "model.name: model cannot be loaded: …",
        ],
        loads=True,
        prepare=remove("model/model.safetensors"),
    ),
    Case(
        "model with truncated weights",
        [
            "model.name: model cannot be loaded: …",
        ],
        loads=True,
        prepare=truncate("model/model.safetensors"),
    ),
    Case(
        "model with corrupt weights",
        [
            "model.name: model cannot be loaded: …",
        ],
        loads=True,
        prepare=write("model/model.safetensors", b"\xff" * 400),
    ),
    Case(
        "model with another's weights",
        [
            "model.name: model cannot be loaded: its weights do not fit its config.json: lm_head.weight lacks or has "
            "another shape",
        ],
        loads=True,
        prepare=other_weights,
    ),
    Case(
        "model without a layer's weights",
        [
            "model.name: model cannot be loaded: its weights do not fit its config.json: "
            "model.layers.1.mlp.down_proj.weight lacks or has another shape",
        ],
        loads=True,
        prepare=without_a_layer,
    ),
    Case(
        "model without config.json",
        [
            "model.name: model cannot be loaded: …",
        ],
        prepare=remove("model/config.json"),
        loads=True,
    ),
    Case(
        "model with a damaged config.json",
        [
            "model.name: no tokenizer at model: …",
        ],
        prepare=truncate("model/config.json"),
    ),
    Case(
        "model of an unknown type",
        [
            "model.name: model cannot be loaded: …",
        ],
        prepare=edit_json("model/config.json", model_type="nope"),
        loads=True,
    ),
    Case(
        "model without heads",
        [
            "model.name: model cannot be loaded: …",
        ],
        prepare=edit_json("model/config.json", num_attention_heads=0),
        loads=True,
    ),
    Case(
        "model with odd positions",
        [
            "model.name: model cannot be loaded: …",
        ],
        prepare=edit_json("model/config.json", rope_parameters={"rope_type": "x"}),
        loads=True,
    ),
    Case(
        "tokenizer of another model",
        [
            "model.name: the tokenizer of model has tokens that its model lacks: it is another model's",
        ],
        prepare=lambda: build_model(Path("model"), vocab_size=50),
        loads=True,
    ),
    Case(
        "model with an odd size",
        [
            "model.name: no tokenizer at model: …",
        ],
        prepare=edit_json("model/config.json", hidden_size="many"),
    ),
    Case(
        "model without chat template",
        [
            "model.name: model has no chat template; set model.chat_template to one or pick a chat model",
        ],
        prepare=remove("model/chat_template.jinja"),
    ),
    Case(
        "4 bits on a CPU",
        [
            "model.load_in_4bit: needs a GPU; set it to false on a CPU",
        ],
        {"model.load_in_4bit": True},
    ),
    Case(
        "no such modules",
        [
            "model.lora.target_modules: model has no query; leave it out or correct it",
        ],
        {"model.lora.target_modules": ["query"]},
        loads=True,
    ),
    Case(
        "one module missing",
        [
            "model.lora.target_modules: model has no query; leave it out or correct it",
        ],
        {"model.lora.target_modules": ["q_proj", "query"]},
        loads=True,
    ),
    Case(
        "the head adapted",
        [
            "model.lora.target_modules: the output head cannot be adapted; leave lm_head out",
        ],
        {"model.lora.target_modules": ["lm_head"]},
        loads=True,
    ),
    Case(
        "template refuses a system message",
        [
            "prompts.system: the chat template of model refuses it: System role not supported",
        ],
        {"model.chat_template": NO_SYSTEM + PLAIN_TEMPLATE, "prompts.system": "Be brief."},
    ),
    Case(
        "template without the worked examples",
        [
            "prompts.examples: the chat template of model does not render each of their turns exactly once; show the "
            "examples inside prompts.system instead",
        ],
        {"model.chat_template": NO_HISTORY, "prompts.examples": [{"input": "1+1=?", "output": "2"}]},
    ),
    Case(
        "worked example without output",
        [
            "prompts.examples.0.output: required, and not given",
        ],
        {"prompts.examples": [{"input": "1+1=?"}]},
    ),
    Case(
        "template without the second turn",
        [
            "model.chat_template: does not render the user's second turn (prompts.self_correction)",
        ],
        {"model.chat_template": ONE_TURN},
    ),
    Case(
        "template without history",
        [
            "model.chat_template: does not render an earlier assistant turn exactly once",
        ],
        {"model.chat_template": NO_HISTORY},
    ),
    Case(
        "template invalid",
        [
            "model.chat_template: the chat template of model refuses it: …",
        ],
        {"model.chat_template": "{% for %}"},
    ),
    Case(
        "template fails",
        [
            "model.chat_template: the chat template of model refuses it: …",
        ],
        {"model.chat_template": "{{ messages.nope.nope }}"},
    ),
    Case(
        "template file missing",
        [
            "model.chat_template: no Jinja template, and no file: 'nowhere.jinja': No such file or directory",
        ],
        {"model.chat_template": "nowhere.jinja"},
    ),
    Case(
        "template file not text",
        [
            "model.chat_template: no Jinja template, and no file: 'odd.jinja': …",
        ],
        {"model.chat_template": "odd.jinja"},
        prepare=write("odd.jinja", b"\xff"),
    ),
    Case(
        "template a long text",
        [
            "model.chat_template: no Jinja template, and no file: 'user says …",
        ],
        {"model.chat_template": "user says " * 40},
    ),
    # ---- adapters
    Case(
        "adapter missing",
        [
            "--resume-adapter nowhere: no adapter_config.json there; give a folder such as outputs/NAME/stage1",
        ],
        flags=["--eval-only", "--resume-adapter", "nowhere"],
    ),
    Case(
        "adapter a file",
        [
            "--resume-adapter config.yaml: no adapter_config.json there; give a folder such as outputs/NAME/stage1",
        ],
        flags=["--eval-only", "--resume-adapter", "config.yaml"],
    ),
    Case(
        "adapter's config damaged",
        [
            "--resume-adapter outputs/test/stage1: adapter_config.json is not valid JSON",
        ],
        flags=STAGE2,
        prepare=truncate(f"{ADAPTER}/adapter_config.json"),
    ),
    Case(
        "adapter of another base",
        [
            "--resume-adapter outputs/test/stage1: trained with model.name other, the config says model",
        ],
        flags=STAGE2,
        prepare=edit_json(f"{ADAPTER}/adapter_config.json", base_model_name_or_path="other"),
    ),
    Case(
        "adapter of another rank",
        [
            "--resume-adapter outputs/test/stage1: trained with model.lora.r 4, the config says 8",
        ],
        {"model.lora.r": 8},
        flags=STAGE2,
    ),
    Case(
        "adapter of another alpha",
        [
            "--resume-adapter outputs/test/stage1: trained with model.lora.alpha 8.0, the config says 16.0",
        ],
        {"model.lora.alpha": 16},
        flags=STAGE2,
    ),
    Case(
        "adapter of another scale",
        [
            "--resume-adapter outputs/test/stage1: trained with use_rslora, which this trainer does not do",
        ],
        flags=STAGE2,
        prepare=edit_json(f"{ADAPTER}/adapter_config.json", use_rslora=True),
    ),
    Case(
        "adapter of other modules",
        [
            "--resume-adapter outputs/test/stage1: trained with model.lora.target_modules …, the config says ['q_proj']",
        ],
        {"model.lora.target_modules": ["q_proj"]},
        flags=STAGE2,
    ),
    Case(
        "adapter without weights",
        [
            "outputs/test/stage1/adapter_model.safetensors: cannot be read: …; give another adapter or, to --resume "
            "from the checkpoint before it, delete the state.json beside it",
        ],
        flags=STAGE2,
        prepare=remove(f"{ADAPTER}/adapter_model.safetensors"),
    ),
    Case(
        "adapter truncated",
        [
            "outputs/test/stage1/adapter_model.safetensors: cannot be read: …; give another adapter or, to --resume "
            "from the checkpoint before it, delete the state.json beside it",
        ],
        flags=STAGE2,
        prepare=truncate(f"{ADAPTER}/adapter_model.safetensors"),
    ),
    Case(
        "adapter corrupt",
        [
            "outputs/test/stage1/adapter_model.safetensors: cannot be read: …; give another adapter or, to --resume "
            "from the checkpoint before it, delete the state.json beside it",
        ],
        flags=STAGE2,
        prepare=write(f"{ADAPTER}/adapter_model.safetensors", b"\xff" * 400),
    ),
    Case(
        "adapter with other shapes",
        [
            "--resume-adapter outputs/test/stage1: is of another base model: "
            "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight (4, 64) does not match",
        ],
        flags=STAGE2,
        loads=True,
        prepare=lambda: shutil.copy("model/model.safetensors", f"{ADAPTER}/adapter_model.safetensors"),
    ),
    Case(
        "adapter's state damaged",
        [
            "outputs/test/stage1/state.json: is damaged; delete it to go on from the checkpoint before it",
        ],
        flags=["--eval-only", "--resume-adapter", ADAPTER],
        prepare=write(f"{ADAPTER}/state.json", "{"),
        loads=True,
    ),
    # ---- rewards and extractors
    Case(
        "reward raises",
        [
            "reward.fn: reward function 'odd' raised KeyError('inside') on ['PPPPPPPP']",
        ],
        {"reward.fn": "odd"},
        before=reward(raise_it),
        earlier=False,
        loads=True,
    ),
    Case(
        "reward returns too few",
        [
            "reward.fn: reward function 'odd' returned 1 rewards for 6 predictions, the first of them ['PPPPPPPP']",
        ],
        {"reward.fn": "odd"},
        before=reward(lambda p, t, e: [1.0]),
        earlier=False,
        loads=True,
    ),
    Case(
        "reward returns NaN",
        [
            "reward.fn: reward function 'odd' returned nan for 'PPPPPPPP'",
        ],
        {"reward.fn": "odd"},
        before=reward(lambda p, t, e: [math.nan] * len(p)),
        earlier=False,
        loads=True,
    ),
    Case(
        "reward returns text",
        [
            "reward.fn: reward function 'odd' returned 'good' for 'PPPPPPPP'",
        ],
        {"reward.fn": "odd"},
        before=reward(lambda p, t, e: ["good"] * len(p)),
        earlier=False,
        loads=True,
    ),
    Case(
        "reward returns nothing",
        [
            "reward.fn: reward function 'odd' raised TypeError(\"'NoneType' object is not iterable\") on ['PPPPPPPP']",
        ],
        {"reward.fn": "odd"},
        before=reward(lambda p, t, e: None),
        earlier=False,
        loads=True,
    ),
    Case(
        "reward by path is not there",
        [
            "reward.fn: trl.rewards.acuracy_reward cannot be imported: AttributeError: …",
        ],
        {"reward.fn": ["exact_match", "trl.rewards.acuracy_reward"]},
    ),
    Case(
        "reward by path in no module",
        [
            "reward.fn: json.rewards.right cannot be imported: ModuleNotFoundError: No module named 'json.rewards'",
        ],
        {"reward.fn": "json.rewards.right"},
    ),
    Case(
        "reward by path is no function",
        [
            "reward.fn: json.__all__ is no function",
        ],
        {"reward.fn": "json.__all__"},
    ),
    Case(
        "reward in a file is no function",
        [
            "reward.fn: is no function in own.py (got 'limit')",
        ],
        {"reward.module": "own.py", "reward.fn": "limit"},
        prepare=write("own.py", "limit = 3\n"),
    ),
    Case(
        "weights of another length",
        [
            "reward.weights: must be as many as the functions in reward.fn: 2, not 1 (got [1.0])",
        ],
        {"reward.fn": ["exact_match", "json.dumps"], "reward.weights": [1.0]},
    ),
    Case(
        "reward asks for a column that is not there",
        [
            "reward.fn: trl.rewards.accuracy_reward asks for solution, and is given question, answer, target_answer, "
            "prompts, completions, completion_ids; say which of them it is, as in reward.columns.solution=target_answer",
        ],
        {"reward.fn": "trl.rewards.accuracy_reward"},
    ),
    Case(
        "reward's column is not there",
        [
            "reward.columns.solution: no column 'answr' in data (train); it has question, answer, target_answer; did you "
            "mean answer?",
        ],
        {"reward.fn": "trl.rewards.accuracy_reward", "reward.columns": {"solution": "answr"}},
    ),
    Case(
        "reward by path raises",
        [
            "reward.fn: reward function 'json.loads' raised TypeError(…) on ['PPPPPPPP']",
        ],
        {"reward.fn": "json.loads", "reward.columns": {"s": "answer"}},
        earlier=False,
        loads=True,
    ),
    Case(
        "extractor raises on targets",
        [
            "reward.answer_extractor: answer extractor 'odd' raised KeyError('inside') on '10'",
        ],
        {"reward.answer_extractor": "odd"},
        before=extractor(raise_it),
    ),
    Case(
        "extractor returns a number",
        [
            "reward.answer_extractor: answer extractor 'odd' returned 2, not a string, for '10'",
        ],
        {"reward.answer_extractor": "odd"},
        before=extractor(len),
    ),
    Case(
        "extractor raises on outputs",
        [
            "reward.answer_extractor: answer extractor 'odd' raised KeyError('inside') on 'PPPPPPPP'",
        ],
        {"reward.answer_extractor": "odd"},
        before=extractor(raise_on_outputs),
        earlier=False,
        loads=True,
    ),
]


# --------------------------------------------------------------------------------------------------------- the runs


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, a dataset, a config and a finished run, all named relative to it."""
    folder = tmp_path_factory.mktemp("sound")
    build_model(folder / "model")
    build_data(folder / "data")
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG))

    def before() -> None:
        os.chdir(folder)
        no_curves()

    code = fork_run(["--config", "config.yaml"], folder.parent / "sound_log", before)
    assert code == 0, output(folder.parent / "sound_log")
    return folder


@pytest.fixture
def run_case(sound: Path, tmp_path: Path) -> Callable[[Case], SimpleNamespace]:
    def run(case: Case) -> SimpleNamespace:
        here, log = Path(shutil.copytree(sound, tmp_path / "here")), tmp_path / "log"
        config = yaml.safe_dump(with_keys(CONFIG, case.changes)) if case.text is None else case.text
        (here / "config.yaml").write_bytes(config if isinstance(config, bytes) else config.encode())
        if not case.earlier:
            shutil.rmtree(here / EARLIER)
        if case.prepare:
            within(here, case.prepare)
        before, argv = tree(here), ["--config", case.config] * bool(case.config) + case.flags

        def in_child() -> None:
            os.chdir(here)
            sys.dont_write_bytecode = True
            no_curves()
            if not case.loads:
                transformers.AutoModelForCausalLM.from_pretrained = weights_are_loaded
            if case.before:
                case.before()
            tell_writes(here, tmp_path / "writes")

        code = fork_run(argv, log, in_child)
        writes = (tmp_path / "writes").read_text().splitlines()
        return SimpleNamespace(code=code, says=output(log).splitlines(), before=before, after=tree(here), writes=writes)

    return run


def within(folder: Path, do: Callable[[], Any]) -> None:
    """Calls `do` with `folder` as the working directory."""
    old = os.getcwd()
    os.chdir(folder)
    try:
        do()
    finally:
        os.chdir(old)


def tree(folder: Path) -> dict[str, bytes | None]:
    """Every file's bytes; None for a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


class LoadedTooSoon(BaseException):
    """No handler of train.py takes this one: the run ends with a traceback."""


def weights_are_loaded(*_: Any, **__: Any) -> None:
    raise LoadedTooSoon


def tell_writes(here: Path, diary: Path) -> None:
    """Writes down every place that this process opens for writing, makes, renames or removes, but for the libraries'
    cache of datasets and models."""
    pid, descriptor = os.getpid(), os.open(diary, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    libraries = (str(datasets.config.HF_CACHE_HOME), os.devnull)

    def watch(event: str, args: tuple) -> None:
        if os.getpid() != pid or event not in ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir"):
            return
        if not isinstance(args[0], str | Path) or (event == "open" and not (args[2] or 0) & (os.O_WRONLY | os.O_RDWR)):
            return
        place = os.path.abspath(args[0])
        by_descriptor = event in ("os.remove", "os.rmdir") and args[-1] != -1  # as rmtree does it: relative to that
        if not place.startswith(libraries) and not by_descriptor:
            os.write(descriptor, f"{event} {os.path.relpath(place, here)}\n".encode())

    sys.addaudithook(watch)


def matches(line: str, expected: str) -> bool:
    return bool(re.fullmatch(".+".join(map(re.escape, expected.split("…"))), line))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bad_input(case: Case, run_case: Callable[[Case], SimpleNamespace]) -> None:
    done = run_case(case)
    assert done.code == 2, done.says
    assert len(done.says) == len(case.says), done.says
    for line, expected in zip(done.says, case.says, strict=True):
        assert matches(line, expected), line
    assert [write for write in done.writes if not in_run_folder(write.split(" ", 1)[1], case)] == []
    assert [p for p in done.after.keys() - done.before.keys() if not in_run_folder(p, case)] == []
    lost = [place for place, content in done.before.items() if done.after.get(place, "gone") != content]
    assert lost == [], "what was there is there unchanged"


def in_run_folder(place: str, case: Case) -> bool:
    folder = Path(case.changes.get("output.dir", "outputs"), str(case.changes.get("run_name", "test")))
    return Path(place).is_relative_to(folder)


def test_there_are_many_cases() -> None:
    assert len({case.name for case in CASES}) == len(CASES) >= 150
