"""Files of sensors: what cannot be read is refused in one line."""

from __future__ import annotations

import importlib
import zipfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlmkd.errors import UserError
from vlmkd.files import one_line, unreadable


def read_arrays(
    path: Path, what: str, mend: str = "fetch it again", needs: Collection[str] = ()
) -> dict[str, np.ndarray]:
    """The arrays of an .npz file, of which `needs` must be there."""
    try:
        with np.load(path) as content:
            found = dict(content)
    except OSError as error:
        raise unreadable(error, path, what, mend) from None
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{what} {path} is damaged ({one_line(error)}); delete it, and {mend}") from None
    _check(found, needs, path, what, mend)
    return found


def read_sweep(path: Path, columns: int) -> NDArray[np.float32]:
    """[n, columns] of a file of nothing but float32."""
    try:
        values = np.fromfile(path, np.float32)
    except OSError as error:
        raise unreadable(error, path, "LiDAR sweep", "fetch the sweeps of the data set") from None
    if len(values) % columns:
        told = f"{len(values)} numbers are no rows of {columns}"
        raise UserError(f"LiDAR sweep {path} is cut off: {told}; fetch it again")
    return values.reshape(-1, columns)


def read_table(path: Path, what: str, mend: str, needs: Collection[str] = (), **options: Any) -> Any:
    """The pyarrow table of a Feather or parquet file, whose columns `needs` must be there."""
    form = "feather" if path.suffix == ".feather" else "parquet"
    try:
        pyarrow, reader = (importlib.import_module(name) for name in ("pyarrow", f"pyarrow.{form}"))
    except ImportError:
        raise UserError(f'{what} {path} needs pyarrow; install it by pip install "vlmkd[waymo]"') from None
    try:
        table = reader.read_table(path, **options)
    except FileNotFoundError as error:
        raise unreadable(error, path, what, mend) from None
    except (pyarrow.ArrowException, OSError) as error:
        told = f"is damaged or of another release and cannot be read ({one_line(error)})"
        raise UserError(f"{what} {path} {told}; {mend}") from None
    _check(table.column_names, needs, path, what, mend)
    return table


def _check(there: Collection[str], needs: Collection[str], path: Path, what: str, mend: str) -> None:
    if missing := [name for name in needs if name not in there]:
        raise UserError(f"{what} {path} has no {missing[0]}; delete it, and {mend}")
