"""reward_function.py: what counts as an answer, when two answers match, what rewards pay, and hostile text."""

from __future__ import annotations

import math
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import reward_function as R
from reward_function import ANSWER_EXTRACTORS, MATCH_FNS, REWARD_FNS, RewardError, answers_match, is_correct

GSM8K, MATH, IDENTITY = (ANSWER_EXTRACTORS[name] for name in ("gsm8k_hash", "math_final_answer", "identity"))
EXTRACTORS = pytest.mark.parametrize("extract", [GSM8K, MATH, IDENTITY])

PIECES = (
    r"<think>~</think>~<answer>~</answer>~####~\boxed{~\boxed ~{~}~\{~\}~$~\~42~1,234~2 1/2~3.5~-~−~,~.~/~%~=~\text{~^"
)
PIECES = (PIECES + r"~\frac{~e9~x~i~_{8}~(~)~[~\cup ~\pm ~<~:~ or ~!~\pi~\sqrt~cm~**~½~²~√~×~٣~ ").split("~")
PIECES += ["\n", "\x00", "\ud800", "\u2028", "\u202f"]
ANY = st.text(st.characters(exclude_categories=()), max_size=60)
TEXTS = ANY | st.lists(st.sampled_from(PIECES), max_size=12).map("".join)
LINES = st.text(alphabet="abc xyz.,:;?!0123456789+-", max_size=30)  # no tags, boxes or markers
quick = settings(deadline=None, max_examples=100, suppress_health_check=list(HealthCheck))


def table(rows: str) -> list[tuple[str, str]]:
    """Rows "first | another | ..." as pairs of the first and each other; || or a newline ends a row, ⏎ is a newline."""
    pairs = []
    for row in re.split(r"\n| \|\| ", rows.strip("\n")):
        first, *others = (text.strip(" ").replace("⏎", "\n") for text in re.split(r"(?:^| )\|(?: |$)", row))
        pairs += [(first, other) for other in others]
    return pairs


def answers(answer: str, target: str, extract: Callable = MATH) -> bool:
    return is_correct(f"<answer>{answer}</answer>", target, extract)


def pay(name: str, texts: list[str], targets: list[str], extract: Callable, module: str | None = None) -> list[float]:
    return R.compute_rewards([name], None, module, texts, targets, extract, {})


@pytest.fixture
def scratch_registry():
    """The registries as they were after the test, so that it can register what it likes."""
    kept = [(registry, dict(registry)) for registry in (REWARD_FNS, ANSWER_EXTRACTORS, MATCH_FNS)]
    yield
    for registry, shipped in kept:
        registry.clear()
        registry.update(shipped)


@pytest.fixture
def no_mathematics(monkeypatch):  # it has a time limit of its own
    monkeypatch.setattr(R, "equivalent", lambda a, b: False)


# ---- registries ------------------------------------------------------------------------------------------------------


def test_what_is_shipped():
    assert set(REWARD_FNS) == {"exact_match", "format_and_match", "strict_format_and_match", "format_only"}
    assert set(ANSWER_EXTRACTORS) == {"gsm8k_hash", "math_final_answer", "identity"}
    assert {"equal": answers_match} == MATCH_FNS and R.DEFAULT_MATCH == "equal"


REGISTRIES = [(R.register_reward, REWARD_FNS), (R.register_extractor, ANSWER_EXTRACTORS), (R.register_match, MATCH_FNS)]


@pytest.mark.parametrize(("register", "registry"), REGISTRIES)
def test_registering(register, registry):
    def mine(*_):
        return ""

    shipped = dict(registry)
    assert register("mine")(mine) is mine and registry.pop("mine") is mine
    with pytest.raises(ValueError, match=[*shipped][0]):
        register([*shipped][0])(mine)
    assert registry == shipped


def test_importing_is_light():
    code = "import sys, reward_function; print(*sys.modules)"
    root = Path(R.__file__).parent
    loaded = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True).stdout
    assert not {"torch", "transformers", "train", "sympy", "math_verify"} & set(loaded.split())


# ---- extractors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "text"),
    table(r"""
5 | Tom has 2 + 3 = <<2+3=5>>5 apples.⏎#### 5 | <answer>+5</answer> | <answer>5 apples and 3 pears</answer>
1234 | #### 1,234 || -7 | #### -7
42 | ####42 | #### 42⏎That was easy, 7. | <think>6*7</think><answer>42</answer> | <answer>= 42</answer>
42 | <answer>x = 42 km</answer> | <answer>\boxed{42}</answer> | 42
2 | #### 1⏎#### 2 | <answer>1</answer><answer>2</answer> | <answer><answer>2</answer></answer>
1234.50 | <answer>$1,234.50</answer> || 1234567 | <answer>1,234,567 dollars</answer>
-5 | <answer>-$5</answer> | <answer>$-5$</answer> | <answer>−5</answer> || 30 | <answer>€30</answer>
18 | <answer>18.</answer> | <answer>9 * 2 = $18</answer> | <answer>**18**</answer> | $18
50 | <answer>50%</answer> | <answer>50\%</answer> || 3 | <answer>3 = three</answer>
3/4 | <answer>$\frac{3}{4}$</answer> | <answer>\frac34</answer> | <answer>3/4</answer>
2 1/2 | <answer>2 1/2 hours</answer> || .5 | <answer>.5</answer>
10000 | <answer>10\,000</answer> | <answer>10{,}000</answer>
7 | <answer>7</answer> or <answer>8 | <answer>7</answer>⏎#### 8
 | <answer>none</answer>⏎#### 8 | </answer>8<answer> | The answer is 42. | 42 apples | 41⏎42 | 1+1 | #### none
 | ### 42 | <answer></answer> | <answer>3,4</answer> | <answer>٣</answer> || 8 | <answer>8⏎#### 8 || 153.5 | 153.5
""")
    + [("42", "<think>6*7</think>\n<answer>\n42\n</answer>\n"), ("-1234", " -1,234\n"), ("", "")],
)
def test_gsm8k_hash(answer, text):
    assert GSM8K(text) == answer


@pytest.mark.parametrize(
    ("answer", "text"),
    table(r"""
42 | so it is $\boxed{42}$.
\frac{1}{2} | \boxed{\frac{1}{2}} | <think>x</think><answer> $\frac{1}{2}$ </answer> | \frac{1}{2}
2 | \boxed{1}, no: \boxed{2} | <think>\boxed{1}</think><answer>2</answer> | <answer>2</answer> or \boxed{3}
1 | \boxed{1} and \boxed{2 | \boxed{1} and \boxed{\frac{2}{3} || \left\{1,2\right | \boxed{\left\{1,2\right.}
5 | { \boxed{5} | } \boxed{5} | \boxed{\boxed{5}} | \fbox{5} | \boxed {5} | $\boxed 5$ | \boxed5
5 | The answer is \boxed{5}. I used \boxed as asked. | \boxed{5} in a \boxed environment
5 | $\boxed 5$, and \boxed was asked | <answer>**Answer:** 5</answer> | <answer>**Final answer**: 5</answer>
5 | <answer>The answer: 5</answer> | <answer>= 5</answer> || 12 | \boxed 12 apples || 3 | \boxed{3} and \boxed
x+1 | \boxed{x+1}, boxed with \fbox or so | <answer>\(x+1\)</answer> | <answer>\[ x+1 \]</answer>
x+1 | <answer>Answer: $x+1$</answer> || 7 | I use \boxed for it: \boxed{7} | \boxed{$7$} | \boxed{7.}
\boxedfoo{3} | \boxedfoo{3}
 | \boxed{} | <answer></answer>\boxed{3} | The answer is 4 | It is 4. | Answer: 4 | 2+2⏎4 | <think>2+2</think> 4
 | <answer>4 || Evelyn | \boxed{\text{Evelyn}} | \text{Evelyn} || (C) | \boxed{\textbf{(C)}}
10\text{ cm} | \boxed{10\text{ cm}} || x | <answer>It is \boxed{x}.</answer>
73 | <answer>**73**</answer> | <answer>`73`</answer> || two words | \text{two words}
\frac{270}7\text{ degrees} | \frac{270}7\text{ degrees} || x \in [-2,7] | x \in [-2,7] || p - q | p - q
32,\!348 | \$32,\!348 || even | even || 4 | 4
""")
    + [("", "")],
)
def test_math_final_answer(answer, text):
    assert MATH(text) == answer


@pytest.mark.parametrize(
    ("answer", "text"),
    table(r"""
-1234 | <think>a</think>⏎<answer> -1234 </answer> || 2 | <answer>1</answer><answer>2</answer>
 | <answer></answer> | <think>a</think> 5 | a</think> 5 | <answer>5 | 5</answer>
two lines⏎of a target | two lines⏎of a target
""")
    + [("-1234", "  -1234\n"), ("", " ")],
)
def test_identity(answer, text):
    assert IDENTITY(text) == answer


@EXTRACTORS
@given(before=LINES, after=LINES, number=st.integers(-(10**9), 10**9))
@quick
def test_text_outside_the_mark_changes_nothing(extract, before, after, number):
    assert extract(f"{before}<answer>{number}</answer>{after}") == str(number)
    assert GSM8K(f"{before}\n#### {number}\n{after}") == str(number)
    assert MATH(f"{before}\\boxed{{{number}}}{after}") == str(number)


# ---- two answers match -----------------------------------------------------------------------------------------------


SPACES = ("\u202f", "\u00a0", "\u2009", "\u2007", "\\ ", "\\,", "\\;", "~", " ", "{,}", ",")
NUMBERS = table(r"""
1234 | 1,234 | $1,234 | 1234.0 | \$1,234.00 | 1{,}234 | 1234. | 01234 | +1234 | 1.234e3 | 1,234 \text{ apples}
11111100 | 11,\! 111,\! 100 || -5 | -$5 | −5 | - 5 | − 5 | - $5 | -\ 5 | x = - 5 | $-5$ | (-5) | -5.0
0.5 | .5 | 1/2 | \frac12 | \frac{1}{2} | \dfrac{2}{4} | \nicefrac{1}{2} | \sfrac{1}{2} | \tfrac 1 2 | ½ | 1⁄2
0.5 | 5e-1 | 50/100
50 | 50\% | 50% | 50 \% | 5\times10^1 | $50$ | \text{50} | {50} | ５０ | **50** | `50` | *50* | \mathrm{50}
90 | 90^\circ | 90° | 90^{\circ} | 90\degree | 90\text{ degrees} | 90 degrees
-0.75 | \dfrac{-3}{4} | \frac{3}{-4} | -\frac34 | - \frac34 | -3/4 | -¾
2.5 | 2\frac{1}{2} | 2 1/2 | \frac52 | 2½ | 2 \frac12 | 5/2 | 2.50 || -1.5 | -1 1/2 | -3/2 | -1\frac12 | - 1.5
1500 | 1.5\times10^3 | 1.5e3 | 1.5·10^3 | 1.5×10³ | 1.5 x 10^3 | 1.5*10^{3} | 15e2 | 1.5E+3
10^{-7} | 1e-7 | 0.0000001 | 10⁻⁷ | 1\times10^{-7} | 1E-7 | 0.1e-6
6.02\times10^{23} | 6.02e23 | 6.02\cdot 10^{23} | 602000000000000000000000 | 6.02*10**23
10^6 | 1e6 | 1\cdot 10^6 | 10^{6} | 10**6
5 | x=5 | x = 5 | 5 = x | \text{Area} = 5 | f(2) = 5 | n_1 = 5 | = 5 | 5 cm | 5cm | 5\text{ cm} | 5 cm^2
5 | 5 square feet | 5 apples || 5 cm | 5\text{ cm} | 5\,\mathrm{cm} | 5 CM | 5cm || 52_8 | 52 | 52_{8}
""")
NUMBERS += [("1234", f"1{space}234") for space in SPACES] + [("12345678.5", f"12{s}345{s}678.5") for s in SPACES]
NUMBERS += [("1e400", "1" + "0" * 400), ("7" * 5_000, "7" * 5_000)]
SAME = table(
    r"""
p-q | p - q | $p-q$ | p - q. | \left(p-q\right)
(3,\frac\pi2) | \left( 3, \frac{\pi}{2} \right) | (3, \frac{\pi}{2}) | (3,\dfrac\pi2)
east | \text{east} | East | \mathrm{East} | EAST. || new york | New  York | \text{New York}
x^2 | x² | x**2 | x^{2} | x ^ 2 || \sqrt{2} | √2 | sqrt(2) | \sqrt2 | \sqrt 2 || \sqrt{x+1} | √(x+1) | sqrt(x+1)
(-\infty,1) | (-∞,1) | ( -\infty , 1 ) | (-infinity, 1) | \left(-\infty,1\right) || A\cup B | A ∪ B
\emptyset | \varnothing | ∅ | \{\} | \{ \} || \ln 2 | \log_e 2 | \log_{e} 2 | ln 2
x \le 5 | x ≤ 5 | x\leq5 | x <= 5 | x \leqslant 5 | 5 \ge x || 2\pi | 2π | 2pi | 2 \pi || \sin x | sin x | \sin x
2^{12} | 4^6 | 2**12 | 8^4 || 1-\frac{1}{2^{60}} | \frac{2^{60}-1}{2^{60}} || 5:1 | 5 : 1
A | \textbf{(A)} | (A) | \text{(A)} | \text{A}
\{1,2\} | \{2,1\} | {1, 2} | 1 or 2 | 2, 1 | \{1, 2.0\} | 1 \text{ and } 2 | x=1, x=2 | 1;2
6, 8, 10 | 6, 8\text{, and }10 | 10, 8, 6 | 6, 8, and 10 || (1,2) | 1,2 | (x,y) = (1,2) | ( 1 , 2 ) | x=1, y=2
(0.5,1000) | (\frac12, 1e3) | (½, 1000) || 2,-2 | \pm 2 | ±2 | x = \pm 2 || 1-\sqrt2, 1+\sqrt2 | 1\pm\sqrt{2} | 1±√2
[1,2]\cup[3,4) | [3,4)\cup[1,2] | [1,2] ∪ [3,4) || [-2,7] | x \in [-2,7] | -2\le x\le 7 | 7 \ge x \ge -2 | x ∈ [-2,7]
(2,\infty) | x > 2 | 2 < x | x \in (2,∞) || (-\infty,-1)\cup(1,\infty) | x<-1 \text{ or } x>1 | x > 1 or x < -1
\begin{bmatrix} 0.5 \\ 2 \end{bmatrix} | \begin{pmatrix} 1/2 \\ 2 \end{pmatrix}
"""
)
EQUIVALENT = table(r"""
2x | x+x | x \cdot 2 || p - q | -q+p || x^2-1 | (x-1)(x+1) | (x-1)(x+1) = x^2-1 || (x+1)^2 | x^2+2x+1 | x²+2x+1
\frac{n(n-1)}{2} | \binom{n}{2} || \frac{x}{2} | ½x | x/2 | 0.5x
\frac{1}{\sqrt{2}} | \frac{\sqrt{2}}{2} | \sqrt{\frac12} | 2^{-1/2}
\sqrt{12} | 2\sqrt3 | 2√3 | \frac{6}{\sqrt3} | x = 2\sqrt3 | 2\sqrt{3}\text{ cm} || \sqrt3 | 3^{1/2} | 3^{0.5}
\frac{\pi}{2} | pi/2 | 0.5\pi | \frac12\pi || 2\pi | 2*pi | 2 \cdot \pi || \frac{80\pi}{9} | \frac{80}{9}\pi
\frac{9(3+\sqrt3)}{\pi^2} | \frac{9}{\pi^2}(\sqrt{3}+3) || \frac12+\frac{\sqrt5}{2} | \frac{1+\sqrt5}{2}
\ln 8 | 3\ln 2 | ln(8) || -2 + 7i | 7 i - 2 | 7i-2 || -\frac12+\frac{\sqrt3}{2}i | \frac{-1+i\sqrt3}{2}
(\sqrt{12}, 1) | (2\sqrt3, 1) || 4 | 2+2 = 4 || y = x+2 | x-y+2 = 0 | y = 2+x | x+2
""")
DIFFERENT = table(r"""
1234 | 1235 | 1.234 | 12,34 | 1 | -1234
5 | -5 | 4=5 | 5=5 | 2+2=5 | 2x=10 | 5:1 | five | \ | 5^2 | - 5 | 4 5 | 5,5 | 5\sqrt{1} | 5i || 49 | 4 9
1 | 1/0 | 1 or 2 | 1 234 || 1/3 | 0.333333 | 0.3333333333333333 | 33.3\% || 9007199254740992 | 9007199254740993
1e400 | 1e401 || 0 | 1e-400 | 10^{-400} | 2^{-5000} || e-7 | 1e-7 || 528 | 52_8 || 52_8 | 52_9 || east | seat | west
cat | act || x^2 | x^3 | 2x | y^2 || x | y | X+1 || 4:30 p.m. | 5:30 p.m. | 4:30 a.m. || 2^{-99} | 2^{-100} | 2^{-98}
\frac{1}{21!} | \frac{1}{20!} || e^{-51} | e^{-50} | e^{-510} || 1-\frac{1}{2^{61}} | 1-\frac{1}{2^{60}}
1-\frac{1}{2^{601}} | 1-\frac{1}{2^{600}} || 6.63\times10^{-34} | 1.38\times10^{-23} || 10^{20} | \sqrt{10^{40}+1}
\sqrt{10^{40}+2} | \sqrt{10^{40}+1} || \pi+10^{-31} | \pi+10^{-30} || (e^{-51},1) | (e^{-50},1)
\{3,2^{-99}\} | \{2^{-100},3\} || x+2^{-99} | x+2^{-100} || e^{-51}x | e^{-50}x || \pi | 3.14159265358979 | 22/7
x=5 | y=5 | 2x=10 | x-5=0 || x>2 | 2x+3>7 | x<2 | x\ge2 | y>2 || 5:1 | 10:2 | 1:5 | \frac51 | 5:1:1 || 4 | 4,4 | \{4,5\}
\{4\} | \{4,4\} || \{1,2\} | (2,1) | (1,2) | [1,2] | \{1,2,2\} | \{1,3\} || (1,2) | (2,1) | 2,1 | [1,2] | (1,2]
[3,4] | (3,4] | [3,4) || (1,2)\cup(3,4) | (1,2),(3,4) | (1,2)\cup(3,5)
\begin{pmatrix}1\\2\end{pmatrix} | \begin{pmatrix}1&2\end{pmatrix} | (1,2) || 5 cm | 5 kg | 50 mm | 5\text{ m}
5 hours | 5 days || A_1 | A || x \cdot x | The answer is $5$ or maybe $x^2$ | I say \boxed{5} and \boxed{x^2}
""")
DIFFERENT += [("", ""), (" ", " "), ("$", "$"), ("%", "\\%"), (".", "."), ("", "0"), ("1/0", "2/0")]
DIFFERENT += [("7" * 5_000, "7" * 4_999 + "8"), ("x" * 301 + "+1", "1+" + "x" * 301)]  # too long for mathematics
UNDONE = table(r"""
-4631 | 60494 - 65125 | 60494-65125 | x = 60494 - 65125 | 60494 − 65125 | (60494 - 65125)
492 | 173+319 | 173＋319 | \text{173+319} | 173+319 = | 173+319 = x | 173+319 = 173+319 | 173 plus 319 | 492 = 173+319
492 | 173\text{ apples}+319\text{ apples} | (173+319)\text{ cm} | 173{+}319 | [173+319] | \{173+319\}
492 | 492 \cdot 1 | 492x/x || 492\text{ cm} | (173+319)\text{ cm} | 173+319 cm || x = 492 | x = 173+319 | 173+319
25 | 100/4 | \frac{100}{4} | 100÷4 | \frac{50}{2} | 75/3 cm
5 | \frac{\frac{10}{2}}{1} | |-5| | \max(3,5) | \lfloor 5.5 \rfloor | 17 \bmod 12 | x-x+5 | \sqrt{25} | 5^1 | 0+5 | --5
51 | 17 × 3 | 17*3 | 17 \cdot 3 | 17(3) | (17)(3) | 102÷2 || 81 | 3^4 | 3**4 | 9^{2} | 3⁴
1000 | 10^3 | 10^{3} | 10·100 || 1023 | 2^{10}-1 || 720 | 6! | 3!! || 120 | \binom{10}{3} | \dbinom{10}{3} | 5!
6 | \gcd(12,18) | 2*3 | 3! || \frac13 | \int_0^1 x^2 dx || 55 | \sum_{k=1}^{10} k | 1+2+3+4+5+6+7+8+9+10
3 | \log_2 8 | \ln e^3 || \frac12 | \cos 60^\circ | 1-\frac12 | \frac12\cdot 1 || 10 | 5\%\cdot 200
(2,3) | (1+1,3) | (2, 6/2) || \{2\} | \{1+1\} || 1,2,3 | 1,2,1+2
\begin{pmatrix}2\\2\end{pmatrix} | \begin{pmatrix}1+1\\2\end{pmatrix} || x > 2 | x > 1+1
3\sqrt2 | \sqrt{2}+\sqrt{8} | \sqrt2+2\sqrt2 || 5\sqrt{21} | \sqrt{15}\cdot\sqrt{35} || 12\sqrt2 | 3\cdot4\sqrt2
\frac{\pi}{4} | \arctan 1 | \frac{\pi}{2}-\frac{\pi}{4} || 3+\sqrt3 | 1+2+\sqrt3 || 7+i | (3+2i)+(4-i)
""")


@pytest.mark.parametrize(("a", "b"), NUMBERS + SAME)
def test_answers_match_without_mathematics(a, b, monkeypatch):
    monkeypatch.setattr(R, "equivalent", None)
    assert answers_match(a, b) and answers_match(b, a)


@pytest.mark.parametrize(("a", "b"), EQUIVALENT)
def test_answers_match_as_mathematics(a, b):
    assert answers_match(a, b) and answers_match(b, a)


@pytest.mark.parametrize(("a", "b"), DIFFERENT + UNDONE)
def test_answers_differ(a, b):
    assert not answers_match(a, b) and not answers_match(b, a)
    assert not answers(b, a, IDENTITY) and ("boxed" in b or not answers(b, a, MATH))


MINUS_THREE = ["- 3", "− 3", "- $3", "-\\ 3", "$- 3$", "x = - 3", "−\u00a03"]
FIRST_NUMBERS = [("-3", "- 3"), ("7", "10 - 3 = 7"), ("3", "Total - 3"), ("12345678", "12\u202f345\u202f678 dollars")]
FIRST_NUMBERS += [("-3", text) for text in MINUS_THREE] + [("1234", f"1{space}234") for space in SPACES]
FIRST_NUMBERS += [("-4631", "60494 - 65125 = -4631"), ("5", "5 apples and 3 pears"), ("- 3", "-3")]
NOT_THE_FIRST = [("3", text) for text in MINUS_THREE] + [("1", f"1{space}234") for space in SPACES]
NOT_THE_FIRST += [("25", "100/4"), ("-4631", "60494 - 65125"), ("- 3", "3")]


@pytest.mark.parametrize(
    ("target", "answer", "right"), [(*x, True) for x in FIRST_NUMBERS] + [(*x, False) for x in NOT_THE_FIRST]
)
def test_the_first_number_of_an_answer(target, answer, right):
    assert answers(answer, f"so\n#### {target}", GSM8K) == right


def problem(kind: str, rng: random.Random) -> tuple[str, str]:
    a, b = rng.randint(2, 9999), rng.randint(2, 9999)
    small = rng.randint(2, 12)
    return {
        "sum": (f"{a} + {b}", str(a + b)),
        "difference": (f"{a} - {b}", str(a - b)),
        "product": (rng.choice(["{} \\cdot {}", "{} * {}", "{} × {}", "{}({})"]).format(a, b), str(a * b)),
        "quotient": (rng.choice(["{}/{}", "\\frac{{{}}}{{{}}}", "{} ÷ {}"]).format(a * b, a), str(b)),
        "binomial": (f"\\binom{{{small + 9}}}{{{small}}}", str(math.comb(small + 9, small))),
        "power": (rng.choice(["{}^{{{}}}", "{}**{}"]).format(small, small + 1), str(small ** (small + 1))),
    }[kind]


@pytest.mark.parametrize("kind", ["sum", "difference", "product", "quotient", "binomial", "power"])
def test_a_policy_that_copies_earns_no_match_and_the_value_does(kind):
    rng = random.Random(kind)
    for _ in range(200):
        text, value = problem(kind, rng)
        for extract in (MATH, IDENTITY):
            assert not answers(text, value, extract), text
            assert not answers(f"{text} =", value, extract) and not answers(f"x = {text}", value, extract), text
            assert answers(value, value, extract) and answers(f"{int(value):,}", value, extract)
        if kind not in ("sum", "difference", "product", "power"):  # gsm8k_hash reads the first number of the problem
            assert not answers(text, f"#### {value}", GSM8K), text
        assert answers(value, f"#### {value}", GSM8K)


@given(number=st.decimals(min_value=-(10**12), max_value=10**12, places=3))
@quick
def test_a_number_matches_itself_however_it_is_written(number):
    whole, thousandths = f"{number:.3f}", int(number * 1000)
    forms = [whole, f"{number:,.3f}", f"${number:,.3f}$", f"\\${whole}", f"{whole}0", f" {whole}. ", f"{whole}\\%"]
    forms += [f"\\text{{{whole}}}", f"{number:,.3f}".replace(",", "\u202f"), f"x = {whole}", f"{whole} cm"]
    if thousandths % 1000:
        forms += [f"{thousandths}/1000", f"\\frac{{{thousandths}}}{{1000}}"]
    assert all(answers_match(form, whole) and answers_match(whole, form) for form in forms)
    assert not any(answers_match(form, f"{number + 1:.3f}") for form in forms)


@given(text=TEXTS)
@quick
def test_nothing_matches_nothing(text):
    assert not answers_match("", text) and not answers_match(text, "")
    for extract in ANSWER_EXTRACTORS.values():
        assert not is_correct("", text, extract) and not is_correct("</answer>", "<answer></answer>", extract)


# ---- properties ------------------------------------------------------------------------------------------------------

FORMS = [text for pair in NUMBERS + SAME + EQUIVALENT + DIFFERENT + UNDONE for text in pair if len(text) < 100]


@given(a=st.sampled_from(FORMS) | TEXTS, b=st.sampled_from(FORMS) | TEXTS)
@settings(quick, max_examples=300)
def test_matching_is_symmetric(a, b):
    assert answers_match(a, b) is answers_match(b, a)


@EXTRACTORS
@given(text=st.sampled_from(FORMS) | TEXTS)
@quick
def test_a_target_with_an_answer_answers_itself(extract, text):
    for target in (text, f"<answer>{text}</answer>", f"\\boxed{{{text}}}", f"#### {text}"):
        answer = extract(target)
        assert answer == answer.strip()
        if R._canonical(answer):  # "$" alone says nothing
            assert is_correct(target, target, extract), target


@given(text=TEXTS, other=TEXTS)
@settings(quick, max_examples=200)
def test_any_text_is_graded_within_a_second(text, other):
    answers_match("y+y", "2y")  # the worker's start is no question
    for a, b in ((text, other), (f"{text}+x", "x+1"), (f"({text}, 1)", f"(1, {other})")):
        start = time.process_time()
        assert answers_match(a, b) in (True, False)
        assert time.process_time() - start < 1


HOSTILE = r"9^9^9^9^9~9^{9^{9^9}}~10^{10^{10}}~x^{9^{9^{9^9}}}~1000000!!~((99999!)!)!~(x+y+z+w)^{200}~1e9999~1e99999"
HOSTILE = [*HOSTILE.split("~"), "\\sum_{i=1}^{10^9} \\frac{1}{i}", "\ud800^2", "\x002", "(" * 299, "\\{" * 140]
HOSTILE += ["{1," * 90, "1,2" * 90, "x=" * 140 + "1", "_aaaa" * 55 + "!=5", "\\sqrt{" * 50 + "2" + "}" * 50]
HOSTILE += ["+".join(f"1/{p}^{{9000}}" for p in range(3, 60, 2))]


@pytest.mark.parametrize("text", HOSTILE)
def test_a_computation_that_would_never_end_is_given_up(text):
    assert answers_match("y+y", "2y")
    start = time.process_time()
    assert not answers_match(text, "x^2+5")  # the worker's own limit ends it
    assert time.process_time() - start < 1
    assert not answers_match(text, "7")
    assert answers_match("z+z+y", "y+2z"), "the next question is answered"


def ends_soon(text: str, extract: Callable) -> None:  # what is quadratic would take minutes
    start = time.process_time()
    for wrapped in (text, f"<answer>{text}</answer>", f"\\boxed{{{text}}} x", f"#### {text}", f"answer is ${text}"):
        assert isinstance(extract(wrapped), str)
        R.given_answer(wrapped, True, extract)
        R.is_flexibly_correct(wrapped, "#### 42", extract)
        R.is_flexibly_correct("<answer>42</answer>", wrapped, extract)
    for name in REWARD_FNS:
        assert 0 <= pay(name, [text], ["42"], extract)[0] <= 1
    assert not answers_match(text, "42" + text[::-1] + "x")
    assert time.process_time() - start < 5


UNITS = r"<think>~<answer>~</answer>~</answer><answer>~<answer></answer~\boxed{~\boxed~\boxed{}~\boxed{\{~{}~\text{"
UNITS = (
    UNITS + r"~\frac{1~1~0~1,~1,234,~1 ~1 234 ~234 ~1/~1 1/~1.~-~- ~1e~#~ ~(~{~\~$~-$~$1,~^~=~x=~ab ~a: ~٣~²~½~{,}~\ "
).split("~")
UNITS += ["answer is ", "\\(\\", ".a", "<", "*", "**", "`", "_a", "\\left", "####\n", "\n", "\ud800", "\x00"]
UNITS += [start + " " * 1000 for start in ("\\boxed", "\\frac", "\\)", "^", "answer is")]


@pytest.mark.parametrize("number", range(len(UNITS)))
def test_a_long_text_is_graded_soon(no_mathematics, number):
    ends_soon(UNITS[number] * (20_000 // len(UNITS[number])), (GSM8K, MATH)[number % 2])


@settings(quick, max_examples=40)
@given(
    unit=st.lists(st.sampled_from(PIECES), min_size=1, max_size=4).map("".join),
    tail=st.lists(st.sampled_from(PIECES), max_size=8).map("".join),
    length=st.sampled_from([100, 1000, 20_000]),
)
def test_a_unit_repeated_to_any_length_is_graded_soon(no_mathematics, unit, tail, length):
    ends_soon(unit * (length // len(unit)) + tail, MATH)


# ---- the worker ------------------------------------------------------------------------------------------------------


def test_matching_as_mathematics_outside_the_main_thread():
    found = []
    thread = threading.Thread(target=lambda: found.extend([answers_match("z+z", "2z"), answers_match("z^2", "2z")]))
    thread.start()
    thread.join()
    assert found == [True, False]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGABRT])
def test_a_worker_that_dies_is_no_grade(number):
    assert answers_match("w+w", "2w")
    os.kill(R._worker().pid, number)
    R._worker().wait()
    name = f"w_{number}"  # a question that was not asked before
    assert answers_match(f"{name}+1", f"1+{name}") and answers_match(f"{name}+2", f"2+{name}")


def test_a_worker_that_dies_twice_is_not_remembered(monkeypatch):
    real = R._worker

    def dead():
        worker = real()
        worker.kill()
        return worker

    dead.cache_clear = real.cache_clear
    monkeypatch.setattr(R, "_worker", dead)
    assert not answers_match("v_1+1", "1+v_1")
    monkeypatch.setattr(R, "_worker", real)
    assert answers_match("v_1+1", "1+v_1")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_worker_leaves_signals_to_the_trainer(number):
    worker = R._worker()
    os.kill(worker.pid, number)
    assert answers_match(f"u_{number}+1", f"1+u_{number}")
    assert worker.poll() is None and R._worker() is worker


def test_a_missing_math_verify_is_an_error_not_a_wrong_answer(monkeypatch, tmp_path):
    (tmp_path / "math_verify.py").write_text("raise ImportError('not installed')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    R._end(R._worker())
    R._worker.cache_clear()
    with pytest.raises(RewardError, match="math-verify"):
        answers_match("t+t", "2t")


# ---- reading an attempt ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "text"),
    table(r"""
42 | <think>2</think><answer>42</answer> or 5 | <answer>1</answer> no: <answer>42</answer>
42 | <answer>42 apples</answer> | <answer>42 | \boxed{42 \text{ apples}} | The answer is 41. No, the answer is 42
42 | THE ANSWER IS: **42**⏎in 3 steps | **Answer:** 42 | 50-8=42 is it
x+1 | <answer>$\boxed{x+1}$</answer> | the answer is \(x+1\) cm | <think>the answer is x+1</think>
7 | <answer></answer> so it is 7 | <answer></answer> \boxed{7} | \boxed{7}. The answer is 8
Evelyn | \boxed{\text{Evelyn}} | the answer is Evelyn. || 5 | \boxed{} 5 || 18 | The answer is $18 per day, not 3
\frac{1}{2} | the answer is $\frac{1}{2}$ of a pie || x^2 + 1 | The answer is x^2 + 1.⏎Or 3 || 2\pi | The answer is 2\pi
3.5 | The answer is 3.5. || 3 | 1 + 2 = 3, so the answer is || 1,234 | 3 and 4⏎#### 1,234 || 6 | #### 5⏎#### 6⏎7
1234.50 | He pays $1,234.50. || -4 | from 3 to -4 || 2 1/2 | half of it is 2 1/2 ||  | no idea
""")
    + [("", "")],
)
def test_a_lenient_reader(answer, text):
    assert R.flexible_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "target", "extract", "strict", "flexible"),
    [
        ("<answer>42</answer>", "#### 42", GSM8K, True, True),
        ("\\boxed{42}", "#### 42", GSM8K, False, True),
        ("The answer is 42.00 dollars", "so\n#### 42", GSM8K, False, True),
        ("<answer>41</answer> or 42", "#### 42", GSM8K, False, False),
        ("the answer is $\\frac12$", "it is $\\boxed{0.5}$", MATH, False, True),
        ("<answer>$18</answer>", "9 * 2 = 18.\n#### 18", GSM8K, True, True),
        ("<answer>0.5</answer>", "\\frac{1}{2}", MATH, True, True),
        ("It is $\\boxed{x^2-1}$.", "we get $\\boxed{(x-1)(x+1)}$", MATH, True, True),
        ("<answer>1,234</answer>", "1234", IDENTITY, True, True),
        ("<think>9</think> 9", "9", IDENTITY, False, True),
        ("<answer>9 8</answer>", "9 8", IDENTITY, True, True),
        ("<answer>roses\nare red</answer>", "roses\nare red", IDENTITY, True, True),
        ("nothing", "nothing", GSM8K, False, False),
        ("", "", IDENTITY, False, False),
    ],
)
def test_correct_in_any_format(text, target, extract, strict, flexible):
    assert (is_correct(text, target, extract), R.is_flexibly_correct(text, target, extract)) == (strict, flexible)


@given(text=TEXTS, target=st.sampled_from(["#### 42", "42", "\\boxed{x}"]))
@quick
def test_whatever_is_correct_is_so_in_any_format_and_answered(no_mathematics, text, target):
    for extract in ANSWER_EXTRACTORS.values():
        right = is_correct(text, target, extract)
        assert R.is_flexibly_correct(text, target, extract) >= right
        assert not right or R.given_answer(text, False, extract)


def test_a_lenient_reader_is_never_a_reward():
    assert R.flexible_answer not in ANSWER_EXTRACTORS.values()
    text = "<think>6*7</think> The answer is \\boxed{42}"
    for name in REWARD_FNS:
        assert pay(name, [text], ["#### 42"], GSM8K) == pay(name, [text.replace("42", "41")], ["#### 42"], GSM8K)


@pytest.mark.parametrize(
    ("text", "truncated", "extract", "answer"),
    [
        ("<answer>42</answer>", False, IDENTITY, "42"),
        ("<answer>42</answer> and", True, IDENTITY, "42"),
        ("42", False, GSM8K, "42"),
        ("42", True, GSM8K, ""),  # may have become 420
        ("$42", True, GSM8K, ""),
        ("$\\frac{1}{2", True, MATH, ""),
        ("not yet", True, IDENTITY, ""),
        ("several\nlines", False, IDENTITY, ""),  # an output without a pair
        ("<think>a</think> 5", False, IDENTITY, ""),
        ("<answer>several\nlines</answer>", False, IDENTITY, "several\nlines"),
        ("<answer></answer>", False, MATH, ""),
    ],
)
def test_the_answer_given(text, truncated, extract, answer):
    assert R.given_answer(text, truncated, extract) == answer


def test_the_extractors_that_read_a_target(scratch_registry):
    assert set(R.extractors_that_read("153.5")) == {"gsm8k_hash", "math_final_answer", "identity"}
    assert set(R.extractors_that_read("so many.\n#### 5")) == {"gsm8k_hash", "identity"}
    R.register_extractor("broken")(lambda text: 1 / 0)
    assert "broken" not in R.extractors_that_read("5") and R.extractors_that_read(" ") == []


TURNS = st.builds(SimpleNamespace, correct=st.booleans(), answer=st.sampled_from(["", "1", "1.0", "2", "x"]))


@given(pairs=st.lists(st.tuples(TURNS, TURNS), min_size=1, max_size=9))
@quick
def test_the_parts_of_the_split_sum_up(pairs):
    split = R.correction_split(pairs, answers_match)
    assert split["delta"] == pytest.approx(split["delta_i_to_c"] - split["delta_c_to_i"])
    assert split["delta_i_to_c"] == pytest.approx(split["unanswered_to_correct"] + split["wrong_to_correct"])
    assert split["delta_c_to_i"] == pytest.approx(split["correct_to_unanswered"] + split["correct_to_wrong"])
    if split["wrong_answered"]:
        assert split["wrong_mended"] * split["wrong_answered"] == pytest.approx(split["wrong_to_correct"])
        assert split["wrong_mended"] + split["wrong_repeated"] <= 1 + 1e-9
    else:
        assert split["wrong_mended"] is split["wrong_repeated"] is None


def test_outcomes_and_a_split_by_hand():
    assert [R.outcome(True, "5"), R.outcome(False, "5"), R.outcome(False, "")] == ["correct", "wrong", "unanswered"]
    answers = [("1", "1.0", False), ("1", "2", False), ("1", "3", True), ("", "3", True)]
    turn = partial(SimpleNamespace, correct=False)
    pairs = [(turn(answer=first), turn(answer=second, correct=right)) for first, second, right in answers]
    split = R.correction_split(pairs, answers_match)
    assert split["wrong_answered"] == 0.75 and split["unanswered_to_correct"] == 0.25
    assert split["wrong_mended"] == split["wrong_repeated"] == pytest.approx(1 / 3)
    near = R.correction_split(pairs, lambda a, b: abs(float(a) - float(b)) <= 1)
    assert near["wrong_repeated"] == pytest.approx(2 / 3)


# ---- a task's own equality -------------------------------------------------------------------------------------------


def test_a_match_of_ones_own_decides_what_is_correct(scratch_registry):
    @R.register_match("degree")
    def degree(answer, reference):
        return abs(float(answer) - float(reference)) <= 1

    reader = R.answer_reader("gsm8k_hash", "degree")
    assert reader.name == "gsm8k_hash" and reader("#### 20") == "20"
    assert reader.match("21", "20") and not reader.match("22", "20")
    assert is_correct("<answer>21</answer>", "#### 20", reader) and not is_correct(
        "<answer>21</answer>", "#### 20", GSM8K
    )
    assert not is_correct("<answer>warm</answer>", "#### 20", reader), "no answer is never right, nor is it asked about"
    assert not R.is_flexibly_correct("it is warm", "#### 20", reader), "a diagnosis ends no run"
    assert R.is_flexibly_correct("It is 21", "#### 20", reader)
    assert pay("exact_match", ["<answer>21</answer>"], ["#### 20"], reader) == [1.0]
    assert R.answer_reader("identity").match("1.0", "1")


@pytest.mark.parametrize("match", [lambda a, b: 1 / 0, lambda a, b: None, lambda a, b: "yes"])
def test_a_bad_match_is_named_with_the_answers(scratch_registry, match):
    R.register_match("mine")(match)
    with pytest.raises(RewardError, match="'mine'") as caught:
        R.answer_reader("identity", "mine").match("4", "5" * 500)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


# ---- rewards ---------------------------------------------------------------------------------------------------------

# output, what each of PAID pays for the target 42
PAID = ("exact_match", "format_and_match", "strict_format_and_match", "format_only")
OUTPUTS = table(r"""
1 1 1 1 | <think>6*7</think><answer>42</answer> | ⏎ <think>6*7</think>⏎⏎<answer>42</answer> ⏎
1 1 1 1 | <think></think><answer>42.0</answer>
0 0.5 0.5 1 | <think>6*7</think><answer>41</answer> | <think>6*7</think><answer>6*7</answer>
0 0.5 0.5 0.5 | <think>6*7</think><answer></answer> | <think>6*7</think><answer> ⏎ </answer>
1 1 0.5 1 | <think>6*7</think>So<answer>42</answer> | <think>6*7</think><answer>42</answer>.
1 1 0.5 1 | Well: <think>6*7</think><answer>42</answer> | <think>6</think><think>*7</think><answer>42</answer>
1 1 0.5 1 | <think><think>6*7</think></think><answer>42</answer> | <think><think>6*7</think><answer>42</answer>
1 1 0.5 1 | <answer>42</answer><think>6*7</think> || 0 0.5 0 1 | <think>6*7</think><answer>41<think></answer>
1 0.75 0.5 0.5 | <think>6*7<answer>42</answer></think><answer>42</answer>
1 0.75 0.5 0.5 | <think>6*7</think><answer>41</answer><answer>42</answer>
1 0.75 0.5 0.5 | <think>6*7</think><answer><answer>42</answer></answer>
1 0.75 0.5 0.5 | <think>6*7</think><answer>42</answer></answer> | <think>in <answer> tags</think><answer>42</answer>
1 0.75 0.5 0.5 | <answer>42</answer> | </think><answer>42</answer> | </think><think><answer>42</answer>
0 0.25 0 0.5 | <think>6*7</think>42 | <think>6*7</think><answer>42 | <think>6*7</think></answer>42<answer>
0 0.25 0 0.5 | <answer>no idea</answer>
0 0 0 0 | <think>6*7 | <THINK>6*7</THINK><ANSWER>42</ANSWER> | The answer is 42 |  || 0 0.25 0 0 | <answer></answer>
""")
OUTPUTS = [(text, tuple(map(float, paid.split()))) for paid, text in OUTPUTS] + [("", (0.0,) * 4)]


@pytest.mark.parametrize(("extract", "target"), [(IDENTITY, "42"), (MATH, "so $\\boxed{42}$."), (GSM8K, "#### 42")])
@pytest.mark.parametrize("place", range(len(PAID)))
def test_what_each_reward_pays(extract, target, place):
    rewards = pay(PAID[place], [text for text, _ in OUTPUTS], [target] * len(OUTPUTS), extract)
    assert dict(zip((t for t, _ in OUTPUTS), rewards, strict=True)) == {t: paid[place] for t, paid in OUTPUTS}


@pytest.mark.parametrize("name", REWARD_FNS)
def test_each_prediction_is_graded_against_its_own_target(name):
    outputs = [f"<think>a</think><answer>{n}</answer>" for n in (1, 2, 3)]
    first, second, third = pay(name, outputs, ["#### 1", "#### 5", "#### 3.0"], GSM8K)
    assert first == third == 1.0 and second == {"exact_match": 0.0, "format_only": 1.0}.get(name, 0.5)
    assert pay(name, [], [], GSM8K) == []


BAD_REWARDS = [None, [1.0], [1.0] * 3, [math.nan, 1.0], [-math.inf, 1], [10**400, 1.0], [1e39, 1]]
BAD_REWARDS += [["1", 1.0], [None, 1.0], [1j, 1]]


@pytest.mark.parametrize("rewards", [*BAD_REWARDS, "1 / 0", "exit()"])
def test_a_bad_reward_function_is_named_with_the_prediction(scratch_registry, rewards):
    R.register_reward("mine")(lambda p, t, extract: eval(rewards) if isinstance(rewards, str) else rewards)
    with pytest.raises(RewardError) as caught:
        pay("mine", ["a line\n" * 100, "7"], ["7", "7"], IDENTITY)
    message = str(caught.value)
    assert "'mine'" in message and "a line" in message and "\n" not in message and len(message) < 300


@pytest.mark.parametrize("bad", [lambda p: 1 / (p != "nine"), lambda p: math.inf if p == "nine" else 0.0])
def test_the_prediction_at_fault_is_found_in_the_batch(scratch_registry, bad):
    R.register_reward("mine")(lambda predictions, targets, extract: [bad(p) for p in predictions])
    with pytest.raises(RewardError, match="'nine'"):
        pay("mine", ["7", "8", "nine", "10"], ["7"] * 4, IDENTITY)


@pytest.mark.parametrize("extract", [lambda text: {}[text], lambda text: None])
@pytest.mark.parametrize("name", ["exact_match", "format_and_match", "strict_format_and_match", "direct"])
def test_a_bad_extractor_is_named_with_the_text(scratch_registry, extract, name):
    R.register_extractor("mine")(extract)
    R.register_reward("direct")(lambda predictions, targets, extract: [float(len(extract(p))) for p in predictions])
    with pytest.raises(RewardError) as caught:
        pay(name, ["some " * 100], ["7"], extract)
    message = str(caught.value)
    assert "'mine'" in message and "'some some" in message and "\n" not in message and len(message) < 300


def test_rewards_are_floats_and_unknown_names_and_uneven_batches_are_refused(scratch_registry):
    R.register_reward("mine")(lambda predictions, targets, extract: (len(p) > 1 for p in predictions))
    rewards = pay("mine", ["7", "77"], ["7", "7"], IDENTITY)
    assert rewards == [0.0, 1.0] and all(type(reward) is float for reward in rewards)
    with pytest.raises(RewardError, match="exact_match"):
        pay("exact", ["7"], ["7"], IDENTITY)
    with pytest.raises(RewardError, match="2"):
        pay("exact_match", ["7"], ["7", "8"], IDENTITY)


def test_the_example_of_the_module_docstring_works(scratch_registry, tmp_path):
    example = "\n".join(line[4:] for line in R.__doc__.splitlines() if line.startswith("    "))
    module = tmp_path / "my_rewards.py"
    module.write_text(example)
    R.load_reward_module(str(module))
    reader = R.answer_reader("last_line", "within_one_degree")
    assert reader("so\n42\n") == "42"
    texts = ["so\n42", "so\n43", "s" * 500 + "\n42", "so\n50"]
    assert pay("short_and_right", texts, ["42"] * 4, reader) == [1.0, 1.0, 0.5, 0.0]
    given = {"completions": chat("so", "<answer>42"), "answer": ["42"] * 2}
    assert R.compute_rewards(["tagged"], None, str(module), ["so", "<answer>42"], ["42"] * 2, reader, given) == [0, 1]


# ---- rewards in TRL's form -------------------------------------------------------------------------------------------


def chat(*texts: str) -> list[list[dict[str, str]]]:
    return [[{"role": "assistant", "content": text}] for text in texts]


FUNCTIONS = """
def longer(completions, limit, **columns):
    assert set(columns) == {"prompts", "answer"}
    sizes = [len(completion[0]["content"]) for completion in completions]
    return [None if most is None else size > most for size, most in zip(sizes, limit, strict=True)]
def few(completions): return [*map(len, completions)]
def by_name(*, answer): return map(float, answer)
async def later(completions, **columns): return [float(len(completion)) for completion in completions]
def silent(completions, **columns): return [None] * len(completions)
def some(completions, **columns): return [None, 0.5]
def raises(completions, **columns): return [1 / (text != "nine") for text in completions]
def not_finite(completions, **columns): return [float("nan") if text == "nine" else None for text in completions]
def asks(prompts, completions, solution, level=3, *, unit, **columns): return [1.0] * len(completions)
constant = 5
"""


@pytest.fixture
def module(tmp_path):
    file = tmp_path / "functions.py"
    file.write_text(FUNCTIONS)
    return str(file)


def trl(names, module, texts, arguments, weights=None):
    return R.compute_rewards(names, weights, module, texts, ["42"] * len(texts), IDENTITY, arguments)


def test_functions_in_trls_form_get_lists_by_name(module):
    given = {"prompts": ["?"] * 3, "completions": chat("a", "bb", "ccc"), "limit": [1, None, 1], "answer": ["4"] * 3}
    assert trl(["longer"], module, ["a", "bb", "ccc"], given) == [0.0, 0.0, 1.0]
    given = {"completions": ["a", "bb"], "prompts": ["?", "?"], "answer": ["1", "2"]}
    for name in ("few", "by_name", "later"):
        assert trl([name], module, ["a", "bb"], given) == [1.0, 2.0]


def test_weighted_sums_leave_none_out(module, scratch_registry):
    given, texts = {"completions": ["a", "bb"]}, ["<answer>42</answer>", "bb"]
    assert trl(["few", "some"], module, texts, given) == [1.0, 2.5]
    assert trl(["few", "some"], module, texts, given, [2.0, 0.5]) == [2.0, 4.25]
    assert trl(["exact_match", "some"], module, texts, given, [1.0, 0.2]) == pytest.approx([1.0, 0.1])


def test_a_function_that_never_applies_is_warned_of_once(module, capsys):
    assert [trl(["silent"], module, ["a", "b"], {"completions": ["a", "b"]}) for _ in range(2)] == [[0.0, 0.0]] * 2
    assert trl(["some"], module, ["a", "b"], {"completions": ["a", "b"]}) == [0.0, 0.5]
    assert capsys.readouterr().err.count("silent") == 1


@pytest.mark.parametrize("name", ["raises", "not_finite"])
def test_a_bad_function_in_trls_form_is_named_with_the_prediction(module, name):
    texts = ["7", "nine", "8"]
    with pytest.raises(RewardError, match=f"'{name}'.*'nine'"):
        trl([name], module, texts, {"completions": texts})


def test_finding_rewards(module, tmp_path):
    assert R.find_reward("exact_match", module) is REWARD_FNS["exact_match"]
    assert R.find_reward("few", module)(["a"]) == [1] and R.find_reward("math.fsum", None) is math.fsum
    assert R.trl_names(["few", "exact_match", "math.fsum"]) == ["few", "math.fsum"]
    wrong = [("nothing", None), ("x_y", module), ("constant", module), ("math.nothing", None), ("no.x", None)]
    for name, file in wrong:
        with pytest.raises(RewardError, match=name):
            R.find_reward(name, file)
    good = [("exact_match", None), ("few", module), ("math.fsum", None)]
    bad = [("exact_mach", None), ("few", None), ("constant", module), ("no_such_package.x", None), ("a b.c", None)]
    assert [R.reward_fault(*case) for case in good] == [None] * 3
    assert all(R.reward_fault(*case) and "\n" not in R.reward_fault(*case) for case in bad)
    assert "exact_match" in R.reward_fault("exact_mach", None)


def test_loading_a_module(module, tmp_path):
    assert R.load_reward_module(module) is R.load_reward_module(module)
    (tmp_path / "broken.py").write_text("raise KeyError('two\\nlines')")
    for file in ("nowhere.py", str(tmp_path), str(tmp_path / "broken.py")):
        with pytest.raises(ValueError) as caught:
            R.load_reward_module(file)
        assert "\n" not in str(caught.value)


def test_the_columns_of_each_row(module):
    rows, targets = [{"q": "1+1", "a": "so\n#### 2"}, {"q": "2+2", "a": "#### 4"}], ["so\n#### 2", "#### 4"]
    columns = R.trl_columns(rows, targets, ["few"], module, {"solution": "target_answer"}, GSM8K)
    assert columns[0] == {"q": "1+1", "a": "so\n#### 2", "target_answer": "2", "solution": "2"}
    assert R.trl_columns(rows, targets, ["exact_match"], None, {}, GSM8K) == [{}, {}]
    assert R.trl_columns([], [], ["few"], module, {}, GSM8K) == []
    for names, aliases, key in (
        (["few"], {"x": "qq"}, "reward.columns.x"),
        (["few", "asks"], {}, "reward.fn"),
        (["no.x"], {}, "reward.fn"),
    ):
        with pytest.raises(ValueError) as caught:
            R.trl_columns(rows, targets, names, module, aliases, GSM8K)
        assert str(caught.value).startswith(f"{key}:") and "\n" not in str(caught.value)
    assert R.trl_columns(rows, targets, ["asks"], module, {"solution": "a", "unit": "q"}, GSM8K)[1]["unit"] == "2+2"


GSM8K_TARGETS = {"She sold 48+24 = <<48+24=72>>72.\n#### 72": "72", "10 * 180 = $1800.\n#### 1,800": "1800"}
GSM8K_TARGETS["It falls by <<2-5=-3>>3 degrees.\n#### -3"] = "-3"


def test_trls_own_rewards_read_the_targets_answer_and_a_boxed_output():
    names = ["trl.rewards.accuracy_reward", "trl.rewards.think_format_reward"]
    for target, answer in GSM8K_TARGETS.items():
        texts = [f"<think>so</think>\n<answer>\\boxed{{{value}}}</answer>" for value in (answer, "17")] + ["so"]
        given = {"completions": chat(*texts), "solution": [GSM8K(target)] * 3, "answer": [target] * 3}
        assert trl(names, None, texts, given, [1.0, 0.5]) == [1.5, 0.5, 0.0]
        assert [is_correct(text, target, GSM8K) for text in texts] == [True, False, False], "and so does the extractor"
    given = {"completions": chat("\\boxed{x}", "\\boxed{7}"), "solution": ["Paris", "7"]}
    assert trl(names[:1], None, ["", ""], given) == [0.0, 1.0], "None where it cannot read the target"
