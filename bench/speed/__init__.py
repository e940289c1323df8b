"""What a step of sampling costs: architectures with random weights, arms, counts, times and how they are shown."""
