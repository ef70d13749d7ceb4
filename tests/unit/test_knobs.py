"""Settings from the environment."""

from pathlib import Path

import pytest

from tilelink import knobs


def test_default_and_override(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TILELINK_TIMEOUT", raising=False)
    assert knobs.TIMEOUT.get() == 10.0
    monkeypatch.setenv("TILELINK_TIMEOUT", "2.5")
    assert knobs.TIMEOUT.get() == 2.5


@pytest.mark.parametrize(
    ("name", "text"),
    [("TILELINK_TIMEOUT", "soon"), ("TILELINK_TIMEOUT", "-1"), ("TILELINK_ARENA_MB", "0")],
)
def test_nonsense_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, name: str, text: str) -> None:
    monkeypatch.setenv(name, text)
    knob = next(k for k in knobs.KNOBS if k.name == name)
    with pytest.raises(knobs.BadKnob, match=f"{name}={text}"):
        knob.get()


def test_every_knob_is_in_the_documentation() -> None:
    table = knobs.docs()
    assert [k.name for k in knobs.KNOBS if f"`{k.name}`" not in table] == []
    assert table in (Path(__file__).parents[2] / "README.md").read_text()
