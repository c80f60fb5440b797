"""The jobs as commands: `cmcgns pretrain ...` and `python jobs/pretrain.py ...` are the same.

Each function takes the arguments after the command and returns the exit status. Imports are inside: --help needs none of them.
"""

import argparse
import difflib
import io
import os
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout, suppress
from importlib import resources
from pathlib import Path
from typing import NoReturn

from cmcgns import __version__
from cmcgns.cli import COMMAND, FLAGS, STATUS_WRONG_INPUT, invocation, run_job
from cmcgns.errors import UserError

Arguments = Sequence[str]
DEFAULT_CONFIG = Path(str(resources.files("cmcgns.recipes"))) / "phantom.yaml"


def pretrain(arguments: Arguments) -> int:
    """Pretrain a model: [--config FILE.yaml] [--dry-run] [--section.key=value ...]"""
    from cmcgns.config import Config

    def main(config: Config, dry_run: bool = False) -> int:
        from cmcgns.job import run
        from cmcgns.train.run import PretrainJob

        return run(PretrainJob(config, dry_run), dry_run)

    return run_job(main, Config, DEFAULT_CONFIG, arguments, plan=lambda config: main(config, dry_run=True))


def prepare(arguments: Arguments) -> int:
    """Convert a raw corpus to shards: --data.uri=RAW --prepare.out=URI; check a prepared set or an export: --check"""
    from cmcgns.data.prepare.config import PrepareJobConfig

    def main(config: PrepareJobConfig) -> int:
        if not config.prepare.check:
            from cmcgns.data.prepare.run import prepare as convert

            return convert(config)
        from cmcgns.data.prepare.check import check_set
        from cmcgns.data.prepare.check_export import check_export, export_folder

        export = export_folder(config.prepare.out)
        return check_export(export) if export else check_set(config.prepare.out)

    words = ["--prepare.check=true" if word == "--check" else word for word in arguments]
    return run_job(main, PrepareJobConfig, None, words)


def sweep(arguments: Arguments) -> int:
    """Sweep settings of pretraining: [--config FILE.yaml] [--sweep.key=value ...]"""
    from cmcgns.sweep.config import SweepJobConfig

    def main(config: SweepJobConfig) -> int:
        from cmcgns.job import run
        from cmcgns.sweep.run import SweepJob

        return run(SweepJob(config))

    return run_job(main, SweepJobConfig, DEFAULT_CONFIG, arguments)


def evaluate(arguments: Arguments) -> int:
    """Evaluate encoders on downstream tasks: [--evaluate.run=RUN_FOLDER ...]"""
    from cmcgns.evaluate.config import EvaluateJobConfig

    def main(config: EvaluateJobConfig) -> int:
        from cmcgns.job import run

        if config.evaluate.ablation is not None:
            from cmcgns.evaluate.ablation import AblationJob

            return run(AblationJob(config))
        from cmcgns.evaluate.run import EvaluateJob

        return run(EvaluateJob(config))

    return run_job(main, EvaluateJobConfig, None, arguments)


def embed(arguments: Arguments) -> int:
    """Embed a corpus's sentences with a trained model: --embed.run=RUN_FOLDER"""
    from cmcgns.evaluate.config import EmbedJobConfig

    def main(config: EmbedJobConfig) -> int:
        from cmcgns.evaluate.embed import EmbedJob
        from cmcgns.job import run

        return run(EmbedJob(config))

    return run_job(main, EmbedJobConfig, None, arguments)


def search(arguments: Arguments) -> int:
    """Find the films and reports nearest to a film or a text: --search.index=FOLDER; build the index: --search.run=RUN_FOLDER"""
    from cmcgns.search.config import SearchJobConfig

    def main(config: SearchJobConfig) -> int:
        from cmcgns.search.run import search as build_or_query

        return build_or_query(config)

    return run_job(main, SearchJobConfig, None, arguments)


def kmeans(arguments: Arguments) -> int:
    """Cluster embeddings in Parquet: --data.uri=URI"""
    from cmcgns.clustering.config import KMeansConfig

    def main(config: KMeansConfig) -> int:
        from cmcgns.clustering.fit import KMeansJob
        from cmcgns.job import run

        return run(KMeansJob(config))

    return run_job(main, KMeansConfig, None, arguments)


def doctor(arguments: Arguments) -> int:
    """Check this machine, or the cluster in RAY_ADDRESS, before a run"""
    from cmcgns.doctor import DoctorJobConfig, main

    return run_job(main, DoctorJobConfig, None, arguments)


def report(arguments: Arguments) -> int:
    """Write report.html of a pretraining run, or of several side by side: RUN [RUN ...] [--out=FILE] [--samples=N]"""
    parser = _Parser(" ".join(invocation()), description="Curves, settings and pictures of runs on one page.")
    parser.add_argument("run", nargs="+", help="folder of a pretraining run, local or s3://; it may still be running")
    parser.add_argument(
        "--out", help="the page; by default report.html in the folder of the run, or of the first of several"
    )
    parser.add_argument(
        "--samples",
        type=int,
        help="validation studies whose films and sentences are shown: retrieval, heat maps, clusters, pictures; by default 128 "
        "of the generated corpus and 0 of any other",
    )
    parser.add_argument(
        "--trusted", action="append", default=[], help="a module that the run's settings name and that may be executed"
    )

    def write() -> int:
        from cmcgns.report.page import write_report

        given = parser.parse_args(arguments)
        print(write_report(given.run, given.out, given.samples, given.trusted))
        return 0

    return one_message(write)


def export(arguments: Arguments) -> int:
    """Write the export of a finished run with a model card: RUN OUT [--evaluation=FOLDER] [--onnx] [--transformers]"""
    parser = _Parser(" ".join(invocation()), description="Encoders, heads, settings and model card of a finished run.")
    parser.add_argument("run", help="folder of a finished pretraining run, local or s3://")
    parser.add_argument("out", help="new folder, local or s3://")
    parser.add_argument("--evaluation", help="folder of an evaluation of the run, whose scores go into the model card")
    parser.add_argument("--onnx", action="store_true", help="also write both encoders as ONNX (extra `onnx`)")
    parser.add_argument(
        "--transformers",
        action="store_true",
        help="also write both as one model for AutoModel, if a ViT and a BERT by [CLS]",
    )

    def write() -> int:
        from cmcgns.library.export import export_run

        given = parser.parse_args(arguments)
        print(export_run(given.run, given.out, given.evaluation, given.onnx, given.transformers))
        return 0

    return one_message(write)


class _Parser(argparse.ArgumentParser):
    """Wrong arguments are a ``UserError``: one message without the usage."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see --help)")


def one_message(action: Callable[[], int]) -> int:
    """The exit status of ``action``; on wrong input prints one message and returns 2."""
    try:
        return action()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return STATUS_WRONG_INPUT


COMMANDS: dict[str, Callable[[Arguments], int]] = {
    command.__name__: command
    for command in (pretrain, prepare, sweep, evaluate, embed, search, kmeans, report, export, doctor)
}


def run_script(name: str) -> int:
    """Exit status of the script ``jobs/NAME.py`` with the arguments of this process."""
    return run_command(name, sys.argv[1:])


def run_command(name: str, arguments: Arguments) -> int:
    """Exit status of a command; one message if it needs a package of the extras, which the core does not install."""
    try:
        return COMMANDS[name](arguments)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", __package__):
            raise
        print(
            f"error: {name} needs {package}, which is not installed: pip install 'cmcgns[cpu]', or 'cmcgns[gpu]' with CUDA",
            file=sys.stderr,
        )
        return STATUS_WRONG_INPUT


def main(argv: Arguments | None = None) -> int:
    """Exit status of `cmcgns COMMAND ...`."""
    if "_ARGCOMPLETE" in os.environ:
        complete()
    words = list(sys.argv[1:] if argv is None else argv)
    name = words[0] if words else ""
    if name in ("", "-h", "--help"):
        print(usage())
        return 0 if name else STATUS_WRONG_INPUT
    if name == "--version":
        print(f"cmcgns {__version__}")
        return 0
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(COMMANDS)}"
        print(f"error: there is no command '{name}'; {hint}", file=sys.stderr)
        return STATUS_WRONG_INPUT
    sys.argv = [f"{COMMAND} {name}", *words[1:]]  # as usage lines and the commands that resume a run name it
    return run_command(name, words[1:])


def complete() -> None:
    """Answer a shell that asks for completions: `eval "$(register-python-argcomplete cmcgns)"`."""
    import argcomplete

    words = os.environ["COMP_LINE"].split()
    parser = argparse.ArgumentParser(COMMAND)
    parser.add_argument("--version", action="store_true")
    commands = parser.add_subparsers()
    for name in COMMANDS:
        command = commands.add_parser(name)
        if name in words[1:2]:
            for key in keys_of(name):
                command.add_argument(f"--{key}")
            command.add_argument("--config", choices=sorted(path.stem for path in DEFAULT_CONFIG.parent.glob("*.yaml")))
            for flag in FLAGS:
                command.add_argument(flag, action="store_true")
    argcomplete.autocomplete(parser)


def keys_of(name: str) -> list[str]:
    """The settings of a job, from its --help; of a command without settings its options."""
    shown = io.StringIO()
    with redirect_stdout(shown), suppress(SystemExit):  # argparse's --help ends the process
        COMMANDS[name](["--help"])
    return re.findall(r"^  --([\w.-]+) ", shown.getvalue(), re.MULTILINE)


def usage() -> str:
    """What `cmcgns --help` prints."""
    lines = [f"  {name:9} {(command.__doc__ or '').strip()}" for name, command in COMMANDS.items()]
    return "\n".join(["usage: cmcgns COMMAND ...; cmcgns COMMAND --help lists its settings", "", *lines])
