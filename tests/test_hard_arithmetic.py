"""build_hard_arithmetic.py keeps what a model fails, and nothing else."""

from __future__ import annotations

import subprocess
import sys

import datasets
import pytest
from conftest import ROOT

import build_hard_arithmetic
import train

TINY = ["--config", str(ROOT / "configs" / "tiny.yaml"), "--operation", "addition", "--digits", "3"]


def test_problems_are_right_different_and_of_the_asked_size() -> None:
    problems = build_hard_arithmetic.make_problems(200, "subtraction", 2, 0)
    assert len({problem["question"] for problem in problems}) == 200
    for problem in problems:
        a, sign, b, *_ = problem["question"].split()
        assert sign == "-" and 10 <= int(a) < 100 and 10 <= int(b) < 100
        assert int(problem["answer"]) == int(a) - int(b)
    with pytest.raises(ValueError, match="--pool 8101"):
        build_hard_arithmetic.make_problems(8101, "subtraction", 2, 0)


def test_failures_are_the_wrong_greedy_answers_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    config = train.read_config("configs/tiny.yaml", ["eval.batch_size=16"])
    tokenizer = train.load_tokenizer(config)
    _, examples = train.load_examples(config, tokenizer)
    policy, examples = train.load_policy(config, tokenizer), examples[:48]
    attempt = train.make_attempt(policy, [e.prompt for e in examples], examples, config, 0.0, "greedy")
    wrong = [example for example, right in zip(examples, attempt.correct, strict=True) if not right]
    assert 0 < len(wrong) < len(examples)
    assert build_hard_arithmetic.find_failures(policy, examples, config, len(examples)) == wrong
    some = build_hard_arithmetic.find_failures(policy, examples, config, 3)
    assert some == wrong[: len(some)] and 3 <= len(some) < len(wrong), "it stops at the batch in which it has enough"


@pytest.mark.parametrize("train_rows, code", [(6, 0), (60, 2)])
def test_the_script_writes_both_splits_or_says_what_to_ask_for(tmp_path, train_rows: int, code: int) -> None:
    command = [sys.executable, "build_hard_arithmetic.py", *TINY, "--n-train", str(train_rows), "--n-eval", "2",
               "--pool", "20", "--out", str(tmp_path / "hard")]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    if code:
        assert "--pool 20: configs/tiny failed on" in done.stderr
        return
    made = datasets.load_from_disk(str(tmp_path / "hard"))
    assert {split: len(rows) for split, rows in made.items()} == {"train": 6, "test": 2}
    questions = [row["question"] for rows in made.values() for row in rows]
    assert len(set(questions)) == 8
