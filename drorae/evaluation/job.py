"""Settings of the stages `evaluate` and `report`.

Imports nothing heavy, so that planning a run needs no torch.
"""

from dataclasses import dataclass
from typing import Literal

from drorae.config import expand_home

__all__ = ["EvaluateJob", "ReportJob", "Sampling"]

Sampling = Literal["unguided", "cfg", "autoguidance", "internal", "untrained"]
"""A way of sampling. `untrained` is the same network freshly initialised: the floor."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateJob:
    """What the `evaluate` stage measures and how many images it spends on it."""

    control: bool = True
    """Train and measure the control: the last-layer decoder trained on for as many steps as fusion
    and finetune took."""
    num_val_images: int = 1000
    """Held-out photos to reconstruct, and the reference set of every distance; 0 means all. Ids
    0..n-1 of the split."""
    num_samples: int = 1000
    """Images generated per way of sampling. The ADM protocol of the paper uses 50000."""
    guidances: tuple[Sampling, ...] = ("unguided", "cfg", "autoguidance", "untrained")
    """Ways of sampling that are measured. `internal` needs a generator with a base head,
    `autoguidance` the guide stage, which is trained only then."""
    sampler: Literal["euler", "heun", "sde"] = "euler"
    """Solver: of the ODE, or Euler-Maruyama of an SDE with the same marginals. RAE, imagenet256:
    euler."""
    sde_churn: float = 1.0
    """Strength of the SDE: w(t) = churn * t; 0 is Euler. SiT's default diffusion is 1."""
    num_grid_points: int = 50
    """Points of the time grid; n points are n - 1 solver steps. RAE, imagenet256: 50."""
    grid_end: Literal["reference", "zero"] = "reference"
    """`reference` stops at t = 0.001 before the shift, as RAE does; `zero` integrates to clean
    (RAEv2)."""
    cfg_scale: float = 1.5
    """Classifier-free guidance: v_null + scale * (v - v_null); 1 is unguided. DRoRAE lists 1.5."""
    autoguidance_scale: float = 1.5
    """AutoGuidance: v_weak + scale * (v - v_weak); 1 is unguided. DRoRAE: 1.5; RAE's tuned value is
    1.42."""
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    """Times t (t = 1 is noise, after the shift) at which CFG and AutoGuidance act, both ends
    included. RAE: [0, 1]."""
    internal_scale: float = 1.78
    """Internal guidance: base + scale * (full - base); 1 is unguided. RAEv2: 1.78."""
    internal_interval: tuple[float, float] = (0.1, 1.0)
    """Times at which internal guidance acts. RAEv2: [0.1, 1]."""
    feature_extractor: Literal["efficientnet-lite0", "inception-v3"] = "efficientnet-lite0"
    """Feature space of FD, KID, precision and recall. Only inception-v3 compares with published
    FID."""
    feature_px: int = 224
    """Side to which images are resized for efficientnet-lite0, pixels. Inception always uses
    299."""
    inception_weights_path: str = ""
    """File with torch-fidelity's converted Inception weights; needed for inception-v3 and read
    nowhere else."""
    kid_subset: int = 100
    """Images per KID subset; the smaller of the two sets is a hard limit (torch-fidelity issue
    45)."""
    isc_splits: int = 10
    """Splits of the Inception-Score-like number. 10 is customary; it needs many images per
    split."""
    precision: Literal["float32", "tf32", "bfloat16"] = "float32"
    """Number format of matrix products in encoder, decoders and generator; features and LPIPS are
    always float32. RAE measures in TF32."""
    batch_images: int = 64
    """Images per forward pass. Changes speed and memory only."""
    chunk_samples: int = 64
    """Generated images per sampling task: the unit that is redone after a failure."""
    chunk_photos: int = 1000
    """Photos per task, held-out or training ones: the unit that is redone after a failure."""
    bootstrap_replicates: int = 2000
    """Resamples of the image ids behind each 95 % interval."""
    lpips_net: Literal["vgg", "alex"] = "vgg"
    """Trunk of LPIPS. RAE measures with the VGG that it also trains on; alex shares no weights with
    the loss."""
    decoder_for_samples: Literal["finetune", "decoder"] = "finetune"
    """Stage whose decoder turns generated latents into images; the other one is measured as a
    decoder swap."""
    num_grid_images: int = 8
    """Columns of the reconstruction grid, and samples per class in the sample grids."""
    num_grid_classes: int = 10
    """Classes shown in the sample grids: the first n class ids."""
    num_diagnostic_images: int = 64
    """Held-out photos for routing maps, angles and decoding sensitivity."""

    def __post_init__(self) -> None:
        """Check ranges."""
        expand_home(self, "inception_weights_path")
        for name in ("num_samples", "kid_subset"):
            _require(getattr(self, name) >= 2, name, getattr(self, name), "at least 2")
        for name in ("isc_splits", "batch_images", "chunk_samples", "chunk_photos"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("num_grid_images", "num_grid_classes", "num_diagnostic_images"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        _require(self.num_val_images >= 0, "num_val_images", self.num_val_images, "0 (all) or more")
        for name in ("cfg_scale", "autoguidance_scale", "internal_scale"):
            _require(getattr(self, name) >= 1.0, name, getattr(self, name), "1 (unguided) or more")
        _require(self.num_grid_points >= 2, "num_grid_points", self.num_grid_points, "2 or more")
        _require(self.feature_px >= 32, "feature_px", self.feature_px, "32 or more")
        _require(
            self.bootstrap_replicates >= 100,
            "bootstrap_replicates",
            self.bootstrap_replicates,
            "100 or more",
        )
        _require(self.sde_churn >= 0, "sde_churn", self.sde_churn, "0 (Euler) or more")
        once = len(set(self.guidances)) == len(self.guidances) > 0
        _require(once, "guidances", self.guidances, "at least one, each once")
        for name in ("guidance_interval", "internal_interval"):
            low, high = getattr(self, name)
            _require(0.0 <= low < high <= 1.0, name, [low, high], "0 <= low < high <= 1")
        needs_file = self.feature_extractor == "inception-v3" and not self.inception_weights_path
        _require(not needs_file, "inception_weights_path", "", "a file when features are Inception")


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportJob:
    """What the `report` stage shows."""

    title: str = "DRoRAE run"
    """Heading of the page."""
    max_curve_points: int = 400
    """Points drawn per training curve; longer logs are thinned evenly."""
    figure_dpi: int = 110
    """Resolution of embedded bitmap figures, dots per inch."""

    def __post_init__(self) -> None:
        """Check ranges."""
        for name, least in (("max_curve_points", 2), ("figure_dpi", 10)):
            value = getattr(self, name)
            _require(value >= least, name, value, f"at least {least}", section="report")


def _require(ok: bool, name: str, value: object, expected: str, section: str = "evaluate") -> None:
    if not ok:
        raise ValueError(
            f"{section}.{name}={value!r} is out of range: expected {expected}; change it in the "
            "recipe or with --set."
        )
