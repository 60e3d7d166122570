"""Batches for the tests of noise and targets: the same shapes, pictures and noise for all of them."""
import torch

SHAPES = {"pictures": (6, 3, 8, 8), "latents": (6, 4, 5, 7), "vectors": (6, 9)}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batch(shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Clean values in [-1, 1], noise of that shape, and six timesteps, both ends among them."""
    clean = torch.rand(shape, generator=generator(1)) * 2 - 1
    noise = torch.randn(shape, generator=generator(2))
    return clean, noise, torch.tensor([0, 1, 50, 400, 998, 999])
