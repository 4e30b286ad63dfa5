"""The made-up task's own way to read, compare and pay answers. A config names this file in `reward.module`."""

import re

from reward_function import Extractor, is_correct, register_extractor, register_match, register_reward


@register_extractor("last_digits")
def last_digits(text: str) -> str:
    """The last run of digits: of an output as of a solution, "312 sorted is 123"."""
    return (re.findall(r"[0-9]+", text) or [""])[-1]


@register_match("one_place_off")
def one_place_off(answer: str, reference: str) -> bool:
    """Are two answers equal but for one place? Accuracy, and which corrections mended an answer, follow this."""
    return len(answer) == len(reference) and sum(a != b for a, b in zip(answer, reference, strict=True)) <= 1


@register_reward("digits_in_place")
def digits_in_place(predictions: list[str], targets: list[str], extract: Extractor) -> list[float]:
    """Up to 0.4 for digits that stand where they should, 0.6 for a correct answer."""
    pairs = zip(predictions, targets, strict=True)
    return [0.4 * share_in_place(extract(p), extract(t)) + 0.6 * is_correct(p, t, extract) for p, t in pairs]


def share_in_place(answer: str, wanted: str) -> float:
    return sum(a == b for a, b in zip(answer, wanted, strict=False)) / max(len(answer), len(wanted))
