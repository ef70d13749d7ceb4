"""How kernels are run: the schedule type, defaults, and machine models."""

from tilelink.schedules.default import default_schedule
from tilelink.schedules.schedule import EMITTERS, ORDERS, Move, Schedule, ScheduleError

__all__ = ["EMITTERS", "ORDERS", "Move", "Schedule", "ScheduleError", "default_schedule"]
