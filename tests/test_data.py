"""Datasets of every kind, and faults in them named by split, column and row."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from conftest import PLAIN_TEMPLATE, STRIPPING_TEMPLATE, THINKING_TEMPLATE, build_model, write_jsonl

import train

ROWS = [{"question": f"{i}+1=?", "answer": str(i + 1)} for i in range(12)]


@pytest.fixture
def load(make_config: Callable[..., Any]) -> Callable[..., tuple[list[Any], list[Any]]]:
    """load(name, changes) -> (train, test) examples of a dataset."""

    def load_it(name: Path, changes: dict[str, Any] | None = None) -> tuple[list[Any], list[Any]]:
        config = make_config({"dataset.name": str(name)} | (changes or {}))
        return train.load_examples(config, train.load_tokenizer(config))

    return load_it


def pairs(examples: list[Any]) -> list[tuple[str, str]]:
    return [(example.question, example.target) for example in examples]


EXPECTED = [(row["question"], row["answer"]) for row in ROWS]


def fault(load: Callable[..., Any], name: Path, changes: dict[str, Any] | None = None) -> str:
    with pytest.raises(train.UserError) as caught:
        load(name, changes)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def test_a_folder_of_jsonl_files(load: Callable[..., Any], tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", ROWS[:8])
    write_jsonl(tmp_path / "test.jsonl", ROWS[8:])
    for part, expected in zip(load(tmp_path), (EXPECTED[:8], EXPECTED[8:]), strict=True):
        assert pairs(part) == expected
        assert all(example.prompt for example in part)


def test_a_folder_of_parquet_shards_as_the_hub_names_them(load: Callable[..., Any], tmp_path: Path) -> None:
    for name, rows in (
        ("train-00000-of-00002", ROWS[:4]),
        ("train-00001-of-00002", ROWS[4:8]),
        ("test-00000-of-00001", ROWS[8:]),
    ):
        datasets.Dataset.from_list(rows).to_parquet(tmp_path / f"{name}.parquet")
    train_part, test_part = load(tmp_path)
    assert (pairs(train_part), pairs(test_part)) == (EXPECTED[:8], EXPECTED[8:])


def test_save_to_disk(load: Callable[..., Any], tmp_path: Path) -> None:
    parts = {"train": datasets.Dataset.from_list(ROWS[:8]), "test": datasets.Dataset.from_list(ROWS[8:])}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "dict")
    train_part, test_part = load(tmp_path / "dict")
    assert (pairs(train_part), pairs(test_part)) == (EXPECTED[:8], EXPECTED[8:])
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "single")
    train_part, test_part = load(tmp_path / "single", {"dataset.split": "train", "dataset.test_split_size": 4})
    assert sorted(pairs(train_part) + pairs(test_part)) == sorted(EXPECTED)


def test_one_file_of_which_test_rows_are_held_out(load: Callable[..., Any], tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "all.jsonl", ROWS)
    changes = {"dataset.split": "train", "dataset.test_split_size": 5}
    train_part, test_part = load(file, changes)
    assert (len(train_part), len(test_part)) == (7, 5)
    assert sorted(pairs(train_part) + pairs(test_part)) == sorted(EXPECTED)
    again = load(file, changes)
    assert [pairs(part) for part in again] == [pairs(train_part), pairs(test_part)], "a seed decides which"
    assert pairs(load(file, changes | {"train.seed": 2})[1]) != pairs(test_part)
    message = fault(load, file, changes | {"dataset.test_split_size": 12})
    assert "dataset.test_split_size" in message
    assert "12 rows" in message


def test_missing_splits_and_columns_are_named_with_what_exists(load: Callable[..., Any], tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", ROWS)
    write_jsonl(tmp_path / "validation.jsonl", ROWS)
    message = fault(load, tmp_path)
    assert "no test split" in message
    assert "train" in message
    assert "validation" in message
    message = fault(load, tmp_path, {"dataset.split": "dev", "dataset.test_split_size": 3})
    assert message.startswith("dataset.split")
    assert "validation" in message
    write_jsonl(tmp_path / "test.jsonl", [{"question": "9+9=?", "answer": "18"}])
    message = fault(load, tmp_path, {"dataset.input_field": "qestion"})
    assert message.startswith("dataset.input_field")
    assert "did you mean question" in message
    assert "answer" in message
    assert fault(load, tmp_path, {"dataset.target_field": "solution"}).startswith("dataset.target_field")


@pytest.mark.parametrize("target", [None, "", "   "])
def test_an_empty_target_is_named_by_row(load: Callable[..., Any], tmp_path: Path, target: Any) -> None:
    write_jsonl(tmp_path / "train.jsonl", [*ROWS[:5], {"question": "odd", "answer": target}, *ROWS[5:8]])
    write_jsonl(tmp_path / "test.jsonl", ROWS[8:])
    message = fault(load, tmp_path)
    assert message.startswith("dataset.target_field")
    assert "row 5 of train" in message


def test_a_target_without_an_answer_is_named_by_row(load: Callable[..., Any], tmp_path: Path) -> None:
    write_jsonl(
        tmp_path / "train.jsonl",
        [{"question": row["question"], "answer": f"so #### {row['answer']}"} for row in ROWS[:8]],
    )
    write_jsonl(
        tmp_path / "test.jsonl", [{"question": "9+9=?", "answer": "#### 18"}, {"question": "8+9=?", "answer": "17!"}]
    )
    message = fault(load, tmp_path, {"reward.answer_extractor": "gsm8k_hash"})
    assert "row 1 of test" in message
    assert "gsm8k_hash" in message
    assert "17!" in message


@pytest.mark.parametrize(
    ("question", "answer", "key"), [(None, "1", "input_field"), ("", "1", "input_field"), ("q", ["1"], "target_field")]
)
def test_fields_that_are_no_text_are_named(
    load: Callable[..., Any], tmp_path: Path, question: Any, answer: Any, key: str
) -> None:
    write_jsonl(tmp_path / "train.jsonl", [{"question": question, "answer": answer}])
    write_jsonl(tmp_path / "test.jsonl", ROWS[8:])
    message = fault(load, tmp_path)
    assert message.startswith(f"dataset.{key}")
    assert "row 0 of train" in message


def test_numbers_are_targets(load: Callable[..., Any], tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", [{"question": f"{i}+1=?", "answer": i + 1} for i in range(8)])
    write_jsonl(tmp_path / "test.jsonl", [{"question": "half", "answer": 0.5}])
    train_part, test_part = load(tmp_path)
    assert [example.target for example in train_part] == [str(i + 1) for i in range(8)]
    assert [example.target for example in test_part] == ["0.5"]


def test_train_rows_that_are_also_test_rows_are_not_trained_on(
    load: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_jsonl(tmp_path / "train.jsonl", ROWS)
    write_jsonl(tmp_path / "test.jsonl", ROWS[9:])
    train_part, test_part = load(tmp_path)
    assert (pairs(train_part), pairs(test_part)) == (EXPECTED[:9], EXPECTED[9:])
    assert "3 train rows" in capsys.readouterr().out


def test_test_rows_that_are_not_evaluated_are_not_trained_on_either(load: Callable[..., Any], tmp_path: Path) -> None:
    """test_split_size only says how many of the test split are evaluated."""
    write_jsonl(tmp_path / "train.jsonl", ROWS)
    write_jsonl(tmp_path / "test.jsonl", ROWS[8:])
    train_part, test_part = load(tmp_path, {"dataset.test_split_size": 2})
    assert pairs(test_part) == EXPECTED[8:10]
    assert pairs(train_part) == EXPECTED[:8]


def test_a_train_split_of_test_rows_alone_is_a_fault(load: Callable[..., Any], tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", ROWS[:3])
    write_jsonl(tmp_path / "test.jsonl", ROWS)
    assert "train" in fault(load, tmp_path)


def test_duplicates_of_the_held_out_rows_are_not_trained_on(load: Callable[..., Any], tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "all.jsonl", ROWS * 2)
    train_part, test_part = load(file, {"dataset.split": "train", "dataset.test_split_size": 5})
    assert not set(pairs(train_part)) & set(pairs(test_part))


@pytest.mark.parametrize("content", ["", "not json\n", '{"question": "half\n'])
def test_damaged_and_empty_files_are_named(load: Callable[..., Any], tmp_path: Path, content: str) -> None:
    (tmp_path / "train.jsonl").write_text(content)
    write_jsonl(tmp_path / "test.jsonl", ROWS)
    assert fault(load, tmp_path).startswith("dataset.name")


def test_places_without_data_are_named(load: Callable[..., Any], tmp_path: Path) -> None:
    assert str(tmp_path) in fault(load, tmp_path)
    assert "nobody/nothing" in fault(load, Path("nobody/nothing"))


def test_fewer_rows_than_a_batch(make_config: Callable[..., Any]) -> None:
    config = make_config({"train.stage2_batch_size": 30})
    with pytest.raises(train.UserError, match="train.stage2_batch_size: 30 .*24"):
        train.stage_batches(2, 24, config)
    assert len(train.stage_batches(1, 24, config)) == 3
    assert train.stage_batches(2, 24, make_config({"train.stage2_batch_size": 30, "train.stage2_epochs": 0})) == []


def test_faulty_rows_are_left_out_where_the_config_says_so(
    make_config: Callable[..., Any], data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = tmp_path / "faulty"
    shutil.copytree(data_dir, folder)
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    rows[3]["answer"], rows[5]["question"] = "", " "
    write_jsonl(folder / "train.jsonl", rows)
    config = make_config({"dataset.name": str(folder)})
    tokenizer = train.load_tokenizer(config)
    with pytest.raises(train.UserError, match="row 3 of train .* is empty.*dataset.skip_faulty_rows"):
        train.load_examples(config, tokenizer)
    config.dataset.skip_faulty_rows = True
    examples, _ = train.load_examples(config, tokenizer)
    assert [e.question for e in examples] == [row["question"] for i, row in enumerate(rows) if i not in (3, 5)]
    said = capsys.readouterr().out
    assert "2 of 24 train rows are faulty and left out; the first: dataset.target_field: row 3" in said


@pytest.mark.parametrize("template", [PLAIN_TEMPLATE, STRIPPING_TEMPLATE, THINKING_TEMPLATE])
@pytest.mark.parametrize("system", ["", "Add."])
def test_worked_examples_are_earlier_turns_of_both_prompts_verbatim(
    make_policy: Callable[..., Any], tmp_path: Path, template: str, system: str
) -> None:
    """Also where the template cuts the reasoning out of earlier turns; and attempt 2 sees them too."""
    if not system:  # a template that has no such role
        template = "{%- if messages[0].role == 'system' -%}{{ raise_exception('no system') }}{%- endif -%}" + template
    reasoned = {"input": "1+1=?", "output": "<think>one more</think><answer>2</answer>"}
    shown = [reasoned, {"input": "2+2=?", "output": "4"}]
    room = {"max_prompt_length_attempt1": 200, "max_prompt_length_attempt2": 300}
    policy, config = make_policy(
        {
            "model.name": str(build_model(tmp_path / "model", template=template)),
            "prompts.examples": shown,
            "prompts.system": system,
            "model.max_seq_length": 320,
            **{f"train.{key}": value for key, value in room.items()},
        }
    )
    examples, _ = train.load_examples(config, policy.tokenizer)
    first, second = (a.prompts[0] for a in train.roll_out(policy, examples[:1], config, 1.0, "seed"))
    turn = "<|im_start|>{}\n{}<|im_end|>\n".format
    expected = (
        turn("system", system) * bool(system)
        + "".join(
            turn("user", example["input"]) + f"<|im_start|>assistant\n{example['output']}<|im_end|>\n"
            for example in shown
        )
        + turn("user", examples[0].question)
        + "<|im_start|>assistant\n"
    )
    text = policy.tokenizer.decode(first)
    if not template.endswith(THINKING_TEMPLATE):
        assert text == expected
    for example in shown:
        assert text.count(example["output"]) == 1
    assert second[: len(first)] == first
    assert "one more" not in policy.tokenizer.decode(policy.bridge)


def test_worked_examples_count_against_the_budget(make_config: Callable[..., Any]) -> None:
    config = make_config({"prompts.examples": [{"input": "1+1=?", "output": "2" * 60}]})
    with pytest.raises(train.UserError, match="max_prompt_length_attempt1: all 24 train prompts are longer"):
        train.load_examples(config, train.load_tokenizer(config))


def test_a_template_that_loses_earlier_turns_is_refused_examples(make_config: Callable[..., Any]) -> None:
    last_only = PLAIN_TEMPLATE.replace("in messages", "in messages[-1:]")
    config = make_config({"prompts.examples": [{"input": "1+1=?", "output": "2"}], "model.chat_template": last_only})
    with pytest.raises(train.UserError, match="^prompts.examples: "):
        train.load_examples(config, train.load_tokenizer(config))


@pytest.mark.parametrize(
    ("examples", "key"),
    [
        ([{"input": "1+1=?"}], "prompts.examples.0.output: required"),
        ([{"input": "1+1=?", "output": ""}], "prompts.examples.0.output: "),
        ([{"input": "1+1=?", "outptu": "2", "output": "2"}], "prompts.examples.0.outptu: unknown key"),
        ({"input": "1+1=?"}, "prompts.examples: "),
    ],
)
def test_faulty_worked_examples_are_named(make_config: Callable[..., Any], examples: Any, key: str) -> None:
    with pytest.raises(train.UserError) as error:
        make_config({"prompts.examples": examples})
    assert str(error.value).startswith(key), error.value
