"""What is saved: from the objects of a training script to tensors with names and JSON documents, and back."""
