import pytest
import torch

from fgtrain.data import Digits, Steps, TensorLoader, TorchvisionImages
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
