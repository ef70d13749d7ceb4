"""Commands that pages of the documentation show."""

COMMAND = "    $ "


def shown(text: str) -> dict[str, str]:
    """The commands of a page, each with the indented text right below it."""
    found: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        if line.startswith(COMMAND):
            lines = found.setdefault(line.removeprefix(COMMAND), [])
        elif line.startswith("    "):
            lines.append(line.removeprefix("    "))
        else:
            lines = []
    return {command: "\n".join(lines) for command, lines in found.items()}
