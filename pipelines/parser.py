"""The options of the `drorae` command, and the function that runs each of its parts.

argparse, not typer or click: every command has a handful of options, and `drorae plan` should not
wait for imports.
"""

import argparse
import os
from collections.abc import Callable

from pipelines import commands, inspect_command, models_command, release_command, run_command
from pipelines.plan import default_workspace

EXAMPLES = """examples:
  drorae assets fetch smoke
  drorae inspect photos/ --sheet photos.png
  drorae run --recipe smoke
  drorae run --recipe smoke --set fusion.expert_hidden=512
  drorae plan --recipe smoke --set fusion.expert_hidden=512
  drorae status --verify
  drorae reconstruct photo.jpg --out compared.png
  drorae import --recipe smoke --decoder model.pt --stats stat.pt
  drorae export --recipe smoke --stage finetune --out decoder.pt
"""


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="drorae",
        description="Train DRoRAE image tokenizers and latent diffusion models.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("-v", "--verbose", action="store_true", help="show log lines and traces")
    commands_of = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_inspect(commands_of)
    _add_run(commands_of)
    _add_plan(commands_of)
    _add_status(commands_of)
    _add_assets(commands_of)
    _add_recipes(commands_of)
    _add_models(commands_of)
    _add_release(commands_of)
    _add_report(commands_of)
    return parser


def _command(
    group: "argparse._SubParsersAction", name: str, text: str, run: Callable
) -> argparse.ArgumentParser:
    parser = group.add_parser(name, help=text, description=text)
    parser.set_defaults(run=run)
    return parser


def _add_workspace(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--workspace",
        default=default_workspace(),
        metavar="URI",
        help="folder or s3://bucket/prefix of all outputs (default: %(default)s)",
    )


def _add_configuration(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--recipe", default="smoke", help="configuration (default: smoke)")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        dest="overrides",
        metavar="PATH=VALUE",
        help="change one field, for example diffusion.optim.lr=1e-4; may be repeated",
    )
    _add_workspace(parser)


def _add_selection(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--only", metavar="STAGE", help="this stage alone; its inputs must be there"
    )
    parser.add_argument(
        "--from", dest="from_stage", metavar="STAGE", help="this stage and all that depend on it"
    )
    parser.add_argument(
        "--force",
        action="append",
        default=[],
        metavar="STAGE",
        help="build this stage even if its output is there; may be repeated",
    )
    parser.add_argument(
        "--strict-code",
        action="store_true",
        help="build again what was built by other code, and all that depends on it",
    )


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def _add_inspect(group: "argparse._SubParsersAction") -> None:
    parser = _command(
        group, "inspect", "show what would be read of a source", inspect_command.inspect
    )
    parser.add_argument(
        "source",
        nargs="?",
        type=_path,
        metavar="SOURCE",
        help="folder, .tar, .zip or .parquet file, s3:// or hf:// place, or asset:NAME "
        "(default: the recipe's)",
    )
    parser.add_argument(
        "--val-source", type=_path, metavar="SOURCE", help="separate source of validation images"
    )
    parser.add_argument("--recipe", help="take its settings, and say whether the data fit it")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        dest="overrides",
        metavar="PATH=VALUE",
        help="change one field, for example shard.label_column=fine_label; may be repeated",
    )
    parser.add_argument(
        "--images",
        type=_positive,
        default=64,
        metavar="N",
        help="images to decode (default: 64)",
    )
    parser.add_argument(
        "--sheet", type=_path, metavar="FILE", help="write a contact sheet of them, a PNG"
    )
    _add_json(parser)


def _add_run(group: "argparse._SubParsersAction") -> None:
    parser = _command(group, "run", "run the graph; what is there is reused", run_command.run)
    _add_configuration(parser)
    _add_selection(parser)
    parser.add_argument(
        "--jobs",
        type=_positive,
        metavar="N",
        help="stages at the same time (default: the recipe's)",
    )
    parser.add_argument(
        "--retries",
        type=int,
        default=2,
        metavar="N",
        help="further attempts of a stage (default: 2)",
    )


def _add_plan(group: "argparse._SubParsersAction") -> None:
    parser = _command(group, "plan", "show what a run would do, and why", commands.show_plan)
    _add_configuration(parser)
    _add_selection(parser)
    _add_json(parser)
    _add_cost(parser)


def _add_cost(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--cost",
        action=argparse.BooleanOptionalAction,
        help="parameters, FLOPs, memory, storage and GPU-hours of what would run (default: for "
        "recipes that use a GPU, unless --json)",
    )
    parser.add_argument(
        "--peak-tflops",
        type=float,
        default=989.4,
        metavar="N",
        help="peak rate of a GPU in bfloat16 (default: 989.4, H100 SXM)",
    )
    parser.add_argument(
        "--mfu",
        type=float,
        default=0.4,
        metavar="SHARE",
        help="share of the peak that is reached (default: 0.4)",
    )
    parser.add_argument(
        "--train-images",
        type=_positive,
        metavar="N",
        help="training images (default: those of CIFAR-10 or ImageNet-1k)",
    )
    for name, meaning, default in (
        ("gpus-per-node", "GPUs that share a network connection", 8),
        ("cores-per-gpu", "CPU cores for each GPU", 12),
    ):
        parser.add_argument(
            f"--{name}",
            type=_positive,
            default=default,
            metavar="N",
            help=f"{meaning} (default: {default})",
        )
    parser.add_argument(
        "--network-gbps",
        type=float,
        default=100.0,
        metavar="N",
        help="network of a node, 10^9 bits a second (default: 100)",
    )


def _add_status(group: "argparse._SubParsersAction") -> None:
    parser = _command(group, "status", "list all outputs of a workspace", commands.show_status)
    _add_workspace(parser)
    _add_json(parser)
    parser.add_argument(
        "--verify", action="store_true", help="read every file and compare its sha256"
    )


def _add_assets(group: "argparse._SubParsersAction") -> None:
    parser = group.add_parser("assets", help="data sets and pretrained networks")
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    fetch = _command(actions, "fetch", "download, check and convert", commands.fetch_assets)
    fetch.add_argument("names", nargs="+", metavar="NAME", help="`smoke`, or names from the list")
    _command(actions, "list", "list assets and whether they are here", commands.list_assets)


def _add_recipes(group: "argparse._SubParsersAction") -> None:
    parser = group.add_parser("recipes", help="configurations")
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    _command(actions, "list", "list all recipes", commands.list_recipes)
    show = _command(
        actions, "show", "every field, its value, meaning and source", commands.show_recipe
    )
    show.add_argument("recipe", help="name of the recipe")
    show.add_argument("--set", action="append", default=[], dest="overrides", metavar="PATH=VALUE")
    _add_json(show)


def _add_models(group: "argparse._SubParsersAction") -> None:
    reconstruct = _command(
        group,
        "reconstruct",
        "write input, RAE and fused reconstruction side by side",
        models_command.reconstruct,
    )
    reconstruct.add_argument("images", nargs="+", type=_path, metavar="IMAGE")
    reconstruct.add_argument("--out", default="reconstructions.png", type=_path, metavar="FILE")
    _add_configuration(reconstruct)
    sample = _command(group, "sample", "generate images of a class", models_command.sample)
    sample.add_argument("--class", type=int, required=True, dest="label", metavar="N")
    sample.add_argument("--num", type=_positive, default=8, help="images (default: 8)")
    sample.add_argument("--seed", type=int, default=0)
    sample.add_argument(
        "--guidance",
        choices=["unguided", "cfg", "autoguidance", "internal"],
        help="way of sampling (default: the strongest that the recipe measures)",
    )
    sample.add_argument("--scale", type=float, help="guidance scale (default: the recipe's)")
    sample.add_argument("--out", default="samples.png", type=_path, metavar="FILE")
    _add_configuration(sample)


def _add_release(group: "argparse._SubParsersAction") -> None:
    bring = _command(
        group,
        "import",
        "make a released decoder the output of stage `decoder`",
        release_command.import_decoder,
    )
    bring.add_argument(
        "--decoder",
        required=True,
        type=_path,
        metavar="FILE",
        help="weights in any of RAE's layouts, or s3://",
    )
    bring.add_argument(
        "--stats", default="", type=_path, metavar="FILE", help="its latent statistics"
    )
    _add_configuration(bring)
    give = _command(
        group, "export", "write a stage's averaged weights to a file", release_command.export
    )
    give.add_argument("--stage", required=True, choices=release_command.EXPORTED_STAGES)
    give.add_argument("--out", required=True, type=_path, metavar="FILE")
    give.add_argument(
        "--format",
        choices=["rae", "safetensors"],
        help="rae: a flat state dict as RAE's .pt files (default: by the name of FILE)",
    )
    give.add_argument(
        "--stats", type=_path, metavar="FILE", help="write the latent statistics here, too"
    )
    _add_configuration(give)


def _add_report(group: "argparse._SubParsersAction") -> None:
    parser = _command(group, "report", "print the path of the report", commands.show_report)
    _add_configuration(parser)
    parser.add_argument("--open", action="store_true", help="open it in a browser")


def _path(text: str) -> str:
    """A path whose `~` the shell may have left, as in `--out=~/picture.png`."""
    return os.path.expanduser(text)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is out of range: expected at least 1")
    return number
