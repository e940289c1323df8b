"""What distillation keeps in memory: a budget from shapes alone, and measurements."""
