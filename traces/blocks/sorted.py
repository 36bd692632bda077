"""Numbers that a pattern holds: columns, diagonals."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError


def sorted_unique(values: Sequence[int] | NDArray[np.integer], field: str) -> NDArray[np.int32]:
    """Return numbers in rising order, as a read-only int32 array.

    InputError, naming `field`, for what is no list of whole numbers of 0 and more, each once.
    """
    array = np.asarray(values)
    if array.ndim != 1 or (array.size and not np.issubdtype(array.dtype, np.integer)):
        raise InputError(f"must be a list of integers, not {array.dtype} of shape {array.shape}", field=field)
    if array.size and array.min() < 0:
        raise InputError(f"must not be negative, found {array.min()}", field=field)
    if not (array[1:] > array[:-1]).all():  # files and selectors give rising numbers, which need no sorting
        unique = np.unique(array)
        if unique.size != array.size:
            raise InputError(f"must not repeat, found {array.size - unique.size} repeats", field=field)
        array = unique
    result = array.astype(np.int32)
    result.flags.writeable = False
    return result
