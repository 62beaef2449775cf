"""Learning from a teacher: losses, and how they are summed without holding all logits."""
