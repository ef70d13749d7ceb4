"""From Tile IR to a proven, running program."""
