"""What a benchmark measured: repetitions by case, their spread, and tables of them."""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from rectvlm.types import JsonObject

Plot = Literal["bars", "lines", "stack", "none"]
Direction = Literal["lower", "higher", "neither"]


@dataclass(frozen=True)
class Measurement:
    """Repetitions of one case at one point."""

    case: str
    """What was measured, for example `folded`."""
    at: str
    """Point at which it was measured, for example the number of patches; empty where there is only
    one."""
    values: tuple[float, ...]
    """Every repetition, in the unit of the comparison."""

    @property
    def median(self) -> float:
        """Median of the repetitions."""
        return statistics.median(self.values)

    @property
    def quartiles(self) -> tuple[float, float]:
        """First and third quartile of the repetitions; the range of fewer than four."""
        if len(self.values) < 4:
            return min(self.values), max(self.values)
        low, _, high = statistics.quantiles(self.values, n=4, method="inclusive")
        return low, high


@dataclass(frozen=True)
class Comparison:
    """Cases that were measured in turns in one run, with one plot."""

    title: str
    unit: str
    measurements: tuple[Measurement, ...]
    better: Direction = "lower"
    """Which values are better; `neither` where a value is not judged."""
    plot: Plot = "bars"
    """`bars` compares cases, `lines` shows growth over `at`, `stack` piles the cases of a bar."""
    at_label: str = ""
    """What `at` counts, with its unit."""
    baseline: str | None = None
    """Case to which the table compares the others."""
    note: str = ""

    @classmethod
    def from_json(cls, values: JsonObject) -> "Comparison":
        """Read what `asdict` wrote."""
        measurements = tuple(
            Measurement(row["case"], row["at"], tuple(row["values"]))
            for row in values["measurements"]
        )
        return cls(**values | {"measurements": measurements})

    def find(self, case: str, at: str) -> Measurement | None:
        """Find the measurement of a case at a point."""
        for measurement in self.measurements:
            if (measurement.case, measurement.at) == (case, at):
                return measurement
        return None


@dataclass(frozen=True)
class MissingPeer:
    """A package that the benchmark would have compared with."""

    name: str
    install: str
    """Command that installs it."""


@dataclass(frozen=True)
class SectionResult:
    """What one benchmark found."""

    name: str
    title: str
    command: str
    """Command that repeats it."""
    seconds: float
    """Duration of the benchmark, seconds."""
    facts: JsonObject
    """Settings and raw figures."""
    comparisons: tuple[Comparison, ...] = ()
    text: str = ""
    """Markdown of the report: circumstances and the benchmark's own tables."""
    missing_peers: tuple[MissingPeer, ...] = ()
    failure: str | None = None
    """Why there are no figures."""

    @classmethod
    def from_json(cls, values: JsonObject) -> "SectionResult":
        """Read what `to_json` wrote."""
        parts = {
            "comparisons": tuple(map(Comparison.from_json, values["comparisons"])),
            "missing_peers": tuple(MissingPeer(**peer) for peer in values["missing_peers"]),
        }
        return cls(**values | parts)

    def to_json(self) -> JsonObject:
        """Plain values."""
        return asdict(self)


@dataclass
class Repetitions:
    """Collects repetitions by case and point, in the order in which they come first."""

    values: dict[tuple[str, str], list[float]] = field(default_factory=dict)

    def add(self, case: str, value: float | Iterable[float], at: Any = "") -> None:
        """Add one repetition of a case at a point, or several."""
        values = self.values.setdefault((case, str(at)), [])
        if isinstance(value, Iterable):
            values += value
        else:
            values.append(value)

    def to_measurements(self) -> tuple[Measurement, ...]:
        """All of them."""
        return tuple(
            Measurement(case, at, tuple(values)) for (case, at), values in self.values.items()
        )


def make_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Write a Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def format_value(value: float) -> str:
    """Write a value with three significant digits, from 1,000 on as a whole number."""
    if abs(value) >= 999.5:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def make_comparison_table(comparison: Comparison) -> str:
    """Write a comparison as a Markdown table: medians, spread, and the ratio to the baseline."""
    has_points = any(measurement.at for measurement in comparison.measurements)
    columns = [comparison.at_label] if has_points else []
    columns += ["case", f"median, {comparison.unit}", "quartiles", "repetitions"]
    if comparison.baseline is not None:
        columns.append(f"of {comparison.baseline}")
    rows: list[list[str]] = []
    for measurement in comparison.measurements:
        low, high = (format_value(value) for value in measurement.quartiles)
        cells = [measurement.at] if has_points else []
        cells += [measurement.case, format_value(measurement.median), f"{low} to {high}"]
        cells.append(str(len(measurement.values)))
        if comparison.baseline is not None:
            cells.append(_format_ratio(comparison, measurement))
        rows.append(cells)
    return make_table(columns, rows)


def _format_ratio(comparison: Comparison, measurement: Measurement) -> str:
    assert comparison.baseline is not None
    baseline = comparison.find(comparison.baseline, measurement.at)
    if baseline is None or baseline.median == 0:
        return ""
    return f"{measurement.median / baseline.median:.2f}"
