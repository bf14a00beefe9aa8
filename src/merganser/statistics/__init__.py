"""What a data owner publishes: collecting Gram matrices, counts and Fisher information, and the file they live in."""
