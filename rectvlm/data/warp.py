"""Random smooth movements of a volume: rotation, size, shift and an elastic part, as one sampling grid.

All of it is made in millimetres, so that a rotation stays one, and the elastic part is equally smooth in all
directions, where voxels are longer along z. Parameters are drawn on the CPU and are the same for every device; only the
dense grid is made on the device.
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
    """Where each voxel of a moved volume comes from. Coordinates are (x, y, z), from −1 to 1 over the grid's sides."""

    affine: Tensor
    """(3, 4) for `affine_grid`, on the CPU."""
    control_points: Tensor
    """(Lz, Ly, Lx, 3): control points of a cubic B-spline that is added, on the CPU."""

    @property
    def is_identity(self) -> bool:
        """Whether it moves nothing."""
        return torch.equal(self.affine, torch.eye(3, 4)) and not self.control_points.any()

    def sampling_grid(self, shape: GridShape, spacing: GridSpacing, device: torch.device) -> Tensor:
        """(1, Z, Y, X, 3) for `grid_sample` with `align_corners=False`."""
        grid = F.affine_grid(self.affine[None].to(device), [1, 1, *shape], align_corners=False)
        if not self.control_points.any():
            return grid
        field = self.control_points.to(device)
        z, y, x = (
            _spline_basis(n, step).to(device) for n, step in zip(shape, spacing, strict=True)
        )
        field = torch.einsum("zi,ijkc->zjkc", z, field)
        field = torch.einsum("yj,zjkc->zykc", y, field)
        return grid + torch.einsum("xk,zykc->zyxc", x, field)


def draw_warps(
    count: int, shape: GridShape, spacing: GridSpacing, config: AugmentConfig
) -> list[SpatialWarp]:
    """Draw from torch's global generator, the same numbers whatever the strengths are.

    A voxel at p mm from the centre comes from A (p + u(p)) + t: A turns and scales, u is a free-form deformation
    (Rueckert et al., 1999) whose control points, a lattice of `ELASTIC_LATTICE_MM`, move by at most `elastic` mm along
    each axis.
    """
    angles = (torch.rand(count, 3) * 2 - 1) * torch.tensor(
        [config.tilt, config.tilt, config.rotate]
    )
    size = 1 + (torch.rand(count, 1, 1) * 2 - 1) * config.scale
    shift = (torch.rand(count, 3) * 2 - 1) * config.shift * 2
    points = [_control_point_count(n, step) for n, step in zip(shape, spacing, strict=True)]
    moved = (torch.rand(count, *points, 3) * 2 - 1) * config.elastic
    half = torch.tensor([n * step / 2 for n, step in zip(shape, spacing, strict=True)]).flip(0)
    turned = size * _rotation_matrices(angles * (math.pi / 180))
    linear = torch.cat([turned * half / half[:, None], shift[:, :, None]], 2)
    lattice = torch.einsum("bcd,bijkd->bijkc", turned, moved) / half
    return [SpatialWarp(*pair) for pair in zip(linear, lattice, strict=True)]


def _rotation_matrices(angles: Tensor) -> Tensor:
    """(B, 3, 3) from angles about x, y and z (B, 3), radians; applied in that order."""
    cos, sin = angles.cos(), angles.sin()
    total = torch.eye(3).expand(len(angles), 3, 3)
    for axis in range(3):
        a, b = (axis + 1) % 3, (axis + 2) % 3
        one = torch.eye(3).repeat(len(angles), 1, 1)
        one[:, a, a], one[:, b, b] = cos[:, axis], cos[:, axis]
        one[:, a, b], one[:, b, a] = -sin[:, axis], sin[:, axis]
        total = one @ total
    return total


def _control_point_count(size: int, step: float) -> int:
    """Control points along a side: a cubic spline needs one before, and two after, the cell of its last voxel."""
    return int((size - 0.5) * step / ELASTIC_LATTICE_MM) + 4


def _spline_basis(size: int, step: float) -> Tensor:
    """(size, points): weights of the control points at each voxel centre along a side; each row sums to 1."""
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
