"""From Python source and mapping text to Tile IR."""
