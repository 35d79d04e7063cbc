"""The accuracy matrix: definitions on a matrix worked by hand, and what is missing stays missing."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from lori_nb.analysis.continual import average_score, backward_transfer, forgetting, forward_transfer, intransigence

NAN = math.nan
# Task 0 is best after stage 1, so forgetting and backward transfer differ.
R = np.array([[0.50, 0.25, 0.00], [0.75, 0.50, 0.25], [0.25, 0.75, 1.00]])
MATRICES = st.integers(1, 5).flatmap(lambda n: arrays(np.float64, (n, n), elements=st.floats(0, 1)))


def test_values_worked_by_hand():
    assert average_score(R) == (0.25 + 0.75 + 1.0) / 3
    np.testing.assert_array_equal(forgetting(R), [0.75 - 0.25, 0.5 - 0.75, NAN])
    assert backward_transfer(R) == ((0.25 - 0.5) + (0.75 - 0.5)) / 2
    assert forward_transfer(R, [0.0, 0.125, 0.25]) == ((0.25 - 0.125) + (0.25 - 0.25)) / 2
    assert intransigence(R, [0.75, 0.5, 0.75]) == ((0.75 - 0.5) + (0.5 - 0.5) + (0.75 - 1.0)) / 3


@given(matrix=MATRICES)
@settings(max_examples=50, deadline=None, derandomize=True)
def test_equals_the_definitions_written_as_loops(matrix):
    T = len(matrix)
    lost = [max(matrix[i, j] for i in range(T - 1)) - matrix[-1, j] for j in range(T - 1)]
    np.testing.assert_array_equal(forgetting(matrix), [*lost, NAN])
    if T > 1:
        backward = sum(matrix[-1, j] - matrix[j, j] for j in range(T - 1)) / (T - 1)
        forward = sum(matrix[j - 1, j] - 0.5 for j in range(1, T)) / (T - 1)
        room = 2 * T * np.finfo(float).eps  # T sums of numbers of at most 1, in another order
        assert abs(backward_transfer(matrix) - backward) <= room
        assert abs(forward_transfer(matrix, [0.5] * T) - forward) <= room
        assert -np.mean(lost) <= backward_transfer(matrix) + room  # the best earlier score is no less than R[j, j]


def test_two_stages_of_a_safety_study():
    matrix = [[0.9, 0.1], [0.6, 0.8]]
    np.testing.assert_array_equal(forgetting(matrix), [0.9 - 0.6, NAN])
    assert backward_transfer(matrix) == 0.6 - 0.9


def test_scores_that_were_not_evaluated_are_left_out():
    partial = R.copy()
    partial[1, 0] = partial[2, 1] = NAN
    np.testing.assert_array_equal(forgetting(partial), [0.5 - 0.25, NAN, NAN])
    assert backward_transfer(partial) == 0.25 - 0.5
    assert average_score(partial) == (0.25 + 1.0) / 2
    assert forward_transfer(partial, [0, 0, NAN]) == 0.25


def test_tasks_only_watched_are_not_forgotten_but_count_in_the_average():
    watched = [[0.5, 0.1, 0.3], [0.4, 0.6, 0.2]]
    np.testing.assert_array_equal(forgetting(watched), [0.5 - 0.4, NAN, NAN])
    assert average_score(watched) == pytest.approx(0.4)
    assert forward_transfer(watched, [0, 0, 0]) == pytest.approx((0.1 + 0.2) / 2)


@pytest.mark.filterwarnings("error")
def test_one_stage_has_nothing_to_forget_and_says_so_without_a_warning():
    assert math.isnan(backward_transfer([[0.5]]))
    assert math.isnan(forward_transfer([[0.5]], [0.1]))
    np.testing.assert_array_equal(forgetting([[0.5]]), [NAN])
    assert average_score([[0.5]]) == 0.5
    assert math.isnan(average_score([[NAN]]))


def test_input_is_not_altered():
    before = R.copy()
    forgetting(R)
    backward_transfer(R)
    np.testing.assert_array_equal(R, before)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: forgetting([0.5, 0.5]), r"R must be a matrix of stages × tasks .* found \(2,\)"),
        (lambda: average_score(np.ones((3, 2))), r"at most as many stages as tasks; found \(3, 2\)"),
        (lambda: average_score(np.ones((0, 2))), r"found \(0, 2\)"),
        (lambda: average_score([[math.inf]]), "R must hold finite scores, or NaN .* found infinity"),
        (lambda: forward_transfer(R, [0.1]), r"baseline must have shape \(3,\), one score a task; found \(1,\)"),
    ],
)
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_intransigence_counts_trained_tasks_with_a_reference():
    assert intransigence([[0.5, 0.1, 0.3], [0.4, 0.6, 0.2]], [0.75, NAN, 1.0]) == 0.25
    assert math.isnan(intransigence([[0.5]], [NAN]))
    with pytest.raises(ValueError, match="reference must have shape \\(3,\\), one score a task; found \\(2,\\)"):
        intransigence(R, [0.5, 0.5])
