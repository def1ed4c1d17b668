"""Published numbers that the report shows beside its own, and why the two do not compare.

Source: DRoRAE (arXiv 2605.10780), tables 1, 2 and 4, and the RAE rows that it quotes. Where the
paper contradicts itself the note says so.
"""

from dataclasses import dataclass

__all__ = ["PAPER_ROWS", "WHY_NOT_COMPARABLE", "PaperRow"]


@dataclass(frozen=True, kw_only=True, slots=True)
class PaperRow:
    """One published system on ImageNet-1k at 256 px; None where the paper gives nothing."""

    name: str
    ours: str
    """Name of the matching model in our metrics, or empty."""
    rfid: float | None
    psnr: float | None
    ssim: float | None
    lpips: float | None
    gfid: float | None
    """Without guidance."""
    gfid_guided: float | None
    """With AutoGuidance."""
    note: str = ""


PAPER_ROWS = (
    PaperRow(
        name="RAE, DINOv2-B",
        ours="rae",
        rfid=0.57,
        psnr=18.8,
        ssim=0.483,
        lpips=0.256,
        gfid=2.16,
        gfid_guided=1.74,
        note="Quoted from the RAE paper, whose generator was trained with another recipe.",
    ),
    PaperRow(
        name="DRoRAE, fusion only",
        ours="fusion",
        rfid=0.47,
        psnr=21.79,
        ssim=0.583,
        lpips=0.195,
        gfid=2.46,
        gfid_guided=1.70,
        note="2.45 in its table 1, 2.46 in table 4.",
    ),
    PaperRow(
        name="DRoRAE, decoder fine-tuned",
        ours="finetune",
        rfid=0.29,
        psnr=24.32,
        ssim=0.701,
        lpips=0.134,
        gfid=2.68,
        gfid_guided=1.65,
        note="Same latents as the row above: only the decoder differs.",
    ),
    PaperRow(
        name="DRoRAE, backbone tuned too",
        ours="",
        rfid=0.13,
        psnr=None,
        ssim=None,
        lpips=None,
        gfid=18.36,
        gfid_guided=None,
        note="Reconstruction improves, generation collapses.",
    ),
)

WHY_NOT_COMPARABLE = (
    "The paper uses ImageNet-1k at 256 px, an untouched DINOv2-B encoder, Inception features, "
    "50,000 images "
    "and 100 epochs a stage. None of these holds for a small run, so only the direction of a "
    "difference between rows may be "
    "read across, never a value."
)
