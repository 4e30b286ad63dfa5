"""Sampling and the two attempts: what is sampled is the policy, and attempt 2 sees attempt 1 verbatim."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import (
    END_OF_TEXT,
    IM_END,
    PLAIN_TEMPLATE,
    SELF_CORRECTION,
    STRIPPING_TEMPLATE,
    THINKING_TEMPLATE,
    build_model,
    perturb,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import train

ROUTES = ["auto", "generate"]  # the built-in decoder where it serves, and transformers' own loop


def encode(policy: Any, text: str) -> list[int]:
    return policy.tokenizer(text, add_special_tokens=False)["input_ids"]


def examples_of(policy: Any, config: Any, questions: list[str]) -> list[Any]:
    """Examples with their prompts, by the same way that data takes."""
    rows = [(question, "42") for question in questions]
    return train.encode_rows(rows, "train", config, policy.tokenizer)


def say_instead(monkeypatch: pytest.MonkeyPatch, policy: Any, *attempts: list[str]) -> list[list[list[int]]]:
    """Makes the policy "sample" these texts; returns the list in which the prompts it is given gather."""
    prompts_seen: list[list[list[int]]] = []

    def scripted(policy: Any, prompts: list[list[int]], *_: Any) -> tuple[list[list[int]], None]:
        prompts_seen.append(prompts)
        return [encode(policy, text) for text in attempts[len(prompts_seen) - 1]], None

    monkeypatch.setattr(train, "sample", scripted)
    return prompts_seen


# ----------------------------------------------------------------------------------------------------------- sampling


def surprise_bins(policy: Any, prompts: list, completions: list, temperature: float, bins: int = 20) -> list[int]:
    """Counts that are even, [bins], if every token was drawn from softmax(logits / temperature).

    A token's place among the probabilities in falling order, at random within its own share, is uniform then."""
    counts, generator = [0] * bins, torch.Generator().manual_seed(7)
    model = policy.model
    for prompt, completion in zip(prompts, completions, strict=True):
        logits = model(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1].double()
        ordered, tokens = (logits / temperature).softmax(-1).sort(-1, descending=True)
        for share, order, token in zip(ordered, tokens, completion, strict=True):
            place = order.tolist().index(token)
            within = share[:place].sum() + share[place] * torch.rand((), generator=generator, dtype=torch.float64)
            counts[min(bins - 1, int(within.item() * bins))] += 1
    return counts


def chi_square(counts: list[float], expected: list[float]) -> float:
    return sum((c - e) ** 2 / e for c, e in zip(counts, expected, strict=True))


def chi_square_limit(freedom: int) -> float:
    """What chance exceeds once in 100,000 (Wilson and Hilferty)."""
    return freedom * (1 - 2 / (9 * freedom) + 4.265 * math.sqrt(2 / (9 * freedom))) ** 3


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.5])
def test_first_tokens_come_from_the_whole_softmax(
    make_policy: Callable[..., Any], route: str, temperature: float
) -> None:
    """The model's own generation_config asks for top_k 5, top_p 0.5 and a repetition penalty."""
    policy, _ = make_policy({"model.decoder": route})
    perturb(policy)
    prompt, count = [20, 30, 40, 30], 6000
    completions, _ = train.sample(policy, [prompt] * count, 1, temperature, "seed")
    with torch.no_grad():
        probabilities = (policy.model(input_ids=torch.tensor([prompt])).logits[0, -1] / temperature).softmax(-1)
    expected = probabilities.double() * count
    observed = torch.bincount(torch.tensor([row[0] for row in completions]), minlength=len(probabilities)).double()
    common = expected >= 8
    tail = [observed[~common].sum().item()], [expected[~common].sum().item()]
    statistic = chi_square([*observed[common].tolist(), *tail[0]], [*expected[common].tolist(), *tail[1]])
    assert common.sum() > 6
    assert statistic < chi_square_limit(int(common.sum()))


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_all_tokens_of_ragged_rows_come_from_the_policy(
    make_policy: Callable[..., Any], route: str, temperature: float
) -> None:
    policy, _ = make_policy({"model.decoder": route})
    perturb(policy)
    prompts = [[20 + (row * 7 + i) % 60 for i in range(2 + row % 9)] for row in range(300)]
    completions, _ = train.sample(policy, prompts, 8, temperature, "seed")
    with torch.no_grad():
        counts = surprise_bins(policy, prompts, completions, temperature)
        flat = surprise_bins(policy, prompts, completions, 1.25 * temperature)  # and the test can see another policy
    assert sum(counts) > 1000
    assert chi_square(counts, [sum(counts) / 20] * 20) < chi_square_limit(19)
    assert chi_square(flat, [sum(flat) / 20] * 20) > chi_square_limit(19)


@pytest.mark.parametrize("route", ROUTES)
def test_temperature_zero_is_greedy(make_policy: Callable[..., Any], route: str) -> None:
    policy, _ = make_policy({"model.decoder": route})
    perturb(policy)
    prompts = [[20, 30, 40], [50, 60], [70, 71, 72, 73, 74]]
    completions, _ = train.sample(policy, prompts, 10, 0.0, "seed")
    for prompt, completion in zip(prompts, completions, strict=True):
        with torch.no_grad():
            logits = policy.model(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        assert completion == logits.argmax(-1).tolist()
        assert len(completion) == 10 or completion[-1] in policy.eos_token_ids


@pytest.mark.parametrize("route", ROUTES)
def test_a_seed_decides_every_sample(make_policy: Callable[..., Any], route: str) -> None:
    policy, config = make_policy({"model.decoder": route})
    examples = examples_of(policy, config, ["1+1=?", "12+34=?", "7+8=?"])
    torch.manual_seed(5)
    one = train.roll_out(policy, examples, config, 1.0, "a/1")
    torch.manual_seed(6)  # the state of the global generator does not matter
    two = train.roll_out(policy, examples, config, 1.0, "a/1")
    other = train.roll_out(policy, examples, config, 1.0, "a/2")
    for a, b in zip(one, two, strict=True):
        assert (a.completions, a.texts, a.rewards, a.truncated) == (b.completions, b.texts, b.rewards, b.truncated)
    assert [a.completions for a in one] != [a.completions for a in other]


def test_log_probs_of_the_decoder_are_those_of_the_training_forward(policy: Any) -> None:
    prompts = [[20, 30, 40], [50, 60], [70, 71, 72, 73, 74]]
    completions, sampled = train.sample(policy, prompts, 10, 0.8, "seed")
    assert [len(row) for row in sampled] == [len(row) for row in completions]
    with torch.no_grad():
        trained = train.completion_log_probs(policy, prompts, completions, 0.8)
    torch.testing.assert_close(torch.tensor([p for row in sampled for p in row]), trained, atol=1e-4, rtol=0)


@pytest.mark.parametrize("route", ROUTES)
def test_any_of_several_eos_tokens_ends_a_row_once(make_policy: Callable[..., Any], route: str) -> None:
    policy, _ = make_policy({"model.decoder": route})
    ends = policy.tokenizer.convert_tokens_to_ids([IM_END, END_OF_TEXT])
    assert sorted(policy.eos_token_ids) == sorted(ends)
    completions, _ = train.sample(policy, [[20, 30, 40]] * 200, 8, 1.0, "seed")
    finished = [row for row in completions if row[-1] in ends]
    assert {row[-1] for row in finished} == set(ends)
    assert all(token not in ends for row in completions for token in row[:-1])
    assert all(len(row) == 8 for row in completions if row[-1] not in ends)


def test_rollouts_leave_the_policy_as_they_found_it(make_policy: Callable[..., Any]) -> None:
    policy, config = make_policy()
    before = {name: p.detach().clone() for name, p in policy.model.named_parameters()}
    train.roll_out(policy, examples_of(policy, config, ["1+1=?"]), config, 1.0, "a")
    assert policy.model.training
    assert torch.is_grad_enabled()
    assert set(policy.trainable) == {name for name in before if "lora_" in name}
    assert all(torch.equal(p, before[name]) for name, p in policy.model.named_parameters())
    assert train.completion_log_probs(policy, [[20]], [[21]], 1.0).requires_grad


# ------------------------------------------------------------------------------------------------------- tokenizers


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    "names",
    [
        {"pad": None},  # no pad token
        {"pad": IM_END},  # pad is the end of a turn
        {"pad": END_OF_TEXT},
        {"eos": END_OF_TEXT},  # the generation config has others
        {"eos": None, "pad": None},  # the tokenizer names neither; the model does
    ],
    ids=str,
)
def test_tokenizers_without_a_pad_or_with_shared_ids(
    make_policy: Callable[..., Any], tmp_path: Path, names: dict, route: str
) -> None:
    """Greedy completions of a ragged batch do not depend on which token pads."""
    plain, config = make_policy({"model.decoder": "generate"})
    perturb(plain)
    policy, config = make_policy({"model.name": str(build_model(tmp_path / "model", **names)), "model.decoder": route})
    perturb(policy)
    assert set(policy.eos_token_ids) == set(plain.eos_token_ids)
    examples = examples_of(policy, config, ["1+1=?", "12+34=?", "7+8=?", "100+200=?"])
    expected = train.roll_out(plain, examples, config, 0.0, "a")
    for mine, theirs in zip(train.roll_out(policy, examples, config, 0.0, "a"), expected, strict=True):
        assert (mine.completions, mine.texts, mine.truncated) == (theirs.completions, theirs.texts, theirs.truncated)
        alone = train.completion_log_probs(policy, mine.prompts[:1], mine.completions[:1], 1.0)
        batch = train.completion_log_probs(policy, mine.prompts, mine.completions, 1.0)
        torch.testing.assert_close(batch[: len(alone)], alone, atol=1e-5, rtol=0)


def test_a_model_without_a_chat_template_is_refused(make_policy: Callable[..., Any], tmp_path: Path) -> None:
    folder = build_model(tmp_path / "model")
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    settings_file = folder / "tokenizer_config.json"
    kept = {key: value for key, value in json.loads(settings_file.read_text()).items() if key != "chat_template"}
    settings_file.write_text(json.dumps(kept))
    with pytest.raises(train.UserError, match="chat_template"):
        make_policy({"model.name": str(folder)})
    policy, _ = make_policy({"model.name": str(folder), "model.chat_template": PLAIN_TEMPLATE})
    assert policy.tokenizer.chat_template == PLAIN_TEMPLATE
    file = tmp_path / "template.jinja"
    file.write_text(PLAIN_TEMPLATE)
    policy, _ = make_policy({"model.name": str(folder), "model.chat_template": str(file)})
    assert policy.tokenizer.chat_template == PLAIN_TEMPLATE


@pytest.mark.parametrize(
    ("template", "key"),
    [
        ("{{ raise_exception('System role not supported') }}", "prompts.system"),
        ("{%- for m in messages -%}{{ m.nothing.at_all }}{%- endfor -%}", "model.chat_template"),
        ("{%- for m in messages", "model.chat_template"),
        ("{{ messages[-1].content }}", "model.chat_template"),  # drops the first attempt
        ("{%- for m in messages[:2] -%}{{ m.content }}{%- endfor -%}", "model.chat_template"),  # drops the instruction
        ("no-such-file.jinja", "model.chat_template"),
    ],
)
def test_templates_that_cannot_serve_are_named(make_policy: Callable[..., Any], template: str, key: str) -> None:
    system = {"prompts.system": "Be brief."} if key == "prompts.system" else {}
    with pytest.raises(train.UserError, match=key):
        make_policy({"model.chat_template": template} | system)


# ------------------------------------------------------------------------------------------------------ two attempts

BRIDGE = f"<|im_end|>\n<|im_start|>user\n{SELF_CORRECTION}<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("ending", [IM_END, END_OF_TEXT, ""], ids=["eos", "other eos", "cut off"])
def test_attempt_two_sees_attempt_one_verbatim_with_its_reasoning(
    make_policy: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    policy, config = make_policy()
    assert policy.tokenizer.chat_template == STRIPPING_TEMPLATE
    text = "<think>2+2</think>\n\n <answer>4</answer>  "
    history = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": text},
        {"role": "user", "content": "r"},
    ]
    assert "2+2" not in policy.tokenizer.apply_chat_template(history, tokenize=False)  # the template would cut it
    examples = examples_of(policy, config, ["2+2=?"])
    prompts = say_instead(monkeypatch, policy, [text + ending], ["<answer>4</answer>" + IM_END])
    first, second = train.roll_out(policy, examples, config, 1.0, "a")
    assert prompts[0] == first.prompts == [encode(policy, "<|im_start|>user\n2+2=?<|im_end|>\n<|im_start|>assistant\n")]
    assert prompts[1] == second.prompts == [first.prompts[0] + encode(policy, text) + encode(policy, BRIDGE)]
    assert first.texts == [text]
    assert second.texts == ["<answer>4</answer>"]
    assert first.truncated == [ending == ""]
    assert first.completions == [encode(policy, text + ending)]


def test_attempt_twos_prompt_is_the_templates_own_where_nothing_is_stripped(
    make_policy: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, config = make_policy({"model.chat_template": PLAIN_TEMPLATE, "prompts.system": "Add."})
    text = "<think>2+2</think><answer>4</answer>"
    say_instead(monkeypatch, policy, [text + IM_END], [text + IM_END])
    _, second = train.roll_out(policy, examples_of(policy, config, ["2+2=?"]), config, 1.0, "a")
    conversation = [
        {"role": "system", "content": "Add."},
        {"role": "user", "content": "2+2=?"},
        {"role": "assistant", "content": text},
        {"role": "user", "content": SELF_CORRECTION},
    ]
    rendered = policy.tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
    assert policy.tokenizer.decode(second.prompts[0]) == rendered
    assert second.prompts[0] == encode(policy, rendered)


def test_rewards_see_the_think_tag_that_the_template_opens(
    make_policy: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, config = make_policy({"model.chat_template": THINKING_TEMPLATE})
    say_instead(
        monkeypatch, policy, ["a</think><answer>42</answer>" + IM_END], ["b</think><answer>1</answer>" + IM_END]
    )
    first, second = train.roll_out(policy, examples_of(policy, config, ["2+2=?"]), config, 1.0, "a")
    assert (first.rewards, second.rewards) == ([1.0], [0.5])
    assert (first.correct, second.correct) == ([True], [False])
    prompt = policy.tokenizer.decode(second.prompts[0])
    assert prompt.endswith("<think>\n")
    assert prompt.count("<think>") == 2  # once a turn, not twice


def test_special_tokens_in_a_question_are_text_of_the_template_and_extra_variables_reach_it(
    make_policy: Callable[..., Any],
) -> None:
    template = PLAIN_TEMPLATE + "{%- if mood is defined -%}{{ mood }}{%- endif -%}"
    policy, config = make_policy({"model.chat_template": template, "model.chat_template_kwargs": {"mood": "calm"}})
    (example,) = examples_of(policy, config, ["2+2=?"])
    assert policy.tokenizer.decode(example.prompt).endswith("assistant\ncalm")
    assert policy.tokenizer.decode(policy.bridge).endswith("assistant\ncalm")


def test_attempts_are_graded_against_their_own_target(
    make_policy: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, config = make_policy()
    examples = examples_of(policy, config, ["a", "b"])
    examples[1].target = "7"
    answer = "<think></think><answer>{}</answer>" + IM_END
    say_instead(monkeypatch, policy, [answer.format(42), answer.format(42)], [answer.format(7), answer.format(7)])
    first, second = train.roll_out(policy, examples, config, 1.0, "a")
    assert (first.rewards, second.rewards) == ([1.0, 0.5], [0.5, 1.0])
    assert (first.correct, second.correct) == ([True, False], [False, True])


@pytest.mark.parametrize("misdeed", ["raises", "counts", "nan"])
def test_a_reward_that_misbehaves_is_named(
    make_policy: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, misdeed: str
) -> None:
    def bad(predictions: list[str], targets: list[str], extract: Any) -> list[float]:
        return {"raises": lambda: 1 / 0, "counts": lambda: [1.0], "nan": lambda: [math.nan] * len(targets)}[misdeed]()

    monkeypatch.setitem(train.REWARD_FNS, "my_reward", bad)
    policy, config = make_policy({"reward.fn": "my_reward"})
    with pytest.raises(train.RewardError, match="my_reward"):
        train.roll_out(policy, examples_of(policy, config, ["a", "b"]), config, 1.0, "a")


# --------------------------------------------------------------------------------------------- no prompt is ever cut


def test_prompts_over_the_budget_are_left_out_with_a_count(
    make_policy: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    policy, config = make_policy()
    around = len(encode(policy, "<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n"))
    fits = config.train.max_prompt_length_attempt1 - around
    questions = ["1" * fits, "1" * (fits + 1), "2", "3" * 200]
    examples = examples_of(policy, config, questions)
    assert [example.question for example in examples] == ["1" * fits, "2"]
    for example in examples:
        assert example.question in policy.tokenizer.decode(example.prompt)
        assert len(example.prompt) <= config.train.max_prompt_length_attempt1
    printed = capsys.readouterr().out
    assert "2 of 4" in printed
    assert "max_prompt_length_attempt1" in printed
    with pytest.raises(train.UserError, match="max_prompt_length_attempt1"):
        examples_of(policy, config, ["3" * 200])


def test_the_longest_attempt_two_fits_the_budget_or_the_config_is_refused(make_policy: Callable[..., Any]) -> None:
    bridge = len(make_policy()[0].bridge)
    need = 48 + 8 + bridge
    policy, config = make_policy({"train.max_prompt_length_attempt2": need})
    fits = config.train.max_prompt_length_attempt1 - 28
    longest = examples_of(policy, config, ["1" * n for n in range(fits - 3, fits + 4) if n <= 21])
    _, second = train.roll_out(policy, longest, config, 1.0, "a")
    assert max(map(len, second.prompts)) <= need
    with pytest.raises(train.UserError, match=f"max_prompt_length_attempt2.*{need}"):
        make_policy({"train.max_prompt_length_attempt2": need - 1})


# ------------------------------------------------------------------------------------------------------------ batches


@given(count=st.integers(1, 60), size=st.integers(1, 20), epochs=st.floats(0, 4), seed=st.text(max_size=3))
@settings(deadline=None)
def test_each_epoch_is_a_new_order_of_all_rows(count: int, size: int, epochs: float, seed: str) -> None:
    if count < size:
        return
    batches = train.shuffled_batches(count, size, epochs, seed)
    assert batches == train.shuffled_batches(count, size, epochs, seed)
    per_epoch = count // size
    assert abs(len(batches) - epochs * per_epoch) <= 0.5
    assert all(len(batch) == size for batch in batches)
    for epoch in range(0, len(batches), per_epoch):
        rows = [row for batch in batches[epoch : epoch + per_epoch] for row in batch]
        assert len(set(rows)) == len(rows)
        assert set(rows) <= set(range(count))
    if count % size == 0 and len(batches) >= per_epoch:
        assert sorted(row for batch in batches[:per_epoch] for row in batch) == list(range(count))


def test_the_order_changes_with_epoch_and_seed() -> None:
    batches = train.shuffled_batches(40, 8, 2, "1/stage1")
    assert batches[:5] != batches[5:]
    assert batches != train.shuffled_batches(40, 8, 2, "2/stage1")
    assert batches[:5] != [list(range(i, i + 8)) for i in range(0, 40, 8)]
    assert train.shuffled_batches(40, 8, 1.4, "1/stage1") == batches[:7]
    assert train.shuffled_batches(40, 8, 0, "1/stage1") == []


# --------------------------------------------------------------------------------------------------------- evaluation


@pytest.mark.parametrize(
    ("a", "b", "ratio"),
    [
        ([1, 2, 3], [1, 2, 3], 0.0),
        ([1, 2, 3], [4, 5, 6], 1.0),
        ([1, 2, 3, 4], [1, 3, 4], 0.25),
        ([1], [2, 1], 0.5),
        ([1, 2], [2, 1], 1.0),
        (list(range(10)), [0, 1, 99, 3, 4, 5, 6, 7, 8, 9, 10], 2 / 11),
    ],
)
def test_edit_distance_ratio(a: list[int], b: list[int], ratio: float) -> None:
    assert train.edit_distance_ratio(a, b) == pytest.approx(ratio)
    assert train.edit_distance_ratio(b, a) == pytest.approx(ratio)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=7), st.lists(st.integers(0, 3), min_size=1, max_size=7))
@settings(deadline=None)
def test_edit_distance_equals_the_textbook_recursion(a: list[int], b: list[int]) -> None:
    def distance(i: int, j: int) -> int:
        if i == 0 or j == 0:
            return i + j
        return min(table[i - 1, j] + 1, table[i, j - 1] + 1, table[i - 1, j - 1] + (a[i - 1] != b[j - 1]))

    table: dict[tuple[int, int], int] = {}
    for i in range(len(a) + 1):
        for j in range(len(b) + 1):
            table[i, j] = distance(i, j)
    assert train.edit_distance_ratio(a, b) == pytest.approx(table[len(a), len(b)] / max(len(a), len(b)))


def test_evaluation_counts_as_the_paper_does(make_policy: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    policy, config = make_policy({"eval.batch_size": 8})
    right, wrong, none = ("<answer>42</answer>" + IM_END, "<answer>41</answer>" + IM_END, "no" + IM_END)
    examples = examples_of(policy, config, list("abcde"))
    say_instead(monkeypatch, policy, [right, right, wrong, none, right], [right, wrong, right, right, right])
    event, samples = train.evaluate(policy, examples, config, "pretrain")
    exact = {
        "event": "eval",
        "checkpoint": "pretrain",
        "n": 5,
        "acc_attempt1": 0.6,
        "acc_attempt2": 0.8,
        "delta": 0.2,
        "delta_i_to_c": 0.4,
        "delta_c_to_i": 0.2,
        "reward_attempt1": (3 * 0.75 + 0.25) / 5,
        "reward_attempt2": 0.65,
        "truncated_attempt1": 0.0,
    }
    assert {key: event[key] for key in exact} == pytest.approx(exact)
    assert event["delta"] == pytest.approx(event["delta_i_to_c"] - event["delta_c_to_i"])
    assert 0 < event["edit_distance_ratio"] < 1
    assert len(samples) == 5
    assert (samples[1]["question"], samples[1]["correct_attempt1"], samples[1]["correct_attempt2"]) == (
        "b",
        True,
        False,
    )


def test_batches_of_the_evaluation_do_not_change_its_numbers(make_policy: Callable[..., Any]) -> None:
    events = []
    for size in (2, 7):
        policy, config = make_policy({"eval.batch_size": size})
        event, _ = train.evaluate(
            policy, examples_of(policy, config, [f"{i}+1=?" for i in range(7)]), config, "pretrain"
        )
        events.append({key: value for key, value in event.items() if key != "seconds"})
    for key, value in events[0].items():
        assert events[1][key] == (value if isinstance(value, str) else pytest.approx(value)), key
