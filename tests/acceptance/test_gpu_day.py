"""`make gpu-day` with small encoders on the CPU: every part runs, or says what it needs."""

import json
from pathlib import Path

from tests.test_benchmarks import gpu_day


def test_every_part_runs_or_says_what_it_needs(tmp_path: Path) -> None:
    done = gpu_day(tmp_path)
    print(done.stdout)
    assert done.returncode == 0, done.stderr[-2000:] + done.stdout
    found = json.loads((tmp_path / "results.json").read_text())["parts"]
    left_out = {name: part["rows"][0]["what"] for name, part in found.items() if part["state"] == "left out"}
    assert left_out == {"decoding": "needs a GPU and torchvision"}
    assert {part["state"] for name, part in found.items() if name not in left_out} == {"done"}
    assert all(row["good"] is not False for part in found.values() for row in part["rows"])
    assert "engine: DeepSpeed ZeRO-1" in done.stdout
