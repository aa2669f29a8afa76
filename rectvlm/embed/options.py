"""Options of `rectvlm embed` and `rectvlm probe`."""

from dataclasses import dataclass, field
from pathlib import Path

from rectvlm.cli_options import argument
from rectvlm.types import Split, UserError


@dataclass(frozen=True)
class EmbedOptions:
    """What is embedded, by which encoder, and where it goes."""

    source: str = field(metadata=argument(is_positional=True, metavar="CT_FOLDER_OR_SHARDS"))
    """CT (NIfTI, DICOM, …), folder of CTs, or folder or URL of shards."""
    out: Path = field(kw_only=True, metadata=argument(metavar="FILE"))
    """Features, `.safetensors` or `.npz`."""
    checkpoint: Path | None = field(
        default=None, kw_only=True, metadata=argument(metavar="DIR", exclusive_group="encoder")
    )
    """Run's phase folder whose encoder embeds."""
    config: tuple[str, ...] = field(
        default=(), kw_only=True, metadata=argument(metavar="NAME", exclusive_group="encoder")
    )
    """Configuration and `part.field=value` changes whose encoder embeds, with the weights of
    `encoder.init`."""
    hide_regions: bool = field(default=False, kw_only=True)
    """Treat every region map of shards as unknown, as a new CT's is."""
    batch_size: int = field(default=1, kw_only=True, metadata=argument(metavar="B", minimum=1))
    """Number of CTs of shards that are embedded together."""
    limit: int | None = field(default=None, kw_only=True, metadata=argument(metavar="N", minimum=1))
    """Number of CTs of each split of shards, the first ones; by default all."""

    @property
    def is_url(self) -> bool:
        """Whether the source is a URL, which shards alone can be."""
        return "://" in self.source

    def require_source_and_encoder(self) -> None:
        """Check that the source exists and an encoder is named.

        Raises:
            UserError: there is no such path, or neither a checkpoint nor a configuration is given.
        """
        if not self.is_url and not Path(self.source).exists():
            raise UserError(
                f"{self.source} does not exist: give a CT (NIfTI, DICOM, …), a folder of them, or "
                "shards."
            )
        if self.checkpoint is None and not self.config:
            raise UserError(
                "No encoder is named: give --checkpoint DIR of a run, or --config NAME "
                "encoder.init=WEIGHTS for one that was not trained here."
            )


@dataclass(frozen=True)
class ProbeOptions:
    """How a linear probe is fitted and measured."""

    features: tuple[Path, ...] = field(metadata=argument(is_positional=True, metavar="FEATURES"))
    """Files that `rectvlm embed` wrote, of one encoder."""
    out: Path | None = field(default=None, metadata=argument(metavar="FILE"))
    """JSON file of the scores; by default `FEATURES.probe-SPLIT.json` beside the first file."""
    split: Split = "valid"
    """Split that is scored; the probe learns on the train split."""
    bootstrap: int = field(default=1000, metadata=argument(metavar="N", minimum=0))
    """Number of bootstrap resamples for the intervals, 0 for none."""
    seed: int = 0
    """Seed of the split that chooses C, and of the resamples."""

    @property
    def output_path(self) -> Path:
        """JSON file of the scores."""
        first = self.features[0]
        return self.out or first.with_name(f"{first.stem}.probe-{self.split}.json")
