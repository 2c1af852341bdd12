"""The network: tokens -> embedding -> looped stack of decoder layers -> logits."""
