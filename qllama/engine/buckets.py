"""Few shapes, so that few programs are compiled: sizes are rounded up to powers of two."""


def bucket(size: int, smallest: int = 1, largest: int | None = None) -> int:
    """The smallest power of two that is at least `size` and `smallest`, but not over `largest`."""
    rounded = max(smallest, 1 << max(size - 1, 0).bit_length())
    return rounded if largest is None else min(rounded, largest)
