"""The schema of a sample, both ways: four members of a WebDataset tar, and back.

`KEY.ct`, `KEY.lesions` and `KEY.regions` are volumes (see `packing`), `KEY.json` is the `SampleMeta`.
"""

import functools
import json
import re
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError

from rectvlm.data.volume_codec import decode_volume, encode_volume
from rectvlm.labels import FINDINGS, LESIONS, N_LESIONS, N_REGIONS
from rectvlm.types import Sample, SampleMeta, UserError

SAMPLE_SCHEMA = 2
SAMPLE_MEMBERS = ("ct", "lesions", "regions", "json")
_MEMBER_DTYPES: dict[str, np.dtype[Any]] = {
    "ct": np.dtype("<i2"),
    "lesions": np.dtype("u1"),
    "regions": np.dtype("u1"),
}
_KEY_PATTERN = re.compile(r"[A-Za-z0-9_-]{1,80}")


_META_ADAPTER = TypeAdapter(SampleMeta)


def encode_sample(sample: Sample) -> dict[str, bytes]:
    """The four members of a sample.

    Raises:
        UserError: a key that WebDataset would cut, or labels, flags or values outside the schema.
    """
    meta = sample.meta
    if not _KEY_PATTERN.fullmatch(meta.key):
        raise UserError(
            f"Sample key {meta.key!r} must be 1 to 80 letters, digits, '_' or '-' (WebDataset cuts a name at its "
            f"first dot): rename the case from {meta.source}."
        )
    _check_sample(sample, where=f"Sample {meta.key}")
    arrays: dict[str, NDArray[Any]] = {
        "ct": sample.ct,
        "lesions": sample.lesions,
        "regions": sample.regions,
    }
    for name, array in arrays.items():
        assert array.dtype == _MEMBER_DTYPES[name], f"{name} is {array.dtype}"
    members = {name: encode_volume(array) for name, array in arrays.items()}
    members["json"] = _META_ADAPTER.dump_json(meta)
    return members


def decode_sample(
    members: Mapping[str, bytes | memoryview],
    where: str = "sample",
    into: Mapping[str, NDArray[Any]] | None = None,
) -> Sample:
    """A sample from its four members, as WebDataset gives them (other keys are ignored).

    Args:
        members: by name.
        where: the source, for messages.
        into: arrays by name (`ct`, `lesions`, `regions`) that receive the volumes and become the sample's.

    Raises:
        UserError: a member is missing, damaged, not of this schema, or not of the shape of `into`.
    """
    missing = [name for name in SAMPLE_MEMBERS if name not in members]
    if missing:
        raise UserError(
            f"{where} lacks {', '.join(missing)}: expected the members {', '.join(SAMPLE_MEMBERS)}."
        )
    arrays = {
        name: decode_volume(
            members[name], dtype, f"{where}, member {name}", None if into is None else into[name]
        )
        for name, dtype in _MEMBER_DTYPES.items()
    }
    sample = Sample(**arrays, meta=_parse_meta(bytes(members["json"]), where))
    _check_sample(sample, where)
    return sample


def _parse_meta(data: bytes, where: str) -> SampleMeta:
    try:
        tree = json.loads(data)
        meta = _META_ADAPTER.validate_json(data, strict=True)
    except ValidationError as error:
        fault = error.errors()[0]
        place = ".".join(map(str, fault["loc"])) or "top level"
        raise UserError(
            f"{where}: {place} of its JSON is not of schema {SAMPLE_SCHEMA}: {fault['msg']}."
        ) from None
    except ValueError as error:
        raise UserError(
            f"{where}: its JSON cannot be read ({error}); make the shards again."
        ) from None
    found, expected = (
        set(_json_paths(tree)),
        set(_json_paths(_META_ADAPTER.dump_python(meta, mode="json"))),
    )
    if found != expected:
        unknown, missing = sorted(found - expected), sorted(expected - found)
        raise UserError(
            f"{where}: its JSON is not of schema {SAMPLE_SCHEMA}: unknown {unknown}, missing {missing}; "
            f"read it with the version that wrote it, or make the shards again."
        )
    return meta


def _json_paths(tree: Any, prefix: str = "") -> Iterator[str]:
    for name, value in tree.items():
        yield prefix + name
        if isinstance(value, dict):
            yield from _json_paths(value, f"{prefix}{name}.")


def _check_sample(sample: Sample, where: str) -> None:
    meta = sample.meta
    if meta.schema != SAMPLE_SCHEMA:
        raise UserError(
            f"{where} is of schema {meta.schema}, this version reads {SAMPLE_SCHEMA}: make the shards again."
        )
    wrong = set(meta.labels) ^ set(FINDINGS)
    if wrong or any(value not in (0, 1, None) for value in meta.labels.values()):
        raise UserError(
            f"{where}: labels must give 0, 1 or null for each of the 18 findings; wrong: {sorted(wrong)}."
        )
    wrong = set(meta.lesions_annotated) ^ {lesion.key for lesion in LESIONS}
    if wrong:
        raise UserError(
            f"{where}: lesions_annotated must name each of the 5 lesions; wrong: {sorted(wrong)}."
        )
    both = [
        key
        for key, partly in meta.lesions_partial.items()
        if partly and meta.lesions_annotated.get(key)
    ]
    if both or set(meta.lesions_partial) != set(meta.lesions_annotated):
        raise UserError(
            f"{where}: lesions_partial must name each of the 5 lesions, none of them annotated: {both}."
        )
    shapes = {sample.ct.shape, sample.lesions.shape, sample.regions.shape}
    if len(shapes) != 1:
        raise UserError(
            f"{where}: CT, lesions and regions must have one shape, found {sorted(shapes)}."
        )
    if sample.lesions.max() >= 1 << N_LESIONS or sample.regions.max() > N_REGIONS:
        raise UserError(
            f"{where}: lesion bits must be below {1 << N_LESIONS} and region ids at most {N_REGIONS}."
        )


@functools.cache
def preprocessing_versions() -> dict[str, str]:
    """Versions of what decides a sample's voxels and bytes."""
    return {name: version(name) for name in ("rectvlm", "numpy", "nibabel", "blosc2")}
