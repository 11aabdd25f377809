"""Logs, metrics, traces. Imports nothing above."""
