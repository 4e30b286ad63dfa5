"""Datasets of every kind, the faults in them, prompts by the chat template, and the order of training."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from datetime import datetime
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import transformers
import yaml
from conftest import PLAIN_TEMPLATE, SELF_CORRECTION, STRIPPING_TEMPLATE, THINKING_TEMPLATE, write_jsonl

import train

ROWS = [{"question": f"{i}+1=?", "answer": str(i + 1)} for i in range(12)]
PAIRS = [(row["question"], row["answer"]) for row in ROWS]
SPLIT = {"dataset.split": "train", "dataset.test_split_size": 5}


def answers(*targets: Any) -> list[dict[str, Any]]:
    return [{"question": f"q{i}", "answer": target} for i, target in enumerate(targets)]


@pytest.fixture
def load(make_config: Callable[..., Any], tmp_path: Path) -> Callable[..., SimpleNamespace]:
    """load(train rows or a path, changes) -> train, validation and test pairs, and the examples."""

    def load_it(data: Any, changes: dict[str, Any] | None = None, smoke: int | None = None) -> SimpleNamespace:
        if not isinstance(data, str | Path):
            write_jsonl(tmp_path / "train.jsonl", data)
            write_jsonl(tmp_path / "test.jsonl", ROWS[8:])
            data = tmp_path
        config = make_config({"dataset.name": str(data)} | (changes or {}))
        parts = train.load_examples(config, train.load_tokenizer(config), smoke)
        train_rows, validation, test = ([(example.question, example.target) for example in part] for part in parts)
        return SimpleNamespace(train=train_rows, validation=validation, test=test, parts=parts)

    return load_it


def refusal(call: Callable[..., Any], *args: Any) -> str:
    """The one line of the UserError that a call raises."""
    with pytest.raises(train.UserError) as caught:
        call(*args)
    (line,) = str(caught.value).splitlines()
    return line


def write_split(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    table = datasets.Dataset.from_list(rows)
    write = {".csv": table.to_csv, ".parquet": table.to_parquet, ".jsonl": table.to_json, "": table.save_to_disk}
    write.get(file.suffix, lambda place: place.write_text(json.dumps(rows)))(file)
    return file


@pytest.mark.parametrize("name", ["{}.jsonl", "{}.json", "{}.csv", "{}.parquet", "data/{}.jsonl", "{}-0-of-2.parquet"])
def test_load_splits_folder(load: Any, tmp_path: Path, name: str) -> None:
    write_split(tmp_path / name.format("train"), ROWS[:4])
    if "-0-" in name:  # shards, as the hub names them
        write_split(tmp_path / "train-1-of-2.parquet", ROWS[4:8])
    write_split(tmp_path / name.format("test"), ROWS[8:])
    (tmp_path / "notes.json").write_text("{}")
    loaded = load(tmp_path)
    assert (loaded.train, loaded.validation, loaded.test) == (PAIRS[: 8 if "-0-" in name else 4], [], PAIRS[8:])
    write_split(tmp_path / name.format("train"), ROWS[2:4])
    assert load(tmp_path).train[:2] == PAIRS[2:4], "not what an earlier start has read"
    write_split(tmp_path / name.format("old/train"), ROWS)
    with pytest.raises(train.UserError, match="dataset.name: .*train"):  # or rows of two ages would mix silently
        load(tmp_path)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet", ""])
def test_load_splits_one_split(load: Any, tmp_path: Path, suffix: str) -> None:
    loaded = load(write_split(tmp_path / f"all{suffix}", ROWS), SPLIT)
    assert (len(loaded.train), len(loaded.test)) == (7, 5)
    assert sorted(loaded.train + loaded.test) == sorted(PAIRS)


def test_load_splits_save_to_disk_and_config_name(load: Any, tmp_path: Path) -> None:
    parts = {"train": datasets.Dataset.from_list(ROWS[:8]), "test": datasets.Dataset.from_list(ROWS[8:])}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved" / "main")
    assert load(tmp_path / "saved", {"dataset.config_name": "main"}).train == PAIRS[:8]
    for split in ("train", "test"):
        write_split(tmp_path / "other" / f"main/{split}.jsonl", ROWS)
    assert refusal(load, tmp_path / "other", {"dataset.config_name": "nope"}).startswith("dataset.name: ")


def test_load_splits_hub_shards_and_a_file_beside_a_script(load: Any, tmp_path: Path) -> None:
    for number in (0, 1):
        write_split(tmp_path / f"hub/train/000{number}.parquet", ROWS[4 * number : 4 * number + 4])
    write_split(tmp_path / "hub/test/0000.parquet", ROWS[8:])
    assert load(tmp_path / "hub").train == PAIRS[:8]
    (tmp_path / "hub" / "hub.py").touch()  # what a folder of the hub may no longer have
    assert len(load(tmp_path / "hub/train/0000.parquet", SPLIT | {"dataset.test_split_size": 1}).train) == 3


DAMAGED = [
    ("train.jsonl", b""), ("train.jsonl", b"question,answer\n1,2\n"), ("train.jsonl", b'{"question": "half\n'),
    ("train.jsonl", b'{"question": "q", "answer": "2"}\n{"question": "caf\xe9", "answer": "2"}\n'),
    ("train.jsonl", b'{"question": "q", "answer": "\xe92"}\n'), ("train.jsonl", bytes(range(256))),
    ("train.json", b'[{"question": "caf\xe9", "answer": "2"}]'), ("train.csv", b"question,answer\ncaf\xe9,2\n"),
    ("train.parquet", b"PAR1" + bytes(90)), ("train.txt", b"1+1=?"),
]  # fmt: skip


@pytest.mark.parametrize(("file", "content"), DAMAGED)
def test_load_splits_damaged_file(load: Any, tmp_path: Path, file: str, content: bytes) -> None:
    write_split(tmp_path / f"test{Path(file).suffix.replace('txt', 'csv')}", ROWS)  # a folder has files of one format
    (tmp_path / file).write_bytes(content)
    assert refusal(load, tmp_path).startswith("dataset.name: ")


def test_load_examples_missing_split_or_column(load: Any, tmp_path: Path) -> None:
    for place in (tmp_path, "nobody/nothing", "nowhere.jsonl", "a" * 300):  # the first is an empty folder
        assert refusal(load, place).startswith("dataset.name: ")
    write_jsonl(tmp_path / "train.jsonl", ROWS)
    write_jsonl(tmp_path / "dev.jsonl", ROWS)
    message = refusal(load, tmp_path)
    assert message.startswith("dataset.name: ") and all(word in message for word in ("test", "train", "validation"))
    message = refusal(load, tmp_path, SPLIT | {"dataset.split": "val"})
    assert message.startswith("dataset.split: ") and "validation" in message
    message = refusal(load, ROWS, {"dataset.input_field": "qestion"})
    assert message.startswith("dataset.input_field: ") and "did you mean question" in message
    assert refusal(load, ROWS, {"dataset.target_field": "solution"}).startswith("dataset.target_field: ")


@pytest.mark.parametrize(
    ("question", "answer"), [(None, "1"), (" ", "1"), ("q", None), ("q", " \n"), ("q", "<answer></answer>")]
)
def test_read_rows_leaves_out_faulty_rows_with_a_count(load: Any, capsys: Any, question: Any, answer: Any) -> None:
    key = "dataset.target_field" if question == "q" else "dataset.input_field"
    odd = {"question": question, "answer": answer}
    assert load([*ROWS[:3], odd, *ROWS[3:6], odd, *ROWS[6:8]]).train == PAIRS[:8]
    said = capsys.readouterr().out
    assert "2 of 10 train rows" in said and key in said and "row 3 of train" in said
    assert load([*ROWS[:2], odd, odd]).train == PAIRS[:2]
    message = refusal(load, [*ROWS[:2], odd, odd, odd])  # more than half
    assert message.startswith(f"{key}: ") and "row 2 of train" in message and "3 of 5" in message


@pytest.mark.parametrize(("question", "answer"), [(["q"], "1"), (5, "1"), ("q", True), ("q", ["1"]), ("q", {"a": 1})])
def test_read_rows_column_that_is_no_text(load: Any, question: Any, answer: Any) -> None:
    key = "target_field" if question == "q" else "input_field"
    assert refusal(load, [{"question": question, "answer": answer}]).startswith(f"dataset.{key}: ")


def test_read_rows_target_that_the_extractor_does_not_read(load: Any, capsys: Any) -> None:
    gsm8k = {"reward.answer_extractor": "gsm8k_hash"}
    message = refusal(load, answers("so it is 5!", "x"), gsm8k)
    assert message.startswith("dataset.target_field: ")
    assert all(word in message for word in ("row 0 of train", "gsm8k_hash", "so it is 5!", "identity would"))
    assert load(answers("so #### 5", "6", "{x}"), gsm8k).train == [("q0", "so #### 5"), ("q1", "6")]
    assert "'{x}'" in capsys.readouterr().out


KEPT = [
    [5, -7, 2**53 + 1], [0.5, 4.25], ["10000000000000000000001", "007"], ["a,b", 'say "c"', "é\u2028ü"],
    ["2024-01-05", "1999-12-31"],  # which the reader takes for dates
]  # fmt: skip
LOST = [[10**22 + 1, 10**22 + 3], [2**53 + 1, 4.5], [4.5, -(2**53) - 1], [2**63 + 1, 5], [10**22 + 1, "5"]]


@pytest.mark.parametrize("targets", KEPT)
def test_targets_keep_what_was_written(load: Any, targets: list[Any]) -> None:
    assert [target for _, target in load(answers(*targets)).train] == list(map(str, targets))


@pytest.mark.parametrize("targets", LOST)
def test_targets_refuse_numbers_that_lost_digits(load: Any, targets: list[Any]) -> None:
    """Two targets 10^22 + 1 and 10^22 + 3 would both be 1e+22."""
    assert refusal(load, answers(*targets)).startswith("dataset.")


def test_read_rows_nan_is_no_answer(load: Any, tmp_path: Path, capsys: Any) -> None:
    assert load(answers(float("nan"), 4.5, 0.25)).train == [("q1", "4.5"), ("q2", "0.25")]
    assert "nan" in capsys.readouterr().out
    (tmp_path / "all.csv").write_text("question,answer\na,NaN\nb,\nc,x\nd,y\n")
    loaded = load(tmp_path / "all.csv", SPLIT | {"dataset.test_split_size": 1})
    assert sorted(loaded.train + loaded.test) == [("c", "x"), ("d", "y")]


def test_read_rows_columns_stay_with_their_row(load: Any, tmp_path: Path) -> None:
    """Rewards in TRL's form read columns of the dataset, also where rows before were left out."""
    (tmp_path / "own.py").write_text("def easy(completions, question, **rest):\n    return [1.0] * len(question)\n")
    examples = load(answers("5", "", "5"), {"reward.module": str(tmp_path / "own.py"), "reward.fn": "easy"}).parts[0]
    assert [(example.question, example.columns["question"]) for example in examples] == [("q0", "q0"), ("q2", "q2")]


def test_load_examples_never_trains_on_test_rows(load: Any, capsys: Any) -> None:
    """Nor on those that test_split_size does not evaluate, nor on copies that differ in white space."""
    copies = [row | {"question": f" {row['question']}\n"} for row in ROWS[8:]]
    loaded = load([*ROWS, *copies], {"dataset.test_split_size": 2, "eval.max_examples": 1})
    assert (loaded.train, loaded.test) == (PAIRS[:8], PAIRS[8:9])
    loaded = load(ROWS, {"dataset.test_split_size": 2}, smoke=4)
    assert (loaded.train, loaded.test) == (PAIRS[:4], PAIRS[8:10])
    assert "8 train rows" in capsys.readouterr().out
    assert refusal(load, copies).startswith("dataset.name: ")


def test_hold_out_depends_on_the_rows_alone(load: Any, tmp_path: Path) -> None:
    """Another seed must not train on what one has tested: Stage II may start from another seed's Stage I."""
    rows = [{"question": f"{i}+{i}=?", "answer": str(2 * i)} for i in range(60)]
    held_out = SPLIT | {"eval.validation": 7}
    first = load(write_jsonl(tmp_path / "a.jsonl", rows), held_out)
    assert (len(first.test), len(first.validation), len(first.train)) == (5, 7, 48)
    assert len({*first.train, *first.validation, *first.test}) == 60
    assert first.test[4][0] != "4+4=?", "not simply the first rows"
    other = load(tmp_path / "a.jsonl", held_out | {"train.seed": 2})
    assert (other.test, other.validation) == (first.test, first.validation)
    random.Random(1).shuffle(rows)
    other = load(write_jsonl(tmp_path / "b.jsonl", rows), held_out)
    assert [sorted(other.test), sorted(other.validation)] == [sorted(first.test), sorted(first.validation)]


def test_hold_out_keeps_copies_on_one_side(load: Any, tmp_path: Path) -> None:
    doubled = [*ROWS, *(row | {"question": row["question"] + " "} for row in ROWS)]
    place = write_jsonl(tmp_path / "all.jsonl", doubled)
    loaded = load(place, SPLIT | {"eval.validation": 3})
    sides = [{question.strip() for question, _ in side} for side in (loaded.train, loaded.validation, loaded.test)]
    assert all(sides) and len(set.union(*sides)) == sum(map(len, sides))
    for size in (24, None):
        assert refusal(load, place, SPLIT | {"dataset.test_split_size": size}).startswith("dataset.test_split_size: ")
    assert refusal(load, ROWS[:1] * 9, {"eval.validation": 2}).startswith("eval.validation: ")


# ----------------------------------------------------------------------------------------------- budgets, chat template


def test_first_prompt_leaves_out_prompts_over_budget(load: Any, capsys: Any) -> None:
    rows = [*ROWS[:3], {"question": "9" * 40, "answer": "1"}, *ROWS[3:8]]
    loaded = load(rows)
    assert loaded.train == PAIRS[:8]
    budget, said = "train.max_prompt_length_attempt1", capsys.readouterr().out
    assert "1 of 9 train rows" in said and budget in said
    longest = max(len(example.prompt) for example in loaded.parts[0])
    assert load(rows, {budget: longest}).train == PAIRS[:8], "the budget itself fits"
    assert refusal(load, rows, {budget: 4}).startswith(f"{budget}: ")


def render(make_config: Any, changes: dict[str, Any]) -> tuple[str, str, str]:
    """Attempt 1's prompt for the question "?", the bridge to attempt 2, and the think tag that it leaves open."""
    config = make_config(changes)
    tokenizer = train.load_tokenizer(config)
    bridge, think = train.attempt2_bridge(tokenizer, config)
    return train.chat_text(tokenizer, config, "?"), tokenizer.decode(bridge), think


USER, OPEN = "<|im_start|>user\n{}<|im_end|>\n", "<|im_start|>assistant\n"
BRIDGE = "<|im_end|>\n" + USER.format(SELF_CORRECTION) + OPEN


@pytest.mark.parametrize("system", ["", "Add."])
@pytest.mark.parametrize("template", [PLAIN_TEMPLATE, STRIPPING_TEMPLATE, THINKING_TEMPLATE])
def test_chat_text_and_bridge(make_config: Any, template: str, system: str) -> None:
    """Worked examples stand verbatim, also where the template cuts the reasoning out of earlier turns."""
    if not system:  # a template without such a role
        template = "{%- if messages[0].role == 'system' -%}{{ raise_exception('no system') }}{%- endif -%}" + template
    shown = [{"input": "1+1=?", "output": "<think>one more</think><answer>2</answer>"}, {"input": "2", "output": "4"}]
    changes = {"model.chat_template": template, "prompts.examples": shown, "prompts.system": system}
    prompt, bridge, think = render(make_config, changes)
    thinks = "<think>\n" * template.endswith(THINKING_TEMPLATE)
    worked = "".join(USER.format(turn["input"]) + OPEN + turn["output"] + "<|im_end|>\n" for turn in shown)
    head = f"<|im_start|>system\n{system}<|im_end|>\n" if system else ""
    assert prompt == head + worked + USER.format("?") + OPEN + thinks
    assert (bridge, think) == (BRIDGE + thinks, "<think>" if thinks else "")


@pytest.mark.parametrize(("value", "tail"), [(True, "<think>"), (False, "")])
def test_chat_text_template_variables(make_config: Any, value: bool, tail: str) -> None:
    template = PLAIN_TEMPLATE + "{{ '<think>' if enable_thinking else '' }}"
    changes = {"model.chat_template": template, "model.chat_template_kwargs.enable_thinking": value}
    assert render(make_config, changes)[1] == BRIDGE + tail


@pytest.mark.parametrize(("change", "shown"), [("trim", "{}"), ("tojson", '"{}"'), ("upper", None)])
def test_chat_text_is_the_templates_own(make_config: Any, change: str, shown: str | None) -> None:
    """What a template does to a problem or an instruction is done, or whoever uses the adapter has other prompts."""
    template = PLAIN_TEMPLATE.replace("message.content", f"message.content | {change}")
    changes = {"model.chat_template": template, "prompts.self_correction": f" {SELF_CORRECTION}\n"}
    if shown is None:
        assert refusal(render, make_config, changes).startswith("model.chat_template: ")
    elif change == "trim":
        assert render(make_config, changes)[:2] == (USER.format("?") + OPEN, BRIDGE)
    else:
        assert render(make_config, changes | {"prompts.self_correction": "Go."})[0] == USER.format('"?"') + OPEN


NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
IGNORES_SYSTEM = PLAIN_TEMPLATE.replace("in messages", "in messages if message.role != 'system'")
NO_HISTORY, ONE_TURN, NO_PROBLEM = (PLAIN_TEMPLATE.replace("messages", f"messages[{p}]") for p in ("-1:", ":2", "1:"))
BROKEN, FIXED = ("{% for %}", "{{ messages.a.b }}"), ("tokenize", "add_generation_prompt")
NO_TEMPLATES = ("nowhere.jinja", "~nobody/x.jinja", "{today}.jinja", "user says " * 400)
BAD_TEMPLATES = [  # (template, more changes, the key that the line must name)
    (NO_SYSTEM + PLAIN_TEMPLATE, {"prompts.system": "Add."}, "prompts.system"),
    (IGNORES_SYSTEM, {"prompts.system": "Add."}, "prompts.system"),
    (NO_HISTORY, {"prompts.examples": [{"input": "1+1=?", "output": "2"}]}, "prompts.examples"),
    *((text, {}, "model.chat_template") for text in (NO_HISTORY, ONE_TURN, NO_PROBLEM, *BROKEN, *NO_TEMPLATES)),
    *((PLAIN_TEMPLATE, {"model.chat_template_kwargs": {name: False}}, "model.chat_template") for name in FIXED),
]


@pytest.mark.parametrize(("template", "changes", "key"), BAD_TEMPLATES)
def test_chat_template_refused(make_config: Any, template: str, changes: dict, key: str) -> None:
    assert refusal(render, make_config, {"model.chat_template": template} | changes).startswith(f"{key}: ")


def test_chat_template_file(make_config: Any, tmp_path: Path) -> None:
    """With a byte order mark, by a path that looks like a template; a file that is no text is refused."""
    file = tmp_path / "{{today}} {% x %}.jinja"
    file.write_text(PLAIN_TEMPLATE, encoding="utf-8-sig")
    assert render(make_config, {"model.chat_template": str(file)})[0] == USER.format("?") + OPEN
    file.write_bytes(PLAIN_TEMPLATE.encode() + b"caf\xe9")
    assert refusal(render, make_config, {"model.chat_template": str(file)}).startswith("model.chat_template: ")


def test_attempt2_bridge_computes_open_budgets(make_config: Any) -> None:
    def budgets(changes: dict[str, Any]) -> tuple[int, int, int]:
        config = make_config(changes)
        bridge, _ = train.attempt2_bridge(train.load_tokenizer(config), config)
        return len(bridge), config.train.max_prompt_length_attempt2, config.model.max_seq_length

    bridge, *computed = budgets({})
    need = 48 + 8 + bridge
    assert computed == [need, need + 12]
    given = {"train.max_prompt_length_attempt2": need, "model.max_seq_length": 140}
    assert budgets(given)[1:] == (need, 140)
    for key, little in (("train.max_prompt_length_attempt2", need - 1), ("model.max_seq_length", need + 11)):
        assert refusal(budgets, {key: little}).startswith(f"{key}: ")


def test_resume_names_a_template_that_prints_the_date(make_config: Any, tmp_path: Path, monkeypatch: Any) -> None:
    config = make_config({"model.chat_template": "{{ strftime_now('%d %b %Y') }}" + PLAIN_TEMPLATE})
    tokenizer = train.load_tokenizer(config)

    def marks(day: int) -> dict[str, str]:
        today = SimpleNamespace(now=lambda: datetime(2026, 3, day))
        monkeypatch.setattr(transformers.utils.chat_template_utils, "datetime", today)
        bridge, _ = train.attempt2_bridge(tokenizer, config)
        return train.fingerprints(train.load_examples(config, tokenizer), bridge, config)

    state = {"stage": 1, "step": 0, "finished": False, "logs": {}, "marks": marks(1), "seconds": 0.0}
    (tmp_path / "state.json").write_text(json.dumps(state))
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config.model_dump()))
    assert train.newest_checkpoint(tmp_path, config, marks(1)) == tmp_path
    message = refusal(train.newest_checkpoint, tmp_path, config, marks(2))
    assert message.startswith("--resume: ") and "chat template" in message


# ------------------------------------------------------------------------------------------------ the order of training


def test_stage_batches_are_seeded_shuffles(make_config: Any) -> None:
    """Another order for each epoch, stage and seed; the leftovers of an epoch are left out."""

    def order(stage: int, **keys: Any) -> list[list[int]]:
        return train.stage_batches(stage, 27, make_config({f"train.{key}": value for key, value in keys.items()}))

    epochs = {"stage1_epochs": 2, "stage2_epochs": 2}
    first = order(1, **epochs)
    assert [len(batch) for batch in first] == [8] * 6
    halves = [sum(first[:3], []), sum(first[3:], [])]
    assert all(len(set(half)) == 24 and set(half) <= set(range(27)) for half in halves)
    assert halves[0] != halves[1] and halves[0] != sorted(halves[0])
    assert order(1, **epochs) == first
    for other in (order(2, **epochs), order(1, **epochs, seed=2)):
        assert other[:3] != first[:3] and other[3:] != first[3:]
    assert order(1, stage1_steps=4) == first[:4], "steps go on where an epoch ends"
    assert order(1, stage1_epochs=1.34) == first[:4]
    assert [len(batch) for batch in order(2, stage2_batch_size=4, num_generations=2, oversample=3)] == [12, 12]
    assert order(1, stage1_epochs=0) == order(1, stage1_steps=0) == []
    oversampled = {"stage1_batch_size": 14, "num_generations": 2, "oversample": 2}
    for keys in ({"stage1_batch_size": 28}, {"stage1_epochs": 0.1}, oversampled):
        assert refusal(partial(order, 1, **keys)).startswith(f"train.{next(iter(keys))}: ")
