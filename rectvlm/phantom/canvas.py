"""The canvas of a phantom: patient coordinates, and shapes with soft edges to paint.

Patient coordinates are mm from the middle of the chest: x to the patient's left, y to posterior, z
to superior. Arrays are canonical, (z, y, x). A shape is an occupancy in [0, 1] that falls off over
one voxel, so that edges show partial volume as in a real CT. Dimensions are those of an average
adult; the patient's build stretches them.
"""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from rectvlm.labels import REGION_BY_NAME

ScalarField = NDArray[np.floating]
"""Values (Z, Y, X) on the canvas or in a box of it."""
IndexBox = tuple[slice, slice, slice]
PatientPoint = tuple[float, float, float]
"""Patient coordinates (x, y, z), mm."""

REGION_IDS = {name: region.id for name, region in REGION_BY_NAME.items()}
EDGE_WIDTH_MM = 2.5
"""Width over which an edge falls off: about one voxel in plane."""


@dataclass(frozen=True)
class PatientBuild:
    """Body of one patient and grid of the scan."""

    shape: tuple[int, int, int]
    """Voxels (z, y, x)."""
    spacing_mm: tuple[float, float, float]
    """Voxel size (z, y, x), mm."""
    scale: tuple[float, float, float]
    """Stretch of the anatomy along (x, y, z)."""
    roll_radians: float
    """Rotation about the long axis of the body."""
    lean_per_mm: float
    """Sideways shift for each mm of height, mm."""
    fat_mm: float
    """Thickness of the fat under the skin."""
    heart_size: float
    """Size of the heart; 1 is normal."""
    blood_hu: float
    """HU of blood: about 42 without contrast medium, more with."""
    pericardial_effusion_mm: float
    """Thickness of a pericardial effusion, 0 for none; the lungs make way for it."""
    dome_height_mm: float
    """Height of the diaphragm above average."""


@dataclass
class PhantomCanvas:
    """The volume being painted, and the distances that organs and lesions share."""

    build: PatientBuild
    """Patient who is painted."""
    hu: ScalarField
    """HU (Z, Y, X)."""
    regions: NDArray[np.uint8]
    """Region ids (Z, Y, X)."""
    lesions: NDArray[np.uint8]
    """Lesion bits (Z, Y, X)."""
    x: ScalarField
    """Patient coordinate (Z, Y, X), mm."""
    y: ScalarField
    """Patient coordinate (Z, Y, X), mm."""
    z: ScalarField
    """Patient coordinate (Z, 1, 1), mm."""
    distances_mm: dict[str, ScalarField] = field(default_factory=dict)
    """Signed distances, positive inside, to "body", "cage", "cavity", "heart" and "lung", and above
    the diaphragm ("dome")."""

    def index_box(self, points: NDArray[np.float64], margin_mm: float) -> IndexBox:
        """Find the box of voxels around points (N, 3) in patient coordinates, with a margin."""
        build = self.build
        x, y, z = (points[:, n] * 1.0 for n in range(3))
        x = (x + build.lean_per_mm * z) * build.scale[0]
        y, z = y * build.scale[1], z * build.scale[2]
        cos, sin = np.cos(build.roll_radians), np.sin(build.roll_radians)
        along_axes = (z, x * sin + y * cos, x * cos - y * sin)
        slices = []
        for values, step, size in zip(along_axes, build.spacing_mm, build.shape, strict=True):
            centre = (size - 1) / 2
            low = int(np.floor((values.min() - margin_mm) / step + centre))
            high = int(np.ceil((values.max() + margin_mm) / step + centre)) + 1
            slices.append(slice(min(max(low, 0), size), min(max(high, 0), size)))
        return slices[0], slices[1], slices[2]

    def paint_shape(
        self, shape: "SoftShape", hu: float | ScalarField, region: int | None = None
    ) -> None:
        """Blend in HU by the shape's occupancy; with a region id (0 for none), set it too."""
        view = self.hu[shape.box]
        view += shape.occupancy * (hu - view)
        if region is not None:
            self.regions[shape.box][shape.occupancy > 0.5] = region

    def paint_field(
        self, occupancy: ScalarField, hu: float | ScalarField, region: int | None = None
    ) -> None:
        """Paint a shape that is given by the occupancy (Z, Y, X) of the entire canvas."""
        self.paint_shape(SoftShape(FULL_BOX, occupancy), hu, region)


@dataclass(frozen=True)
class SoftShape:
    """A shape with soft edges."""

    box: IndexBox
    """Box of voxels that holds the shape."""
    occupancy: ScalarField
    """Share of each voxel of the box that the shape fills, 0 to 1."""

    def masked(self, mask: NDArray[np.bool_]) -> "SoftShape":
        """Cut the shape by a mask (Z, Y, X) of the canvas."""
        return SoftShape(self.box, self.occupancy * mask[self.box])


FULL_BOX: IndexBox = (slice(None), slice(None), slice(None))


def soft_occupancy(distance: ScalarField, width: float = EDGE_WIDTH_MM) -> ScalarField:
    """Occupancy of voxels at a signed distance (mm, positive inside) from a surface."""
    out: ScalarField = distance * np.float32(1 / width)
    out += np.float32(0.5)
    return np.clip(out, 0, 1, out=out)


def smooth_noise(rng: np.random.Generator, canvas: PhantomCanvas, scale: float) -> ScalarField:
    """Draw a smooth field (Z, Y, X) of mean 0 and variance about 1 that varies over `scale` mm.

    Normals on a coarse grid are spread by separable raised-cosine weights and rescaled.
    """
    weights = []
    for size, step in zip(canvas.build.shape, canvas.build.spacing_mm, strict=True):
        count = int(size * step / scale) + 2
        at = np.arange(size) * step / scale
        distance = np.abs(at[:, None] - np.arange(count)[None])
        tent = np.where(distance < 1, 0.5 + 0.5 * np.cos(np.pi * distance), 0)
        weights.append((tent / np.sqrt((tent**2).sum(1, keepdims=True))).astype(np.float32))
    coarse = rng.standard_normal([w.shape[1] for w in weights], dtype=np.float32)
    wz, wy, wx = weights
    spread = np.tensordot(wz, coarse, 1)
    return np.ascontiguousarray(np.matmul(np.matmul(wy, spread), wx.T), dtype=np.float32)


def make_ellipsoid(
    canvas: PhantomCanvas, centre: PatientPoint, axes: PatientPoint, width: float = EDGE_WIDTH_MM
) -> SoftShape:
    """Make an ellipsoid with semi-axes along (x, y, z), mm."""
    box = canvas.index_box(np.array([centre]), max(axes) * 1.1 + 4)
    return SoftShape(box, soft_occupancy(_ellipsoid_distance(canvas, box, centre, axes), width))


def _ellipsoid_distance(
    canvas: PhantomCanvas, box: IndexBox, centre: PatientPoint, axes: PatientPoint
) -> ScalarField:
    """Distance (mm, positive inside) to an ellipsoid's surface along the ray from its centre."""
    dx, dy = canvas.x[box] - np.float32(centre[0]), canvas.y[box] - np.float32(centre[1])
    dz = canvas.z[box[0]] - np.float32(centre[2])
    length = np.sqrt(dx * dx + dy * dy + dz * dz)
    level = np.sqrt((dx / axes[0]) ** 2 + (dy / axes[1]) ** 2 + (dz / axes[2]) ** 2)
    np.maximum(level, np.float32(0.02), out=level)
    return np.asarray(np.maximum(length, 1e-3) * (1 / level - 1), dtype=np.float32)


def make_tube(
    canvas: PhantomCanvas,
    path: NDArray[np.float64],
    radii: NDArray[np.float64] | float,
    flat: float = 1.0,
) -> SoftShape:
    """Make a tube along a path. A tube thinner than a voxel is fainter, not wider.

    Args:
        canvas: canvas that the tube is for.
        path: points (N, 3) in patient coordinates.
        radii: one radius, or one at each point (N,), mm.
        flat: below 1, shortens distances along z, which spreads a thin tube over its slice as a
            thick slice does.
    """
    radii = np.broadcast_to(np.asarray(radii, dtype=float), (len(path),))
    box = canvas.index_box(path, float(radii.max()) + 4)
    occupancy = np.zeros(canvas.hu[box].shape, np.float32)
    for a, b, ra, rb in zip(path[:-1], path[1:], radii[:-1], radii[1:], strict=True):
        inner = canvas.index_box(np.stack([a, b]), max(ra, rb) + 3)
        if any(s.stop <= s.start for s in inner):
            continue
        local = tuple(
            slice(s.start - o.start, s.stop - o.start) for s, o in zip(inner, box, strict=True)
        )
        view = occupancy[local]
        segment = _segment_occupancy(canvas, inner, a, b, float(ra), float(rb), flat)
        np.maximum(view, segment, out=view)
    return SoftShape(box, occupancy)


def _segment_occupancy(
    canvas: PhantomCanvas,
    box: IndexBox,
    a: NDArray[np.float64],
    b: NDArray[np.float64],
    ra: float,
    rb: float,
    flat: float,
) -> ScalarField:
    dx, dy = canvas.x[box] - np.float32(a[0]), canvas.y[box] - np.float32(a[1])
    dz = (canvas.z[box[0]] - np.float32(a[2])) * np.float32(flat)
    ux, uy, uz = (b - a) * (1, 1, flat)
    squared = max(ux * ux + uy * uy + uz * uz, 1e-6)
    projection = dx * np.float32(ux) + dy * np.float32(uy) + dz * np.float32(uz)
    along = np.clip(projection / np.float32(squared), 0, 1)
    dx = dx - along * np.float32(ux)
    dy = dy - along * np.float32(uy)
    dz = dz - along * np.float32(uz)
    distance = np.sqrt(dx * dx + dy * dy + dz * dz)
    radius = np.float32(ra) + along * np.float32(rb - ra)
    thin = min(1.0, (ra + rb) / 2 / (0.55 * EDGE_WIDTH_MM))
    return soft_occupancy(radius - distance) * np.float32(thin)


def catmull_rom_path(points: list[PatientPoint], count: int = 12) -> NDArray[np.float64]:
    """Interpolate a smooth path (count, 3) through points (Catmull and Rom, 1974)."""
    p = np.array([points[0], *points, points[-1]], dtype=float)
    t = np.linspace(0, len(points) - 1 - 1e-6, count)
    n, u = t.astype(int), (t % 1)[:, None]
    a, b, c, d = p[n], p[n + 1], p[n + 2], p[n + 3]
    return 0.5 * (
        2 * b + (c - a) * u + (2 * a - 5 * b + 4 * c - d) * u**2 + (3 * b - a - 3 * c + d) * u**3
    )


def make_canvas(build: PatientBuild) -> PhantomCanvas:
    """Make an empty canvas (air) with its coordinates."""
    z, y, x = (
        ((np.arange(size) - (size - 1) / 2) * step).astype(np.float32)
        for size, step in zip(build.shape, build.spacing_mm, strict=True)
    )
    cos, sin = np.float32(np.cos(build.roll_radians)), np.float32(np.sin(build.roll_radians))
    height = z[:, None, None] / np.float32(build.scale[2])
    across = (x[None, :] * cos + y[:, None] * sin) / np.float32(build.scale[0])
    deep = (y[:, None] * cos - x[None, :] * sin) / np.float32(build.scale[1])
    return PhantomCanvas(
        build,
        hu=np.full(build.shape, -1000, np.float32),
        regions=np.zeros(build.shape, np.uint8),
        lesions=np.zeros(build.shape, np.uint8),
        x=np.ascontiguousarray(across[None] - np.float32(build.lean_per_mm) * height),
        y=np.ascontiguousarray(np.broadcast_to(deep[None], build.shape)),
        z=height,
    )


def smoothstep(values: ScalarField, low: float, high: float) -> ScalarField:
    """Rise smoothly from 0 below `low` to 1 above `high`."""
    t = np.clip((values - np.float32(low)) / np.float32(high - low), 0, 1)
    return np.asarray(t * t * (3 - 2 * t), dtype=np.float32)
