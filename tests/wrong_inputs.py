"""Wrong inputs that a user may well give, and what each answer must name."""

import time
from dataclasses import dataclass
from pathlib import Path

from tests.jobs import Job

LONGEST_ANSWER = 3
"""Lines of the message at most."""


@dataclass(frozen=True)
class WrongInput:
    """One mistake: the arguments that make it, and the words that its message must hold."""

    name: str
    arguments: tuple[str, ...]
    words: tuple[str, ...]

    def __str__(self) -> str:
        return self.name


def wrong_inputs(folder: Path) -> list[WrongInput]:
    """The mistakes of settings and files; ``folder`` takes the files that some of them need."""
    unreadable = folder / "unreadable.csv"
    unreadable.write_bytes(b'image,report\n"one.png,"a quote that is never closed\ntwo.png\0,x\n')
    headless = folder / "headless.csv"
    headless.write_text("one.png,The lungs are clear.\n")
    silent = folder / "silent.csv"
    silent.write_text("image,report\n" + "".join(f"{i}.png,{'Clear lungs.' if i % 2 else ''}\n" for i in range(10)))
    for number in range(10):
        (folder / f"{number}.png").touch()
    missing = f"{folder}/no/such/folder"
    return [
        WrongInput("misspelt key", ("--train.zero_stge=1",), ("train.zero_stge", "train.zero_stage")),
        WrongInput("misspelt section", ("--trian.zero_stage=1",), ("trian", "train")),
        WrongInput("mask ratio 1.5", ("--objective.mask_ratio=1.5",), ("objective.mask_ratio", "1.5", "less than 1")),
        WrongInput("zero clusters", ("--objective.num_clusters=0",), ("objective.num_clusters", "0", "at least 2")),
        WrongInput("ZeRO 7", ("--train.zero_stage=7",), ("train.zero_stage", "7", "at most 3")),
        WrongInput("missing folder", (f"--data.uri={missing}",), ("data.uri", missing, "does not exist")),
        WrongInput(
            "missing config file", ("--config", f"{folder}/none.yaml"), ("--config", "none.yaml", "jobs/configs")
        ),
        WrongInput(
            "batch sizes that do not divide",
            ("--train.global_batch_size=1000",),
            ("train.global_batch_size 1000", "16 x 2 = 32", "992 and 1024"),
        ),
        WrongInput("unreadable CSV", (f"--data.uri={unreadable}",), ("data.uri", str(unreadable), "UTF-8")),
        WrongInput("CSV without header", (f"--data.uri={headless}",), ("data.uri", str(headless), "image and report")),
        WrongInput(
            "films without reports",
            (f"--data.uri={silent}",),
            ("data.uri", "5 of ", "data.max_bad_fraction 0.01", "row has no report"),
        ),
        WrongInput("word for a number", ("--train.num_workers=two",), ("train.num_workers", "two", "integer")),
        WrongInput("value without a key", ("1000",), ("1000", "--section.key=value")),
    ]


def missing_buckets() -> list[WrongInput]:
    """A bucket that is not there, as the corpus and as the place of the run; they need an S3 server."""
    uri = "s3://no-such-bucket/films"
    return [
        WrongInput("missing bucket", (f"--data.uri={uri}",), ("data.uri", uri, "bucket does not exist")),
        WrongInput(
            "missing bucket for the run",
            (f"--run.storage={uri}",),
            ("run.storage", uri, "bucket does not exist"),
        ),
    ]


def check_refused(wrong: WrongInput, folder: Path) -> float:
    """Assert that a job with ``wrong`` ends with status 2 and one message that names it; the seconds it took."""
    before = time.perf_counter()
    job = Job(folder, *wrong.arguments)
    said = job.wait()
    seconds = time.perf_counter() - before
    assert job.process.returncode == 2, f"{wrong}: status {job.process.returncode}\n{said[-2000:]}"
    assert "Traceback" not in said, said
    assert said.startswith("error: "), said
    assert not [path for path in folder.iterdir() if path.is_dir()], "a refused run leaves no folder"
    assert len(said.splitlines()) <= LONGEST_ANSWER, said
    for word in wrong.words:
        assert word in said, f"{wrong}: '{word}' is not in: {said}"
    print(f"{wrong.name:32} {seconds:5.1f} s  {said.strip()}")
    return seconds
