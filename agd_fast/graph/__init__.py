"""A forward as a graph of tensor operations: captured, rewritten, and cut by what it depends on."""
