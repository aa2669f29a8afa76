"""The findings of a phantom, painted into its healthy chest: five outlined lesions and the rest of the 18.

Every painter reads the plan and paints what it says; the ones of the five lesions set their bit in `canvas.lesions`.
"""

import numpy as np
from numpy.typing import NDArray

from rectvlm.data.phantom_anatomy import oblique_fissure
from rectvlm.data.phantom_canvas import (
    REGION,
    WHOLE,
    Canvas,
    Field,
    Part,
    Point,
    curve,
    ellipsoid,
    ramp,
    smooth_noise,
    soft,
    tube,
)
from rectvlm.data.phantom_plan import Plan
from rectvlm.data.phantom_vessels import AORTA, BRONCHI, DESCENDING, LAD, bronchus
from rectvlm.labels import LESION_BY_KEY

Mask = NDArray[np.bool_]


def draw_findings(canvas: Canvas, plan: Plan, rng: np.random.Generator) -> None:
    """Paint everything that the plan names. Fluid comes first: it displaces lung."""
    if plan.build.pericardial:
        _pericardial_effusion(canvas, rng)
    _pleural_effusions(canvas, plan, rng)
    painters = (
        ("Mosaic attenuation pattern", _mosaic),
        ("Emphysema", _emphysema),
        ("Interlobular septal thickening", _septal_thickening),
        ("Pulmonary fibrotic sequela", _fibrotic_sequela),
        ("Atelectasis", _atelectasis),
        ("Bronchiectasis", _bronchiectasis),
        ("Peribronchial thickening", _peribronchial_thickening),
        ("Consolidation", _consolidations),
        ("Lung opacity", _ground_glass),
        ("Lung nodule", _nodules),
        ("Lymphadenopathy", _lymphadenopathy),
        ("Hiatal hernia", _hiatal_hernia),
        ("Arterial wall calcification", _aortic_calcification),
        ("Coronary artery wall calcification", _coronary_calcification),
        ("Medical material", _device),
    )
    for finding, painter in painters:
        if plan.present[finding]:
            painter(canvas, plan, rng)


def lobe_mask(canvas: Canvas, lobe: str) -> Mask:
    """Voxels of one lobe."""
    return np.asarray(canvas.regions == REGION[lobe])


def _outline(canvas: Canvas, key: str, part: Part) -> None:
    canvas.lesions[part.box][part.occupancy > 0.5] |= np.uint8(1 << LESION_BY_KEY[key].bit)


def _pericardial_effusion(canvas: Canvas, rng: np.random.Generator) -> None:
    heart, dome = canvas.fields["heart"], canvas.fields["dome"]
    thickness = canvas.build.pericardial * (0.85 + 0.15 * ramp(-canvas.z, 0, 60))
    depth = -heart - 1.5
    rim = np.minimum(depth, thickness - depth)
    # The sac ends below the great vessels and rests on the diaphragm.
    np.minimum(rim, 18 - canvas.z, out=rim)
    np.minimum(rim, dome + 4, out=rim)
    np.minimum(rim, canvas.fields["cavity"] - 2, out=rim)
    spared = (canvas.regions > 0) & (canvas.regions != REGION["heart"]) & (canvas.regions > 5)
    part = Part(WHOLE, soft(np.asarray(rim, np.float32)) * ~spared)
    canvas.paint(part, 12 + 3 * smooth_noise(rng, canvas, 15), 0)
    _outline(canvas, "pericardial_effusion", part)


def _pleural_effusions(canvas: Canvas, plan: Plan, rng: np.random.Generator) -> None:
    """A crescent against the back wall, deepest at the base; its voxels belong to no lobe."""
    cavity, lung = canvas.fields["cavity"], canvas.fields["lung"]
    for side, depth in plan.effusions.items():
        own = (canvas.x > 0) == (side == "left")
        layer = depth * ramp(canvas.y, -55, 62) * (0.12 + 0.88 * ramp(-canvas.z, -70, 95))
        above = np.minimum(cavity, canvas.fields["dome"] * 0.9 + 1)
        fluid = np.minimum(layer - above, lung + 1) - 3 * ramp(canvas.z, 40, 80)
        occupancy = soft(np.asarray(fluid, np.float32)) * own * (canvas.lesions == 0)
        occupancy *= (canvas.regions <= 5) & (layer > 3)
        part = Part(WHOLE, np.asarray(occupancy, np.float32))
        canvas.paint(part, 11 + 4 * smooth_noise(rng, canvas, 18), 0)
        _outline(canvas, "pleural_effusion", part)


def _patch(canvas: Canvas, rng: np.random.Generator, free: Mask, volume: float, ragged: float) -> Part:
    """An irregular patch of about `volume` ml within `free`: the voxels nearest to a random centre, unevenly."""
    flat = np.flatnonzero(free)
    middle = flat[int(rng.integers(flat.size // 4, flat.size * 3 // 4))]
    centre = np.unravel_index(middle, free.shape)
    scale, build = canvas.build.scale, canvas.build
    dx = (canvas.x - canvas.x[centre]) * np.float32(scale[0])
    dy = (canvas.y - canvas.y[centre]) * np.float32(scale[1])
    dz = (canvas.z - canvas.z[centre[0], 0, 0]) * np.float32(scale[2])
    distance = np.sqrt(dx * dx + dy * dy + dz * dz)
    radius = (volume * 1000 * 3 / (4 * np.pi)) ** (1 / 3)
    distance += np.float32(ragged * radius) * smooth_noise(rng, canvas, max(11.0, 0.5 * radius))
    voxels = min(int(volume * 1000 / np.prod(build.spacing)), flat.size - 1)
    limit = np.partition(distance.reshape(-1)[flat], voxels)[voxels]
    return Part(WHOLE, soft(limit - distance, 4) * free)


def _smallest(canvas: Canvas, lobes: list[str]) -> float:
    """Volume of the smallest of some lobes, ml."""
    voxels = min(int(lobe_mask(canvas, lobe).sum()) for lobe in lobes)
    return voxels * float(np.prod(canvas.build.spacing)) / 1000


def _consolidations(canvas: Canvas, plan: Plan, rng: np.random.Generator) -> None:
    volume = min(float(rng.uniform(18, 90)), 0.5 * _smallest(canvas, plan.consolidations))
    for lobe in plan.consolidations:
        part = _patch(canvas, rng, lobe_mask(canvas, lobe), volume, 0.22)
        canvas.paint(part, 32 + 12 * smooth_noise(rng, canvas, 8))
        _outline(canvas, "consolidation", part)
        # Air bronchograms: the lobe's airways stay open.
        branch = tube(canvas, curve(BRONCHI[lobe], 7), np.linspace(3.6, 1.6, 7))
        canvas.paint(Part(branch.box, branch.occupancy * lobe_mask(canvas, lobe)[branch.box]), -950)


def _ground_glass(canvas: Canvas, plan: Plan, rng: np.random.Generator) -> None:
    if not plan.ground_glass:
        return
    volume = min(float(rng.uniform(25, 130)), 0.35 * _smallest(canvas, plan.ground_glass))
    solid = canvas.lesions != 0
    for lobe in plan.ground_glass:
        free = lobe_mask(canvas, lobe) & ~solid
        part = _patch(canvas, rng, free, min(volume, 0.6 * free.sum() * np.prod(canvas.build.spacing) / 1000), 0.2)
        haze = float(rng.uniform(240, 340)) + 30 * smooth_noise(rng, canvas, 10)
        # Haze adds to the lung and leaves its vessels visible.
        canvas.hu += part.occupancy * haze * ramp(-canvas.hu, 200, 600)
        _outline(canvas, "ground_glass_opacity", part)


def _nodules(canvas: Canvas, plan: Plan, rng: np.random.Generator) -> None:
    lung = canvas.fields["lung"]
    bit = np.uint8(1 << LESION_BY_KEY["consolidation"].bit)
    for nodule in plan.nodules:
        radius = nodule.diameter / 2
        own = lobe_mask(canvas, nodule.lobe)
        bulk = own & (lung > radius + 4) & ((canvas.lesions & bit) == 0)
        bulk &= np.abs(oblique_fissure(canvas)) > radius + 2
        flat = np.flatnonzero(bulk if bulk.any() else own)
        spot = np.unravel_index(int(flat[int(rng.integers(flat.size))]), own.shape)
        centre = (float(canvas.x[spot]), float(canvas.y[spot]), float(canvas.z[spot[0], 0, 0]))
        stretch = rng.uniform(0.95, 1.05, 3)
        axes = [radius * float(k) / s for k, s in zip(stretch, canvas.build.scale, strict=True)]
        part = ellipsoid(canvas, centre, (axes[0], axes[1], axes[2]))
        part = Part(part.box, part.occupancy * own[part.box])
        canvas.paint(part, float(rng.uniform(25, 60)))
        _outline(canvas, "lung_nodule", part)


def _add(canvas: Canvas, occupancy: Field, hu: float | Field) -> None:
    """Change aerated lung by `hu`, and leave vessels and lesions alone."""
    canvas.hu += occupancy * hu * ((canvas.regions > 0) & (canvas.regions <= 5)) * ramp(-canvas.hu, 500, 750)


def _mosaic(canvas: Canvas, plan: Plan, rng: np.random.Generator) -> None:
    _add(canvas, ramp(smooth_noise(rng, canvas, 24), -0.1, 0.25), 105)


def _emphysema(canvas: Canvas, plan: Plan, rng: np.random.Generator) -> None:
    upper = (canvas.regions == REGION["right upper lobe"]) | (canvas.regions == REGION["left upper lobe"])
    holes = ramp(smooth_noise(rng, canvas, 10), 0.35, 0.7) * upper
    view = holes * ramp(-canvas.hu, 500, 700)
    canvas.hu += view * (-978 - canvas.hu)


def _septal_thickening(canvas: Canvas, plan: Plan, rng: np.random.Generator) -> None:
    """Thin sheets between lobules, near the pleura of the lower half."""
    walls = np.minimum(np.abs(smooth_noise(rng, canvas, 13)), np.abs(smooth_noise(rng, canvas, 13)))
    rim = ramp(-canvas.fields["lung"], -26, -18) * ramp(-canvas.z, -20, 10)
    _add(canvas, ramp(-walls, -0.17, -0.05) * rim, 420)


def _fibrotic_sequela(canvas: Canvas, plan: Plan, rng: np.random.Generator) -> None:
    """Strands from a thickened apical pleura."""
    lobe = plan.lobe_of["Pulmonary fibrotic sequela"]
    sign = 1 if lobe.startswith("left") else -1
    own = lobe_mask(canvas, lobe)
    cap = soft(7 - canvas.fields["lung"]) * own * (canvas.z > 84)
    canvas.paint(Part(WHOLE, np.asarray(cap, np.float32)), 0)
    for _ in range(6):
        start = np.array((sign * rng.uniform(30, 62), rng.uniform(-30, 45), rng.uniform(92, 108)))
        end = np.array((sign * rng.uniform(34, 70), rng.uniform(-30, 45), rng.uniform(48, 70)))
        middle = (start + end) / 2 + rng.uniform(-10, 10, 3)
        part = tube(canvas, curve([tuple(start), tuple(middle), tuple(end)], 6), float(rng.uniform(1.8, 2.6)), flat=0.7)
        canvas.paint(Part(part.box, part.occupancy * own[part.box]), -20)


def _atelectasis(canvas: Canvas, plan: Plan, rng: np.random.Generator) -> None:
    """One or two bands (plate atelectasis) near the base of a lobe."""
    lobe = plan.lobe_of["Atelectasis"]
    own = lobe_mask(canvas, lobe)
    flat = np.flatnonzero(own & (canvas.fields["lung"] > 9))
    low = flat[: max(1, flat.size // 2)]
    centre = np.unravel_index(int(low[int(rng.integers(low.size // 3, low.size))]), own.shape)
    dx, dy = canvas.x - canvas.x[centre], canvas.y - canvas.y[centre]
    dz = canvas.z - canvas.z[centre[0], 0, 0]
    tilt, turn = rng.uniform(0.7, 1.1), rng.uniform(-0.7, 0.7)
    normal = (np.sin(tilt) * np.sin(turn), np.sin(tilt) * np.cos(turn), np.cos(tilt))
    across = dx * np.float32(normal[0]) + dy * np.float32(normal[1]) + dz * np.float32(normal[2])
    across += 1.5 * smooth_noise(rng, canvas, 25)
    away = np.sqrt(dx * dx + dy * dy + dz * dz)
    band = soft(3.4 - np.abs(across)) * soft(38 - away, 10) * own
    canvas.paint(Part(WHOLE, np.asarray(band, np.float32)), 5)


def _branches(canvas: Canvas, lobe: str, rng: np.random.Generator, count: int) -> list[NDArray[np.float64]]:
    """Airway paths that fan out from the end of a lobe's bronchus."""
    points = np.array(BRONCHI[lobe])
    hub, onwards = points[1], points[2] - points[1]
    paths = []
    for n in range(count):
        turn = rng.uniform(-9, 9, 3) + np.array((0, (n - (count - 1) / 2) * 16, 0))
        paths.append(
            curve([tuple(hub), tuple(points[1] + 0.6 * onwards + turn), tuple(hub + 1.35 * onwards + 2 * turn)], 7)
        )
    return paths


def _bronchiectasis(canvas: Canvas, plan: Plan, rng: np.random.Generator) -> None:
    for path in _branches(canvas, plan.lobe_of["Bronchiectasis"], rng, 4):
        bronchus(canvas, path, np.linspace(4.6, 5.2, len(path)), 1.4)


def _peribronchial_thickening(canvas: Canvas, plan: Plan, rng: np.random.Generator) -> None:
    for path in _branches(canvas, plan.lobe_of["Peribronchial thickening"], rng, 4):
        bronchus(canvas, path, np.linspace(2.2, 1.4, len(path)), 3.2)


def _lymphadenopathy(canvas: Canvas, plan: Plan, rng: np.random.Generator) -> None:
    where: dict[str, list[Point]] = {
        "paratracheal": [(-20, 2, 44), (-19, 4, 64)],
        "subcarinal": [(0, 16, 4), (12, 18, -2)],
        "aortopulmonary": [(34, 6, 36), (30, -12, 34)],
    }
    for station in plan.stations:
        for centre in where[station]:
            a = rng.uniform(9, 12.5, 3)
            canvas.paint(ellipsoid(canvas, centre, (a[0], a[1], a[2])), 40 + 0.25 * (canvas.build.blood - 40), 0)


def _hiatal_hernia(canvas: Canvas, plan: Plan, rng: np.random.Generator) -> None:
    """A pouch of stomach behind the heart: wall, fluid, and air in front of it."""
    r = float(rng.uniform(19, 25))
    centre = (6.0, 24.0, -72.0)
    pouch = ellipsoid(canvas, centre, (r * 1.15, r * 0.85, r))
    canvas.paint(pouch, 42, REGION["stomach"])
    # What it displaces is no longer there to be outlined.
    canvas.lesions[pouch.box][pouch.occupancy > 0.5] = 0
    inside = ellipsoid(canvas, centre, (r * 1.15 - 5, r * 0.85 - 5, r - 5))
    canvas.paint(inside, 18)
    air = Part(inside.box, inside.occupancy * soft(centre[1] - canvas.y[inside.box]))
    canvas.paint(air, -940)


def _specks(canvas: Canvas, points: NDArray[np.float64], rng: np.random.Generator) -> None:
    for point in points:
        r = float(rng.uniform(2.0, 3.4))
        stretched = (point[0], point[1], point[2])
        canvas.paint(ellipsoid(canvas, stretched, (r, r, r * 1.4)), float(rng.uniform(750, 1150)))


def _aortic_calcification(canvas: Canvas, plan: Plan, rng: np.random.Generator) -> None:
    path = np.concatenate([curve(AORTA, 30)[14:], curve(DESCENDING, 30)[1:26]])
    at = rng.choice(len(path), 12, replace=False)
    turn = rng.uniform(0, 2 * np.pi, 12)
    wall = 12.5 * np.stack([np.cos(turn), np.sin(turn), np.zeros(12)], axis=1)
    # On the arch the vessel runs forwards, so that its wall lies above and below it.
    arch = path[at, 2] > 36
    wall[arch] = wall[arch][:, [0, 2, 1]]
    _specks(canvas, path[at] + wall, rng)


def _coronary_calcification(canvas: Canvas, plan: Plan, rng: np.random.Generator) -> None:
    """Specks on the heart's front, where the left anterior descending artery runs."""
    path = curve(LAD, 40)
    n = np.sort(rng.choice(40, 7, replace=False))
    points = path[n].copy()
    for point in points:
        # Bring each point to the heart's surface, whatever the heart's size.
        for _ in range(12):
            box = canvas.box(point[None], 0.1)
            depth = float(canvas.fields["heart"][tuple(s.start for s in box)])
            if abs(depth) < 1.5:
                break
            point[1] -= np.clip(depth, -6, 6) * 0.6
    _specks(canvas, points, rng)


def _sternum(canvas: Canvas, height: float) -> float:
    """y of the sternum's middle at a height, mm."""
    box = canvas.box(np.array([(0.0, -150.0, height), (0.0, 0.0, height)]), 0.1)
    column = box[0].start, slice(box[1].start, box[1].stop), box[2].start
    return float(canvas.y[column][np.argmin(np.abs(canvas.fields["cage"][column] + 8))])


def _device(canvas: Canvas, plan: Plan, rng: np.random.Generator) -> None:
    if plan.device == "sternal wires":
        for height in np.linspace(-45, 70, 6):
            loop = np.linspace(0, 2 * np.pi, 13)
            front = _sternum(canvas, float(height))
            ring = np.stack([13 * np.cos(loop), front + 8 * np.sin(loop), np.full(13, height)], axis=1)
            canvas.paint(tube(canvas, ring, 1.9, flat=0.4), 3000)
        return
    side = 1 if plan.device == "pacemaker" else -1
    size = (20.0, 6.0, 22.0) if plan.device == "pacemaker" else (11.0, 6.0, 11.0)
    front = -78.0 if plan.device == "pacemaker" else -84.0
    canvas.paint(ellipsoid(canvas, (side * 78, front, 74), size), 2800)
    vein: list[Point] = [(side * 74, front, 84), (side * 58, -44, 98), (-25, -22, 74), (-27, -18, 30)]
    if plan.device == "pacemaker":
        vein += [(-22, -18, -30), (10, -44, -60)]
    canvas.paint(tube(canvas, curve(vein, 30), 1.6, flat=0.8), 2200)
