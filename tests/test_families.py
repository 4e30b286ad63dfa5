"""Model families: what each does to its weights, logits, dropout and caches must leave the algorithm exact.

A family is a random model of a few thousand weights, loaded as a real one is, its adapter moved away from zero. It is
compared with the model that was written to disk, and with its own logits, one row at a time, without dropout."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as hf
import yaml
from conftest import build_tokenizer, fork_run, no_curves, output, perturb, tiny_config, with_keys
from safetensors.torch import load_file
from test_objective import plain_log_probs, random_conversations

import train

TEMPERATURE = 0.7
BASE = {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.2,
    "bos_token_id": None, "eos_token_id": 3, "pad_token_id": 0,
}  # fmt: skip
WINDOW = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
START = {"rope_theta": 1e4, "original_max_position_embeddings": 64}
LONG = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
YARN = {"rope_type": "yarn", "factor": 8.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}
DELTA = {
    "head_dim": 16, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
LATENT = {"q_lora_rank": 12, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
SHARED = {"n_routed_experts": 4, "n_shared_experts": 1, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1}
SHARED |= {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
EXPERTS = {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 24}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 16}
GRANITE = {"embedding_multiplier": 6.0, "residual_multiplier": 0.4, "attention_multiplier": 0.3}
GEMMA = WINDOW | {"head_dim": 8, "query_pre_attn_scalar": 8}
GEMMA4 = WINDOW | {
    "head_dim": 8, "global_head_dim": 8, "vocab_size_per_layer_input": 128, "hidden_size_per_layer_input": 4,
    "num_hidden_layers": 4, "layer_types": WINDOW["layer_types"] * 2, "num_kv_shared_layers": 2,
}  # fmt: skip
VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION |= {"image_size": 28, "patch_size": 14}
QWEN_VISION = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}


def tiny(kind: str, **changes: Any) -> Any:
    return getattr(hf, f"{kind}Config")(**BASE | changes)


def seeing(kind: str, vision: dict[str, Any], text: dict[str, Any], **ids: Any) -> Any:
    return getattr(hf, f"{kind}Config")(text_config=BASE | text, vision_config=vision, **ids)


FAMILIES = {
    "llama3": tiny("Llama", rope_parameters=LLAMA3 | START),
    "qwen2": tiny("Qwen2", tie_word_embeddings=True),
    "qwen3": tiny("Qwen3", head_dim=16),
    "qwen3.5": tiny("Qwen3_5Text", **DELTA),
    "qwen3.5-vision": seeing(
        "Qwen3_5", QWEN_VISION | {"patch_size": 14, "num_position_embeddings": 16}, DELTA, image_token_id=120,
        video_token_id=121, vision_start_token_id=122, vision_end_token_id=123, tie_word_embeddings=True,
    ),
    "gemma2": tiny("Gemma2", **GEMMA, final_logit_softcapping=2.0, attn_logit_softcapping=5.0),
    "gemma3": tiny("Gemma3Text", **GEMMA),
    "gemma3-vision": seeing("Gemma3", VISION, GEMMA, mm_tokens_per_image=4, tie_word_embeddings=False),
    "gemma4": tiny("Gemma4Text", **GEMMA4, final_logit_softcapping=2.0),
    "gemma4-vision": seeing("Gemma4", VISION | {"num_key_value_heads": 2, "head_dim": 8}, GEMMA4 | EXPERTS),
    "gemma3n": tiny("Gemma3nText", **GEMMA4, activation_sparsity_pattern=[0.5, 0.0] * 2, final_logit_softcapping=2.0),
    "ministral": tiny("Ministral", **WINDOW, head_dim=8),
    "mistral3-vision": seeing(
        "Mistral3", VISION | {"model_type": "pixtral"}, {"model_type": "ministral3", "head_dim": 8}, image_token_id=120
    ),
    "phi3": tiny("Phi3", sliding_window=None),
    "phi3-longrope": tiny(
        "Phi3", sliding_window=None, original_max_position_embeddings=128,
        rope_parameters=LONG | START | {"original_max_position_embeddings": 128},
    ),
    "phi2": tiny("Phi", num_key_value_heads=4),
    "smollm3": tiny("SmolLM3", no_rope_layers=[1, 0]),
    "granite": tiny("Granite", **GRANITE, logits_scaling=8.0, logit_scale="a name"),
    "granite4": tiny(
        "GraniteMoeHybrid", **MAMBA, layer_types=["mamba", "attention"], num_local_experts=4, num_experts_per_tok=2,
        shared_intermediate_size=24, logits_scaling=3.0,
    ),
    "olmo3": tiny("Olmo3", **WINDOW),
    "lfm2": tiny("Lfm2", layer_types=["conv", "full_attention"], block_multiple_of=8),
    "glm4": tiny("Glm4", head_dim=8),
    "gpt-oss": tiny(
        "GptOss", **WINDOW, head_dim=8, num_local_experts=4, num_experts_per_tok=2, rope_parameters=YARN | START,
    ),
    "mixtral": tiny("Mixtral", num_local_experts=4, num_experts_per_tok=2, router_jitter_noise=0.2),
    "qwen3-moe": tiny("Qwen3Moe", **MOE, head_dim=8),
    "glm4-moe": tiny("Glm4Moe", **SHARED, head_dim=8),
    "deepseek-v3": tiny("DeepseekV3", **SHARED, **LATENT, num_key_value_heads=4),
    "nemotron-h": tiny(
        "NemotronH", layers_block_type=["mamba", "attention", "mlp"], num_hidden_layers=3, head_dim=8,
        mamba_num_heads=8, mamba_head_dim=8, ssm_state_size=8, n_groups=1, chunk_size=16,
        time_step_min=1e-6,  # the limit below which transformers' whole rows, and not its single steps, clamp a step
    ),
    "falcon-h1": tiny("FalconH1", **MAMBA, mamba_d_ssm=64, lm_head_multiplier=0.4, head_dim=8),
    "gpt2": tiny("GPT2", n_embd=32, n_layer=2, n_head=4, n_positions=256),
    "opt": tiny("OPT", ffn_dim=48, word_embed_proj_dim=16, dropout=0.2),
    "starcoder2": tiny("Starcoder2", residual_dropout=0.2, embedding_dropout=0.2, attention_dropout=0.2),
    "cohere2": tiny("Cohere2", **WINDOW, logit_scale=0.25),
}  # fmt: skip


def build(config: Any, folder: Path) -> Any:
    """Writes a random model with the tests' tokenizer into `folder`, and returns it. No weight is trivial, and so many
    tokens end an answer that some answers end early."""
    torch.manual_seed(0)
    kind = hf.AutoModelForImageTextToText if hasattr(config, "vision_config") else hf.AutoModelForCausalLM
    model = kind.from_config(copy.deepcopy(config)).eval()
    with torch.no_grad():
        for weight in [*model.parameters(), *(b for name, b in model.named_buffers() if "bias" in name)]:
            if weight.dim() < 2 or not weight.any():
                weight.add_(torch.randn_like(weight) * 0.2)
    ends = [3, 4, *range(20, 100, 6)]
    model.generation_config = hf.GenerationConfig(do_sample=True, top_k=5, pad_token_id=0, eos_token_id=ends)
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def load(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """load(a model's config) -> a namespace of the model on disk and of the policy that was loaded from there."""

    def load(family: Any) -> SimpleNamespace:
        folder = tmp_path_factory.mktemp("family")
        own, config = build(family, folder), train.check_config(tiny_config(folder, data_dir, folder / "out"))
        policy = train.load_policy(config, train.load_tokenizer(config))
        perturb(policy, 0.1)
        return SimpleNamespace(folder=folder, own=own, config=config, policy=policy)

    return load


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, load: Callable[..., Any]) -> SimpleNamespace:
    return SimpleNamespace(name=request.param, **vars(load(FAMILIES[request.param])))


def naive(model: Any, conversations: list[list[Any]]) -> torch.Tensor:
    """The log-probs from whole logits of one row at a time, without dropout."""
    training = model.training
    model.eval()
    rows = [plain_log_probs(model, turn, TEMPERATURE) for conversation in conversations for turn in conversation]
    model.train(training)
    return torch.cat(rows)


CONVERSATIONS = random_conversations(random.Random(0), 4, (8, 12), [3, 4], longest_prompt=70)
close = {"atol": 1e-4, "rtol": 0}


def test_log_probs_and_their_gradients_are_those_of_whole_logits(family: SimpleNamespace) -> None:
    """Of both attempts of ragged rows in training mode, activations kept or computed again."""
    policy = family.policy
    with torch.no_grad():
        with train.reference(policy):
            as_reference = train.completion_log_probs(policy, CONVERSATIONS, TEMPERATURE)
        torch.testing.assert_close(as_reference, naive(family.own, CONVERSATIONS), **close)
    weights, incoming = list(policy.trainable.values()), torch.randn(len(as_reference))
    exact = naive(policy.model, CONVERSATIONS)
    assert (exact - as_reference).abs().max() > 0.01, "the adapter does nothing"
    exact_gradients = dict(zip(policy.trainable, torch.autograd.grad(exact, weights, incoming), strict=True))
    assert all(gradient.any() for gradient in exact_gradients.values())
    for again in (False, True):
        policy.for_training.func(again)
        assert policy.model.training
        found = train.completion_log_probs(policy, CONVERSATIONS, TEMPERATURE)
        torch.testing.assert_close(found, exact, **close)
        gradients = zip(exact_gradients.items(), torch.autograd.grad(found, weights, incoming), strict=True)
        for (name, wanted), mine in gradients:
            assert (mine - wanted).norm() <= 1e-3 * wanted.norm() + 1e-6, name
    policy.for_training()


def test_built_in_sampler_is_exact(family: SimpleNamespace) -> None:
    policy = family.policy
    prompts = [turn.prompt for conversation in CONVERSATIONS for turn in conversation]
    assert isinstance(policy.sampler, train.Decoder | train.GraphSampler)
    greedy, _ = policy.sampler.generate(prompts, 10, 0.0, 0)
    assert greedy == train.Generate(policy).generate(prompts, 10, 0.0, 0)[0]
    rows, log_probs = policy.sampler.generate(prompts, 10, TEMPERATURE, 5)
    turns = [[train.Turn(prompt, row)] for prompt, row in zip(prompts, rows, strict=True)]
    assert len({len(row) for row in rows}) > 1
    with torch.no_grad():
        torch.testing.assert_close(torch.tensor(sum(log_probs, [])), naive(policy.model, turns), **close)


def test_saved_and_merged_are_the_same_policy(family: SimpleNamespace, tmp_path: Path, monkeypatch: Any) -> None:
    policy, config = family.policy, family.config
    train.save_checkpoint(policy, tmp_path, None)
    monkeypatch.setattr(train, "make_sampler", lambda *_: None)
    again = train.load_policy(config, policy.tokenizer, adapter=tmp_path)
    with torch.no_grad():
        mine, theirs = (train.completion_log_probs(p, CONVERSATIONS, TEMPERATURE) for p in (policy, again))
        assert torch.equal(mine, theirs)
        merged = copy.deepcopy(policy.model).merge_and_unload()
        torch.testing.assert_close(naive(merged, CONVERSATIONS), mine, atol=1e-3, rtol=0)
    train.save_merged(tmp_path, tmp_path / "merged", config, policy)
    loaded = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    wanted, found = merged.to(torch.bfloat16).state_dict(), loaded.state_dict()
    assert wanted.keys() == found.keys()
    assert [name for name, weight in wanted.items() if not torch.equal(weight, found[name].to(weight.dtype))] == []
    assert type(loaded) is type(merged)
    theirs, mine = (set(load_file(folder / "model.safetensors")) for folder in (family.folder, tmp_path / "merged"))
    assert mine == theirs if type(family.own) is type(merged) else mine <= wanted.keys(), "other tools go by the names"
    assert loaded.config.tie_word_embeddings == merged.config.tie_word_embeddings
    assert loaded.generation_config.eos_token_id == policy.eos_token_ids


@pytest.mark.parametrize("name", ["qwen3.5-vision", "qwen3-moe", "lfm2", "granite"])
def test_whole_run(name: str, data_dir: Path, tmp_path: Path) -> None:
    """Both stages train on what was sampled, and the merged model is one that transformers loads."""
    build(FAMILIES[name], tmp_path)
    more = {"output.merge": True, "train.stage1_batch_size": 4, "train.stage2_batch_size": 4}
    config, folder = tiny_config(tmp_path, data_dir, tmp_path / "out"), tmp_path / "out" / "test-smoke"
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(with_keys(config, more)))
    code = fork_run(["--config", str(tmp_path / "run.yaml"), "--smoke", "4"], tmp_path / "log", no_curves)
    assert code == 0, output(tmp_path / "log")
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    steps = [line for line in lines if "logprob_drift" in line]
    assert len(steps) == 4
    assert max(step["logprob_drift"] for step in steps) < 1e-4
    assert not any(step["skipped"] for step in steps)
    assert hf.AutoModelForCausalLM.from_pretrained(folder / "merged").config.num_hidden_layers == 2
    card = (folder / "stage2" / "README.md").read_text().split("```python\n")[1].split("system =")[0]
    exec(card, names := {})
    config, ids = train.check_config(with_keys(config, more)), torch.arange(5, 40)[None]
    policy = train.load_policy(config, train.load_tokenizer(config), folder / "stage2").model.eval()
    torch.testing.assert_close(names["model"](ids).logits, policy(ids).logits, **close)


EXPERT = {"gate_proj", "up_proj", "down_proj"}  # PEFT cannot load an adapter of shared experts
LEFT = {"gemma3n": {"correction_coefs"}, "glm4-moe": EXPERT, "deepseek-v3": EXPERT, "gemma4-vision": {"proj"}}
LEFT |= dict.fromkeys(["granite4", "nemotron-h", "falcon-h1"], {"out_proj"})  # proj: a router's; others: see train.py


def test_all_linear_is_every_linear_layer_that_can_have_an_adapter(family: SimpleNamespace) -> None:
    """Of a multimodal model these are layers of its text part alone, for the rest is not loaded."""
    kinds, base = (torch.nn.Linear, hf.pytorch_utils.Conv1D), family.policy.model.get_base_model()
    layers = {path for path, module in base.named_modules() if isinstance(module, kinds) and "lora_" not in path}
    adapted = {path.partition(".lora_")[0].removeprefix("base_model.model.") for path in family.policy.trainable}
    left = {path.rpartition(".")[2] for path in {path.removesuffix(".base_layer") for path in layers} - adapted}
    assert left == {"lm_head"} | LEFT.get(family.name, set())
    assert not [path for path in layers if "vis" in path]


def test_a_family_that_is_random_in_training_is_refused(load: Callable[..., Any]) -> None:
    with pytest.raises(train.UserError, match="^model.name: .* it draws its experts at random in training$"):
        load(tiny("Phimoe", num_local_experts=4, num_experts_per_tok=2, sliding_window=None))


@pytest.mark.parametrize(("told", "its_own"), [
    ({"model_type": "qwen2", "sliding_window": 9, "use_sliding_window": False}, True), ({"model_type": "gemma"}, False),
    ({"model_type": "mistral", "sliding_window": 9}, False), ({}, True)])  # fmt: skip
def test_unsloth_is_imported_for_the_families_that_it_has_code_for(tmp_path, monkeypatch, told, its_own):
    (tmp_path / "config.json").write_text(json.dumps(told))
    command = ["profile_run.py", "--config", "configs/tiny.yaml", "--n", "4", "--set", f"model.name={tmp_path}"]
    monkeypatch.setattr("sys.argv", command)
    assert train.written_for_unsloth() is its_own
