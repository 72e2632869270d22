"""Random access to the rows of a JSONL or Parquet file, which stay on disk. It knows neither prompts nor answers."""

from __future__ import annotations

import json
import tempfile
from array import array
from pathlib import Path
from typing import Any, Protocol

from weaver_rl.errors import TaskError


class Rows(Protocol):
    """Rows 0 ... n-1 of one file."""

    path: Path

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...

    def where(self, index: int) -> str:
        """The row as a person would look it up."""


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise TaskError(f"task.path: {path} is {'a directory' if path.is_dir() else 'not there'}; expected a file")
    return path


class JsonlRows:
    """Keeps the byte offset of every line that is not blank, and parses a line when asked."""

    def __init__(self, path: Path) -> None:
        self.path = _existing(path)
        self._offsets = array("q")
        self._lines = array("q")
        self._file = self.path.open("rb")
        offset = 0
        for line_number, line in enumerate(self._file, start=1):
            if line.strip():
                self._offsets.append(offset)
                self._lines.append(line_number)
            offset += len(line)
        if not self._offsets:
            raise TaskError(f"{path} is empty: expected one JSON object a line")

    def __len__(self) -> int:
        return len(self._offsets)

    def where(self, index: int) -> str:
        return f"{self.path} line {self._lines[index]}"

    def __getitem__(self, index: int) -> dict[str, Any]:
        self._file.seek(self._offsets[index])
        try:
            row = json.loads(self._file.readline())
        except ValueError as error:
            raise TaskError(f"{self.where(index)}: no JSON ({error}); expected one object a line") from error
        if not isinstance(row, dict):
            raise TaskError(f"{self.where(index)}: expected an object, seen {type(row).__name__}")
        return row


class ParquetRows:
    """Unpacks the file once, batch by batch, into an unnamed Arrow file that is memory-mapped.

    Parquet itself has no random access: one row costs its whole row group.
    """

    def __init__(self, path: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.path = _existing(path)
        try:
            with pq.ParquetFile(path, memory_map=True) as parquet, tempfile.NamedTemporaryFile(suffix=".arrow") as file:
                with pa.ipc.new_file(file, parquet.schema_arrow) as writer:
                    for batch in parquet.iter_batches(batch_size=8192):
                        writer.write_batch(batch)
                file.flush()
                # The mapping keeps the unlinked file alive.
                self._table = pa.ipc.open_file(pa.memory_map(file.name)).read_all()
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise TaskError(f"{path}: no readable Parquet file: {error}") from error
        if len(self) == 0:
            raise TaskError(f"{path} is empty: expected one row a problem")

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def where(self, index: int) -> str:
        return f"{self.path} row {index + 1}"

    def __getitem__(self, index: int) -> dict[str, Any]:
        row: dict[str, Any] = self._table.slice(index, 1).to_pylist()[0]
        return row


def open_rows(kind: str, path: Path) -> Rows:
    return JsonlRows(path) if kind == "jsonl" else ParquetRows(path)
