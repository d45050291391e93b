"""Data of one's own: a CSV file, a folder of images."""

import os

import numpy as np
import pytest
import torch
from PIL import Image

from fgtrain.data import CsvTable, ImagesOfFolders
from fgtrain.errors import ConfigError, DataError
from tests.commands import results_under, train

SHORT = ("method=backprop", "trainer.max_steps=60", "trainer.val_check_interval=30", "quiet=true", "self_check=false")


def write_table(path, rows=60):
    """The class is whether the first column is positive."""
    numbers = np.random.default_rng(0).normal(size=(rows, 2))
    lines = [f"{x:.4f},{'up' if x > 0 else 'down'},{y:.4f}" for x, y in numbers]
    path.write_text("\n".join(["height,way,noise", *lines]) + "\n")


def test_table(tmp_path):
    write_table(tmp_path / "table.csv")
    data = CsvTable(str(tmp_path / "table.csv"), 8, label="way")
    assert (data.num_classes, data.input_shape) == (2, (2,))
    data.setup("fit")
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        for inputs, labels in loader:
            assert torch.equal(labels, (inputs[:, 0] > inputs[labels == 0, 0].max()).long())  # "down" is class 0
    status, _, err = train(tmp_path, "data=csv", "data.path=table.csv", "data.label=way", *SHORT)
    assert status == 0, err
    assert results_under(tmp_path)[0]["metrics"]["test/acc"] > 0.8


def test_a_table_as_spreadsheets_write_it(tmp_path):
    """With a mark at the start, carriage returns, and a line break in a quoted cell."""
    rows = "".join(f'"{"up" if i % 2 else "very{}down"}",{i}\r\n' for i in range(20)).replace("{}", "\n")
    (tmp_path / "table.csv").write_bytes(b"\xef\xbb\xbf" + f"way,height\r\n{rows}".encode())
    data = CsvTable(str(tmp_path / "table.csv"), 8, label="way")
    assert (data.num_classes, data.input_shape) == (2, (1,))


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "table.csv")
    with pytest.raises(DataError, match="is a pipe or a device"):
        CsvTable(str(tmp_path / "table.csv"), 8)


def test_images(tmp_path):
    for name, colour in (("dark", 20), ("light", 220)):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(10):
            Image.new("RGB", (12 + i, 9), (colour, colour, i)).save(tmp_path / "images" / name / f"{i}.png")
    data = ImagesOfFolders(str(tmp_path / "images"), 4, image_size=8)
    data.setup("fit")
    inputs, labels = next(iter(data.train_dataloader()))
    assert (data.num_classes, data.input_shape) == (2, tuple(inputs.shape[1:])) == (2, (3, 8, 8))
    assert torch.equal(labels, (inputs[:, 0, 0, 0] > 0).long())
    status, _, err = train(tmp_path, "data=image_folder", "data.path=images", "data.image_size=8", *SHORT)
    assert status == 0, err
    assert results_under(tmp_path)[0]["metrics"]["test/acc"] == 1


@pytest.mark.parametrize(
    ("text", "label", "error", "message"),
    [
        ("a,b\n1,x\n", "c", ConfigError, "has no column 'c'; it has a, b"),
        ("a,b\n1,x\n2\n", None, DataError, "line 3 has another number of columns"),
        ("a,b\n\n1,x\n\n2\n", None, DataError, "line 5 has another number of columns"),
        ("a,b\n", None, DataError, "needs rows"),
        ("", None, DataError, "is empty"),
        ("\n\n", None, DataError, "not a CSV file with a header"),
        ("a,b\nq,x\n", None, DataError, "row 1 has 'q' in the column 'a'; all columns but 'b' must hold"),
        ("a;b\n1;x\n", None, DataError, "with commas between them"),
        ("a,b\n1,x\n2, \n", None, DataError, "row 2 has nothing in the column 'b', .*; give it a class"),
        (
            "a,b,c\n1,x,2\n3,y,nan\n",
            "b",
            DataError,
            "row 2 has 'nan' in the column 'c'; all columns but 'b' must hold finite numbers",
        ),
        ("a,b\n1e39,x\n", None, DataError, "row 1 has '1e39' in the column 'a'"),
        ("a,b\n1,0\n2,1\n3,nan\n", None, DataError, "row 3 has b=nan; give it a class"),
        ("a,b\n1,x\n2, x\n", None, DataError, "one class only, x;"),
        (
            "a,b\n" + "1,x\n" * 30 + "1,y\n",
            None,
            DataError,
            "31 examples of 2 classes cannot be split .*: class y has only 1; give",
        ),
    ],
)
def test_bad_tables(text, label, error, message, tmp_path):
    (tmp_path / "table.csv").write_text(text)
    with pytest.raises(error, match=message):
        CsvTable(str(tmp_path / "table.csv"), 8, label=label).load()


def test_classes_that_are_numbers_are_the_same_if_their_values_are(tmp_path):
    """Long numbers count in all digits; a word among them makes all of them words."""

    def classes_of(*labels):
        (tmp_path / "table.csv").write_text("a,b\n" + "".join(f"{i},{label}\n" for i, label in enumerate(labels)))
        return CsvTable(str(tmp_path / "table.csv"), 8)._labels.tolist()

    assert classes_of("10", "1", "1.0", "2", "1e1") == [2, 0, 0, 1, 2]
    assert classes_of(str(10**20), str(10**20 + 1)) == [0, 1]
    assert classes_of("1", "1.0", "no") == [0, 1, 2]


def test_columns_of_any_size_keep_their_differences(tmp_path):
    """Seconds since 1970, which single precision rounds to two minutes; farads; one that is constant in training."""
    seconds = 1_700_000_000 + np.arange(200)
    rows = "".join(f"{t},{1e-12 * (t % 7)},{int(t == seconds[-1])},{t % 2}\n" for t in seconds)
    (tmp_path / "table.csv").write_text(f"time,capacity,rare,class\n{rows}")
    data = CsvTable(str(tmp_path / "table.csv"), 200)
    data.setup("fit")
    batches = [batch for split in ("train", "val", "test") for batch in getattr(data, f"{split}_dataloader")()]
    (train, _), inputs = batches[0], torch.cat([inputs for inputs, _ in batches])
    torch.testing.assert_close(train[:, :2].std(0), torch.ones(2))
    assert inputs.dtype == torch.float32
    assert len(inputs[:, 0].unique()) == 200
    assert inputs.abs().max() < 15


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_pixels_of_more_than_eight_bits_are_refused(mode, tmp_path):
    """Pillow cuts them off: all but the darkest would be white."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        Image.new(mode, (8, 8), 300).save(tmp_path / name / "1.tiff")
    with pytest.raises(DataError, match=r"a/1.tiff has pixels of more than eight bits; convert it to eight"):
        ImagesOfFolders(str(tmp_path), 8).load()


def test_hidden_files_and_folders_are_no_data(tmp_path):
    for name in ("a", "b", ".ipynb_checkpoints"):
        (tmp_path / name).mkdir()
        for i in range(10):
            Image.new("RGB", (8, 8)).save(tmp_path / name / f"{i}.png")
        (tmp_path / name / "._1.png").write_text("written beside images on a Mac")
    data = ImagesOfFolders(str(tmp_path), 4)
    data.setup("fit")
    assert (data.num_classes, sum(len(labels) for _, labels in data._splits.values())) == (2, 20)


def test_what_is_no_image_is_left_out_with_a_word(tmp_path, capsys):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(10):
            Image.new("RGB", (8, 8), (i, 0, 255)).save(tmp_path / name / f"{i}.{'gif' if i % 2 else 'PNG'}")
        (tmp_path / name / "labels.txt").touch()
    for _ in range(2):
        data = ImagesOfFolders(str(tmp_path), 4)
        data.setup("fit")
        assert sum(len(labels) for _, labels in data._splits.values()) == 20
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith(f"fgtrain: left out of {tmp_path}: 2 files that are not images (.jpg, ")
    assert err.endswith(f".gif), such as {tmp_path}/a/labels.txt\n")


@pytest.mark.parametrize("content", [b"P6 4 x 255\n", b"P6 60000 60000 255\n", b"P6", b""])
def test_damaged_images_are_named(content, tmp_path):
    """Pillow raises ValueError for the first and DecompressionBombError for the second."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.ppm").write_bytes(content)
    with pytest.raises(DataError, match=r"a/1.ppm cannot be read as an image"):
        ImagesOfFolders(str(tmp_path), 8).load()


@pytest.mark.slow
def test_bad_paths(tmp_path):
    for data in ("csv", "image_folder"):
        assert train(tmp_path, f"data={data}", *SHORT)[2].startswith("fgtrain: data: data.path is not set")
        assert "does not exist" in train(tmp_path, f"data={data}", "data.path=nowhere", *SHORT)[2]
    with pytest.raises(DataError, match=r"must hold a folder of images \(\.jpg, .*\) for every class"):
        ImagesOfFolders(str(tmp_path), 8)
    (tmp_path / "photos" / "cats").mkdir(parents=True)
    (tmp_path / "photos" / "cats" / "1.png").write_text("no image")
    with pytest.raises(DataError, match="cannot be read as an image"):
        ImagesOfFolders(str(tmp_path / "photos"), 8).setup("fit")
