"""A reduced ``tests.assurance.residency``: the proof and the simulator agree on which launches hang."""

import itertools

from tests.assurance.residency import (
    beside_roles,
    configurations,
    measure,
    mixed,
    proof_hangs,
    schedule_hangs,
)


def test_proof_and_simulator_agree() -> None:
    found = measure(24, seed=0, schedules=30, beside=12)
    assert found["agree"] == found["configurations"] == 36
    assert mixed(found)


def test_all_resident_never_hangs() -> None:
    """The same programs with room for all: the positive control of the refusals above."""
    for configuration in itertools.chain(configurations(10, seed=1), beside_roles(5, seed=1)):
        program = configuration.program
        roomy = program.with_ops(
            tuple(o.with_attrs(resident=64) if o.name == "launch" else o for o in program.body)
        )
        if "swap=True" not in configuration.words:
            assert not proof_hangs(roomy)
            assert not schedule_hangs(roomy, 3)
