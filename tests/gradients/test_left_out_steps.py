"""Steps that are left out in turn are warned of, once."""

import warnings

import pytest

from dpoptim.gradients.left_out_steps import LeftOutSteps


def test_the_third_in_turn_is_warned_of_once():
    steps = LeftOutSteps()
    for number in range(1, 7):
        steps.note_reduction(is_step_due=True)
        if number == 3:
            with pytest.warns(
                UserWarning, match="^no step was made with the gradients of 3 backward passes in turn. If"
            ):
                steps.note_gone()
        else:
            steps.note_gone()  # warnings are errors


def test_a_step_in_between_begins_anew():
    steps = LeftOutSteps()
    for number in range(12):
        steps.note_reduction(is_step_due=True)
        if number % 3 == 2:
            steps.note_step()
        steps.note_gone()


def test_what_needs_no_step_does_not_count():
    steps = LeftOutSteps()
    for _ in range(5):
        steps.note_reduction(is_step_due=False)
        steps.note_gone()
        steps.note_gone()


def test_another_sign_uses_up_the_warning():
    steps = LeftOutSteps()
    with pytest.warns(UserWarning, match="^gradients were set to zero. If the program has looked"):
        steps.warn("gradients were set to zero")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        steps.warn("anything")
