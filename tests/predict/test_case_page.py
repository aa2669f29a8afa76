import base64
import hashlib
import json
import re
from dataclasses import replace

import numpy as np
import pytest
from browser import CHROMIUM, WITH_WEBGL, WITHOUT_WEBGL, Browser

from rectvlm.finding_thresholds import NOT_FITTED
from rectvlm.labels import FINDINGS, LESION_BY_KEY, LESIONS
from rectvlm.lesion_places import LesionPlace
from rectvlm.predict import case_page, page_volume, report_sentences

NODULE = LESION_BY_KEY["lung_nodule"]
EFFUSION = LESION_BY_KEY["pleural_effusion"]
AFFINE = np.array([[0, 0, -2.0, 60], [0, -2.0, 0, 50], [4, 0, 0, -700], [0, 0, 0, 1.0]])
"""Canonical index (z, y, x, 1) to RAS mm."""
BRIGHT = (14, 20, 45)
"""Voxel (z, y, x) of 1,500 HU in a body of 0 HU, in the patient's left front."""
HOSTILE = "<script>window.broken=1</script></script>\"'\u2028<img src=x onerror=window.broken=1>"

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")


def make_view(**changes):
    ct = np.full((30, 50, 60), -1000, np.int16)
    ct[:, 2:48, 2:58] = 0
    ct[BRIGHT] = 1500
    lesions = np.zeros(ct.shape, np.uint8)
    lesions[10:16, 25:33, 12:22] = NODULE.mask_value
    fields = {
        "name": "phantom",
        "ct": ct,
        "lesion_bits": lesions,
        "affine": AFFINE,
        "finding_probabilities": dict.fromkeys(FINDINGS, 0.25) | {"Lung nodule": 0.75},
        "thresholds": NOT_FITTED,
        "volumes_ml": dict.fromkeys((lesion.key for lesion in LESIONS), 0.0) | {NODULE.key: 7.7},
        "places": {NODULE.key: LesionPlace(NODULE.key, 7.7, "right", (), "geometry", "right lung")},
        "lobes": {NODULE.key: ("right upper lobe",)},
        "contradictions": [],
        "report_sections": [
            ("Findings", "There is a lung nodule in the right lung. No pleural effusion.")
        ],
        "facts": [("File", "a & b")],
    }
    return case_page.CaseView(**(fields | changes))


def with_truth(view):
    lesions = np.zeros_like(view.lesion_bits)
    lesions[10:16, 25:33, 16:26] = NODULE.mask_value
    labels = dict.fromkeys(FINDINGS) | {"Lung nodule": 1, "Atelectasis": 0}
    annotated = dict.fromkeys((lesion.key for lesion in LESIONS), False) | {NODULE.key: True}
    return replace(
        view,
        truth=case_page.CaseTruth(lesions, annotated, labels, [("Findings", "A lung nodule.")]),
    )


# The text of the page


def test_a_page_asks_for_nothing_and_trusts_no_text():
    view = make_view(
        name=HOSTILE,
        report_sections=[("Findings", HOSTILE + "\x01")],
        facts=[("File", HOSTILE), ("Note", "a & b")],
    )
    html = case_page.render_page(view)
    assert "<img src=x" not in html and "<script>window" not in html and "\x01" not in html
    assert "a &amp; b" in html
    assert not re.search(r"""(?:src|href)\s*=\s*["']?https?:|@import|url\(""", html)


def test_only_the_scripts_of_the_package_are_allowed():
    html = case_page.render_page(make_view())
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', html)
    assert "default-src &#39;none&#39;" in policy and "unsafe" not in policy
    scripts = re.findall(r"<script>(.*?)</script>", html, re.S)
    assert len(scripts) == 2
    for script in scripts:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert f"sha256-{digest}" in policy


def test_the_shipped_viewer_is_the_one_that_its_note_names():
    vendor = case_page._NIIVUE_FILE.parent
    digest = hashlib.sha256(case_page._NIIVUE_FILE.read_bytes()).hexdigest()
    assert digest in (vendor / "README.md").read_text()


def test_data_in_a_script_ends_no_script():
    text = str(case_page._script_json({"name": HOSTILE}))
    assert "<" not in text and "\u2028" not in text and json.loads(text)["name"] == HOSTILE


def test_sentences_light_the_lesions_that_they_state_and_not_those_that_they_deny():
    text = "There is a 1.5 cm nodule in the right lung. No pleural effusion.\nStable."
    sentences = report_sentences.link_sentences(text)
    assert [sentence.text for sentence in sentences] == [
        "There is a 1.5 cm nodule in the right lung.",
        "No pleural effusion.",
        "Stable.",
    ]
    assert [sentence.lesions for sentence in sentences] == [(NODULE.key,), (), ()]


def test_truth_stands_beside_the_prediction():
    html = case_page.render_page(with_truth(make_view()))
    # Of 480 predicted and 480 true voxels 288 are common.
    assert "Dice 0.60" in html and "True report" in html and "dashed" in html
    assert "Not annotated: pericardial effusion" in html
    assert html.count('class="label right"') == 2 and html.count('class="label unknown"') == 16
    assert "True report" not in case_page.render_page(make_view())


# The volume of the page


def test_a_small_ct_stays_as_it_is():
    view = make_view()
    volume = page_volume.reduce_for_page(view.ct, [view.lesion_bits], AFFINE)
    assert volume.hu_step == 1 and not volume.is_resampled
    # In RAS order the patient's left is at small i, and the front at large j.
    (index,) = np.argwhere(volume.ct == 1500)
    expected = AFFINE @ [*BRIGHT, 1]
    assert np.allclose(volume.affine @ [*index, 1], expected)
    assert np.allclose(volume.from_canonical @ [*BRIGHT, 1], [*index, 1])


def test_a_large_ct_is_averaged_and_loses_no_lesion(monkeypatch):
    rng = np.random.default_rng(0)
    ct = rng.normal(0, 100, (60, 90, 96)).astype(np.int16)
    lesions = np.zeros(ct.shape, np.uint8)
    specks = [(5, 7, 9), (30, 40, 50), (59, 89, 95)]
    for speck in specks:
        lesions[speck] = NODULE.mask_value
    lesions[20:30, 20:30, 20:30] |= EFFUSION.mask_value
    monkeypatch.setattr(page_volume, "MAX_CT_BYTES", 15_000)
    monkeypatch.setattr(page_volume, "choose_shape", lambda *_: (20, 30, 32))
    volume = page_volume.reduce_for_page(ct, [lesions], AFFINE)
    assert volume.ct.shape == (32, 30, 20) and volume.is_resampled
    assert len(volume.ct_nifti_gz) <= 15_000 and volume.hu_step > 1
    (bits,) = volume.lesions
    for speck in specks:
        i, j, k = np.rint(volume.from_canonical @ [*speck, 1])[:3].astype(int)
        assert bits[i, j, k] & NODULE.mask_value
    assert np.count_nonzero(bits & EFFUSION.mask_value) == pytest.approx(1000 / 27, rel=0.5)
    # Each voxel is the mean of its 27, but for the step of the HU.
    means = ct.reshape(20, 3, 30, 3, 32, 3).mean(axis=(1, 3, 5))[:, ::-1, ::-1].transpose(2, 1, 0)
    assert np.abs(volume.ct - means).max() <= volume.hu_step / 2 + 0.5


def test_a_grid_of_a_page_is_the_finest_that_fits():
    size, spacing = np.array([300, 512, 512]), np.array([1.0, 0.75, 0.75])
    shape = page_volume.choose_shape(size, spacing, 8_000_000)
    assert 7_000_000 < np.prod(shape) <= 8_000_000
    step_mm = size * spacing / shape
    assert step_mm.max() / step_mm.min() < 1.02
    assert page_volume.choose_shape(np.array([40, 300, 300]), spacing, 8_000_000) == (40, 300, 300)


@pytest.mark.slow
def test_the_page_of_a_thin_sliced_ct_is_below_15_mb():
    """Noise of 30 HU in 300 slices of 512 × 512, more than a scanner's."""
    rng = np.random.default_rng(0)
    slab = rng.normal(0, 30, (50, 512, 512)).astype(np.int16)
    ct = np.tile(slab, (6, 1, 1))
    ct[:, :40] = ct[:, -40:] = -1000
    lesions = np.zeros(ct.shape, np.uint8)
    lesions[40:90, 100:300, 100:300] = NODULE.mask_value
    affine = AFFINE * np.array([0.25, 1, 1, 1])
    html = case_page.render_page(make_view(ct=ct, lesion_bits=lesions, affine=affine))
    assert len(html.encode()) < 15e6


# The page in a browser


@pytest.fixture(scope="module")
def browser():
    opened = Browser(*WITH_WEBGL)
    yield opened
    opened.close()


def open_view(browser, view, folder):
    (folder / "index.html").write_text(case_page.render_page(view), encoding="utf-8")
    browser.open_page(folder / "index.html")
    assert browser.run("document.getElementById('failure').hidden")
    return browser


def tile(browser, view):
    """Left, top, width and height of a view on the window, pixels."""
    place = browser.run(f"Object.values(nv.screenSlices[{view}].leftTopWidthHeight)")
    left, top, width, height = place
    box = browser.run("(({x, y}) => [x, y])(document.getElementById('ct').getBoundingClientRect())")
    return int(left + box[0]), int(top + box[1]), int(width), int(height)


def go_to(browser, bright):
    """Show the slices of a voxel (z, y, x) by the CT's own numbers, in the three views."""
    z, y, x = bright
    browser.run(f"moveTo([59 - {x}, 49 - {y}, {z}])")
    browser.next_frame()


@needs_chromium
def test_the_viewer_shows_what_it_says(browser, tmp_path):
    """One page for all: starting a page takes longer than looking at it."""
    open_view(browser, with_truth(make_view()), tmp_path)
    assert not browser.messages
    check_the_voxel_under_the_cursor(browser)
    check_windows(browser)
    check_distance_and_zoom(browser)
    check_overlays_and_lists(browser)
    assert not browser.messages


def check_the_voxel_under_the_cursor(browser):
    """The bright pixel of each view is at the voxel whose place and HU the page tells."""
    browser.key("o")
    browser.key("3")
    # The cross-hair would hide it, so it stays in the slice, but elsewhere.
    for view, elsewhere in enumerate([(14, 40, 10), (3, 20, 10), (3, 40, 45)]):
        go_to(browser, elsewhere)
        left, top, width, height = tile(browser, view)
        picture = browser.screenshot()[top : top + height, left : left + width].astype(int)
        is_grey = np.ptp(picture, axis=2) < 10
        rows, columns = np.nonzero((picture.min(axis=2) > 215) & is_grey)
        # The patient's left is on the right of the picture, the front of the sagittal on its left.
        assert (np.median(columns) > width / 2) == (view < 2)
        browser.mouse("mouseMoved", left + float(np.median(columns)), top + float(np.median(rows)))
        assert browser.run("document.getElementById('hu').textContent") == "1500 HU", view
        x, y, z = (AFFINE @ [*BRIGHT, 1])[:3]
        place = browser.run("document.getElementById('position').textContent").replace("−", "-")
        assert f"x {x:.1f}, y {y:.1f}, z {z:.1f} mm" in place
    browser.key("o")


def check_windows(browser):
    browser.key("1")
    assert "centre −600, width 1500" in browser.run("document.getElementById('window').textContent")
    left, top, _, _ = tile(browser, 0)
    before = browser.screenshot()
    browser.drag((left + 40, top + 60), (left + 80, top + 30), "right")
    assert "centre −450, width 1700" in browser.run("document.getElementById('window').textContent")
    assert (browser.screenshot() != before).any()
    browser.key("r")


def check_distance_and_zoom(browser):
    browser.key("m")
    left, top, width, _ = tile(browser, 0)
    # The axial view is 60 voxels of 2 mm wide.
    browser.drag((left + 20, top + 30), (left + 20 + width / 2, top + 30), "left")
    assert browser.run("distances.length === 1 && lengthOf(distances[0])") == pytest.approx(
        60, abs=1
    )
    browser.key("c")
    browser.key("+")
    assert browser.run("nv.scene.pan2Dxyzmm[3]") == pytest.approx(1.25)
    browser.drag((left + width / 2, top + 40), (left + width / 2 + 30, top + 40), "middle")
    go_to(browser, (14, 40, 10))
    # With zoom and shift the place under the cursor is still that of NiiVue's own picture.
    to_frac = "Array.from(nv.canvasPos2frac(toScreen(tileOf(0), 31.5, 21.5)))"
    script = f"{to_frac}.map((part, axis) => part * data.shape[axis])"
    assert np.allclose(browser.run(script)[:2], [31.5, 21.5], atol=0.05)
    browser.key("r")
    assert browser.run("distances.length") == 0


def check_overlays_and_lists(browser):
    go_to(browser, (3, 40, 10))
    browser.run("document.querySelector('[data-part^=predicted]').click()")
    browser.next_frame()
    assert 10 <= browser.run("cross[2]") < 16
    shown = browser.screenshot()
    left, top, width, height = tile(browser, 0)
    view = np.s_[top : top + height, left : left + width]
    for layer in ("predicted", "true"):
        box = f"document.querySelector('[data-toggle=\"{layer} lung_nodule\"]').click()"
        browser.run(box)
        hidden = browser.screenshot()
        changed = (hidden[view] != shown[view]).any(axis=2)
        assert changed.sum() > 50, layer
        # Both nodules lie in the patient's right, on the left of the picture.
        assert np.nonzero(changed)[1].max() < width / 2
        browser.run(box)
    browser.run("highlight(['lung_nodule'])")
    assert browser.run("document.querySelectorAll('.sentence.lit').length") == 2
    assert (browser.screenshot()[view] != shown[view]).any()
    browser.run("highlight([])")


@needs_chromium
def test_hostile_text_runs_nothing(browser, tmp_path):
    view = make_view(name=HOSTILE, report_sections=[(HOSTILE, HOSTILE)], facts=[(HOSTILE, HOSTILE)])
    open_view(browser, view, tmp_path)
    assert browser.run("window.broken === undefined")
    # NiiVue, the page's own, its data, the CT, the mask.
    assert browser.run("document.scripts.length") == 5
    assert browser.run("document.querySelector('h1').textContent").startswith("<script>window")
    assert not browser.messages


@pytest.mark.slow
@needs_chromium
def test_without_webgl_the_text_is_there_and_a_sentence_says_why(tmp_path):
    browser = Browser(*WITHOUT_WEBGL)
    try:
        (tmp_path / "index.html").write_text(case_page.render_page(make_view()), encoding="utf-8")
        browser.open_page(tmp_path / "index.html")
        told = browser.run("document.getElementById('failure').innerText")
        assert told.startswith("No images are shown: this browser has no WebGL 2")
        assert "lung nodule in the right lung" in browser.run("document.body.innerText")
    finally:
        browser.close()
