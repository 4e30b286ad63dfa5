"""The samplers against generate(), the model's own forward and the softmax: tiny float32 models on the CPU."""

import copy
import math
import os
import random
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import transformers as hf
from peft import LoraConfig, get_peft_model

import train
from train import Decoder, Generate, GraphSampler, make_sampler, sample

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
GPT2 = hf.GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=61)
CONFIGS = {
    "llama": hf.LlamaConfig(**SHAPE, rope_parameters=LLAMA3, tie_word_embeddings=True),
    "llama-dynamic": hf.LlamaConfig(**SHAPE, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4}),
    "llama-linear": hf.LlamaConfig(**SHAPE, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}),
    "mistral": hf.MistralConfig(**SHAPE, sliding_window=None),
    "qwen2": hf.Qwen2Config(**SHAPE),
    "qwen3": hf.Qwen3Config(**SHAPE, head_dim=12, tie_word_embeddings=True),
}
PROMPTS = [[5, 6, 7], [9], [11, 12, 13, 14, 15, 16, 17], [5, 6, 7], [20, 21], [30, 31, 32, 33]]
WINDOW = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
LINEAR = {
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
OTHERS = {  # served by the graph of their own forward
    "gemma3": hf.Gemma3TextConfig(**SHAPE, **WINDOW, tie_word_embeddings=False, head_dim=12, query_pre_attn_scalar=12),
    "qwen3_5": hf.Qwen3_5TextConfig(**SHAPE, **LINEAR, head_dim=12),
    "mistral-window": hf.MistralConfig(**SHAPE, sliding_window=8),
}
KINDS = {"decoder": "qwen3", "generate": "qwen3", "graph": "qwen3"} | {f"graph-{name}": name for name in OTHERS}


def make_model(config, lora: dict, device="cpu"):
    """A random PEFT model whose LoRA B is not zero and whose norms and biases are not trivial."""
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(copy.deepcopy(config)).float()
    for p in model.parameters():
        if p.dim() == 1:
            torch.nn.init.normal_(p.data, mean=1.0, std=0.3)
    settings = {"r": 5, "lora_alpha": 7, "lora_dropout": 0.1, "target_modules": ALL} | lora
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))
    shake(model)
    train.make_deterministic(model)
    return model.to(device).eval()


def shake(model, std: float = 0.1) -> None:
    """New random LoRA B weights."""
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p.data, std=std)


def policy_of(model, eos=()):
    """What samplers need of a Policy. It is in training mode, as train.py's is."""
    policy = SimpleNamespace(model=model, eos_token_ids=list(eos), pad_token_id=0)
    policy.for_generation, policy.for_training = model.eval, model.train
    model.train()
    return policy


def make(kind, model, eos=()):
    return {"decoder": Decoder, "graph": GraphSampler, "generate": Generate}[kind](policy_of(model, eos))


@pytest.fixture(params=KINDS)
def sampler(request):
    """sampler(eos) of each kind over the same model, which is sampler.model."""
    model = make_model((CONFIGS | OTHERS)[KINDS[request.param]], {})

    def build(eos=()):
        built = make(request.param.split("-")[0], model, eos)
        built.model = model
        return built

    return build


def generate(model, prompts, new, eos=None):
    """transformers' greedy tokens from left-padded prompts, cut after the first EOS."""
    width = max(map(len, prompts))
    pads = [width - len(p) for p in prompts]
    device, training = next(model.parameters()).device, model.training
    out = model.eval().generate(
        input_ids=torch.tensor([[0] * n + p for n, p in zip(pads, prompts, strict=True)], device=device),
        attention_mask=torch.tensor([[0] * n + [1] * (width - n) for n in pads], device=device),
        max_new_tokens=new, do_sample=False, eos_token_id=eos, pad_token_id=0,
    )[:, width:].tolist()  # fmt: skip
    model.train(training)
    ends = [next((i + 1 for i, t in enumerate(row) if t in (eos or [])), new) for row in out]
    return [row[:end] for row, end in zip(out, ends, strict=True)]


@torch.no_grad()
def forward_log_probs(model, prompt, completion, temperature):
    """Log-probs [tokens of the completion, V] by the model's plain forward."""
    training = model.training
    logits = model.eval()(torch.tensor([prompt + completion], device=next(model.parameters()).device)).logits[0].float()
    model.train(training)
    return (logits / temperature).log_softmax(-1)[len(prompt) - 1 : -1].cpu()


def assert_log_probs(model, prompts, samples, temperature):
    for prompt, row, logps in zip(prompts, *samples, strict=True):
        expected = forward_log_probs(model, prompt, row, temperature or 1.0).gather(1, torch.tensor(row)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(logps), expected, atol=1e-4, rtol=0)


def chi_square_limit(freedom: int) -> float:
    """What chance exceeds once in 100,000 (Wilson and Hilferty)."""
    return freedom * (1 - 2 / (9 * freedom) + 4.265 * math.sqrt(2 / (9 * freedom))) ** 3


# ------------------------------------------------------------------------------------------------ every sampler


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("compact", [True, False])
def test_decoder_greedy_equals_generate_with_ragged_prompts_and_early_eos(family, compact, monkeypatch):
    monkeypatch.setattr(Decoder, "compact", compact)
    model = make_model(CONFIGS[family], {})
    assert_greedy_equals_generate(model, lambda eos: make("decoder", model, eos))


def test_greedy_equals_generate_with_ragged_prompts_and_early_eos(sampler):
    assert_greedy_equals_generate(sampler().model, sampler)


def assert_greedy_equals_generate(model, build):
    whole = generate(model, PROMPTS, 14)
    assert build([]).generate(PROMPTS, 14, 0.0, 0)[0] == whole
    eos = [whole[1][2], whole[4][5]]
    expected = generate(model, PROMPTS, 14, eos)
    assert len({len(row) for row in expected}) > 1, "the chosen EOS ids end no row early"
    tokens, logps = build(eos).generate(PROMPTS, 14, 0.0, 0)
    assert tokens == expected
    assert [len(row) for row in logps] == [len(row) for row in expected]
    one, _ = build(eos).generate(PROMPTS[2:3], 1, 0.0, 0)
    assert one == [expected[2][:1]], "one row, one token"


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_log_probs_are_those_of_the_models_forward(sampler, temperature):
    built = sampler([3])
    assert_log_probs(built.model, PROMPTS, built.generate(PROMPTS, 12, temperature, 1), temperature)


@pytest.mark.parametrize("sampler", ["decoder", "generate", "graph"], indirect=True)
@pytest.mark.parametrize("temperature", [0.6, 1.7])
def test_first_tokens_follow_the_softmax_at_the_temperature(sampler, temperature):
    built, n = sampler(), 6000
    tokens = [row[0] for row in built.generate([[5, 6]] * n, 1, temperature, 7)[0]]
    expected = n * forward_log_probs(built.model, [5, 6], [0], temperature)[0].exp()
    seen = torch.bincount(torch.tensor(tokens), minlength=61).float()
    rare = expected < 5
    seen, expected = (torch.cat([t[~rare], t[rare].sum()[None]]) for t in (seen, expected))
    assert len(seen) > 6
    assert ((seen - expected) ** 2 / expected.clamp(min=1e-9)).sum() < chi_square_limit(len(seen) - 1)


@pytest.mark.parametrize("sampler", ["decoder", "generate", "graph"], indirect=True)
def test_all_tokens_of_ragged_rows_follow_the_softmax(sampler):
    """A token's place among the probabilities in falling order, at random within its own share, is uniform then."""
    built, draw = sampler([3, 4]), random.Random(7)
    prompts = [[5 + (row * 7 + i) % 50 for i in range(2 + row % 9)] for row in range(250)]
    completions, _ = built.generate(prompts, 8, 1.3, 5)
    for factor, follows in ((1.0, True), (1.3, False)):  # the test can tell another policy
        counts = torch.zeros(20)
        for prompt, row in zip(prompts, completions, strict=True):
            for p, token in zip(forward_log_probs(built.model, prompt, row, 1.3 * factor).exp(), row, strict=True):
                within = p[p > p[token]].sum() + p[token] * draw.random()
                counts[min(19, int(within * 20))] += 1
        assert counts.sum() > 1000
        statistic = ((counts - counts.sum() / 20) ** 2).sum() / (counts.sum() / 20)
        assert (statistic < chi_square_limit(19)) == follows


def test_one_seed_gives_the_same_samples_and_leaves_the_global_generator_alone(sampler):
    built = sampler([3])
    state = torch.get_rng_state()
    first = built.generate(PROMPTS, 10, 1.0, 5)
    assert torch.equal(state, torch.get_rng_state())
    assert built.generate(PROMPTS, 10, 1.0, 5) == first
    assert first[0] not in [built.generate(PROMPTS, 10, 1.0, *other)[0] for other in ((6,), (5, 1))]
    assert first[0][0] != first[0][3], "equal prompts must not get equal samples"


def test_a_rows_samples_depend_on_the_seed_and_its_number_alone(sampler):
    """Not on the rows around it, on how many there are, on which have ended, on the budget."""
    ends, rows = [3, 4, 5, 6], PROMPTS * 3
    built = sampler(ends)
    whole, logps = built.generate(rows, 20, 1.5, 9)
    assert len({len(row) for row in whole}) > 3
    assert len({row[-1] for row in whole if len(row) < 20}) > 1, "several ids end rows"
    assert all(len(row) == 20 or row[-1] in ends for row in whole)
    assert not any(token in ends for row in whole for token in row[:-1])
    for first, last in ((0, 1), (4, 9), (7, 8), (12, 18)):
        part, part_logps = built.generate(rows[first:last], 20, 1.5, 9, first_row=first)
        assert part == whole[first:last]
        for mine, theirs in zip(part_logps, logps[first:last], strict=True):
            torch.testing.assert_close(torch.tensor(mine), torch.tensor(theirs), atol=1e-3, rtol=0)
    assert built.generate(rows, 7, 1.5, 9)[0] == [row[:7] for row in whole]
    others = [[40, 41]] * 4 + rows[4:]
    assert built.generate(others, 20, 1.5, 9)[0][4:] == whole[4:]


def test_sample_goes_in_parts_where_memory_is_short_and_gives_the_same(sampler, monkeypatch):
    built, rows = sampler([3]), PROMPTS * 2
    policy = SimpleNamespace(sampler=built)
    whole = sample(policy, rows, 8, 1.0, "seed/1")
    assert whole == sample(policy, rows, 8, 1.0, "seed/1")
    assert whole[0] != sample(policy, rows, 8, 1.0, "seed/2")[0]
    assert sample(policy, [], 8, 1.0, "seed/1") == ([], [])
    monkeypatch.setattr(train, "rows_that_fit", lambda policy, prompts, *_: min(5, len(prompts)))
    built.keeps, built.kept = True, "K/V"
    parts = sample(policy, rows, 8, 1.0, "seed/1")
    assert (built.keeps, built.kept) == (False, None), "kept K/V would only take memory"
    assert parts[0] == whole[0]


def test_each_rollout_reads_the_adapter_as_it_is(sampler):
    built = sampler()
    before = built.generate(PROMPTS, 10, 0.0, 0)[0]
    shake(built.model, 0.3)
    after = built.generate(PROMPTS, 10, 0.0, 0)[0]
    assert after != before
    assert after == generate(built.model, PROMPTS, 10)
    with built.model.disable_adapter():
        base = built.generate(PROMPTS, 10, 0.0, 0)[0]
        assert base == generate(built.model, PROMPTS, 10)
    assert base != after
    assert built.generate(PROMPTS, 10, 0.0, 0)[0] == after


def test_training_is_untouched_by_sampling(sampler):
    built = sampler()
    model, ids = built.model.train(), torch.arange(3, 33).view(2, 15)
    logits, saved = model(ids).logits.detach(), {k: v.clone() for k, v in model.state_dict().items()}
    built.generate(PROMPTS, 4, 1.0, 0)
    assert (model.training, torch.is_grad_enabled()) == (True, True)
    assert model.state_dict().keys() == saved.keys()
    assert all(torch.equal(v, saved[k]) for k, v in model.state_dict().items())
    again = model(ids).logits
    assert torch.equal(again, logits)
    again.logsumexp(-1).sum().backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == {
        n for n, p in model.named_parameters() if "lora_" in n
    }


@pytest.mark.parametrize("family", ["qwen3", "gemma3", "qwen3_5"])  # norms times w, times 1 + w, and gated ones
def test_a_graph_replaces_norms_and_projections_inside_a_rollout_only(family, monkeypatch):
    built, inside = make("graph", model := make_model((CONFIGS | OTHERS)[family], {"lora_alpha": 5}).bfloat16()), []
    own = [part for part in model.modules() if hasattr(part, "lora_A") or type(part).__name__.endswith("RMSNorm")]
    replaced = lambda: sum("forward" in vars(module) for module in own)  # noqa: E731
    for old, _, new in built.replaced:
        x = torch.randn(50, getattr(old, "in_features", old.weight.shape[-1])).bfloat16()
        assert new != old.forward, "each norm is known"
        assert (new(x) == old(x)).float().mean() > 0.99, "rounded as its trainer does"
    monkeypatch.setattr(built, "_step", lambda rows: inside.append(replaced()) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        built.generate(PROMPTS, 4, 0.0, 0)
    assert (inside, replaced()) == ([len(own)], 0)
    assert model.config._attn_implementation == "sdpa"


def test_pick_takes_the_first_token_whose_cumulative_probability_exceeds_the_noise():
    p = torch.tensor([0.0, 0.25, 0.0, 0.5, 0.25, 0.0])
    noise = torch.tensor([0.0, 0.24, 0.26, 0.74, 0.76, 1 - 2**-53], dtype=torch.float64)
    for temperature in (1.0, 0.5):
        token, logp = train.pick((p.log() * temperature).expand(6, 6), temperature, noise)
        assert token.tolist() == [1, 1, 3, 3, 4, 4], "never a token of probability 0, never past the end"
        torch.testing.assert_close(logp, p.log()[token])
    wide = torch.zeros(2, 300_000)
    token, _ = train.pick(wide, 1.0, torch.tensor([1 - 2**-53, 123_456.5 / 300_000], dtype=torch.float64))
    assert token.tolist() == [299_999, 123_456], "exact where float32 sums are not"
    token, logp = train.pick(p.log().expand(2, 6), 0.0, None)
    assert token.tolist() == [3, 3]
    torch.testing.assert_close(logp, torch.tensor([0.5, 0.5]).log())


def test_noise_of_a_row_is_its_own():
    whole = train.row_uniforms(5, 0, 9, 12)
    assert whole.dtype == torch.float64
    assert torch.equal(train.row_uniforms(5, 3, 4, 7), whole[3:7, :7])
    assert not torch.equal(train.row_uniforms(6, 0, 9, 12), whole)
    assert len(whole.unique()) == 9 * 12
    many = train.row_uniforms(1, 0, 4000, 5)
    assert 0 <= many.min() <= many.max() < 1
    counts = torch.histc(many, 50, 0, 1)
    assert ((counts - 400) ** 2 / 400).sum() < chi_square_limit(49)


# --------------------------------------------------------------------------------------------- which one serves


FAULTS = [
    (CONFIGS["llama"], {}, None),
    (GPT2, {"target_modules": ["c_attn"], "fan_in_fan_out": True}, "GPT2LMHeadModel"),
    (OTHERS["mistral-window"], {}, "sliding"),
    (hf.LlamaConfig(**SHAPE, hidden_act="gelu"), {}, "gelu"),
]


@pytest.mark.parametrize(("config", "lora", "reason"), FAULTS)
def test_models_that_the_decoder_does_not_serve_are_named_with_the_reason(config, lora, reason):
    model = make_model(config, lora)
    if reason is None:
        make("decoder", model)
        model.get_base_model().model.layers[1].to("meta")  # as a model that one card does not hold is split
        reason = "it is on several devices"
    with pytest.raises(ValueError, match=reason):
        make("decoder", model)


def test_make_sampler_logs_one_line_that_names_the_sampler_and_the_reason(monkeypatch):
    lines, served = [], {}
    monkeypatch.setattr(train, "log", lines.append)
    for config, fast in ((CONFIGS["qwen2"], True), (CONFIGS["qwen2"], False), (OTHERS["gemma3"], True)):
        served[len(lines)] = type(make_sampler(policy_of(make_model(config, {})), fast, "some/model"))
    assert [*served.values()] == [Decoder, Generate, GraphSampler]
    for line, word in zip(lines, ("decoder", "fast_inference", "Gemma3ForCausalLM"), strict=True):
        assert line.startswith("Rollouts of some/model use ")
        assert word in line


@pytest.mark.parametrize("fault", ["raises", "differs"])
def test_make_sampler_falls_back_where_a_graph_fails_its_trial(fault, monkeypatch):
    lines, policy = [], policy_of(make_model(OTHERS["mistral-window"], {}))
    monkeypatch.setattr(train, "log", lines.append)
    if fault == "raises":
        monkeypatch.setattr(GraphSampler, "_step", lambda *_: 1 / 0)
    else:
        monkeypatch.setattr(GraphSampler, "_logits", lambda self, ids, *_: torch.zeros(len(ids), 61))
    assert type(make_sampler(policy, True, "some/model")) is Generate
    assert ("division" if fault == "raises" else "nats") in lines[0]
    assert policy.model.training
    monkeypatch.setattr(Generate, "generate", lambda *_: 1 / 0)
    with pytest.raises(train.UserError, match="some/model cannot be sampled: .*division"):
        make_sampler(policy, True, "some/model")


# ------------------------------------------------------------------------------------------------------ the decoder


SOME = {"target_modules": ["q_proj", "v_proj", "down_proj"], "use_rslora": True}


@pytest.mark.parametrize("lora", [SOME, {"rank_pattern": {"k_proj": 19, "up_proj": 2}}], ids=["some", "ranks differ"])
def test_decoder_greedy_equals_generate_whatever_the_adapter(lora):
    model = make_model(CONFIGS["qwen2"], lora)
    assert make("decoder", model).generate(PROMPTS, 10, 0.0, 0)[0] == generate(model, PROMPTS, 10)


def test_base_weights_are_views_and_follow_replacement():
    model = make_model(CONFIGS["llama"], {})
    decoder = make("decoder", model)
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
    make("decoder", model).generate(PROMPTS, 4, 1.0, 0)
    model.save_pretrained(tmp_path / "after")
    name = "adapter_model.safetensors"
    assert (tmp_path / "before" / name).read_bytes() == (tmp_path / "after" / name).read_bytes()
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    merged = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert generate(merged, PROMPTS, 6) == expected


BRIDGE = [40, 41, 42]


def converse(decoder, eos, temperature, turns=3, continues=True):
    """Completions of each turn; a turn's prompts are the last turn's, its completions without EOS, and the bridge."""
    said, prompts = [], PROMPTS * 3
    for turn in range(turns):
        decoder.keeps = continues and turn < turns - 1
        said.append(decoder.generate(prompts, 14 + 3 * turn, temperature, turn))
        rows = zip(prompts, said[-1][0], strict=True)
        prompts = [p + (row[:-1] if row[-1] in eos else row) + BRIDGE for p, row in rows]
    return said


def spy_on_prefills(monkeypatch, decoder):
    """[tokens of each forward pass that is not a token step], filled as the decoder works."""
    sizes, forward = [], decoder._forward

    def look(ids, rows, pos, *prompt, **width):
        if not width:
            sizes.append(len(ids))
        return forward(ids, rows, pos, *prompt, **width)

    monkeypatch.setattr(decoder, "_forward", look)
    return sizes


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
@pytest.mark.parametrize("compact", [True, False])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_going_on_from_kept_kv_equals_a_fresh_prefill(family, compact, temperature, monkeypatch):
    """Also where rows ended at several lengths, by EOS and by the budget, were dropped, and where prompts are equal."""
    monkeypatch.setattr(Decoder, "compact", compact)
    model = make_model(CONFIGS[family], {})
    eos = [row[k] for row, k in zip(make("decoder", model).generate(PROMPTS, 14, 0.0, 0)[0], (5, 9), strict=False)]
    decoder = make("decoder", model, eos)
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
    decoder = make("decoder", make_model(CONFIGS["qwen2"], {}), [3])
    fresh = converse(decoder, [3], 0.0, continues=False)
    monkeypatch.setattr(decoder, "prompt_tokens", prompt_tokens)
    assert [tokens for tokens, _ in converse(decoder, [3], 0.0)] == [tokens for tokens, _ in fresh]


@pytest.mark.parametrize("change", ["token", "shorter", "same", "fewer", "more", "order"])
def test_prompts_that_do_not_extend_what_is_kept_are_prefilled_afresh(change, monkeypatch):
    decoder = make("decoder", make_model(CONFIGS["qwen2"], {}))
    first = decoder.generate(PROMPTS, 6, 0.0, 0)[0]
    whole = [p + row + BRIDGE for p, row in zip(PROMPTS, first, strict=True)]
    heads = {"token": [60, *whole[0][1:]], "shorter": whole[0][:4], "same": PROMPTS[0] + first[0][:-1]}
    others = {"fewer": whole[:-1], "more": [*whole, [8, 9]], "order": whole[::-1]}
    prompts = [heads[change], *whole[1:]] if change in heads else others[change]
    expected = decoder.generate(prompts, 8, 0.0, 0)[0]
    sizes = spy_on_prefills(monkeypatch, decoder)
    decoder.keeps = True
    assert decoder.generate(PROMPTS, 6, 0.0, 0)[0] == first
    assert decoder.generate(prompts, 8, 0.0, 0)[0] == expected
    assert sizes[1] >= sum(map(len, prompts))


def test_several_prompts_go_on_from_one_kept_row(monkeypatch):
    decoder = make("decoder", make_model(CONFIGS["qwen2"], {}))
    first = decoder.generate(PROMPTS, 6, 0.0, 0)[0]
    prompts = [p + row + BRIDGE + [tail] for p, row in zip(PROMPTS, first, strict=True) for tail in (50, 50, 51)]
    expected = decoder.generate(prompts, 8, 1.0, 7)[0]
    sizes = spy_on_prefills(monkeypatch, decoder)
    decoder.keeps = True
    decoder.generate(PROMPTS, 6, 0.0, 0)
    assert decoder.generate(prompts, 8, 1.0, 7)[0] == expected
    new = len(BRIDGE) + 2  # the last token of attempt 1, the bridge and the tail
    assert sizes[1] == len({*map(tuple, PROMPTS)}) * 2 * new, "equal prompts go on once"


def test_kv_is_kept_for_one_generate_and_only_where_it_is_asked():
    decoder = make("decoder", make_model(CONFIGS["qwen2"], {}))
    for keeps in (False, True, False):
        decoder.keeps = keeps
        decoder.generate(PROMPTS, 4, 0.0, 0)
        assert (decoder.kept is not None, decoder.cache) == (keeps, None)


INTERPRETED = """
import sys, torch, {module} as m, tests_of_samplers as t
model = t.make_model(t.CONFIGS["qwen3"], {{"r": 17}})
plain, kernels = t.make("decoder", model), t.make("decoder", model)
kernels.kernels, kernels.most, kernels.block = True, 3, 16  # the vocabulary in four blocks
def same(prompts, new):
    made, expected = (decoder.generate(prompts, new, 0.0, 0) for decoder in (kernels, plain))
    assert made[0] == expected[0], (made[0], expected[0])
    torch.testing.assert_close(*(torch.tensor(logps) for _, logps in (made, expected)), atol=1e-4, rtol=0)
    return made[0]
for kernels.processors, prompts in ((1, t.PROMPTS[:2]), (8, t.PROMPTS[4:6])):  # the row's attention whole, in parts
    longer = [[*p, *row, 40, 41] for p, row in zip(prompts, same(prompts, 3))]
    kernels.keeps = True
    assert kernels.generate(prompts, 3, 0.0, 0) and kernels.kept
    kernels.keeps = False
    same(longer, 2)
t.assert_log_probs(model, long := [[*range(5, 57)] * 5], kernels.generate(long, 2, 0.0, 0), 1.0)  # past one split
(a, b), logps = kernels.generate([[5], [5]], 3, 2.0, 3)
assert a != b
assert [a, b] != kernels.generate([[5], [5]], 3, 2.0, 4)[0]
t.assert_log_probs(model, [[5], [5]], ([a, b], logps), 2.0)
assert kernels.generate([[5]], 3, 2.0, 3, first_row=1)[0] == [b], "the noise is the row number's"
step, steps = kernels._step, []
kernels._step = lambda rows: steps.append(rows) or step(rows)
for eos, length in ((61, 10), (21, 8)):  # 21 stands behind a guess
    kernels.eos, made, steps[:] = torch.tensor([eos]), [], []
    for kernels.most in (1, 3):
        kernels.release()
        made += [(*kernels.generate([[9], [5, 6, 7] * 3], 10, 0.3, 3), len(steps))]
    (rows, logps, n), (again, close, both) = made
    assert rows == again and len(rows[1]) == length and both < 2 * n, (rows, again, n, both)
    torch.testing.assert_close(*(torch.tensor(sum(part, [])) for part in (logps, close)), atol=1e-4, rtol=0)
own, near = [1, 7, 2, 3, 7], [5, 3, 7, 8, 9, 6]
for texts, guesses in (
    ([own], [2, 3]), ([[4, 5, 6]], [6, 6]),  # after the last 7 before this one; nothing like it: the last token again
    ([own, near], [8, 9]), ([[3, 7, 4, 3, 7], near], [4, 3]),  # 3, 7 stood there, 7 alone here; as much here as there
    ([[9, 9, 6], near], [6, 6]), ([[2, 7], near], [7, 7]),  # one token, at their end; one of theirs is not enough
    ([[5, 3, 7]] + [near[:3]] * 6 + [[0, 5, 3, 7, 1]], [1, 7]),  # what is known ends there
):
    (state, ends), context = (torch.zeros(n, 16, dtype=torch.long) for n in (7, 1)), torch.full((16, 32), 7)
    state[4, 0], ends = 8, ends[0]
    for prompt, text in enumerate(texts, 8):
        context[prompt, : len(text)], ends[prompt] = torch.tensor(text), len(text) - 1
    m._guess_kernel[(1,)](state, context, ends, 16, 32, 3, 8, 16)
    assert state[5:, 0].tolist() == guesses, (texts, state[5:, 0])
for family in ("gemma3", "qwen3_5"):
    model = t.make_model(t.OTHERS[family], {{}})
    plain, kernels = t.make("graph", model), t.make("graph", model)
    kernels.kernels, there = True, sys.modules[type(model.get_base_model()).__module__]
    kernels.replaced += [(there, "torch_recurrent_gated_delta_rule", m.one_token_delta_rule)] * (family == "qwen3_5")
    same(t.PROMPTS[2:5], 5)
y, b, x = torch.randn(19, 86), torch.randn(16, 70), torch.empty(19, 70)
m._add_lora_kernel[(2, 2)](y, b, x, 19, 70, 16, 16, 64)
torch.testing.assert_close(x, torch.addmm(y[:, :70], y[:, 70:], b))
"""


def test_triton_kernels_equal_the_torch_path_in_the_interpreter(tmp_path):
    pytest.importorskip("triton")
    shutil.copy(__file__, tmp_path / "tests_of_samplers.py")
    paths = [str(tmp_path), os.path.dirname(os.path.abspath(sys.modules[Decoder.__module__].__file__))]
    env = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(paths), "CUDA_VISIBLE_DEVICES": ""}
    code = INTERPRETED.format(module=Decoder.__module__)
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-3000:]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
class TestOnCuda:
    @pytest.mark.parametrize("family", CONFIGS | OTHERS)
    def test_graphs_equal_generate_in_float32(self, family):
        model, prompts = make_model((CONFIGS | OTHERS)[family], {}, "cuda"), PROMPTS * 5
        expected = generate(model, prompts, 30)
        eos = [expected[1][2], expected[4][9]]
        built = make("graph" if family in OTHERS else "decoder", model, eos)
        expected = generate(model, prompts, 30, eos)
        for compact in (True, False) if family in CONFIGS else (False,):
            built.compact = compact
            assert built.generate(prompts, 30, 0.0, 0)[0] == expected
        shake(model, 0.3)
        assert built.generate(prompts, 30, 0.0, 0)[0] == generate(model, prompts, 30, eos), "a graph held old weights"

    def test_going_on_from_kept_kv_equals_a_fresh_prefill_in_float32(self):
        model = make_model(CONFIGS["qwen3"], {}, "cuda")
        eos = [row[k] for row, k in zip(generate(model, PROMPTS, 14), (2, 5, 9), strict=False)]
        for compact in (True, False):
            decoder = make("decoder", model, eos)
            decoder.compact = compact
            for temperature in (0.0, 1.0):
                fresh = converse(decoder, eos, temperature, continues=False)
                going_on = converse(decoder, eos, temperature)
                assert [tokens for tokens, _ in going_on] == [tokens for tokens, _ in fresh]
            assert decoder.kept is None

    def test_a_rows_samples_depend_on_its_number_alone(self):
        decoder = make("decoder", make_model(CONFIGS["llama"], {}, "cuda"), [3, 4, 5])
        whole = decoder.generate(PROMPTS * 4, 40, 1.5, 9)[0]
        assert decoder.generate((PROMPTS * 4)[5:9], 40, 1.5, 9, first_row=5)[0] == whole[5:9]
        decoder.compact = False
        assert decoder.generate(PROMPTS * 4, 40, 1.5, 9)[0] == whole

    def test_samples_follow_the_softmax(self):
        model, n = make_model(CONFIGS["llama"], {}, "cuda"), 6000
        tokens = [row[0] for row in make("decoder", model).generate([[5, 6]] * n, 1, 1.7, 7)[0]]
        expected = n * forward_log_probs(model, [5, 6], [0], 1.7)[0].exp()
        seen = torch.bincount(torch.tensor(tokens), minlength=61).float()
        keep = expected >= 5
        assert ((seen - expected)[keep] ** 2 / expected[keep]).sum() < chi_square_limit(int(keep.sum()))
