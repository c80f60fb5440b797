"""The day a GPU is there, in one command: correctness first, then figures. `make gpu-day`, or `python -m tests.gpu_day`.

It needs torch and transformers alone, and no network; what else is installed (DeepSpeed, FAISS, torchvision) is used, and what is
missing is named. Each part is written to OUT/results.json when it ends, and the same command again does the rest. A look without
a GPU: `--device=cpu --small`.
"""

import argparse
import gc
import importlib.util
import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

import tests.benchmarks.bare_settings  # noqa: F401  before anything of cmcgns: in place of pydantic where there is none

# isort: split
from cmcgns.methods.base import load_method
from cmcgns.train.speed import set_up_torch
from tests.benchmarks import gpu_step, heads
from tests.benchmarks.gpu_step import FULL, SMALL, Run, Shape, build_run, seconds_per_step, wait
from tests.benchmarks.measure import Line, commit, where

CPU_APART, BF16_APART, FP16_APART, EXPORT_APART = 1e-3, 2e-2, 2e-2, 1e-3
"""Largest relative difference of losses over all steps: a GPU's from a CPU's in fp32, and each precision's from fp32; largest
difference of an embedding between devices."""
CHECKED_STUDIES = 8
"""Of the steps that a CPU repeats."""
SIZES = (64, 128, 256, 512)
TIMED_AT = 128
"""Studies at which settings are compared."""
ROWS, CENTROIDS, WIDTH = 262_144, 128, 768
PROFILED_STEPS = 3


@dataclass
class Part:
    """What a part found."""

    state: str
    """`done`, `failed` or `left out`."""
    seconds: float = 0.0
    rows: list[Line] = field(default_factory=list)


class LeftOut(Exception):
    """A part cannot run here, and says why."""


@dataclass
class Day:
    """Where and how long everything runs."""

    device: torch.device
    small: bool
    steps: int
    out: Path
    engine: str
    end: float
    parts: dict[str, Part]

    def do(self, name: str, part: Callable[["Day"], Iterator[Line]]) -> None:
        """Run ``part`` and store what it found, unless it is there or no time is left."""
        if name in self.parts and self.parts[name].state != "failed":
            return
        if time.monotonic() > self.end:
            print(f"{name}: no time left; the same command again does it", flush=True)
            return
        began, rows, state = time.monotonic(), list[Line](), "done"
        print(name, flush=True)
        try:
            exact()
            for row in part(self):
                rows.append(row)
                print(
                    f"  {row.what:60} {row.measured:>28} {row.wanted} {'NO' if row.good is False else ''}", flush=True
                )
        except LeftOut as reason:
            state = "left out"
            rows.append(Line(str(reason), ""))
            print(f"  {reason}", flush=True)
        except Exception as error:  # the other parts go on
            state = "failed"
            rows.append(Line(f"{type(error).__name__}: {error}"[:500], "", good=False))
            print(f"  failed: {rows[-1].what}", flush=True)
        self.parts[name] = Part(state, time.monotonic() - began, rows)
        self.save()
        free(self.device)

    def save(self) -> None:
        """Write results.json, so that a cut leaves either the old file or the new one, and table.md."""
        found = {"machine": machine(self.device), "parts": {name: asdict(part) for name, part in self.parts.items()}}
        new = self.out / "results.json.new"
        new.write_text(json.dumps(found, indent=1))
        new.replace(self.out / "results.json")
        (self.out / "table.md").write_text(table(self))


def machine(device: torch.device) -> str:
    """The device, and the versions of torch and of this code."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return f"{name}, torch {torch.__version__}, commit {commit()}"


def exact() -> None:
    """fp32 means fp32: for parts that compare losses."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.benchmark = False


def free(device: torch.device) -> None:
    """Give memory back, so that each part begins with all of it."""
    gc.collect()  # compiled modules hold each other
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def losses_of(shape: Shape, precision: str, engine: str, device: torch.device) -> list[float]:
    """Losses of ``shape.loss_steps`` steps."""
    run = build_run(shape, precision, engine, device)
    for _ in range(shape.loss_steps):
        run()
    return [float(loss) for loss in run.losses]


def apart(ours: list[float], theirs: list[float]) -> float:
    """The largest relative difference; infinite where a loss is not finite."""
    found = max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))
    return found if np.isfinite(found) else float("inf")


def losses_beside_cpu(shape: Shape, day: Day) -> Iterator[Line]:
    """The device in fp32 beside the CPU, the same weights and batches."""
    few = replace(shape, studies=min(shape.studies, CHECKED_STUDIES))
    found = apart(losses_of(few, "fp32", "torch", day.device), losses_of(few, "fp32", "torch", torch.device("cpu")))
    what = f"fp32 from a CPU's, {few.loss_steps} steps of {few.studies} studies"
    yield Line(what, f"{found:.1e} relative", f"<= {CPU_APART:g}", found <= CPU_APART)


def losses_in_half(shape: Shape, day: Day) -> Iterator[Line]:
    """bf16 and fp16 beside fp32."""
    whole = losses_of(shape, "fp32", day.engine, day.device)
    for precision, most in (("bf16", BF16_APART), ("fp16", FP16_APART)):
        if precision == "fp16" and day.device.type == "cpu":
            continue
        found = apart(losses_of(shape, precision, day.engine, day.device), whole)
        yield Line(
            f"{precision} from fp32, {shape.loss_steps} steps", f"{found:.1e} relative", f"<= {most:g}", found <= most
        )


@torch.no_grad()
def embeddings_beside_cpu(shape: Shape, day: Day) -> Iterator[Line]:
    """The weights after some steps on the device, in a model on a CPU: the embeddings of the same films and reports."""
    few = replace(shape, studies=min(shape.studies, CHECKED_STUDIES))
    run = build_run(few, "fp32", "torch", day.device)
    for _ in range(3):
        with torch.enable_grad():
            run()
    own = load_method(gpu_step.settings(few, "fp32", "torch", torch.device("cpu"))).build_model(few.vocabulary)
    own.load_state_dict(run.engine.weights())
    own.eval()
    run.engine.module.eval()
    batch = run.batches[0]
    theirs, ours = run.engine.module(batch, 1), own(batch.to("cpu"), 1)
    for name in ("image_BD", "report_BD"):
        found = float((getattr(theirs, name).cpu() - getattr(ours, name)).abs().max())
        yield Line(
            f"{name} from a CPU's, the same weights", f"{found:.1e}", f"<= {EXPORT_APART:g}", found <= EXPORT_APART
        )


def every_method(day: Day) -> Iterator[Line]:
    """Losses and gradients of each method's tests on the device, beside the CPU."""
    missing = [name for name in ("pydantic", "pytest", "pyarrow", "ray") if importlib.util.find_spec(name) is None]
    if missing:
        raise LeftOut(f"needs {', '.join(missing)}")
    from tests.methods.test_ranks import CONFIGS, centroids, config_of
    from tests.small import losses_of as small_losses
    from tests.small import random_batch, small_model

    for name in CONFIGS:
        config = config_of(name)
        stage, found = config.objective.stages, []
        for device in (torch.device("cpu"), day.device):
            torch.manual_seed(0)
            model = small_model(config).to(device)
            batch = random_batch(config, slice(0, 6)).to(device)
            loss = small_losses(config, model(batch, stage), batch, centroids().to(device), stage).total
            loss.backward()
            norm = sum(float(each.grad.square().sum()) for each in model.parameters() if each.grad is not None) ** 0.5
            found.append([float(loss), norm])
        different = apart(found[1], found[0])
        yield Line(
            f"{name}: loss and norm of the gradient",
            f"{different:.1e} relative",
            f"<= {CPU_APART:g}",
            different <= CPU_APART,
        )


def throughput(shape: Shape, day: Day) -> Iterator[Line]:
    """bf16 steps of growing batches, until memory ends."""
    for studies in (shape.studies,) if day.small else SIZES:
        try:
            yield from timed(replace(shape, studies=studies), day, f"{studies} studies")
        except torch.cuda.OutOfMemoryError:
            free(day.device)
            yield Line(f"{studies} studies", "out of memory")
            return


def timed(shape: Shape, day: Day, what: str, **options: Any) -> Iterator[Line]:
    """Speed, share of the peak and memory of a bf16 step."""
    free(day.device)
    run = fast_run(shape, day, **options)
    step_s = seconds_per_step(run, day.steps, day.device)
    memory = f", {torch.cuda.max_memory_allocated(day.device) / 2**30:.1f} GiB" if day.device.type == "cuda" else ""
    share = ""
    if not options.get("train", {}).get("compile"):  # torch cannot count what is compiled
        tflops, peak = gpu_step.flops_per_step(run) / step_s / 1e12, gpu_step.peak_tflops(day.device)
        share = f", {tflops:.3g} TFLOP/s" + (f" ({tflops / peak:.1%})" if peak else "")
    yield Line(what, f"{shape.studies / step_s:.1f} studies/s{share}{memory}")


def fast_run(shape: Shape, day: Day, slices: int | None = None, **options: Any) -> Run:
    """In bf16, with the settings for speed that training has."""
    set_up_torch(gpu_step.settings(shape, "bf16", day.engine, day.device, **options).train, day.device)
    return build_run(shape, "bf16", day.engine, day.device, slices, **options)


VARIANTS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "channels_last": {"model": {"channels_last": True}},
    "compiled": {"train": {"compile": True}},
    "without TF32": {"train": {"tf32": False}},
    "reports of all lengths, one pass": {"slices": 1},
    "reports of all lengths, two passes": {"slices": 2},
    "reports of all lengths, four passes": {"slices": 4},
}


def variants(shape: Shape, day: Day) -> Iterator[Line]:
    """The same step with other settings."""
    at = replace(shape, studies=shape.studies if day.small else TIMED_AT)
    for name, options in VARIANTS.items():
        if name == "channels_last" and shape.image_encoder.startswith("vit"):
            continue  # it has one convolution
        try:
            yield from timed(at, day, name, **options)
        except Exception as error:  # a compiler or memory is missing: the other settings go on
            yield Line(name, f"{type(error).__name__}: {error}".splitlines()[0][:60])


def where_time_goes(shape: Shape, day: Day) -> Iterator[Line]:
    """Share of a step by part, each timed with a wait after it; and a trace of whole steps for chrome://tracing."""
    run = fast_run(shape, day)
    seconds = dict[str, list[float]]()

    def lap(name: str, began: float) -> float:
        wait(day.device)
        seconds.setdefault(name, []).append(time.perf_counter() - began)
        return time.perf_counter()

    for number in range(3 + day.steps):
        batch, clock = run.batches[number % len(run.batches)], time.perf_counter()
        outputs = run.engine(batch, 2)
        clock = lap("forward", clock)
        loss = run.method.losses(outputs, batch, {"sentences": run.centroids_KD}, 2, 1).total
        clock = lap("losses", clock)
        run.engine.backward(loss, last=True)
        clock = lap("backward", clock)
        run.engine.step(1e-5)
        lap("optimizer", clock)
    middle = {name: median(each[3:]) for name, each in seconds.items()}
    for name, part_s in middle.items():
        yield Line(name, f"{part_s / sum(middle.values()):.0%}, {1000 * part_s:.1f} ms")
    yield from profiled(run, shape, day)


def profiled(run: Run, shape: Shape, day: Day) -> Iterator[Line]:
    """The kernels that take most of the time."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    on_gpu = day.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu) as found:
        for _ in range(PROFILED_STEPS):
            run()
        wait(day.device)
    trace = day.out / f"trace-{shape.image_encoder}.json.gz"
    found.export_chrome_trace(str(trace))
    time_of = lambda event: event.self_device_time_total if on_gpu else event.self_cpu_time_total
    # on a GPU the rows of operators hold the time of their kernels, which have rows of their own
    kernels = [each for each in found.key_averages() if not on_gpu or each.device_type != DeviceType.CPU]
    events = sorted((each for each in kernels if not each.is_user_annotation), key=time_of, reverse=True)
    whole = sum(map(time_of, events)) or 1
    for event in events[:8]:
        yield Line(f"  {event.key[:56]}", f"{time_of(event) / whole:.0%}, {event.count // PROFILED_STEPS} a step")
    yield Line("trace", trace.name)


def heads_alone(day: Day) -> Iterator[Line]:
    """Heads and losses beside the matrix products that they are made of."""
    steps: tuple[tuple[str, Callable[[], Callable[[], None]], Any], ...] = (
        ("heads and losses 1-3", heads.build_step, heads.PRODUCTS),
        ("film negatives", heads.build_film_step, heads.FILM_PRODUCTS),
    )
    with day.device:
        for what, build, products in steps:
            ours, bare = (
                seconds_per_step(run, day.steps, day.device) for run in (build(), heads.build_products(products))
            )
            yield Line(f"{what}, fp32", f"{1000 * ours:.1f} ms, {ours / bare:.2f} x its products")


def kmeans_pass(day: Day) -> Iterator[Line]:
    """One pass of the clustering pool over a bank, by FAISS on the device and on the CPU, near ties settled."""
    if importlib.util.find_spec("faiss") is None:
        raise LeftOut("FAISS is not installed")
    from cmcgns.clustering.kmeans import faiss_assign, numpy_assign

    generator, rows = np.random.default_rng(0), ROWS // 64 if day.small else ROWS
    rows_ND = generator.standard_normal((rows, WIDTH), np.float32)
    rows_ND /= np.linalg.norm(rows_ND, axis=1, keepdims=True)
    centroids_KD = rows_ND[:CENTROIDS]
    exact_N = numpy_assign(rows_ND[: ROWS // 64], centroids_KD).nearest_N
    import faiss

    for device in ("cpu", "gpu")[: 1 + (day.device.type == "cuda" and hasattr(faiss, "StandardGpuResources"))]:
        assign, seconds = faiss_assign(device), list[float]()
        for _ in range(3):
            before = time.perf_counter()
            found = assign(rows_ND, centroids_KD)
            seconds.append(time.perf_counter() - before)
        same = bool((found.nearest_N[: len(exact_N)] == exact_N).all())
        what = f"{rows} x {WIDTH} rows, {CENTROIDS} centroids, {device}"
        yield Line(what, f"{min(seconds):.3f} s, {found.near_ties} near ties", "as in float64", same)


def decoding(day: Day) -> Iterator[Line]:
    """JPEGs decoded on the GPU, beside one core, by torchvision."""
    if day.device.type == "cpu" or importlib.util.find_spec("torchvision") is None:
        raise LeftOut("needs a GPU and torchvision")
    from torchvision.io import decode_jpeg, encode_jpeg

    grey = F.interpolate(torch.rand(1, 1, 64, 64), (2048, 2048), mode="bicubic").clamp(0, 1)[0]
    films = [encode_jpeg((grey * 255).byte(), quality=90)] * 64
    for name, decode in (
        ("one core", lambda: [decode_jpeg(film) for film in films[:8]]),
        ("GPU, batches of 64", lambda: decode_jpeg(films, device=day.device)),
    ):
        number = len(decode())  # also warms up
        before = time.perf_counter()
        decode()
        wait(day.device)
        yield Line(f"2048 x 2048, {name}", f"{number / (time.perf_counter() - before):.0f} films/s")
    different = float(
        (decode_jpeg(films[:1], device=day.device)[0].cpu().float() - decode_jpeg(films[0]).float()).abs().mean()
    )
    yield Line("GPU from CPU, mean of grey levels", f"{different:.3f}", "<= 1", different <= 1)


def parts(day: Day) -> Iterator[tuple[str, Callable[[Day], Iterator[Line]]]]:
    """All parts: what is right first."""
    shapes = SMALL if day.small else FULL
    for title, part in (
        ("losses beside a CPU", losses_beside_cpu),
        ("losses in half precision", losses_in_half),
        ("embeddings beside a CPU", embeddings_beside_cpu),
    ):
        for shape in shapes:
            yield f"{title}: {shape.image_encoder}", partial(part, shape)
    yield "every method beside a CPU", every_method
    for title, part in (("throughput", throughput), ("settings", variants), ("where time goes", where_time_goes)):
        for shape in shapes:
            yield f"{title}: {shape.image_encoder} + {shape.text_encoder}, bf16", partial(part, shape)
    yield "heads alone", heads_alone
    yield "k-means", kmeans_pass
    yield "decoding", decoding


def stored(out: Path, here: str) -> dict[str, Part]:
    """The parts that an earlier run has stored; exits if they are of another machine or commit."""
    file = out / "results.json"
    if not file.exists():
        return {}
    found = json.loads(file.read_text())
    if found["machine"] != here:
        sys.exit(f"error: {file} is of {found['machine']}, and here is {here}; give another --out")
    return {
        name: Part(part["state"], part["seconds"], [Line(**row) for row in part["rows"]])
        for name, part in found["parts"].items()
    }


def table(day: Day) -> str:
    """All rows in Markdown."""
    lines = [f"{machine(day.device)}; {where()}", "", "| | | wanted | |", "|---|---|---|---|"]
    for name, part in day.parts.items():
        lines.append(f"| **{name}** ({part.state}, {part.seconds:.0f} s) | | | |")
        verdict = {None: "", True: "yes", False: "NO"}
        lines += [f"| {row.what} | {row.measured} | {row.wanted} | {verdict[row.good]} |" for row in part.rows]
    return "\n".join(lines) + "\n"


def main() -> int:
    """0; 1 if a part failed or a figure is not as wanted; 2 without a GPU; 3 if parts are left for lack of time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny encoders, for a look without a GPU")
    parser.add_argument("--steps", type=int, default=20, help="steps that are timed")
    parser.add_argument("--minutes", type=float, default=6.0, help="begin no part after these")
    parser.add_argument("--only", default="", help="parts whose name matches this regular expression")
    parser.add_argument("--out", type=Path, default=Path("gpu-day"))
    given = parser.parse_args()
    if given.device == "cuda" and not torch.cuda.is_available():
        print("error: no CUDA device here; a look without one: --device=cpu --small", file=sys.stderr)
        return 2
    device = torch.device(given.device, 0) if given.device == "cuda" else torch.device("cpu")
    given.out.mkdir(parents=True, exist_ok=True)
    before, engine = stored(given.out, machine(device)), gpu_step.choose_engine(device)
    print(machine(device))
    print("engine: DeepSpeed ZeRO-1" if engine == "deepspeed" else "engine: plain torch, as DeepSpeed is not installed")
    day = Day(device, given.small, given.steps, given.out, engine, time.monotonic() + 60 * given.minutes, before)
    asked = [(name, part) for name, part in parts(day) if re.search(given.only, name)]
    for name, part in asked:
        day.do(name, part)
    print(f"{given.out}/table.md and results.json")
    if any(name not in day.parts for name, _ in asked):
        return 3
    found = day.parts.values()
    return int(any(part.state == "failed" or any(row.good is False for row in part.rows) for part in found))


if __name__ == "__main__":
    sys.exit(main())
