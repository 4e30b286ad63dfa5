"""The mathematics: token log-probs, K3, returns and baselines, the gradient of a whole step, and what a step does.

The gradient is compared with the paper's objective in float64: one row at a time, full logits, autograd through all of
it (`Exact`). The objective is linear in a few terms, so a comparison that fails names the term."""

from __future__ import annotations

import copy
import math
import random
import sys
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from conftest import build_model, perturb, tiny_config, with_keys
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import train

ROWS, BUDGETS = 8, (8, 12)


def plain_log_probs(model: Any, turn: Any, temperature: float) -> torch.Tensor:
    """log pi of a turn's tokens: one row, no pads, full logits."""
    logits = model(input_ids=torch.tensor([turn.prompt + turn.completion]), use_cache=False).logits[0]
    log_probs = (logits / temperature).log_softmax(-1)
    return torch.stack([log_probs[len(turn.prompt) - 1 + t, token] for t, token in enumerate(turn.completion)])


def random_conversations(
    rng: Any, rows: int, budgets: tuple[int, ...], eos: list[int], vocab: int = 100, longest_prompt: int = 9
) -> list[list[Any]]:
    """Conversations of a train.Turn for each of `budgets`, of ragged random tokens and random rewards.

    Every other row ends in an EOS, each of `eos` in turn. A later prompt is the earlier one, what was answered there
    (EOS left out) and a bridge of three tokens. Every third row has the prompt of the one before."""

    def draw(most: int, least: int = 1) -> list[int]:
        return [rng.randrange(5, vocab) for _ in range(rng.randrange(least, most))]

    conversations = []
    for row in range(rows):
        turns, prompt = [], conversations[-1][0].prompt if row % 3 == 2 else draw(longest_prompt, 2)
        for budget in budgets:
            completion = draw(budget)
            end = [eos[row // 2 % len(eos)]] if row % 2 else []
            more = {"reward": rng.choice([0.0, 0.25, 0.5, 1.0]), "log_probs": [-1.0] * len(completion + end)}
            turns.append(train.Turn(prompt, completion + end, truncated=not end, **more))
            prompt = [*prompt, *completion, 9, 8, 7]
        conversations.append(turns)
    return conversations


def conversations_of(policy: Any) -> list[list[Any]]:
    assert len(policy.eos_token_ids) == 2
    return random_conversations(random.Random(0), ROWS, BUDGETS, policy.eos_token_ids)


def turns_of(conversations: list[list[Any]]) -> list[Any]:
    return [turn for conversation in conversations for turn in conversation]


# ---------------------------------------------------------------------------------------------------- log-probs, K3


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_completion_log_probs_equal_plain_log_softmax(policy, temperature):
    """Of both turns of ragged conversations, whatever ended attempt 1 (either EOS, or its budget): from the first token
    after the prompt to EOS, whatever pads and later turns stand beside it."""
    conversations = conversations_of(policy)
    assert {c[0].completion[-1] for c in conversations} > set(policy.eos_token_ids)
    turns = turns_of(conversations)
    with torch.no_grad():
        together = train.completion_log_probs(policy, conversations, temperature)
        assert (together.dtype, together.shape) == (torch.float32, (sum(len(turn.completion) for turn in turns),))
        for turn, mine in zip(turns, together.split([len(turn.completion) for turn in turns]), strict=True):
            plain = plain_log_probs(policy.model, turn, temperature)
            torch.testing.assert_close(mine, plain, atol=1e-5, rtol=0)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("chunk_rows", [1, 3, 1000])
@pytest.mark.parametrize(("biased", "scale", "cap"), [(False, 1.0, None), (True, 0.3, None), (True, 3.0, 2.0)])
def test_linear_log_prob_and_its_gradient(monkeypatch, temperature, dtype, chunk_rows, biased, scale, cap):
    """Of plain heads, of one with a bias whose logits are scaled, and of one whose logits are capped as well."""
    tokens, width, vocab = 10, 6, 17
    monkeypatch.setattr(train.LinearLogProb, "CHUNK_BYTES", 4 * vocab * chunk_rows)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, width, generator=generator, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocab, width, generator=generator, dtype=dtype)
    bias = torch.randn(vocab, generator=generator, dtype=dtype) if biased else None
    targets = torch.randint(vocab, (tokens,), generator=generator)
    incoming = torch.randn(tokens, generator=generator)

    log_probs = train.LinearLogProb.apply(hidden, weight, bias, targets, scale, cap, temperature)
    (gradient,) = torch.autograd.grad(log_probs, hidden, incoming.to(log_probs.dtype))

    exact_hidden = hidden.detach().double().requires_grad_()
    logits = scale * (exact_hidden @ weight.double().T + (bias.double() if biased else 0))
    logits = cap * (logits / cap).tanh() if cap else logits
    exact = (logits / temperature).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    (exact_gradient,) = torch.autograd.grad(exact, exact_hidden, incoming.double())
    torch.testing.assert_close(log_probs.double(), exact, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(gradient.double(), exact_gradient, atol=2e-6, rtol=1e-5)


def test_linear_log_prob_of_a_nearly_sure_token_keeps_its_gradient():
    """1 - p is computed before it is rounded."""
    weight = torch.eye(3, dtype=torch.bfloat16)
    hidden = torch.tensor([[9.0, 0.0, 0.0]], dtype=torch.bfloat16, requires_grad=True)
    train.LinearLogProb.apply(hidden, weight, None, torch.tensor([0]), 1.0, None, 1.0).sum().backward()
    probabilities = torch.tensor([9.0, 0.0, 0.0]).softmax(0)
    torch.testing.assert_close(hidden.grad[0].float(), torch.tensor([1.0, 0, 0]) - probabilities, rtol=0.01, atol=0)


def test_gradients_reach_every_lora_weight_of_a_tied_model(make_policy, tmp_path):
    policy, _ = make_policy({"model.name": str(build_model(tmp_path / "model", tied=True))})
    perturb(policy)
    train.completion_log_probs(policy, conversations_of(policy), 1.0).sum().backward()
    assert [name for name, weight in policy.trainable.items() if not weight.grad.abs().max() > 0] == []


class LargestTensor(TorchDispatchMode):
    """Records the most elements that any operation's result has."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.elements = max([self.elements, *sizes])
        return result


def test_train_step_creates_no_tensor_of_tokens_times_vocabulary(make_policy, tmp_path, monkeypatch):
    vocab = 5000
    policy, config = make_policy({"model.name": str(build_model(tmp_path / "model", vocab_size=vocab))})
    monkeypatch.setattr(train.LinearLogProb, "CHUNK_BYTES", 4 * vocab * 8)
    conversations = random_conversations(random.Random(0), 8, (60, 60), policy.eos_token_ids)
    policy.micro_tokens = 10**6  # one micro-batch
    tokens = sum(len(turn.completion) for turn in turns_of(conversations))
    with LargestTensor() as largest:
        train.train_step(policy, Recorder(policy.trainable.values()), conversations, 2, config.train)
    assert 0 < largest.elements < tokens * vocab / 4
    turn = conversations[0][1]
    with LargestTensor() as largest, torch.no_grad():  # and the recorder would have seen one
        policy.model(input_ids=torch.tensor([turn.prompt + turn.completion]))
    assert largest.elements >= len(turn.completion) * vocab


@pytest.mark.parametrize("d", [0.0, 1e-4, -1e-4, 3e-6, 2e-3, -0.5, 3.0, 9.9, 10.1, 50.0, -500.0, 1e4, 1e30])
def test_k3_is_exact_in_float32_and_goes_on_as_its_tangent_from_10(d):
    """Early in training the policies differ by little: exp(d) - d - 1 taken literally is noise there."""
    log_probs = torch.tensor([-2.0 if abs(d) > 0.1 else 0.0], requires_grad=True)
    estimate = train.k3(log_probs, log_probs.detach() + d)
    estimate.sum().backward()
    shift = (log_probs.detach() + d - log_probs.detach()).double().item()
    steep = math.exp(min(shift, 10))
    exact = math.expm1(shift) - shift if shift < 10 else steep * (1 + shift - 10) - shift - 1
    assert estimate.item() == pytest.approx(exact, rel=1e-3, abs=1e-13)
    assert log_probs.grad.item() == pytest.approx(1 - steep, rel=1e-3, abs=1e-9)


def test_k3_is_the_kl_from_policy_to_reference_and_has_the_gradient_of_the_other():
    """By enumeration. As a loss term K3's samples are held fixed: its expected gradient is that of KL(pi_ref || pi)."""
    logits = torch.tensor([1.2, 0.4, 0.4, -0.3, 0.3, -1.1], dtype=torch.float64, requires_grad=True)
    p = logits.log_softmax(-1)
    q = torch.tensor([-0.2, 0.5, -3.0, 0.4, 0.0, 0.7], dtype=torch.float64).log_softmax(-1)
    k3, forward, backward = p.exp().detach() @ train.k3(p, q), p.exp() @ (p - q), q.exp() @ (q - p)
    assert k3.item() == pytest.approx(forward.item(), rel=1e-12) != pytest.approx(backward.item(), abs=0.1)
    gradients = [torch.autograd.grad(value, logits, retain_graph=True)[0] for value in (k3, forward, backward)]
    torch.testing.assert_close(gradients[0], gradients[2], rtol=1e-10, atol=1e-12)
    assert (gradients[0] - gradients[1]).abs().max() > 0.05


# ---------------------------------------------------------------------------------------------- returns, advantages


def rewarded(*rewards: tuple[float, float]) -> list[list[Any]]:
    """Conversations that earned so much for attempt 1 and attempt 2."""
    return [[train.Turn([1], [2], reward=float(reward)) for reward in pair] for pair in rewards]


PAPER = [
    (1, 0, "attempt 1 earns nothing", [0, 0]),
    (1, 1, "attempt 2 earns its own reward r2", [0.25, 1]),
    (1, 2, "the KL weighs beta2 on attempt 1, beta1 on attempt 2", [0.2, 0.01]),
    (2, 0, "attempt 1 earns its own reward r1", [1, 0]),
    (2, 1, "attempt 2 earns r2 + alpha (r2 - r1)", [0.25 + 3 * (0.25 - 1), 1 + 3 * (1 - 0)]),
    (2, 2, "the KL weighs beta1 on both attempts", [0.01, 0.01]),
]


@pytest.mark.parametrize(("stage", "which", "term", "expected"), PAPER)
def test_stage_returns_are_the_papers(stage, which, term, expected):
    keys = train.TrainConfig(alpha=3.0, beta1=0.01, beta2=0.2)
    returns, kappas = train.stage_returns(stage, rewarded((1, 0.25), (0, 1)), keys)
    found = [*returns.T.tolist(), kappas][which]
    assert found == pytest.approx(expected), f"stage_returns no longer says: in Stage {stage} {term}"


def test_advantages_by_hand():
    returns = torch.tensor([[0, reward] for reward in (1.0, 0.0, 0.0, 3.0)], dtype=torch.float64)
    for keys, expected in (
        ({}, [1 - 3 / 3, 0 - 4 / 3, 0 - 4 / 3, 3 - 1 / 3]),
        ({"num_generations": 2}, [1, -1, -3, 3]),
        ({"baseline": "none"}, [1, 0, 0, 3]),
    ):
        credit = train.advantages(returns, 2, train.TrainConfig(**keys))
        assert credit[:, 1].tolist() == pytest.approx(expected), keys


def test_advantages_of_corrections_are_among_those_of_one_first_attempt():
    """First attempts are compared by their mean with the others at their problem, or in the batch if there are none."""
    returns = torch.tensor([[1.0, 1], [1, 0], [0, 0], [0, 1], [0, 1], [0, 1], [0, 0], [0, 0]])
    by_problem = train.advantages(returns, 1, train.TrainConfig(num_generations=4, stage1_corrections=2))
    assert by_problem[:, 1].tolist() == [1, -1, -1, 1, 0, 0, 0, 0]
    assert by_problem[:, 0].tolist() == [1, 1, -1, -1, 0, 0, 0, 0]
    by_batch = train.advantages(returns, 1, train.TrainConfig(num_generations=2, stage1_corrections=2))
    assert by_batch[:, 0].tolist() == pytest.approx([1, 1] + [-1 / 3] * 6)
    stage2 = train.advantages(returns, 2, train.TrainConfig(num_generations=4, stage1_corrections=2))
    assert stage2[:, 1].tolist() == pytest.approx([2 / 3, -2 / 3, -2 / 3, 2 / 3, 2 / 3, 2 / 3, -2 / 3, -2 / 3])
    conversations = rewarded((1, 1), (1, 1), (0, 0), (0, 0), *[(0, 0)] * 4)  # alike after each first attempt
    for stage, silent in ((1, 1.0), (2, 0.5)):
        keys = train.TrainConfig(num_generations=4, stage1_corrections=2)
        assert train.dynamic_sampling(conversations, stage, keys) == (conversations, silent)


def test_balanced_brings_both_attempts_of_stage_two_to_one_scale():
    keys = train.TrainConfig(attempt2_weight=2.5)
    credit = torch.tensor([[1.0, 30], [-1, -10], [2, 20], [-2, -40]], dtype=torch.float64)
    torch.testing.assert_close(train.balanced(credit, 2, keys), credit / credit.std(0) * torch.tensor([1, 2.5]))
    assert torch.equal(train.balanced(credit, 2, train.TrainConfig()), credit), "null is the paper's objective"
    assert torch.equal(train.balanced(credit, 1, keys), credit), "Stage I stays as it is"
    assert torch.equal(train.balanced(0 * credit, 2, keys), 0 * credit), "without signal nothing is made up"


@pytest.mark.parametrize(
    ("stage", "r1", "r2", "kept", "silent"),
    [
        (2, "aadaa", "aaaad", [2, 4], 0.6),
        (2, "adaaa", "aaaaa", [0, 1], 0.8),  # filled up in the order of the batch
        (2, "ddddd", "ddddd", [0, 1], 0.0),
        (1, "ddddd", "aaaad", [0, 4], 0.8),  # attempt 1 earns nothing in Stage I
    ],
)
def test_dynamic_sampling_keeps_problems_whose_rollouts_differ(stage, r1, r2, kept, silent):
    """Five problems of two rows each, whose rewards are alike (a) or differ (d); two are trained."""
    rows = {"a": [0.3, 0.3], "d": [1.0, 0.3]}
    firsts, seconds = ([reward for kind in kinds for reward in rows[kind]] for kinds in (r1, r2))
    conversations = rewarded(*zip(firsts, seconds, strict=True))
    keys = train.TrainConfig(alpha=0.0, num_generations=2, oversample=2)  # with alpha, r1 shows in both returns
    chosen, share = train.dynamic_sampling(conversations, stage, keys)
    assert share == pytest.approx(silent)
    wanted = [conversations[row] for problem in kept for row in (2 * problem, 2 * problem + 1)]
    assert list(map(id, chosen)) == list(map(id, wanted))


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize(("reward", "generations"), [(33.3, 6), (100.1, 8), (1e12 + 0.1, 7), (0.1 + 0.2, 7)])
def test_dynamic_sampling_knows_equal_rewards_of_any_size(stage, reward, generations):
    """Rounding leaves traces of large rewards that are no signal; a small difference is one."""
    keys = train.TrainConfig(num_generations=generations, oversample=2)
    alike = rewarded(*[(reward / 3, reward)] * (2 * generations))
    assert train.dynamic_sampling(alike, stage, keys)[1] == 1.0
    alike[-1][1].reward *= 1 + 1e-6
    chosen, share = train.dynamic_sampling(alike, stage, keys)
    assert (share, chosen[-1]) == (0.5, alike[-1])


# ---------------------------------------------------------------------------------------------- the whole gradient


class Recorder(torch.optim.SGD):
    """An optimizer that keeps the gradient it is given and changes nothing."""

    gradient = None

    def step(self, closure: Any = None) -> None:
        self.gradient = torch.cat([weight.grad.flatten() for weight in self.param_groups[0]["params"]]).double()


def step_gradient(policy: Any, conversations: list[Any], stage: int, keys: Any) -> tuple[torch.Tensor, dict[str, Any]]:
    recorder = Recorder(policy.trainable.values())
    update = train.train_step(policy, recorder, conversations, stage, keys)
    return recorder.gradient, update


class Exact:
    """In float64, for each turn of each conversation: gradient and (last) value of sum_t log pi and of sum_t K3."""

    def __init__(self, policy: Any, conversations: list[Any], temperature: float) -> None:
        model = copy.deepcopy(policy.model).double()
        weights = [p for p in model.parameters() if p.requires_grad]
        self.conversations, self.k3, parts = conversations, [[], []], {"log pi": [], "k3": []}
        for turn, k3_of_attempt in zip(turns_of(conversations), self.k3 * len(conversations), strict=True):
            with torch.no_grad(), model.disable_adapter():
                reference = plain_log_probs(model, turn, temperature)
            log_probs = plain_log_probs(model, turn, temperature)
            d = reference - log_probs
            k3 = torch.exp(d) - d - 1
            k3_of_attempt += k3.tolist()
            for name, total in (("log pi", log_probs.sum()), ("k3", k3.sum())):
                found = torch.autograd.grad(total, weights, retain_graph=True)
                parts[name].append(torch.cat([g.flatten() for g in found] + [total.detach()[None]]))
        self.parts = {name: torch.stack(found).unflatten(0, (-1, 2)) for name, found in parts.items()}

    def terms(self, stage: int, keys: Any) -> dict[str, tuple[float, torch.Tensor]]:
        """The objective's terms by name: the paper's weight, and the term's gradient and value."""
        pays, kappas = [[0, 0], [0, 1]], [keys.beta2, keys.beta1]  # of r1 and r2 to attempt 1, and to attempt 2
        if stage == 2:
            pays, kappas = [[1, 0], [-keys.alpha, 1 + keys.alpha]], [keys.beta1, keys.beta1]
        terms, budgets = {}, (keys.max_new_tokens_attempt1, keys.max_new_tokens_attempt2)
        for i in (0, 1):
            lengths = torch.tensor([len(c[i].completion) for c in self.conversations])
            norms = ROWS * (lengths if keys.length_norm == "sequence" else torch.full((ROWS,), budgets[i]))
            credit = [minus_baseline([c[r].reward for c in self.conversations], stage, i, keys) for r in (0, 1)]
            scale = 1.0
            if stage == 2 and keys.attempt2_weight:
                all_credit = pays[i][0] * credit[0] + pays[i][1] * credit[1]
                scale = (1.0, keys.attempt2_weight)[i] / all_credit.std().item()
            for r in (0, 1):
                term = -credit[r] / norms @ self.parts["log pi"][:, i]
                terms[f"r{r + 1} on attempt {i + 1}"] = scale * pays[i][r], term
            terms[f"KL of attempt {i + 1}"] = kappas[i], (1 / norms).double() @ self.parts["k3"][:, i]
        return terms


def minus_baseline(rewards: list[float], stage: int, attempt: int, keys: Any) -> torch.Tensor:
    """Rewards of attempt 0 or 1 minus the mean of the company: others at the same prompt, or else in the batch."""
    rewards, n = torch.tensor(rewards, dtype=torch.float64), keys.num_generations
    m, credit = keys.stage1_corrections if stage == 1 else 1, rewards.clone()
    for row in range(len(rewards)) if keys.baseline != "none" else ():
        first, problem = (range(row // size * size, row // size * size + size) for size in (m, n))
        mine, company = first, problem if n > m else range(len(rewards))
        if attempt == 1 and m > 1:
            mine, company = [row], first
        credit[row] = rewards[list(mine)].mean() - rewards[[i for i in company if i not in mine]].mean()
    return credit


def assert_objective(mine: torch.Tensor, terms: dict[str, tuple[float, torch.Tensor]]) -> None:
    """The gradient is the weighted sum of the terms; else names the terms that have another weight in it."""
    vectors = torch.stack([vector[:-1] for _, vector in terms.values()], 1)
    weights = torch.tensor([weight for weight, _ in terms.values()], dtype=torch.float64)
    exact = vectors @ weights
    error = ((mine - exact).norm() / exact.norm()).item()
    if error < 1e-4:
        return
    scale = vectors.norm(dim=0).clamp(min=1e-12)
    found = torch.linalg.lstsq(vectors / scale, mine[:, None], driver="gelsd").solution[:, 0] / scale
    rest = ((mine - vectors @ found).norm() / exact.norm()).item()
    odd = [
        f"{name} weighs {found[i]:.3g}, the paper says {weights[i]:.3g}"
        for i, name in enumerate(terms)
        if abs(found[i] - weights[i]) * scale[i] > 1e-3 * exact.norm()
    ]
    pytest.fail(f"gradient off by {error:.1e}: {'; '.join(odd) or 'no single term'}; {rest:.1e} is of no term")


KEYS = {"alpha": 1.5, "beta1": 0.3, "beta2": 0.8, "generation_temperature": 0.7}
KEYS |= {f"max_new_tokens_attempt{number}": budget for number, budget in enumerate(BUDGETS, 1)}
SCENE = {f"train.{name}": value for name, value in KEYS.items()}


@pytest.fixture(scope="module")
def shared_scene(tiny_dir: Path, data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    tree = with_keys(tiny_config(tiny_dir, data_dir, tmp_path_factory.mktemp("scene")), SCENE)
    config = train.check_config(tree)
    policy = train.load_policy(config, train.load_tokenizer(config))
    policy.model.set_attn_implementation("rows")
    perturb(policy, 0.05)  # rewards and KL then weigh about the same in the gradient
    conversations = conversations_of(policy)
    return SimpleNamespace(policy=policy, conversations=conversations, exact=Exact(policy, conversations, 0.7))


@pytest.fixture
def scene(shared_scene: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A policy away from its reference, rolled-out conversations, and the exact parts of the objective on them."""
    monkeypatch.setattr(train, "MAX_GRAD_NORM", 1e9)
    shared_scene.policy.micro_tokens, shared_scene.policy.share = 45, ""  # a few rows
    return shared_scene


def keys_of(changes: dict[str, Any] | None = None) -> Any:
    return train.TrainConfig(**KEYS | (changes or {}))


FORMS = [{}, {"num_generations": 2}, {"baseline": "none"}, {"num_generations": 8, "stage1_corrections": 4}]
NORMS = [{"length_norm": norm} for norm in ("sequence", "constant")]
OBJECTIVES = [(stage, form | norm) for stage in (1, 2) for form in FORMS[: 5 - stage] for norm in NORMS]
OBJECTIVES += [(2, {"attempt2_weight": 0.5}), (2, {"attempt2_weight": 2.0, "num_generations": 2} | NORMS[1])]


def attention(module: Any, q: Any, k: Any, v: Any, mask: Any, rows: Any = None, **more: Any) -> tuple[Any, None]:
    """What Unsloth's attention does on a GPU, in transformers: with `rows`, what train.py has for shared prompts."""
    if rows:
        return train.attend_in_rows(*(t.transpose(1, 2) for t in (q, k, v)), rows, more["scaling"]), None
    return transformers.AttentionInterface()["sdpa"](module, q, k, v, mask, **more)


transformers.AttentionInterface.register("rows", attention)
transformers.AttentionMaskInterface.register("rows", transformers.masking_utils.sdpa_mask)


def test_rows_share_prompts_only_where_that_works(scene, capsys):
    for share, said in (("input_ids", "do not share"), ("unheard_of", "nats off"), ("rows", "")):
        train.share_where_exact(scene.policy, share)
        assert scene.policy.share == ("" if said else share) and said in capsys.readouterr().out


@pytest.mark.parametrize(("stage", "changes"), OBJECTIVES)
def test_train_step_has_the_gradient_of_the_papers_objective(scene, stage, changes):
    terms = scene.exact.terms(stage, keys_of(changes))
    exact = sum(weight * vector for weight, vector in terms.values())
    for micro_tokens, share in product((1, 45, 10**6), ("", "rows")):  # row by row, a few rows, all together
        scene.policy.micro_tokens, scene.policy.share = micro_tokens, share
        mine, update = step_gradient(scene.policy, scene.conversations, stage, keys_of(changes))
        assert_objective(mine, terms)
        assert update["loss"] == pytest.approx(exact[-1].item(), rel=1e-4, abs=1e-5)
        assert update["grad_norm"] == pytest.approx(exact[:-1].norm().item(), rel=1e-3)


def test_objectives_differ_by_more_than_the_comparison_forgives(scene):
    """Each pair of settings has another gradient, and every coefficient moves it: no mix-up could pass."""
    doubled = [(s, {name: 2 * KEYS[name]}) for s, name in ((1, "beta1"), (1, "beta2"), (2, "beta1"), (2, "alpha"))]
    found = [scene.exact.terms(stage, keys_of(changes)).values() for stage, changes in OBJECTIVES + doubled]
    found = [sum(weight * vector for weight, vector in terms) for terms in found]
    for i, one in enumerate(found):
        for j, other in enumerate(found[:i]):
            assert (one - other).norm() > 1e-2 * other.norm(), (i, j)


@pytest.mark.parametrize(
    ("stage", "edit", "term"),
    [
        (2, lambda returns, kappas: (returns * torch.tensor([0, 1]), kappas), "r1 on attempt 1 weighs"),
        (1, lambda returns, kappas: (returns, kappas[::-1]), "KL of attempt 1 weighs 0.3"),
        (1, lambda returns, kappas: (returns.flip(1), kappas), "r2 on attempt 1 weighs 1"),
    ],
)
def test_a_changed_objective_is_named(scene, monkeypatch, stage, edit, term):
    inner = train.stage_returns
    monkeypatch.setattr(train, "stage_returns", lambda *given: edit(*inner(*given)))
    mine, _ = step_gradient(scene.policy, scene.conversations, stage, keys_of())
    with pytest.raises(pytest.fail.Exception, match=term):
        assert_objective(mine, scene.exact.terms(stage, keys_of()))


@pytest.mark.parametrize("bound", [1, 30, 50, 100, 1000])
def test_micro_batches_hold_every_row_once_within_the_bound(bound):
    lengths = random.Random(bound).choices(range(5, 50), k=20)
    conversations = [[train.Turn([1], [2]), train.Turn([1] * (length - 3), [2] * 3)] for length in lengths]
    batches = train.micro_batches(conversations, bound, shared=False)
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    assert all(len(b) == 1 or len(b) * max(lengths[row] for row in b) <= bound for b in batches)
    assert len(batches) < 20 or bound < 30
    shared = [[train.Turn([row // 4] * 9, [2] * 3)] for row in range(8)]  # 12 tokens; four share 9: 21
    sizes = [[len(batch) for batch in train.micro_batches(shared, most, True)] for most in (1, 20, 21, 41, 42)]
    assert sizes == [[1] * 8, [3, 1, 3, 1], [4, 4], [7, 1], [8]], "a prompt counts once"
    shared = [[train.Turn([1], [2] * n)] for n in (3, 3, 3, 3, 3, 3, 3, 3, 99)]  # 124 tokens, 900 with pads
    assert [len(train.micro_batches(shared, most, True)) for most in (224, 225)] == [2, 1], "pads count a fourth"
    policy = SimpleNamespace(recompute=None, micro_tokens=100, share="rows")
    train.use_less_memory(policy, 101)
    assert policy.micro_tokens == 50, "a micro-batch of 100 may have had several rows of 101"


def before_each_forward(monkeypatch: pytest.MonkeyPatch, act: Callable[[list], Any]) -> None:
    """Calls act(conversations) before each pass of the policy or of its reference."""
    inner = train.completion_log_probs
    monkeypatch.setattr(train, "completion_log_probs", lambda *given: (act(given[1]), inner(*given))[1])


@pytest.mark.parametrize("checkpointing", [True, False, "auto"])
def test_gradient_checkpointing_changes_nothing(scene, make_policy, monkeypatch, capsys, checkpointing):
    """`auto` is off until an out-of-memory, which then switches it on before it makes micro-batches smaller."""
    monkeypatch.setattr(train, "ENOUGH_TOKENS", 1)  # `auto` takes no more, but one longest row
    policy, config = make_policy(SCENE | {"model.gradient_checkpointing": checkpointing})
    perturb(policy, 0.05)
    layer, longest, emptied = policy.model.get_base_model().model.layers[0], config.model.max_seq_length, []
    assert layer.gradient_checkpointing == (checkpointing is True)
    assert policy.micro_tokens == longest * (1 if checkpointing == "auto" else config.train.micro_batch_size)

    def full(_: list) -> None:
        small = policy.micro_tokens < longest if checkpointing is False else layer.gradient_checkpointing
        if torch.is_grad_enabled() and not small:
            raise torch.OutOfMemoryError("injected")

    before_each_forward(monkeypatch, full)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(sys.exc_info()[1]))
    mine, _ = step_gradient(policy, scene.conversations, 2, config.train)
    assert not any(emptied), "an error that is being handled holds the activations"
    assert layer.gradient_checkpointing != (policy.micro_tokens < longest) == (checkpointing is False)
    says = [line.rpartition("starts over with ")[2][:12] for line in capsys.readouterr().out.splitlines()[1:]]
    assert says == {True: [], False: ["micro-batche"] * 3, "auto": ["gradient che"]}[checkpointing]
    assert_objective(mine, scene.exact.terms(2, keys_of()))


def test_no_two_graphs_are_alive_together(scene, monkeypatch):
    alive, saved, at_start = weakref.WeakSet(), [], []

    class Saved:
        def __init__(self, tensor: torch.Tensor) -> None:
            self.tensor = tensor
            alive.add(self)
            saved.append(tensor.numel())

    before_each_forward(monkeypatch, lambda _: at_start.append(sum(kept.tensor.numel() for kept in alive)))
    with torch.autograd.graph.saved_tensors_hooks(Saved, lambda kept: kept.tensor):
        step_gradient(scene.policy, scene.conversations, 2, keys_of())
    assert len(at_start) > 6
    assert max(at_start) < 0.02 * sum(saved) / len(at_start)


def test_train_step_clips_the_gradient_and_reports_its_norm_before(scene, monkeypatch):
    free, update = step_gradient(scene.policy, scene.conversations, 2, keys_of())
    monkeypatch.setattr(train, "MAX_GRAD_NORM", 0.01)
    clipped, again = step_gradient(scene.policy, scene.conversations, 2, keys_of())
    assert [update["grad_norm"], again["grad_norm"]] == pytest.approx([free.norm().item()] * 2, rel=1e-4)
    torch.testing.assert_close(clipped, free * 0.01 / free.norm(), rtol=1e-3, atol=1e-5)


def test_train_step_reports_kl_and_drift_per_token(scene):
    """The drift is between the sampler's log-probs and the update's: the larger of both attempts' means."""
    conversations = copy.deepcopy(scene.conversations)
    for c in conversations:
        for turn, off in zip(c, (0.1, -0.3), strict=True):
            turn.log_probs = [p + off for p in plain_log_probs(scene.policy.model, turn, 0.7).tolist()]
    _, update = step_gradient(scene.policy, conversations, 2, keys_of())
    first, second = scene.exact.k3
    expected = [sum(first) / len(first), sum(second) / len(second), max(first + second), 0.3]
    found = [update[name] for name in ("kl_attempt1", "kl_attempt2", "kl_max", "logprob_drift")]
    assert found == pytest.approx(expected, rel=1e-3)


# ---------------------------------------------------------------------------------- what a step does, what it leaves


def weights_of(policy: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in policy.model.named_parameters()}


def assert_untouched(policy: Any, before: dict[str, torch.Tensor]) -> None:
    assert [name for name, weight in weights_of(policy).items() if not torch.equal(weight, before[name])] == []


def adam(policy: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(policy.trainable.values(), lr=0.01, weight_decay=0.0)


def test_train_step_changes_lora_weights_alone_and_raises_what_earned(make_policy, tiny_dir):
    """The reference is the untouched base model bit for bit, before and after; at the start the KL to it is 0."""
    policy, config = make_policy(SCENE)
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny_dir, dtype=torch.float32)
    conversations, optimizer, before = conversations_of(policy), adam(policy), weights_of(policy)
    for row, conversation in enumerate(conversations):
        conversation[1].reward = float(row == 0)
    likely = train.completion_log_probs(policy, conversations[:1], 0.7).sum().item()
    updates = [train.train_step(policy, optimizer, conversations, 1, config.train) for _ in range(3)]
    assert not any(update["skipped"] for update in updates)
    assert updates[0]["kl_attempt1"] == updates[0]["kl_attempt2"] == updates[0]["kl_max"] == 0 < updates[2]["kl_max"]
    assert train.completion_log_probs(policy, conversations[:1], 0.7).sum().item() > likely
    after = weights_of(policy)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == set(policy.trainable) == {name for name in before if "lora_" in name}
    ids = torch.tensor([[20, 30, 40, 50, 60]])
    with torch.no_grad():
        assert not torch.equal(policy.model(input_ids=ids).logits, base(input_ids=ids).logits)
        with train.reference(policy):
            assert torch.equal(policy.model(input_ids=ids).logits, base(input_ids=ids).logits)


@pytest.mark.parametrize("what", ["loss", "gradient", "rollout"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_train_step_skips_what_is_not_finite(policy, make_config, what, bad):
    """Weights and Adam's moments stay, and the next step is none the worse."""
    optimizer, conversations, keys = adam(policy), conversations_of(policy), make_config().train
    train.train_step(policy, optimizer, conversations, 2, keys)
    before, moments = weights_of(policy), copy.deepcopy(optimizer.state_dict()["state"])
    poisoned, factor = copy.deepcopy(conversations), bad if what == "gradient" else 1.0
    if what == "loss":
        poisoned[3][1].reward = bad
    for turn in turns_of(poisoned) if what == "rollout" else ():
        turn.log_probs = [bad] * len(turn.completion)
    hook = next(iter(policy.trainable.values())).register_hook(lambda gradient: gradient * factor)
    assert train.train_step(policy, optimizer, poisoned, 2, keys)["skipped"] is True
    hook.remove()
    assert_untouched(policy, before)
    for index, state in optimizer.state_dict()["state"].items():
        assert all(torch.equal(state[key], moments[index][key]) for key in state)
    assert train.train_step(policy, optimizer, conversations, 2, keys)["skipped"] is False


@pytest.mark.parametrize("share", ["", "rows"])
@pytest.mark.parametrize("at_call", [1, 4, 6, "all"])
def test_out_of_memory_starts_the_update_over_with_smaller_micro_batches(scene, monkeypatch, at_call, share):
    """Where even one row does not fit, the run ends."""
    sizes, before = [], weights_of(scene.policy)
    scene.policy.micro_tokens, scene.policy.share = 60, share

    def full(rows: list) -> None:
        sizes.append(len(rows) * max(len(c[-1].prompt) + len(c[-1].completion) for c in rows))  # tokens and pads
        if at_call in (len(sizes), "all"):
            raise torch.OutOfMemoryError("injected")

    before_each_forward(monkeypatch, full)
    with pytest.raises(train.RunError, match="memory") if at_call == "all" else nullcontext():
        mine, _ = step_gradient(scene.policy, scene.conversations, 2, keys_of())
        assert max(sizes[at_call:]) < max(sizes[:at_call])
        assert_objective(mine, scene.exact.terms(2, keys_of()))
    assert_untouched(scene.policy, before)


# ----------------------------------------------------------------------------------------------------------- float16


@pytest.fixture(scope="module")
def half(shared_scene: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The scene's policy with base weights in float16."""
    name = shared_scene.policy.model.peft_config["default"].base_model_name_or_path
    tree = tiny_config(Path(name), Path("data"), tmp_path_factory.mktemp("half"))
    config = train.check_config(with_keys(tree, SCENE | {"model.dtype": "float16"}))
    policy = train.load_policy(config, train.load_tokenizer(config))
    perturb(policy, 0.05)
    return policy


@pytest.fixture
def earning(scene: Any, half: Any) -> Callable:
    """earning(reward, scale) -> the gradient and update of float32 and of float16 where rewards are so large."""
    train.log_once.cache_clear()
    keys = keys_of({"beta1": 0.0, "beta2": 0.0})

    def both(reward: float, scale: float = train.LOSS_SCALE) -> tuple:
        conversations, half.loss_scale = copy.deepcopy(scene.conversations), scale
        for turn in turns_of(conversations):
            turn.reward *= reward
        return *step_gradient(scene.policy, conversations, 2, keys), *step_gradient(half, conversations, 2, keys)

    return both


def off(mine: torch.Tensor, exact: torch.Tensor) -> float:
    return ((mine - exact).norm() / exact.norm()).item()


def test_float16_gradient_is_that_of_float32_also_where_it_is_tiny(earning, half):
    """Without the scale gradients of 1e-9 are lost; loss and norm are reported without it."""
    exact, wanted, mine, update = earning(1.0)
    assert off(mine, exact) < 0.01
    assert [update["loss"], update["grad_norm"]] == pytest.approx([wanted["loss"], wanted["grad_norm"]], rel=0.02)
    tiny = 1e-9 / exact.abs().median().item()
    exact, _, mine, _ = earning(tiny)
    assert exact.abs().median().item() == pytest.approx(1e-9, rel=0.01) and off(mine, exact) < 0.1
    exact, _, mine, _ = earning(tiny, 1.0)
    assert off(mine, exact) > 0.5


def test_float16_overflow_halves_the_scale_and_does_the_step_again(earning, half, capsys):
    for _ in range(2):
        exact, _, mine, update = earning(1e4)
        assert (math.frexp(half.loss_scale)[0], update["skipped"]) == (0.5, False)
        assert 1 < half.loss_scale < train.LOSS_SCALE and off(mine, exact) < 0.01
    assert capsys.readouterr().out.count("overflow") == 1, "said once"


def test_float16_gives_up_where_no_scale_helps(half):
    """The step is skipped, and the scale is not to blame."""
    before, tried, half.loss_scale = weights_of(half), [], 8.0
    hook = next(iter(half.trainable.values())).register_hook(lambda g: tried.append(half.loss_scale) or g * math.nan)
    half.micro_tokens = 10**6
    assert train.train_step(half, adam(half), conversations_of(half), 2, keys_of())["skipped"] is True
    hook.remove()
    assert (tried, half.loss_scale) == ([8.0, 4.0, 2.0], 8.0)
    assert_untouched(half, before)


def test_float16_scale_grows_back_every_hundredth_step(half, make_config, monkeypatch):
    monkeypatch.setattr(train, "roll_out", lambda *_: conversations_of(half))
    monkeypatch.setattr(train, "LOSS_SCALE", 16.0)
    recorder, scales, half.loss_scale = Recorder(half.trainable.values()), [], 8.0
    for step in (99, 100, 101, 200):
        train.training_step(half, recorder, [None] * ROWS, 2, step, 0.01, make_config(SCENE))
        scales.append(half.loss_scale)
    assert scales == [8, 16, 16, 16]


@pytest.mark.parametrize(("logit", "incoming"), [(16.0, 1e6), (0.0, 1e-5)])
def test_linear_log_prob_in_float16_keeps_large_and_small_gradients(logit, incoming):
    """1 - p of 1e-7, times a weight of the loss that float16 does not hold; or a weight that is small itself."""
    hidden = torch.tensor([[logit, 0.0, 0.0]], dtype=torch.float16, requires_grad=True)
    log_prob = train.LinearLogProb.apply(hidden, torch.eye(3).half(), None, torch.tensor([0]), 1.0, None, 1.0)
    (found,) = torch.autograd.grad(log_prob, hidden, torch.tensor([incoming]))
    exact = incoming * (torch.tensor([1.0, 0, 0]) - hidden[0].detach().double().softmax(0))
    torch.testing.assert_close(found[0].double(), exact, rtol=0.1, atol=0)


# ---------------------------------------------------------------------------------------------------- a step, a stage


def test_learning_rate_is_a_trapezoid():
    for warmup, decay, shares in (
        (0, 0.0, [1, 1, 1, 1, 1]),
        (3, 0.0, [1 / 3, 2 / 3, 1, 1, 1]),
        (0, 1.0, [1, 0.8, 0.6, 0.4, 0.2]),
        (2, 0.4, [0.5, 1, 1, 1, 0.5]),
        (0, 0.1, [1, 1, 1, 1, 1]),  # less than a step
    ):
        keys = train.TrainConfig(learning_rate=2.0, warmup_steps=warmup, lr_decay=decay)
        rates = [train.learning_rate(step, 5, keys) for step in range(1, 6)]
        assert rates == pytest.approx([2 * share for share in shares]), (warmup, decay)


def problems_of(policy: Any, config: Any, count: int = 8) -> list[Any]:
    questions = [f"{i}+1=?" for i in range(count)]
    return [train.Example(text, "42", train.first_prompt(text, config, policy.tokenizer)) for text in questions]


@pytest.mark.parametrize("stage", [1, 2])
def test_training_step_trains_what_dynamic_sampling_chose(scene, make_config, monkeypatch, stage):
    """Of four problems two have rollouts that differ: those alone go through the update; all are reported."""
    config = make_config(SCENE | {"train.num_generations": 2, "train.oversample": 2})
    conversations = copy.deepcopy(scene.conversations)
    for row, turn in enumerate(turns_of(conversations)):
        turn.reward = float(row in (7, 13))  # attempt 2 of rows 3 and 6
    monkeypatch.setattr(train, "roll_out", lambda *_: conversations)
    recorder = Recorder(scene.policy.trainable.values())
    figures, reported = train.training_step(scene.policy, recorder, [None] * 4, stage, 1, 0.01, config)
    expected, _ = step_gradient(scene.policy, [conversations[row] for row in (2, 3, 6, 7)], stage, config.train)
    torch.testing.assert_close(recorder.gradient, expected)
    assert (figures["without_signal"], figures["reward_attempt2"], reported) == (0.5, 0.25, conversations)


def test_training_step_depends_on_nothing_that_went_before(make_policy):
    """A resumed run repeats an undisturbed one: LoRA dropout, too, is seeded by the step."""
    policy, config = make_policy({"model.lora.dropout": 0.3})
    perturb(policy)
    problems, found = problems_of(policy, config, 4), []
    for state, step in ((5, 1), (6, 1), (5, 2)):
        torch.manual_seed(state)
        random.seed(state)
        recorder = Recorder(policy.trainable.values())
        _, conversations = train.training_step(policy, recorder, problems, 1, step, 0.01, config)
        found.append((recorder.gradient.tolist(), [turn.completion for turn in turns_of(conversations)]))
    assert found[0] == found[1] != found[2]


def run_stage(policy: Any, config: Any, examples: list[Any], stage: int, steps: int) -> Any:
    """train_stage with something in a Run's place that keeps what it is told."""
    run = SimpleNamespace(config=config, folder=Path("folder"), steps=[], saved=[])
    run.log_step = lambda event, *_: run.steps.append(event)
    run.save_checkpoint = lambda *given: run.saved.append((*given[1:3], given[3] and given[3].param_groups[0]["lr"]))
    train.train_stage(policy, examples, stage, run, 0, {1: steps, 2: steps}, lambda stage, step: None)
    return run


@pytest.mark.parametrize("stage", [1, 2])
def test_train_stage_without_signal_changes_nothing_and_says_so(make_policy, monkeypatch, capsys, stage):
    """All rollouts earn alike and the KL weighs nothing: the gradient is 0, and there is no weight decay."""
    keys = {"beta1": 0.0, "beta2": 0.0, "num_generations": 2, f"stage{stage}_steps": 4}
    keys |= {f"stage{number}_batch_size": 2 for number in (1, 2)}
    monkeypatch.setitem(train.rewards.REWARD_FNS, "same", lambda texts, *_: [0.3] * len(texts))
    policy, config = make_policy({"reward.fn": "same"} | {f"train.{name}": value for name, value in keys.items()})
    perturb(policy)
    before = weights_of(policy)
    run = run_stage(policy, config, problems_of(policy, config), stage, 4)
    assert [event["without_signal"] for event in run.steps] == [1.0] * 4
    assert capsys.readouterr().out.count("Format before correction") == 1, "once"
    assert_untouched(policy, before)


def test_an_optimizer_before_its_first_step_is_saved_and_loaded(policy, tmp_path):
    train.save_checkpoint(policy, tmp_path, adam(policy))
    train.load_optimizer(policy, optimizer := adam(policy), tmp_path / train.OPTIMIZER)
    assert not optimizer.state


def test_train_stage_steps_at_the_stages_rate_skips_and_saves(make_policy, monkeypatch):
    """A gradient that is not finite skips its step alone; two in a row, here, end the run."""
    keys = {"stage1_batch_size": 2, "stage1_steps": 5, "warmup_steps": 2, "lr_decay": 0.4, "checkpoint_every": 1}
    policy, config = make_policy({f"train.{name}": value for name, value in keys.items()})
    problems, calls, broken = problems_of(policy, config), [], {1, 3}
    policy.micro_tokens = 10**6  # one backward pass a step

    def breaks(gradient: torch.Tensor) -> torch.Tensor:
        calls.append(gradient)
        return gradient * (math.nan if len(calls) in broken else 1)

    next(iter(policy.trainable.values())).register_hook(breaks)
    monkeypatch.setattr(train, "MAX_SKIPPED_STEPS", 2)
    run = run_stage(policy, config, problems, 1, 5)
    assert [event["skipped"] for event in run.steps] == [True, False, True, False, False]
    assert [event["learning_rate"] for event in run.steps] == pytest.approx([0.005, 0.01, 0.01, 0.01, 0.005])
    assert run.saved == [(1, 1, 0.005), (1, 2, 0.01), (1, 3, 0.01), (1, 4, 0.01), (1, 5, None)]
    broken.update((7, 8))
    with pytest.raises(train.RunError, match="learning_rate"):
        run_stage(policy, config, problems, 1, 5)
    assert len(calls) == 8
