"""What bad input is refused with."""

import pytest

from rsagent_jax.types import DataError


def refused(says: str, call, *args, **kwargs) -> str:
    """The message of the DataError that the call must raise; it matches `says`."""
    with pytest.raises(DataError, match=says) as caught:
        call(*args, **kwargs)
    return str(caught.value)
