"""Compressed gradients and local steps: what they send, and how far they are from the mean of all gradients."""

import pytest
import torch

from tests import exchange_jobs
from tests.commands import train
from tests.exchange_jobs import CALLS, gradients_of
from tests.rank_jobs import STEPS, start

NUMBERS = 24 * 30 + 24
MEAN = {name: (a + b) / 2 for (name, a), b in zip(gradients_of(0).items(), gradients_of(1).values(), strict=True)}


@pytest.fixture(scope="module")
def exchanged(tmp_path_factory):
    return start(2, exchange_jobs.exchanged, tmp_path_factory.mktemp("exchanged"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return start(2, exchange_jobs.trained, tmp_path_factory.mktemp("trained"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fp16", "power_sgd"])
def test_ranks_get_the_same_gradients(exchanged, name):
    for one, other in zip(*(found[name][0] for found in exchanged), strict=True):
        for key, g in one.items():
            torch.testing.assert_close(g, other[key], rtol=0, atol=0)


@pytest.mark.slow
def test_half_precision_is_the_mean_to_its_rounding_in_half_the_bytes(exchanged):
    calls, sent = exchanged[0]["fp16"]
    for name, expected in MEAN.items():
        error = (calls[-1][name] - expected).abs().max() / expected.abs().max()
        assert 0 < error < 2**-10, "no hook ran" if error == 0 else name
    assert sent == [2 * NUMBERS * (i + 1) for i in range(CALLS)]


@pytest.mark.slow
def test_power_sgd_sends_two_thin_matrices_and_forgets_nothing(exchanged):
    """With error feedback, the sum of what it returns follows the sum of the gradients."""
    calls, sent = exchanged[0]["power_sgd"]
    steps = [late - early for early, late in zip([0, *sent], sent, strict=False)]
    assert steps[:2] == [4 * NUMBERS] * 2
    assert set(steps[2:]) == {4 * (2 * (24 + 30) + 24)}
    first, late = (torch.linalg.matrix_rank(calls[i]["weight"], rtol=1e-4).item() for i in (0, -1))
    assert (first, late) == (12, 2)
    total = sum(call["weight"] for call in calls)
    single = (calls[2]["weight"] - MEAN["weight"]).norm()
    assert (total - CALLS * MEAN["weight"]).norm() < 0.2 * CALLS * single


@pytest.mark.slow
def test_only_finite_exact_gradients_are_taken(exchanged):
    for found in exchanged:
        assert found["untouched"]
        assert found["refused"].startswith("distributed.gradients=fp16 is for exact gradients")
        assert "no rank can skip a step alone" in found["not finite"]


@pytest.mark.slow
def test_local_steps_of_one_are_steps_along_the_mean(trained):
    (mean, sent), (local, sent_local) = (trained[0][key] for key in (("mean", 1), ("local", 1)))
    for name, p in mean.items():
        torch.testing.assert_close(local[name], p, rtol=0, atol=1e-12)
    assert sent_local == sent


@pytest.mark.slow
def test_local_steps_send_less_and_end_with_equal_weights(trained):
    (one, sent), (other, _) = (found["local", 3] for found in trained)
    assert all(torch.equal(p, other[name]) for name, p in one.items())
    assert any(not torch.allclose(p, trained[0]["mean", 1][0][name]) for name, p in one.items())
    assert sent == pytest.approx(trained[0]["mean", 1][1] / 3)
    assert STEPS % 3 == 0


@pytest.mark.slow
def test_training_in_half_precision_follows_the_mean(trained):
    """The gradients pass through the hook at every step, and the weights stay close."""
    (mean, sent), (half, sent_half) = (trained[0][key] for key in (("mean", 1), ("fp16", 1)))
    assert 0 < max((p - half[name]).abs().max().item() for name, p in mean.items()) < 1e-3
    assert sent_half == sent / 4  # of double precision


@pytest.mark.parametrize(
    ("argument", "told"),
    [
        ("distributed.gradients=half", "distributed.gradients must be one of mean, fp16, power_sgd, local, got 'half'"),
        ("distributed.local_steps=0", "distributed.local_steps must be at least 1, got 0"),
    ],
)
def test_a_bad_choice_is_one_line(tmp_path, argument, told):
    assert train(tmp_path, argument) == (2, "", f"fgtrain: {told}\n")
