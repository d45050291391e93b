"""Streams of chunks: what they hold, where they end, and resumed runs."""

import itertools
import math

import pytest
import torch
from torch import nn

from fgtrain.data import Recall, SeriesStream, TextStream
from fgtrain.errors import DataError
from fgtrain.lightning.checkpoints import read_checked
from fgtrain.tasks import Recall as RecallTask
from tests.commands import results_under, train

RECALL = ["task=recall", "method=forward_in_time", "model.width=4", "model.depth=2", "data.batch_size=3"]
RECALL += ["data.lag=9", "data.chunk=4", "trainer.val_check_interval=4", "optimizer=adam", "lr=0.01", "quiet=true"]
RECALL += ["scheduler=constant"]


def joined(chunks):
    return [torch.cat(parts, 1) for parts in zip(*chunks, strict=True)]


@pytest.mark.parametrize("chunk", [1, 7, 50])
def test_every_question_asks_for_the_symbol_of_lag_steps_before(chunk):
    data = Recall(4, chunk, lag=10, symbols=3)
    tokens, targets = joined(itertools.islice(data.train_dataloader(), 350 // chunk))
    rows, times = (targets >= 0).nonzero(as_tuple=True)
    assert len(rows) > 4 * 20
    assert (tokens[rows, times] == 4).all()
    assert torch.equal(targets[rows, times], tokens[rows, times - 10])
    assert (tokens[:, :10] == 4).any()  # a question for a symbol from before the beginning
    assert (targets[:, :10] < 0).all()
    shown = tokens < 3
    assert shown.sum(1).float().mean() == pytest.approx(350 / 13, abs=1)
    assert set(tokens[shown].tolist()) == {0, 1, 2}
    assert tokens[~shown & (tokens != 4)].eq(3).all()


def test_chunks_of_any_length_are_the_same_stream():
    first, second = (joined(itertools.islice(Recall(4, c).train_dataloader(), 600 // c)) for c in (1, 20))
    assert all(map(torch.equal, first, second))


def test_validation_has_other_symbols_and_a_question_in_every_sequence():
    data = Recall(4, lag=50)
    batches = [*data.val_dataloader(), *data.test_dataloader()]
    for tokens, targets in batches:
        assert tokens.shape == (4, 2 * data.period)
        assert (targets >= 0).any(1).all()
    (val, _), (test, _) = batches[0], batches[8]
    assert not torch.equal(val, test)
    assert not torch.equal(val, data.steps(0, 2 * data.period)[0])


def test_the_loss_is_the_mean_over_the_questions():
    class Known(nn.Module):
        def forward(self, tokens):
            return torch.arange(12.0).view(2, 3, 2)

    batch = torch.zeros(2, 3, dtype=torch.long), torch.tensor([[-1, 0, 1], [-1, -1, -1]])
    one, other = torch.tensor([1.0, -1.0]).exp().add(1).log()  # the logits differ by 1
    assert RecallTask().losses(Known(), batch).mean().item() == pytest.approx((one + other).item() / 2)
    assert RecallTask().metrics(Known(), batch)["acc"].tolist() == [0, 1]
    assert RecallTask().losses(Known(), (batch[0], batch[1].fill_(-1))).tolist() == [0, 0]


def test_pieces_of_a_text(tmp_path):
    text = "".join(f"{i:03d}-" for i in range(100))
    (tmp_path / "text.txt").write_text(text)
    data = TextStream(3, str(tmp_path / "text.txt"), chunk=10, context=8)
    tokens, following = joined(data.train_dataloader())
    assert tokens.shape == (3, 106)  # (320 - 1) // 3
    for i, (row, later) in enumerate(zip(tokens, following, strict=True)):
        assert "".join(data.vocab[t] for t in row) == text[106 * i : 106 * (i + 1)]
        assert "".join(data.vocab[t] for t in later) == text[106 * i + 1 : 106 * (i + 1) + 1]


def test_pieces_of_a_series(tmp_path):
    numbers = (torch.arange(400) * 37 % 101).double() / 7
    (tmp_path / "series.txt").write_text("\n".join(map(str, numbers.tolist())))
    data = SeriesStream(2, str(tmp_path / "series.txt"), levels=5, chunk=10, context=8)
    tokens, following = joined(data.train_dataloader())
    assert torch.equal(tokens[:, 1:], following[:, :-1])
    levels = tokens.flatten()  # the training part, but for the last of its 320 numbers
    assert set(levels.tolist()) == set(range(5))
    assert levels.bincount().tolist() == pytest.approx([64] * 5, abs=3)
    known = numbers[: len(levels)]
    for level in range(4):  # no number of a level is above one of the next
        assert known[levels == level].max() < known[levels == level + 1].min()


def test_the_series_that_comes_along():
    tokens, _ = joined(SeriesStream(4).train_dataloader())
    assert tokens.shape == (4, 1999)
    assert tokens.unique().tolist() == list(range(32))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("1.5\nlots\n", "must have one number in each line (could not convert string to float: b'lots')"),
        ("1\nnan\n", "holds nan or inf; remove or replace these numbers"),
        ("1\n2\n", "has 2 tokens, too few for windows of 64; set a smaller data.context"),
        ("", "is empty"),
    ],
)
def test_a_bad_series_is_one_line(content, message, tmp_path):
    (tmp_path / "series.txt").write_text(content)
    options = ["task=language_modeling", "data=series_stream", "model=diagonal_rnn", "method=forward_in_time"]
    status, out, err = train(tmp_path, *options, "data.path=series.txt")
    assert (status, out, err.count("\n")) == (2, "", 1), err
    assert message in err


def test_a_stream_that_ends_at_once_is_one_line(tmp_path):
    options = ["task=language_modeling", "data=text_stream", "model=diagonal_rnn", "method=forward_in_time"]
    status, out, err = train(tmp_path, *options, "data.batch_size=400")
    assert (status, out, err.count("\n")) == (2, "", 1), err
    assert (
        "the stream ends before its first chunk: 400 sequences of the text that comes with fgtrain have 11 tokens each"
        in err
    )
    with pytest.raises(DataError, match=r"set a smaller data\.chunk or data\.batch_size, or give a longer file"):
        TextStream(400)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["data.chunk=0"], "data: chunk must be at least 1, got 0"),
        (["data.lag=0"], "data: lag must be at least 1, got 0"),
        (["data.symbols=1"], "data: symbols must be at least 2, got 1"),
        (["model=lstm"], "LSTMLM has no DiagonalRecurrence"),
    ],
)
def test_a_bad_stream_is_one_line(options, message, tmp_path):
    status, out, err = train(tmp_path, *RECALL, *(["model=lstm"] if "lstm" in options[0] else options))
    assert (status, out, err.count("\n")) == (2, "", 1), err
    assert message in err


@pytest.mark.slow
def test_a_resumed_run_has_the_same_weights_state_and_traces(tmp_path):
    for folder, *others in (("straight",), ("resumed", "trainer.max_steps=5"), ("resumed", "resume=auto")):
        options = [*RECALL, "trainer.max_steps=11", f"hydra.run.dir={folder}", *others]
        status, _, err = train(tmp_path, *options)
        assert status == 0, err
    straight, resumed = (
        read_checked(tmp_path / name / "checkpoints" / "last.ckpt")["state_dict"] for name in ("straight", "resumed")
    )
    assert straight.keys() == resumed.keys()
    assert sum("traces" in name for name in straight) == 6
    for name, value in straight.items():
        assert torch.equal(value, resumed[name]), name


@pytest.mark.slow
def test_it_learns_the_text_and_to_recall(tmp_path):
    options = ["method=forward_in_time", "optimizer=adam", "lr=0.01", "quiet=true"]
    recall = ["task=recall", "data.lag=20", "data.symbols=2", "model.memory=10", "trainer.max_steps=1000"]
    text = ["task=language_modeling", "data=text_stream", "model=diagonal_rnn", "trainer.max_steps=500"]
    for command in (recall, text):
        assert train(tmp_path, *options, *command)[0] == 0
    found = {results["task"]: results["metrics"] for results in results_under(tmp_path)}
    assert found["recall"]["test/acc"] > 0.9
    assert found["language_modeling"]["test/loss"] < math.log(TextStream(1).vocab_size) - 0.3
