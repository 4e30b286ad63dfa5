"""Every class of fault in a config is named with its key, all at once, before anything slow is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT, with_keys
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import train


def faults(raw: dict[str, Any]) -> list[str]:
    with pytest.raises(train.UserError) as caught:
        train.check_config(raw)
    return str(caught.value).splitlines()


@pytest.fixture
def config_file(raw_config: dict[str, Any], tmp_path: Path) -> Path:
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(raw_config))
    return file


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("train.learnin_rate", 1e-5, ["did you mean", "learning_rate"]),
        ("modle", {}, ["did you mean", "model"]),
        ("model.lora.rank", 8, ["unknown"]),
        ("train.lora", {"r": 8}, ["model.lora"]),
        ("learning_rate", 1e-5, ["train.learning_rate"]),  # the right name in the wrong section
        ("train.max_grad_norm", "high", ["number", "high"]),
        ("train.micro_batch_size", "8", ["integer", "'8'"]),
        ("train.micro_batch_size", 8.0, ["integer", "8.0"]),
        ("train.micro_batch_size", True, ["integer", "True"]),
        ("train.alpha", True, ["number", "True"]),
        ("run_name", 7, ["string", "7"]),
        ("model.load_in_4bit", 1, ["boolean", "1"]),
        ("model.load_in_4bit", "yes", ["boolean", "yes"]),
        ("model.gradient_checkpointing", "unslot", ["unslot"]),
        ("model.lora.target_modules", "q_proj", ["list", "q_proj"]),
        ("model.lora.target_modules", [], ["at least 1"]),
        ("model.lora", None, ["LoraConfig", "None"]),
        ("train", 5, ["5"]),
        ("train.learning_rate", 0, ["greater than 0"]),
        ("train.learning_rate", float("nan"), ["nan"]),
        ("train.lr_decay", 1.5, ["less than or equal to 1"]),
        ("train.beta1", -0.1, ["greater than or equal to 0", "-0.1"]),
        ("train.beta1", float("inf"), ["finite"]),
        ("train.generation_temperature", 0, ["greater than 0"]),
        ("train.max_new_tokens_attempt1", 0, ["greater than or equal to 1"]),
        ("train.num_generations", 0, ["greater than or equal to 1"]),
        ("train.stage1_epochs", -1, ["greater than or equal to 0"]),
        ("train.seed", -1, ["greater than or equal to 0"]),
        ("train.checkpoint_every", 0, ["greater than or equal to 1"]),
        ("model.lora.dropout", 1.0, ["less than 1"]),
        ("eval.generation_temperature", -1.0, ["greater than or equal to 0"]),
        ("train.baseline", "leave-one-out", ["did you mean leave_one_out"]),
        ("train.length_norm", "token", ["'sequence' or 'constant'"]),
        ("reward.fn", "format_and_mach", ["did you mean format_and_match"]),
        ("reward.fn", ["exact_match", "exact_mach"], ["'exact_mach' is not registered", "did you mean exact_match"]),
        ("reward.fn", "no_such_package.rewards.right", ["no package no_such_package", "reward.module"]),
        ("reward.fn", "trl.rewards.accuracy reward", ["is not registered"]),
        ("reward.fn", [], ["list of names", "[]"]),
        ("reward.fn", ["exact_match", 1], ["list of names"]),
        ("reward.fn", 5, ["list of names", "5"]),
        ("reward.weights", [1.0, 0.2], ["reward.fn: 1, not 2"]),
        ("reward.weights", "high", ["list", "high"]),
        ("reward.columns", "solution", ["dict", "solution"]),
        ("reward.completions", "conversation", ["did you mean conversational"]),
        ("reward.answer_extractor", "gsm8k", ["gsm8k_hash"]),
        ("run_name", "../elsewhere", ["../elsewhere"]),
        *([] if find_spec("vllm") else [("model.fast_inference", True, ["vLLM"])]),
    ],
)
def test_a_fault_is_named_by_key_value_and_mend(raw_config: dict, key: str, value: Any, words: list[str]) -> None:
    lines = faults(with_keys(raw_config, {key: value}))
    mine = [line for line in lines if line.startswith(f"{key}:")]
    assert mine, lines
    for word in words:
        assert word in "\n".join(mine)


@pytest.mark.parametrize("key", ["run_name", "model", "model.name", "dataset", "dataset.name", "dataset.input_field"])
def test_a_missing_required_key_is_named(raw_config: dict, key: str) -> None:
    *parents, name = key.split(".")
    node = raw_config
    for part in parents:
        node = node[part]
    del node[name]
    assert any(line.startswith(f"{key}: required") for line in faults(raw_config))


@pytest.mark.parametrize(
    ("changes", "key", "number"),
    [
        ({"train.max_prompt_length_attempt2": 56}, "train.max_prompt_length_attempt2", "57"),
        ({"model.max_seq_length": 111}, "model.max_seq_length", "112"),
        ({"dataset.split": "train"}, "dataset.test_split_size", None),
        ({"train.stage1_batch_size": 1}, "train.stage1_batch_size", None),
        ({"train.stage2_batch_size": 1, "train.baseline": "batch"}, "train.stage2_batch_size", None),
    ],
)
def test_keys_that_cannot_go_together(raw_config: dict, changes: dict, key: str, number: str | None) -> None:
    (line,) = faults(with_keys(raw_config, changes))
    assert line.startswith(f"{key}:")
    assert number is None or number in line


@pytest.mark.parametrize(
    "changes",
    [
        {"model.max_seq_length": 112},
        {"train.stage1_batch_size": 1, "train.baseline": "none"},
        {"train.stage1_batch_size": 1, "train.num_generations": 2},
        {"train.stage1_epochs": 0.5, "train.warmup_steps": 3},
        {"dataset.split": "train", "dataset.test_split_size": 4},
        {"model.gradient_checkpointing": "unsloth"},
        {"reward.fn": ["exact_match", "trl.rewards.think_format_reward"], "reward.weights": [1, 0.2]},
        {"reward.fn": ["exact_match"], "reward.weights": ["1e-1"]},
    ],
)
def test_keys_that_can_go_together(make_config: Callable[..., Any], changes: dict) -> None:
    make_config(changes)


# One fault of each class, and the fault between keys that has to be seen beside it.
@pytest.mark.parametrize(
    "fault",
    [
        {"train.learnin_rate": 1e-5},
        {"train.micro_batch_size": True},
        {"train.beta1": -1.0},
        {"reward.fn": "nope"},
        {"reward.fn": ["exact_match", 5]},
        {"reward.weights": [1.0, 1.0]},
        {"model.lora.target_modules": ["q_proj", 5]},
        {"model.gradient_checkpointing": "unslot"},
        {"run_name": 7},
        {"run_name": "a/b"},
        {"dataset.input_field": None},
        {"model.name": 3},
    ],
)
def test_every_fault_is_listed_at_once_also_those_between_keys(raw_config: dict, fault: dict) -> None:
    lines = faults(with_keys(raw_config, fault | {"train.max_prompt_length_attempt2": 20, "eval.batch_sise": 3}))
    for key in [*fault, "train.max_prompt_length_attempt2", "eval.batch_sise"]:
        assert any(line.startswith(key) for line in lines), f"{key} is not in {lines}"


def test_a_missing_section_does_not_hide_faults_between_keys(raw_config: dict) -> None:
    raw = with_keys(raw_config, {"train.max_prompt_length_attempt2": 20})
    del raw["dataset"]
    lines = faults(raw)
    assert any(line.startswith("dataset") for line in lines)
    assert any(line.startswith("train.max_prompt_length_attempt2") for line in lines)


@pytest.mark.parametrize("text", ["5e-6", "1e-5", "1.0e-5", "0.00001", "1E-5"])
def test_numbers_without_a_dot_are_numbers(config_file: Path, text: str) -> None:
    """YAML 1.1 reads 5e-6 as text."""
    written = config_file.read_text().replace("learning_rate: 0.01", f"learning_rate: {text}")
    config_file.write_text(written)
    assert train.read_config(str(config_file)).train.learning_rate == float(text)


@pytest.mark.parametrize("seed", [2**64, 2**70])
def test_a_seed_that_torch_cannot_take_is_refused(raw_config: dict, seed: int) -> None:
    assert faults(with_keys(raw_config, {"train.seed": seed}))[0].startswith("train.seed")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["mapping"]),
        ("# only a comment\n", ["mapping"]),
        ("- a\n- b\n", ["mapping", "list"]),
        ("just words", ["mapping", "str"]),
        ("run_name: [unclosed", ["YAML"]),
        ("train:\n\tseed: 1\n", ["YAML", "line 2"]),
        ("a: b: c", ["YAML"]),
    ],
)
def test_a_file_that_is_no_mapping(tmp_path: Path, text: str, words: list[str]) -> None:
    file = tmp_path / "odd.yaml"
    file.write_text(text)
    with pytest.raises(train.UserError) as caught:
        train.read_config(str(file))
    assert len(str(caught.value).splitlines()) == 1
    for word in [str(file), *words]:
        assert word in str(caught.value)


def test_a_file_that_is_not_text_or_not_there(tmp_path: Path) -> None:
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00\x81")
    for file in (binary, tmp_path / "missing.yaml", tmp_path):
        with pytest.raises(train.UserError, match="--config"):
            train.read_config(str(file))


def test_set_overrides_a_key(config_file: Path) -> None:
    overrides = [
        "train.seed=7",
        "model.lora.r=2",
        "train.learning_rate=5e-6",
        "wandb_project=null",
        "prompts.system='Say: a = b'",
        "model.chat_template_kwargs.enable_thinking=false",
        "model.lora.target_modules=[q_proj, v_proj]",
        "train.seed=8",
    ]
    config = train.read_config(str(config_file), overrides)
    assert (config.train.seed, config.model.lora.r, config.train.learning_rate) == (8, 2, 5e-6)
    assert config.wandb_project is None
    assert config.prompts.system == "Say: a = b"
    assert config.model.chat_template_kwargs == {"enable_thinking": False}
    assert config.model.lora.target_modules == ["q_proj", "v_proj"]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.seed", ["key.sub=value"]),
        ("=3", ["key.sub=value"]),
        ("train..seed=3", ["key.sub=value"]),
        ("run_name.x=3", ["run_name", "section"]),
        ("train.sed=3", ["train.sed", "did you mean", "seed"]),
        ("train.seed=three", ["train.seed", "three"]),
        ("train.seed=", ["train.seed"]),
        ("train.seed=[1", ["train.seed"]),
        ("train.max_prompt_length_attempt2=20", ["train.max_prompt_length_attempt2"]),
    ],
)
def test_set_faults(config_file: Path, override: str, words: list[str]) -> None:
    with pytest.raises(train.UserError) as caught:
        train.read_config(str(config_file), [override])
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--start-stage", "2"], ["--start-stage 2", "--resume-adapter"]),
        (["--resume-adapter", "somewhere"], ["--resume-adapter"]),
        (["--smoke", "1"], ["--smoke"]),
        (["--eval-only", "--resume-adapter", "nowhere"], ["nowhere", "adapter_config.json"]),
    ],
)
def test_flags_that_do_not_go_together(config_file: Path, flags: list[str], words: list[str]) -> None:
    with pytest.raises(train.UserError) as caught:
        train.parse_command_line(["--config", str(config_file), *flags])
    for word in words:
        assert word in str(caught.value)


def test_smoke_is_a_config_of_its_own(config_file: Path) -> None:
    _, config = train.parse_command_line(["--config", str(config_file), "--smoke", "4"])
    assert config.run_name == "test-smoke"
    assert config.eval.max_examples == 4
    assert config.train.stage1_batch_size <= 4
    _, config = train.parse_command_line(
        ["--config", str(config_file), "--smoke", "4", "--set", "train.stage1_epochs=0", "--set", "eval.max_examples=2"]
    )
    assert (config.train.stage1_epochs, config.eval.max_examples) == (0, 2)


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
trees = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["name", "lora", "r", "seed", "x"]) | st.integers(), inner, max_size=3)
    ),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    key=st.sampled_from([*train.known_keys(), "model", "train", "dataset", "eval", "model.lora", "odd", "train.odd"]),
    value=trees,
)
def test_whatever_stands_under_a_key_is_taken_or_refused_by_name(raw_config: dict, key: str, value: Any) -> None:
    try:
        train.check_config(with_keys(raw_config, {key: value}))
    except train.UserError as error:
        assert all(": " in line for line in str(error).splitlines() if line.strip())
        assert key in str(error) or "max_" in str(error) or "batch_size" in str(error) or "test_split" in str(error)


def test_one_shipped_config_explains_every_key() -> None:
    file = ROOT / "configs" / "tiny.yaml"
    config, written = train.read_config(str(file)), yaml.safe_load(file.read_text())
    assert set(written) == set(train.Config.model_fields), "a reader learns the algorithm from the YAML: every key"
    for section in ("model", "dataset", "prompts", "reward", "train", "eval", "output"):
        assert set(written[section]) == set(type(getattr(config, section)).model_fields)


@pytest.mark.parametrize("name", ["arithmetic", "gsm8k", "math"])
def test_the_other_shipped_configs_hold_what_they_change_and_nothing_else(name: str) -> None:
    file = ROOT / "configs" / f"{name}.yaml"
    written, config = yaml.safe_load(file.read_text()), train.read_config(str(file))
    assert "configs/tiny.yaml explains every key" in " ".join(file.read_text().replace("#", " ").split())
    for section, keys in ((s, keys) for s, keys in written.items() if isinstance(keys, dict)):
        for key in keys:
            field = type(getattr(config, section)).model_fields[key]
            assert field.is_required() or field.get_default() != getattr(getattr(config, section), key), key


@pytest.fixture
def without_torch(tmp_path: Path) -> dict[str, str]:
    """An environment in which importing anything slow is an error."""
    for package in ("torch", "unsloth", "transformers", "peft", "datasets", "wandb", "matplotlib"):
        (tmp_path / "poison" / package).mkdir(parents=True)
        (tmp_path / "poison" / package / "__init__.py").write_text(f"raise SystemExit('{package} was imported')\n")
    return os.environ | {"PYTHONPATH": str(tmp_path / "poison")}


def test_a_bad_config_exits_with_2_before_torch_is_imported(config_file: Path, without_torch: dict[str, str]) -> None:
    command = [sys.executable, str(ROOT / "train.py"), "--config", str(config_file)]
    faulty = ["--set", "train.learnin_rate=1e-5", "--set", "reward.fn=nope", "--set", "model.max_seq_length=20"]
    done = subprocess.run([*command, *faulty], env=without_torch, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    keys = [line.split(":")[0] for line in done.stderr.splitlines()]
    assert sorted(keys) == ["model.max_seq_length", "reward.fn", "train.learnin_rate"]
    # and the environment does what it says: without a fault the import is reached
    done = subprocess.run(command, env=without_torch, capture_output=True, text=True, check=False)
    assert "torch was imported" in done.stderr


def test_naming_a_packages_reward_imports_nothing(config_file: Path, without_torch: dict[str, str]) -> None:
    """It would import transformers before Unsloth, and cost a faulty config seconds."""
    package = Path(without_torch["PYTHONPATH"]) / "trl"
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemExit('trl was imported')\n")
    command = [sys.executable, str(ROOT / "train.py"), "--config", str(config_file), "--set"]
    keys = ["reward.fn=[trl.rewards.accuracy_reward, trl.rewards.think_format_reward]", "reward.weights=[1.0]"]
    done = subprocess.run([*command, *keys], env=without_torch, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("reward.weights: must be as many as the functions in reward.fn: 2, not 1")


@pytest.mark.parametrize(
    "flags", [["--no-such-flag"], ["--start-stage", "3"], ["--start-stage", "2"], ["--smoke", "x"]]
)
def test_a_bad_command_line_exits_with_2(config_file: Path, without_torch: dict[str, str], flags: list[str]) -> None:
    command = [sys.executable, str(ROOT / "train.py"), "--config", str(config_file), *flags]
    done = subprocess.run(command, env=without_torch, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert flags[0] in done.stderr
    assert "Traceback" not in done.stderr
