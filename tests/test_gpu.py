"""What only a CUDA device can show: `pytest -m gpu`. Unsloth serves the policy there, in bf16."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, build_model

pytestmark = pytest.mark.gpu
KEYS = {"train.max_new_tokens_attempt2": 256, "train.max_new_tokens_attempt1": 64}
needs_unsloth = pytest.mark.skipif(not importlib.util.find_spec("unsloth"), reason="needs unsloth")


@pytest.fixture
def make_gpu_policy(make_policy: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable:
    """make_gpu_policy(use_unsloth, vocab_size, keys, adapter=...) -> Policy of a random Qwen3 with heads of 32."""

    def make(use_unsloth: bool = True, vocab_size: int = 0, keys: dict[str, Any] = KEYS, **more: Any) -> Any:
        folder = tmp_path / f"model{vocab_size}"
        if not folder.exists():
            build_model(folder, hidden=128, vocab_size=vocab_size)
        monkeypatch.setattr("train.unsloth_serves", lambda _: use_unsloth)
        return make_policy({"model.name": str(folder)} | KEYS | keys, **more)[0]

    return make


def ragged_rows(count: int = 16) -> list[list[Any]]:
    """Conversations of one turn each, of all lengths."""
    import train

    prompts = [[10 + (row * 7 + i) % 90 for i in range(3 + 5 * row % 60)] for row in range(count)]
    completions = [[10 + (row * 11 + 3 * i) % 90 for i in range(4 + 9 * row % 100)] for row in range(count)]
    return [[train.Turn(*pair)] for pair in zip(prompts, completions, strict=True)]


def move(policy: Any, scale: float = 0.05) -> None:
    """Away from the reference, the same way for the same names."""
    import torch

    with torch.no_grad():
        for number, (name, weight) in enumerate(sorted(policy.trainable.items())):
            if "lora_B" in name:
                noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(number))
                weight.copy_(scale * noise)


@needs_unsloth
def test_unsloth_and_transformers_give_the_same_log_probs(make_gpu_policy: Callable[..., Any], tmp_path: Path) -> None:
    import torch

    import train

    rows = ragged_rows()
    fast = make_gpu_policy(True)
    move(fast)
    train.save_checkpoint(fast, tmp_path / "stage1", None)
    slow = make_gpu_policy(False, adapter=tmp_path / "stage1")
    moved, base = [], []
    for policy in (fast, slow):
        with torch.no_grad():
            moved.append(train.completion_log_probs(policy, rows, 0.8))
            with train.reference(policy):
                base.append(train.completion_log_probs(policy, rows, 0.8))
    for mine, theirs in (moved, base):  # bf16 carries 8 bits: a hundredth of a random model's log-probs of -8 or so
        difference, size = (mine - theirs).abs(), theirs.abs().mean().item()
        print(f"mean difference {difference.mean().item():.4f}, mean log-prob {-size:.2f}")
        assert difference.mean().item() < 0.01 * size
        assert difference.max().item() < 0.1 * size
    assert (moved[0] - base[0]).abs().mean().item() > 0.1, "the adapter has moved the policy"


@pytest.mark.parametrize("use_unsloth", [pytest.param(True, marks=needs_unsloth), False])
def test_gradients_reach_every_lora_weight(make_gpu_policy: Callable[..., Any], use_unsloth: bool) -> None:
    import torch

    import train

    policy = make_gpu_policy(use_unsloth)
    move(policy)
    train.completion_log_probs(policy, ragged_rows(), 1.0).mean().backward()
    for name, weight in policy.trainable.items():
        assert weight.dtype == torch.float32
        assert weight.grad is not None, name
        assert torch.isfinite(weight.grad).all(), name
        assert weight.grad.abs().max() > 0, name


@pytest.mark.parametrize("use_unsloth", [pytest.param(True, marks=needs_unsloth), False])
def test_an_out_of_memory_switches_checkpointing_on(make_gpu_policy: Callable[..., Any], use_unsloth: bool) -> None:
    import torch

    import train

    keys = {"model.gradient_checkpointing": "auto", "train.micro_batch_size": 10**6}
    policy = make_gpu_policy(use_unsloth, keys=keys)
    move(policy)
    found, peaks = [], []
    for _ in range(2):
        before = torch.cuda.memory_allocated()
        log_probs = train.completion_log_probs(policy, ragged_rows(), 1.0)
        peaks.append(torch.cuda.memory_allocated() - before)
        log_probs.mean().backward()
        found.append(torch.cat([weight.grad.flatten() for weight in policy.trainable.values()]))
        policy.model.zero_grad()
        if policy.recompute:
            train.use_less_memory(policy, 1)  # as after an out-of-memory
    assert (policy.recompute, policy.micro_tokens) == (None, train.ENOUGH_TOKENS)
    print(f"kept for the backward pass: {peaks[0]} bytes, with checkpointing {peaks[1]}")
    assert peaks[1] < peaks[0] / 2
    assert (found[0] - found[1]).norm() < 0.05 * found[0].norm()


@needs_unsloth
def test_right_padding_is_exact_and_left_padding_is_not(make_gpu_policy: Callable[..., Any]) -> None:
    """Unsloth drops the attention mask in training mode: a left-padded row would attend to its pads."""
    import torch

    import train

    policy = make_gpu_policy(True)
    move(policy)
    prompt, completion = [20, 30, 40], [50, 60, 70, 80]
    with torch.no_grad():
        short, long = [train.Turn(prompt, completion)], [train.Turn([25] * 90, [35] * 20)]
        alone = train.completion_log_probs(policy, [short], 1.0)
        beside = train.completion_log_probs(policy, [short, long], 1.0)[: len(completion)]
        row = [policy.pad_token_id] * 60 + prompt + completion
        ids = torch.tensor([row], device=train.DEVICE)
        with train.autocast(policy):
            logits = policy.model(input_ids=ids, attention_mask=(ids != policy.pad_token_id).long()).logits
        left = logits[0, 62:-1].float().log_softmax(-1).gather(1, ids[0, 63:, None])[:, 0]
    right_error, left_error = (alone - beside).abs().max().item(), (alone - left).abs().max().item()
    print(f"largest error: right-padded {right_error:.4f}, left-padded {left_error:.4f} nats")
    assert right_error < 0.05
    assert left_error > 4 * right_error + 0.01


@needs_unsloth
def test_memory_does_not_grow_as_batch_times_tokens_times_vocabulary(make_gpu_policy: Callable[..., Any]) -> None:
    import torch

    import train

    vocab = 150_000
    policy = make_gpu_policy(True, vocab_size=vocab)
    rows = [[train.Turn([20, 30], [40] * 200)]] * 32
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    train.completion_log_probs(policy, rows, 1.0).mean().backward()
    peak = torch.cuda.max_memory_allocated() - before
    assert peak < 32 * 200 * vocab * 4 / 3


@pytest.mark.parametrize("use_unsloth", [pytest.param(True, marks=needs_unsloth), False])
def test_the_decoder_samples_from_the_policy_that_is_trained(make_gpu_policy: Callable, use_unsloth: bool) -> None:
    import torch

    import train

    policy = make_gpu_policy(use_unsloth)
    move(policy)
    assert isinstance(policy.sampler, train.Decoder)
    prompts = [turn.prompt for (turn,) in ragged_rows(24)]
    completions, sampled = train.sample(policy, prompts, 48, 0.9, "seed")
    again, _ = train.sample(policy, prompts, 48, 0.9, "seed")
    assert completions == again
    with torch.no_grad():
        turns = [[train.Turn(*pair)] for pair in zip(prompts, completions, strict=True)]
        trained = train.completion_log_probs(policy, turns, 0.9).cpu()
    drift = (trained - torch.tensor([p for row in sampled for p in row])).abs()
    assert len(drift) > 200
    assert drift.mean().item() < 0.03
    assert drift.max().item() < 0.6


@needs_unsloth
def test_the_shipped_default_smokes_on_the_gpu_with_unsloth(tmp_path: Path) -> None:
    flags = ["--config", "configs/tiny.yaml", "--smoke", "8", "--set", f"output.dir={tmp_path}"]
    command = [sys.executable, "train.py", *flags]
    done = subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    folder = tmp_path / "score-tiny-smoke"
    results = json.loads((folder / "results.json").read_text())
    assert results["versions"]["unsloth"]
    assert results["device"] != "cpu"
    assert [line["checkpoint"] for line in results["evals"]] == ["pretrain", "stage1", "stage2"]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["event"] == "train"]
    assert {line["stage"] for line in steps} == {1, 2}
    assert steps[0]["kl_attempt1"] < 1e-3, "the first batch is sampled from the reference"
    assert not any(line["skipped"] for line in steps)
    assert all(line["peak_memory_gb"] > 0 for line in steps)


@needs_unsloth
def test_rows_that_share_a_prompt_have_the_log_probs_and_gradients_of_whole_rows(make_gpu_policy: Callable[..., Any]):
    """Also with gradient checkpointing. A token sees its own row and its problem's prompt, not the rows beside it."""
    import torch
    from unsloth import FastLanguageModel

    import train

    policy, alone = make_gpu_policy(True), ragged_rows(12)
    move(policy)
    rows = [[train.Turn(alone[row // 4][0].prompt * 3, turn.completion)] for row, (turn,) in enumerate(alone)]
    found, shared = [], policy.share
    for policy.share, checkpointing in (("", False), (shared, False), (shared, True)):
        FastLanguageModel.for_training(policy.model, checkpointing)
        log_probs = train.completion_log_probs(policy, rows, 0.8)
        (log_probs * torch.linspace(-1, 1, len(log_probs), device="cuda")).sum().backward()
        found.append((log_probs.detach(), torch.cat([weight.grad.flatten() for weight in policy.trainable.values()])))
        policy.model.zero_grad(set_to_none=True)
    (whole, of_whole), *others = found
    for log_probs, gradient in others:
        assert shared and (log_probs - whole).abs().mean().item() < 0.01 * whole.abs().mean().item()
        assert torch.cosine_similarity(gradient, of_whole, dim=0).item() > 0.99
