"""Orthogonal matrices that spread what one channel holds over all: Hadamard's, of many orders, and random ones."""

from __future__ import annotations

import torch
from torch import Tensor


def hadamard(order: int) -> Tensor | None:
    """A Hadamard matrix: entries 1 and -1, rows orthogonal to each other; float64 [order, order].

    Sylvester's doubling of the smallest that Paley's constructions give (1933): of order p + 1 for a prime
    p = 3 (mod 4), and of order 2 (p + 1) for a prime p = 1 (mod 4). That covers 576 = 16 x 36, 768 = 64 x 12,
    896 = 32 x 28, 960 = 16 x 60, 5120 = 256 x 20. None where they give none.
    """
    if order in (1, 2):
        return torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)[:order, :order]
    if order % 4:
        return None
    half = hadamard(order // 2)
    if half is not None:
        return torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), half)
    if _is_prime(order - 1):
        return torch.eye(order, dtype=torch.float64) + _conference(order - 1)
    if _is_prime(order // 2 - 1):
        conference = _conference(order // 2 - 1)
        one = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
        other = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
        return torch.kron(conference, one) + torch.kron(torch.eye(order // 2, dtype=torch.float64), other)
    return None


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, int(number**0.5) + 1))


def _conference(prime: int) -> Tensor:
    """Paley's conference matrix of order `prime` + 1: quadratic residues of i - j, bordered by ones; zero diagonal."""
    residues = {number * number % prime for number in range(1, prime)}
    character = torch.tensor([0.0, *(1.0 if n in residues else -1.0 for n in range(1, prime))], dtype=torch.float64)
    at = torch.arange(prime)
    matrix = torch.zeros(prime + 1, prime + 1, dtype=torch.float64)
    matrix[0, 1:] = 1
    matrix[1:, 0] = 1 if prime % 4 == 1 else -1
    matrix[1:, 1:] = character[(at[:, None] - at) % prime]
    return matrix


def rotation(order: int) -> Tensor:
    """An orthogonal matrix, float64 [order, order], whose every entry is small.

    A Hadamard matrix with columns of random sign, over the root of its order (QuaRot, arXiv 2404.00456, section 3);
    where `hadamard` has none, a random orthogonal one (as SpinQuant starts from, 2405.16406).
    """
    generator = torch.Generator().manual_seed(0)
    known = hadamard(order)
    if known is None:
        return _random_orthogonal(order, generator)
    signs = torch.randint(0, 2, (order, 1), generator=generator, dtype=torch.float64) * 2 - 1
    return signs * known / order**0.5


def mean_keeping_rotation(order: int) -> Tensor:
    """A random orthogonal matrix Q with Q 1 = 1, float64: a vector's mean and variance stay, so LayerNorm without
    weight and bias commutes with it.

    Q = U diag(1, R) U^T, where U reflects the first axis onto 1 / sqrt(order) and R is random in what is orthogonal.
    """
    generator = torch.Generator().manual_seed(0)
    turned = torch.eye(order, dtype=torch.float64)
    turned[1:, 1:] = _random_orthogonal(order - 1, generator)
    normal = torch.full((order,), -(order**-0.5), dtype=torch.float64)
    normal[0] += 1
    length = normal.norm()
    if length == 0:
        return turned
    reflection = torch.eye(order, dtype=torch.float64) - 2 * torch.outer(normal / length, normal / length)
    return reflection @ turned @ reflection


def _random_orthogonal(order: int, generator: torch.Generator) -> Tensor:
    """Uniform over the orthogonal group: QR of a Gaussian matrix, the signs of R's diagonal taken into Q."""
    q, r = torch.linalg.qr(torch.randn(order, order, generator=generator, dtype=torch.float64))
    return q * r.diagonal().sign()
