"""A session on a GPU that ends at a fixed time: its tasks, their order, how they run, and what is kept of them."""
