"""What filters keep between calls."""
