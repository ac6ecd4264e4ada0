"""What is measured on batches: ranges of activations, biases, equal channels."""
