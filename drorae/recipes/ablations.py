"""The ablations of the paper: every row of its Tables 3, 4, 8 and 9 as a recipe `ablation:*`.

One table of (name, what the paper measured, changes); every row is `imagenet256` with the changes
of its table and its own. Source of all numbers: arXiv:2605.10780.

Deliberately absent: the row "+ backbone" of Table 4 (rFID 0.13, gFID 18.36). It trains the encoder,
which is frozen in this product from the latent cache to the keys of the stages; the paper shows the
row as a failure.
"""

from dataclasses import dataclass

from drorae.config import override
from drorae.recipes.full import FullJob
from drorae.recipes.imagenet import PAPER_EPOCH, imagenet256

__all__ = ["ABLATIONS", "Ablation"]

# Tables 3, 8 and 9 measure the fusion through the untuned decoder; Table 3 adds the loss of a
# generator at epoch 12.
FUSION_ROWS = (
    f"diffusion.num_steps={12 * PAPER_EPOCH}",
    'evaluate.guidances=["unguided"]',
    "evaluate.decoder_for_samples=decoder",
    "evaluate.control=false",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Ablation:
    """One row of a table of the paper."""

    name: str
    """Recipe."""
    what: str
    """The row in words."""
    expected: str
    """What the paper measured."""
    own: tuple[str, ...]
    """What this row changes, `section.field=value`."""
    common: tuple[str, ...] = ()
    """What all rows of its table change."""
    note: str = ""
    """What the paper leaves open."""

    def __call__(self) -> FullJob:
        """The configuration: `imagenet256` with the changes."""
        return override(imagenet256(), [f"recipe={self.name}", *self.common, *self.own])

    def describe(self) -> str:
        """Command, changes and expected result."""
        changes = "\n".join(f"  {change}" for change in (*self.common, *self.own))
        return (
            f"{self.what}: {self.expected} in the paper.\n\n"
            f"Command: `drorae run --recipe {self.name}`, with the files of imagenet256.\n"
            f"imagenet256 with\n{changes}\n"
            f"{self.note}"
            "Source: arXiv:2605.10780. Never run at full size here."
        )


def _row(
    table: int,
    name: str,
    what: str,
    expected: str,
    *own: str,
    common: tuple[str, ...],
    note: str = "",
) -> Ablation:
    return Ablation(
        name=f"ablation:table{table}/{name}",
        what=f"Table {table}, {what}",
        expected=expected,
        own=own,
        common=common,
        note=note and note + "\n",
    )


def _table3() -> list[Ablation]:
    """How the layers are joined: rFID, and the loss of the generator at epoch 12."""
    unbounded = "fusion.model.incremental=false"
    rows = [
        _row(3, "rae", "RAE, the last layer alone", "rFID 0.57, DiT loss 0.43",
             "fusion.model.kind=rae", common=FUSION_ROWS),
        _row(3, "cross_attention", "cross-attention over layers", "rFID 0.498",
             "fusion.model.aggregation=cross_attention", common=FUSION_ROWS,
             note="The paper does not say whether the step of Eq. 5 applies; here it does."),
        _row(3, "softmax_no_beta", "softmax weights without beta", "rFID 0.475, DiT loss 0.79",
             "fusion.model.aggregation=softmax", unbounded, common=FUSION_ROWS),
        _row(3, "energy_no_beta", "signed weights without beta", "rFID 0.447, DiT loss 0.81",
             "fusion.model.aggregation=energy", unbounded, common=FUSION_ROWS),
        _row(3, "softmax_beta", "softmax weights with beta", "rFID 0.512, DiT loss 0.48",
             "fusion.model.aggregation=softmax", common=FUSION_ROWS),
        _row(3, "energy_beta", "signed weights with beta, the method", "rFID 0.470, DiT loss 0.47",
             "fusion.model.aggregation=energy", common=FUSION_ROWS),
    ]  # fmt: skip
    return rows


def _table4() -> list[Ablation]:
    """What is trained after the fusion."""
    return [
        _row(4, "fusion_only", "decoder untuned",
             "rFID 0.47, gFID 2.46 unguided, 1.70 with AutoGuidance",
             "evaluate.decoder_for_samples=decoder", common=()),
        _row(4, "plus_decoder", "decoder fine-tuned",
             "rFID 0.29, gFID 2.68 unguided, 1.65 with AutoGuidance",
             "evaluate.decoder_for_samples=finetune", common=()),
    ]  # fmt: skip


def _table8() -> list[Ablation]:
    """Hidden width of an expert: million parameters and rFID."""
    measured = {
        128: (2.5, 0.539),
        256: (4.8, 0.559),
        512: (9.6, 0.525),
        1024: (19.0, 0.519),
        2048: (37.8, 0.510),
        3072: (56.7, 0.471),
        4096: (75.6, 0.470),
        6144: (113.3, 0.459),
    }
    return [
        _row(8, f"h{hidden}", f"expert width {hidden}", f"{millions}M parameters, rFID {rfid:.3f}",
             f"fusion.model.expert_hidden={hidden}", common=FUSION_ROWS)
        for hidden, (millions, rfid) in measured.items()
    ]  # fmt: skip


def _table9() -> list[Ablation]:
    """Number of layers, the deepest first: rFID."""
    measured = (0.570, 0.530, 0.568, 0.518, 0.540, 0.515, 0.522, 0.507, 0.466, 0.541, 0.515, 0.471)
    return [
        _row(9, f"layers{count}", f"the deepest {count} of 12 layers", f"rFID {rfid:.3f}",
             f"fusion.model.deepest_layers={count}", common=FUSION_ROWS)
        for count, rfid in enumerate(measured, start=1)
    ]  # fmt: skip


ABLATIONS: dict[str, Ablation] = {
    row.name: row for rows in (_table3(), _table4(), _table8(), _table9()) for row in rows
}
"""Every row by recipe name."""
