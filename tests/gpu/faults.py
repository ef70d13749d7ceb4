"""Breaks ranks on real GPUs and sees what becomes of the others: ``python -m tests.gpu.faults --out FILE``.

Needs two or more GPUs; ``--cpu`` runs the same on the interpreter, with small shapes. This process never
touches a GPU: it imports everything once, keeps the store, and forks a process a rank for every start, so
that a start costs little more than a CUDA context. What each rank does is told to it over a pipe, and every
answer has a time limit; a rank that does not answer is a hang. Survivors of a death go on in a smaller
group, which is the group of the next death.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from multiprocessing import get_context
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

Reply = dict[str, Any]
TIMEOUT = 2.0  # TILELINK_TIMEOUT where an error is wanted
BEYOND = 2.0  # seconds beyond the limit within which every survivor must have its error
NAMED = ("WaitTimeout", "PeerTimeout", "PeerLost", "CallsDiffer")
FAULTS = ("kill", "lost", "straggler", "mismatch", "other", "absent", "exception", "graph")


class Ranks:
    """The processes of one start and what is said to them; ``members`` are those of the group now."""

    def __init__(
        self, start: int, world: int, port: int, cpu: bool, nccl: bool, arrival: float
    ) -> None:
        context = get_context("fork")
        self.members = list(range(world))
        self.pipes, self.processes = [], []
        for rank in range(world):
            ours, theirs = context.Pipe()
            spec: dict[str, Any] = {
                "rank": rank,
                "world": world,
                "port": port,
                "cpu": cpu,
                "start": start,
            }
            spec |= {"arrival": arrival, "nccl": nccl}
            process = context.Process(target=_serve, args=(theirs, spec), daemon=True)
            process.start()
            self.pipes.append(ours)
            self.processes.append(process)

    def tell(self, rank: int, **message: Any) -> None:
        """Sends a request to one rank."""
        self.pipes[rank].send(message)

    def hear(self, ranks: list[int], limit: float) -> dict[int, Reply]:
        """What each rank answers; ``{"hang": True}`` after ``limit`` seconds, and what died says so."""
        deadline = time.monotonic() + limit
        found: dict[int, Reply] = {}
        while len(found) < len(ranks):
            left = [r for r in ranks if r not in found]
            wait(
                [*(self.pipes[r] for r in left), *(self.processes[r].sentinel for r in left)],
                max(0.0, deadline - time.monotonic()),
            )
            for rank in left:
                if self.pipes[rank].poll():
                    try:
                        found[rank] = self.pipes[rank].recv()
                    except (EOFError, OSError):
                        found[rank] = {"died": True}
                elif self.processes[rank].exitcode is not None:
                    found[rank] = {"died": self.processes[rank].exitcode}
            if time.monotonic() >= deadline:
                for rank in left:
                    found.setdefault(rank, {"hang": True})
        return found

    def ask(self, limit: float, **message: Any) -> dict[int, Reply]:
        """The same request to every member, and their answers."""
        for rank in self.members:
            self.tell(rank, **message)
        return self.hear(self.members, limit)

    def kill(self, rank: int) -> float:
        """Ends a rank at once; the time of it."""
        pid = self.processes[rank].pid
        assert pid is not None
        now = time.monotonic()
        os.kill(pid, signal.SIGKILL)
        self.members.remove(rank)
        return now

    def close(self) -> None:
        """Ends all."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join(10.0)


class Bench:
    """Runs the faults and keeps what came of them."""

    def __init__(self, world: int, cpu: bool, seconds: float, seed: int) -> None:
        import torch.distributed as dist

        self.world, self.cpu = world, cpu
        store: Any = dist.TCPStore  # type: ignore[attr-defined]
        self.store = store("127.0.0.1", 0, None, True, wait_for_workers=False)
        self.deadline = time.monotonic() + seconds
        self.rows: list[dict[str, Any]] = []
        self.random = random.Random(seed)
        self.starts = 0
        self.skipped: list[str] = []
        # The interpreter is slow, and so is what shares its cores.
        self.slack = 6.0 if cpu else 0.0

    def start(self, arrival: float, nccl: bool = False) -> Ranks | None:
        """A fresh set of ranks, warmed up; None and a row where that fails."""
        self.starts += 1
        ranks = Ranks(self.starts, self.world, self.store.port, self.cpu, nccl, arrival)
        answers = ranks.hear(ranks.members, 90.0)
        if all(a.get("right") for a in answers.values()):
            return ranks
        self.rows.append({"fault": "start", "ok": False, "said": answers})
        _say(self.rows[-1])
        ranks.close()
        return None

    def time_for(self, name: str, seconds: float) -> bool:
        """Whether that many seconds are left; notes what is left out."""
        if time.monotonic() + seconds < self.deadline:
            return True
        self.skipped.append(name)
        return False

    def finish(
        self, ranks: Ranks, row: dict[str, Any], answers: dict[int, Reply], since: float | None
    ) -> bool:
        """Judges the errors, has the members recover and launch again, and writes the row.

        ``since``: when the fault happened; None where no error is wanted.
        """
        row["errors"] = {
            rank: {
                "error": a.get(
                    "error", "hang" if "hang" in a else str(a.get("crash", a.get("died")))
                ),
                "seconds": round(a["at"] - since, 3) if since and "at" in a else None,
                "said": a.get("said", ""),
            }
            for rank, a in sorted(answers.items())
        }
        limit = row["limit"] + BEYOND + self.slack
        found = row["errors"].values()
        if since is not None:
            row["named"] = all(e["error"] in NAMED for e in found)
            row["in_time"] = all(e["seconds"] is not None and e["seconds"] < limit for e in found)
            row["worst_s"] = max((e["seconds"] or 0.0 for e in found), default=0.0)
            row["nan"] = all(a.get("nan", False) for a in answers.values())
        else:
            row["named"] = row["in_time"] = all(e["error"] == "" for e in found)
        again = ranks.ask(60.0, do="recover") if since is not None else ranks.ask(30.0, do="verify")
        row["recovered_world"] = sorted({a.get("world", 0) for a in again.values()})
        row["recover_s"] = max((a.get("seconds", 0.0) for a in again.values()), default=0.0)
        row["right"] = all(a.get("right", False) for a in again.values())
        if not row["right"]:
            row["recovery"] = again
        row["hangs"] = sum("hang" in a for a in [*answers.values(), *again.values()])
        size = row["recovered_world"] == [len(ranks.members)]
        row["ok"] = bool(row["named"] and row["in_time"] and row["right"] and size)
        self.rows.append(row)
        _say(row)
        return bool(row["ok"])

    def kills(self, runs: int, nccl: bool) -> None:
        """SIGKILL of a random rank while calls are in flight, down to a group of one, start after start."""
        done, starts = 0, 0
        while done < runs and self.time_for("kill", 25.0):
            # The limit for arrival is long: what finds the death is the watchdog.
            ranks = self.start(60.0, nccl and starts == 0)
            starts += 1
            if ranks is None:
                return
            while done < runs and len(ranks.members) > 1 and self.time_for("kill", 12.0):
                row = {"fault": "kill", "run": done, "world": len(ranks.members), "limit": TIMEOUT}
                done += 1
                everyone = list(ranks.members)
                for rank in everyone:
                    ranks.tell(rank, do="calls", seconds=4.0)
                time.sleep(self.random.uniform(0.1, 0.6))
                victim = self.random.choice(everyone)
                since = ranks.kill(victim)
                row["killed"] = victim
                if not self.finish(ranks, row, ranks.hear(ranks.members, 30.0), since):
                    break
            ranks.close()

    def others(self, runs: int, names: list[str]) -> None:
        """All faults after which every rank is alive, in one start, and the graph last."""
        ranks = self.start(TIMEOUT)
        if ranks is None:
            return
        for name in names:
            for run in range(runs if name in ("lost", "straggler") else 1):
                if self.time_for(name, 15.0) and not getattr(self, name)(ranks, run):
                    ranks.close()
                    ranks = self.start(TIMEOUT)
                    if ranks is None:
                        return
        ranks.close()

    def _victim(self, ranks: Ranks) -> int:
        return self.random.choice(ranks.members)

    def lost(self, ranks: Ranks, run: int) -> bool:
        """What one rank pushes and signals to another one in one call goes nowhere."""
        victim = self._victim(ranks)
        peer = self.random.choice([r for r in ranks.members if r != victim])
        for rank in ranks.members:
            drop = peer if rank == victim else None
            ranks.tell(rank, do="lost", drop=drop, signals=self.random.randrange(2))
        row = {"fault": "lost", "run": run, "world": len(ranks.members), "limit": TIMEOUT}
        answers = ranks.hear(ranks.members, 30.0)
        since = answers.get(victim, {}).get("began")
        return self.finish(ranks, {**row, "from": victim, "to": peer}, answers, since or 0.0)

    def straggler(self, ranks: Ranks, run: int) -> bool:
        """A rank is 5 s late: an error with a limit of 2 s, nothing with one of 10 s, in turn."""
        patient = run % 2 == 0
        ranks.ask(60.0, do="recover", arrival=10.0 if patient else TIMEOUT)
        late = self._victim(ranks)
        began = time.monotonic()
        for rank in ranks.members:
            ranks.tell(rank, do="calls", calls=4, sleep=5.0 if rank == late else 0.0)
        answers = ranks.hear(ranks.members, 40.0)
        row: dict[str, Any] = {"fault": "straggler", "run": run, "world": len(ranks.members)}
        row |= {"late": late, "limit": 10.0 if patient else TIMEOUT}
        if not patient:
            # The late rank meets the error when it comes.
            if "at" in answers.get(late, {}):
                answers[late]["at"] -= 5.0 - TIMEOUT
            return self.finish(ranks, row, answers, began)
        fine = self.finish(ranks, row, answers, None)
        ranks.ask(60.0, do="recover", arrival=TIMEOUT)
        return fine

    def absent(self, ranks: Ranks, run: int) -> bool:
        """One rank never makes the call."""
        return self._without(ranks, {"do": "nothing"}, "absent", run)

    def exception(self, ranks: Ranks, run: int) -> bool:
        """One rank raises between two calls."""
        return self._without(ranks, {"do": "calls", "calls": 3, "fail_at": 1}, "exception", run)

    def _without(self, ranks: Ranks, message: dict[str, Any], name: str, run: int) -> bool:
        victim, began = self._victim(ranks), time.monotonic()
        for rank in ranks.members:
            ranks.tell(rank, **(message if rank == victim else {"do": "calls", "calls": 3}))
        answers = ranks.hear(ranks.members, 30.0)
        own = answers.pop(victim)
        row = {"fault": name, "run": run, "world": len(ranks.members), "limit": TIMEOUT}
        row |= {"victim": victim, "own": own.get("error", "")}
        return self.finish(ranks, row, answers, began)

    def mismatch(self, ranks: Ranks, run: int) -> bool:
        """One rank comes with another shape: an error on all before anything runs; no recovery needed."""
        victim, began = self._victim(ranks), time.monotonic()
        for rank in ranks.members:
            ranks.tell(rank, do="mismatch", wide=rank == victim)
        answers = ranks.hear(ranks.members, 30.0)
        again = ranks.ask(30.0, do="verify")
        row: dict[str, Any] = {"fault": "mismatch", "run": run, "world": len(ranks.members)}
        row["errors"] = {r: a.get("error", str(a)) for r, a in sorted(answers.items())}
        row["worst_s"] = round(max(a.get("at", 1e9) - began for a in answers.values()), 3)
        row["named"] = all(a.get("error") == "AgreementError" for a in answers.values())
        row["right"] = all(a.get("right", False) for a in again.values())
        row["hangs"] = sum("hang" in a for a in [*answers.values(), *again.values()])
        row["ok"] = row["named"] and row["right"] and row["hangs"] == 0
        self.rows.append(row)
        _say(row)
        return bool(row["ok"])

    def other(self, ranks: Ranks, run: int) -> bool:
        """One rank runs another program in the same call, and all of them know both."""
        victim = self._victim(ranks)
        ranks.ask(30.0, do="learn")
        began = time.monotonic()
        for rank in ranks.members:
            ranks.tell(rank, do="other", wide=rank == victim)
        row: dict[str, Any] = {"fault": "other", "run": run, "world": len(ranks.members)}
        answers = ranks.hear(ranks.members, 30.0)
        named = sum("called" in a.get("said", "") for a in answers.values())
        row |= {"limit": TIMEOUT, "victim": victim, "name_both": named}
        return self.finish(ranks, row, answers, began)

    def graph(self, ranks: Ranks, run: int) -> bool:
        """A captured graph is replayed while a rank dies."""
        if self.cpu:
            self.skipped.append("graph (no GPU)")
            return True
        captured = ranks.ask(40.0, do="capture")
        if not all(a.get("right") for a in captured.values()):
            self.rows.append({"fault": "graph", "ok": False, "said": captured})
            _say(self.rows[-1])
            return False
        everyone = list(ranks.members)
        for rank in everyone:
            ranks.tell(rank, do="replays", seconds=4.0)
        time.sleep(0.3)
        victim = self._victim(ranks)
        since = ranks.kill(victim)
        row = {
            "fault": "graph",
            "run": run,
            "world": len(everyone),
            "killed": victim,
            "limit": TIMEOUT,
        }
        return self.finish(ranks, row, ranks.hear(ranks.members, 30.0), since)


def _say(row: dict[str, Any]) -> None:
    print(json.dumps(row), file=sys.stderr, flush=True)


def _serve(pipe: Any, spec: dict[str, Any]) -> None:
    """A rank: answers requests until it is killed."""
    from tests.gpu.faults_rank import serve

    serve(pipe, spec)


def summary(bench: Bench, seconds: float) -> dict[str, Any]:
    """The figures of all rows."""
    by_fault = {}
    for name in FAULTS:
        rows = [row for row in bench.rows if row["fault"] == name]
        if rows:
            by_fault[name] = {
                "runs": len(rows),
                "ok": sum(row["ok"] for row in rows),
                "worst_s": max(row.get("worst_s", 0.0) for row in rows),
                "worst_recover_s": max(row.get("recover_s", 0.0) for row in rows),
            }
    return {
        "kind": "faults",
        "world": bench.world,
        "on": "interpreter" if bench.cpu else "cuda",
        "runs": len(bench.rows),
        "ok": sum(row["ok"] for row in bench.rows),
        "hangs": sum(row.get("hangs", 0) for row in bench.rows),
        "by_fault": by_fault,
        "timeout_s": TIMEOUT,
        "skipped": bench.skipped,
        "starts": bench.starts,
        "seconds": round(seconds, 1),
    }


def _gpus() -> int:
    """How many GPUs there are, without a CUDA context here."""
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    except OSError:
        return 0
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())


def main() -> int:
    """Runs the faults; 0 if every run was as it must be."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="file for all rows as JSON")
    parser.add_argument("--world", type=int, help="ranks (default: all GPUs, at most 8)")
    parser.add_argument("--runs", type=int, default=10, help="of kill, lost and straggler each")
    parser.add_argument(
        "--seconds", type=float, default=250.0, help="nothing new begins after that"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cpu", action="store_true", help="on the interpreter")
    parser.add_argument("faults", nargs="*", choices=[*FAULTS, []], default=[])
    args = parser.parse_args()
    os.environ["TILELINK_TIMEOUT"] = str(TIMEOUT)
    if args.cpu:
        os.environ |= {"TRITON_INTERPRET": "1", "TILELINK_ARENA_MB": "2", "OMP_NUM_THREADS": "1"}
    else:
        # Multicast objects are never needed, and can take a shared host's GPUs down.
        os.environ |= {"TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", "NCCL_NVLS_ENABLE": "0"}
    world = args.world or (3 if args.cpu else min(8, _gpus()))
    if world < 2:
        print("skipped: two GPUs are needed", file=sys.stderr)
        return 0
    import tests.gpu.faults_rank  # noqa: F401 - before the forks: it imports torch and Triton

    started = time.monotonic()
    bench = Bench(world, args.cpu, args.seconds, args.seed)
    wanted = args.faults or list(FAULTS)
    if "kill" in wanted:
        bench.kills(args.runs, nccl=True)
    rest = [name for name in FAULTS if name in wanted and name != "kill"]
    if rest:
        bench.others(args.runs, rest)
    found = summary(bench, time.monotonic() - started)
    if not args.cpu:
        # Not before: a process with a CUDA context must not fork.
        from bench import environment

        found = {**environment.describe(world), **found}
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps({**found, "rows": bench.rows}, indent=1) + "\n")
    print(json.dumps(found), flush=True)
    fine = found["ok"] == found["runs"] and found["runs"] > 0 and found["hangs"] == 0
    sys.stdout.flush()
    # No destructor waits for anything.
    os._exit(0 if fine else 1)


if __name__ == "__main__":
    raise SystemExit(main())
