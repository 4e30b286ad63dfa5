"""Rewards and answer extractors: how an attempt is graded (config keys `reward.fn` and `reward.answer_extractor`).

An extractor pulls the final answer out of a text, "" where there is none. The same one reads the model's output
("<think>...</think><answer>42</answer>") and the dataset's target ("... #### 42"). A reward grades a batch of outputs.
To add your own, write a file of them and name it, and them, in the YAML (`reward.module: my_rewards.py`):

    from reward_function import Extractor, is_correct, register_extractor, register_reward

    @register_extractor("last_line")
    def last_line(text: str) -> str:
        return text.strip().rpartition("\\n")[2]

    @register_reward("short_and_right")
    def short_and_right(predictions: list[str], targets: list[str], extract: Extractor) -> list[float]:
        pairs = zip(predictions, targets, strict=True)
        return [is_correct(p, t, extract) * (1.0 if len(p) < 500 else 0.5) for p, t in pairs]

A reward function written for TRL's GRPOTrainer works as it is, without being registered:

    def tagged(completions, **columns):
        return [float("<answer>" in completion[0]["content"]) for completion in completions]

Name it by its import path (`reward.fn: trl.rewards.accuracy_reward`), or as a function in the file of `reward.module`
(`reward.fn: tagged`). A list, which may hold registered names too, is a weighted sum: `reward.fn: [a, b]` with
`reward.weights: [1.0, 0.2]`, 1.0 each if not given. A None, "does not apply", is left out of the sum, and the reward is
0 where all of them say so.

- It is called once for each attempt, with lists over rows by name: `completions`, `prompts`, `completion_ids`, every
  column of the dataset, and `target_answer`, what the answer extractor finds in the target.
- Completions are conversational, [{"role": "assistant", "content": text}], and prompts the messages before them, in
  attempt 2 with attempt 1 and the instruction; `reward.completions: text` is for functions that want plain strings.
- `reward.columns` gives a column by another name as well: TRL's accuracy_reward asks for `solution`, so on GSM8K it
  needs `reward.columns: {solution: target_answer}`. The whole target, `{solution: answer}`, is worse: it holds numbers
  and $ before the answer, and math-verify may take one of these. Where the target's answer
  is LaTeX, name the column of the whole target: math-verify finds a formula by its $ or box, and not without.
- accuracy_reward reads LaTeX only: ask in prompts.system for the answer as <answer>\\boxed{...}</answer>, which it and
  the extractors here all read. think_format_reward wants the output to begin with <think>.
- Of what TRL gives, `trainer_state`, `log_extra` and `log_metric` are missing.

Accuracy is by the extractor, whatever the reward.

What everything here keeps to: an answer that cannot be extracted is never correct; and since a policy in training
writes anything at all, no text makes a grader raise or hang (linear-time scans, patterns that cannot backtrack).
"""

from __future__ import annotations

import asyncio
import atexit
import inspect
import io
import json
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from fractions import Fraction
from functools import lru_cache, partial
from itertools import chain, repeat
from numbers import Real

Extractor = Callable[[str], str]
RewardFn = Callable[[list[str], list[str], Extractor], list[float]]

REWARD_FNS: dict[str, RewardFn] = {}
ANSWER_EXTRACTORS: dict[str, Extractor] = {}


class RewardError(ValueError):
    """A reward function or an extractor misbehaved; the message is one line that names it and the text at fault."""


def register_reward(name: str) -> Callable[[RewardFn], RewardFn]:
    """Decorator: make `fn(predictions, targets, extract) -> list[float]` available as `reward.fn: name`."""
    return _register(REWARD_FNS, "reward function", name)


def register_extractor(name: str) -> Callable[[Extractor], Extractor]:
    """Decorator: make `fn(text) -> str` available as `reward.answer_extractor: name`."""
    return _register(ANSWER_EXTRACTORS, "answer extractor", name)


def _register(registry: dict, kind: str, name: str) -> Callable:
    def add(fn: Callable) -> Callable:
        if name in registry:
            raise ValueError(f"{kind} {name!r} is registered twice")
        registry[name] = fn
        return fn

    return add


# ---- extractors ------------------------------------------------------------------------------------------------------


@register_extractor("identity")
def identity(text: str) -> str:
    """The <answer> content where there is a pair (an output), else the whole text (a bare target), stripped."""
    tagged = answer_tag(text)
    return text.strip() if tagged is None else tagged


@register_extractor("gsm8k_hash")
def gsm8k_hash(text: str) -> str:
    """The number in the last <answer> pair or, without a pair, in what follows the last "####" on its line.

    There is no fallback to the last number of the text: it would reward answers that ignore the format.
    """
    tagged = answer_tag(text)
    if tagged is None:
        tagged = text.rpartition("####")[2].strip().partition("\n")[0] if "####" in text else ""
    return first_number(tagged)


@register_extractor("math_final_answer")
def math_final_answer(text: str) -> str:
    r"""The last <answer> pair's content or, without a pair, the last \boxed{...}; of a box inside a pair, its content.

    A text with neither is its own answer only if it can hardly be anything else (a dataset column of bare LaTeX): one
    short line without prose or tags. An unformatted "The answer is 4" is therefore no answer; an output that is "4" and
    nothing else is one, as a target looks the same.
    """
    tagged = answer_tag(text)
    text = text.strip() if tagged is None else tagged
    boxed = last_boxed(text)
    if boxed is not None:
        text = boxed
    elif tagged is None and (len(text) > 200 or "\n" in text or _NOT_BARE.search(_COMMAND.sub(" ", text))):
        return ""
    text = _MATH_MODE.sub("", text).strip().rstrip(".").rstrip()
    words = _TEXT.fullmatch(text)
    return words[1].strip() if words else text


_TEXT = re.compile(r"\\(?:text(?:bf|it|rm|normal)?|mathrm|mathbf|mbox)\s*+\{([^{}]*+)\}")
_COMMAND = re.compile(_TEXT.pattern + r"|\\[A-Za-z]++")
_NOT_BARE = re.compile(r"</?(?:think|answer)>|[^\W\d_]{2,}+(?::|\s++[^\W\d_]{2})")  # "</think>", "Answer:", "it is"
_MATH_MODE = re.compile(r"\\?\$|^\s*+\\[(\[]|\\[)\]]\s*+$")
_BOX = re.compile(r"\\(?:boxed|fbox)\s*+\{|\\(?:boxed|fbox)(?![A-Za-z])\s*+(?=[^\s{}$])|\\.|[{}]", re.DOTALL)
_WORD = re.compile(r"[^\s$]*+")


def answer_tag(text: str) -> str | None:
    """Content of the last complete <answer>...</answer> pair, stripped; None where there is no pair."""
    _, opened, content = text.rpartition("</answer>")[0].rpartition("<answer>")
    return content.partition("</answer>")[0].strip() if opened else None


def last_boxed(text: str) -> str | None:
    r"""Content of the last complete \boxed{...} or \fbox{...}, nested braces balanced, or of "\boxed 5"; else None."""
    start, end = -1, None  # of the content; end None: a box without braces
    open_braces: list[int] = []  # a box's brace: where its content starts; any other brace: -1
    for token in _BOX.finditer(text):
        if token[0] == "}":
            opened = open_braces.pop() if open_braces else -1
            if opened > start:
                start, end = opened, token.start()
        elif token[0] == "{":
            open_braces.append(-1)
        elif len(token[0]) > 2 and token[0].endswith("{"):  # two characters: an escaped brace, another command's head
            open_braces.append(token.end())
        elif len(token[0]) > 2:
            start, end = token.end(), None
    if start < 0:
        return None
    return _WORD.match(text, start)[0] if end is None else text[start:end]


# ---- do two answers match? -------------------------------------------------------------------------------------------

_UNSIGNED = r"(?:(?:\d{1,3}+(?:,\d{3})++(?!\d|,\d)|\d++(?!,\d))(?:\.\d++)?|\.\d++)(?:[eE][-+]?\d{1,4}+(?!\d))?"
_NUMBER = re.compile(  # 42, -1,234.5, 1e9, 3/4, 2 1/2: sign, whole part, numerator, denominator
    rf"(?<![A-Za-z\d.,])([-+]?)(?:(\d++)\s(?=\d++/))?({_UNSIGNED})(?:\s?/\s?({_UNSIGNED}))?", re.ASCII
)
_TYPOGRAPHY = str.maketrans({"−": "-", "–": "-", "€": "$", "£": "$", "¥": "$", "₹": "$"})
_THIN_SPACE = re.compile(r"\\[!,]\s*+|\{(?=,\})|(?<=,)\}")  # 1\,000 and 1{,}000
_PLAIN_FRACTION = re.compile(r"\\[dt]?frac\s*+(?:\{(-?[\d.,]++)\}|(\d))\s*+(?:\{([\d.,]++)\}|(\d))", re.ASCII)
_LAYOUT = re.compile(r"\\(?:left|right)(?![A-Za-z])|\\[;: %]|[$%°~]|\^\s*+(?:\{\s*+\\circ\s*+\}|\\circ)")
_MATHS = re.compile(r"[\d\\^_+*/=()\[\]{}-]", re.ASCII)
_LONE_I = re.compile(r"(?<=\d)i(?![A-Za-z])")  # 7i is complex to math-verify only as "7 i"
_BASE = re.compile(r"\d_\{?(\d++)", re.ASCII)


def _tidy(text: str) -> str:
    """The answer without what does not change its meaning: currency, %, degrees, spacing, layout, a closing stop."""
    text = text.translate(_TYPOGRAPHY).replace("\\$", "$").replace("-$", "-")
    text = _TEXT.sub(r" \1 ", _THIN_SPACE.sub("", text))
    text = _PLAIN_FRACTION.sub(r"\1\2/\3\4 ", re.sub(r"(?<=\d)(?=\\[dt]?frac)", " ", text)).replace("\\dfrac", "\\frac")
    return " ".join(_LAYOUT.sub(" ", text).split()).rstrip(" .")


def first_number(text: str) -> str:
    """The first number after the last "=", else of the whole text, without commas and units; "" if there is none."""
    text = _tidy(text)
    match = _NUMBER.search(text.rpartition("=")[2]) or _NUMBER.search(text)
    return match[0].replace(",", "").lstrip("+") if match else ""


def _value(text: str) -> Fraction | None:
    """The exact value of a tidied text that is one number (of at most 1,000 characters) and nothing else, or None."""
    match = _NUMBER.fullmatch(text) if len(text) <= 1000 else None
    sign, whole, top, bottom = (part.replace(",", "") for part in match.groups("")) if match else ("", "", "", "0")
    divisor = Fraction(bottom or 1)
    return (Fraction(whole or 0) + Fraction(top) / divisor) * (-1 if sign == "-" else 1) if divisor else None


def answers_match(answer: str, reference: str) -> bool:
    """Do two extracted answers mean the same? "" matches nothing. The cheapest test that can decide decides.

    Two numbers: exact equality. Else: the same text but for spacing and layout. Else, if either looks like mathematics
    and both have at most 300 characters: `equivalent` ("x = 5" and "5" are).
    """
    a, b = _tidy(answer), _tidy(reference)
    x, y = _value(a), _value(b)
    if x is not None and y is not None:
        return x == y
    a, b = a.replace(" ", ""), b.replace(" ", "")
    if not a or not b or a == b:
        return a == b != ""
    if not _MATHS.search(a + b):
        return a.casefold() == b.casefold()
    bases = _BASE.findall(a), _BASE.findall(b)  # math-verify ignores them: 52_8 would equal 52_9
    if max(len(answer), len(reference)) > 300 or (all(bases) and bases[0] != bases[1]):
        return False
    return equivalent(*(_LONE_I.sub(" i", " ".join(text.split())) for text in (answer, reference)))


# Sympy evaluates what it reads: 9^{9^{9^9}} would fill the memory. math-verify's own time limit is a signal, which
# works in the main thread only and cannot interrupt C code. A process can always be ended: one with a limit on time and
# memory answers, and a new one takes over after a question it did not survive. (A pair too slow to decide is unequal;
# the limit is on processor time, so that a busy machine changes no reward.)
SECONDS, BYTES = 1.0, 2 << 30
_lock = threading.Lock()


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


@lru_cache(maxsize=4096)
def equivalent(answer: str, reference: str) -> bool:
    """Are two LaTeX texts the same mathematics, by math-verify? False where it fails or is not done in `SECONDS`."""
    with _lock:
        worker, reply = _worker(), b""
        try:
            worker.stdin.write(json.dumps([answer, reference]).encode() + b"\n")
            reply = worker.stdout.readline()
        except OSError:
            pass  # it had died before
        finally:
            if not reply:  # or this one was interrupted: its late reply must not answer the next question
                _end(worker)
                _worker.cache_clear()
    return reply == b"True\n"


def _serve() -> None:
    """The worker: a JSON line [answer, reference] in, True or False out, until its input closes."""
    import logging
    import resource
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the trainer to handle
    from math_verify import LatexExtractionConfig, parse, verify

    logging.disable()
    with suppress(OSError, ValueError):  # not every system has this limit
        resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    replies, sys.stdout = sys.stdout, io.StringIO()  # nothing that a library prints is a reply
    how = {"fallback_mode": "no_fallback", "extraction_mode": "first_match", "parsing_timeout": None}
    trial = (0.0, '["x+x", "2x"]')  # the first comparison loads grammars and takes far longer than others: no limit
    for seconds, line in chain([trial], zip(repeat(SECONDS), sys.stdin)):
        reply = False
        signal.setitimer(signal.ITIMER_PROF, seconds)  # its signal has no handler: the system ends the process
        with suppress(Exception):
            # One pair of $ around it all: the text is the formula, none is to be searched for in it.
            formulas = ["$" + text.replace("\\$", "").replace("$", "") + "$" for text in json.loads(line)]
            answer, reference = (parse(formula, [LatexExtractionConfig()], **how) for formula in formulas)
            reply = bool(verify(reference, answer, timeout_seconds=None))
        signal.setitimer(signal.ITIMER_PROF, 0.0)
        print(reply, file=replies, flush=True)


# ---- diagnosis: what an attempt came to, never what it is paid -------------------------------------------------------


def given_answer(text: str, cut_off: bool, extract: Extractor) -> str:
    """The extracted answer, stripped; "" also where the budget cut off a text that was to be its own answer."""
    answer = _extract(extract, text).strip()
    return "" if cut_off and answer == text.strip() else answer


def flexible_answer(text: str) -> str:
    r"""What a lenient reader takes for the answer, else "". For diagnosis: it tells a bad format from bad reasoning.

    The last <answer> pair that is not empty, else the last \boxed{...}, else the rest of the sentence after the last
    "####", "answer is" or "answer:", else the last number. It must never be registered: as a reward it would pay
    answers that ignore the format.
    """
    marked = [text[mark.end() :] for mark in list(_MARK.finditer(text))[-1:]]
    for part in (answer_tag(text), last_boxed(text), *(_SENTENCE.match(part)[0] for part in marked)):
        answer = _without_words(part or "")
        if answer:
            return answer
    numbers = [match[0] for match in _NUMBER.finditer(_tidy(text))]
    return numbers[-1].replace(",", "").lstrip("+") if numbers else ""


_MARK = re.compile(r"(?:####|answer(?:\s{1,3}is|:))[\s:*]*+", re.IGNORECASE)
_SENTENCE = re.compile(r"(?:[^.\n<]|\.(?!\s|$)|<(?!/))*+")  # "</" closes the tag around it
_FORMULA = re.compile(r"\$([^$]++)\$|\\[(\[]((?:[^\\]|\\(?![)\]]))++)")


def _without_words(text: str) -> str:
    """A lenient reader's answer in a short text: the formula that it begins with; of words and a number, the number."""
    boxed = last_boxed(text)
    text = (text if boxed is None else boxed).strip(" \n\t*")
    formula = _FORMULA.match(text)
    text = _TEXT.sub(r" \1 ", formula[1] or formula[2] if formula else text)
    words = re.search(r"[^\W\d_]{2}", re.sub(r"\\[A-Za-z]++", " ", text))
    return (words and first_number(text)) or text.strip(" \n\t*.").strip()


def is_flexibly_correct(prediction: str, target: str, extract: Extractor) -> bool:
    """Does the output hold the right answer, whatever its format? Whatever `is_correct` accepts, and more."""
    reference = _extract(extract, target)
    return is_correct(prediction, target, extract) or answers_match(flexible_answer(prediction), reference)


def diagnose(
    texts: list[str], targets: list[str], cut_off: list[bool], extract: Extractor
) -> tuple[list[str], list[bool]]:
    """The answers given, and which outputs are right in any format."""
    answers = [given_answer(text, cut, extract) for text, cut in zip(texts, cut_off, strict=True)]
    return answers, [is_flexibly_correct(text, target, extract) for text, target in zip(texts, targets, strict=True)]


def outcomes(correct: list[bool], answers: list[str]) -> list[str]:
    """What became of each attempt: "correct", "wrong", or "unanswered" where no answer can be extracted."""
    pairs = zip(correct, answers, strict=True)
    return ["correct" if right else "wrong" if answer else "unanswered" for right, answer in pairs]


def correction_split(
    correct1: list[bool], answers1: list[str], correct2: list[bool], answers2: list[str]
) -> dict[str, float | None]:
    """What the corrections are, from which rows are correct and the answers given, in attempt 1 and in attempt 2.

    delta = Acc@t2 - Acc@t1 = i->c - c->i. i->c is `unanswered_to_correct`, where format was mended, plus
    `wrong_to_correct`, where an answer was; c->i likewise. All are shares of the rows. Unanswered is an attempt without
    an answer that can be extracted, cut off by the budget or not; one that was cut off after a wrong answer is wrong.
    Of the wrong first attempts (`wrong_answered`) `wrong_mended` is the share whose second is correct and
    `wrong_repeated` the share whose second gives the same answer again; None if there are none.
    """
    pairs = list(zip(outcomes(correct1, answers1), outcomes(correct2, answers2), strict=True))
    wrong = [row for row, (before, _) in enumerate(pairs) if before == "wrong"]
    repeated = [pairs[row][1] == "wrong" and answers_match(answers1[row], answers2[row]) for row in wrong]
    changes = [("unanswered", "correct"), ("wrong", "correct"), ("correct", "unanswered"), ("correct", "wrong")]
    return {
        "delta": (sum(correct2) - sum(correct1)) / len(pairs),
        "delta_i_to_c": sum(b and not a for a, b in zip(correct1, correct2, strict=True)) / len(pairs),
        "delta_c_to_i": sum(a and not b for a, b in zip(correct1, correct2, strict=True)) / len(pairs),
        **{f"{before}_to_{after}": pairs.count((before, after)) / len(pairs) for before, after in changes},
        "wrong_answered": len(wrong) / len(pairs),
        "wrong_mended": pairs.count(("wrong", "correct")) / len(wrong) if wrong else None,
        "wrong_repeated": sum(repeated) / len(wrong) if wrong else None,
    }


# ---- rewards ---------------------------------------------------------------------------------------------------------


def is_correct(prediction: str, target: str, extract: Extractor) -> bool:
    """Does the answer extracted from the output match the target's? Accuracy is the mean of this, never of a reward."""
    return answers_match(_extract(extract, prediction), _extract(extract, target))


def majority(texts: list[str], extract: Extractor) -> int:
    """Index of the first text with the answer that most of the texts give; texts without an answer do not vote."""
    answers, votes = [_extract(extract, text) for text in texts], {}
    for index, answer in enumerate(answers):
        same = next((i for i in votes if answers_match(answer, answers[i])), index)
        if answer:
            votes[same] = votes.get(same, 0) + 1
    return max(votes, key=votes.__getitem__, default=0)


def has_pair(text: str, tag: str) -> bool:
    """Does an opening tag come before a closing one?"""
    return 0 <= text.find(f"<{tag}>") < text.rfind(f"</{tag}>")


def has_one_pair(text: str, tag: str) -> bool:
    """Is there one pair and no stray tag of that name beside it?"""
    return has_pair(text, tag) and text.count(f"<{tag}>") == text.count(f"</{tag}>") == 1


def is_two_blocks(text: str) -> bool:
    """Is the whole text <think>...</think> and then <answer>...</answer>, with only white space around and between?"""
    thought, _, answer = text.strip().partition("</think>")
    whole = thought.startswith("<think>") and answer.lstrip().startswith("<answer>") and answer.endswith("</answer>")
    return whole and has_one_pair(text, "think") and has_one_pair(text, "answer")


@register_reward("exact_match")
def exact_match(predictions: list[str], targets: list[str], extract: Extractor) -> list[float]:
    """1 for a correct answer, otherwise 0."""
    return [float(is_correct(p, t, extract)) for p, t in zip(predictions, targets, strict=True)]


@register_reward("format_and_match")
def format_and_match(predictions: list[str], targets: list[str], extract: Extractor) -> list[float]:
    """0.25 for a <think>...</think> pair, 0.25 for exactly one <answer>...</answer> pair, 0.5 for a correct answer."""
    return [
        0.25 * has_pair(p, "think") + 0.25 * has_one_pair(p, "answer") + 0.5 * is_correct(p, t, extract)
        for p, t in zip(predictions, targets, strict=True)
    ]


@register_reward("format_only")
def format_only(predictions: list[str], targets: list[str], extract: Extractor) -> list[float]:
    """0.5 for a <think>...</think> pair, 0.5 for exactly one <answer>...</answer> pair with something in it, right or
    wrong: for a short warm-up that teaches a model the format before SCoRe begins."""
    return [0.5 * has_pair(p, "think") + 0.5 * (has_one_pair(p, "answer") and answer_tag(p) != "") for p in predictions]


@register_reward("strict_format_and_match")
def strict_format_and_match(predictions: list[str], targets: list[str], extract: Extractor) -> list[float]:
    """0.5 if the whole output is a <think> block and an <answer> block, 0.5 for a correct answer."""
    pairs = zip(predictions, targets, strict=True)
    return [0.5 * is_two_blocks(p) + 0.5 * is_correct(p, t, extract) for p, t in pairs]


def score(reward_name: str, predictions: list[str], targets: list[str], extract: Extractor) -> list[float]:
    """The rewards of a batch, checked: one finite number for each prediction.

    Raises RewardError where the reward function or the extractor raises or returns anything else.
    """
    if reward_name not in REWARD_FNS:
        raise RewardError(f"no reward function {reward_name!r}; there are {', '.join(sorted(REWARD_FNS))}")
    if len(predictions) != len(targets):
        raise RewardError(f"{len(predictions)} predictions but {len(targets)} targets")
    fn, extract = REWARD_FNS[reward_name], partial(_extract, extract)
    rewards = _checked(reward_name, predictions, lambda rows: fn(predictions[rows], targets[rows], extract))
    return [float(reward) for reward in rewards]


def score_by_name(name: str, fn: Callable, predictions: list[str], given: dict[str, list]) -> list[float | None]:
    """The rewards of a batch by a function in TRL's form, checked; `given`: its arguments, a list over rows each.

    Raises RewardError where it raises or returns anything but one finite number or None for each prediction.
    """
    asked = _parameters(fn)
    if asked and not any(parameter.kind is parameter.VAR_KEYWORD for parameter in asked):
        given = {key: given[key] for key in given.keys() & {parameter.name for parameter in asked}}

    def rewards(rows: slice) -> list:
        found = fn(**{key: values[rows] for key, values in given.items()})
        return asyncio.run(found) if inspect.iscoroutine(found) else found

    return [None if reward is None else float(reward) for reward in _checked(name, predictions, rewards, optional=True)]


def missing_arguments(fn: Callable, given: Iterable[str]) -> list[str]:
    """The arguments that `fn` cannot do without and is not given."""
    return [
        parameter.name
        for parameter in _parameters(fn)
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        and parameter.name not in given
    ]


def _parameters(fn: Callable) -> list[inspect.Parameter]:
    with suppress(ValueError, TypeError):  # a builtin may have no signature
        return list(inspect.signature(fn).parameters.values())
    return []


def weighted_sum(parts: list[list[float | None]], weights: list[float] | None = None) -> list[float]:
    """The reward of each row from those of each function; None is left out."""
    weights = weights or [1.0] * len(parts)
    return [
        float(sum(w * reward for w, reward in zip(weights, row, strict=True) if reward is not None))
        for row in zip(*parts, strict=True)
    ]


def _checked(name: str, predictions: list[str], rewards_of: Callable[[slice], Iterable], optional=False) -> list:
    rewards = _rewards(name, predictions, rewards_of, slice(None))
    if len(rewards) != len(predictions):
        what = f"returned {len(rewards)} rewards for {len(predictions)} predictions, the first of them"
        raise _blame("reward function", name, what, predictions[:1])
    for prediction, reward in zip(predictions, rewards, strict=True):
        if optional and reward is None:
            continue
        if not isinstance(reward, Real) or not abs(reward) < 1e300:  # nan is not smaller either
            raise _blame("reward function", name, f"returned {_short(reward)} for", prediction)
    return rewards


def _rewards(name: str, predictions: list[str], rewards_of: Callable[[slice], Iterable], rows: slice) -> list:
    try:
        return list(rewards_of(rows))
    except RewardError:
        raise
    except Exception as error:
        if len(predictions[rows]) > 1:
            for row in range(len(predictions)):
                _rewards(name, predictions, rewards_of, slice(row, row + 1))  # raises for the one at fault
        raise _blame("reward function", name, f"raised {_short(error)} on", predictions[rows][:1]) from error


def _extract(extract: Extractor, text: str) -> str:
    """extract(text), or RewardError where it raises or returns no string."""
    name = next((name for name, fn in ANSWER_EXTRACTORS.items() if fn is extract), repr(extract))
    try:
        answer = extract(text)
    except RewardError:
        raise
    except Exception as error:
        raise _blame("answer extractor", name, f"raised {_short(error)} on", text) from error
    if not isinstance(answer, str):
        raise _blame("answer extractor", name, f"returned {_short(answer)}, not a string, for", text)
    return answer


def _blame(kind: str, name: str, what: str, text: object) -> RewardError:
    return RewardError(f"{kind} {name!r} {what} {_short(text)}")


def _short(value: object) -> str:
    shown = " ".join(repr(value[:80] if isinstance(value, str) else value).split())
    return shown if len(shown) <= 80 else shown[:77] + "..."


if __name__ == "__main__":  # started by _worker
    _serve()
