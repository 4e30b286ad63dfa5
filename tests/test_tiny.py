"""The embedded default: configs/tiny/ is what tests/build_tiny.py says it is, and configs/tiny.yaml fits it."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import build_tiny
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import reward_function
import train

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "configs" / "tiny"

problems = st.builds(lambda seed: build_tiny.draw_problem(random.Random(seed)), st.integers(0, 2**32))


def read_rows(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (FOLDER / name).read_text().splitlines()]


def numbers(question: str) -> tuple[int, int]:
    a, b = question.removesuffix("=?").split("+")
    return int(a), int(b)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def config() -> train.Config:
    return train.read_config(str(ROOT / "configs" / "tiny.yaml"), [])


def test_folder_is_small() -> None:
    assert sum(file.stat().st_size for file in FOLDER.rglob("*")) < 5_000_000


def test_model_is_a_small_qwen3(tokenizer: Any) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(FOLDER)
    assert type(model).__name__ == "Qwen3ForCausalLM"
    assert model.num_parameters() <= 1_100_000
    assert model.config.vocab_size == len(tokenizer)
    # On purpose: a trainer that leaves these in force samples another policy than the one it trains.
    assert (model.generation_config.top_k, model.generation_config.top_p) == (20, 0.8)
    assert model.generation_config.eos_token_id == [tokenizer.eos_token_id]


@given(st.text(st.sampled_from(build_tiny.CHARACTERS)) | st.text("<think>/answer user assistant system"))
def test_tokenizer_round_trips(text: str) -> None:
    tokenizer = build_tiny.build_tokenizer()
    ids = build_tiny.encode(tokenizer, text)
    assert tokenizer.decode(ids) == tokenizer.decode(ids, skip_special_tokens=True) == text


def test_saved_tokenizer_is_the_built_one(tokenizer: Any) -> None:
    built = build_tiny.build_tokenizer()
    assert tokenizer.get_vocab() == built.get_vocab()
    assert tokenizer.chat_template == built.chat_template
    text = f"<think>{build_tiny.CHARACTERS}</think> <answer> 5 , 6 </answer>é<|im_end|>"
    assert tokenizer(text)["input_ids"] == built(text)["input_ids"]
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text.replace("é", "<unk>")


def test_tags_survive_decoding_and_chat_tokens_do_not(tokenizer: Any) -> None:
    ids = tokenizer("<think>a</think><answer>5</answer><|im_end|>")["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<think>a</think><answer>5</answer>"
    assert ids[-1] == tokenizer.eos_token_id != tokenizer.pad_token_id
    assert len({tokenizer.convert_tokens_to_ids(tag) for tag in build_tiny.TAGS} & set(ids)) == 4


def test_template_drops_reasoning_from_history(tokenizer: Any) -> None:
    turns = [
        {"role": "system", "content": "Add."},
        {"role": "user", "content": "1+2=?"},
        {"role": "assistant", "content": "<think>secret</think><answer>3</answer>"},
    ]
    show = tokenizer.apply_chat_template
    last = show(turns, tokenize=False)
    earlier = show([*turns, {"role": "user", "content": "Check it."}], tokenize=False, add_generation_prompt=True)
    assert last == (
        "<|im_start|>system\nAdd.<|im_end|>\n<|im_start|>user\n1+2=?<|im_end|>\n"
        "<|im_start|>assistant\n<think>secret</think><answer>3</answer><|im_end|>\n"
    )
    assert earlier == last.replace("<think>secret</think>", "") + (
        "<|im_start|>user\nCheck it.<|im_end|>\n<|im_start|>assistant\n"
    )


def test_data_is_right_and_held_out() -> None:
    train_rows, test_rows = read_rows("train.jsonl"), read_rows("test.jsonl")
    questions = [row["question"] for row in train_rows + test_rows]
    assert len(train_rows) >= 2000 and len(test_rows) >= 200
    assert len(set(questions)) == len(questions)
    assert all(int(row["answer"]) == sum(numbers(row["question"])) for row in train_rows + test_rows)


def test_data_is_what_the_builder_makes() -> None:
    train_rows, test_rows = read_rows("train.jsonl"), read_rows("test.jsonl")
    built = build_tiny.build_data(0, len(train_rows), len(test_rows))
    assert build_tiny.build_data(0, len(train_rows), len(test_rows)) == built
    assert [numbers(row["question"]) for row in train_rows] == built[0]
    assert [numbers(row["question"]) for row in test_rows] == built[1]
    assert build_tiny.build_data(1, len(train_rows), len(test_rows)) != built


@given(problems)
def test_ways_are_right_where_they_should_be(problem: tuple[int, int]) -> None:
    right = {w: build_tiny.is_right(build_tiny.completion(problem, w), problem) for w in ("easy", "ones", "redo")}
    kind = build_tiny.carry_kind(problem)
    assert right == {"easy": kind == "none", "ones": kind != "tens", "redo": True}
    for way in right:
        text = build_tiny.completion(problem, way)
        assert build_tiny.way_of(text) == way
        assert reward_function.score("format_and_match", [text], [str(sum(problem))], reward_function.identity) == [
            1.0 if right[way] else 0.5
        ]


def test_ways_look_as_documented() -> None:
    shown = {way: build_tiny.completion((347, 586), way) for way in ("easy", "ones", "long", "redo")}
    assert all(text in build_tiny.__doc__ for text in shown.values())
    assert [text[-12:-9] for text in shown.values()] == ["823", "833", "933", "933"]


@given(problems)
def test_budgets_hold_the_quick_ways_only(problem: tuple[int, int]) -> None:
    tokenizer = build_tiny.build_tokenizer()
    tokens = {
        way: len(build_tiny.encode(tokenizer, build_tiny.completion(problem, way))) + 1
        for way in ("easy", "ones", "long", "redo")
    }
    assert max(tokens["easy"], tokens["ones"]) <= build_tiny.MAX_NEW_TOKENS_ATTEMPT1 < tokens["long"]
    long = build_tiny.encode(tokenizer, build_tiny.completion(problem, "long"))
    assert "</think>" not in tokenizer.decode(long[: build_tiny.MAX_NEW_TOKENS_ATTEMPT1])
    assert tokens["redo"] <= build_tiny.MAX_NEW_TOKENS_ATTEMPT2


def test_config_says_what_the_model_was_pretrained_on(config: train.Config, monkeypatch: Any) -> None:
    monkeypatch.chdir(ROOT)
    assert config.prompts.self_correction == build_tiny.SELF_CORRECTION
    assert config.prompts.system == ""
    assert config.train.max_new_tokens_attempt1 == build_tiny.MAX_NEW_TOKENS_ATTEMPT1
    assert config.train.max_new_tokens_attempt2 == build_tiny.MAX_NEW_TOKENS_ATTEMPT2
    tokenizer = train.load_tokenizer(config)
    assert train.attempt2_bridge(tokenizer, config)[0] == build_tiny.turn_ids(tokenizer)
    train_examples, test_examples = train.load_examples(config, tokenizer)
    assert len(train_examples) == len(read_rows("train.jsonl")) and len(test_examples) == len(read_rows("test.jsonl"))
    for example in test_examples[:5]:
        assert example.prompt == build_tiny.prompt_ids(tokenizer, numbers(example.question))


@settings(max_examples=30)
@given(problems, st.integers(0, 2**32), st.booleans())
def test_pretraining_takes_loss_on_the_assistant_alone(problem: tuple[int, int], seed: int, habits: bool) -> None:
    tokenizer = build_tiny.build_tokenizer()
    ids, labels = build_tiny.draw_conversation(tokenizer, problem, random.Random(seed), habits)
    assert (ids, labels) == build_tiny.draw_conversation(tokenizer, problem, random.Random(seed), habits)
    assert all(label in (-100, token) for token, label in zip(ids, labels, strict=True))
    prompt, turn = build_tiny.prompt_ids(tokenizer, problem), build_tiny.turn_ids(tokenizer)
    first_and_rest = tokenizer.decode(ids[len(prompt) :])
    first, second = first_and_rest.split(tokenizer.decode(turn))
    assert ids[: len(prompt)] == prompt and labels[: len(prompt)] == [-100] * len(prompt)
    learned = tokenizer.decode([label for label in labels if label != -100])
    cut_off = build_tiny.way_of(first) == "long"
    assert learned == first + ("" if cut_off else "<|im_end|>") + second
    assert build_tiny.way_of(second) == "redo" or second == (
        build_tiny.completion(problem, "easy") + "<|im_end|>" if cut_off else first + "<|im_end|>"
    )
