"""Features of CTs: those of shards with their labels, or those of files.

Command: `rectvlm embed data/shards/demo --checkpoint runs/demo/phase1 --out features.safetensors`
"""

import logging
import typing
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from rectvlm.checkpoint import Checkpoint
from rectvlm.config import Config, load_config
from rectvlm.data.dataset import ShardDataset, collate_samples
from rectvlm.data.hounsfield import to_hu
from rectvlm.data.loader import BatchLoader
from rectvlm.data.shards import SHARD_INDEX_FILE, read_index
from rectvlm.embed.features import FeatureTable, require_feature_path, write_features
from rectvlm.embed.options import EmbedOptions
from rectvlm.files import (
    append_json_line,
    explain_write_error,
    printable_line,
    require_writable_file,
)
from rectvlm.labels import FINDINGS
from rectvlm.models import load_part
from rectvlm.models.encoder import build_encoder, load_starting_weights
from rectvlm.models.language_model import resolve_device
from rectvlm.predict.case import make_sample
from rectvlm.predict.ct_source import CtSource
from rectvlm.predict.find_volumes import case_names, find_volumes
from rectvlm.predict.run import FailedFile
from rectvlm.types import Batch, Sample, SampleMeta, Split, UserError

log = logging.getLogger(__name__)

LOG_EVERY = 100
"""CTs between two log lines of progress."""


FeatureRow = tuple[SampleMeta, str, "np.ndarray[tuple[int], np.dtype[np.float32]]"]
"""Metadata, split and global token (C,) of one CT."""


@dataclass(frozen=True)
class LoadedEncoder:
    """An encoder that embeds."""

    encoder: torch.nn.Module
    """`ImageEncoder` in eval mode, on its device."""
    config: Config
    """Configuration with the grid that it expects."""
    device: torch.device
    description: str
    """Name of the encoder and the source of its weights."""


def embed_cts(options: EmbedOptions, device: str | None = None) -> Path:
    """Embed CTs and write a table of features.

    A folder of CTs is walked and read as `rectvlm predict` does: a file that cannot be used is
    logged and listed beside the features, in `NAME.failed.jsonl`, and the rest goes on.

    Args:
        options: what is embedded, by which encoder, and where it goes.
        device: device of the encoder, by default the GPU if there is one.

    Returns:
        The file of the features.

    Raises:
        UserError: there is no such source or encoder, the shards have another grid, no CT can be
            used, a feature is not finite, or the file cannot be written.
    """
    options.require_source_and_encoder()
    require_feature_path(options.out)
    require_writable_file(options.out)
    loaded = _load_encoder(options, device)
    if options.is_url or (Path(options.source) / SHARD_INDEX_FILE).is_file():
        rows = _embed_shards(loaded, options)
    else:
        rows = _embed_files(loaded, Path(options.source), options.out)
    table = _build_table(list(rows), loaded.description)
    try:
        write_features(table, options.out)
    except OSError as error:
        raise UserError(explain_write_error(options.out, error)) from error
    log.info("features of %d CTs, %d channels each", len(table), table.features.shape[1])
    return options.out


def _load_encoder(options: EmbedOptions, device: str | None) -> LoadedEncoder:
    torch_device = resolve_device(device)
    if options.checkpoint is not None:
        checkpoint = Checkpoint.open(options.checkpoint)
        trained = load_part(checkpoint.folder, "encoder", torch_device)
        name = checkpoint.config.encoder.name
        description = f"{name} of {checkpoint.folder}"
        return LoadedEncoder(trained, checkpoint.config, torch_device, description)
    config = load_config(options.config[0], options.config[1:])
    torch.manual_seed(config.train.seed)
    encoder = build_encoder(config.encoder, config.data)
    if config.encoder.init is None:
        log.warning("encoder.init is null: these are features of random weights, a control")
    else:
        log.info("%s", load_starting_weights(encoder, config.encoder))
    description = f"{config.encoder.name} with {config.encoder.init or 'random weights'}"
    module = typing.cast(torch.nn.Module, encoder).eval().to(torch_device)
    return LoadedEncoder(module, config, torch_device, description)


def _embed_shards(loaded: LoadedEncoder, options: EmbedOptions) -> Iterator[FeatureRow]:
    data = loaded.config.data.model_copy(update={"shards": options.source})
    index = read_index(options.source)
    for split in typing.get_args(Split):
        if not index.select_split(split):
            continue
        dataset = ShardDataset(data, split)
        numbers = range(min(len(dataset), options.limit or len(dataset)))
        size = options.batch_size
        batches = [list(numbers[start : start + size]) for start in numbers[::size]]
        n_done = 0
        for batch in BatchLoader(dataset, batches):
            if options.hide_regions:
                batch = replace(batch, regions_known=torch.zeros_like(batch.regions_known))
            for meta, token in zip(batch.metas, _embed_batch(loaded, batch), strict=True):
                yield meta, split, token
            n_done += len(batch.keys)
            if n_done % LOG_EVERY < len(batch.keys):
                log.info("%s: %d of %d CTs", split, n_done, len(numbers))


def _embed_files(loaded: LoadedEncoder, source: Path, out: Path) -> Iterator[FeatureRow]:
    found = find_volumes(source, out)
    for path in found.skipped:
        log.warning("skipped: %s %s", printable_line(path.path), printable_line(path.reason))
    failed_file = out.with_name(f"{out.name}.failed.jsonl")
    failed_file.unlink(missing_ok=True)
    for name, ct in zip(case_names(found.sources), found.sources, strict=True):
        try:
            sample = _read_sample(name, ct, loaded.config)
            tokens = _embed_batch(loaded, collate_samples([sample]))
        except Exception as error:
            failure = FailedFile.from_error(ct.place, error)
            if source.is_file():
                raise UserError(failure.reason) from error
            log.error("%s", printable_line(failure.reason))
            log.debug("%s failed", ct.place, exc_info=True)
            append_json_line(failed_file, vars(failure))
        else:
            yield sample.meta, "", tokens[0]


def _read_sample(name: str, source: CtSource, config: Config) -> Sample:
    """Read a CT onto the grid of the encoder, through the same checks as a prediction."""
    volume = source.read()
    hu, decision = to_hu(volume)
    return make_sample(name, volume, hu, decision, config)


@torch.inference_mode()
def _embed_batch(loaded: LoadedEncoder, batch: Batch) -> np.ndarray:
    """Global tokens (B, C) float32.

    Raises:
        UserError: one is not finite.
    """
    batch = batch.to(loaded.device)
    features = loaded.encoder(batch.ct, batch.regions, batch.regions_known)
    tokens = features.global_token.float().cpu().numpy()
    if not np.isfinite(tokens).all():
        raise UserError(f"Features of {', '.join(batch.keys)} are not finite: use other weights.")
    return tokens


def _build_table(rows: list[FeatureRow], encoder: str) -> FeatureTable:
    if not rows:
        raise UserError("No CT could be embedded: see the log for why.")
    metas = [meta for meta, _, _ in rows]
    labels = [[meta.labels[name] for name in FINDINGS] for meta in metas]
    return FeatureTable(
        features=np.stack([token for _, _, token in rows]),
        labels=np.array(labels, np.float32),
        keys=[meta.key for meta in metas],
        patients=[meta.patient for meta in metas],
        scans=[meta.scan for meta in metas],
        splits=[split for _, split, _ in rows],
        encoder=encoder,
    )
