"""The decoder against generate() and against the model's own forward: tiny float32 models of each family on the CPU."""

import copy
import os
import shutil
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from train import Decoder, why_not_decodable

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SHAPE = {
    "vocab_size": 61, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 6,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.2,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
CONFIGS = {
    "llama": LlamaConfig(**SHAPE, rope_parameters=LLAMA3, tie_word_embeddings=True),
    "llama-linear": LlamaConfig(**SHAPE, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}),
    "mistral": MistralConfig(**SHAPE, sliding_window=None),
    "qwen2": Qwen2Config(**SHAPE),
    "qwen3": Qwen3Config(**SHAPE, head_dim=12, tie_word_embeddings=True),
}
PROMPTS = [[5, 6, 7], [9], [11, 12, 13, 14, 15, 16, 17], [5, 6, 7], [20, 21], [30, 31, 32, 33]]


def make_model(config, lora: dict | None = None, device="cpu", dtype=torch.float32):
    """A random model; with lora not None, adapters whose B is not zero and norms and biases that are not trivial."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config)).float()
    for p in model.parameters():
        if p.dim() == 1:
            torch.nn.init.normal_(p.data, mean=1.0, std=0.3)
    if lora is not None:
        settings = {"r": 5, "lora_alpha": 7, "lora_dropout": 0.1, "target_modules": ALL} | lora
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))
        shake(model)
    return model.to(device, dtype).eval()


def shake(model, std: float = 0.1) -> None:
    """New random LoRA B weights."""
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p.data, std=std)


def generate(model, prompts, new, eos=None):
    """transformers' greedy tokens from left-padded prompts, cut after the first EOS."""
    width = max(map(len, prompts))
    pads = [width - len(p) for p in prompts]
    device = next(model.parameters()).device
    out = model.generate(
        input_ids=torch.tensor([[0] * n + p for n, p in zip(pads, prompts, strict=True)], device=device),
        attention_mask=torch.tensor([[0] * n + [1] * (width - n) for n in pads], device=device),
        max_new_tokens=new, do_sample=False, eos_token_id=eos, pad_token_id=0,
    )[:, width:].tolist()  # fmt: skip
    ends = [next((i + 1 for i, t in enumerate(row) if t in (eos or [])), new) for row in out]
    return [row[:end] for row, end in zip(out, ends, strict=True)]


@torch.no_grad()
def forward_log_probs(model, prompt, completion, temperature):
    logits = model(torch.tensor([prompt + completion], device=next(model.parameters()).device)).logits[0].float()
    logps = (logits / temperature).log_softmax(-1)[len(prompt) - 1 : -1]
    return logps.gather(1, torch.tensor(completion, device=logps.device)[:, None])[:, 0].cpu()


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("compact", [True, False])
def test_greedy_tokens_equal_generate_with_ragged_prompts_and_early_eos(family, compact, monkeypatch):
    monkeypatch.setattr(Decoder, "compact", compact)
    model = make_model(CONFIGS[family], {})
    whole = generate(model, PROMPTS, 14)
    assert Decoder(model, [], 0).generate(PROMPTS, 14, 0.0, 0)[0] == whole
    eos = [whole[1][2], whole[4][5]]
    expected = generate(model, PROMPTS, 14, eos)
    assert len({len(row) for row in expected}) > 1, "the chosen EOS ids end no row early"
    tokens, logps = Decoder(model, eos, 0).generate(PROMPTS, 14, 0.0, 0)
    assert tokens == expected
    assert [len(row) for row in logps] == [len(row) for row in expected]


@pytest.mark.parametrize(
    "lora",
    [
        None,
        {"target_modules": ["q_proj", "v_proj", "down_proj"], "use_rslora": True},
        {"rank_pattern": {"k_proj": 19, "up_proj": 2}},
    ],
    ids=["no adapter", "some projections", "ranks differ"],
)
def test_greedy_tokens_equal_generate_whatever_the_adapter(lora):
    model = make_model(CONFIGS["qwen2"], lora)
    assert Decoder(model, [], 0).generate(PROMPTS, 10, 0.0, 0)[0] == generate(model, PROMPTS, 10)


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_log_probs_are_those_of_the_models_forward(family, temperature):
    model = make_model(CONFIGS[family], {})
    for prompt, row, logps in zip(PROMPTS, *Decoder(model, [3], 0).generate(PROMPTS, 12, temperature, 1), strict=True):
        expected = forward_log_probs(model, prompt, row, temperature or 1.0)
        torch.testing.assert_close(torch.tensor(logps), expected, atol=1e-4, rtol=0)


def test_samples_follow_the_softmax_at_the_temperature():
    model, n, temperature = make_model(CONFIGS["llama"], {}), 6000, 1.7
    tokens = [row[0] for row in Decoder(model, [], 0).generate([[5, 6]] * n, 1, temperature, 7)[0]]
    with torch.no_grad():
        expected = n * (model(torch.tensor([[5, 6]])).logits[0, -1] / temperature).softmax(-1)
    seen = torch.bincount(torch.tensor(tokens), minlength=61).float()
    rare = expected < 5
    seen, expected = (torch.cat([t[~rare], t[rare].sum()[None]]) for t in (seen, expected))
    freedom = len(seen) - 1
    assert freedom > 5
    assert ((seen - expected) ** 2 / expected.clamp(min=1e-9)).sum() < freedom + 5 * (2 * freedom) ** 0.5


def test_one_seed_gives_the_same_samples_and_leaves_the_global_generator_alone():
    decoder = Decoder(make_model(CONFIGS["qwen3"], {}), [3], 0)
    state = torch.get_rng_state()
    first = decoder.generate(PROMPTS, 10, 1.0, 5)
    assert torch.equal(state, torch.get_rng_state())
    assert decoder.generate(PROMPTS, 10, 1.0, 5) == first
    assert decoder.generate(PROMPTS, 10, 1.0, 6)[0] != first[0]
    assert first[0][0] != first[0][3], "equal prompts must not get equal samples"


def test_each_rollout_reads_the_adapter_as_it_is():
    model = make_model(CONFIGS["qwen3"], {})
    decoder = Decoder(model, [], 0)
    before = decoder.generate(PROMPTS, 10, 0.0, 0)[0]
    shake(model, 0.3)
    after = decoder.generate(PROMPTS, 10, 0.0, 0)[0]
    assert after != before
    assert after == generate(model, PROMPTS, 10)
    with model.disable_adapter():
        base = decoder.generate(PROMPTS, 10, 0.0, 0)[0]
        assert base == generate(model, PROMPTS, 10)
    assert base != after
    assert decoder.generate(PROMPTS, 10, 0.0, 0)[0] == after


def test_training_is_untouched_by_decoding():
    model = make_model(CONFIGS["qwen2"], {})
    ids = torch.arange(3, 33).view(2, 15)
    logits, saved = model(ids).logits.detach(), {k: v.clone() for k, v in model.state_dict().items()}
    Decoder(model, [], 0).generate(PROMPTS, 4, 1.0, 0)
    assert all(torch.equal(v, saved[k]) for k, v in model.state_dict().items())
    assert model.state_dict().keys() == saved.keys()
    again = model(ids).logits
    assert torch.equal(again, logits)
    again.logsumexp(-1).sum().backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == {
        n for n, p in model.named_parameters() if "lora_" in n
    }


def test_base_weights_are_views_and_follow_replacement():
    model = make_model(CONFIGS["llama"], {})
    decoder = Decoder(model, [], 0)
    for layer, fused in zip(model.get_base_model().model.layers, decoder.layers, strict=True):
        attn = layer.self_attn
        rows = [p.base_layer.weight.data_ptr() for p in (attn.q_proj, attn.k_proj, attn.v_proj)]
        step = fused.qkv.weight.element_size() * 48
        assert rows == [fused.qkv.weight.data_ptr() + step * start for start in (0, 48, 64)]
        assert layer.mlp.down_proj.base_layer.weight.data_ptr() == fused.down.weight.data_ptr()
    before = decoder.generate(PROMPTS, 8, 0.0, 0)[0]
    weight = model.get_base_model().model.layers[0].mlp.up_proj.base_layer.weight
    weight.data = -weight.data  # what merging and unmerging an adapter does
    after = decoder.generate(PROMPTS, 8, 0.0, 0)[0]
    assert after != before
    assert after == generate(model, PROMPTS, 8)


def test_model_and_adapter_save_as_before(tmp_path):
    model = make_model(CONFIGS["qwen3"], {})
    model.save_pretrained(tmp_path / "before")
    expected = generate(model, PROMPTS, 6)
    Decoder(model, [], 0).generate(PROMPTS, 4, 1.0, 0)
    model.save_pretrained(tmp_path / "after")
    name = "adapter_model.safetensors"
    assert (tmp_path / "before" / name).read_bytes() == (tmp_path / "after" / name).read_bytes()
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert generate(merged, PROMPTS, 6) == expected


BRIDGE = [40, 41, 42]


def converse(decoder, eos, temperature, turns=3, continues=True):
    """Completions of each turn; a turn's prompts are the last turn's, its completions without EOS, and the bridge."""
    decoder.continues, said, prompts = continues, [], PROMPTS * 3
    with decoder.conversation():
        for turn in range(turns):
            said.append(decoder.generate(prompts, 14 + 3 * turn, temperature, turn))
            rows = zip(prompts, said[-1][0], strict=True)
            prompts = [p + (row[:-1] if row[-1] in eos else row) + BRIDGE for p, row in rows]
    return said


def spy_on_prefills(monkeypatch, decoder):
    """[tokens of each forward pass that is not a token step], filled as the decoder works."""
    sizes, forward = [], decoder._forward

    def look(ids, rows, pos, *prompt):
        if prompt or len(ids) != len(rows.unique()):
            sizes.append(len(ids))
        return forward(ids, rows, pos, *prompt)

    monkeypatch.setattr(decoder, "_forward", look)
    return sizes


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
@pytest.mark.parametrize("compact", [True, False])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_going_on_from_kept_kv_equals_a_fresh_prefill(family, compact, temperature, monkeypatch):
    """Also where rows ended at several lengths, by EOS and by the budget, were dropped, and where prompts are equal."""
    monkeypatch.setattr(Decoder, "compact", compact)
    model = make_model(CONFIGS[family], {})
    eos = [row[k] for row, k in zip(Decoder(model, [], 0).generate(PROMPTS, 14, 0.0, 0)[0], (5, 9), strict=False)]
    decoder = Decoder(model, eos, 0)
    fresh = converse(decoder, eos, temperature, continues=False)
    lengths = {len(row) for row in fresh[0][0]}
    assert len(lengths) > 2
    assert max(lengths) == 14 > min(lengths)
    sizes = spy_on_prefills(monkeypatch, decoder)
    going_on = converse(decoder, eos, temperature)
    for (tokens, logps), (expected, expected_logps) in zip(going_on, fresh, strict=True):
        assert tokens == expected
        for mine, theirs in zip(logps, expected_logps, strict=True):
            torch.testing.assert_close(torch.tensor(mine), torch.tensor(theirs), atol=1e-4, rtol=0)
    rows = len(PROMPTS) * 3
    assert len(sizes) == 3
    assert max(sizes[1:]) <= rows * (len(BRIDGE) + 1), "only the bridge, and a last token that was never fed, are new"
    assert decoder.kept is None


@pytest.mark.parametrize("prompt_tokens", [1, 7])
def test_a_bridge_longer_than_one_forward_pass_goes_in_parts(prompt_tokens, monkeypatch):
    decoder = Decoder(make_model(CONFIGS["qwen2"], {}), [3], 0)
    fresh = converse(decoder, [3], 0.0, continues=False)
    monkeypatch.setattr(decoder, "prompt_tokens", prompt_tokens)
    assert [tokens for tokens, _ in converse(decoder, [3], 0.0)] == [tokens for tokens, _ in fresh]


@pytest.mark.parametrize("change", ["token", "shorter", "same", "fewer", "more", "order"])
def test_prompts_that_do_not_extend_what_is_kept_are_prefilled_afresh(change, monkeypatch):
    decoder = Decoder(make_model(CONFIGS["qwen2"], {}), [], 0)
    first = decoder.generate(PROMPTS, 6, 0.0, 0)[0]
    whole = [p + row + BRIDGE for p, row in zip(PROMPTS, first, strict=True)]
    prompts = {
        "token": [[60, *whole[0][1:]], *whole[1:]],
        "shorter": [whole[0][:4], *whole[1:]],
        "same": [PROMPTS[0] + first[0][:-1], *whole[1:]],
        "fewer": whole[:-1],
        "more": [*whole, [8, 9]],
        "order": whole[::-1],
    }[change]
    expected = decoder.generate(prompts, 8, 0.0, 0)[0]
    sizes = spy_on_prefills(monkeypatch, decoder)
    with decoder.conversation():
        assert decoder.generate(PROMPTS, 6, 0.0, 0)[0] == first
        assert decoder.generate(prompts, 8, 0.0, 0)[0] == expected
    assert sizes[1] >= sum(map(len, prompts))


def test_several_prompts_go_on_from_one_kept_row(monkeypatch):
    decoder = Decoder(make_model(CONFIGS["qwen2"], {}), [], 0)
    first = decoder.generate(PROMPTS, 6, 0.0, 0)[0]
    prompts = [p + row + BRIDGE + [tail] for p, row in zip(PROMPTS, first, strict=True) for tail in (50, 50, 51)]
    expected = decoder.generate(prompts, 8, 1.0, 7)[0]
    sizes = spy_on_prefills(monkeypatch, decoder)
    with decoder.conversation():
        decoder.generate(PROMPTS, 6, 0.0, 0)
        assert decoder.generate(prompts, 8, 1.0, 7)[0] == expected
    new = len(BRIDGE) + 2  # the last token of attempt 1, the bridge and the tail
    assert sizes[1] == len({*map(tuple, PROMPTS)}) * 2 * new, "equal prompts go on once"


def test_kv_is_kept_inside_a_conversation_only_and_freed_however_it_ends(monkeypatch):
    decoder = Decoder(make_model(CONFIGS["qwen2"], {}), [], 0)
    decoder.generate(PROMPTS, 4, 0.0, 0)
    assert decoder.kept is None
    with pytest.raises(ZeroDivisionError), decoder.conversation():
        decoder.generate(PROMPTS, 4, 0.0, 0)
        assert decoder.kept is not None
        raise ZeroDivisionError
    assert (decoder.kept, decoder.cache, decoder.keeps) == (None, None, False)
    with decoder.conversation():
        decoder.generate(PROMPTS, 4, 0.0, 0)
        decoder.forget()
        assert decoder.kept is None
        decoder.generate(PROMPTS, 4, 0.0, 0)
        assert decoder.kept is None
    monkeypatch.setattr(Decoder, "continues", False)
    with decoder.conversation():
        decoder.generate(PROMPTS, 4, 0.0, 0)
        assert decoder.kept is None


def test_bad_calls_are_refused_and_no_prompts_are_no_work():
    decoder = Decoder(make_model(CONFIGS["llama"], {}), [], 0)
    assert decoder.generate([], 4, 1.0, 0) == ([], [])
    for prompts, new, temperature in (([[]], 4, 1.0), ([[5]], 0, 1.0), ([[5]], 4, -1.0)):
        with pytest.raises(ValueError):
            decoder.generate(prompts, new, temperature, 0)


@pytest.mark.parametrize(
    ("config", "lora", "reason"),
    [
        (CONFIGS["llama"], {}, None),
        (GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=61), None, "GPT2LMHeadModel"),
        (MistralConfig(**SHAPE, sliding_window=16), None, "sliding"),
        (LlamaConfig(**SHAPE, hidden_act="gelu"), None, "gelu"),
        (LlamaConfig(**SHAPE, rope_parameters=DYNAMIC), None, "dynamic"),
        (CONFIGS["llama"], {"use_dora": True}, "DoRA"),
        (CONFIGS["mistral"], {"target_modules": [*ALL, "lm_head"]}, "head"),
        (CONFIGS["mistral"], {"modules_to_save": ["embed_tokens"]}, "embedding"),
    ],
)
def test_models_it_does_not_serve_are_named_with_the_reason(config, lora, reason):
    model = make_model(config, lora)
    said = why_not_decodable(model)
    assert said is None if reason is None else reason in said
    if reason:
        with pytest.raises(ValueError, match=reason):
            Decoder(model, [], 0)


INTERPRETED = """
import torch, {module} as m, tests_of_decoder as t
model = t.make_model(t.CONFIGS["qwen3"], {{"r": 17}})
plain, kernels = m.Decoder(model, [], 0), m.Decoder(model, [], 0)
kernels.kernels = True
for splits, prompts in ((None, t.PROMPTS[:2]), (4, t.PROMPTS[2:4])):
    kernels.splits = splits
    tokens, logps = kernels.generate(prompts, 4, 0.0, 0)
    expected = plain.generate(prompts, 4, 0.0, 0)
    assert tokens == expected[0], (tokens, expected[0])
    torch.testing.assert_close(torch.tensor(logps), torch.tensor(expected[1]), atol=1e-4, rtol=0)
    longer = [[*p, *row, 40, 41] for p, row in zip(prompts, tokens)]
    with kernels.conversation():
        kernels.generate(prompts, 4, 0.0, 0)
        assert kernels.kept
        tokens, logps = kernels.generate(longer, 3, 0.0, 0)
    expected = plain.generate(longer, 3, 0.0, 0)
    assert tokens == expected[0], (tokens, expected[0])
    torch.testing.assert_close(torch.tensor(logps), torch.tensor(expected[1]), atol=1e-4, rtol=0)
(a, b), logps = kernels.generate([[5], [5]], 4, 2.0, 3)
assert a != b
assert ((a, b), logps) != kernels.generate([[5], [5]], 4, 2.0, 4)
for row, logp in zip((a, b), logps):
    torch.testing.assert_close(torch.tensor(logp), t.forward_log_probs(model, [5], row, 2.0), atol=1e-4, rtol=0)
"""


def test_triton_kernels_equal_the_torch_path_in_the_interpreter(tmp_path):
    pytest.importorskip("triton")
    shutil.copy(__file__, tmp_path / "tests_of_decoder.py")
    paths = [str(tmp_path), os.path.dirname(os.path.abspath(sys.modules[Decoder.__module__].__file__))]
    env = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(paths), "CUDA_VISIBLE_DEVICES": ""}
    code = INTERPRETED.format(module=Decoder.__module__)
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
class TestOnCuda:
    @pytest.mark.parametrize("family", CONFIGS)
    def test_graphs_equal_generate_in_float32(self, family):
        model = make_model(CONFIGS[family], {}, "cuda")
        prompts = PROMPTS * 5
        expected = generate(model, prompts, 30)
        eos = [expected[1][2], expected[4][9]]
        decoder = Decoder(model, eos, 0)
        expected = generate(model, prompts, 30, eos)
        for compact in (True, False):
            decoder.compact = compact
            assert decoder.generate(prompts, 30, 0.0, 0)[0] == expected
        shake(model, 0.3)
        assert decoder.generate(prompts, 30, 0.0, 0)[0] == generate(model, prompts, 30, eos), "a graph held old weights"

    def test_going_on_from_kept_kv_equals_a_fresh_prefill_in_float32(self):
        model = make_model(CONFIGS["qwen3"], {}, "cuda")
        eos = [row[k] for row, k in zip(generate(model, PROMPTS, 14), (2, 5, 9), strict=False)]
        for compact in (True, False):
            decoder = Decoder(model, eos, 0)
            decoder.compact = compact
            for temperature in (0.0, 1.0):
                fresh = converse(decoder, eos, temperature, continues=False)
                going_on = converse(decoder, eos, temperature)
                assert [tokens for tokens, _ in going_on] == [tokens for tokens, _ in fresh]
            assert decoder.kept is None

    def test_graphs_agree_with_the_forward_in_bfloat16(self):
        model = make_model(CONFIGS["qwen3"], {}, "cuda", torch.bfloat16)
        decoder = Decoder(model, [], 0)
        drift = [
            (torch.tensor(logps) - forward_log_probs(model, prompt, row, 0.8)).abs().mean()
            for prompt, row, logps in zip(PROMPTS, *decoder.generate(PROMPTS, 40, 0.8, 1), strict=True)
        ]
        assert sum(drift) / len(drift) < 0.05

    def test_samples_do_not_depend_on_the_batch_around_a_row(self):
        decoder = Decoder(make_model(CONFIGS["llama"], {}, "cuda"), [3, 4, 5], 0)
        whole = decoder.generate(PROMPTS * 4, 40, 1.5, 9)[0]
        decoder.compact = False
        assert decoder.generate(PROMPTS * 4, 40, 1.5, 9)[0] == whole
        assert decoder.generate(PROMPTS, 40, 1.5, 9)[0] == whole[: len(PROMPTS)]

    def test_samples_follow_the_softmax(self):
        model = make_model(CONFIGS["llama"], {}, "cuda")
        n = 6000
        tokens = [row[0] for row in Decoder(model, [], 0).generate([[5, 6]] * n, 1, 1.7, 7)[0]]
        with torch.no_grad():
            expected = n * (model(torch.tensor([[5, 6]], device="cuda")).logits[0, -1] / 1.7).softmax(-1).cpu()
        seen = torch.bincount(torch.tensor(tokens), minlength=61).float()
        keep = expected >= 5
        freedom = int(keep.sum())
        assert ((seen - expected)[keep] ** 2 / expected[keep]).sum() < freedom + 5 * (2 * freedom) ** 0.5

    def test_the_cache_is_freed_and_weights_are_stored_once(self):
        model = make_model(CONFIGS["qwen2"], {}, "cuda")
        before = torch.cuda.memory_allocated()
        decoder = Decoder(model, [], 0)
        held = torch.cuda.memory_allocated() - before
        lora = sum(p.numel() * p.element_size() for n, p in model.named_parameters() if "lora_" in n)
        base = sum(p.numel() * p.element_size() for n, p in model.named_parameters() if "base_layer.weight" in n)
        assert held < base / 2 + 16 * lora
        decoder.generate(PROMPTS, 200, 1.0, 0)
        assert decoder.cache is None
