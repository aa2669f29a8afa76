"""The schema of a sample: how it becomes four members of a WebDataset tar, and back.

`KEY.ct`, `KEY.lesions` and `KEY.regions` are volumes (see `volume_codec`), `KEY.json` is the
`SampleMeta`.
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
from rectvlm.types import SAMPLE_SCHEMA, Sample, SampleMeta, UserError, first_invalid_field

SAMPLE_MEMBERS = ("ct", "lesions", "regions", "json")
VOLUME_DTYPES: dict[str, np.dtype[Any]] = {
    "ct": np.dtype("<i2"),
    "lesions": np.dtype("u1"),
    "regions": np.dtype("u1"),
}
"""Type of each volume of a sample, in a shard and in memory."""
SAMPLE_KEY_PATTERN = re.compile(r"[A-Za-z0-9_-]{1,80}")
"""Key that WebDataset keeps whole."""
_META_ADAPTER = TypeAdapter(SampleMeta)


def encode_sample(sample: Sample) -> dict[str, bytes]:
    """Make the four members of a sample, by name.

    Raises:
        UserError: WebDataset would cut the key, or labels, flags or values are outside the schema.
    """
    meta = sample.meta
    if not SAMPLE_KEY_PATTERN.fullmatch(meta.key):
        raise UserError(
            f"Sample key {meta.key!r} must be 1 to 80 letters, digits, '_' or '-' (WebDataset cuts "
            f"a name at its first dot): rename the case from {meta.source}."
        )
    _check_sample(sample, where=f"Sample {meta.key}")
    members = {}
    for name, dtype in VOLUME_DTYPES.items():
        array = getattr(sample, name)
        assert array.dtype == dtype, f"{name} is {array.dtype}"
        members[name] = encode_volume(array)
    members["json"] = _META_ADAPTER.dump_json(meta)
    return members


def decode_sample(
    members: Mapping[str, bytes | memoryview],
    where: str = "sample",
    into: Mapping[str, NDArray[Any]] | None = None,
) -> Sample:
    """Read a sample from its members, as WebDataset gives them; other keys are ignored.

    Args:
        members: bytes by name.
        where: name of the sample in messages.
        into: arrays by name (`ct`, `lesions`, `regions`) that receive the volumes and become the
            sample's.

    Raises:
        UserError: a member is missing, damaged, not of this schema, or not of the shape of `into`.
    """
    missing = [name for name in SAMPLE_MEMBERS if name not in members]
    if missing:
        raise UserError(
            f"{where} lacks {', '.join(missing)}: expected the members {', '.join(SAMPLE_MEMBERS)}."
        )
    arrays = {}
    for name, dtype in VOLUME_DTYPES.items():
        out = None if into is None else into[name]
        arrays[name] = decode_volume(members[name], dtype, f"{where}, member {name}", out)
    sample = Sample(**arrays, meta=parse_meta(bytes(members["json"]), where))
    _check_sample(sample, where)
    return sample


def parse_meta(data: bytes, where: str) -> SampleMeta:
    """Read the metadata of a sample.

    Args:
        data: member `json` of the sample.
        where: name of the sample in messages.

    Raises:
        UserError: it is damaged or not of this schema.
    """
    try:
        tree = json.loads(data)
        meta = _META_ADAPTER.validate_json(data, strict=True)
    except ValidationError as error:
        field, reason = first_invalid_field(error)
        raise UserError(
            f"{where}: {field} of its JSON is not of schema {SAMPLE_SCHEMA}: {reason}; make the "
            "shards again."
        ) from None
    except ValueError as error:
        raise UserError(
            f"{where}: its JSON cannot be read ({error}); make the shards again."
        ) from None
    # pydantic ignores unknown keys and fills in missing ones.
    stored = set(_json_paths(tree))
    expected = set(_json_paths(_META_ADAPTER.dump_python(meta, mode="json")))
    if stored != expected:
        unknown, missing = sorted(stored - expected), sorted(expected - stored)
        raise UserError(
            f"{where}: its JSON is not of schema {SAMPLE_SCHEMA}: unknown {unknown}, missing "
            f"{missing}; read it with the version that wrote it, or make the shards again."
        )
    return meta


def _json_paths(tree: Any, prefix: str = "") -> Iterator[str]:
    """Dotted names of all keys of nested objects."""
    for name, value in tree.items():
        yield prefix + name
        if isinstance(value, dict):
            yield from _json_paths(value, f"{prefix}{name}.")


def _check_sample(sample: Sample, where: str) -> None:
    meta = sample.meta
    if meta.schema != SAMPLE_SCHEMA:
        raise UserError(
            f"{where} is of schema {meta.schema}, this version reads {SAMPLE_SCHEMA}: "
            "make the shards again."
        )
    wrong = set(meta.labels) ^ set(FINDINGS)
    if wrong or any(value not in (0, 1, None) for value in meta.labels.values()):
        raise UserError(
            f"{where}: labels must give 0, 1 or null for each of the 18 findings; "
            f"wrong: {sorted(wrong)}."
        )
    wrong = set(meta.lesions_annotated) ^ {lesion.key for lesion in LESIONS}
    if wrong:
        raise UserError(
            f"{where}: lesions_annotated must name each of the 5 lesions; wrong: {sorted(wrong)}."
        )
    wrong = set(meta.lesions_source) ^ {lesion.key for lesion in LESIONS}
    if wrong:
        raise UserError(
            f"{where}: lesions_source must name each of the 5 lesions; wrong: {sorted(wrong)}."
        )
    partial = [key for key, is_partial in meta.lesions_partial.items() if is_partial]
    both = [key for key in partial if meta.lesions_annotated.get(key)]
    if both or set(meta.lesions_partial) != set(meta.lesions_annotated):
        raise UserError(
            f"{where}: lesions_partial must name each of the 5 lesions, none of them annotated: "
            f"{both}."
        )
    shapes = {sample.ct.shape, sample.lesions.shape, sample.regions.shape}
    if len(shapes) != 1:
        raise UserError(
            f"{where}: CT, lesions and regions must have one shape, found {sorted(shapes)}."
        )
    if sample.lesions.max() >= 1 << N_LESIONS or sample.regions.max() > N_REGIONS:
        raise UserError(
            f"{where}: lesion bits must be below {1 << N_LESIONS} and region ids at most "
            f"{N_REGIONS}."
        )


@functools.cache
def preprocessing_versions() -> dict[str, str]:
    """Versions of the packages that decide a sample's voxels and bytes, by name."""
    return {name: version(name) for name in ("rectvlm", "numpy", "nibabel", "blosc2")}
