"""Rewards and answers: how an attempt is graded (config section `reward`).

An extractor pulls the final answer out of a text, "" where there is none. The same one reads the model's output
("<think>...</think><answer>42</answer>") and the dataset's target ("... #### 42"). A match says whether two answers
mean the same. A reward grades a batch of outputs. To add your own, write a file of them and name it, and them, in the
YAML (`reward.module: my_rewards.py`):

    from reward_function import Extractor, is_correct, register_extractor, register_match, register_reward

    @register_extractor("last_line")
    def last_line(text: str) -> str:
        return text.strip().rpartition("\\n")[2]

    @register_match("within_one_degree")
    def within_one_degree(answer: str, reference: str) -> bool:
        try:
            return abs(float(answer) - float(reference)) <= 1
        except ValueError:  # a policy in training writes anything at all
            return False

    @register_reward("short_and_right")
    def short_and_right(predictions: list[str], targets: list[str], extract: Extractor) -> list[float]:
        pairs = zip(predictions, targets, strict=True)
        return [is_correct(p, t, extract) * (1.0 if len(p) < 500 else 0.5) for p, t in pairs]

`reward.match` (default: "equal") and the extractor decide accuracy, and which corrections mended or repeated an answer,
whatever the reward.

A reward function written for TRL's GRPOTrainer works as it is, without being registered:

    def tagged(completions, **columns):
        return [float("<answer>" in completion[0]["content"]) for completion in completions]

Name it by its import path (`reward.fn: trl.rewards.accuracy_reward`), or as a function in the file of `reward.module`
(`reward.fn: tagged`). A list, which may hold registered names too, is a weighted sum: `reward.fn: [a, b]` with
`reward.weights: [1.0, 0.2]`, 1.0 each if not given. A None, "does not apply", is left out of the sum; the reward is 0
where all of them say so, and a function that says so of a whole batch is warned of once.

- It gets lists over rows by name: `completions` ([{"role": "assistant", "content": text}]), `prompts` (the messages
  before them), `completion_ids`, every column of the dataset, and `target_answer`, what the extractor finds in the
  target; no `trainer_state`, `log_extra` and `log_metric`, which TRL gives.
- `reward.columns` gives a column by another name as well: TRL's accuracy_reward asks for `solution`, so on GSM8K it
  needs `reward.columns: {solution: target_answer}`: in the whole target, math-verify may take a number or $ before the
  answer. Where the answer is LaTeX, name the whole target's column: math-verify finds a formula by its $ or box only.
- accuracy_reward reads LaTeX only: ask in prompts.system for the answer as <answer>\\boxed{...}</answer>, which the
  extractors here read too. think_format_reward wants the output to begin with <think>.

What everything here keeps to: an answer that cannot be extracted is never correct; a problem that is copied is no
answer; and since a policy in training writes anything at all, no text makes a grader raise or hang (linear-time scans,
patterns that cannot backtrack).
"""

from __future__ import annotations

import asyncio
import atexit
import difflib
import importlib
import importlib.util
import inspect
import io
import json
import math
import operator
import re
import signal
import subprocess
import sys
import threading
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from fractions import Fraction
from functools import lru_cache, partial
from itertools import chain, repeat
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple

Extractor = Callable[[str], str]
Match = Callable[[str, str], bool]
RewardFn = Callable[[list[str], list[str], Extractor], list[float]]

REWARD_FNS: dict[str, RewardFn] = {}
ANSWER_EXTRACTORS: dict[str, Extractor] = {}
MATCH_FNS: dict[str, Match] = {}
DEFAULT_MATCH = "equal"


class RewardError(ValueError):
    """A reward function or an extractor misbehaved; the message is one line that names it and the text at fault."""


def _register(registry: dict[str, Callable], kind: str, name: str) -> Callable[[Callable], Callable]:
    if not isinstance(name, str):
        raise ValueError(f'the decorator of {name.__name__} needs a name: @register_...("{name.__name__}")')

    def add(fn: Callable) -> Callable:
        if name in registry:
            raise ValueError(f"{kind} {name!r} is registered twice")
        registry[name] = fn
        return fn

    return add


# Decorators: @register_reward("mine") makes a RewardFn available as `reward.fn: mine`, and so on.
register_reward = partial(_register, REWARD_FNS, "reward function")
register_extractor = partial(_register, ANSWER_EXTRACTORS, "answer extractor")
register_match = partial(_register, MATCH_FNS, "match")


# ---- extractors ------------------------------------------------------------------------------------------------------


@register_extractor("identity")
def identity(text: str) -> str:
    """The <answer> content where there is a pair (an output), else the whole text (a bare target), stripped.

    A text with one of the four tags and no answer pair is an output without an answer.
    """
    tagged = answer_tag(text)
    return tagged if tagged is not None else "" if _TAG.search(text) else text.strip()


@register_extractor("gsm8k_hash")
def gsm8k_hash(text: str) -> str:
    """The number in the last <answer> pair or, without a pair, in what follows the last "####" on its line. A text
    that is a number and nothing else (a column of bare numbers) is its own answer.

    It is the first number after the last "=", else the first of all: it pays "5 apples and 3 pears" as 5, and
    "2 + 3 = 5" as 5. "2 + 3" is 2, and "100/4", a division left undone, matches no number. There is no fallback to the
    last number of a text without tag and mark: it would reward answers that ignore the format.
    Thousands may be grouped by commas or by spaces of any kind, ordinary ones too: "1 234" is 1234.
    """
    tagged = answer_tag(text)
    if tagged is None and "####" in text:
        tagged = text.rpartition("####")[2].strip().partition("\n")[0]
    if tagged is not None:
        return first_number(tagged)
    number = first_number(text) if len(text) <= DIGITS else ""
    return number if _tidy(text).replace(",", "").lstrip("+") == number else ""


@register_extractor("math_final_answer")
def math_final_answer(text: str) -> str:
    r"""The last <answer> pair's content or, without a pair, the last \boxed{...}; of a box inside a pair, its content.

    A text with neither is its own answer only if it can hardly be anything else (a dataset column of bare LaTeX): one
    short line without prose or tags. An unformatted "The answer is 4" is therefore no answer; an output that is "4" and
    nothing else is one, as a target looks the same. Inside a pair, a label before the answer ("**Answer:** 5", "The
    answer is 5", "= 5") and Markdown around it (**5**) are left out.
    """
    tagged = answer_tag(text)
    text = text.strip() if tagged is None else tagged
    boxed = last_boxed(text)
    if boxed is not None:
        text = boxed
    elif tagged is not None:
        text = _LABEL.sub("", text)
    elif len(text) > 200 or "\n" in text or _NOT_BARE.search(_COMMAND.sub(" ", text)):
        return ""
    text = _MATH_MODE.sub("", text.strip("`*")).strip().rstrip(".").rstrip()
    words = _TEXT.fullmatch(text)
    return words[1].strip() if words else text


_TAG = re.compile(r"</?(?:think|answer)>")
_TEXT = re.compile(r"\\(?:text(?:bf|it|rm|normal)?|mathrm|mathbf|mbox)\s*+\{([^{}]*+)\}")
_COMMAND = re.compile(_TEXT.pattern + r"|\\[A-Za-z]++")
_NOT_BARE = re.compile(_TAG.pattern + r"|[^\W\d_]{2,}+(?::|\s++[^\W\d_]{2})")  # "</think>", "Answer:", "it is"
_LABEL = re.compile(r"(?i)^[*_ ]{0,4}(?:(?:the |my )?(?:final )?answer[*_ ]{0,3}(?:[:=]|is )[*_ ]{0,4}|=\s*)")
_MATH_MODE = re.compile(r"\\?\$|^\s*+\\[(\[]|\\[)\]]\s*+$")
_BOX = re.compile(r"(?s)\\(?:boxed|fbox)\s*+\{|\\(?:boxed|fbox)(?![A-Za-z])\s*+(?![^\W\d_]{2})(?=[^\s{}$])|\\.|[{}]")
_WORD = re.compile(r"[^\s$]*+")


def answer_tag(text: str) -> str | None:
    """Content of the last complete <answer>...</answer> pair, stripped; None where there is no pair."""
    _, opened, content = text.rpartition("</answer>")[0].rpartition("<answer>")
    return content.partition("</answer>")[0].strip() if opened else None


def last_boxed(text: str) -> str | None:
    r"""Content of the last complete \boxed{...} or \fbox{...}, nested braces balanced, else of "\boxed 5"; else None.

    "\boxed as asked" is no box: a word follows.
    """
    box, bare = (-1, 0), None  # where the content of the last box with braces is; the last box without
    open_braces: list[int] = []  # a box's brace: where its content starts; any other brace: -1
    for token in _BOX.finditer(text):
        if token[0] == "}":
            box = max(box, (open_braces.pop(), token.start())) if open_braces else box
        elif token[0][-1] == "{" and token[0] != "\\{":
            open_braces.append(token.end() if len(token[0]) > 1 else -1)
        elif len(token[0]) > 2:  # two characters: an escaped brace, another command's head
            bare = token.end()
    if box[0] >= 0:
        return text[slice(*box)]
    return None if bare is None else _WORD.match(text, bare)[0]


# ---- do two answers match? -------------------------------------------------------------------------------------------


@register_match(DEFAULT_MATCH)
def answers_match(answer: str, reference: str) -> bool:
    r"""Do two extracted answers mean the same? The relation is symmetric; "" matches nothing.

    - A literal number matches literal numbers of the same value only: 12, -1,234.5, 3/4, 2 1/2, \frac{3}{4}, 1.5e3,
      1.5\times10^3. An operation left undone is none: 173+319, 100/4 and \binom{10}{3} match no number, so that copying
      the problem is never right. (10^6 alone matches 1e6 and 1\cdot10^6, not 1000000: it may be the problem.)
    - Other closed values match by value if they have the same operations; signs, fractions, roots, integer powers and
      multiples of a constant are free: 2\sqrt{3} matches \sqrt{12}, not \sqrt{3}+\sqrt{3}. As this holds in both
      directions, a reference that leaves an operation undone, 6!, wants an answer that leaves the same one.
      Rational values are compared exactly, others to 100 digits.
    - Expressions with variables match where math-verify finds them to be the same mathematics.
    - Ordered containers (pairs, intervals, matrices) match item by item. Sets, lists ("1, 2", "1 or 2", \pm 2) and
      unions match in any order, each item as often as it stands there: 4 is not "4, 4". A pair is no set; a list
      without brackets matches either. A bracket of one item is that item. A solved inequality is its interval.
    - "x = 5", "2+3 = 5" and "x \in A" are read as what stands last, if the left side is a name or equal to it and no
      literal number (4=5). An equation to be solved (2x = 10) does not match its solution.
    - Units may be left out, as degrees, currency and % may; different ones do not match (5 cm, 5 kg; nothing is
      converted). So may a base: 52_8 matches 52, not 52_9. A ratio matches the same terms only: 5:1 is not 5 or 10:2.
    - Plain text is read as LaTeX (pi/2, x**2, 2*pi, sqrt(2)), and so is Markdown (**73**). Words match in any case.
    """
    if _INTEGER.fullmatch(answer) and _INTEGER.fullmatch(reference) and max(len(answer), len(reference)) < DIGITS:
        return int(answer) == int(reference)
    a, b = sorted((_canonical(answer), _canonical(reference)))
    try:
        return _same(a, b, _undecided)
    except _Undecided:
        return equivalent(a, b)


class _Undecided(Exception):
    """It takes math-verify to compare two answers."""


def _undecided(a: str, b: str) -> bool:
    raise _Undecided


# ---- one spelling for what can be spelled in several ways

MOST, DIGITS = 300, 1000  # characters of a text that is read as mathematics, and of a number
_INTEGER = re.compile(r"-?\d++", re.ASCII)
_SIGNS = r"·\cdot ⋅\cdot ∙\cdot ×\cdot ∞\infty π\pi θ\theta √\sqrt ±\pm ∓\mp ≤\le ≥\ge ≠\ne ∪\cup ∩\cap ∅\emptyset ∈\in"
_UNICODE = str.maketrans(
    {chr(0xFF01 + i): chr(0x21 + i) for i in range(94)}  # full-width ASCII
    | {c: "\\frac{{{}}}{{{}}}".format(*unicodedata.normalize("NFKC", c).split("⁄")) for c in "½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅐⅛⅜⅝⅞⅑⅒"}
    | {sign[0]: sign[1:] + " " for sign in _SIGNS.split()}
    | dict.fromkeys("−–‐‑‒－", "-")
    | dict.fromkeys("€£¥₹", "$")
    | dict.fromkeys("÷⁄", "/")
    | dict.fromkeys("\u200b\u2060\ufeff", "")
)
_RAISED, _LOWERED = re.compile("[⁰¹²³⁴-⁹⁺⁻]++"), re.compile("[₀-₉]++")
_LEVEL = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻₀₁₂₃₄₅₆₇₈₉", "0123456789+-0123456789")
_THIN_SPACE = re.compile(r"(?<!\\)\\[!,]\s*+|\{(?=,\})|(?<=,)\}")  # 1\,000 and 1{,}000
_LAYOUT = re.compile(
    r"\\(?:left|right|displaystyle|q?quad|degree|[bB]igg?[lr]?)(?![A-Za-z])"
    r"|(?<!\\)\\[;:%\u00a0\u2002-\u200a\u202f\u205f\u3000 ]|[$%°~]|\^\s*+(?:\{\s*+\\circ\s*+\}|\\circ)"
)
_GROUPS = re.compile(r"(?<![\w.,\\])(?<![\d.,] )\d{1,3}+(?: \d{3}(?!\d))++(?! ?[\d/])", re.ASCII)  # 1 234 567
_SPACED_MINUS = re.compile(r"(^|[=(\[{,:]) ?- (?=[\d.\\])")
_UNSIGNED = r"(?:(?:\d{1,3}+(?:,\d{3})++(?!\d|,\d)|\d++(?!,\d))(?:\.\d++)?|\.\d++)(?:[eE][-+]?\d{1,4}+(?!\d))?"
_NUMBER = re.compile(  # 42, -1,234.5, 1e9, 3/4, 2 1/2
    rf"(?<![A-Za-z\d.,])[-+]?(?:\d++\s(?=\d++/))?{_UNSIGNED}(?:\s?/\s?{_UNSIGNED})?", re.ASCII
)
_PLAIN_FRACTION = re.compile(r"\\[dtc]?frac\s*+(?:\{(-?[\d.,]++)\}|(\d))\s*+(?:\{([\d.,]++)\}|(\d))", re.ASCII)


def _tidy(text: str) -> str:
    """The text without what does not change its meaning: currency, %, degrees, layout, spacing, Unicode spellings.

    A minus with a space behind it, where no number can stand before it, is a sign.
    """
    if not text.isascii():
        text = _RAISED.sub(lambda run: "^{" + run[0].translate(_LEVEL) + "}", text)
        text = _LOWERED.sub(lambda run: "_{" + run[0].translate(_LEVEL) + "}", text).translate(_UNICODE)
    text = _LAYOUT.sub(" ", _THIN_SPACE.sub("", text.replace("\\$", "$").replace("-$", "-")))
    text = _GROUPS.sub(lambda number: number[0].replace(" ", ""), " ".join(text.split()))
    return _SPACED_MINUS.sub(r"\1-", text).rstrip(" .")


def first_number(text: str) -> str:
    """The first number after the last "=", else of the whole text, without commas and units; "" if there is none."""
    if _INTEGER.fullmatch(text):
        return text
    text = _TEXT.sub(r" \1 ", _tidy(text))
    text = _PLAIN_FRACTION.sub(r"\1\2/\3\4 ", re.sub(r"(?<=\d)(?=\\[dt]?frac)", " ", text))
    match = _NUMBER.search(text.rpartition("=")[2]) or _NUMBER.search(text)
    return match[0].replace(",", "").lstrip("+") if match else ""


_MARKDOWN = re.compile(r"(?s)(\*\*|`|\*)(?=[^*`])(.*[^*`])\1")
_ALIASES = r"\frac dfrac tfrac cfrac nicefrac sfrac, \binom dbinom tbinom, \le leq leqslant, \ge geq geqslant, \ne neq"
_ALIASES += (
    r", < lt, > gt, / div, \emptyset varnothing, \cdot times ast, \text textbf textit textrm textnormal mathrm mbox"
)
_COMMANDS = {alias: name for name, *aliases in map(str.split, _ALIASES.split(", ")) for alias in aliases}
_FUNCTIONS = "sin|cos|tan|cot|sec|csc|arcsin|arccos|arctan|ln|log|exp"
_ONE = r"(\d|[a-z](?![A-Za-z])|\\pi(?![A-Za-z]))"  # what TeX takes for an argument without braces
_SPELLINGS = [
    (re.compile(pattern), spelling)
    for pattern, spelling in [
        (r"<=", r"\\le "),
        (r">=", r"\\ge "),
        (r"\\\{ ?\\\}", r"\\emptyset "),
        (r"\*\*", "^"),
        (r"\*|(?<=\d) ?x ?(?=10 ?\^)", r"\\cdot "),
        (rf"(?<![\\A-Za-z])(pi|theta|infty|sqrt|{_FUNCTIONS})(?![A-Za-z])", r"\\\1 "),
        (r"(?<![\\A-Za-z])inf(?:inity)?(?![A-Za-z])", r"\\infty "),
        (r"\\log ?_ ?(?:e(?![A-Za-z])|\{ ?e ?\})", r"\\ln "),
        (rf"\\sqrt ?(?:\(([^()]*)\)|{_ONE})", r"\\sqrt{\1\2}"),
        (rf"\\(frac|binom) ?{_ONE}", r"\\\1{\2}"),
        (rf"\\(frac|binom) ?(\{{[^{{}}]*\}}) ?{_ONE}", r"\\\1\2{\3}"),
        (r"\^ ?(-?\d+)", r"^{\1}"),
        (r"(?<=\d)i(?![A-Za-z])", " i"),  # 7i is complex to math-verify only as "7 i"
    ]
]


@lru_cache(maxsize=4096)
def _canonical(text: str) -> str:
    text = _tidy(text)
    if len(text) > MOST:
        return text
    while emphasized := _MARKDOWN.fullmatch(text):
        text = emphasized[2].strip()
    text = re.sub(r"\\([A-Za-z]+)", lambda command: _COMMANDS.get(command[1], command[0]), text.removeprefix("="))
    for pattern, spelling in _SPELLINGS:
        text = pattern.sub(spelling, text)
    while words := _TEXT.fullmatch(text):
        text = words[1].strip()
    return _SPACED_MINUS.sub(r"\1-", " ".join(text.split())).rstrip(" .")


# ---- containers, then values

_MATHS = re.compile(r"[\d\\^_+*/=<>()\[\]{}-]", re.ASCII)
_BRACKET = r"(\\begin|\\?[{(\[])|(\\end|\\?[})\]])"
_LIST = re.compile(  # at "and", "or", ";" and a comma, unless it is one between thousands
    r"(,? ?\\text\{ ?,? ?(?:and|or) ?,? ?\}|,? ?(?<![A-Za-z\\])(?:and|or)(?![A-Za-z])"
    rf"|(?<!\d),|,(?!\d{{3}}(?!\d))|;)|{_BRACKET}"
)
_COORDINATES = re.compile(rf"([,;])|{_BRACKET}")
_UNION = re.compile(rf"(\\cup(?![A-Za-z]))|{_BRACKET}")
_MATRIX = re.compile(r"\\begin\{([pbB]?matrix|array)\}(?:\{[lcr| ]*\})?((?:(?!\\begin).)*)\\end\{\1\}")
_RELATION = re.compile(r"(=|<|>|\\(?:le|ge|ne|in|subset|equiv)(?![A-Za-z]))")
_NAME = re.compile(
    r"(?:[A-Za-z]\(-?\d++\)|_ ?\{?\w++\}?|\\text\{[^{}]*+\}|[A-Za-z\s'(),|{}:]"
    r"|\\(?!sqrt|binom|cdot|pm|mp|int|sum|prod|lim|pi|infty|text)[A-Za-z]++)++"
)


def _same(a: str, b: str, equal: Match) -> bool:
    """Do two canonical texts mean the same? `equal` is asked about expressions and about irrational values."""
    if not a or not b:
        return False
    if _plain(a) == _plain(b) or (_plain(a).casefold() == _plain(b).casefold() and not _MATHS.search(a)):
        return True
    if max(len(a), len(b)) > MOST:
        return _literal(a) == _literal(b) is not None
    (name_a, kind_a, items_a), (name_b, kind_b, items_b) = _form(a, equal), _form(b, equal)
    if "relation" in (kind_a, kind_b) or (name_a and name_b and name_a != name_b):
        both = _RELATION.search(a) and _RELATION.search(b)
        return bool(both) and not any(map(_closed, items_a + items_b)) and equal(a, b)
    kinds = {kind_a, kind_b}
    if kinds == {"value"}:
        return _same_value(items_a[0], items_b[0], equal)
    if len(items_a) != len(items_b) or len(items_a) > 50:
        return False
    if kinds <= {"list", "{}"} or kinds == {"union"} or (kinds == {"list", "union"} and _RELATION.search(a + b)):
        for matches in (lambda x, y: _plain(x) == _plain(y), lambda x, y: _same(x, y, equal)):
            for item in list(items_a):
                found = next((other for other in items_b if matches(item, other)), None)
                if found is not None:
                    items_a.remove(item)
                    items_b.remove(found)
        return not items_a
    ordered = kind_a == kind_b or kinds in ({"list", "()"}, {"list", "[]"})
    return ordered and all(_same(x, y, equal) for x, y in zip(items_a, items_b, strict=True))


def _plain(text: str) -> str:
    """Without spaces, except between digits: 4 9 is not 49."""
    return re.sub(r"(?<!\d) | (?!\d)", "", text)


def _form(text: str, equal: Match) -> tuple[str, str, list[str]]:
    """The name that a text gives to its value ("" without one), the value's kind, and its items.

    Kinds: "value"; in any order "list", "{}", "union"; ordered "()", "[)", ..., "matrix"; "relation": it has no value.
    """
    items = _split(text, _LIST)
    if len(items) > 1:
        return "", "list", [item for item in items if item]
    name, text = _read_relation(text, equal)
    while name is not None:
        if words := _TEXT.fullmatch(text):
            text = words[1].strip()
        if len(members := _split(text, _UNION)) > 1:
            return name, "union", members
        if matrix := _MATRIX.fullmatch(text):
            rows = [row.split("&") for row in matrix[2].split("\\\\") if row.strip()]
            return name, f"matrix {[len(row) for row in rows]}", [cell.strip() for row in rows for cell in row]
        bracket = re.fullmatch(r"\\?([{(\[])(.*?)\\?([})\]])", text)
        items = _split(bracket[2], _COORDINATES) if bracket else []
        if not any(items):
            return name, "value", [text]
        if len(items) > 1:
            return name, bracket[1] + bracket[3], items
        text = items[0]
    return "", "relation", [text]


def _split(text: str, separator: re.Pattern) -> list[str]:
    r"""The parts of a text between separators outside of brackets, \pm 2 as 2 and -2; [] if brackets do not pair."""
    parts, start, depth = [], 0, 0
    for token in separator.finditer(text):
        depth += bool(token[2]) - bool(token[3])
        if depth < 0:
            return []
        if token[1] and depth == 0:
            parts.append(text[start : token.start()])
            start = token.end()
    parts = [part.strip() for part in [*parts, text[start:]]]
    if "\\pm" in text:
        signs = [("\\pm", "+", "\\mp", "-"), ("\\pm", "-", "\\mp", "+")]
        both = [[part.replace(*s[:2]).replace(*s[2:]).removeprefix("+").strip() for s in signs] for part in parts]
        parts = [side for pair in both for side in dict.fromkeys(pair)]
    return parts if depth == 0 else []


def _read_relation(text: str, equal: Match) -> tuple[str | None, str]:
    r"""(name, value) of "name = value", "name \in value" and of a solved inequality, ("", text) of a text without a
    relation, (None, text) of any other relation."""
    parts = [part.strip() for part in _RELATION.split(text)]
    sides, signs = parts[::2], parts[1::2]
    if not signs:
        return "", text
    if set(signs) == {"="} and all(sides):
        if _NAME.fullmatch(sides[-1]) and _closed(sides[0]):
            sides.reverse()
        names = [side.replace(" ", "") for side in sides[:-1] if _NAME.fullmatch(side)]
        others = [side for side in sides[:-1] if not _NAME.fullmatch(side)]
        if all(_literal(side) is None and equal(side, sides[-1]) for side in others):
            return "".join(names[:1]), sides[-1]
    elif signs == ["\\in"] and _NAME.fullmatch(sides[0]):
        return sides[0].replace(" ", ""), sides[1]
    if set(signs) <= {">", "\\ge"}:
        sides, signs = sides[::-1], [{">": "<", "\\ge": "\\le"}[sign] for sign in signs[::-1]]
    if len(signs) == 1:
        below = _NAME.fullmatch(sides[0])
        sides, signs = (["-\\infty", *sides], ["<", *signs]) if below else ([*sides, "\\infty"], [*signs, "<"])
    two = len(signs) == 2 and set(signs) <= {"<", "\\le"} and _NAME.fullmatch(sides[1])
    if two and all(map(_closed, sides[::2])):
        return sides[1].replace(" ", ""), "[("[signs[0] == "<"] + ",".join(sides[::2]) + "])"[signs[1] == "<"]
    return None, text


_UNIT = re.compile(
    r"(?s)(?=.*[\d\\])(.*?[\w})\]])(?: ?\\text\{([A-Za-z .,/'()-]*)\}"
    r"| ((?!and|or|mod|sin|cos|tan|log|ln|exp)[A-Za-z]{2,}(?:[ /][A-Za-z]+)*|[CF])"
    r"|(cm|mm|km|kg|ft|mi|lb|mL|mph|degrees?|dollars?|cents?))(\^\{?\d\}?)?"
)
_BASE = re.compile(r"(-?(?=[A-F]*\d)[\dA-F]+) ?(_ ?\{?\d+\}?)")
_WORDS = re.compile(r"\\text(?![A-Za-z])|(?<![\\A-Za-z])[A-Za-z]{4,}")
_DECIMAL = r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?|\.\d+"
_LITERAL = re.compile(
    rf"([+-]?) ?(?:({_DECIMAL})(?:[eE]([+-]?\d{{1,4}}))?|(?:({_DECIMAL}) ?\\cdot ?)?10 ?\^\{{([+-]?\d{{1,4}})\}}"
    r"|(?:(\d+) )?(-?\d+) ?/ ?(-?\d+))",
    re.ASCII,
)
_INTEGER_FRACTION = re.compile(r" ?\\frac\{ ?(-?\d+) ?\}\{ ?(-?\d+) ?\}", re.ASCII)


def _same_value(a: str, b: str, equal: Match) -> bool:
    (a, unit_a), (b, unit_b) = _without_unit(a), _without_unit(b)
    if (unit_a and unit_b and unit_a != unit_b) or _plain(a) == _plain(b):
        return unit_a == unit_b or not unit_a or not unit_b
    x, y = _literal(a, beside=b), _literal(b, beside=a)
    if x is not None or y is not None:
        return x == y
    if ":" in a + b:
        x, y = ([_literal(term.strip()) for term in side.split(":")] for side in (a, b))
        return x == y and None not in x
    if _WORDS.search(a) or _WORDS.search(b) or not _MATHS.search(a + b):
        a, b = (_TEXT.sub(r"\1", side).replace(" ", "").casefold() for side in (a, b))
        return a == b
    x, y = _closed(a), _closed(b)
    if not x or not y:
        return not x and not y and equal(a, b)
    left, right = (sorted(operation for operation in side.done if operation != "root") for side in (x, y))
    if left != right:
        return False
    return equal(a, b) if x.value is None or y.value is None else x.value == y.value


def _without_unit(text: str) -> tuple[str, str]:
    """A value and its unit or base, "" without one."""
    found = _BASE.fullmatch(text) or _UNIT.fullmatch(text)
    if not found:
        return text, ""
    unit = "".join(part or "" for part in found.groups()[1:])
    return found[1].strip(), re.sub(r"[\s.{}^]", "", unit).casefold().removesuffix("s")


def _literal(text: str, beside: str = "") -> Fraction | None:
    """The exact value of a text that is a literal number and nothing else, or None. 10^{6} is one beside a text in that
    notation or in e-notation."""
    found = _LITERAL.fullmatch(_INTEGER_FRACTION.sub(r" \1/\2", text).strip()) if len(text) <= DIGITS else None
    if not found:
        return None
    sign, number, power, times_ten, power_of_ten, whole, top, bottom = found.groups()
    if power_of_ten and not times_ten and power_of_ten[0] != "-" and not re.search(r"10 ?\^|\d[eE]", beside):
        return None
    if bottom is None:
        number, power = number or times_ten or "1", power or power_of_ten or "0"
        value = Fraction(number.replace(",", "")) * Fraction(10) ** int(power)
    elif int(bottom) == 0 or int(top) % int(bottom) == 0:
        return None  # a division left undone
    else:
        value = int(whole or 0) + Fraction(int(top), int(bottom))
    return -value if sign == "-" else value


# ---- a closed value: numbers, constants and operations, without variables

_MIXED = re.compile(r"(?<![\d.])(\d+) ?\\frac\{ ?(\d+) ?\}\{ ?(\d+) ?\}", re.ASCII)
_TOKEN = re.compile(r"\d+&\d+/\d+|\d+(?:\.\d*)?(?:[eE][+-]?\d{1,4}(?!\d))?|\.\d+|\\[A-Za-z]+|\S", re.ASCII)
_CLOSING = {"(": ")", "{": "}", "[": "]"}


class _Closed(NamedTuple):
    value: Fraction | None  # exact; None where it is irrational or too large to compute
    done: list[str]  # the operations in it


def _combined(compute: Callable | None, parts: list[_Closed], *operations: str) -> _Closed:
    values = [part.value for part in parts]
    value = compute(*values) if compute and None not in values else None
    if value is not None and value.numerator.bit_length() + value.denominator.bit_length() > 100_000:
        value = None
    return _Closed(value, [*chain(*(part.done for part in parts)), *operations])


@lru_cache(maxsize=4096)
def _closed(text: str) -> _Closed | None:
    """A canonical text as a closed value; None if it is none (it has variables, or is not understood)."""
    tokens = _TOKEN.findall(_MIXED.sub(r"\1&\2/\3", re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)))
    if len(text) > MOST or sum(token in _CLOSING for token in tokens) > 40:
        return None
    rest = ["", *reversed(tokens)]
    with suppress(ValueError, ZeroDivisionError):
        value = _Descent(rest).sum()
        return value if rest == [""] else None
    return None


class _Descent(NamedTuple):
    """Reads tokens by recursive descent, a method for each rank of operation. ValueError: not a closed value."""

    rest: list[str]  # the next token last

    def take(self, *wanted: str) -> str:
        """The next token if it is one of those wanted, else ""."""
        return self.rest.pop() if self.rest[-1] in wanted else ""

    def sum(self) -> _Closed:
        total = self.product()
        while sign := self.take("+", "-"):
            total = _combined(operator.add if sign == "+" else operator.sub, [total, self.product()], "sum")
        return total

    def product(self) -> _Closed:
        """Factors; two numbers or two roots that are left to multiply are the operation "product"."""
        sign = 1
        while token := self.take("+", "-"):
            sign = -sign if token == "-" else sign
        total = self.power()
        numbers, roots = int(total.value is not None), int("root" in total.done)
        while (by := self.take("\\cdot", "/")) or self.rest[-1] in ("(", "{", "e", "i") or self.rest[-1][:1] == "\\":
            token, factor = self.rest[-1], self.power()
            if by == "/":
                total = _combined(operator.truediv, [total, factor])
                continue
            numbers += factor.value is not None and token != "10"
            roots += "root" in factor.done
            total = _combined(operator.mul, [total, factor], *["product"] * (numbers > 1 or roots > 1))
        return _combined(lambda value: sign * value, [total])

    def power(self) -> _Closed:
        base = self.atom()
        while token := self.take("^", "!"):
            if token == "!":
                base = _combined(_factorial, [base], "!")
                continue
            exponent = self.atom()
            whole = exponent.value is not None and exponent.value.denominator == 1
            base = _combined(_power, [base, exponent], *[] if whole else ["root" if exponent.value else "power"])
        return base

    def atom(self) -> _Closed:
        token = self.rest.pop()
        if token[:1].isdigit() or token[:1] == "." != token:
            return _Closed(sum(map(Fraction, token.split("&"))), [])
        if token in _CLOSING:
            value = self.sum()
            if self.take(_CLOSING[token]):
                return value
        elif token in ("\\pi", "e", "i", "\\infty"):
            return _Closed(None, [])
        elif token == "\\frac":
            return _combined(operator.truediv, [self.atom(), self.atom()])
        elif token == "\\binom":
            return _combined(None, [self.atom(), self.atom()], token)
        elif token == "\\sqrt":
            index = [self.atom()] if self.rest[-1] == "[" else []
            return _combined(None, [*index, self.atom()], "root")
        elif re.fullmatch(rf"\\(?:{_FUNCTIONS})", token):
            marks = [self.atom() for _ in range(2) if self.take("_", "^")]
            return _combined(None, [*marks, self.power()], token)
        raise ValueError(f"not closed: {token}")


def _factorial(value: Fraction) -> Fraction | None:
    return Fraction(math.factorial(int(value))) if value.denominator == 1 and 0 <= value <= 1000 else None


def _power(base: Fraction, exponent: Fraction) -> Fraction | None:
    """base ** exponent, None where that is irrational or has more than some 30,000 digits."""
    bits = max(base.numerator.bit_length(), base.denominator.bit_length())
    return base ** int(exponent) if exponent.denominator == 1 and abs(exponent) * bits < 100_000 else None


# ---- mathematics that only math-verify decides

# Sympy evaluates what it reads: 9^{9^{9^9}} would fill the memory. math-verify's own time limit is a signal, which
# works in the main thread only and cannot interrupt C code. A process can always be ended: one with a limit on time and
# memory answers, and a new one takes over after a question it did not survive. (A pair too slow to decide is unequal;
# the limit is on processor time, so that a busy machine changes no reward.)
SECONDS, BYTES = 0.8, 2 << 30
_lock = threading.Lock()


def equivalent(a: str, b: str) -> bool:
    """Do two canonical texts mean the same? By the worker, which may ask math-verify; False where it takes too long.

    A worker that dies (the OOM killer, a signal to the group) is replaced and the new one is asked. Only replies and
    the time limit are remembered; a question that ends two workers is answered False.
    """
    with suppress(EOFError):
        return _reply(a, b)
    return False


@lru_cache(maxsize=4096)
def _reply(a: str, b: str) -> bool:
    for _ in range(2):
        with _lock:
            worker, reply = _worker(), b""
            try:
                with suppress(OSError):  # it had died before
                    worker.stdin.write(json.dumps([a, b]).encode() + b"\n")
                    reply = worker.stdout.readline()
            finally:
                if not reply:  # or this one was interrupted: its late reply must not answer the next question
                    with suppress(subprocess.TimeoutExpired):
                        worker.wait(0.1)
                    _end(worker)
                    _worker.cache_clear()
        if reply or worker.returncode == -signal.SIGPROF:
            return reply == b"True\n"
    raise EOFError("two workers ended before they replied, and not by their time limit")


@lru_cache(maxsize=1)
def _worker() -> subprocess.Popen:
    command = [sys.executable, "-W", "ignore", __file__]
    worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
    atexit.register(_end, worker)
    if worker.stdout.readline() != b"True\n":  # to its trial question
        _end(worker)
        raise RewardError("math-verify does not start, see its message above: pip install math-verify")
    return worker


def _end(worker: subprocess.Popen) -> None:
    with worker:  # closes its pipes and waits for it
        worker.kill()


def _serve() -> None:
    """The worker: a JSON line [answer, reference] in, True or False out, until its input closes."""
    import logging
    import resource

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # the trainer handles them, and then closes our input
        signal.signal(number, signal.SIG_IGN)
    importlib.import_module("math_verify")  # not subject to the limits
    logging.disable()
    with suppress(OSError, ValueError):  # not every system has this limit
        resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    replies, sys.stdout = sys.stdout, io.StringIO()  # nothing that a library prints is a reply
    trial = (0.0, '["x+x", "2x"]')  # the first comparison loads grammars and takes far longer than others: no limit
    for seconds, line in chain([trial], zip(repeat(SECONDS), sys.stdin)):
        reply = False
        signal.setitimer(signal.ITIMER_PROF, seconds)  # its signal has no handler: the system ends the process
        with suppress(Exception):
            reply = _same(*json.loads(line), _by_math_verify)
        signal.setitimer(signal.ITIMER_PROF, 0.0)
        print(reply, file=replies, flush=True)


def _by_math_verify(a: str, b: str) -> bool:
    """Are two formulas equal by math-verify, in either direction? As it looks at 15 digits, so are 100 of them here, at
    a point for the variables."""
    from math_verify import LatexExtractionConfig, parse, verify
    from sympy import Expr, Rational, nsimplify

    how = {"fallback_mode": "no_fallback", "extraction_mode": "first_match", "parsing_timeout": None}
    a, b = (parse("$" + side.replace("$", "") + "$", [LatexExtractionConfig()], **how) for side in (a, b))
    if not any(verify(x, y, timeout_seconds=None) for x, y in ((a, b), (b, a))):
        return False
    if not isinstance(a[0], Expr) or not isinstance(b[0], Expr):
        return True
    variables = sorted(a[0].free_symbols | b[0].free_symbols, key=str)
    point = {variable: Rational(7919 + 104729 * i, 6007 + i) for i, variable in enumerate(variables)}
    x, y = (nsimplify(side, rational=True).doit().subs(point) for side in (a[0], b[0]))
    if x == y or (x.is_Rational and y.is_Rational):
        return bool(x == y)
    x, y = x.evalf(120), y.evalf(120)
    if not (x.is_number and y.is_number and x.is_finite and y.is_finite):
        return True  # there is no value at that point
    return bool(abs(x - y) <= abs(x) * Rational(1, 10**100))


# ---- reading an attempt ----------------------------------------------------------------------------------------------


class Reader:
    """What rewards get as `extract`: reads an answer, and by `match` compares two. Raises RewardError where the
    extractor or the match raises or returns something else than it should."""

    def __init__(self, extractor: Extractor, match: Match = answers_match) -> None:
        self.extractor, self.matcher = extractor, match
        self.name, self.match_name = (
            next((name for name, known in registry.items() if known is fn), repr(fn))
            for fn, registry in ((extractor, ANSWER_EXTRACTORS), (match, MATCH_FNS))
        )

    def __call__(self, text: str) -> str:
        answer = _call("answer extractor", self.name, self.extractor, text)
        if not isinstance(answer, str):
            raise _blame("answer extractor", self.name, f"returned {_short(answer)}, not a string, for", text)
        return answer

    def match(self, answer: str, reference: str) -> bool:
        """Do the two answers mean the same? An answer that cannot be extracted, "", matches nothing."""
        if not answer.strip() or not reference.strip():
            return False
        same = _call("match", self.match_name, self.matcher, answer, reference)
        with suppress(ValueError, TypeError):  # an array is neither
            if same in (True, False):  # NumPy's too
                return bool(same)
        what = f"returned {_short(same)}, not True or False, for"
        raise _blame("match", self.match_name, what, (answer, reference))


def _call(kind: str, name: str, fn: Callable, *texts: str) -> Any:
    try:
        return fn(*texts)
    except RewardError:
        raise
    except (Exception, SystemExit) as error:
        raise _blame(kind, name, f"raised {_short(error)} on", texts[0] if len(texts) == 1 else texts) from error


def _blame(kind: str, name: str, what: str, text: object) -> RewardError:
    keys = {"reward function": "fn", "answer extractor": "answer_extractor", "match": "match"}
    return RewardError(f"reward.{keys[kind]}: {kind} {name!r} {what} {_short(text)}")


def _short(value: object, most: int = 80) -> str:
    shown = " ".join(repr(value[:most] if isinstance(value, str) else value).split())
    return shown if len(shown) <= most else shown[: most - 3] + "..."


def answer_reader(extractor: str, match: str = DEFAULT_MATCH) -> Reader:
    """The reader by the names in reward.answer_extractor and reward.match."""
    return Reader(ANSWER_EXTRACTORS[extractor], MATCH_FNS[match])


def _reader(extract: Extractor) -> Reader:
    return extract if isinstance(extract, Reader) else Reader(extract, getattr(extract, "match", answers_match))


def is_correct(prediction: str, target: str, extract: Extractor) -> bool:
    """Does the answer extracted from the output match the target's? Accuracy is the mean of this, never of a reward."""
    reader = _reader(extract)
    return reader.match(reader(prediction), reader(target))


def is_flexibly_correct(prediction: str, target: str, extract: Extractor) -> bool:
    """Does the output hold the right answer, whatever its format? Whatever `is_correct` accepts, and more.

    A match of your own may refuse texts that your extractor never returns; that is a no.
    """
    reader = _reader(extract)
    if is_correct(prediction, target, reader):
        return True
    with suppress(RewardError):
        return reader.match(flexible_answer(prediction), reader(target))
    return False


def extractors_that_read(text: str) -> list[str]:
    """The registered extractors that find an answer in a target."""
    found = []
    for name in ANSWER_EXTRACTORS:
        with suppress(RewardError):
            found += [name] if answer_reader(name)(text).strip() else []
    return found


def given_answer(text: str, truncated: bool, extract: Extractor) -> str:
    """The answer that an output gives, "" where it gives none.

    Where the text itself is the answer that is found, it gives none if it is not whole (the budget cut it off), nor,
    by `identity`, if it has several lines: a target may, but an output of several lines without a pair is no answer.
    """
    reader = _reader(extract)
    answer = reader(text).strip()
    if truncated and _tidy(answer) == _tidy(text):
        return ""
    return "" if reader.extractor is identity and answer == text.strip() and len(answer.splitlines()) > 1 else answer


def outcome(correct: bool, answer: str) -> str:
    """What became of an attempt: "correct", "wrong", or "unanswered" where no answer can be extracted."""
    return "correct" if correct else "wrong" if answer else "unanswered"


def correction_split(pairs: list[tuple[Any, Any]], match: Match) -> dict[str, float | None]:
    """What the corrections are, from pairs of attempts at a problem, each with its `correct` and its `answer`.

    delta = Acc@t2 - Acc@t1 = i->c - c->i. i->c is `unanswered_to_correct`, where format was mended, plus
    `wrong_to_correct`, where an answer was; c->i likewise. All are shares of the rows. Unanswered is an attempt without
    an answer that can be extracted, cut off by the budget or not; one that was cut off after a wrong answer is wrong.
    Of the wrong first attempts (`wrong_answered`) `wrong_mended` is the share whose second is correct and
    `wrong_repeated` the share whose second gives the same answer again; None if there are none.
    """
    changes = [tuple(outcome(turn.correct, turn.answer) for turn in pair) for pair in pairs]
    wrong = [pair for pair, (before, _) in zip(pairs, changes, strict=True) if before == "wrong"]
    repeated = [not second.correct and match(first.answer, second.answer) for first, second in wrong if second.answer]
    kinds = [("unanswered", "correct"), ("wrong", "correct"), ("correct", "unanswered"), ("correct", "wrong")]
    return {
        "delta": sum(second.correct - first.correct for first, second in pairs) / len(pairs),
        "delta_i_to_c": sum(second.correct and not first.correct for first, second in pairs) / len(pairs),
        "delta_c_to_i": sum(first.correct and not second.correct for first, second in pairs) / len(pairs),
        **{f"{before}_to_{after}": changes.count((before, after)) / len(pairs) for before, after in kinds},
        "wrong_answered": len(wrong) / len(pairs),
        "wrong_mended": changes.count(("wrong", "correct")) / len(wrong) if wrong else None,
        "wrong_repeated": sum(repeated) / len(wrong) if wrong else None,
    }


_MARK = re.compile(r"(?i)(?:####|answer(?:\s{1,3}is|:))[\s:*]*+")
_SENTENCE = re.compile(r"(?:[^.\n<]|\.(?!\s|$)|<(?!/))*+")  # "</" closes the tag around it
_FORMULA = re.compile(r"\$([^$]++)\$|\\[(\[]((?:[^\\]|\\(?![)\]]))++)")


def flexible_answer(text: str) -> str:
    r"""What a lenient reader takes for the answer, else "". For diagnosis: it tells a bad format from bad reasoning.

    The last <answer> pair that is not empty, else the last \boxed{...}, else the rest of the sentence after the last
    "####", "answer is" or "answer:", else the last number. Of such a part it takes the box or the formula that it
    begins with; of words and a number the number. It must never be registered: it would pay answers without format.
    """
    marked = [_SENTENCE.match(text, mark.end())[0] for mark in list(_MARK.finditer(text))[-1:]]
    for part in filter(None, (answer_tag(text), last_boxed(text), *marked)):
        boxed = last_boxed(part)
        part = (part if boxed is None else boxed).strip(" \n\t*")
        if formula := _FORMULA.match(part):
            part = formula[1] or formula[2]
        part = _TEXT.sub(r" \1 ", part)
        words = re.search(r"[^\W\d_]{2}", re.sub(r"\\[A-Za-z]++", " ", part))
        if answer := (words and first_number(part)) or part.strip(" \n\t*.").strip():
            return answer
    numbers = [match[0] for match in _NUMBER.finditer(_tidy(text))]
    return numbers[-1].replace(",", "").lstrip("+") if numbers else ""


# ---- rewards ---------------------------------------------------------------------------------------------------------


def has_pair(text: str, tag: str) -> bool:
    """Does an opening tag come before a closing one?"""
    return 0 <= text.find(f"<{tag}>") < text.rfind(f"</{tag}>")


def has_one_pair(text: str, tag: str) -> bool:
    """Is there one pair and no stray tag of that name beside it?"""
    return has_pair(text, tag) and text.count(f"<{tag}>") == text.count(f"</{tag}>") == 1


def is_two_blocks(text: str) -> bool:
    """Is the whole text <think>...</think> and then <answer>...</answer>, with only white space around and between?"""
    one = has_one_pair(text, "think") and has_one_pair(text, "answer")  # so the pattern cannot backtrack far
    return one and bool(re.fullmatch(r"(?s)\s*+<think>.*</think>\s*+<answer>.*</answer>\s*+", text))


@register_reward("exact_match")
def exact_match(predictions: list[str], targets: list[str], extract: Extractor) -> list[float]:
    """1 for a correct answer, otherwise 0."""
    return [float(is_correct(p, t, extract)) for p, t in zip(predictions, targets, strict=True)]


@register_reward("format_and_match")
def format_and_match(predictions: list[str], targets: list[str], extract: Extractor) -> list[float]:
    """0.25 for a <think>...</think> pair, 0.25 for exactly one <answer>...</answer> pair, 0.5 for a correct answer."""
    pairs = zip(predictions, exact_match(predictions, targets, extract), strict=True)
    return [0.25 * has_pair(p, "think") + 0.25 * has_one_pair(p, "answer") + 0.5 * right for p, right in pairs]


@register_reward("format_only")
def format_only(predictions: list[str], targets: list[str], extract: Extractor) -> list[float]:
    """0.5 for a <think>...</think> pair, 0.5 for exactly one <answer>...</answer> pair with something in it, right or
    wrong: for a short warm-up that teaches a model the format before SCoRe begins."""
    return [0.5 * has_pair(p, "think") + 0.5 * (has_one_pair(p, "answer") and answer_tag(p) != "") for p in predictions]


@register_reward("strict_format_and_match")
def strict_format_and_match(predictions: list[str], targets: list[str], extract: Extractor) -> list[float]:
    """0.5 if the whole output is a <think> block and an <answer> block, 0.5 for a correct answer."""
    pairs = zip(predictions, exact_match(predictions, targets, extract), strict=True)
    return [0.5 * is_two_blocks(p) + 0.5 * right for p, right in pairs]


def compute_rewards(
    names: list[str],
    weights: list[float] | None,
    module: str | None,
    texts: list[str],
    targets: list[str],
    extract: Extractor,
    arguments: dict[str, list] | None = None,
) -> list[float]:
    """The reward of each output: the weighted sum over the functions of reward.fn; a None is left out of it.

    `arguments`: what functions in TRL's form get by name, a list over rows each. Raises RewardError where a function or
    the extractor raises, or a function returns anything but one finite number for each output.
    """
    if len(texts) != len(targets):
        raise RewardError(f"{len(texts)} outputs but {len(targets)} targets")
    reader, arguments = _reader(extract), arguments or {}
    parts = [_checked(name, texts, _batch(name, module, texts, targets, reader, arguments)) for name in names]
    for name, rewards in zip(names, parts, strict=True):
        if rewards and name not in _silent and all(reward is None for reward in rewards):
            _silent.add(name)
            warning = f"Warning: reward.fn: {name} returned None for all {len(rewards)} rows of a batch: no reward"
            print(warning, file=sys.stderr, flush=True)
    weights, rows = weights or [1.0] * len(names), zip(*parts, strict=True)
    return [float(sum(w * r for w, r in zip(weights, row, strict=True) if r is not None)) for row in rows]


_silent: set[str] = set()  # of these functions it was said already


def _batch(
    name: str, module: str | None, texts: list[str], targets: list[str], reader: Reader, arguments: dict[str, list]
) -> Callable[[slice], list]:
    """What grades some rows of the batch by a reward function, registered or in TRL's form."""
    fn = find_reward(name, module)
    if name in REWARD_FNS:
        return lambda rows: list(fn(texts[rows], targets[rows], reader))
    asked = _parameters(fn)
    if asked and not any(parameter.kind is parameter.VAR_KEYWORD for parameter in asked):
        arguments = {p.name: arguments[p.name] for p in asked if p.name in arguments}

    def run(rows: slice) -> list:
        found = fn(**{key: values[rows] for key, values in arguments.items()})
        return list(asyncio.run(found) if inspect.iscoroutine(found) else found)

    return run


def _checked(name: str, texts: list[str], run: Callable[[slice], list]) -> list[float | None]:
    try:
        rewards = run(slice(None))
    except RewardError:
        raise
    except (Exception, SystemExit) as error:
        if len(texts) > 1:
            for row in range(len(texts)):
                _checked(name, texts[row : row + 1], lambda _, row=row: run(slice(row, row + 1)))
        raise _blame("reward function", name, f"raised {_short(error)} on", texts[:1]) from error
    if len(rewards) != len(texts):
        what = f"returned {len(rewards)} rewards for {len(texts)} predictions, the first of them"
        raise _blame("reward function", name, what, texts[:1])
    for text, reward in zip(texts, rewards, strict=True):
        finite = isinstance(reward, Real) and abs(reward) < 1e38  # float32 holds it; nan is not smaller either
        if not finite and not (reward is None and name not in REWARD_FNS):
            raise _blame("reward function", name, f"returned {_short(reward)} for", text)
    return [None if reward is None else float(reward) for reward in rewards]


# ---- TRL's form ------------------------------------------------------------------------------------------------------


def load_reward_module(file: str) -> Any:
    """The module of a Python file of rewards and extractors, run once. Raises ValueError with a one-line reason."""
    path = Path(file)
    name = "rewards_of_" + re.sub(r"\W", "_", str(path.resolve()))
    if name in sys.modules:
        return sys.modules[name]
    if path.suffix != ".py" or not path.is_file():
        raise ValueError("must be a .py file that exists")
    spec = importlib.util.spec_from_file_location(name, path)
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # whatever the user's file raises
        del sys.modules[name]
        raise ValueError(f"cannot be run: {_short(error, 200)}") from None
    return module


def trl_names(names: list[str]) -> list[str]:
    """The functions of reward.fn that are not registered: they are in TRL's form."""
    return [name for name in names if name not in REWARD_FNS]


def did_you_mean(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def reward_fault(name: str, module: str | None) -> str | None:
    """Why `name` can be no reward function, as far as can be told without importing its package: an import costs
    seconds, and transformers must not be imported before Unsloth."""
    own = vars(load_reward_module(module)) if module else {}
    package, dot, _ = name.partition(".")
    if name in REWARD_FNS or callable(own.get(name)):
        return None
    if name in own:
        return f"is no function in {module}"
    if not dot or not all(part.isidentifier() for part in name.split(".")):
        hint = did_you_mean(name, REWARD_FNS) or "; one of your own comes from a file that reward.module names"
        return f"is not registered; registered are {', '.join(sorted(REWARD_FNS))}{hint}"
    if importlib.util.find_spec(package):
        return None
    return f"cannot be imported: there is no package {package}; a function in a file of your own: reward.module"


def find_reward(name: str, module: str | None) -> Callable:
    """The reward function `name`: registered, or a function of reward.module, or at this import path."""
    if name in REWARD_FNS:
        return REWARD_FNS[name]
    package, _, attribute = name.rpartition(".")
    if not package and not module:
        raise RewardError(f"reward function {name!r} {reward_fault(name, None)}")
    try:
        fn = getattr(importlib.import_module(package) if package else load_reward_module(module), attribute)
    except Exception as error:  # whatever the package raises
        raise RewardError(f"reward function {name!r} cannot be imported: {_short(error, 200)}") from None
    if not callable(fn):
        raise RewardError(f"reward function {name!r} is no function")
    return fn


def trl_columns(
    rows: Sequence[dict], targets: list[str], names: list[str], module: str | None, columns: dict, extract: Extractor
) -> list[dict]:
    """What functions in TRL's form get of each row by name: the dataset's columns, `target_answer`, and either of them
    by another name as reward.columns ({name: column}) says; nothing where `names` has no such function.

    Raises RewardError with one line that begins with the key at fault.
    """
    if not rows or not trl_names(names):
        return [{} for _ in targets]
    known = [*rows[0], "target_answer"]
    for argument, column in columns.items():
        if column not in known:
            there = f"there are {', '.join(known)}{did_you_mean(column, known)}"
            raise RewardError(f"reward.columns.{argument}: no column {column!r}; {there}")
    given = [*known, *columns, "prompts", "completions", "completion_ids"]
    try:
        for name in trl_names(names):
            asked = [p for p in _parameters(find_reward(name, module)) if p.kind is not p.VAR_KEYWORD]
            missing = [p.name for p in asked if p.default is p.empty and p.name not in given]
            if missing:
                raise RewardError(
                    f"{name} asks for {', '.join(missing)}, and is given {', '.join(given)}; say which of "
                    f"them it is, as in reward.columns.{missing[0]}=target_answer"
                )
        reader = _reader(extract)
        rows = [{"target_answer": reader(target)} | row for target, row in zip(targets, rows, strict=True)]
    except RewardError as error:
        key = "" if str(error).startswith("reward.") else "reward.fn: "
        raise RewardError(f"{key}{error}") from None
    return [row | {argument: row[column] for argument, column in columns.items()} for row in rows]


def trl_arguments(turns: list, examples: list, earlier: list[list], opening: list[dict], correction: str) -> dict:
    """What TRL gives to its reward functions by name, a list over rows each, from anything like train.py's Turn and
    Example. `earlier`: the turns before, a list a row; `opening`: the messages that all chats begin with."""
    chats = []
    for row, example in enumerate(examples):
        said = [("user", example.question)]
        for turn in earlier[row] if earlier else ():
            said += [("assistant", turn.text), ("user", correction)]
        chats.append(opening + [{"role": role, "content": text} for role, text in said if text])
    columns = {name: [example.columns.get(name) for example in examples] for name in examples[0].columns}
    answers = [[{"role": "assistant", "content": turn.text}] for turn in turns]
    return columns | {"prompts": chats, "completions": answers, "completion_ids": [turn.completion for turn in turns]}


def _parameters(fn: Callable) -> list[inspect.Parameter]:
    """The arguments that a function takes by name, and **any; [] where a builtin does not say."""
    with suppress(ValueError, TypeError):
        return [p for p in inspect.signature(fn).parameters.values() if p.kind is not p.VAR_POSITIONAL]
    return []


if __name__ == "__main__":  # started by _worker
    _serve()
