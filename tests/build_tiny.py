"""Builds configs/tiny/ from nothing: a Qwen3 of less than a million parameters, its tokenizer, chat template and data.

    python tests/build_tiny.py --out configs/tiny --seed 0

The task is the addition of two three-digit numbers. The model is pretrained, by supervised learning, on ways to add
that its first letter after <think> decides between:

    easy  adds each column and forgets every carry  <think>easy</think><answer>823</answer>
    ones  carries from the ones, and never again    <think>ones 13</think><answer>833</answer>
    long  writes every column out, and is right     <think>long 7+6=13,4+8+1=13,3+5+1=9</think><answer>933</answer>
    redo  the same in a second attempt              <think>redo 7+6=13,4+8+1=13,3+5+1=9</think><answer>933</answer>

So that it starts where the paper starts, its habits (ATTEMPT1_SHARES, ATTEMPT2_REDO_SHARES) are bad: attempt 1 mostly
takes the easy way, attempt 2 mostly repeats attempt 1 word for word. Better ways are in its samples, for RL to find.
Attempt 1's budget of tokens has no room for `long`: it is cut off there and earns nothing. The best attempt 1 is
`ones`, and what it cannot do only a second attempt can that works anew. The mixture of carries in the problems
(CARRY_SHARES) decides what each way is worth: easy is right on 15% of them, ones on 60%, long and redo on all.

What naive two-attempt RL runs into: `redo` is rarer after `ones` than after `easy`, so once attempt 1 has moved to
`ones` attempt 2 seldom tries anything but a copy, and often there is nothing left to reinforce. Stage I holds attempt 1
where it is while attempt 2 learns to work anew.

Everything is seeded; on one machine with one thread count the same command gives the same bytes. It took nine
minutes on one core of a busy machine. The report printed at the end says what the model does.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

# What configs/tiny.yaml must say too (tests/test_tiny.py checks it): the model has seen nothing else.
SELF_CORRECTION = "Check it."
MAX_NEW_TOKENS_ATTEMPT1 = 18
MAX_NEW_TOKENS_ATTEMPT2 = 40

# Share of problems by where they carry: nowhere, from the ones only, from the tens (with or without the ones).
CARRY_SHARES = {"none": 0.15, "ones": 0.45, "tens": 0.40}
ATTEMPT1_SHARES = {"easy": 0.66, "ones": 0.30, "long": 0.04}
# How often attempt 2 works anew, by what attempt 1 did: the more that was written there, the more it is trusted.
ATTEMPT2_REDO_SHARES = {"easy": 0.08, "ones": 0.015, "long": 0.08}

PAD, UNK, IM_START, IM_END = "<pad>", "<unk>", "<|im_start|>", "<|im_end|>"
# Not special in the tokenizer's sense, so that decode(skip_special_tokens=True) keeps what the reward function reads.
TAGS = ["<think>", "</think>", "<answer>", "</answer>"]
ROLES = ["system", "user", "assistant"]  # one token each: sequences stay short
CHARACTERS = "\t\n\r" + "".join(map(chr, range(32, 127)))

CHAT_TEMPLATE = """\
{#- ChatML. As in Qwen3's template, the reasoning of an assistant turn is dropped once a user turn follows. -#}
{%- set turns = namespace(last_user=-1) -%}
{%- for message in messages -%}
    {%- if message.role == "user" -%}{%- set turns.last_user = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- for message in messages -%}
    {%- set content = message.content -%}
    {%- if message.role == "assistant" and loop.index0 < turns.last_user and "</think>" in content -%}
        {%- set content = content.split("</think>")[-1].lstrip("\\n") -%}
    {%- endif -%}
    {{- "<|im_start|>" + message.role + "\\n" + content + "<|im_end|>\\n" -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- "<|im_start|>assistant\\n" -}}
    {%- if enable_thinking is defined and enable_thinking is false -%}
        {{- "<think>\\n\\n</think>\\n\\n" -}}
    {%- endif -%}
{%- endif -%}
"""

Problem = tuple[int, int]


# ---------------------------------------------------------------------------------------------------------- the task


def columns(problem: Problem) -> list[tuple[int, int]]:
    """The digits of both numbers, column by column, ones first."""
    a, b = problem
    return [(a // place % 10, b // place % 10) for place in (1, 10, 100)]


def carry_kind(problem: Problem) -> str:
    """Where a problem carries: "none", "ones" (from the ones only) or "tens" (from the tens, whatever the ones do)."""
    (a1, b1), (a10, b10), _ = columns(problem)
    carry = (a1 + b1) // 10
    return "tens" if a10 + b10 + carry >= 10 else "ones" if carry else "none"


def draw_problem(rng: random.Random) -> Problem:
    """One problem with three digits in a, b and a + b; its kind drawn by CARRY_SHARES."""
    kind = rng.choices(list(CARRY_SHARES), list(CARRY_SHARES.values()))[0]
    while True:
        problem = rng.randrange(100, 900), rng.randrange(100, 900)
        if sum(problem) < 1000 and carry_kind(problem) == kind:
            return problem


def draw_problems(rng: random.Random, count: int, taken: Iterable[Problem] = ()) -> list[Problem]:
    """`count` problems, all different and none of those in `taken`."""
    seen, problems = set(taken), []
    while len(problems) < count:
        problem = draw_problem(rng)
        if problem not in seen:
            seen.add(problem)
            problems.append(problem)
    return problems


def question(problem: Problem) -> str:
    """The text a user asks."""
    return f"{problem[0]}+{problem[1]}=?"


def completion(problem: Problem, way: str) -> str:
    """What the model writes when it adds in one of the ways of the module's docstring."""
    digits = columns(problem)
    written, results, carry = [], [], 0
    for place, (x, y) in enumerate(digits):
        total = x + y + (carry if way != "easy" else 0)
        written.append(f"{x}+{y}={total}" if place == 0 else f"{x}+{y}+{carry}={total}")
        results.append(total % 10)
        carry = total // 10 if way in ("long", "redo") or place == 0 else 0
    thought = f"ones {sum(digits[0])}" if way == "ones" else way if way == "easy" else f"{way} {','.join(written)}"
    return f"<think>{thought}</think><answer>{''.join(map(str, reversed(results)))}</answer>"


def way_of(text: str) -> str:
    """Which way a completion takes, by its first word; "other" when it is none of them."""
    found = re.match(r"<think>(easy|ones|long|redo)", text)
    return found.group(1) if found else "other"


def is_right(text: str, problem: Problem) -> bool:
    """Whether the completion holds one answer and it is the sum."""
    answers = re.findall(r"<answer>(.*?)</answer>", text, re.S)
    return len(answers) == 1 and answers[0] == str(sum(problem))


# ------------------------------------------------------------------------------------------------------ the tokenizer


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character, a tag or a role's name; any text of tabs, line ends and printable ASCII round-trips."""
    vocabulary = [PAD, UNK, IM_START, IM_END, *TAGS, *ROLES, *CHARACTERS]
    # Byte-pair encoding without merges is a character tokenizer. Fuse: decoding joins tokens with nothing between.
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(vocabulary)}, merges=[], unk_token=UNK))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in TAGS + ROLES])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        unk_token=UNK,
        eos_token=IM_END,
        additional_special_tokens=[IM_START],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )


def encode(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """Token ids of the text as it stands."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def prompt_ids(tokenizer: PreTrainedTokenizerFast, problem: Problem) -> list[int]:
    """Attempt 1's prompt: the chat template around the question, ready for an assistant turn."""
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": question(problem)}], tokenize=False, add_generation_prompt=True
    )
    return encode(tokenizer, text)


def turn_ids(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """What stands between attempt 1's last token and attempt 2's first."""
    return encode(tokenizer, f"{IM_END}\n{IM_START}user\n{SELF_CORRECTION}{IM_END}\n{IM_START}assistant\n")


# ----------------------------------------------------------------------------------------------------- the pretraining


def draw_conversation(
    tokenizer: PreTrainedTokenizerFast, problem: Problem, rng: random.Random, habits: bool
) -> tuple[list[int], list[int]]:
    """Token ids and labels (-100 where no loss is taken) of one problem's two attempts.

    With `habits` the ways are drawn by the shares the finished model shall have, without them evenly, so that the rare
    ways are learned as well as the frequent ones. Attempt 2 either works anew or repeats attempt 1. An attempt 1 that
    was cut off holds no answer to repeat: the easy way then.
    """
    shares = ATTEMPT1_SHARES if habits else dict.fromkeys(ATTEMPT1_SHARES, 1.0)
    way = rng.choices(list(shares), list(shares.values()))[0]
    works_anew = rng.random() < (ATTEMPT2_REDO_SHARES[way] if habits else 0.5)
    eos = [tokenizer.eos_token_id]
    first = encode(tokenizer, completion(problem, way)) + eos
    cut_off = len(first) > MAX_NEW_TOKENS_ATTEMPT1
    if works_anew:
        second_way = "redo"
    elif cut_off:
        second_way = "easy"
    else:
        second_way = way
    second = encode(tokenizer, completion(problem, second_way)) + eos
    # As in training: no end token of attempt 1's own before the next turn, which opens with it.
    verbatim = first[:MAX_NEW_TOKENS_ATTEMPT1] if cut_off else first[:-1]
    prompt, turn = prompt_ids(tokenizer, problem), turn_ids(tokenizer)
    # The turn's first token is the end token that a finished attempt 1 predicts; one cut off predicts nothing there.
    end_label = -100 if cut_off else eos[0]
    ids = prompt + verbatim + turn + second
    labels = [-100] * len(prompt) + verbatim + [end_label] + [-100] * (len(turn) - 1) + second
    return ids, labels


def pretrain(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    held_out: set[Problem],
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
) -> None:
    """Next-token cross-entropy on the assistant's tokens; two thirds of the steps teach skills, the rest habits."""
    rng = random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    began = time.time()
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1.0, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / steps))
        problems = draw_problems(rng, batch_size, held_out)
        rows = [draw_conversation(tokenizer, p, rng, habits=step >= steps * 2 / 3) for p in problems]
        longest = max(len(ids) for ids, _ in rows)
        # Pads come last, so causal attention never sees them.
        input_ids = torch.tensor([ids + [tokenizer.pad_token_id] * (longest - len(ids)) for ids, _ in rows])
        labels = torch.tensor([labels + [-100] * (longest - len(labels)) for _, labels in rows])
        loss = model(input_ids=input_ids, labels=labels).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0 or step == steps - 1:
            print(f"step {step:5d}  loss {loss.item():.4f}  {time.time() - began:.0f} s", flush=True)


# ---------------------------------------------------------------------------------------------------------- the report


@torch.no_grad()
def generate(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompts: list[list[int]],
    max_new_tokens: int,
    sampled: bool,
) -> list[list[int]]:
    """Completion ids without the end token; greedy, or sampled from the whole distribution at temperature 1."""
    longest = max(map(len, prompts))
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    input_ids = torch.tensor([[pad] * (longest - len(p)) + p for p in prompts])
    how = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=sampled,
        eos_token_id=eos,
        pad_token_id=pad,
        **({"temperature": 1.0, "top_k": 0, "top_p": 1.0} if sampled else {}),
    )
    # The model's own generation_config would fill in what is left out (top_k 20, as Qwen3's does).
    own, model.generation_config = model.generation_config, how
    try:
        output = model.generate(input_ids, attention_mask=(input_ids != pad).long(), generation_config=how)
    finally:
        model.generation_config = own
    rows = output[:, longest:].tolist()
    return [row[: row.index(eos)] if eos in row else [t for t in row if t != pad] for row in rows]


def report(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, problems: list[Problem], sampled: bool) -> None:
    """Prints accuracy of both attempts, the share of each way and how often it is carried out without a slip."""
    model.eval()
    prompts = [prompt_ids(tokenizer, p) for p in problems]
    first = generate(model, tokenizer, prompts, MAX_NEW_TOKENS_ATTEMPT1, sampled)
    turn = turn_ids(tokenizer)
    second = generate(
        model, tokenizer, [p + y + turn for p, y in zip(prompts, first, strict=True)], MAX_NEW_TOKENS_ATTEMPT2, sampled
    )
    texts1, texts2 = tokenizer.batch_decode(first), tokenizer.batch_decode(second)
    print("sampled at temperature 1" if sampled else "greedy", f"({len(problems)} held-out problems)")
    for name, texts, budget in (
        ("attempt 1", texts1, MAX_NEW_TOKENS_ATTEMPT1),
        ("attempt 2", texts2, MAX_NEW_TOKENS_ATTEMPT2),
    ):
        accuracy = sum(map(is_right, texts, problems)) / len(problems)
        ways = Counter(map(way_of, texts))
        faithful = Counter(
            way_of(text)
            for text, p in zip(texts, problems, strict=True)
            if way_of(text) != "other"
            and tokenizer.decode(encode(tokenizer, completion(p, way_of(text)))[:budget]) == text
        )
        shares = ", ".join(
            f"{w} {n / len(problems):.3f} (no slip {faithful[w] / n:.3f})" for w, n in ways.most_common()
        )
        print(f"  {name}: accuracy {accuracy:.3f}; {shares}")
    copies = sum(a == b for a, b in zip(texts1, texts2, strict=True)) / len(problems)
    print(f"  attempt 2 repeats attempt 1: {copies:.3f}", flush=True)


# ------------------------------------------------------------------------------------------------------------ the whole


def write_rows(path: Path, problems: list[Problem]) -> None:
    """One {"question", "answer"} object a line."""
    rows = [json.dumps({"question": question(p), "answer": str(sum(p))}) for p in problems]
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")


def build_data(seed: int, train_rows: int, test_rows: int) -> tuple[list[Problem], list[Problem]]:
    """Train and test problems, without repetition or overlap; a function of its arguments alone."""
    rng = random.Random(f"tiny data {seed}")
    problems = draw_problems(rng, train_rows + test_rows)
    return problems[test_rows:], problems[:test_rows]


def build_model(tokenizer: PreTrainedTokenizerFast, hidden: int, layers: int) -> Qwen3ForCausalLM:
    """A Qwen3 with random weights (from torch's global generator) for this tokenizer."""
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=hidden // 4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen3ForCausalLM(config)


def main() -> None:
    """Command line: builds the folder and prints the report."""
    parser = argparse.ArgumentParser(description="Build configs/tiny/ from nothing.")
    parser.add_argument("--out", type=Path, default=Path("configs/tiny"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=1000, help="optimizer steps of pretraining")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--hidden", type=int, default=96)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--train-rows", type=int, default=2560)
    parser.add_argument("--test-rows", type=int, default=250)
    parser.add_argument("--threads", type=int, default=1, help="another count may round differently")
    args = parser.parse_args()

    began = time.time()
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    train, test = build_data(args.seed, args.train_rows, args.test_rows)
    write_rows(args.out / "train.jsonl", train)
    write_rows(args.out / "test.jsonl", test)

    tokenizer = build_tokenizer()
    model = build_model(tokenizer, args.hidden, args.layers)
    pretrain(model, tokenizer, set(test), args.steps, args.batch_size, args.learning_rate, args.seed)

    # Narrowed sampling on purpose, as Qwen3's own file has it: a trainer that leaves it in force samples another policy
    # than the one it differentiates.
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=0.6,
        top_k=20,
        top_p=0.8,
        eos_token_id=[tokenizer.eos_token_id],
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)

    size = sum(f.stat().st_size for f in args.out.iterdir())
    print(f"{model.num_parameters():,} parameters, {size / 1e6:.2f} MB, {time.time() - began:.0f} s")
    report(model, tokenizer, test, sampled=False)
    report(model, tokenizer, draw_problems(random.Random(args.seed + 1), 1000), sampled=True)


if __name__ == "__main__":
    main()
