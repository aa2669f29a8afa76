"use strict";
// The viewer of a case. NiiVue draws the CT in three slices; a second canvas above it has the
// outlines, the cross-hair, distances and letters. Voxels (i, j, k) are in RAS order.

const byId = (id) => document.getElementById(id);
const all = (selector) => [...document.querySelectorAll(selector)];
const data = JSON.parse(byId("data").textContent);
const stage = byId("stage"), overlay = byId("overlay");
const VIEWS = [
  { name: "Axial", x: 0, y: 1, depth: 2, letters: "RLAP" },
  { name: "Coronal", x: 0, y: 2, depth: 1, letters: "RLSI" },
  { name: "Sagittal", x: 1, y: 2, depth: 0, letters: "APSI" },
];
const DOWN = [1, -1, -1]; // step along i, j, k of a scroll downwards: to the left, the back, the feet
const MIN_WIDTH_HU = 20, MAX_ZOOM = 12;
const TOOL_KEYS = { c: "cross", w: "window", z: "pan", m: "measure" };

const masks = {};        // lesion bits by layer, one byte a voxel
const hidden = new Set(); // "LAYER KEY" of lesions whose box is not ticked
let lit = new Set();      // keys of highlighted lesions
let nv = null, ct = null;
let cross = [...data.start], centre = 0, width = 0, tool = "cross";
let distances = [], drag = null, viewUnderCursor = 0, outlines = new Map();

// Data

function decodeBase64(text) {
  if (Uint8Array.fromBase64) return Uint8Array.fromBase64(text);
  const letters = atob(text), bytes = new Uint8Array(letters.length);
  for (let n = 0; n < bytes.length; n++) bytes[n] = letters.charCodeAt(n);
  return bytes;
}

async function unpack(text) {
  const packed = decodeBase64(text);
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).arrayBuffer();
}

const voxelIndex = ([i, j, k]) => i + data.shape[0] * (j + data.shape[1] * k);
const transform = (matrix, point) =>
  [0, 1, 2].map((row) => matrix[row][3] + [0, 1, 2].reduce((sum, c) => sum + matrix[row][c] * point[c], 0));
const isInside = (voxel) => voxel.every((n, axis) => n >= 0 && n < data.shape[axis]);
const minus = (text) => String(text).replace("-", "−");

// Places on the screen: voxel coordinates of a view to pixels of the canvas, and back

function tileOf(view) {
  const tile = nv.screenSlices.find((slice) => slice.axCorSag === view);
  if (!tile) return null;
  const { x, y } = VIEWS[view], [left, top, w, h] = tile.leftTopWidthHeight;
  const low = nv.frac2mm([0, 0, 0]), high = nv.frac2mm([1, 1, 1]);
  const perVoxel = (axis) => (high[axis] - low[axis]) / data.shape[axis];
  const scaleX = (perVoxel(x) / tile.fovMM[0]) * w, scaleY = (-perVoxel(y) / tile.fovMM[1]) * h;
  return {
    view, left, top, w, h, scaleX, scaleY,
    // Pixel of the low edge of voxel 0.
    originX: left + ((low[x] - tile.leftTopMM[0]) / tile.fovMM[0]) * w,
    originY: top + h - ((low[y] - tile.leftTopMM[1]) / tile.fovMM[1]) * h,
  };
}
const tiles = () => VIEWS.map((_, view) => tileOf(view)).filter(Boolean);
const toScreen = (tile, u, v) => [tile.originX + u * tile.scaleX, tile.originY + v * tile.scaleY];

// Edges of voxels are whole numbers here: voxel n reaches from n to n + 1.
function pointAt(event) {
  const box = overlay.getBoundingClientRect();
  const scale = overlay.width / box.width;
  const px = (event.clientX - box.left) * scale, py = (event.clientY - box.top) * scale;
  const tile = tiles().find((t) => px >= t.left && px < t.left + t.w && py >= t.top && py < t.top + t.h);
  if (!tile) return null;
  const { x, y, depth } = VIEWS[tile.view], point = [0, 0, 0];
  point[x] = (px - tile.originX) / tile.scaleX;
  point[y] = (py - tile.originY) / tile.scaleY;
  point[depth] = cross[depth] + 0.5;
  return { view: tile.view, point, tile, px, py };
}

// Outlines: the border of a mask in a slice, traced once and kept

function traceOutline(layer, bit, view, depthIndex) {
  const key = `${layer} ${bit} ${view} ${depthIndex}`;
  if (outlines.has(key)) return outlines.get(key);
  if (outlines.size > 600) outlines = new Map();
  const { x, y, depth } = VIEWS[view], mask = masks[layer];
  const step = [1, data.shape[0], data.shape[0] * data.shape[1]];
  const base = depthIndex * step[depth], nx = data.shape[x], ny = data.shape[y];
  const at = (u, v) => u >= 0 && v >= 0 && u < nx && v < ny && (mask[base + u * step[x] + v * step[y]] & bit) !== 0;
  // Every border between two voxels is an edge with the mask on its left; edges form loops.
  const next = new Map(), corner = (u, v) => v * (nx + 1) + u;
  const add = (from, to) => next.has(from) ? next.get(from).push(to) : next.set(from, [to]);
  for (let v = 0; v < ny; v++) for (let u = 0; u < nx; u++) {
    if (!at(u, v)) continue;
    if (!at(u, v - 1)) add(corner(u, v), corner(u + 1, v));
    if (!at(u + 1, v)) add(corner(u + 1, v), corner(u + 1, v + 1));
    if (!at(u, v + 1)) add(corner(u + 1, v + 1), corner(u, v + 1));
    if (!at(u - 1, v)) add(corner(u, v + 1), corner(u, v));
  }
  const path = new Path2D();
  let isEmpty = true;
  for (const start of next.keys()) {
    const loop = [];
    for (let from = start; next.get(from)?.length;) {
      loop.push([from % (nx + 1), Math.floor(from / (nx + 1))]);
      from = next.get(from).pop();
    }
    if (loop.length < 4) continue;
    isEmpty = false;
    addSmoothLoop(path, loop);
  }
  outlines.set(key, isEmpty ? null : path);
  return outlines.get(key);
}

// Through the middles of the edges, so that stairs of voxels become slanted lines.
function addSmoothLoop(path, loop) {
  loop.forEach(([u, v], n) => {
    const [u2, v2] = loop[(n + 1) % loop.length];
    if (n === 0) path.moveTo((u + u2) / 2, (v + v2) / 2);
    else path.lineTo((u + u2) / 2, (v + v2) / 2);
  });
  path.closePath();
}

// Painting

const dpr = () => overlay.width / Math.max(1, overlay.clientWidth);

function paint() {
  const canvas = byId("ct");
  if (overlay.width !== canvas.width || overlay.height !== canvas.height) {
    overlay.width = canvas.width;
    overlay.height = canvas.height;
  }
  const pen = overlay.getContext("2d");
  pen.setTransform(1, 0, 0, 1, 0, 0);
  pen.clearRect(0, 0, overlay.width, overlay.height);
  for (const tile of tiles()) {
    pen.save();
    pen.beginPath();
    pen.rect(tile.left, tile.top, tile.w, tile.h);
    pen.clip();
    paintLesions(pen, tile);
    paintCross(pen, tile);
    paintDistances(pen, tile);
    paintLetters(pen, tile);
    pen.restore();
  }
  paintReadout();
}

function paintLesions(pen, tile) {
  if (byId("all") && !byId("all").checked) return;
  const fill = byId("opacity") ? byId("opacity").value / 100 : 0;
  const matrix = new DOMMatrix([tile.scaleX, 0, 0, tile.scaleY, tile.originX, tile.originY]);
  for (const layer of Object.keys(masks)) for (const lesion of data.lesions) {
    if (hidden.has(`${layer} ${lesion.key}`)) continue;
    const path = traceOutline(layer, lesion.bit, tile.view, cross[VIEWS[tile.view].depth]);
    if (!path) continue;
    const isLit = lit.has(lesion.key), isDim = lit.size > 0 && !isLit, onScreen = new Path2D();
    onScreen.addPath(path, matrix);
    pen.fillStyle = pen.strokeStyle = lesion.colour;
    pen.lineJoin = "round";
    pen.lineWidth = (isLit ? 3 : 1.6) * dpr();
    pen.setLineDash(layer === "true" ? [6 * dpr(), 4 * dpr()] : []);
    if (layer === "predicted") {
      pen.globalAlpha = isDim ? fill / 3 : isLit ? Math.min(1, fill + 0.2) : fill;
      pen.fill(onScreen, "evenodd");
    }
    pen.globalAlpha = isDim ? 0.35 : fill === 0 && !isLit ? 0.85 : 1;
    pen.stroke(onScreen);
    pen.globalAlpha = 1;
  }
  pen.setLineDash([]);
}

function paintCross(pen, tile) {
  const { x, y } = VIEWS[tile.view], gap = 14 * dpr();
  const [cx, cy] = toScreen(tile, cross[x] + 0.5, cross[y] + 0.5);
  pen.strokeStyle = "rgba(240, 180, 92, .75)";
  pen.lineWidth = dpr();
  pen.beginPath();
  for (const [from, to] of [[tile.left, cx - gap], [cx + gap, tile.left + tile.w]]) { pen.moveTo(from, cy); pen.lineTo(to, cy); }
  for (const [from, to] of [[tile.top, cy - gap], [cy + gap, tile.top + tile.h]]) { pen.moveTo(cx, from); pen.lineTo(cx, to); }
  pen.stroke();
}

function write(pen, text, x, y, align, size = 13, colour = "#dfe7ee") {
  pen.font = `${size * dpr()}px system-ui, "Segoe UI", Roboto, "Noto Sans", "DejaVu Sans", sans-serif`;
  pen.textAlign = align;
  pen.textBaseline = "middle";
  pen.lineWidth = 3 * dpr();
  pen.strokeStyle = "rgba(0, 0, 0, .8)";
  pen.strokeText(text, x, y);
  pen.fillStyle = colour;
  pen.fillText(text, x, y);
}

function paintLetters(pen, tile) {
  const { left, top, w, h } = tile, { letters, name, depth } = VIEWS[tile.view], pad = 12 * dpr();
  write(pen, letters[0], left + pad, top + h / 2, "center", 15);
  write(pen, letters[1], left + w - pad, top + h / 2, "center", 15);
  write(pen, letters[2], left + w / 2, top + pad, "center", 15);
  write(pen, letters[3], left + w / 2, top + h - pad, "center", 15);
  write(pen, `${name} ${sliceNumber(depth)}`, left + pad * 0.7, top + pad, "left", 12.5, "#b6c2cd");
}

// Number of the CT's own slice, from 1 at the feet, the front and the patient's right.
function sliceNumber(depth) {
  const axis = 2 - depth, number = Math.round(transform(data.toCanonical, cross)[axis]) + 1;
  return `${number} / ${data.canonicalShape[axis]}`;
}

function lengthOf({ from, to }) {
  const a = transform(data.affine, from), b = transform(data.affine, to);
  return Math.hypot(a[0] - b[0], a[1] - b[1], a[2] - b[2]);
}

function paintDistances(pen, tile) {
  const { x, y, depth } = VIEWS[tile.view];
  for (const distance of distances) {
    if (distance.view !== tile.view || Math.floor(distance.from[depth]) !== cross[depth]) continue;
    const start = toScreen(tile, distance.from[x], distance.from[y]);
    const end = toScreen(tile, distance.to[x], distance.to[y]);
    pen.strokeStyle = pen.fillStyle = "#8fe3a9";
    pen.lineWidth = 1.8 * dpr();
    pen.beginPath();
    pen.moveTo(...start);
    pen.lineTo(...end);
    pen.stroke();
    for (const point of [start, end]) { pen.beginPath(); pen.arc(...point, 3 * dpr(), 0, 7); pen.fill(); }
    write(pen, `${lengthOf(distance).toFixed(1)} mm`, end[0] + 9 * dpr(), end[1] - 9 * dpr(), "left", 13, "#8fe3a9");
  }
}

let hover = null;
function paintReadout() {
  const voxel = (hover || cross.map((n) => n + 0.5)).map(Math.floor);
  if (!isInside(voxel)) return;
  const mm = transform(data.affine, voxel).map((value) => minus(value.toFixed(1)));
  byId("hu").textContent = `${minus(ct[voxelIndex(voxel)])} HU`;
  byId("position").textContent = `${hover ? "cursor" : "cross-hair"} at x ${mm[0]}, y ${mm[1]}, z ${mm[2]} mm (RAS)`;
  byId("window").textContent = `centre ${minus(Math.round(centre))}, width ${Math.round(width)}`;
}

// Actions

function moveTo(voxel) {
  cross = voxel.map((n, axis) => Math.max(0, Math.min(data.shape[axis] - 1, Math.round(n))));
  nv.scene.crosshairPos = cross.map((n, axis) => (n + 0.5) / data.shape[axis]);
  nv.drawScene();
}

function scroll(view, steps) {
  const { depth } = VIEWS[view], voxel = [...cross];
  voxel[depth] += steps * DOWN[depth];
  moveTo(voxel);
}

function nameWindow(newCentre, newWidth) {
  centre = newCentre;
  width = Math.max(MIN_WIDTH_HU, newWidth);
  for (const button of all("[data-window]")) {
    const [presetCentre, presetWidth] = data.windows[button.dataset.window];
    button.setAttribute("aria-pressed", String(presetCentre === centre && presetWidth === width));
  }
}

let isRefreshing = false;
function setWindow(newCentre, newWidth) {
  nameWindow(newCentre, newWidth);
  if (isRefreshing) return;
  isRefreshing = true;
  requestAnimationFrame(() => {
    isRefreshing = false;
    nv.volumes[0].cal_min = centre - width / 2;
    nv.volumes[0].cal_max = centre + width / 2;
    nv.refreshLayers(nv.volumes[0], 0);
    nv.drawScene();
  });
}

function chooseTool(name) {
  tool = stage.dataset.tool = name;
  for (const button of all("[data-tool]")) if (button.tagName === "BUTTON") button.setAttribute("aria-pressed", String(button.dataset.tool === name));
}

function zoom(factor) {
  const pan = nv.scene.pan2Dxyzmm, old = pan[3];
  pan[3] = Math.max(1, Math.min(MAX_ZOOM, old * factor));
  // The cross-hair stays where it is; at no zoom the whole slice is in view.
  const mm = nv.frac2mm(nv.scene.crosshairPos);
  for (const axis of [0, 1, 2]) pan[axis] = pan[3] === 1 ? 0 : pan[axis] + (old - pan[3]) * mm[axis];
  nv.drawScene();
}

function pan(view, dx, dy) {
  const tile = tileOf(view), { x, y } = VIEWS[view];
  nv.scene.pan2Dxyzmm[x] += (dx / tile.scaleX) * data.spacing[x] * nv.scene.pan2Dxyzmm[3];
  nv.scene.pan2Dxyzmm[y] += (dy / tile.scaleY) * data.spacing[y] * nv.scene.pan2Dxyzmm[3];
  nv.drawScene();
}

function reset() {
  distances = [];
  nv.scene.pan2Dxyzmm.set ? nv.scene.pan2Dxyzmm.set([0, 0, 0, 1]) : nv.setPan2Dxyzmm([0, 0, 0, 1]);
  setWindow(...data.windows.lung);
}

function highlight(keys) {
  lit = new Set(keys);
  for (const row of all(".lesion")) row.classList.toggle("lit", lit.has(row.dataset.lesion));
  for (const sentence of all(".sentence[data-lesions]")) {
    sentence.classList.toggle("lit", sentence.dataset.lesions.split(" ").some((key) => lit.has(key)));
  }
  nv?.drawScene();
}

function goToPart(button) {
  for (const other of all("[data-part]")) other.setAttribute("aria-current", String(other === button));
  moveTo(button.dataset.voxel.split(" ").map(Number));
}

function goToLesion(keys) {
  const button = all("[data-part]").find((part) => keys.includes(part.dataset.part.split(" ")[1]));
  if (button) goToPart(button);
}

function goToNextPart() {
  const parts = all("[data-part]");
  const now = parts.findIndex((part) => part.getAttribute("aria-current") === "true");
  if (parts.length) goToPart(parts[(now + 1) % parts.length]);
}

function toggleKeys(isShown = byId("keys").hidden) {
  byId("keys").hidden = !isShown;
  byId("help").setAttribute("aria-expanded", String(isShown));
}

// Input

function startDrag(event) {
  const place = pointAt(event);
  if (!place) return;
  event.preventDefault();
  const kind = event.button === 2 ? "window" : event.button === 1 ? "pan" : tool;
  drag = { kind, view: place.view, x: event.clientX, y: event.clientY, centre, width };
  byId("ct").setPointerCapture(event.pointerId);
  if (kind === "cross") moveTo(place.point.map(Math.floor));
  if (kind === "measure") distances.push({ view: place.view, from: place.point, to: place.point });
}

function followPointer(event) {
  const place = pointAt(event);
  hover = place && isInside(place.point.map(Math.floor)) ? place.point : null;
  if (place) viewUnderCursor = place.view;
  if (drag) continueDrag(event, place);
  else paintReadout();
}

function continueDrag(event, place) {
  const dx = event.clientX - drag.x, dy = event.clientY - drag.y;
  if (drag.kind === "window") {
    // As wide as the window is, so fine are its changes.
    const gain = Math.max(1, drag.width / 300);
    setWindow(drag.centre - dy * gain, drag.width + dx * gain);
  } else if (drag.kind === "pan") {
    pan(drag.view, dx * dpr(), dy * dpr());
    Object.assign(drag, { x: event.clientX, y: event.clientY });
  } else if (place && place.view === drag.view) {
    if (drag.kind === "cross") moveTo(place.point.map(Math.floor));
    else { distances.at(-1).to = place.point; nv.drawScene(); }
  }
}

function endDrag() {
  // A click without a drag measures nothing.
  if (drag?.kind === "measure" && lengthOf(distances.at(-1)) < 0.5) distances.pop();
  drag = null;
  nv.drawScene();
}

let turned = 0;
function turnWheel(event) {
  const place = pointAt(event);
  if (!place) return;
  event.preventDefault();
  turned += event.deltaMode === 0 ? event.deltaY / 50 : event.deltaY;
  const steps = Math.trunc(turned);
  turned -= steps;
  if (!steps) return;
  if (event.ctrlKey || tool === "pan") zoom(1.15 ** -steps);
  else scroll(place.view, steps);
}

function pressKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const isForm = ["INPUT", "SUMMARY"].includes(event.target.tagName);
  const key = event.key.toLowerCase(), presets = Object.keys(data.windows);
  const steps = { arrowup: -1, arrowleft: -1, arrowdown: 1, arrowright: 1, pageup: -5, pagedown: 5 }[key];
  const opacity = byId("opacity"), toggle = byId("all");
  if (isForm && (steps || key === " ")) return;
  if (steps) scroll(viewUnderCursor, steps);
  else if (presets[key - 1]) setWindow(...data.windows[presets[key - 1]]);
  else if (TOOL_KEYS[key]) chooseTool(TOOL_KEYS[key]);
  else if (key === "+" || key === "=") zoom(1.25);
  else if (key === "-") zoom(0.8);
  else if (key === "n") goToNextPart();
  else if (key === "r") reset();
  else if (key === "?") toggleKeys();
  else if (key === "escape") toggleKeys(false);
  else if (key === "o" && toggle) { toggle.checked = !toggle.checked; nv.drawScene(); }
  else if ((key === "[" || key === "]") && opacity) { opacity.value = Number(opacity.value) + (key === "]" ? 10 : -10); nv.drawScene(); }
  else return;
  event.preventDefault();
}

function listen() {
  const canvas = byId("ct");
  canvas.addEventListener("pointerdown", startDrag);
  canvas.addEventListener("pointermove", followPointer);
  canvas.addEventListener("pointerup", endDrag);
  canvas.addEventListener("pointercancel", endDrag);
  canvas.addEventListener("pointerleave", () => { hover = null; paintReadout(); });
  canvas.addEventListener("contextmenu", (event) => event.preventDefault());
  canvas.addEventListener("wheel", turnWheel, { passive: false });
  document.addEventListener("keydown", pressKey);
  for (const button of all("button[data-tool]")) button.addEventListener("click", () => chooseTool(button.dataset.tool));
  for (const button of all("[data-window]")) button.addEventListener("click", () => setWindow(...data.windows[button.dataset.window]));
  for (const button of all("[data-part]")) button.addEventListener("click", () => goToPart(button));
  byId("reset").addEventListener("click", reset);
  byId("help").addEventListener("click", () => toggleKeys());
  byId("opacity")?.addEventListener("input", () => nv.drawScene());
  byId("all")?.addEventListener("change", () => nv.drawScene());
  for (const box of all("[data-toggle]")) box.addEventListener("change", () => {
    box.checked ? hidden.delete(box.dataset.toggle) : hidden.add(box.dataset.toggle);
    nv.drawScene();
  });
}

// Sentences and rows light up their lesions, with images or without.
function listenToText() {
  for (const sentence of all(".sentence[data-lesions]")) {
    const keys = sentence.dataset.lesions.split(" ");
    sentence.addEventListener("mouseenter", () => highlight(keys));
    sentence.addEventListener("focus", () => highlight(keys));
    for (const end of ["mouseleave", "blur"]) sentence.addEventListener(end, () => highlight([]));
    sentence.addEventListener("click", () => { if (nv) goToLesion(keys); });
    sentence.addEventListener("keydown", (event) => { if (event.key === "Enter" && nv) goToLesion(keys); });
  }
  for (const row of all(".lesion")) {
    row.addEventListener("mouseenter", () => highlight([row.dataset.lesion]));
    row.addEventListener("mouseleave", () => highlight([]));
  }
}

// Start

function chooseLayout(viewer) {
  const isWide = stage.clientWidth >= stage.clientHeight * 0.95;
  const [axial, coronal, sagittal] = isWide
    ? [[0, 0, 0.62, 1], [0.62, 0, 0.38, 0.5], [0.62, 0.5, 0.38, 0.5]]
    : [[0, 0, 1, 0.6], [0, 0.6, 0.5, 0.4], [0.5, 0.6, 0.5, 0.4]];
  viewer.setCustomLayout([
    { sliceType: 0, position: axial },
    { sliceType: 1, position: coronal },
    { sliceType: 2, position: sagittal },
  ]);
}

// NiiVue links 48 programs, most of them for volume rendering and meshes, and waits for each. Those
// that neither draw slices nor load a CT are never linked: they count as good, have no uniforms and
// draw nothing.
const NEEDED_SOURCE = /gl_Position|axCorSag|scl_slope/; // vertex shaders, slices, loading

function skipUnusedPrograms(gl) {
  const unused = new WeakSet(); // fragment shaders and their programs
  const replace = (name, call) => {
    const original = gl[name].bind(gl);
    gl[name] = (object, ...more) => call(original, object, ...more);
  };
  replace("shaderSource", (original, shader, source) => {
    NEEDED_SOURCE.test(source) ? original(shader, source) : unused.add(shader);
  });
  replace("attachShader", (original, program, shader) => {
    unused.has(shader) ? unused.add(program) : original(program, shader);
  });
  for (const name of ["compileShader", "linkProgram"]) {
    replace(name, (original, object) => { if (!unused.has(object)) original(object); });
  }
  replace("getProgramParameter", (original, program, name) => unused.has(program) || original(program, name));
  replace("getUniformLocation", (original, program, name) => unused.has(program) ? null : original(program, name));
  let isUnused = false; // the program in use
  replace("useProgram", (original, program) => {
    isUnused = unused.has(program);
    original(isUnused ? null : program);
  });
  replace("drawArrays", (original, ...call) => { if (!isUnused) original(...call); });
}

async function openViewer() {
  // The context that NiiVue will ask for, with its attributes: a second one would cost time.
  const gl = byId("ct").getContext("webgl2", { alpha: true, antialias: false });
  if (!gl) throw new Error("this browser has no WebGL 2, or it is switched off");
  skipUnusedPrograms(gl);
  const viewer = new niivue.Niivue({
    logLevel: "silent", backColor: [0, 0, 0, 1], crosshairWidth: 0, isRadiologicalConvention: true,
    sagittalNoseLeft: true, isOrientationTextVisible: false, dragAndDropEnabled: false,
    interactive: false, trustCalMinMax: true, loadingText: "",
  });
  // Nothing is drawn before all of it is there: a software renderer takes its time.
  const draw = viewer.drawScene.bind(viewer);
  viewer.drawScene = () => "";
  const layers = all("[data-layer]");
  chooseLayout(viewer);
  const [, buffer, ...maskBuffers] = await Promise.all([
    viewer.attachToCanvas(byId("ct"), false),
    unpack(byId("ct-data").textContent),
    ...layers.map((layer) => unpack(layer.textContent)),
  ]);
  layers.forEach((layer, n) => { masks[layer.dataset.layer] = new Uint8Array(maskBuffers[n]); });
  await viewer.loadFromArrayBuffer(buffer, "ct.nii");
  nv = viewer;
  ct = nv.volumes[0].img;
  nv.drawScene = () => { const place = draw(); paint(); return place; };
  listen();
  chooseTool("cross");
  // The CT comes in the lung window.
  nameWindow(...data.windows.lung);
  moveTo(data.start);
  new ResizeObserver(() => chooseLayout(nv)).observe(stage);
  byId("loading").hidden = true;
}

function explainFailure(error) {
  byId("loading").hidden = true;
  byId("failure").hidden = false;
  byId("failure").textContent = `No images are shown: ${error.message}. Findings and report are complete.`;
}

listenToText();
openViewer().catch(explainFailure).finally(() => requestAnimationFrame(() => {
  // Milliseconds from the start of the page to the first picture.
  document.documentElement.dataset.openedMs = Math.round(performance.now());
}));
