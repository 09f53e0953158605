"""What is tested and ranked: router logits, or the experts' log contributions."""
