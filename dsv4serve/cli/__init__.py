"""The dsv4serve command; thin."""
