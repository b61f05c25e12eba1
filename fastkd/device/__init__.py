"""The machine: its clock, its peaks, its power, its memory, and how it is described."""
