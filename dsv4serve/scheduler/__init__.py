"""Which tokens run in the next step: admission, chunking, retraction, priorities. Torch-free."""

from dsv4serve.scheduler.scheduler import Scheduler
from dsv4serve.scheduler.stats import SchedulerStats

__all__ = ["Scheduler", "SchedulerStats"]
