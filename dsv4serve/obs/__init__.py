"""Logs (metrics and traces come with their issue). Imports nothing above."""
