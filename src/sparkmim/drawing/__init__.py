"""What several pictures share: tensors as colours, figures, charts."""
