"""Multiplication and fused operations of frozen layers: less memory, and fast on any CPU.

A `Fusion` exchanges the forward of layers that it recognises for the time of a block. A layer is
recognised by its parts and then by its behaviour: if the fused operation does not reproduce the
layer on a random input, the layer is left alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn.functional import linear, silu

from llmos.models.devices import emulates_bfloat16
from llmos.models.lora import LoRALinear, plain_product

Context = Any  # autograd's own context object has no useful type
Forward = Callable[[Tensor], Tensor]
_MLP_PARTS: Final = {"gate_proj", "up_proj", "down_proj", "act_fn"}
_PROBE_TOLERANCE: Final = 1e-2  # of bfloat16, two roundings


def apply(function: type[Function], *inputs: object) -> Any:  # noqa: ANN401 - tensor or tuple
    """Call an autograd function."""
    return function.apply(*inputs)  # type: ignore[no-untyped-call]


def product_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which to multiply `x`: its own, or float32 where that is faster."""
    if x.dtype == torch.bfloat16 and x.device.type == "cpu" and emulates_bfloat16():
        return torch.float32
    return x.dtype


class Scratch:
    """Reused memory for widened copies; fresh ones each time would leave the heap full of holes.

    What lies under a name is valid until the name is used again.
    """

    def __init__(self) -> None:
        """Start without memory; it grows to the largest size asked for."""
        self._buffers: dict[str, Tensor] = {}

    def widen(self, name: str, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Return `x` in `dtype`: itself if it has that dtype."""
        return x if x.dtype == dtype else self._take(name, x.shape, x, dtype).copy_(x)

    def product(self, name: str, a: Tensor, b: Tensor, final: torch.dtype) -> Tensor:
        """Return a (n, k) times b (k, m): a fresh tensor if it has the `final` dtype already."""
        if a.dtype == final:
            return a @ b
        return torch.mm(a, b, out=self._take(name, (len(a), b.shape[1]), a, a.dtype))

    def _take(self, name: str, shape: tuple[int, ...], like: Tensor, dtype: torch.dtype) -> Tensor:
        size = math.prod(shape)
        buffer = self._buffers.get(name)
        if buffer is None or len(buffer) < size or buffer.dtype != dtype:
            buffer = torch.empty(size, dtype=dtype, device=like.device)
            self._buffers[name] = buffer
        return buffer[:size].view(shape)


class _FrozenProduct(Function):
    """y = x W^T + b with frozen W and b, multiplied in `product_dtype`."""

    @staticmethod
    def forward(ctx: Context, x: Tensor, layer: nn.Linear) -> Tensor:
        wide = product_dtype(x)
        ctx.layer, ctx.wide, ctx.dtype = layer, wide, x.dtype
        bias = None if layer.bias is None else layer.bias.to(wide)
        return linear(x.to(wide), layer.weight.to(wide), bias).to(x.dtype)

    @staticmethod
    def backward(ctx: Context, *gradients: Tensor) -> tuple[Tensor, None]:
        (g,) = gradients
        return (g.to(ctx.wide) @ ctx.layer.weight.to(ctx.wide)).to(ctx.dtype), None


class _FrozenRmsNorm(Function):
    """y = w * x / rms(x) with frozen w; keeps x and one number a row (arXiv:1910.07467)."""

    @staticmethod
    def forward(ctx: Context, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
        scale = norm.square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return weight * _scaled(x, scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Context, *gradients: Tensor) -> tuple[Tensor, None, None]:
        x, weight, scale = ctx.saved_tensors
        g, normal = _scaled(gradients[0], weight), _scaled(x, scale)
        mean = (g * normal).mean(-1, keepdim=True)
        return g.sub_(normal.mul_(mean)).mul_(scale).to(x.dtype), None, None


class _Gate(Function):
    """silu(gate) * up; keeps only its two inputs."""

    @staticmethod
    def forward(ctx: Context, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return gated(gate, up)

    @staticmethod
    def backward(ctx: Context, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        return gate_gradients(gradients[0], *ctx.saved_tensors)


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) * up (arXiv:2002.05202)."""
    return silu(gate).mul_(up)


def gate_gradients(g: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of `gated` for gate and up, in their dtype."""
    g = g.to(gate.dtype)
    return torch.ops.aten.silu_backward(g * up, gate), silu(gate).mul_(g)


def _scaled(x: Tensor, factor: Tensor) -> Tensor:
    """Return x times `factor` as a fresh tensor in float32 or better, without a third one."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return x * factor if wide is x else wide.mul_(factor)


def _norm_forward(norm: Any, x: Tensor) -> Tensor:  # noqa: ANN401 - any class with these parts
    result: Tensor = apply(_FrozenRmsNorm, x, norm.weight.detach(), norm.variance_epsilon)
    return result


def _linear_forward(layer: nn.Linear, x: Tensor) -> Tensor:
    result: Tensor = apply(_FrozenProduct, x, layer)
    return result


def _mlp_forward(mlp: Any, x: Tensor) -> Tensor:  # noqa: ANN401 - any class with these parts
    gate, up = mlp.gate_proj(x), mlp.up_proj(x)
    down = mlp.down_proj
    if isinstance(down, LoRALinear) and down.product is not plain_product:
        return down.product(down, gate, up)  # computes the gate again in backward
    result: Tensor = down(apply(_Gate, gate, up))
    return result


def _replacement(module: nn.Module) -> tuple[Forward, Tensor] | None:
    """Return the fused forward that a module's parts suggest, and the weight its input meets."""
    if isinstance(module, nn.Linear):
        return partial(_linear_forward, module), module.weight
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor) and isinstance(getattr(module, "variance_epsilon", None), float):
        return partial(_norm_forward, module), weight
    parts = dict(module.named_children())
    if parts.keys() == _MLP_PARTS and isinstance(parts["gate_proj"], nn.Linear | LoRALinear):
        return partial(_mlp_forward, module), parts["gate_proj"].weight
    return None


def _behaves(module: nn.Module, replacement: Forward, weight: Tensor) -> bool:
    """Compare a replacement with the module itself on a random input."""
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(2, 3, weight.shape[-1], generator=generator).to(weight)
    with torch.no_grad():
        expected, found = module(probe).double(), replacement(probe).double()
    if expected.shape != found.shape:
        return False
    return bool((expected - found).norm() <= _PROBE_TOLERANCE * expected.norm())


@dataclass(frozen=True, slots=True, eq=False)
class Fusion:
    """The layers of one model that were recognised, with their fused forward."""

    forwards: tuple[tuple[nn.Module, Forward], ...]

    @classmethod
    def of(cls, model: nn.Module) -> Fusion:
        """Recognise layers by their parts and, once for each class, by their behaviour."""
        verdicts: dict[type[nn.Module], bool] = {}
        forwards: list[tuple[nn.Module, Forward]] = []
        for module in model.modules():
            found = _replacement(module)
            if found is None:
                continue
            kind = type(module)
            if kind not in verdicts:
                verdicts[kind] = _behaves(module, *found)
            if verdicts[kind]:
                forwards.append((module, found[0]))
        return cls(tuple(forwards))

    @contextmanager
    def active(self) -> Iterator[None]:
        """Exchange the forwards inside the block."""
        try:
            for module, forward in self.forwards:
                module.__dict__["forward"] = forward
            yield
        finally:
            for module, _ in self.forwards:
                module.__dict__.pop("forward", None)
