"""Random smooth movements of a volume: rotation, scale, shift and elastic deformation.

They become one sampling grid. It is computed in mm, since voxels are longer along z: a rotation
stays a rotation, and the deformation is equally smooth in all directions. Parameters are drawn on
the CPU and are the same for every device; only the dense grid is made on the device.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from rectvlm.config import ELASTIC_LATTICE_MM, AugmentConfig

GridShape = tuple[int, int, int]
GridSpacing = tuple[float, float, float]


@dataclass(frozen=True)
class SpatialWarp:
    """Source of each voxel of a moved volume, in (x, y, z) from −1 to 1 across the grid."""

    affine: Tensor
    """(3, 4) matrix for `affine_grid`, on the CPU."""
    control_points: Tensor
    """(Lz, Ly, Lx, 3) displacements at the control points of a cubic B-spline, on the CPU."""

    @property
    def is_identity(self) -> bool:
        """Whether it moves nothing."""
        return torch.equal(self.affine, torch.eye(3, 4)) and not self.control_points.any()

    def sampling_grid(self, shape: GridShape, spacing: GridSpacing, device: torch.device) -> Tensor:
        """Make the grid (1, Z, Y, X, 3) for `grid_sample` with `align_corners=False`."""
        grid = F.affine_grid(self.affine[None].to(device), [1, 1, *shape], align_corners=False)
        if not self.control_points.any():
            return grid
        field = self.control_points.to(device)
        bases = [_spline_basis(n, step) for n, step in zip(shape, spacing, strict=True)]
        z, y, x = (basis.to(device) for basis in bases)
        field = torch.einsum("zi,ijkc->zjkc", z, field)
        field = torch.einsum("yj,zjkc->zykc", y, field)
        return grid + torch.einsum("xk,zykc->zyxc", x, field)


def draw_warps(
    count: int, shape: GridShape, spacing: GridSpacing, config: AugmentConfig
) -> list[SpatialWarp]:
    """Draw warps from torch's global generator: as many numbers for any strength.

    A voxel at p mm from the centre comes from A (p + u(p)) + t. A rotates and scales; u is a
    free-form deformation (Rueckert et al., 1999) whose control points, `ELASTIC_LATTICE_MM` apart,
    move by at most the configured mm along each axis.
    """
    largest_angles = torch.tensor([config.tilt, config.tilt, config.rotate])
    angles = (torch.rand(count, 3) * 2 - 1) * largest_angles
    size = 1 + (torch.rand(count, 1, 1) * 2 - 1) * config.scale
    shift = (torch.rand(count, 3) * 2 - 1) * config.shift * 2
    points = [_control_point_count(n, step) for n, step in zip(shape, spacing, strict=True)]
    displacements_mm = (torch.rand(count, *points, 3) * 2 - 1) * config.elastic

    half_extents_mm = [n * step / 2 for n, step in zip(shape, spacing, strict=True)]
    half = torch.tensor(half_extents_mm).flip(0)
    rotation = size * _rotation_matrices(angles * (math.pi / 180))
    affines = torch.cat([rotation * half / half[:, None], shift[:, :, None]], 2)
    control_points = torch.einsum("bcd,bijkd->bijkc", rotation, displacements_mm) / half
    return [SpatialWarp(*pair) for pair in zip(affines, control_points, strict=True)]


def _rotation_matrices(angles: Tensor) -> Tensor:
    """Rotations (B, 3, 3) about x, then y, then z, by angles (B, 3) in radians."""
    cos, sin = angles.cos(), angles.sin()
    total = torch.eye(3).expand(len(angles), 3, 3)
    for axis in range(3):
        a, b = (axis + 1) % 3, (axis + 2) % 3
        rotation = torch.eye(3).repeat(len(angles), 1, 1)
        rotation[:, a, a], rotation[:, b, b] = cos[:, axis], cos[:, axis]
        rotation[:, a, b], rotation[:, b, a] = -sin[:, axis], sin[:, axis]
        total = rotation @ total
    return total


def _control_point_count(size: int, step: float) -> int:
    """Number of control points along an axis.

    A cubic spline needs one before and two after the cell of the last voxel.
    """
    return int((size - 0.5) * step / ELASTIC_LATTICE_MM) + 4


def _spline_basis(size: int, step: float) -> Tensor:
    """Weights (size, points) of the control points at each voxel centre; each row sums to 1."""
    at = (torch.arange(size) + 0.5) * step / ELASTIC_LATTICE_MM
    cell = at.floor()
    t = at - cell
    weights = (
        torch.stack(
            [(1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3], 1
        )
        / 6
    )
    basis = torch.zeros(size, _control_point_count(size, step))
    return basis.scatter_(1, cell.long()[:, None] + torch.arange(4), weights)
