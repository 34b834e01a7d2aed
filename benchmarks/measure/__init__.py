"""Error, time, memory, ceilings, tiles: one file for each thing that is measured."""
