"""Rules by which ``torch.func.vmap`` over parameters becomes one call of a flow operator for many networks.

Rows have shape (models, rows, d). Weights have the shapes of a module, or are stacked over the models.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fdkernels.layers import EncodedNetwork


def fold(batch_size: int, call: Any, dims: Any) -> Any:
    """Fold a mapped dimension into the call: into models if the weights are mapped too, otherwise into rows.

    Unmapped tensors (models, rows, ...) are repeated.

    Args:
        call: an operator's record of arguments, one of which is its ``network``.
        dims: the same record, with mapped dimensions in it.
    """
    models = by_model(dims)

    def over(part: Any, dim: Any) -> Any:
        if isinstance(part, EncodedNetwork):
            if not models:
                return part
            stacked = [_leading(batch_size, p, p_dim) for p, p_dim in zip(part.parameters, dim.parameters)]
            return part._replace(parameters=stacked)
        if isinstance(part, Tensor):
            part = _leading(batch_size, part, dim)
            return part.flatten(0, 1) if models else part.transpose(0, 1).flatten(1, 2)
        if isinstance(part, tuple):
            return part._make(map(over, part, dim))  # type: ignore[attr-defined]
        return part

    return call._make(map(over, call, dims))


def by_model(dims: Any) -> bool:
    """Whether the weights are mapped."""
    return any(dim is not None for dim in dims.network.parameters)


def unfold(out: Tensor, batch_size: int, dims: Any, first: int = 0) -> tuple[Tensor, int | None]:
    """Split off the mapped dimension again; ``first`` is the dimension of models. Unwanted outputs are empty."""
    if out.ndim == 1:
        return out, None
    at = first if by_model(dims) else first + 1
    return out.unflatten(at, (batch_size, out.shape[at] // batch_size)), at


def _leading(batch_size: int, tensor: Any, dim: int | None) -> Any:
    if tensor is None:
        return None
    return tensor.expand(batch_size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
