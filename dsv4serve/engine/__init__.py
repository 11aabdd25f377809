"""The step loop, its process, IPC messages and supervision."""
