"""The embedded default: configs/tiny/ is what tests/build_tiny.py says it is, and configs/tiny.yaml fits it."""

from __future__ import annotations

import filecmp
import json
import random
from pathlib import Path
from typing import Any

import build_tiny
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

import reward_function
import train

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "configs" / "tiny"
TOKENIZER = build_tiny.build_tokenizer()

problems = st.builds(lambda seed: build_tiny.draw_problem(random.Random(seed)), st.integers(0, 2**32))


def test_model_is_a_small_qwen3_whose_own_sampling_is_narrow() -> None:
    """On purpose: a trainer that leaves its top_k and top_p in force samples another policy than the one it trains."""
    model = AutoModelForCausalLM.from_pretrained(FOLDER)
    assert type(model).__name__ == "Qwen3ForCausalLM" and model.num_parameters() <= 1_100_000
    assert model.config.vocab_size == len(TOKENIZER) and sum(f.stat().st_size for f in FOLDER.iterdir()) < 5_000_000
    own = model.generation_config
    assert (own.top_k, own.top_p, own.eos_token_id) == (20, 0.8, [TOKENIZER.eos_token_id])


def test_the_builder_makes_the_files_beside_the_weights(tmp_path: Path, monkeypatch: Any) -> None:
    """Without pretraining steps, that is; with them it takes nine minutes and gives the same weights bit for bit."""
    monkeypatch.setattr("sys.argv", ["build_tiny.py", "--out", str(tmp_path), "--steps", "0"])
    monkeypatch.setattr(build_tiny, "report", lambda *_, **__: None)
    build_tiny.main()
    names = {file.name for file in FOLDER.iterdir()}
    assert names == {file.name for file in tmp_path.iterdir()}
    _, other, missing = filecmp.cmpfiles(FOLDER, tmp_path, names, shallow=False)
    assert (other, missing) == (["model.safetensors"], [])


@given(st.text(st.sampled_from(build_tiny.CHARACTERS)) | st.text("<think>/answer user assistant system"))
def test_tokenizer_round_trips(text: str) -> None:
    ids = build_tiny.encode(TOKENIZER, text)
    assert TOKENIZER.decode(ids) == TOKENIZER.decode(ids, skip_special_tokens=True) == text


def test_saved_tokenizer_keeps_tags_and_drops_reasoning_from_history() -> None:
    tokenizer, pair = AutoTokenizer.from_pretrained(FOLDER), "<think>a</think><answer>5</answer>"
    ids = tokenizer(pair + "<|im_end|>")["input_ids"]
    assert ids == TOKENIZER(pair + "<|im_end|>")["input_ids"] and ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == pair
    assert tokenizer.decode(tokenizer("é")["input_ids"]) == "<unk>"
    turns = [{"role": "user", "content": "1+2=?"}, {"role": "assistant", "content": pair}]
    last = tokenizer.apply_chat_template(turns, tokenize=False)
    assert last == f"<|im_start|>user\n1+2=?<|im_end|>\n<|im_start|>assistant\n{pair}<|im_end|>\n"
    earlier = tokenizer.apply_chat_template([*turns, turns[0]], tokenize=False, add_generation_prompt=True)
    again = "<|im_start|>user\n1+2=?<|im_end|>\n<|im_start|>assistant\n"
    assert earlier == last.replace("<think>a</think>", "") + again


def test_data_is_right_held_out_and_seeded() -> None:
    train_rows, test_rows = ([*map(json.loads, (FOLDER / f"{n}.jsonl").open())] for n in ("train", "test"))
    sums = [tuple(map(int, row["question"].removesuffix("=?").split("+"))) for row in train_rows + test_rows]
    assert (len(train_rows), len(test_rows), len(set(sums))) == (2560, 250, 2810)
    assert [int(row["answer"]) for row in train_rows + test_rows] == [*map(sum, sums)]
    assert build_tiny.build_data(0, 2560, 250) == (sums[:2560], sums[2560:]) != build_tiny.build_data(1, 2560, 250)


@given(problems)
def test_ways_are_right_where_they_should_be_and_fit_their_budgets(problem: tuple[int, int]) -> None:
    """Attempt 1 has room for the quick ways alone: `long` ends before its answer."""
    kind, texts = build_tiny.carry_kind(problem), {}
    for way, right in {"easy": kind == "none", "ones": kind != "tens", "long": True, "redo": True}.items():
        text = texts[way] = build_tiny.completion(problem, way)
        assert (build_tiny.way_of(text), build_tiny.is_right(text, problem)) == (way, right)
        named = ["format_and_match"], None, None, [text], [str(sum(problem))], reward_function.identity
        assert reward_function.compute_rewards(*named) == [1.0 if right else 0.5]
    ids = {way: build_tiny.encode(TOKENIZER, text) for way, text in texts.items()}
    assert max(len(ids["easy"]), len(ids["ones"])) < build_tiny.MAX_NEW_TOKENS_ATTEMPT1 < len(ids["long"])
    assert "</think>" not in TOKENIZER.decode(ids["long"][: build_tiny.MAX_NEW_TOKENS_ATTEMPT1])
    assert len(ids["redo"]) < build_tiny.MAX_NEW_TOKENS_ATTEMPT2


@pytest.mark.parametrize("way, answer", [("easy", 823), ("ones", 833), ("long", 933), ("redo", 933)])
def test_ways_look_as_documented(way: str, answer: int) -> None:
    text = build_tiny.completion((347, 586), way)
    assert text in build_tiny.__doc__ and f"<answer>{answer}<" in text


def test_config_says_what_the_model_was_pretrained_on(monkeypatch: Any) -> None:
    monkeypatch.chdir(ROOT)
    config = train.read_config("configs/tiny.yaml", [])
    budgets = (config.train.max_new_tokens_attempt1, config.train.max_new_tokens_attempt2)
    assert budgets == (build_tiny.MAX_NEW_TOKENS_ATTEMPT1, build_tiny.MAX_NEW_TOKENS_ATTEMPT2)
    tokenizer = train.load_tokenizer(config)
    assert train.attempt2_bridge(tokenizer, config)[0] == build_tiny.turn_ids(tokenizer)
    pool, _, test = train.load_examples(config, tokenizer)
    assert (len(pool), len(test)) == (2560, 250)
    problem = tuple(map(int, test[0].question.removesuffix("=?").split("+")))
    assert test[0].prompt == build_tiny.prompt_ids(tokenizer, problem)


@settings(max_examples=30)
@given(problems, st.integers(0, 2**32), st.booleans())
def test_pretraining_takes_loss_on_the_assistant_alone(problem: tuple[int, int], seed: int, habits: bool) -> None:
    ids, labels = build_tiny.draw_conversation(TOKENIZER, problem, random.Random(seed), habits)
    assert all(label in (-100, token) for token, label in zip(ids, labels, strict=True))
    prompt, between = build_tiny.prompt_ids(TOKENIZER, problem), TOKENIZER.decode(build_tiny.turn_ids(TOKENIZER))
    assert ids[: len(prompt)] == prompt and labels[: len(prompt)] == [-100] * len(prompt)
    first, second = TOKENIZER.decode(ids[len(prompt) :]).split(between)
    cut_off, end = build_tiny.way_of(first) == "long", "<|im_end|>"
    assert TOKENIZER.decode([x for x in labels if x != -100]) == first + ("" if cut_off else end) + second
    other = build_tiny.completion(problem, "easy") if cut_off else first
    assert build_tiny.way_of(second) == "redo" or second == other + end
