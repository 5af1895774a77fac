"""The subspace of a public weight in which an SB adapter trains: its top singular vectors.

Every site of a federation derives it by itself, so it must not depend on the machine: weights are
rounded to bfloat16, the least precise dtype in which a model is loaded, and the rest is float64 on
the CPU. What is left between machines is far below a float32 rounding as long as singular values
differ: in SmolLM2-135M the top 64 do by 3e-5 of the largest or more, and two algorithms agree on
their vectors to 3e-13 (measured).
"""

from __future__ import annotations

import math

import torch
from scipy.linalg import eigh
from torch import Tensor
from torch.nn.functional import normalize


def frozen_factors(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return A = c V^T (rank, in) and B = U (out, rank) in float64, for W (out, in) = U S V^T.

    With c^2 = out / (3 rank) one Adam step on R moves W as far (in Frobenius norm) as LoRA's first
    step on B does, whose A has rows of squared norm 1 / 3, and in random directions the gradients
    have the same norm: one learning rate and one clipping bound suit both. LoRA-XS takes A = S V^T
    (Balazy et al. 2024, arXiv:2405.17604); clipping would then weigh the directions by S, while the
    noise is the same in all.
    """
    u, v = top_subspace(weight, rank)
    return v.T.mul(math.sqrt(weight.shape[0] / (3 * rank))), u


def top_subspace(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return orthonormal U (out, rank) and V (in, rank) of the truncated SVD of W (out, in).

    The eigenvectors of the smaller Gram matrix are found several times faster than the SVD; that
    it squares the singular values costs no digits that matter at the top of the spectrum.
    """
    exact = weight.detach().cpu().bfloat16().double()
    tall = exact.shape[0] > exact.shape[1]
    short = exact.T if tall else exact  # (m, n) with m <= n
    size = len(short)
    gram = (short @ short.T).numpy()
    _, vectors = eigh(gram, subset_by_index=(size - rank, size - 1), check_finite=False)
    left = _signed(torch.from_numpy(vectors))  # (m, rank)
    right = normalize(short.T @ left, dim=0)  # (n, rank)
    return (right, left) if tall else (left, right)


def _signed(vectors: Tensor) -> Tensor:
    """Make each column's largest entry positive: an eigenvector's sign is an accident."""
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return vectors * largest.sign()
