"""The healthy chest of a phantom: body, upper abdomen, lungs and lobes, bones (see also `vessels`).

Numbers are mm and HU of an average adult lying supine; `PatientBuild` stretches and tilts them.
Organs are painted from the outside in, and later ones replace earlier ones.
"""

import numpy as np

from rectvlm.phantom.canvas import (
    REGION_IDS,
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
from rectvlm.phantom.vessels import paint_airways, paint_heart_and_vessels, paint_vessel_tree


def paint_chest(canvas: PhantomCanvas, rng: np.random.Generator) -> None:
    """Paint the healthy chest and compute the canvas's distances, which lesions need."""
    _compute_distances(canvas)
    _paint_body(canvas, rng)
    _paint_abdomen(canvas, rng)
    _paint_lungs(canvas, rng)
    paint_heart_and_vessels(canvas)
    _paint_bones(canvas, rng)
    paint_vessel_tree(canvas, rng)
    paint_airways(canvas)


def _superellipse_distance(
    canvas: PhantomCanvas,
    a: ScalarField,
    b: ScalarField,
    y0: float = 0.0,
    aside: ScalarField | None = None,
) -> ScalarField:
    """Distance along the ray from the axis to the surface |x/a|^2.5 + |y/b|^2.5 = 1.

    It is positive inside. With `aside`, each half of the body has its own axis, that far from the
    midline.
    """
    y = canvas.y - np.float32(y0)
    x = np.abs(canvas.x) if aside is None else np.abs(canvas.x) - aside
    u, v = np.abs(x) / a, np.abs(y) / b
    u *= u * np.sqrt(u)
    v *= v * np.sqrt(v)
    level = np.maximum(u + v, np.float32(1e-4)) ** np.float32(0.4)
    radius = np.sqrt(x**2 + y**2) + np.float32(0.1)
    return np.asarray(radius * (1 / level - 1), dtype=np.float32)


def _compute_distances(canvas: PhantomCanvas) -> None:
    x, y, z = canvas.x, canvas.y, canvas.z
    side = np.abs(x)
    apex = np.sqrt(np.clip(1 - np.clip((z + 30) / 158, 0, 1) ** 2.6, 0.0004, 1)).astype(np.float32)
    wide = 126 + 6 * smoothstep(-z, 0, 100)
    # Each lung narrows towards its own apex, beside the great vessels and not over them.
    aside = np.float32(34) * smoothstep(z, 20, 120)
    deep = (88 + 4 * smoothstep(-z, 0, 90)) * np.sqrt(apex) * (0.35 + 0.65 * apex)
    cavity = _superellipse_distance(canvas, np.maximum(wide * apex - aside, 4), deep, 2, aside)
    # The cage goes on above the lungs: without this the ribs would close over the apex.
    shell = np.maximum(apex, np.float32(0.45))
    canvas.distances_mm["cage"] = _superellipse_distance(
        canvas, wide * shell, (88 + 4 * smoothstep(-z, 0, 90)) * (0.3 + 0.7 * shell), 2
    )
    shoulder = smoothstep(z, 70, 150)
    girth = 155 + canvas.build.fat_mm * 0.8
    canvas.distances_mm["body"] = _superellipse_distance(
        canvas, girth - 22 * shoulder, 106 + canvas.build.fat_mm * 0.6 - 26 * shoulder
    )

    right = x < 0
    medial = side < 64
    reach = np.where(medial, np.float32(125), np.float32(66))
    bowl = ((side - 64) / reach) ** 2 + ((y + 8) / 78) ** 2
    top = np.where(right, np.float32(-50), np.float32(-64)) + np.float32(
        canvas.build.dome_height_mm
    )
    dome = (z - (top - 58 * bowl)) * np.float32(0.8)

    # A large heart, with its fluid, flattens against the chest wall.
    heart = np.minimum(
        _heart_distance(canvas), cavity - 4 - np.float32(canvas.build.pericardial_effusion_mm)
    )
    gap = 5.0 + canvas.build.pericardial_effusion_mm
    waist = (
        6
        + 17 * np.exp(-(((y - 2) / 42) ** 2))
        + 9 * np.exp(-((z - 4) ** 2) / 600) * np.exp(-((y - 5) ** 2) / 900)
    )
    spine = 23 - np.sqrt(x**2 + np.minimum(y - 52, 0) ** 2)
    lung = np.minimum(cavity, dome)
    np.minimum(lung, side - waist, out=lung)
    np.minimum(lung, -heart - gap, out=lung)
    np.minimum(lung, -spine - 2, out=lung)
    canvas.distances_mm |= {"cavity": cavity, "dome": dome, "heart": heart, "lung": lung}


def _heart_distance(canvas: PhantomCanvas) -> ScalarField:
    """Distance to the heart's surface, positive inside.

    The ventricles are on the left, the atria to the right and behind.
    """
    size = canvas.build.heart_size
    x, y, z = canvas.x, canvas.y, canvas.z
    chambers = []
    # The long axis points to the left, forwards and down.
    axis = np.array((0.78, -0.42, -0.46))
    across = np.cross(axis, (0.0, 0.0, 1.0))
    across /= np.linalg.norm(across)
    third = np.cross(axis, across)
    upright = np.eye(3)
    for centre, directions, axes in (
        ((22, -30, -42), (axis, across, third), (58, 42, 44)),
        ((-14, -28, -36), upright, (30, 34, 40)),
        ((0, 4, -14), upright, (36, 20, 24)),
    ):
        # A large heart grows to the left and down, away from the great vessels.
        d = (x - centre[0] * (2 * size - 1), y - centre[1], z - (centre[2] - 30 * (size - 1)))
        squares = 0
        for f, semi_axis in zip(directions, axes, strict=True):
            along = d[0] * np.float32(f[0]) + d[1] * np.float32(f[1]) + d[2] * np.float32(f[2])
            squares = squares + (along / np.float32(semi_axis * size)) ** 2
        level = np.sqrt(squares)
        length = np.sqrt(d[0] ** 2 + d[1] ** 2 + d[2] ** 2) + np.float32(0.1)
        chambers.append(length * (1 / np.maximum(level, np.float32(0.02)) - 1))

    # Smooth unions: the chambers bulge from one organ, with no cleft between them.
    heart = chambers[0]
    for chamber in chambers[1:]:
        blend = np.clip(1 - np.abs(heart - chamber) / 28, 0, 1)
        heart = np.maximum(heart, chamber) + 7 * blend * blend
    return np.asarray(heart, dtype=np.float32)


def _paint_body(canvas: PhantomCanvas, rng: np.random.Generator) -> None:
    body, cage = canvas.distances_mm["body"], canvas.distances_mm["cage"]
    build = canvas.build
    table = build.spacing_mm[1] * (build.shape[1] - 1) / 2 - 9
    sag = table - 14 * (canvas.x / 170) ** 2
    canvas.paint_field(
        soft_occupancy(2.0 - np.abs(canvas.y * np.float32(build.scale[1]) - sag))
        * (np.abs(canvas.x) < 170),
        -350,
    )
    tissue = np.full(build.shape, -102, np.float32)
    streaks = smooth_noise(rng, canvas, 17)
    muscle = soft_occupancy(body - build.fat_mm, 3) * soft_occupancy(10 - cage, 3)
    planes = 0.75 * smoothstep(streaks, 0.9, 1.5) * soft_occupancy(-cage - 13, 4)
    tissue += muscle * (1 - planes) * np.float32(155)
    tissue += soft_occupancy(2.2 - body, 2) * np.float32(110)
    canvas.paint_field(soft_occupancy(body), tissue)
    # The cavity is fat until an organ is painted there.
    canvas.paint_field(
        soft_occupancy(canvas.distances_mm["cavity"] - 1) * soft_occupancy(body - build.fat_mm), -92
    )


def _paint_abdomen(canvas: PhantomCanvas, rng: np.random.Generator) -> None:
    x, y, z = canvas.x, canvas.y, canvas.z
    cavity, dome = canvas.distances_mm["cavity"], canvas.distances_mm["dome"]
    below = np.minimum(-dome - 2, cavity - 3)
    canvas.paint_field(soft_occupancy(np.minimum(3 - np.abs(dome + 1.5), cavity)), 50)
    liver = np.minimum(below, (44 + 0.55 * (z + 70) - 0.35 * (y + 30)) - x)
    np.minimum(liver, 62 - y + 0.2 * x, out=liver)
    np.minimum(liver, np.sqrt(x**2 + (y - 50) ** 2) - 34, out=liver)
    mottle = 4 * smooth_noise(rng, canvas, 14)
    contrast = 0.35 * (canvas.build.blood_hu - 42)
    canvas.paint_field(soft_occupancy(liver), 58 + contrast + mottle, REGION_IDS["liver"])
    limit = soft_occupancy(below)

    def paint_organ(part: SoftShape, hu: float, region: str) -> None:
        inside = SoftShape(
            part.box, part.occupancy * limit[part.box] * soft_occupancy(-liver[part.box])
        )
        canvas.paint_shape(inside, hu, REGION_IDS[region])

    for left in (-1, 1):
        paint_organ(
            make_ellipsoid(canvas, (58 * left, 50, -138), (25, 22, 30)),
            34 + 1.5 * contrast,
            "other upper abdominal organs",
        )
    paint_organ(make_ellipsoid(canvas, (92, 38, -106), (32, 40, 34)), 50 + contrast, "spleen")
    stomach = make_ellipsoid(canvas, (56, -12, -106), (40, 48, 32))
    paint_organ(stomach, 28, "stomach")
    bubble = np.minimum(limit[stomach.box], soft_occupancy(-22 - y[stomach.box]))
    inner = make_ellipsoid(canvas, (56, -12, -106), (36, 44, 28))
    overlap = np.zeros_like(limit)
    overlap[inner.box] = inner.occupancy
    canvas.paint_shape(
        SoftShape(
            stomach.box, overlap[stomach.box] * bubble * soft_occupancy(-liver[stomach.box] - 4)
        ),
        -950,
    )
    canvas.paint_shape(
        make_tube(canvas, catmull_rom_path([(-24, 16, -150), (-24, 14, -90), (-20, 2, -50)]), 12),
        canvas.build.blood_hu,
        REGION_IDS["other upper abdominal organs"],
    )


def height_above_oblique_fissure(canvas: PhantomCanvas) -> ScalarField:
    """Height above the oblique fissure of either lung, mm; below it lies the lower lobe."""
    side = np.abs(canvas.x)
    sag = 9 * np.sin((side - 20) / 34) + np.where(canvas.x > 0, np.float32(4), np.float32(-4))
    return np.asarray(
        (canvas.z - (1.08 * (canvas.y - 8) - 6 + sag)) * np.float32(0.68), dtype=np.float32
    )


def height_above_horizontal_fissure(canvas: PhantomCanvas) -> ScalarField:
    """Height above the horizontal fissure between the right upper and middle lobes, mm."""
    return np.asarray(
        canvas.z - (-4 + 8 * np.cos((canvas.x + 60) / 45) + 0.08 * canvas.y), dtype=np.float32
    )


def _paint_lungs(canvas: PhantomCanvas, rng: np.random.Generator) -> None:
    lung, y = canvas.distances_mm["lung"], canvas.y
    oblique = height_above_oblique_fissure(canvas)
    horizontal = height_above_horizontal_fissure(canvas)
    right = canvas.x < 0
    tissue = -858 + 0.16 * y + 9 * smooth_noise(rng, canvas, 9) + 8 * smooth_noise(rng, canvas, 30)
    crease = soft_occupancy(1.0 - np.abs(oblique), 3)
    np.maximum(
        crease, soft_occupancy(0.8 - np.abs(horizontal), 4) * (right & (oblique > 0)), out=crease
    )
    tissue += crease * np.float32(260)
    canvas.paint_field(soft_occupancy(lung), np.asarray(tissue, np.float32))
    upper_right = np.where(
        horizontal > 0, REGION_IDS["right upper lobe"], REGION_IDS["right middle lobe"]
    )
    lobes = np.where(
        right,
        np.where(oblique > 0, upper_right, REGION_IDS["right lower lobe"]),
        np.where(oblique > 0, REGION_IDS["left upper lobe"], REGION_IDS["left lower lobe"]),
    )
    inside = lung > 0
    canvas.regions[inside] = lobes[inside]


def _paint_bones(canvas: PhantomCanvas, rng: np.random.Generator) -> None:
    x, y, z = canvas.x, canvas.y, canvas.z
    depth = -canvas.distances_mm["cage"]
    _paint_spine(canvas)
    # Ribs are bands on the shell of the cage that run down and forwards. The angle is 0 at the
    # spine and pi at the sternum.
    angle = np.arctan2(np.abs(x), y - 4)
    slope = 25.0 * angle - 14 * smoothstep(angle, 2.2, 3.0)
    phase = (z + slope + float(rng.uniform(0, 25))) % 25 - 12.5
    band = np.sqrt((phase / 6.6) ** 2 + ((depth - 6.0) / 4.6) ** 2)
    start = soft_occupancy(np.abs(x) - 18)
    free = z > -116 + 34 * smoothstep(angle, 1.3, 2.1)
    bone = soft_occupancy((1 - band) * 5) * start * (angle < 2.35) * free
    ribs = 190 + 330 * smoothstep(np.asarray(band, np.float32), 0.45, 0.85)
    canvas.paint_field(np.asarray(bone, np.float32), ribs)
    solid = bone > 0.5
    canvas.regions[solid & (x < 0)] = REGION_IDS["right ribs"]
    canvas.regions[solid & (x > 0)] = REGION_IDS["left ribs"]
    height = (z > -62) & (z < 96)
    cartilage = soft_occupancy((1 - band) * 5) * (angle >= 2.35) * height * (np.abs(x) > 14)
    canvas.paint_field(np.asarray(cartilage, np.float32), 95, REGION_IDS["sternum"])
    plate = np.minimum(7 - np.abs(depth - 8), (17 + 5 * smoothstep(z, 50, 75)) - np.abs(x))
    plate = np.where((y < 0) & (z > -58) & (z < 84), plate, np.float32(-5))
    canvas.paint_field(
        soft_occupancy(plate), 170 + 230 * smoothstep(-plate, -4, 0), REGION_IDS["sternum"]
    )
    for left in (-1, 1):
        collar = catmull_rom_path(
            [(14 * left, -66, 86), (60 * left, -58, 104), (118 * left, -18, 116)], 10
        )
        canvas.paint_shape(make_tube(canvas, collar, 6.5), 480)
        canvas.paint_shape(make_tube(canvas, collar, 3.5), 230)
    blade = (
        soft_occupancy(2.6 - np.abs(depth - 17))
        * soft_occupancy(52 - np.abs(z - 62))
        * ((angle > 0.62) & (angle < 1.45))
    )
    canvas.paint_field(np.asarray(blade, np.float32), 420)


def _paint_spine(canvas: PhantomCanvas) -> None:
    x, z = canvas.x, canvas.z
    y = canvas.y - (3 - 0.0004 * (z + 10) ** 2)
    step = z % 25 - 12.5
    body = 18 - np.sqrt(x**2 + (1.15 * (y - 54)) ** 2)
    disc = np.abs(step) > 9.5
    level = np.where(disc, np.float32(75), 165 + 260 * smoothstep(-body, -4.5, -1))
    level = np.where(~disc & (np.abs(step) > 7.2), np.float32(360), level)
    canvas.paint_field(soft_occupancy(body), np.asarray(level, np.float32), REGION_IDS["spine"])
    arch_level = np.abs(step) < 8
    radius = np.sqrt(x**2 + (y - 79) ** 2)
    ring = 4.5 - np.abs(radius - 13)
    process = np.minimum(4 - np.abs(x), 13 - np.abs(y - 98))
    wings = np.minimum(5.5 - np.abs(y - 82 + 0.12 * np.abs(x)), 34 - np.abs(x))
    arch = np.where(
        arch_level, np.maximum(np.maximum(ring, process), np.minimum(wings, radius - 11)), ring - 6
    )
    canvas.paint_field(soft_occupancy(np.asarray(arch, np.float32)), 380, REGION_IDS["spine"])
    canvas.paint_field(soft_occupancy(10 - radius), 25, REGION_IDS["spine"])
