"""The mathematics: token log-probs, K3, returns and baselines, and the gradient of a whole step.

The step's gradient is compared with `naive_gradients`: design.md's equations in float64, row by row, with full logits
and autograd through everything at once."""

from __future__ import annotations

import copy
import math
import random
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import build_model, perturb, random_attempts
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM

import train

ROWS, BUDGETS = 8, (8, 12)


def plain_log_probs(model: Any, prompt: list[int], completion: list[int], temperature: float) -> torch.Tensor:
    """log pi of the completion's tokens, [len(completion)]: one row, no pads, full logits."""
    logits = model(input_ids=torch.tensor([prompt + completion]), use_cache=False).logits[0]
    log_probs = (logits / temperature).log_softmax(-1)
    return torch.stack([log_probs[len(prompt) - 1 + t, token] for t, token in enumerate(completion)])


def rows_of(values: torch.Tensor, completions: list[list[int]]) -> list[torch.Tensor]:
    return list(values.split([len(tokens) for tokens in completions]))


def two_attempts(policy: Any, seed: int = 0, rows: int = ROWS) -> list[Any]:
    assert len(policy.eos_token_ids) == 2
    return random_attempts(random.Random(seed), rows, BUDGETS, policy.eos_token_ids)


# -------------------------------------------------------------------------------------------------------- log-probs


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_log_probs_of_a_ragged_batch_equal_plain_log_softmax_row_by_row(policy: Any, temperature: float) -> None:
    attempt = two_attempts(policy)[1]
    with torch.no_grad():
        together = train.completion_log_probs(policy, attempt.prompts, attempt.completions, temperature)
        assert together.dtype == torch.float32
        assert together.shape == (sum(map(len, attempt.completions)),)
        for row, mine in enumerate(rows_of(together, attempt.completions)):
            prompt, completion = attempt.prompts[row], attempt.completions[row]
            alone = train.completion_log_probs(policy, [prompt], [completion], temperature)
            torch.testing.assert_close(mine, alone, atol=1e-5, rtol=0)
            plain = plain_log_probs(policy.model, prompt, completion, temperature)
            torch.testing.assert_close(mine, plain, atol=1e-5, rtol=0)


def test_log_probs_begin_at_the_first_token_after_the_prompt_and_end_with_eos(policy: Any) -> None:
    prompt, eos = [20, 30, 40], policy.eos_token_ids[0]
    log_probs = lambda completion: train.completion_log_probs(policy, [prompt], [completion], 1.0)  # noqa: E731
    with torch.no_grad():
        after_prompt = policy.model(input_ids=torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
        after_50 = policy.model(input_ids=torch.tensor([[*prompt, 50]])).logits[0, -1].log_softmax(-1)
        assert log_probs([50])[0].item() == pytest.approx(after_prompt[50].item(), abs=1e-5)
        with_eos = log_probs([50, eos])
        assert len(with_eos) == 2
        assert with_eos[1].item() == pytest.approx(after_50[eos].item(), abs=1e-5)


def test_all_token_probabilities_sum_to_one(policy: Any) -> None:
    tokens = range(policy.model.get_output_embeddings().weight.shape[0])
    with torch.no_grad():
        log_probs = train.completion_log_probs(policy, [[20, 30]] * len(tokens), [[token] for token in tokens], 0.7)
    assert log_probs.exp().sum().item() == pytest.approx(1.0, abs=1e-5)


def test_pads_and_neighbours_do_not_matter(policy: Any) -> None:
    row = ([7, 8, 9], [10, 11])
    with torch.no_grad():
        alone = train.completion_log_probs(policy, [row[0]], [row[1]], 1.0)
        beside_a_long_one = train.completion_log_probs(policy, [row[0], [12] * 40], [row[1], [13] * 20], 1.0)[:2]
    torch.testing.assert_close(alone, beside_a_long_one, atol=1e-5, rtol=0)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("chunk_rows", [1, 3, 1000])
def test_linear_log_prob_gradient(
    monkeypatch: pytest.MonkeyPatch, temperature: float, dtype: torch.dtype, chunk_rows: int
) -> None:
    tokens, width, vocab = 10, 6, 17
    monkeypatch.setattr(train.LinearLogProb, "CHUNK_BYTES", 4 * vocab * chunk_rows)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, width, generator=generator, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocab, width, generator=generator, dtype=dtype)
    targets = torch.randint(vocab, (tokens,), generator=generator)
    incoming = torch.randn(tokens, generator=generator)

    log_probs = train.LinearLogProb.apply(hidden, weight, targets, temperature)
    (gradient,) = torch.autograd.grad(log_probs, hidden, incoming.to(log_probs.dtype))

    exact_hidden = hidden.detach().double().requires_grad_()
    exact = (exact_hidden @ weight.double().T / temperature).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    (exact_gradient,) = torch.autograd.grad(exact, exact_hidden, incoming.double())
    torch.testing.assert_close(log_probs.double(), exact, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(gradient.double(), exact_gradient, atol=2e-6, rtol=1e-5)


def test_linear_log_prob_of_a_nearly_sure_token_keeps_its_gradient() -> None:
    """1 - p is computed before it is rounded."""
    weight = torch.eye(3, dtype=torch.bfloat16)
    hidden = torch.tensor([[9.0, 0.0, 0.0]], dtype=torch.bfloat16, requires_grad=True)
    train.LinearLogProb.apply(hidden, weight, torch.tensor([0]), 1.0).sum().backward()
    probabilities = torch.tensor([9.0, 0.0, 0.0]).softmax(0)
    torch.testing.assert_close(hidden.grad[0].float(), torch.tensor([1.0, 0, 0]) - probabilities, rtol=0.01, atol=0)


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_log_prob_gradients_reach_every_lora_weight(
    make_policy: Callable[..., Any], tmp_path: Path, checkpointing: bool, tied: bool
) -> None:
    folder = build_model(tmp_path / "model", tied=tied)
    policy, _ = make_policy({"model.name": str(folder), "model.gradient_checkpointing": checkpointing})
    perturb(policy)
    train.completion_log_probs(policy, [[20, 21], [22]], [[23, 24, 25], [26]], 1.0).sum().backward()
    for name, weight in policy.trainable.items():
        assert weight.grad is not None, name
        assert weight.grad.abs().max() > 0, name


def test_a_head_that_is_adapted_is_refused_or_right(make_policy: Callable[..., Any]) -> None:
    """The fused route multiplies by the head's own weight: a LoRA on it must not be lost in silence."""
    try:
        policy, _ = make_policy({"model.lora.target_modules": ["q_proj", "lm_head"]})
    except train.UserError:
        return
    perturb(policy)
    with torch.no_grad():
        fused = train.completion_log_probs(policy, [[20, 21]], [[23, 24, 25]], 1.0)
        plain = plain_log_probs(policy.model, [20, 21], [23, 24, 25], 1.0)
    torch.testing.assert_close(fused, plain, atol=1e-4, rtol=0)


class LargestTensor(TorchDispatchMode):
    """Records the most elements that any operation's result has."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.elements = max(self.elements, leaf.numel())
        return result


def test_a_step_creates_no_tensor_of_batch_times_tokens_times_vocabulary(
    make_policy: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vocab = 5000
    policy, config = make_policy({"model.name": str(build_model(tmp_path / "model", vocab_size=vocab))})
    monkeypatch.setattr(train.LinearLogProb, "CHUNK_BYTES", 4 * vocab * 8)
    attempts = random_attempts(random.Random(0), 8, (60, 60), policy.eos_token_ids)
    policy.micro_tokens = 10**6  # one micro-batch
    tokens = sum(map(len, attempts[0].completions))
    with LargestTensor() as largest:
        train.improve(policy, Recorder(policy), attempts, 2, config)
    assert 0 < largest.elements < tokens * vocab / 2
    with LargestTensor() as largest, torch.no_grad():  # and the recorder would have seen one
        policy.model(input_ids=torch.tensor([attempts[0].prompts[0] + attempts[0].completions[0]]))
    assert largest.elements >= len(attempts[0].completions[0]) * vocab


# --------------------------------------------------------------------------------------------------------------- K3


def kl(p_logits: torch.Tensor, q_logits: torch.Tensor) -> torch.Tensor:
    """KL(p || q)."""
    p, q = p_logits.log_softmax(-1), q_logits.log_softmax(-1)
    return (p.exp() * (p - q)).sum()


def small_policies() -> tuple[torch.Tensor, torch.Tensor]:
    logits = torch.tensor([1.2, 0.4, 0.4, -0.3, 0.3, -1.1], dtype=torch.float64, requires_grad=True)
    return logits, torch.tensor([-0.2, 0.5, -3.0, 0.4, 0.0, 0.7], dtype=torch.float64)


@given(st.floats(-200, 0), st.floats(-200, 0))
@settings(deadline=None)
def test_k3_is_never_negative_and_zero_for_equal_policies(log_prob: float, reference: float) -> None:
    a, b = torch.tensor([log_prob], dtype=torch.float64), torch.tensor([reference], dtype=torch.float64)
    assert train.k3(a, b).item() >= 0
    assert train.k3(a, a).item() == 0
    assert math.isfinite(train.k3(a.float(), b.float()).item())


@pytest.mark.parametrize("d", [1e-4, -1e-4, 3e-6, 2e-3, -0.5, 9.9, 10.1, 50.0])
def test_k3_is_exact_in_float32_too(d: float) -> None:
    """Early in training the policies differ by little: exp(d) - d - 1 taken literally is noise there."""
    log_probs = torch.tensor([-2.0 if abs(d) > 0.1 else 0.0], requires_grad=True)
    estimate = train.k3(log_probs, log_probs.detach() + d)
    estimate.sum().backward()
    shift = (log_probs.detach() + d - log_probs.detach()).double().item()
    steep = math.exp(min(shift, 10))
    exact = math.expm1(shift) - shift if shift < 10 else steep * (1 + shift - 10) - shift - 1
    assert estimate.item() == pytest.approx(exact, rel=1e-3, abs=1e-13)
    assert log_probs.grad.item() == pytest.approx(1 - steep, rel=1e-3, abs=1e-9)


def test_k3_is_schulmans_formula() -> None:
    log_probs, reference = torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([-2.0, -1.0, -3.0])
    d = reference - log_probs
    torch.testing.assert_close(train.k3(log_probs, reference), d.exp() - d - 1)


def test_k3_averages_to_the_kl_from_policy_to_reference() -> None:
    logits, reference = small_policies()
    p, q = logits.detach().log_softmax(-1), reference.log_softmax(-1)
    exact = kl(logits, reference).item()
    assert (p.exp() * train.k3(p, q)).sum().item() == pytest.approx(exact, rel=1e-12)  # by enumeration
    assert abs(exact - kl(reference, logits).item()) > 0.1  # the other direction is another number
    tokens = torch.multinomial(p.exp(), 100_000, replacement=True, generator=torch.Generator().manual_seed(0))
    samples = train.k3(p[tokens], q[tokens])
    error = samples.std().item() / len(samples) ** 0.5
    assert samples.mean().item() == pytest.approx(exact, abs=4 * error)
    assert 8 * error < exact


def test_gradient_of_the_k3_term_is_that_of_the_kl_from_reference_to_policy() -> None:
    """As a loss term K3's samples are held fixed: its expected gradient is that of KL(pi_ref || pi)."""
    logits, reference = small_policies()
    weights = logits.detach().softmax(-1)  # the chance of each sample; no gradient goes through sampling
    term = (weights * train.k3(logits.log_softmax(-1), reference.log_softmax(-1))).sum()
    (gradient,) = torch.autograd.grad(term, logits)
    (from_reference,) = torch.autograd.grad(kl(reference, logits), logits)
    (from_policy,) = torch.autograd.grad(kl(logits, reference), logits)
    torch.testing.assert_close(gradient, from_reference, rtol=1e-10, atol=1e-12)
    assert (gradient - from_policy).abs().max() > 0.05


def test_k3_cannot_overflow_and_its_cap_is_smooth() -> None:
    def at(d: float) -> tuple[float, float]:
        log_prob = torch.tensor([-d], dtype=torch.float32, requires_grad=True)
        value = train.k3(log_prob, torch.zeros(1))
        value.sum().backward()
        return value.item(), -log_prob.grad.item()  # K3 and its slope in d

    for d in (-500.0, 50.0, 100.0, 1e4, 1e30):
        assert all(map(math.isfinite, at(d))), d
    for d in (-30.0, -1.0, 0.5, 3.0, 9.9):  # below the cap: untouched
        value, slope = at(d)
        assert value == pytest.approx(math.exp(d) - d - 1, rel=1e-4, abs=1e-6)
        assert slope == pytest.approx(math.exp(d) - 1, rel=1e-4)
    places = [9 + i / 100 for i in range(300)]
    values, slopes = zip(*map(at, places), strict=True)
    assert all(a < b for a, b in zip(values, values[1:], strict=False)), "grows with the distance, capped or not"
    for (a, slope_a), (b, slope_b) in zip(
        zip(values, slopes, strict=True), zip(values[1:], slopes[1:], strict=True), strict=False
    ):
        assert b - a == pytest.approx((slope_a + slope_b) / 2 * 0.01, rel=0.02), "no jump"
        assert slope_a <= slope_b * (1 + 1e-6) <= slope_a * 1.02, "and no kink"


# ---------------------------------------------------------------------------------------------- returns, advantages


def settings_of(**keys: Any) -> Any:
    return train.TrainConfig(**keys)


def test_stage_one_pays_attempt_two_alone_and_holds_attempt_one() -> None:
    r1, r2 = torch.tensor([1.0, 0.0]), torch.tensor([0.25, 1.0])
    (first, kappa1), (second, kappa2) = train.stage_terms(1, r1, r2, settings_of(alpha=3.0, beta1=0.01, beta2=0.2))
    assert (first.tolist(), second.tolist(), kappa1, kappa2) == ([0, 0], [0.25, 1], 0.2, 0.01)


def test_stage_two_pays_attempt_two_for_progress() -> None:
    r1, r2 = torch.tensor([1.0, 0.0]), torch.tensor([0.25, 1.0])
    (first, kappa1), (second, kappa2) = train.stage_terms(2, r1, r2, settings_of(alpha=3.0, beta1=0.01, beta2=0.2))
    assert (first.tolist(), second.tolist()) == ([1, 0], [0.25 + 3 * (0.25 - 1), 1 + 3 * (1 - 0)])
    assert (kappa1, kappa2) == (0.01, 0.01)


def test_leave_one_out_by_hand() -> None:
    rewards = torch.tensor([1.0, 0.0, 0.0, 3.0])
    over_batch = train.advantages(rewards, settings_of(baseline="leave_one_out"))
    assert over_batch.tolist() == pytest.approx([1 - 3 / 3, 0 - 4 / 3, 0 - 4 / 3, 3 - 1 / 3])
    over_groups = train.advantages(rewards, settings_of(baseline="leave_one_out", num_generations=2))
    assert over_groups.tolist() == pytest.approx([1, -1, -3, 3])
    assert train.advantages(rewards, settings_of(baseline="batch")).tolist() == pytest.approx([0, -1, -1, 2])
    assert train.advantages(rewards, settings_of(baseline="none")).tolist() == rewards.tolist()


@given(st.lists(st.integers(-8, 8), min_size=2, max_size=12), st.integers(0, 11))
@settings(deadline=None)
def test_leave_one_outs_baseline_never_looks_at_its_own_reward(rewards: list[int], row: int) -> None:
    row %= len(rewards)
    other = [r + 5 * (i == row) for i, r in enumerate(rewards)]
    config = settings_of(baseline="leave_one_out")
    before, after = (
        train.advantages(torch.tensor(r, dtype=torch.float64), config)[row].item() for r in (rewards, other)
    )
    assert after - before == pytest.approx(5)


# ---------------------------------------------------------------------------------------------- the whole gradient


class Recorder(torch.optim.SGD):
    """An optimizer that keeps the gradients it is given and changes nothing."""

    def __init__(self, policy: Any) -> None:
        super().__init__(policy.trainable.values(), lr=1.0)
        self.names, self.gradients = list(policy.trainable), None

    def step(self, closure: Any = None) -> None:
        weights = (weight for group in self.param_groups for weight in group["params"])
        self.gradients = {name: weight.grad.clone() for name, weight in zip(self.names, weights, strict=True)}


def step_gradients(policy: Any, attempts: list[Any], stage: int, config: Any) -> tuple[dict[str, torch.Tensor], dict]:
    recorder = Recorder(policy)
    update = train.improve(policy, recorder, attempts, stage, config)
    return recorder.gradients, update


def naive_baseline(returns: list[float], row: int, kind: str, generations: int) -> float:
    if kind == "none":
        return 0.0
    if kind == "batch":
        return sum(returns) / len(returns)
    company = range(len(returns))
    if generations > 1:
        first = row // generations * generations
        company = range(first, first + generations)
    others = [returns[i] for i in company if i != row]
    return sum(others) / len(others)


class Naive:
    """The loss of a step in float64, as design.md writes it down."""

    def __init__(self, policy: Any, attempts: list[Any], temperature: float) -> None:
        self.model = copy.deepcopy(policy.model).double()
        self.weights = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.attempts = attempts
        rows = [list(zip(a.prompts, a.completions, strict=True)) for a in attempts]
        self.log_probs = [[plain_log_probs(self.model, *row, temperature) for row in part] for part in rows]
        with torch.no_grad(), self.model.disable_adapter():
            self.reference = [[plain_log_probs(self.model, *row, temperature) for row in part] for part in rows]

    def loss(self, stage: int, keys: Any) -> torch.Tensor:
        r1, r2 = (attempt.rewards for attempt in self.attempts)
        if stage == 1:
            returns, kappas = [[0.0] * len(r1), r2], [keys.beta2, keys.beta1]
        else:
            returns = [r1, [b + keys.alpha * (b - a) for a, b in zip(r1, r2, strict=True)]]
            kappas = [keys.beta1, keys.beta1]
        total = torch.zeros((), dtype=torch.float64)
        for i, budget in enumerate((keys.max_new_tokens_attempt1, keys.max_new_tokens_attempt2)):
            for row, (log_pi, log_ref) in enumerate(zip(self.log_probs[i], self.reference[i], strict=True)):
                advantage = returns[i][row] - naive_baseline(returns[i], row, keys.baseline, keys.num_generations)
                d = log_ref - log_pi
                k3 = torch.exp(d) - d - 1
                norm = len(log_pi) if keys.length_norm == "sequence" else budget
                total = total + (-advantage * log_pi.sum() + kappas[i] * k3.sum()) / norm / len(returns[i])
        return total

    def gradients(self, stage: int, keys: Any) -> dict[str, torch.Tensor]:
        found = torch.autograd.grad(self.loss(stage, keys), list(self.weights.values()), retain_graph=True)
        return dict(zip(self.weights, found, strict=True))


def assert_same_gradients(
    mine: dict[str, torch.Tensor], exact: dict[str, torch.Tensor], tolerance: float = 1e-4
) -> None:
    assert mine.keys() == exact.keys()
    scale = torch.stack([g.double().norm() for g in exact.values()]).norm()
    assert scale > 0
    for name in exact:
        error = (mine[name].double() - exact[name].double()).norm() / scale
        assert error < tolerance, f"{name}: off by {error:.2e} of the whole gradient"


NO_CLIP = {
    "train.max_grad_norm": 1e9,
    "train.alpha": 1.5,
    "train.beta1": 0.3,
    "train.beta2": 0.8,
    "train.generation_temperature": 0.7,
    "train.max_new_tokens_attempt1": BUDGETS[0],
    "train.max_new_tokens_attempt2": BUDGETS[1],
}


@pytest.fixture
def scene(make_policy: Callable[..., Any]) -> Any:
    """A policy away from its reference, a rolled-out batch, and the naive losses on it."""
    policy, _ = make_policy()
    perturb(policy, 0.05)  # rewards and KL then weigh about the same in the gradient
    attempts = two_attempts(policy)
    return SimpleNamespace(policy=policy, attempts=attempts, naive=Naive(policy, attempts, 0.7))


@pytest.mark.parametrize("generations", [1, 2])
@pytest.mark.parametrize("stage", [1, 2])
def test_a_steps_gradient_is_that_of_the_equations(
    scene: Any, make_config: Callable[..., Any], stage: int, generations: int
) -> None:
    seen = []
    for baseline in ("leave_one_out", "batch", "none"):
        for norm in ("sequence", "constant"):
            keys = {"train.baseline": baseline, "train.length_norm": norm, "train.num_generations": generations}
            config = make_config(NO_CLIP | keys)
            exact = scene.naive.gradients(stage, config.train)
            seen.append(exact)
            for micro_tokens in (1, 45, 10**6):  # row by row, a few rows, all rows together
                scene.policy.micro_tokens = micro_tokens
                mine, update = step_gradients(scene.policy, scene.attempts, stage, config)
                assert_same_gradients(mine, exact)
                loss = scene.naive.loss(stage, config.train).item()
                assert update["loss"] == pytest.approx(loss, rel=1e-4, abs=1e-5)
                norm_of_it = torch.stack([g.norm() for g in exact.values()]).norm().item()
                assert update["grad_norm"] == pytest.approx(norm_of_it, rel=1e-3)
    for i, one in enumerate(seen):  # the six differ: a mix-up among them could not pass
        for other in seen[:i]:
            with pytest.raises(AssertionError):
                assert_same_gradients(one, other, 1e-3)


@pytest.mark.parametrize("stage", [1, 2])
def test_one_pass_over_conversations_equals_a_pass_for_each_attempt(
    scene: Any, make_config: Callable[..., Any], stage: int
) -> None:
    config = make_config(NO_CLIP)
    scene.policy.micro_tokens = 100
    mine, update = step_gradients(scene.policy, scene.attempts, stage, config)
    total, keys = 0.0, config.train
    terms = train.stage_terms(stage, *(torch.tensor(attempt.rewards) for attempt in scene.attempts), keys)
    for attempt, (returns, kappa) in zip(scene.attempts, terms, strict=True):
        rows = (attempt.prompts, attempt.completions, keys.generation_temperature)
        with torch.no_grad(), train.reference(scene.policy):
            reference = train.completion_log_probs(scene.policy, *rows)
        log_probs = train.completion_log_probs(scene.policy, *rows)
        lengths = torch.tensor([len(c) for c in attempt.completions])
        credit = (train.advantages(returns, keys) / lengths / ROWS).repeat_interleave(lengths)
        weight = (kappa / lengths / ROWS).repeat_interleave(lengths)
        loss = (weight * train.k3(log_probs, reference) - credit * log_probs).sum()
        loss.backward()
        total += loss.item()
    assert update["loss"] == pytest.approx(total, rel=1e-5, abs=1e-6)
    assert_same_gradients(mine, {name: weight.grad for name, weight in scene.policy.trainable.items()}, 2e-6)


def test_both_attempts_of_a_conversation_have_the_log_probs_of_plain_rows(policy: Any) -> None:
    first, second = two_attempts(policy)
    assert {c[-1] for c in first.completions} > set(policy.eos_token_ids), "both EOS ids and budgets"
    with torch.no_grad():
        together = train.completion_log_probs(
            policy,
            first.prompts + second.prompts,
            first.completions + second.completions,
            0.7,
            [prompt + completion for prompt, completion in zip(second.prompts, second.completions, strict=True)],
        )
        rows = [(*row, 0.7) for a in (first, second) for row in zip(a.prompts, a.completions, strict=True)]
        for mine, row in zip(rows_of(together, first.completions + second.completions), rows, strict=True):
            torch.testing.assert_close(mine, plain_log_probs(policy.model, *row), atol=1e-5, rtol=0)


def test_log_probs_of_attempt_one_do_not_change_with_attempt_two(policy: Any) -> None:
    first, second = two_attempts(policy)
    other = two_attempts(policy, seed=1)[1].completions

    def of_attempt1(answers: list[list[int]]) -> torch.Tensor:
        conversations = [prompt + answer for prompt, answer in zip(second.prompts, answers, strict=True)]
        with torch.no_grad():
            return train.completion_log_probs(policy, first.prompts, first.completions, 1.0, conversations)

    assert second.completions != other
    torch.testing.assert_close(of_attempt1(second.completions), of_attempt1(other), atol=1e-5, rtol=0)


def test_terms_for_attempt_one_alone_leave_attempt_two_out(
    scene: Any, make_config: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(NO_CLIP | {"train.beta1": 0.0})
    monkeypatch.setattr(train, "stage_terms", lambda stage, r1, r2, keys: [(r1, keys.beta1)])
    mine, update = step_gradients(scene.policy, scene.attempts, 2, config)
    attempt = scene.attempts[0]
    credit = train.advantages(torch.tensor(attempt.rewards), config.train)
    exact = -sum(a * log_pi.mean() for a, log_pi in zip(credit, scene.naive.log_probs[0], strict=True)) / ROWS
    found = torch.autograd.grad(exact, list(scene.naive.weights.values()))
    assert_same_gradients(mine, dict(zip(scene.naive.weights, found, strict=True)))
    assert math.isnan(update["kl_attempt2"])
    assert update["kl_attempt1"] > 0


def test_each_term_counts(scene: Any, make_config: Callable[..., Any]) -> None:
    """The scene is one in which every coefficient moves the gradient by more than the comparison forgives."""
    for stage, names in ((1, ("beta1", "beta2", "generation_temperature")), (2, ("alpha", "beta1"))):
        scene.policy.micro_tokens = 10**6
        before, _ = step_gradients(scene.policy, scene.attempts, stage, make_config(NO_CLIP))
        for name in names:
            value = 2 * NO_CLIP[f"train.{name}"]
            after, _ = step_gradients(
                scene.policy, scene.attempts, stage, make_config(NO_CLIP | {f"train.{name}": value})
            )
            with pytest.raises(AssertionError):
                assert_same_gradients(after, before, 0.01)


def test_gradient_checkpointing_changes_nothing(scene: Any, make_policy: Callable[..., Any]) -> None:
    policy, config = make_policy(NO_CLIP | {"model.gradient_checkpointing": True})
    perturb(policy, 0.05)
    mine, _ = step_gradients(policy, scene.attempts, 2, config)
    assert_same_gradients(mine, scene.naive.gradients(2, config.train))


def test_checkpointing_auto_is_off_where_memory_does_not_matter_and_comes_on_before_giving_up(
    scene: Any, make_policy: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, config = make_policy(NO_CLIP | {"model.gradient_checkpointing": "auto"})
    perturb(policy, 0.05)
    backbone, inner = policy.model.get_base_model().model, train.completion_log_probs
    assert not any(layer.gradient_checkpointing for layer in backbone.layers)
    policy.recompute = partial(policy.for_training.func, use_gradient_checkpointing=True)  # as on a GPU

    def full(*args: Any) -> torch.Tensor:
        if torch.is_grad_enabled() and not backbone.layers[0].gradient_checkpointing:
            raise torch.OutOfMemoryError("injected")
        return inner(*args)

    monkeypatch.setattr(train, "completion_log_probs", full)
    mine, _ = step_gradients(policy, scene.attempts, 2, config)
    assert_same_gradients(mine, scene.naive.gradients(2, config.train))
    assert backbone.layers[0].gradient_checkpointing


def test_micro_batch_size_of_the_config_bounds_the_rows_of_a_forward(
    make_policy: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, config = make_policy({"train.micro_batch_size": 2})
    seen, inner = [], train.completion_log_probs

    def spy(policy: Any, prompts: Any, completions: Any, temperature: float, conversations: Any) -> torch.Tensor:
        seen.append(len(conversations) * max(map(len, conversations)))
        return inner(policy, prompts, completions, temperature, conversations)

    monkeypatch.setattr(train, "completion_log_probs", spy)
    attempts = random_attempts(random.Random(0), 8, (8, 10), policy.eos_token_ids)
    attempts[1].prompts = [prompt + [9] * (90 - len(prompt)) for prompt in attempts[1].prompts]  # two such rows fit
    train.improve(policy, Recorder(policy), attempts, 1, config)
    assert len(seen) == 4 * 2  # four micro-batches, reference and policy
    assert max(seen) <= 2 * (config.train.max_prompt_length_attempt2 + config.train.max_new_tokens_attempt2)


def test_no_two_graphs_are_alive_together(
    scene: Any, make_config: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: weakref.WeakSet = weakref.WeakSet()
    kept_at_start, saved_in_all = [], []
    inner = train.completion_log_probs

    class Saved:
        def __init__(self, tensor: torch.Tensor) -> None:
            self.tensor = tensor
            alive.add(self)
            saved_in_all.append(tensor.numel())

    def spy(*args: Any) -> torch.Tensor:
        if torch.is_grad_enabled():
            kept_at_start.append(sum(saved.tensor.numel() for saved in alive))
        return inner(*args)

    monkeypatch.setattr(train, "completion_log_probs", spy)
    scene.policy.micro_tokens = 45
    with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
        train.improve(scene.policy, Recorder(scene.policy), scene.attempts, 2, make_config(NO_CLIP))
    assert len(kept_at_start) > 4
    assert max(kept_at_start) < 0.02 * sum(saved_in_all) / len(kept_at_start)


def test_gradients_are_clipped_and_the_norm_before_clipping_reported(
    scene: Any, make_config: Callable[..., Any]
) -> None:
    free, update = step_gradients(scene.policy, scene.attempts, 2, make_config(NO_CLIP))
    clipped, again = step_gradients(
        scene.policy, scene.attempts, 2, make_config(NO_CLIP | {"train.max_grad_norm": 0.01})
    )
    assert again["grad_norm"] == pytest.approx(update["grad_norm"], rel=1e-4)
    assert torch.stack([g.norm() for g in clipped.values()]).norm().item() == pytest.approx(0.01, rel=1e-3)
    assert_same_gradients({n: g * update["grad_norm"] / 0.01 for n, g in clipped.items()}, free, 1e-3)


def test_stage_one_has_no_policy_gradient_on_attempt_one(scene: Any, make_config: Callable[..., Any]) -> None:
    config = make_config(NO_CLIP)
    before, _ = step_gradients(scene.policy, scene.attempts, 1, config)
    scene.attempts[0].rewards = [3.0 * row for row in range(ROWS)]
    after, _ = step_gradients(scene.policy, scene.attempts, 1, config)
    for name in before:
        assert torch.equal(before[name], after[name]), name
    stage2, _ = step_gradients(scene.policy, scene.attempts, 2, config)
    with pytest.raises(AssertionError):
        assert_same_gradients(stage2, before, 0.01)


def test_logged_kl_is_the_mean_per_token_and_its_maximum(scene: Any, make_config: Callable[..., Any]) -> None:
    _, update = step_gradients(scene.policy, scene.attempts, 2, make_config(NO_CLIP))
    peaks = []
    for i, key in enumerate(("kl_attempt1", "kl_attempt2")):
        d = torch.cat(scene.naive.reference[i]) - torch.cat(scene.naive.log_probs[i]).detach()
        k3 = d.exp() - d - 1
        peaks.append(k3.max().item())
        assert update[key] == pytest.approx(k3.mean().item(), rel=1e-4)
    assert update["kl_max"] == pytest.approx(max(peaks), rel=1e-4)


def test_a_fresh_policy_has_zero_kl(make_policy: Callable[..., Any]) -> None:
    policy, config = make_policy(NO_CLIP)
    _, update = step_gradients(policy, two_attempts(policy), 1, config)
    assert update["kl_attempt1"] == update["kl_attempt2"] == update["kl_max"] == 0


# ---------------------------------------------------------------------------------- what a step does, what it leaves


def weights_of(policy: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in policy.model.named_parameters()}


def adam(policy: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(policy.trainable.values(), lr=0.01, weight_decay=0.0)


def test_a_step_changes_lora_weights_alone_and_raises_what_earned(make_policy: Callable[..., Any]) -> None:
    policy, config = make_policy(NO_CLIP)
    attempts = two_attempts(policy)
    attempts[1].rewards = [1.0] + [0.0] * (ROWS - 1)
    row = (attempts[1].prompts[:1], attempts[1].completions[:1], 0.7)
    before, optimizer = weights_of(policy), adam(policy)
    likely = train.completion_log_probs(policy, *row).sum().item()
    for _ in range(3):
        assert train.improve(policy, optimizer, attempts, 1, config)["skipped"] is False
    assert train.completion_log_probs(policy, *row).sum().item() > likely
    after = weights_of(policy)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all("lora_" in name for name in changed)
    assert {name for name in before if "lora_" in name} == changed
    assert set(policy.trainable) == changed


def test_reference_is_the_untouched_base_model_bit_for_bit(make_policy: Callable[..., Any], tiny_dir: Path) -> None:
    policy, config = make_policy({"model.lora.dropout": 0.1})
    base = AutoModelForCausalLM.from_pretrained(tiny_dir, dtype=torch.float32)
    ids, optimizer = torch.tensor([[20, 30, 40, 50, 60]]), adam(policy)

    def same() -> bool:
        with torch.no_grad(), train.reference(policy):
            return torch.equal(policy.model(input_ids=ids).logits, base(input_ids=ids).logits)

    assert same()
    train.improve(policy, optimizer, two_attempts(policy), 2, config)
    train.improve(policy, optimizer, two_attempts(policy), 2, config)
    assert same()
    with torch.no_grad():
        assert not torch.equal(policy.model(input_ids=ids).logits, base(input_ids=ids).logits)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_skips_the_step(
    policy: Any, make_config: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, bad: float
) -> None:
    optimizer, attempts, inner, calls = adam(policy), two_attempts(policy), train.completion_log_probs, []
    policy.micro_tokens = 60
    train.improve(policy, optimizer, attempts, 2, make_config())
    before = weights_of(policy)
    moments = copy.deepcopy(optimizer.state_dict()["state"])

    def poisoned(*args: Any) -> torch.Tensor:
        calls.append(args)
        return inner(*args) * (bad if len(calls) == 4 else 1.0)

    monkeypatch.setattr(train, "completion_log_probs", poisoned)
    assert train.improve(policy, optimizer, attempts, 2, make_config())["skipped"] is True
    for name, weight in weights_of(policy).items():
        assert torch.equal(weight, before[name]), name
    for index, state in optimizer.state_dict()["state"].items():
        assert all(torch.equal(state[key], moments[index][key]) for key in state)
    monkeypatch.undo()
    update = train.improve(policy, optimizer, attempts, 2, make_config())  # and the next one is none the worse
    assert update["skipped"] is False
    assert math.isfinite(update["grad_norm"])


@pytest.mark.parametrize("at_call", [1, 4, 7])
def test_out_of_memory_starts_the_update_over_with_smaller_micro_batches(
    scene: Any, make_config: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, at_call: int
) -> None:
    config, inner, sizes = make_config(NO_CLIP), train.completion_log_probs, []
    scene.policy.micro_tokens = 60
    exact, _ = step_gradients(scene.policy, scene.attempts, 2, config)

    def full(*args: Any) -> torch.Tensor:
        sizes.append(len(args[-1]))
        if len(sizes) == at_call:
            raise torch.OutOfMemoryError("injected")
        return inner(*args)

    monkeypatch.setattr(train, "completion_log_probs", full)
    mine, _ = step_gradients(scene.policy, scene.attempts, 2, config)
    assert max(sizes[at_call:]) < max(sizes[:at_call])
    assert_same_gradients(mine, exact, 1e-5)


def test_a_row_that_never_fits_ends_the_run_with_advice(
    policy: Any, make_config: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("injected")

    before = weights_of(policy)
    monkeypatch.setattr(train, "completion_log_probs", full)
    with pytest.raises(train.RunError, match="memory"):
        train.improve(policy, adam(policy), two_attempts(policy), 2, make_config())
    assert all(torch.equal(weight, before[name]) for name, weight in weights_of(policy).items())


# ----------------------------------------------------------------------------------------------------------- loading


def test_a_saved_adapter_loads_back_bit_for_bit_also_with_plain_peft(
    policy: Any, make_policy: Callable[..., Any], tiny_dir: Path, tmp_path: Path
) -> None:
    train.save_checkpoint(policy, tmp_path / "stage1", {"stage": 1, "step": 1, "finished": True}, None)
    again, _ = make_policy(adapter=tmp_path / "stage1")
    plain = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_dir, dtype=torch.float32), tmp_path / "stage1"
    )
    ids = torch.tensor([[20, 30, 40, 50, 60]])
    with torch.no_grad():
        logits = policy.model(input_ids=ids).logits
        assert torch.equal(again.model(input_ids=ids).logits, logits)
        assert torch.equal(plain(input_ids=ids).logits, logits)


def test_an_adapter_with_dropout_loads_back(make_policy: Callable[..., Any], tmp_path: Path) -> None:
    """Dropout draws anew in each forward; that is no reason to refuse the model."""
    policy, _ = make_policy({"model.lora.dropout": 0.2})
    perturb(policy)
    train.save_checkpoint(policy, tmp_path / "stage1", {"stage": 1, "step": 1, "finished": True}, None)
    again, _ = make_policy({"model.lora.dropout": 0.2}, adapter=tmp_path / "stage1")
    assert all(torch.equal(weight, policy.trainable[name]) for name, weight in again.trainable.items())


@pytest.mark.parametrize("changes", [{"hidden": 64}, {"tied": False, "vocab_size": 300}])
def test_an_adapter_of_another_base_model_is_refused(
    policy: Any, make_policy: Callable[..., Any], tmp_path: Path, changes: dict
) -> None:
    train.save_checkpoint(policy, tmp_path / "stage1", {"stage": 1, "step": 1, "finished": True}, None)
    other = build_model(tmp_path / "other", **changes)
    if changes.get("vocab_size"):  # the same shapes of LoRA: fits
        make_policy({"model.name": str(other)}, adapter=tmp_path / "stage1")
    else:
        with pytest.raises(train.UserError, match="another base model"):
            make_policy({"model.name": str(other)}, adapter=tmp_path / "stage1")


def test_damaged_files_are_named(make_policy: Callable[..., Any], policy: Any, tmp_path: Path) -> None:
    broken = build_model(tmp_path / "broken")
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(train.UserError, match=f"model.name: {broken}"):
        make_policy({"model.name": str(broken)})
    train.save_checkpoint(policy, tmp_path / "stage1", {"stage": 1, "step": 1, "finished": True}, None)
    (tmp_path / "stage1" / "adapter_model.safetensors").write_bytes(b"nothing")
    with pytest.raises(train.UserError, match="adapter_model.safetensors"):
        make_policy(adapter=tmp_path / "stage1")
    (tmp_path / "empty").mkdir()
    with pytest.raises(train.UserError, match="model.name"):
        make_policy({"model.name": str(tmp_path / "empty")})


def test_a_model_that_caps_its_logits_is_refused(make_policy: Callable[..., Any], tmp_path: Path) -> None:
    import transformers

    folder = build_model(tmp_path / "model")
    config = transformers.Gemma2Config(
        vocab_size=len(
            train.load_tokenizer(
                SimpleNamespace(model=SimpleNamespace(name=str(folder), trust_remote_code=False, chat_template=None))
            )
        ),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=512,
        final_logit_softcapping=1.0,
        initializer_range=0.3,
    )
    transformers.Gemma2ForCausalLM(config).save_pretrained(folder)
    with pytest.raises(train.UserError, match="logits"):
        make_policy({"model.name": str(folder)})


def test_corrections_of_one_first_attempt_are_compared_with_each_other():
    keys = settings_of(alpha=1.0, beta1=0.01, beta2=0.2)
    r1, r2 = torch.tensor([1.0, 1, 0, 0, 0, 0]), torch.tensor([1.0, 0, 0, 1, 1, 1])
    credit = train.credits_of(train.stage_terms(2, r1, r2, keys), keys, 2)
    assert credit[0].tolist() == [1, 1, -0.5, -0.5, -0.5, -0.5], "three first attempts, each in two rows"
    assert credit[1].tolist() == [2, -2, -2, 2, 0, 0], "(1 + alpha) (r2 - the other's r2): r1 cancels"
    keys = settings_of(alpha=0.0, beta1=0.01, beta2=0.2, num_generations=4)
    r1 = torch.tensor([1.0, 1, 0, 0, 0, 0, 0, 0])
    credit = train.credits_of(train.stage_terms(2, r1, torch.zeros(8), keys), keys, 2)
    assert credit[0].tolist() == [1, 1, -1, -1, 0, 0, 0, 0], "with first attempts at its own problem, where there are"


def rewarded(seed: int, *rewards: list[float]) -> list[Any]:
    attempts = random_attempts(random.Random(seed), len(rewards[0]), (4, 4), 1)
    for attempt, earned in zip(attempts, rewards, strict=True):
        attempt.rewards = [float(reward) for reward in earned]
    return attempts


@pytest.mark.parametrize(("stage", "r1", "r2", "kept", "silent"), [
    (2, "aadaa", "aaaad", [2, 4], 0.6),
    (2, "adaaa", "aaaaa", [0, 1], 0.8),  # filled up in the order of the batch
    (2, "ddddd", "ddddd", [0, 1], 0.0),
    (1, "ddddd", "aaaad", [0, 4], 0.8),  # attempt 1 earns nothing in Stage I
])  # fmt: skip
def test_oversampling_trains_the_problems_whose_rollouts_differ(stage, r1, r2, kept, silent) -> None:
    """Five problems of two rows each, whose rewards are alike (a) or differ (d); two are trained."""
    rows = {"a": [0.3, 0.3], "d": [1.0, 0.3]}
    attempts = rewarded(0, *([reward for kind in kinds for reward in rows[kind]] for kinds in (r1, r2)))
    keys = settings_of(alpha=0.0, beta1=0.01, beta2=0.2, num_generations=2, oversample=2)
    chosen, share = train.with_signal(attempts, stage, keys)
    assert share == pytest.approx(silent)
    rows = [row for problem in kept for row in (2 * problem, 2 * problem + 1)]
    assert chosen == [train.picked(attempt, rows) for attempt in attempts]


def test_corrections_with_signal_are_compared_within_a_first_attempt() -> None:
    """One problem a batch of four: two first attempts, two corrections each. r2 differs between the first attempts
    alone: nothing to learn from in Stage I; in Stage II the first attempts differ."""
    attempts = rewarded(0, [1, 1, 0, 0] + [0] * 4, [1, 1, 0, 0] + [0] * 4)
    for stage, silent in ((1, 1.0), (2, 0.5)):
        keys = settings_of(num_generations=4, stage1_corrections=2, stage2_corrections=2)
        assert train.with_signal(attempts, stage, keys) == (attempts, silent)
