r"""Whether a completion's final answer is the right one, for answers as MATH and GSM8K write them.

math-verify reads and compares formulas: 1/2, \frac12 and 0.5 are equal, a list has no order, and a point has one. Where
its reading loses a part of the answer, a rule of ours comes first:

- Words are text. math-verify multiplies their letters, so TTHH would be HHTT.
- The base of a numeral is part of it. math-verify drops it, so 10101_3 would be 10101_2.
- A unit is a \text{...} behind a number, or, if the gold has no letters, a word behind the answer's number. It may be
  left out, as MATH does. math-verify has a list of units, which makes 3t and 5s the numbers 3 and 5.
- If the gold is no equation, an equation is right only if each of its sides equals the gold or is a name: for the gold
  5, x = 5 and 2 + 3 = 5 are right. math-verify looks at the last side only, so x^2 + y^2 = 5 would be right.
- A percent sign may be left out on either side. math-verify accepts 40 for 40 %, but not 12.5 for 12.5 %.
- Small numbers are compared to 4 digits. math-verify compares 6 decimals, so -2^{-98} would be 2^{-98}.
- A list is no answer to an inequality. math-verify accepts the list of the two bounds, -3, 5, for -3 < x < 5.
- Powers and factorials of more than LARGEST are text: to work out 10^{10^{10}} takes minutes and gigabytes.
"""

from __future__ import annotations

import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from fractions import Fraction
from functools import lru_cache
from types import FrameType
from typing import Any

import sympy
from latex2sympy2_extended.math_normalization import extract_boxed_content
from math_verify import LatexExtractionConfig, parse, verify
from math_verify.grader import is_equation, is_relation

from trainer.tasks.base import ANSWER

CPU_LIMIT_S = 3.0  # to read an answer, and again to compare it; most take a thousandth of this
LONGEST = 500  # characters; a longer answer is not read as a formula, unless the gold is long; MATH's longest has 159
LARGEST = 10_000
_TAIL = 4_000  # characters of a completion, from its end, where an answer without marks is looked for

_LATEX = LatexExtractionConfig()
_LATEX = replace(_LATEX, normalization_config=replace(_LATEX.normalization_config, units=False))

_WRAPPER = re.compile(r"\\(?:text(?:bf|it|rm|normal)?|math(?:rm|bf|it)|mbox)\s*\{([^{}]*)\}")
_INVISIBLE = re.compile(r"\\left(?![a-z])|\\right(?![a-z])|\\[!,;: ]|\\?\$|\s")
_CHOICE = re.compile(r"\(([A-Z])\)")
_NUMERAL = re.compile(r"[+-]?(?:\d+|\d{1,3}(?:,\d{3})+)(?:\.\d+)?|[+-]?\.\d+")
_WORD = re.compile(r"[^\W\d_]{2,}")
_BASE = re.compile(r"(?<=[\dA-Z}])_\{?(\d+)\}?")
_NO_UNIT = r"(?!\s*(?:\d|(?:hundred|thousand|million|billion|trillion|dozen|and|or|pi)\b))"
_POWER = r"\s*(?:\^\{?\d\}?)?$"
_UNIT = re.compile(
    r"(?:(?<=[\d})\]])|(?<=\\pi))\s*\\(?:text(?:rm)?|mbox|mathrm)\s*\{" + _NO_UNIT + r"[^{}]*\}" + _POWER
)
_UNIT_WORD = re.compile(r"(?<=\d)\s+" + _NO_UNIT + r"[A-Za-z]{2,}[A-Za-z .]*" + _POWER)
_LETTER = re.compile(r"[A-Za-z]")
_EQUALS = re.compile(r"(?<![<>!:])=")
_NAME = re.compile(r"(?:^|(?<=[,;]))\s*\\?[A-Za-z]\w*(?:\{\w+\})?(?:\([^()=]*\))?\s*(?<![<>!:])=")


def final_answer(completion: str) -> str | None:
    r"""The answer that a completion gives: the last <answer>...</answer>, else the last \boxed{...}, else None.

    Boxes joined by "and", "or" or a comma are one list. An empty answer counts as none.
    """
    tagged = ANSWER.findall(completion)
    text = tagged[-1] if tagged else completion
    if "boxed" in text or "\\fbox" in text:
        text = extract_boxed_content(text, mode="last")
    elif not tagged:
        return None
    return text.strip().strip("*") or None  # **5** is bold


def is_right(gold: str, completion: str) -> bool:
    r"""Whether a completion's answer is `gold`.

    The answer is `final_answer`, or, where that is None, what math-verify finds near the end of the completion.
    Examples: ("6 - 5i", "\boxed{6-5i}") True, ("6 - 5i", "<answer>5</answer>") False, ("72", "#### 72") True.
    """
    answer = final_answer(completion)
    if answer is None:
        if len(completion) <= 2 * len(gold) and same_text(gold, completion):
            return True
        found = _parse(completion[-_TAIL:])
        answer = found[-1] if found else None  # math-verify returns its reading first and the text that it read last
    return isinstance(answer, str) and same_answer(gold, answer)


def same_answer(gold: str, answer: str) -> bool:
    """Whether two answers are the same, by the rules of the module's docstring. Not symmetric: the gold sets the form.

    Results are remembered, because the rollouts of a group often give the same answer.
    """
    return len(answer) <= max(LONGEST, 2 * len(gold)) and _same(gold, answer)


def same_text(gold: str, answer: str) -> bool:
    """Whether two answers look the same in print. Texts without formulas ignore case. An empty text equals none."""
    text, given = _plain(gold), _plain(answer)
    if _WORD.search(text) and "\\" not in text:
        text, given = text.casefold(), given.casefold()
    return text == given != ""


@lru_cache(maxsize=8192)
def _same(gold: str, answer: str) -> bool:
    if same_text(gold, answer):
        return True
    text, given = _plain(gold), _plain(answer)
    if _NUMERAL.fullmatch(text) and _NUMERAL.fullmatch(given) and ", " not in gold:  # plain numbers need no parser
        return Fraction(text.replace(",", "")) == Fraction(given.replace(",", ""))
    if (_WORD.fullmatch(text) and _WORD.fullmatch(given)) or _BASE.findall(text) != _BASE.findall(given):
        return False
    gold, answer = _without_unit(gold), _without_unit(answer)
    if not _LETTER.search(gold):
        answer = _UNIT_WORD.sub("", answer)
    if "=" in answer and not _EQUALS.search(gold):
        answer = _NAME.sub("", answer)
        if _EQUALS.search(answer):
            return all(same_answer(gold, side) for side in _EQUALS.split(answer))
    if _equal(gold, answer):
        return True
    if "%" in gold + answer:
        return _equal(re.sub(r"\\?%", "", gold), re.sub(r"\\?%", "", answer))
    return False


def _plain(text: str) -> str:
    r"""The text without marks that change only how it is printed: spaces, \text, \left, dollars, the last full stop."""
    while (unwrapped := _WRAPPER.sub(r"\1", text)) != text:
        text = unwrapped
    text = _INVISIBLE.sub("", text).replace("{,}", ",").replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac")
    text = text.rstrip(".,;")
    choice = _CHOICE.fullmatch(text)
    return choice[1] if choice else text


def _without_unit(text: str) -> str:
    return _UNIT.sub("", re.sub(r"(?<!\\)\$", "", text).strip().rstrip(".,;")).strip()


def _equal(gold: str, answer: str) -> bool:
    """math-verify's verdict on two formulas."""
    (expected, decimals), (given, _) = _read(gold), _read(answer)
    if not expected or not given or any(_is_too_large(each) for each in given):
        return False
    if is_relation(expected[0]) and not is_equation(expected[0]) and isinstance(given[0], sympy.FiniteSet):
        return False
    with suppress(_TookTooLong), _within_cpu_time():
        return bool(
            verify(expected, given, float_rounding=decimals, numeric_precision=decimals + 9, timeout_seconds=None)
        )
    return False


@lru_cache(maxsize=8192)
def _read(text: str) -> tuple[list[Any], int]:
    """math-verify's reading of a formula, and how many decimals to compare: 6, or for small numbers 4 digits."""
    found = _parse("\\boxed{" + text + "}", [_LATEX])
    return found, max(6, 3 - _magnitude(found[0])) if found else 6


def _magnitude(expression: Any) -> int:
    """The power of ten of a number's first digit; 0 for anything else."""
    if not getattr(expression, "is_number", False) or _is_too_large(expression):
        return 0
    size = abs(expression.evalf(5))
    return int(sympy.floor(sympy.log(size, 10))) if size.is_Float and size.is_finite and size > 0 else 0


def _is_too_large(expression: Any) -> bool:
    """Whether a formula holds a power, factorial or binomial of a number above LARGEST."""
    for node in sympy.postorder_traversal(expression):  # inner first: 10^10^(10^10) cannot even be estimated
        if isinstance(node, (sympy.Pow, sympy.factorial, sympy.factorial2, sympy.binomial)):
            size = node.args[1] if isinstance(node, sympy.Pow) else node.args[0]
            if size.is_number and abs(size.evalf(5)) > LARGEST:
                return True
    return False


class _TookTooLong(Exception):
    pass


@contextmanager
def _within_cpu_time() -> Iterator[None]:
    """Raises _TookTooLong after CPU_LIMIT_S seconds of this process's own CPU time.

    math-verify's own limit counts wall time, so that on a busy machine right answers would be judged wrong. Only the
    main thread can set a limit; in other threads there is none.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def too_long(number: int, frame: FrameType | None) -> None:
        if frame is not None and frame.f_code.co_filename.endswith("_weakrefset.py"):
            return  # what is raised in a callback of a weak reference is lost: the next tick raises it
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        raise _TookTooLong

    before = signal.signal(signal.SIGVTALRM, too_long)
    signal.setitimer(signal.ITIMER_VIRTUAL, CPU_LIMIT_S, 0.01)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def _parse(text: str, *configuration: Any) -> list[Any]:
    """math-verify's reading of a text; empty where it takes too long."""
    with suppress(_TookTooLong), _within_cpu_time():
        return list(parse(text, *configuration, parsing_timeout=None))
    return []
