"""Localised detectors against scikit-learn on anything that hypothesis thinks of, and what a kill or a strange file does to a fit."""
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.neighbors import LocalOutlierFactor
from sklearn.svm import OneClassSVM

from anomaly_nb.core import DataError, ParameterError
from anomaly_nb.detectors.localized import LocalizedOCSVM
from anomaly_nb.detectors.localized_density import LocalizedLOF
from anomaly_nb.detectors.neighbours import BlockedLOF, nearest


@settings(max_examples=40, deadline=None)
@given(n=st.integers(2, 60), d=st.integers(1, 6), nu=st.floats(0.02, 0.9), seed=st.integers(0, 99), levels=st.sampled_from([0, 2, 5]), shift=st.sampled_from([0.0, 100.0]), backend=st.sampled_from(["numba", "torch"]))
def test_scores_are_those_of_scikit_learn(n, d, nu, seed, levels, shift, backend):
    "Duplicates and ties (a few levels only), few and many vectors, far from the origin."
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(3, n, d))
    if levels: X = np.round(X * levels / 2) / levels
    X = (X + shift).astype(np.float32)
    if any((x == x[0]).all() for x in X): return
    Z = (rng.normal(0, 1.5, (3, 5, d)) + shift).astype(np.float32)
    ours = LocalizedOCSVM(nu=nu, gamma=0.7, backend=backend).fit(X)
    allowed = 1e-3 * max(1.0, nu * n / 20)
    for x, z, scores in zip(X.astype(np.float64), Z.astype(np.float64), ours.score_samples(Z)):
        peer = OneClassSVM(nu=nu, gamma=0.7, tol=1e-8).fit(x)
        np.testing.assert_allclose(scores, peer.score_samples(z), atol=allowed)


@pytest.mark.parametrize("backend", ["numba", "torch"])
@pytest.mark.parametrize("unit", [1e-25, 1e-20, 1.0, 1e20, 1e30])
def test_the_unit_of_the_vectors_does_not_matter(backend, unit):
    "gamma and squared lengths leave float32 long before the vectors do."
    rng = np.random.default_rng(0)
    X, Z = (rng.normal(size=(3, n, 4)) for n in (25, 6))
    X, Z = (X * unit).astype(np.float32), (Z * unit).astype(np.float32)
    ours = LocalizedOCSVM(nu=0.2, backend=backend).fit(X)
    for x, z, found in zip(X.astype(np.float64) / unit, Z.astype(np.float64) / unit, ours.decision_function(Z)):
        np.testing.assert_allclose(found, OneClassSVM(nu=0.2, tol=1e-8).fit(x).decision_function(z), atol=1e-3)
    with np.errstate(over="ignore"): far = ours.score_samples(np.full((3, 1, 4), 3e38, dtype=np.float32))
    if unit <= 1e20: np.testing.assert_allclose(far, 0, atol=1e-6)


@pytest.mark.parametrize("backend", ["numba", "torch"])
def test_all_weights_full_has_a_threshold(backend):
    "nu = 1: no vector lies above rho, the densest one on it."
    X = np.random.default_rng(0).normal(size=(3, 20, 4)).astype(np.float32)
    decisions = LocalizedOCSVM(nu=1, backend=backend).fit(X).decision_function(X)
    np.testing.assert_allclose(decisions.max(1), 0, atol=1e-5)


def test_float16_that_keeps_too_little_is_refused():
    X = np.random.default_rng(0).normal(size=(3, 20, 4)).astype(np.float32)
    for spoilt in (X + 1000, X * 1e-7, X * 1e6):
        with pytest.raises(ParameterError, match="float16"): LocalizedOCSVM(keep="float16").fit(spoilt)
        LocalizedOCSVM(keep="float16", standardise=True).fit(spoilt)


def test_a_fit_killed_while_it_cleans_up_is_finished(tmp_path):
    X = np.random.default_rng(0).normal(size=(8, 20, 3)).astype(np.float32)
    LocalizedOCSVM(nu=np.float32(0.25), chunk=4).fit(X, folder=tmp_path/"fit")
    (tmp_path/"fit"/"part-000000004.npz").write_bytes(b"left behind")
    LocalizedOCSVM(nu=np.float32(0.25), chunk=4).fit(X, folder=tmp_path/"fit")
    assert not list((tmp_path/"fit").glob("part-*"))
    (tmp_path/"fit"/"plan.json").unlink()
    with pytest.raises(DataError, match="plan.json"): LocalizedOCSVM.load(tmp_path/"fit")


@settings(max_examples=30, deadline=None)
@given(n=st.integers(5, 50), d=st.integers(1, 4), k=st.integers(1, 4), seed=st.integers(0, 99))
def test_factors_are_those_of_scikit_learn(n, d, k, seed):
    rng = np.random.default_rng(seed)
    X, Z = rng.normal(size=(2, n, d)).astype(np.float32), rng.normal(size=(2, 4, d)).astype(np.float32)
    located = LocalizedLOF(k).fit(X).score_samples(Z)
    for l in range(2):
        peer = LocalOutlierFactor(n_neighbors=k, novelty=True).fit(X[l].astype(np.float64)).score_samples(Z[l].astype(np.float64))
        np.testing.assert_allclose(located[l], peer, rtol=1e-4)
        np.testing.assert_allclose(BlockedLOF(k).fit(X[l]).score_samples(Z[l]), peer, rtol=1e-4)


@settings(max_examples=30, deadline=None)
@given(n=st.integers(3, 80), d=st.integers(1, 5), seed=st.integers(0, 99), clump=st.sampled_from([1.0, 1e-3, 1e-5]), shift=st.sampled_from([0.0, 1e3]))
def test_neighbours_are_exact_however_close_they_lie(n, d, seed, clump, shift):
    "Clumps far from the origin: products lose the digits that tell neighbours apart."
    rng = np.random.default_rng(seed)
    X = (rng.integers(-2, 3, (n, d)) + clump * rng.normal(size=(n, d)) + shift).astype(np.float32)
    k = min(4, n - 1)
    slow = np.sqrt(((X[:, None].astype(np.float64) - X[None])**2).sum(-1))
    np.fill_diagonal(slow, np.inf)
    np.testing.assert_allclose(nearest(X, k=k, rows=16, columns=7)[0], np.sort(slow, 1)[:, :k], rtol=1e-9)


FIT = """
import sys, time, numpy as np
from anomaly_nb.detectors.localized import LocalizedOCSVM
class Slow(LocalizedOCSVM):
    def _fit_chunk(self, X, constant, variance):
        time.sleep(float(sys.argv[2])); return super()._fit_chunk(X, constant, variance)
Slow.__name__ = "LocalizedOCSVM"
X = np.load(sys.argv[1] + "/vectors.npy", mmap_mode="r")
np.save(sys.argv[1] + "/scores.npy", Slow(chunk=10, threads=1).fit(X, folder=sys.argv[1] + "/fit").score_samples(X[:, :3]))
"""


def test_a_killed_fit_goes_on(tmp_path):
    X = np.random.default_rng(0).normal(size=(60, 30, 4)).astype(np.float32)
    np.save(tmp_path/"vectors.npy", X)
    child = subprocess.Popen([sys.executable, "-c", FIT, str(tmp_path), "0.5"])
    end = time.monotonic() + 60
    while len(list((tmp_path/"fit").glob("part-*.npz"))) < 2 and time.monotonic() < end: time.sleep(0.05)
    child.send_signal(signal.SIGKILL); child.wait()
    left = sorted((tmp_path/"fit").glob("part-*.npz"))
    assert 2 <= len(left) < 6 and not (tmp_path/"scores.npy").exists()
    before = {file.name: file.stat().st_mtime_ns for file in left}
    again = subprocess.Popen([sys.executable, "-c", FIT, str(tmp_path), "0"])
    assert again.wait(60) == 0
    np.testing.assert_allclose(np.load(tmp_path/"scores.npy"), LocalizedOCSVM(threads=1).fit(X).score_samples(X[:, :3]), atol=1e-6)
    assert not list((tmp_path/"fit").glob("part-*")) and len(before) >= 2


def test_a_fit_of_other_vectors_or_parameters_is_never_continued(tmp_path):
    X = np.random.default_rng(0).normal(size=(8, 20, 3)).astype(np.float32)
    LocalizedOCSVM().fit(X, folder=tmp_path/"fit")
    files = {file.name: file.read_bytes() for file in (tmp_path/"fit").iterdir()}
    with pytest.raises(ParameterError, match="other fingerprint"): LocalizedOCSVM().fit(X + 1, folder=tmp_path/"fit")
    with pytest.raises(ParameterError, match="other vectors and fingerprint"): LocalizedOCSVM().fit(X[:5], folder=tmp_path/"fit")
    with pytest.raises(ParameterError, match="other parameters"): LocalizedOCSVM(nu=0.5).fit(X, folder=tmp_path/"fit")
    assert files == {file.name: file.read_bytes() for file in (tmp_path/"fit").iterdir()}


def test_a_downloaded_fit_is_never_unpickled(tmp_path):
    X = np.random.default_rng(0).normal(size=(8, 20, 3)).astype(np.float32)
    LocalizedOCSVM().fit(X, folder=tmp_path/"fit")

    class Trap:
        def __reduce__(self): return os.system, (f"touch {tmp_path}/sprung",)
    np.save(tmp_path/"fit"/"support.npy", np.array([Trap()], dtype=object), allow_pickle=True)
    with pytest.raises(DataError): LocalizedOCSVM.load(tmp_path/"fit")
    (tmp_path/"fit"/"support.npy").write_bytes(b"nonsense")
    with pytest.raises(DataError, match="support.npy"): LocalizedOCSVM.load(tmp_path/"fit")
    assert not (tmp_path/"sprung").exists()
