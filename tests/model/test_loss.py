"""The loss at supervised positions, by hand, and where there are none."""

from __future__ import annotations

import math

import pytest
import torch

from llava.constants import IGNORE_INDEX
from llava.model.loss import share_of_batch, supervised_loss
from llava.train.evaluation import EvaluationMeter

VOCABULARY = 7


@pytest.fixture
def head() -> torch.nn.Linear:
    torch.manual_seed(0)
    return torch.nn.Linear(4, VOCABULARY)


def test_the_mean_over_the_predicted_tokens_by_hand(head) -> None:
    hidden = torch.randn(2, 4, 4)
    labels = torch.tensor([[5, IGNORE_INDEX, 3, 1], [2, 6, IGNORE_INDEX, IGNORE_INDEX]])
    scores = head(hidden).log_softmax(-1)
    # The label of position t + 1 is predicted at t; the first one of a row by nothing.
    terms = [-scores[0, 1, 3], -scores[0, 2, 1], -scores[1, 0, 6]]
    torch.testing.assert_close(supervised_loss(hidden, labels, head), sum(terms) / 3)
    for items in (5, torch.tensor(5)):
        torch.testing.assert_close(supervised_loss(hidden, labels, head, items), sum(terms) / 5)
    assert share_of_batch(labels, None) == 1.0
    assert float(share_of_batch(labels, 12)) == 0.25


@pytest.mark.parametrize("labels", [torch.full((2, 4), IGNORE_INDEX), torch.tensor([[3, IGNORE_INDEX]] * 2)])
@pytest.mark.parametrize("items", [None, 0, torch.tensor(0), 9])
def test_a_batch_that_predicts_nothing_has_a_loss_of_zero_and_no_gradient(head, labels, items) -> None:
    """Not nan: it would poison the step's other micro-batches."""
    hidden = torch.randn(*labels.shape, 4, requires_grad=True)
    loss = supervised_loss(hidden, labels, head, items)
    loss.backward()
    assert loss.item() == 0.0
    assert not hidden.grad.any()
    assert not head.weight.grad.any()
    assert items is None or float(share_of_batch(labels, items)) == 0.0


def test_an_evaluation_counts_tokens_not_batches() -> None:
    meter = EvaluationMeter()
    assert math.isnan(meter.mean_loss())
    nothing = {"labels": torch.full((2, 3), IGNORE_INDEX)}
    meter.add(nothing, torch.tensor(0.0))
    assert math.isnan(meter.mean_loss()), "nothing was predicted: there is no mean, least of all a perfect zero"
    meter.add({"labels": torch.tensor([[1, 2, 3]])}, torch.tensor(2.0))
    meter.add(nothing, torch.tensor(0.0))
    meter.add({"labels": torch.tensor([[9, 9, 9, 9, IGNORE_INDEX]])}, torch.tensor(7.0))
    assert meter.mean_loss() == pytest.approx((2 * 2.0 + 3 * 7.0) / 5)
