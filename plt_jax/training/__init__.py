"""Training: the loss, the optimizer, the jitted step, the loop around it, and its metrics."""
