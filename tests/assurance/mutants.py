"""Every mistake of docs/mutants.md in a grid of small programs, against the proof and the simulator.

``python -m tests.assurance.mutants`` breaks the programs of :mod:`grid` and asks the oracle, or both.
What one misses is explored in every interleaving; a mutant is set aside only where that shows it to be
equivalent. Intact programs are asked too: none may be refused, none may raise an alarm.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import multiprocessing
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.assurance.grid import Sample, prepared, samples, wide_grid
from tilelink.backend.mutate import Mutant, mutants
from tilelink.backend.mutate.judge import (
    DIFFERENT,
    EQUIVALENT,
    SCHEDULES,
    UNDECIDED,
    Trial,
    Truth,
    decide,
    prove,
    simulate,
)
from tilelink.errors import TilelinkError
from tilelink.ir import print_ir

ORACLES = ("proof", "simulator")


@dataclass(frozen=True, slots=True)
class Job:
    """A sample for one oracle: every ``step``-th of its mutants, and for the simulator ``runs`` runs of the intact
    program. ``known`` are the numbers of mutants whose truth is known already. Once a process has explored for
    ``budget`` seconds of its CPU, what is left is undecided.
    """

    oracle: str
    sample: Sample
    step: int
    runs: int
    known: frozenset[int]
    budget: float


@dataclass(frozen=True, slots=True)
class Said:
    """What one oracle said of the mutants of a sample: class, description and objection of each.

    ``decided``: of those that it said nothing of and whose truth was not known, number, text, truth and why.
    """

    sample: Sample
    words: tuple[tuple[str, str, str], ...]
    decided: tuple[tuple[int, str, str, str], ...]
    intact: str
    seconds: float  # of this process' CPU
    exploring: float  # the same, to decide


def ask(job: Job) -> Said:
    """One oracle on the mutants of a sample and on the sample itself; what it says nothing of is explored."""
    sample = job.sample
    program, trial = prepared(sample)
    start = time.process_time()
    checks: dict[str, Callable[[Any], str]] = {
        "proof": lambda p: prove(p, trial.kernel),
        "simulator": lambda p: simulate(p, trial),
    }
    check = checks[job.oracle]
    chosen = [m for n, m in enumerate(mutants(program)) if n % job.step == 0]
    said = [_safely(check, mutant.program) for mutant in chosen]
    objected = [_safely(check, program)]
    if job.oracle == "simulator":
        objected.append(_safely(lambda p: simulate(p, trial, job.runs, seed=1000), program))
    intact = next(("crash" if word is None else word for word in objected if word != ""), "")
    asked = time.process_time()
    decided = []
    for number, (mutant, word) in enumerate(zip(chosen, said, strict=True)):
        if not word and number not in job.known:
            # What the simulator has run to the end and found nothing in has the right numbers.
            right = job.oracle == "simulator" and word is not None
            decided.append((number, *explore(mutant, trial, right, job.budget)))
    words = ((m.name, m.description, word or "") for m, word in zip(chosen, said, strict=True))
    return Said(
        sample,
        tuple(words),
        tuple(decided),
        intact,
        asked - start,
        time.process_time() - asked,
    )


def _safely(check: Callable[[Any], str], program: Any) -> str | None:
    """What ``check`` says; None where it falls over.

    A crash is not a refusal: the mutant counts as missed, and as different unless explored otherwise.
    """
    try:
        return check(program)
    except Exception as error:
        print(f"  crash: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return None


_explored = 0.0  # CPU seconds of this process


def explore(mutant: Mutant, trial: Trial, right: bool, budget: float) -> tuple[str, str, str]:
    """The truth of a mutant: text (of one that is not equivalent), word, why. ``right``: see :func:`decide`."""
    global _explored
    start = time.process_time()
    if _explored > budget:
        truth = Truth(UNDECIDED, "no time left")
    else:
        try:
            truth = decide(mutant.program, trial, right=right)
        except Exception as error:
            truth = Truth(UNDECIDED, f"crash: {type(error).__name__}: {error}")
    _explored += time.process_time() - start
    why = " / ".join(truth.why.splitlines())
    if truth.word == EQUIVALENT:
        return "", truth.word, why
    head = f"# {mutant.name}: {mutant.description}\n# {truth.word}: {why}\n"
    return head + print_ir(mutant.program), truth.word, why


def prove_intact(sample: Sample) -> tuple[str, float]:
    """The proof on an intact program of the wide grid: what it objects to, or "", and its seconds."""
    try:
        program = sample.program()
    except TilelinkError as error:
        return f"{sample.name}: {error}", 0.0
    start = time.process_time()
    word = prove(program, sample.op())
    return f"{sample.name}: {word}" if word else "", time.process_time() - start


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; 0 if nothing was missed and nothing intact was objected to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--oracle", choices=(*ORACLES, "both"), default="both")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--step", type=int, default=1, help="only every STEP-th mutant")
    parser.add_argument("--programs", type=int, default=0, help="only so many programs (0: all)")
    parser.add_argument(
        "--intact", type=int, default=1000, help="runs and proofs of intact programs"
    )
    parser.add_argument(
        "--explore-seconds",
        type=float,
        default=600.0,
        help="CPU seconds that a process may explore",
    )
    parser.add_argument(
        "--survivors", metavar="DIR", help="write what was missed there, as IR text"
    )
    args = parser.parse_args(argv)
    chosen = samples()[: args.programs or None]
    result: dict[str, Any] = {"programs": len(chosen), "schedules": SCHEDULES}
    good = True
    truths: dict[tuple[str, int], tuple[str, str, str]] = {}
    context = multiprocessing.get_context("fork")
    with context.Pool(args.processes, initializer=_collect_seldom) as pool:
        for oracle in ORACLES if args.oracle == "both" else (args.oracle,):
            part = run_oracle(pool, oracle, chosen, args, truths)
            result[oracle] = part
            good &= part["missed"] == 0 and not part["intact_alarms"]
    print(json.dumps(result))
    return 0 if good else 1


def _collect_seldom() -> None:
    """What is there before the first job stays for good, and runs leave little that refers to itself."""
    gc.freeze()
    gc.set_threshold(100_000)


def run_oracle(
    pool: Any,
    oracle: str,
    chosen: Sequence[Sample],
    args: argparse.Namespace,
    truths: dict[tuple[str, int], tuple[str, str, str]],
) -> dict[str, Any]:
    """One oracle on everything; ``truths`` holds what exploration said, by sample and number."""
    start = time.perf_counter()
    runs = -(-args.intact // len(chosen))
    jobs = []
    for one in chosen:
        known = frozenset(number for name, number in truths if name == one.name)
        jobs.append(Job(oracle, one, args.step, runs, known, args.explore_seconds))
    said = []
    for answer in pool.imap(ask, jobs):
        said.append(answer)
        for number, text, truth, why in answer.decided:
            truths[answer.sample.name, number] = text, truth, why
        _progress(oracle, answer)
    part: dict[str, Any] = {"intact_runs": runs * len(chosen), "intact_alarms": []}
    if oracle == "proof":
        part = prove_wide(pool, args.intact, len(chosen))
    part["seconds"] = round(time.perf_counter() - start, 1)
    part["cpu_seconds"] = round(part.get("cpu_seconds", 0.0) + sum(s.seconds for s in said), 1)
    part["exploration_cpu_seconds"] = round(sum(s.exploring for s in said), 1)
    part["intact_alarms"] += [f"{s.sample.name}: {s.intact}" for s in said if s.intact]
    classes: dict[str, Counter[str]] = {}
    for answer in said:
        for number, (name, _, word) in enumerate(answer.words):
            counts = classes.setdefault(name, Counter())
            counts["mutants"] += 1
            if word:
                counts["found"] += 1
                counts[word] += 0
                continue
            text, truth, why = truths[answer.sample.name, number]
            counts[truth] += 1
            if truth != EQUIVALENT:
                print(f"  {oracle} missed: {answer.words[number][:2]} {why}", file=sys.stderr)
                _keep(args.survivors, oracle, answer.sample, number, name, text)
    total: Counter[str] = Counter()
    for counts in classes.values():
        total += counts
    words = (EQUIVALENT, DIFFERENT, UNDECIDED)
    part["mutants"], part["found"] = total["mutants"], total["found"]
    part |= {word: total[word] for word in words}
    part["missed"] = total[DIFFERENT] + total[UNDECIDED]
    part["classes"] = {
        name: {key: counts[key] for key in ("mutants", "found", *words)}
        for name, counts in classes.items()
    }
    part["objections"] = dict(
        sorted(Counter(word for s in said for _, _, word in s.words if word).items())
    )
    return part


def prove_wide(pool: Any, count: int, samples: int) -> dict[str, Any]:
    """The proof on ``count`` intact programs of the wide grid, beside those of the samples: what it objects to."""
    wide = list(wide_grid())[:count]
    answers = pool.map(prove_intact, wide, chunksize=8)
    median = statistics.median(seconds for _, seconds in answers)
    return {
        "intact_programs": len(wide) + samples,
        "intact_alarms": [word for word, _ in answers if word],
        "median_ms": round(1e3 * median, 2),
        "cpu_seconds": sum(seconds for _, seconds in answers),
    }


def _keep(
    folder: str | None, oracle: str, sample: Sample, number: int, name: str, text: str
) -> None:
    if folder is None:
        return
    place = Path(folder) / oracle
    place.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    (place / f"{name}.{sample.kernel}.{sample.resource}.{digest}.ir").write_text(text)


def _progress(oracle: str, said: Said) -> None:
    found = sum(bool(word) for _, _, word in said.words)
    text = f"{oracle}: {said.sample.name}: {found} of {len(said.words)} in {said.seconds:.1f} s"
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
