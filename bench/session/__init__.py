"""A session on a GPU that ends at a fixed time: which tasks there are, in which order, how they run, what of them is kept."""
