"""The synthetic anomalies of Baugh et al. (2023) written plainly from the paper's formulas with numpy, scipy and scikit-image: what they cost without this library.

Nothing here is fast or clever on purpose: float64, a copy of the whole volume an anomaly, cubic splines by `affine_transform` and `map_coordinates` (which filter
the whole patch first), five-step finite differences, `scipy.fft.dstn`, grey closing, reconstruction by erosion. The random draws come in the order of the library's
tasks, and the shapes from its sampler, so that one seed gives both the same anomalies: `REFERENCE[name](task, sample, rng) -> (image, target)`.
"""
import numpy as np
from scipy import fft, ndimage
from skimage.morphology import reconstruction

from anomaly_nb.tasks.poisson import place_patch
from anomaly_nb.tasks.shapes import turn


def box_at(corner, shape):
    return tuple(slice(c, c + n) for c, n in zip(corner, shape))


# ---------------------------------------------------------------- label: section 2.3 of the paper

def label(image, original, mask, sigma=0.2):
    "Flipped Gaussian of the mean change, then each component closed and its holes filled in its own box."
    d = mask.ndim
    y = np.zeros(mask.shape)
    y[mask] = 1 - np.exp(-np.abs(image - original)[:, mask].mean(0)**2 / (2 * sigma**2))
    found, count = ndimage.label(mask, ndimage.generate_binary_structure(d, d))
    out = np.zeros_like(y)
    for n, box in enumerate(ndimage.find_objects(found), 1):
        part = np.pad(y[box] * (found[box] == n), 1)                                # with a rim, or the closing would fill the box's corners
        part = ndimage.grey_closing(part, footprint=ndimage.generate_binary_structure(d, 2))
        seed = np.full_like(part, part.max())
        for axis in range(d):
            edge = [slice(None)] * d
            for edge[axis] in (0, -1): seed[tuple(edge)] = part[tuple(edge)]
        out[box] = np.maximum(out[box], reconstruction(seed, part, method="erosion")[(slice(1, -1),) * d])
    return out[None]


# ---------------------------------------------------------------- Poisson blending: section 2.1

def poisson_blend(target, source, mask, corner, mix_gradients=True):
    "The discrete Dirichlet problem on the mask's box, by DST-I, channel by channel, on a copy of the whole target."
    result, box = target.copy(), box_at(corner, mask.shape)
    mask, d = mask.astype(float), mask.ndim
    for axis in range(d):
        edge = [slice(None)] * d
        for edge[axis] in (0, -1): mask[tuple(edge)] = 0
    for channel in range(len(target)):
        t, s = target[channel][box], source[channel]
        laplacian = np.zeros(t.shape)
        for axis in range(d):
            gt, gs = (ndimage.correlate1d(x, [0, -1, 1], axis, mode="mirror") for x in (t, s))
            mixed = np.where(np.abs(gt) >= np.abs(gs), gt, gs) if mix_gradients else gs
            laplacian += ndimage.correlate1d(gt * (1 - mask) + mixed * mask, [-1, 1, 0], axis, mode="mirror")
        inner = (slice(1, -1),) * d
        faces = t.copy(); faces[inner] = 0
        rhs = (laplacian - ndimage.laplace(faces, mode="mirror"))[inner]
        eigenvalue = 0
        for axis, n in enumerate(rhs.shape):
            shape = [1] * d; shape[axis] = n
            eigenvalue = eigenvalue + (2 * np.cos(np.pi * np.arange(1, n + 1) / (n + 1)) - 2).reshape(shape)
        new = t.copy(); new[inner] = fft.idstn(fft.dstn(rhs, type=1) / eigenvalue, type=1)
        result[(channel, *box)] = new
    return result


def turned_patch(image, foreground, box, rng, angle, scale):
    "Cut out the part of the whole image that the turned box needs, turn it by cubic splines, clip to the image's range."
    zoom = 1 + rng.exponential(scale)
    if rng.random() < 0.5: zoom = 1 / zoom
    centre, matrix = place_patch(foreground, zoom * turn(len(box), rng, angle), box, rng)
    middle = (np.array(box) - 1) / 2
    reach = np.abs(matrix) @ middle
    low = np.floor(centre - reach).astype(int)
    high = np.ceil(centre + reach).astype(int) + 1
    part = image[(slice(None), *(slice(max(a, 0), b) for a, b in zip(low, high)))]
    offset = centre - np.maximum(low, 0) - matrix @ middle
    out = np.stack([ndimage.affine_transform(c.astype(float), matrix, offset, output_shape=tuple(box), order=3, mode="nearest") for c in part])
    axes = tuple(range(1, image.ndim))
    return np.clip(out, image.min(axes, keepdims=True), image.max(axes, keepdims=True))


def blend(task, image, limits, shape, corner, rng, sample):
    donor = task.donor(sample, rng)
    source = turned_patch(donor["image"], donor["foreground"][0], shape.mask.shape, rng, task.angle, task.scale)
    out = poisson_blend(image, source, shape.mask, corner, task.mix)
    out = np.clip(out, *limits)
    box = box_at(corner, shape.mask.shape)
    return out, shape.mask | (np.abs(out - image)[(slice(None), *box)].mean(0) > 1e-3)


# ---------------------------------------------------------------- sink and source: equations 1 and 2

def reach(shape, center, u):
    "Distance from `center` along unit vectors u [d,n] to the boundary of the box or ellipse."
    inverse = np.linalg.inv(shape.matrix)
    o, v, h = inverse @ (center - (np.array(shape.mask.shape) - 1) / 2), inverse @ u, shape.sides / 2
    if shape.kind == "box":
        with np.errstate(divide="ignore", invalid="ignore"):
            t = np.concatenate([(h[:, None] - o[:, None]) / v, (-h[:, None] - o[:, None]) / v])
        return np.where(t > 0, t, np.inf).min(0)
    o, v = o / h, v / h[:, None]
    a, b, c = (v**2).sum(0), 2 * o @ v, o @ o - 1
    return (-b + np.sqrt(np.maximum(b**2 - 4 * a * c, 0))) / (2 * a)


def deform(task, image, limits, shape, corner, rng, sample):
    mask, box = shape.mask, box_at(corner, shape.mask.shape)
    inside = np.flatnonzero(mask)
    center = np.array(np.unravel_index(inside[rng.integers(len(inside))], mask.shape))
    if task.factor == "plain": f = 2 ** rng.uniform(0.5, 2)
    else:
        edge = np.argwhere(mask & ~ndimage.binary_erosion(mask))
        a = np.sqrt(((edge - center) ** 2).sum(1)).mean()
        P = a / np.sqrt(2)
        q = rng.uniform(max(0.1 * P, min(task.push[0], 0.9 * P)), min(0.9 * P, max(task.push[1], 0.1 * P)))
        f = np.log(0.5 - q / (np.sqrt(2) * a)) / np.log(0.5 + q / (np.sqrt(2) * a)) if a > 0 else 1.0
    p = np.argwhere(mask).T.astype(float)
    p = p[:, (p != center[:, None]).any(0)]
    r = np.sqrt(((p - center[:, None]) ** 2).sum(0))
    u = (p - center[:, None]) / r
    d = reach(shape, center, u)
    x = np.minimum(r / d, 1)
    new_r = d * (1 - (1 - x) ** f) if task.kind == "sink" else d * x**f
    places = np.stack(np.meshgrid(*(np.arange(n, dtype=float) for n in mask.shape), indexing="ij"))
    places[(slice(None), *p.astype(int))] = center[:, None] + new_r * u
    for axis, n in enumerate(mask.shape): places[axis] = np.clip(places[axis], 0, n - 1)
    out, inner = image.copy(), (slice(1, -1),) * mask.ndim
    for channel in range(len(image)):
        moved = ndimage.map_coordinates(image[channel][box], places, order=3, mode="nearest")
        content = out[channel][box]
        content[inner] = moved[inner]
    return out, mask


# ---------------------------------------------------------------- smooth intensity

def intensity(task, image, limits, shape, corner, rng, sample):
    change, width = task.draw(image, rng)
    distance = ndimage.distance_transform_edt(np.pad(shape.mask, 1))[(slice(1, -1),) * shape.mask.ndim]
    out, wide = image.copy(), (-1, *(1,) * shape.mask.ndim)
    out[(slice(None), *box_at(corner, shape.mask.shape))] += change.reshape(wide) * np.minimum(distance / min(width, distance.max()), 1)
    return np.clip(out, *limits), shape.mask


# ---------------------------------------------------------------- the loop: section 2 and supplement

def run(change):
    def reference(task, sample, rng):
        original = sample["image"].astype(float)
        limits = [f(axis=tuple(range(1, original.ndim)), keepdims=True) for f in (original.min, original.max)]
        image, mask = original.copy(), np.zeros(original.shape[1:], bool)
        for _ in range(task.most):
            shape, corner = task.draw_shape(sample["foreground"][0], rng)
            image, changed = change(task, image, limits, shape, corner, rng, sample)
            mask[box_at(corner, shape.mask.shape)] |= changed
            if rng.random() >= task.again: break
        return image, label(image, original, mask, task.sigma)
    return reference


REFERENCE = {"intra": run(blend), "inter": run(blend), "sink": run(deform), "source": run(deform), "smooth": run(intensity)}
