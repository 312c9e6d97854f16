"""Right and wrong answers as MATH and GSM8K write them: every kind of gold, and each rule beside math-verify."""

from __future__ import annotations

import time

import pytest
from math_gold import GOLD

from trainer.rewards import math_answers
from trainer.rewards.math_answers import final_answer, is_right, same_answer

FORMS = (r"So the answer is \boxed{%s}.", "<answer>%s</answer>", "<answer>$%s$</answer>")


def test_there_are_enough_golds_of_enough_kinds():
    assert sum(map(len, GOLD.values())) >= 200 and len(GOLD) >= 20


@pytest.mark.parametrize("kind", GOLD)
def test_the_gold_and_its_other_forms_are_right_a_part_or_a_change_of_it_is_wrong(kind):
    for gold, part, other, *same in GOLD[kind]:
        for form in FORMS:
            refused = [text for text in (gold, *same) if not is_right(gold, form % text)]
            accepted = [text for text in (part, other) if is_right(gold, form % text)]
            assert (refused, accepted) == ([], []), f"{form % gold}"


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("<answer> 3 </answer> no, <answer>\n4\n</answer>", "4"),
        (r"\boxed{3}, no: \boxed{\frac{1}{2}}", r"3,\frac{1}{2}"),  # boxes a comma apart are one list
        (r"\boxed{3}. But that is wrong: it is too small. It is \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{3} <answer>so \boxed{4}</answer>", "4"),
        ("<answer>**5**</answer>", "5"),
        ("the answer is 3", None),
        ("<answer>3", None),
        ("<answer> </answer>", None),
        (r"\boxed{}", None),
    ],
)
def test_the_answer_is_in_the_last_tag_or_box(completion, answer):
    assert final_answer(completion) == answer


@pytest.mark.parametrize(
    ("gold", "completion", "right"),
    [
        # GSM8K: numbers, also with what is written around them
        ("72", "48 + 24 = 72\n#### 72", True),
        ("1234", "#### 1,234", True),
        ("1234", "<answer>1,234</answer>", True),
        ("72", "<answer>72 clips</answer>", True),
        ("18", "<answer>$18.00</answer>", True),
        ("18", "<answer>18 dollars.</answer>", True),
        ("18", "<answer>$19</answer>", False),
        ("5", "<answer>5 million</answer>", False),
        ("5", "<answer>5 pi</answer>", False),
        ("12, 345", r"\boxed{12345}", False),
        # equations
        ("5", r"\boxed{x = 5}", True),
        ("5", r"\boxed{2 + 3 = 5}", True),
        ("5", r"\boxed{4 = 5}", False),
        ("5", r"\boxed{x = 3 = 5}", False),
        ("5", r"\boxed{x^2 + y^2 = 5}", False),
        ("1,2", r"\boxed{x=1, y=2}", True),
        # several boxes are one list
        ("1,-2", r"\boxed{1} and \boxed{-2}", True),
        ("1", r"\boxed{1} and \boxed{-2}", False),
        # an answer that was cut off is none
        ("1", r"so \boxed{1", False),
        ("12", r"so \boxed{1", False),
        # without marks, as math-verify reads the text
        ("6 - 5i", "The final answer is $6 - 5i$.", True),
        ("6 - 5i", "The final answer is $5$.", False),
        ("5", "The final answer is $6 - 5i$.", False),
        ("1,-2", "The answers are $1$ and $-2$.", True),
        ("x + 1", "x+1", True),
        ("42", "I do not know", False),
        ("42", "", False),
        ("", "", False),
        # small numbers, and rounding
        ("0.0000005", r"\boxed{-0.0000005}", False),
        ("0.0000005", r"\boxed{0}", False),
        ("0.0000005", r"\boxed{5 \times 10^{-7}}", True),
        (r"\frac13", r"\boxed{0.333333}", True),
        (r"\frac13", r"\boxed{0.33}", False),
    ],
)
def test_rules(gold, completion, right):
    assert is_right(gold, completion) is right


@pytest.mark.parametrize("gold", ["5", "x + 1", "(1,2)", r"\begin{pmatrix} 3 & 1 \end{pmatrix}"])
@pytest.mark.parametrize(
    "answer",
    [
        "10^{10^{10}}!",
        "9^{9^{9^9}}",
        "(9^9)!",
        r"\binom{10^9}{10^8}",
        r"\begin{pmatrix} 10^{10^{10}} & 1 \end{pmatrix}",
        r"10^{-10^{10}}",
        "1" * 100_000,
        "(" * 1000 + "1" + ")" * 1000,
    ],
)
@pytest.mark.timeout(20)
def test_what_no_machine_can_work_out_is_wrong_at_once(gold, answer):
    assert same_answer(gold, answer) is False
    assert same_answer(answer, answer) is True


def test_the_limit_is_of_computing_not_of_the_clock(monkeypatch):
    monkeypatch.setattr(math_answers, "CPU_LIMIT_S", 0.2)
    verify = math_answers.verify

    def slow(*args, **named):  # a machine that is busy with something else
        time.sleep(0.5)
        return verify(*args, **named)

    def endless(*args, **named):
        while True:
            pass

    monkeypatch.setattr(math_answers, "verify", slow)
    assert same_answer("2x + 7", "7 + 2x") is True
    monkeypatch.setattr(math_answers, "verify", endless)
    assert same_answer("3x + 8", "8 + 3x") is False
