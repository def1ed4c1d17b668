"""Names for tensor annotations: `Float[Tensor, "batch tokens dim"]`.

With jaxtyping installed these are jaxtyping's types, and `pytest
--jaxtyping-packages=drorae,beartype.beartype` checks every call. A GPU host that has only torch,
transformers, safetensors and numpy lacks jaxtyping: there each name keeps the subscript syntax and
means plain `Tensor`, so models and losses import unchanged.
"""

from typing import TYPE_CHECKING, Any

from torch import Tensor

__all__ = ["Bool", "Float", "Int", "Tensor", "UInt8"]

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int, UInt8
else:
    try:
        from jaxtyping import Bool, Float, Int, UInt8
    except ImportError:

        class _Unchecked:
            """Stands in for a jaxtyping dtype: subscribing it gives the bare array type."""

            def __class_getitem__(cls, item: tuple[Any, str]) -> Any:
                return item[0]

        Bool = Float = Int = UInt8 = _Unchecked
