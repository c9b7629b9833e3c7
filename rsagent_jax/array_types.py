"""Arrays in signatures: `Float[Array, "B T"]` is an array of floats with those axes (letters: types.py).

jaxtyping's names, through this one file. Nothing is checked while the package runs; the tests check what they call
(tests/conftest.py). An axis alone is written " T", with a space: ruff takes "T" for the name of a variable.
"""

import typing

import numpy as np
from jaxtyping import Bool, Float, Float32, Float64, Int, Int32, UInt8

__all__ = ["Array", "Bool", "Float", "Float32", "Float64", "Int", "Int32", "Scalar", "UInt8"]


@typing.runtime_checkable
class Array(typing.Protocol):
    """numpy's, jax's, or what stands for one while a program is traced; so that numpy's users need not import jax."""

    shape: tuple[int, ...]
    dtype: np.dtype


Scalar = Float[Array, ""]
