"""Loading: the policy, its reference, its adapter, and what is refused instead of being loaded wrongly."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import END_OF_TEXT, IM_END, build_model, build_tokenizer, perturb, with_keys
from safetensors.torch import load_file, save_file
from test_families import FAMILIES, GEMMA, LONG, START, VISION, build, close, seeing, tiny

import train


def logits_of(model: Any, row: list[int]) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=torch.tensor([row])).logits[0].float()


ROW = [20, 30, 40, 50, 60, 33]
EVERY = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]


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


def test_checkpointing_is_refused_where_a_family_has_none(make_policy: Callable[..., Any], monkeypatch: Any) -> None:
    policy, _ = make_policy({"model.gradient_checkpointing": "auto"})
    assert policy.recompute
    monkeypatch.setattr(type(policy.model.get_base_model()), "supports_gradient_checkpointing", False)
    assert make_policy({"model.gradient_checkpointing": "auto"})[0].recompute is None
    with pytest.raises(train.UserError, match="^model.gradient_checkpointing: "):
        make_policy({"model.gradient_checkpointing": True})


# ---- adapters


@pytest.fixture
def adapter(make_policy: Callable[..., Any], tmp_path: Path) -> Path:
    policy, _ = make_policy()
    perturb(policy)
    train.save_checkpoint(policy, tmp_path / "stage1", None)
    return tmp_path / "stage1"


def test_load_adapter_gives_the_saved_policy(make_policy: Any, adapter: Path, make_config: Any) -> None:
    saved, _ = make_policy(adapter=adapter)
    fresh, _ = make_policy()
    perturb(fresh)
    assert torch.equal(logits_of(saved.model, ROW), logits_of(fresh.model, ROW))
    train.check_adapter(adapter, make_config())
    train.check_adapter(adapter, make_config({"model.lora.target_modules": EVERY[::-1]}))


def test_an_adapter_of_fewer_layers_does_not_fit_all_linear(make_policy: Callable[..., Any], tmp_path: Path) -> None:
    policy, config = make_policy({"model.lora.target_modules": "q_proj"})
    train.save_checkpoint(policy, tmp_path / "stage1", None)
    train.check_adapter(tmp_path / "stage1", config)
    with pytest.raises(train.UserError, match="stage1: is of another base model: .*down_proj.*"):
        make_policy(adapter=tmp_path / "stage1")


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


def test_merged_model_gives_the_adapters_logits(make_policy: Callable[..., Any], adapter: Path, tmp_path: Path) -> None:
    policy, config = make_policy(adapter=adapter)
    train.save_merged(adapter, tmp_path / "merged", config, policy)
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    wanted, found = logits_of(policy.model, ROW).log_softmax(-1), logits_of(merged, ROW).log_softmax(-1)
    assert (wanted - found).abs().max() < 0.1, "bf16 rounds"
    assert set(merged.generation_config.eos_token_id) == set(policy.eos_token_ids)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template


# ---- what is refused


@pytest.mark.parametrize(
    ("bend", "says"),
    [(torch.sin, "changes its logits after the head in an unknown way"), (torch.mm, "cannot be trained")],
)
def test_a_forward_unlike_others_is_refused(monkeypatch: Any, make_policy: Any, bend: Any, says: str) -> None:
    def bent(model: Any, *args: Any, **kwargs: Any) -> Any:
        made = whole(model, *args, **kwargs)
        return type(made)(logits=bend(made.logits))

    whole = transformers.Qwen3ForCausalLM.forward
    monkeypatch.setattr(transformers.Qwen3ForCausalLM, "forward", bent)
    with pytest.raises(train.UserError, match=f"qwen3 {says}"):
        make_policy()


TARGETS = [  # (family, names as a config gives them, what LoRA gets, layers that a line names as being without)
    ("qwen3.5", ["q_proj", "all-linear"], "down_proj gate_proj in_proj_a in_proj_b in_proj_qkv in_proj_z k_proj o_proj "
     "out_proj q_proj up_proj v_proj", ""),
    ("qwen3.5", ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "mlp.up_proj", "down_proj", "q_proj"],
     "q_proj k_proj v_proj o_proj gate_proj mlp.up_proj down_proj", "in_proj_a, in_proj_b, in_proj_qkv, in_proj_z"),
    ("gpt2", "c_attn", "c_attn", "c_fc, c_proj."),
    ("granite4", ["in_proj", "q_proj", "k_proj", "v_proj", "o_proj"], "in_proj q_proj k_proj v_proj o_proj", "input_"),
]  # fmt: skip
NO_TARGETS = [  # (family, names, those that it lacks, what it has)
    ("qwen3", ["embed_tokens", "q_porj", "q_proj", "lm_head"], "embed_tokens, q_porj, lm_head", "down_proj, gate_"),
    ("llama3", "proj", "proj", "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj;"),
    ("glm4-moe", ["q_proj", "gate_proj"], "gate_proj", "k_proj, o_proj, q_proj, v_proj;"),
    ("nemotron-h", ["out_proj"], "out_proj", "down_proj, in_proj, k_proj, "),
]  # fmt: skip


def targets(raw: dict[str, Any], family: str, wanted: Any) -> str:
    """The layers that LoRA gets."""
    config = train.check_config(with_keys(raw, {"model.lora.target_modules": wanted}))
    base = transformers.AutoModelForCausalLM.from_config(copy.deepcopy(FAMILIES[family]))
    return " ".join(train.lora_settings(base, config)["target_modules"])


@pytest.mark.parametrize(("family", "wanted", "got", "without"), TARGETS)
def test_targets(raw_config: dict, monkeypatch: Any, family: str, wanted: Any, got: str, without: str) -> None:
    """A list that leaves layers out says so in a line."""
    lines: list[str] = []
    monkeypatch.setattr(train, "log", lines.append)
    assert targets(raw_config, family, wanted) == got
    assert [line.startswith(f"Without LoRA: {without}") for line in lines[-1:]] == [True] * bool(without)
    assert [line[:19] for line in lines[:-1]] == ["LoRA leaves out out"] * (family == "granite4")


@pytest.mark.parametrize(("family", "wanted", "lacks", "has"), NO_TARGETS)
def test_targets_that_a_model_lacks(raw_config: dict, family: str, wanted: Any, lacks: str, has: str) -> None:
    with pytest.raises(train.UserError) as refused:
        targets(raw_config, family, wanted)
    (line,) = str(refused.value).splitlines()
    assert line.startswith("model.lora.target_modules: ")
    assert f" has no {lacks} that LoRA can train; it has {has}" in line


LIMITS = dict.fromkeys(["gpt2", "opt", "llama3", "qwen3.5-vision"], 256)
LIMITS |= {"phi3-longrope": 128, "dynamic": 80, "layered": 128}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
LAYERED = {"full_attention": LONG | START | {"original_max_position_embeddings": 128}}
LAYERED |= {"sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
OTHERS = {"dynamic": tiny("Llama", max_position_embeddings=80, rope_parameters=DYNAMIC)}
OTHERS |= {"layered": tiny("Gemma3Text", **GEMMA, rope_parameters=LAYERED)}


def test_what_stands_beside_the_text_part_goes_for_it(raw_config: dict, tmp_path: Path, monkeypatch: Any) -> None:
    """Unsloth, which serves the text part's own family, would load all of such a model."""
    monkeypatch.setattr(train, "DEVICE", torch.device("cuda"))
    whole = seeing("Mistral3", VISION | {"model_type": "pixtral"}, {"model_type": "llama"}, tie_word_embeddings=True)
    whole.quantization_config = {"quant_method": "fp8"}
    config = train.check_config(with_keys(raw_config, {"model.name": str(tmp_path)}))
    whole.text_config.save_pretrained(tmp_path)
    assert train.unsloth_serves(train.text_config(config))
    whole.save_pretrained(tmp_path)
    text = train.text_config(config)
    assert not train.unsloth_serves(text)
    assert (text.tie_word_embeddings, text.quantization_config["quant_method"]) == (True, "fp8")


@pytest.mark.parametrize(("name", "limit"), LIMITS.items())
def test_conversations_end_where_positions_do(raw_config: dict, tmp_path: Path, name: str, limit: int) -> None:
    (FAMILIES | OTHERS)[name].save_pretrained(tmp_path)
    raw = with_keys(raw_config, {"model.name": str(tmp_path), "train.max_prompt_length_attempt1": 20})
    fits, long = (
        train.check_config(with_keys(raw, {"train.max_prompt_length_attempt2": n - 12})) for n in (limit, limit + 1)
    )  # attempt 2 may take 12 tokens
    train.check_length(train.text_config(fits), fits)
    says = f"^train.max_new_tokens_attempt1: a conversation can take {limit + 1} tokens, and .* exact up to {limit}"
    with pytest.raises(train.UserError, match=says):
        train.load_policy(long, build_tokenizer())


@pytest.mark.parametrize("name", ["phi3-longrope", "dynamic", "layered"])
def test_a_tokens_place_does_not_depend_on_its_rows_length(name: str, tmp_path: Path) -> None:
    model, ids = build((FAMILIES | OTHERS)[name], tmp_path), torch.arange(200)[None] % 100
    with torch.no_grad():
        assert (model(ids).logits[:, :20] - model(ids[:, :20]).logits).abs().max() > 0.01
        train.make_deterministic(model)
        torch.testing.assert_close(model(ids).logits[:, :20], model(ids[:, :20]).logits, **close)


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


def test_code_of_a_model_runs_only_when_asked_for(tiny_dir: Path, tmp_path: Path, make_policy: Any) -> None:
    folder = shutil.copytree(tiny_dir, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "mine", "architectures": ["Mine"]}
    config["auto_map"] = {"AutoConfig": "mine.MineConfig", "AutoModelForCausalLM": "mine.Mine"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\nraise ValueError('it ran')\n")
    with pytest.raises(train.UserError, match="trust_remote_code"):
        make_policy({"model.name": str(folder)})
    assert not (tmp_path / "ran").exists()
