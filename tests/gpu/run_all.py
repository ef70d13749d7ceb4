"""All GPU tests without pytest: ``python -m tests.gpu.run_all --out DIR``; the table comes last."""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.gpu import kernels
from tests.gpu.harness import Rank, failures, spawn
from tilelink.tuning.prepare import make_pool, prepare
from tilelink.tuning.problem import Problem

LIMITS = {
    "correctness": 420.0,
    "graph": 180.0,
    "varying": 300.0,
    "mismatch": 90.0,
    "late_mismatch": 90.0,
    "unequal": 90.0,
    "killed": 90.0,
    "subgroups": 90.0,
}
SHORT = {"TILELINK_TIMEOUT": "5", "TILELINK_ARRIVAL_TIMEOUT": "5"}


def run_test(
    name: str, world: int, only: str = "", gpus: int | None = None
) -> tuple[list[dict[str, Any]], list[Rank]]:
    """The rows that rank 0 wrote (none if it did not get that far) and what became of the ranks."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "rows.json"
        env = SHORT if name in ("killed", "late_mismatch", "unequal") else {}
        arguments = ["-m", "tests.gpu.worker", name, str(result), only]
        ranks = spawn(arguments, world, LIMITS[name], env, gpus)
        rows = json.loads(result.read_text()) if result.exists() else []
        # What correctness had found before it stopped.
        if not rows and name == "correctness":
            lines = [line for line in ranks[0].output.splitlines() if line.startswith("{")]
            rows = [json.loads(line) for line in lines]
        return rows, ranks


def compile_ahead(world: int, only: str) -> str:
    """Compiles the kernels of all cases of ``correctness``, many at once, so that its ranks find them in
    Triton's cache; says how long that took. What cannot be compiled is met again by the ranks."""
    started = time.monotonic()
    jobs = [
        (
            Problem(
                kernels.__file__, c.kernel, {"M": c.M, "K": c.K, "N": c.N}, world, c.dtype
            ).to_json(),
            kernels.schedule_for(c, world).to_json(),
        )
        for c in kernels.cases(only)
    ]
    with make_pool() as pool:
        done = list(pool.map(prepare, *zip(*jobs, strict=True)))
    failed = sum(one.path is None for one in done)
    seconds = time.monotonic() - started
    return f"{len(done)} cases compiled ahead in {seconds:.0f} s, {failed} not"


def _how(row: dict[str, Any]) -> str:
    """What moves the bytes, and who makes the code where that is not Triton."""
    emitter = str(row.get("emitter", "triton"))
    resource = str(row.get("resource", ""))
    short = {"copy_engine": "copy"}.get(resource, resource)
    return resource if emitter == "triton" else f"{emitter} {short}"


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as text, one a line."""
    lines = []
    for row in rows:
        what = row.get("test", row.get("kernel", ""))
        shape = "x".join(str(row[k]) for k in ("M", "K", "N") if k in row)
        error = row.get("error")
        lines.append(
            f"{'ok  ' if row['ok'] else 'FAIL'}  {what:14} {shape:16} {_how(row):12}"
            f"{row.get('dtype', ''):5} {'' if error is None else f'{error:.2e}':9}"
            f" host {row.get('host_us', '-')} us  gpu {row.get('gpu_us', '-')} us"
            f"  {row.get('refused', '')}{row.get('message', '').partition(chr(10))[0]}"
        )
    return "\n".join(lines)


def main() -> int:
    """Runs the tests that are named, or all; 0 if all passed."""
    import torch

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for gpu_tests.json")
    parser.add_argument("--world", type=int, default=torch.cuda.device_count())
    parser.add_argument(
        "--share", action="store_true", help="more ranks than GPUs: several take turns on each"
    )
    parser.add_argument("--only", default="", metavar="TEXT", help="correctness: only such cases")
    parser.add_argument("tests", nargs="*", choices=[*LIMITS, []], default=[])
    args = parser.parse_args()
    gpus = min(args.world, torch.cuda.device_count())
    if args.world < 2 or gpus < (1 if args.share else args.world):
        print(f"skipped: {args.world} ranks need as many CUDA devices, and at least two")
        return 0
    args.out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    trouble = []
    for name in args.tests or LIMITS:
        if name == "subgroups" and args.world < 4:
            continue
        if name == "correctness":
            print(compile_ahead(args.world, args.only), flush=True)
        found, ranks = run_test(name, args.world, args.only, gpus)
        rows += found
        problem = failures(ranks, killed=(1,) if name == "killed" else ())
        if problem:
            trouble.append(f"== {name}\n{problem}")
            rows.append({"test": name, "ok": False, "message": "see above"})
        if name in ("killed", "mismatch", "late_mismatch", "unequal"):
            said = [r.output.strip() for r in ranks]
            print("\n".join(f"-- {name}, rank {i}: {text[-900:]}" for i, text in enumerate(said)))
        facts = {
            "kind": "gpu_tests",
            "gpu": torch.cuda.get_device_name(0),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "world": args.world,
            "gpus": gpus,
            "rows": rows,
        }
        (args.out / "gpu_tests.json").write_text(json.dumps(facts, indent=1))
    print("\n".join(trouble))
    print(table(rows))
    passed = sum(bool(row["ok"]) for row in rows)
    print(f"{passed} of {len(rows)} passed, {args.world} ranks on {gpus} GPUs")
    return 0 if passed == len(rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
