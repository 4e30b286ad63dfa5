"""The two attempts: attempt 2 sees attempt 1 verbatim, both are graded, an evaluation counts as the paper does."""

from __future__ import annotations

import math
import random
import sys
from importlib.machinery import ModuleSpec
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import END_OF_TEXT, IM_END, PLAIN_TEMPLATE, SELF_CORRECTION, build_model, perturb

import profile_run
import train

BRIDGE = f"<|im_end|>\n<|im_start|>user\n{SELF_CORRECTION}<|im_end|>\n<|im_start|>assistant\n"
RIGHT, WRONG, NONE = f"<answer>42</answer>{IM_END}", f"<answer>41</answer>{IM_END}", f"<answer>no{IM_END}"


def encode(policy: Any, text: str) -> list[int]:
    return policy.tokenizer(text, add_special_tokens=False)["input_ids"]


def examples_of(policy: Any, config: Any, questions: list[str], target: str = "42") -> list[Any]:
    """Examples with their prompts, as data gets them."""
    return [train.Example(text, target, train.first_prompt(text, config, policy.tokenizer)) for text in questions]


class Listening:
    """Stands before a policy's sampler and notes each call; `texts`, a list a call, are said in place of samples."""

    def __init__(self, policy: Any, *texts: list[str]) -> None:
        self.tokenizer, self.inner, self.texts, self.calls = policy.tokenizer, policy.sampler, list(texts), []
        policy.sampler = self

    def generate(self, prompts: list, max_new_tokens: int, temperature: float, seed: int, first_row: int = 0) -> Any:
        rows = [(seed, first_row + row) for row in range(len(prompts))]
        self.calls.append(SimpleNamespace(prompts=prompts, budget=max_new_tokens, temperature=temperature, rows=rows))
        if not self.texts:
            return self.inner.generate(prompts, max_new_tokens, temperature, seed, first_row)
        said = self.tokenizer(self.texts.pop(0), add_special_tokens=False)["input_ids"]
        return said, [[-1.0] * len(row) for row in said]


# ------------------------------------------------------------------------------------------------------ two attempts


@pytest.mark.parametrize("ending", [IM_END, END_OF_TEXT, ""], ids=["eos", "other eos", "cut off"])
def test_roll_out_shows_attempt_two_attempt_one_verbatim(make_policy, ending):
    """With its reasoning, which the template would cut out, and its spaces."""
    policy, config = make_policy()
    text = "<think>2+2</think>\n\n <answer>4</answer>  "
    history = [{"role": "user", "content": "q"}, {"role": "assistant", "content": text}]
    assert "2+2" not in policy.tokenizer.apply_chat_template(history, tokenize=False)
    heard = Listening(policy, [text + ending], [WRONG])
    ((first, second),) = train.roll_out(policy, examples_of(policy, config, ["2+2=?"]), config, 1.0, "a")
    assert first.prompt == encode(policy, "<|im_start|>user\n2+2=?<|im_end|>\n<|im_start|>assistant\n")
    assert second.prompt == first.prompt + encode(policy, text) + encode(policy, BRIDGE)
    assert [call.prompts for call in heard.calls] == [[first.prompt], [second.prompt]]
    assert (first.text, second.text) == (text, "<answer>41</answer>")
    assert (first.truncated, second.truncated) == (ending == "", False)
    assert (first.completion, second.completion) == (encode(policy, text + ending), encode(policy, WRONG))
    assert len(first.log_probs) == len(first.completion)


def test_roll_out_builds_the_templates_own_prompt_where_nothing_is_stripped(make_policy):
    keys = {"model.chat_template": "{{ mood }}" + PLAIN_TEMPLATE, "model.chat_template_kwargs": {"mood": "calm"}}
    policy, config = make_policy(keys | {"prompts.system": "Add."})
    text = "<think>2+2</think><answer>4</answer>"
    Listening(policy, [text + IM_END], [text + IM_END])
    ((_, second),) = train.roll_out(policy, examples_of(policy, config, ["2+2=?"]), config, 1.0, "a")
    said = [("system", "Add."), ("user", "2+2=?"), ("assistant", text), ("user", SELF_CORRECTION)]
    turns = [{"role": role, "content": content} for role, content in said]
    rendered = policy.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True, mood="calm")
    assert rendered.startswith("calm")
    assert second.prompt == encode(policy, rendered)


def test_roll_out_gives_rewards_the_think_tag_that_the_template_opens(make_policy):
    template = PLAIN_TEMPLATE.replace("assistant\\n'", "assistant\\n<think>\\n'")  # as DeepSeek-R1's
    policy, config = make_policy({"model.chat_template": template})
    Listening(policy, [f"a</think>{RIGHT}"], [f"b</think>{WRONG}"])
    ((first, second),) = train.roll_out(policy, examples_of(policy, config, ["2+2=?"]), config, 1.0, "a")
    assert (first.text, first.reward, second.reward) == ("<think>a</think><answer>42</answer>", 1.0, 0.5)
    assert (first.correct, second.correct) == (True, False)
    prompt = policy.tokenizer.decode(second.prompt)
    assert prompt.endswith("<think>\n")
    assert prompt.count("<think>") == 2, "once a turn, not twice"


def test_roll_out_corrects_each_first_attempt_as_often_as_asked(make_policy):
    """Every turn is graded against its own problem's target."""
    policy, config = make_policy()
    examples = examples_of(policy, config, ["a"]) + examples_of(policy, config, ["b"], target="41")
    heard = Listening(policy, [RIGHT, NONE], [RIGHT, WRONG, WRONG, RIGHT])
    conversations = train.roll_out(policy, examples, config, 1.0, "a", corrections=2)
    assert [len(call.prompts) for call in heard.calls] == [2, 4]
    assert [[turn.answer for turn in c] for c in conversations] == [["42", "42"], ["42", "41"], ["", "41"], ["", "42"]]
    correct = [[turn.correct for turn in c] for c in conversations]
    assert correct == [[True, True], [True, False], [False, True], [False, False]]
    assert [second.reward for _, second in conversations] == [0.75, 0.25, 0.75, 0.25]
    assert conversations[0][0] is conversations[1][0]
    for first, second in conversations:
        assert second.prompt[: len(first.prompt)] == first.prompt


@pytest.mark.parametrize("fast", [True, False])
def test_roll_out_is_of_the_policy_and_leaves_it_as_it_was(make_policy, fast):
    """The model's own generation_config asks for top_k 5, top_p 0.5, a repetition penalty. A seed decides all."""
    policy, config = make_policy({"model.fast_inference": fast})
    perturb(policy)
    before = {name: p.detach().clone() for name, p in policy.model.named_parameters()}
    examples = examples_of(policy, config, ["1+1=?", "12+34=?", "7+8=?"])
    for turn in (turn for c in train.roll_out(policy, examples, config, 0.0, "a") for turn in c):
        with torch.no_grad():
            logits = policy.model(input_ids=torch.tensor([turn.prompt + turn.completion])).logits[0]
        assert turn.completion == logits[len(turn.prompt) - 1 : -1].argmax(-1).tolist()
    found = []
    for state, seed in ((5, "a"), (6, "a"), (5, "b")):
        torch.manual_seed(state)
        found.append(train.roll_out(policy, examples, config, 1.0, seed))
    assert found[0] == found[1] != found[2]
    sampled = torch.tensor([p for c in found[0] for turn in c for p in turn.log_probs])
    torch.testing.assert_close(sampled, train.completion_log_probs(policy, found[0], 1.0), atol=1e-4, rtol=0)
    assert policy.model.training and torch.is_grad_enabled()
    assert set(policy.trainable) == {name for name in before if "lora_" in name}
    assert all(torch.equal(p, before[name]) for name, p in policy.model.named_parameters())


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize(
    "names",
    [{"pad": None}, {"pad": IM_END}, {"pad": END_OF_TEXT}, {"eos": END_OF_TEXT}, {"eos": None, "pad": None}],
    ids=str,
)
def test_roll_out_does_not_depend_on_which_token_pads_or_is_named_eos(make_policy, tmp_path, names, fast):
    plain, config = make_policy()
    policy, _ = make_policy({"model.name": str(build_model(tmp_path / "model", **names)), "model.fast_inference": fast})
    assert set(policy.eos_token_ids) == set(plain.eos_token_ids) == set(encode(plain, IM_END + END_OF_TEXT))
    examples, found = examples_of(policy, config, ["1+1=?", "12+34=?", "7+8=?", "100+200=?"]), []
    for one in (plain, policy):
        perturb(one)
        conversations = train.roll_out(one, examples, config, 0.0, "a")
        log_probs = train.completion_log_probs(one, conversations, 1.0).tolist()
        found.append([(t.prompt, t.completion, t.text, t.truncated) for c in conversations for t in c])
        found.append(pytest.approx(log_probs, abs=1e-5))
    assert found[0] == found[2]
    assert log_probs == found[1]


def test_training_step_rolls_out_each_problem_as_configured_and_draws_all_anew(make_policy):
    """Rollouts of a problem stand together and differ; in Stage I corrections share a first attempt. Attempts are drawn
    at the training temperature within their budgets, each with noise of its own."""
    keys = {"num_generations": 4, "stage1_corrections": 2, "generation_temperature": 0.9}
    policy, config = make_policy({f"train.{name}": value for name, value in keys.items()})
    problems, heard, firsts = examples_of(policy, config, ["1+1=?", "2+2=?"]), Listening(policy), {1: 2, 2: 4}
    frozen = torch.optim.SGD(policy.trainable.values())
    for stage, step in ((1, 1), (1, 2), (2, 1), (2, 2)):
        _, conversations = train.training_step(policy, frozen, problems, stage, step, 0.0, config)
        first, second = heard.calls[-2:]
        assert first.prompts == [problem.prompt for problem in problems for _ in range(firsts[stage])]
        assert (first.budget, first.temperature, second.budget, second.temperature) == (8, 0.9, 12, 0.9)
        assert [c[0].prompt for c in conversations] == [problem.prompt for problem in problems for _ in range(4)]
        for rows in (conversations[:4], conversations[4:]):
            assert len({id(c[0]) for c in rows}) == len({tuple(c[0].completion) for c in rows}) == firsts[stage]
            assert len({tuple(c[1].completion) for c in rows}) == 4
    noise = [row for call in heard.calls for row in call.rows]
    assert len(noise) == len(set(noise)) == 2 * (4 + 8 + 8 + 8)


# --------------------------------------------------------------------------------------------------------- grading


def test_grade_gives_functions_in_trls_form_what_trl_gives(make_policy, monkeypatch):
    calls = []

    def graded(prompts: list, completions: list, completion_ids: list, level: list, **rest: Any) -> list:
        calls.append((prompts, completions, completion_ids, level, rest))
        return [None if level == 0 else float(level) for level in level]

    module = SimpleNamespace(graded=graded, __spec__=ModuleSpec("my_rewards", None))
    monkeypatch.setitem(sys.modules, "my_rewards", module)
    keys = {"reward.fn": ["my_rewards.graded", "exact_match"], "reward.weights": [0.5, 2.0], "prompts.system": "Add."}
    keys |= {"prompts.examples": [{"input": "i", "output": "o"}], "train.max_prompt_length_attempt1": 96}
    policy, config = make_policy(keys)
    examples = examples_of(policy, config, ["a", "b"])
    examples[0].columns, examples[1].columns = {"level": 3, "hint": "x"}, {"level": 0, "hint": "y"}
    Listening(policy, [WRONG, RIGHT], [RIGHT, NONE])
    conversations = train.roll_out(policy, examples, config, 1.0, "a")
    assert [[turn.reward for turn in c] for c in conversations] == [[1.5, 3.5], [2.0, 0.0]]
    opening = [("system", "Add."), ("user", "i"), ("assistant", "o")]
    later = [("assistant", "<answer>41</answer>"), ("user", SELF_CORRECTION)]
    for number, (prompts, completions, ids, level, rest) in enumerate(calls):
        said = [(message["role"], message["content"]) for message in prompts[0]]
        assert said == [*opening, ("user", "a"), *(later if number else [])]
        turns = [c[number] for c in conversations]
        assert completions == [[{"role": "assistant", "content": turn.text}] for turn in turns]
        assert (ids, level, rest) == ([turn.completion for turn in turns], [3, 0], {"hint": ["x", "y"]})


@pytest.mark.parametrize("misdeed", [lambda n: 1 / 0, lambda n: [1.0], lambda n: [math.nan] * n])
def test_grade_names_a_reward_that_misbehaves(make_policy, monkeypatch, misdeed):
    monkeypatch.setitem(train.rewards.REWARD_FNS, "my_reward", lambda texts, *_: misdeed(len(texts)))
    policy, config = make_policy({"reward.fn": "my_reward"})
    with pytest.raises(train.RewardError, match="my_reward"):
        train.roll_out(policy, examples_of(policy, config, ["a", "b"]), config, 1.0, "a")


# --------------------------------------------------------------------------------------------------------- evaluation


def test_edit_distance_ratio_equals_the_textbook_recursion():
    rng = random.Random(0)
    for _ in range(100):
        a, b = (rng.choices(range(4), k=rng.randrange(1, 8)) for _ in range(2))
        table = {(i, 0): i for i in range(8)} | {(0, j): j for j in range(8)}
        for i in range(1, len(a) + 1):
            for j in range(1, len(b) + 1):
                changed = table[i - 1, j - 1] + (a[i - 1] != b[j - 1])
                table[i, j] = min(table[i - 1, j] + 1, table[i, j - 1] + 1, changed)
        assert profile_run.edit_distance_ratio(a, b) == pytest.approx(table[len(a), len(b)] / max(len(a), len(b)))


def test_intervals_are_of_rows_whose_attempts_stay_together():
    rng = np.random.default_rng(5)
    first = rng.random(4000) < 0.4
    correct = np.stack([first, np.where(rng.random(4000) < 0.7, first, rng.random(4000) < 0.9)], 1).astype(float)
    found = profile_run.intervals(correct)
    assert found == profile_run.intervals(correct.copy()), "the same on every call"
    columns = {"acc_attempt1": correct[:, 0], "acc_attempt2": correct[:, 1], "delta": correct[:, 1] - correct[:, 0]}
    for name, values in columns.items():
        error = values.std() / math.sqrt(len(values))
        exact = [values.mean() - 1.96 * error, values.mean() + 1.96 * error]
        assert found.pop(f"{name}_interval") == pytest.approx(exact, abs=0.3 * error), name
    assert not found
    assert profile_run.intervals(np.repeat([[1, 1], [0, 0]], 25, 0).astype(float))["delta_interval"] == [0, 0]


def test_evaluate_counts_as_the_paper_does(make_policy, capsys):
    policy, config = make_policy({"eval.batch_size": 8})
    Listening(policy, [RIGHT, RIGHT, WRONG, NONE, RIGHT], [RIGHT, WRONG, RIGHT, RIGHT, RIGHT])
    event, samples = train.evaluate(policy, examples_of(policy, config, list("abcde")), config, "pretrain")
    exact = {"n": 5, "acc_attempt1": 0.6, "acc_attempt2": 0.8, "delta": 0.2, "delta_i_to_c": 0.4, "delta_c_to_i": 0.2}
    exact |= {"reward_attempt1": (3 * 0.75 + 0.25) / 5, "reward_attempt2": 0.65, "truncated_attempt1": 0.0}
    exact |= {"unanswered_attempt1": 0.2, "completion_tokens_attempt1": (4 * 5 + 4) / 5}
    assert {key: event[key] for key in exact} == pytest.approx(exact)
    assert 0 < event["edit_distance_ratio"] < 1
    assert event["delta_interval"][0] <= event["delta"] <= event["delta_interval"][1]
    assert "overflow" not in capsys.readouterr().out
    policy.sampler.generate = lambda prompts, *_: ([[5]] * len(prompts), [[math.nan]] * len(prompts))
    train.evaluate(policy, examples_of(policy, config, ["a"]), config, "pretrain")
    assert "overflows its numbers in rollouts of pretrain" in capsys.readouterr().out
    rows = [(row["question"], row["correct_attempt1"], row["correct_attempt2"]) for row in samples]
    assert rows == [("a", True, True), ("b", True, False), ("c", False, True), ("d", False, True), ("e", True, True)]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_evaluate_draws_each_batch_anew_at_its_own_temperature(make_policy, temperature):
    """Greedy numbers do not depend on the batches."""
    found = []
    for size in (2, 7):
        policy, config = make_policy({"eval.batch_size": size, "eval.generation_temperature": temperature})
        heard = Listening(policy)
        examples = examples_of(policy, config, [f"{i}+1=?" for i in range(7)])
        found.append(train.evaluate(policy, examples, config, "pretrain")[1])
        noise = [row for call in heard.calls for row in call.rows]
        assert len(noise) == len(set(noise)) == 2 * 7
        assert {call.temperature for call in heard.calls} == {temperature}
    assert temperature or found[0] == found[1]
