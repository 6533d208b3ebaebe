"Lesion families: what would spoil every comparison if it were subtly wrong."
import numpy as np
import pytest
from scipy import ndimage

from anomaly_nb.core import ParameterError
from anomaly_nb.data.anatomy import TISSUE_VALUES, subject_tissues
from anomaly_nb.data.lesion_scene import make_scene, side_of
from anomaly_nb.data.lesion_shapes import jacobian
from anomaly_nb.data.lesions import FAMILIES, apply_lesion, draw_lesion, paint_lesion

HEADS = {}


def head(seed=1, site="A", spacing=4):
    key = seed, site, spacing
    if key not in HEADS: HEADS[key] = subject_tissues(seed, spacing, site=site)
    return HEADS[key]


def image(tissues, contrast): return np.tensordot(np.float32(TISSUE_VALUES[contrast]), tissues, 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_contract(family):
    tissues = head()
    before = tissues.copy()
    lesion = draw_lesion(family, tissues, np.random.default_rng(5), 4)
    again = draw_lesion(family, tissues, np.random.default_rng(5), 4)
    other = draw_lesion(family, tissues, np.random.default_rng(6), 4)
    assert np.array_equal(tissues, before)                                        # the input is not changed
    for name in ("weight", "displacement", "mask"): assert np.array_equal(getattr(lesion, name), getattr(again, name))
    assert lesion.meta == again.meta and (lesion.mask != other.mask).any()
    shape = tissues.shape[1:]
    assert lesion.weight.shape[1:] == lesion.mask.shape == lesion.displacement.shape[1:] == shape and lesion.displacement.shape[0] == 3
    assert lesion.weight.dtype == lesion.displacement.dtype == np.float32 and lesion.mask.dtype == bool
    assert lesion.mask.any() and not (lesion.mask & (tissues.sum(0) <= 0.5)).any()
    assert lesion.weight.min() >= 0 and lesion.weight.sum(0).max() <= 1 + 1e-5
    assert not lesion.weight[:, tissues.sum(0) == 0].any()                        # nothing is painted outside the head
    assert jacobian(lesion.displacement).min() > 0
    assert set(lesion.values) == set(FAMILIES[family].visible)
    assert family == "atrophy" or lesion.weight.any()
    assert FAMILIES[family].mask_known == (family != "atrophy")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("spacing", (2, 4))
def test_contrast_zero_is_the_healthy_twin_to_the_bit(family, spacing):
    tissues = head(spacing=spacing)
    lesion = draw_lesion(family, tissues, np.random.default_rng(2), spacing)
    moved, weight, mask = apply_lesion(tissues, lesion, 0.0)
    assert np.array_equal(moved, tissues) and moved is not tissues and not weight.any() and np.array_equal(mask, lesion.mask)
    for contrast in TISSUE_VALUES:
        assert np.array_equal(paint_lesion(image(moved, contrast), weight, lesion, contrast), image(tissues, contrast))
    moved, weight, _ = apply_lesion(tissues, lesion, 1.0)
    assert moved.min() >= 0 and np.abs(moved.sum(0) - tissues.sum(0)).max() < 0.02  # the outline of the brain stays
    for contrast in FAMILIES[family].visible:
        change = paint_lesion(image(moved, contrast), weight, lesion, contrast) - image(tissues, contrast)
        assert np.abs(change[lesion.mask]).max() > 0.04
    for contrast in set(TISSUE_VALUES) - set(FAMILIES[family].visible):           # an unseen family leaves the intensities of the tissues
        assert np.array_equal(paint_lesion(image(moved, contrast), weight, lesion, contrast), image(moved, contrast))


def test_volumes_are_in_the_stated_ranges():
    scenes = [make_scene(head(k, s), 4) for k, s in ((0, "A"), (1, "B"))]
    for name, family in FAMILIES.items():
        for k in range(8):
            lesion = draw_lesion(name, scenes[k % 2].tissues, np.random.default_rng(k), 4, scene=scenes[k % 2])
            assert min(family.size_ml[0], 0.063) <= lesion.meta["volume"] <= family.size_ml[1], (name, k, lesion.meta)
            assert np.isclose(lesion.meta["volume"], lesion.mask.sum() * 0.064)


@pytest.mark.parametrize("size", (0.1, 0.3, 3.0))
def test_extreme_sizes_neither_vanish_nor_break(size):
    scene = make_scene(head(), 4)
    for name in FAMILIES:
        lesion = draw_lesion(name, scene.tissues, np.random.default_rng(3), 4, size=size, scene=scene)
        assert lesion.mask.any() and np.isfinite(lesion.weight).all() and jacobian(lesion.displacement).min() > 0, name
        if name != "atrophy": assert lesion.weight.max() > 0.2, name


def test_stroke_and_ischaemia_stay_on_their_side():
    scene = make_scene(head(1, "B"), 4)
    side = side_of(scene, tuple(slice(0, n) for n in scene.brain.shape))
    seen = set()
    for name in ("stroke", "ischaemia"):
        for k in range(6):
            lesion = draw_lesion(name, scene.tissues, np.random.default_rng(k), 4, scene=scene)
            left = lesion.meta["side"] == "left"
            seen.add(left)
            assert ((side[lesion.mask] > 0) == left).all()
            # independent of our midplane: left is where the last axis grows
            assert (np.argwhere(lesion.mask)[:, 2].mean() > np.argwhere(scene.brain)[:, 2].mean()) == left
    assert seen == {True, False}


def test_midplane_follows_a_tilted_head():
    tissues = head()
    turned = np.stack([ndimage.rotate(t, 7, (1, 2), reshape=False, order=1) for t in tissues])
    tilt = [np.degrees(np.arctan(make_scene(t, 4).midplane[1])) for t in (tissues, turned)]
    assert 5 < abs(tilt[1] - tilt[0]) < 9


def test_atrophy_turns_tissue_into_csf_and_grows_with_size():
    tissues = head()
    csf = [np.mean([apply_lesion(tissues, draw_lesion("atrophy", tissues, np.random.default_rng(k), 4, size=s))[0][0].sum() for k in range(3)]) for s in (0.4, 1, 1.6)]
    assert tissues[0].sum() * 1.03 < csf[0] < csf[1] < csf[2]


def test_dials_refuse_nonsense():
    tissues, rng = head(), np.random.default_rng(0)
    with pytest.raises(ParameterError, match="haemorrhage"): draw_lesion("hemorrhage", tissues, rng, 4)
    with pytest.raises(ParameterError, match="out of range"): draw_lesion("ms", tissues, rng, 4, size=0)
    lesion = draw_lesion("ms", tissues, rng, 4)
    for contrast in (-0.1, 1.1, float("nan")):
        with pytest.raises(ParameterError, match="out of range"): apply_lesion(tissues, lesion, contrast)


def test_a_head_without_ventricles_still_gets_lesions():
    tissues = head().copy()
    tissues[2] += tissues[0]
    tissues[0] = 0
    for name in FAMILIES: assert draw_lesion(name, tissues, np.random.default_rng(0), 4).mask.any(), name
