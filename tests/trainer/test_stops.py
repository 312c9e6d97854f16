"""Where a signal may end a run: real signals to this process, and several ranks of which one meets it."""

from __future__ import annotations

import os
import signal
from types import SimpleNamespace

import pytest

from trainer.runtime.stops import Interrupted, Stops

HERE = [signal.SIGINT, signal.SIGTERM]


@pytest.fixture(autouse=True)
def handlers_are_put_back():
    before = [signal.getsignal(number) for number in HERE]
    yield
    assert [signal.getsignal(number) for number in HERE] == before


def meet(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)
    for _ in range(1000):  # the handler runs between two of these
        pass


@pytest.mark.parametrize("number", HERE)
def test_outside_of_held_it_is_raised_at_once_and_inside_at_the_end(number, capfd):
    done = []
    with pytest.raises(Interrupted, match=number.name) as met, Stops().installed():
        meet(number)
        done.append("not reached")
    assert met.value.number == number and not done
    with pytest.raises(Interrupted), (stops := Stops()).installed():
        with stops.held():
            meet(number)
            assert all(signal.getsignal(each) is signal.SIG_DFL for each in HERE)  # a second one kills
            done.append("the whole step")
        done.append("not reached")
    assert done == ["the whole step"]
    assert f"{number.name}: stops at the end of this step" in capfd.readouterr().err


def test_what_changes_nothing_is_cut_short_and_the_step_goes_on_to_its_end():
    done = []

    def evaluation() -> int:
        meet(signal.SIGINT)
        done.append("not reached")
        return 1

    with pytest.raises(Interrupted), (stops := Stops()).installed(), stops.held():
        done.append(stops.cut_short(evaluation))
        done.append("recorded")
        done.append(stops.cut_short(evaluation))  # the next does not begin
    assert done == [None, "recorded", None]
    with (stops := Stops()).installed(), stops.held():
        assert stops.cut_short(lambda: 7) == 7


def test_ranks_stop_together_where_they_agree():
    """Two ranks: the signal reaches the other one, and `any` is the collective in which this one learns of it."""
    answers = iter([False, False, True, True])
    ranks = SimpleNamespace(world=2, any=lambda met: next(answers) or met)
    done, stops = [], Stops(ranks)
    with pytest.raises(Interrupted, match="SIGTERM"), stops.installed(), stops.held():
        done.append(stops.cut_short(lambda: "evaluated"))
        done.append(stops.cut_short(lambda: "the other rank was told to stop"))
        done.append("recorded")
    assert done == ["evaluated", None, "recorded"]


def test_of_several_ranks_the_one_that_meets_it_does_not_leave_alone():
    ranks, done = SimpleNamespace(world=2, any=lambda met: met), []
    with pytest.raises(Interrupted, match="SIGINT"), (stops := Stops(ranks)).installed():
        meet(signal.SIGINT)
        done.append("sampled")
        with stops.held():
            done.append("not reached")
    assert done == ["sampled"]


def test_a_failure_inside_is_not_hidden_by_a_signal():
    with pytest.raises(ZeroDivisionError), (stops := Stops()).installed(), stops.held():
        meet(signal.SIGTERM)
        raise ZeroDivisionError
