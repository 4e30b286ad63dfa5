"""reward_function.py: what counts as an answer, when two answers match, what each reward pays, and hostile text."""

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import reward_function as R
from reward_function import ANSWER_EXTRACTORS, REWARD_FNS, RewardError, answers_match, is_correct, score

GSM8K, MATH, IDENTITY = (ANSWER_EXTRACTORS[name] for name in ("gsm8k_hash", "math_final_answer", "identity"))

# Any text, and texts made of the pieces that the scans look for.
PIECES = ["<think>", "</think>", "<answer>", "</answer>", "####", "\\boxed", "{", "}", "\\{", "$", "\\", " ", "\n"]
PIECES += ["42", "-", ",", ".", "/", "%", "=", "\\text{", "\\frac", "e9", "x", "٣", "\x00", "\ud800"]
TEXTS = st.text(st.characters(exclude_categories=()), max_size=60) | st.lists(st.sampled_from(PIECES)).map("".join)
LINES = st.text(alphabet="abc xyz.,:;?!0123456789+-", max_size=30)  # no tags, boxes or markers
NO_MATHS = settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.too_slow])

LONG = {
    "think": "<think>" * 20_000,
    "answer unclosed": "<answer>" * 15_000,
    "answer unopened": "</answer>" * 12_000,
    "answer nested": "<answer>" * 6_000 + "</answer>" * 6_000,
    "crossed": "</answer><answer>" * 6_000,
    "boxed unclosed": "\\boxed{" * 15_000,
    "boxed nested": "\\boxed{" * 12_000 + "}" * 12_000,
    "boxed chain": "\\boxed" * 16_000,
    "boxed blanks": "\\boxed 5" + ("\\boxed" + " " * 1_000) * 100,
    "boxed after blanks": "\\boxed" + " " * 100_000 + "5",
    "one box": "\\boxed{" + "{}" * 50_000 + "}",
    "text commands": "\\text{" * 16_000,
    "fractions": "\\frac{1" * 14_000,
    "fraction blanks": ("\\frac" + " " * 1_000) * 100,
    "digits": "1" * 100_000,
    "zeros": "0" * 100_000,
    "thousands": "1,234" + ",567" * 25_000,
    "bad thousands": "1,23" * 25_000,
    "mixed numbers": "1 " * 50_000,
    "slashes": "1/" * 50_000,
    "points": "1." * 50_000,
    "signs": "-" * 100_000,
    "exponents": "1e" * 50_000,
    "hashes": "#" * 100_000,
    "hash blanks": "####" + " " * 100_000,
    "blanks": " " * 100_000 + "x",
    "newlines": "\n" * 100_000,
    "parens": "(" * 100_000,
    "braces": "{" * 100_000,
    "backslashes": "\\" * 100_000,
    "dollars": "$" * 100_000,
    "closing math mode": "\\)" + (" " * 1_000 + "\\)") * 100 + "x",
    "carets": "^" * 100_000,
    "circ": ("^" + " " * 1_000) * 100 + "{\\circ",
    "equals": "=" * 100_000,
    "words": "ab " * 33_000,
    "arabic digits": "٣" * 100_000,
    "superscripts": "²" * 100_000,
    "surrogates": "\ud800" * 100_000,
    "nuls": "\x00" * 100_000,
}


@pytest.fixture
def scratch_registry(monkeypatch):
    """The registries as copies, so that a test can register what it likes."""
    monkeypatch.setattr(R, "REWARD_FNS", dict(REWARD_FNS))
    monkeypatch.setattr(R, "ANSWER_EXTRACTORS", dict(ANSWER_EXTRACTORS))


# ---- registries ------------------------------------------------------------------------------------------------------


def test_what_is_shipped():
    assert set(REWARD_FNS) == {"exact_match", "format_and_match", "strict_format_and_match", "format_only"}
    assert set(ANSWER_EXTRACTORS) == {"gsm8k_hash", "math_final_answer", "identity"}


@pytest.mark.parametrize(
    ("register", "registry", "name"),
    [(R.register_reward, "REWARD_FNS", "exact_match"), (R.register_extractor, "ANSWER_EXTRACTORS", "identity")],
)
def test_registering(scratch_registry, register, registry, name):
    def mine(*_):
        return ""

    assert register("mine")(mine) is mine  # the decorated function is itself
    assert getattr(R, registry)["mine"] is mine
    shipped = getattr(R, registry)[name]
    with pytest.raises(ValueError, match=repr(name)):
        register(name)(mine)
    assert getattr(R, registry)[name] is shipped


def test_importing_is_light():
    code = "import sys, reward_function; print(*sys.modules)"
    root = Path(R.__file__).parent
    loaded = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True).stdout
    assert not {"torch", "transformers", "train", "sympy", "math_verify"} & set(loaded.split())


# ---- extractors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("Tom has 2 + 3 = <<2+3=5>>5 apples.\n#### 5", "5"),
        ("#### 1,234", "1234"),
        ("#### -7", "-7"),
        ("####42", "42"),
        ("#### 1\n#### 2", "2"),
        ("#### 42\nThat was easy, 7.", "42"),
        ("<think>6*7</think><answer>42</answer>", "42"),
        ("<think>6*7</think>\n<answer>\n42\n</answer>\n", "42"),
        ("<answer>$1,234.50</answer>", "1234.50"),
        ("<answer>1,234,567 dollars</answer>", "1234567"),
        ("<answer>-$5</answer>", "-5"),
        ("<answer>$-5$</answer>", "-5"),
        ("<answer>−5</answer>", "-5"),
        ("<answer>+5</answer>", "5"),
        ("<answer>€30</answer>", "30"),
        ("<answer>18.</answer>", "18"),
        ("<answer>50%</answer>", "50"),
        ("<answer>50\\%</answer>", "50"),
        ("<answer>= 42</answer>", "42"),
        ("<answer>x = 42 km</answer>", "42"),
        ("<answer>9 * 2 = $18</answer>", "18"),
        ("<answer>3 = three</answer>", "3"),
        ("<answer>\\boxed{42}</answer>", "42"),
        ("<answer>$\\frac{3}{4}$</answer>", "3/4"),
        ("<answer>\\frac34</answer>", "3/4"),
        ("<answer>3/4</answer>", "3/4"),
        ("<answer>2 1/2 hours</answer>", "2 1/2"),
        ("<answer>.5</answer>", ".5"),
        ("<answer>**18**</answer>", "18"),
        ("<answer>10\\,000</answer>", "10000"),
        ("<answer>10{,}000</answer>", "10000"),
        ("<answer>5 apples and 3 pears</answer>", "5"),  # the first, as after ####
        ("<answer>1</answer><answer>2</answer>", "2"),  # the last pair
        ("<answer><answer>2</answer></answer>", "2"),
        ("<answer>7</answer> or <answer>8", "7"),  # the last complete one
        ("<answer>7</answer>\n#### 8", "7"),  # the tag comes first
        ("<answer>none</answer>\n#### 8", ""),  # and decides
        ("<answer>8\n#### 8", "8"),
        ("</answer>8<answer>", ""),
        ("The answer is 42.", ""),  # no fallback to the last number
        ("42", ""),
        ("#### none", ""),
        ("### 42", ""),
        ("<answer></answer>", ""),
        ("<answer>3,4</answer>", ""),  # a list is no number
        ("<answer>٣</answer>", ""),
        ("", ""),
    ],
)
def test_gsm8k_hash(text, number):
    assert GSM8K(text) == number


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("so it is $\\boxed{42}$.", "42"),
        ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("\\boxed{1}, no: \\boxed{2}", "2"),
        ("\\boxed{1} and \\boxed{2", "1"),  # the last balanced one
        ("\\boxed{1} and \\boxed{\\frac{2}{3}", "1"),
        ("\\boxed{\\left\\{1,2\\right.}", "\\left\\{1,2\\right"),  # an escaped brace does not count
        ("{ \\boxed{5}", "5"),
        ("} \\boxed{5}", "5"),
        ("\\boxed{\\boxed{5}}", "5"),
        ("\\fbox{5}", "5"),
        ("\\boxed {5}", "5"),
        ("$\\boxed 5$", "5"),
        ("\\boxed 12 apples", "12"),
        ("\\boxed5", "5"),
        ("\\boxed{3} and \\boxed", "3"),
        ("\\boxedfoo{3}", "\\boxedfoo{3}"),  # another command
        ("\\boxed{}", ""),
        ("\\boxed{\\text{Evelyn}}", "Evelyn"),
        ("\\boxed{\\textbf{(C)}}", "(C)"),
        ("\\boxed{$7$}", "7"),
        ("\\boxed{7.}", "7"),
        ("\\boxed{10\\text{ cm}}", "10\\text{ cm}"),
        ("<think>\\boxed{1}</think><answer>2</answer>", "2"),
        ("<think>x</think><answer> $\\frac{1}{2}$ </answer>", "\\frac{1}{2}"),
        ("<answer>\\(x+1\\)</answer>", "x+1"),
        ("<answer>\\[ x+1 \\]</answer>", "x+1"),
        ("<answer>It is \\boxed{x}.</answer>", "x"),
        ("<answer>2</answer> or \\boxed{3}", "2"),
        ("<answer></answer>\\boxed{3}", ""),
        # Neither: a bare target, or nothing.
        ("\\frac{1}{2}", "\\frac{1}{2}"),
        ("\\text{Evelyn}", "Evelyn"),
        ("\\text{two words}", "two words"),
        ("\\frac{270}7\\text{ degrees}", "\\frac{270}7\\text{ degrees}"),
        ("x \\in [-2,7]", "x \\in [-2,7]"),
        ("p - q", "p - q"),
        ("\\$32,\\!348", "32,\\!348"),
        ("even", "even"),
        ("4", "4"),
        ("The answer is 4", ""),
        ("It is 4.", ""),
        ("Answer: 4", ""),
        ("2+2\n4", ""),
        ("<think>2+2</think> 4", ""),
        ("<answer>4", ""),
        ("1+" * 150 + "1", ""),
        ("", ""),
    ],
)
def test_math_final_answer(text, answer):
    assert MATH(text) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("  -1234\n", "-1234"),
        ("<think>a</think>\n<answer> -1234 </answer>", "-1234"),
        ("<answer>1</answer><answer>2</answer>", "2"),
        ("<answer></answer>", ""),
        ("<think>a</think> 5", "<think>a</think> 5"),
        ("<answer>5", "<answer>5"),
        (" ", ""),
    ],
)
def test_identity(text, answer):
    assert IDENTITY(text) == answer


@pytest.mark.parametrize("name", ANSWER_EXTRACTORS)
@given(text=TEXTS)
@NO_MATHS
def test_extractors_return_a_stripped_string_for_any_text(name, text):
    answer = ANSWER_EXTRACTORS[name](text)
    assert isinstance(answer, str) and answer == answer.strip()


@pytest.mark.parametrize("name", ANSWER_EXTRACTORS)
@given(before=LINES, after=LINES, number=st.integers(-(10**9), 10**9))
@NO_MATHS
def test_text_outside_the_tag_changes_nothing(name, before, after, number):
    assert ANSWER_EXTRACTORS[name](f"{before}<answer>{number}</answer>{after}") == str(number)


@given(before=LINES, after=LINES, number=st.integers(-(10**9), 10**9))
@NO_MATHS
def test_text_outside_the_mark_or_the_box_changes_nothing(before, after, number):
    assert GSM8K(f"{before}\n#### {number}\n{after}") == str(number)
    assert MATH(f"{before}\\boxed{{{number}}}{after}") == str(number)


@given(text=TEXTS)
@NO_MATHS
def test_reading_an_answer_again_changes_nothing(text):
    number = GSM8K(text)
    assert GSM8K(f"<answer>{number}</answer>") == number
    answer = IDENTITY(text)
    assert "<answer>" in answer or IDENTITY(answer) == answer


# ---- matching --------------------------------------------------------------------------------------------------------

SAME = [
    ("1,234", "1234"),
    ("$1,234", "1234.0"),
    ("\\$1,234.00", "1234"),
    ("1{,}234", "1234"),
    ("11,\\! 111,\\! 100", "11111100"),
    ("-$5", "-5"),
    ("+5", "5"),
    ("−5", "-5"),
    ("007", "7"),
    ("0.5", ".5"),
    ("5.", "5"),
    ("50\\%", "50"),
    ("90^\\circ", "90"),
    ("90^{\\circ}", "90°"),
    ("1e3", "1000"),
    ("1e400", "1" + "0" * 400),
    ("3/4", "0.75"),
    ("\\frac{3}{4}", "\\frac34"),
    ("\\dfrac{-3}{4}", "-0.75"),
    ("2\\frac{1}{2}", "2.5"),
    ("-1 1/2", "-3/2"),
    ("$42$", "42"),
    ("\\text{42}", "42"),
    ("p - q", "p-q"),
    ("\\left( 3, \\frac{\\pi}{2} \\right)", "(3,\\frac{\\pi}{2})"),
    ("\\text{east}", "East"),
    ("New  York", "new york"),
    ("7" * 5_000, "7" * 5_000),
]
DIFFERENT = [
    ("", ""),
    (" ", " "),
    ("$", "$"),
    ("%", "\\%"),
    (".", "."),
    ("", "0"),
    ("1234", "1235"),
    ("1.234", "1234"),
    ("-5", "5"),
    ("1/3", "0.333333"),
    ("9007199254740993", "9007199254740992"),  # equal as floats
    ("1e400", "1e401"),
    ("1e-400", "0"),
    ("7" * 5_000, "7" * 4_999 + "8"),
    ("52_8", "52_9"),
    ("52_8", "528"),
    ("east", "seat"),
    ("east", "west"),
    ("x" * 301 + "+1", "1+" + "x" * 301),  # too long for mathematics
    ("1/0", "1"),
    ("1/0", "2/0"),
]
EQUIVALENT = [
    ("x+x", "2x"),
    ("-q+p", "p - q"),
    ("(x-1)(x+1)", "x^2-1"),
    ("\\frac{\\sqrt{2}}{2}", "\\frac{1}{\\sqrt{2}}"),
    ("\\{2,1\\}", "\\{1,2\\}"),
    ("x=5", "5"),
    ("5", "x = 5"),
    ("10\\text{ cm}", "10"),
    ("7 i - 2", "-2 + 7i"),
    ("\\begin{pmatrix} 1/2 \\\\ 2 \\end{pmatrix}", "\\begin{pmatrix} 0.5 \\\\ 2 \\end{pmatrix}"),
]
NOT_EQUIVALENT = [("x^2", "x^3"), ("(1,2)", "(2,1)"), ("(3,4]", "[3,4]"), ("1 or 2", "1"), ("five", "5"), ("\\", "5")]
HOSTILE = [
    "9^9^9^9^9",
    "9^{9^{9^9}}",
    "10^{10^{10}}",
    "1000000!!",
    "\\sum_{i=1}^{10^9} \\frac{1}{i}",
    "(x+y+z+w)^{200}",
    "(" * 299,
    "\ud800^2",
    "\x002",
]


@pytest.mark.parametrize(("a", "b"), SAME)
def test_answers_match_without_mathematics(a, b, monkeypatch):
    monkeypatch.setattr(R, "equivalent", None)  # the cheap tests decide
    assert answers_match(a, b) and answers_match(b, a)


@pytest.mark.parametrize(("a", "b"), DIFFERENT)
def test_answers_differ(a, b):
    assert not answers_match(a, b) and not answers_match(b, a)


@pytest.mark.parametrize(("a", "b"), EQUIVALENT)
def test_answers_match_as_mathematics(a, b):
    assert answers_match(a, b)


@pytest.mark.parametrize(("a", "b"), NOT_EQUIVALENT)
def test_answers_differ_as_mathematics(a, b):
    assert not answers_match(a, b)


@pytest.mark.parametrize("text", HOSTILE)
def test_a_computation_that_would_never_end_is_given_up(text):
    assert not answers_match(text, "x^2+5")
    assert R.equivalent.__wrapped__("y+y", "2y")  # the next question is answered (anew, not from the cache)


def test_matching_as_mathematics_outside_the_main_thread():
    answers = []
    thread = threading.Thread(target=lambda: answers.extend([answers_match("z+z", "2z"), answers_match("z^2", "2z")]))
    thread.start()
    thread.join()
    assert answers == [True, False]


def test_no_mathematics_is_searched_for_in_a_text():
    assert not answers_match("The answer is $5$ or maybe $x^2$", "x \\cdot x")
    assert not answers_match("I say \\boxed{5} and \\boxed{x^2}", "x \\cdot x")


def test_a_worker_that_dies_is_replaced():
    assert answers_match("w+w", "2w")
    R._worker().kill()
    R._worker().wait()
    assert not answers_match("w+w+w", "3w")  # asked of the dead one
    assert answers_match("w+w+w+w", "4w")


def test_a_missing_math_verify_is_an_error_not_a_wrong_answer(monkeypatch, tmp_path):
    (tmp_path / "math_verify.py").write_text("raise ImportError('not installed')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    R._end(R._worker())
    R._worker.cache_clear()
    with pytest.raises(RewardError, match="pip install math-verify"):
        answers_match("v+v", "2v")


@given(number=st.decimals(min_value=-(10**12), max_value=10**12, places=3))
@NO_MATHS
def test_a_number_matches_itself_however_it_is_written(number):
    whole = f"{number:.3f}"
    forms = [whole, f"{number:,.3f}", f"${number:,.3f}$", f"\\${whole}", f"{whole}0", f" {whole}. ", f"{whole}\\%"]
    forms += [f"\\text{{{whole}}}", f"{int(number * 1000)}/1000", f"\\frac{{{int(number * 1000)}}}{{1000}}"]
    assert all(answers_match(form, whole) and answers_match(whole, form) for form in forms)
    assert not any(answers_match(form, f"{number + 1:.3f}") for form in forms)


@given(text=TEXTS)
@NO_MATHS
def test_nothing_matches_nothing(text):
    assert not answers_match("", text) and not answers_match(text, "")
    for extract in ANSWER_EXTRACTORS.values():
        assert not is_correct("", text, extract) and not is_correct("</answer>", "<answer></answer>", extract)


@given(a=TEXTS, b=TEXTS)
@settings(NO_MATHS, max_examples=60)
def test_matching_returns_a_bool_for_any_texts(a, b):
    assert answers_match(a, b) in (True, False)
    assert answers_match(a, a) in (True, False)


# ---- diagnosis -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<think>2</think><answer>42</answer> or 5", "42"),
        ("<answer>1</answer> no: <answer>42</answer>", "42"),
        ("<answer>42 apples</answer>", "42"),
        ("<answer>$\\boxed{x+1}$</answer>", "x+1"),
        ("<answer></answer> so it is 7", "7"),
        ("<answer></answer> \\boxed{7}", "7"),
        ("<answer>42", "42"),
        ("\\boxed{7}. The answer is 8", "7"),
        ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("\\boxed{42 \\text{ apples}}", "42"),
        ("\\boxed{\\text{Evelyn}}", "Evelyn"),
        ("\\boxed{} 5", "5"),
        ("The answer is 42. It took 3 steps.", "42"),
        ("The answer is 41. No, the answer is 42", "42"),
        ("THE ANSWER IS: **42**\nin 3 steps", "42"),
        ("**Answer:** 42", "42"),
        ("The answer is $18 per day, not 3", "18"),
        ("the answer is $\\frac{1}{2}$ of a pie", "\\frac{1}{2}"),
        ("the answer is \\(x+1\\) cm", "x+1"),
        ("The answer is x^2 + 1.\nOr 3", "x^2 + 1"),
        ("The answer is 2\\pi", "2\\pi"),
        ("The answer is 3.5.", "3.5"),
        ("the answer is Evelyn.", "Evelyn"),
        ("<think>the answer is x+1</think>", "x+1"),
        ("1 + 2 = 3, so the answer is", "3"),
        ("3 and 4\n#### 1,234", "1,234"),
        ("#### 5\n#### 6\n7", "6"),
        ("He pays $1,234.50.", "1234.50"),
        ("50-8=42 is it", "42"),
        ("from 3 to -4", "-4"),
        ("half of it is 2 1/2", "2 1/2"),
        ("no idea", ""),
        ("", ""),
    ],
)
def test_a_lenient_reader(text, answer):
    assert R.flexible_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "target", "extract", "strict", "flexible"),
    [
        ("<answer>42</answer>", "#### 42", GSM8K, True, True),
        ("\\boxed{42}", "#### 42", GSM8K, False, True),
        ("The answer is 42.00 dollars", "so\n#### 42", GSM8K, False, True),
        ("<answer>41</answer> or 42", "#### 42", GSM8K, False, False),
        ("the answer is $\\frac12$", "it is $\\boxed{0.5}$", MATH, False, True),
        ("<think>9</think> 9", "9", IDENTITY, False, True),
        ("<answer>9 8</answer>", "9 8", IDENTITY, True, True),
        ("nothing", "nothing", GSM8K, False, False),
        ("", "", IDENTITY, False, False),
    ],
)
def test_correct_in_any_format(text, target, extract, strict, flexible):
    assert (is_correct(text, target, extract), R.is_flexibly_correct(text, target, extract)) == (strict, flexible)


ROWS = st.lists(st.tuples(*[st.booleans(), st.sampled_from(["", "1", "1.0", "2", "x"])] * 2), min_size=1, max_size=9)


@given(rows=ROWS)
@settings(NO_MATHS)
def test_the_parts_of_the_split_sum_up(rows):
    correct1, answers1, correct2, answers2 = map(list, zip(*rows, strict=True))
    split = R.correction_split(correct1, answers1, correct2, answers2)
    assert split["delta"] == pytest.approx(split["delta_i_to_c"] - split["delta_c_to_i"])
    assert split["delta_i_to_c"] == pytest.approx(split["unanswered_to_correct"] + split["wrong_to_correct"])
    assert split["delta_c_to_i"] == pytest.approx(split["correct_to_unanswered"] + split["correct_to_wrong"])
    if split["wrong_answered"]:
        assert split["wrong_mended"] * split["wrong_answered"] == pytest.approx(split["wrong_to_correct"])
        assert split["wrong_mended"] + split["wrong_repeated"] <= 1 + 1e-9
    else:
        assert split["wrong_mended"] is split["wrong_repeated"] is None


def test_a_lenient_reader_is_never_a_reward():
    lenient = (R.flexible_answer, R.is_flexibly_correct)
    assert not [fn for fn in [*ANSWER_EXTRACTORS.values(), *REWARD_FNS.values()] if fn in lenient]
    assert not [name for name in [*ANSWER_EXTRACTORS, *REWARD_FNS] if "flexible" in name]
    text = "<think>6*7</think> The answer is \\boxed{42}"
    for name in REWARD_FNS:
        (paid,) = score(name, [text], ["#### 42"], GSM8K)
        assert paid == score(name, [text.replace("42", "41")], ["#### 42"], GSM8K)[0]


MARKS = st.sampled_from(["the answer is ", "Answer:", "#### ", "answer is $", "#### \\("])


@given(text=TEXTS | st.tuples(TEXTS, MARKS, TEXTS).map("".join))
@settings(NO_MATHS)
def test_a_lenient_reader_takes_any_text(text):
    answer = R.flexible_answer(text)
    assert isinstance(answer, str) and answer == answer.strip()
    assert len(answer) <= len(text) + 10
    given_up = [R.given_answer(text, cut, extract) for cut in (False, True) for extract in ANSWER_EXTRACTORS.values()]
    assert all(answer == answer.strip() for answer in given_up)


@given(text=TEXTS, target=st.sampled_from(["#### 42", "42", "\\boxed{x}"]))
@settings(NO_MATHS, max_examples=100)
def test_whatever_is_correct_is_so_in_any_format_and_answered(text, target):
    for extract in ANSWER_EXTRACTORS.values():
        right = is_correct(text, target, extract)
        assert R.is_flexibly_correct(text, target, extract) >= right
        assert not right or R.given_answer(text, False, extract)


LONG_MARKS = ["answer is " * 10_000, ("answer is" + " " * 1_000) * 100, "####" + "\\(\\" * 30_000, ".a" * 50_000]


@pytest.mark.parametrize("text", [*LONG.values(), *LONG_MARKS, "<" * 100_000])
def test_a_lenient_reader_of_long_texts_finishes(text):
    start = time.process_time()
    for wrapped in (text, f"<answer>{text}</answer>", f"\\boxed{{{text}}}", f"#### {text}", f"answer is ${text}"):
        assert isinstance(R.flexible_answer(wrapped), str)
    assert time.process_time() - start < 5


# ---- rewards ---------------------------------------------------------------------------------------------------------

# output, what each of PAID pays for the target 42
PAID = ("exact_match", "format_and_match", "strict_format_and_match", "format_only")
OUTPUTS = [
    ("<think>6*7</think><answer>42</answer>", (1.0, 1.0, 1.0, 1.0)),
    ("\n <think>6*7</think>\n\n<answer>42</answer> \n", (1.0, 1.0, 1.0, 1.0)),
    ("<think></think><answer>42.0</answer>", (1.0, 1.0, 1.0, 1.0)),
    ("<think>6*7</think><answer>41</answer>", (0.0, 0.5, 0.5, 1.0)),
    ("<think>6*7</think><answer></answer>", (0.0, 0.5, 0.5, 0.5)),
    ("<think>6*7</think>So<answer>42</answer>", (1.0, 1.0, 0.5, 1.0)),
    ("<think>6*7</think><answer>42</answer>.", (1.0, 1.0, 0.5, 1.0)),
    ("Well: <think>6*7</think><answer>42</answer>", (1.0, 1.0, 0.5, 1.0)),
    ("<think>6</think><think>*7</think><answer>42</answer>", (1.0, 1.0, 0.5, 1.0)),
    ("<think><think>6*7</think></think><answer>42</answer>", (1.0, 1.0, 0.5, 1.0)),
    ("<think><think>6*7</think><answer>42</answer>", (1.0, 1.0, 0.5, 1.0)),
    ("<think>6*7</think><answer>41<think></answer>", (0.0, 0.5, 0.0, 1.0)),
    ("<think>6*7<answer>42</answer></think><answer>42</answer>", (1.0, 0.75, 0.5, 0.5)),
    ("<think>6*7</think><answer>41</answer><answer>42</answer>", (1.0, 0.75, 0.5, 0.5)),
    ("<think>6*7</think><answer><answer>42</answer></answer>", (1.0, 0.75, 0.5, 0.5)),
    ("<think>6*7</think><answer>42</answer></answer>", (1.0, 0.75, 0.5, 0.5)),
    ("<think>in <answer> tags</think><answer>42</answer>", (1.0, 0.75, 0.5, 0.5)),
    ("<answer>42</answer><think>6*7</think>", (1.0, 1.0, 0.5, 1.0)),
    ("<answer>42</answer>", (1.0, 0.75, 0.5, 0.5)),
    ("</think><answer>42</answer>", (1.0, 0.75, 0.5, 0.5)),
    ("</think><think><answer>42</answer>", (1.0, 0.75, 0.5, 0.5)),
    ("<think>6*7</think>42", (0.0, 0.25, 0.0, 0.5)),
    ("<think>6*7</think><answer>42", (0.0, 0.25, 0.0, 0.5)),
    ("<think>6*7</think></answer>42<answer>", (0.0, 0.25, 0.0, 0.5)),
    ("<think>6*7", (0.0, 0.0, 0.0, 0.0)),
    ("<THINK>6*7</THINK><ANSWER>42</ANSWER>", (0.0, 0.0, 0.0, 0.0)),
    ("<think>6*7</think><answer> \n </answer>", (0.0, 0.5, 0.5, 0.5)),
    ("<answer></answer>", (0.0, 0.25, 0.0, 0.0)),
    ("<answer>no idea</answer>", (0.0, 0.25, 0.0, 0.5)),
    ("The answer is 42", (0.0, 0.0, 0.0, 0.0)),
    ("", (0.0, 0.0, 0.0, 0.0)),
]


@pytest.mark.parametrize(("extractor", "target"), [("identity", "42"), ("math_final_answer", "so $\\boxed{42}$.")])
@pytest.mark.parametrize("place", range(len(PAID)))
def test_what_each_reward_pays(extractor, target, place):
    rewards = score(PAID[place], [text for text, _ in OUTPUTS], [target] * len(OUTPUTS), ANSWER_EXTRACTORS[extractor])
    assert dict(zip((t for t, _ in OUTPUTS), rewards, strict=True)) == {t: paid[place] for t, paid in OUTPUTS}


@pytest.mark.parametrize("name", REWARD_FNS)
def test_each_prediction_is_graded_against_its_own_target(name):
    outputs = [f"<think>a</think><answer>{n}</answer>" for n in (1, 2, 3)]
    first, second, third = score(name, outputs, ["#### 1", "#### 5", "#### 3.0"], GSM8K)
    wrong = {"exact_match": 0.0, "format_only": 1.0}.get(name, 0.5)
    assert first == third == 1.0 and second == wrong
    assert score(name, [], [], GSM8K) == []


@pytest.mark.parametrize(
    ("prediction", "target", "extractor"),
    [
        ("<think>a</think><answer>1,234</answer>", "1234", "identity"),
        ("<think>a</think><answer>-17</answer>", "-17", "identity"),
        ("<answer>$18</answer>", "9 * 2 = 18.\n#### 18", "gsm8k_hash"),
        ("<answer>0.5</answer>", "\\frac{1}{2}", "math_final_answer"),
        ("It is $\\boxed{x^2-1}$.", "we get $\\boxed{(x-1)(x+1)}$", "math_final_answer"),
    ],
)
def test_an_output_answers_a_target_of_another_shape(prediction, target, extractor):
    assert is_correct(prediction, target, ANSWER_EXTRACTORS[extractor])


def test_an_unreadable_answer_is_wrong_even_if_the_target_is_unreadable_too():
    assert not is_correct("no idea", "no idea", GSM8K)
    assert score("exact_match", ["no idea"], ["no idea"], GSM8K) == [0.0]


@pytest.mark.parametrize("name", REWARD_FNS)
@given(text=TEXTS)
@settings(NO_MATHS, max_examples=100)
def test_rewards_lie_between_0_and_1_for_any_text(name, text):
    rewards = [score(name, [text], ["#### 42"], extract)[0] for extract in ANSWER_EXTRACTORS.values()]
    assert all(0.0 <= reward <= 1.0 for reward in rewards)


@pytest.mark.parametrize("text", LONG.values(), ids=LONG)
def test_long_texts_finish(text):
    for extract in ANSWER_EXTRACTORS.values():
        assert isinstance(extract(text), str) and isinstance(extract(f"<answer>{text}</answer>"), str)
        assert isinstance(extract(f"####{text}\\boxed{{{text}}}"), str)
        for name in REWARD_FNS:
            assert len(score(name, [text, f"<think>{text}</think>"], ["#### 42", text], extract)) == 2
    assert not answers_match(text, "42" + text[::-1] + "x")


# ---- score's checks --------------------------------------------------------------------------------------------------


def fail(text):
    raise KeyError(f"bad\nluck {text}")


@pytest.mark.parametrize(
    ("fn", "says"),
    [
        (lambda predictions, targets, extract: [float(p) for p in predictions], "raised ValueError"),
        (lambda predictions, targets, extract: None, "raised TypeError"),
        (lambda predictions, targets, extract: [1.0], "returned 1 rewards for 2"),
        (lambda predictions, targets, extract: [1.0] * 3, "returned 3 rewards for 2"),
        (lambda predictions, targets, extract: [float("nan"), 1.0], "returned nan"),
        (lambda predictions, targets, extract: [float("-inf"), 1], "returned -inf"),
        (lambda predictions, targets, extract: [10**400, 1.0], "returned 1000"),
        (lambda predictions, targets, extract: ["1", 1.0], "returned '1'"),
        (lambda predictions, targets, extract: [None, 1.0], "returned None"),
        (lambda predictions, targets, extract: [1j, 1.0], "returned 1j"),
    ],
)
def test_a_bad_reward_function_is_named_with_the_prediction(scratch_registry, fn, says):
    R.register_reward("mine")(fn)
    with pytest.raises(RewardError) as caught:
        score("mine", ["a line\n" * 100, "7"], ["7", "7"], IDENTITY)
    message = str(caught.value)
    assert "reward function 'mine'" in message and says in message and "a line" in message
    assert "\n" not in message and len(message) < 300


def test_the_prediction_at_fault_is_found_in_the_batch(scratch_registry):
    R.register_reward("mine")(lambda predictions, targets, extract: [1 / (p != "nine") for p in predictions])
    with pytest.raises(RewardError, match="'nine'"):
        score("mine", ["7", "8", "nine", "10"], ["7"] * 4, IDENTITY)
    R.register_reward("theirs")(lambda predictions, targets, extract: [0.0, 0.0, float("inf"), 0.0])
    with pytest.raises(RewardError, match="'nine'"):
        score("theirs", ["7", "8", "nine", "10"], ["7"] * 4, IDENTITY)


@pytest.mark.parametrize(("extract", "says"), [(fail, "raised KeyError"), (lambda text: None, "returned None")])
@pytest.mark.parametrize("name", ["exact_match", "format_and_match", "strict_format_and_match", "direct"])
def test_a_bad_extractor_is_named_with_the_text(scratch_registry, extract, says, name):
    R.register_extractor("mine")(extract)
    R.register_reward("direct")(lambda predictions, targets, extract: [float(len(extract(p))) for p in predictions])
    with pytest.raises(RewardError) as caught:
        score(name, ["some " * 100], ["7"], extract)
    message = str(caught.value)
    assert "answer extractor 'mine'" in message and says in message and "'some some" in message
    assert "\n" not in message and len(message) < 300


def test_score_converts_numbers_and_refuses_unknown_names_and_uneven_batches(scratch_registry):
    R.register_reward("mine")(lambda predictions, targets, extract: (len(p) > 1 for p in predictions))
    rewards = score("mine", ["7", "77"], ["7", "7"], IDENTITY)
    assert rewards == [0.0, 1.0] and all(type(reward) is float for reward in rewards)
    with pytest.raises(RewardError, match="'exact'.*exact_match"):
        score("exact", ["7"], ["7"], IDENTITY)
    with pytest.raises(RewardError, match="1 predictions but 2 targets"):
        score("exact_match", ["7"], ["7", "8"], IDENTITY)


def test_the_example_of_the_module_docstring_works(scratch_registry):
    lines = R.__doc__.splitlines()
    example = "\n".join(line[4:] for line in lines if line.startswith("    ")).replace("\\\\n", "\\n")
    names = R.__dict__ | {}
    exec(compile(example, "docstring", "exec"), names)
    last_line = R.ANSWER_EXTRACTORS["last_line"]
    assert last_line("so\n42\n") == "42"
    assert score("short_and_right", ["so\n42", "so\n43", "s" * 500 + "\n42"], ["42"] * 3, last_line) == [1.0, 0.0, 0.5]
    given = {"completions": chat("so", "<answer>42"), "answer": ["42"] * 2}
    assert R.score_by_name("tagged", names["tagged"], ["so", "<answer>42"], given) == [0.0, 1.0]


# ---- rewards in TRL's form -------------------------------------------------------------------------------------------


def chat(*texts):
    return [[{"role": "assistant", "content": text}] for text in texts]


def test_a_function_in_trls_form_gets_lists_by_name_and_may_say_none():
    def longer(completions, limit, **columns):
        assert set(columns) == {"prompts", "answer"}
        sizes = [len(completion[0]["content"]) for completion in completions]
        return [None if most is None else size > most for size, most in zip(sizes, limit, strict=True)]

    given = {"prompts": ["?"] * 3, "completions": chat("a", "bb", "ccc"), "limit": [1, None, 1], "answer": ["x"] * 3}
    rewards = R.score_by_name("longer", longer, ["a", "bb", "ccc"], given)
    assert rewards == [0.0, None, 1.0] and type(rewards[2]) is float


def test_a_function_that_takes_few_arguments_gets_those_alone():
    given = {"completions": ["a", "bb"], "prompts": ["?", "?"], "answer": ["1", "2"]}
    assert R.score_by_name("few", lambda completions: [*map(len, completions)], ["a", "bb"], given) == [1.0, 2.0]
    assert R.score_by_name("none", lambda *, answer: map(float, answer), ["a", "bb"], given) == [1.0, 2.0]


def test_a_coroutine_is_waited_for():
    async def later(completions, **columns):
        return [float(len(completion)) for completion in completions]

    assert R.score_by_name("later", later, ["a", "bb"], {"completions": ["a", "bb"]}) == [1.0, 2.0]


@pytest.mark.parametrize(
    ("fn", "says"),
    [
        (lambda completions, **c: [1 / (text != "nine") for text in completions], "raised ZeroDivisionError"),
        (lambda completions, **c: [float("nan") if text == "nine" else None for text in completions], "returned nan"),
        (lambda completions, **c: ["good" if text == "nine" else 1 for text in completions], "returned 'good'"),
    ],
)
def test_a_bad_function_in_trls_form_is_named_with_the_prediction(fn, says):
    texts = ["7", "nine", "8"]
    with pytest.raises(RewardError, match=rf"reward function 'my\.fn' {says}.* '?\[?'nine'"):
        R.score_by_name("my.fn", fn, texts, {"completions": texts})
    with pytest.raises(RewardError, match="'my.fn' returned 1 rewards for 3"):
        R.score_by_name("my.fn", lambda completions: [1.0], texts, {"completions": texts})


def test_the_arguments_that_are_missing():
    def fn(prompts, completions, solution, level=3, *, unit, **columns):
        return []

    assert R.missing_arguments(fn, ["prompts", "completions", "answer"]) == ["solution", "unit"]
    assert R.missing_arguments(fn, ["prompts", "completions", "solution", "unit"]) == []
    assert R.missing_arguments(max, []) == [], "a builtin need not say what it takes"


def test_weighted_sums_leave_none_out():
    parts = [[1.0, None, None, 0.5], [0.5, 0.5, None, 1.0]]
    assert R.weighted_sum(parts, [1.0, 0.2]) == pytest.approx([1.1, 0.1, 0.0, 0.7])
    assert R.weighted_sum(parts) == [1.5, 0.5, 0.0, 1.5]
    assert R.weighted_sum([[0.1, -0.3]]) == [0.1, -0.3]


GSM8K_TARGETS = {
    "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\nShe sold 48+24 = <<48+24=72>>72 altogether.\n#### 72": "72",
    "He pays $5*3=$<<5*3=15>>15 and $20 more.\nThat is $15+$20=$<<15+20=35>>35.\n#### 35": "35",
    "That makes 10 * 180 = <<10*180=1800>>1800.\n#### 1,800": "1800",
    "It falls by <<2-5=-3>>3 degrees.\n#### -3": "-3",
}


@pytest.mark.parametrize(("target", "answer"), GSM8K_TARGETS.items())
def test_trls_accuracy_reward_reads_the_targets_answer_and_a_boxed_output(target, answer):
    from trl.rewards import accuracy_reward, think_format_reward

    texts = [f"<think>so</think>\n<answer>\\boxed{{{value}}}</answer>" for value in (answer, "17")]
    given = {"completions": chat(*texts), "solution": [GSM8K(target)] * 2, "answer": [target] * 2}
    assert R.score_by_name("accuracy", accuracy_reward, texts, given) == [1.0, 0.0]
    assert [is_correct(text, target, GSM8K) for text in texts] == [True, False], "and so does the extractor"
    assert R.score_by_name("format", think_format_reward, texts, given) == [1.0, 1.0]
    assert R.score_by_name("format", think_format_reward, ["so"], {"completions": chat("so")}) == [0.0]


def test_trls_accuracy_reward_says_none_where_it_cannot_read_the_target():
    from trl.rewards import accuracy_reward

    given = {"completions": chat("\\boxed{x}", "\\boxed{7}"), "solution": ["Paris", "7"]}
    parts = [R.score_by_name("accuracy", accuracy_reward, ["", ""], given), [1.0, 1.0]]
    assert parts[0] == [None, 1.0]
    assert R.weighted_sum(parts, [1.0, 0.5]) == [0.5, 1.5]
