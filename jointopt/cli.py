"""The command: python -m jointopt run CONFIG, and what goes with it.

Errors are one line on stderr and exit code 2; an export that does not do what the study says is exit code 1; Ctrl-C is
exit code 130, and the same command goes on from there; output that nobody reads any more is 141.
"""

from __future__ import annotations

import argparse
import errno
import io
import logging
import math
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

from jointopt.files import check_path, from_home, writing
from jointopt.names import MODELS, MOST, NOISY, TARGET_NAMES
from quant.errors import JointoptError, check_count

if TYPE_CHECKING:
    from jointopt.config.config import Config
    from jointopt.report.devices import OnDevice
    from jointopt.study.study import Study

PICKS = "knee, size_mb=20, drop=0.01, or the number of an evaluation"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit code."""
    options = _parser().parse_args(arguments)
    _quiet()
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal without some character must not cost a search
        sys.stdout.reconfigure(errors="replace")
    try:
        code = options.command(options)
        print(end="", flush=True)  # a pipe that is closed is told here, and not by Python when it ends
        return code
    except JointoptError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        print("jointopt: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return _unread()
    except SystemExit as error:
        if isinstance(error.__context__, BrokenPipeError):  # as rich makes of one
            return _unread()
        raise
    except OSError as error:
        full = "; free some space, and the same command goes on from here" if error.errno == errno.ENOSPC else ""
        return _fail(f"{error.filename or 'system'}: {error.strerror or error}{full}")
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":
            raise
        return _fail("device: out of memory; a smaller data.batch_size or data.length needs less")


def _quiet() -> None:
    """Notices of the libraries inside are not for the user; our own warnings are one line."""
    for kind in (FutureWarning, DeprecationWarning):
        warnings.filterwarnings("ignore", category=kind)
    warnings.formatwarning = lambda message, *_: f"jointopt: note: {message}\n"
    # These two set their own level when they are imported.
    for name in ("TRANSFORMERS_VERBOSITY", "HF_HUB_VERBOSITY"):
        os.environ.setdefault(name, "error")
    for name in NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)


def _unread() -> int:
    """Nobody reads any more, as after `| head -1`: no complaint, and the exit code of whom SIGPIPE ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for what Python has still to write when it ends
    return 141


def _fail(message: str) -> int:
    print("jointopt: error:", " ".join(message.split()), file=sys.stderr)
    return 2


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without repeating the usage."""

    def error(self, message: str) -> Any:
        self.exit(2, f"jointopt: error: {message}; see {self.prog} --help\n")


def _given(text: str) -> str:
    """A path. An empty one is a variable of the shell's that was not set, and no wish for the default."""
    if not text:
        raise argparse.ArgumentTypeError("found ''; allowed: a path")
    try:
        return from_home(text)
    except JointoptError as error:
        raise argparse.ArgumentTypeError(f"found {error}") from None


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="jointopt",
        description="Search a model's architecture and its layers' number formats together.",
        epilog="To begin: jointopt init MODEL -o my.yaml; name your data in it; jointopt run my.yaml",
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def command(name: str, function: Any, about: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=about, description=f"{about[0].upper()}{about[1:]}.")
        added.set_defaults(command=function)
        return added

    run = command("run", _run, "search, export and verify what a config describes; go on where it was stopped")
    run.add_argument("config", metavar="CONFIG", type=_given, help="a YAML file, such as init writes")
    run.add_argument("--evaluations", type=int, metavar="N", help="in place of the config's search.evaluations")
    run.add_argument("--seed", type=int, metavar="N", help="in place of the config's search.seed")
    run.add_argument("--device", metavar="DEVICE", help="in place of the config's device")
    run.add_argument("--output", metavar="FOLDER", type=_given, help="in place of the config's output")
    run.add_argument("--overwrite", action="store_true", help="replace an export of another genome")

    init = command("init", _init, "write a commented config for a model")
    init.add_argument("model", metavar="MODEL", type=_given, help=MODELS)
    init.add_argument(
        "-o",
        "--out",
        metavar="FILE",
        type=_given,
        help="the config's file, - for stdout (default: the model's name with .yaml)",
    )

    space = command("space", _space, "show a config's genes, the number of genomes, and the sizes of both ends")
    space.add_argument("config", metavar="CONFIG", type=_given, help="a YAML file, such as init writes")

    report = command("report", _report, "show the front of a finished or running study, and write its HTML report")
    report.add_argument("study", metavar="OUTPUT", type=_given, help="a run's output folder, or a study's file")
    report.add_argument(
        "-o", "--out", metavar="FILE", type=_given, help="the HTML file (default: report.html beside the study)"
    )
    report.add_argument(
        "--device", action="append", metavar="DEVICE", help="a device to show the front on, by its roofline; repeatable"
    )
    report.add_argument("--batch", type=int, default=None, metavar="N", help="samples computed together there")
    report.add_argument("--context", type=int, default=None, metavar="N", help="tokens of a sample there")

    export = command("export", _export, "export any point of a finished or running study")
    export.add_argument("output", metavar="OUTPUT", type=_given, help="a run's output folder")
    export.add_argument("--pick", required=True, metavar="POINT", help=PICKS)
    export.add_argument("--to", metavar="FOLDER", type=_given, help="the folder to be made (default: OUTPUT/export)")
    export.add_argument(
        "--target",
        choices=TARGET_NAMES,
        help="the library that it is for (default: the config's)",
    )
    export.add_argument("--overwrite", action="store_true", help="replace FOLDER if it exists")

    verify = command(
        "verify", _verify, "reload an export without jointopt, score it again, weigh it; exit 1 if it differs"
    )
    verify.add_argument("folder", metavar="FOLDER", type=_given, help="an export, or a run's output folder")
    verify.add_argument(
        "--config", metavar="CONFIG", type=_given, help="whose data is scored (default: the run's that made it)"
    )
    return parser


def _run(options: argparse.Namespace) -> int:
    from rich.console import Console

    from jointopt.config.config import load_config
    from jointopt.workflow import run

    given = {
        "search.evaluations": options.evaluations,
        "search.seed": options.seed,
        "device": options.device,
        "output": options.output,
    }
    config = load_config(options.config, {key: value for key, value in given.items() if value is not None})
    return 0 if run(config, Console(), options.overwrite).ok else 1


def _init(options: argparse.Namespace) -> int:
    from jointopt.config.starter import starter_config

    text = starter_config(options.model)
    if options.out == "-":
        print(text, end="")
        return 0
    path = Path(options.out or f"{Path(options.model).resolve().name}.yaml")
    with writing(f"init: {str(path)!r}"):
        try:
            with open(path, "x", encoding="utf-8") as file:
                file.write(text)
        except FileExistsError:
            raise JointoptError(f"init: {str(path)!r} exists; choose another file with -o") from None
    print(f"{path}: written; name your data in it, then: python -m jointopt run {quote(str(path))}")
    return 0


def _space(options: argparse.Namespace) -> int:
    from rich.console import Console

    from jointopt.config.config import load_config
    from jointopt.prepared import stay_offline

    config = load_config(options.config)
    stay_offline(config)
    from jointopt.report.quantities import counted
    from jointopt.report.terminal import extremes_table, space_table
    from jointopt.workflow import empty_supernet

    supernet = empty_supernet(config)
    space = supernet.space
    console = Console()
    console.print(space_table(space))
    ends = {"largest": supernet.costs(space.largest), "smallest": supernet.costs(space.smallest)}
    console.print(extremes_table({"the original": supernet.original_costs(), **ends}))
    console.print(f"{len(space)} genes, {counted(space.count())} genomes", highlight=False, soft_wrap=True)
    return 0


def _report(options: argparse.Namespace) -> int:
    from jointopt.report.page import write_report
    from jointopt.run_folder import REPORT, STUDY
    from jointopt.study.study import Study

    check_path(options.study, "report")
    given = Path(options.study)
    file = given / STUDY if given.is_dir() else given
    for name in ("batch", "context"):
        if getattr(options, name) is not None and not options.device:
            raise JointoptError(f"--{name}: found {getattr(options, name)} and no --device; allowed: with one")
    study = Study.open(file)
    try:
        devices = _on_devices(study, file.parent, options) if options.device else []
        try:
            path = write_report(study, Path(options.out) if options.out else file.parent / REPORT, devices=devices)
        finally:  # the tables are there where the page cannot be written, too
            _show(study, devices)
    finally:
        study.close()
    print(f"report: {path}")
    return 0


def _show(study: Study, devices: Sequence[OnDevice]) -> None:
    from rich.console import Console

    from jointopt.report.terminal import device_table, finished_table, front_table

    console = Console()
    choice = study.fact("choice", {})
    console.print(front_table(study, choice.get("genome")))
    if study.finished():
        console.print(finished_table(study, choice.get("genome"), choice.get("rounding")))
    for each in devices:
        console.print(device_table(each))


def _on_devices(study: Study, output: Path, options: argparse.Namespace) -> list[OnDevice]:
    """The study's sub-networks on each device that was asked for; no quality is measured again."""
    from jointopt.config.config import load_config
    from jointopt.cost.device import load_device
    from jointopt.cost.roofline import Roofline
    from jointopt.prepared import stay_offline
    from jointopt.report.devices import on_device
    from jointopt.run_folder import CONFIG
    from jointopt.workflow import empty_supernet

    if not (output / CONFIG).is_file():
        raise JointoptError(
            f"--device: {str(output)!r} holds no {CONFIG}, which names the model; allowed: a run's output"
        )
    check_count("--batch", options.batch, MOST["batch"])
    check_count("--context", options.context, MOST["context"])
    config = load_config(output / CONFIG)
    given = config.hardware
    batch = options.batch or (given.batch if given else 1)
    context = options.context or (given.context if given else None)
    names = list(dict.fromkeys(options.device))
    devices = [load_device(name) for name in names]
    # The run's parallel is of its kind of device; one without a network is alone.
    models = [Roofline(d, batch, context, given.parallel if given and d.network else 1) for d in devices]
    stay_offline(config)
    shapes = study.fact("shapes")
    if shapes is None:  # as while the original is scored
        raise JointoptError("--device: the study has no evaluation yet; allowed: with one or more")
    supernet = empty_supernet(config)
    supernet.take_shapes(shapes)
    wish = config.choose.model_dump(exclude_none=True)
    return [on_device(study, supernet, name, model, wish) for name, model in zip(names, models, strict=True)]


def _export(options: argparse.Namespace) -> int:
    from jointopt.run_picks import export_pick

    pick = parse_pick(options.pick)
    if options.to:
        check_path(options.to, "export: --to")
    output = Path(options.output)
    folder = export_pick(output, pick, Path(options.to) if options.to else None, options.target, options.overwrite)
    check = f"python -m jointopt verify {quote(str(folder))}" + _config_option(folder, output)
    print(f"exported: {folder}; check it: {check}")
    return 0


def _config_option(folder: Path, output: Path) -> str:
    return "" if folder.resolve().parent == output.resolve() else f" --config {quote(str(output / 'config.yaml'))}"


def parse_pick(text: str) -> dict[str, Any]:
    """ "knee", "size_mb=20", "drop=0.01", "evaluation=17" or "17", as keywords. Raises JointoptError for all else."""
    name, given, value = text.partition("=")
    try:
        if text == "knee":
            return {"knee": True}
        number = value if given else text
        if (not given or name == "evaluation") and number.isascii() and number.isdigit():
            return {"evaluation": int(number)}
        if name in ("size_mb", "drop") and math.isfinite(float(value)):
            return {name: float(value)}
    except ValueError:
        pass
    raise JointoptError(f"--pick: found {text!r}; allowed: {PICKS}")


def _verify(options: argparse.Namespace) -> int:
    from jointopt.config.config import load_config
    from jointopt.prepared import prepare, stay_offline
    from jointopt.run_exports import verify_export
    from jointopt.run_folder import CONFIG, EXPORT, STUDY

    check_path(options.folder, "verify")
    folder = Path(options.folder)
    if not folder.is_dir():
        raise JointoptError(f"verify: no folder {options.folder!r}")
    if (folder / STUDY).is_file():
        folder /= EXPORT
    path = Path(options.config) if options.config else folder.parent / CONFIG
    config: Config | None = load_config(path) if options.config or path.is_file() else None
    if config is not None:
        stay_offline(config)
        _check_task(folder, config, path)
    verification = verify_export(folder, None if config is None else prepare(config))
    scored = [f"{name} {value:.6g}" for name, value in verification.metrics.items()]
    told = ", ".join([*scored, f"{verification.size / 1e6:.6g} MB"])
    if verification.ok:
        print(f"verified: {folder}: {told}" + ("" if scored else " (outputs and size; --config CONFIG scores it too)"))
        return 0
    print(f"not verified: {folder}: {'; '.join(verification.differences)}")
    return 1


def _check_task(folder: Path, config: Config, path: Path) -> None:
    """Raises JointoptError where the export is of another task than the config, whose data it cannot take."""
    from jointopt.models import exported_task, find_source, model_task

    found, wanted = exported_task(folder), config.task or model_task(find_source(config.model))
    if found not in (None, wanted):
        raise JointoptError(f"verify: {str(folder)!r} is of {found}, {str(path)!r} of {wanted}; allowed: one task")
