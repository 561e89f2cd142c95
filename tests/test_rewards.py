"""The accuracy rewards: what is an answer, what equals the reference, and who is asked."""

import signal
import subprocess
import sys
import threading
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo_engine.rewards import (
    RewardPool,
    accuracy_reward,
    unusable_solutions,
)
from grpo_engine.rewards.exact import exact_value
from grpo_engine.rewards.math import judge_answer
from grpo_engine.rewards.symbolic import MathVerify
from grpo_engine.types import UserError


class NoSymbols:
    """Fails the test if the comparison was not exact."""

    def parses(self, gold):
        raise AssertionError(f"symbolic parse of {gold!r}")

    def equal(self, gold, answer):
        raise AssertionError(f"symbolic comparison of {gold!r} and {answer!r}")


def exact_verdict(text, gold, **options):
    return judge_answer(text, gold, NoSymbols(), **options)


def test_importing_rewards_does_not_import_torch_or_the_optional_packages():
    code = (
        "import sys, grpo_engine.rewards as r; r.load_reward('accuracy'); "
        "print([m for m in ('torch', 'math_verify', 'sympy', 'reasoning_gym', 'numpy') "
        "if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- where the answer is ------------------------------------------------------------------------

EXTRACTION = [
    (r"\boxed{72}", 1.0, "ok"),
    (r"so \fbox{ 72 } it is", 1.0, "ok"),
    ("<think>hm 5</think> <answer>72</answer>", 1.0, "ok"),
    (r"<think>\boxed{5}</think> <answer>\boxed{72}</answer>", 1.0, "ok"),
    ("Sum.\n**Answer:** 72.", 1.0, "ok"),
    ("reasoning</think> Answer: $72$", 1.0, "ok"),
    (r"\boxed{72} again \boxed{72.0}", 1.0, "ok"),
    (r"\boxed{\text{72}}", 1.0, "ok"),
    ("<answer>**72**</answer>", 1.0, "ok"),
    ("<answer>\n`72`\n</answer>", 1.0, "ok"),
    ("Answer\uff1a72", 1.0, "ok"),
    (r"so \boxed{\boxed{72}}", 1.0, "ok"),
    (r"\boxed{x = \boxed{72}}", 1.0, "ok"),
    # several different answers are a bet, not an answer
    (r"\boxed{71, \boxed{72}}", 0.0, "ok"),
    (r"\boxed{\boxed{71} \boxed{72}}", 0.0, "ok"),
    ("<answer>**71** or **72**</answer>", 0.0, "ok"),
    (r"\boxed{71} or \boxed{72}", 0.0, "ok"),
    (r"\boxed{72} or \boxed{71}", 0.0, "ok"),
    (r"\boxed{71} <answer>72</answer>", 0.0, "ok"),
    ("<answer>71</answer><answer>72</answer>", 0.0, "ok"),
    ("Answer: 71\nAnswer: 72", 0.0, "ok"),
    (" ".join(rf"\boxed{{{n}}}" for n in range(100)), 0.0, "ok"),
    # not marked, not closed, not outside the thinking
    ("72", 0.0, "no_answer"),
    ("The answer is 72", 0.0, "no_answer"),
    ("xq 72 zzzz 72 72", 0.0, "no_answer"),
    (r"\boxed{72", 0.0, "no_answer"),
    (r"\boxed{72} then \boxed{7", 0.0, "no_answer"),
    (r"<answer>72</answer> \boxed{7", 0.0, "no_answer"),
    ("<answer>72", 0.0, "no_answer"),
    ("<answer>72</answer> <answer>", 0.0, "no_answer"),
    ("<answer></answer>", 0.0, "no_answer"),
    (r"\boxed{}", 0.0, "no_answer"),
    ("Answer:", 0.0, "no_answer"),
    (r"<think>\boxed{72}", 0.0, "no_answer"),
    (r"<think>\boxed{72}</think>", 0.0, "no_answer"),
    (r"<think>a</think> \boxed{72} <think>", 0.0, "no_answer"),
    ("", 0.0, "no_answer"),
    # wrong content in the right place
    (r"\boxed{72 or 73}", 0.0, "ok"),
    (r"\boxed{not 72}", 0.0, "ok"),
    (r"\boxed{gibberish 72 blah}", 0.0, "ok"),
    (r"\boxed{the answer is 72}", 0.0, "ok"),
    (r"\boxed{0,1,2,72}", 0.0, "ok"),
    (r"\boxed{" + "72" * 2000 + "}", 0.0, "too_long"),
]


@pytest.mark.parametrize(("text", "score", "outcome"), EXTRACTION)
def test_only_a_marked_final_answer_counts(text, score, outcome):
    assert exact_verdict(text, "72") == (score, outcome)


def test_prefilled_thinking():
    assert exact_verdict(r"\boxed{72}", "72", thinking_prefilled=True) == (0.0, "no_answer")
    assert exact_verdict(r"so</think>\boxed{72}", "72", thinking_prefilled=True) == (1.0, "ok")


def test_extraction_is_linear_in_the_text():
    for text in (r"\boxed{" * 50_000, "<answer>" * 50_000, "answer: " * 50_000, "{" * 500_000):
        assert exact_verdict(text, "72")[0] == 0.0


# --- what equals what ---------------------------------------------------------------------------

EXACT = [
    ("72", "72.0", True),
    (72, "072", True),
    (0.5, r"\frac{1}{2}", True),
    ("-5", "\u22125", True),
    ("-5", "5", False),
    ("1234567", "1,234,567", True),
    ("1234567", "1{,}234{,}567", True),
    ("1234567", r"1\,234\,567", True),
    ("1234", "123,4", False),
    (r"\frac{3}{4}", ".75", True),
    (r"\frac43", r"\dfrac{4}{3}", True),
    ("1/3", "0.3333333333", False),
    ("3.5", r"3\frac{1}{2}", True),
    ("7/2", "3 1/2", True),
    ("31/2", "3 1/2", False),
    ("12", "1 2", False),
    ("1024", "2^{10}", True),
    ("9", r"\sqrt{81}", True),
    ("6", "3!", True),
    ("1e-7", "0.0000001", True),
    ("1e-7", "0", False),
    # tiny and huge numbers are not equal because they round to the same float
    (r"\frac{1}{2004!}", r"\frac{1}{2006!}", False),
    (r"\frac{1}{2004!}", r"1/2004!", True),
    ("2^{-1000}", "2^{-1001}", False),
    ("100000000000000000000", "100000000000000000001", False),
    ("0.1", "0.10000000000000001", False),
    # percent is a unit, also with a decimal point
    (r"50\%", "50.0%", True),
    (r"50\%", "50", True),
    ("50", r"50\%", True),
    ("0.5", "50%", True),
    ("50", "0.5", False),
    ("50%", "5000%", False),
    # units
    ("5", r"5\text{ km}", True),
    ("72", "72 clips", True),
    ("5 km", "5 kilometers", True),
    (r"5\text{ km}", r"5\text{ m}", False),
    ("45^\\circ", "45", True),
    (r"\$5.00", "$5", True),
    ("5", "5 apples", True),
    ("5", "5 dollars", True),
    ("5", "$5", True),
    ("5", "5cm", True),
    ("5", "5 m", True),
    ("5", "5 years old", True),
    ("5 years", "5 years old", True),
    ("5", r"5\text{ square units}", True),
    (r"5\text{ cm}^2", "5 square centimeters", True),
    ("5", r"5^\circ\text{C}", True),
    ("5", r"5^{\circ}C", True),
    (r"5^\circ C", r"5^\circ F", False),
    ("5", r"5\text{ million-ish}", False),
    ("5 boxes", "5 box", True),
    ("60 mph", "60 miles per hour", True),
    ("3/2", "1 1/2 cups", True),
    ("1234", "1,234 dollars", True),
    ("5", "\u20ac5", True),
    ("$5", "\u20ac5", True),
    ("5 dollars", "\u20ac5", False),
    ("5 apples", "5 pears", False),
    (r"5\text{ m}", "5 ms", False),
    (r"5\text{ cm}", r"5\text{ cm}^2", False),
    ("60 miles", "60 miles per hour", False),
    ("5 m/s", "5", True),
    ("5 m/s", r"5\text{ m/s}", True),
    ("5 m/s", "5 km/h", False),
    ("5", "5 m/s", True),
    # words that are no units: magnitudes count, the others leave no number
    ("12", r"12\text{ (thirteen)}", False),
    ("5", "~5", False),
    ("5", r"5~\text{cm}", True),
    ("500", "5 hundred", True),
    ("5000000", r"5\text{ million}", True),
    ("5000000", "$5 million dollars", True),
    ("300000", "3 hundred thousand", True),
    ("36", "3 dozen eggs", True),
    ("50%", "50 percent", True),
    ("0.5", "50 per cent", True),
    ("5 million", "5 billion", False),
    ("5", "5 million", False),
    ("5 million", "5", False),
    ("50", "$50 million", False),
    ("3", "3 dozen", False),
    ("5", "5 squared", False),
    ("5", "5 factorial", False),
    ("5", "5 plus seven", False),
    ("5", "5 dollars minus one", False),
    ("5", "5 and a half", False),
    ("2", "2 thirds", False),
    ("5", "5 times", False),
    ("5", "5 bn", False),
    ("5", "5 is wrong", False),
    ("5", r"5\text{ + 2}", False),
    ("5", "2+2=5 million", False),
    *(("5", word, False) for word in (r"5\text{k}", "5M", r"5\text{ M}", "5 MM", r"5\text{B}")),
    *(("5", f"5 {word}", False) for word in ("hundredfold", "quintuple", "quintupled", "log")),
    ("0.3", "0.3 repeating", False),
    ("11", "11 binary", False),
    ("11 binary", "11 binary", True),
    ("5", "5g", True),
    ("5", "5 blindfolds", True),
    ("1/3", r"0.\overline{3}", True),
    ("1/6", r"0.1\overline{6}", True),
    ("-1/3", r"-.\bar{3}", True),
    ("1/3", r"0.\overline{30}", False),
    ("1", r"0.\overline{}", False),
    # numeral bases
    ("101_2", "101_{2}", True),
    ("101", "101_{10}", True),
    ("101_2", "101", False),
    ("12", "12_5", False),
    ("10_2", "10_3", False),
    # malformed or with free variables: wrong, and nobody has to be asked
    ("5", "5-", False),
    ("5", "-", False),
    ("3", "3+", False),
    ("7", "7=", False),
    ("5", "x", False),
    ("5", "5x", False),
    ("5", "(5", False),
    ("5", "9^9^9^9", False),
    ("5", "1/0", False),
    ("5", r"\approx 5", False),
    ("5", "x<5", False),
    ("5", "3+=5", False),
    ("x", "5", False),
    ("(1,2)", "(1,x)", False),
    ("5", "[5]", True),
    ("5", "'5'", True),
    ("5", "|-5|", True),
    ("2", "4^{1/2}", True),
    ("1/2", "1:2", True),
    ("5:00", "05:00 pm", True),
    ("5:00 am", "5:00 pm", False),
    ("5:00", "6:00", False),
    ("5:00", "5", False),
    # equations
    ("5", "x=5", True),
    ("5", "= 5", True),
    ("5", "== 5", False),
    ("x = 5", "5", True),
    ("x=5", "y=5", False),
    ("5", "2+3=5", True),
    ("5", "2+2=5", False),
    ("5", "x=2+3=5", True),
    ("5", "x=2+2=5", False),
    ("x=5", "x=2+3=5", True),
    ("x=5", "x=2+2=5", False),
    ("x=5", "x=5=6", False),
    ("(1,2)", "(x,y)=(1,2)", True),
    ("(1,2)", "(x,y)=(2,1)", False),
    (r"\{1,2\}", r"S=\{2,1\}", True),
    ("x=1, y=2", "x=1, y=2", True),
    ("x=1, y=2", "y=2, x=1", True),
    ("x=1, y=2", "x=2, y=1", False),
    ("x=1, y=2", "1, 2", True),
    ("x=1, y=2", "2, 1", False),
    ("2, 1", "x=1, y=2", False),
    ("(2,1)", "x=1, y=2", False),
    ("x=1, x=2", "2, 1", True),
    ("1, 2", "x=2, x=1", True),
    # order and brackets
    ("(1,2)", "( 1, 2.0 )", True),
    ("(1,2)", "{1,2}", False),
    (r"\{1,2\}", "{2, 1}", True),
    ("5", "{5}", True),
    (r"\langle 1,2\rangle", "(1,2)", True),
    (r"\langle 1,2\rangle", r"\left\langle 2,1\right\rangle", False),
    ("(1,2)", "(2,1)", False),
    ("(1,2)", r"\{1,2\}", False),
    ("(1,2)", r"\left(1, 2\right)", True),
    (r"\{1,2\}", r"\{2,1\}", True),
    ("1, 2", "2 and 1", True),
    ("1;2", "1,2", True),
    ("5", r"\{5\}", True),
    ("5", r"\{\{5\}\}", False),
    ("5", r"\{" * 300 + "5" + r"\}" * 300, False),
    ("1,2", "1,2,3", False),
    ("1,1,2", "1,2,2", False),
    (r"\pm 5", "5, -5", True),
    ("(x,y)=(1,2)", "(1,2)", True),
    # characters in place of notation
    ("72", "\uff17\uff12", True),
    ("72", "\u200b72\u2060", True),
    ("(1,2)", "\uff081\uff0c2\uff09", True),
    ("x=5", "x\uff1d5", True),
    ("25", "5\u00b2", True),
    ("52", "5\u00b2", False),
    ("0.001", "10\u207b\u00b3", True),
    ("0.5", "\u00bd", True),
    ("7/2", "3\u00bd", True),
    ("3", "\u221a9", True),
    ("5", "\u221a(16+9)", True),
    (r"5\text{ cm}^2", "5 cm\u00b2", True),
    # words are words
    ("east", r"\text{East}", True),
    ("east", "west", False),
    ("B", "(B)", True),
    ("B", "(C)", False),
    (r"1,2,\ldots", r"1,2,\ldots", True),
    (r"1,2,\ldots", "1,2", False),
    (r"1,2,\ldots", r"1,2,3,\ldots", False),
    # how data sets store references
    ("Natalia sold 48.\n#### 1,072", "1072", True),
    (r"so it is \boxed{4}", "4", True),
]


@pytest.mark.parametrize(("gold", "answer", "equal"), EXACT)
def test_exact_comparison(gold, answer, equal):
    assert exact_verdict(rf"\boxed{{{answer}}}", gold) == (float(equal), "ok")


@pytest.mark.parametrize("gold", ["", None, "  ", True, ["4"], r"\boxed{4", "#### ", "7" * 5000])
def test_an_unusable_reference_is_none_whatever_the_completion(gold):
    for text in (r"\boxed{4}", "no answer", ""):
        assert exact_verdict(text, gold) == (None, "gold_invalid")


@given(st.fractions(max_denominator=10**6))
def test_every_rational_equals_its_spellings(value):
    spellings = [f"{value.numerator}/{value.denominator}"]
    spellings.append(rf"\frac{{{value.numerator}}}{{{value.denominator}}}")
    spellings.append(f"{2 * value.numerator}/{2 * value.denominator}")
    for spelling in spellings:
        assert exact_value(spelling) == value
        assert exact_verdict(rf"\boxed{{{spelling}}}", spellings[0])[0] == 1.0
        near = value + Fraction(1, 10**30)
        assert (
            exact_verdict(rf"\boxed{{{spelling}}}", f"{near.numerator}/{near.denominator}")[0]
            == 0.0
        )


@given(st.text(alphabet=r"0123456789+-*/^!(){}\fracsqt., e", max_size=40))
def test_reading_never_raises_and_never_runs_away(text):
    value = exact_value(text)
    assert value is None or isinstance(value, Fraction)


@pytest.mark.parametrize(
    "text",
    [
        "9^9^9^9",
        "(((" * 500,
        "2^" * 500 + "2",
        "1/0",
        "5000000!",
        "3!!",
        "0^{-1}",
        "2 3",
        "1e99999",
    ],
)
def test_what_is_too_large_or_ambiguous_is_not_a_number(text):
    assert exact_value(text) is None


SYMBOLIC = [
    (r"\sqrt{8}", r"2\sqrt2", True),
    (r"\frac{\sqrt3}{2}", "sqrt(3)/2", True),
    (r"2\pi", "2*pi", True),
    ("x^2-1", "(x-1)(x+1)", True),
    ("y=2x+1", "2x+1", True),
    ("y=2x+1", "y=1+2x", True),
    ("x^2+y^2=25", "25", False),
    ("x<3", "3>x", True),
    ("[0,1)", "[0,1]", False),
    (r"0.1\sqrt2", r"\frac{\sqrt2}{10}", True),
    (r"3\pm\sqrt2", r"3-\sqrt2, 3+\sqrt2", True),
    (r"(\sqrt2, 3)", r"(3, \sqrt2)", False),
    (r"\infty", "\u221e", True),
    (r"-\infty", "\u221e", False),
    (r"[0,\infty)", "[0,\u221e)", True),
    # a relation is an interval, whichever of the two is the reference, and never its two ends
    ("1<x<3", "(1,3)", True),
    ("(1,3)", "1<x<3", True),
    (r"[1,3]", r"1\le x\le3", True),
    (r"(-\infty,3)", "x<3", True),
    ("(1,3)", r"1\le x\le3", False),
    ("[1,3]", "1<x<3", False),
    (r"(-\infty,3)", r"x\le3", False),
    ("1<x<3", r"\{1,3\}", False),
    ("1<x<3", "1,3", False),
    (r"\{1,3\}", "1<x<3", False),
    ("1,3", "1<x<3", False),
    ("x<3", "x<3, x<5", False),
    ("5m", "5", False),  # five times m, as a reference
    (r"\sqrt2", r"\sqrt2/0", False),
    # Math-Verify alone accepts these: it rounds constants to six digits
    (r"\pi", "3.141593", False),
    (r"\sqrt2", "1.4142136", False),
    ("10^{-9}", r"\sqrt2\cdot10^{-10}", False),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}2\\1\end{pmatrix}", False),
    # the blank behind the end of a row is no thin space
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}", True),
    (r"\begin{pmatrix} 1 \\ 3 \end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}", False),
    # constants of an equation are equal to each other
    ("5", r"\sqrt{2}=5", False),
    ("5", r"\pi=5", False),
    ("3", r"\log_2 8=3", True),
    ("3", r"\log_2 9=3", False),
    ("3", r"\log_2 8", True),
    ("3/5", r"\sin A=\frac35", True),
    ("1/2", r"\sin 30^\circ=\frac12", True),
    (r"\frac{\sqrt3}{2}", r"\cos\frac{\pi}{6}=\frac{\sqrt3}{2}", True),
    (r"\frac{\sqrt3}{2}", r"\cos\frac{\pi}{3}=\frac{\sqrt3}{2}", False),
    (r"x \le 3", "x \u2264 3", True),
    (r"(-\infty,1)\cup(2,\infty)", "(\u2212\u221e,1)\u222a(2,\u221e)", True),
    (r"2\sqrt3", "2\u221a3", True),
]


def test_symbolic_comparison():
    pytest.importorskip("math_verify")
    engine = MathVerify()
    for gold, answer, equal in SYMBOLIC:
        verdict = judge_answer(rf"\boxed{{{answer}}}", gold, engine)
        assert verdict == (float(equal), "ok"), (gold, answer)
    assert judge_answer(r"\boxed{5}", r"\frac{1", engine) == (None, "gold_invalid")
    assert judge_answer("nothing", r"\frac{1", engine) == (None, "gold_invalid")


@pytest.mark.parametrize("bomb", [r"(10^7)!", r"\binom{10^9}{5\cdot10^8}"])
def test_an_answer_too_large_to_compare_is_wrong_and_not_unjudged(bomb):
    pytest.importorskip("math_verify")
    answers = [rf"\boxed{{{bomb}}}", r"\boxed{2\sqrt2}"]
    with RewardPool(["accuracy"], num_workers=1, timeout_s=3, max_error_rate=0.0) as pool:
        report = pool.score(
            prompts=["", ""], completions=answers, columns={"solution": [r"\sqrt{8}"] * 2}
        )
    assert report.scores["accuracy"] == [0.0, 1.0]
    assert report.outcomes["accuracy"].keys() <= {"ok", "time_limit", "resource_limit"}


@pytest.mark.parametrize("error", [MemoryError, RecursionError, OverflowError])
def test_an_answer_that_exhausts_the_comparison_is_wrong(error):
    class Exhausted:
        def parses(self, gold):
            return True

        def equal(self, gold, answer):
            raise error

    assert judge_answer(r"\boxed{\pi}", r"\sqrt{2}", Exhausted()) == (0.0, "resource_limit")


def test_accuracy_reward_alone_from_a_thread_leaves_the_callers_alarm_alone():
    pytest.importorskip("math_verify")
    completions = [r"\boxed{2\sqrt2}", r"\boxed{7}", "7", r"\boxed{\sqrt{2}}", r"\boxed{1}"]
    solution = [r"\sqrt{8}", "7", "7", r"\sqrt{3}", r"\frac{1"]
    wanted = [1.0, 1.0, 0.0, 0.0, None]
    handler = signal.signal(signal.SIGALRM, signal.SIG_IGN)
    signal.setitimer(signal.ITIMER_REAL, 1000)
    try:
        here = accuracy_reward(completions, solution)
        elsewhere = []
        thread = threading.Thread(
            target=lambda: elsewhere.append(accuracy_reward(completions, solution))
        )
        thread.start()
        thread.join()
        assert signal.getsignal(signal.SIGALRM) is signal.SIG_IGN
        assert signal.getitimer(signal.ITIMER_REAL)[0] > 900
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
    assert here == wanted and elsewhere == [wanted]


@given(
    st.integers(-999, 999), st.text(alphabet="0123456789+-*/^!(){}[]|=<>%$.,:;_ xyzab", max_size=20)
)
def test_integer_tasks_never_need_symbols(gold, answer):
    score, _ = exact_verdict(f"<answer>{answer}</answer>", gold)
    assert score in (0.0, 1.0)


def test_accuracy_reward_names_the_missing_extra(monkeypatch):
    monkeypatch.setattr("grpo_engine.rewards.symbolic.math_verify_installed", lambda: False)
    assert accuracy_reward([r"\boxed{7}"], ["7"]) == [1.0]
    with pytest.raises(UserError, match=r"pip install 'grpo-engine\[rewards\]'"):
        accuracy_reward([r"\boxed{\sqrt2}"], [r"\sqrt2"])


def test_unusable_references_are_listed_at_load_time():
    pytest.importorskip("math_verify")
    solutions = ["72", r"\frac{1", "", r"\sqrt{2}", None, "so #### 1,072", "east", "(1, 2)", "1;2"]
    assert unusable_solutions(solutions) == [1, 2, 4]


def test_accuracy_reward_refuses_unequal_lengths():
    with pytest.raises(UserError, match="2 completions but 1 solutions"):
        accuracy_reward(["a", "b"], ["1"])
