"""Sizes of packs, micro-batches and steps, in tokens. Imports no torch: the options of a run are checked with these."""

SEQUENCES_PER_PACK = 16  # P = 16 sequences of full length


def pack_size(seq_length: int) -> int:
    """P, the tokens of a pack. Sizes of batches and micro-batches are multiples of it."""
    if seq_length < 8:
        raise ValueError(f"seq_length is {seq_length}: take at least 8, usually 128")
    return SEQUENCES_PER_PACK * seq_length


def check_sizes(batch_tokens: int, micro_tokens: int, pack_tokens: int, world: int) -> None:
    """Raises ``ValueError`` unless a micro-batch is whole packs and every rank has the same number of whole micro-batches."""
    for name, value, unit, why in (
        ("--micro-batch", micro_tokens, pack_tokens, f"packs of {pack_tokens} tokens"),
        ("--batch-tokens", batch_tokens, micro_tokens * world, f"{world} × micro-batches of {micro_tokens} tokens"),
    ):
        if value < 1 or value % unit:
            nearest = max(round(value / unit), 1) * unit
            raise ValueError(f"{name} is {value}, no positive multiple of {unit} ({why}): take {nearest}")
