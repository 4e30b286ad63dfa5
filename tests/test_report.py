"""What a run reports and leaves for others: later attempts, votes, intervals, cards, merged models, the hub, W&B,
`--quiet`, the samples view, and rewards from a file of the user's own."""

from __future__ import annotations

import base64
import http.server
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import huggingface_hub
import matplotlib.image
import numpy as np
import plain_peft
import pytest
import torch
import transformers
import yaml
from conftest import (
    IM_END,
    ROOT,
    SELF_CORRECTION,
    as_from_the_shell,
    build_data,
    build_model,
    build_tokenizer,
    fork_run,
    no_curves,
    output,
    perturb,
    teach_format,
    with_keys,
    write_jsonl,
)
from peft import PeftModel
from safetensors.torch import load_file
from test_decoder import SHAPE
from transformers import AutoModelForCausalLM

import profile_run
import train

TABLE_HEAD = "| checkpoint | Acc@t1"
TOKEN = "hf_" + "secret" * 6
IDS = [[20, 30, 40, 50, 60, 33]]


@pytest.fixture
def forgotten() -> Iterator[None]:
    """What a test registers is gone after it."""
    places = (train.REWARD_FNS, train.ANSWER_EXTRACTORS, sys.modules)
    known = [set(place) for place in places]
    yield
    for place, names in zip(places, known, strict=True):
        for name in set(place) - names:
            if place is not sys.modules or name.startswith("rewards_of_"):
                del place[name]


def read_jsonl(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n")[:-1]]


# ------------------------------------------------------------------------------------------- later attempts and votes


@pytest.fixture
def scripted(make_policy: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """scripted(script, changes) -> policy, config, examples, calls: the policy answers by script.

    script: {question: (target, answers of the first attempts, of the second, ...)}; a question's rows get an attempt's
    answers in turn, from the first again when they are through. "" answers nothing; a final "..." is cut off before
    EOS. calls: (question, attempt, prompt, completion, temperature) of every row sampled."""

    def build(script: dict[str, tuple], changes: dict[str, Any]) -> tuple:
        policy, config = make_policy(changes | {"reward.answer_extractor": "gsm8k_hash"})
        rows = [(question, f"#### {target}") for question, (target, *_) in script.items()]
        examples, calls = train.encode_rows(rows, "test", config, policy.tokenizer), []

        def sample(_: Any, prompts: list, budget: int, temperature: float, seed: str) -> tuple[list, None]:
            made = []
            for prompt in prompts:
                question = next(e.question for e in examples if prompt[: len(e.prompt)] == e.prompt)
                attempt = 1 + policy.tokenizer.decode(prompt).count(SELF_CORRECTION)
                turn = sum(call[:2] == (question, attempt) for call in calls)
                answers = script[question][attempt]
                text = answers[turn % len(answers)]
                tagged = f"<answer>{text.removesuffix('...')}</answer>" if text else "<think>?"
                ids = policy.tokenizer(tagged + IM_END * (not text.endswith("...")))["input_ids"]
                calls.append((question, attempt, prompt, ids, temperature))
                made.append(ids)
            return made, None

        monkeypatch.setattr(train, "sample", sample)
        return policy, config, examples, calls

    return build


def test_later_attempts_by_hand(scripted: Callable[..., Any]) -> None:
    script = {
        "1+1=?": ("2", ["2"], ["3"], ["2"], ["2"]),
        "1+2=?": ("3", ["4"], ["5..."], [""], ["3"]),
        "1+3=?": ("4", ["4"], ["4"], ["4..."], ["4"]),
        "1+4=?": ("5", ["6"], ["5"], ["5"], ["5"]),
        "1+5=?": ("6", [""], [""], ["6"], ["7"]),
    }
    wanted = {"eval.attempts": 4, "model.max_seq_length": 512, "train.generation_temperature": 0.7}
    policy, config, examples, calls = scripted(script, wanted)
    event, samples = train.evaluate(policy, examples, config, "stage1")
    assert [event[f"acc_attempt{number}"] for number in (1, 2, 3, 4)] == [2 / 5, 2 / 5, 4 / 5, 4 / 5]
    assert event["delta"] == 0
    assert (event["delta_i_to_c"], event["delta_c_to_i"]) == (1 / 5, 1 / 5)
    assert [event[f"truncated_attempt{number}"] for number in (1, 2, 3, 4)] == [0, 1 / 5, 1 / 5, 0]
    assert not [key for key in event if key.startswith("vote")]
    assert {temperature for *_, temperature in calls} == {0.0}
    for number, row in enumerate(samples):
        answers = [row[f"text_attempt{attempt}"] for attempt in (1, 2, 3, 4)]
        turns = script[examples[number].question][1:]
        expected = [f"<answer>{t.removesuffix('...')}</answer>" if t else "<think>?" for (t,) in turns]
        assert [answer.removesuffix("<|im_end|>") for answer in answers] == expected
        assert row["correct_attempt4"] == (number != 4)
    for example in examples:
        mine = [call for call in calls if call[0] == example.question]
        assert [attempt for _, attempt, *_ in mine] == [1, 2, 3, 4]
        conversation = example.prompt
        for _, _, prompt, completion, _ in mine:
            assert prompt == conversation, "a later prompt is all before it, verbatim"
            ended = completion[-1] in policy.eos_token_ids
            conversation = conversation + completion[: len(completion) - ended] + policy.bridge
    table = train.results_table([event]).splitlines()
    assert [cell.strip() for cell in table[0].split("|")[2:6]] == ["Acc@t1", "Acc@t2", "Acc@t3", "Acc@t4"]
    assert [cell.strip() for cell in table[2].split("|")[2:6]] == ["0.400", "0.400", "0.800", "0.800"]


def test_attempts_that_the_sequence_cannot_hold_are_refused(make_policy: Callable[..., Any]) -> None:
    bridge = len(make_policy()[0].bridge)
    longest = 48 + 8 + 3 * (bridge + 12)  # attempt 1's prompt and completion, then three of bridge and completion
    make_policy({"eval.attempts": 4, "model.max_seq_length": longest})
    with pytest.raises(train.UserError, match=rf"^eval\.attempts: 4 attempts can take {longest} tokens") as fault:
        make_policy({"eval.attempts": 4, "model.max_seq_length": longest - 1})
    assert "\n" not in str(fault.value)
    with pytest.raises(train.UserError, match=r"^eval\.attempts"):
        make_policy({"eval.attempts": 1})


VOTES = {
    # target, first attempts (three, then three more in parallel), second attempts
    "a": ("7", ["7", "", "7", "5", "5", "7"], ["5", "7", "7"]),
    "b": ("9", ["", "", "9", "", "9", "8"], ["", "9.0", "8"]),
    "c": ("3", ["4", "3", "3", "3", "4", "4"], ["4", "3", "3"]),
    "d": ("2", ["2"], ["2"]),
}
BY_HAND = {
    "vote_parallel_2": 2 / 4,  # a: 7 5, a tie, the first wins. b: nobody votes. c: 4 3, the first is wrong. d
    "vote_parallel_4": 2 / 4,  # a: 7 - 5 5. b: - - - 9. c: 4 3 3 4. d
    "vote_parallel_6": 3 / 4,  # a: 7 - 7 5 5 7. b: - - 9 - 9 8. c: 4 3 3 3 4 4. d
    "vote_sequential_2": 1 / 4,  # a: 5. b: -. c: 4. d
    "vote_sequential_4": 2 / 4,  # a: 5 7. b: - 9.0. c: 4 3. d
    "vote_sequential_6": 4 / 4,  # a: 5 7 7. b: - 9.0 8, a tie. c: 4 3 3. d
}


@pytest.mark.parametrize("batch", [1, 4, 7, 64])
def test_votes_by_hand(scripted: Callable[..., Any], batch: int) -> None:
    changes = {"eval.samples": 3, "eval.batch_size": batch, "train.generation_temperature": 0.7}
    policy, config, examples, calls = scripted(VOTES, changes)
    assert train.vote(policy, examples, config) == BY_HAND
    assert {temperature for *_, temperature in calls} == {0.7}, "votes are sampled as in training"
    assert len(calls) == 4 * 3 * 3
    assert [attempt for question, attempt, *_ in calls if question == "b"] == [1, 1, 1, 2, 2, 2, 1, 1, 1]


def test_an_evaluation_with_samples_reports_votes(scripted: Callable[..., Any]) -> None:
    script = {"1+1=?": ("2", ["2"], ["2"]), "1+2=?": ("3", ["4"], ["3"])}
    policy, config, examples, calls = scripted(script, {"eval.samples": 2})
    event, _ = train.evaluate(policy, examples, config, "stage2")
    votes = {key: value for key, value in event.items() if key.startswith("vote")}
    assert votes == {"vote_parallel_2": 0.5, "vote_parallel_4": 0.5, "vote_sequential_2": 1, "vote_sequential_4": 1}
    assert {temperature for *_, temperature in calls} == {0.0, 1.0}
    tables = train.results_table([event]).split("\n\n")
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in tables[-1].splitlines()]
    assert cells[2:] == [["stage2", "2", "0.500", "1.000"], ["stage2", "4", "0.500", "1.000"]]
    assert train.results_table([event | {"checkpoint": "pretrain"}, event]).count("stage2") == 4


def test_majority_by_hand() -> None:
    from reward_function import majority

    tag = "<answer>{}</answer>".format
    extract = lambda text: text[8:-9] if text.startswith("<answer>") else ""  # noqa: E731
    assert majority([tag(1), tag(2), tag(2)], extract) == 1
    assert majority([tag(1), tag(2)], extract) == 0
    assert majority([tag(3), tag(2), tag(1), tag(1), tag(2)], extract) == 1
    assert majority(["no answer", "no answer", tag(5)], extract) == 2
    assert majority([tag("1/2"), tag(3), tag("0.5")], extract) == 0
    assert majority(["no", "no"], extract) == 0


# ---------------------------------------------------------------------------------------------------------- intervals


def test_intervals_are_of_rows_whose_attempts_stay_together() -> None:
    rng = np.random.default_rng(5)
    first = rng.random(4000) < 0.4
    second = np.where(rng.random(4000) < 0.7, first, rng.random(4000) < 0.9)
    correct = np.stack([first, second], 1).astype(float)
    found = train.intervals(correct)
    assert found == train.intervals(correct.copy()), "the same on every call"
    columns = {"acc_attempt1": correct[:, 0], "acc_attempt2": correct[:, 1], "delta": correct[:, 1] - correct[:, 0]}
    assert set(found) == {f"{name}_interval" for name in columns}
    for name, values in columns.items():
        low, high = found[f"{name}_interval"]
        error = values.std() / math.sqrt(len(values))
        assert low < values.mean() < high
        assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.3 * error), name
        assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.3 * error), name


def test_attempts_that_agree_have_no_uncertain_delta() -> None:
    right = (np.arange(50) % 3 == 0).astype(float)
    found = train.intervals(np.stack([right, right], 1))
    assert found["delta_interval"] == [0, 0]
    assert found["acc_attempt1_interval"] == found["acc_attempt2_interval"]
    assert found["acc_attempt1_interval"][0] < right.mean() < found["acc_attempt1_interval"][1]
    assert train.intervals(np.ones((1, 2))) == {"acc_attempt1_interval": [1, 1], "acc_attempt2_interval": [1, 1],
                                                "delta_interval": [0, 0]}  # fmt: skip


@pytest.mark.parametrize("trained", [False, True])
def test_a_run_of_an_older_version_is_drawn_and_printed(
    tmp_path: Path, make_config: Callable[..., Any], trained: bool
) -> None:
    """Without intervals, without the split: --resume must not fail on it."""
    evals = [{"event": "eval", "checkpoint": "pretrain", "n": 4, "global_step": 0, "acc_attempt1": 0.25,
              "acc_attempt2": 0.5, "delta": 0.25}]  # fmt: skip
    names = ("reward", "acc", "kl", "completion_tokens", "truncated")
    steps = [{"event": "train", "stage": 1, "step": step, "global_step": step, "reward_gap": 0.1}
             | {f"{name}_attempt{number}": 0.5 for name in names for number in (1, 2)} for step in (1, 2)]  # fmt: skip
    write_jsonl(tmp_path / "metrics.jsonl", evals + steps * trained)
    train.draw_curves(tmp_path)
    assert matplotlib.image.imread(tmp_path / "curves.png").size
    table = train.results_table(evals)
    assert "| 0.250" in table
    assert "unanswered" not in table
    assert table in train.model_card(make_config(), evals, tmp_path / "stage1")
    resumed = train.results_table([*evals, evals[0] | {"checkpoint": "stage1", "wrong_answered": 0.5}])
    assert [line.split("|")[1].strip() for line in resumed.split("\n\n")[-1].splitlines()[2:]] == ["pretrain", "stage1"]


# ------------------------------------------------------------------------------------------ what the corrections are

PAIRS = {
    # target, attempt 1, attempt 2: as `completed` reads them
    "no pair, mended": ("7", "so 9", "<answer>7</answer>"),
    "cut off, mended": ("7", "<think>2+...", "<answer>7</answer>"),
    "cut off after a wrong answer, mended": ("7", "<answer>6</answer> or...", "<answer>7</answer>"),
    "wrong, mended": ("7", "<answer>6</answer>", "<answer>7</answer>"),
    "two pairs, mended": ("7", "<answer>7</answer><answer>8</answer>", "<answer>8</answer><answer>7</answer>"),
    "an empty pair, a right box": ("7", "<answer></answer> \\boxed{7}", "<answer></answer> \\boxed{7}"),
    "right, then no pair": ("7", "<answer>7</answer>", "it is 7"),
    "right, then cut off": ("7", "<answer>7</answer>", "<answer>7..."),
    "right, then wrong": ("7", "<answer>7</answer>", "<answer>8</answer>"),
    "right twice": ("7", "<answer>7</answer>", "<think></think><answer>7.0</answer>"),
    "wrong, the same": ("7", "<answer>6</answer>", "<answer>6</answer>"),
    "wrong, the same in other words": ("7", "<answer>6</answer>", "<think>!</think><answer>$6.00</answer>"),
    "wrong, another": ("7", "<answer>6</answer>", "<answer>8</answer>"),
    "wrong, then no pair": ("7", "<answer>6</answer>", "hm"),
    "no pair, then wrong": ("7", "hm", "<answer>6</answer>"),
    "cut off twice": ("7", "hm...", "hm..."),
}


@pytest.fixture
def evaluated_pairs(
    make_policy: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[dict, list]]:
    """evaluated_pairs(pairs, changes) -> event, sample rows of scripted pairs; a text that ends in "..." has no EOS."""

    def evaluate(pairs: dict[str, tuple[str, str, str]], changes: dict[str, Any] | None = None) -> tuple[dict, list]:
        policy, config = make_policy({"reward.answer_extractor": "gsm8k_hash"} | (changes or {}))
        bare = config.reward.answer_extractor == "identity"
        rows = [(name, f"#### {target}" if not bare else target) for name, (target, *_) in pairs.items()]
        examples = train.encode_rows(rows, "test", config, policy.tokenizer)
        attempts = iter(zip(*(texts for _, *texts in pairs.values()), strict=True))

        def sample(*_: Any) -> tuple[list, None]:
            texts = [text.removesuffix("...") if text.endswith("...") else text + IM_END for text in next(attempts)]
            return policy.tokenizer(texts)["input_ids"], None

        monkeypatch.setattr(train, "sample", sample)
        return train.evaluate(policy, examples, config, "stage1")

    room = {"train.max_prompt_length_attempt1": 96, "train.max_prompt_length_attempt2": 148, "eval.batch_size": 99}
    return lambda pairs, changes=None: evaluate(pairs, room | (changes or {}))


def test_the_split_by_hand(evaluated_pairs: Callable[..., Any]) -> None:
    event, samples = evaluated_pairs(PAIRS)
    counts = {
        "acc_attempt1": 4,
        "acc_attempt2": 6,
        "unanswered_attempt1": 5,  # no pair twice, cut off twice, an empty pair
        "unanswered_attempt2": 5,
        "truncated_attempt1": 3,
        "truncated_attempt2": 2,
        "delta_i_to_c": 5,
        "unanswered_to_correct": 2,
        "wrong_to_correct": 3,
        "delta_c_to_i": 3,
        "correct_to_unanswered": 2,
        "correct_to_wrong": 1,
        "wrong_answered": 7,
        "flexible_acc_attempt1": 5,  # and the box
        "flexible_acc_attempt2": 9,  # and "it is 7", "<answer>7" and the box
    }
    assert {key: event[key] for key in counts} == pytest.approx({key: n / 16 for key, n in counts.items()})
    assert event["wrong_mended"] == pytest.approx(3 / 7)
    assert event["wrong_repeated"] == pytest.approx(2 / 7)
    answers = {row["question"]: (row["answer_attempt1"], row["answer_attempt2"]) for row in samples}
    assert answers["two pairs, mended"] == ("8", "7")
    assert answers["cut off, mended"] == ("", "7")
    assert answers["cut off after a wrong answer, mended"] == ("6", "7")
    assert answers["an empty pair, a right box"] == ("", "")
    main, _, split = train.results_table([event]).split("\n\n")
    assert "wrong->c" not in main
    head, _, row = ([cell.strip() for cell in line.split("|")[1:-1]] for line in split.splitlines())
    assert dict(zip(head, row, strict=True)) == {
        "checkpoint": "stage1", "flexible 1": "0.312", "flexible 2": "0.562", "unanswered 1": "0.312",
        "unanswered 2": "0.312", "cut off 1": "0.188", "cut off 2": "0.125", "unanswered->c": "0.125",
        "wrong->c": "0.188", "c->unanswered": "0.125", "c->wrong": "0.062", "wrong 1": "0.438", "mended": "0.429",
        "repeated": "0.286",
    }  # fmt: skip


def test_without_a_wrong_first_attempt_nothing_is_mended_or_repeated(evaluated_pairs: Callable[..., Any]) -> None:
    event, _ = evaluated_pairs({name: PAIRS[name] for name in ("right twice", "cut off twice", "no pair, mended")})
    assert (event["wrong_answered"], event["wrong_mended"], event["wrong_repeated"]) == (0, None, None)
    assert "| 0.000   |        |          |" in train.results_table([event])


def test_a_text_that_was_cut_off_is_not_its_own_answer(evaluated_pairs: Callable[..., Any]) -> None:
    """`identity` takes a whole text without a pair for the answer."""
    pairs = {"a": ("7", "<think>5...", "<answer>7</answer>"), "b": ("7", "<answer>6</answer>...", "6"),
             "c": ("7", "7...", "6...")}  # fmt: skip
    event, samples = evaluated_pairs(pairs, {"reward.answer_extractor": "identity"})
    assert [row["answer_attempt1"] for row in samples] == ["", "6", ""]
    assert [row["answer_attempt2"] for row in samples] == ["7", "6", ""]
    assert event["unanswered_to_correct"] == event["wrong_answered"] == event["correct_to_unanswered"] == 1 / 3
    assert event["unanswered_attempt1"] == 1 / 3, "a right one is correct all the same"
    assert event["wrong_repeated"] == 1


KINDS_OF_PAIRS = {
    "no pair, mended": "unanswered -> correct",
    "wrong, mended": "wrong -> correct",
    "right, then cut off": "correct -> unanswered",
    "right, then wrong": "correct -> wrong",
    "wrong, the same": "copied, wrong",
    "wrong, the same in other words": "wrong, repeated",
    "wrong, another": "wrong, another wrong answer",
    "wrong, then no pair": "wrong -> unanswered",
    "no pair, then wrong": "unanswered -> wrong",
    "right twice": "still correct",
    "cut off twice": "copied, unanswered",
    "cut off, then no pair": "still unanswered",
    "right, copied": "copied, correct",
}
MORE_PAIRS = {
    "cut off, then no pair": ("7", "ha...", "hm"),
    "right, copied": ("7", "<answer>7</answer>", "<answer>7</answer>"),
}


@pytest.mark.parametrize("version", ["new", "old", "old, its extractor is gone"])
def test_samples_name_the_kind_of_each_pair(
    evaluated_pairs: Callable[..., Any], show: Callable[..., Any], tmp_path: Path, version: str
) -> None:
    _, rows = evaluated_pairs({name: (PAIRS | MORE_PAIRS)[name] for name in KINDS_OF_PAIRS})
    if version != "new":
        rows = [{key: value for key, value in row.items() if not key.startswith("answer_")} for row in rows]
        extractor = "gsm8k_hash" if version == "old" else "of_my_own"
        (tmp_path / "config.yaml").write_text(f"reward:\n  answer_extractor: {extractor}\n")
    write_jsonl(tmp_path / "samples.jsonl", rows)
    code, text, errors = show("--samples", str(tmp_path))
    assert (code, errors) == (0, "")
    shown = dict(re.findall(r"=== ([^:]*): target .*\n(.*)", text))
    counted = {kind: int(count) for count, kind in re.findall(r"^ +(\d+)  (.*)$", text.partition("\n===")[0], re.M)}
    if version == "old, its extractor is gone":
        assert counted == {"corrected (i->c)": 2, "broken (c->i)": 2, "changed, still wrong": 5,
                           "changed, still right": 1, "copied": 3}  # fmt: skip
    else:
        assert shown == {kind: question for question, kind in KINDS_OF_PAIRS.items()}
        assert counted == dict.fromkeys(KINDS_OF_PAIRS.values(), 1)


# ----------------------------------------------------------------------------------------- a budget that cuts too much


@pytest.fixture
def warned(make_config: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """warned(shares cut off by step, ...) -> what is said after these steps of 64 attempts."""

    def warn(*shares: tuple[float, float], stage: int = 1) -> str:
        lines = [{"event": "train", "stage": stage, "step": i, "truncated_attempt1": a, "truncated_attempt2": b}
                 for i, (a, b) in enumerate(shares, 1)]  # fmt: skip
        other = {"event": "train", "stage": 3 - stage, "step": 1, "truncated_attempt1": 1, "truncated_attempt2": 1}
        write_jsonl(tmp_path / "metrics.jsonl", [{"event": "eval", "checkpoint": "pretrain"}, other, *lines])
        train.warn_of_budgets(train.Run(tmp_path, make_config(), ""), stage, 64)
        return capsys.readouterr().out

    return warn


def test_a_budget_that_cuts_off_more_than_a_twentieth_is_said(warned: Callable[..., str], tmp_path: Path) -> None:
    text = warned((0.5, 0.0), (0.25, 0.0), (0.15, 0.0), (0.15, 0.0), (0.1, 0.0))
    assert text == ("Warning: train.max_new_tokens_attempt1 = 8 cut off 23% of the first 320 first attempts; python "
                    f"profile_run.py --config {tmp_path}/config.yaml recommends budgets.\n")  # fmt: skip
    text = warned((0.06, 0.5), stage=2)
    assert text.count("\n") == 1
    assert "attempt1 = 8 cut off 6% of the first 64 first attempts and " in text
    assert "attempt2 = 12 cut off 50% of the first 64 second attempts;" in text
    assert warned((0.05, 0.05), (0.05, 0.01)) == ""


def test_a_run_says_once_a_stage_that_its_budgets_cut(
    tiny_run: Callable[..., list[str]],
    tmp_path: Path,  # noqa: F811
) -> None:
    """Also when it stops before the fifth step and is resumed."""
    argv = tiny_run(tmp_path, "--set", "train.max_new_tokens_attempt1=2", "train.stage2_epochs=0.4")

    def before() -> None:
        no_curves()
        log = train.Run.log

        def log_and_stop(run: train.Run, event: dict, samples: list) -> None:
            log(run, event, samples)
            if event.get("step") == 3:
                train.SIGNALS_SEEN.append(signal.SIGINT)

        train.Run.log = log_and_stop

    assert fork_run(argv, tmp_path / "log", before) == 130, output(tmp_path / "log")
    assert "cut off" not in output(tmp_path / "log", "out")
    assert fork_run([*argv, "--resume"], tmp_path / "log", no_curves) == 0, output(tmp_path / "log")
    lines = output(tmp_path / "log", "out").splitlines()
    warning = "Warning: train.max_new_tokens_attempt1 = 2 cut off "
    said = [number for number, line in enumerate(lines) if line.startswith(warning)]
    assert [lines[number - 1].partition(":")[0] for number in said] == ["Stage I step 5/6", "Stage II step 2/2"]
    events = [e for e in read_jsonl(tmp_path / "run" / "metrics.jsonl") if e.get("stage") == 1][:5]
    share = sum(e["truncated_attempt1"] for e in events) / 5
    assert f"cut off {share:.0%} of the first 20 first attempts" in lines[said[0]]


# -------------------------------------------------------------------------------------------------- cards of adapters


@pytest.fixture(scope="module")
def finished(tiny_run: Callable[..., list[str]], tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:  # noqa: F811
    """A quick run of both stages with votes and a merged model, its argv and what it printed."""
    out = tmp_path_factory.mktemp("finished")
    flags = ["--set", "eval.samples=2", "output.merge=true", "train.stage1_epochs=0.5", "train.stage2_epochs=0.5"]
    argv = tiny_run(out, *flags)
    assert fork_run(argv, out / "log", no_curves) == 0, output(out / "log")
    config = train.read_config(str(out / "run" / "config.yaml"))
    return SimpleNamespace(
        out=out,
        folder=out / "run",
        argv=argv,
        config=config,
        printed=output(out / "log", "out"),
        errors=output(out / "log"),
        base=config.model.name,
        data=config.dataset.name,
    )


def plain_logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor(IDS)).logits.float()


def test_cards_hold_the_runs_results_and_no_local_names(finished: SimpleNamespace) -> None:
    evals = json.loads((finished.folder / "results.json").read_text())["evals"]
    for stage in ("stage1", "stage2"):
        card = huggingface_hub.ModelCard.load(finished.folder / stage / "README.md")
        data = card.data
        assert (data.library_name, data.pipeline_tag) == ("peft", "text-generation")
        assert {"lora", "self-correction", "reinforcement-learning"} <= set(data.tags)
        assert data.base_model is None, "the hub refuses a local folder"
        assert data.datasets is None
        (event,) = (e for e in evals if e["checkpoint"] == stage)
        assert [result.metric_value for result in data.eval_results] == [event["acc_attempt1"], event["acc_attempt2"]]
        assert {result.metric_type for result in data.eval_results} == {"accuracy"}
        assert data.model_name == "run"
        rest = card.content.replace(str(finished.folder / stage), "")
        assert str(finished.out) not in rest
        assert finished.base not in rest
        assert finished.data not in rest
        assert f"`{stage}` is this adapter" in rest
        assert SELF_CORRECTION in rest
    table = train.results_table(evals)
    assert table in card.content
    assert "vote of that many" in table


def test_cards_of_checkpoints_claim_no_result(finished: SimpleNamespace) -> None:
    for step in finished.folder.glob("stage[12]/step_*"):
        card = huggingface_hub.ModelCard.load(step / "README.md")
        assert card.data.eval_results is None
        assert "model_name" not in card.data.to_dict()
        assert "Not evaluated yet" in card.content
        assert "is this adapter" not in card.content
        assert f'"{step}"' in card.content
    assert step.name == "step_2"


def test_the_cards_snippet_runs(finished: SimpleNamespace) -> None:
    content = (finished.folder / "stage2" / "README.md").read_text()
    (snippet,) = re.findall(r"```python\n(.*?)```", content, re.DOTALL)
    names: dict[str, Any] = {}
    exec(snippet, names)
    base = AutoModelForCausalLM.from_pretrained(finished.base)
    expected = plain_logits(PeftModel.from_pretrained(base, finished.folder / "stage2"))
    assert torch.equal(plain_logits(names["model"]), expected)
    prompt = names["tokenizer"].apply_chat_template([{"role": "user", "content": "1+1=?"}], tokenize=False)
    assert "1+1=?" in prompt


def test_the_cards_snippet_gives_the_runs_own_attempts(finished: SimpleNamespace) -> None:
    """Plain PEFT, both attempts, attempt 1 handed back as token ids."""
    card = (finished.folder / "stage2" / "README.md").read_text()
    (snippet,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    config = finished.config
    budget = min(config.train.max_new_tokens_attempt1, config.train.max_new_tokens_attempt2)
    rows = train.read_lines(finished.folder / "samples.jsonl")
    rows = [row for row in rows if row["event"] == "eval" and row["checkpoint"] == "stage2"]
    for row in [row for row in rows if row["tokens_attempt1"] <= budget][:3]:
        mine = snippet.replace('"A pen costs 3 dollars. What do 7 cost?"', repr(row["question"]))
        mine = mine.replace(f"max_new_tokens={config.train.max_new_tokens_attempt2}", f"max_new_tokens={budget}")
        names: dict[str, Any] = {}
        exec(mine, names)
        plain = [names["tokenizer"].decode(names[key]) for key in ("first", "second")]
        assert plain[0] == row["text_attempt1"]
        assert row["text_attempt2"].startswith(plain[1])
        assert plain[1]


@pytest.mark.parametrize("as_text", [False, True])
def test_plain_peft_repeats_the_whole_evaluation(finished: SimpleNamespace, as_text: bool) -> None:
    """In float32, batched; the tiny tokenizer reads its own text back as the same tokens."""
    for counts in plain_peft.compare(finished.folder, "stage2", 6, as_text, "float32", size=4):
        assert counts["rows"] == counts["identical"] == counts["same answer"] == 6
        assert counts["right here"] == counts["right in the run"]


def test_hub_ids_stand_in_the_metadata(make_config: Callable[..., Any], tmp_path: Path) -> None:
    hub = {"model.name": "Qwen/Qwen3-0.6B", "dataset.name": "openai/gsm8k", "output.push_to_hub": "me/scored",
           "prompts.system": "Think.",
           "prompts.examples": [{"input": "1+1=?", "output": "<think>a\nb</think>2"}]}  # fmt: skip
    event = {"event": "eval", "checkpoint": "stage2", "acc_attempt1": 0.25, "acc_attempt2": 0.5, "n": 4}
    other = event | {"acc_attempt1": 0.75, "eval_only": True, "adapter": "elsewhere"}
    evals = [event | {"checkpoint": "pretrain"}, event, other]
    card = huggingface_hub.ModelCard(train.model_card(make_config(hub), evals, tmp_path / "stage2"))
    assert card.data.base_model == "Qwen/Qwen3-0.6B"
    assert card.data.datasets == ["openai/gsm8k"]
    assert {result.dataset_type for result in card.data.eval_results} == {"openai/gsm8k"}
    assert [result.metric_value for result in card.data.eval_results] == [0.25, 0.5], "not of another adapter"
    assert "0.750" not in card.content
    assert 'from_pretrained("me/scored")' in card.content
    assert "```\nThink.\n```" in card.content
    (turns,) = re.findall(r"```json\n(.*?)\n```", card.content, re.DOTALL)
    assert json.loads(turns) == [{"role": "user", "content": "1+1=?"},
                                 {"role": "assistant", "content": "<think>a\nb</think>2"}]  # fmt: skip
    assert card.content.index("Think.") < card.content.index(turns) < card.content.index("Sent after the first answer")
    assert "```json" not in train.model_card(make_config(hub | {"prompts.examples": []}), evals, tmp_path / "stage2")
    assert str(tmp_path) not in card.content
    earlier = train.model_card(make_config(hub), evals, tmp_path / "stage1")
    assert "me/scored" not in earlier, "only the last adapter is pushed"
    only_one = train.model_card(make_config(hub | {"train.stage2_epochs": 0}), evals, tmp_path / "stage1")
    assert "me/scored" in only_one


def test_evaluating_another_adapter_beside_a_run_leaves_its_cards(finished: SimpleNamespace) -> None:
    cards = {file: file.read_text() for file in finished.folder.glob("stage[12]/README.md")}
    here = ["--eval-only", "--resume-adapter", str(finished.folder / "stage1"), "--set", "train.alpha=3"]
    before = {name: (finished.folder / name).read_bytes() for name in ("metrics.jsonl", "samples.jsonl")}
    results = {name: (finished.folder / name).read_bytes() for name in ("results.json", "results.md")}
    try:
        code = fork_run([*finished.argv, *here], finished.out / "eval", no_curves)
        assert code == 0, output(finished.out / "eval")
        assert len(cards) == 2
        assert {file: file.read_text() for file in cards} == cards
    finally:
        for name, content in (before | results).items():
            (finished.folder / name).write_bytes(content)


def test_stage_two_from_elsewhere_leaves_the_first_stages_card(
    finished: SimpleNamespace,
    tmp_path: Path,
    tiny_run: Callable[..., list[str]],  # noqa: F811
) -> None:
    first = ["--set", "train.stage1_epochs=0.5", "train.stage2_epochs=0"]
    assert fork_run(tiny_run(tmp_path, *first), tmp_path / "log", no_curves) == 0, output(tmp_path / "log")
    card = (tmp_path / "run" / "stage1" / "README.md").read_text()
    second = ["--set", "train.stage2_epochs=0.2", "train.alpha=3", "--start-stage", "2", "--resume-adapter"]
    adapter = finished.folder / "stage2"
    code = fork_run(tiny_run(tmp_path, *second, str(adapter)), tmp_path / "log", no_curves)
    assert code == 0, output(tmp_path / "log")
    assert (tmp_path / "run" / "stage1" / "README.md").read_text() == card
    assert "alpha 3," in (tmp_path / "run" / "stage2" / "README.md").read_text()
    assert "Not evaluated yet" in (tmp_path / "run" / "stage2" / "step_0" / "README.md").read_text()


# ---------------------------------------------------------------------------------------- adapters and merged models


def build_qwen2(folder: Path) -> Path:
    """A random Qwen2: biases of q, k and v that are not trivial."""
    tokenizer = build_tokenizer()
    ends = {"eos_token_id": tokenizer.convert_tokens_to_ids(IM_END), "vocab_size": len(tokenizer)}
    torch.manual_seed(0)
    model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SHAPE | ends))
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter.data, mean=1.0, std=0.3)
    assert any(name.endswith("q_proj.bias") for name, _ in model.named_parameters())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


LOADER = """
import json, sys
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
ids, cases, out = json.loads(sys.argv[1])
logits = {}
for name, folder in cases.items():
    ways = {"adapter": AutoPeftModelForCausalLM, "merged": AutoModelForCausalLM}
    for way, auto in ways.items():
        with torch.no_grad():
            model = auto.from_pretrained(f"{folder}/{way}", dtype=torch.float32).eval()
            logits[f"{name}/{way}"] = model(input_ids=torch.tensor(ids)).logits
save_file(logits, out)
assert "train" not in sys.modules and "unsloth" not in sys.modules
"""


def test_adapters_and_merged_models_load_without_this_repository(
    make_policy: Callable[..., Any], tmp_path: Path
) -> None:
    bases = {"untied": build_model(tmp_path / "untied"), "tied": build_model(tmp_path / "tied", tied=True),
             "biases": build_qwen2(tmp_path / "biases")}  # fmt: skip
    expected, bare, cases = {}, {}, {name: str(tmp_path / f"{name}-saved") for name in bases}
    for name, base in bases.items():
        policy, _ = make_policy({"model.name": str(base), "model.lora.alpha": 6})
        perturb(policy, 0.1)
        weights = {key: value.clone() for key, value in policy.model.state_dict().items()}
        train.save_checkpoint(policy, Path(cases[name]) / "adapter", {"stage": 1}, None)
        train.save_merged(policy, Path(cases[name]) / "merged")
        assert all(torch.equal(value, weights[key]) for key, value in policy.model.state_dict().items())
        expected[name] = plain_logits(policy.model)
        with train.reference(policy):
            bare[name] = plain_logits(policy.model)
        merged = load_file(Path(cases[name]) / "merged" / "model.safetensors")
        assert {value.dtype for value in merged.values()} == {torch.bfloat16}
        assert ("lm_head.weight" in merged) == (name != "tied")
        assert not [key for key in merged if "lora" in key or "base_layer" in key]
        config = json.loads((Path(cases[name]) / "merged" / "config.json").read_text())
        assert config["dtype"] == "bfloat16"
        assert config["tie_word_embeddings"] == (name == "tied")
        ends = json.loads((Path(cases[name]) / "merged" / "generation_config.json").read_text())["eos_token_id"]
        assert (ends if isinstance(ends, list) else [ends]) == policy.eos_token_ids, "it ends where the policy does"
        assert transformers.AutoTokenizer.from_pretrained(Path(cases[name]) / "merged").chat_template
    call = [sys.executable, "-c", LOADER, json.dumps([IDS, cases, str(tmp_path / "logits")])]
    done = subprocess.run(call, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    logits = load_file(tmp_path / "logits")
    for name in bases:
        moved = (expected[name] - bare[name]).abs().mean()
        assert torch.allclose(logits[f"{name}/adapter"], expected[name], atol=1e-4), name
        off = (logits[f"{name}/merged"] - expected[name]).abs().mean()
        assert off < 0.1 * moved, f"{name}: bf16 may round, not more: {off} of {moved}"


def test_a_run_leaves_a_merged_model_on_request(finished: SimpleNamespace) -> None:
    base = AutoModelForCausalLM.from_pretrained(finished.base)
    expected = plain_logits(PeftModel.from_pretrained(base, finished.folder / "stage2"))
    merged = plain_logits(AutoModelForCausalLM.from_pretrained(finished.folder / "merged", dtype=torch.float32))
    before = plain_logits(AutoModelForCausalLM.from_pretrained(finished.base))
    assert (merged - expected).abs().mean() < 0.3 * (before - expected).abs().mean()
    assert not (finished.folder / "merged" / "adapter_config.json").exists()


# ------------------------------------------------------------------------------------------------------------ the hub


class FakeHub(http.server.BaseHTTPRequestHandler):
    """As much of huggingface.co as a push needs; `server.repos` and `server.asked` tell what came."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.asked.append((f"POST {self.path}", self.headers.get("authorization")))
        if self.path == "/api/repos/create":
            name = "{organization}/{name}".format(**json.loads(body))
            self.server.repos.setdefault(name, {})
            self.reply({"url": f"http://127.0.0.1:{self.server.server_port}/{name}"})
        elif self.path == "/api/validate-yaml":
            self.reply({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            files = [file["path"] for file in json.loads(body)["files"]]
            self.reply({"files": [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in files]})
        elif "/commit/" in self.path:
            name = self.path.removeprefix("/api/models/").partition("/commit")[0]
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    self.server.repos[name][line["value"]["path"]] = content
            here = f"http://127.0.0.1:{self.server.server_port}/{name}/commit/{'0' * 40}"
            self.reply({"commitUrl": here, "commitOid": "0" * 40, "success": True})
        else:
            self.reply({"error": f"no {self.path}"}, 404)

    def do_GET(self) -> None:
        self.server.asked.append((f"GET {self.path}", self.headers.get("authorization")))
        self.reply({"error": f"no {self.path}"}, 404)

    do_HEAD = do_GET

    def reply(self, content: dict[str, Any], status: int = 200) -> None:
        text = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(text)

    def log_message(self, *_: Any) -> None:
        pass


PUSHER = """
import json, os, sys
from pathlib import Path
import train  # before conftest, which would take it offline
sys.path.insert(0, "tests")
from conftest import fork_run, no_curves
del os.environ["WANDB_MODE"]
for argv, log, curves in json.loads(sys.argv[1]):
    print(fork_run(argv, Path(log), None if curves else no_curves), flush=True)
    sys.stdin.readline()
"""


@pytest.fixture(scope="module")
def pushed(tiny_run: Callable[..., list[str]], tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:  # noqa: F811
    """A run whose push finds no hub, then the same with --resume and a hub that takes it. No W&B login.

    In a process of its own: huggingface_hub reads its address when it is imported."""
    out = tmp_path_factory.mktemp("pushed")
    flags = ["output.push_to_hub=me/scored", "train.stage1_epochs=0.2", "train.stage2_epochs=0.4"]
    argv = tiny_run(out, "--set", *flags, "train.checkpoint_every=1")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), FakeHub, bind_and_activate=False)
    server.server_bind()  # and does not listen yet: connections are refused
    server.repos, server.asked = {}, []
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB", "HF_"))} | {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_address[1]}", "HF_TOKEN": TOKEN, "HF_HOME": str(out / "home"),
        "HF_HUB_DISABLE_TELEMETRY": "1", "NETRC": os.devnull,
    }  # fmt: skip
    runs = [(argv + ["wandb_project=score-tests"], str(out / "refused"), True),
            (argv + ["--resume"], str(out / "done"), False)]  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-c", PUSHER, json.dumps(runs)],
        cwd=ROOT,
        env=environment,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with process, server:
        first = process.stdout.readline()
        before = {file: file.read_bytes() for file in (out / "run").glob("stage*/**/*") if file.is_file()}
        server.server_activate()
        threading.Thread(target=server.serve_forever, daemon=True).start()
        second, _ = process.communicate("\n\n", timeout=120)
        server.shutdown()
    assert (int(first), int(second)) == (1, 0), output(out / "refused") + output(out / "done")
    printed = {name: (output(out / name, "out"), output(out / name, "err")) for name in ("refused", "done")}
    return SimpleNamespace(folder=out / "run", before=before, hub=server, **printed)


def test_a_push_that_fails_is_one_line_and_the_adapters_are_in_place(pushed: SimpleNamespace) -> None:
    text, errors = pushed.refused
    (line,) = errors.splitlines()
    assert line.startswith("output.push_to_hub: me/scored was not pushed: ")
    assert f"hf upload me/scored {pushed.folder / 'stage2'}" in line
    assert TABLE_HEAD in text, "the results are printed all the same"
    names = {str(file.relative_to(pushed.folder)) for file in pushed.before}
    assert {f"stage{n}/{name}" for n in (1, 2) for name in ("adapter_model.safetensors", "state.json")} <= names


def test_resuming_pushes_the_last_adapter_and_nothing_else(pushed: SimpleNamespace) -> None:
    text, errors = pushed.done
    assert errors == ""
    assert "Pushed " in text
    assert set(pushed.hub.repos) == {"me/scored"}
    files = pushed.hub.repos["me/scored"]
    assert {"README.md", "adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= set(files)
    assert not [name for name in files if "step_" in name or "state" in name or "optimizer" in name or "/" in name]
    final = pushed.folder / "stage2"
    assert list(final.glob("step_*"))
    assert all(content == (final / name).read_bytes() for name, content in files.items())
    assert huggingface_hub.ModelCard(files["README.md"].decode()).data.eval_results
    assert b'from_pretrained("me/scored")' in files["README.md"]
    assert {word for word, _ in pushed.hub.asked} == {
        "POST /api/repos/create",
        "POST /api/validate-yaml",
        "POST /api/models/me/scored/preupload/main",
        "POST /api/models/me/scored/commit/main",
    }, "nothing else asks the hub"
    assert {token for _, token in pushed.hub.asked} == {f"Bearer {TOKEN}"}


def test_the_token_is_written_nowhere(pushed: SimpleNamespace) -> None:
    files = [file for file in pushed.folder.rglob("*") if file.is_file()]
    assert len(files) > 20
    assert [file for file in files if TOKEN.encode() in file.read_bytes()] == []
    assert TOKEN not in "".join(pushed.refused + pushed.done)


def test_wandb_offline_says_how_to_sync(pushed: SimpleNamespace) -> None:
    assert f"wandb sync {pushed.folder}/wandb/offline-run-*" in pushed.refused[0]
    (folder,) = pushed.folder.glob("wandb/offline-run-*")
    assert folder.name.endswith(json.loads((pushed.folder / "stage2" / "state.json").read_text())["wandb_id"])


def test_output_without_a_terminal_has_no_carriage_returns(pushed: SimpleNamespace, finished: SimpleNamespace) -> None:
    for text in (*pushed.refused, *pushed.done, finished.printed, finished.errors):
        assert "\r" not in text
        assert "\x1b" not in text


# ----------------------------------------------------------------------------------------------------- what is printed


def test_quiet_prints_the_final_table_and_nothing_else(
    tiny_run: Callable[..., list[str]],
    tmp_path: Path,  # noqa: F811
) -> None:
    argv = tiny_run(tmp_path, "--quiet", "--set", "train.stage1_epochs=0.4", "train.stage2_epochs=0.2")
    assert fork_run(argv, tmp_path / "log", no_curves) == 0, output(tmp_path / "log")
    assert output(tmp_path / "log") == ""
    assert output(tmp_path / "log", "out").strip() == (tmp_path / "run" / "results.md").read_text().strip()
    assert fork_run([*argv, "--resume", "--set", "train.seed=5"], tmp_path / "log", no_curves) == 2
    assert output(tmp_path / "log").startswith("--resume: "), "an error is always said"
    assert output(tmp_path / "log", "out") == ""


def test_a_run_says_its_steps_and_saved_places(finished: SimpleNamespace) -> None:
    assert f"Saved {finished.folder}/stage1/step_2" in finished.printed
    assert "Stage I step 1/3: reward" in finished.printed
    assert "Stage II step 3/3: reward" in finished.printed
    assert finished.errors == ""


@pytest.mark.parametrize("interval", [0.0, 300.0])
def test_results_and_curves_are_renewed_while_a_run_goes_on(
    tiny_run: Callable[..., list[str]],
    tmp_path: Path,
    interval: float,  # noqa: F811
) -> None:
    def draw(folder: Path) -> None:
        (folder / "curves.png").write_bytes(b"")
        with (tmp_path / "drawn").open("a") as stream:
            print(len(train.read_lines(folder / "metrics.jsonl")), file=stream)

    def before() -> None:
        train.RENEW_SECONDS, train.draw_curves = interval, draw

    assert train.RENEW_SECONDS == 300
    keys = ("train.checkpoint_every=null", "train.stage1_epochs=0.5", "train.stage2_epochs=0.5")
    assert fork_run(tiny_run(tmp_path, "--set", *keys), tmp_path / "log", before) == 0, output(tmp_path / "log")
    lines = list(map(int, (tmp_path / "drawn").read_text().split()))  # of metrics.jsonl when it was drawn
    assert lines == (list(range(1, 10)) if interval == 0 else [1, 5, 9]), "else only when an evaluation is done"
    last = output(tmp_path / "log", "out").splitlines()[-1]
    assert last.endswith(f" s: {tmp_path / 'run' / 'results.md'}, {tmp_path / 'run' / 'curves.png'}")


# ---------------------------------------------------------------------------------------------------------------- W&B


@pytest.fixture
def fake_wandb(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A `wandb` that keeps what it is told: .inits, .logged, .summary, .finished; .faults raise by name."""
    fake = ModuleType("wandb")
    fake.inits, fake.logged, fake.summary, fake.finished, fake.faults, fake.at_step = [], [], {}, 0, {}, {}

    def told(name: str, keep: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if name in fake.faults:
                raise fake.faults[name]
            return keep(*args, **kwargs)

        return call

    def log(values: dict[str, Any]) -> None:
        fake.logged.append(values)
        fake.at_step.get(values["global_step"], lambda: None)()

    def finish() -> None:
        fake.finished += 1

    def init(**how: Any) -> Any:
        fake.inits.append(how)
        run = SimpleNamespace(id=how["id"] or "firstid", summary=fake.summary)
        run.log, run.finish = told("log", log), told("finish", finish)
        run.define_metric = told("define_metric", lambda *_, **__: None)
        return run

    fake.init = told("init", init)
    fake.Settings = lambda **settings: settings
    fake.Table = lambda columns, data: SimpleNamespace(columns=columns, data=data)
    fake.Image = lambda file: SimpleNamespace(pixels=matplotlib.image.imread(file).size)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


@pytest.fixture
def run_here(
    tiny_run: Callable[..., list[str]],  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Iterator[Callable[..., tuple[int, str]]]:
    """run_here(*flags) -> (exit code, all that was printed) of a short run with W&B in this process."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def run(*flags: str) -> tuple[int, str]:
        short = ["wandb_project=score-tests", "train.stage1_epochs=0.7", "train.stage2_epochs=0.5"]
        argv = tiny_run(tmp_path, "--set", *short, *flags)
        monkeypatch.setattr(sys, "argv", ["train.py", *argv])
        train.SIGNALS_SEEN.clear()
        code = as_from_the_shell(argv)
        printed = capsys.readouterr()
        return code, printed.out + printed.err

    yield run
    train.SIGNALS_SEEN.clear()
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_wandb_gets_both_stages_on_one_axis(
    fake_wandb: Any, run_here: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted in Stage I and resumed: the same W&B run, a step after the other."""
    draw, drawn = train.draw_curves, []
    monkeypatch.setattr(train, "draw_curves", lambda folder: drawn.append(draw(folder)) if len(drawn) < 1 else None)
    fake_wandb.at_step[3] = lambda: train.SIGNALS_SEEN.append(signal.SIGINT)
    code, printed = run_here()
    assert code == 130, printed
    fake_wandb.at_step.clear()
    code, printed = run_here("--resume")
    assert code == 0, printed
    first, second = fake_wandb.inits
    assert (first["id"], first["resume"]) == (None, None)
    assert (second["id"], second["resume"]) == ("firstid", "allow")
    assert second["mode"] == "offline"
    assert (second["project"], second["name"], second["config"]["run_name"]) == ("score-tests", "run", "run")
    assert fake_wandb.finished == 1

    steps = [values["global_step"] for values in fake_wandb.logged]
    assert steps == [0, 1, 2, 3, 4, 4, 5, 6, 7, 7], "pretrain, four steps, stage1, three steps, stage2"
    places = [{key.partition("/")[0] for key in values} - {"global_step"} for values in fake_wandb.logged]
    tables = {"eval", "curves"}
    assert places == [tables, *[{"stage1"}] * 4, {*tables, "train"}, *[{"stage2"}] * 3, {*tables, "train"}]
    lines = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert [line["global_step"] for line in lines] == steps, "metrics.jsonl has the same axis"
    for line, values in zip(lines, fake_wandb.logged, strict=True):
        prefix = f"stage{line['stage']}" if line["event"] == "train" else "eval"
        numbers = {key: value for key, value in line.items() if isinstance(value, (int, float))}
        assert {"reward_attempt1", "acc_attempt2"} < set(numbers)
        assert all(values[f"{prefix}/{key}"] == value for key, value in numbers.items())

    samples = read_jsonl(tmp_path / "run" / "samples.jsonl")
    wanted = {"question", "target"} | {
        f"{name}_attempt{n}" for name in ("text", "reward", "tokens", "truncated") for n in (1, 2)
    }
    last = fake_wandb.logged[-1]
    for name, rows in {
        "eval/samples": [s for s in samples if s.get("checkpoint") == "stage2"],
        "train/rollouts": [s for s in samples if s.get("stage") == 2],
    }.items():
        assert wanted <= set(last[name].columns)
        assert [dict(zip(last[name].columns, row, strict=True)) for row in last[name].data] == rows
    assert len(last["train/rollouts"].data) == 3 * 4
    assert last["curves"].pixels > 10_000
    evals = {line["checkpoint"]: line for line in lines if line["event"] == "eval"}
    for checkpoint, line in evals.items():
        assert fake_wandb.summary[f"{checkpoint}/acc_attempt2"] == line["acc_attempt2"]
        assert fake_wandb.summary[f"{checkpoint}/delta"] == line["delta"]


@pytest.mark.parametrize("what", ["import", "init", "define_metric", "log", "finish"])
def test_a_failing_wandb_never_stops_a_run(
    fake_wandb: Any, run_here: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    monkeypatch.setattr(train, "draw_curves", lambda folder: (folder / "curves.png").write_bytes(b""))
    fake_wandb.Image = lambda file: file
    fake_wandb.faults[what] = RuntimeError("the server is gone\nand more")
    if what == "import":
        monkeypatch.setitem(sys.modules, "wandb", None)
    code, printed = run_here("--set", "train.stage2_epochs=0")
    assert code == 0, printed
    (line,) = [line for line in printed.splitlines() if "W&B is off " in line]
    assert line.endswith("the server is gone") or (what == "import" and "wandb" in line)
    assert (tmp_path / "run" / "stage1" / "state.json").exists()
    assert len(fake_wandb.logged) == (6 if what == "finish" else 0)


# ---------------------------------------------------------------------------------------------- profile_run's split

PARTS = (
    "prefill", "token steps", "grading", "reference forward", "policy forward", "backward", "optimizer", "the rest",
)  # fmt: skip


@pytest.fixture
def split(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, str]]:
    """split(*overrides) -> the lines of one small profile_run.py by part, "step" the whole."""

    def run(*overrides: str) -> dict[str, str]:
        flags = ["--config", "configs/tiny.yaml", "--n", "4", "--set", "model.decoder=auto", *overrides]
        monkeypatch.setattr(sys, "argv", ["profile_run.py", *flags])
        assert profile_run.main() == 0
        printed = capsys.readouterr().out
        lines = printed.split("Where it goes")[1].split("\n\n")[0].splitlines()[1:]
        return {re.split(r"\s{2,}", line.strip())[0]: line for line in lines}

    return run


def seconds_of(line: str) -> float:
    return float(re.search(r"(\d+\.\d{3}) s", line)[1])


def test_a_steps_parts_sum_to_the_step(split: Callable[..., dict[str, str]]) -> None:
    before = (train.grade, train.completion_log_probs, train.Decoder._prefill, torch.Tensor.backward)
    lines = split()
    assert set(lines) == {*PARTS, "step"}, "and no limits: a CPU is no card that we know"
    assert "limit" not in "".join(lines.values())
    parts = {part: seconds_of(lines[part]) for part in PARTS}
    assert sum(parts.values()) == pytest.approx(seconds_of(lines["step"]), abs=0.0005 * (len(PARTS) + 1))
    assert min(parts[part] for part in ("prefill", "token steps", "policy forward", "backward")) > 0
    assert before == (train.grade, train.completion_log_probs, train.Decoder._prefill, torch.Tensor.backward)


def test_without_the_decoder_sampling_is_one_part(split: Callable[..., dict[str, str]]) -> None:
    assert set(split("model.decoder=generate")) == {*PARTS, "sampling", "step"} - {"prefill", "token steps"}


def test_what_is_paid_once_is_not_a_steps(
    monkeypatch: pytest.MonkeyPatch, split: Callable[..., dict[str, str]]
) -> None:
    """As when an answer starts the grader's worker: the first of the split's own steps takes longer, no later one."""
    grade, calls = train.grade, []
    watched = profile_run.split_step

    def slow_once(*args: Any) -> Any:
        if not calls:
            time.sleep(0.5)
        calls.append(1)
        return grade(*args)

    def splitting(*args: Any) -> Any:
        monkeypatch.setattr(train, "grade", slow_once)
        return watched(*args)

    monkeypatch.setattr(profile_run, "split_step", splitting)
    assert seconds_of(split()["grading"]) < 0.25
    assert len(calls) == 2 * profile_run.REPEATS


def test_parts_nest_and_an_error_leaves_nothing_watched() -> None:
    """A part inside another counts once, for the inner one; what the step raises comes through."""
    model = torch.nn.Linear(1, 1)
    model.base_model_prefix, model.model = "model", torch.nn.Identity()
    inner, policy = train.grade, SimpleNamespace(decoder=None, model=SimpleNamespace(get_base_model=lambda: model))
    optimizer = SimpleNamespace(step=lambda: (time.sleep(0.1), train.grade([], [], None), time.sleep(0.1)))

    def fails() -> None:
        raise ValueError("in the step")

    seconds, _ = profile_run.split_step(train, policy, optimizer, lambda: (optimizer.step(), time.sleep(0.1)))
    assert seconds["optimizer"] >= 0.2, "before and after what it calls"
    assert seconds["the rest"] >= 0.1 > seconds["grading"] > 0
    with pytest.raises(ValueError, match="in the step"):
        profile_run.split_step(train, policy, optimizer, fails)
    assert train.grade is inner


def test_limits_by_hand() -> None:
    """One linear layer of 6 x 4, a head of 10 x 6; two attempts of two rows."""
    body = torch.nn.Module()
    body.layer, body.lora_A, body.head = (torch.nn.Linear(*n, bias=False) for n in ((6, 4), (6, 2), (6, 10)))
    config = SimpleNamespace(num_hidden_layers=3, num_key_value_heads=2, num_attention_heads=4, hidden_size=20)
    model = SimpleNamespace(get_base_model=lambda: body, config=config, get_output_embeddings=lambda: body.head)
    attempts = [SimpleNamespace(prompts=[[1] * 5, [1] * 7], completions=[[2] * 4, [2] * 6])] * 2
    tokens = {"prefill": 11, "reference forward": 40, "policy forward": 40}
    limits = profile_run.least_seconds(SimpleNamespace(model=model), attempts, tokens, 1e-12, 1e-12)
    steps, kv = 2 * 5, 2 * (4 * (5 + 2) + 6 * (7 + 3)) * (2 * 3 * 2 * 5 * 4)
    assert limits == pytest.approx({
        "prefill": 2 * 24 * 11, "reference forward": 2 * 24 * 40 + 2 * 60 * 20,
        "policy forward": 2 * 24 * 40 + 4 * 60 * 20, "backward": 2 * 24 * 40, "token steps": steps * 84 * 4 + kv,
    })  # fmt: skip
    body.gradient_checkpointing = True
    again = profile_run.least_seconds(SimpleNamespace(model=model), attempts, tokens, 1e-12, 1e-12)
    assert again["backward"] == pytest.approx(2 * limits["backward"])


# --------------------------------------------------------------------------------------------- profile_run --samples


def pair(question: str, before: str, after: str, right: tuple[bool, bool], checkpoint: str, **more: Any) -> dict:
    return {
        "event": "eval", "checkpoint": checkpoint, "question": question, "target": "so\n#### 7",
        "text_attempt1": before, "text_attempt2": after, "correct_attempt1": right[0], "correct_attempt2": right[1],
    } | more  # fmt: skip


@pytest.fixture
def samples_run(tmp_path: Path) -> Path:
    """A run folder of eight evaluated pairs before and after Stage I, with other lines between them."""
    before = [False, True, True, True, True, False, False, False]  # attempt 1 before training
    pairs = [
        ("corrected one", "is 6", "is 7", (False, True)),
        ("corrected two", "a b\nc", "a x\nc", (False, True)),
        ("broken", "is 7", "is 8", (True, False)),
        ("still right", "it is 7", "7 it is", (True, True)),
        ("copied right", "7", "7", (True, True)),
        ("copied wrong", "5", "5", (False, False)),
        ("still wrong", "4", "3", (False, False)),
        ("corrected three", "9", "7", (False, True)),
    ]
    rows = [pair(*row[:3], (was, False), "pretrain") for row, was in zip(pairs, before, strict=True)]
    rows += [{"event": "train", "stage": 1, "step": 1, "question": "trained on", "text_attempt1": "?"}]
    rows += [pair(*row, "stage1") for row in pairs]
    rows += [pair(*pairs[0], "stage1", eval_only=True, adapter="elsewhere")]
    write_jsonl(tmp_path / "samples.jsonl", rows)
    with (tmp_path / "samples.jsonl").open("a") as stream:
        stream.write('{"event": "eval", "checkpo')
    return tmp_path


@pytest.fixture
def show(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """show(*flags) -> (exit code, stdout, stderr) of profile_run.py on a terminal of 61 columns."""
    monkeypatch.setenv("COLUMNS", "61")

    def run(*flags: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["profile_run.py", *flags])
        code = profile_run.main()
        return code, *capsys.readouterr()

    return run


def test_samples_are_counted_by_kind(samples_run: Path, show: Callable[..., Any]) -> None:
    code, text, errors = show("--samples", str(samples_run))
    assert (code, errors) == (0, "")
    head, *counts, gain = text.splitlines()[:7]
    assert head == f"{samples_run}, stage1: 8 rows"
    kinds = ["3 corrected (i->c)", "1 broken (c->i)", "1 changed, still wrong", "1 changed, still right", "2 copied"]
    assert [" ".join(line.split()) for line in counts] == kinds
    change = np.array([1, 0, -1, 0, 0, 0, 0, 1])  # correct in attempt 2 here - in attempt 1 before training
    assert gain.startswith("attempt 2 here minus attempt 1 before training: ")
    mean, low, high = map(float, re.findall(r"[-+]\d\.\d{3}", gain))
    error = change.std() / math.sqrt(8)
    assert mean == change.mean()
    assert low == pytest.approx(mean - 1.96 * error, abs=1 / 8)
    assert high == pytest.approx(mean + 1.96 * error, abs=1 / 8)
    assert show("--samples", str(samples_run))[1] == text, "the same on every call"
    for kind in ("corrected (i->c)", "broken (c->i)", "changed, still wrong", "changed, still right", "copied"):
        assert f"=== {kind}: target '#### 7'" in text
    assert "trained on" not in text
    assert text.count("=== corrected") == 3
    code, text, _ = show("--samples", str(samples_run), "--show", "1")
    assert text.count("=== corrected") == 1
    code, text, _ = show("--samples", str(samples_run), "--checkpoint", "pretrain")
    assert code == 0
    counts = "pretrain: 8 rows\n 0 corrected (i->c)\n 4 broken (c->i)\n 3 changed, still wrong\n "
    assert counts in re.sub(" +", " ", text)
    assert "before training" not in text


def test_the_word_diff(samples_run: Path, show: Callable[..., Any]) -> None:
    _, text, _ = show("--samples", str(samples_run))
    start = text.index("corrected two\n") + len("corrected two\n")
    columns = [[side.strip() for side in line.split("|")] for line in text[start:].splitlines()[:2]]
    assert columns == [["a [-b-]", "a {+x+}"], ["c", "c"]]
    long = " ".join(f"word{i}" for i in range(12))
    shown = profile_run.side_by_side(long, long.replace("word5", "other"))
    left, right = ("".join(line.split("|")[side].strip() + " " for line in shown.splitlines()) for side in (0, 1))
    assert left.split() == long.replace("word5", "[-word5-]").split()
    assert right.split() == long.replace("word5", "{+other+}").split()
    assert max(map(len, shown.splitlines())) <= 61


@pytest.mark.parametrize("bad", ["no folder", "no samples", "empty", "unknown checkpoint"])
def test_samples_that_are_not_there_are_one_line(
    samples_run: Path, show: Callable[..., Any], tmp_path: Path, bad: str
) -> None:
    folder, flags = tmp_path / "other", []
    if bad != "no folder":
        folder.mkdir()
    if bad == "empty":
        write_jsonl(folder / "samples.jsonl", [{"event": "train", "stage": 1, "step": 1}])
    if bad == "unknown checkpoint":
        folder, flags = samples_run, ["--checkpoint", "stage2"]
    code, text, errors = show("--samples", str(folder), *flags)
    assert (code, text) == (2, "")
    (line,) = errors.splitlines()
    assert line.startswith(f"--samples {folder}: ")
    assert "  " not in line and " ;" not in line
    if bad == "unknown checkpoint":
        assert "stage2" in line and "pretrain, stage1" in line


def test_samples_of_a_real_run_are_shown(finished: SimpleNamespace, show: Callable[..., Any]) -> None:
    code, text, _ = show("--samples", str(finished.folder))
    assert code == 0
    assert text.startswith(f"{finished.folder}, stage2: 6 rows\n")
    counts = re.findall(r"^ +(\d+)  (.*)$", text.partition("\nattempt 2")[0], re.M)
    assert [kind for _, kind in counts] == list(profile_run.KINDS)
    assert sum(int(count) for count, _ in counts) == 6


# ------------------------------------------------------------------------------------------------- profile_run --ask


def evaluated(folder: Path, checkpoint: str) -> list[dict[str, Any]]:
    return [row for row in read_jsonl(folder / "samples.jsonl") if row.get("checkpoint") == checkpoint]


@pytest.mark.parametrize("checkpoint", ["stage2", "stage1"])
def test_asking_gives_the_evaluations_answers(
    finished: SimpleNamespace, show: Callable[..., Any], checkpoint: str
) -> None:
    """Several questions, by the last adapter or a given one, without a reward: this one raises on any text."""
    rows = evaluated(finished.folder, checkpoint)[:3]
    adapter = ["--adapter", str(finished.folder / checkpoint)] * (checkpoint == "stage1")
    flags = [*adapter, *(row["question"] for row in rows), "--set", "reward.fn=json.loads"]
    code, text, errors = show("--ask", str(finished.folder), *flags)
    assert (code, errors) == (0, "")
    assert f"with {finished.folder / checkpoint}\n" in text
    for row, part in zip(rows, text.split("=== question\n")[1:], strict=True):
        lines = [row["question"]]
        for n in (1, 2):
            cut = ", cut off by the budget" if row[f"truncated_attempt{n}"] else ""
            lines += ["=== correction prompt", SELF_CORRECTION] * (n == 2)
            lines += [f"=== attempt {n} ({row[f'tokens_attempt{n}']} tokens{cut})", row[f"text_attempt{n}"].strip()]
        texts = [row[f"text_attempt{n}"].strip() for n in (1, 2)]
        changed = "nothing" if texts[0] == texts[1] else profile_run.side_by_side(*texts)
        assert part.startswith("\n".join([*lines, "=== what changed", changed, "=== "]))
        tokens = row["tokens_attempt1"] + row["tokens_attempt2"]
        assert re.match(rf"{tokens} tokens in [\d.]+ s: [\d,]+ tokens/s\n", part.rpartition("=== ")[2])


@pytest.mark.parametrize("ends", ["", EOFError, KeyboardInterrupt])
def test_questions_may_be_typed(
    finished: SimpleNamespace, show: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, ends: Any
) -> None:
    row = evaluated(finished.folder, "stage2")[0]
    moved = Path(shutil.copytree(finished.base, tmp_path / "moved"))
    typed = [f" {row['question'].strip()} ", "1" * 60, "1+1=?", ends, "never asked"]
    lines = iter(typed)

    def type_in(prompt: str) -> str:
        line = next(lines)
        if not isinstance(line, str):
            raise line
        return line

    monkeypatch.setattr("builtins.input", type_in)
    code, text, errors = show("--ask", str(finished.folder), "--set", f"model.name={moved}")
    assert (code, next(lines)) == (0, "never asked")
    asked = [part.split("\n=== attempt 1")[0] for part in text.split("=== question\n")[1:]]
    assert asked == [row["question"].strip(), "1+1=?"]
    assert text.startswith(f"{moved} with ")
    (line,) = errors.splitlines()
    assert line.startswith("train.max_prompt_length_attempt1: "), "one that is too long does not end it"


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("no folder", "no such folder"),
        ("no adapter yet", "no adapter has been saved yet; give one with --adapter DIR"),
        ("no config", "config.yaml: cannot be read"),
        ("damaged config", "config.yaml: not valid YAML"),
        ("a key", "train.learnin_rate: unknown key"),
        ("no such adapter", "no adapter_config.json there"),
        ("another rank", "trained with model.lora.r 4, the config says 2"),
        ("damaged adapter", "cannot be read"),
        ("no model", "model.name: no tokenizer at "),
        ("too long", "train.max_prompt_length_attempt1: "),
    ],
)
def test_asking_what_cannot_be_asked_is_one_line(
    finished: SimpleNamespace, show: Callable[..., Any], tmp_path: Path, fault: str, says: str
) -> None:
    folder, flags = tmp_path / "run", ["?" if fault != "too long" else "1" * 60]
    shutil.copytree(finished.folder, folder)
    if fault == "no folder":
        folder = tmp_path / "other"
    elif fault == "no adapter yet":
        shutil.rmtree(folder / "stage1")
        shutil.rmtree(folder / "stage2")
    elif fault == "no config":
        (folder / "config.yaml").unlink()
    elif fault == "damaged config":
        (folder / "config.yaml").write_text("run_name: [")
    elif fault == "damaged adapter":
        os.truncate(folder / "stage2" / "adapter_model.safetensors", 100)
    elif fault == "no such adapter":
        flags += ["--adapter", str(tmp_path)]
    keys = {"a key": "train.learnin_rate=1", "another rank": "model.lora.r=2", "no model": f"model.name={tmp_path}"}
    flags += ["--set", keys[fault]] if fault in keys else []
    code, _, errors = show("--ask", str(folder), *flags)
    assert code == 2
    (line,) = errors.splitlines()
    assert says in line
    assert "--config" not in line and "--resume-adapter" not in line, "a flag of another command"


# ------------------------------------------------------------------------------------------------ rewards of one's own

OWN = """
from reward_function import is_correct, register_extractor, register_reward

@register_extractor("{name}_words")
def words(text):
    return text.split()[-1] if text.split() else ""

@register_reward("{name}")
def reward(predictions, targets, extract):
    return [2.0 * is_correct(p, t, extract) for p, t in zip(predictions, targets, strict=True)]
"""
own_names = (f"own{number}" for number in itertools.count())


@pytest.fixture
def own(tmp_path: Path, forgotten: None) -> SimpleNamespace:
    """A file of rewards outside the repository and the names that it registers."""
    name = next(own_names)
    file = tmp_path / "my rewards.py"
    file.write_text(OWN.format(name=name))
    return SimpleNamespace(file=file, fn=name, extractor=f"{name}_words")


def test_a_file_of_rewards_is_used(own: SimpleNamespace, raw_config: dict[str, Any]) -> None:
    changes = {"reward.module": str(own.file), "reward.fn": own.fn, "reward.answer_extractor": own.extractor}
    for _ in range(2):  # the second time it is there already
        config = train.check_config(with_keys(raw_config, changes))
    rewards, correct = train.grade(["it is 7", "it is 8", ""], ["seven: 7"] * 3, config.reward)
    assert (rewards, correct) == ([2.0, 0.0, 0.0], [True, False, False])
    relative = os.path.relpath(own.file)
    train.check_config(with_keys(raw_config, changes | {"reward.module": relative}))  # the same file by another name


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("missing", "exists"),
        ("not python", ".py"),
        ("a folder", ".py"),
        ("raises", "KeyError: 'inside'"),
        ("syntax", "SyntaxError"),
        ("taken", "'identity' is registered twice"),
        ("registers nothing", "is not registered"),
        ("no file", "a file that reward.module names"),
    ],
)
def test_faults_of_a_file_of_rewards_are_one_line(
    own: SimpleNamespace,
    tiny_run: Callable[..., list[str]],  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    fault: str,
    says: str,
) -> None:
    text = OWN.format(name=own.fn)
    file, key = own.file, "reward.module"
    if fault == "missing":
        file.unlink()
    elif fault == "not python":
        file = own.file.rename(tmp_path / "rewards.txt")
    elif fault == "a folder":
        file = tmp_path / "folder.py"
        file.mkdir()
    elif fault == "raises":
        file.write_text("def f():\n    raise KeyError('inside')\n\n\nf()\n")
    elif fault == "syntax":
        file.write_text("def f(:\n")
    elif fault == "taken":
        file.write_text(text.replace(own.extractor, "identity"))
    else:
        file.write_text("'''Nothing is registered here.'''\n")
        file, key = "null" if fault == "no file" else file, "reward.fn"
    code = as_from_the_shell(tiny_run(tmp_path, "--set", f"reward.module={file}", f"reward.fn={own.fn}"))
    printed = capsys.readouterr()
    assert (code, printed.out) == (2, "")
    (line,) = printed.err.splitlines()
    assert line.startswith(f"{key}: ")
    assert says in line
    assert not (tmp_path / "run").exists()


def test_a_reward_of_ones_own_that_raises_is_named(
    own: SimpleNamespace,
    tiny_run: Callable[..., list[str]],
    tmp_path: Path,  # noqa: F811
) -> None:
    own.file.write_text(OWN.format(name=own.fn).replace("2.0 *", "1 / 0 *"))
    argv = tiny_run(tmp_path, "--set", f"reward.module={own.file}", f"reward.fn={own.fn}")
    assert fork_run(argv, tmp_path / "log", no_curves) == 2
    (line,) = output(tmp_path / "log").splitlines()
    assert line.startswith(f"reward.fn: reward function '{own.fn}' raised ZeroDivisionError")


RECORDER = """
CALLS = []

def record(completions, prompts, completion_ids, right, **columns):
    CALLS.append((completions, prompts, completion_ids, right, columns))
    return [None if text == "5" else 1.0 for text in columns["answer"]]
"""


@pytest.mark.parametrize("form", ["conversational", "text"])
def test_an_unregistered_function_gets_what_trl_gives(
    make_policy: Callable[..., Any], tmp_path: Path, forgotten: None, form: str
) -> None:
    file = tmp_path / "recorder.py"
    file.write_text(RECORDER)
    changes = {
        "reward.module": str(file), "reward.fn": ["record", "exact_match"], "reward.weights": [0.5, 1.0],
        "reward.columns": {"right": "target_answer"}, "reward.completions": form, "prompts.system": "Add.",
        "dataset.name": str(tmp_path / "data"), "reward.answer_extractor": "gsm8k_hash",
    }  # fmt: skip
    (tmp_path / "data").mkdir()
    rows = [{"question": f"{i}+2=?", "answer": f"{i} + 2 = {i + 2}\n#### {i + 2}", "level": i} for i in range(4)]
    for split, part in (("train", rows[:3]), ("test", rows[3:])):
        write_jsonl(tmp_path / "data" / f"{split}.jsonl", part)
    policy, config = make_policy(changes)
    examples, _ = train.load_examples(config, policy.tokenizer)
    attempts = train.roll_out(policy, examples, config, 1.0, "seed")
    calls = train.load_reward_module(file).CALLS
    assert len(calls) == 2, "once for each attempt"
    for attempt, (completions, prompts, completion_ids, right, columns) in zip(attempts, calls, strict=True):
        assert completion_ids == attempt.completions
        assert right == columns["target_answer"] == ["2", "3", "4"]
        assert columns["level"] == [0, 1, 2]
        assert columns["answer"] == [row["answer"] for row in rows[:3]]
        assert columns["question"] == [row["question"] for row in rows[:3]]
        assert attempt.rewards == [0.5 + correct for correct in attempt.correct]
        if form == "text":
            assert completions == attempt.texts
            assert prompts == [policy.tokenizer.decode(prompt) for prompt in attempt.prompts]
            continue
        assert completions == [[{"role": "assistant", "content": text}] for text in attempt.texts]
        for row, prompt in enumerate(prompts):
            turns = [("system", "Add."), ("user", rows[row]["question"])]
            if attempt is attempts[1]:
                turns += [("assistant", attempts[0].texts[row]), ("user", SELF_CORRECTION)]
            assert prompt == [{"role": role, "content": content} for role, content in turns]


def test_registered_rewards_keep_no_columns(make_config: Callable[..., Any]) -> None:
    config = make_config()
    examples, _ = train.load_examples(config, train.load_tokenizer(config))
    assert all(example.columns == {} for example in examples)
    by_name = make_config({"reward.fn": "trl.rewards.think_format_reward"})
    others, _ = train.load_examples(by_name, train.load_tokenizer(by_name))
    assert others[0].columns.keys() == {"question", "answer", "target_answer"}
    assert train.fingerprint(others) == train.fingerprint(examples), "the rows are the same"


def test_trls_rewards_by_configuration_alone(tmp_path: Path) -> None:
    """accuracy_reward and think_format_reward on rows like GSM8K's, targets with a "$" and a sum before the answer."""
    answer = "<think></think><answer>\\boxed{{{}}}</answer>"
    data = build_data(tmp_path / "data", train=24, test=6)
    model = teach_format(build_model(tmp_path / "model"), data, steps=60, answer=answer)
    for file in data.glob("*.jsonl"):
        rows = read_jsonl(file)
        hard = [row | {"answer": f"It is $5 and ${row['question']}\n#### {row['answer']}"} for row in rows]
        write_jsonl(file, hard)
    config = {
        "run_name": "run",
        "model": {"name": str(model), "max_seq_length": 160, "gradient_checkpointing": False, "lora": {"r": 4}},
        "dataset": {"name": str(data), "input_field": "question", "target_field": "answer"},
        "prompts": {"self_correction": SELF_CORRECTION},
        "reward": {
            "fn": ["trl.rewards.accuracy_reward", "trl.rewards.think_format_reward"],
            "weights": [1.0, 0.2],
            "columns": {"solution": "target_answer"},
            "answer_extractor": "gsm8k_hash",
        },
        "train": {
            "stage1_batch_size": 12, "stage2_batch_size": 12, "learning_rate": 0.005, "max_new_tokens_attempt1": 20,
            "max_new_tokens_attempt2": 20, "max_prompt_length_attempt1": 48, "max_prompt_length_attempt2": 100,
        },
        "output": {"dir": str(tmp_path)},
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    argv = ["--config", str(tmp_path / "run.yaml")]
    assert fork_run(argv, tmp_path / "log", no_curves) == 0, output(tmp_path / "log")
    paid = set()
    for row in read_jsonl(tmp_path / "run" / "samples.jsonl"):
        for n in (1, 2):
            text, reward = row[f"text_attempt{n}"], row[f"reward_attempt{n}"]
            boxed = re.search(r"\\boxed\{(\d+)\}", text)
            formatted = text.startswith("<think>") and text.count("<think>") == 1 and "</think>" in text
            right = bool(boxed) and int(boxed[1]) == int(row["target"].rpartition("#### ")[2])
            if text.count("boxed") < 2:  # of several, TRL chooses
                assert reward == pytest.approx(right + 0.2 * formatted), text
            paid.add(round(reward, 3))
    assert {0.0, 0.2} <= paid, "a run whose rewards are equal shows nothing"
    card = (tmp_path / "run" / "stage2" / "README.md").read_text()
    assert "`trl.rewards.accuracy_reward`, `trl.rewards.think_format_reward`, weighted [1.0, 0.2]" in card
    again = tmp_path / "again"
    assert fork_run([*argv, "--resume", "--set", "reward.weights=[1.0, 0.3]"], again) == 2
    assert "reward.weights [1.0, 0.2] -> [1.0, 0.3]" in output(again), "the weights are mathematics"


def test_the_new_task(tmp_path: Path) -> None:
    """tests/new_task as its own comment says to start it."""

    def before() -> None:
        os.chdir(ROOT)
        no_curves()

    argv = ["--config", "tests/new_task/config.yaml", "--smoke", "8", "--set", f"output.dir={tmp_path}"]
    assert fork_run(argv, tmp_path / "log", before) == 0, output(tmp_path / "log")
    samples = read_jsonl(tmp_path / "sort-digits-smoke" / "samples.jsonl")
    assert {s["event"] for s in samples} == {"train", "eval"}
    graded = [(s[f"text_attempt{n}"], s["target"], s[f"reward_attempt{n}"]) for s in samples for n in (1, 2)]
    for text, target, reward in graded:
        answer, wanted = (re.findall("[0-9]+", part) or [""] for part in (text, target))
        answer, wanted = answer[-1], wanted[-1]
        in_place = sum(a == b for a, b in zip(answer, wanted, strict=False)) / max(len(answer), len(wanted))
        assert reward == pytest.approx(0.4 * in_place + 0.6 * (answer == wanted))
    assert any(reward > 0 for *_, reward in graded), "a run without rewards shows nothing"
