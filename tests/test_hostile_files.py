"""Files that are damaged, huge or not data give one line with the remedy, and take no memory."""

import os
import pickle
import struct
import zipfile

import numpy as np
import pytest
import torch
from torch import nn

from fgtrain.data import InMemoryDataModule, Text, TorchvisionImages
from fgtrain.errors import CheckpointError, ConfigError, DataError, StorageError
from fgtrain.lightning.atomic_files import write_atomically
from fgtrain.lightning.checkpoints import read_checked
from fgtrain.models import FineTuned
from fgtrain.runs.provenance import load_config
from fgtrain.runs.results import read_results
from tests.commands import results_under, train
from tests.idx_files import write_idx

IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"


@pytest.fixture
def raw(tmp_path):
    """The folder with the four files of a small MNIST."""
    folder = tmp_path / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for prefix, size in (("train", 40), ("t10k", 20)):
        write_idx(folder / f"{prefix}-images-idx3-ubyte", np.zeros((size, 28, 28)))
        write_idx(folder / f"{prefix}-labels-idx1-ubyte", np.arange(size) % 10)
    return folder


def idx(shape, body=b"", magic=None):
    return struct.pack(f">{1 + len(shape)}I", 0x800 + len(shape) if magic is None else magic, *shape) + body


def run(folder, *overrides):
    return train(folder, "trainer.max_steps=2", "trainer.val_check_interval=2", "quiet=true", *overrides)


def refusal(folder, *overrides):
    """The one line that a run ends in."""
    status, out, err = run(folder, *overrides)
    assert (status, out, len(err.splitlines())) == (2, "", 1), err
    assert not results_under(folder)
    return err


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        (IMAGES, b"", "is empty"),
        (LABELS, b"", "is empty"),
        (IMAGES, b"\0\0\x08", "is not an unpacked idx file of 3 dimensions"),
        (IMAGES, b"\x1f\x8b" + bytes(500), "is not an unpacked idx file of 3 dimensions"),
        (LABELS, b"garbage" * 50, "is not an unpacked idx file of 1 dimensions"),
        (IMAGES, idx((40, 28, 28), bytes(40 * 28 * 28), magic=0xD03), "is not an unpacked idx file"),
        (IMAGES, idx((2**31, 2**31, 2**31)), r"shape \(2147483648, 2147483648\); they should be \(28, 28\)"),
        (IMAGES, idx((2**31, 28, 28), bytes(784)), r"has 800 bytes; the 2147483648 examples .* take 1683627180048"),
        (LABELS, idx((40,), bytes(39)), "has 47 bytes; the 40 examples that its header declares take 48"),
        ("t10k-images-idx3-ubyte", idx((20, 28, 28), bytes(20 * 784 + 1)), "has 15697 bytes; the 20 examples"),
        ("t10k-labels-idx1-ubyte", idx((0,)), "holds no examples"),
        (LABELS, idx((39,), bytes(39)), r"do not match: \(40, 1, 28, 28\) torch.uint8 and \(39,\)"),
    ],
)
def test_damaged_idx_files(name, content, reason, raw):
    (raw / name).write_bytes(content)
    data = TorchvisionImages("MNIST", str(raw.parents[1]), 8)
    with pytest.raises(DataError, match=rf"{reason}.*; put .* or name another folder with data.root=\.\.\.$"):
        data.prepare_data()


def test_a_file_larger_than_the_memory_is_not_read(raw, tmp_path):
    count = 10**9
    with (raw / IMAGES).open("wb") as file:
        file.write(idx((count, 28, 28)))
        file.truncate(16 + count * 784)  # of which the disk holds nothing
    assert "730 GiB; reading it takes 3 times as much memory" in refusal(
        tmp_path, "data=mnist", f"data.root={tmp_path}"
    )
    with (tmp_path / "text").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(
        DataError, match=r"1.02e\+03 GiB.*20 times as much memory.*; set data.path=\.\.\. to a text file"
    ):
        Text(4, str(tmp_path / "text"))


def test_torchvision_s_old_files_run_no_code(raw, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    (raw.parent / "processed").mkdir()
    for content in (pickle.dumps(Evil()), b"junk"):
        for name in ("training.pt", "test.pt"):
            (raw.parent / "processed" / name).write_bytes(content)
        with pytest.raises(DataError, match=r"cannot be downloaded, or is damaged \("):
            TorchvisionImages("MNIST", str(tmp_path), 8).prepare_data()
    assert not (tmp_path / "ran").exists()


def test_a_training_set_of_a_few_images_is_all_for_training(raw, tmp_path):
    write_idx(raw / IMAGES, np.zeros((5, 28, 28)))
    write_idx(raw / LABELS, np.arange(5))
    data = TorchvisionImages("MNIST", str(tmp_path), 8)
    data.setup("fit")
    assert [len(labels) for labels in (data._splits["train"][1], data._splits["val"][1])] == [5, 0]


@pytest.mark.parametrize("split", ["train", "val", "test"])
@pytest.mark.parametrize(
    ("inputs", "labels", "reason"),
    [
        (
            torch.zeros(4, 3),
            torch.tensor([0, 1, 2, 99]),
            "labels of the SPLIT split run from 0 to 99; they must be from 0 to 2, for num_classes=3",
        ),
        (torch.zeros(4, 3), torch.tensor([0, 1, 2, -1]), "run from -1 to 2"),
        (torch.zeros(4, 3), torch.zeros(5).long(), "the SPLIT split has 4 inputs and 5 labels"),
        (
            torch.zeros(4, 2),
            torch.zeros(4).long(),
            r"SPLIT split have the shape \(2,\), but input_shape of the data is \(3,\)",
        ),
    ],
)
def test_every_split_is_what_the_data_says(split, inputs, labels, reason):
    class Mine(InMemoryDataModule):
        input_shape, num_classes = (3,), 3

        def load(self):
            sound = (torch.zeros(4, 3), torch.tensor([0, 1, 2, 0]))
            splits = dict.fromkeys(("train", "val", "test"), sound)
            return splits | {split: (inputs, labels)}, torch.Tensor.float

    with pytest.raises(DataError, match=reason.replace("SPLIT", split)):
        Mine(2).setup("fit")


def text(folder, content, **options):
    (folder / "file.txt").write_bytes(content)
    return Text(4, str(folder / "file.txt"), **options)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", r"file.txt is empty; set data.path=\.\.\. to a text file"),
        (b"short", "has 5 tokens, too few for windows of 64"),
        (b"\xff\xfe" + bytes(1000), "is not UTF-8 text"),
        (b"hello\xc3(" * 200, "is not UTF-8 text"),
    ],
)
def test_what_is_no_text(content, reason, tmp_path):
    with pytest.raises(DataError, match=reason):
        text(tmp_path, content)


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for path in (tmp_path / "pipe", "/dev/zero"):
        assert "is a pipe or a device; copy its content into a file" in refusal(
            tmp_path, "data=text", "task=language_modeling", "model=lstm", f"data.path={path}"
        )
    for path in (tmp_path, tmp_path / "loop", "x" * 5000, "a\0b"):
        with pytest.raises(DataError, match=r"cannot be read \(.*\); give a text file"):
            Text(4, str(path))


@pytest.mark.parametrize("content", ["\0" * 700, "one line " * 100, "a\r\nb\U0001f600" * 200, "\ufeff\0\x7f" * 300])
def test_odd_texts_are_texts(content, tmp_path):
    data = text(tmp_path, content.encode())
    assert data.vocab == sorted(set(content))
    assert "".join(data.vocab[token] for token in data._tokens) == content


def test_a_long_line_takes_memory_in_proportion(tmp_path):
    import tracemalloc

    tracemalloc.start()
    data = text(tmp_path, b"hello worl" * 10**6)
    taken = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(data._tokens) == 10**7
    assert taken <= 20 * 10**7


@pytest.mark.parametrize(
    "content", [3, [torch.zeros(2)], {1: torch.zeros(2)}, {"state_dict": [1]}, {"weight": 3, "bias": 4}]
)
def test_weights_without_names(content, tmp_path):
    torch.save(content, tmp_path / "weights.pt")
    with pytest.raises(DataError, match=r"holds no named weights; give the checkpoint of a run|of another network"):
        FineTuned(lambda: nn.Linear(3, 2), weights=str(tmp_path / "weights.pt"))


def test_a_checkpoint_that_unpacks_to_more_than_it_has(tmp_path):
    with zipfile.ZipFile(tmp_path / "bomb.ckpt", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("archive/data.pkl", bytes(2**24))
    with pytest.raises(CheckpointError, match=r"unpacks to more bytes than it has"):
        read_checked(tmp_path / "bomb.ckpt")


def test_a_checkpoint_that_is_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "last.ckpt")
    with pytest.raises(CheckpointError, match=r"is not a checkpoint but a pipe or a device"):
        read_checked(tmp_path / "last.ckpt")


def test_configuration_and_results_that_grow_when_read(tmp_path):
    (tmp_path / "config.yaml").write_text("a: &a [1, 1]\nb: &b [*a, *a]\n")
    with pytest.raises(ConfigError, match=r"it has YAML aliases"):
        load_config(tmp_path)
    (tmp_path / "results.json").write_text("[" * 100_000)
    with pytest.raises(ConfigError, match=r"results.json cannot be read"):
        read_results(tmp_path)


@pytest.mark.parametrize("place", ["file", "file/below", "x" * 300])
def test_a_place_that_cannot_be_a_folder(place, tmp_path):
    (tmp_path / "file").write_text("")
    assert "cannot write" in refusal(tmp_path, f"hydra.run.dir={place}")
    with pytest.raises(StorageError, match=r"cannot write"):
        write_atomically("text", tmp_path)
