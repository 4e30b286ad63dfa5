"""Any config is taken or refused by name; any text is graded, and soon.

test_config.py puts odd values under single keys and test_rewards.py grades short texts and long ones of one piece
each; here whole shipped configs are mutated at several places at once, files are any bytes, and long texts mix the
pieces that the scans look for. What hangs is ended by an alarm: no test compares timings.
"""

from __future__ import annotations

import copy
import random
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import reward_function
import train
from reward_function import ANSWER_EXTRACTORS, REWARD_FNS

SECONDS = 10  # a text takes milliseconds; what is quadratic takes minutes
SHIPPED = {
    name: yaml.safe_load((ROOT / f"configs/{name}.yaml").read_text())
    for name in ("tiny", "arithmetic", "gsm8k", "math")
}
slow = settings(deadline=None, suppress_health_check=list(HealthCheck))


@contextmanager
def soon(seconds: int = SECONDS) -> Iterator[None]:
    """Ends what hangs."""

    def give_up(*_: Any) -> None:
        raise TimeoutError(f"not done in {seconds} seconds")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


# ------------------------------------------------------------------------------------------------------------ configs

any_text = st.text(st.characters(exclude_categories=()), max_size=20)
scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-3, 3)
    | st.sampled_from([2**70, 10**400, -(10**400), 1e308, "1e999", "nan", "1_0", "٣", "\ud800", "a\nb", "~", ""])
    | st.floats()
    | any_text
    | st.dates()
    | st.datetimes()
    | st.binary(max_size=5)
)
words = st.sampled_from([*train.known_keys(), *(key.split(".")[-1] for key in train.known_keys())])
keys = words | any_text | st.integers() | st.none() | st.booleans() | st.dates()
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3) | st.sets(scalars, max_size=2),
    max_leaves=8,
)


def sections(tree: dict) -> list[dict]:
    return [tree, *(below for value in tree.values() if isinstance(value, dict) for below in sections(value))]


@st.composite
def mutated(draw: st.DrawFn) -> dict[Any, Any]:
    """A shipped config with keys dropped, values replaced, unknown keys added, and keys where they do not belong."""
    tree = copy.deepcopy(SHIPPED[draw(st.sampled_from(sorted(SHIPPED)))])
    for _ in range(draw(st.integers(1, 5))):
        places = sections(tree)
        section = places[draw(st.integers(0, len(places) - 1))]
        known = st.sampled_from(list(section)) if section else keys
        match draw(st.sampled_from(["drop", "replace", "add", "swap", "nest"])):
            case "drop":
                section.pop(draw(known), None)
            case "replace":
                section[draw(known)] = draw(values)
            case "add":
                section[draw(keys)] = draw(values)
            case "swap":  # one key's value under another
                one, other = draw(known), draw(known)
                section[one], section[other] = section.get(other), section.get(one)
            case "nest":
                key = draw(known)
                section[key] = {key: section.get(key)}
    return tree


def taken_or_refused(config: Any, *args: Any) -> None:
    """Calls what checks a config: it returns one or raises UserError of lines that can be read."""
    try:
        with soon():
            assert isinstance(config(*args), train.Config)
    except train.UserError as error:
        lines = str(error).split("\n")
        assert all(": " in line and len(line) < 2000 for line in lines), lines
        assert len(set(lines)) == len(lines)


@settings(slow, max_examples=300)
@given(tree=mutated())
def test_a_mutated_config_is_taken_or_refused(tree: dict[Any, Any]) -> None:
    before = repr(tree)
    taken_or_refused(train.check_config, tree)
    assert repr(tree) == before, "checking changes nothing"


@settings(slow, max_examples=100)
@given(tree=mutated(), override=any_text | st.tuples(words, any_text | st.sampled_from(["[", "!!int ''", "{a: &b"])))
def test_a_mutated_file_and_any_override_are_taken_or_refused(
    tmp_path_factory: pytest.TempPathFactory, tree: dict[Any, Any], override: str | tuple[str, str]
) -> None:
    file = tmp_path_factory.mktemp("fuzz") / "config.yaml"
    file.write_text(yaml.safe_dump(tree, allow_unicode=False), encoding="utf-8", errors="surrogatepass")
    taken_or_refused(train.read_config, str(file))
    taken_or_refused(train.read_config, str(file), [override if isinstance(override, str) else "=".join(override)])


YAML_PIECES = [
    "a",
    ": ",
    "- ",
    "\n",
    "  ",
    "\t",
    "[",
    "]",
    "{",
    "}",
    ",",
    "&x ",
    "*x",
    "!!int ",
    "!!timestamp ",
    "!!set ",
    "!!omap ",
    "!!pairs ",
    "!!float ",
    "!!bool ",
    "!!binary ",
    "!!python/none ",
    "<<: ",
    "? ",
    "| ",
    "> ",
    "'",
    '"',
    "%YAML 1.1\n",
    "---\n",
    "...\n",
    "#",
    "0x_",
    "1:60",
    "2025-13-13",
    "0o9",
    ".inf",
    "~",
    "train",
    "\\x",
    "\x00",
    "\u2028",
    "\ufeff",
    "run_name",
    "model",
]


@settings(slow, max_examples=300)
@given(
    content=st.binary(max_size=200)
    | any_text.map(lambda text: text.encode("utf-8", "surrogatepass"))
    | st.lists(st.sampled_from(YAML_PIECES), max_size=25).map(lambda pieces: "".join(pieces).encode())
)
def test_any_file_is_taken_or_refused(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    file = tmp_path_factory.mktemp("fuzz") / "config.yaml"
    file.write_bytes(content)
    taken_or_refused(train.read_config, str(file))


@pytest.mark.parametrize("depth", [10, 100, 300, 1000, 100_000])
@pytest.mark.parametrize(("opened", "closed"), [("[", "]"), ("{a: ", "}"), ("- ", "")])
def test_a_deep_file_is_refused(tmp_path: Path, depth: int, opened: str, closed: str) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("train:\n  alpha: " + "\n  " * (opened == "- ") + opened * depth + "1" + closed * depth)
    with pytest.raises(train.UserError):
        train.read_config(str(file))


@pytest.mark.parametrize("text", ["train: &a {alpha: *a}", "train: &a [*a]", "a: &a [*a]", "model: &a {lora: *a}"])
def test_a_file_that_holds_itself_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.yaml").write_text(text)
    taken_or_refused(train.read_config, str(tmp_path / "config.yaml"))


# ------------------------------------------------------------------------------------------------------------ rewards

PIECES = [
    "<think>",
    "</think>",
    "<answer>",
    "</answer>",
    "<",
    "####",
    "\\boxed{",
    "\\boxed ",
    "\\fbox{",
    "{",
    "}",
    "\\{",
    "\\}",
    "$",
    "\\$",
    "\\(",
    "\\)",
    "\\frac{",
    "\\frac12",
    "\\dfrac",
    "\\text{",
    "\\mathrm{",
    "\\left(",
    "^\\circ",
    "^{",
    "\\!",
    "\\,",
    "1,",
    "1,234",
    "3.5",
    ".",
    "-",
    "−",
    "1e9",
    "e5",
    "1/",
    "2 1/2",
    "=",
    "%",
    "€",
    "°",
    "x",
    "i",
    "_{8}",
    "ab ",
    "答",
    "٣",
    "²",
    "\ud800",
    "\x00",
    "\u2028",
    " ",
    "\n",
    "\t",
    "\\",
    "42",
]
MANY = 100_000
# Units that make a scan begin at each of them, and look far from each.
HARD = [
    "<answer>",
    "<think>",
    "{",
    "}",
    "\\boxed{",
    "1,",
    "$",
    "\\frac{",
    "</answer>",
    "\\text{",
    "1,234,",
    "1 1/",
    "\\left",
    "<answer></answer",
    "<answer><think>",
    "</think><think>",
    "\\boxed{}",
    "\\boxed{\\{",
    "$1,",
    "\\frac{1}{",
    "\\frac{1}",
    "{,}",
    "1{,}",
    "\\text{a",
    "\\text {",
    "\\$",
    "-$",
    "x=",
    "1/1",
    "1e9,",
    "1.1.",
    "####\n",
    "a: ",
    "ab cd ",
    "\\ ",
]


@pytest.fixture
def no_mathematics(monkeypatch: pytest.MonkeyPatch) -> None:
    """math-verify has a time limit of its own, which test_rewards.py tests; here it would only take time."""
    monkeypatch.setattr(reward_function, "equivalent", lambda answer, reference: False)


def grade(text: str) -> None:
    with soon():
        for extract in ANSWER_EXTRACTORS.values():
            assert isinstance(extract(text), str)
            reward_function.score("exact_match", ["<answer>42</answer>"], [text], extract)
        for name in REWARD_FNS:
            (paid,) = reward_function.score(name, [text], ["42"], ANSWER_EXTRACTORS["identity"])
            assert 0 <= paid <= 1


@settings(slow, max_examples=100)
@given(
    head=st.lists(st.sampled_from(PIECES), max_size=8).map("".join),
    unit=st.lists(st.sampled_from(PIECES), min_size=1, max_size=4).map("".join),
    tail=st.lists(st.sampled_from(PIECES), max_size=8).map("".join),
    length=st.sampled_from([100, 1000, 10_000, MANY]),
)
def test_a_unit_repeated_to_any_length_is_graded(
    no_mathematics: None, head: str, unit: str, tail: str, length: int
) -> None:
    grade(head + unit * (length // len(unit)) + tail)


@settings(slow, max_examples=60)
@given(seed=st.integers(0, 2**32), length=st.sampled_from([30, 3000, 30_000]))
def test_a_long_mixture_is_graded(no_mathematics: None, seed: int, length: int) -> None:
    rng = random.Random(seed)
    text = "".join(rng.choices(PIECES + rng.choices(PIECES, k=3) * 40, k=length))[:MANY]
    grade(text)
    grade(f"<think>{text}</think><answer>{text}</answer>"[:MANY])


@settings(slow, max_examples=200)
@given(text=st.text(st.characters(exclude_categories=())))
def test_any_text_is_graded(no_mathematics: None, text: str) -> None:
    grade(text)


@pytest.mark.parametrize("unit", HARD)
def test_what_makes_scans_look_far_is_graded_soon(no_mathematics: None, unit: str) -> None:
    text = unit * (MANY // len(unit))
    for wrapped in (text, f"<answer>{text}</answer>", f"\\boxed{{{text}}} x", f"#### {text}"):
        grade(wrapped)


def test_the_alarm_rings() -> None:
    """A quadratic scan of such a text would be noticed."""
    with pytest.raises(TimeoutError), soon(1):
        re.search(r"(?:<answer>)+x", "<answer>" * 12_500)
