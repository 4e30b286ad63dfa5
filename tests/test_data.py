"""Datasets of every kind, and faults in them named by split, column and row."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from conftest import write_jsonl

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
