"""Meta's `segment_anything.utils`, as far as clients take it."""
