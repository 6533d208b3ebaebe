"""The family of patch tasks: bad input, odd sizes and channels, the same bytes everywhere, and second implementations of what they are made of."""
import dataclasses

import numpy as np
import pytest
from scipy import ndimage, stats
from skimage import exposure, filters, morphology

from anomaly_nb.core import DataError, InputError, ParameterError, PoolError
from anomaly_nb.data.module import AnomalyDataModule
from anomaly_nb.tasks.nsa import NSA, PII, blend_gradients
from anomaly_nb.tasks.patches import CLASSES, FPI, CutPaste, PseudoAnomaly, cut_sides, scar_shape, square_patch
from anomaly_nb.tasks.perlin import OPERATIONS, PerlinTexture, perlin_mask, perlin_noise, spoil, texture_of
from anomaly_nb.tasks.poisson import poisson_blend
from anomaly_nb.tasks.task import check_task

FAMILY = {"fpi": FPI(), "pii": PII(), "nsa": NSA(), "nsa-object": NSA(mix=False, offset=.03, gamma=(2., .05), k=1/12, x0=24.), "nsa-gaussian": NSA(label="gaussian"), "cutpaste": CutPaste(), "scar": CutPaste("scar"),
          "pseudo": PseudoAnomaly(), "perlin": PerlinTexture(normal=0.), "perlin-subjects": PerlinTexture(normal=0., texture="subjects"), "perlin-noise": PerlinTexture(normal=0., texture="noise")}
SPATIAL = [(40, 40), (33, 57), (20, 24, 28), (17, 30, 16)]


def person(spatial, channels=1, seed=0):
    "Smooth noise in a round organ, nothing outside."
    rng = np.random.default_rng(seed)
    organ = (sum(g**2 for g in np.meshgrid(*(np.linspace(-1, 1, n) for n in spatial), indexing="ij")) < .8)[None]
    image = ndimage.gaussian_filter(rng.normal(size=(channels, *spatial)), (0,) + (1,)*len(spatial))
    return dict(image=(image/image.std()*organ).astype(np.float32), foreground=organ, valid=np.ones_like(organ), mask=np.zeros_like(organ), mask_known=True, label=0, id=f"person{seed}", subject=f"s{seed}", meta={})


class People:
    "A data set of samples, as the data module wants it."
    spacing = None
    def __init__(self, samples):
        self.samples, self.subjects, self.ids, self.labels = samples, [s["subject"] for s in samples], [s["id"] for s in samples], np.zeros(len(samples), int)
    def __len__(self): return len(self.samples)
    def __getitem__(self, index): return self.samples[index]
    channels = property(lambda self: len(self[0]["image"]))
    shape = property(lambda self: self[0]["image"].shape[1:])
    volumes = property(lambda self: self)
    spatial_dims = property(lambda self: self[0]["image"].ndim - 1)


def crowd(spatial, channels=1, seeds=range(4)):
    return People([person(spatial, channels, n) for n in seeds])


@pytest.mark.parametrize("spatial", SPATIAL, ids=str)
@pytest.mark.parametrize("name", FAMILY)
def test_contract_in_any_shape_with_any_number_of_channels(name, spatial):
    for channels in (1, 3):
        people = crowd(spatial, channels)
        task, changed = FAMILY[name].bind(people), 0
        for seed in range(6):
            made = check_task(task, people[0], seed)
            moved = np.abs(made["image"] - made["clean"]).max(0)
            assert (moved[made["target"][0] == 0] <= (.1 if "nsa" in name else 2e-3)).all()      # what is not called anomalous was not changed (NSA: not by a grey level)
            changed += bool(made["target"].any())
        assert changed or name == "cutpaste"


@pytest.mark.parametrize("name", FAMILY)
def test_bad_samples_are_errors_that_name_them(name):
    good = person((40, 40))
    task = FAMILY[name].bind(crowd((40, 40)))
    if name == "cutpaste": task = CutPaste("cutpaste")
    bad = {"NaN": dict(image=np.where(good["image"] > 1, np.nan, good["image"])), "infinite": dict(image=np.where(good["image"] > 1, np.inf, good["image"])), "constant": dict(image=np.full_like(good["image"], 3)),
           "foreground": dict(foreground=np.zeros_like(good["foreground"])), "shape": dict(image=good["image"][..., 0], foreground=good["foreground"][..., 0])}
    for words, change in bad.items():
        before = {k: v.copy() for k, v in change.items()}
        with pytest.raises(DataError, match=words) as error: task(good | change, np.random.default_rng(0))
        assert "person0" in str(error.value)
        for key, value in before.items(): np.testing.assert_array_equal(change[key], value)


@pytest.mark.parametrize("task", [FPI(), PII(), NSA(), PerlinTexture(normal=0, texture="subjects")], ids=lambda t: type(t).__name__)
def test_strangers_that_do_not_fit(task):
    good = person((40, 40))
    with pytest.raises(PoolError, match="no source"): task(good, np.random.default_rng(0))
    with pytest.raises(PoolError, match="no subject but"): task.bind(People([good]))(good, np.random.default_rng(0))
    two = person((40, 40), 2, seed=1)
    with pytest.raises(DataError, match="person1"): task.bind(People([good, two]))(good, np.random.default_rng(0))
    if isinstance(task, FPI):
        with pytest.raises(DataError, match="person1.*shape"): task.bind(People([good, person((40, 44), seed=1)]))(good, np.random.default_rng(0))


def test_the_external_set_of_perlin_textures():
    volume, picture = person((16, 20, 18)), person((40, 40))
    task = PerlinTexture(normal=0, texture="external")
    with pytest.raises(PoolError): task(picture, np.random.default_rng(0))
    with pytest.raises(DataError): task.with_external(People([volume]))(picture, np.random.default_rng(0))
    with pytest.raises(DataError): task.with_external(crowd((30, 30), 3))(picture, np.random.default_rng(0))
    check_task(task.with_external(crowd((23, 61))), picture)                                   # another size is no obstacle
    dots = person((30, 30), seed=5); dots["foreground"][:] = False; dots["foreground"][0, 4, 7] = True
    assert np.isfinite(texture_of(dots["image"], dots["foreground"], (40, 40))).all()          # an organ of one voxel


@pytest.mark.parametrize("wrong", [lambda: FPI(half=(.3, .1)), lambda: FPI(core=2), lambda: FPI(location="sam"), lambda: CutPaste("normal+scars"), lambda: CutPaste(area=(.2, .1)), lambda: CutPaste(share=0),
                                   lambda: NSA(resize=(0, 1)), lambda: NSA(label="logistics"), lambda: NSA(gamma=(2,)), lambda: PerlinTexture(texture="noises"), lambda: PerlinTexture(normal=2), lambda: PerlinTexture(operations=12)])
def test_wrong_parameters_are_refused(wrong):
    with pytest.raises(ParameterError): wrong()


def test_an_organ_too_small_ends_in_an_error_not_in_a_loop():
    speck = person((40, 40))
    speck["foreground"] = np.zeros_like(speck["foreground"]); speck["foreground"][0, 20, 20:22] = True
    for task in (CutPaste("cutpaste"), PseudoAnomaly(), NSA().bind(crowd((40, 40)))):
        with pytest.raises(DataError, match="person0.*no place"): task(speck, np.random.default_rng(0))
    with pytest.raises(DataError): square_patch((2, 40), np.random.default_rng(0))
    with pytest.raises(DataError): cut_sides((2, 2), np.random.default_rng(0))


def test_a_donor_with_little_organ_still_lends():
    people = crowd((40, 40), seeds=range(2))
    people[1]["foreground"][:] = False; people[1]["foreground"][0, 2, 3] = True                 # one voxel, in a corner
    for seed in range(20): check_task(NSA().bind(people), people[0], seed)


def test_the_same_bytes_with_and_without_workers_and_only_the_own_split():
    pools = dict(train=crowd((24, 24), seeds=range(6)), val=crowd((24, 24), seeds=range(6, 10)))
    pools["val"][0]["image"][:] += 100*pools["val"][0]["foreground"]                            # a subject that would be seen from afar
    for task in (FPI(location="random"), PII(), NSA(), PerlinTexture(normal=0, texture="subjects")):
        batches = []
        for workers in (0, 2):
            data = AnomalyDataModule(**pools, task=dataclasses.replace(task), batch_size=3, seed=3, workers=workers)
            batches.append([b for b in data.loader("train", task=True)])
            assert all(b["image"].max() < 50 for b in batches[-1])
        for a, b in zip(*batches):
            for key in ("image", "target"): assert a[key].numpy().tobytes() == b[key].numpy().tobytes()


def test_cutpaste_classes_are_balanced_and_go_through_the_loader():
    people = crowd((32, 32), seeds=range(8))
    batch = next(iter(AnomalyDataModule(train=people, val=crowd((32, 32), seeds=range(8, 12)), task=CutPaste(), batch_size=8).loader("train", task=True)))
    assert str(batch["pretext"].dtype) == "torch.int64" and batch["pretext"].shape == (8,)
    volume = person((16, 18, 20))
    for kinds in ("normal+cutpaste+scar", "scar+normal"):
        found = np.bincount([CutPaste(kinds)(volume, np.random.default_rng(n))["pretext"] for n in range(450)], minlength=3)
        expected = [450/len(kinds.split("+"))*(c in kinds.split("+")) for c in CLASSES]
        assert all(found[i] == 0 for i in range(3) if not expected[i])
        assert stats.chisquare(found[found > 0], [e for e in expected if e]).pvalue > .001


def test_cutpaste_area_and_aspect_of_what_is_changed():
    noise = person((64, 64)); noise["image"] = np.random.default_rng(1).normal(size=(1, 64, 64)).astype(np.float32); noise["foreground"][:] = True
    area, aspect = [], []
    for seed in range(400):
        y = CutPaste("cutpaste")(noise, np.random.default_rng(seed))["target"][0] > 0
        rows, columns = np.flatnonzero(y.any(1)), np.flatnonzero(y.any(0))
        h, w = rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1
        assert y.sum() == h*w                                                                   # a whole rectangle
        area.append(y.mean()); aspect.append(w/h)
    assert min(area) >= .02 and max(area) <= .15 and min(aspect) >= .3 and max(aspect) <= 3.3
    assert stats.kstest(area, stats.uniform(.02, .13).cdf).pvalue > .001                        # U(0.02, 0.15), in spite of rounding and retries


def test_scars_are_turned_both_ways_within_45_degrees():
    angles = [np.degrees(np.arctan2(s.matrix[1, 0], s.matrix[0, 0])) for s in (scar_shape((256, 256), np.random.default_rng(n)) for n in range(500))]
    assert -45 <= min(angles) < -43 and 43 < max(angles) <= 45


def test_fpi_and_pii_draw_the_same_square_alpha_and_stranger():
    people = crowd((48, 40))
    for seed in range(30):
        a, b = (t.bind(people)(people[0], np.random.default_rng(seed)) for t in (FPI(), PII()))
        if not b["target"].any(): continue
        assert a["target"].max() == b["target"].max()
        rows = np.flatnonzero(a["target"][0].any(1)); inner = np.flatnonzero(b["target"][0].any(1))
        assert rows[0] <= inner[0] and inner[-1] <= rows[-1]                                    # PII leaves the border of the square as it is


def test_pii_is_the_blend_of_chapter_240_added_twice():
    rng = np.random.default_rng(0)
    for shape in ((9, 12), (7, 6, 8)):
        x, other = rng.normal(size=(2, 2, *shape))
        whole, corner = np.ones(shape, bool), (0,)*len(shape)
        slow = poisson_blend(.3*x, .7*other, whole, corner) + poisson_blend(.7*x, 0*x, whole, corner, mix_gradients=False)
        np.testing.assert_allclose(blend_gradients(x, other, .7), slow, atol=1e-12)
        flat = blend_gradients(x.astype(np.float32), other.astype(np.float32), .7)
        assert flat.dtype == np.float32 and np.abs(flat - slow).max() < 1e-5


def test_nsa_label_against_scikit_image():
    rng = np.random.default_rng(0)
    original = np.clip(rng.normal(128, 40, (1, 256, 256)), 0, 255).astype(np.float32); original[0, 0, :2] = 0, 255     # a grey level is 1
    change = np.zeros((1, 256, 256)); change[0, 60:160, 80:200] = ndimage.gaussian_filter(rng.normal(size=(100, 120)), 3)*80
    image, mask = (original + change).astype(np.float32), np.zeros((256, 256), bool); mask[60:160, 80:200] = True
    box = (slice(50, 170), slice(70, 210))
    made = NSA().soft_label(image, original, mask, [box])[0]
    d = np.abs(image - original).mean(0); inside = mask & (d > 1)
    smooth = filters.median(np.where(inside, d, 0), morphology.disk(5))
    np.testing.assert_allclose(made, np.where(inside, 1/(1 + np.exp(-.5*(smooth - 4))), 0), atol=1e-5)


def test_operations_against_scikit_image():
    x = np.random.default_rng(0).beta(2, 3, (1, 80, 90))
    np.testing.assert_allclose(OPERATIONS["equalize"](x, None), exposure.equalize_hist(x), atol=.02)
    rng = lambda: np.random.default_rng(7)
    np.testing.assert_allclose(OPERATIONS["gamma"](x, rng()), exposure.adjust_gamma(x, rng().uniform(.5, 2, (1, 1, 1))[0, 0, 0]))
    cut = rng().uniform(0, 20)
    np.testing.assert_allclose(np.clip(OPERATIONS["autocontrast"](x, rng()), 0, 1), exposure.rescale_intensity(x, tuple(np.percentile(x, (cut, 100 - cut))), (0, 1)), atol=1e-9)
    angle = rng().uniform(-np.pi/4, np.pi/4)
    blob = np.zeros((1, 61, 61)); blob[0, 30, 50] = 1; blob = ndimage.gaussian_filter(blob, (0, 3, 3))
    turned = OPERATIONS["rotate"](blob, rng())[0]
    np.testing.assert_allclose(np.linalg.norm(np.array(ndimage.center_of_mass(turned)) - 30), 20, atol=.1)                # turned about the middle
    assert abs(abs(np.arctan2(*(np.array(ndimage.center_of_mass(turned)) - 30))) - abs(angle)) < .01


def test_hue_turns_colours_and_leaves_grey():
    grey = np.repeat(np.random.default_rng(0).uniform(size=(1, 8, 8)), 3, 0)
    np.testing.assert_allclose(OPERATIONS["hue"](grey, np.random.default_rng(1)), grey)
    colour = np.random.default_rng(0).uniform(size=(3, 8, 8)); turned = OPERATIONS["hue"](colour, np.random.default_rng(1))
    rng = np.random.default_rng(1); angle, more = rng.uniform(-50, 50)/255*np.pi, 1 + rng.uniform(-50, 50)/255
    a, b = colour - colour.mean(0), turned - turned.mean(0)
    np.testing.assert_allclose(np.linalg.norm(b, axis=0), more*np.linalg.norm(a, axis=0))      # saturation
    np.testing.assert_allclose((a*b).sum(0)/np.linalg.norm(a, axis=0)/np.linalg.norm(b, axis=0), np.cos(angle))   # and hue


def test_perlin_has_no_seams_and_no_holes_when_turned():
    for shape in ((64, 48), (24, 30, 20)):
        noise = perlin_noise(shape, 4, np.random.default_rng(0))
        assert noise.shape == shape and noise.dtype == np.float32 and np.abs(noise).max() <= 1
        steps = max(np.abs(np.diff(noise, axis=a)).max() for a in range(len(shape)))
        assert steps < 4*4/max(shape)                                                           # slope at most a few units a cell, everywhere
        assert min(np.abs(noise[corner]).max() for corner in [tuple(slice(-6, None) if c else slice(0, 6) for c in np.unravel_index(i, (2,)*len(shape))) for i in range(2**len(shape))]) > 0


def test_perlin_speaks_the_range_it_says_with_any_scale():
    for cells in (.5, 1, 3.7, 32):
        for seed in range(10): assert np.abs(perlin_noise((50, 37), cells, np.random.default_rng(seed))).max() <= 1 + 1e-6
    assert perlin_mask((5, 6), np.random.default_rng(0)).shape == (5, 6)                        # smaller than a cell


def test_half_of_draems_samples_stay_normal_even_with_a_small_organ():
    small = person((48, 48)); small["foreground"][:] = False; small["foreground"][0, 20:28, 20:28] = True
    stay = sum(not PerlinTexture()(small, np.random.default_rng([5, n]))["target"].any() for n in range(300))
    assert stats.binomtest(stay, 300, .5).pvalue > .001


def test_every_error_is_of_the_house():
    "Whatever a random broken sample meets, it is an InputError."
    rng = np.random.default_rng(0)
    for n in range(60):
        sample = person((12, 14), seed=n)
        sample["foreground"] = rng.random((1, 12, 14)) < rng.choice([0, .02, .3, 1])
        if n % 3 == 0: sample["image"][rng.random(sample["image"].shape) < .1] = np.nan
        for name, task in FAMILY.items():
            try: check_task(task.bind(crowd((12, 14))), sample, n)
            except InputError as error: assert "gave" not in str(error) and "changed" not in str(error), (name, error)
