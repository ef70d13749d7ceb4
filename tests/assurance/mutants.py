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
from functools import lru_cache
from pathlib import Path
from typing import Any

from tests.assurance.grid import Sample, prepared, samples, wide_grid
from tilelink.backend.mutate import Mutant, mutants
from tilelink.backend.mutate.judge import (
    DIFFERENT,
    EQUIVALENT,
    SCHEDULES,
    UNDECIDED,
    Truth,
    decide,
    prove,
    simulate,
)
from tilelink.errors import TilelinkError
from tilelink.ir import print_ir

ORACLES = ("proof", "simulator")


@dataclass(frozen=True, slots=True)
class Said:
    """What one oracle said of the mutants of a sample: class, description and objection of each.

    ``crashed``: the numbers of those over which it fell, so that it said nothing.
    """

    sample: Sample
    words: tuple[tuple[str, str, str], ...]
    crashed: frozenset[int]
    intact: str
    seconds: float  # of this process' CPU


def ask(job: tuple[str, Sample, int]) -> Said:
    """One oracle on all mutants of a sample (every ``step``-th), and on the sample itself."""
    oracle, sample, step = job
    program, trial = prepared(sample)
    start = time.process_time()
    checks: dict[str, Callable[[Any], str]] = {
        "proof": lambda p: prove(p, trial.kernel),
        "simulator": lambda p: simulate(p, trial),
    }
    check = checks[oracle]
    words: list[tuple[str, str, str]] = []
    crashed: set[int] = set()
    for number, mutant in enumerate(mutants(program)):
        if number % step == 0:
            word = _safely(check, mutant.program)
            crashed |= {len(words)} if word is None else set()
            words.append((mutant.name, mutant.description, word or ""))
    intact = _safely(check, program) or ""
    return Said(sample, tuple(words), frozenset(crashed), intact, time.process_time() - start)


def _safely(check: Callable[[Any], str], program: Any) -> str | None:
    """What ``check`` says; None where it falls over.

    A crash is not a refusal: the mutant counts as missed, and as different unless explored otherwise.
    """
    try:
        return check(program)
    except Exception as error:
        print(f"  crash: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return None


@lru_cache(maxsize=2)
def _chosen(sample: Sample, step: int) -> list[Mutant]:
    """Every ``step``-th mutant of a sample: jobs of one sample follow each other."""
    return [m for n, m in enumerate(mutants(prepared(sample)[0])) if n % step == 0]


def explore(
    job: tuple[Sample, int, tuple[int, ...], float, frozenset[int]],
) -> list[tuple[int, str, str, str]]:
    """The truth of the mutants of a sample with these numbers: (number, text, word, why).

    Past the deadline (seconds since the epoch) what is left is undecided. The last of a job are the numbers of
    those that the simulator has run to the end and found nothing in.
    """
    sample, step, wanted, deadline, right = job
    _, trial = prepared(sample)
    found = []
    for number in wanted:
        mutant = _chosen(sample, step)[number]
        if time.time() > deadline:
            truth = Truth(UNDECIDED, "no time left")
        else:
            try:
                truth = decide(mutant.program, trial, right=number in right)
            except Exception as error:
                truth = Truth(UNDECIDED, f"crash: {type(error).__name__}: {error}")
        why = " / ".join(truth.why.splitlines())
        head = f"# {mutant.name}: {mutant.description}\n# {truth.word}: {why}\n"
        found.append((number, head + print_ir(mutant.program), truth.word, why))
    return found


def intact_alarms(job: tuple[Sample, int]) -> tuple[str, float]:
    """The simulator on an intact program under so many schedules: what it objects to, and CPU seconds."""
    sample, schedules = job
    program, trial = prepared(sample)
    start = time.process_time()
    return simulate(program, trial, schedules, seed=1000), time.process_time() - start


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
    parser.add_argument("--explore-seconds", type=float, default=600.0)
    parser.add_argument(
        "--survivors", metavar="DIR", help="write what was missed there, as IR text"
    )
    args = parser.parse_args(argv)
    chosen = samples()[: args.programs or None]
    result: dict[str, Any] = {"programs": len(chosen), "schedules": SCHEDULES}
    good = True
    truths: dict[str, tuple[str, str, str]] = {}
    context = multiprocessing.get_context("fork")
    # What is there before the first job stays for good: no collection need look at it again.
    with context.Pool(args.processes, initializer=gc.freeze) as pool:
        for oracle in ORACLES if args.oracle == "both" else (args.oracle,):
            part = run_oracle(pool, oracle, chosen, args, truths)
            result[oracle] = part
            good &= part["missed"] == 0 and not part["intact_alarms"]
    print(json.dumps(result))
    return 0 if good else 1


def run_oracle(
    pool: Any,
    oracle: str,
    chosen: Sequence[Sample],
    args: argparse.Namespace,
    truths: dict[str, tuple[str, str, str]],
) -> dict[str, Any]:
    """One oracle on everything; ``truths`` holds what exploration said, by mutant."""
    start = time.perf_counter()
    said = []
    for answer in pool.imap(ask, [(oracle, sample, args.step) for sample in chosen]):
        said.append(answer)
        _progress(oracle, answer)
    part = intact(pool, oracle, chosen, args)
    part["seconds"] = round(time.perf_counter() - start, 1)
    part["cpu_seconds"] = round(part["cpu_seconds"] + sum(s.seconds for s in said), 1)
    part["intact_alarms"] += [f"{s.sample.name}: {s.intact}" for s in said if s.intact]
    before = time.perf_counter()
    decide_missed(pool, oracle, said, args, truths)
    part["exploration_seconds"] = round(time.perf_counter() - before, 1)
    classes: dict[str, Counter[str]] = {}
    for answer in said:
        for number, (name, _, word) in enumerate(answer.words):
            counts = classes.setdefault(name, Counter())
            counts["mutants"] += 1
            if word:
                counts["found"] += 1
                counts[word] += 0
                continue
            text, truth, why = truths[_key(answer.sample, number)]
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


def intact(
    pool: Any, oracle: str, chosen: Sequence[Sample], args: argparse.Namespace
) -> dict[str, Any]:
    """How many intact programs, or runs of them, were asked about, and what was objected to."""
    if oracle == "simulator":
        each = -(-args.intact // len(chosen))
        words = pool.map(intact_alarms, [(sample, each) for sample in chosen], chunksize=1)
        alarms = [f"{s.name}: {w}" for s, (w, _) in zip(chosen, words, strict=True) if w]
        return {
            "intact_runs": each * len(chosen),
            "intact_alarms": alarms,
            "cpu_seconds": sum(seconds for _, seconds in words),
        }
    wide = list(wide_grid())[: args.intact]
    answers = pool.map(prove_intact, wide, chunksize=8)
    refused = [word for word, _ in answers if word]
    median = statistics.median(seconds for _, seconds in answers)
    return {
        "intact_programs": len(wide) + len(chosen),
        "intact_alarms": refused,
        "median_ms": round(1e3 * median, 2),
        "cpu_seconds": sum(seconds for _, seconds in answers),
    }


def decide_missed(
    pool: Any,
    oracle: str,
    said: Sequence[Said],
    args: argparse.Namespace,
    truths: dict[str, tuple[str, str, str]],
) -> None:
    """Explores what ``oracle`` missed and is not in ``truths`` yet."""
    deadline = time.time() + args.explore_seconds
    jobs = []
    for answer in said:
        missed = [n for n, (_, _, word) in enumerate(answer.words) if not word]
        new = [n for n in missed if _key(answer.sample, n) not in truths]
        right = frozenset(new) - answer.crashed if oracle == "simulator" else frozenset[int]()
        # One job a mutant of a slow program would build it again; a few each keep both processes busy.
        jobs += [
            (answer.sample, args.step, tuple(new[at : at + 8]), deadline, right)
            for at in range(0, len(new), 8)
        ]
    for job, found in zip(jobs, pool.imap(explore, jobs), strict=True):
        for number, text, word, why in found:
            truths[_key(job[0], number)] = (text, word, why)


def _key(sample: Sample, number: int) -> str:
    return f"{sample.name}#{number}"


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
