"""``nn.LayerNorm`` and ``nn.RMSNorm`` that also take the residual that is added in front of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import has_torch_function_variadic

from fastattn.modules._common import check_backend, plain_twin
from fastattn.modules._tracing import expect_defaults, leaf_node
from fastattn.ops import add_layer_norm, add_rms_norm
from fastattn.ops.common.backends import Backend
from fastattn.ops.common.tracing import is_symbolically_traced
from fastattn.ops.residual_norm import direct


def _check_dropout(dropout: float) -> float:
    if not isinstance(dropout, (int, float)) or isinstance(dropout, bool):
        raise TypeError(f"dropout={dropout!r}: expected a number from 0 to 1")
    if not 0.0 <= dropout <= 1.0:
        raise ValueError(f"dropout={dropout!r}: expected a number from 0 to 1")
    return float(dropout)


class AddLayerNorm(nn.LayerNorm):
    """``torch.nn.LayerNorm`` with the residual add, its dropout and its scale fused in (arXiv:1607.06450).

    ``norm(x)`` is what ``nn.LayerNorm`` gives; ``norm(x, residual)`` is the norm of ``residual + dropout(x)``.
    Parameters, their names and initialisation, and with them checkpoints in both directions, are torch's.

    Args:
        normalized_shape: the sizes of the last axes, which are normalised together.
        eps: added to the variance.
        elementwise_affine: learn a weight and a bias.
        bias: learn the bias.
        device: where to make the parameters.
        dtype: of which type to make them.
        dropout: probability of dropping an element of ``x`` in training, where a residual is given.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``, as for :func:`fastattn.add_layer_norm`; default what
            :func:`fastattn.use_backend` says at the call.

    Raises:
        TypeError: ``dropout`` is no number.
        ValueError: ``dropout`` is no probability, or ``backend`` is unknown.
    """

    dropout: float = 0.0
    backend: Backend | None = None

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        dropout: float = 0.0,
        backend: Backend | None = None,
    ) -> None:
        check_backend(backend)
        super().__init__(normalized_shape, eps, elementwise_affine, bias, device, dtype)  # type: ignore[arg-type]
        self.dropout = _check_dropout(dropout)
        self.backend = backend

    def forward(  # type: ignore[override]
        self,
        input: Tensor,
        residual: Tensor | None = None,
        *,
        x_bias: Tensor | None = None,
        row_scale: Tensor | None = None,
        dropout_p: float | None = None,
        out_dtype: torch.dtype | None = None,
        residual_dtype: torch.dtype | None = None,
        return_residual: bool = False,
    ) -> Any:
        """The norm of ``residual + dropout(input + x_bias) * row_scale``.

        Args:
            input: ``[..., *normalized_shape]``.
            residual: of the same shape, or one that broadcasts; default none.
            x_bias: ``normalized_shape``; added to the input.
            row_scale: broadcastable to the rows ``[...]``; multiplies those of the input.
            dropout_p: in the place of the module's own dropout, and applied in evaluation too.
            out_dtype: of the norm; default the input's (under autocast on a GPU float32, as in torch).
            residual_dtype: of the sum; default what input and residual promote to.
            return_residual: also return the sum.

        Returns:
            The norm, or the pair of it and the sum.

        Raises:
            TypeError, ValueError, NotImplementedError: as :func:`fastattn.add_layer_norm`.
        """
        if (
            type(input) is Tensor
            and input.is_cpu
            and x_bias is row_scale is dropout_p is out_dtype is residual_dtype is None
            and (residual is None or not self.training or self.dropout == 0.0)
            and "weight" in (own := self._parameters)  # else it is parametrized
            and "bias" in own
        ):
            results = direct.layer_norm(
                input,
                residual,
                own["weight"],
                own["bias"],
                self.normalized_shape,
                self.eps,
                return_residual,
                self.backend,
            )
            if results is not None:
                return results
        if has_torch_function_variadic(input, residual) and is_symbolically_traced(input, residual):
            others: dict[str, Any] = {
                "residual": residual, "x_bias": x_bias, "row_scale": row_scale, "dropout_p": dropout_p,
                "out_dtype": out_dtype, "residual_dtype": residual_dtype, "return_residual": return_residual,
            }  # fmt: skip
            node = leaf_node(self, input, **others)
            if node is not None:
                return node
            if expect_defaults(self, **others):
                return super().forward(input)
        elif residual is None and input.is_nested:
            return super().forward(input)
        if dropout_p is None:
            dropout_p = self.dropout if self.training and residual is not None else 0.0
        return add_layer_norm(
            input,
            residual,
            self.weight,
            self.bias,
            self.eps,
            normalized_shape=self.normalized_shape,
            x_bias=x_bias,
            row_scale=row_scale,
            dropout_p=dropout_p,
            out_dtype=out_dtype,
            residual_dtype=residual_dtype,
            return_residual=return_residual,
            backend=self.backend,
        )

    def __prepare_scriptable__(self) -> nn.LayerNorm:
        """What ``torch.jit.script`` compiles in this module's place."""
        return plain_twin(self, nn.LayerNorm, "dropout", "backend")


class AddRMSNorm(nn.RMSNorm):
    """``torch.nn.RMSNorm`` with the residual add, its dropout and its scale fused in (arXiv:1910.07467).

    ``norm(x)`` is what ``nn.RMSNorm`` gives; ``norm(x, residual)`` is the norm of ``residual + dropout(x)``.
    Parameters, their names and initialisation, and with them checkpoints in both directions, are torch's.

    Args:
        normalized_shape: the sizes of the last axes, which are normalised together.
        eps: added to the mean square; default that of float32 (float64 for float64).
        elementwise_affine: learn a weight.
        device: where to make it.
        dtype: of which type to make it.
        dropout: probability of dropping an element of ``x`` in training, where a residual is given.
        backend: as for :class:`AddLayerNorm`.

    Raises:
        TypeError: ``dropout`` is no number.
        ValueError: ``dropout`` is no probability, or ``backend`` is unknown.
    """

    dropout: float = 0.0
    backend: Backend | None = None

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float | None = None,
        elementwise_affine: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        dropout: float = 0.0,
        backend: Backend | None = None,
    ) -> None:
        check_backend(backend)
        super().__init__(normalized_shape, eps, elementwise_affine, device, dtype)  # type: ignore[arg-type]
        self.dropout = _check_dropout(dropout)
        self.backend = backend

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        residual: Tensor | None = None,
        *,
        x_bias: Tensor | None = None,
        row_scale: Tensor | None = None,
        dropout_p: float | None = None,
        out_dtype: torch.dtype | None = None,
        residual_dtype: torch.dtype | None = None,
        return_residual: bool = False,
    ) -> Any:
        """The norm of ``residual + dropout(x + x_bias) * row_scale``; arguments, results and errors are those of
        :meth:`AddLayerNorm.forward`."""
        if (
            type(x) is Tensor
            and x.is_cpu
            and x_bias is row_scale is dropout_p is out_dtype is residual_dtype is None
            and (residual is None or not self.training or self.dropout == 0.0)
            and "weight" in (own := self._parameters)  # else it is parametrized
        ):
            results = direct.rms_norm(
                x, residual, own["weight"], self.normalized_shape, self.eps, return_residual, self.backend
            )
            if results is not None:
                return results
        if has_torch_function_variadic(x, residual) and is_symbolically_traced(x, residual):
            others: dict[str, Any] = {
                "residual": residual, "x_bias": x_bias, "row_scale": row_scale, "dropout_p": dropout_p,
                "out_dtype": out_dtype, "residual_dtype": residual_dtype, "return_residual": return_residual,
            }  # fmt: skip
            node = leaf_node(self, x, **others)
            if node is not None:
                return node
            if expect_defaults(self, **others):
                return super().forward(x)
        elif residual is None and x.is_nested and x.layout is torch.jagged:
            return super().forward(x)
        if dropout_p is None:
            dropout_p = self.dropout if self.training and residual is not None else 0.0
        return add_rms_norm(
            x,
            residual,
            self.weight,
            eps=self.eps,
            normalized_shape=self.normalized_shape,
            x_bias=x_bias,
            row_scale=row_scale,
            dropout_p=dropout_p,
            out_dtype=out_dtype,
            residual_dtype=residual_dtype,
            return_residual=return_residual,
            backend=self.backend,
        )

    def __prepare_scriptable__(self) -> nn.RMSNorm:
        """What ``torch.jit.script`` compiles in this module's place."""
        return plain_twin(self, nn.RMSNorm, "dropout", "backend")
