"""A reduced ``tests.assurance.residency``: the proof and the simulator agree on which launches hang."""

from tests.assurance.residency import configurations, measure, proof_hangs, schedule_hangs


def test_proof_and_simulator_agree() -> None:
    found = measure(24, seed=0, schedules=30)
    assert found["agree"] == found["configurations"] == 24
    assert min(found["hang"], found["fine"]) >= 7


def test_all_resident_never_hangs() -> None:
    """The same programs with room for all: the positive control of the refusals above."""
    for configuration in configurations(10, seed=1):
        program = configuration.program
        roomy = program.with_ops(
            tuple(o.with_attrs(resident=64) if o.name == "launch" else o for o in program.body)
        )
        if "swap=True" not in configuration.words:
            assert not proof_hangs(roomy)
            assert not schedule_hangs(roomy, 3)
