"""Loading: the policy, its reference, its adapter, and what is refused instead of being loaded wrongly."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import END_OF_TEXT, IM_END, build_model, build_tokenizer, perturb
from safetensors.torch import load_file, save_file

import train

SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
}


def save_model(folder: Path, config: Any) -> Path:
    """A random model of any architecture with the tests' tokenizer."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    config.vocab_size, config.eos_token_id = len(tokenizer), tokenizer.eos_token_id
    config.pad_token_id = tokenizer.pad_token_id
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def logits_of(model: Any, row: list[int]) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=torch.tensor([row])).logits[0].float()


ROW = [20, 30, 40, 50, 60, 33]


def test_policy_starts_as_its_reference_and_keeps_lora_in_float32(make_policy: Callable[..., Any]) -> None:
    policy, config = make_policy()
    base = transformers.AutoModelForCausalLM.from_pretrained(config.model.name, dtype=torch.float32)
    assert torch.allclose(logits_of(policy.model, ROW), logits_of(base, ROW), atol=1e-5)
    assert policy.trainable
    assert all(weight.dtype == torch.float32 and "lora_" in name for name, weight in policy.trainable.items())
    perturb(policy)
    moved = logits_of(policy.model, ROW)
    with train.reference(policy):
        assert torch.allclose(logits_of(policy.model, ROW), logits_of(base, ROW), atol=1e-5)
    assert not torch.allclose(moved, logits_of(base, ROW), atol=1e-2)


@pytest.mark.parametrize(
    ("wanted", "device", "native", "found"),
    [("auto", "cpu", True, "float32"), ("auto", "cuda", True, "bfloat16"), ("auto", "cuda", False, "float16"),
     ("auto", "xpu", False, "bfloat16"), ("bfloat16", "cuda", False, "bfloat16"), ("float16", "cpu", True, "float16")],
)  # fmt: skip
def test_number_format_is_what_the_card_computes(make_config, monkeypatch, wanted, device, native, found) -> None:
    monkeypatch.setattr(train, "DEVICE", torch.device(device))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation or native)
    assert str(train.number_format(make_config({"model.dtype": wanted}))) == f"torch.{found}"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_base_weights_of_16_bits_on_a_cpu(make_policy: Callable[..., Any], dtype: str) -> None:
    policy, _ = make_policy({"model.dtype": dtype})
    held = {"lora" if "lora_" in name else "base": weight.dtype for name, weight in policy.model.named_parameters()}
    assert held == {"lora": torch.float32, "base": getattr(torch, dtype)}
    assert policy.sampler.name == "the built-in decoder"
    assert policy.loss_scale == (train.LOSS_SCALE if dtype == "float16" else 1)


def test_a_model_that_overflows_float16_is_refused(tiny_dir: Path, tmp_path: Path, make_policy: Callable) -> None:
    folder = shutil.copytree(tiny_dir, tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] *= 1e6
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(train.UserError, match="model.dtype"):
        make_policy({"model.name": str(folder), "model.dtype": "float16"})


def test_generation_config_keeps_token_ids_and_nothing_else(make_policy: Callable[..., Any]) -> None:
    """The tests' model asks for top_k 5, top_p .5 and a repetition penalty, as real ones do."""
    policy, _ = make_policy()
    left = policy.model.generation_config.to_diff_dict()
    assert set(left) <= {"eos_token_id", "pad_token_id", "transformers_version", "_from_model_config"}
    ids = policy.tokenizer.convert_tokens_to_ids
    assert set(policy.eos_token_ids) == {ids(IM_END), ids(END_OF_TEXT)}


def test_eos_ids_come_from_the_tokenizer_too(tmp_path: Path, make_policy: Callable[..., Any]) -> None:
    folder = build_model(tmp_path / "model", eos=END_OF_TEXT)
    (folder / "generation_config.json").unlink()
    policy, _ = make_policy({"model.name": str(folder)})
    ids = policy.tokenizer.convert_tokens_to_ids
    assert set(policy.eos_token_ids) == {ids(IM_END), ids(END_OF_TEXT)}


def test_pad_without_a_pad_token_is_an_eos(tmp_path: Path, make_policy: Callable[..., Any]) -> None:
    policy, _ = make_policy({"model.name": str(build_model(tmp_path / "model", pad=None))})
    assert policy.pad_token_id in policy.eos_token_ids


def test_gradient_checkpointing_changes_no_gradient(make_policy: Callable[..., Any]) -> None:
    found = []
    for wanted in (False, True):
        policy, _ = make_policy({"model.gradient_checkpointing": wanted})
        perturb(policy)
        train.completion_log_probs(policy, [[train.Turn(ROW[:2], ROW[2:])]], 1.0).sum().backward()
        found.append([weight.grad for weight in policy.trainable.values()])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*found, strict=True))


# ---- adapters


@pytest.fixture
def adapter(make_policy: Callable[..., Any], tmp_path: Path) -> Path:
    policy, _ = make_policy()
    perturb(policy)
    state = {"stage": 1, "step": 1, "finished": True, "logs": {}, "marks": {}, "seconds": 0.0}
    train.save_checkpoint(policy, tmp_path / "stage1", state, None, "card")
    return tmp_path / "stage1"


def test_load_adapter_gives_the_saved_policy(
    make_policy: Callable[..., Any], adapter: Path, make_config: Callable[..., Any]
) -> None:
    saved, _ = make_policy(adapter=adapter)
    fresh, _ = make_policy()
    perturb(fresh)
    assert torch.equal(logits_of(saved.model, ROW), logits_of(fresh.model, ROW))
    train.check_adapter(adapter, make_config())


@pytest.mark.parametrize("damage", ["nan", "cut", "shape", "missing"])
def test_load_adapter_refuses_what_does_not_fit(make_policy: Callable[..., Any], adapter: Path, damage: str) -> None:
    file = adapter / "adapter_model.safetensors"
    weights = load_file(file)
    first = next(iter(weights))
    if damage == "nan":
        weights[first][0, 0] = float("nan")
    elif damage == "shape":
        weights[first] = weights[first][:, :-1].contiguous()
    elif damage == "missing":
        del weights[first]
    save_file(weights, file)
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(train.UserError, match=adapter.name):
        make_policy(adapter=adapter)


@pytest.mark.parametrize(
    ("name", "value"),
    [("r", 8), ("lora_alpha", 3), ("target_modules", ["q_proj"]), ("use_dora", True), ("rank_pattern", {"q_proj": 2})],
)
def test_check_adapter_names_what_differs(
    make_config: Callable[..., Any], adapter: Path, name: str, value: Any
) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {name: value}))
    with pytest.raises(train.UserError, match="--resume-adapter"):
        train.check_adapter(adapter, make_config())


def test_merged_model_gives_the_adapters_logits(make_policy: Callable[..., Any], adapter: Path, tmp_path: Path) -> None:
    policy, config = make_policy(adapter=adapter)
    train.save_merged(adapter, tmp_path / "merged", config, policy)
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    wanted, found = logits_of(policy.model, ROW).log_softmax(-1), logits_of(merged, ROW).log_softmax(-1)
    assert (wanted - found).abs().max() < 0.1, "bf16 rounds"
    assert set(merged.generation_config.eos_token_id) == set(policy.eos_token_ids)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template


# ---- what is refused


def test_logits_that_change_after_the_head_are_refused(tmp_path: Path, make_policy: Callable[..., Any]) -> None:
    folder = save_model(tmp_path / "granite", transformers.GraniteConfig(**SHAPE, logits_scaling=4.0))
    with pytest.raises(train.UserError, match="granite"):
        make_policy({"model.name": str(folder)})


def test_missing_target_modules_are_all_named_beside_those_there(make_policy: Callable[..., Any]) -> None:
    with pytest.raises(train.UserError, match="model.lora.target_modules") as found:
        make_policy({"model.lora.target_modules": ["q_proj", "Wqkv", "out_proj"]})
    for name in ("Wqkv", "out_proj", "gate_proj", "k_proj"):
        assert name in str(found.value)


def test_an_adapted_head_is_refused(make_policy: Callable[..., Any]) -> None:
    with pytest.raises(train.UserError, match="lm_head"):
        make_policy({"model.lora.target_modules": ["q_proj", "lm_head"]})


def test_weights_that_are_missing_are_refused(tiny_dir: Path, tmp_path: Path, make_policy: Callable[..., Any]) -> None:
    """transformers would leave them random."""
    folder = shutil.copytree(tiny_dir, tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(train.UserError, match="model.name"):
        make_policy({"model.name": str(folder)})


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path, make_policy: Callable[..., Any]) -> None:
    folder = build_model(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(config["vocab_size"] - 60)
    model.save_pretrained(folder)
    with pytest.raises(train.UserError, match="tokenizer"):
        make_policy({"model.name": str(folder)})


def test_four_bits_on_a_cpu_are_refused(make_policy: Callable[..., Any]) -> None:
    with pytest.raises(train.UserError, match="load_in_4bit"):
        make_policy({"model.load_in_4bit": True})


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/model", "a/b/c"])
def test_a_folder_that_is_not_there_is_no_hub_id(make_config: Callable[..., Any], name: str) -> None:
    with pytest.raises(train.UserError, match="no folder"):
        train.load_tokenizer(make_config({"model.name": name}))


def test_code_that_comes_with_a_model_runs_only_when_asked_for(
    tiny_dir: Path, tmp_path: Path, make_policy: Callable[..., Any]
) -> None:
    folder = shutil.copytree(tiny_dir, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "mine", "architectures": ["Mine"]}
    config["auto_map"] = {"AutoConfig": "mine.MineConfig", "AutoModelForCausalLM": "mine.Mine"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\nraise ValueError('it ran')\n")
    with pytest.raises(train.UserError, match="trust_remote_code"):
        make_policy({"model.name": str(folder)})
    assert not (tmp_path / "ran").exists()
