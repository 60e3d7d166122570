"""A block of pixels as a data set: batches, order, workers, processes, fingerprints, and the steps on the device."""

import itertools
import multiprocessing
import pickle

import numpy as np
import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from PIL import Image
from torch.utils.data import DataLoader, Subset
from torchvision import transforms

from diffusion_lessons.engine.config import InputError
from diffusion_lessons.pictures.batches import ImageSet, make_dataloader, random_flip, to_model_range


def block(count: int = 20, size: int = 4) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 3, size, size), dtype=np.uint8)


def numbered(count: int = 20) -> ImageSet:
    """Picture i is filled with the number i."""
    return ImageSet(np.broadcast_to(np.arange(count, dtype=np.uint8)[:, None, None, None], (count, 3, 2, 2)).copy())


def numbers(batch: dict) -> list[int]:
    return batch["images"][:, 0, 0, 0].tolist()


@pytest.fixture
def mapped(tmp_path) -> ImageSet:
    block().tofile(tmp_path / "pixels.bin")
    return ImageSet(np.memmap(tmp_path / "pixels.bin", np.uint8, "r", shape=block().shape), names=["a"] * 20)


@pytest.mark.parametrize("kind", ["array", "tensor", "mapped"])
def test_one_picture_a_slice_a_batch(kind, mapped):
    images = {"array": ImageSet(block()), "tensor": ImageSet(torch.from_numpy(block())), "mapped": mapped}[kind]
    expected = torch.from_numpy(block())
    assert len(images) == 20 and images.nbytes == 20 * 3 * 16
    assert torch.equal(images[3]["images"], expected[3]) and torch.equal(images[-1]["images"], expected[-1])
    assert torch.equal(images[4:9:2]["images"], expected[4:9:2])
    assert torch.equal(images.__getitems__([5, 1, 1])["images"], expected[[5, 1, 1]])
    assert len(list(images)) == 20
    with pytest.raises(IndexError):
        images[20]
    images[0]["images"].zero_()
    images[:2]["images"].zero_()
    assert torch.equal(images[0]["images"], expected[0]), "what is handed out is a copy"


def test_the_fingerprint_is_that_of_the_pixels(mapped):
    assert ImageSet(block()).fingerprint == mapped.fingerprint == ImageSet(torch.from_numpy(block())).fingerprint
    changed = block()
    changed[7, 1, 2, 3] ^= 1
    assert len({ImageSet(pixels).fingerprint for pixels in (block(), changed, block()[::-1], block()[:-1])}) == 4


@pytest.mark.parametrize("wrong", [block().astype(np.float32), block()[0], block()[:, :1], torch.zeros(2, 3, 4, 4)])
def test_other_arrays_are_refused(wrong):
    with pytest.raises(InputError, match="uint8 with the shape"):
        ImageSet(wrong)


def test_to_device_in_place():
    images = ImageSet(block())
    before = images.fingerprint
    loader = make_dataloader(images, 4, shuffle=False)
    assert images.to("cpu") is images and isinstance(images.pixels, torch.Tensor)
    assert torch.equal(next(iter(loader))["images"], torch.from_numpy(block()[:4])) and images.fingerprint == before
    assert images.to("meta")[:3]["images"].device.type == "meta"


def test_repr_says_what_it_is(mapped):
    assert repr(ImageSet(block(), skipped=["x"])) == "ImageSet(20 pictures of 4 x 4 px, 0.0 MiB in memory, 1 skipped)"
    assert "mapped from a file" in repr(mapped) and "on cpu" in repr(ImageSet(block()).to("cpu"))


def test_a_mapped_set_is_pickled_by_name(mapped):
    content = pickle.dumps(mapped)
    assert len(content) < 1000
    copy = pickle.loads(content)
    assert isinstance(copy.pixels, np.memmap) and np.array_equal(copy.pixels, block())
    assert not copy.pixels.flags.writeable and copy.names == mapped.names


def test_an_epoch_holds_every_picture_once():
    loader = make_dataloader(numbered(), 6)
    batches = [numbers(batch) for batch in loader]
    assert [len(batch) for batch in batches] == [6, 6, 6, 2]
    assert sorted(itertools.chain(*batches)) == list(range(20))
    assert [numbers(batch) for batch in make_dataloader(numbered(), 20, shuffle=False)] == [list(range(20))]


def test_the_generator_draws_the_order():
    def order(seed):
        loader = make_dataloader(numbered(), 5, generator=torch.Generator().manual_seed(seed))
        return [numbers(batch) for _ in range(2) for batch in loader]

    assert order(0) == order(0) != order(1)
    assert order(0)[:4] != order(0)[4:]


@pytest.mark.parametrize("size", [0, 21])
def test_a_batch_that_the_set_cannot_fill(size):
    with pytest.raises(InputError, match=f"--train_batch_size {size}: the set has 20 pictures"):
        make_dataloader(numbered(), size)


def test_subsets_and_plain_samples_collate():
    loader = DataLoader(Subset(numbered(), [3, 1, 4]), batch_size=3, collate_fn=ImageSet.collate)
    assert numbers(next(iter(loader))) == [3, 1, 4]
    assert numbers(ImageSet.collate([numbered()[2], numbered()[7]])) == [2, 7]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_worker_processes(method, mapped):
    loader = DataLoader(mapped, 8, num_workers=1, collate_fn=ImageSet.collate,
                        multiprocessing_context=multiprocessing.get_context(method))  # fmt: skip
    assert torch.equal(torch.cat([batch["images"] for batch in loader]), torch.from_numpy(block()))


def test_accelerate_shares_the_pictures_out():
    seen = []
    for rank in range(2):
        torch.manual_seed(0)
        loader = make_dataloader(numbered(), 5, generator=torch.Generator().manual_seed(0))
        shard = prepare_data_loader(loader, num_processes=2, process_index=rank, put_on_device=False)
        seen.append([number for batch in shard for number in numbers(batch)])
    assert len(seen[0]) == len(seen[1]) == 10 and sorted(seen[0] + seen[1]) == list(range(20))


def test_model_range_is_the_tutorials_to_the_last_bit():
    image = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    steps = transforms.Compose([transforms.ToTensor(), transforms.Normalize([0.5], [0.5])])
    ours = to_model_range(torch.from_numpy(image).permute(2, 0, 1)[None], device="cpu")
    assert ours.dtype == torch.float32 and torch.equal(ours[0], steps(Image.fromarray(image)))
    assert torch.equal(((ours + 1) * 127.5).round().to(torch.uint8)[0].permute(1, 2, 0), torch.from_numpy(image))


def test_floats_pass_and_bytes_stay_as_they_were():
    floats = torch.randn(2, 3, 4, 4)
    assert to_model_range(floats) is floats
    pixels = torch.from_numpy(block())
    to_model_range(pixels)
    assert torch.equal(pixels, torch.from_numpy(block()))


def test_flips_are_drawn_per_picture_from_the_generator():
    images = torch.randn(4000, 1, 1, 3)
    flipped = random_flip(images, torch.Generator().manual_seed(0))
    mirrored = (flipped != images).flatten(1).any(1)
    assert torch.equal(flipped[mirrored], images[mirrored].flip(-1))
    assert torch.equal(flipped[~mirrored], images[~mirrored])
    assert abs(mirrored.float().mean() - 0.5) < 4 * 0.008
    torch.manual_seed(5)  # the global state must not matter
    assert torch.equal(random_flip(images, torch.Generator().manual_seed(0)), flipped)
    state = torch.get_rng_state()
    random_flip(images, torch.Generator().manual_seed(0))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(random_flip(images, torch.Generator(), probability=0.0), images)
    assert torch.equal(random_flip(images, torch.Generator(), probability=1.0), images.flip(-1))


def test_flips_keep_bytes_bytes():
    pixels = torch.from_numpy(block())
    assert random_flip(pixels, torch.Generator().manual_seed(0)).dtype == torch.uint8
