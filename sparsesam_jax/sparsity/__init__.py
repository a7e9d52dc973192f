"""What a sparse encoder keeps: orders, importance, the plan of a forward, and what it computes."""
