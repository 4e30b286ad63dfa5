"""Configs, flags and adapters: what is wrong is named by its key, all at once, before anything slow is imported."""

from __future__ import annotations

import copy
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import PLAIN_TEMPLATE, ROOT, fork_run, no_curves, output, with_keys
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import train


def refusal(call: Callable[..., Any], *args: Any) -> list[str]:
    """The lines of the UserError that a call raises."""
    with pytest.raises(train.UserError) as caught:
        call(*args)
    return str(caught.value).split("\n")


def named(lines: list[str]) -> list[str]:
    """What each line of a refusal is about."""
    assert all(": " in line for line in lines), lines
    return sorted(line.split(": ")[0] for line in lines)


@pytest.fixture
def config_file(raw_config: dict[str, Any], tmp_path: Path) -> Path:
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(raw_config))
    return file


# ----------------------------------------------------------------------------------------------------------------- keys

BAD_VALUES = {
    "modle": [{}], "learning_rate": [1e-5], "train.learnin_rate": [1e-5], "train.lora": [{"r": 8}],
    "train.importance_clip": [2.0], "train.learning_rate": ["high", 0, math.nan, "nan", 1e30],
    "train.alpha": [math.inf, True, "x" * 100_000], "train.beta1": [-0.1], "train.lr_decay": [1.5],
    "train.attempt2_weight": [0], "train.micro_batch_size": ["8", 8.0, True], "train.stage1_epochs": [-1, 1e9],
    "train.stage2_steps": [1.5, 10**9], "train.num_generations": [0], "train.generation_temperature": [0],
    "train.max_new_tokens_attempt1": [0], "train.checkpoint_every": [0], "train.seed": [-1, 2**70, "three", None],
    "train.baseline": ["batch"], "train.length_norm": ["token"], "eval.generation_temperature": [-1.0],
    "eval.max_examples": [0], "model.name": ["", 3], "model.load_in_4bit": ["yes", 1], "model.max_seq_length": [7],
    "model.gradient_checkpointing": ["unslot"], "model.fast_inference_gpu_mem": [1.5], "model.lora.rank": [8],
    "model.dtype": ["float32", 16, None],
    "model.lora.dropout": [1.0], "model.lora.target_modules": [5, []], "dataset.input_field": [None],
    "dataset.test_split_size": [0], "prompts.self_correction": [""], "prompts.examples": [{"input": "1+1=?"}],
    "reward.fn": ["format_and_mach", "no_such_package.right", "trl.rewards.a b", [], ["exact_match", "nope"], 5],
    "reward.weights": ["high"], "reward.columns": ["solution"], "reward.answer_extractor": ["gsm8k"],
    "reward.match": ["equals"], "reward.module": ["nowhere.py"],
    "run_name": [7, "../elsewhere", "/elsewhere", "..", "a\n", "a/b", "", "a" * 300],
}  # fmt: skip
BAD = [  # (changes, the key that the line must name, what the line must also say)
    *(({key: value}, key, "") for key, values in BAD_VALUES.items() for value in values),
    ({"train": [1]}, "train", "its own"), ({"fp8": 1}, "fp8", "--help"), ({"train.a\nb": 1}, "train.'a\\nb'", ""),
    ({"reward.fn": [1]}, "reward.fn.0", "1"),
    ({"model.lora.target_modules": ["q_proj", 5]}, "model.lora.target_modules.1", "5"),
    ({"prompts.examples": [{"input": "1+1=?"}]}, "prompts.examples.0.output", "required"),
    ({"prompts.examples": [{"input": "1+1=?", "output": " "}]}, "prompts.examples.0.output", ""),
    ({"prompts.examples": [{"input": "1", "output": "2", "outptu": "2"}]}, "prompts.examples.0.outptu", "unknown"),
    ({"train.learnin_rate": 1e-5}, "train.learnin_rate", "did you mean train.learning_rate?"),
    ({"modle": {}}, "modle", "did you mean model?"), ({"train.lora": {"r": 8}}, "train.lora", "model.lora"),
    ({"learning_rate": 1e-5}, "learning_rate", "train.learning_rate"),
    ({"train.baseline": "leave-one-out"}, "train.baseline", "'leave_one_out' or 'none'"),
    ({"model.dtype": "half"}, "model.dtype", "'auto', 'bfloat16' or 'float16'"),
    ({"reward.fn": "format_and_mach"}, "reward.fn", "did you mean format_and_match"),
    ({"reward.answer_extractor": "gsm8k"}, "reward.answer_extractor", "did you mean gsm8k_hash"),
    # between keys
    ({"train.stage1_batch_size": 1}, "train.stage1_batch_size", ""),
    ({"train.stage2_batch_size": 1}, "train.stage2_batch_size", ""),
    ({"train.stage1_batch_size": 1, "train.num_generations": 4, "train.stage1_corrections": 4},
     "train.stage1_batch_size", ""),
    ({"train.num_generations": 4, "train.stage1_corrections": 3}, "train.stage1_corrections", "4"),
    ({"train.oversample": 2}, "train.oversample", "num_generations"),
    ({"train.oversample": 2, "train.num_generations": 2, "train.baseline": "none"}, "train.oversample", "baseline"),
    ({"train.attempt2_weight": 1, "train.baseline": "none"}, "train.attempt2_weight", "baseline"),
    ({"reward.weights": [1.0, 0.2]}, "reward.weights", "1"),
    ({"dataset.split": "train"}, "dataset.test_split_size", "dataset.split"),
    ({"reward.fn": ["exact_match", "json.dumps"], "reward.weights": [1.0]}, "reward.weights", "2"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "key", "says"), BAD, ids=[key for _, key, _ in BAD])
def test_check_config_names_the_faulty_key(raw_config: dict, changes: dict, key: str, says: str) -> None:
    (line,) = refusal(train.check_config, with_keys(raw_config, changes))
    assert line.startswith(f"{key}: ")
    assert says in line
    assert len(line) < 400


def test_check_config_reports_all_faults_at_once(raw_config: dict) -> None:
    """Every field fault; where there is none, every fault between keys."""
    single = {key: values[0] for key, values in BAD_VALUES.items() if key != "reward.module"}
    assert named(refusal(train.check_config, with_keys(raw_config, single))) == sorted(single)
    between = {"train.oversample": 2, "train.stage1_batch_size": 1, "train.stage2_batch_size": 1}
    assert named(refusal(train.check_config, with_keys(raw_config, between))) == sorted(between)


@pytest.mark.parametrize("key", ["run_name", "model", "model.name", "dataset", "dataset.name", "dataset.target_field"])
def test_check_config_required_key(raw_config: dict, key: str) -> None:
    *parents, name = key.split(".")
    node = raw_config[parents[0]] if parents else raw_config
    del node[name]
    assert named(refusal(train.check_config, raw_config)) == [key]


GOOD = [
    {"model.max_seq_length": 69, "train.max_prompt_length_attempt2": 57}, {"model.chat_template": ""},
    {"train.stage1_batch_size": 1, "train.stage2_batch_size": 1, "train.baseline": "none"},
    {"train.stage1_batch_size": 1, "train.stage2_batch_size": 1, "train.num_generations": 2},
    {"train.num_generations": 8, "train.stage1_corrections": 4, "train.oversample": 2},
    {"train.stage1_epochs": 0.5, "train.stage2_epochs": 0, "train.stage2_steps": 0},
    {"dataset.split": "train", "dataset.test_split_size": 4}, {"train.learning_rate": 1},
    {"reward.fn": ["exact_match", "trl.rewards.think_format_reward"], "reward.weights": [1, 0.1]},
]  # fmt: skip


@pytest.mark.parametrize("changes", GOOD)
def test_check_config_takes_keys_that_go_together(make_config: Callable[..., Any], changes: dict) -> None:
    make_config(changes)


def test_check_config_module_brings_names(raw_config: dict, tmp_path: Path) -> None:
    names = {"reward.fn": "close", "reward.match": "near", "reward.answer_extractor": "x"}
    code = ("raise SystemExit", "limit = (", "close = 3", "import train\n@train.rewards.register_match\ndef a(): 0")
    for number, wrong in enumerate((["reward.module"], ["reward.module"], sorted(names), ["reward.module"])):
        (tmp_path / f"{number}.py").write_text(code[number])  # where the file cannot be run its names are not judged
        changes = names | {"reward.module": str(tmp_path / f"{number}.py")}
        assert named(refusal(train.check_config, with_keys(raw_config, changes))) == wrong


def test_check_config_home_in_paths(raw_config: dict, config_file: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "own.py").touch()
    (tmp_path / "t.jinja").write_text(PLAIN_TEMPLATE)
    paths = {"output.dir": "~/runs", "model.name": "~/m", "dataset.name": "~/d", "reward.module": "~/own.py"}
    config = train.check_config(with_keys(raw_config, paths))
    assert (config.output.dir, config.model.name) == (f"{tmp_path}/runs", f"{tmp_path}/m")
    assert (config.dataset.name, config.reward.module) == (f"{tmp_path}/d", f"{tmp_path}/own.py")
    config = train.check_config(with_keys(raw_config, {"model.chat_template": "~/t.jinja"}))
    assert train.load_tokenizer(config).chat_template == PLAIN_TEMPLATE
    (tmp_path / "link").symlink_to(raw_config["model"]["name"])  # the base model by another path
    adapter = make_adapter(tmp_path / "adapter", raw_config, base_model_name_or_path=str(tmp_path / "link"))
    flags = ["--config", str(config_file), "--eval-only", "--resume-adapter", "~/adapter"]
    assert train.parse_command_line(flags)[0].resume_adapter == str(adapter)


# ---------------------------------------------------------------------------------------------------------------- files

BAD_FILES = [
    "", "# only a comment\n", "- a\n- b\n", "just words", "run_name: [unclosed", "train:\n\tseed: 1\n", "a: b: c",
    "a: 1\n---\nb: 2\n", "run_name: 2025-13-13", "run_name: !!int ''", "run_name: !!bool maybe", "run_name: \x00a",
    "run_name: !!python/object/apply:os.getcwd []", "a: " + "[" * 500, "a: " + "{a: " * 500 + "1" + "}" * 500,
    "a: &a [*a]", "\xff\xfe\x00\x81", "run_name: caf\xe9",
]  # fmt: skip


@pytest.mark.parametrize("text", BAD_FILES)
def test_read_config_bad_file(tmp_path: Path, text: str) -> None:
    file = tmp_path / "odd.yaml"
    file.write_text(text, "latin-1")
    lines = refusal(train.read_config, str(file))
    assert text == "a: &a [*a]" or named(lines) == [f"--config {file}"]


def test_read_config_no_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for file in (tmp_path / "missing.yaml", tmp_path, tmp_path / "file" / "x"):
        assert named(refusal(train.read_config, str(file))) == [f"--config {file}"]
    assert "--config" in refusal(train.parse_command_line, [])[0]


@pytest.mark.parametrize(
    ("more", "key"), [("run_name: x", "run_name"), ("train: {seed: 2}", "train"), ("x: {seed: 2, seed: 3}", "seed")]
)
def test_read_config_key_twice(config_file: Path, more: str, key: str) -> None:
    """YAML's own reader keeps the last; a second section would replace the first whole."""
    config_file.write_text(config_file.read_text() + more)
    assert f"{key} stands twice" in refusal(train.read_config, str(config_file))[0]


@pytest.mark.parametrize(("written", "value"), [("1e-5", 1e-5), ("+2E3", 2e3), ("1.5e5", 1.5e5), (".5e1", 5.0)])
def test_read_config_numbers_without_a_dot(config_file: Path, written: str, value: float) -> None:
    """YAML 1.1 reads 1e-5 as text; text stays text."""
    more = f"reward: {{fn: [exact_match, format_only], weights: [1, {written}]}}\nwandb_project: 1e-5\n"
    config_file.write_text(config_file.read_text() + more)
    config = train.read_config(str(config_file), [f"train.learning_rate={written}"])
    assert (config.train.learning_rate, config.reward.weights) == (value, [1, value])
    assert config.wandb_project == "1e-5"
    for text in ("1e999", "1e5x", "0x1e5"):
        assert named(refusal(train.read_config, str(config_file), [f"train.lr_decay={text}"])) == ["train.lr_decay"]


def test_read_config_byte_order_mark_and_merged_keys(config_file: Path) -> None:
    """YAML's `<<` merges a mapping in, and what stands beside it wins: no key stands twice."""
    merged = "  chat_template_kwargs: &x {<<: {batch_size: 4}, batch_size: 8}\n  lora:\n"
    text = config_file.read_text().replace("  lora:\n", merged).replace("eval:\n  batch_size: 4\n", "")
    config_file.write_text(text + "eval: {<<: *x}\n", encoding="utf-8-sig")
    assert train.read_config(str(config_file)).eval.batch_size == 8


# ---------------------------------------------------------------------------------------------------------------- flags


def test_set_overrides(config_file: Path) -> None:
    first = ["train.seed=7", "model.lora.r=2", "train.learning_rate=5e-6", "wandb_project=null"]
    again = ["train.seed=8", "prompts.system='Say: a = b'", "model.chat_template_kwargs.enable_thinking=false"]
    flags = ["--config", str(config_file), "--set", *first, "--set", *again]
    _, config = train.parse_command_line(flags)
    assert (config.train.seed, config.model.lora.r, config.train.learning_rate) == (8, 2, 5e-6)
    assert (config.wandb_project, config.prompts.system) == (None, "Say: a = b")
    assert config.model.chat_template_kwargs == {"enable_thinking": False}


BAD_FLAGS = [  # (flags, what the line must name)
    ("--no-such-flag", "--no-such-flag"), ("--set", "--set"), ("--set train.seed", "--set 'train.seed'"),
    ("--set =3", "'': "), ("--set train..seed=3", "train.'': "), ("--set train.sed=3", "train.sed: "),
    ("--set run_name.x=3", "--set 'run_name.x=3'"), ("--set train.seed=[1", "--set 'train.seed=[1'"),
    ("--set train.seed=three", "train.seed: "), ("--set train.seed=", "train.seed: "), ("--smoke 3", "--smoke 3"),
    ("--smoke 0", "--smoke 0"), ("--smoke x", "--smoke"), ("--start-stage 3", "--start-stage"),
    ("--start-stage 2", "--start-stage 2"), ("--start-stage 2 --resume-adapter DIR --eval-only", "--start-stage 2"),
    ("--resume-adapter DIR", "--resume-adapter"), ("--resume --overwrite", "--overwrite"),
    ("--resume --eval-only", "--eval-only"), ("--resume --start-stage 2 --resume-adapter DIR", "--resume"),
    ("--resume --start-stage 2", "--resume: "),
]  # fmt: skip


@pytest.mark.parametrize(("flags", "says"), BAD_FLAGS)
def test_parse_command_line_refuses(raw_config: dict, config_file: Path, tmp_path: Path, flags: str, says: str) -> None:
    flags = flags.replace("DIR", str(make_adapter(tmp_path / "adapter", raw_config)))
    (line,) = refusal(train.parse_command_line, ["--config", str(config_file), *flags.split()])
    assert says in line


def test_find_start_resume_of_no_run(config_file: Path) -> None:
    """A mistyped name must not train from scratch."""
    args, config = train.parse_command_line(["--config", str(config_file), "--resume", "--set", "run_name=tset"])
    folder = Path(config.output.dir, config.run_name)
    assert named(refusal(train.find_start, args, config, folder, {})) == ["--resume"]


def test_help_lists_every_key_with_its_meaning(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        train.parse_command_line(["--help"])
    assert ended.value.code == 0
    entries, fields = capsys.readouterr().out.split("\n  "), train.known_keys()
    assert all(info.description for info in train.known_keys(train.WorkedExample).values())
    sections = {"model", "model.lora", "dataset", "prompts", "reward", "train", "eval", "output"}
    assert {name for name, info in fields.items() if not info.description} == sections
    for name in fields.keys() - sections:
        shown = "required: " if fields[name].is_required() else f"{json.dumps(fields[name].default)}: "
        assert entries[entries.index(name) + 1].strip().startswith(shown), name


def test_bad_config_exits_with_2_before_anything_slow_is_imported(config_file: Path, tmp_path: Path) -> None:
    for package in ("torch", "unsloth", "transformers", "peft", "datasets", "wandb", "matplotlib", "trl"):
        (tmp_path / "poison" / package).mkdir(parents=True)
        (tmp_path / "poison" / package / "__init__.py").write_text(f"raise SystemExit('{package} was imported')\n")
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "poison")}
    command = [sys.executable, str(ROOT / "train.py"), "--config", str(config_file)]

    def run(*flags: str) -> tuple[int, str, str]:
        done = subprocess.run([*command, *flags], env=environment, capture_output=True, text=True, timeout=60)
        return done.returncode, done.stdout, done.stderr

    faulty = ["train.learnin_rate=1e-5", "reward.fn=[trl.rewards.accuracy_reward, nope]", "model.lora.r=0"]
    code, printed, said = run("--set", *faulty)
    assert (code, printed) == (2, "")
    assert named(said.splitlines()) == ["model.lora.r", "reward.fn", "train.learnin_rate"]
    code, printed, said = run("--set", "reward.fn=trl.rewards.accuracy_reward", "--no-such-flag")
    assert (code, printed, len(said.splitlines())) == (2, "", 1)
    assert run("--set", "reward.fn=trl.rewards.accuracy_reward")[2].strip() == "torch was imported"  # nothing is wrong


# ------------------------------------------------------------------------------------------------------------- adapters


def make_adapter(folder: Path, raw: dict[str, Any], **changes: Any) -> Path:
    """A folder whose adapter_config.json fits the config but for `changes`."""
    lora = raw["model"]["lora"]
    saved = {"base_model_name_or_path": raw["model"]["name"], "r": lora["r"], "lora_alpha": lora["alpha"]}
    saved |= {"target_modules": ["v_proj", "q_proj"]} | changes
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(saved))
    return folder


BAD_ADAPTERS = [  # (what its adapter_config.json says, the word that the line must hold)
    ({"base_model_name_or_path": "other"}, "model.name"), ({"r": 8}, "model.lora.r"), ({"use_dora": True}, "use_dora"),
    ({"lora_alpha": 16}, "model.lora.alpha"), ({"target_modules": ["q_proj"]}, "model.lora.target_modules"),
    ({"target_modules": None}, "model.lora.target_modules"), ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
    ({"use_rslora": True}, "use_rslora"), ({"init_lora_weights": "pissa"}, "init"), ({"target_modules": 3}, "sound"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "says"), BAD_ADAPTERS)
def test_check_adapter_refuses(raw_config: dict, config_file: Path, tmp_path: Path, changes: dict, says: str) -> None:
    adapter = make_adapter(tmp_path / "adapter", raw_config, **changes)
    flags = ["--config", str(config_file), "--start-stage", "2", "--resume-adapter", str(adapter)]
    flags += ["--set", "model.lora.target_modules=[q_proj, v_proj, q_proj]"]
    (line,) = refusal(train.parse_command_line, flags)
    assert line.startswith(f"--resume-adapter {adapter}: ")
    assert says in line


@pytest.mark.parametrize("content", [None, b"", b"{", b"[]", b"5", b"\xff"])
def test_check_adapter_damaged(make_config: Callable[..., Any], tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "adapter_config.json").write_bytes(content)
    assert named(refusal(train.check_adapter, tmp_path, make_config())) == [f"--resume-adapter {tmp_path}"]


# ----------------------------------------------------------------------------------------------- shipped configs, smoke

SHIPPED = {"tiny": (2560, 40, 60), "arithmetic": (200, 30, 45), "gsm8k": (7473, 11, 190), "math": (11985, 374, 374)}


@pytest.mark.parametrize(("name", "rows", "stage1", "stage2"), [(name, *numbers) for name, numbers in SHIPPED.items()])
def test_shipped_config(name: str, rows: int, stage1: int, stage2: int) -> None:
    file = ROOT / "configs" / f"{name}.yaml"
    config, text = train.read_config(str(file)), file.read_text()
    assert [len(train.stage_batches(stage, rows, config)) for stage in (1, 2)] == [stage1, stage2]
    assert text.splitlines()[0] == f"# python train.py --config configs/{name}.yaml"
    for section, keys in yaml.safe_load(text).items():
        for key in keys if isinstance(keys, dict) else ():
            field = type(getattr(config, section)).model_fields[key]
            changed = field.is_required() or field.get_default() != getattr(getattr(config, section), key)
            assert changed, f"{section}.{key} is the default"


@pytest.mark.parametrize("examples", [4, 8])
@pytest.mark.parametrize("name", SHIPPED)
def test_smoke_shrinks(name: str, examples: int, tmp_path: Path) -> None:
    """Two steps a stage of few rows, a checkpoint after each, whatever the config's batches."""
    flags = ["--smoke", str(examples), "--set", "train.oversample=4", "train.num_generations=8"]
    flags += [f"output.dir={tmp_path}", "--config", f"{ROOT}/configs/{name}.yaml"]
    args, config = train.parse_command_line(flags)
    with train.claim_folder(args, config) as folder:
        assert folder == tmp_path / f"score-{name}-smoke"
    assert (config.eval.max_examples, config.train.checkpoint_every) == (examples, 1)
    assert config.train.max_new_tokens_attempt1 <= 64
    for stage in (1, 2):
        batches = train.stage_batches(stage, examples, config)
        assert len(batches) == 2
        assert sum(map(len, batches)) * config.train.num_generations <= 64
    assert train.TrainConfig() == train.Config.model_fields["train"].default, "defaults are not shared"


def test_smoke_keeps_what_is_smaller_and_what_is_off(config_file: Path) -> None:
    changes = ["train.stage1_epochs=0", "eval.max_examples=2", "train.max_new_tokens_attempt1=3", "eval.validation=1"]
    _, config = train.parse_command_line(["--config", str(config_file), "--smoke", "8", "--set", *changes])
    assert (config.eval.max_examples, config.train.max_new_tokens_attempt1, config.eval.validation) == (2, 3, 1)
    assert [len(train.stage_batches(stage, 8, config)) for stage in (1, 2)] == [0, 2]


def test_smoke_of_the_original_keys(tiny_dir: Path, data_dir: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """A YAML of exactly the keys that the original repository's configs have runs end to end."""
    original = f"""
      run_name: original
      wandb_project: score
      model: {{name: {tiny_dir}, max_seq_length: 200, load_in_4bit: false, chat_template: "", fast_inference: false,
        fast_inference_gpu_mem: 0.5, lora: {{r: 4, alpha: 8, dropout: 0.0, target_modules: [q_proj, v_proj]}}}}
      dataset: {{name: {data_dir}, config_name: null, input_field: question, target_field: answer, test_split_size: 4}}
      prompts: {{system: Add., self_correction: Check it.}}
      reward: {{fn: format_and_match, answer_extractor: identity}}
      train: {{stage1_batch_size: 8, stage2_batch_size: 8, learning_rate: 5e-6, stage1_epochs: 1, stage2_epochs: 1,
        beta1: 0.01, beta2: 0.1, alpha: 10.0, max_new_tokens_attempt1: 8, max_new_tokens_attempt2: 8,
        max_prompt_length_attempt1: 48, max_prompt_length_attempt2: 120, generation_temperature: 1.0, seed: 42,
        length_norm: sequence, checkpoint_every: 50}}
      eval: {{batch_size: 8, max_examples: 100, generation_temperature: 0.0}}
      output: {{dir: {tmp_path}/outputs}}
    """
    file, log, folder = tmp_path / "original.yaml", tmp_path / "log", tmp_path / "outputs" / "original-smoke"
    file.write_text(original)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert fork_run(["--config", str(file), "--smoke", "8"], log, no_curves) == 0, output(log)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [(line["stage"], line["step"]) for line in lines if line["event"] == "train"]
    assert steps == [(1, 1), (1, 2), (2, 1), (2, 2)]
    assert [line["n"] for line in lines if line["event"] == "eval"] == [4, 4, 4]
    assert all((folder / f"stage{stage}" / "adapter_model.safetensors").exists() for stage in (1, 2))


# ------------------------------------------------------------------------------------------------- any config, any file

TREES = [yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text()) for name in SHIPPED]
odd = [None, 2**70, 10**400, 1e308, "1e999", "nan", "1_0", "٣", "\ud800", "a\nb", "~", "", b"a", date(2025, 1, 1)]
scalars = st.sampled_from(odd) | st.booleans() | st.integers(-3, 3) | st.floats() | st.text(max_size=9)
words = st.sampled_from([*train.known_keys(), *(key.split(".")[-1] for key in train.known_keys())]) | scalars
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3), max_leaves=6
)


def taken_or_refused(check: Callable[..., Any], *args: Any) -> None:
    try:
        assert isinstance(check(*args), train.Config)
    except train.UserError as error:
        lines = str(error).split("\n")
        assert all(": " in line and len(line) < 2000 for line in lines), lines
        assert len(set(lines)) == len(lines)


slow = settings(deadline=None, suppress_health_check=list(HealthCheck))
parts = st.sampled_from(["", "model", "dataset", "prompts", "reward", "train", "eval", "output"])
changes = st.lists(st.tuples(parts, words, values), max_size=4)


@settings(slow, max_examples=60)
@given(tree=st.sampled_from(TREES), changes=changes, override=words.map(str) | st.text(max_size=9))
def test_read_config_takes_or_refuses_any_config(tmp_path: Path, tree: dict, changes: list, override: str) -> None:
    """A shipped config with odd values and unknown keys at several places."""
    tree = copy.deepcopy(tree)
    for section, key, value in changes:
        place = tree.get(section)
        (place if isinstance(place, dict) else tree)[key] = value
    before = repr(tree)
    taken_or_refused(train.check_config, tree)
    assert repr(tree) == before, "checking changes nothing"
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(tree, allow_unicode=False), encoding="utf-8", errors="surrogatepass")
    taken_or_refused(train.read_config, str(file), [f"{override}={override}"])


@settings(slow, max_examples=100)
@given(content=st.binary(max_size=200) | st.lists(words.map(str) | st.sampled_from(list(":-[]{}&*!?|>'\"%#~\n\t ")))
       .map(lambda pieces: " ".join(pieces).encode("utf-8", "surrogatepass")))  # fmt: skip
def test_read_config_takes_or_refuses_any_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.yaml").write_bytes(content)
    taken_or_refused(train.read_config, str(tmp_path / "config.yaml"))
