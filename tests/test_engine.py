"""Rollouts by vLLM, with a fake engine of the interface that Unsloth gives its own, and importance sampling."""

from __future__ import annotations

import copy
import importlib.machinery
import json
import os
import random
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import IM_END, fork_run, no_curves, output, perturb, random_attempt
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from test_rollout import chi_square, chi_square_limit, surprise_bins
from transformers import AutoModelForCausalLM

import train


@dataclass
class SamplingParams:
    """vLLM's, as far as it matters here: its names and its defaults."""

    n: int = 1
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    logprobs: int | None = None
    detokenize: bool = True


@dataclass
class Engine:
    """Samples with a copy of the base model and the LoRA tensors of each call, row by row, as told."""

    model: Any
    lora: Any
    heat: float = 1.0  # other than 1: an engine whose probabilities are off
    calls: list[SimpleNamespace] = field(default_factory=list)

    def generate(self, prompts: list[dict], sampling_params: list[SamplingParams], use_tqdm: bool,
                 lora_request: Any = None) -> list[SimpleNamespace]:  # fmt: skip
        assert not use_tqdm
        self.calls.append(SimpleNamespace(prompts=prompts, how=sampling_params, lora=lora_request))
        weights = self.lora if lora_request is None else lora_request.tensors
        set_peft_model_state_dict(self.model, weights)
        pairs = zip(prompts, sampling_params, strict=True)
        return [self.answer(prompt["prompt_token_ids"], how) for prompt, how in pairs]

    def answer(self, prompt: list[int], how: SamplingParams) -> SimpleNamespace:
        assert (how.top_p, how.min_p, how.repetition_penalty) == (1, 0, 1)
        assert how.top_k <= 0
        generator, tokens, found = torch.Generator().manual_seed(how.seed), [], []
        for _ in range(how.max_tokens):
            with torch.no_grad():
                logits = self.model(input_ids=torch.tensor([[*prompt, *tokens]])).logits[0, -1].float()
            log_probs = (logits / (how.temperature * self.heat or 1)).log_softmax(-1)
            drawn = torch.multinomial(log_probs.exp(), 1, generator=generator).item()
            tokens.append(drawn if how.temperature else logits.argmax().item())
            found.append({tokens[-1]: SimpleNamespace(logprob=log_probs[tokens[-1]].item(), rank=1)})
            if tokens[-1] in how.stop_token_ids and not how.ignore_eos:
                break
        return SimpleNamespace(outputs=[SimpleNamespace(token_ids=tuple(tokens), logprobs=found, text="")])


def copy_of_lora(model: Any) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in train.get_peft_model_state_dict(model).items()}


class FastLanguageModel:
    """Unsloth's loader with fast_inference, on transformers + PEFT and the engine above."""

    loaded: dict[str, Any] = {}
    has_engine, room = True, 4096

    @classmethod
    def from_pretrained(cls, name: str, **how: Any) -> tuple[Any, None]:
        cls.loaded = how
        os.write(sys.stdout.fileno(), b"")  # vLLM asks for the number
        print("==((====))==  Unsloth: a banner")
        print("Unsloth: this card is too old - will switch to another kernel!")
        if how.get("fast_inference"):
            print("\rCapturing CUDA graphs: 0/54", file=sys.stderr)
        model = AutoModelForCausalLM.from_pretrained(name)
        if how.get("fast_inference"):  # as vLLM's way of loading leaves it
            model.generation_config.eos_token_id = model.config.eos_token_id
        return model, None

    @classmethod
    def get_peft_model(cls, model: Any, use_gradient_checkpointing: Any, random_state: int, **how: Any) -> Any:
        fresh = copy.deepcopy(model)
        model = get_peft_model(model, LoraConfig(**how, task_type="CAUSAL_LM"))
        if cls.loaded.get("fast_inference") and cls.has_engine:
            fresh = get_peft_model(fresh, LoraConfig(**how, task_type="CAUSAL_LM")).eval()
            model.vllm_engine = Engine(fresh, copy_of_lora(fresh))
            model.vllm_engine.llm_engine = SimpleNamespace(model_config=SimpleNamespace(max_model_len=cls.room))
            model.fast_generate = model.vllm_engine.generate
            model.load_lora = lambda folder, load_tensors: SimpleNamespace(tensors=copy_of_lora(model))
        return model

    for_inference = staticmethod(lambda model: model.eval())
    for_training = staticmethod(lambda model, use_gradient_checkpointing: model.train())


def install() -> None:
    """vllm and unsloth, as far as `import` and `find_spec` can see."""
    for name, content in (("vllm", SamplingParams), ("unsloth", FastLanguageModel)):
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        setattr(module, content.__name__, content)
        sys.modules[name] = module


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("vllm", "unsloth"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(FastLanguageModel, "has_engine", True)
    monkeypatch.setattr(FastLanguageModel, "room", 4096)
    install()
    yield
    for name in ("vllm", "unsloth"):
        sys.modules.pop(name, None)


@pytest.fixture
def fast(make_policy: Callable[..., Any], fakes: None) -> Any:
    """A policy whose rollouts the fake engine makes, its adapter moved away from zero."""
    policy, _ = make_policy({"model.fast_inference": True}, use_unsloth=True)
    perturb(policy)
    return policy


PROMPTS = [[20 + (row * 7 + i) % 60 for i in range(2 + row % 9)] for row in range(60)]


def test_the_engine_is_asked_for_with_its_memory_and_a_rank_it_knows(
    make_policy: Callable[..., Any], fakes: None
) -> None:
    keys = {"model.fast_inference": True, "model.fast_inference_gpu_mem": 0.3}
    for rank, known in ((4, 8), (8, 8), (12, 16), (64, 64)):
        policy, _ = make_policy(keys | {"model.lora.r": rank}, use_unsloth=True)
        assert policy.engine
        assert policy.decoder is None
        loaded = FastLanguageModel.loaded
        assert loaded["fast_inference"] is True
        assert (loaded["gpu_memory_utilization"], loaded["max_lora_rank"]) == (0.3, known)
    make_policy(use_unsloth=True)
    assert "fast_inference" not in FastLanguageModel.loaded


def test_banners_are_kept_off_and_what_matters_is_said(
    make_policy: Callable[..., Any], fakes: None, capsys: pytest.CaptureFixture[str]
) -> None:
    make_policy({"model.fast_inference": True}, use_unsloth=True)
    said = capsys.readouterr()
    assert said.out == "Unsloth: this card is too old - will switch to another kernel!\n"
    assert said.err == ""


def test_every_end_of_an_answer_is_known_to_both(make_policy: Callable[..., Any], fakes: None) -> None:
    plain, _ = make_policy()
    policy, _ = make_policy({"model.fast_inference": True}, use_unsloth=True)
    assert set(policy.eos_token_ids) == set(plain.eos_token_ids)
    assert len(policy.eos_token_ids) > 1


def test_what_the_engine_samples_is_the_policy_that_is_trained(fast: Any) -> None:
    """Tokens, log-probs and ends: those of the LoRA weights of the moment, at the sampling temperature."""
    for temperature in (1.0, 0.6):
        completions, sampled = train.sample(fast, PROMPTS, 8, temperature, "seed")
        counts = surprise_bins(fast, PROMPTS, completions, temperature)
        assert chi_square(counts, [sum(counts) / len(counts)] * len(counts)) < chi_square_limit(len(counts) - 1)
        with torch.no_grad():
            expected = train.completion_log_probs(fast, PROMPTS, completions, temperature)
        assert torch.allclose(torch.tensor(sum(sampled, [])), expected, atol=1e-4)
        ended = [row for row in completions if row[-1] in fast.eos_token_ids]
        assert ended
        assert all(len(row) == 8 for row in completions if row not in ended)
        assert not any(token in fast.eos_token_ids for row in completions for token in row[:-1])
        perturb(fast, seed=int(10 * temperature))  # the next round samples from these


def test_rows_of_one_prompt_differ_and_a_seed_repeats_them(fast: Any) -> None:
    once, _ = train.sample(fast, [PROMPTS[3]] * 8, 8, 1.0, "seed")
    assert len({tuple(row) for row in once}) > 4
    assert train.sample(fast, [PROMPTS[3]] * 8, 8, 1.0, "seed")[0] == once
    assert train.sample(fast, [PROMPTS[3]] * 8, 8, 1.0, "another")[0] != once


def test_greedy_is_the_other_routes_greedy(fast: Any) -> None:
    completions, _ = train.sample(fast, PROMPTS[:12], 8, 0.0, "seed")
    engine, fast.engine = fast.engine, None
    assert train.sample(fast, PROMPTS[:12], 8, 0.0, "seed")[0] == completions
    fast.engine = engine


def test_the_reference_samples_without_the_adapter(fast: Any) -> None:
    with train.reference(fast):
        completions, sampled = train.sample(fast, PROMPTS, 6, 1.0, "seed")
        with torch.no_grad():
            base = train.completion_log_probs(fast, PROMPTS, completions, 1.0)
    assert fast.model.vllm_engine.calls[-1].lora is None
    assert torch.allclose(torch.tensor(sum(sampled, [])), base, atol=1e-4)
    with torch.no_grad():
        moved = train.completion_log_probs(fast, PROMPTS, completions, 1.0)
    assert (moved - base).abs().mean() > 0.01
    train.sample(fast, PROMPTS[:1], 6, 1.0, "seed")
    assert fast.model.vllm_engine.calls[-1].lora is not None


def test_a_timed_decoding_ignores_ends(fast: Any) -> None:
    """As profile_run asks for it."""
    completions, _ = train.engine_samples(fast.model, [], PROMPTS, 12, 1.0, 3)
    assert {len(row) for row in completions} == {12}
    assert any(token in fast.eos_token_ids for row in completions for token in row)


def test_faults_are_told_before_anything_is_trained(make_policy: Callable[..., Any], fakes: None) -> None:
    with pytest.raises(train.UserError, match=r"^model.fast_inference: vLLM serves one process with a GPU; set it to"):
        make_policy({"model.fast_inference": True})
    with pytest.raises(train.UserError, match=r"^model.decoder: graph leaves nothing to model.fast_inference"):
        make_policy({"model.fast_inference": True, "model.decoder": "graph"}, use_unsloth=True)
    for section, heat in (("train", 2.5), ("eval", 2.5), ("train", 0.001)):
        key = f"{section}.generation_temperature"
        with pytest.raises(train.UserError, match=rf"^{key}: vLLM takes 0.01 to 2 and 0 \(greedy\), and it is {heat}$"):
            make_policy({"model.fast_inference": True, key: heat}, use_unsloth=True)
    FastLanguageModel.room = 40
    with pytest.raises(train.UserError, match=r"^model.fast_inference_gpu_mem: 0.5 of the free memory holds rows of"):
        make_policy({"model.fast_inference": True}, use_unsloth=True)
    FastLanguageModel.has_engine = False
    with pytest.raises(train.UserError, match=r"^model.fast_inference: Unsloth has no vLLM engine for .*; set it to"):
        make_policy({"model.fast_inference": True}, use_unsloth=True)
    with pytest.raises(train.UserError, match=r"^train.importance_clip: needs the sampler's log-probs, .* to null"):
        make_policy({"model.decoder": "generate", "train.importance_clip": 2.0})


def test_a_whole_run_with_the_engine(tiny_run: Callable[..., list[str]], tmp_path: Path) -> None:
    short = ("train.stage1_epochs=0.4", "train.stage2_epochs=0.4", "model.lora.dropout=0")  # dropout would be drift
    load_policy = train.load_policy

    def before() -> None:
        no_curves()
        for name in ("vllm", "unsloth"):
            sys.modules.pop(name, None)
        install()
        train.load_policy = lambda *args: load_policy(*args, use_unsloth=True)

    argv = tiny_run(tmp_path, "--set", "model.fast_inference=true", "train.importance_clip=2", *short)
    assert fork_run(argv, tmp_path / "log", before) == 0, output(tmp_path / "log")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["event"] == "train"]
    assert {line["stage"] for line in steps} == {1, 2}
    assert all(line["logprob_drift"] < 1e-4 for line in steps)
    assert [line["checkpoint"] for line in lines if line["event"] == "eval"] == ["pretrain", "stage1", "stage2"]
    assert json.loads((tmp_path / "run" / "stage2" / "adapter_config.json").read_text())["r"] == 4


# ------------------------------------------------------------------------------------------------ importance sampling


def with_sampler(policy: Any, heat: float, rows: int = 6) -> tuple[Any, torch.Tensor]:
    """A ragged attempt whose sampler had a temperature of `heat` in place of 1, and each token's ratio pi / sampler."""
    attempt = random_attempt(random.Random(2), rows, 9, policy.tokenizer.convert_tokens_to_ids(IM_END), vocab=60)
    with torch.no_grad():
        mine = train.completion_log_probs(policy, attempt.prompts, attempt.completions, 1.0)
        theirs = train.completion_log_probs(policy, attempt.prompts, attempt.completions, heat)
    attempt.sampled_log_probs = [part.tolist() for part in theirs.split([len(c) for c in attempt.completions])]
    return attempt, (mine - theirs).exp()


def gradients(policy: Any, attempt: Any, returns: torch.Tensor, config: Any) -> dict[str, torch.Tensor]:
    policy.model.zero_grad(set_to_none=True)
    train.accumulate_gradients(policy, [attempt], [(returns, 0.0)], config.train)
    return {name: weight.grad.clone() for name, weight in policy.trainable.items()}


@pytest.mark.parametrize("clip", [0.8, 1.5, 100.0])
def test_truncated_importance_sampling_weights_each_token(make_policy: Callable[..., Any], clip: float) -> None:
    policy, config = make_policy({"train.importance_clip": clip, "model.lora.dropout": 0})
    perturb(policy)
    attempt, ratio = with_sampler(policy, 2.0)
    assert (ratio > 1.5).any()
    assert (ratio < 0.8).any()
    returns = torch.tensor(attempt.rewards)
    mine = gradients(policy, attempt, returns, config)
    policy.model.zero_grad(set_to_none=True)
    lengths = torch.tensor([len(c) for c in attempt.completions])
    others = (returns.sum() - returns) / (len(returns) - 1)
    log_probs = train.completion_log_probs(policy, attempt.prompts, attempt.completions, 1.0)
    weights = ratio.clamp(max=clip) * torch.repeat_interleave((returns - others) / lengths, lengths)
    (-(weights * log_probs).sum() / len(returns)).backward()
    for name, weight in policy.trainable.items():
        assert torch.allclose(mine[name], weight.grad, rtol=1e-4, atol=1e-6), name


def test_a_sampler_that_agrees_needs_no_correction(make_policy: Callable[..., Any]) -> None:
    policy, config = make_policy({"model.lora.dropout": 0})
    perturb(policy)
    attempt, _ = with_sampler(policy, 1.0)
    returns = torch.tensor(attempt.rewards)
    plain = gradients(policy, attempt, returns, config)
    config.train.importance_clip = 1.5
    for name, gradient in gradients(policy, attempt, returns, config).items():
        assert torch.allclose(gradient, plain[name], rtol=1e-4, atol=1e-7), name
    off, _ = with_sampler(policy, 2.0)
    corrected = gradients(policy, off, returns, config)
    assert any(not torch.allclose(corrected[name], plain[name], rtol=1e-2) for name in plain)
