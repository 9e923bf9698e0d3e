"""Writes columns of a Parquet file to standard output as doubles, one column after the other.

Runs in an environment that has pyarrow (`make peers PEERS=traces`), as a program of its own:
parquet_columns.py FILE MODEL COLUMN …: the rows whose `model` is MODEL; texts as their first letter's code;
nothing as NaN. The first double is the number of rows.
"""

from __future__ import annotations

import array
import math
import sys

import pyarrow.parquet  # type: ignore[import-not-found,unused-ignore]


def main() -> None:
    path, model, *names = sys.argv[1:]
    table = pyarrow.parquet.read_table(path, columns=["model", *names]).to_pydict()
    rows = [index for index, value in enumerate(table["model"]) if value == model]
    out = array.array("d", [len(rows)])
    for name in names:
        column = table[name]
        out.extend(number_of(column[index]) for index in rows)
    sys.stdout.buffer.write(out.tobytes())


def number_of(value: object) -> float:
    if isinstance(value, str):
        return float(ord(value[0]))
    return float(value) if isinstance(value, int | float) else math.nan


if __name__ == "__main__":
    main()
