"""An outside judge: emitted kernels under GSan, the global memory sanitizer of Triton 3.8 and later.

    python -m tests.gpu.gsan --out DIR            # 2 GPUs, a Triton with GSan first on PYTHONPATH

GSan keeps vector clocks of every CTA and finds accesses that nothing orders, across the GPUs of a host. It
sees tile loads and stores, TMA among them, and `tl.atomic_*`; neither copy engines nor inline assembly. So
the kernels whose CTAs move the data are judged (`sm:N`, `epilogue`), with TMA and with pointers in its
place; the broken ones beside them must be reported. Of the read-modify-writes that raise a counter GSan
follows only the last one's release, so those acquire here too (`tests.gpu.weak.joined_notify`).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench import environment

WORLD = 2
CALLS = 4
EXTENTS = {"M": 256, "K": 128, "N": 256}
PROGRAMS = (
    ("ag_gemm", "sm:4"),
    ("gemm_rs", "sm:4"),
    ("gemm_rs", "epilogue"),
    ("gemm_ar", "epilogue"),
)
_WAIT = r"device\.peer_tile_wait\((?:[^()]|\([^()]*\))*\)"
# What is broken, in which program, and how the text changes.
BROKEN: dict[str, tuple[str, str, Callable[[str], str]]] = {
    "dropped wait": ("gemm_rs", "epilogue", lambda s: re.sub(_WAIT, "0", s)),
    "dropped wait of a gathered tile": ("ag_gemm", "sm:4", lambda s: re.sub(_WAIT, "0", s)),
    "stale epoch": ("gemm_rs", "epilogue", lambda s: s.replace("ctx.epoch,", "ctx.epoch - 1,")),
    "relaxed notify": (
        "gemm_ar",
        "epilogue",
        lambda s: s.replace("device.counted_tile_notify(", "weak.relaxed_notify("),
    ),
    "notify at gpu scope": (
        "gemm_ar",
        "epilogue",
        lambda s: s.replace("device.counted_tile_notify(", "weak.narrow_notify("),
    ),
    "no acknowledgement awaited": (
        "gemm_rs",
        "epilogue",
        lambda s: s.replace("device.open_call(", "weak.deaf_call("),
    ),
}


def source_of(kind: str, resource: str, pointers: bool) -> tuple[Any, str]:
    """A program of `tilelink.kernels` and its emitted text; ``pointers``: no access goes through TMA."""
    import tilelink.kernels
    from tests.gpu.reliability import schedule_of
    from tilelink.backend.emit.triton import emit
    from tilelink.backend.pipeline import compile_kernel

    op = getattr(tilelink.kernels, kind).build(EXTENTS, world=WORLD)
    schedule = replace(schedule_of(op, resource), workers=12)
    program = compile_kernel(op, schedule)
    if pointers:
        program = _without_tma(program)
    return program, emit(program)


def _without_tma(op: Any) -> Any:
    attrs = tuple((k, v) for k, v in op.attrs if k != "via")
    blocks = tuple(replace(b, ops=tuple(_without_tma(o) for o in b.ops)) for b in op.blocks)
    return replace(op, attrs=attrs, blocks=blocks)


def worker(name: str, pointers: bool) -> None:
    """One rank: some calls of one program, or of all; every output is compared."""
    import torch
    import torch.distributed as dist
    import triton
    from triton.experimental import gsan
    from triton.experimental.gsan import symmetric_memory

    from tests.gpu.integers import Problem
    from tilelink.backend.runtime import load_module, write_module
    from tilelink.backend.runtime.image import image_of
    from tilelink.backend.runtime.views import Views, clear_words
    from tilelink.device import head_kernel
    from tilelink.ir import layout

    # Every poll of a wait takes a place in GSan's buffer of clocks.
    os.environ.setdefault("TRITON_GSAN_CLOCK_BUFFER_SIZE", "12000")
    rank = int(os.environ["RANK"])
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", device_id=torch.device("cuda", rank))
    group = dist.group.WORLD
    pool = gsan.create_mem_pool()

    class Call(Views):
        """Runs an emitted host function by plain launches, which GSan instruments."""

        def head(self, ack_wait: bool = True) -> None:
            head_kernel[(1,)](*self.head_arguments(ack_wait), num_warps=4)

        def begin(self) -> None:
            pass

        def launch(self, kernel: Any, workers: int, args: Any, **options: Any) -> None:
            kernel[(workers,)](*args, **{k: v for k, v in options.items() if k.startswith("num_")})

    intact = name not in BROKEN
    programs = (PROGRAMS[int(name)],) if intact else (BROKEN[name][:2],)
    for kind, resource in programs:
        program, text = source_of(kind, resource, pointers)
        # GSan takes a release by read-modify-write for the only one of its word.
        for name_ in ("delayed_tile_notify", "producer_tile_notify"):
            text = text.replace(f"device.{name_}(", "weak.joined_notify(")
        if not intact:
            broken = BROKEN[name][2](text)
            assert broken != text, name
            text = broken
        text = text.replace(
            "from tilelink import device\n",
            "from tests.gpu import weak\nfrom tilelink import device\n",
        )
        module = load_module(write_module(text, program.symbol))
        image = image_of(program)
        arena = symmetric_memory.empty(image.arena_bytes, dtype=torch.uint8, device="cuda")
        arena.zero_()
        clear_words(arena)
        handle = symmetric_memory.rendezvous(arena, group)
        views = [
            arena if r == rank else handle.get_buffer(r, (image.arena_bytes,), torch.uint8, 0)
            for r in range(WORLD)
        ]
        with torch.cuda.use_mem_pool(pool):
            m, k, n = EXTENTS.values()
            triton.knobs.compilation.instrumentation_mode = ""
            problem = Problem(kind, m, k, n, "bf16", rank, WORLD, lambda a, b, out: None)
            peers = torch.tensor([v.data_ptr() for v in views], dtype=torch.int64, device="cuda")
            size = max(image.workspace_bytes, 16)
            workspace = torch.empty(size, dtype=torch.uint8, device="cuda")
        call = Call(image, rank, views, peers, 20.0, 20.0)
        call.tensors = {"A": problem.a, "B": problem.b, "C": problem.out}
        call.workspace = workspace
        torch.cuda.synchronize()
        dist.barrier()
        torch.cuda.synchronize()
        for _ in range(CALLS):
            triton.knobs.compilation.instrumentation_mode = ""
            problem.begin()
            problem.reference()
            triton.knobs.compilation.instrumentation_mode = "gsan"
            module.host(call)
            if not image.ended:
                first, last = image.counter_words
                call.arena[first:last] = 0
                call.arena[layout.ENDED] = call.arena[layout.EPOCH]
            triton.knobs.compilation.instrumentation_mode = ""
            problem.compare()
        torch.cuda.synchronize()
        print(
            json.dumps(
                {
                    "kernel": kind,
                    "resource": resource,
                    "pointers": pointers,
                    "calls": CALLS,
                    "wrong_elements": int(problem.wrong),
                }
            ),
            flush=True,
        )
    sys.stdout.flush()
    os._exit(0)


def _bare(text: str) -> str:
    """``text`` without the folders of the machine that said it."""
    return re.sub(r"(?:/[\w.-]+)+/", "", text)


def judge(name: str, pointers: bool, limit: float) -> dict[str, Any]:
    """Runs one case on both GPUs; what GSan said of it."""
    from tests.gpu.harness import spawn

    arguments = ["-m", "tests.gpu.gsan", "--worker", name, *(["--pointers"] if pointers else [])]
    # GSan's state grows with the devices that a process sees.
    env = {"CUDA_VISIBLE_DEVICES": ",".join(map(str, range(WORLD)))}
    for _ in range(3):
        ranks = spawn(arguments, WORLD, limit, env)
        # A free port may be taken by another case before it is used.
        if not any("EADDRINUSE" in r.output for r in ranks):
            break
    text = "\n".join(r.output for r in ranks)
    found = re.search(r"[^\n]*(?:Read after|Write after|race|[Rr]ead.*[Ww]rite)[^\n]*", text)
    reports = re.findall(r"[^\n]*Assertion `[^\n]*", text)
    rows = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    return {
        "name": name,
        "pointers": pointers,
        "codes": [r.code for r in ranks],
        "reported": _bare(reports[0] if reports else (found[0] if found else "")),
        "rows": rows,
        "tail": "" if rows and not reports else _bare(text.strip().splitlines()[-1]),
        "seconds": round(max(r.seconds for r in ranks), 1),
    }


def main() -> int:
    """Judge intact and broken kernels; 1 where an intact one is reported or a broken one is not."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder for the JSON")
    parser.add_argument("--worker", default="")
    parser.add_argument("--pointers", action="store_true")
    parser.add_argument("--limit", type=float, default=100)
    parser.add_argument("--broken", action="store_true", help="judge the broken kernels too")
    parser.add_argument("--at-once", type=int, default=4, help="cases at the same time")
    parser.add_argument("--only", default="", help="cases whose name holds this")
    options = parser.parse_args()
    if options.worker:
        worker(options.worker, options.pointers)
        return 0
    environment.prepare()

    # An intact program goes by its number.
    cases = [(str(n), pointers) for pointers in (True, False) for n in range(len(PROGRAMS))]
    if options.broken:
        cases += [(name, True) for name in BROKEN]
    labels = {str(n): " ".join(("intact", *PROGRAMS[n])) for n in range(len(PROGRAMS))}
    cases = [case for case in cases if options.only in labels.get(case[0], case[0])]
    with ThreadPoolExecutor(options.at_once) as pool:
        rows = list(pool.map(lambda c: judge(c[0], c[1], options.limit), cases))
    for row in rows:
        intact = row["name"] not in BROKEN
        if intact:
            row["name"] = labels[row["name"]]
        clean = not row["reported"] and all(c == 0 for c in row["codes"])
        right = (
            clean
            and len(row["rows"]) == WORLD
            and not any(r["wrong_elements"] for r in row["rows"])
        )
        row["ok"] = right if intact else bool(row["reported"])
        print(json.dumps(row)[:1800], flush=True)
    data = {"kind": "gsan", **environment.describe(WORLD), **EXTENTS, "rows": rows}
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "gsan.json").write_text(json.dumps(data, indent=1) + "\n")
    return 0 if all(row["ok"] for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
