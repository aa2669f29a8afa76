"""Heart chambers, great vessels, esophagus, vessel trees of the lungs and airways of a phantom."""

import numpy as np
from numpy.typing import NDArray

from rectvlm.phantom.canvas import (
    REGION_IDS,
    PatientPoint,
    PhantomCanvas,
    ScalarField,
    SoftShape,
    catmull_rom_path,
    make_ellipsoid,
    make_tube,
    soft_occupancy,
)

AORTA_PATH: list[PatientPoint] = [
    (-6, -26, -8),
    (-14, -30, 14),
    (-14, -26, 38),
    (2, -10, 54),
    (18, 14, 54),
    (24, 30, 38),
]
DESCENDING_AORTA_PATH: list[PatientPoint] = [
    (24, 30, 38),
    (25, 34, 0),
    (22, 34, -60),
    (12, 32, -150),
]
CARINA: PatientPoint = (-2, 8, 24)
HILUM_BY_SIDE: dict[str, PatientPoint] = {"right": (-44, 8, 2), "left": (46, 10, 4)}
LEFT_ANTERIOR_DESCENDING_PATH: list[PatientPoint] = [
    (10, -34, -6),
    (26, -56, -18),
    (42, -70, -40),
    (52, -72, -62),
]
"""Path of the left anterior descending coronary artery."""


def paint_heart_and_vessels(canvas: PhantomCanvas) -> None:
    """Paint heart, great vessels, esophagus and thyroid."""
    blood = canvas.build.blood_hu
    heart = canvas.distances_mm["heart"]
    canvas.paint_field(soft_occupancy(heart), 46, REGION_IDS["heart"])
    size = canvas.build.heart_size
    _paint_heart_chambers(canvas, size, blood)
    # The pericardium: a hairline in the fat around the heart.
    canvas.paint_field(
        0.5 * soft_occupancy(0.8 - np.abs(heart + 4 + canvas.build.pericardial_effusion_mm)), 30
    )

    def paint_vessel(
        points: list[PatientPoint], radius: float | list[float], region: str | None, count: int = 10
    ) -> None:
        path = catmull_rom_path(points, count)
        radii = np.interp(
            np.linspace(0, 1, count), np.linspace(0, 1, np.size(radius)), np.atleast_1d(radius)
        )
        canvas.paint_shape(make_tube(canvas, path, radii + 1.2), 40, None)
        canvas.paint_shape(
            make_tube(canvas, path, radii), blood, REGION_IDS[region] if region else None
        )

    paint_vessel([(4, -34, -10), (12, -32, 10), (16, -14, 22)], 13, None)
    paint_vessel([(16, -14, 20), (32, -2, 20), (48, 8, 14)], [11, 9, 7], None)
    paint_vessel([(14, -14, 18), (-10, -8, 14), (-32, -2, 10), (-46, 4, 4)], [11, 10, 9, 7], None)
    for left in (-1, 1):
        paint_vessel(
            [(14 * left, 6, -16), (34 * left, 8, -12), (50 * left, 12, -8)],
            [6, 5, 4],
            "pulmonary veins",
        )
    paint_vessel([(-26, -18, -8), (-27, -18, 30), (-25, -22, 72)], 9, "great vessels")
    paint_vessel([(-25, -22, 72), (2, -36, 80), (34, -30, 100), (46, -24, 118)], 6, "great vessels")
    paint_vessel([(-25, -22, 72), (-34, -26, 96), (-46, -22, 118)], 7, "great vessels")
    paint_vessel([(-12, -24, 52), (-16, -16, 80), (-24, -12, 146)], 6, "great vessels")
    paint_vessel([(4, -8, 56), (12, -6, 90), (18, -4, 146)], 4.5, "great vessels")
    paint_vessel([(14, 6, 56), (24, 8, 88), (36, -4, 108), (60, -20, 114)], 5, "great vessels")
    paint_vessel(AORTA_PATH, [16, 16, 15, 14, 13], "aorta", 18)
    paint_vessel(DESCENDING_AORTA_PATH, [13, 12, 11], "aorta", 12)
    gullet = catmull_rom_path(
        [(4, 26, 146), (3, 28, 40), (4, 27, -20), (10, 22, -70), (26, 8, -100)], 16
    )
    canvas.paint_shape(make_tube(canvas, gullet, 7.5), 38, REGION_IDS["esophagus"])
    canvas.paint_shape(make_tube(canvas, gullet[:9], 1.6), -500)
    for left in (-1, 1):
        canvas.paint_shape(
            make_ellipsoid(canvas, (17 * left, -2, 138), (8, 10, 18)), 100, REGION_IDS["thyroid"]
        )


def _paint_heart_chambers(canvas: PhantomCanvas, size: float, blood: float) -> None:
    """Paint the blood within the muscle: left and right ventricles, both atria."""
    grow, drop = 2 * size - 1, 30 * (size - 1)
    for (x, y, z), axes, level in (
        ((38, -34, -52), (27, 20, 22), 0.0),
        ((4, -50, -46), (26, 14, 28), 0.0),
        ((-24, -20, -34), (20, 24, 30), -2.0),
        ((0, 6, -14), (30, 14, 19), 2.0),
    ):
        part = make_ellipsoid(
            canvas, (x * grow, y, z - drop), (axes[0] * size, axes[1] * size, axes[2] * size), 5
        )
        inside = SoftShape(
            part.box, part.occupancy * soft_occupancy(canvas.distances_mm["heart"][part.box] - 4)
        )
        canvas.paint_shape(inside, blood - 3 + level)


def paint_vessel_tree(canvas: PhantomCanvas, rng: np.random.Generator) -> None:
    """Paint branching, tapering vessels from each hilum to points spread over its lung."""
    lung = canvas.distances_mm["lung"]
    for side, hilum in HILUM_BY_SIDE.items():
        left = side == "left"
        inside = np.flatnonzero((lung > 5) & ((canvas.x > 0) == left))
        chosen = inside[np.sort(rng.choice(inside.size, 230, replace=False))]
        coordinates = [
            _values_at(field, chosen, canvas) for field in (canvas.x, canvas.y, canvas.z)
        ]
        targets = np.stack(coordinates, axis=1)
        for a, b, radius in _grow_vessel_tree(np.array(hilum, dtype=float), targets):
            part = make_tube(canvas, np.stack([a, b]), radius, flat=0.6)
            canvas.paint_shape(
                SoftShape(part.box, part.occupancy * (lung[part.box] > -2)),
                max(canvas.build.blood_hu - 10, 30),
            )


def _values_at(
    values: ScalarField, flat: NDArray[np.intp], canvas: PhantomCanvas
) -> NDArray[np.float64]:
    return np.broadcast_to(values, canvas.build.shape).reshape(-1)[flat].astype(float)


def _grow_vessel_tree(
    root: NDArray[np.float64], targets: NDArray[np.float64]
) -> list[tuple[NDArray[np.float64], NDArray[np.float64], float]]:
    """Grow a tree over the targets; return start, end and radius of each branch.

    From near to far, each target joins the node that makes the shortest, straightest way. A
    branch's radius follows Murray's law (1926): its cube is proportional to the number of tips that
    it feeds.
    """
    order = np.argsort(((targets - root) ** 2).sum(1), kind="stable")
    nodes = np.concatenate([root[None], targets[order]])
    reach = np.sqrt(((nodes - root) ** 2).sum(1))
    parent = np.zeros(len(nodes), int)
    for n in range(1, len(nodes)):
        step = np.sqrt(((nodes[:n] - nodes[n]) ** 2).sum(1))
        parent[n] = int(np.argmin(step + 0.45 * reach[:n]))
    tips = np.zeros(len(nodes))
    for n in range(len(nodes) - 1, 0, -1):
        tips[n] = max(tips[n], 1)
        tips[parent[n]] += tips[n]
    radii = np.minimum(0.85 * tips ** (1 / 3), 4.8)
    return [(nodes[parent[n]], nodes[n], float(radii[n])) for n in range(1, len(nodes))]


BRONCHUS_PATHS: dict[str, list[PatientPoint]] = {
    "right upper lobe": [(-30, 8, 12), (-50, 4, 24), (-62, -4, 44)],
    "right middle lobe": [(-40, 8, -2), (-56, -14, -18), (-66, -34, -30)],
    "right lower lobe": [(-40, 8, -2), (-52, 24, -26), (-62, 38, -56)],
    "left upper lobe": [(44, 10, 2), (54, -4, 20), (62, -14, 42)],
    "left lower lobe": [(44, 10, 2), (56, 26, -22), (66, 40, -52)],
}
"""Paths of the lobar bronchi, from the hilum outwards."""


def paint_airways(canvas: PhantomCanvas) -> None:
    """Paint trachea, main and lobar bronchi: a thin wall around air."""
    trachea = catmull_rom_path([(-1, 4, 146), (-1, 6, 80), CARINA], 8)
    main = {
        "right": catmull_rom_path([CARINA, (-20, 9, 12), (-40, 8, -2)], 6),
        "left": catmull_rom_path([CARINA, (20, 11, 14), (44, 10, 2)], 6),
    }
    for path in main.values():
        paint_bronchus(canvas, path, np.linspace(7.5, 5.5, len(path)), 1.5)
    for points in BRONCHUS_PATHS.values():
        paint_bronchus(canvas, catmull_rom_path(points, 7), np.linspace(4.2, 1.6, 7), 1.0)
    canvas.paint_shape(make_tube(canvas, trachea, 10.5), 40, 0)
    canvas.paint_shape(make_tube(canvas, trachea, 9), -1000, REGION_IDS["trachea"])
    for path in main.values():
        canvas.paint_shape(make_tube(canvas, path[:2], 6), -990, REGION_IDS["trachea"])


def paint_bronchus(
    canvas: PhantomCanvas, path: NDArray[np.float64], lumen_mm: NDArray[np.float64], wall_mm: float
) -> None:
    """Paint one airway, bounded by heart, fluid, diaphragm and chest wall.

    Args:
        canvas: canvas to paint on.
        path: points (N, 3) in patient coordinates.
        lumen_mm: radius of the lumen at each point (N,).
        wall_mm: thickness of the wall.
    """
    for radii, hu in ((lumen_mm + wall_mm, 20), (lumen_mm, -985)):
        part = make_tube(canvas, path, radii)
        lung, heart = canvas.distances_mm["lung"][part.box], canvas.distances_mm["heart"][part.box]
        middle = np.abs(canvas.x[part.box]) < 46
        free = ((lung > 3) | middle) & (heart < -4) & (canvas.distances_mm["dome"][part.box] > 4)
        free &= canvas.lesions[part.box] == 0
        canvas.paint_shape(SoftShape(part.box, part.occupancy * free), hu)
