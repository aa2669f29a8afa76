"""Findings of a phantom, painted into its healthy chest.

Every painter follows the plan; the painters of the five lesions set their bit in `canvas.lesions`.
"""

import numpy as np
from numpy.typing import NDArray

from rectvlm.labels import LESION_BY_KEY
from rectvlm.lesion_bits import lesion_mask
from rectvlm.phantom.anatomy import height_above_oblique_fissure
from rectvlm.phantom.canvas import (
    FULL_BOX,
    REGION_IDS,
    PatientPoint,
    PhantomCanvas,
    ScalarField,
    SoftShape,
    catmull_rom_path,
    make_ellipsoid,
    make_tube,
    smooth_noise,
    smoothstep,
    soft_occupancy,
)
from rectvlm.phantom.patient_plan import PatientPlan
from rectvlm.phantom.vessels import (
    AORTA_PATH,
    BRONCHUS_PATHS,
    DESCENDING_AORTA_PATH,
    LEFT_ANTERIOR_DESCENDING_PATH,
    paint_bronchus,
)

VoxelMask = NDArray[np.bool_]


def paint_findings(canvas: PhantomCanvas, plan: PatientPlan, rng: np.random.Generator) -> None:
    """Paint all findings of the plan. Fluid comes first, since it displaces lung."""
    if plan.build.pericardial_effusion_mm:
        _paint_pericardial_effusion(canvas, rng)
    _paint_pleural_effusions(canvas, plan, rng)
    painters = (
        ("Mosaic attenuation pattern", _paint_mosaic_attenuation),
        ("Emphysema", _paint_emphysema),
        ("Interlobular septal thickening", _paint_septal_thickening),
        ("Pulmonary fibrotic sequela", _paint_fibrotic_sequela),
        ("Atelectasis", _paint_atelectasis),
        ("Bronchiectasis", _paint_bronchiectasis),
        ("Peribronchial thickening", _paint_peribronchial_thickening),
        ("Consolidation", _paint_consolidations),
        ("Lung opacity", _paint_ground_glass),
        ("Lung nodule", _paint_nodules),
        ("Lymphadenopathy", _paint_lymphadenopathy),
        ("Hiatal hernia", _paint_hiatal_hernia),
        ("Arterial wall calcification", _paint_aortic_calcification),
        ("Coronary artery wall calcification", _paint_coronary_calcification),
        ("Medical material", _paint_device),
    )
    for finding, painter in painters:
        if plan.present[finding]:
            painter(canvas, plan, rng)


def lobe_mask(canvas: PhantomCanvas, lobe: str) -> VoxelMask:
    """Voxels of one lobe."""
    return np.asarray(canvas.regions == REGION_IDS[lobe])


def _mark_lesion(canvas: PhantomCanvas, key: str, part: SoftShape) -> None:
    canvas.lesions[part.box][part.occupancy > 0.5] |= np.uint8(LESION_BY_KEY[key].mask_value)


def _paint_pericardial_effusion(canvas: PhantomCanvas, rng: np.random.Generator) -> None:
    heart, dome = canvas.distances_mm["heart"], canvas.distances_mm["dome"]
    thickness = canvas.build.pericardial_effusion_mm * (0.85 + 0.15 * smoothstep(-canvas.z, 0, 60))
    depth = -heart - 1.5
    rim = np.minimum(depth, thickness - depth)
    # The sac ends below the great vessels and rests on the diaphragm.
    np.minimum(rim, 18 - canvas.z, out=rim)
    np.minimum(rim, dome + 4, out=rim)
    np.minimum(rim, canvas.distances_mm["cavity"] - 2, out=rim)
    spared = (canvas.regions > 0) & (canvas.regions != REGION_IDS["heart"]) & (canvas.regions > 5)
    part = SoftShape(FULL_BOX, soft_occupancy(np.asarray(rim, np.float32)) * ~spared)
    canvas.paint_shape(part, 12 + 3 * smooth_noise(rng, canvas, 15), 0)
    _mark_lesion(canvas, "pericardial_effusion", part)


def _paint_pleural_effusions(
    canvas: PhantomCanvas, plan: PatientPlan, rng: np.random.Generator
) -> None:
    """Paint crescents against the back wall, deepest at the base; their voxels are in no lobe."""
    cavity, lung = canvas.distances_mm["cavity"], canvas.distances_mm["lung"]
    for side, depth in plan.pleural_effusions_mm.items():
        on_side = (canvas.x > 0) == (side == "left")
        layer = (
            depth * smoothstep(canvas.y, -55, 62) * (0.12 + 0.88 * smoothstep(-canvas.z, -70, 95))
        )
        above = np.minimum(cavity, canvas.distances_mm["dome"] * 0.9 + 1)
        fluid = np.minimum(layer - above, lung + 1) - 3 * smoothstep(canvas.z, 40, 80)
        occupancy = soft_occupancy(np.asarray(fluid, np.float32)) * on_side * (canvas.lesions == 0)
        occupancy *= (canvas.regions <= 5) & (layer > 3)
        part = SoftShape(FULL_BOX, np.asarray(occupancy, np.float32))
        canvas.paint_shape(part, 11 + 4 * smooth_noise(rng, canvas, 18), 0)
        _mark_lesion(canvas, "pleural_effusion", part)


def _make_patch(
    canvas: PhantomCanvas,
    rng: np.random.Generator,
    free: VoxelMask,
    volume_ml: float,
    raggedness: float,
) -> SoftShape:
    """Make an irregular patch in `free`: about the voxels nearest to a random centre."""
    flat = np.flatnonzero(free)
    middle = flat[int(rng.integers(flat.size // 4, flat.size * 3 // 4))]
    centre = np.unravel_index(middle, free.shape)
    scale, build = canvas.build.scale, canvas.build
    dx = (canvas.x - canvas.x[centre]) * np.float32(scale[0])
    dy = (canvas.y - canvas.y[centre]) * np.float32(scale[1])
    dz = (canvas.z - canvas.z[centre[0], 0, 0]) * np.float32(scale[2])
    distance = np.sqrt(dx * dx + dy * dy + dz * dz)
    radius = (volume_ml * 1000 * 3 / (4 * np.pi)) ** (1 / 3)
    distance += np.float32(raggedness * radius) * smooth_noise(rng, canvas, max(11.0, 0.5 * radius))
    voxels = min(int(volume_ml * 1000 / np.prod(build.spacing_mm)), flat.size - 1)
    limit = np.partition(distance.reshape(-1)[flat], voxels)[voxels]
    return SoftShape(FULL_BOX, soft_occupancy(limit - distance, 4) * free)


def _smallest_lobe_ml(canvas: PhantomCanvas, lobes: list[str]) -> float:
    """Volume of the smallest of the given lobes."""
    voxels = min(int(lobe_mask(canvas, lobe).sum()) for lobe in lobes)
    return voxels * float(np.prod(canvas.build.spacing_mm)) / 1000


def _paint_consolidations(
    canvas: PhantomCanvas, plan: PatientPlan, rng: np.random.Generator
) -> None:
    largest_ml = 0.5 * _smallest_lobe_ml(canvas, plan.consolidations)
    volume_ml = min(float(rng.uniform(18, 90)), largest_ml)
    for lobe in plan.consolidations:
        part = _make_patch(canvas, rng, lobe_mask(canvas, lobe), volume_ml, 0.22)
        canvas.paint_shape(part, 32 + 12 * smooth_noise(rng, canvas, 8))
        _mark_lesion(canvas, "consolidation", part)
        # Air bronchograms: the lobe's airways stay open.
        branch = make_tube(
            canvas, catmull_rom_path(BRONCHUS_PATHS[lobe], 7), np.linspace(3.6, 1.6, 7)
        )
        canvas.paint_shape(branch.masked(lobe_mask(canvas, lobe)), -950)


def _paint_ground_glass(canvas: PhantomCanvas, plan: PatientPlan, rng: np.random.Generator) -> None:
    if not plan.ground_glass:
        return
    largest_ml = 0.35 * _smallest_lobe_ml(canvas, plan.ground_glass)
    volume_ml = min(float(rng.uniform(25, 130)), largest_ml)
    solid = canvas.lesions != 0
    for lobe in plan.ground_glass:
        free = lobe_mask(canvas, lobe) & ~solid
        free_ml = 0.6 * free.sum() * np.prod(canvas.build.spacing_mm) / 1000
        part = _make_patch(canvas, rng, free, min(volume_ml, free_ml), 0.2)
        haze = float(rng.uniform(240, 340)) + 30 * smooth_noise(rng, canvas, 10)
        # Haze adds to the lung and leaves its vessels visible.
        canvas.hu += part.occupancy * haze * smoothstep(-canvas.hu, 200, 600)
        _mark_lesion(canvas, "ground_glass_opacity", part)


def _paint_nodules(canvas: PhantomCanvas, plan: PatientPlan, rng: np.random.Generator) -> None:
    lung = canvas.distances_mm["lung"]
    consolidated = lesion_mask(canvas.lesions, LESION_BY_KEY["consolidation"])
    for nodule in plan.nodules:
        radius = nodule.diameter_mm / 2
        lobe_voxels = lobe_mask(canvas, nodule.lobe)
        bulk = lobe_voxels & (lung > radius + 4) & ~consolidated
        bulk &= np.abs(height_above_oblique_fissure(canvas)) > radius + 2
        flat = np.flatnonzero(bulk if bulk.any() else lobe_voxels)
        spot = np.unravel_index(int(flat[int(rng.integers(flat.size))]), lobe_voxels.shape)
        centre = (float(canvas.x[spot]), float(canvas.y[spot]), float(canvas.z[spot[0], 0, 0]))
        stretch = rng.uniform(0.95, 1.05, 3)
        axes = [radius * float(k) / s for k, s in zip(stretch, canvas.build.scale, strict=True)]
        part = make_ellipsoid(canvas, centre, (axes[0], axes[1], axes[2]))
        part = part.masked(lobe_voxels)
        canvas.paint_shape(part, float(rng.uniform(25, 60)))
        _mark_lesion(canvas, "lung_nodule", part)


def _add_to_aerated_lung(
    canvas: PhantomCanvas, occupancy: ScalarField, hu: float | ScalarField
) -> None:
    """Add HU to aerated lung, but not to vessels and lesions."""
    in_lobe = (canvas.regions > 0) & (canvas.regions <= 5)
    canvas.hu += occupancy * hu * in_lobe * smoothstep(-canvas.hu, 500, 750)


def _paint_mosaic_attenuation(
    canvas: PhantomCanvas, plan: PatientPlan, rng: np.random.Generator
) -> None:
    _add_to_aerated_lung(canvas, smoothstep(smooth_noise(rng, canvas, 24), -0.1, 0.25), 105)


def _paint_emphysema(canvas: PhantomCanvas, plan: PatientPlan, rng: np.random.Generator) -> None:
    upper = (canvas.regions == REGION_IDS["right upper lobe"]) | (
        canvas.regions == REGION_IDS["left upper lobe"]
    )
    holes = smoothstep(smooth_noise(rng, canvas, 10), 0.35, 0.7) * upper
    view = holes * smoothstep(-canvas.hu, 500, 700)
    canvas.hu += view * (-978 - canvas.hu)


def _paint_septal_thickening(
    canvas: PhantomCanvas, plan: PatientPlan, rng: np.random.Generator
) -> None:
    """Paint thin sheets between lobules, near the pleura of the lower half."""
    walls = np.minimum(np.abs(smooth_noise(rng, canvas, 13)), np.abs(smooth_noise(rng, canvas, 13)))
    rim = smoothstep(-canvas.distances_mm["lung"], -26, -18) * smoothstep(-canvas.z, -20, 10)
    _add_to_aerated_lung(canvas, smoothstep(-walls, -0.17, -0.05) * rim, 420)


def _paint_fibrotic_sequela(
    canvas: PhantomCanvas, plan: PatientPlan, rng: np.random.Generator
) -> None:
    """Paint strands from a thickened apical pleura."""
    lobe = plan.lobe_by_finding["Pulmonary fibrotic sequela"]
    sign = 1 if lobe.startswith("left") else -1
    lobe_voxels = lobe_mask(canvas, lobe)
    cap = soft_occupancy(7 - canvas.distances_mm["lung"]) * lobe_voxels * (canvas.z > 84)
    canvas.paint_field(np.asarray(cap, np.float32), 0)
    for _ in range(6):
        start = np.array((sign * rng.uniform(30, 62), rng.uniform(-30, 45), rng.uniform(92, 108)))
        end = np.array((sign * rng.uniform(34, 70), rng.uniform(-30, 45), rng.uniform(48, 70)))
        middle = (start + end) / 2 + rng.uniform(-10, 10, 3)
        part = make_tube(
            canvas,
            catmull_rom_path([tuple(start), tuple(middle), tuple(end)], 6),
            float(rng.uniform(1.8, 2.6)),
            flat=0.7,
        )
        canvas.paint_shape(part.masked(lobe_voxels), -20)


def _paint_atelectasis(canvas: PhantomCanvas, plan: PatientPlan, rng: np.random.Generator) -> None:
    """Paint a band (plate atelectasis) near the base of a lobe."""
    lobe = plan.lobe_by_finding["Atelectasis"]
    lobe_voxels = lobe_mask(canvas, lobe)
    flat = np.flatnonzero(lobe_voxels & (canvas.distances_mm["lung"] > 9))
    low = flat[: max(1, flat.size // 2)]
    centre = np.unravel_index(
        int(low[int(rng.integers(low.size // 3, low.size))]), lobe_voxels.shape
    )
    dx, dy = canvas.x - canvas.x[centre], canvas.y - canvas.y[centre]
    dz = canvas.z - canvas.z[centre[0], 0, 0]
    tilt, turn = rng.uniform(0.7, 1.1), rng.uniform(-0.7, 0.7)
    normal = (np.sin(tilt) * np.sin(turn), np.sin(tilt) * np.cos(turn), np.cos(tilt))
    across = dx * np.float32(normal[0]) + dy * np.float32(normal[1]) + dz * np.float32(normal[2])
    across += 1.5 * smooth_noise(rng, canvas, 25)
    away = np.sqrt(dx * dx + dy * dy + dz * dz)
    band = soft_occupancy(3.4 - np.abs(across)) * soft_occupancy(38 - away, 10) * lobe_voxels
    canvas.paint_field(np.asarray(band, np.float32), 5)


def _draw_airway_branches(
    canvas: PhantomCanvas, lobe: str, rng: np.random.Generator, count: int
) -> list[NDArray[np.float64]]:
    """Draw airway paths that fan out from the end of a lobe's bronchus."""
    points = np.array(BRONCHUS_PATHS[lobe])
    hub, onwards = points[1], points[2] - points[1]
    paths = []
    for n in range(count):
        turn = rng.uniform(-9, 9, 3) + np.array((0, (n - (count - 1) / 2) * 16, 0))
        middle, end = hub + 0.6 * onwards + turn, hub + 1.35 * onwards + 2 * turn
        paths.append(catmull_rom_path([tuple(hub), tuple(middle), tuple(end)], 7))
    return paths


def _paint_bronchiectasis(
    canvas: PhantomCanvas, plan: PatientPlan, rng: np.random.Generator
) -> None:
    for path in _draw_airway_branches(canvas, plan.lobe_by_finding["Bronchiectasis"], rng, 4):
        paint_bronchus(canvas, path, np.linspace(4.6, 5.2, len(path)), 1.4)


def _paint_peribronchial_thickening(
    canvas: PhantomCanvas, plan: PatientPlan, rng: np.random.Generator
) -> None:
    for path in _draw_airway_branches(
        canvas, plan.lobe_by_finding["Peribronchial thickening"], rng, 4
    ):
        paint_bronchus(canvas, path, np.linspace(2.2, 1.4, len(path)), 3.2)


def _paint_lymphadenopathy(
    canvas: PhantomCanvas, plan: PatientPlan, rng: np.random.Generator
) -> None:
    centres_by_station: dict[str, list[PatientPoint]] = {
        "paratracheal": [(-20, 2, 44), (-19, 4, 64)],
        "subcarinal": [(0, 16, 4), (12, 18, -2)],
        "aortopulmonary": [(34, 6, 36), (30, -12, 34)],
    }
    for station in plan.enlarged_stations:
        for centre in centres_by_station[station]:
            axes = rng.uniform(9, 12.5, 3)
            node = make_ellipsoid(canvas, centre, (axes[0], axes[1], axes[2]))
            canvas.paint_shape(node, 40 + 0.25 * (canvas.build.blood_hu - 40), 0)


def _paint_hiatal_hernia(
    canvas: PhantomCanvas, plan: PatientPlan, rng: np.random.Generator
) -> None:
    """Paint a pouch of stomach behind the heart: wall, fluid, and air in front of it."""
    r = float(rng.uniform(19, 25))
    centre = (6.0, 24.0, -72.0)
    pouch = make_ellipsoid(canvas, centre, (r * 1.15, r * 0.85, r))
    canvas.paint_shape(pouch, 42, REGION_IDS["stomach"])
    # The pouch displaces lesions.
    canvas.lesions[pouch.box][pouch.occupancy > 0.5] = 0
    inside = make_ellipsoid(canvas, centre, (r * 1.15 - 5, r * 0.85 - 5, r - 5))
    canvas.paint_shape(inside, 18)
    air = SoftShape(inside.box, inside.occupancy * soft_occupancy(centre[1] - canvas.y[inside.box]))
    canvas.paint_shape(air, -940)


def _paint_calcifications(
    canvas: PhantomCanvas, points: NDArray[np.float64], rng: np.random.Generator
) -> None:
    for point in points:
        r = float(rng.uniform(2.0, 3.4))
        speck = make_ellipsoid(canvas, (point[0], point[1], point[2]), (r, r, r * 1.4))
        canvas.paint_shape(speck, float(rng.uniform(750, 1150)))


def _paint_aortic_calcification(
    canvas: PhantomCanvas, plan: PatientPlan, rng: np.random.Generator
) -> None:
    path = np.concatenate(
        [catmull_rom_path(AORTA_PATH, 30)[14:], catmull_rom_path(DESCENDING_AORTA_PATH, 30)[1:26]]
    )
    at = rng.choice(len(path), 12, replace=False)
    turn = rng.uniform(0, 2 * np.pi, 12)
    wall = 12.5 * np.stack([np.cos(turn), np.sin(turn), np.zeros(12)], axis=1)
    # On the arch the vessel runs forwards, so that its wall lies above and below it.
    arch = path[at, 2] > 36
    wall[arch] = wall[arch][:, [0, 2, 1]]
    _paint_calcifications(canvas, path[at] + wall, rng)


def _paint_coronary_calcification(
    canvas: PhantomCanvas, plan: PatientPlan, rng: np.random.Generator
) -> None:
    """Paint specks on the heart's front, along the left anterior descending artery."""
    path = catmull_rom_path(LEFT_ANTERIOR_DESCENDING_PATH, 40)
    n = np.sort(rng.choice(40, 7, replace=False))
    points = path[n].copy()
    for point in points:
        # Bring each point to the heart's surface, whatever the heart's size.
        for _ in range(12):
            box = canvas.index_box(point[None], 0.1)
            depth = float(canvas.distances_mm["heart"][tuple(s.start for s in box)])
            if abs(depth) < 1.5:
                break
            point[1] -= np.clip(depth, -6, 6) * 0.6
    _paint_calcifications(canvas, points, rng)


def _sternum_y_mm(canvas: PhantomCanvas, height: float) -> float:
    """Coordinate y of the sternum's middle at a height."""
    box = canvas.index_box(np.array([(0.0, -150.0, height), (0.0, 0.0, height)]), 0.1)
    column = box[0].start, slice(box[1].start, box[1].stop), box[2].start
    return float(canvas.y[column][np.argmin(np.abs(canvas.distances_mm["cage"][column] + 8))])


def _paint_device(canvas: PhantomCanvas, plan: PatientPlan, rng: np.random.Generator) -> None:
    if plan.device == "sternal wires":
        for height in np.linspace(-45, 70, 6):
            loop = np.linspace(0, 2 * np.pi, 13)
            front = _sternum_y_mm(canvas, float(height))
            ring = np.stack(
                [13 * np.cos(loop), front + 8 * np.sin(loop), np.full(13, height)], axis=1
            )
            canvas.paint_shape(make_tube(canvas, ring, 1.9, flat=0.4), 3000)
        return
    side = 1 if plan.device == "pacemaker" else -1
    size = (20.0, 6.0, 22.0) if plan.device == "pacemaker" else (11.0, 6.0, 11.0)
    front = -78.0 if plan.device == "pacemaker" else -84.0
    canvas.paint_shape(make_ellipsoid(canvas, (side * 78, front, 74), size), 2800)
    vein: list[PatientPoint] = [
        (side * 74, front, 84),
        (side * 58, -44, 98),
        (-25, -22, 74),
        (-27, -18, 30),
    ]
    if plan.device == "pacemaker":
        vein += [(-22, -18, -30), (10, -44, -60)]
    canvas.paint_shape(make_tube(canvas, catmull_rom_path(vein, 30), 1.6, flat=0.8), 2200)
