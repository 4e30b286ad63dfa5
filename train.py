#!/usr/bin/env python3
"""SCoRe: a language model learns to correct its own answers by reinforcement learning, on one GPU, in one file.

Kumar et al., "Training Language Models to Self-Correct via Reinforcement Learning", ICLR 2025 (arXiv 2409.12917).

A problem x1 is answered (attempt 1, y1); the model is told that there may be an error, not whether there is one
(x2 = x1 + y1 + instruction), and answers again (attempt 2, y2). Both attempts are sampled from the policy being
trained, one gradient step a batch. r is the reward of an answer, pi_ref the model before any training.

    Stage I     max  E[ r(y2)                                         ]  - beta2 KL1 - beta1 KL2
    Stage II    max  E[ r(y1)  +  r(y2) + alpha * (r(y2) - r(y1))     ]  - beta1 KL1 - beta1 KL2

KLi is KL(pi(.|xi) || pi_ref(.|xi)). Stage I holds attempt 1 where it was (a strict beta2) while attempt 2 learns to
improve on it; without it the policy learns to answer once and to copy. Stage II trains both, and pays attempt 2 for
progress. Each attempt is credited with its own reward only.

How it differs from a plain implementation, and why:
- The reference is the same LoRA model with its adapter switched off: no second copy of the weights.
- Both attempts of a conversation are read from one forward pass: attempt 2's row begins with attempt 1's.
- The loss is a sum over conversations, so each micro-batch goes forward and backward alone: memory depends on the
  micro-batch, not on the batch, and no two graphs are alive at once.
- Token log-probs are computed from hidden states in chunks: no [B, T, V] tensor exists.
- All randomness of a step comes from (seed, stage, step), so a resumed run repeats an uninterrupted one exactly.

    python train.py --config configs/tiny.yaml                 # two stages on a laptop's CPU, in minutes
    python train.py --config configs/gsm8k.yaml [--smoke 8]    # one GPU, with Unsloth
    python train.py --config configs/gsm8k.yaml --start-stage 2 --resume-adapter outputs/score-gsm8k/stage1

Part one is the method, in the order in which a run meets it; part two the machinery. Names are looked up when they are
called, so part one may use anything of part two. Part two gets Config, Policy, Example and Attempt from part one, and
calls back only what stands below behind "calls".

Part one: the method
    configuration        every key, its default and its bounds; knows only the fault words of the command line
    model                the policy, its reference, and how both come out of one set of weights
    data                 problems as prompts, and the bridge from attempt 1 to attempt 2
    rollout              attempts sampled one after the other
    rewards looked up    what an attempt earns, and whether it is correct; knows no model
    objective            log-probs, KL, advantages, one step; knows attempts, no examples
    a stage              roll out, improve, write down; Stage I and II differ in `stage_terms` alone
    evaluation           the paper's metrics; changes no weight
    the run              evaluate, Stage I, evaluate, Stage II, evaluate

Part two: the machinery
    light imports        what only part two needs before a config is read
    messages             the errors, and what is printed; knows nothing
    command line         flags, and every fault of a config in one line; knows no torch
    heavy imports        torch, Unsloth and the rest, the device, the processes
    loading              tokenizer, sampler, adapter, memory; calls completion_log_probs and reference to try them
    chat template        turns as text
    rows                 reading a dataset and its faults, its order in a stage, TRL's rewards
    sampling             vLLM, memory, rows of attempts taken apart and joined
    log-probs kernel     tensors only
    decoder              CUDA graphs and Triton kernels; knows a model, nothing of this project's types
    several processes    shares of a batch, sums of gradients, watching one another
    run folder           what is written, when it may be overwritten, how it is rewound; knows no model
    checkpoints          saved, found, pruned, merged, uploaded
    reports              bars, tables, curves, cards, W&B, votes, statistics; calls roll_out, attempt_means
    signals              stopping at a safe point
    start                every way of ending as an exit code; calls train_and_evaluate
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import random
import re
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator

from reward_function import (
    ANSWER_EXTRACTORS,
    REWARD_FNS,
    correction_split,
    diagnose,
    is_correct,
    outcomes,
    score,
    score_by_name,
    weighted_sum,
)

# ---------------------------------------------------------------------------------------------------- configuration


def read_number(value: Any) -> Any:
    """YAML 1.1 reads 1e-5 (no dot) as text; a number written so is still a number."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            pass
    return value


Real = Annotated[float, BeforeValidator(read_number), Field(allow_inf_nan=False)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())


class LoraConfig(Section):
    r: int = Field(16, ge=1)
    alpha: Real = Field(16, gt=0)
    dropout: Real = Field(0.0, ge=0, lt=1)
    target_modules: list[str] = Field(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], min_length=1
    )


class ModelConfig(Section):
    name: str = Field(min_length=1)
    max_seq_length: int = Field(2048, ge=8)
    load_in_4bit: bool = False
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] = {}
    fast_inference: bool = False
    fast_inference_gpu_mem: Real = Field(0.5, gt=0, lt=1)
    gradient_checkpointing: Literal["auto", True, False, "unsloth"] = "auto"
    decoder: Literal["auto", "graph", "generate"] = "auto"
    trust_remote_code: bool = False
    lora: LoraConfig = LoraConfig()

    @field_validator("fast_inference")
    @classmethod
    def has_vllm(cls, value: bool) -> bool:
        if value and not importlib.util.find_spec("vllm"):
            raise ValueError("needs vLLM: pip install vllm==0.24.0, or set it to false (model.decoder is fast too)")
        return value


class DatasetConfig(Section):
    name: str = Field(min_length=1)
    config_name: str | None = None
    revision: str | None = None
    split: str | None = None
    input_field: str = Field(min_length=1)
    target_field: str = Field(min_length=1)
    test_split_size: int | None = Field(None, ge=1)
    skip_faulty_rows: bool = False


class WorkedExample(Section):
    model_config = ConfigDict(str_strip_whitespace=True)
    input: str = Field(min_length=1)
    output: str = Field(min_length=1)


class PromptsConfig(Section):
    system: str = ""
    examples: list[WorkedExample] = []
    self_correction: str = Field(
        "There might be an error in the solution above because of lack of understanding of the question. Please "
        "correct the error, if any, and rewrite the solution.",
        min_length=1,
    )


class RewardConfig(Section):
    module: str | None = None  # first: it registers what the others name
    fn: str | list[str] = "format_and_match"
    weights: list[Real] | None = None
    columns: dict[str, str] = {}
    completions: Literal["conversational", "text"] = "conversational"
    answer_extractor: str = "identity"

    @property
    def names(self) -> list[str]:
        return [self.fn] if isinstance(self.fn, str) else self.fn

    @property
    def unregistered(self) -> list[str]:
        """The functions in TRL's form."""
        return [name for name in self.names if name not in REWARD_FNS]

    @field_validator("module")
    @classmethod
    def is_loaded(cls, file: str | None) -> str | None:
        if file:
            load_reward_module(Path(file))
        return file

    @field_validator("fn", mode="before")
    @classmethod
    def can_be_found(cls, fn: Any, field: Any) -> Any:
        names = fn if isinstance(fn, list) else [fn]
        if not names or not all(isinstance(name, str) for name in names):
            raise ValueError("must be the name of a reward function, or a list of names")
        for name in names if "module" in field.data else ():  # else the module's fault says enough
            if fault := reward_fault(name, field.data["module"]):
                raise ValueError(f"{name!r} {fault}" if names is fn else fault)
        return fn

    @field_validator("weights")
    @classmethod
    def are_one_each(cls, weights: list[float] | None, field: Any) -> list[float] | None:
        fn = field.data.get("fn")  # missing if it is at fault itself
        count = len(fn) if isinstance(fn, list) else 1
        if fn and weights is not None and len(weights) != count:
            raise ValueError(f"must be as many as the functions in reward.fn: {count}, not {len(weights)}")
        return weights

    @field_validator("answer_extractor")
    @classmethod
    def is_registered(cls, name: str, field: Any) -> str:
        if name not in ANSWER_EXTRACTORS and "module" in field.data:
            raise ValueError(not_registered(name, ANSWER_EXTRACTORS))
        return name


class TrainConfig(Section):
    stage1_batch_size: int = Field(64, ge=1)
    stage2_batch_size: int = Field(64, ge=1)
    micro_batch_size: int = Field(8, ge=1)
    stage1_epochs: Real = Field(1, ge=0)
    stage2_epochs: Real = Field(1, ge=0)
    learning_rate: Real = Field(1e-5, gt=0)
    max_grad_norm: Real = Field(1.0, gt=0)
    warmup_steps: int = Field(0, ge=0)
    lr_decay: Real = Field(0.0, ge=0, le=1)
    alpha: Real = Field(10.0, ge=0)
    beta1: Real = Field(0.01, ge=0)
    beta2: Real = Field(0.1, ge=0)
    baseline: Literal["leave_one_out", "batch", "none"] = "leave_one_out"
    num_generations: int = Field(1, ge=1)
    stage1_corrections: int = Field(1, ge=1)
    stage2_corrections: int = Field(1, ge=1)
    oversample: int = Field(1, ge=1)
    importance_clip: Real | None = Field(None, gt=0)
    length_norm: Literal["sequence", "constant"] = "sequence"
    generation_temperature: Real = Field(1.0, gt=0)
    max_new_tokens_attempt1: int = Field(512, ge=1)
    max_new_tokens_attempt2: int = Field(512, ge=1)
    max_prompt_length_attempt1: int = Field(512, ge=1)
    max_prompt_length_attempt2: int = Field(1536, ge=1)
    seed: int = Field(42, ge=0, lt=2**32)
    checkpoint_every: int | None = Field(None, ge=1)
    max_skipped_steps: int = Field(10, ge=1)


class EvalConfig(Section):
    batch_size: int = Field(64, ge=1)
    max_examples: int | None = Field(None, ge=1)
    generation_temperature: Real = Field(0.0, ge=0)
    attempts: int = Field(2, ge=2)
    samples: int = Field(1, ge=1)
    validation: int = Field(0, ge=0)


class OutputConfig(Section):
    dir: str = Field("outputs", min_length=1)
    keep_checkpoints: int | None = Field(None, ge=1)
    merge: bool = False
    push_to_hub: str | None = Field(None, pattern=r"^[\w.-]+/[\w.-]+$")


class Config(Section):
    run_name: str = Field(max_length=200, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    wandb_project: str | None = None
    model: ModelConfig
    dataset: DatasetConfig
    prompts: PromptsConfig = PromptsConfig()
    reward: RewardConfig = RewardConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    output: OutputConfig = OutputConfig()


# ------------------------------------------------------------------------------------------------------------ model


@dataclass
class Policy:
    """The model being trained and what goes with it. Its reference is itself inside `reference(policy)`."""

    model: Any  # a PEFT model, always in training mode outside `generating(policy)`
    tokenizer: Any
    eos_token_ids: list[int]
    pad_token_id: int
    think_prefix: str  # "<think>" where the chat template itself opens the tag, so that rewards see the pair
    bridge: list[int]  # what the chat template puts between attempt 1 and attempt 2: turn ends, instruction
    for_generation: Callable[[], Any]
    for_training: Callable[[], Any]
    decoder: Decoder | None = None
    engine: Callable | None = None  # vLLM's, in the decoder's place
    micro_tokens: int = 0  # the update's tokens per micro-batch, pads included; an out-of-memory halves it
    recompute: Callable[[], Any] | None = None  # gradient checkpointing on, where `auto` has left it off

    @property
    def trainable(self) -> dict[str, torch.nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}


def reference(policy: Policy) -> Any:
    """Context in which the policy is the reference pi_ref: the same weights, the adapter switched off."""
    return policy.model.disable_adapter()


def load_policy(config: Config, tokenizer: Any, adapter: Path | None = None, use_unsloth: bool | None = None) -> Policy:
    """Loads base model and LoRA adapter: with Unsloth where it runs, else with transformers + PEFT.

    Both paths give the same model: bf16 (float32 on the CPU), the same LoRA settings, float32 LoRA weights. `adapter`
    holds LoRA weights to start from. Raises UserError for a model or an adapter that does not fit."""
    bridge, think_prefix = attempt2_bridge(tokenizer, config)
    use_unsloth = DEVICE.type != "cpu" if use_unsloth is None else use_unsloth
    if config.model.fast_inference and (not use_unsloth or PROCESSES.num_processes > 1):
        raise UserError("model.fast_inference: vLLM serves one process with a GPU; set it to false")
    name, dtype = config.model.name, torch.float32 if DEVICE.type == "cpu" else torch.bfloat16
    torch.manual_seed(config.train.seed)  # LoRA's A matrices
    try:
        load = load_with_unsloth if use_unsloth else load_with_transformers
        model, for_generation, for_training = load(config, dtype)
    except torch.OutOfMemoryError:
        raise UserError(f"model.name: {name} does not fit in GPU memory; set model.load_in_4bit: true") from None
    except UserError:
        raise
    except Exception as error:  # an odd config.json raises what it likes
        raise UserError(f"model.name: {name} cannot be loaded: {first_line(error)}") from None
    if max(bridge, default=0) >= model.get_input_embeddings().weight.shape[0]:
        raise UserError(f"model.name: the tokenizer of {name} has tokens that its model lacks: it is another model's")
    # A model's own generation_config (top_k, top_p, repetition penalty) would sample from another policy than the one
    # whose log-probs are trained: keep its token ids and nothing else.
    eos = eos_ids(model, tokenizer, name)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else eos[0]
    model.generation_config = transformers.GenerationConfig(eos_token_id=eos, pad_token_id=pad)
    model.peft_config["default"].base_model_name_or_path = name
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if adapter:
        load_adapter(model, adapter)
    if DEVICE.type == "cpu" and model.num_parameters() < 2**24:
        torch.set_num_threads(1)  # matrices this small keep threads waiting for one another, worse beside another job
    auto = config.model.gradient_checkpointing == "auto"
    checkpointing = True if auto else config.model.gradient_checkpointing
    longest = config.train.max_prompt_length_attempt2 + config.train.max_new_tokens_attempt2
    policy = Policy(
        model,
        tokenizer,
        eos,
        pad,
        think_prefix,
        bridge,
        for_generation,
        partial(for_training, use_gradient_checkpointing=checkpointing),
        micro_tokens=config.train.micro_batch_size * longest,
    )
    policy.for_training()
    check_log_prob_route(policy)
    choose_sampler(policy, config, longest)
    if auto:
        keep_activations_if_they_fit(policy, for_training, longest)
    return policy


def load_with_unsloth(config: Config, dtype: torch.dtype) -> tuple[Any, Callable, Callable]:
    """The PEFT model, the switch to generation and the one to training, which is told about gradient checkpointing;
    with vLLM inside if asked for."""
    from unsloth import FastLanguageModel

    wanted, more = config.model, {}
    checkpointing = True if wanted.gradient_checkpointing == "auto" else wanted.gradient_checkpointing
    if PROCESSES.num_processes > 1:
        more["device_map"] = {"": PROCESSES.local_process_index}
    if wanted.fast_inference:  # vLLM knows ranks that are powers of two
        more |= dict(
            fast_inference=True,
            gpu_memory_utilization=wanted.fast_inference_gpu_mem,
            max_lora_rank=max(8, 1 << (wanted.lora.r - 1).bit_length()),
        )
    heard = BANNERS.tell()
    # vLLM draws progress bars; its log has had the real stderr since Unsloth imported it.
    with redirect_stdout(BANNERS), redirect_stderr(BANNERS) if wanted.fast_inference else nullcontext():
        model, _ = FastLanguageModel.from_pretrained(
            wanted.name,
            max_seq_length=wanted.max_seq_length,
            dtype=dtype,
            use_exact_model_name=True,
            load_in_4bit=wanted.load_in_4bit,
            trust_remote_code=wanted.trust_remote_code,
            **more,
        )
        model = FastLanguageModel.get_peft_model(
            model, **lora_settings(config), use_gradient_checkpointing=checkpointing, random_state=config.train.seed
        )
    BANNERS.seek(heard)
    for line in BANNERS:  # among them one that matters now and then
        if re.search("disabling|cannot|will switch|defaulting", line, re.IGNORECASE):
            say(line.strip())
    return model, partial(FastLanguageModel.for_inference, model), partial(FastLanguageModel.for_training, model)


def load_with_transformers(config: Config, dtype: torch.dtype) -> tuple[Any, Callable, Callable]:
    """The same without Unsloth. Raises UserError for what it would load wrongly."""
    wanted = config.model
    if wanted.load_in_4bit and DEVICE.type == "cpu":
        raise UserError("model.load_in_4bit: needs a GPU; set it to false on a CPU")
    nf4 = dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    model, found = transformers.AutoModelForCausalLM.from_pretrained(
        wanted.name,
        dtype=dtype,
        trust_remote_code=wanted.trust_remote_code,
        quantization_config=transformers.BitsAndBytesConfig(**nf4) if wanted.load_in_4bit else None,
        device_map={"": DEVICE} if DEVICE.type != "cpu" else None,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # what is not loaded would be left random
    )
    if odd := sorted([*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])]):
        raise ValueError(f"its weights do not fit its config.json: {odd[0]} lacks or has another shape")
    for target in wanted.lora.target_modules:
        if not any(f".{module}".endswith(f".{target}") for module, _ in model.named_modules()):
            raise UserError(f"model.lora.target_modules: {wanted.name} has no {target}; leave it out or correct it")
    base, model = model, get_peft_model(model, PeftLoraConfig(**lora_settings(config), task_type="CAUSAL_LM"))

    def for_training(use_gradient_checkpointing: bool | str) -> None:
        model.train()
        if use_gradient_checkpointing:
            base.gradient_checkpointing_enable({"use_reentrant": False})
        else:
            base.gradient_checkpointing_disable()

    return model, model.eval, for_training


def lora_settings(config: Config) -> dict[str, Any]:
    lora = config.model.lora
    return dict(
        r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, bias="none", target_modules=lora.target_modules
    )


# ------------------------------------------------------------------------------------------------------------- data


@dataclass
class Example:
    """One problem: its text, its reference answer ("": none is known), and the token ids of the attempt-1 prompt."""

    question: str
    target: str
    prompt: list[int]
    columns: dict[str, Any] = field(default_factory=dict)  # what rewards in TRL's form get by name


def load_examples(config: Config, tokenizer: Any) -> tuple[list[Example], list[Example]]:
    """Train and test examples. A test row is never trained on. Raises UserError."""
    wanted = config.dataset
    splits = load_splits(wanted)
    if wanted.split:
        if wanted.split not in splits:
            raise UserError(f"dataset.split: {wanted.name} has no split {wanted.split!r}; it has {', '.join(splits)}")
        if len(splits[wanted.split]) <= wanted.test_split_size:
            raise UserError(
                f"dataset.test_split_size: {wanted.test_split_size} leaves nothing to train on: "
                f"{wanted.split} has {len(splits[wanted.split])} rows"
            )
        parts = splits[wanted.split].train_test_split(test_size=wanted.test_split_size, seed=config.train.seed)
        train, test = parts["train"], parts["test"]
    else:
        for split in ("train", "test"):
            if split not in splits:
                raise UserError(
                    f"dataset.name: {wanted.name} has no {split} split; it has {', '.join(splits)}. "
                    "Set dataset.split to one of them and dataset.test_split_size to hold rows out"
                )
        train, test = splits["train"], splits["test"]
    train, test = read_rows(train, "train", config), read_rows(test, "test", config)
    seen = {row[0] for row in test}
    kept, test = [row for row in train if row[0] not in seen], test[: wanted.test_split_size]
    if len(kept) < len(train):
        say(f"Warning: {len(train) - len(kept)} train rows are also test rows; they are not trained on.")
    if not kept:
        raise UserError(f"dataset.name: every train row of {wanted.name} is also a test row; nothing is left to learn")
    return tuple(encode_rows(rows, split, config, tokenizer) for rows, split in ((kept, "train"), (test, "test")))


def encode_rows(rows: list[tuple], split: str, config: Config, tokenizer: Any) -> list[Example]:
    """Builds the attempt-1 prompts; a prompt over budget is dropped with a count, never cut."""
    limit = config.train.max_prompt_length_attempt1
    texts = [chat_text(tokenizer, config, [{"role": "user", "content": question}]) for question, *_ in rows]
    prompts = tokenizer(texts, add_special_tokens=False)["input_ids"]
    examples = [
        Example(question, target, prompt, *columns)
        for (question, target, *columns), prompt in zip(rows, prompts, strict=True)
        if len(prompt) <= limit
    ]
    if not examples:
        raise UserError(
            f"train.max_prompt_length_attempt1: all {len(rows)} {split} prompts are longer than {limit} "
            f"tokens; the shortest has {min(map(len, prompts))}"
        )
    if len(examples) < len(rows):
        say(
            f"Warning: {len(rows) - len(examples)} of {len(rows)} {split} prompts are over "
            f"train.max_prompt_length_attempt1 = {limit} tokens and are left out (longest: {max(map(len, prompts))})."
        )
    return examples


def attempt2_bridge(tokenizer: Any, config: Config) -> tuple[list[int], str]:
    """The token ids that stand between attempt 1's last token and attempt 2's first, and the think tag if open.

    The attempt-2 prompt is attempt-1 prompt + attempt 1 verbatim + bridge. Rendering the conversation through the
    template instead would cut the reasoning out of attempt 1 where the template strips <think> from history (Qwen3),
    and re-tokenise what the policy sampled. So a marker is rendered in its place, and what follows it is the bridge."""
    marker = "FIRSTATTEMPTSTANDSHERE"
    turns = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": marker},
        {"role": "user", "content": config.prompts.self_correction},
    ]
    text = chat_text(tokenizer, config, turns)
    if text.count(marker) != 1:
        raise UserError("model.chat_template: does not render an earlier assistant turn exactly once")
    tail = text[text.index(marker) + len(marker) :]
    if config.prompts.self_correction.strip() not in tail:
        raise UserError("model.chat_template: does not render the user's second turn (prompts.self_correction)")
    bridge = tokenizer(tail, add_special_tokens=False)["input_ids"]
    train = config.train
    need = train.max_prompt_length_attempt1 + train.max_new_tokens_attempt1 + len(bridge)
    if need > train.max_prompt_length_attempt2:
        raise UserError(
            f"train.max_prompt_length_attempt2: {train.max_prompt_length_attempt2} cannot hold attempt 1's "
            f"prompt ({train.max_prompt_length_attempt1}) and completion ({train.max_new_tokens_attempt1}) "
            f"and the instruction ({len(bridge)} tokens); set it to {need} or more"
        )
    more = config.eval.attempts - 2  # attempts 3, 4, ... of an evaluation see all before them
    need += train.max_new_tokens_attempt2 + more * (train.max_new_tokens_attempt2 + len(bridge))
    if more and need > config.model.max_seq_length:
        raise UserError(
            f"eval.attempts: {config.eval.attempts} attempts can take {need} tokens, model.max_seq_length "
            f"is {config.model.max_seq_length}; raise that, or lower eval.attempts"
        )
    return bridge, "<think>" if tail.rstrip().endswith("<think>") else ""


# ---------------------------------------------------------------------------------------------------------- rollout


@dataclass
class Attempt:
    """One attempt at each of B rows. Lists, not padded tensors: a completion is its tokens up to and with EOS."""

    prompts: list[list[int]]
    completions: list[list[int]]
    texts: list[str]  # what rewards see: the completion decoded, EOS removed, tags kept
    answers: list[str]  # extracted from them, "" where there is none
    rewards: list[float]
    correct: list[bool]
    flexible: list[bool]  # correct if a lenient reader looks for the answer: for diagnosis, never a reward
    truncated: list[bool]  # the budget ended it, not EOS
    sampled_log_probs: list[list[float]] | None  # by the decoder, under softmax(logits / T)
    seconds: float


def roll_out(
    policy: Policy,
    examples: list[Example],
    config: Config,
    temperature: float,
    seed: str,
    attempts: int = 2,
    corrections: int = 1,
) -> list[Attempt]:
    """Samples the attempts at every example one after the other; returns [attempt 1, attempt 2, ...] with rewards.

    A later prompt holds the attempts before it verbatim, reasoning included. With `corrections` m a first attempt
    stands in m rows, one after the other, and is corrected in each anew. Raises RewardError.

    Several processes take a share of the examples each, and all return the whole."""
    rank, processes = PROCESSES.process_index, PROCESSES.num_processes
    first_row, end = (number * len(examples) // processes for number in (rank, rank + 1))
    examples, seed = examples[first_row:end], f"{seed}/process {rank}" if rank else seed
    with policy.decoder.conversation() if policy.decoder else nullcontext():
        prompts = [example.prompt for example in examples]
        made = [make_attempt(policy, prompts, examples, config, temperature, f"{seed}/1")]
        if corrections > 1:
            repeated = [row for row in range(len(examples)) for _ in range(corrections)]
            made, examples = [picked(made[0], repeated)], [examples[row] for row in repeated]
        for number in range(2, attempts + 1):
            prompts = [
                prompt + without_eos(completion, policy) + policy.bridge
                for prompt, completion in zip(made[-1].prompts, made[-1].completions, strict=True)
            ]
            made.append(make_attempt(policy, prompts, examples, config, temperature, f"{seed}/{number}", made))
    if processes > 1:
        made = [joined(parts, at_once=True) for parts in zip(*gather_object([made]), strict=True)]
    return made


def make_attempt(
    policy: Policy,
    prompts: list[list[int]],
    examples: list[Example],
    config: Config,
    temperature: float,
    seed: str,
    earlier: Sequence[Attempt] = (),
) -> Attempt:
    """Samples and grades one attempt at every example, after `earlier` ones. Raises RewardError."""
    start = time.perf_counter()
    budget = config.train.max_new_tokens_attempt2 if earlier else config.train.max_new_tokens_attempt1
    completions, log_probs = sample(policy, prompts, budget, temperature, seed)
    without_end = [without_eos(completion, policy) for completion in completions]
    texts = policy.tokenizer.batch_decode(without_end, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    texts = [policy.think_prefix + text for text in texts]
    seconds = time.perf_counter() - start
    targets, extract = [example.target for example in examples], ANSWER_EXTRACTORS[config.reward.answer_extractor]
    named = reward_arguments(policy, prompts, completions, texts, examples, config, earlier)
    rewards, correct = grade(texts, targets, config.reward, named)
    truncated = [len(written) == len(completion) for written, completion in zip(without_end, completions, strict=True)]
    answers, flexible = diagnose(texts, targets, truncated, extract)
    return Attempt(prompts, completions, texts, answers, rewards, correct, flexible, truncated, log_probs, seconds)


def sample(
    policy: Policy, prompts: list[list[int]], max_new_tokens: int, temperature: float, seed: str
) -> tuple[list[list[int]], list[list[float]] | None]:
    """Completions of `prompts` sampled from softmax(logits / temperature) over the whole vocabulary; 0 is greedy.

    Returns token ids a row, EOS included when reached, and their log-probs where the decoder gives them."""
    if not prompts:  # more processes than rows
        return [], [] if policy.decoder else None
    size = rows_that_fit(policy, max(map(len, prompts)) + max_new_tokens)
    if size < len(prompts) and policy.decoder:  # parts, if it comes to them, are prefilled whole
        policy.decoder.forget()
        size = rows_that_fit(policy, max(map(len, prompts)) + max_new_tokens)
    if size < len(prompts):
        parts = [
            sample(policy, prompts[i : i + size], max_new_tokens, temperature, f"{seed}/{i}")
            for i in range(0, len(prompts), size)
        ]
        completions, log_probs = zip(*parts, strict=True)
        return sum(completions, []), None if log_probs[0] is None else sum(log_probs, [])
    seed_number = random.Random(seed).getrandbits(31)
    if policy.engine or policy.decoder:
        generate = policy.engine or policy.decoder.generate
        return generate(prompts, max_new_tokens, temperature, seed_number)
    torch.manual_seed(seed_number)
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), policy.pad_token_id)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    sampled = dict(do_sample=True, temperature=temperature, top_k=0, top_p=1.0)
    with generating(policy):
        output = policy.model.generate(
            input_ids=ids.to(DEVICE),
            attention_mask=mask.to(DEVICE),
            max_new_tokens=max_new_tokens,
            eos_token_id=policy.eos_token_ids or -1,
            pad_token_id=policy.pad_token_id,
            **(sampled if temperature > 0 else dict(do_sample=False)),
        )
    return [until_eos(row, policy.eos_token_ids) for row in output[:, width:].tolist()], None


# ------------------------------------------------------------------------------------------------ rewards looked up


def grade(
    texts: list[str], targets: list[str], reward: RewardConfig, named: dict[str, list] | None = None
) -> tuple[list[float], list[bool]]:
    """Rewards: the weighted sum of reward.fn; correctness: by the extracted answers alone. `named`: `reward_arguments`.

    Without any target (a question that somebody asks, more processes than rows) there is nothing to grade by."""
    if not any(targets):
        return [0.0] * len(texts), [False] * len(texts)
    extract = ANSWER_EXTRACTORS[reward.answer_extractor]
    parts = [
        score(name, texts, targets, extract)
        if name in REWARD_FNS
        else score_by_name(name, find_reward(name, reward.module), texts, named or {})
        for name in reward.names
    ]
    rewards = weighted_sum(parts, reward.weights)
    return rewards, [is_correct(text, target, extract) for text, target in zip(texts, targets, strict=True)]


# -------------------------------------------------------------------------------------------------------- objective


def completion_log_probs(
    policy: Policy,
    prompts: list[list[int]],
    completions: list[list[int]],
    temperature: float,
    conversations: list[list[int]] | None = None,
) -> torch.Tensor:
    """log pi(token | all before it) of every completion token under softmax(logits / temperature).

    Returns float32 [N], the completions' tokens one after the other, N = sum of their lengths; the first token after
    the prompt and a final EOS are among them, the prompt is not. Each completion is a row of its own behind its prompt;
    or, with B `conversations`, it is read from row (number mod B), which begins with its prompt, so that all attempts
    of a conversation share one forward pass. Targets are the sampled tokens, whatever the row goes on with: what ended
    attempt 1 need not be what stands there in attempt 2's prompt.

    Rows go in right-padded: causal attention never looks ahead, so no pad is seen and no mask is needed (Unsloth drops
    masks in training mode: a left-padded row would be silently wrong)."""
    rows = conversations or [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
    ids = pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=policy.pad_token_id)
    model = policy.model.get_base_model()
    with autocast(policy):
        backbone = getattr(model, model.base_model_prefix)
        hidden = backbone(input_ids=ids.to(DEVICE), use_cache=False)[0]  # [B, L, H]
    before = [number % len(rows) * ids.shape[1] + len(prompt) - 1 for number, prompt in enumerate(prompts)]
    index = torch.cat([torch.arange(at, at + len(c)) for at, c in zip(before, completions, strict=True)])
    targets = torch.tensor([token for completion in completions for token in completion], device=DEVICE)
    weight = model.get_output_embeddings().weight
    hidden = hidden.flatten(0, 1)[index.to(DEVICE)].to(weight.dtype)  # [N, H]
    return LinearLogProb.apply(hidden, weight, targets, temperature)


K3_LINEAR_FROM = 10.0


def k3(log_probs: torch.Tensor, reference_log_probs: torch.Tensor) -> torch.Tensor:
    """Schulman's K3 estimate of KL(pi || pi_ref) a token, from samples of pi: exp(d) - d - 1, d = log pi_ref - log pi.

    >= 0, and 0 where the policies agree. Past d = 10 (a token 22,000 times likelier under the reference) the
    exponential goes on as its tangent: one such token would otherwise drown, or overflow, the whole step."""
    d = reference_log_probs - log_probs
    capped = d.clamp(max=K3_LINEAR_FROM)
    # expm1: near 0, exp(d) - 1 would keep less of float32 than the estimate has; what rounding leaves below 0 is 0
    return (capped.expm1() * (1 + (d - capped)) - capped).clamp(min=0)


def stage_terms(stage: int, r1: torch.Tensor, r2: torch.Tensor, train: TrainConfig) -> list[tuple[torch.Tensor, float]]:
    """What differs between the stages: for each attempt its return R [B] and its KL weight kappa.

    Stage I: attempt 1 earns nothing and is held by beta2. Stage II: attempt 2 earns r2 + alpha (r2 - r1)."""
    if stage == 1:
        return [(torch.zeros_like(r1), train.beta2), (r2, train.beta1)]
    return [(r1, train.beta1), (r2 + train.alpha * (r2 - r1), train.beta1)]


def terms_of(attempts: list[Attempt], stage: int, train: TrainConfig) -> list[tuple[torch.Tensor, float]]:
    """`stage_terms` of the rewards that the attempts have earned."""
    return stage_terms(stage, *(torch.tensor(attempt.rewards) for attempt in attempts[:2]), train)


def advantages(returns: torch.Tensor, train: TrainConfig, together: int | None = None) -> torch.Tensor:
    """Returns [B] minus a baseline that does not depend on the row's own sample (`batch` nearly so), so that the
    gradient keeps its direction and loses variance. `together` samples of one prompt (num_generations) stand one after
    the other and are compared with each other; where there is only 1, the whole batch is."""
    together = together or train.num_generations
    if train.baseline == "none":
        return returns
    if train.baseline == "batch":
        return returns - returns.mean()
    groups = returns.view(-1, together) if together > 1 else returns.view(1, -1)
    others = (groups.sum(1, keepdim=True) - groups) / (groups.shape[1] - 1)
    return (groups - others).view(-1)


def credits_of(terms: list[tuple[torch.Tensor, float]], train: TrainConfig, m: int) -> torch.Tensor:
    """The advantage of every attempt [attempts, B].

    With m > 1 corrections of a first attempt each is compared with the m - 1 others of the same one, all else being
    equal; a first attempt, which stands in m rows, is compared with other first attempts by its mean return."""

    def credit(returns: torch.Tensor, corrects: bool) -> torch.Tensor:
        if corrects and m > 1:
            return advantages(returns, train, m)
        return advantages(returns.view(-1, m).mean(1), train, train.num_generations // m).repeat_interleave(m)

    return torch.stack([credit(returns, corrects=number > 0) for number, (returns, _) in enumerate(terms)])


def with_signal(attempts: list[Attempt], stage: int, train: TrainConfig) -> tuple[list[Attempt], float]:
    """The rows to train on, and the share of problems without signal (dynamic sampling, DAPO).

    Where all rollouts of a problem earn alike, every advantage is 0 and only the KL terms would pull. One problem in
    `oversample` is trained, in the order of the batch; those without signal are the first to be left out."""
    terms, rows = terms_of(attempts, stage, train), train.num_generations
    credit = credits_of(terms, train, getattr(train, f"stage{stage}_corrections"))
    silent = credit.view(len(terms), -1, rows).abs().amax((0, 2)) < 1e-6  # [problems]
    kept = silent.int().argsort(stable=True)[: len(silent) // train.oversample].sort().values
    kept = [int(problem) * rows + row for problem in kept for row in range(rows)]
    return [picked(attempt, kept) for attempt in attempts], silent.float().mean().item()


def accumulate_gradients(
    policy: Policy,
    attempts: list[Attempt],
    terms: list[tuple[torch.Tensor, float]],
    train: TrainConfig,
    corrections: int = 1,
) -> list[dict[str, float]]:
    """Adds the gradient of

        sum over attempts of  mean over rows of  [ -A * sum_t log pi_t  +  kappa * sum_t k3_t ] / N

    to the parameters, a micro-batch of conversations at a time: attempt 2's row begins with attempt 1's, so one forward
    pass of the policy, one of the reference and one backward pass serve both. `terms` holds each attempt's returns [B]
    and kappa. A is the advantage, N the completion's own length (`sequence`) or the token budget (`constant`, Dr.
    GRPO). With `importance_clip` C, A is weighted a token by min(pi / sampler, C): truncated importance sampling, for
    a sampler whose probabilities are a little off. Returns each attempt's share of the loss and token statistics."""
    budgets, last = (train.max_new_tokens_attempt1, train.max_new_tokens_attempt2), attempts[-1]
    credits, tokens = credits_of(terms, train, corrections).tolist(), [0] * len(attempts)
    sums = torch.zeros(len(attempts), 3, device=DEVICE)  # loss, KL, drift: read once, at the end
    peaks = torch.zeros(len(attempts), device=DEVICE)
    for rows in micro_batches(last, policy.micro_tokens):
        prompts = [attempt.prompts[r] for attempt in attempts for r in rows]  # attempt by attempt
        completions = [attempt.completions[r] for attempt in attempts for r in rows]
        conversations = [last.prompts[r] + last.completions[r] for r in rows]
        batch = (policy, prompts, completions, train.generation_temperature, conversations)
        with torch.no_grad(), reference(policy):
            reference_log_probs = completion_log_probs(*batch)
        log_probs = completion_log_probs(*batch)  # [N]
        lengths = torch.tensor([len(completion) for completion in completions])
        norms = (
            lengths
            if train.length_norm == "sequence"
            else torch.tensor([budget for budget in budgets[: len(attempts)] for _ in rows])
        )
        weights = (
            torch.tensor([[credit[r], kappa] for credit, (_, kappa) in zip(credits, terms, strict=True) for r in rows])
            / (len(last.texts) * norms)[:, None]
        )
        credit, kappa = weights.repeat_interleave(lengths, 0).to(DEVICE).unbind(1)  # [N] each
        drift = torch.zeros_like(log_probs)
        if last.sampled_log_probs is not None:
            sampled = torch.tensor([p for a in attempts for r in rows for p in a.sampled_log_probs[r]], device=DEVICE)
            drift = log_probs.detach() - sampled
            if train.importance_clip:
                credit = credit * drift.exp().clamp(max=train.importance_clip)
        kl = k3(log_probs, reference_log_probs)
        loss = kappa * kl - credit * log_probs
        loss.sum().backward()
        counts = lengths.view(len(attempts), -1).sum(1).tolist()
        parts = zip(*(values.detach().split(counts) for values in (loss, kl, drift)), strict=True)
        for number, (loss, kl, drift) in enumerate(parts):
            sums[number] += torch.stack([loss.sum(), kl.sum(), drift.abs().sum()])
            tokens[number] += len(loss)
            peaks[number] = torch.maximum(peaks[number], kl.max())  # keeps a NaN
    return [
        dict(loss=loss, kl_sum=kl, drift_sum=drift, kl_max=peak, tokens=count)
        for (loss, kl, drift), peak, count in zip(sums.tolist(), peaks.tolist(), tokens, strict=True)
    ]


def improve(
    policy: Policy, optimizer: torch.optim.Optimizer, attempts: list[Attempt], stage: int, config: Config
) -> dict[str, Any]:
    """One REINFORCE step on a rolled-out batch. Returns loss, KL and gradient statistics; "skipped" is True, and the
    weights are untouched, if loss or gradient is not finite. On-policy, so there is no importance ratio but the one
    that `importance_clip` asks for. Attempts past those that `stage_terms` has terms for are not trained.

    An out-of-memory starts the update over with half the micro-batch: nothing of the step is lost."""
    train = config.train
    terms, corrections = terms_of(attempts, stage, train), getattr(train, f"stage{stage}_corrections")
    attempts = attempts[: len(terms)]
    while True:
        optimizer.zero_grad(set_to_none=True)
        try:
            stats = accumulate_gradients(policy, attempts, terms, train, corrections)
            break
        except torch.OutOfMemoryError:
            last = attempts[-1]
            longest = max(len(p) + len(c) for p, c in zip(last.prompts, last.completions, strict=True))
            if policy.micro_tokens >= longest:
                policy.micro_tokens //= 2
            elif policy.recompute:
                policy.for_training, policy.recompute = policy.recompute, None
                policy.for_training()
            else:
                raise RunError(
                    f"one row of {longest} tokens does not fit in this card's memory; lower "
                    "train.max_new_tokens_attempt2, or set model.gradient_checkpointing or "
                    "model.load_in_4bit"
                ) from None
        torch.cuda.empty_cache()
        say(f"Out of GPU memory: the update starts over with micro-batches of {policy.micro_tokens} tokens.")
    if PROCESSES.num_processes > 1:
        stats = sum_over_processes(policy, stats)
    norm = torch.nn.utils.clip_grad_norm_(policy.trainable.values(), train.max_grad_norm).item()
    loss = sum(s["loss"] for s in stats)
    skipped = not (math.isfinite(loss) and math.isfinite(norm))
    if not skipped:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    kl = [s["kl_sum"] / s["tokens"] for s in stats]
    drift = max(s["drift_sum"] / s["tokens"] for s in stats)
    return {
        "loss": loss,
        "grad_norm": norm,
        "skipped": skipped,
        "kl_attempt1": kl[0],
        "kl_attempt2": kl[1] if len(kl) > 1 else math.nan,
        "kl_max": max(s["kl_max"] for s in stats),
        "logprob_drift": drift if attempts[-1].sampled_log_probs is not None else None,
    }


# ---------------------------------------------------------------------------------------------------------- a stage


def learning_rate(step: int, steps: int, train: TrainConfig) -> float:
    """The rate of a stage's step, 1 to `steps`: a trapezoid. Linear warm-up over `warmup_steps`, then constant, and
    over the last share `lr_decay` of the stage linearly towards 0."""
    rise, fall = step / max(1, train.warmup_steps), (steps + 1 - step) / max(1.0, train.lr_decay * steps)
    return train.learning_rate * min(1.0, rise, fall)


def train_stage(
    policy: Policy,
    examples: list[Example],
    stage: int,
    config: Config,
    run: Run,
    checkpoint: Path | None,
    steps_before: int,
    validate: Callable[[int, int], None],
) -> None:
    """One stage: roll out, improve, write down. Stage I and II differ in `stage_terms` alone.

    `checkpoint` is a mid-stage one to go on from; `validate(stage, step)` is called after every one. Raises Interrupted
    after saving, RunError when train.max_skipped_steps steps in a row had a loss or gradient that is not finite."""
    train, seed = config.train, f"{config.train.seed}/stage{stage}"
    corrections = getattr(train, f"stage{stage}_corrections")
    firsts = train.num_generations // corrections  # of each problem
    batches = stage_batches(stage, len(examples), config)
    optimizer = torch.optim.AdamW(policy.trainable.values(), lr=train.learning_rate, weight_decay=0.0)
    done = checkpoint_place(checkpoint)[1] if checkpoint else 0
    if done:
        load_optimizer(policy, optimizer, checkpoint / "optimizer.safetensors")
    skipped_in_a_row, folder = 0, run.folder / f"stage{stage}"
    state = {"stage": stage, "wandb_id": run.wandb.id if run.wandb else None, "train_rows": fingerprint(examples)}
    bar = progress(range(done + 1, len(batches) + 1), f"Stage {'I' * stage}", initial=done, total=len(batches))
    for step in bar:
        rows = [examples[i] for i in batches[step - 1] for _ in range(firsts)]
        rate = learning_rate(step, len(batches), train)
        for group in optimizer.param_groups:
            group["lr"] = rate
        torch.manual_seed(random.Random(f"{seed}/{step}").getrandbits(31))  # LoRA dropout, and whatever else draws
        start = time.perf_counter()
        attempts = roll_out(
            policy, rows, config, train.generation_temperature, f"{seed}/{step}", corrections=corrections
        )
        rolled_out = time.perf_counter()
        rows = [row for row in rows for _ in range(corrections)]
        chosen, silent = with_signal(attempts, stage, train)
        update = improve(policy, optimizer, chosen, stage, config) | {"without_signal": silent, "learning_rate": rate}
        where = {"event": "train", "stage": stage, "step": step}
        event = where | {"global_step": steps_before + step} | rollout_means(attempts, corrections)
        event |= update | {
            "seconds_rollout": rolled_out - start,
            "seconds_update": time.perf_counter() - rolled_out,
            "peak_memory_gb": torch.cuda.max_memory_allocated() / 2**30 if DEVICE.type == "cuda" else None,
        }
        run.log(event, sample_rows(rows, attempts, where, most=None if update["skipped"] else 4))
        now = STEP_LINE.format(**event)
        bar.set_postfix_str(now)
        if bar.disable:  # a log file: a line a step
            say(f"Stage {'I' * stage} step {step}/{len(batches)}: {now}")
        if step == min(5, len(batches)):
            warn_of_budgets(run, stage, len(rows))
        skipped_in_a_row = skipped_in_a_row + 1 if update["skipped"] else 0
        if skipped_in_a_row >= train.max_skipped_steps:
            raise RunError(
                f"loss or gradient was not finite in {skipped_in_a_row} steps in a row (stage {stage}, step "
                f"{step}); their samples are in {run.folder}/samples.jsonl; lower train.learning_rate"
            )
        last, stop = step == len(batches), asked_to_stop()
        if not last and (stop or (train.checkpoint_every and step % train.checkpoint_every == 0)):
            here = folder / f"step_{step}"
            save_checkpoint(policy, here, state | {"step": step}, optimizer, model_card(config, run.evals(), here))
            prune_checkpoints(folder, config.output.keep_checkpoints)
            run.write_results()
            say(f"Saved {here} ({now})")
            if stop:
                PROCESSES.wait_for_everyone()  # a launcher ends the rest when one has gone
                raise Interrupted
            validate(stage, step)
    card = model_card(config, run.evals(), folder)
    save_checkpoint(policy, folder, state | {"step": len(batches), "finished": True}, None, card)


# ------------------------------------------------------------------------------------------------------- evaluation


def evaluate(policy: Policy, examples: list[Example], config: Config, checkpoint: str, votes: bool = True) -> tuple:
    """The paper's metrics on `examples`, greedily unless eval.generation_temperature says otherwise.

    Returns the eval event (dict) and one sample row an example (list). "acc" is the share of correct answers, not a
    mean reward. With eval.attempts above 2 also the accuracy of the later attempts, with `votes` and eval.samples
    above 1 also that of majority votes."""
    size, temperature = config.eval.batch_size, config.eval.generation_temperature
    start, batches = time.perf_counter(), []
    for i in progress(range(0, len(examples), size), f"evaluate {checkpoint}"):
        stop_if_asked()
        batches.append(
            roll_out(
                policy,
                examples[i : i + size],
                config,
                temperature,
                f"{config.train.seed}/eval/{i}",
                config.eval.attempts,
            )
        )
    attempts = [joined(parts) for parts in zip(*batches, strict=True)]
    first, second, n = attempts[0], attempts[1], len(examples)
    pairs = list(zip(first.correct, second.correct, strict=True))
    event = (
        {"event": "eval", "checkpoint": checkpoint, "n": n}
        | attempt_means(attempts)
        | {
            "edit_distance_ratio": sum(map(edit_distance_ratio, first.completions, second.completions)) / n,
        }
        | intervals(np.array(pairs, dtype=float))
    )
    if votes and config.eval.samples > 1:
        event |= vote(policy, examples, config)
    event["seconds"] = time.perf_counter() - start
    return event, sample_rows(examples, attempts, {"event": "eval", "checkpoint": checkpoint})


def attempt_means(attempts: list[Attempt]) -> dict[str, float]:
    """Mean reward, accuracy (strict and flexible), truncation and length of each attempt over its rows; shares of
    rows unanswered; and `correction_split` of the first two attempts."""
    means = {
        f"{name}_attempt{number}": sum(values) / len(values)
        for number, a in enumerate(attempts, 1)
        for name, values in (
            ("reward", a.rewards),
            ("acc", a.correct),
            ("flexible_acc", a.flexible),
            ("unanswered", [kind == "unanswered" for kind in outcomes(a.correct, a.answers)]),
            ("truncated", a.truncated),
            ("completion_tokens", [*map(len, a.completions)]),
        )
    }
    first, second = attempts[:2]
    return means | correction_split(first.correct, first.answers, second.correct, second.answers)


# ---------------------------------------------------------------------------------------------------------- the run


def train_and_evaluate(args: argparse.Namespace, config: Config) -> tuple[Run, Policy]:
    """The whole run: evaluate, Stage I, evaluate, Stage II, evaluate."""
    run, checkpoint = open_run(args, config)
    PROCESSES.wait_for_everyone()  # until all have read the folder
    tokenizer = load_tokenizer(config)
    train, test = load_examples(config, tokenizer)
    train, validation = hold_out(train, config.eval.validation, None if args.eval_only else args.resume_adapter)
    train = train[: args.smoke] if args.smoke else train
    test = test[: config.eval.max_examples]
    steps = {
        stage: 0 if args.eval_only else len(stage_batches(stage, len(train), config, stage >= args.start_stage))
        for stage in (1, 2)
    }
    state = json.loads((checkpoint / "state.json").read_text()) if checkpoint else {}
    if state.get("train_rows", "") not in ("", fingerprint(train)):
        raise UserError(
            f"--resume: {checkpoint} was trained on other rows or prompts of {config.dataset.name}; put "
            "them back, or start a new run with --set run_name=NAME"
        )
    adapter = checkpoint or (Path(args.resume_adapter) if args.resume_adapter else None)
    policy = load_policy(config, tokenizer, adapter)
    PROCESSES.wait_for_everyone()  # until all have loaded: now the folder may change
    enter_run(args, run, checkpoint)
    PROCESSES.wait_for_everyone()
    start_wandb(run, state.get("wandb_id"))
    say(
        f"{config.run_name}: {config.model.name} on {DEVICE.type}, {len(train)} train and {len(test)} test examples, "
        f"{steps[1] if args.start_stage == 1 else 0} + {steps[2]} steps, "
        f"{PROCESSES.num_processes} process{'es' * (PROCESSES.num_processes > 1)}, into {run.folder}"
    )

    def record(label: str, step: int, examples: list[Example] = test, **extra: Any) -> None:
        if {"adapter", "eval_only"} & extra.keys() or not run.has_evaluated(label):
            event, samples = evaluate(policy, examples, config, label, votes=examples is test)
            run.log(event | {"global_step": step} | extra, [row | extra for row in samples])

    def validate(stage: int, step: int) -> None:
        if validation and (step == steps[stage] or step % (config.train.checkpoint_every or steps[stage]) == 0):
            record(f"stage{stage}/step_{step}", steps[1] * (stage - 1) + step, validation, held_out="validation")

    if args.eval_only:
        stage = f"stage{checkpoint_place(adapter)[0]}" if adapter and (adapter / "state.json").exists() else "adapter"
        record(stage if adapter else "pretrain", 0, eval_only=True, adapter=str(adapter) if adapter else None)
    else:
        start_stage, done = checkpoint_place(checkpoint) if checkpoint else (args.start_stage, 0)
        with reference(policy):  # an adapter to start from is not the pretrained model
            record("pretrain", 0)
        if args.start_stage == 2 and not checkpoint:
            record("stage1", steps[1], adapter=args.resume_adapter)
            start = run.folder / "stage2" / "step_0"  # for --resume
            state = {"stage": 2, "step": 0, "train_rows": fingerprint(train)}
            save_checkpoint(policy, start, state, None, model_card(config, run.evals(), start))
        for stage in (1, 2):
            before, given = steps[1] * (stage - 1), checkpoint if stage == start_stage else None
            if stage >= start_stage and steps[stage] > (done if stage == start_stage else 0):
                if stage == start_stage or not steps[1]:  # else Stage I has ended with this one
                    validate(stage, done)
                train_stage(policy, train, stage, config, run, given, before, validate)
            if stage >= start_stage and steps[stage]:
                validate(stage, steps[stage])
                record(f"stage{stage}", before + steps[stage])
    return run, policy


# ========================================================================================== part two: the machinery

# ---------------------------------------------------------------------------------------------------- light imports

import copy
import difflib
import hashlib
import importlib
import importlib.metadata
import logging
import netrc
import os
import reprlib
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import fields
from functools import wraps
from types import SimpleNamespace
from urllib.parse import urlparse

import yaml
from pydantic import ValidationError

from reward_function import RewardError, majority, missing_arguments

# --------------------------------------------------------------------------------------------------------- messages


class UserError(Exception):
    """Something the user gave is wrong: one line that names it and the mend, exit code 2."""


class RunError(Exception):
    """The run cannot go on: one line that says why, exit code 1."""


QUIET = False  # --quiet
MAIN = os.environ.get("RANK", "0") == "0"  # of several processes, the one that prints and writes


def say(message: str, always: bool = False) -> None:
    """Prints one line without tearing a progress bar; with --quiet only what is said `always`."""
    if (QUIET and not always) or not MAIN:
        return
    bar = sys.modules.get("tqdm")
    (bar.tqdm.write if bar else print)(message, file=sys.stdout)
    sys.stdout.flush()


def on_main(function: Callable) -> Callable:
    """Decorator for what one process does for all: elsewhere the function does nothing."""
    return wraps(function)(lambda *args, **kwargs: function(*args, **kwargs) if MAIN else None)


# ----------------------------------------------------------------------------------------------------- command line


def parse_command_line(argv: list[str] | None = None) -> tuple[argparse.Namespace, Config]:
    """Reads flags and config. Raises UserError."""

    def refuse(message: str) -> None:
        raise UserError(f"{' '.join(message.split())} (--help lists the flags)")

    parser = argparse.ArgumentParser(description="SCoRe: two-stage RL for self-correction on one GPU.")
    parser.add_argument("--config", required=True, help="YAML file; configs/tiny.yaml explains every key")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY.SUB=VALUE", help="override keys")
    parser.add_argument("--smoke", type=int, metavar="N", help="train on N examples, evaluate at most N: a quick check")
    parser.add_argument("--start-stage", type=int, choices=(1, 2), default=1, help="2 skips Stage I")
    parser.add_argument("--resume-adapter", metavar="DIR", help="adapter to start from (needed by --start-stage 2)")
    parser.add_argument("--resume", action="store_true", help="continue this run from its newest complete checkpoint")
    parser.add_argument("--eval-only", action="store_true", help="evaluate the base model, or --resume-adapter")
    parser.add_argument("--overwrite", action="store_true", help="delete an earlier run of this name (or its Stage II)")
    parser.add_argument("--quiet", action="store_true", help="print the final table and errors only")
    parser.error = refuse  # argparse's own prints the usage too
    args = parser.parse_args(argv)
    config = read_config(args.config, args.set)
    if args.start_stage == 2 and not (args.resume_adapter or args.resume):
        raise UserError("--start-stage 2: needs --resume-adapter DIR, the Stage I adapter to start from")
    if args.resume_adapter and not (args.start_stage == 2 or args.eval_only):
        raise UserError("--resume-adapter: goes with --start-stage 2 or --eval-only; --resume continues a run")
    if args.resume and args.eval_only:
        raise UserError("--resume: continues a run, --eval-only trains nothing; give one of them")
    if args.resume and args.overwrite:
        raise UserError("--overwrite: deletes what --resume would continue; give one of them")
    if args.smoke is not None:
        if args.smoke < 4:
            raise UserError(f"--smoke {args.smoke}: needs at least 4 examples, for two steps of two")
        config = shrink_for_smoke(config, args.smoke)
    if args.resume_adapter:
        check_adapter(Path(args.resume_adapter), config)
    return args, config


def read_config(path: str, overrides: list[str] = ()) -> Config:
    """Reads a YAML file, applies `key.sub=value` overrides and validates the result. Raises UserError."""
    try:
        raw = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    except Exception as error:  # yaml has more than its own: 2025-13-13 is a ValueError, !!bool maybe a KeyError
        raise UserError(f"--config {path}: not valid YAML: {' '.join(str(error).split())[:300]}") from None
    if not isinstance(raw, dict):
        what = "empty" if raw is None else type(raw).__name__
        raise UserError(f"--config {path}: must be a mapping of keys to values, and is {what}")
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not all(key.split(".")):
            raise UserError(f"--set {override!r}: must read key.sub=value")
        try:
            value = yaml.safe_load(text)
        except Exception:
            raise UserError(f"--set {override!r}: the value is not valid YAML") from None
        *parents, name = key.split(".")
        node = raw
        for part in parents:
            node = node.setdefault(part, {}) if isinstance(node, dict) else None
        if not isinstance(node, dict):
            raise UserError(f"--set {override!r}: {'.'.join(parents)!r} is not a section")
        node[name] = value
    return check_config(raw)


def check_config(raw: dict[str, Any]) -> Config:
    """Validates a whole config.

    Raises UserError that lists every fault at once, one a line: also those between keys, which are looked for with
    the faulty keys put back to their defaults (or to any text, where there is none)."""
    lines, config, patched, reset = [], None, copy.deepcopy(raw), set()
    for _ in range(4):  # a patch can bring up another fault: a section that was no mapping now lacks its keys
        try:
            config = Config.model_validate(patched)
            break
        except ValidationError as error:
            lines = lines or fault_lines(error)
            for fault in error.errors():
                patch_key(patched, list(map(str, fault["loc"])), missing=fault["type"] == "missing")
                reset.add(fault["loc"][-1])
    # A fault between keys of which one was put back is not the user's.
    lines += [line for line in (budget_faults(config) if config else []) if reset.isdisjoint(re.findall(r"\w+", line))]
    if lines:
        raise UserError("\n".join(lines))
    return config


def fault_lines(error: ValidationError) -> list[str]:
    """One line a fault: the key, the bad value, what would be right."""
    lines = []
    for fault in error.errors():
        key = ".".join(str(part) if str(part).isprintable() else repr(part) for part in fault["loc"])
        value = f" (got {reprlib.repr(fault['input'])})" if not isinstance(fault["input"], dict) else ""
        if fault["type"] == "extra_forbidden":
            name = str(fault["loc"][-1])
            home = [other for other in known_keys() if other.split(".")[-1] == name]
            siblings = [other for other in known_keys() if other.rpartition(".")[0] == key.rpartition(".")[0]]
            mend = f"; it belongs to {home[0]}" if home else did_you_mean(key, siblings or known_keys())
            lines.append(f"{key}: unknown key{mend}")
        elif fault["type"] == "missing":
            lines.append(f"{key}: required, and not given")
        else:
            message = fault["msg"].removeprefix("Value error, ")
            choices = (fault.get("ctx") or {}).get("expected", "").split("'")[1::2]
            close = did_you_mean(reprlib.repr(fault["input"]).strip("'"), choices)
            lines.append(f"{key}: {message[0].lower() + message[1:]}{value}{close}")
    return list(dict.fromkeys(lines))


def budget_faults(config: Config) -> list[str]:
    """Faults between keys: token budgets that cannot hold, a baseline without company, a split without its test."""
    train, faults = config.train, []
    attempt2 = train.max_prompt_length_attempt1 + train.max_new_tokens_attempt1 + 1
    if train.max_prompt_length_attempt2 < attempt2:
        faults.append(
            f"train.max_prompt_length_attempt2: {train.max_prompt_length_attempt2} cannot hold attempt 1's prompt and "
            f"completion and the instruction (max_prompt_length_attempt1 {train.max_prompt_length_attempt1} + "
            f"max_new_tokens_attempt1 {train.max_new_tokens_attempt1} + the instruction); raise it above {attempt2}"
        )
    longest = train.max_prompt_length_attempt2 + train.max_new_tokens_attempt2
    if config.model.max_seq_length < longest:
        faults.append(
            f"model.max_seq_length: {config.model.max_seq_length} cannot hold train.max_prompt_length_attempt2 "
            f"{train.max_prompt_length_attempt2} + train.max_new_tokens_attempt2 {train.max_new_tokens_attempt2}; "
            f"set it to {longest} or more"
        )
    for stage in (1, 2):
        problems, m = (getattr(train, f"stage{stage}_{key}") for key in ("batch_size", "corrections"))
        if train.num_generations % m:
            faults.append(
                f"train.stage{stage}_corrections: {m} does not divide train.num_generations, which is "
                f"{train.num_generations}"
            )
        elif train.baseline != "none" and train.num_generations // m * problems == 1:
            faults.append(
                f"train.stage{stage}_batch_size: baseline {train.baseline} needs at least 2 first attempts a step; "
                "raise the batch or num_generations, or set train.baseline to none"
            )
    if train.oversample > 1 and (train.baseline != "leave_one_out" or train.num_generations == 1):
        faults.append(
            f"train.oversample: {train.oversample} needs rollouts of one problem to compare; raise "
            "train.num_generations and set train.baseline to leave_one_out, or set it to 1"
        )
    if config.model.fast_inference and config.model.decoder != "auto":
        faults.append(f"model.decoder: {config.model.decoder} leaves nothing to model.fast_inference; set it to auto")
    for section in ("train", "eval") if config.model.fast_inference else ():
        heat = getattr(config, section).generation_temperature
        if heat and not 0.01 <= heat <= 2:
            faults.append(f"{section}.generation_temperature: vLLM takes 0.01 to 2 and 0 (greedy), and it is {heat}")
    if config.dataset.split and config.dataset.test_split_size is None:
        faults.append("dataset.test_split_size: required with dataset.split: how many of its rows to hold out for test")
    return faults


def patch_key(tree: dict[str, Any], path: list[str], missing: bool) -> None:
    """Removes the faulty value at `path`, or gives a missing required key a stand-in."""
    *parents, name = path
    for part in parents:
        if not isinstance(tree.get(part), dict):  # the fault lies inside a list: drop the whole of it
            tree.pop(part, None)
            return
        tree = tree[part]
    if missing:
        tree[name] = {} if name in Config.model_fields and name != "run_name" else "missing"
    else:
        tree.pop(name, None)


def known_keys(section: type[BaseModel] = Config, prefix: str = "") -> list[str]:
    """Every dotted key of the schema, sections included, for suggestions."""
    keys = []
    for name, info in section.model_fields.items():
        nested = isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel)
        keys += [prefix + name, *(known_keys(info.annotation, f"{prefix}{name}.") if nested else [])]
    return keys


def did_you_mean(word: str, words: Any) -> str:
    close = difflib.get_close_matches(word, list(words), n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""


def not_registered(name: str, known: dict[str, Callable]) -> str:
    mend = did_you_mean(name, known) or "; one of your own comes from a file that reward.module names"
    return f"is not registered; registered are {', '.join(sorted(known))}{mend}"


def reward_fault(name: str, module: str | None) -> str | None:
    """Why `name` can be no reward function, so far as it shows without importing a package, which would cost seconds
    and has to wait for Unsloth's import."""
    own = vars(load_reward_module(Path(module))) if module else {}
    if name in REWARD_FNS or callable(own.get(name)):
        return None
    if name in own:
        return f"is no function in {module}"
    package, dot, _ = name.partition(".")
    if not dot or not all(part.isidentifier() for part in name.split(".")):
        return not_registered(name, REWARD_FNS)
    if importlib.util.find_spec(package):
        return None
    return f"cannot be imported: there is no package {package}; a function in a file of your own: reward.module"


def load_reward_module(file: Path) -> Any:
    """The module of a Python file of rewards and extractors, run once. Raises ValueError with a one-line reason."""
    name = "rewards_of_" + re.sub(r"\W", "_", str(file.resolve()))
    if name in sys.modules:
        return sys.modules[name]
    if file.suffix != ".py" or not file.is_file():
        raise ValueError("must be a .py file that exists")
    spec = importlib.util.spec_from_file_location(name, file)
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the user's file raises
        del sys.modules[name]
        raise ValueError(f"cannot be run: {type(error).__name__}: {' '.join(str(error).split())[:200]}") from None
    return module


def shrink_for_smoke(config: Config, examples: int) -> Config:
    """Two optimizer steps a stage on a handful of examples (more where they fill more batches), with a mid-stage
    checkpoint: every code path, quickly."""
    config = config.model_copy(deep=True)
    config.run_name += "-smoke"
    batch = max(2, examples // 2 // config.train.oversample)
    for stage in (1, 2):
        setattr(config.train, f"stage{stage}_batch_size", min(batch, getattr(config.train, f"stage{stage}_batch_size")))
        if getattr(config.train, f"stage{stage}_epochs") > 0:
            setattr(config.train, f"stage{stage}_epochs", 1)
    config.train.checkpoint_every = 1
    config.eval.max_examples = min(examples, config.eval.max_examples or examples)
    config.eval.validation = min(examples, config.eval.validation)
    return config


def check_adapter(folder: Path, config: Config) -> None:
    """Refuses, before any model is loaded, an adapter that does not fit the config. Raises UserError."""
    try:
        saved = json.loads((folder / "adapter_config.json").read_text())
    except OSError:
        raise UserError(
            f"--resume-adapter {folder}: no adapter_config.json there; give a folder such as outputs/NAME/stage1"
        ) from None
    except ValueError:
        raise UserError(f"--resume-adapter {folder}: adapter_config.json is not valid JSON") from None
    base, wanted, lora = str(saved.get("base_model_name_or_path")), config.model.name, config.model.lora
    if Path(base).exists() and Path(wanted).exists() and Path(base).samefile(wanted):
        base = wanted
    for key, theirs, ours in (
        ("name", base, wanted),
        ("lora.r", saved.get("r"), lora.r),
        ("lora.alpha", saved.get("lora_alpha"), lora.alpha),
        ("lora.target_modules", sorted(saved.get("target_modules") or []), sorted(set(lora.target_modules))),
    ):
        if theirs != ours:
            raise UserError(f"--resume-adapter {folder}: trained with model.{key} {theirs}, the config says {ours}")
    for key in ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern"):
        if saved.get(key):
            raise UserError(f"--resume-adapter {folder}: trained with {key}, which this trainer does not do")


if __name__ == "__main__":  # a fault in the config costs a second, not the minute that the imports below may take
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until main() there is nothing to save
    try:
        ARGS, CONFIG = parse_command_line()
    except UserError as error:
        if MAIN:
            print(error, file=sys.stderr)
        sys.exit(2)


# ---------------------------------------------------------------------------------------------------- heavy imports

# Here, so that a wrong key costs a second, not the minute of these imports. Part one needs them only when it is called.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # else it tells of every kernel
os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)  # torchao's import warns of a coming change there
logging.getLogger("bitsandbytes.backends.cpu").setLevel(logging.ERROR)  # of 4-bit kernels

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

# Unsloth runs on these accelerators, and wants to be imported before transformers and peft. Elsewhere the same code
# runs on transformers + PEFT: load_policy decides, nothing after it asks.
DEVICE = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
DEVICE = torch.device("cpu") if DEVICE is None or DEVICE.type not in ("cuda", "xpu") else DEVICE
BANNERS = tempfile.TemporaryFile("w+", encoding="utf-8")  # what Unsloth prints; vLLM wants a real file  # noqa: SIM115
if DEVICE.type != "cpu":
    with redirect_stdout(BANNERS):
        import unsloth  # noqa: F401

import datasets
import huggingface_hub
import transformers
from accelerate import PartialState
from accelerate.utils import gather_object, reduce
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils.integrations import dequantize_module_weight
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tqdm import tqdm

try:
    import triton
    import triton.language as tl
except ImportError:  # a CPU-only installation
    triton = None

# Started with accelerate launch or torchrun there are several processes, a device each: they share out the rows of
# every batch, roll_out gathers the attempts, improve sums the gradients, so all stay equal. Alone this is one of one.
PROCESSES = PartialState(cpu=DEVICE.type == "cpu")

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
datasets.disable_progress_bars()
datasets.utils.logging.set_verbosity(logging.CRITICAL)  # it logs an error before raising it


# ---------------------------------------------------------------------------------------------------------- loading


def load_tokenizer(config: Config) -> Any:
    """The tokenizer with its chat template. Raises UserError."""
    name = config.model.name
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=config.model.trust_remote_code)
    except Exception as error:  # a wrong name, no network, or a damaged file: each library has its own class for it
        place = name if os.path.isdir(name) else f"{name} (no folder here, so a hub id)"
        raise UserError(f"model.name: no tokenizer at {place}: {first_line(error)}") from None
    if template := config.model.chat_template:
        try:
            tokenizer.chat_template = template if "{" in template else Path(template).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or first_line(error)
            raise UserError(f"model.chat_template: no Jinja template, and no file: {template!r}: {reason}") from None
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # what transformers makes up where there are no files
        raise UserError(f"model.name: {name} has no tokenizer (tokenizer.json)")
    if not tokenizer.chat_template:
        raise UserError(f"model.name: {name} has no chat template; set model.chat_template to one or pick a chat model")
    return tokenizer


@contextmanager
def generating(policy: Policy) -> Iterator[None]:
    """Context for model.generate: inference mode on, and back to training mode however it ends."""
    policy.for_generation()
    try:
        with torch.no_grad(), autocast(policy):
            yield
    finally:
        policy.for_training()


def autocast(policy: Policy) -> Any:
    """bf16 arithmetic on the accelerator (LoRA weights are kept in float32), plain float32 on the CPU."""
    dtype = policy.model.get_input_embeddings().weight.dtype
    mixed = DEVICE.type != "cpu" and dtype != torch.float32
    return torch.autocast(DEVICE.type, dtype=dtype) if mixed else nullcontext()


def choose_sampler(policy: Policy, config: Config, longest: int) -> None:
    """vLLM if asked for, else the built-in decoder where it serves, else model.generate. `longest` is a row's tokens.

    Raises UserError where the config asks for what cannot be."""
    model, name = policy.model, config.model.name
    if config.model.fast_inference:
        if not hasattr(model, "vllm_engine"):
            raise UserError(f"model.fast_inference: Unsloth has no vLLM engine for {name}; set it to false")
        settings = getattr(getattr(model.vllm_engine, "llm_engine", None), "model_config", None)
        longest = config.model.max_seq_length if config.eval.attempts > 2 else longest
        held = getattr(settings, "max_model_len", longest)  # Unsloth lowers it where the K/V cache is small
        if held < longest:
            raise UserError(
                f"model.fast_inference_gpu_mem: {config.model.fast_inference_gpu_mem} of the free memory "
                f"holds rows of {held} tokens, and {longest} are needed; raise it"
            )
        policy.engine = partial(engine_samples, model, policy.eos_token_ids)
        return
    reason = "model.decoder is generate" if config.model.decoder == "generate" else why_not_decodable(model)
    if not reason:
        policy.decoder = Decoder(model, policy.eos_token_ids, policy.pad_token_id)
        return
    if config.model.decoder == "graph":
        raise UserError(f"model.decoder: graph cannot serve {name}: {reason}; use auto or generate")
    if config.train.importance_clip:
        raise UserError(
            f"train.importance_clip: needs the sampler's log-probs, which model.generate does not give "
            f"({reason}); set it to null"
        )
    say(f"Rollouts use model.generate: {reason}.")


def check_log_prob_route(policy: Policy) -> None:
    """Some architectures scale or cap their logits after the head; those would be trained on wrong log-probs. Refuse.

    Compares the fused route with the model's own logits on one short row. Raises UserError."""
    if type(policy.model.get_base_model().get_output_embeddings()) is not torch.nn.Linear:
        raise UserError("model.lora.target_modules: the output head cannot be adapted; leave lm_head out")
    row = [i % len(policy.tokenizer) for i in range(5, 17)]
    with torch.no_grad(), reference(policy):  # the adapter's dropout would differ between the two
        fused = completion_log_probs(policy, [row[:1]], [row[1:]], 1.0)
        with autocast(policy):
            logits = policy.model(input_ids=torch.tensor([row], device=DEVICE)).logits[0, :-1].float()
        plain = logits.log_softmax(-1).gather(-1, torch.tensor(row[1:], device=DEVICE)[:, None])[:, 0]
    if not torch.allclose(fused, plain, atol=1e-3 if DEVICE.type == "cpu" else 0.1):
        raise UserError(
            f"model.name: {policy.model.config.model_type} changes its logits after the output head "
            "(scaling or soft cap), which this trainer does not do"
        )


ENOUGH_TOKENS = 8192  # a micro-batch of as many keeps a card busy: more would take memory, and no less time


def keep_activations_if_they_fit(policy: Policy, for_training: Callable, longest: int) -> None:
    """Gradient checkpointing `auto`: computing activations twice costs time, so it is off where half of the free memory
    holds those of a micro-batch of ENOUGH_TOKENS (and of one row of `longest`).

    What a token's activations take is measured on one row. `improve` switches it on again rather than give up."""
    recompute, policy.for_training = policy.for_training, partial(for_training, use_gradient_checkpointing=False)
    policy.for_training()
    if DEVICE.type != "cuda":
        return
    row = [i % len(policy.tokenizer) for i in range(min(1024, longest))]
    before = torch.cuda.memory_allocated()
    kept = completion_log_probs(policy, [row[:1]], [row[1:]], 1.0)
    a_token = (torch.cuda.memory_allocated() - before) / len(row)
    del kept
    fits = int((torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - before) / 2 / a_token)
    if fits < max(longest, min(ENOUGH_TOKENS, policy.micro_tokens)):
        policy.for_training = recompute
        recompute()
    else:
        policy.recompute, policy.micro_tokens = recompute, min(policy.micro_tokens, max(longest, ENOUGH_TOKENS))


def eos_ids(model: Any, tokenizer: Any, name: str) -> list[int]:
    """Every token that ends an answer: those of the generation config, of the model config and of the tokenizer."""
    saved = None
    with suppress(Exception):  # no generation_config.json; one that vLLM's way of loading has left out
        saved = transformers.GenerationConfig.from_pretrained(name).eos_token_id
    loaded = getattr(model.generation_config, "eos_token_id", None)
    named = (saved, loaded, model.config.eos_token_id, tokenizer.eos_token_id)
    ids = [i for ids in named if ids is not None for i in (ids if isinstance(ids, list) else [ids])]
    if not ids:
        raise UserError("model.name: neither the model nor its tokenizer names an EOS token")
    return list(dict.fromkeys(ids))


def load_adapter(model: Any, folder: Path) -> None:
    """Copies saved LoRA weights into `model`. Raises UserError when names or shapes differ, or the file is damaged."""
    saved = read_weights(folder / "adapter_model.safetensors")
    ours = get_peft_model_state_dict(model, save_embedding_layers=False)
    shapes = lambda weights: {name: tuple(tensor.shape) for name, tensor in weights.items()}  # noqa: E731
    if shapes(saved) != shapes(ours):
        odd = sorted(set(shapes(saved).items()) ^ set(shapes(ours).items()))[0]
        raise UserError(f"--resume-adapter {folder}: is of another base model: {odd[0]} {odd[1]} does not match")
    set_peft_model_state_dict(model, saved)


def read_weights(file: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{file}: cannot be read: {first_line(error)}; give another adapter or, to --resume from the "
            "checkpoint before it, delete the state.json beside it"
        ) from None


def first_line(error: BaseException) -> str:
    line = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip()
    return line[:300] + "; model.trust_remote_code: true would run it" * ("trust_remote_code" in str(error))


# ---------------------------------------------------------------------------------------------------- chat template


def example_turns(prompts: PromptsConfig) -> list[dict[str, str]]:
    return [
        {"role": role, "content": text}
        for example in prompts.examples
        for role, text in (("user", example.input), ("assistant", example.output))
    ]


def chat_text(tokenizer: Any, config: Config, turns: list[dict[str, str]]) -> str:
    """The chat template's text of system prompt + worked examples + `turns`, open for the assistant to write.

    The examples stand there verbatim, also where the template cuts the reasoning out of earlier turns: it renders a
    marker in the place of each of their texts. Raises UserError."""
    system = [{"role": "system", "content": config.prompts.system}] if config.prompts.system else []
    worked = example_turns(config.prompts)
    texts = {f"WORKEDEXAMPLETURN{number}STANDSHERE": turn["content"] for number, turn in enumerate(worked)}
    marked = [turn | {"content": marker} for turn, marker in zip(worked, texts, strict=True)]
    try:
        text = tokenizer.apply_chat_template(
            system + marked + turns, tokenize=False, add_generation_prompt=True, **config.model.chat_template_kwargs
        )
    except Exception as error:  # templates raise what they like
        key = "prompts.system" if system and "system" in str(error).lower() else "model.chat_template"
        raise UserError(f"{key}: the chat template of {config.model.name} refuses it: {first_line(error)}") from None
    if any(text.count(marker) != 1 for marker in texts):
        raise UserError(
            f"prompts.examples: the chat template of {config.model.name} does not render each of their "
            "turns exactly once; show the examples inside prompts.system instead"
        )
    return re.sub("|".join(texts), lambda marker: texts[marker[0]], text) if texts else text


# ------------------------------------------------------------------------------------------------------------- rows


def load_splits(wanted: DatasetConfig) -> dict[str, Any]:
    """The dataset's splits by name, from a file, a folder (of files, or one written by save_to_disk) or the hub."""
    folders = (os.path.join(wanted.name, sub) for sub in (wanted.config_name, "data") if sub)  # a clone has one
    place = path = Path(next(filter(os.path.isdir, folders), wanted.name))
    readers = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
    try:
        if path.is_dir() and any((path / name).exists() for name in ("dataset_dict.json", "state.json")):
            loaded = datasets.load_from_disk(str(path))
        elif path.is_file() and path.suffix in readers:
            loaded = datasets.load_dataset(readers[path.suffix], data_files={"train": str(path)})
        elif path.is_dir():
            loaded = {}
            for suffix, reader in readers.items():
                for file in sorted(path.glob(f"*{suffix}")):
                    split = file.stem.split("-")[0]  # the hub's parquet files are called train-00000-of-00001
                    if suffix != ".json" or split in ("train", "test", wanted.split):
                        loaded.setdefault(split, (reader, []))[1].append(str(file))
            for split, (reader, files) in loaded.items():
                place = ", ".join(files)
                loaded[split] = datasets.load_dataset(reader, data_files=files, split="train")
        else:
            loaded = datasets.load_dataset(wanted.name, wanted.config_name, revision=wanted.revision)
    except Exception as error:  # one class a library, a network and a file format
        cause = error.__cause__ or error
        reason = "it is empty" if isinstance(cause, StopIteration) else first_line(cause)
        raise UserError(f"dataset.name: cannot load {place}: {reason}") from None
    if not loaded:
        raise UserError(f"dataset.name: {path} holds no train/test .jsonl, .parquet, .csv files")
    return dict(loaded) if isinstance(loaded, dict) else {"train": loaded}


def read_rows(rows: Any, split: str, config: Config) -> list[tuple[str, str, dict[str, Any]]]:
    """(question, target, columns for rewards) of each row. Raises UserError that names the column or the row."""
    wanted, extract = config.dataset, ANSWER_EXTRACTORS[config.reward.answer_extractor]
    for key in ("input_field", "target_field"):
        column = getattr(wanted, key)
        if column not in rows.column_names:
            raise UserError(
                f"dataset.{key}: no column {column!r} in {wanted.name} ({split}); it has "
                f"{', '.join(rows.column_names)}{did_you_mean(column, rows.column_names)}"
            )
    pairs, kept, faults = [], [], []
    for number, (question, target) in enumerate(zip(rows[wanted.input_field], rows[wanted.target_field], strict=True)):
        if isinstance(target, (int, float)) and not isinstance(target, bool):
            target = str(target)
        if fault := row_fault(question, target, extract, f"row {number} of {split} in {wanted.name}", config):
            if not wanted.skip_faulty_rows:
                raise UserError(f"{fault}, or leave such rows out with dataset.skip_faulty_rows=true")
            faults.append(fault)
        else:
            pairs.append((question, target))
            kept.append(number)
    if faults:
        say(f"Warning: {len(faults)} of {len(rows)} {split} rows are faulty and left out; the first: {faults[0]}.")
        rows = rows.select(kept)
    if not pairs:
        raise UserError(f"dataset.name: {wanted.name} has no {split} rows")
    columns = reward_columns(rows, [target for _, target in pairs], split, config)
    return [(*pair, named) for pair, named in zip(pairs, columns, strict=True)]


def row_fault(question: Any, target: Any, extract: Callable, row: str, config: Config) -> str | None:
    """What is wrong with a row, called `row`, and the mend; None if nothing is."""
    for key, text in (("input_field", question), ("target_field", target)):
        if not isinstance(text, str):
            what = "null" if text is None else f"a {type(text).__name__}"
            return f"dataset.{key}: {row} is {what}, not text; mend or remove the row"
        if not text.strip():
            return f"dataset.{key}: {row} is empty; mend or remove the row"
    if not is_correct(target, target, extract):
        return (
            f"dataset.target_field: {row}: {config.reward.answer_extractor} finds no answer in {target[-60:]!r}; "
            "mend the row or choose another reward.answer_extractor"
        )
    return None


def reward_columns(rows: Any, targets: list[str], split: str, config: Config) -> list[dict[str, Any]]:
    """What rewards in TRL's form get of each row by name: its columns, `target_answer`, and either of them by another
    name as reward.columns says; nothing where there is no such reward. Raises UserError."""
    reward, known = config.reward, [*rows.column_names, "target_answer"]
    if not reward.unregistered:
        return [{}] * len(rows)
    for argument, column in reward.columns.items():
        if column not in known:
            raise UserError(
                f"reward.columns.{argument}: no column {column!r} in {config.dataset.name} ({split}); it "
                f"has {', '.join(known)}{did_you_mean(column, known)}"
            )
    given = [*known, *reward.columns, "prompts", "completions", "completion_ids"]
    for name in reward.unregistered:
        if missing := missing_arguments(find_reward(name, reward.module), given):
            raise UserError(
                f"reward.fn: {name} asks for {', '.join(missing)}, and is given {', '.join(given)}; say "
                f"which of them it is, as in reward.columns.{missing[0]}=target_answer"
            )
    extract = ANSWER_EXTRACTORS[reward.answer_extractor]
    named = ({"target_answer": extract(target)} | row for target, row in zip(targets, rows, strict=True))
    return [row | {argument: row[column] for argument, column in reward.columns.items()} for row in named]


def find_reward(name: str, module: str | None) -> Callable:
    """The function in TRL's form that is called `name` in reward.module, or has it as import path. Raises UserError."""
    package, _, attribute = name.rpartition(".")
    try:
        fn = getattr(importlib.import_module(package) if package else load_reward_module(Path(module)), attribute)
    except Exception as error:  # whatever the package raises
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"reward.fn: {name} cannot be imported: {reason}") from None
    if not callable(fn):
        raise UserError(f"reward.fn: {name} is no function")
    return fn


def reward_arguments(
    policy: Policy,
    prompts: list[list[int]],
    completions: list[list[int]],
    texts: list[str],
    examples: list[Example],
    config: Config,
    earlier: Sequence[Attempt],
) -> dict[str, list]:
    """By name, a list over rows each: what TRL gives to its reward functions. {} where no reward is of that form."""
    if not config.reward.unregistered or not examples:
        return {}
    columns = {name: [example.columns.get(name) for example in examples] for name in examples[0].columns}
    if config.reward.completions == "text":
        shown = policy.tokenizer.batch_decode(prompts, clean_up_tokenization_spaces=False)
        return columns | {"prompts": shown, "completions": texts, "completion_ids": completions}
    message = lambda role, content: [{"role": role, "content": content}] if content else []  # noqa: E731
    opening = message("system", config.prompts.system) + example_turns(config.prompts)
    chats = [opening + message("user", example.question) for example in examples]
    for attempt in earlier:
        chats = [
            chat + message("assistant", text) + message("user", config.prompts.self_correction)
            for chat, text in zip(chats, attempt.texts, strict=True)
        ]
    answers = [[{"role": "assistant", "content": text}] for text in texts]
    return columns | {"prompts": chats, "completions": answers, "completion_ids": completions}


def hold_out(examples: list[Example], count: int, adapter: str | None = None) -> tuple[list[Example], list[Example]]:
    """The examples to train on and `count` others for validation: chosen by the hash of the question, so that neither
    the seed nor the order matters and a question is on one side. Warns of an `adapter` that has seen other rows."""
    if count >= len(examples):
        raise UserError(f"eval.validation: {count} leaves nothing of {len(examples)} train examples; lower it")
    by_hash = lambda i: hashlib.sha256(examples[i].question.encode(errors="replace")).digest()  # noqa: E731
    chosen = sorted(sorted(range(len(examples)), key=by_hash)[:count])
    asked = {examples[i].question for i in chosen}
    kept = [example for example in examples if example.question not in asked]
    if count and adapter:
        with suppress(OSError, ValueError, AttributeError):
            if json.loads((Path(adapter) / "state.json").read_text()).get("train_rows") == fingerprint(kept):
                adapter = None
    if count and adapter:
        say(f"Warning: {adapter} was not trained on just these train rows; it may have seen the eval.validation ones.")
    return kept, [examples[i] for i in chosen]


def fingerprint(examples: list[Example]) -> str:
    """Changes with any prompt, target or their order: a resumed run goes on with the rows it began with."""
    return hashlib.sha256(json.dumps([[e.prompt, e.target] for e in examples]).encode()).hexdigest()[:16]


def shuffled_batches(count: int, batch_size: int, epochs: float, seed: str) -> list[list[int]]:
    """Index batches of a whole stage: a seeded shuffle each epoch, leftovers (under a batch) left out of it.

    A function of its arguments alone, so a resumed run finds its place by step number."""
    per_epoch = count // batch_size
    batches = []
    for epoch in range(math.ceil(epochs)):
        order = list(range(count))
        random.Random(f"{seed}/{epoch}").shuffle(order)
        batches += [order[i * batch_size : (i + 1) * batch_size] for i in range(per_epoch)]
    return batches[: round(epochs * per_epoch)]


def stage_batches(stage: int, examples: int, config: Config, runs: bool = True) -> list[list[int]]:
    """The index batches of a stage. Raises UserError, if it runs, when there are not examples enough for one."""
    size, epochs = (getattr(config.train, f"stage{stage}_{key}") for key in ("batch_size", "epochs"))
    more = f" x oversample {config.train.oversample}" * (config.train.oversample > 1)
    if runs and epochs > 0 and examples < size * config.train.oversample:
        raise UserError(
            f"train.stage{stage}_batch_size: {size}{more} is more than the {examples} train examples; lower it"
        )
    size *= config.train.oversample
    batches = shuffled_batches(examples, size, epochs, f"{config.train.seed}/stage{stage}")
    if runs and epochs > 0 and not batches:
        raise UserError(
            f"train.stage{stage}_epochs: {epochs} of {examples} examples is less than one step of {size}; "
            "raise it, or set 0 to skip the stage"
        )
    return batches


# --------------------------------------------------------------------------------------------------------- sampling


def rows_that_fit(policy: Policy, slots: int) -> int:
    """How many rows of `slots` tokens decode together: their K/V cache and logits may take half of the free memory."""
    if DEVICE.type != "cuda" or policy.engine:  # which queues what does not fit
        return 2**31
    config = policy.model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    row = 4 * config.num_hidden_layers * kv_heads * head_dim * slots + 8 * config.vocab_size  # bf16 K, V; f32 logits
    free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return max(1, int(free / 2 / row))


def engine_samples(
    model: Any, eos_token_ids: list[int], prompts: list[list[int]], max_new_tokens: int, temperature: float, seed: int
) -> tuple[list[list[int]], list[list[float]]]:
    """`sample` by Unsloth's vLLM engine, with the LoRA weights of this moment (none inside `reference`).

    Token ids and log-probs are the engine's own: nothing is decoded and encoded again. No EOS: none ends a row. Each
    row has a seed of its own, or rollouts of one prompt would be the same."""
    from vllm import SamplingParams

    live = not any(getattr(module, "disable_adapters", None) is True for module in model.modules())
    folder = os.path.join(tempfile.gettempdir(), f"score-lora-{os.getpid()}")  # for the adapter's settings
    how = [
        SamplingParams(
            temperature=temperature,
            top_p=1.0,
            top_k=-1,
            min_p=0.0,
            repetition_penalty=1.0,
            seed=(seed + row) % 2**31,
            max_tokens=max_new_tokens,
            stop_token_ids=eos_token_ids,
            ignore_eos=not eos_token_ids,
            logprobs=0,
            detokenize=False,
        )
        for row in range(len(prompts))
    ]
    answers = model.fast_generate(
        [{"prompt_token_ids": prompt} for prompt in prompts],
        sampling_params=how,
        use_tqdm=False,
        lora_request=model.load_lora(folder, load_tensors=True) if live else None,
    )
    rows = [answer.outputs[0] for answer in answers]
    log_probs = [
        [found[token].logprob for token, found in zip(row.token_ids, row.logprobs, strict=True)] for row in rows
    ]
    return [list(row.token_ids) for row in rows], log_probs


def picked(attempt: Attempt, rows: Sequence[int]) -> Attempt:
    """Some rows of an attempt, or one row several times."""
    columns = ((f.name, getattr(attempt, f.name)) for f in fields(Attempt))
    return Attempt(**{name: [c[row] for row in rows] if isinstance(c, list) else c for name, c in columns})


def joined(batches: Sequence[Attempt], at_once: bool = False) -> Attempt:
    """The rows of several batches of one attempt, in order, sampled one after the other or by processes at once."""
    columns = {f.name: [getattr(batch, f.name) for batch in batches] for f in fields(Attempt)}
    seconds, log_probs = (max if at_once else sum)(columns.pop("seconds")), columns.pop("sampled_log_probs")
    rows = {name: [row for part in parts for row in part] for name, parts in columns.items()}
    return Attempt(**rows, sampled_log_probs=None if None in log_probs else sum(log_probs, []), seconds=seconds)


def until_eos(tokens: list[int], eos_token_ids: list[int]) -> list[int]:
    """The tokens up to and with the first EOS."""
    return tokens[: next((i + 1 for i, token in enumerate(tokens) if token in eos_token_ids), len(tokens))]


def without_eos(completion: list[int], policy: Policy) -> list[int]:
    return completion[:-1] if completion[-1] in policy.eos_token_ids else completion


# ------------------------------------------------------------------------------------------------- log-probs kernel


def head_logits(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Logits in float32 from hidden [N, H] and the output embedding [V, H]: bf16 would round a logit of 20 by 0.06."""
    if hidden.is_cuda and hidden.dtype != torch.float32:
        return torch.mm(hidden, weight.T, out_dtype=torch.float32)
    return (hidden @ weight.T).float()


class LinearLogProb(torch.autograd.Function):
    """log softmax(h W^T / T)[target] for N tokens, in chunks, never holding [N, V].

    W is frozen, so the gradient with respect to h, (W[target] - softmax W) / T, is known in the forward pass: it is
    kept ([N, H]) and backward is one multiplication. Two matrix products a token instead of the three of a
    checkpointed head, no filtering of small probabilities, softmax in float32 on every device."""

    CHUNK_BYTES = 2**28

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, temperature: float):
        log_probs = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        direction = torch.empty_like(hidden) if hidden.requires_grad else None
        rows = max(1, LinearLogProb.CHUNK_BYTES // (4 * weight.shape[0]))
        for start in range(0, len(targets), rows):
            chunk = slice(start, start + rows)
            logits = head_logits(hidden[chunk], weight)  # [rows, V]
            log_p = (logits / temperature if temperature != 1 else logits).log_softmax(1)
            log_probs[chunk] = log_p.gather(1, targets[chunk, None])[:, 0]
            if direction is not None:
                # softmax - onehot in float32 first: where the target is nearly sure, bf16 would lose the difference
                away = log_p.exp_().scatter_add_(1, targets[chunk, None], -torch.ones_like(log_p[:, :1]))
                direction[chunk] = (away.to(weight.dtype) @ weight) / -temperature
        ctx.save_for_backward(direction)
        return log_probs

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor):
        (direction,) = ctx.saved_tensors
        return gradient[:, None].to(direction.dtype) * direction, None, None, None


# ---------------------------------------------------------------------------------------------------------- decoder

# Decoder. model.generate() launches some thousand kernels a token, one by one; here a token step is about ten kernels a
# layer, captured once as a CUDA graph and replayed. Prompts are right-padded, so a token's position is its cache slot:
# causal attention never sees a pad, and a decoded token attends to slots 0..position of its row and to nothing else.
# Kernels find the K/V cache through an offset held in device memory, so graphs outlive the cache, which each rollout
# allocates at its own size and frees before the update. Attempt 2 goes on from attempt 1's K/V: only the bridge is new.
if triton is not None:

    @triton.jit
    def _add_norm_kernel(
        h, y, b, weight, x, eps, SIZE: tl.constexpr, WIDTH: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr
    ):
        """One row: h += y[:SIZE] + y[SIZE:] @ b (not when WIDTH, the length of y's rows, is 0); x = RMSNorm(h)."""
        row = tl.program_id(0).to(tl.int64)
        c = tl.arange(0, BLOCK)
        ok = c < SIZE
        dtype = h.dtype.element_ty
        v = tl.load(h + row * SIZE + c, mask=ok, other=0.0).to(tl.float32)
        if WIDTH > 0:
            d = tl.load(y + row * WIDTH + c, mask=ok, other=0.0).to(tl.float32)
            for r0 in range(0, R, 8):
                for r1 in tl.static_range(8):
                    xa = tl.load(y + row * WIDTH + SIZE + r0 + r1).to(tl.float32)
                    d += xa * tl.load(b + (r0 + r1) * SIZE + c, mask=ok, other=0.0).to(tl.float32)
            v = (v + d.to(dtype).to(tl.float32)).to(dtype).to(tl.float32)
            tl.store(h + row * SIZE + c, v.to(dtype), mask=ok)
        v *= tl.rsqrt(tl.sum(v * v, 0) / SIZE + eps)
        w = tl.load(weight + c, mask=ok, other=0.0).to(tl.float32)
        tl.store(x + row * SIZE + c, (v.to(dtype).to(tl.float32) * w).to(dtype), mask=ok)

    @triton.jit
    def _lora_tile(y, b, n, ok_n, c, ok_c, part, OUT: tl.constexpr, WIDTH: tl.constexpr, R: tl.constexpr):
        """Rows n, columns c of y[:, :OUT] + y[:, OUT:] @ b in float32; b is block-diagonal, c lies in block `part`."""
        v = tl.load(y + n[:, None] * WIDTH + c[None, :], mask=ok_n[:, None] & ok_c[None, :], other=0.0).to(tl.float32)
        if R > 0:
            r = part * R + tl.arange(0, R)
            xa = tl.load(y + n[:, None] * WIDTH + OUT + r[None, :], mask=ok_n[:, None], other=0.0)
            block = tl.load(b + r[:, None] * OUT + c[None, :], mask=ok_c[None, :], other=0.0)
            v += tl.dot(xa, block, input_precision="ieee")
        return v.to(y.dtype.element_ty).to(tl.float32)

    @triton.jit(do_not_specialize=["tokens", "layer"])
    def _rope_cache_kernel(
        y,
        b,
        q_norm,
        k_norm,
        cos,
        sin,
        rows,
        pos,
        q,
        anchor,
        control,
        tokens,
        layer,
        eps,
        H: tl.constexpr,
        KV: tl.constexpr,
        D: tl.constexpr,
        R: tl.constexpr,
        NORM: tl.constexpr,
        M: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        """M tokens of one head of q|k|v: add LoRA; normalize and rotate q and k; q goes out, k and v to the cache."""
        n = tl.program_id(0).to(tl.int64) * M + tl.arange(0, M)
        ok_n = n < tokens
        head = tl.program_id(1)
        part = (head >= H).to(tl.int32) + (head >= H + KV).to(tl.int32)  # 0: q, 1: k, 2: v
        HALF: tl.constexpr = D // 2
        OUT: tl.constexpr = (H + 2 * KV) * D
        i = tl.arange(0, BLOCK)
        ok_i = i < HALF
        ok = ok_n[:, None] & ok_i[None, :]
        dtype = y.dtype.element_ty
        lo = _lora_tile(y, b, n, ok_n, head * D + i, ok_i, part, OUT, OUT + 3 * R, R)
        hi = _lora_tile(y, b, n, ok_n, head * D + HALF + i, ok_i, part, OUT, OUT + 3 * R, R)
        slot = tl.load(pos + n, mask=ok_n, other=0)
        if part < 2:
            if NORM:
                scale = tl.rsqrt((tl.sum(lo * lo, 1) + tl.sum(hi * hi, 1)) / D + eps)[:, None]
                w_lo = tl.where(part == 0, tl.load(q_norm + i, mask=ok_i), tl.load(k_norm + i, mask=ok_i))
                w_hi = tl.where(part == 0, tl.load(q_norm + HALF + i, mask=ok_i), tl.load(k_norm + HALF + i, mask=ok_i))
                lo = ((lo * scale).to(dtype).to(tl.float32) * w_lo.to(tl.float32)[None, :]).to(dtype).to(tl.float32)
                hi = ((hi * scale).to(dtype).to(tl.float32) * w_hi.to(tl.float32)[None, :]).to(dtype).to(tl.float32)
            angle = slot[:, None] * HALF + i[None, :]
            co = tl.load(cos + angle, mask=ok, other=0.0).to(tl.float32)
            si = tl.load(sin + angle, mask=ok, other=0.0).to(tl.float32)
            lo, hi = lo * co - hi * si, hi * co + lo * si
        if part == 0:
            to = q + (n[:, None] * (H * D) + head * D + i[None, :])
        else:
            at = (layer * 2 + part - 1) * tl.load(control + 1) + tl.load(rows + n, mask=ok_n, other=0)
            at = ((at * KV + (head - H - (part - 1) * KV)) * tl.load(control + 2) + slot) * D
            to = anchor + (tl.multiple_of(tl.load(control), 16) + at[:, None] + i[None, :])
        tl.store(to, lo.to(dtype), mask=ok)
        tl.store(to + HALF, hi.to(dtype), mask=ok)

    @triton.jit(do_not_specialize=["layer"])
    def _attend_kernel(
        q,
        anchor,
        control,
        rows,
        pos,
        o,
        part,
        layer,
        scale,
        KV: tl.constexpr,
        GROUP: tl.constexpr,
        G: tl.constexpr,
        D: tl.constexpr,
        BLOCK_D: tl.constexpr,
        BLOCK: tl.constexpr,
        SPLITS: tl.constexpr,
    ):
        """One token's GROUP query heads of one K/V head over slots 0..pos of its cache row, or one of SPLITS parts."""
        row, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
        g, d = tl.arange(0, G), tl.arange(0, BLOCK_D)
        ok_d = d < D
        ok_q = (g < GROUP)[:, None] & ok_d[None, :]
        at = ((row * KV + head) * GROUP + g)[:, None] * D + d[None, :]
        query = tl.load(q + at, mask=ok_q, other=0.0)
        held, slots, cell = tl.load(control + 1), tl.load(control + 2), tl.load(rows + row)
        k = anchor + tl.multiple_of(tl.load(control), 16) + ((layer * 2 * held + cell) * KV + head) * slots * D
        v = k + held * KV * slots * D
        length = tl.load(pos + row).to(tl.int32) + 1
        span = tl.cdiv(tl.cdiv(length, SPLITS), BLOCK) * BLOCK
        start = split * span
        stop = tl.minimum(start + span, length)
        top = tl.full([G], float("-inf"), tl.float32)
        total = tl.zeros([G], tl.float32)
        acc = tl.zeros([G, BLOCK_D], tl.float32)
        for s0 in range(start, stop, BLOCK):
            s = s0 + tl.arange(0, BLOCK)
            ok = s < stop
            keys = tl.load(k + s[None, :] * D + d[:, None], mask=ok[None, :] & ok_d[:, None], other=0.0)
            w = tl.dot(query, keys, input_precision="ieee") * (scale * 1.44269504)  # log2(e): exp2 is the fast one
            w = tl.where(ok[None, :], w, float("-inf"))
            higher = tl.maximum(top, tl.max(w, 1))
            p = tl.exp2(w - higher[:, None])
            decay = tl.exp2(top - higher)
            values = tl.load(v + s[:, None] * D + d[None, :], mask=ok[:, None] & ok_d[None, :], other=0.0)
            acc = acc * decay[:, None] + tl.dot(p.to(values.dtype), values, input_precision="ieee")
            total = total * decay + tl.sum(p, 1)
            top = higher
        if SPLITS == 1:
            tl.store(o + at, (acc / total[:, None]).to(o.dtype.element_ty), mask=ok_q)
        else:  # part: [rows, heads, SPLITS, D + 2], float32
            to = (((row * KV + head) * GROUP + g) * SPLITS + split) * (D + 2)
            tl.store(part + to[:, None] + d[None, :], acc, mask=ok_q)
            tl.store(part + to + D, top, mask=g < GROUP)
            tl.store(part + to + D + 1, total, mask=g < GROUP)

    @triton.jit
    def _combine_kernel(part, o, D: tl.constexpr, BLOCK_D: tl.constexpr, SPLITS: tl.constexpr):
        """Join the SPLITS parts of one row's head; part 0 is never empty."""
        head = tl.program_id(0)
        d, s = tl.arange(0, BLOCK_D), tl.arange(0, SPLITS)
        ok = d < D
        at = part + (head * SPLITS + s) * (D + 2)
        top = tl.load(at + D)
        w = tl.exp2(top - tl.max(top, 0))
        acc = tl.load(at[:, None] + d[None, :], mask=ok[None, :], other=0.0)
        out = tl.sum(acc * w[:, None], 0) / tl.sum(tl.load(at + D + 1) * w, 0)
        tl.store(o + head * D + d, out.to(o.dtype.element_ty), mask=ok)

    @triton.jit(do_not_specialize=["tokens"])
    def _silu_mul_kernel(y, b, x, tokens, SIZE: tl.constexpr, R: tl.constexpr, M: tl.constexpr, BLOCK: tl.constexpr):
        """A tile of M tokens: SiLU(gate) * up, each with its LoRA added."""
        n = tl.program_id(0).to(tl.int64) * M + tl.arange(0, M)
        c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        ok_n, ok_c = n < tokens, c < SIZE
        gate = _lora_tile(y, b, n, ok_n, c, ok_c, 0, 2 * SIZE, 2 * SIZE + 2 * R, R)
        up = _lora_tile(y, b, n, ok_n, SIZE + c, ok_c, 1, 2 * SIZE, 2 * SIZE + 2 * R, R)
        dtype = y.dtype.element_ty
        act = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32)
        tl.store(x + n[:, None] * SIZE + c[None, :], (act * up).to(dtype), mask=ok_n[:, None] & ok_c[None, :])

    @triton.jit
    def _sample_kernel(
        logits, control, heat, ids_of_rows, count, best, where, top, total, VOCAB: tl.constexpr, BLOCK: tl.constexpr
    ):
        """A block of one row's vocabulary: the maximum of z + Gumbel noise, z = logits / T, and logsumexp(z) in parts.

        The noise is -log(E), E exponential, keyed by (seed, row, token count, column): it does not depend on the batch
        around the row. E is -log(1 - u) with u on a grid of 2^-31 near 0, where E decides who wins: probabilities are
        exact to about 5e-10 a token, and no token can gain more than 22 nats.
        """
        row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
        c = block * BLOCK + tl.arange(0, BLOCK)
        z = tl.load(logits + row * VOCAB + c, mask=c < VOCAB, other=float("-inf")).to(tl.float32) * tl.load(heat)
        quad = block * (BLOCK // 4) + tl.arange(0, BLOCK // 4)  # Philox gives four numbers at a time
        r0, r1, r2, r3 = tl.philox(
            tl.load(control + 4),
            quad,
            quad * 0 + tl.load(ids_of_rows + row).to(tl.int32),
            quad * 0 + tl.load(count + row).to(tl.int32),
            quad * 0,
        )
        bits = tl.reshape(tl.join(tl.join(r0, r1), tl.join(r2, r3)), (BLOCK,))
        u = tl.minimum(((bits >> 1).to(tl.float32) + 0.5) * 4.656612873e-10, 0.99999994)
        e = tl.where(u < 0.01, u * (1.0 + u * (0.5 + u * 0.33333334)), -tl.log(1.0 - u))
        value, index = tl.max(z - tl.load(heat + 1) * tl.log(e), 0, return_indices=True)
        peak = tl.max(z, 0)
        to = row * tl.num_programs(1) + block
        tl.store(best + to, value)
        tl.store(where + to, block * BLOCK + index)
        tl.store(top + to, peak)
        tl.store(total + to, tl.sum(tl.exp(z - peak), 0))

    @triton.jit
    def _advance_kernel(
        logits,
        control,
        heat,
        best,
        where,
        top,
        total,
        eos,
        state,
        tokens,
        logps,
        lengths,
        pad,
        CAP: tl.constexpr,
        WIDTH: tl.constexpr,
        VOCAB: tl.constexpr,
        BLOCKS: tl.constexpr,
        BLOCK: tl.constexpr,
        EOS: tl.constexpr,
    ):
        """One row: pick the winning block's token, record it and its log-prob, and move the row's state on."""
        row = tl.program_id(0).to(tl.int64)
        c = tl.arange(0, BLOCK)
        ok = c < BLOCKS
        value = tl.load(best + row * BLOCKS + c, mask=ok, other=float("-inf"))
        token = tl.load(where + row * BLOCKS + tl.argmax(value, 0)).to(tl.int64)
        peaks = tl.load(top + row * BLOCKS + c, mask=ok, other=float("-inf"))
        peak = tl.max(peaks, 0)
        sums = tl.load(total + row * BLOCKS + c, mask=ok, other=0.0)
        z = tl.load(logits + row * VOCAB + token).to(tl.float32) * tl.load(heat)
        logp = z - peak - tl.log(tl.sum(sums * tl.exp(peaks - peak), 0))
        pos, count = tl.load(state + CAP + row), tl.load(state + 2 * CAP + row)
        done, prompt = tl.load(state + 3 * CAP + row), tl.load(state + 4 * CAP + row)
        alive = done == 0
        tl.store(tokens + prompt * WIDTH + count, token, mask=alive)
        tl.store(logps + prompt * WIDTH + count, logp, mask=alive)
        tl.store(lengths + prompt, count + 1, mask=alive)
        ended = (count + 1 >= tl.load(control + 3)).to(tl.int64)
        for e in tl.static_range(EOS):
            ended |= (token == tl.load(eos + e)).to(tl.int64)
        tl.store(state + row, tl.where(alive, token, pad))
        tl.store(state + CAP + row, tl.where(alive, pos + 1, pos))
        tl.store(state + 2 * CAP + row, tl.where(alive, count + 1, count))
        tl.store(state + 3 * CAP + row, tl.where(alive, ended, done))


def causal_lm(model: torch.nn.Module) -> torch.nn.Module:
    """The causal language model inside a PEFT model, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _projections(layer: torch.nn.Module) -> list[torch.nn.Module]:
    """The seven linear maps of a decoder layer, each bare or wrapped by PEFT."""
    attn, mlp = layer.self_attn, layer.mlp
    return [attn.q_proj, attn.k_proj, attn.v_proj, attn.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj]


def why_not_decodable(model: torch.nn.Module) -> str | None:
    """None if Decoder serves this model, else the plain reason why model.generate() must be used."""
    base = causal_lm(model)
    config, name = base.config, type(base).__name__
    devices = {p.device for p in base.parameters()}
    if name not in ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"):
        return f"the architecture {name} is not Llama, Mistral, Qwen2 or Qwen3"
    if triton is None and DEVICE.type != "cpu":
        return "Triton is not installed"
    if len(devices) > 1 or next(iter(devices)).type not in ("cpu", "cuda"):
        return f"the model is on {', '.join(sorted(map(str, devices)))}; one CUDA device or the CPU is needed"
    if getattr(config, "sliding_window", None) or "sliding_attention" in (getattr(config, "layer_types", None) or ()):
        return "the model uses sliding-window attention"
    if any(getattr(config, k, None) for k in ("attn_logit_softcapping", "final_logit_softcapping", "logit_scale")):
        return "the model caps or scales its logits"
    if config.hidden_act != "silu":
        return f"the activation is {config.hidden_act}, not silu"
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kind = rope.get("rope_type", rope.get("type")) or "default"
    if kind not in ("default", "linear", "llama3", "yarn") or rope.get("partial_rotary_factor", 1.0) != 1.0:
        return f"the rotary embedding is of type {kind} with {rope}"
    if type(base.lm_head) is not torch.nn.Linear or type(base.model.embed_tokens) is not torch.nn.Embedding:
        return "the embedding or the output head is wrapped (by LoRA, modules_to_save or quantization)"
    for module in (m for layer in base.model.layers for m in _projections(layer)):
        inner = getattr(module, "base_layer", module)
        if type(inner) is not torch.nn.Linear and type(inner).__name__ != "Linear4bit":
            return f"a projection is a {type(inner).__name__}, not a Linear or Linear4bit"
        if type(inner) is torch.nn.Linear and inner.weight.dtype != base.model.embed_tokens.weight.dtype:
            return "the embedding and the projections differ in dtype"
        if inner is not module and not hasattr(module, "lora_A"):
            return f"the adapter layer {type(module).__name__} is not LoRA"
        if getattr(module, "lora_variant", None) or any(getattr(module, "lora_bias", {}).values()):
            return "the adapter is a LoRA variant (DoRA, a LoRA bias, ...)"
        if inner is not module and sum(a in module.lora_A for a in module.active_adapters) > 1:
            return "several adapters are active at once"
    return None


class FusedLinear:
    """Projections of one input (q/k/v, gate/up, o, down) as one product [W; A] x: outputs, then every LoRA's A x.

    What comes after it adds (A x) B, with B block-diagonal and scaled. Dense base weights move into the buffer that
    also holds A, and each module's weight becomes a view of its rows: training reads the same memory, nothing is
    stored twice. Quantized base layers run by themselves, and only A is a buffer.
    """

    def __init__(self, modules: list[torch.nn.Module], dtype: torch.dtype):
        self.modules = modules
        self.bases = [getattr(m, "base_layer", m) for m in modules]
        self.sizes = [base.out_features for base in self.bases]
        self.out, wide = sum(self.sizes), self.bases[0].in_features
        ranks = [a.weight.shape[0] for m in modules for a in getattr(m, "lora_A", {}).values()]
        self.rank = max(16, 1 << (max(ranks) - 1).bit_length()) if ranks else 0  # padded with zeros: tl.dot wants >= 16
        self.dense = all(type(base) is torch.nn.Linear for base in self.bases)
        device, extra = self.bases[0].weight.device, self.rank * len(modules)
        held = torch.zeros(self.out * self.dense + extra, wide, dtype=dtype, device=device)
        self.weight, self.a = held, held[self.out * self.dense :]
        self.b = torch.zeros(extra, self.out, dtype=dtype, device=device)
        biased = self.dense and any(base.bias is not None for base in self.bases)
        self.bias = torch.zeros(self.out + extra, dtype=dtype, device=device) if biased else None
        self.reload()

    def reload(self) -> None:
        """Copy the LoRA weights as they are now (zeros where adapters are off), cast to the compute dtype.

        Raises ValueError if an adapter has grown past the rank this was built for."""
        self.b.zero_()
        start = 0
        for i, (module, base, size) in enumerate(zip(self.modules, self.bases, self.sizes, strict=True)):
            stop, at = start + size, i * self.rank
            if self.dense and base.weight.data_ptr() != self.weight[start:stop].data_ptr():
                self.weight[start:stop] = base.weight  # at the first call, and when something replaced the weight
                base.weight.data = self.weight[start:stop]
            if self.bias is not None and base.bias is not None:
                self.bias[start:stop] = base.bias
            live = [] if getattr(module, "disable_adapters", True) or module.merged else module.active_adapters
            for name in (name for name in live if name in module.lora_A):
                a, b = module.lora_A[name].weight, module.lora_B[name].weight
                if len(a) > self.rank:
                    raise ValueError(f"LoRA rank {len(a)} is above the decoder's {self.rank}: build a new Decoder")
                self.a[at : at + len(a)] = a
                torch.mul(b.t(), module.scaling[name], out=self.b[at : at + len(a), start:stop])
            start = stop

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [N, in] -> [N, out + LoRA columns]."""
        if self.dense:
            return F.linear(x, self.weight, self.bias)
        return torch.cat([base(x) for base in self.bases] + [F.linear(x, self.a)] * (self.rank > 0), -1)

    def add_lora(self, y: torch.Tensor) -> torch.Tensor:
        """y [N, out + LoRA columns] -> [N, out], in plain torch."""
        return torch.addmm(y[:, : self.out], y[:, self.out :], self.b) if self.rank else y


def _rows_for_graph(rows: int) -> int:
    """The batch size whose graph decodes `rows` rows: 8, 16, 32, 64, 96, 128, 192, 256, 384, ..."""
    size = max(8, 1 << (rows - 1).bit_length())
    return size * 3 // 4 if size >= 128 and rows <= size * 3 // 4 else size


class Decoder:
    """Samples from a causal language model with its own parameters, LoRA active and unmerged; see the comment above.

    On CUDA a token step is a graph of Triton kernels; on a CPU the same step runs in torch operations.
    """

    compact = True  # drop ended rows from the batch
    continues = True  # inside conversation(), go on from the K/V of the generate() before
    keeps = False  # leave the K/V to the next generate()
    burst = 8  # graph replays between two looks at which rows have ended
    splits: int | None = None  # programs that share one row's attention; None: enough to fill the card
    prompt_tokens = 8192  # prompt tokens in one forward pass, pads included

    def __init__(self, model: torch.nn.Module, eos_token_ids: list[int], pad_token_id: int):
        """Raises ValueError with why_not_decodable()'s reason. Re-points the base weights (see FusedLinear)."""
        if reason := why_not_decodable(model):
            raise ValueError(f"cannot decode with this model: {reason}")
        base = causal_lm(model)
        config, self.backbone, self.head = base.config, base.model, base.lm_head
        self.embedding, self.pad = base.model.embed_tokens.weight, pad_token_id
        self.device, self.dtype, self.eps = self.embedding.device, self.embedding.dtype, config.rms_norm_eps
        self.heads, self.kv = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // self.heads
        with torch.inference_mode(False), torch.no_grad():  # a weight that is an inference tensor could not train
            self.layers = [self._fuse(layer) for layer in base.model.layers]
        self.kernels = triton is not None and self.device.type == "cuda"
        self.graphed = self.kernels
        gpu = torch.cuda.get_device_properties(self.device) if self.graphed else None
        self.processors, self.stages = (gpu.multi_processor_count, 2 if gpu.major >= 8 else 1) if gpu else (1, 1)
        self.eos = torch.tensor(eos_token_ids or [-1], device=self.device)
        self.release()

    def _fuse(self, layer: torch.nn.Module) -> SimpleNamespace:
        """What a token step reads of one decoder layer."""
        q, k, v, o, gate, up, down = _projections(layer)
        norms = [getattr(layer.self_attn, name, None) for name in ("q_norm", "k_norm")]
        return SimpleNamespace(
            before=layer.input_layernorm.weight,
            after=layer.post_attention_layernorm.weight,
            norms=[norm.weight for norm in norms if norm is not None],
            qkv=FusedLinear([q, k, v], self.dtype),
            o=FusedLinear([o], self.dtype),
            gate_up=FusedLinear([gate, up], self.dtype),
            down=FusedLinear([down], self.dtype),
        )

    def release(self) -> None:
        """Drop graphs and buffers; the next generate() makes them again. K/V outlives it in conversation() alone."""
        self.graphs, self.pool, self.cache, self.state, self.kept = {}, None, None, None, None

    @contextmanager
    def conversation(self) -> Iterator[None]:
        """Inside, prompts that each extend the one before them and its completion are prefilled from there on.

        The weights must not change inside."""
        self.keeps = self.continues
        try:
            yield
        finally:
            self.forget()

    def forget(self) -> None:
        """Free the K/V that is kept, and keep none for the rest of the conversation."""
        self.keeps, self.kept = False, None

    @torch.inference_mode(False)
    @torch.no_grad()
    def generate(
        self, prompts: list[list[int]], max_new_tokens: int, temperature: float, seed: int
    ) -> tuple[list[list[int]], list[list[float]]]:
        """Sample one completion of at most max_new_tokens for each prompt from softmax(logits / temperature).

        Temperature 0 is greedy. Returns the completions' token ids, EOS included where it was reached, and the
        log-prob of each under that distribution (greedy: temperature 1). The same seed gives the same samples.
        Raises ValueError for an empty prompt, a negative temperature or no tokens to make."""
        if temperature < 0 or max_new_tokens < 1 or not all(prompts):
            raise ValueError("generate() needs prompts that are not empty, max_new_tokens >= 1 and temperature >= 0")
        if not prompts:
            return [], []
        for layer in self.layers:
            for linear in (layer.qkv, layer.o, layer.gate_up, layer.down):
                linear.reload()
        try:
            rows = self._start(prompts, max_new_tokens, temperature, seed)
            self._continue(rows, max_new_tokens, max(map(len, prompts)))
            lengths = self.lengths[: len(prompts)].tolist()
            tokens, logps = (t[: len(prompts), :max_new_tokens].tolist() for t in (self.tokens, self.logps))
            tokens, logps = ([row[:n] for row, n in zip(t, lengths, strict=True)] for t in (tokens, logps))
            if self.keeps:  # by prompt: the cache row and the tokens whose K/V it holds, which the last's is not among
                held = [prompt + row[:-1] for prompt, row in zip(prompts, tokens, strict=True)]
                self.kept = self.cache, self.state[4, :rows].argsort(), held
        finally:
            self.cache = None
        return tokens, logps

    def _start(self, prompts: list[list[int]], max_new_tokens: int, temperature: float, seed: int) -> int:
        """Prefill and the first token of each row. Returns the batch size, spare rows of the graph's size included."""
        kept, self.kept = self._kept_for(prompts), None
        copies: dict[tuple, list[int]] = {}  # equal prompts are prefilled once
        for i, prompt in enumerate(prompts):
            copies.setdefault(tuple(prompt), []).append(i)
        unique = sorted(copies, key=len, reverse=True)
        order = [copies[p][0] for p in unique] + [i for p in unique for i in copies[p][1:]]
        source = [*range(len(unique))] + [u for u, p in enumerate(unique) for _ in copies[p][1:]]
        rows = _rows_for_graph(len(prompts)) if self.graphed else len(prompts)
        spare, slots = rows - len(prompts), len(unique[0]) + max_new_tokens
        source += [0] * spare
        self._reserve(rows, max_new_tokens, slots)
        shape = (len(self.layers), 2, rows, self.kv, slots, self.head_dim)
        self.cache = torch.zeros(shape, dtype=self.dtype, device=self.device)
        offset = (self.cache.data_ptr() - self.anchor.data_ptr()) // self.anchor.element_size()
        self.control.copy_(torch.tensor([offset, rows, slots, max_new_tokens, seed & (2**63 - 1)]))
        self.heat.copy_(torch.tensor([1 / (temperature or 1), float(temperature > 0)]))
        self.limit, self.temperature = max_new_tokens, temperature
        self.generator = torch.Generator(self.device).manual_seed(seed & (2**63 - 1))
        state = [
            [self.pad] * rows,
            [len(unique[s]) - 1 for s in source],
            [0] * rows,
            [0] * len(prompts) + [1] * spare,
            order + [*range(len(prompts), rows)],
        ]
        self.state[:, :rows] = torch.tensor(state, device=self.device)
        hidden = self._go_on(unique, order[: len(unique)], *kept) if kept else self._prefill(unique)
        where = torch.tensor(source, device=self.device)
        if len(unique) < len(prompts):
            for layer in self.cache:
                layer[:, len(unique) : len(prompts)] = layer[:, where[len(unique) : len(prompts)]]
        self._choose(hidden[where], rows)
        return rows

    def _reserve(self, rows: int, new: int, slots: int) -> None:
        """Buffers that graphs point at, with room to grow: larger ones drop the graphs."""
        if self.state is not None:
            if rows <= self.state.shape[1] and new < self.tokens.shape[1] and slots <= len(self.cos):
                return
            rows, new = max(rows, self.state.shape[1]), max(new, self.tokens.shape[1] - 1)
            slots = max(slots, len(self.cos))
        self.release()
        rows, new, slots = (1 << (max(n) - 1).bit_length() for n in ((rows, 256), (new, 1024), (slots, 4096)))
        whole = {"dtype": torch.long, "device": self.device}
        self.state = torch.zeros(5, rows, **whole)  # token, position, tokens made, ended, index of the prompt
        self.control = torch.zeros(5, **whole)  # cache offset, its rows and slots, max_new_tokens, seed
        self.heat = torch.zeros(2, device=self.device)  # 1 / temperature, 1 to sample or 0 for greedy
        self.tokens = torch.zeros(rows, new + 1, **whole)  # by prompt; ended rows may write to the last column
        self.logps = torch.zeros(rows, new + 1, device=self.device)
        self.lengths, self.row_numbers = torch.zeros(rows, **whole), torch.arange(rows, **whole)
        self.anchor = torch.zeros(16, dtype=self.dtype, device=self.device)
        rotary = getattr(self.backbone, "rotary_emb", None) or self.backbone.layers[0].self_attn.rotary_emb
        if hasattr(rotary, "get_cached"):  # Unsloth's
            rotary.extend_rope_embedding(self.anchor, slots)
            table = rotary.get_cached(slots, self.device.index)
        else:
            table = [t[0] for t in rotary(self.anchor, torch.arange(slots, device=self.device)[None])]
        self.cos, self.sin = (t[:slots, : self.head_dim // 2].contiguous() for t in table)

    def _continue(self, rows: int, max_new_tokens: int, longest: int) -> None:
        """Token steps until every row has ended, in smaller batches when most have."""
        made, looks = 1, []
        while made < max_new_tokens:
            graph = self._graph(rows) if self.graphed else None
            steps = min(self.burst, max_new_tokens - made) if graph else 1
            for _ in range(steps):
                graph.replay() if graph else self._step(rows)
            made += steps
            looks.append((self.state[3, :rows].to("cpu", non_blocking=True), torch.cuda.Event() if graph else None))
            if graph:  # look one burst behind, so that the card never waits for us
                looks[-1][1].record()
                if len(looks) < 2:
                    continue
                looks[0][1].synchronize()
            ended = looks.pop(0)[0].tolist()
            alive = [row for row in range(rows) if not ended[row]]
            if not alive:
                return
            fewer = _rows_for_graph(len(alive)) if graph else len(alive)
            if self.compact and fewer <= rows * (0.5 if graph else 0.75):
                n = rows if self.keeps else fewer  # rows whose K/V is kept change places, others are overwritten
                order = torch.tensor(sorted(range(rows), key=ended.__getitem__)[:n], device=self.device)
                self.state[:, :n] = self.state[:, order]
                for layer in self.cache:
                    layer[:, :n, :, : longest + made] = layer[:, order, :, : longest + made]
                rows, looks = fewer, []

    def _graph(self, rows: int) -> torch.cuda.CUDAGraph:
        """The captured token step of this batch size. Warming up moves the state, so it is put back."""
        if rows not in self.graphs:
            state, side, graph = self.state.clone(), torch.cuda.Stream(), torch.cuda.CUDAGraph()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                self._step(rows)
                self._step(rows)
            torch.cuda.current_stream().wait_stream(side)
            self.state.copy_(state)
            self.pool = self.pool or torch.cuda.graph_pool_handle()
            with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
                self._step(rows)
            self.graphs[rows] = graph
        return self.graphs[rows]

    def _step(self, rows: int) -> None:
        self._choose(self._forward(self.state[0, :rows], self.row_numbers[:rows], self.state[1, :rows]), rows)

    def _prefill(self, prompts: list[tuple[int, ...]]) -> torch.Tensor:
        """Write the prompts' K/V to the first cache rows, longest prompt first -> hidden states [prompts, hidden]."""
        hidden, first = [], 0
        while first < len(prompts):
            length = len(prompts[first])
            part = prompts[first : first + max(1, self.prompt_tokens // length)]
            ids = torch.tensor([p + (self.pad,) * (length - len(p)) for p in part], device=self.device)
            last = torch.tensor([i * length + len(p) - 1 for i, p in enumerate(part)], device=self.device)
            rows = torch.arange(first, first + len(part), device=self.device).repeat_interleave(length)
            pos = torch.arange(length, device=self.device).repeat(len(part))
            hidden.append(self._forward(ids.flatten(), rows, pos, (first, len(part), length), last))
            first += len(part)
        return torch.cat(hidden)

    def _kept_for(self, prompts: list[list[int]]) -> tuple | None:
        """The kept K/V as (cache, cache row and number of known tokens of each prompt), if all prompts extend what is
        kept; m prompts in a row may go on from one of it."""
        if not self.kept or len(prompts) % len(self.kept[2]):
            return None
        cache, rows_of, held = self.kept
        each = len(prompts) // len(held)
        if any(p[: len(held[i // each])] != held[i // each] or p == held[i // each] for i, p in enumerate(prompts)):
            return None
        return cache, rows_of.repeat_interleave(each), [len(tokens) for tokens in held for _ in range(each)]

    def _go_on(self, prompts, numbers, cache, rows_of, known) -> torch.Tensor:
        """_prefill() of prompts whose first known[number] tokens have their K/V in row rows_of[number] of `cache`.

        The other tokens run without pads, each over its row's slots as a decoded token does."""
        known, source = [known[number] for number in numbers], rows_of[numbers]
        for new, old in zip(self.cache, cache, strict=True):
            new[:, : len(prompts), :, : max(known)] = old[:, source, :, : max(known)]
        rest = [
            (token, row, at)
            for row, (prompt, n) in enumerate(zip(prompts, known, strict=True))
            for at, token in enumerate(prompt[n:], n)
        ]
        ids, rows, pos = (torch.tensor(column, device=self.device) for column in zip(*rest, strict=True))
        parts = zip(*(t.split(self.prompt_tokens) for t in (ids, rows, pos)), strict=True)
        hidden = torch.cat([self._forward(*part) for part in parts])
        return hidden[rows.bincount().cumsum(0) - 1]

    def _forward(self, ids, rows, pos, prompt=None, last=None) -> torch.Tensor:
        """Tokens ids [N] at (rows, pos) [N] of the cache -> normalized hidden states [N, hidden].

        prompt = (first row, rows, length) for a prefill of N = rows * length tokens, which keeps only tokens `last`."""
        h, y, below = F.embedding(ids, self.embedding), None, None
        plan = None if self.kernels else self._plan(rows, pos, prompt)
        for index, layer in enumerate(self.layers):
            x = self._add_norm(h, y, below, layer.before)
            q = self._rope_cache(index, layer, layer.qkv(x), rows, pos, plan)
            x = self._attend_prompt(index, q, prompt) if prompt else self._attend(index, q, rows, pos, plan)
            x = self._add_norm(h, layer.o(x), layer.o, layer.after)
            y, below = layer.down(self._silu_mul(layer, layer.gate_up(x))), layer.down
        if last is not None:
            h, y = h[last], y[last]
        return self._add_norm(h, y, below, self.backbone.norm.weight)

    def _plan(self, rows: torch.Tensor, pos: torch.Tensor, prompt) -> tuple:
        """What every layer of the torch path shares: cos, sin [N, 1, head_dim / 2], the mask [N, 1, 1, slots], rows."""
        if torch.equal(rows, self.row_numbers[: len(rows)]):  # a token step reads the cache as it lies
            rows = slice(len(rows))
        slots = 0 if prompt else int(pos.max()) + 1
        mask = torch.arange(slots, device=self.device) <= pos[:, None]
        return self.cos[pos][:, None], self.sin[pos][:, None], mask[:, None, None], rows

    def _add_norm(self, h, y, linear, weight) -> torch.Tensor:
        """h += y with linear's LoRA (y None: nothing to add), in place; returns RMSNorm(h)."""
        if not self.kernels:
            if y is not None:
                h += linear.add_lora(y)
            return F.rms_norm(h, h.shape[-1:], weight, self.eps)
        x, size = torch.empty_like(h), h.shape[1]
        block = triton.next_power_of_2(size)
        y, b, width, rank = (h, h, 0, 0) if y is None else (y, linear.b, y.shape[1], linear.rank)
        _add_norm_kernel[(len(h),)](
            h, y, b, weight, x, self.eps, size, width, rank, block, num_warps=min(16, max(4, block // 256))
        )
        return x

    def _rope_cache(self, index, layer, y, rows, pos, plan) -> torch.Tensor:
        """y of q|k|v -> q [N, heads * head_dim], normalized (Qwen3) and rotated; k and v go to the cache."""
        heads, kv, dim = self.heads, self.kv, self.head_dim
        if self.kernels:
            q, norms = y.new_empty(len(y), heads * dim), layer.norms or (y, y)
            _rope_cache_kernel[(triton.cdiv(len(y), 16), heads + 2 * kv)](
                y,
                layer.qkv.b,
                *norms,
                self.cos,
                self.sin,
                rows,
                pos,
                q,
                self.anchor,
                self.control,
                len(y),
                index,
                self.eps,
                heads,
                kv,
                dim,
                layer.qkv.rank,
                bool(layer.norms),
                16,
                max(16, triton.next_power_of_2(dim // 2)),
            )
            return q
        q, k, v = layer.qkv.add_lora(y).view(len(y), -1, dim).split([heads, kv, kv], 1)
        if layer.norms:
            q, k = (F.rms_norm(t, (dim,), w, self.eps) for t, w in zip((q, k), layer.norms, strict=True))
        lo, hi = torch.cat((q, k), 1).chunk(2, -1)
        cos, sin, *_ = plan
        q, k = torch.cat((lo * cos - hi * sin, hi * cos + lo * sin), -1).split([heads, kv], 1)
        self.cache[index][0][rows, :, pos] = k
        self.cache[index][1][rows, :, pos] = v
        return q.reshape(len(q), -1)

    def _attend(self, index, q, rows, pos, plan) -> torch.Tensor:
        """Query tokens q [N, heads * head_dim], each over slots 0..pos of its cache row."""
        n, group, dim = len(q), self.heads // self.kv, self.head_dim
        if not self.kernels:
            _, _, mask, rows = plan
            k, v = self.cache[index, :, :, :, : mask.shape[-1]][:, rows]
            return F.scaled_dot_product_attention(q.view(n, self.kv, group, dim), k, v, attn_mask=mask).view(n, -1)
        splits, out = self.splits or 1, torch.empty_like(q)
        while self.splits is None and splits < 16 and n * self.kv * splits <= self.processors:
            splits *= 2
        part = q.new_empty(n * self.heads * splits * (dim + 2) * (splits > 1), dtype=torch.float32)
        wide = max(16, triton.next_power_of_2(dim))
        _attend_kernel[(n, self.kv, splits)](
            q,
            self.anchor,
            self.control,
            rows,
            pos,
            out,
            part,
            index,
            dim**-0.5,
            self.kv,
            group,
            max(16, triton.next_power_of_2(group)),
            dim,
            wide,
            max(16, 16384 // (wide * q.element_size())),
            splits,
            num_stages=self.stages,
        )
        if splits > 1:
            _combine_kernel[(n * self.heads,)](part, out, dim, wide, splits, num_warps=2)
        return out

    def _attend_prompt(self, index, q, prompt) -> torch.Tensor:
        """Causal attention of whole prompts, right-padded: q [rows * length, heads * head_dim]."""
        first, rows, length = prompt
        k, v = self.cache[index, :, first : first + rows, :, :length]
        q = q.view(rows, length, self.heads, self.head_dim).transpose(1, 2)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return out.transpose(1, 2).reshape(rows * length, -1)

    def _silu_mul(self, layer, y) -> torch.Tensor:
        """y of gate|up -> SiLU(gate) * up, both with their LoRA."""
        linear = layer.gate_up
        if not self.kernels:
            gate, up = linear.add_lora(y).chunk(2, -1)
            return F.silu(gate) * up
        n, size = len(y), linear.sizes[0]
        x = y.new_empty(n, size)
        _silu_mul_kernel[(triton.cdiv(n, 16), triton.cdiv(size, 64))](y, linear.b, x, n, size, linear.rank, 16, 64)
        return x

    def _choose(self, hidden: torch.Tensor, rows: int) -> None:
        """Sample each row's next token from hidden [rows, hidden], record it, and move the rows' state on."""
        logits = head_logits(hidden, self.head.weight)
        if self.kernels:
            block = 4096
            blocks = triton.cdiv(logits.shape[1], block)
            best, top, total = logits.new_empty(3, rows, blocks, dtype=torch.float32)
            where = logits.new_empty(rows, blocks, dtype=torch.int32)
            state = self.state
            _sample_kernel[(rows, blocks)](
                logits,
                self.control,
                self.heat,
                state[4],
                state[2],
                best,
                where,
                top,
                total,
                logits.shape[1],
                block,
                num_warps=8,
            )
            _advance_kernel[(rows,)](
                logits,
                self.control,
                self.heat,
                best,
                where,
                top,
                total,
                self.eos,
                state,
                self.tokens,
                self.logps,
                self.lengths,
                self.pad,
                state.shape[1],
                self.tokens.shape[1],
                logits.shape[1],
                blocks,
                triton.next_power_of_2(blocks),
                len(self.eos),
                num_warps=1,
            )
            return
        logp = F.log_softmax(logits.float() / (self.temperature or 1), -1)
        sampled = self.temperature > 0
        token = torch.multinomial(logp.exp(), 1, generator=self.generator) if sampled else logp.argmax(-1, keepdim=True)
        logp, token = logp.gather(-1, token)[:, 0], token[:, 0]
        ids, pos, count, done, prompt = self.state[:, :rows]
        alive = done == 0
        column = torch.where(alive, count, self.tokens.shape[1] - 1)
        self.tokens[prompt, column], self.logps[prompt, column] = token, logp
        self.lengths[prompt] = torch.where(alive, count + 1, self.lengths[prompt])
        done |= (count + 1 >= self.limit) | (token[:, None] == self.eos).any(-1)
        ids.copy_(torch.where(alive, token, self.pad))
        pos += alive
        count += alive


# ------------------------------------------------------------------------------------------------ several processes


def micro_batches(attempt: Attempt, max_tokens: int) -> list[list[int]]:
    """This process's rows by index, longest first, in groups of at most `max_tokens` tokens, pads counted (and at
    least one row)."""
    lengths = [len(p) + len(c) for p, c in zip(attempt.prompts, attempt.completions, strict=True)]
    batches: list[list[int]] = []
    longest_first = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    for row in longest_first[PROCESSES.process_index :: PROCESSES.num_processes]:
        if not batches or (len(batches[-1]) + 1) * lengths[batches[-1][0]] > max_tokens:
            batches.append([])
        batches[-1].append(row)
    return batches


def sum_over_processes(policy: Policy, stats: list[dict[str, float]]) -> list[dict[str, float]]:
    """Sums the gradients over the processes in one flat all-reduce, and each attempt's statistics (kl_max: the max)."""
    weights = list(policy.trainable.values())
    flat = [torch.zeros_like(w) if w.grad is None else w.grad for w in weights]  # None: this process had no rows
    flat = reduce(torch.cat([gradient.flatten() for gradient in flat]), "sum")
    for weight, gradient in zip(weights, flat.split([w.numel() for w in weights]), strict=True):
        weight.grad = gradient.view_as(weight)
    everyones = zip(*gather_object([stats]), strict=True)  # by attempt, then by process
    return [
        {
            key: float(np.max([s[key] for s in parts])) if key == "kl_max" else sum(s[key] for s in parts)
            for key in parts[0]
        }
        for parts in everyones
    ]


@contextmanager
def watching_peers() -> Iterator[None]:
    """Ends this process when another one on this machine is gone: NCCL would wait for it, until the launcher kills."""
    if PROCESSES.num_processes == 1:
        yield
        return
    import psutil  # accelerate's own

    everyone = gather_object([(socket.gethostname(), os.getpid())])
    peers = [pid for host, pid in everyone if host == socket.gethostname() and pid != os.getpid()]
    left = threading.Event()

    def gone(pid: int) -> bool:
        try:
            return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True

    def watch() -> None:
        while not left.wait(1):
            if any(map(gone, peers)) and not left.wait(3):  # an error of its own, or the collective's, may come first
                os.write(2, f"Process {PROCESSES.process_index} stops, as another has\n".encode())
                os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        left.set()


# ------------------------------------------------------------------------------------------------------- run folder

RENEW_SECONDS = 300.0  # between two renewals of what one looks at while a run goes on


@dataclass
class Run:
    """The run folder and W&B: what is written down while the stages go by."""

    folder: Path
    config: Config
    command: str
    doomed: Path | None = None  # what --overwrite is to delete
    wandb: Any = None
    rollouts: list[dict[str, Any]] = field(default_factory=list)  # of training, since the last table of them
    kept: dict[str, Any] = field(default_factory=dict)  # of results.json, when --eval-only adds to a run
    seconds_before: float = 0.0
    started: float = field(default_factory=time.time)
    renewed: float = field(default_factory=time.time)  # results.md and curves.png

    @on_main
    def log(self, event: dict[str, Any], samples: list[dict[str, Any]]) -> None:
        append_lines(self.folder / "samples.jsonl", samples)
        append_lines(self.folder / "metrics.jsonl", [event])  # last: with it the step or the evaluation is done
        if event["event"] == "eval" or time.time() - self.renewed >= RENEW_SECONDS:
            self.write_results()
        if event["event"] == "eval":
            say(
                "Evaluated {checkpoint}: Acc@t1 {acc_attempt1:.3f}, Acc@t2 {acc_attempt2:.3f}, delta {delta:+.3f}, "
                "i->c {delta_i_to_c:.3f} (wrong->c {wrong_to_correct:.3f}), c->i {delta_c_to_i:.3f}, n {n}".format(
                    **event
                )
            )
        if self.wandb:
            with at_the_loggers_risk(self):
                log_to_wandb(self, event, samples)

    def has_evaluated(self, label: str) -> bool:
        return any(e["checkpoint"] == label and "eval_only" not in e for e in self.evals())

    def evals(self) -> list[dict[str, Any]]:
        return [e for e in read_lines(self.folder / "metrics.jsonl") if e["event"] == "eval"]

    @on_main
    def write_results(self) -> None:
        evals = self.evals()
        packages = ("torch", "transformers", "peft", "unsloth", "datasets")
        results = {
            "run_name": self.config.run_name,
            "evals": evals,
            "versions": {"python": sys.version.split()[0]}
            | {p: importlib.metadata.version(p) if importlib.util.find_spec(p) else None for p in packages},
            "device": torch.cuda.get_device_name() if DEVICE.type == "cuda" else DEVICE.type,
            "seconds_total": self.seconds_before + time.time() - self.started,
            "git_commit": git_commit(),
            "command": self.command,
        } | self.kept
        write_atomically(self.folder / "results.json", json.dumps(results, indent=1))
        write_atomically(self.folder / "results.md", results_table(evals) + "\n")
        for last in evals[-1:]:
            stage = self.folder / last["checkpoint"]  # with "adapter" one from elsewhere, perhaps of another config
            if "adapter" not in last and (stage / "state.json").exists():
                write_atomically(stage / "README.md", model_card(self.config, evals, stage))
        draw_curves(self.folder)
        self.renewed = time.time()


def open_run(args: argparse.Namespace, config: Config) -> tuple[Run, Path | None]:
    """Finds the run folder and the checkpoint to resume from; changes nothing yet. Raises UserError.

    An earlier run in the folder is never overwritten unasked: a fresh start over it is refused. A smoke run replaces
    the last one; Stage II from an adapter adds to the folder that may hold Stage I."""
    folder = Path(config.output.dir) / config.run_name
    adapter = Path(args.resume_adapter) if args.resume_adapter else None
    adding, doomed = args.eval_only or args.resume, None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except (OSError, ValueError) as error:
        raise UserError(f"output.dir: cannot write to {folder}: {getattr(error, 'strerror', error)}") from None
    lines = [e for e in read_lines(folder / "metrics.jsonl") if "eval_only" not in e]
    taken = ["metrics.jsonl"] * bool(lines) + [s for s in ("stage1", "stage2") if (folder / s).exists()]
    if args.start_stage == 2 and not adding:
        taken = ["stage2"] if "stage2" in taken or any(e.get("stage") == 2 for e in lines) else []
    if taken and not adding:
        if not (args.overwrite or args.smoke):
            raise UserError(
                f"output.dir: {folder} already holds a run ({', '.join(taken)}); continue it with "
                "--resume, choose another with --set run_name=NAME, or delete it with --overwrite"
            )
        doomed = folder / "stage2" if args.start_stage == 2 else folder
        if adapter and adapter.resolve().is_relative_to(doomed.resolve()):
            raise UserError(f"--overwrite: would delete the adapter to start from, {adapter}")
    if args.resume and (folder / "config.yaml").exists():
        check_same_config(folder / "config.yaml", config)
    checkpoint = newest_checkpoint(folder) if args.resume else None
    if args.start_stage == 2 and adapter and checkpoint and checkpoint_place(checkpoint)[0] == 1:
        checkpoint = None  # that Stage II had not begun, and was to begin from the adapter
    if args.start_stage == 2 and not (checkpoint or adapter):
        raise UserError(f"--start-stage 2: {folder} has no checkpoint to --resume from; give --resume-adapter DIR")
    if checkpoint or adapter:  # before the minutes that the model takes
        read_weights((checkpoint or adapter) / "adapter_model.safetensors")
    if checkpoint and 0 < checkpoint_place(checkpoint)[1] < math.inf:
        read_weights(checkpoint / "optimizer.safetensors")
    return Run(folder, config, shlex.join(["python", *sys.argv]), doomed), checkpoint


@on_main
def enter_run(args: argparse.Namespace, run: Run, checkpoint: Path | None) -> None:
    """Readies the run folder, once data, model and adapter have turned out well: until here nothing old is lost."""
    folder = run.folder
    if run.doomed and run.doomed.exists():
        shutil.rmtree(run.doomed)
        folder.mkdir(exist_ok=True)
    before = {}
    with suppress(OSError, ValueError):  # none yet, or a damaged one, which is written anew
        before = json.loads((folder / "results.json").read_text())
    if args.eval_only and (folder / "config.yaml").exists():  # beside a run, which may be running
        run.kept = {key: value for key, value in before.items() if key != "evals"}
        return
    if args.start_stage == 2 and not checkpoint and not evaluates_as(folder / "config.yaml", run.config):
        for name in ("metrics.jsonl", "samples.jsonl"):  # so pretrain is evaluated anew
            kept = [
                e
                for e in read_lines(folder / name)
                if "eval_only" in e or not (e.get("checkpoint") == "pretrain" or "held_out" in e)
            ]
            write_atomically(folder / name, "".join(map(to_json, kept)))
    text = yaml.safe_dump(run.config.model_dump(), sort_keys=False, allow_unicode=True)
    write_atomically(folder / "config.yaml", text)
    halves = [c for c in folder.glob("stage*/step_*") if args.resume and not (c / "state.json").exists()]
    for leftover in [*folder.glob("stage*/.*.tmp"), *folder.glob(".*.tmp"), *halves]:  # a kill left them
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    if args.resume:
        run.seconds_before = before.get("seconds_total", 0.0)
    if not args.eval_only:
        fresh = (1, 0 if args.resume else -1) if args.start_stage == 1 else (2, -1)
        rewind(folder, *(checkpoint_place(checkpoint) if checkpoint else fresh))
    if args.resume and (folder / "metrics.jsonl").exists():
        run.write_results()  # a kill may have come between the line of an evaluation and its results


# A resumed run may change these: they move time, memory and files, not the mathematics.
HARMLESS_KEYS = (
    "wandb_project",
    "eval.",
    "output.",
    "model.decoder",
    "model.fast_inference",
    "model.gradient_checkpointing",
    "train.micro_batch_size",
    "train.checkpoint_every",
    "train.max_skipped_steps",
)


def check_same_config(file: Path, config: Config) -> None:
    """A resumed run keeps its mathematics. Raises UserError that lists every key that would change it."""
    flat = lambda tree, prefix="": {  # noqa: E731
        key: value
        for name, item in tree.items()
        for key, value in (flat(item, f"{prefix}{name}.") if isinstance(item, dict) else {prefix + name: item}).items()
    }
    try:
        before, now = flat(yaml.safe_load(file.read_text(encoding="utf-8"))), flat(config.model_dump())
    except Exception as error:  # whatever stands there
        raise UserError(f"--resume: {file} is damaged ({first_line(error)}); delete it if no key changed") from None
    then = {
        f"{name}.{key}": info.default
        for name, section in config
        if isinstance(section, Section)
        for key, info in type(section).model_fields.items()
    } | before  # a key that is younger than the file
    changed = [
        f"{key} {then.get(key)!r} -> {now[key]!r}" if key in now else f"{key}, which is no key any more"
        for key in sorted(before.keys() | now.keys())
        if then.get(key) != now.get(key) and (key == "eval.validation" or not key.startswith(HARMLESS_KEYS))
    ]
    if changed:
        raise UserError(
            f"--resume: {file} was made with another config ({'; '.join(changed)}); put these back, or "
            "start a new run with --set run_name=NAME"
        )


def evaluates_as(file: Path, config: Config) -> bool:
    """Does the config of an earlier run, if there is one, evaluate on the same rows, prompts and budgets?"""

    def measure(tree: dict[str, Any]) -> list[Any]:
        budgets = {key: value for key, value in tree["train"].items() if key.startswith("max_")}
        return [*(tree[section] for section in ("model", "dataset", "prompts", "reward", "eval")), budgets]

    try:
        return not file.exists() or measure(yaml.safe_load(file.read_text())) == measure(config.model_dump())
    except Exception:  # whatever stands there
        return False


def rewind(folder: Path, stage: int, step: int) -> None:
    """Drops from metrics.jsonl and samples.jsonl what lies past (stage, step), so that resuming adds no line twice.

    Evaluations stand after the steps of the stage they close; those of --eval-only stay. Samples without their line
    in metrics.jsonl, which is written after them, go too: what they belong to is done again."""
    order = {"pretrain": (1, 0), "stage1": (1, math.inf), "stage2": (2, math.inf)}
    mark = lambda e: [e.get(key) for key in ("event", "checkpoint", "stage", "step", "adapter")]  # noqa: E731
    logged = [mark(event) for event in read_lines(folder / "metrics.jsonl")]

    def past(e: dict[str, Any]) -> bool:  # "adapter" marks the evaluation of the adapter that Stage II started from
        label = e.get("checkpoint")
        if "held_out" in e:
            place = tuple(map(int, re.findall(r"\d+", label)))
        else:
            place = (2, 0) if "adapter" in e else order.get(label) or (e["stage"], e["step"])
        return "eval_only" not in e and place > (stage, step)

    for file in filter(Path.exists, (folder / "metrics.jsonl", folder / "samples.jsonl")):
        kept = [event for event in read_lines(file) if mark(event) in logged and not past(event)]
        write_atomically(file, "".join(map(to_json, kept)))


def where_to_look(config: Config) -> str:
    """The files of a run that show how it went."""
    folder = Path(config.output.dir) / config.run_name
    return ", ".join(str(folder / name) for name in ("results.md", "curves.png") if (folder / name).exists())


def git_commit() -> str | None:
    here = Path(__file__).resolve().parent
    with suppress(OSError):  # no git here
        done = subprocess.run(["git", "-C", here, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
        return done.stdout.strip() or None
    return None


@contextmanager
def writing(place: Path) -> Iterator[None]:
    """Names what could not be written, which a full disk's error does not. Raises RunError."""
    try:
        yield
    except Exception as error:  # safetensors and tokenizers have classes of their own for the system's errors
        if not isinstance(error, OSError) and "os error" not in str(error):
            raise
        reason = getattr(error, "strerror", None) or first_line(error)
        raise RunError(f"{place}: cannot be written: {reason}; mend that and go on with --resume") from None


def write_atomically(file: Path, text: str) -> None:
    """The file holds the old text or the new, never half of one. Raises RunError."""
    temporary = file.with_name(f".{file.name}.tmp")
    with writing(file), temporary.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
        os.replace(temporary, file)


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The complete lines of a jsonl file; one that a kill cut short is left out."""
    events = []
    # A cut can fall inside a character; JSON leaves U+2028 as it is, which splitlines takes for the end of a line.
    for line in file.read_text(encoding="utf-8", errors="replace").split("\n") if file.exists() else []:
        with suppress(ValueError):
            events.append(json.loads(line))
    return [event for event in events if isinstance(event, dict)]


def append_lines(file: Path, rows: list[dict[str, Any]]) -> None:
    """Adds rows to a jsonl file, after ending a line that a kill left half written. Raises RunError."""
    cut = False
    if file.exists() and file.stat().st_size:
        with file.open("rb") as stream:
            stream.seek(-1, os.SEEK_END)
            cut = stream.read() != b"\n"
    with writing(file), file.open("a", encoding="utf-8") as stream:
        stream.writelines(["\n"] * cut + [to_json(row) for row in rows])


def to_json(row: dict[str, Any]) -> str:
    """One line of JSON; a number that is not finite, which JSON lacks, becomes null."""
    finite = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in row.items()}
    return json.dumps(finite, ensure_ascii=False) + "\n"


# ------------------------------------------------------------------------------------------------------ checkpoints


@on_main
def save_checkpoint(
    policy: Policy, folder: Path, state: dict, optimizer: torch.optim.Optimizer | None, card: str | None = None
) -> None:
    """Writes adapter, tokenizer, model card, optimizer state and state.json to a hidden folder, then moves them in
    place. state.json comes last: a folder without it is not a checkpoint. safetensors and JSON only."""
    temporary = folder.parent / f".{folder.name}.tmp" if folder.name.startswith("step_") else folder / ".end.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    with writing(folder):
        temporary.mkdir(parents=True)
        policy.model.save_pretrained(str(temporary), safe_serialization=True, save_embedding_layers=False)
        policy.tokenizer.save_pretrained(str(temporary))
        if card:
            (temporary / "README.md").write_text(card, encoding="utf-8")
        if optimizer:
            moments = {
                f"{name}/{key}": value.contiguous()
                for name, parameter in policy.trainable.items()
                for key, value in optimizer.state[parameter].items()
            }
            save_file(moments, temporary / "optimizer.safetensors")
        (temporary / "state.json").write_text(json.dumps(state, indent=1))
        for file in temporary.rglob("*"):
            if file.is_file():
                with file.open("rb") as stream:
                    os.fsync(stream.fileno())
        if folder.exists():
            (folder / "state.json").unlink(missing_ok=True)
            for file in sorted(temporary.iterdir(), key=lambda file: file.name == "state.json"):
                os.replace(file, folder / file.name)
            temporary.rmdir()
        else:
            os.rename(temporary, folder)


def load_optimizer(policy: Policy, optimizer: torch.optim.Optimizer, file: Path) -> None:
    moments = read_weights(file)
    for name, parameter in policy.trainable.items():
        prefix = f"{name}/"
        optimizer.state[parameter] = {
            key.removeprefix(prefix): value.to("cpu" if key == f"{prefix}step" else parameter.device)
            for key, value in moments.items()
            if key.startswith(prefix)
        }


def checkpoint_place(folder: Path) -> tuple[int, float]:
    """(stage, step) of a complete checkpoint; the end of a stage is past any of its steps."""
    try:
        state = json.loads((folder / "state.json").read_text())
        return state["stage"], math.inf if state.get("finished") else state["step"]
    except (ValueError, TypeError, KeyError):
        raise UserError(f"{folder}/state.json: is damaged; delete it to go on from the checkpoint before it") from None


def newest_checkpoint(folder: Path) -> Path | None:
    """The complete checkpoint that is furthest along."""
    complete = [file.parent for file in [*folder.glob("stage*/state.json"), *folder.glob("stage*/step_*/state.json")]]
    return max(complete, key=checkpoint_place, default=None)


@on_main
def prune_checkpoints(folder: Path, keep: int | None) -> None:
    """Deletes all but the newest `keep` mid-stage checkpoints of a stage."""
    steps = sorted((f.parent for f in folder.glob("step_*/state.json")), key=lambda c: checkpoint_place(c)[1])
    for old in steps[: -keep if keep else 0]:
        (old / "state.json").unlink()  # first: what is half deleted is no checkpoint
        shutil.rmtree(old)


@on_main
def save_merged(policy: Policy, folder: Path) -> None:
    """The base model with the adapter added to its weights, in bf16, for whoever does without PEFT. Raises RunError.

    4-bit base weights are expanded first and stay so: nothing is rounded to 4 bits a second time."""
    base, weights = policy.model.get_base_model(), {}
    for name, module in base.named_modules():
        layer = getattr(module, "base_layer", module)  # of a module that LoRA wraps
        if "lora_" in name or "base_layer" in name:
            continue
        for key, weight in layer.named_parameters(recurse=False):
            weight = dequantize_module_weight(layer) if key == "weight" else weight
            if key == "weight" and layer is not module:
                weight = weight.float() + module.get_delta_weight("default").float()
            weights[f"{name}.{key}"] = weight.detach().to("cpu", torch.bfloat16)
    config = copy.deepcopy(base.config)
    config.dtype = torch.bfloat16
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        merged = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    merged.load_state_dict(weights, assign=True)
    merged.tie_weights()
    merged.generation_config = base.generation_config  # every token that ends an answer
    with writing(folder):
        merged.save_pretrained(folder)
        policy.tokenizer.save_pretrained(folder)


@on_main
def push_to_hub(folder: Path, name: str) -> None:
    """Uploads the adapter at the end of a stage with its card and tokenizer. Raises RunError."""
    own = ["step_*", "state.json", ".*"]  # of no use to others
    try:
        huggingface_hub.create_repo(name, exist_ok=True)
        huggingface_hub.upload_folder(repo_id=name, folder_path=folder, ignore_patterns=own)
    except Exception as error:  # no token, no network, no right to write: each its own class
        by_hand = f"hf upload {name} {folder} --exclude 'step_*' --exclude state.json"
        raise RunError(
            f"output.push_to_hub: {name} was not pushed: {first_line(error)}; the run is complete, push it "
            f"with --resume, or: {by_hand}"
        ) from None
    say(f"Pushed {folder} to {name}")


# ---------------------------------------------------------------------------------------------------------- reports


STEP_LINE = (
    "reward {reward_attempt1:.3f} / {reward_attempt2:.3f}, acc {acc_attempt1:.2f} / {acc_attempt2:.2f}, "
    "kl {kl_attempt1:.3f} / {kl_attempt2:.3f}, {tokens_per_second:.0f} tok/s"
)


def progress(items: Any, title: str, **kwargs: Any) -> tqdm:
    """A progress bar on a terminal; nothing in a log file, where the summary lines say enough."""
    hidden = QUIET or not MAIN or not sys.stderr.isatty()
    return tqdm(items, desc=title, leave=False, disable=hidden, dynamic_ncols=True, **kwargs)


def rollout_means(attempts: list[Attempt], corrections: int) -> dict[str, float]:
    """What a step's metrics say of its rollouts: `attempt_means`, the gap of their rewards, and the speed."""
    means = attempt_means(attempts)
    means["reward_gap"] = means["reward_attempt2"] - means["reward_attempt1"]
    made = attempts[0].completions[::corrections] + attempts[1].completions
    return means | {"tokens_per_second": sum(map(len, made)) / sum(attempt.seconds for attempt in attempts)}


def sample_rows(examples: list[Example], attempts: list[Attempt], where: dict, most: int | None = None) -> list[dict]:
    """Rows of samples.jsonl: the question, the target and both attempts with their rewards."""
    return [
        where
        | {"question": example.question, "target": example.target}
        | {
            f"{key}_attempt{number}": values[row]
            for number, attempt in enumerate(attempts, 1)
            for key, values in (
                ("text", attempt.texts),
                ("answer", attempt.answers),
                ("reward", attempt.rewards),
                ("correct", attempt.correct),
                ("truncated", attempt.truncated),
                ("tokens", [*map(len, attempt.completions)]),
            )
        }
        for row, example in enumerate(examples[:most])
    ]


def intervals(correct: np.ndarray) -> dict[str, list[float]]:
    """95% bootstrap intervals over rows of Acc@t1, Acc@t2 and delta from correct [n, 2]; the pairs stay together."""
    rows = np.random.default_rng(0).integers(len(correct), size=(1000, len(correct)))
    means = correct[rows].mean(1)  # [1000, 2]
    found = {"acc_attempt1": means[:, 0], "acc_attempt2": means[:, 1], "delta": means[:, 1] - means[:, 0]}
    return {f"{key}_interval": np.quantile(values, (0.025, 0.975)).round(4).tolist() for key, values in found.items()}


def vote(policy: Policy, examples: list[Example], config: Config) -> dict[str, float]:
    """Majority votes at equal budgets: 2k first attempts in parallel, against k first attempts each corrected once,
    whose second attempts vote (the paper's inference-scaling comparison). Sampled at the training temperature.

    Returns vote_parallel_{2k} and vote_sequential_{2k}, accuracies, for k = 1, 2, 4, ..., eval.samples."""
    most, temperature = config.eval.samples, config.train.generation_temperature
    sizes = sorted({1 << i for i in range(most.bit_length())} | {most})
    right = {(way, 2 * k): 0 for k in sizes for way in ("parallel", "sequential")}
    extract, each = ANSWER_EXTRACTORS[config.reward.answer_extractor], max(1, config.eval.batch_size // most)
    for i in progress(range(0, len(examples), each), "vote"):
        stop_if_asked()
        rows, seed = [e for e in examples[i : i + each] for _ in range(most)], f"{config.train.seed}/vote/{i}"
        first, second = roll_out(policy, rows, config, temperature, seed)
        (more,) = roll_out(policy, rows, config, temperature, f"{seed}/more", attempts=1)
        for row in range(0, len(rows), most):
            for k in sizes:
                votes = {
                    "parallel": [(a, r) for a in (first, more) for r in range(row, row + k)],
                    "sequential": [(second, r) for r in range(row, row + k)],
                }
                for way, cast in votes.items():
                    attempt, winner = cast[majority([a.texts[r] for a, r in cast], extract)]
                    right[way, 2 * k] += attempt.correct[winner]
    return {f"vote_{way}_{budget}": count / len(examples) for (way, budget), count in right.items()}


def edit_distance_ratio(a: list[int], b: list[int]) -> float:
    """Levenshtein distance of two token sequences over the longer length: 0 is a copy, 1 shares nothing."""
    if a == b:
        return 0.0
    b_tokens, offsets = np.array(b), np.arange(len(b) + 1)
    row = offsets.copy()
    for i, token in enumerate(a, 1):
        step = np.minimum(row[1:] + 1, row[:-1] + (b_tokens != token))  # deletion, substitution
        row = np.minimum.accumulate(np.concatenate(([i], step)) - offsets) + offsets  # insertions, all at once
    return float(row[-1] / max(len(a), len(b)))


@on_main
def warn_of_budgets(run: Run, stage: int, rows: int) -> None:
    """Says in one line which budgets cut off more than 5% of the stage's attempts so far, `rows` a step."""
    steps = [e for e in read_lines(run.folder / "metrics.jsonl") if e["event"] == "train" and e["stage"] == stage]
    cut = {n: sum(e[f"truncated_attempt{n}"] for e in steps) / len(steps) for n in (1, 2)}
    budgets = [
        f"train.max_new_tokens_attempt{n} = {getattr(run.config.train, f'max_new_tokens_attempt{n}')} cut off "
        f"{share:.0%} of the first {rows * len(steps)} {('first', 'second')[n - 1]} attempts"
        for n, share in cut.items()
        if share > 0.05
    ]
    if budgets:
        config = shlex.quote(str(run.folder / "config.yaml"))
        say(f"Warning: {' and '.join(budgets)}; python profile_run.py --config {config} recommends budgets.")


def results_table(evals: list[dict[str, Any]]) -> str:
    """The evaluations as markdown: the paper's metrics, what the corrections are, and votes where there were any."""
    columns = {"checkpoint": "checkpoint", "Acc@t1": "acc_attempt1", "Acc@t2": "acc_attempt2"}
    columns |= {f"Acc@t{key[11:]}": key for e in evals for key in e if re.fullmatch(r"acc_attempt\d+", key)}
    columns |= {
        "delta": "delta",
        "95%": "delta_interval",
        "i->c": "delta_i_to_c",
        "c->i": "delta_c_to_i",
        "reward 1": "reward_attempt1",
        "reward 2": "reward_attempt2",
        "edit distance": "edit_distance_ratio",
        "n": "n",
    }
    kind = lambda e: (
        " (eval only)" * ("eval_only" in e)
        or " (given adapter)" * ("adapter" in e)  # noqa: E731
        or " (validation)" * ("held_out" in e)
    )
    rows = [e | {"checkpoint": e["checkpoint"] + kind(e)} for e in evals]
    table = markdown([list(columns), *([row.get(key) for key in columns.values()] for row in rows)])
    split = (
        {"checkpoint": "checkpoint"}
        | {
            f"{title} {number}": f"{name}_attempt{number}"
            for title, name in (("flexible", "flexible_acc"), ("unanswered", "unanswered"), ("cut off", "truncated"))
            for number in (1, 2)
        }
        | {
            "unanswered->c": "unanswered_to_correct",
            "wrong->c": "wrong_to_correct",
            "c->unanswered": "correct_to_unanswered",
            "c->wrong": "correct_to_wrong",
            "wrong 1": "wrong_answered",
            "mended": "wrong_mended",
            "repeated": "wrong_repeated",
        }
    )
    if any("wrong_answered" in e for e in evals):  # not in runs of older versions
        table += "\n\nCorrections, shares of the rows (mended and repeated: of the wrong first attempts):\n\n"
        table += markdown([list(split), *([row.get(key) for key in split.values()] for row in rows)])
    votes = [
        [e["checkpoint"], int(key[14:]), e[key], e[key.replace("parallel", "sequential")]]
        for e in evals
        for key in e
        if key.startswith("vote_parallel_")
    ]
    if not votes:
        return table
    header = ["checkpoint", "attempts", "vote of that many first attempts", "of half as many, each corrected once"]
    return f"{table}\n\n{markdown([header, *votes])}"


def markdown(rows: list[list[Any]]) -> str:
    """A table whose first row is the header."""
    show = lambda v: (
        ""
        if v is None
        else f"{v:.3f}"
        if isinstance(v, float)  # noqa: E731
        else f"{v[0]:+.3f} to {v[1]:+.3f}"
        if isinstance(v, list)
        else str(v)
    )
    cells = [[show(value) for value in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


@on_main
def draw_curves(folder: Path) -> None:
    """curves.png: rewards, accuracy, KL, lengths and corrections by step (faint: each step), stages marked."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    events = read_lines(folder / "metrics.jsonl")
    steps = [e for e in events if e["event"] == "train"]
    evals = [e for e in events if e["event"] == "eval" and "eval_only" not in e]
    tested, validated = ([e for e in evals if ("held_out" in e) == which] for which in (False, True))
    signs = "dots: test, diamonds: validation" if validated else "dots: held out"
    x = [e["global_step"] for e in steps]
    window = np.ones(max(1, len(x) // 20))
    panels = {
        "reward": "mean reward of rollouts",
        "acc": f"accuracy ({signs}, 95% interval)",
        "reward_gap": "reward gap (attempt 2 - attempt 1)",
        "corrections": f"corrected rows ({signs})",
        "kl": "KL to the reference, per token (K3)",
        "completion_tokens": "completion tokens",
        "truncated": "cut off by the budget (dashed: unanswered)",
        "wrong first attempts": "of the answered wrong first attempts",
    }
    blue, orange, green, red = (f"tab:{color}" for color in ("blue", "orange", "green", "red"))
    curves = {
        "reward_gap": [("reward_gap", green, None)],
        "corrections": [
            ("wrong_to_correct", green, "wrong -> correct"),
            ("unanswered_to_correct", red, "unanswered -> correct"),
        ],
        "wrong first attempts": [("wrong_mended", green, "mended"), ("wrong_repeated", red, "repeated")],
    }
    for name in panels.keys() - curves.keys():
        curves[name] = [(f"{name}_attempt{n}", color, f"attempt {n}") for n, color in ((1, blue), (2, orange))]
    curves["truncated"] += [("unanswered_attempt1", blue, None), ("unanswered_attempt2", orange, None)]
    figure, axes = plt.subplots(2, 4, figsize=(17, 6.5), layout="constrained")
    for axis, (name, title) in zip(axes.flat, panels.items(), strict=True):
        for key, color, label in curves[name]:
            values = np.array([e.get(key) for e in steps], dtype=float)  # NaN: not there, as in older runs
            known = np.isfinite(values)
            if known.any():
                counts = np.convolve(known, window)[: len(x)]
                smooth = np.convolve(np.nan_to_num(values), window)[: len(x)] / np.maximum(counts, 1)
                axis.plot(x, values, color=color, alpha=0.25, linewidth=0.8)
                axis.plot(x, smooth, "--" if key.startswith("unanswered_attempt") else "-", color=color, label=label)
            for rows, sign in ((tested, "o"), (validated, "D")) if name in ("acc", "corrections") else ():
                held_out = np.array([e.get(key) for e in rows], dtype=float)
                bounds = [e.get(f"{key}_interval") or [e.get(key)] * 2 for e in rows]  # accuracies have some
                low, high = np.array(bounds, dtype=float).reshape(-1, 2).T
                axis.errorbar(
                    [e["global_step"] for e in rows],
                    held_out,
                    (held_out - low, high - held_out),
                    fmt=sign,
                    color=color,
                    mec="black",
                    ecolor="black",
                    elinewidth=0.8,
                    capsize=3,
                    markersize=6 if sign == "o" else 3,
                )
        boundary = max((e["global_step"] for e in steps if e["stage"] == 1), default=None)
        if boundary and boundary < x[-1]:
            axis.axvline(boundary + 0.5, color="gray", linestyle="--", linewidth=1)
            for text, side in (("Stage I ", "right"), (" Stage II", "left")):
                axis.text(boundary + 0.5, 0.99, text, transform=axis.get_xaxis_transform(), ha=side, va="top", size=8)
        if name == "kl" and steps:  # K3 has a heavy tail: one token can be worth a hundred steps
            each = np.array([[e["kl_attempt1"], e["kl_attempt2"]] for e in steps], dtype=float)
            usual = 4 * np.nanquantile(each, 0.95) if np.isfinite(each).any() else 0
            if 0 < usual < np.nanmax(each):
                axis.set_ylim(-0.02 * usual, usual)
                title += ", peaks cut off"
        axis.axhline(0, color="black", linewidth=0.5)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("optimizer step")
        if axis.get_legend_handles_labels()[1]:
            axis.legend(fontsize=7)
    with writing(folder / "curves.png"):
        figure.savefig(folder / ".curves.png.tmp", dpi=110, format="png")
        os.replace(folder / ".curves.png.tmp", folder / "curves.png")
    plt.close(figure)


def model_card(config: Config, evals: list[dict[str, Any]], folder: Path) -> str:
    """The README.md of a saved adapter: the hub's metadata, how it was made and measured, how to load it."""
    evals = [e for e in evals if "eval_only" not in e]
    label = folder.name if folder.name.startswith("stage") else f"{folder.parent.name}/{folder.name}"
    final = [e for e in evals if e["checkpoint"] == label and "adapter" not in e]
    local = {name: Path(name).exists() for name in (config.model.name, config.dataset.name)}  # the hub refuses these
    base, data = (Path(name).name if local[name] else name for name in (config.model.name, config.dataset.name))
    metadata = huggingface_hub.ModelCardData(
        base_model=None if local[config.model.name] else base,
        datasets=None if local[config.dataset.name] else [data],
        library_name="peft",
        pipeline_tag="text-generation",
        model_name=config.run_name if final else None,
        tags=["lora", "score", "self-correction", "reinforcement-learning"],
        eval_results=[
            huggingface_hub.EvalResult(
                task_type="text-generation",
                dataset_name=data,
                dataset_type=data,
                dataset_split=e.get("held_out"),
                metric_type="accuracy",
                metric_name=f"accuracy of attempt {number}",
                metric_value=e[f"acc_attempt{number}"],
            )
            for e in final[-1:]
            for number in (1, 2)
        ]
        or None,
    )
    train, last = config.train, "stage2" if config.train.stage2_epochs else "stage1"
    where = config.output.push_to_hub if config.output.push_to_hub and folder.name == last else folder
    table = f"In the table, `{label}` is this adapter on held-out rows.\n" if final else "Not evaluated yet.\n"
    table += f"\n{results_table(evals)}\n" if evals else ""
    reward = ", ".join(f"`{name}`" for name in config.reward.names)
    reward += f", weighted {config.reward.weights}," if config.reward.weights else ""
    system = f"System prompt:\n\n```\n{config.prompts.system}\n```\n\n" if config.prompts.system else ""
    opening = [{"role": "system", "content": config.prompts.system}] if system else []
    opening, budget = opening + example_turns(config.prompts), train.max_new_tokens_attempt2
    turns = json.dumps(example_turns(config.prompts), indent=1, ensure_ascii=False)
    examples = (
        "Worked examples, sent before the problem as earlier turns, with their reasoning also where the chat "
        f"template would cut it:\n\n```json\n{turns}\n```\n\n"
        if config.prompts.examples
        else ""
    )
    return f"""---
{metadata.to_yaml()}
---

# {config.run_name}

A LoRA adapter (r = {config.model.lora.r}) of `{base}`, trained by reinforcement learning to correct its own answers:
SCoRe, [Kumar et al., ICLR 2025](https://arxiv.org/abs/2409.12917). Data: `{data}`. Reward: {reward} with
`{config.reward.answer_extractor}`. Learning rate {train.learning_rate:g}, alpha {train.alpha:g}, beta1 {train.beta1:g},
beta2 {train.beta2:g}, seed {train.seed}. {table}
## Prompts

{system}{examples}Sent after the first answer (as the token ids it came in, not encoded anew), to get the corrected one:

```
{config.prompts.self_correction.strip()}
```

## Use

```python
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

model, tokenizer = AutoPeftModelForCausalLM.from_pretrained("{where}"), AutoTokenizer.from_pretrained("{where}")

def encode(turns):
    text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    return tokenizer(text.split("FIRST ATTEMPT")[-1], add_special_tokens=False)["input_ids"]

def answer(ids):
    out = model.generate(input_ids=torch.tensor([ids], device=model.device), max_new_tokens={budget}, do_sample=False,
                         repetition_penalty=1.0)
    return [token for token in out[0, len(ids):].tolist() if token not in tokenizer.all_special_ids]

turns = {opening!r}
turns += [{{"role": "user", "content": "A pen costs 3 dollars. What do 7 cost?"}}]
question = encode(turns)
first = answer(question)
correction = {config.prompts.self_correction!r}
turns += [{{"role": "assistant", "content": "FIRST ATTEMPT"}}, {{"role": "user", "content": correction}}]
second = answer(question + first + encode(turns))
```
"""


@on_main
def start_wandb(run: Run, run_id: str | None) -> None:
    """Starts W&B: online with a login and a network, else offline; never prompts, never waits, never stops a run."""
    project = run.config.wandb_project
    if not project or os.environ.get("WANDB_MODE") == "disabled":
        return
    mode = os.environ.get("WANDB_MODE") or ("online" if wandb_reachable() else "offline")
    with at_the_loggers_risk(run):
        import wandb

        run.wandb = wandb.init(
            project=project,
            name=run.config.run_name,
            config=run.config.model_dump(),
            dir=str(run.folder),
            mode=mode,
            id=run_id,
            resume="allow" if run_id else None,
            settings=wandb.Settings(silent=True, console="off", init_timeout=20, x_disable_stats=True),
        )
        run.wandb.define_metric("*", step_metric="global_step")
    if mode == "offline" and run.wandb:
        say(f"W&B is offline; later: wandb sync {run.folder / 'wandb'}/offline-run-*")


def log_to_wandb(run: Run, event: dict[str, Any], samples: list[dict[str, Any]]) -> None:
    """Numbers under stage1/, stage2/, eval/ or validation/ on one global step; with an evaluation also tables of
    rollouts, curves.png, and the results as the run's summary."""
    import wandb

    numbers = {key: value for key, value in event.items() if isinstance(value, (int, float))}
    prefix = event.get("held_out", "eval") if event["event"] == "eval" else f"stage{event['stage']}"
    values: dict[str, Any] = {f"{prefix}/{key}": value for key, value in numbers.items()}
    if event["event"] == "train":
        run.rollouts = (run.rollouts + samples)[-100:]
    else:
        for name, rows in ((f"{prefix}/samples", samples[:100]), ("train/rollouts", run.rollouts)):
            if rows:
                values[name] = wandb.Table(columns=list(rows[0]), data=[[row.get(k) for k in rows[0]] for row in rows])
        values["curves"] = wandb.Image(str(run.folder / "curves.png"))
        run.wandb.summary.update({f"{event['checkpoint']}/{key}": value for key, value in numbers.items()})
        run.rollouts = []
    run.wandb.log(values | {"global_step": event["global_step"]})


@contextmanager
def at_the_loggers_risk(run: Run) -> Iterator[None]:
    """A logger must not stop a run: whatever W&B raises is said in a line, and W&B is off from there on."""
    try:
        yield
    except Exception as error:
        say(f"W&B is off from here on: {first_line(error)}")
        run.wandb = None


def wandb_reachable() -> bool:
    """A login (WANDB_API_KEY or ~/.netrc), and a server that answers within 3 seconds."""
    url = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai"))
    try:
        login = os.environ.get("WANDB_API_KEY") or netrc.netrc().authenticators(url.hostname)
        if login:
            socket.create_connection((url.hostname, url.port or 443), timeout=3).close()
        return bool(login)
    except (OSError, netrc.NetrcParseError):
        return False


def say_best_on_validation(run: Run) -> None:
    """The checkpoint with the highest Acc@t2 on the validation rows; a choice that is left to the reader."""
    validated = [e for e in run.evals() if "held_out" in e and not e["checkpoint"].endswith("/step_0")]
    if not validated:
        return
    best, last = max(reversed(validated), key=lambda e: e["acc_attempt2"]), validated[-1]  # the latest of equals
    stage = best["checkpoint"].partition("/")[0]
    ends_stage = [e for e in validated if e["checkpoint"].startswith(stage)][-1] is best
    place = run.folder / (stage if ends_stage else best["checkpoint"])
    gone = "" if place.exists() else ", no longer kept (output.keep_checkpoints)"
    say(
        f"Best on the {best['n']} validation rows: {place}{gone}, Acc@t2 {best['acc_attempt2']:.3f}"
        + f"; of the last, which output.* merges and pushes, {last['acc_attempt2']:.3f}" * (best is not last)
        + "."
    )


def hand_over(args: argparse.Namespace, config: Config, run: Run, policy: Policy) -> None:
    """When all is trained, one process goes on alone: the table, the merged model, the upload."""
    say("\n" + results_table(run.evals()), always=True)
    say_best_on_validation(run)
    if run.wandb:
        with at_the_loggers_risk(run):
            run.wandb.finish()
    final = max(run.folder.glob("stage[12]/adapter_config.json"), default=None) if not args.eval_only else None
    if final and config.output.merge:
        save_merged(policy, run.folder / "merged")
    if final and config.output.push_to_hub:
        push_to_hub(final.parent, config.output.push_to_hub)
    say(f"Done in {time.time() - run.started:.0f} s: {where_to_look(config)}")


# ---------------------------------------------------------------------------------------------------------- signals


class Interrupted(Exception):
    """A signal asked the run to stop; everything that is finished has been saved."""


SIGNALS_SEEN: list[float] = []  # their times


def note_signal(number: int, _frame: Any) -> None:
    """First Ctrl-C or SIGTERM: stop after the step in hand. Second: at once."""
    SIGNALS_SEEN.append(time.monotonic())
    if len(SIGNALS_SEEN) == 1 and MAIN:
        os.write(1, b"Stopping at the next safe point; once more to stop at once.\n")  # print may be in use
    elif PROCESSES.num_processes == 1 or SIGNALS_SEEN[-1] - SIGNALS_SEEN[0] > 2:  # launchers pass a Ctrl-C on
        os._exit(130)


def asked_to_stop() -> bool:
    """Has any process had a signal? All of them ask together."""
    return any(gather_object([bool(SIGNALS_SEEN)]))


def stop_if_asked() -> None:
    if asked_to_stop():
        raise Interrupted


# ------------------------------------------------------------------------------------------------------------ start


def main(args: argparse.Namespace, config: Config) -> int:
    """Runs and turns every way of ending into an exit code: 0 done, 2 the user's input, 130 interrupted, 1 the rest."""
    global QUIET
    QUIET = args.quiet
    signal.signal(signal.SIGINT, note_signal)
    signal.signal(signal.SIGTERM, note_signal)
    try:
        with watching_peers():
            run, policy = train_and_evaluate(args, config)
        hand_over(args, config, run, policy)
    except UserError as error:
        code, line = 2, error if MAIN else f"Process {PROCESSES.process_index}: {error}"
    except RewardError as error:
        key = "answer_extractor" if str(error).startswith("answer extractor") else "fn"
        code, line = 2, f"reward.{key}: {error}"
    except Interrupted:
        again = shlex.join(part for part in sys.argv if part not in ("--resume", "--overwrite"))
        shown = where_to_look(config)
        shown = f"Interrupted. So far: {shown}." if shown else "Interrupted."
        code, line = 130, f"{shown} Continue with: python {again}{' --resume' * (not args.eval_only)}"
    except RunError as error:
        code, line = 1, error
    except torch.OutOfMemoryError:
        code, line = (
            1,
            (
                "Out of GPU memory in a rollout; lower train.stage1_batch_size, train.stage2_batch_size or "
                "train.num_generations (in an evaluation: eval.batch_size, eval.samples)"
            ),
        )
    except OSError as error:
        code, line = 1, f"{error.filename or config.output.dir}: {error.strerror or error}"
    except RuntimeError as error:
        if PROCESSES.num_processes == 1:
            raise
        code, line = 1, f"Process {PROCESSES.process_index} stops, as another has: {first_line(error)}"
    else:
        PROCESSES.destroy_process_group()
        return 0
    if MAIN or code != 130:
        print(line, file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main(ARGS, CONFIG))
