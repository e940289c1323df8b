"""Teachers and data for measuring fidelity to classifier-free guidance."""
