"""What a sampling step costs: architectures with random weights, arms, counts, times and reports."""
