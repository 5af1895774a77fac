"""Per-unit gradient clipping in one backward pass.

While autograd runs backward once for a microbatch, each adapted layer hands a recorder what the
gradients of its trained factors are products of. The recorder multiplies for every row and adds the
rows of a unit: the work of an ordinary batch gradient, only not yet summed over units
(book-keeping: Bu et al. 2022, arXiv:2210.00038). Parameters enter detached, so nothing but a
recorder ever holds a gradient. Norms are taken in float32 on the very tensors that are summed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Final, Protocol

import torch
from torch import Tensor
from torch.autograd import Function

from llmos.engines.dp.kernels import Context, Scratch, apply, gate_gradients, gated, product_dtype
from llmos.errors import SelfTestFailed
from llmos.models.lora import LoraAdapter, LoRALinear, Parametrisation

_SAFETY: Final = 1 - 2.0**-20  # keeps a clipped unit's norm below the bound after float32 rounding

# A trained factor's gradient as left (R, T, m) and right (R, T, n): each row's is left^T right.
Gradient = tuple[Tensor, Tensor]


class Recorder(Protocol):
    """What an adapted layer hands its part of the gradient to during backward."""

    def record(self, layer: LoRALinear, gradients: Sequence[Gradient]) -> None:
        """Take the gradients of a layer's trained factors, valid during the call alone."""
        ...


class _RecordedProduct(Function):
    """An adapted layer's product whose backward records instead of filling `.grad`.

    With two inputs, gate and up, the layer multiplies silu(gate) * up, which is computed again in
    backward rather than kept.
    """

    @staticmethod
    def forward(
        ctx: Context, root: Tensor, layer: LoRALinear, product: RecordedProduct, *inputs: Tensor
    ) -> Tensor:
        del root  # requires grad, so that backward reaches the layer though its input may not
        x = _input(inputs)
        wide, scratch = product_dtype(x), product.scratch
        rows = scratch.widen("x", x, wide).flatten(0, 1)  # (R * T, in)
        u = rows @ layer.lora_a.to(wide).T  # (R * T, rank)
        y = scratch.product("y", rows, scratch.widen("w", layer.weight, wide).T, x.dtype)
        v = u if layer.core is None else u @ layer.core.to(wide).T
        y.addmm_(v, layer.lora_b.to(wide).T, alpha=layer.scaling)  # (R * T, out)
        if layer.bias is not None:
            y.add_(layer.bias)
        ctx.save_for_backward(u.view(*x.shape[:-1], -1), *inputs)
        ctx.layer, ctx.product = layer, product
        return y.to(x.dtype).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Context, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        u, *inputs = ctx.saved_tensors
        layer: LoRALinear = ctx.layer
        product: RecordedProduct = ctx.product
        wide, scratch = u.dtype, product.scratch
        g = scratch.widen("y", gradients[0], wide)  # (R, T, out)
        gv = (g @ layer.lora_b.to(wide)).mul_(layer.scaling)  # (R, T, rank)
        gu = gv if layer.core is None else gv @ layer.core.to(wide)
        match layer.parametrisation:
            case Parametrisation.LORA:
                x = scratch.widen("x", _input(inputs), wide)
                product.recorder.record(layer, [(gu, x), (g, u * layer.scaling)])
            case Parametrisation.FFA:
                product.recorder.record(layer, [(g, u * layer.scaling)])
            case Parametrisation.SB:
                product.recorder.record(layer, [(gv, u)])
        if not any(ctx.needs_input_grad[3:]):
            return (None,) * (3 + len(inputs))
        weight = scratch.widen("w", layer.weight, wide)
        narrow = inputs[0].dtype
        dx = scratch.product("x", g.flatten(0, 1), weight, narrow)  # (R * T, in)
        dx.addmm_(gu.flatten(0, 1), layer.lora_a.to(wide))
        dx = dx.to(narrow).view(inputs[0].shape)
        return None, None, None, *((dx,) if len(inputs) == 1 else gate_gradients(dx, *inputs))


def _input(inputs: Sequence[Tensor]) -> Tensor:
    """Return what the layer multiplies: x, or silu(gate) * up of two inputs."""
    if len(inputs) == 1:
        return inputs[0]
    gate, up = inputs
    return gated(gate, up)


@dataclass(frozen=True, slots=True, eq=False)
class RecordedProduct:
    """The `Product` that lets adapted layers record."""

    recorder: Recorder
    scratch: Scratch
    root: Tensor = field(default_factory=lambda: torch.zeros((), requires_grad=True))

    def __call__(self, layer: LoRALinear, *inputs: Tensor) -> Tensor:
        """Multiply x (R, T, in), or silu(gate) * up of the same shape."""
        result: Tensor = apply(_RecordedProduct, self.root, layer, self, *inputs)
        return result


class _Layout:
    """Where each layer's trained factors lie in a vector (P,), and which layers have recorded."""

    def __init__(self, adapter: LoraAdapter) -> None:
        self.names = {layer: name for name, layer in adapter.layers.items()}
        self.records = dict.fromkeys(self.names, 0)
        self.spans: dict[LoRALinear, list[slice]] = {}
        start = 0
        for layer in self.names:
            ends = list(accumulate((p.numel() for p in layer.trained), initial=start))
            self.spans[layer] = [slice(*span) for span in pairwise(ends)]
            start = ends[-1]

    def check(self) -> None:
        """Refuse a pass in which a layer took part never or more than once."""
        wrong = [self.names[layer] for layer, times in self.records.items() if times != 1]
        if wrong:
            raise SelfTestFailed(
                f"{len(wrong)} adapted layers were not used exactly once, first {wrong[0]}",
                hint="this architecture skips or repeats layers; adapt others with `targets`",
            )


@dataclass(frozen=True, slots=True, eq=False)
class ClippedUnits:
    """What clipping did to each unit of one microbatch."""

    norms: Tensor  # (U,) before clipping
    coefficients: Tensor  # (U,) 0 for a unit whose gradient is not finite


class UnitGradients:
    """Records one microbatch's gradients by unit, then adds their clipped sum to a total."""

    def __init__(self, adapter: LoraAdapter, unit_of_row: Tensor, units: int) -> None:
        """Expect rows (R,) that belong to the units 0 <= unit_of_row < units."""
        self._layout = _Layout(adapter)
        self._unit_of_row = unit_of_row
        self._units = units
        self._squares = torch.zeros(units, dtype=torch.float64, device=unit_of_row.device)
        self._gradients: list[tuple[slice, Tensor]] = []

    def record(self, layer: LoRALinear, gradients: Sequence[Gradient]) -> None:
        """Keep a layer's gradients, one for each unit, and add to the units' squared norms."""
        for span, (left, right) in zip(self._layout.spans[layer], gradients, strict=True):
            self._keep(span, torch.bmm(left.mT, right))
        self._layout.records[layer] += 1

    def add_clipped(self, total: Tensor, clip_norm: float) -> ClippedUnits:
        """Scale each unit's gradient to at most `clip_norm` and add all to `total` (P,).

        A unit whose gradient or norm is not finite adds nothing: one NaN would otherwise void the
        sum and with it the bound on what a unit can do.

        Raises:
            SelfTestFailed: an adapted layer has not recorded exactly once.
        """
        self._layout.check()
        norms = self._squares.sqrt()
        finite = norms.isfinite()
        coefficients = (clip_norm / norms).clamp_(max=1.0).mul_(_SAFETY)
        coefficients = torch.where(finite, coefficients, 0.0).to(total.dtype)
        whole = bool(finite.all())
        for span, gradient in self._gradients:
            rows = gradient if whole else gradient[finite]
            used = coefficients if whole else coefficients[finite]
            total[span].addmv_(rows.T, used)
        self._gradients.clear()
        return ClippedUnits(norms, coefficients)

    def matrix(self) -> Tensor:
        """Return the unclipped gradients (U, P), for checks on a few rows."""
        self._layout.check()
        size = max(span.stop for span, _ in self._gradients)
        result = torch.zeros(self._units, size, device=self._squares.device)
        for span, gradient in self._gradients:
            result[:, span] = gradient.to(result.dtype)
        return result

    def _keep(self, span: slice, rows: Tensor) -> None:
        """Add the rows (R, m, n) of each unit and keep them as (U, m * n) in float32."""
        flat = rows.flatten(1).float()
        if len(flat) != self._units:
            summed = flat.new_zeros(self._units, flat.shape[1])
            flat = summed.index_add_(0, self._unit_of_row, flat)
        self._squares += torch.linalg.vector_norm(flat, dim=1).double().square()
        self._gradients.append((span, flat))


class SummedGradients:
    """Records the plain sum over rows: the same pass without privacy."""

    def __init__(self, adapter: LoraAdapter, total: Tensor) -> None:
        """Add everything to `total` (P,)."""
        self._layout = _Layout(adapter)
        self._total = total

    def record(self, layer: LoRALinear, gradients: Sequence[Gradient]) -> None:
        """Add a layer's gradient to the total."""
        for span, (left, right) in zip(self._layout.spans[layer], gradients, strict=True):
            self._total[span] += (left.flatten(0, 1).T @ right.flatten(0, 1)).flatten()
        self._layout.records[layer] += 1

    def check(self) -> None:
        """Refuse a pass in which a layer took part never or more than once."""
        self._layout.check()
