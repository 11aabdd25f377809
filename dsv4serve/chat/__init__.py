"""Messages to prompt ids and generated ids back to text."""
