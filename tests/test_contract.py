"""The contract of data module, model, fit and predict, held against toys of every kind.

Each toy stands for a family of methods that the library will have. It learns in a second from small noisy blocks, goes through the real data module, `fit` and
`predict`, and must find the bright blob that some test samples have.
"""
import numpy as np
import pytest
import torch
from torch import nn

from anomaly_nb.core import DataError, PoolError, collate, rng_of, seed_everything
from anomaly_nb.data.module import AnomalyDataModule
from anomaly_nb.detectors.detector import Locations
from anomaly_nb.metrics.detection import auroc
from anomaly_nb.models.checks import check_model
from anomaly_nb.models.fit import fit, predict
from anomaly_nb.models.model import AnomalyModel, Part, Stage, load_model, masked_mean, scored

torch.set_num_threads(1)


class Blocks:
    "A data set of noisy blocks of intensity 1; ill ones have a blob of intensity 3. Masks are on 'disk', as they are in real weak pools."
    def __init__(self, name, count, ill=0, shape=(12, 12), bones=False):
        self.shape, self.channels, self.spatial_dims, self.spacing = shape, 1, len(shape), (1.0,) * len(shape)
        self.items = [self.block(f"{name}{i}", i < ill, shape, bones) for i in range(count)]
        self.ids = self.subjects = [s["id"] for s in self.items]
        self.labels = np.array([s["label"] for s in self.items])
        self.volumes, self.infos, self.records = self, [{"mask_known": True}] * count, []

    @staticmethod
    def block(name, ill, shape, bones):
        rng, mask = rng_of(name), np.zeros((1, *shape), bool)
        foreground = np.ones_like(mask)
        foreground[..., 0] = False
        if ill: mask[(0, *(slice(int(o), int(o) + 4) for o in rng.integers(1, np.array(shape) - 4)))] = True
        image = (1 + rng.normal(0, 0.1, mask.shape) + 2 * mask).astype(np.float32) * foreground
        sample = dict(image=image, foreground=foreground, valid=foreground, mask=mask & foreground, mask_known=True, label=int(ill), id=name, subject=name, meta={"family": "blob" if ill else "healthy"})
        if bones:   # a ragged number of vertebrae: half of the ill ones have a bright vertebra
            count = int(rng.integers(2, 5))
            centres = rng.uniform(2, np.array(shape) - 3, (count, len(shape))).astype(np.float32)
            if ill: centres[0] = np.argwhere(mask[0]).mean(0)
            sample["instances"] = dict(ids=np.arange(count), centres=centres, present=np.ones(count, bool))
        return sample

    def __len__(self): return len(self.items)

    def __getitem__(self, index): return self.items[index]


def module(shape=(12, 12), bones=False, **more):
    extra = {name: Blocks(name, 32, ill=16, shape=shape) for name, wanted in more.items() if wanted}
    return AnomalyDataModule(train=Blocks("train", 32, shape=shape, bones=bones), val=Blocks("val", 8, shape=shape, bones=bones), test=Blocks("test", 16, ill=8, shape=shape, bones=bones), batch_size=8, **extra)


class Auto(AnomalyModel):
    "A small convolutional autoencoder with one number a cell, in 2D and 3D."
    def __init__(self, channels=1, spatial_dims=2, shape=None, lr=1e-2, epochs=4):
        super().__init__(channels, spatial_dims, shape, lr, epochs)
        conv = nn.Conv2d if spatial_dims == 2 else nn.Conv3d
        self.down, self.up = conv(1, 2, 4, stride=4), nn.Sequential(nn.Upsample(scale_factor=4), conv(2, 1, 1))

    def draw(self, image): return self.up(torch.tanh(self.down(image)))

    def loss(self, batch): return masked_mean((batch["image"] - self.draw(batch["image"]))**2, batch["foreground"]).mean()

    def score(self, batch, kind=None): return scored((batch["image"] - self.draw(batch["image"])).abs(), batch["foreground"])


class ThreeD(Auto):
    "1: volumes."


class Weak(AnomalyModel):
    "2: weakly supervised: labels of images, never a mask. The map is the class activation."
    needs, kinds = ("train", "weak"), ("activation",)

    def __init__(self, channels=1, spatial_dims=2, shape=None, lr=3e-2, epochs=12):
        super().__init__(channels, spatial_dims, shape, lr, epochs)
        self.net = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 1, 1))

    def stages(self): return [Stage("classify", self, pool="weak", epochs=self.hparams.epochs, val=None)]

    def loss(self, batch):
        assert "mask" not in batch and "mask_known" not in batch, "a mask reached a weakly supervised model"
        assert set(batch["label"].tolist()) <= {0, 1}
        return nn.functional.binary_cross_entropy_with_logits(masked_mean(self.net(batch["image"]), batch["foreground"]) * 10, batch["label"].float())

    def score(self, batch, kind=None): return scored(self.net(batch["image"]), batch["foreground"])


class Unlabelled(Auto):
    "3: learns from a pool without labels, half of it ill."
    needs = ("train", "unlabelled")

    def stages(self): return [Stage("normal", self, epochs=3), Stage("mixed", self, pool="unlabelled", epochs=1)]

    def loss(self, batch):
        assert not {"mask", "mask_known", "label"} & set(batch), "the truth reached an unlabelled training"
        return super().loss(batch)


class Gradient(Auto):
    "4: the map is a gradient, which Lightning's inference mode would forbid."
    kinds = ("gradient", "residual")

    def score(self, batch, kind=None):
        if self.kind_of(kind) == "residual": return super().score(batch)
        with torch.enable_grad():
            image = batch["image"].clone().requires_grad_()
            slope, = torch.autograd.grad(masked_mean((image - self.draw(image))**2, batch["foreground"]).sum(), image)
        return scored(slope.abs(), batch["foreground"])


class Prior(Part):
    "The second training of `TwoStages`: a Gaussian over the codes of a frozen encoder."
    def __init__(self, encoder):
        super().__init__()
        self.encode, self.mean, self.log_sd = encoder, nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))

    def distance(self, image):
        with torch.no_grad(): code = self.encode(image)
        return (0.5 * ((code.movedim(1, -1) - self.mean) / self.log_sd.exp())**2 + self.log_sd).sum(-1)

    def loss(self, batch): return self.distance(batch["image"]).mean()

    def configure_optimizers(self): return torch.optim.Adam([self.mean, self.log_sd], lr=0.05)


class TwoStages(Auto):
    "5: a network, then a prior on its codes (VQ-VAE, f-AnoGAN, diffusion in a latent space)."
    kinds = ("residual", "prior")

    def __init__(self, channels=1, spatial_dims=2, shape=None, lr=1e-2, epochs=4):
        super().__init__(channels, spatial_dims, shape, lr, epochs)
        self.prior = Prior(self.down)

    def stages(self): return [Stage("network", self, epochs=self.hparams.epochs), Stage("prior", self.prior, epochs=20)]

    def score(self, batch, kind=None):
        if self.kind_of(kind) == "residual": return super().score(batch)
        return scored(nn.functional.interpolate(self.prior.distance(batch["image"])[:, None], scale_factor=4), batch["foreground"])


class NoGradients(AnomalyModel):
    "6: only statistics."
    def __init__(self, channels=1, spatial_dims=2, shape=None):
        super().__init__(channels, spatial_dims, shape)
        self.register_buffer("mean_", None)

    def fit_statistics(self, loader):
        assert not torch.is_grad_enabled()
        self.mean_ = torch.cat([masked_mean(b["image"], b["foreground"]) for b in loader]).mean()

    def score(self, batch, kind=None): return scored((batch["image"] - self.mean_).abs(), batch["foreground"])


class PerLocation(AnomalyModel):
    "7: one model a voxel; keeps its locations and refuses others."
    kinds = ("zmap",)

    def __init__(self, channels=1, spatial_dims=2, shape=None):
        super().__init__(channels, spatial_dims, shape)
        for name in ("mean_", "sd_", "mask_"): self.register_buffer(name, None)

    def places(self, batch): return Locations(tuple(batch["image"].shape[2:]), np.eye(4), batch["foreground"][0, 0].cpu().numpy())

    def fit_statistics(self, loader):
        batches = list(loader)
        images = torch.cat([b["image"] for b in batches])
        self.mean_, self.sd_, self.mask_ = images.mean(0), images.std(0) + 1e-3, torch.as_tensor(self.places(batches[0]).mask)

    def score(self, batch, kind=None):
        Locations(tuple(self.mask_.shape), np.eye(4), self.mask_.cpu().numpy()).check(self.places(batch))
        return scored((batch["image"] - self.mean_).abs() / self.sd_, batch["foreground"])


class ImageLevel(NoGradients):
    "8: one number an image, no map."
    has_map, kinds = False, ("distance",)

    def score(self, batch, kind=None): return {"anomaly_score": ((batch["image"] - self.mean_).abs() * batch["foreground"]).flatten(1).amax(1)}


class Spine(NoGradients):
    "9: looks at instances only; their number differs between samples, so they come padded."
    kinds = ("vertebra",)

    def score(self, batch, kind=None):
        centres, present = batch["instances"]["centres"], batch["instances"]["present"]            # [B,K,dim], [B,K]
        grid = torch.stack(torch.meshgrid(*[torch.arange(n, device=centres.device) for n in batch["image"].shape[2:]], indexing="ij"), -1).float()
        near = ((grid[None, None] - centres[:, :, None, None])**2).sum(-1) < 2.5                   # [B,K,H,W]
        value = ((batch["image"] - self.mean_).abs() * near).flatten(2).sum(2) / near.flatten(2).sum(2).clamp_min(1)
        value = value * present                                                                    # padding has no opinion
        return scored((near * value[..., None, None]).amax(1, keepdim=True), batch["foreground"], score=value.amax(1))


TOYS = {"3D": (ThreeD, dict(shape=(8, 12, 12))), "weak": (Weak, dict(weak=True)), "unlabelled": (Unlabelled, dict(unlabelled=True)), "gradient": (Gradient, {}), "two stages": (TwoStages, {}),
        "no gradients": (NoGradients, {}), "per location": (PerLocation, {}), "image level": (ImageLevel, {}), "spine": (Spine, dict(bones=True))}


@pytest.mark.parametrize("toy", TOYS)
def test_toy_goes_all_the_way(toy, tmp_path):
    cls, wants = TOYS[toy]
    data = module(**wants)
    seed_everything(0)
    model = cls(1, data.spatial_dims, data.shape)
    history = fit(model, data, tmp_path/"fit")
    rows = predict(model, data.loader("test"), tmp_path/"predicted")

    assert [r["stage"] for r in history] == [s.name for s in model.stages() for _ in range(s.epochs)]
    assert len(rows) == 16 * len(model.kinds) and {r["kind"] for r in rows} == set(model.kinds)
    for kind in model.kinds:
        mine = [r for r in rows if r["kind"] == kind]
        assert [r["id"] for r in mine] == data.pools["test"].ids and {r["family"] for r in mine} == {"blob", "healthy"}
        assert auroc([r["label"] for r in mine], [r["score"] for r in mine]) > 0.9, f"{toy}, {kind}: the ill do not score higher"
        for row in mine:
            if not model.has_map:
                assert row["map"] is None                      # left out of pixel tables by name
                continue
            found = np.load(row["map"])
            assert found.shape == (1, *data.shape) and found.dtype == np.float32 and np.isfinite(found).all() and not found[..., 0].any()

    again = load_model(tmp_path/"fit"/"model.safetensors", cls)
    for old, new in zip(rows, predict(again, data.loader("test"), tmp_path/"again")): assert old["score"] == new["score"] and old["id"] == new["id"]
    assert len(list((tmp_path/"predicted"/"maps").glob("*.npy")) if model.has_map else []) == (len(rows) if model.has_map else 0)


@pytest.mark.parametrize("toy", TOYS)
def test_toy_passes_the_shared_check(toy):
    cls, wants = TOYS[toy]
    shape, bones = wants.get("shape", (12, 12)), wants.get("bones", False)
    batch = collate([Blocks.block(f"check{i}", False, shape, bones) for i in range(4)])
    ill = collate([Blocks.block(f"check{i}", i % 2 == 0, shape, bones) for i in range(4)])
    check_model(lambda: cls(1, len(shape), shape), {"train": batch, "weak": ill, "unlabelled": ill})


def test_a_missing_pool_is_named():
    with pytest.raises(PoolError, match="Weak: needs the pool weak"): fit(Weak(), module())
    with pytest.raises(PoolError, match="unlabelled"): fit(Unlabelled(), module(weak=True))


def test_other_locations_are_refused(tmp_path):
    data = module()
    model = PerLocation(1, 2, (12, 12))
    fit(model, data)
    other = Blocks("other", 2)
    for sample in other.items: sample["foreground"][..., 3] = False
    with pytest.raises(DataError, match="the mask differs in 12 cells"):
        model.score(collate(other.items))


def test_ragged_instances_come_padded():
    batch = next(iter(module(bones=True).loader("test")))
    present = batch["instances"]["present"]
    assert present.dtype == torch.bool and len(set(present.sum(1).tolist())) > 1 and tuple(batch["instances"]["centres"].shape) == (*present.shape, 2)


def test_meta_is_handed_through_and_not_walked():
    class Wall(dict):
        def items(self): raise AssertionError("somebody walked through meta")
    pools = {"train": Blocks("train", 8), "val": Blocks("val", 8), "test": Blocks("test", 8, ill=4)}
    for sample in (*pools["train"].items, *pools["val"].items): sample["meta"] = Wall(sample["meta"])
    data = AnomalyDataModule(**pools, batch_size=4)
    fit(Auto(1, 2, (12, 12), epochs=1), data)                                  # Lightning's own transfer walks through every number of it
    batch = next(iter(data.loader("train"))) | {"ragged": [torch.zeros(2), torch.zeros(3)], "instances": {"centres": torch.zeros(2, 4, 2)}}
    moved = Auto().transfer_batch_to_device(batch, torch.device("meta"))       # a device without numbers
    assert all(t.device.type == "meta" for t in (moved["image"], moved["foreground"], *moved["ragged"], moved["instances"]["centres"]))
    assert moved["meta"] is batch["meta"] and moved["id"] is batch["id"] and batch["image"].device.type == "cpu"


def test_a_model_that_reads_the_mask_stops(tmp_path):
    class Cheat(NoGradients):
        def score(self, batch, kind=None): return scored(batch["mask"].float(), batch["foreground"])
    model, data = Cheat(), module()
    fit(model, data)
    with pytest.raises(KeyError): predict(model, data.loader("test"), tmp_path)
    assert not (tmp_path/"rows.json").exists()


def test_workers_change_nothing(tmp_path):
    scores = []
    for workers in (0, 2):
        data = module()
        data.workers = workers
        seed_everything(0)
        model = Auto(1, 2, (12, 12), epochs=2)
        fit(model, data)
        scores.append([r["score"] for r in predict(model, data.loader("test"), tmp_path/str(workers))])
    assert scores[0] == scores[1]
