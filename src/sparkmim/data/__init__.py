"""Data: found, read, augmented, and put into batches."""
