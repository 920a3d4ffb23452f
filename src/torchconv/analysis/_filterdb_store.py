"""Collections of filters with records of where each comes from: in memory, safetensors, or the data set's HDF5."""

from __future__ import annotations

import json
import math
import pickle
import pickletools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from torchconv._common import atomic_write, check, require
from torchconv.analysis._filterdb_layers import Source, layers
from torchconv.analysis._filterdb_stream import CHUNK, Array

INDEX = ("model_id", "conv_depth", "conv_depth_norm", "layer_id")
Record = dict[str, Any]


@dataclass(frozen=True)
class Rows:
    """Ranges of rows of a (possibly very large) array, read in pieces each time it is iterated."""

    filters: Any
    ranges: tuple[tuple[int, int], ...]

    def __len__(self) -> int:
        return sum(stop - start for start, stop in self.ranges)

    def __iter__(self) -> Iterator[Array]:
        for start, stop in self.ranges:
            for first in range(start, stop, CHUNK):
                yield self.filters[first : min(first + CHUNK, stop)]


@dataclass(frozen=True)
class Database:
    """Filters and one record for each layer, with ``start`` and ``stop`` (exclusive) of its rows.

    Attributes:
        filters: (N, taps) or (N, kh, kw): an array, or an HDF5 data set that is read as needed.
        records: one dict for each layer.
    """

    filters: Any
    records: tuple[Record, ...]

    @classmethod
    def from_models(
        cls, models: Mapping[str, Source], tags: Mapping[str, Mapping[str, Any]] | None = None, **options: Any
    ) -> Database:
        """Extract all filters of some networks.

        Args:
            models: name → module or state dict.
            tags: name → further columns of that network, {"Task": "Classification", …} say.
            **options: of ``layers``.

        Raises:
            ValueError: no layer has kernels of that size, or kernels of several sizes are mixed.
        """
        pieces: list[Array] = []
        records: list[Record] = []
        start = 0
        for number, (name, model) in enumerate(models.items()):
            for layer in layers(model, **options):
                rows = layer.filters
                record: Record = {
                    "model_id": number,
                    "conv_depth": layer.depth,
                    "conv_depth_norm": layer.depth_norm,
                    "layer_id": layer.layer_id,
                    "model": name,
                    "layer": layer.name,
                    "in_channels": layer.in_channels,
                    "out_channels": layer.weight.shape[0],
                    "start": start,
                    "stop": start + len(rows),
                }
                records.append({**record, **(tags or {}).get(name, {})})
                pieces.append(rows)
                start += len(rows)
        check(bool(pieces), "models", list(models), "none has kernels of this size")
        sizes = sorted({p.shape[1] for p in pieces})
        check(len(sizes) == 1, "kernel_size", options.get("kernel_size"), f"mixes filters of {sizes} taps; choose one")
        return cls(np.concatenate(pieces), tuple(records))

    def groups(self, by: str | Callable[[Record], str | None]) -> dict[str, Rows]:
        """Filters by label, for ``study``.

        Args:
            by: a column ("model", "Task", "Visual Category", …); "depth" for tenths of the normalised depth; or a
                function of a record, None leaving it out. Tasks with "Segmentation" in their name are one.
        """
        label = by if callable(by) else _depth_decile if by == "depth" else _column(by, self.records)
        ranges: dict[str, list[tuple[int, int]]] = {}
        for record in sorted(self.records, key=lambda r: r["start"]):
            name = label(record)
            if name is None:
                continue
            known = ranges.setdefault(name, [])
            if known and known[-1][1] == record["start"]:  # neighbours are read at once
                known[-1] = (known[-1][0], record["stop"])
            else:
                known.append((record["start"], record["stop"]))
        names = sorted(ranges) if by == "depth" else ranges
        return {n: Rows(self.filters, tuple(ranges[n])) for n in names}

    def save(self, path: str | Path) -> None:
        """Write ``.safetensors`` (filters, start, stop, records as JSON) or the data set's layout (``.h5``, ``.hdf5``).

        The HDF5 file has ``/filters`` and the table ``/meta`` as pandas reads it, with ``filter_ids`` "start:end",
        end inclusive; it is written in pieces.
        """
        path = Path(path)
        kind = _kind(path)
        with atomic_write(path) as temporary:
            if kind == "hdf5":
                with require("h5py", "inspect").File(temporary, "w") as file:
                    shape = (self.filters.shape[0], math.prod(self.filters.shape[1:]))
                    out = file.create_dataset("filters", shape, np.float32, chunks=(min(CHUNK, shape[0]), shape[1]))
                    for first in range(0, shape[0], CHUNK):
                        piece = np.asarray(self.filters[first : first + CHUNK], np.float32)
                        out[first : first + len(piece)] = piece.reshape(len(piece), -1)
                    _write_table(file, self.records)
                return
            count = len(self.filters)
            tensors = {
                "filters": np.ascontiguousarray(self.filters[:], np.float32).reshape(count, -1),
                "start": np.array([r["start"] for r in self.records], np.int64),
                "stop": np.array([r["stop"] for r in self.records], np.int64),
            }
            records = [{k: v for k, v in r.items() if k not in ("start", "stop")} for r in self.records]
            save_file(tensors, temporary, {"records": json.dumps(records)})

    @classmethod
    def open(cls, path: str | Path) -> Database:
        """Read a file of ``save`` or of the published data set; the filters of HDF5 stay on the disk until asked for.

        Raises:
            FileNotFoundError: no such file.
            ValueError: a file of another layout. Nothing in it is unpickled.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"path={str(path)!r}: no such file")
        if _kind(path) == "hdf5":
            file = require("h5py", "inspect").File(path, "r")  # stays open as long as its filters are in use
            try:
                name = next((n for n in ("filters", "filter") if n in file), None)
                check(name is not None and "meta" in file, "path", str(path), "has no /filters and /meta")
                return cls(file[name], tuple(_read_table(file, path)))
            except Exception:
                file.close()
                raise
        with safe_open(path, "np") as file:
            records = json.loads((file.metadata() or {}).get("records", "[]"))
            bounds = zip(file.get_tensor("start").tolist(), file.get_tensor("stop").tolist(), strict=True)
            whole = [{**r, "start": a, "stop": b} for r, (a, b) in zip(records, bounds, strict=True)]
            return cls(file.get_tensor("filters"), tuple(whole))


def _kind(path: Path) -> str:
    check(path.suffix in (".safetensors", ".h5", ".hdf5"), "path", str(path), "must end in .safetensors, .h5 or .hdf5")
    return "safetensors" if path.suffix == ".safetensors" else "hdf5"


def _depth_decile(record: Record) -> str:
    """[0, .1], (.1, .2], …, (.9, 1]."""
    tenth = max(math.ceil(round(float(record["conv_depth_norm"]) * 10, 9)), 1)
    return f"{(tenth - 1) / 10:.1f}-{tenth / 10:.1f}"


def _column(name: str, records: tuple[Record, ...]) -> Callable[[Record], str]:
    known = sorted({k for r in records for k in r})
    check(name in known, "by", name, f"must be 'depth', a function, or one of {', '.join(known)}")

    def label(record: Record) -> str:
        text = str(record.get(name, ""))
        return "Segmentation" if name == "Task" and "Segmentation" in text else text

    return label


def _write_table(file: Any, records: tuple[Record, ...]) -> None:
    """The table that pandas reads with ``read_hdf(path, "meta")``: a block a column, names as pickled lists of text."""
    rows = [
        {k: v for k, v in {**r, "filter_ids": f"{r['start']}:{r['stop'] - 1}"}.items() if k not in ("start", "stop")}
        for r in records
    ]
    names = list(dict.fromkeys((*INDEX, *(k for r in rows for k in r))))
    columns = {n: _typed([r.get(n) for r in rows]) for n in names}
    data = [n for n in names if n not in INDEX]
    fields: list[tuple[Any, ...]] = [("index", "<i8")]
    fields += [(f"values_block_{k}", columns[n].dtype.str, (1,)) for k, n in enumerate(data)]
    fields += [(n, columns[n].dtype.str) for n in INDEX]
    table = np.zeros(len(rows), dtype=fields)
    table["index"] = np.arange(len(rows))
    for k, n in enumerate(data):
        table[f"values_block_{k}"][:, 0] = columns[n]
    for n in INDEX:
        table[n] = columns[n]
    group = file.create_group("meta")
    target = group.create_dataset("table", data=table, chunks=(max(len(rows), 1),), maxshape=(None,))

    def text(value: str) -> Any:
        encoded = value.encode()  # PyTables takes texts for text when they are marked as UTF-8
        return np.array(encoded, dtype=require("h5py", "inspect").string_dtype("utf-8", len(encoded)))

    def listed(value: Any) -> np.bytes_:
        return np.bytes_(pickle.dumps(value, protocol=0))

    blocks = [f"values_block_{k}" for k in range(len(data))]
    file.attrs.update({"CLASS": text("GROUP"), "PYTABLES_FORMAT_VERSION": text("2.1"), "VERSION": text("1.0")})
    group.attrs.update(
        {
            "CLASS": text("GROUP"),
            "VERSION": text("1.0"),
            "pandas_type": text("frame_table"),
            "pandas_version": text("0.15.2"),
            "table_type": text("appendable_multiframe"),
            "encoding": text("UTF-8"),
            "errors": text("strict"),
            "nan_rep": text("nan"),
            "levels": listed(list(INDEX)),
            "data_columns": listed(list(INDEX)),
            "index_cols": listed([(0, "index")]),
            "non_index_axes": listed([(1, [*INDEX, *data])]),
            "values_cols": listed([*blocks, *INDEX]),
            "info": listed({}),
        }
    )
    target.attrs.update({"CLASS": text("TABLE"), "VERSION": text("2.7"), "NROWS": np.int64(len(rows))})
    target.attrs.update({f"FIELD_{k}_NAME": text(str(f[0])) for k, f in enumerate(fields)})
    target.attrs["index_kind"] = text("integer")
    for block, name in [*zip(blocks, data, strict=True), *((n, n) for n in INDEX)]:
        dtype = columns[name].dtype
        target.attrs[f"{block}_kind"] = listed([name])
        target.attrs[f"{block}_dtype"] = text(f"bytes{8 * dtype.itemsize}" if dtype.kind == "S" else dtype.name)
        target.attrs[f"{block}_meta"] = text("str") if dtype.kind == "S" else listed(None)


def _typed(values: list[Any]) -> Array:
    """int64, float64 (missing: NaN) or text (missing: empty)."""
    present = [v for v in values if v is not None]
    if present and all(isinstance(v, int | np.integer) for v in present) and len(present) == len(values):
        return np.array(values, np.int64)
    if present and all(isinstance(v, int | float | np.integer | np.floating) for v in present):
        return np.array([math.nan if v is None else v for v in values], np.float64)
    encoded = [b"" if v is None else str(v).encode() for v in values]
    return np.array(encoded, dtype=f"S{max([1, *map(len, encoded)])}")


def _read_table(file: Any, path: Path) -> list[Record]:
    remedy = (
        "/meta is not in pandas' table format; write it anew with DataFrame.to_hdf(path, key='meta', format='table')"
    )
    check("table" in file["meta"], "path", str(path), remedy)
    table = file["meta/table"]
    attributes, data = table.attrs, table[:]
    columns: dict[str, list[Any]] = {}
    for field in data.dtype.names or ():
        if field == "index":
            continue
        names = _texts(attributes[f"{field}_kind"]) if f"{field}_kind" in attributes else [field]
        values = data[field].reshape(len(data), -1)
        check(len(names) == values.shape[1], "path", str(path), f"column block {field} names {len(names)} columns")
        for k, name in enumerate(names):
            columns[name] = [v.decode() if isinstance(v, bytes) else v for v in values[:, k].tolist()]
    check("filter_ids" in columns, "path", str(path), "/meta has no column filter_ids")
    records = []
    for row in zip(*columns.values(), strict=True):
        record: Record = dict(zip(columns, row, strict=True))
        start, _, end = str(record.pop("filter_ids")).partition(":")
        records.append({**record, "start": int(start), "stop": int(end) + 1})
    return records


def _texts(pickled: Any) -> list[str]:
    """The texts in a pickled list, from its opcodes: nothing is run."""
    found = []
    for opcode, argument, _ in pickletools.genops(bytes(pickled)):
        if isinstance(argument, str) and ("UNICODE" in opcode.name or "STRING" in opcode.name):
            found.append(argument)
    return found
